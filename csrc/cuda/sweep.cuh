// The one kernel that reads logits forward: statistics, statistics with ranks, and ranks, over some segments of one
// row.
#pragma once
#include "kernels.h"
#include "places.cuh"

namespace fastcalib::cuda {

struct SweepArgs {
    Matrix logits;
    int64_t vocab;
    Temperatures temperatures;
    Selection selected;
    Partial partial;
    int segments;           // of a row
    int splits, per_split;  // blocks of a row, and segments of a block: one, of statistics
    int capacity, copies;   // thresholds held in shared memory at a time
};

struct SweepMemory {
    ReduceMemory reduce;
    SuffixScan::TempStorage scan;
};

// K temperatures over a segment in registers. With masses, each power is also dropped into the bin of its place.
template <bool Moments, bool Masses, class T>
__device__ __forceinline__ void sum_segment(const SweepArgs& a, int64_t row, int segment_index,
                                            const Segment<T>& segment, float top, bool first_chunk,
                                            const Places<T>& places, const Bins& bins, int count, int64_t position,
                                            ReduceMemory& reduce, SuffixScan::TempStorage& scan) {
    const double* temperature = a.temperatures.row(row);
    for (int64_t k = 0; k < a.temperatures.count; ++k) {
        const float c = power_factor(temperature[k]);
        double (*parts)[4] = reduce.four[k % 2];  // what thread 0 to 3 still read of k - 1 lies in the other half
        if constexpr (Masses) {
            clear(bins.masses, Bins::words(count, bins.copies));
            __syncthreads();
        }
        sum_powers<Moments>(segment, top, c, parts, [&](int j, const float (&e)[kPerVector<T>]) {
            if constexpr (Masses) add_masses(bins, places, j, e);
        });
        __syncthreads();
        if (first_chunk) write_sums(parts, a.partial.sums(row, segment_index, k));
        if constexpr (Masses) {
            gather_copies(bins.masses, count, bins.copies);
            uint64_t* out = a.partial.masses(segment_index, k, position);
            sum_above(
                count, scan,
                [&](int p) { return (bins.total(bins.masses, p, 0) << 17) + bins.total(bins.masses, p, 1); },
                [&](int j, uint64_t above) { out[j] = above; });
        }
    }
}

template <class T, bool Statistics, bool Counting> __global__ void __launch_bounds__(kThreads, Counting ? 2 : 3)
    sweep_kernel(const SweepArgs a) {
    extern __shared__ uint32_t dynamic[];
    __shared__ SweepMemory memory;
    const int64_t row = blockIdx.x / a.splits;
    const int split = int(blockIdx.x % a.splits);
    if constexpr (Statistics) {
        if (row_is_skipped(a.selected, row)) return;
    }
    const T* x = a.logits.template row<const T>(row);
    const int first = Statistics ? split : split * a.per_split;
    const int last = Statistics ? first + 1 : min(first + a.per_split, a.segments);
    const int64_t begin = Counting ? a.selected.begin(row) : 0, end = Counting ? a.selected.end(row) : 0;
    const bool masses = Counting && a.temperatures.count > 0;
    if (!Statistics && begin == end) return;

    // The thresholds of a row, as many at a time as fit; nearly always all of them.
    int64_t chunk = 0;
    do {
        const int64_t position = begin + chunk * a.capacity;
        const Bins bins(dynamic, a.capacity, a.copies, masses);
        int count = 0;
        if constexpr (Counting) {
            count = begin == end ? 0 : *a.partial.limit(row, chunk);
            for (int i = int(threadIdx.x); i < count; i += kThreads) bins.keys[i] = a.partial.keys[position + i];
            clear(bins.counts, Bins::words(count, a.copies));
            __syncthreads();
        }
        const float lowest = count ? bins.keys[0] : infinity();
        const bool first_chunk = chunk == 0;
        ++chunk;
        if (!Statistics && count == 0 && !masses) continue;  // every token ignored: nothing to read

        const auto sweep = [&](int s) {
            const T* here = x;
            if constexpr (!Statistics) asm volatile("" : "+l"(here));  // no addresses made beforehand: no spills
            const int64_t start = int64_t(s) * kSegmentLength<T>;
            const int length = int(min(int64_t(kSegmentLength<T>), a.vocab - start));
            Segment<T> segment;
            Places<T> places;
            constexpr bool kOneAddress = !(Statistics && Counting && sizeof(T) == 4);
            segment.template load<kOneAddress>(here, start, a.vocab);
            if constexpr (Counting) {
                if (count) place_segment(segment, length, bins, count, lowest, places);
            }
            if (!Statistics && !masses) return;

            float own_top;
            const float top = find_top<Statistics>(segment, length, memory.reduce, own_top);
            find_argmax(segment, top, own_top, memory.reduce);
            SegmentHead* head = a.partial.head(row, s);
            if (first_chunk && warp_index() == 0) write_head<Statistics>(head, top, memory.reduce);
            if (Counting && count)
                sum_segment<Statistics, true>(a, row, s, segment, top, first_chunk, places, bins, count, position,
                                              memory.reduce, memory.scan);
            else
                sum_segment<Statistics, false>(a, row, s, segment, top, first_chunk, places, bins, count, position,
                                               memory.reduce, memory.scan);
            if (first_chunk && threadIdx.x == 0)
                head->argmax = memory.reduce.argmax < kSegmentLength<T> ? memory.reduce.argmax : -1;
        };
        if constexpr (Statistics && Counting) {
            sweep(first);
        } else {  // also where there is one segment: as a loop it takes fewer registers
#pragma unroll 1
            for (int s = first; s < last; ++s) sweep(s);
        }
        if constexpr (Counting) {
            gather_copies(bins.counts, count, bins.copies);
            uint2* out = a.partial.counts(split, position);
            sum_above(
                count, memory.scan,
                [&](int p) { return bins.total(bins.counts, p, 0) + bins.total(bins.counts, p, 1); },
                [&](int j, uint64_t above) {
                    out[j] = make_uint2(uint32_t(above), uint32_t(bins.total(bins.counts, j, 1)));
                });
        }
    } while (Counting && begin + chunk * a.capacity < end);
}

// Launch a sweep with its shared memory.
template <class T, bool Statistics, bool Counting> int launch_sweep(const SweepArgs& a, Stream stream) {
    const auto kernel = sweep_kernel<T, Statistics, Counting>;
    size_t bytes = 0;
    if (Counting) {
        const bool masses = a.temperatures.count > 0;
        bytes = 4 * size_t(a.capacity + (masses ? 2 : 1) * Bins::words(a.capacity, a.copies));
    }
    const int64_t blocks = a.logits.rows * a.splits;
    if (blocks == 0) return 0;
    if (blocks > 0x7fffffff) return int(cudaErrorInvalidConfiguration);
    if (bytes > 44 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
        if (error != cudaSuccess) return int(error);
    }
    kernel<<<unsigned(blocks), kThreads, bytes, stream>>>(a);
    return int(cudaGetLastError());
}

}  // namespace fastcalib::cuda
