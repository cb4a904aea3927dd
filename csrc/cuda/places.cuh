// Where the logits of a segment lie among the sorted thresholds of their row: counts and masses per place, in shared
// memory.
//
// A logit in place p is greater than the p lowest thresholds; equal ones are counted beside. Bins are integers, so the
// order in which threads add to them does not matter: counts are exact, and a mass is added as two whole numbers, the
// first 17 and the next 17 bits of the power, which is rounded to 2^-34 of that of the segment's largest logit. No
// float is ever added atomically, and the sums of a segment (at most 2^14 logits) stay below 2^32. Where there is room,
// each bin exists in several copies for different lanes, since the logits of a warp often fall into one.
#pragma once
#include <cub/block/block_scan.cuh>

#include "rows.cuh"

namespace fastcalib::cuda {

constexpr float kMassScale = 0x1p17f;

// Shared memory of one block: sorted thresholds, then bins. `copies` is a power of two.
struct Bins {
    float* keys;
    uint32_t* counts;  // (capacity + 1, {between, equal}, copies)
    uint32_t* masses;  // (capacity + 1, {high, low}, copies)
    int copies;

    __host__ __device__ __forceinline__ static int words(int count, int copies) { return 2 * (count + 1) * copies; }
    __device__ __forceinline__ Bins(uint32_t* memory, int capacity, int copies, bool with_masses)
        : keys(reinterpret_cast<float*>(memory)),
          counts(memory + capacity),
          masses(with_masses ? counts + words(capacity, copies) : nullptr),
          copies(copies) {}
    __device__ __forceinline__ int copy() const { return lane_index() & (copies - 1); }

    // Part 0 or 1 of bin p, once the copies are gathered.
    __device__ __forceinline__ uint64_t total(const uint32_t* bins, int p, int part) const {
        return bins[(2 * p + part) * copies];
    }
};

__device__ __forceinline__ void clear(uint32_t* bins, int words) {
    for (int i = int(threadIdx.x); i < words; i += kThreads) bins[i] = 0;
}

// Add the copies of every bin up into the first. Begins with a barrier.
__device__ __forceinline__ void gather_copies(uint32_t* bins, int count, int copies) {
    __syncthreads();
    const int words = 2 * (count + 1);
    if (copies == 32) {
        for (int w = warp_index(); w < words; w += kWarps) {
            const uint32_t sum = __reduce_add_sync(kAllLanes, bins[w * 32 + lane_index()]);
            __syncwarp();
            if (lane_index() == 0) bins[w * 32] = sum;
        }
    } else if (copies > 1) {
        for (int w = int(threadIdx.x); w < words; w += kThreads) {
            uint32_t sum = bins[w * copies];
            for (int i = 1; i < copies; ++i) sum += bins[w * copies + i];
            bins[w * copies] = sum;
        }
    }
}

// Number of keys below v; the keys ascend.
__device__ __forceinline__ int lower_bound(const float* keys, int count, float v) {
    int at = 0;
    for (int left = count; left > 1;) {  // the same number of steps in every thread
        const int half = left / 2;
        at += keys[at + half - 1] < v ? half : 0;
        left -= half;
    }
    return at + (keys[at] < v ? 1 : 0);
}

// Place of every logit of a thread, 16 bits each; 0 is "greater than no threshold".
template <class T> struct Places {
    static constexpr int kWords = kPerVector<T> / 2;
    uint32_t words[kVectors * kWords];
    __device__ __forceinline__ int of(int j, int u) const {
        uint32_t word = words[j * kWords];
#pragma unroll
        for (int w = 1; w < kWords; ++w) {
            uint32_t other = words[j * kWords + w];
            asm("" : "+r"(other));  // a value now, not the address of one
            word = w == u / 2 ? other : word;
        }
        return word >> 16 * (u % 2) & 0xffff;
    }
    __device__ __forceinline__ bool any(int j) const {
        uint32_t all = words[j * kWords];
#pragma unroll
        for (int w = 1; w < kWords; ++w) all |= words[j * kWords + w];
        return all != 0;
    }
};

template <int N> __device__ __forceinline__ float pick(const float (&values)[N], int u) {
    float v = values[0];
#pragma unroll
    for (int i = 1; i < N; ++i) v = i == u ? values[i] : v;
    return v;
}

// Count a segment into the bins. Below the lowest threshold a logit costs its part of one maximum and one comparison.
template <class T> __device__ __forceinline__ void place_segment(const Segment<T>& segment, int length,
                                                                 const Bins& bins, int count, float lowest,
                                                                 Places<T>& places) {
    constexpr int kWords = Places<T>::kWords;
#pragma unroll
    for (int i = 0; i < kVectors * kWords; ++i) places.words[i] = 0;
    segment.each_vector([&](int j, const float (&z)[kPerVector<T>]) {
        float top = z[0];
#pragma unroll
        for (int u = 1; u < kPerVector<T>; ++u) top = fmaxf(top, z[u]);
        if (!(top >= lowest)) return;
        uint32_t survivors = 0;
#pragma unroll
        for (int u = 0; u < kPerVector<T>; ++u) survivors |= (z[u] >= lowest ? 1u : 0u) << u;
        // Columns past the end of the row hold -inf, which a threshold of -inf would count.
        if (lowest == -infinity()) survivors &= (1u << max(0, min(kPerVector<T>, length - segment.column(j, 0)))) - 1;
        // One search at a time, its element picked out of the registers: the lanes of a warp then wait for the one with
        // the most survivors, not for the sum over all places of a vector.
        for (; survivors; survivors &= survivors - 1) {
            const int u = __ffs(int(survivors)) - 1;
            const float v = pick(z, u);
            const int place = lower_bound(bins.keys, count, v);
            const bool equal = place < count && bins.keys[place] == v;
            atomicAdd(&bins.counts[(2 * place + (equal ? 1 : 0)) * bins.copies + bins.copy()], 1u);
#pragma unroll
            for (int w = 0; w < kWords; ++w)  // a choice of values: one of addresses would move them to local memory
                places.words[j * kWords + w] |= w == u / 2 ? uint32_t(place) << 16 * (u % 2) : 0;
        }
    });
}

__device__ __forceinline__ void add_mass(const Bins& bins, int place, float e) {
    const float scaled = __fmul_rn(e, kMassScale), high = truncf(scaled);
    const float low = rintf(__fmul_rn(__fsub_rn(scaled, high), kMassScale));  // exact: both have few bits
    uint32_t* bin = bins.masses + 2 * place * bins.copies + bins.copy();
    atomicAdd(bin, uint32_t(high));
    atomicAdd(bin + bins.copies, uint32_t(low));
}

// The powers of vector j into the bins of their places.
template <class T> __device__ __forceinline__ void add_masses(const Bins& bins, const Places<T>& places, int j,
                                                              const float (&e)[kPerVector<T>]) {
    if (!places.any(j)) return;
#pragma unroll 1
    for (int u = 0; u < kPerVector<T>; ++u) {
        const int place = places.of(j, u);
        if (place) add_mass(bins, place, pick(e, u));
    }
}

using SuffixScan = cub::BlockScan<unsigned long long, kThreads>;

// For each threshold j, what lies in the bins above j: write(j, sum over p > j of value(p)). Whole numbers: any order
// is exact. Each thread takes neighbouring bins, the last thread the lowest. Begins and ends with a barrier.
template <class Value, class Write> __device__ __forceinline__ void sum_above(int count,
                                                                              SuffixScan::TempStorage& memory,
                                                                              const Value& value, const Write& write) {
    __syncthreads();
    const int each = (count + kThreads) / kThreads;  // of count + 1 bins
    const int first = (kThreads - 1 - int(threadIdx.x)) * each, last = min(first + each, count + 1);
    unsigned long long own = 0, above = 0;
    for (int p = first; p < last; ++p) own += value(p);
    SuffixScan(memory).ExclusiveSum(own, above);
    for (int p = last - 1; p >= first; --p) {
        if (p < count) write(p, above);
        above += value(p);
    }
    __syncthreads();
}

}  // namespace fastcalib::cuda
