// Sorting the thresholds of each row, and each threshold's place among them. Not yet run on a GPU.
//
// Ties need no merging: equal keys stand next to each other, a logit equal to them is counted at the first, and the
// place of a threshold is that of the first key equal to it.
#include <cub/block/block_radix_sort.cuh>

#include "kernels.h"

namespace fastcalib::cuda {
namespace {

constexpr uint32_t kNoKey = 0xffffffffu;    // sorts last; no number has these bits
constexpr uint32_t kFirstNoKey = 0xff800001u;  // nor any from here on: +inf is the one before

// Monotone in v; -0 and +0 as one.
__device__ __forceinline__ uint32_t sortable(float v) {
    uint32_t bits = __float_as_uint(v);
    if (bits == 0x80000000u) bits = 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unsortable(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Key of threshold i of a row, and its Place where it has no key.
__device__ __forceinline__ uint32_t key_of(const RanksArgs& a, int64_t row, int64_t i, int& place) {
    float v;
    if (a.selected.ids) {
        const Token token = kind_of(a.selected, a.vocab, i);
        if (token != Token::kGood) {
            place = token == Token::kIgnored ? kIgnoredPlace : kBadPlace;
            return kNoKey;
        }
        v = logit_at(a.logits, row, a.selected.ids[i]);
    } else {
        v = static_cast<const float*>(a.thresholds)[i];
    }
    place = isnan(v) ? kNaNPlace : 0;
    return isnan(v) ? kNoKey : sortable(v);
}

// Up to 32 thresholds: a warp compares each with each.
__global__ void __launch_bounds__(128) sort_in_warp(const RanksArgs a, const Partial partial) {
    const int64_t row = (int64_t(blockIdx.x) * 128 + threadIdx.x) / 32, chunk = blockIdx.y;
    if (row >= a.logits.rows) return;
    const int64_t begin = a.selected.begin(row) + chunk * 32, end = a.selected.end(row);
    if (begin >= end) return;
    const int64_t i = begin + lane_index();
    int place = kIgnoredPlace;
    const uint32_t key = i < end ? key_of(a, row, i, place) : kNoKey;
    int below = 0, before = 0;
    for (int lane = 0; lane < 32; ++lane) {
        const uint32_t other = __shfl_sync(kAllLanes, key, lane);
        below += other < key;
        before += other == key && lane < lane_index();
    }
    const unsigned known = __ballot_sync(kAllLanes, key != kNoKey);
    if (key != kNoKey) partial.keys[begin + below + before] = unsortable(key);
    if (i < end) partial.place[i] = place < 0 ? place : int(chunk * 32) + below;
    if (lane_index() == 0) *partial.limit(row, chunk) = __popc(known);
}

template <int Threads, int Items> struct SortMemory {
    using Sort = cub::BlockRadixSort<uint32_t, Threads, Items>;
    union {
        typename Sort::TempStorage sort;
        uint32_t keys[Threads * Items];
    };
    int known;
};

// Up to Threads * Items thresholds: a block's radix sort, then a binary search for each. Where a threshold has no key
// its Place, a small negative number, stands for one: it sorts last too. A thread's thresholds wait for the end of the
// sort where their places will be written: beside the registers of the sort there is no room for them.
template <int Threads, int Items> __global__ void __launch_bounds__(Threads)
    sort_in_block(const RanksArgs a, const Partial partial, int capacity) {
    extern __shared__ __align__(16) unsigned char dynamic[];
    auto& memory = *reinterpret_cast<SortMemory<Threads, Items>*>(dynamic);
    const int64_t row = blockIdx.x, chunk = blockIdx.y;
    const int64_t begin = a.selected.begin(row) + chunk * capacity;
    const int count = int(max(int64_t(0), min(a.selected.end(row) - begin, int64_t(capacity))));
    if (count == 0) return;
    if (threadIdx.x == 0) memory.known = 0;
    uint32_t keys[Items];
    int known = 0;
#pragma unroll
    for (int u = 0; u < Items; ++u) {
        const int i = u * Threads + int(threadIdx.x);
        keys[u] = kNoKey;
        if (i >= count) continue;
        int place;
        keys[u] = key_of(a, row, begin + i, place);
        if (place < 0) keys[u] = uint32_t(place);
        else ++known;
        partial.place[begin + i] = int(keys[u]);
    }
    typename SortMemory<Threads, Items>::Sort(memory.sort).Sort(keys);
    __syncthreads();
#pragma unroll
    for (int u = 0; u < Items; ++u) memory.keys[threadIdx.x * Items + u] = keys[u];
    atomicAdd(&memory.known, known);
    __syncthreads();
    known = memory.known;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < count; i += Threads) {
        if (i < known) partial.keys[begin + i] = unsortable(memory.keys[i]);
        const uint32_t own = uint32_t(partial.place[begin + i]);
        if (own >= kFirstNoKey) continue;  // its place it is
        int at = 0;
        for (int left = known; left > 1;) {
            const int half = left / 2;
            at += memory.keys[at + half - 1] < own ? half : 0;
            left -= half;
        }
        partial.place[begin + i] = int(chunk) * capacity + at + (memory.keys[at] < own ? 1 : 0);
    }
    if (threadIdx.x == 0) *partial.limit(row, chunk) = known;
}

template <int Threads, int Items>
int launch_sort(const RanksArgs& args, const Partial& partial, const ThresholdPlan& plan, Stream stream) {
    const auto kernel = sort_in_block<Threads, Items>;
    const size_t bytes = sizeof(SortMemory<Threads, Items>);
    if (bytes > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
        if (error != cudaSuccess) return int(error);
    }
    const dim3 grid(unsigned(args.logits.rows), unsigned(plan.chunks));
    kernel<<<grid, Threads, bytes, stream>>>(args, partial, plan.capacity);
    return int(cudaGetLastError());
}

}  // namespace

// Sets of very different sizes are planned for four times their mean size: larger ones come in chunks.
ThresholdPlan plan_thresholds(int64_t rows, int64_t selected, bool ragged, bool masses, int shared_bytes) {
    const int64_t mean = divide_up(selected, std::max<int64_t>(rows, 1)), most = ragged ? selected : mean;
    const int64_t wanted = ragged ? std::min(selected, 4 * mean) : mean;
    ThresholdPlan plan;
    // A key and two bins each; two more for masses. The rest of a block needs less than 4 KiB.
    const int64_t room = (shared_bytes - 4096) / 4, bins = masses ? 4 : 2;
    for (const int capacity : {32, 512, 4096, 8192, 16384}) {
        if (capacity > 4096 && capacity + bins * (capacity + 1) > room) break;
        plan.capacity = capacity;
        if (capacity >= wanted) break;
    }
    // Copies of the bins while they take no more than 24 KiB, so that occupancy stays.
    plan.copies = 32;
    while (plan.copies > 1 && bins * (plan.capacity + 1) * plan.copies > 6 * 1024) plan.copies /= 2;
    plan.chunks = std::max<int64_t>(1, divide_up(most, plan.capacity));
    return plan;
}

int launch_thresholds(const RanksArgs& args, const Partial& partial, const ThresholdPlan& plan, Stream stream) {
    if (args.logits.rows == 0 || partial.nnz == 0) return 0;
    if (plan.chunks > 65535 || args.logits.rows > 0x7fffffff) return int(cudaErrorInvalidConfiguration);
    if (plan.capacity > 4096) return launch_sort<512, 32>(args, partial, plan, stream);
    if (plan.capacity > 512) return launch_sort<256, 16>(args, partial, plan, stream);
    if (plan.capacity > 32) return launch_sort<128, 4>(args, partial, plan, stream);
    const dim3 grid(unsigned(divide_up(args.logits.rows * 32, 128)), unsigned(plan.chunks));
    sort_in_warp<<<grid, 128, 0, stream>>>(args, partial);
    return int(cudaGetLastError());
}

}  // namespace fastcalib::cuda
