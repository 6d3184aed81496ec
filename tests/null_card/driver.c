/* CUDA's driver on a card that computes nothing. */
#include "card.h"

int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "%s", card_name()); return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = attribute(which); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = memory(); return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = handle; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuCtxGetCurrent(void **context) { *context = handle; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuMemGetInfo_v2(size_t *left, size_t *total) { *total = memory(); *left = *total - (512ul << 20); return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = handle; return 0; }
int cuModuleLoad(void **module, const char *file) { *module = handle; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = handle; return 0; }
int cuFuncGetAttribute(int *value, int which, void *function) { *value = which ? 0 : 1024; return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { *count = 1; return 0; }
int cuPointerGetAttribute(void *value, int which, unsigned long long pointer) {
  *(unsigned long long *)value = pointer; /* CU_POINTER_ATTRIBUTE_DEVICE_POINTER */
  return 0;
}
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "error of the null card"; return 0; }
int cuGetErrorName(int error, const char **text) { *text = "nullCardError"; return 0; }

/* Memory that grows (``expandable_segments``) */
int cuMemGetAllocationGranularity(size_t *bytes, void *what, int option) { *bytes = 2 << 20; return 0; }
int cuMemAddressReserve(void **at, size_t bytes, size_t align, void *wish, unsigned long long flags) {
  *at = reserve(bytes);
  return 0;
}
int cuMemAddressFree(void *at, size_t bytes) { return munmap(at, bytes); }
int cuMemCreate(unsigned long long *made, size_t bytes, void *what, unsigned long long flags) { *made = 1; return 0; }
int cuGetProcAddress_v2(const char *name, void **at, int version, unsigned long long flags, int *found) {
  *at = dlsym(RTLD_DEFAULT, name);
  if (found) *found = *at ? 0 : 1;
  return *at ? 0 : 500; /* CUDA_ERROR_NOT_FOUND */
}
