// ranks: counts and masses above the thresholds of each row, from one read of the logits. Not yet run on a GPU.
//
// A block takes some neighbouring segments of one row, all of them where there are rows enough to fill the device:
// counts then leave it once. With masses a segment's sums wait in the workspace, in whole numbers of 2^-34 of its
// largest power, until the row's maximum and normaliser are known. Neither the number of blocks of a row nor the number
// of thresholds held at a time can change a bit.
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
    error = with_storage(args.logits.dtype,
                         [&](auto storage) { return launch_sweep<decltype(storage), false, true>(a, stream); });
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
