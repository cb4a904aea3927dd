// ranks: counts and masses above the thresholds of each row, from one read of the logits. Not yet run on a GPU.
//
// A block takes some neighbouring segments of one row, all of them where there are rows enough to fill the device:
// counts then leave it once. At most kFew thresholds are compared with every logit, more are searched for its place.
// With masses a segment's sums wait in the workspace, in whole numbers of 2^-34 of its largest power, until the row's
// maximum and normaliser are known. Neither the number of blocks of a row nor the number of thresholds held at a time
// can change a bit.
#include "sweep.cuh"

namespace fastcalib::cuda {
namespace {

struct Shape {
    ThresholdPlan plan;
    int64_t segments, splits, per_split;
};

Shape shape_of(const RanksArgs& args, int64_t selected) {
    const Device device = current_device();
    Shape shape;
    shape.plan = plan_thresholds(args.logits.rows, selected, args.selected.offsets, args.temperatures.count > 0,
                                 device.shared_bytes);
    shape.segments = divide_up(args.vocab, segment_length(args.logits.dtype));
    // Four blocks for each multiprocessor, as far as there are segments.
    const int64_t wanted = divide_up(4 * device.multiprocessors, std::max<int64_t>(args.logits.rows, 1));
    shape.per_split = divide_up(shape.segments, std::clamp<int64_t>(wanted, 1, shape.segments));
    shape.splits = divide_up(shape.segments, shape.per_split);
    return shape;
}

// A search, which the lanes of a warp enter one survivor at a time, costs more than a comparison with each of so few.
constexpr int kFew = 4;

// Logits greater than a threshold and equal to it, of one thread.
struct Tally {
    uint32_t greater[kFew] = {}, equal[kFew] = {};
};

template <class T> __device__ __forceinline__ void compare(const Segment<T>& segment, const float* keys, int count,
                                                           int length, Tally& tally) {
    constexpr int kPer = kPerVector<T>;
    segment.each_vector([&](int j, const float (&z)[kPer]) {
        float top = z[0];
#pragma unroll
        for (int u = 1; u < kPer; ++u) top = fmaxf(top, z[u]);
        if (!(top >= keys[0])) return;
        // Columns past the end of the row hold -inf, which a threshold of -inf would count.
        const int missing = max(0, min(kPer, Segment<T>::column(j, kPer) - length));
#pragma unroll
        for (int i = 0; i < kFew; ++i) {
            if (i >= count) break;
            const float key = keys[i];
#pragma unroll
            for (int u = 0; u < kPer; ++u) {
                tally.greater[i] += z[u] > key ? 1 : 0;
                tally.equal[i] += z[u] == key ? 1 : 0;
            }
            if (key == -infinity()) tally.equal[i] -= missing;
        }
    });
}

// Few thresholds without masses: no bins. Two blocks have 64 KiB of a multiprocessor's logits on their way.
template <class T> __global__ void __launch_bounds__(kThreads, 2) compare_kernel(const SweepArgs a) {
    __shared__ uint32_t sums[2 * kFew];
    __shared__ float keys[kFew];
    const int64_t row = blockIdx.x / a.splits, begin = a.selected.begin(row);
    const int split = int(blockIdx.x % a.splits), count = *a.partial.limit(row, 0);
    if (count == 0) return;  // every token ignored: nothing to read
    if (threadIdx.x < 2 * kFew) sums[threadIdx.x] = 0;
    if (threadIdx.x < count) keys[threadIdx.x] = a.partial.keys[begin + threadIdx.x];
    __syncthreads();
    Tally tally;
    const int last = min((split + 1) * a.per_split, a.segments);
#pragma unroll 1
    for (int s = split * a.per_split; s < last; ++s) {
        const int64_t start = int64_t(s) * kSegmentLength<T>;
        Segment<T> segment;
        segment.template load<true>(a.logits.row<const T>(row), start, a.vocab);
        compare(segment, keys, count, int(min(int64_t(kSegmentLength<T>), a.vocab - start)), tally);
    }
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
        if (i >= count) break;
        const uint32_t greater = __reduce_add_sync(kAllLanes, tally.greater[i]);
        const uint32_t equal = __reduce_add_sync(kAllLanes, tally.equal[i]);
        if (lane_index() != 0) continue;
        atomicAdd(&sums[2 * i], greater);
        atomicAdd(&sums[2 * i + 1], equal);
    }
    __syncthreads();
    if (threadIdx.x < count)
        a.partial.counts(split, begin)[threadIdx.x] = make_uint2(sums[2 * threadIdx.x], sums[2 * threadIdx.x + 1]);
}

template <class T> int launch_compare(const SweepArgs& a, Stream stream) {
    const int64_t blocks = a.logits.rows * a.splits;
    if (blocks > 0x7fffffff) return int(cudaErrorInvalidConfiguration);
    compare_kernel<T><<<unsigned(blocks), kThreads, 0, stream>>>(a);
    return int(cudaGetLastError());
}

}  // namespace

size_t ranks_workspace(const RanksArgs& args, int64_t selected) {
    Partial partial;
    const Shape shape = shape_of(args, selected);
    return carve(partial, nullptr, args.logits, args.vocab, args.temperatures.count, selected, shape.plan,
                 shape.splits);
}

int launch_ranks(const RanksArgs& args, int64_t selected, void* workspace, Stream stream) {
    if (args.logits.rows == 0 || selected == 0) return 0;
    const Shape shape = shape_of(args, selected);
    Partial partial;
    carve(partial, workspace, args.logits, args.vocab, args.temperatures.count, selected, shape.plan, shape.splits);
    const SweepArgs a{
        args.logits,         args.vocab,        args.temperatures,    args.selected,       partial,
        int(shape.segments), int(shape.splits), int(shape.per_split), shape.plan.capacity, shape.plan.copies};
    int error = launch_thresholds(args, partial, shape.plan, stream);
    if (error) return error;
    const bool few = !args.selected.offsets && args.selected.per_row <= kFew && !args.temperatures.count;
    error = with_storage(args.logits.dtype, [&](auto storage) {
        using T = decltype(storage);
        return few ? launch_compare<T>(a, stream) : launch_sweep<T, false, true>(a, stream);
    });
    if (!error && args.temperatures.count) {
        StatisticsArgs rows;  // without results: only the weights of the masses
        rows.logits = args.logits;
        rows.vocab = args.vocab;
        rows.temperatures = args.temperatures;
        rows.selected = args.selected;
        error = launch_finish_rows(rows, partial, stream);
    }
    const int64_t most =
        args.selected.offsets ? std::min<int64_t>(selected, shape.plan.capacity) : args.selected.per_row;
    if (!error) error = launch_finish_ranks(args, partial, shape.splits, most, stream);
    return error;
}

}  // namespace fastcalib::cuda
