/* CUDA's runtime, cuBLAS and NCCL on a card that computes nothing: memory is real, kernels return at once. */
#include "card.h"
#include <cuda_runtime_api.h>

#define LARGE (1 << 20)
static size_t next_id = 0x1000;

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return 0; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return 0; }
const char *cudaGetErrorString(cudaError_t error) { return "error of the null card"; }
const char *cudaGetErrorName(cudaError_t error) { return "nullCardError"; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) { snprintf(id, size, "0000:00:00.0"); return 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int from, int to) { *can = 0; return 0; }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
  *value = attribute(which);
  return 0;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *it, int device) {
  memset(it, 0, sizeof *it);
  snprintf(it->name, sizeof it->name, "%s", card_name());
  it->totalGlobalMem = memory();
  it->major = attribute(75);
  it->minor = attribute(76);
  it->multiProcessorCount = attribute(16);
  it->sharedMemPerBlock = attribute(8);
  it->sharedMemPerBlockOptin = attribute(97);
  it->sharedMemPerMultiprocessor = attribute(81);
  it->regsPerBlock = it->regsPerMultiprocessor = attribute(82);
  it->warpSize = attribute(10);
  it->maxThreadsPerBlock = attribute(1);
  it->maxThreadsPerMultiProcessor = attribute(39);
  it->l2CacheSize = 50 << 20;
  it->maxThreadsDim[0] = it->maxThreadsDim[1] = 1024;
  it->maxThreadsDim[2] = 64;
  it->maxGridSize[0] = 2147483647;
  it->maxGridSize[1] = it->maxGridSize[2] = 65535;
  it->unifiedAddressing = 1;
  return 0;
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) { *total = memory(); *left = *total - (512ul << 20); return 0; }

/* Streams and events: all work has ended when it is asked for. */
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
static int new_id(void *made) { *(size_t *)made = next_id += 8; return 0; }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return new_id(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return new_id(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { return new_id(stream); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = 0; return 0; }
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
  *status = 0;
  return 0;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return new_id(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return new_id(event); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) { *ms = 1; return 0; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) { call(data); return 0; }

/* Memory is the host's, and takes no room before it is written. Large copies to it are left out: nobody reads them. */
cudaError_t cudaMalloc(void **to, size_t bytes) { *to = reserve(bytes); return 0; }
cudaError_t cudaMallocAsync(void **to, size_t bytes, cudaStream_t stream) { *to = reserve(bytes); return 0; }
cudaError_t cudaHostAlloc(void **to, size_t bytes, unsigned flags) { return posix_memalign(to, 4096, bytes ? bytes : 1); }
cudaError_t cudaFreeHost(void *it) { free(it); return 0; }
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  if (bytes < LARGE) memmove(to, from, bytes);
  return 0;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) { if (bytes < LARGE) memset(to, value, bytes); return 0; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
  return cudaMemset(to, value, bytes);
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *it, const void *pointer) {
  memset(it, 0, sizeof *it);
  return 0;
}

/* Kernels */
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *it, const void *kernel) {
  memset(it, 0, sizeof *it);
  it->maxThreadsPerBlock = 1024;
  it->binaryVersion = it->ptxVersion = capability();
  it->numRegs = 32;
  it->maxDynamicSharedSizeBytes = attribute(8);
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *count, const void *kernel, int threads, size_t shared, unsigned flags) {
  *count = 2;
  return 0;
}
cudaError_t cudaGetSymbolAddress(void **at, const void *symbol) { *at = handle; return 0; }
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *entry) { *kernel = (cudaKernel_t)entry; return 0; }
cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  return 0;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  grid->x = grid->y = grid->z = block->x = block->y = block->z = 1;
  *shared = 0;
  *(void **)stream = 0;
  return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **at, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *found) {
  static void *driver;
  if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  *at = driver ? dlsym(driver, name) : 0;
  if (found) *found = *at ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return 0;
}

/* cuBLAS */
int cublasCreate_v2(void **made) { *made = handle; return 0; }
int cublasLtCreate(void **made) { *made = handle; return 0; }
int cublasGetMathMode(void *of, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *of, int *mode) { *mode = 0; return 0; }
int cublasGetVersion_v2(void *of, int *version) { *version = 130000; return 0; }
size_t cublasLtGetVersion(void) { return 130000; }
const char *cublasGetStatusString(int status) { return "status of the null card"; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { *made = handle; return 0; }
int cublasLtMatrixLayoutCreate(void **made, int type, uint64_t rows, uint64_t columns, int64_t lead) {
  *made = handle;
  return 0;
}
int cublasLtMatmulPreferenceCreate(void **made) { *made = handle; return 0; }
int cublasLtMatmulAlgoGetHeuristic(
    void *of, void *product, void *a, void *b, void *c, void *d, void *preference, int wanted, char *result,
    int *found) {
  memset(result, 0, 96); /* a cublasLtMatmulHeuristicResult_t */
  *found = 1;
  return 0;
}

/* NCCL, for one rank */
int ncclGetVersion(int *version) { *version = 22707; return 0; }
int ncclGetUniqueId(void *id) { memset(id, 7, 128); return 0; }
struct id { char bytes[128]; };
int ncclCommInitRank(void **made, int ranks, struct id id, int rank) { *made = handle; return 0; }
int ncclCommInitRankConfig(void **made, int ranks, struct id id, int rank, void *config) { *made = handle; return 0; }
int ncclCommSplit(void *from, int color, int key, void **made, void *config) { *made = handle; return 0; }
int ncclCommCount(void *of, int *ranks) { *ranks = 1; return 0; }
int ncclCommUserRank(void *of, int *rank) { *rank = 0; return 0; }
int ncclCommCuDevice(void *of, int *device) { *device = 0; return 0; }
int ncclCommGetAsyncError(void *of, int *error) { *error = 0; return 0; }
const char *ncclGetErrorString(int error) { return "error of the null card"; }
const char *ncclGetLastError(void *of) { return "none"; }
