// statistics: forward. A block per 32 KiB of a row reads the logits once; a warp per row merges the parts. With ranks, the
// selected logits are gathered and sorted first, and the same read counts around them. Not yet run on a GPU.
#include "kernels.h"

namespace fastcalib::cuda {

size_t carve(Partial& partial, void* workspace, const Matrix& logits, int64_t vocab, int64_t k_count, int64_t selected,
             const ThresholdPlan& plan, int64_t splits) {
    const int64_t rows = logits.rows, length = segment_length(logits.dtype), segments = divide_up(vocab, length);
    const bool counting = splits > 0;
    partial.nnz = selected;
    partial.k_count = k_count;
    partial.segments = segments;
    partial.segment_length = length;
    partial.chunks = plan.chunks;
    Carver carver(workspace);
    partial.heads = carver.take<SegmentHead>(rows * segments);
    partial.sums_data = carver.take<double>(rows * segments * k_count * 4);
    if (!counting) return carver.used();
    if (k_count) partial.weights_data = carver.take<double>(rows * segments * k_count);
    partial.keys = carver.take<float>(selected);
    partial.place = carver.take<int32_t>(selected);
    partial.limits = carver.take<int32_t>(rows * plan.chunks);
    partial.counts_data = carver.take<uint2>(splits * selected);
    partial.masses_data = carver.take<uint64_t>(segments * k_count * selected);
    return carver.used();
}

Device current_device() {
    Device device;
    int index = 0, value = 0;
    if (cudaGetDevice(&index) != cudaSuccess) return device;
    if (cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, index) == cudaSuccess && value > 0)
        device.multiprocessors = value;
    if (cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) == cudaSuccess)
        device.shared_bytes = std::max(device.shared_bytes, value);
    return device;
}

namespace {

constexpr int kMostRanked = 16;  // selected tokens a row; fastcalib/ops/statistics.py sees to it

ThresholdPlan plan_ranked(int64_t selected) {
    ThresholdPlan plan;  // one warp's worth in every row
    plan.chunks = 1;
    (void)selected;
    return plan;
}

RanksArgs ranks_of_selected(const StatisticsArgs& a) {
    RanksArgs r;
    r.logits = a.logits;
    r.vocab = a.vocab;
    r.selected = a.selected;
    r.temperatures = a.temperatures;
    r.n_greater = a.n_greater;
    r.n_equal = a.n_equal;
    r.mass_greater = a.mass_greater;
    return r;
}

}  // namespace

size_t statistics_workspace(const StatisticsArgs& args, int64_t selected) {
    Partial partial;
    const int64_t segments = divide_up(args.vocab, segment_length(args.logits.dtype));
    return carve(partial, nullptr, args.logits, args.vocab, args.temperatures.count, selected, plan_ranked(selected),
                 args.ranks ? segments : 0);
}

int launch_statistics(const StatisticsArgs& args, int64_t selected, void* workspace, Stream stream) {
    const bool counting = args.ranks && selected > 0;
    const int64_t segments = divide_up(args.vocab, segment_length(args.logits.dtype));
    const ThresholdPlan plan = plan_ranked(selected);
    Partial partial;
    carve(partial, workspace, args.logits, args.vocab, args.temperatures.count, selected, plan, counting ? segments : 0);
    SweepArgs a{args.logits, args.vocab, args.temperatures, args.selected, partial, int(segments), int(segments), 1,
                plan.capacity, plan.copies};
    const RanksArgs ranked = ranks_of_selected(args);
    int error = counting ? launch_thresholds(ranked, partial, plan, stream) : 0;
    if (error) return error;
    error = with_storage(args.logits.dtype, [&](auto storage) {
        using T = decltype(storage);
        return counting ? launch_sweep<T, true, true>(a, stream) : launch_sweep<T, true, false>(a, stream);
    });
    if (!error) error = launch_finish_rows(args, partial, stream);
    if (!error && counting) error = launch_finish_ranks(ranked, partial, segments, kMostRanked, stream);
    return error;
}

const char* error_name(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace fastcalib::cuda
