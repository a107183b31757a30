/* Declarations of the functions of ONNX Runtime that the examples call, for their test alone.
 *
 * The table of functions only grows at its end, so these places hold for every version from 1.4.
 * A program of one's own takes the header that ONNX Runtime is released with.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ORT_API_VERSION 4

typedef struct OrtAllocator OrtAllocator;
typedef struct OrtEnv OrtEnv;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtModelMetadata OrtModelMetadata;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtStatus OrtStatus;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtValue OrtValue;

typedef enum { ORT_LOGGING_LEVEL_WARNING = 2 } OrtLoggingLevel;
typedef enum { OrtArenaAllocator = 1 } OrtAllocatorType;
typedef enum { OrtMemTypeDefault = 0 } OrtMemType;
typedef enum { ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1 } ONNXTensorElementDataType;

typedef void (*OrtUnused)(void);

typedef struct OrtApi {
  OrtUnused unused_0[2];
  const char *(*GetErrorMessage)(const OrtStatus *); /* 2 */
  OrtStatus *(*CreateEnv)(OrtLoggingLevel, const char *, OrtEnv **);
  OrtUnused unused_4[3];
  OrtStatus *(*CreateSession)(const OrtEnv *, const char *, const OrtSessionOptions *,
                              OrtSession **); /* 7 */
  OrtUnused unused_8[1];
  OrtStatus *(*Run)(OrtSession *, const OrtRunOptions *, const char *const *,
                    const OrtValue *const *, size_t, const char *const *, size_t,
                    OrtValue **); /* 9 */
  OrtStatus *(*CreateSessionOptions)(OrtSessionOptions **);
  OrtUnused unused_11[13];
  OrtStatus *(*SetIntraOpNumThreads)(OrtSessionOptions *, int); /* 24 */
  OrtUnused unused_25[24];
  OrtStatus *(*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo *, void *, size_t,
                                               const int64_t *, size_t, ONNXTensorElementDataType,
                                               OrtValue **); /* 49 */
  OrtUnused unused_50[1];
  OrtStatus *(*GetTensorMutableData)(OrtValue *, void **); /* 51 */
  OrtUnused unused_52[12];
  OrtStatus *(*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo *, size_t *); /* 64 */
  OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *, OrtTensorTypeAndShapeInfo **);
  OrtUnused unused_66[3];
  OrtStatus *(*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo **); /* 69 */
  OrtUnused unused_70[8];
  OrtStatus *(*GetAllocatorWithDefaultOptions)(OrtAllocator **); /* 78 */
  OrtUnused unused_79[13];
  void (*ReleaseEnv)(OrtEnv *); /* 92 */
  void (*ReleaseStatus)(OrtStatus *);
  void (*ReleaseMemoryInfo)(OrtMemoryInfo *);
  void (*ReleaseSession)(OrtSession *);
  void (*ReleaseValue)(OrtValue *);
  OrtUnused unused_97[2];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *); /* 99 */
  void (*ReleaseSessionOptions)(OrtSessionOptions *);
  OrtUnused unused_101[10];
  OrtStatus *(*SessionGetModelMetadata)(const OrtSession *, OrtModelMetadata **); /* 111 */
  OrtUnused unused_112[4];
  OrtStatus *(*ModelMetadataLookupCustomMetadataMap)(const OrtModelMetadata *, OrtAllocator *,
                                                     const char *, char **); /* 116 */
  OrtUnused unused_117[1];
  void (*ReleaseModelMetadata)(OrtModelMetadata *); /* 118 */
} OrtApi;

typedef struct OrtApiBase {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

const OrtApiBase *OrtGetApiBase(void);

#ifdef __cplusplus
}
#endif
