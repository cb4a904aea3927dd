/* A stand-in for libcudart: what a launcher compiled by nvcc calls, without a driver or a GPU. A kernel launch goes to a callback
   (cudart.py), which runs the kernel's PTX in the emulator; memory is the caller's own, so copies and fills are plain ones.
   Signatures as in the CUDA Runtime API reference; __cuda* are those that nvcc generates calls to. */
#include <stddef.h>
#include <string.h>

typedef struct { unsigned x, y, z; } dim3;
typedef int (*launch_callback)(const char *kernel, const unsigned *extents, size_t shared, void **arguments, int shared_limit);

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_DEVICE_FUNCTION = 98, FUNCTIONS = 4096 };

static launch_callback callback;
static int last_error, streaming_multiprocessors = 132, major = 9, minor = 0, maximum_shared = 232448, l2_bytes = 50 << 20;

static struct { const void *host; const char *name; int shared_limit; } functions[FUNCTIONS];
static int function_count;

static struct { dim3 grid, block; size_t shared; void *stream; } configurations[64];
static int depth;

void stub_set_callback(launch_callback given) { callback = given; last_error = SUCCESS; }

void stub_set_device(int multiprocessors, int major_version, int minor_version, int shared_optin, int l2) {
  streaming_multiprocessors = multiprocessors;
  major = major_version;
  minor = minor_version;
  maximum_shared = shared_optin;
  l2_bytes = l2;
}

static int fail(int error) { return last_error = error; }

static int find(const void *host) {
  for (int i = function_count - 1; i >= 0; i--)
    if (functions[i].host == host) return i;
  return -1;
}

/* Registration, by code that nvcc generates and that runs when the library is loaded. */
void **__cudaRegisterFatBinary(void *binary) { static void *handle; (void)binary; return &handle; }
void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { (void)handle; }
char __cudaInitModule(void **handle) { (void)handle; return 0; }
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *tid, void *bid, void *block, void *grid, int *warp) {
  (void)handle; (void)device; (void)limit; (void)tid; (void)bid; (void)block; (void)grid; (void)warp;
  if (function_count < FUNCTIONS) {
    functions[function_count].host = host;
    functions[function_count].name = name;
    functions[function_count++].shared_limit = 0;
  }
}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size, int constant, int global) {
  (void)handle; (void)host; (void)device; (void)name; (void)external; (void)size; (void)constant; (void)global;
}

/* kernel<<<grid, block, shared, stream>>>(...) */
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  if (depth == 64) return INVALID_VALUE;
  configurations[depth].grid = grid;
  configurations[depth].block = block;
  configurations[depth].shared = shared;
  configurations[depth++].stream = stream;
  return SUCCESS;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
  if (!depth) return INVALID_VALUE;
  *grid = configurations[--depth].grid;
  *block = configurations[depth].block;
  *shared = configurations[depth].shared;
  *stream = configurations[depth].stream;
  return SUCCESS;
}
int cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
  (void)stream;
  int i = find(function);
  if (i < 0) return fail(INVALID_DEVICE_FUNCTION);
  unsigned extents[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  for (int k = 0; k < 6; k++)
    if (!extents[k]) return fail(9); /* cudaErrorInvalidConfiguration */
  int error = callback ? callback(functions[i].name, extents, shared, arguments, functions[i].shared_limit) : 35; /* no driver */
  return error ? fail(error) : SUCCESS;
}
int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return SUCCESS; }
int __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
int __cudaLaunchKernel_ptsz(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
typedef struct { dim3 grid, block; size_t shared; void *stream; void *attributes; unsigned count; } launch_configuration;
int cudaLaunchKernelExC(const launch_configuration *c, const void *function, void **arguments) {
  return cudaLaunchKernel(function, c->grid, c->block, arguments, c->shared, c->stream);
}

/* Errors */
int cudaGetLastError(void) { int error = last_error; last_error = SUCCESS; return error; }
int cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorString(int error) {
  return error == SUCCESS ? "no error" : error == 719 ? "the emulator found a fault in the kernel" : "an error of the emulated CUDA runtime";
}
const char *cudaGetErrorName(int error) { return error == SUCCESS ? "cudaSuccess" : "cudaErrorEmulated"; }

/* Memory: device memory is host memory here. */
int cudaMemsetAsync(void *target, int value, size_t count, void *stream) { (void)stream; memset(target, value, count); return SUCCESS; }
int cudaMemset(void *target, int value, size_t count) { memset(target, value, count); return SUCCESS; }
int cudaMemcpyAsync(void *target, const void *source, size_t count, int kind, void *stream) {
  (void)kind; (void)stream;
  memmove(target, source, count);
  return SUCCESS;
}
int cudaMemcpy(void *target, const void *source, size_t count, int kind) { return cudaMemcpyAsync(target, source, count, kind, 0); }

/* Devices and streams */
int cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
int cudaSetDevice(int device) { return device == 0 ? SUCCESS : fail(101); /* cudaErrorInvalidDevice */ }
int cudaGetDeviceCount(int *count) { *count = 1; return SUCCESS; }
int cudaStreamSynchronize(void *stream) { (void)stream; return SUCCESS; }
int cudaDeviceSynchronize(void) { return SUCCESS; }
int cudaStreamIsCapturing(void *stream, int *status) { (void)stream; *status = 0; return SUCCESS; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  switch (attribute) { /* numbers of cudaDeviceAttr; an H100's figures unless stub_set_device said otherwise */
    case 1: *value = 1024; break;                         /* MaxThreadsPerBlock */
    case 2: case 3: *value = 1024; break;                 /* MaxBlockDimX, Y */
    case 4: *value = 64; break;                           /* MaxBlockDimZ */
    case 5: *value = 2147483647; break;                   /* MaxGridDimX */
    case 6: case 7: *value = 65535; break;                /* MaxGridDimY, Z */
    case 8: *value = 49152; break;                        /* MaxSharedMemoryPerBlock */
    case 10: *value = 32; break;                          /* WarpSize */
    case 12: *value = 65536; break;                       /* MaxRegistersPerBlock */
    case 16: *value = streaming_multiprocessors; break;   /* MultiProcessorCount */
    case 38: *value = l2_bytes; break;                    /* L2CacheSize */
    case 39: *value = 2048; break;                        /* MaxThreadsPerMultiProcessor */
    case 75: *value = major; break;                       /* ComputeCapabilityMajor */
    case 76: *value = minor; break;                       /* ComputeCapabilityMinor */
    case 81: *value = maximum_shared + 1024; break;       /* MaxSharedMemoryPerMultiprocessor */
    case 82: *value = 65536; break;                       /* MaxRegistersPerMultiprocessor */
    case 95: *value = 1; break;                           /* CooperativeLaunch */
    case 97: *value = maximum_shared; break;              /* MaxSharedMemoryPerBlockOptin */
    case 106: *value = 32; break;                         /* MaxBlocksPerMultiprocessor */
    case 111: *value = 1024; break;                       /* ReservedSharedMemoryPerBlock */
    default: return fail(INVALID_VALUE);
  }
  return SUCCESS;
}

/* Functions */
int cudaFuncSetAttribute(const void *function, int attribute, int value) {
  int i = find(function);
  if (i < 0) return fail(INVALID_DEVICE_FUNCTION);
  if (attribute == 8) { /* MaxDynamicSharedMemorySize */
    if (value > maximum_shared) return fail(INVALID_VALUE);
    functions[i].shared_limit = value;
  }
  return SUCCESS;
}
int cudaFuncSetCacheConfig(const void *function, int config) { (void)function; (void)config; return SUCCESS; }
struct attributes { size_t shared, constant, local; int threads, registers, ptx, binary, cache, dynamic, carveout; };
int cudaFuncGetAttributes(struct attributes *into, const void *function) {
  (void)function;
  memset(into, 0, sizeof *into);
  into->threads = 1024;
  into->registers = 32;
  into->ptx = into->binary = 10 * major + minor;
  return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int block, size_t shared, unsigned flags) {
  (void)function; (void)flags;
  if (block <= 0 || block > 1024) return fail(INVALID_VALUE);
  int by_threads = 2048 / block, by_shared = shared ? (int)((maximum_shared + 1024) / (shared + 1024)) : 32;
  *blocks = by_threads < by_shared ? by_threads : by_shared;
  if (*blocks > 32) *blocks = 32;
  return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int block, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, block, shared, 0);
}
