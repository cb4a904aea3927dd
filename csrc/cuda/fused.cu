// Statistics of a row and the gradient to its logits in one launch, for upstream gradients known beforehand: those of a
// loss that is linear in the statistics. Not yet run on a GPU.
//
// A block takes a row through what sweep.cuh, finish.cuh and gradient.cuh do in four launches: so the bits are theirs,
// and a batch with fewer rows than multiprocessors, which they serve better, has the same results. Between them the row
// stays where it is: two_looks.cuh says where the second look finds it.
//
// The gradient may replace the logits. The second look goes from the last segment to the first; of a row that does not
// start at a multiple of 16 bytes a vector reaches into the segment after its own, which is written already, but what
// it finds there is cut off. The logits of the selected token and of the maximum, whose columns are written once more
// at the end, are read before anything is written.
#include "finish.cuh"
#include "gradient.cuh"
#include "two_looks.cuh"

namespace fastcalib::cuda {
namespace {

struct FusedArgs {
    StatisticsArgs forward;
    StatisticsBackwardArgs backward;
    Partial partial;
    Prepared prepared;
    TwoLooks plan;
};

// A segment's part of its row, as sweep.cuh leaves it.
template <class T> __device__ __forceinline__ void sum_segment(const FusedArgs& a, int64_t row, int s,
                                                               const Segment<T>& segment, ReduceMemory& memory) {
    const int64_t left = a.forward.vocab - int64_t(s) * kSegmentLength<T>;
    float own_top;
    const float top = find_top<true>(segment, int(min(int64_t(kSegmentLength<T>), left)), memory, own_top);
    find_argmax(segment, top, own_top, memory);
    SegmentHead* head = a.partial.head(row, s);
    if (warp_index() == 0) write_head<true>(head, top, memory);
    const double* temperature = a.forward.temperatures.row(row);
    for (int64_t k = 0; k < a.forward.temperatures.count; ++k) {
        double (*parts)[4] = memory.four[k % 2];  // what threads 0 to 3 still read of k - 1 lies in the other half
        sum_powers<true>(segment, top, power_factor(temperature[k]), parts, [](int, const float (&)[kPerVector<T>]) {});
        __syncthreads();
        write_sums(parts, a.partial.sums(row, s, k));
    }
    if (threadIdx.x == 0) head->argmax = memory.argmax < kSegmentLength<T> ? memory.argmax : -1;
}

// What the second look needs to know of the row. In shared memory: registers hold a segment.
template <class T> struct Row {
    RowGradient gradient;
    const Polynomial* polynomials;
    const T* x;
    T* out;
    float selected_logit, top_logit;
};

template <class T> __device__ __forceinline__ void write_segment(const FusedArgs& a, const Row<T>& row, int64_t start,
                                                                 Segment<T>& segment) {
    differentiate(a.backward, row.gradient, row.polynomials, start, segment);
    store_segment<true>(segment, row.out, start, a.backward.width);
}

template <class T> __global__ void __launch_bounds__(kThreads, 2) fused_rows(const FusedArgs a) {
    constexpr int kUints = kSegmentBytes / 16;
    constexpr int64_t kLength = kSegmentLength<T>;
    extern __shared__ uint4 kept_segments[];
    __shared__ ReduceMemory memory;
    __shared__ Row<T> known;
    const int segments = int(a.plan.segments), last = segments - 1, first_kept = last - a.plan.kept;
    const int64_t vocab = a.forward.vocab;

    Segment<T> segment;
    if (!row_is_skipped(a.forward.selected, blockIdx.x)) {
        const T* x = a.forward.logits.row<const T>(blockIdx.x);
        for (int s = 0; s < segments; ++s) {
            segment.template load<true, false>(x, s * kLength, vocab, s >= first_kept);
            if (s >= first_kept && s < last) keep(segment, kept_segments + (s - first_kept) * kUints);
            sum_segment(a, blockIdx.x, s, segment, memory);
        }
    }
    if (warp_index() == 0) {
        const int64_t row = blockIdx.x;
        __syncwarp();  // this warp alone wrote the parts of the segments
        finish_row(a.forward, a.partial, row);
        __syncwarp();
        prepare_row(a.backward, a.prepared, row);
        const T* x = a.forward.logits.row<const T>(row);
        if (lane_index() == 0) {
            const RowGradient g = a.prepared.rows[row];
            const int64_t id = a.forward.selected.ids[row];
            known.gradient = g;
            known.polynomials = a.prepared.polynomials + row * a.forward.temperatures.count;
            known.x = x;
            known.out = a.backward.out.template row<T>(row);
            known.selected_logit = id >= 0 && id < vocab ? to_float(x[id]) : -infinity();
            known.top_logit = g.top_column >= 0 ? to_float(x[g.top_column]) : -infinity();
        }
        __syncwarp();
        // This warp's part of the last segment gave way to the numbers of the row.
        segment.template load<true, false>(x, last * kLength, known.gradient.kind >= RowGradient::kSimple ? vocab : 0);
    }
    __syncthreads();

    const bool read = known.gradient.kind >= RowGradient::kSimple;
    for (int s = last; s >= 0; --s) {
        if (read && s < first_kept) {
            __syncthreads();  // whoever reads across a border finds a column either written or not
            segment.template load<true, false>(known.x, s * kLength, vocab, true);
            __syncthreads();  // every lane has read its neighbours' columns before they are replaced
        } else if (read && s < last) {
            take_back(segment, kept_segments + (s - first_kept) * kUints);
        }
        write_segment(a, known, s * kLength, segment);
    }
    for (int64_t s = segments; s < a.plan.written; ++s) {
        segment.fill(s * kLength, vocab, 0.0f, -infinity());
        write_segment(a, known, s * kLength, segment);
    }
    if (!read) return;
    __syncthreads();  // the columns below are written twice, in this order
    const auto logit = [&](int64_t column) {
        return column == known.gradient.top_column ? known.top_logit : known.selected_logit;
    };
    rewrite_selected<T>(a.backward, known.gradient, known.polynomials, blockIdx.x, 0, vocab, logit);
}

size_t carve(FusedArgs& a, void* workspace) {
    const size_t used = carve(a.partial, workspace, a.forward.logits, a.forward.vocab, a.forward.temperatures.count,
                              a.forward.logits.rows, ThresholdPlan(), 0);
    return used + carve(a.prepared, workspace ? static_cast<char*>(workspace) + used : nullptr, a.backward);
}

}  // namespace

size_t fused_workspace(const StatisticsArgs& forward, const StatisticsBackwardArgs& backward) {
    FusedArgs a{forward, backward, {}, {}, {}};
    return carve(a, nullptr);
}

int launch_fused(const StatisticsArgs& forward, const StatisticsBackwardArgs& backward, void* workspace,
                 Stream stream) {
    const int64_t rows = forward.logits.rows;
    if (rows == 0) return 0;
    if (rows > kMostBlocks) return int(cudaErrorInvalidConfiguration);
    FusedArgs a{forward, backward, {}, {}, plan_two_looks(forward.logits, forward.vocab, backward.width, 1)};
    carve(a, workspace);
    return with_storage(forward.logits.dtype, [&](auto storage) {
        const auto kernel = fused_rows<decltype(storage)>;
        if (const int error = allow_shared(kernel, a.plan.shared_bytes)) return error;
        kernel<<<unsigned(rows), kThreads, a.plan.shared_bytes, stream>>>(a);
        return int(cudaGetLastError());
    });
}

}  // namespace fastcalib::cuda
