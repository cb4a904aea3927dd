// Reductions over a block in one fixed order: sums pair up lanes by a butterfly and then go through the warps from
// first to last, so their bits do not depend on anything but the values.
#pragma once
#include "segment.cuh"

namespace fastcalib::cuda {

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int step = 16; step; step /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, step));
    return v;
}

__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
    return v;
}

// Four sums at the price of one and a half: lanes first share out the sums among them. Lanes 0, 8, 16 and 24 end with
// the sums of a, b, c and d.
__device__ __forceinline__ double warp_sum_of_four(double a, double b, double c, double d) {
    const bool upper = lane_index() & 16, odd = lane_index() & 8;
    double first = upper ? c : a, second = upper ? d : b;
    first += __shfl_xor_sync(kAllLanes, upper ? a : c, 16);
    second += __shfl_xor_sync(kAllLanes, upper ? b : d, 16);
    double sum = odd ? second : first;
    sum += __shfl_xor_sync(kAllLanes, odd ? first : second, 8);
#pragma unroll
    for (int step = 4; step; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return sum;
}

// Two sums in every lane, at little more than the price of one.
__device__ __forceinline__ double2 warp_sum_of_two(double a, double b) {
    const bool upper = lane_index() & 16;
    double sum = upper ? b : a;
    sum += __shfl_xor_sync(kAllLanes, upper ? a : b, 16);
#pragma unroll
    for (int step = 8; step; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return make_double2(__shfl_sync(kAllLanes, sum, 0), __shfl_sync(kAllLanes, sum, 16));
}

// What a warp's logits of a segment add to its spread: their number n, where finite, their sum, and n^2 times their
// variance, which needs no division yet.
struct WarpSpread {
    double sum, excess;
    int n, flags;
};

// Shared memory of the reductions below. Each use has its own fields, so that one barrier serves each.
struct ReduceMemory {
    float top[kWarps];
    WarpSpread spread[kWarps];
    double four[2][kWarps][4];
    int argmax;
};

__device__ __forceinline__ double over_warps(const double* parts) {
    double sum = parts[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += parts[w];
    return sum;
}

__device__ __forceinline__ float over_warps(const float* tops) {
    float top = tops[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, tops[w]);
    return top;
}

}  // namespace fastcalib::cuda
