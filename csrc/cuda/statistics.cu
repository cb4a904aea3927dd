// statistics: forward. A block per 32 KiB of a row reads the logits once; a warp per row merges the parts. With ranks,
// the selected logits are gathered and sorted first, and the same read counts around them. Not yet run on a GPU.
#include "sweep.cuh"

namespace fastcalib::cuda {
namespace {

// A warp's worth of thresholds at a time, which is all that fastcalib.statistics lets through; a row with more would be
// read again, never out of bounds.
ThresholdPlan plan_ranked(const StatisticsArgs& args, int64_t selected) {
    ThresholdPlan plan;
    plan.chunks = divide_up(args.selected.offsets ? selected : args.selected.per_row, plan.capacity);
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
    return carve(partial, nullptr, args.logits, args.vocab, args.temperatures.count, selected,
                 plan_ranked(args, selected), args.ranks ? segments : 0);
}

int launch_statistics(const StatisticsArgs& args, int64_t selected, void* workspace, Stream stream) {
    const bool counting = args.ranks && selected > 0;
    const int64_t segments = divide_up(args.vocab, segment_length(args.logits.dtype));
    const ThresholdPlan plan = plan_ranked(args, selected);
    Partial partial;
    carve(partial, workspace, args.logits, args.vocab, args.temperatures.count, selected, plan,
          counting ? segments : 0);
    SweepArgs a{args.logits,   args.vocab, args.temperatures, args.selected, partial, int(segments),
                int(segments), 1,          plan.capacity,     plan.copies};
    const RanksArgs ranked = ranks_of_selected(args);
    int error = counting ? launch_thresholds(ranked, partial, plan, stream) : 0;
    if (error) return error;
    error = with_storage(args.logits.dtype, [&](auto storage) {
        using T = decltype(storage);
        return counting ? launch_sweep<T, true, true>(a, stream) : launch_sweep<T, true, false>(a, stream);
    });
    if (!error) error = launch_finish_rows(args, partial, stream);
    if (!error && counting) error = launch_finish_ranks(ranked, partial, segments, plan.capacity, stream);
    return error;
}

}  // namespace fastcalib::cuda
