// Classify images with an export of smallfry in a C++ program: a class to copy.
//
//   smallfry export RUN --to exports/mine --form whole
//   c++ -std=c++17 -O2 -I ORT/include classify.cpp -L ORT/lib -lonnxruntime -o classify
//   ./classify exports/mine/model.onnx 3 32 32 < pixels
//
// Standard input is one image as raw bytes, (height, width, channels); the program prints the
// logits of the last recursion step. Mean and standard deviation are in the model's metadata.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_c_api.h"

namespace {

const OrtApi* const ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string reason = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  throw std::runtime_error(reason);
}

template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

// Classifier of images of one size; an object serves one thread at a time.
class Classifier {
 public:
  explicit Classifier(const std::string& model, int threads = 1)
      : env_(nullptr, ort->ReleaseEnv), session_(nullptr, ort->ReleaseSession) {
    OrtEnv* env = nullptr;
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "classify", &env));
    env_.reset(env);
    OrtSessionOptions* options = nullptr;
    check(ort->CreateSessionOptions(&options));
    const Owned<OrtSessionOptions> owned(options, ort->ReleaseSessionOptions);
    check(ort->SetIntraOpNumThreads(options, threads));
    OrtSession* session = nullptr;
    check(ort->CreateSession(env, model.c_str(), options, &session));
    session_.reset(session);
    OrtModelMetadata* metadata = nullptr;
    check(ort->SessionGetModelMetadata(session, &metadata));
    const Owned<OrtModelMetadata> described(metadata, ort->ReleaseModelMetadata);
    mean_ = numbers(metadata, "mean");
    std_ = numbers(metadata, "std");
  }

  // Compute the logits of pixels (height, width, channels); those of all recursion steps.
  std::vector<float> logits(const std::vector<std::uint8_t>& pixels, int height, int width) const {
    const std::size_t channels = mean_.size(), places = std::size_t(height) * width;
    if (pixels.size() != places * channels) throw std::invalid_argument("pixels of another size");
    std::vector<float> input(pixels.size());
    for (std::size_t c = 0; c < channels; ++c) {
      const auto scale = float(1 / (255 * std_[c])), shift = float(-mean_[c] / std_[c]);
      for (std::size_t i = 0; i < places; ++i)
        input[c * places + i] = float(pixels[i * channels + c]) * scale + shift;
    }
    OrtMemoryInfo* memory = nullptr;
    check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    const Owned<OrtMemoryInfo> of_cpu(memory, ort->ReleaseMemoryInfo);
    const std::int64_t shape[] = {1, std::int64_t(channels), height, width};
    OrtValue *images = nullptr, *found = nullptr;
    check(ort->CreateTensorWithDataAsOrtValue(memory, input.data(), input.size() * sizeof(float),
                                              shape, 4, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                              &images));
    const Owned<OrtValue> given(images, ort->ReleaseValue);
    const char *inputs[] = {"images"}, *outputs[] = {"logits"};
    const OrtValue* values[] = {images};
    check(ort->Run(session_.get(), nullptr, inputs, values, 1, outputs, 1, &found));
    const Owned<OrtValue> answer(found, ort->ReleaseValue);
    OrtTensorTypeAndShapeInfo* about = nullptr;
    check(ort->GetTensorTypeAndShape(found, &about));
    const Owned<OrtTensorTypeAndShapeInfo> form(about, ort->ReleaseTensorTypeAndShapeInfo);
    std::size_t count = 0;
    check(ort->GetTensorShapeElementCount(about, &count));
    void* data = nullptr;
    check(ort->GetTensorMutableData(found, &data));
    const auto* first = static_cast<const float*>(data);
    return {first, first + count};
  }

 private:
  // Read a JSON list of numbers from the metadata.
  static std::vector<double> numbers(const OrtModelMetadata* metadata, const char* key) {
    OrtAllocator* allocator = nullptr;
    check(ort->GetAllocatorWithDefaultOptions(&allocator));
    char* json = nullptr;
    check(ort->ModelMetadataLookupCustomMetadataMap(metadata, allocator, key, &json));
    if (json == nullptr) throw std::runtime_error(std::string(key) + " is not in the metadata");
    std::vector<double> found;
    for (const char* at = json; *at != '\0' && *at != ']'; ++at)
      if (*at == '[' || *at == ',') found.push_back(std::strtod(at + 1, nullptr));
    return found;
  }

  Owned<OrtEnv> env_;
  Owned<OrtSession> session_;
  std::vector<double> mean_, std_;
};

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 5) throw std::invalid_argument("usage: classify MODEL.onnx CHANNELS HEIGHT WIDTH");
  const int channels = std::atoi(argv[2]), height = std::atoi(argv[3]), width = std::atoi(argv[4]);
  if (channels < 1 || height < 1 || width < 1) throw std::invalid_argument("sizes are at least 1");
  std::vector<std::uint8_t> pixels(std::size_t(channels) * height * width);
  if (std::fread(pixels.data(), 1, pixels.size(), stdin) != pixels.size())
    throw std::invalid_argument("standard input is shorter than an image");
  for (const float logit : Classifier(argv[1]).logits(pixels, height, width))
    std::printf("%.9g\n", logit);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "classify: %s\n", error.what());
  return 1;
}
