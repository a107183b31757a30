/* Classify an image with an export of smallfry and ONNX Runtime's C API.
 *
 *   smallfry export RUN --to exports/mine --form whole
 *   cc -O2 -I ORT/include classify.c -L ORT/lib -lonnxruntime -lm -o classify
 *   ./classify exports/mine/model.onnx photo.ppm
 *
 * The image is a binary PPM or PGM of the model's size (P6 for colour, P5 for grey). Classes, size,
 * mean and standard deviation are read from the metadata of model.onnx. Of several recursion steps,
 * the last counts.
 */
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "onnxruntime_c_api.h"

#define SHOWN 3 /* classes */

static const OrtApi *ort;

static void fail(const char *what, const char *why) {
  fprintf(stderr, "classify: %s: %s\n", what, why);
  exit(1);
}

static void check(OrtStatus *status) {
  if (status == NULL) return;
  fail("ONNX Runtime", ort->GetErrorMessage(status));
}

/* Return an entry of the model's metadata, as JSON. */
static char *entry(const OrtModelMetadata *metadata, OrtAllocator *allocator, const char *key) {
  char *value = NULL;
  check(ort->ModelMetadataLookupCustomMetadataMap(metadata, allocator, key, &value));
  if (value == NULL) fail(key, "is not in the model's metadata: export it with smallfry");
  return value;
}

/* Read a JSON list of count numbers. */
static void read_numbers(const char *json, double *into, int count, const char *key) {
  const char *at = strchr(json, '[');
  for (int i = 0; i < count; i++) {
    char *end = NULL;
    if (at == NULL) fail(key, "has too few numbers");
    into[i] = strtod(at + 1, &end);
    if (end == at + 1) fail(key, "has no number");
    at = strchr(end, i + 1 < count ? ',' : ']');
  }
}

/* Cut a JSON list of texts into its texts, in place; return how many there are. */
static int read_texts(char *json, char **into, int most) {
  int count = 0;
  char *at = json;
  while ((at = strchr(at, '"')) != NULL && count < most) {
    char *to = into[count++] = at + 1;
    for (at++; *at != '"' && *at != '\0'; at++) {
      if (*at == '\\' && at[1] != '\0') at++;
      *to++ = *at;
    }
    if (*at != '\0') at++;
    *to = '\0';
  }
  return count;
}

/* Read the next number of a PPM header, past white space and comments. */
static int header_number(FILE *file) {
  int c = fgetc(file), number = 0;
  while (isspace(c) || c == '#') {
    if (c == '#') while (c != '\n' && c != EOF) c = fgetc(file);
    c = fgetc(file);
  }
  for (; isdigit(c) && number < 100000; c = fgetc(file)) number = 10 * number + c - '0';
  return number; /* the white space behind it has been read */
}

/* Read pixels (height, width, channels) of a PPM or PGM of this very size. */
static unsigned char *read_image(const char *path, int channels, int height, int width) {
  FILE *file = fopen(path, "rb");
  if (file == NULL) fail(path, "can't be opened");
  const char *magic = channels == 3 ? "P6" : "P5";
  if (fgetc(file) != magic[0] || fgetc(file) != magic[1])
    fail(path, channels == 3 ? "is no binary PPM (P6)" : "is no binary PGM (P5)");
  int columns = header_number(file), rows = header_number(file), most = header_number(file);
  if (columns != width || rows != height || most != 255) {
    char words[120];
    snprintf(words, sizeof words, "is %d x %d with values to %d; the model takes %d x %d and 255",
             columns, rows, most, width, height);
    fail(path, words);
  }
  size_t bytes = (size_t)height * width * channels;
  unsigned char *pixels = malloc(bytes);
  if (pixels == NULL || fread(pixels, 1, bytes, file) != bytes) fail(path, "is truncated");
  fclose(file);
  return pixels;
}

int main(int argc, char **argv) {
  if (argc != 3) fail("usage", "classify MODEL.onnx IMAGE.ppm");
  ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (ort == NULL) fail("ONNX Runtime", "is older than the header that this was compiled with");

  OrtEnv *env;
  OrtSessionOptions *options;
  OrtSession *session;
  OrtAllocator *allocator;
  OrtModelMetadata *metadata;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "classify", &env));
  check(ort->CreateSessionOptions(&options));
  check(ort->SetIntraOpNumThreads(options, 1));
  check(ort->CreateSession(env, argv[1], options, &session));
  check(ort->GetAllocatorWithDefaultOptions(&allocator));
  check(ort->SessionGetModelMetadata(session, &metadata));

  int channels = atoi(entry(metadata, allocator, "channels"));
  int height = atoi(entry(metadata, allocator, "height"));
  int width = atoi(entry(metadata, allocator, "width"));
  if (channels != 1 && channels != 3) fail(argv[1], "takes inputs that are no images");
  double mean[3], std[3];
  read_numbers(entry(metadata, allocator, "mean"), mean, channels, "mean");
  read_numbers(entry(metadata, allocator, "std"), std, channels, "std");
  char *names = entry(metadata, allocator, "classes");
  int most = (int)strlen(names) + 1;
  char **classes = malloc(most * sizeof *classes);
  int count = read_texts(names, classes, most);
  if (count < 1) fail("classes", "are missing");

  unsigned char *pixels = read_image(argv[2], channels, height, width);
  size_t places = (size_t)height * width;
  float *input = malloc(places * channels * sizeof *input);
  for (int c = 0; c < channels; c++) {
    float scale = (float)(1 / (255 * std[c])), shift = (float)(-mean[c] / std[c]);
    for (size_t i = 0; i < places; i++)
      input[c * places + i] = (float)pixels[i * channels + c] * scale + shift;
  }

  OrtMemoryInfo *memory;
  OrtValue *images, *logits = NULL;
  int64_t shape[4] = {1, channels, height, width};
  check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  check(ort->CreateTensorWithDataAsOrtValue(memory, input, places * channels * sizeof *input, shape,
                                            4, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &images));
  const char *inputs[] = {"images"}, *outputs[] = {"logits"};
  check(ort->Run(session, NULL, inputs, (const OrtValue *const *)&images, 1, outputs, 1, &logits));

  OrtTensorTypeAndShapeInfo *found;
  size_t values;
  float *data;
  check(ort->GetTensorTypeAndShape(logits, &found));
  check(ort->GetTensorShapeElementCount(found, &values));
  check(ort->GetTensorMutableData(logits, (void **)&data));
  if (values < (size_t)count) fail(argv[1], "has fewer outputs than classes");
  data += values - count; /* of the last recursion step */

  double top = data[0], total = 0;
  for (int i = 1; i < count; i++) top = data[i] > top ? data[i] : top;
  for (int i = 0; i < count; i++) total += exp(data[i] - top);
  for (int rank = 0; rank < SHOWN && rank < count; rank++) {
    int best = 0;
    for (int i = 1; i < count; i++) best = data[i] > data[best] ? i : best;
    printf("%s %.6f\n", classes[best], exp(data[best] - top) / total);
    data[best] = -INFINITY;
  }

  ort->ReleaseTensorTypeAndShapeInfo(found);
  ort->ReleaseValue(logits);
  ort->ReleaseValue(images);
  ort->ReleaseMemoryInfo(memory);
  ort->ReleaseModelMetadata(metadata);
  ort->ReleaseSession(session);
  ort->ReleaseSessionOptions(options);
  ort->ReleaseEnv(env);
  free(input);
  free(pixels);
  free(classes);
  return 0;
}
