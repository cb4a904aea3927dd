// A log-sum-exp of rows of bfloat16 with a CUB block reduction, and a histogram in dynamic shared memory: what test_cudart.py runs.
#include <cstdint>
#include <cub/block/block_reduce.cuh>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

struct State { float m, s; };
struct Merge {
  __device__ State operator()(const State &a, const State &b) const {
    float m = fmaxf(a.m, b.m);
    if (m == -INFINITY) return {m, 0.f};
    return {m, a.s * exp2f(a.m - m) + b.s * exp2f(b.m - m)};
  }
};

template <int THREADS>
__global__ void __launch_bounds__(THREADS) lse_kernel(const __nv_bfloat16 *__restrict__ x, float *__restrict__ out, int columns, int64_t stride) {
  using Reduce = cub::BlockReduce<State, THREADS>;
  __shared__ typename Reduce::TempStorage storage;
  const __nv_bfloat16 *row = x + (int64_t)blockIdx.x * stride;
  State state{-INFINITY, 0.f};
  Merge merge;
  int vectors = columns / 8;
  for (int i = threadIdx.x; i < vectors; i += THREADS) {
    uint4 packed = reinterpret_cast<const uint4 *>(row)[i];
    const __nv_bfloat162 *pairs = reinterpret_cast<const __nv_bfloat162 *>(&packed);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float2 values = __bfloat1622float2(pairs[j]);
      state = merge(state, State{values.x * 1.44269504f, 1.f});
      state = merge(state, State{values.y * 1.44269504f, 1.f});
    }
  }
  for (int i = vectors * 8 + threadIdx.x; i < columns; i += THREADS) state = merge(state, State{__bfloat162float(row[i]) * 1.44269504f, 1.f});
  State whole = Reduce(storage).Reduce(state, merge);
  if (threadIdx.x == 0) out[blockIdx.x] = (whole.m + log2f(whole.s)) * 0.69314718f;
}

struct Settings { const int *values; int *bins; int count; };

__global__ void histogram_kernel(Settings settings, int bins) {
  extern __shared__ int counts[];
  for (int i = threadIdx.x; i < bins; i += blockDim.x) counts[i] = 0;
#ifndef WITHOUT_BARRIER
  __syncthreads();
#endif
  for (int i = threadIdx.x; i < settings.count; i += blockDim.x) atomicAdd(&counts[settings.values[i]], 1);
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += blockDim.x) atomicAdd(&settings.bins[i], counts[i]);
}

extern "C" int launch_lse(const void *x, float *out, int rows, int columns, int64_t stride, cudaStream_t stream) {
  lse_kernel<256><<<rows, 256, 0, stream>>>((const __nv_bfloat16 *)x, out, columns, stride);
  return (int)cudaGetLastError();
}

extern "C" int launch_histogram(const int *values, int *bins, int count, int size, int ask, cudaStream_t stream) {
  int device = -1, multiprocessors = 0, blocks = 0;
  if (cudaGetDevice(&device) || cudaSetDevice(device)) return -1;
  if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) return -1;
  if (ask && cudaFuncSetAttribute(histogram_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, size * 4)) return -1;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, histogram_kernel, 128, size * 4) || blocks < 1) return -1;
  if (cudaMemsetAsync(bins, 0, size * 4, stream)) return -1;
  histogram_kernel<<<1, 128, size * 4, stream>>>(Settings{values, bins, count}, size);
  return (int)cudaGetLastError();
}
