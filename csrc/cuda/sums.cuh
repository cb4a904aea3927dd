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

// Intrinsics fix every rounding: the same lines are inlined into several kernels, and a compiler free to fuse a
// multiplication and an addition here and not there would give a row other bits with ranks=True than without.
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

// Maximum of the segment in every thread; NaN takes no part. Ends with a barrier. `sum` is of all the logits of a full
// segment and shows, by not being finite, that some logit is not.
template <class T> __device__ __forceinline__ float find_top(const Segment<T>& segment, ReduceMemory& memory,
                                                             float& own_top, double& sum) {
    float top = -infinity(), total = 0;
    segment.each_vector([&](int, const float (&z)[kPerVector<T>]) {
        float half[kPerVector<T> / 2];
#pragma unroll
        for (int u = 0; u < kPerVector<T> / 2; ++u) {
            top = fmaxf(top, fmaxf(z[2 * u], z[2 * u + 1]));
            half[u] = __fadd_rn(z[2 * u], z[2 * u + 1]);
        }
        if constexpr (kPerVector<T> == 8)
            total = __fadd_rn(total, __fadd_rn(__fadd_rn(half[0], half[1]), __fadd_rn(half[2], half[3])));
        else total = __fadd_rn(total, __fadd_rn(half[0], half[1]));
    });
    own_top = top;
    top = warp_max(top);
    const double warp_total = warp_sum(double(total));
    if (lane_index() == 0) {
        memory.top[warp_index()] = top;
        memory.sum[warp_index()] = warp_total;
    }
    if (threadIdx.x == 0) {
        memory.argmax = kSegmentLength<T>;
        memory.masked = memory.undefined = memory.unused = 0;
    }
    __syncthreads();
    sum = over_warps(memory.sum);
    return over_warps(memory.top);
}

// Sum of (z - mean)^2 over the thread's logits; a careful one leaves out what is not finite.
template <bool Careful, class Real, class T>
__device__ __forceinline__ double squares(const Segment<T>& segment, Real mean) {
    Real square = 0;
    segment.each_vector([&](int, const float (&z)[kPerVector<T>]) {
#pragma unroll
        for (int u = 0; u < kPerVector<T>; ++u) {
            const Real d = Real(z[u]) - mean;
            if (!Careful || is_finite(z[u])) square = fma(d, d, square);
        }
    });
    return double(square);
}

// Spread and kind of the logits of one segment of `length` columns; all threads call it, thread 0 gets the answer. In a
// full segment of finite logits the sum is known already; otherwise one more look, at registers. Squares are taken
// about the mean of the segment, which keeps their digits whatever offset the logits have, and again in double where
// float32 overflows.
template <class T> __device__ __forceinline__ void find_spread(const Segment<T>& segment, int length, double sum,
                                                               ReduceMemory& memory, SegmentHead& head) {
    int64_t count = length;
    const bool plain = length == kSegmentLength<T> && fabs(sum) < double(infinity());
    if (!plain) {
        float partial = 0;  // scaled, so that no sum of 64 finite numbers overflows
        int finite = 0, masked = 0, undefined = 0;
        segment.each_vector([&](int j, const float (&z)[kPerVector<T>]) {
#pragma unroll
            for (int u = 0; u < kPerVector<T>; ++u) {
                const bool present = Segment<T>::column(j, u) < length, known = is_finite(z[u]);
                finite += known;
                masked |= present && z[u] == -infinity();
                undefined |= !known && z[u] != -infinity();
                if (known) partial = __fmaf_rn(z[u], 0x1p-8f, partial);
            }
        });
        const double warp_partial = warp_sum(double(partial) * 256.0);
        const int warp_count = __reduce_add_sync(kAllLanes, unsigned(finite));
        if (lane_index() == 0) {
            memory.careful[warp_index()] = warp_partial;
            memory.count[warp_index()] = warp_count;
        }
        if (masked) memory.masked = 1;
        if (undefined) memory.undefined = 1;
        __syncthreads();
        sum = over_warps(memory.careful);
        count = 0;
        for (int w = 0; w < kWarps; ++w) count += memory.count[w];
    }
    const double mean = count ? sum / double(count) : 0.0;
    double square =
        warp_sum(plain ? squares<false, float>(segment, float(mean)) : squares<true, float>(segment, float(mean)));
    if (lane_index() == 0) memory.square[warp_index()] = square;
    __syncthreads();
    square = over_warps(memory.square);
    if (!(square < double(infinity()))) {
        __syncthreads();  // everybody has read
        square = warp_sum(squares<true, double>(segment, mean));
        if (lane_index() == 0) memory.square[warp_index()] = square;
        __syncthreads();
        square = over_warps(memory.square);
    }
    if (threadIdx.x != 0) return;
    head.n = int(count);
    head.mean = mean;
    head.m2 = square;
    head.flags = (memory.masked ? kHasMasked : 0) | (memory.undefined ? kIsUndefined : 0);
}

// Only whether some logit is NaN or +inf. Ends with a barrier.
template <class T> __device__ __forceinline__ void find_kind(const Segment<T>& segment, double sum,
                                                             ReduceMemory& memory, SegmentHead& head) {
    if (!(fabs(sum) < double(infinity()))) {
        bool undefined = false;
        segment.each_vector([&](int, const float (&z)[kPerVector<T>]) {
#pragma unroll
            for (int u = 0; u < kPerVector<T>; ++u) undefined |= !is_finite(z[u]) && z[u] != -infinity();
        });
        if (undefined) memory.undefined = 1;
    }
    __syncthreads();
    head.flags = memory.undefined ? kIsUndefined : 0;
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
