// What a segment adds to its row: maximum, spread and the sums of powers (row_state.h), from the registers of one
// block.
#pragma once
#include "../row_state.h"
#include "reduce.cuh"

namespace fastcalib::cuda {

// One segment's part of a row's Head, as it waits in the workspace.
struct SegmentHead {
    double mean, m2;  // of the finite logits
    float top;
    int argmax;  // column within the segment; -1: nothing finite
    int n;       // finite logits
    int flags;
};
enum SegmentFlags : int { kHasMasked = 1, kIsUndefined = 2 };

// Relative error 2^-22 over the whole range (PTX ISA, ex2): 1e-7 of a probability, a twentieth of what the results may
// be off. Arguments are clamped to [-126, 0], so a result is never a denormal and what is flushed is below 2^-126.
__device__ __forceinline__ float power_of_two(float t) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
    return e;
}

// Intrinsics say of each step how it is rounded; CMakeLists.txt, why nothing else may be fused.
template <bool Moments> struct PowerSums {
    float s0[2] = {0, 0}, s1[2] = {0, 0}, s2[2] = {0, 0}, r2[2] = {0, 0};  // even and odd elements: chains of 32 terms

    __device__ __forceinline__ void add(int parity, float e, float t) {
        s0[parity] = __fadd_rn(s0[parity], e);
        if constexpr (Moments) {
            const float et = __fmul_rn(e, t);
            s1[parity] = __fadd_rn(s1[parity], et);
            s2[parity] = __fmaf_rn(et, t, s2[parity]);
            r2[parity] = __fmaf_rn(e, e, r2[parity]);
        }
    }
};

// Sums at one temperature, c = log2(e) / T. visit(number of the vector, its powers) sees every power on the way; one
// ex2 serves everything. Lanes 0, 8, 16, 24 of each warp leave s0, s1, s2, r2 in `parts`; a barrier must follow.
template <bool Moments, class T, class Visit>
__device__ __forceinline__ void sum_powers(const Segment<T>& segment, float top, float c, double (*parts)[4],
                                           const Visit& visit) {
    PowerSums<Moments> sums;
    segment.each_vector([&](int j, const float (&z)[kPerVector<T>]) {
        float e[kPerVector<T>];
#pragma unroll
        for (int u = 0; u < kPerVector<T>; ++u) {
            // -inf, masked or beyond the end, becomes a negligible 2^-126.
            const float t = fmaxf(__fmul_rn(__fsub_rn(z[u], top), c), -126.0f);
            e[u] = power_of_two(t);
            sums.add(u % 2, e[u], t);
        }
        visit(j, e);
    });
    const auto total = [](const float (&chains)[2]) { return double(chains[0]) + double(chains[1]); };
    if constexpr (Moments) {
        const double sum = warp_sum_of_four(total(sums.s0), total(sums.s1), total(sums.s2), total(sums.r2));
        if (lane_index() % 8 == 0) parts[warp_index()][lane_index() / 8] = sum;
    } else {
        const double sum = warp_sum(total(sums.s0));
        if (lane_index() < 4) parts[warp_index()][lane_index()] = lane_index() == 0 ? sum : 0.0;
    }
}

// The c of row_state.h.
__device__ __forceinline__ float power_factor(double temperature) { return float(kLog2e * (1.0 / temperature)); }

// A segment's s0, s1, s2 and r2, by threads 0 to 3 once the parts are there.
__device__ __forceinline__ void write_sums(const double (*parts)[4], double* to) {
    if (threadIdx.x >= 4) return;
    double sum = parts[0][threadIdx.x];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += parts[w][threadIdx.x];
    to[threadIdx.x] = sum;
}

// 1 / n of a count, to the last bits of a double: a division would be a call, and a call puts registers away.
__device__ __forceinline__ double reciprocal(int n) {
    float first;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(first) : "f"(float(n)));
    double r = double(first);
#pragma unroll
    for (int step = 0; step < 2; ++step) r = fma(r, fma(-double(n), r, 1.0), r);
    return r;
}

// Sum and sum of squares of (z - mean) over the thread's finite logits.
template <class Real, class T> __device__ __forceinline__ double2 about(const Segment<T>& segment, Real mean) {
    Real sum = 0, square = 0;
    segment.each_vector([&](int, const float (&z)[kPerVector<T>]) {
#pragma unroll
        for (int u = 0; u < kPerVector<T>; ++u) {
            if (!is_finite(z[u])) continue;
            const Real d = Real(z[u]) - mean;
            sum += d;
            square = fma(d, d, square);
        }
    });
    return make_double2(double(sum), double(square));
}

// A warp's spread by one or two more looks at its registers: some logits are not finite or missing, far from 0 for
// their spread, or their squares overflow. Squares are taken about the mean, in double where float32 overflows.
template <bool Spread, class T>
__device__ __forceinline__ WarpSpread careful_spread(const Segment<T>& segment, int length) {
    float partial = 0;  // scaled, so that no sum of 64 finite numbers overflows
    int finite = 0;
    bool masked = false, undefined = false;
    segment.each_vector([&](int j, const float (&z)[kPerVector<T>]) {
#pragma unroll
        for (int u = 0; u < kPerVector<T>; ++u) {
            const bool known = is_finite(z[u]);
            undefined |= !known && z[u] != -infinity();
            if constexpr (!Spread) continue;
            finite += known;
            masked |= Segment<T>::column(j, u) < length && z[u] == -infinity();
            if (known) partial = __fmaf_rn(z[u], 0x1p-8f, partial);
        }
    });
    WarpSpread out = {0, 0, 0, __any_sync(kAllLanes, undefined) ? kIsUndefined : 0};
    if constexpr (!Spread) return out;
    if (__any_sync(kAllLanes, masked)) out.flags |= kHasMasked;
    out.n = int(__reduce_add_sync(kAllLanes, unsigned(finite)));
    if (out.n == 0) return out;
    const double n = double(out.n), mean = warp_sum(double(partial) * 256.0) * reciprocal(out.n);
    const double near = double(float(mean));
    double2 own = about(segment, float(mean)), of = warp_sum_of_two(own.x, own.y);
    out.sum = fma(n, near, of.x);  // the mean was rounded, and of sums that were
    out.excess = n * of.y - of.x * of.x;
    if (of.y < double(infinity())) return out;
    own = about(segment, mean);
    of = warp_sum_of_two(own.x, own.y);
    out.sum = n * mean + of.x;
    out.excess = n * of.y - of.x * of.x;
    return out;
}

// Maximum of the segment of `length` columns, in every thread; NaN takes no part. On the way each warp leaves its
// spread, or without Spread just the flag of NaN and +inf. Ends with a barrier.
//
// Squares are summed as they are: of finite logits whose mean is within 5 standard deviations of 0 that costs at most
// a factor of 32 in rounding, of a sum in chains of 32 terms. Other warps take the careful way.
template <bool Spread, class T> __device__ __forceinline__ float find_top(const Segment<T>& segment, int length,
                                                                          ReduceMemory& memory, float& own_top) {
    constexpr int kPer = kPerVector<T>;
    float top = -infinity(), total = 0, square[2] = {0, 0};
    segment.each_vector([&](int, const float (&z)[kPer]) {
        float sum[kPer];
#pragma unroll
        for (int u = 0; u < kPer; ++u) {
            sum[u] = z[u];
            top = fmaxf(top, z[u]);
            if constexpr (Spread) square[u % 2] = __fmaf_rn(z[u], z[u], square[u % 2]);
        }
#pragma unroll
        for (int step = kPer / 2; step; step /= 2)
#pragma unroll
            for (int u = 0; u < step; ++u) sum[u] = __fadd_rn(sum[u], sum[u + step]);
        total = __fadd_rn(total, sum[0]);
    });
    own_top = top;
    top = warp_max(top);
    WarpSpread spread = {0, 0, 32 * segment.slots * kPer, 0};
    bool plain;  // the same in all lanes
    if constexpr (Spread) {
        const double2 sums = warp_sum_of_two(double(total), double(square[0]) + double(square[1]));
        const double n = double(spread.n);
        spread.sum = sums.x;
        spread.excess = n * sums.y - sums.x * sums.x;
        plain = spread.excess >= n / 32 * sums.y && sums.y < double(infinity());  // false for NaN
    } else {
        plain = __all_sync(kAllLanes, is_finite(total));
    }
    if (!plain) spread = careful_spread<Spread>(segment, length);
    if (lane_index() == 0) {
        memory.top[warp_index()] = top;
        memory.spread[warp_index()] = spread;
    }
    if (threadIdx.x == 0) memory.argmax = kSegmentLength<T>;
    __syncthreads();
    return over_warps(memory.top);
}

// Whether some logit is NaN or +inf, and perhaps whether some are masked.
__device__ __forceinline__ int find_flags(const ReduceMemory& memory) {
    int flags = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) flags |= memory.spread[w].flags;
    return flags;
}

// Spread of the segment's finite logits from those of its warps, for thread 0: the first warp calls it.
__device__ __forceinline__ void find_spread(const ReduceMemory& memory, SegmentHead& head) {
    const auto over_eight = [](auto v) {
#pragma unroll
        for (int step = kWarps / 2; step; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
        return v;
    };
    const WarpSpread own = memory.spread[lane_index() % kWarps];
    const double n = double(own.n), each = own.n ? reciprocal(own.n) : 0.0;
    head.n = over_eight(own.n);
    head.mean = over_eight(own.sum) * reciprocal(max(head.n, 1));
    const double d = own.sum * each - head.mean;
    head.m2 = over_eight(own.excess * each + n * (d * d));
}

// One segment's Head but for the argmax; the first warp calls it before the barrier that follows find_top's.
template <bool Statistics>
__device__ __forceinline__ void write_head(SegmentHead* out, float top, const ReduceMemory& memory) {
    SegmentHead head = {};
    if constexpr (Statistics) find_spread(memory, head);
    head.top = top;
    head.flags = find_flags(memory);
    if (threadIdx.x == 0) *out = head;
}

// Lowest column of the maximum, for thread 0 after the next barrier, in memory.argmax.
template <class T>
__device__ __forceinline__ void find_argmax(const Segment<T>& segment, float top, float own_top, ReduceMemory& memory) {
    if (own_top != top || top == -infinity()) return;  // all but a thread or two
    int lowest = kSegmentLength<T>;
    segment.each_vector([&](int j, const float (&z)[kPerVector<T>]) {
#pragma unroll
        for (int u = 0; u < kPerVector<T>; ++u)
            if (z[u] == top) lowest = min(lowest, Segment<T>::column(j, u));
    });
    atomicMin(&memory.argmax, lowest);
}

}  // namespace fastcalib::cuda
