// statistics: backward. One read of the logits and one write, whatever the upstream gradients. Not yet run on a GPU.
//
// A warp per row turns the upstream gradients into the coefficients of gradient.cuh; then a block per 32 KiB of a row
// does the rest. Selected tokens are written a second time, by the block that wrote their column.
#include "gradient.cuh"

namespace fastcalib::cuda {
namespace {

__global__ void __launch_bounds__(128) prepare_gradient(const StatisticsBackwardArgs a, const Prepared prepared) {
    const int64_t row = (int64_t(blockIdx.x) * 128 + threadIdx.x) / 32;
    if (row < a.logits.rows) prepare_row(a, prepared, row);
}

// Row and first column of the block's segment. Volatile: worked out again where they are needed again, not kept. With
// three blocks to a multiprocessor a thread has 80 registers, 32 of them for the segment: what is known of the row is
// read while the segment is on its way, and again after it was written.
template <class T> struct Place {
    int64_t row, start;

    __device__ __forceinline__ explicit Place(int segments) {
        unsigned block;
        asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
        row = block / unsigned(segments);
        start = int64_t(block % unsigned(segments)) * kSegmentLength<T>;
    }
};

template <class T> __device__ __forceinline__ void write_segment(const StatisticsBackwardArgs& a,
                                                                 const Prepared& prepared, int segments) {
    Segment<T> segment;
    {
        const auto [row, start] = Place<T>(segments);
        if (prepared.rows[row].kind >= RowGradient::kSimple) segment.load(a.logits.row<const T>(row), start, a.vocab);
    }
    const auto [row, start] = Place<T>(segments);
    differentiate(a, prepared.rows[row], prepared.polynomials + row * a.temperatures.count, start, segment);
    store_segment(segment, a.out.row<T>(row), start, a.width);
}

template <class T> __global__ void __launch_bounds__(kThreads, 3)
    write_gradient(const StatisticsBackwardArgs a, const Prepared prepared, int segments) {
    write_segment<T>(a, prepared, segments);
    const auto [row, start] = Place<T>(segments);
    const RowGradient g = prepared.rows[row];
    if (g.kind < RowGradient::kSimple || (!a.selected.ids && g.top_gradient == 0)) return;
    __syncthreads();  // the columns below are written twice, in this order
    const T* x = a.logits.row<const T>(row);
    rewrite_selected<T>(a, g, prepared.polynomials + row * a.temperatures.count, row, start,
                        min(start + kSegmentLength<T>, a.vocab), [&](int64_t column) { return to_float(x[column]); });
}

}  // namespace

size_t statistics_backward_workspace(const StatisticsBackwardArgs& args) {
    Prepared prepared;
    return carve(prepared, nullptr, args);
}

int launch_statistics_backward(const StatisticsBackwardArgs& args, void* workspace, Stream stream) {
    const int64_t rows = args.logits.rows, segments = divide_up(args.width, segment_length(args.logits.dtype));
    if (rows == 0) return 0;
    if (rows * segments > 0x7fffffff) return int(cudaErrorInvalidConfiguration);
    Prepared prepared;
    carve(prepared, workspace, args);
    prepare_gradient<<<unsigned(divide_up(rows * 32, 128)), 128, 0, stream>>>(args, prepared);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return int(error);
    return with_storage(args.logits.dtype, [&](auto storage) {
        using T = decltype(storage);
        write_gradient<T><<<unsigned(rows * segments), kThreads, 0, stream>>>(args, prepared, int(segments));
        return int(cudaGetLastError());
    });
}

}  // namespace fastcalib::cuda
