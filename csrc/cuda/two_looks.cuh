// What softmax, its gradient and loss and gradient in one share: rows that are looked at twice, first for sums and then
// to be written.
//
// Where the second look finds a row:
//   - its last segment, still in the registers of the block;
//   - the segments before it, as many as fit, in shared memory, each vector where the thread that read it left it;
//   - what remains, in the L2 cache, if that holds the remainders of all rows in flight. Whatever will not be looked
//     for there again (the segments above, every second look, all that is written) passes through it marked as the
//     first to give way, so the remainders alone compete for it.
// So a block takes a whole row, and two blocks share a multiprocessor (one reads while the other computes) unless the
// remainders would then not fit, and one would keep more. On an H100 (227 KiB of shared memory, 50 MiB of L2), forward,
// bfloat16: up to 65,536 logits a row never leave the multiprocessor and are read once; 128,256 leave 4 of 8 segments
// to the L2 cache, 33 MiB for 264 rows; at 262,144 a block that has the multiprocessor for itself keeps 8 of 16, which
// leaves 33 MiB for 132 rows. Backward holds two numbers a column, the gradient and the result of forward: half as far.
//
// With fewer rows than multiprocessors each segment gets a block of its own, twice: one launch sums, the next merges
// and writes. That is at most 131 rows, 32 MiB at 128,256 bfloat16 logits; the second launch begins with what was read
// last, so that of larger inputs, too, what is still in the cache is used before it gives way.
//
// Both ways sum the same segments and merge them in the same order: neither the number of rows nor the device changes a
// bit of a row.
#pragma once
#include "kernels.h"
#include "store.cuh"

namespace fastcalib::cuda {

constexpr int kSegmentBytes = kThreads * kVectors * 16;

struct TwoLooks {
    int64_t segments = 0, written = 0;  // of the real columns of a row, and of all
    bool split = false;                 // a block for each segment
    int kept = 0;                       // segments in shared memory; the last one needs none
    size_t shared_bytes = 0;
};

// `inputs` is the number of matrices that are read: 1 forward, 2 backward.
inline TwoLooks plan_two_looks(const Matrix& logits, int64_t vocab, int64_t width, int inputs) {
    const Device device = current_device();
    const int64_t length = segment_length(logits.dtype);
    TwoLooks plan;
    plan.segments = divide_up(vocab, length);
    plan.written = divide_up(width, length);
    plan.split = plan.segments > 1 && logits.rows < device.multiprocessors;
    const int64_t bytes = inputs * int64_t(kSegmentBytes);
    const auto keep = [&](int blocks) {
        // A multiprocessor has 1 KiB more than a block may ask for, and takes that for each block; 2 KiB are static.
        const int64_t room = (device.shared_bytes + 1024) / blocks - 3 * 1024;
        return std::clamp<int64_t>(room / bytes, 0, plan.segments - 1);
    };
    const auto in_flight = [&](int blocks) {
        return (plan.segments - 1 - keep(blocks)) * bytes * blocks * device.multiprocessors;
    };
    plan.kept = int(keep(in_flight(2) <= int64_t(device.l2_bytes) / 4 * 3 ? 2 : 1));
    plan.shared_bytes = size_t(plan.kept * bytes);
    return plan;
}

// A segment's part of its row's softmax, as it waits in the workspace.
struct SoftmaxPart {
    double s0;
    float top;
    int undefined;
};

constexpr int64_t kMostBlocks = 0x7fffffff;  // of a grid

template <class Kernel> int allow_shared(const Kernel& kernel, size_t bytes) {
    if (bytes <= 44 * 1024) return 0;
    return int(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

// Leave a full segment in shared memory, and take it back. Each thread finds its own vectors, so no barrier is needed.
template <class T> __device__ __forceinline__ void keep(const Segment<T>& segment, uint4* memory) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) memory[j * kThreads + threadIdx.x] = segment.vectors[j];
}
template <class T> __device__ __forceinline__ void take_back(Segment<T>& segment, const uint4* memory) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) segment.vectors[j] = memory[j * kThreads + threadIdx.x];
    segment.slots = kVectors;
}

// Sum of one number of each segment, by one warp, in every lane.
__device__ __forceinline__ double sum_over_segments(const double* parts, int segments) {
    double sum = 0;
    for (int s = lane_index(); s < segments; s += 32) sum += parts[s];
    return warp_sum(sum);
}

}  // namespace fastcalib::cuda
