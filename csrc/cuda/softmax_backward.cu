// softmax and log_softmax, backward. With p (or log p) the result of forward and g its gradient (csrc/cpu/softmax.h):
//   softmax      dz = b p (g - sum g p)          log_softmax   dz = b (g - p sum g)          dT = -sum log p dz
// Two looks at g and at the result (two_looks.cuh says where the second finds them), one write; the gradient to the
// temperature comes from the second look. A masked token (p = 0, log p = -inf) takes no part and gets exactly 0, and so
// does all of a row of -inf; a row with NaN gets NaN. Not yet run on a GPU.
#include "two_looks.cuh"

namespace fastcalib::cuda {
namespace {

// What the threads of a block know of their row.
struct RowGradient {
    float b, total;   // 1/T, and the sum over the row
    float logsumexp;  // finite, or -inf for a row of -inf, or NaN
    __device__ __forceinline__ bool defined() const { return is_finite(logsumexp); }
    __device__ __forceinline__ float instead() const { return isnan(logsumexp) ? __int_as_float(0x7fc00000) : 0.0f; }
};

template <class T> struct Pair {
    Segment<T> grad, result;

    // Call body(u, g, r) for each element of a thread.
    template <class Body> __device__ __forceinline__ void each(const Body& body) const {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            if (j >= grad.slots) continue;
            float g[kPerVector<T>], r[kPerVector<T>];
            widen<T>(grad.vectors[j], g);
            widen<T>(result.vectors[j], r);
#pragma unroll
            for (int u = 0; u < kPerVector<T>; ++u) body(u, g[u], r[u]);
        }
    }
};

// Where the inputs of a segment come from.
template <class T> struct Source {
    const T *grad, *result;

    __device__ __forceinline__ Source(const SoftmaxArgs& a, int64_t row)
        : grad(a.logits.row<const T>(row)), result(static_cast<const T*>(a.saved) + row * a.width) {}
    __device__ __forceinline__ void load(Pair<T>& pair, int64_t start, int64_t vocab, bool last_time) const {
        pair.grad.load(grad, start, vocab, last_time);
        pair.result.load(result, start, vocab, last_time);
    }
};

// Is the token of this result one that takes part? Beyond the real columns a result is read as -inf.
template <bool Log> __device__ __forceinline__ bool takes_part(float r) { return r > (Log ? -infinity() : 0.0f); }

template <bool Log> __device__ __forceinline__ float gradient_of(float g, float r, const RowGradient& row) {
    if constexpr (Log) {
        const float p = power_of_two(__fmul_rn(r, float(kLog2e)));
        return __fmul_rn(row.b, __fmaf_rn(-p, row.total, g));
    } else {
        return __fmul_rn(row.b, __fmul_rn(r, __fadd_rn(g, -row.total)));
    }
}

// Sum over a block of one number of each thread, for thread 0. Calls take turns with the two halves of the memory: who
// still reads one half is waited for at the barrier of the next call, before anyone writes it again.
struct BlockSums {
    double half[2][kWarps];
};
__device__ __forceinline__ double block_sum(double value, BlockSums& memory, int turn) {
    double* parts = memory.half[turn % 2];
    value = warp_sum(value);
    if (lane_index() == 0) parts[warp_index()] = value;
    __syncthreads();
    return threadIdx.x == 0 ? over_warps(parts) : 0.0;
}

// sum g p, or sum g over tokens that take part; even and odd elements apart, chains of 32 terms.
template <bool Log, class T> __device__ __forceinline__ double sum_products(const Pair<T>& pair) {
    float sums[2] = {0, 0};
    pair.each([&](int u, float g, float r) {
        const float sum = Log ? __fadd_rn(sums[u % 2], g) : __fmaf_rn(g, r, sums[u % 2]);
        sums[u % 2] = takes_part<Log>(r) ? sum : sums[u % 2];
    });
    return double(sums[0]) + double(sums[1]);
}

// -sum log p dz.
template <bool Log, class T>
__device__ __forceinline__ double sum_temperature(const Pair<T>& pair, const RowGradient& row) {
    float sums[2] = {0, 0};
    pair.each([&](int u, float g, float r) {
        const float log_p = Log ? r : __fmul_rn(__log2f(r), float(kLn2));
        const float sum = __fmaf_rn(-log_p, gradient_of<Log>(g, r, row), sums[u % 2]);
        sums[u % 2] = takes_part<Log>(r) ? sum : sums[u % 2];
    });
    return double(sums[0]) + double(sums[1]);
}

template <bool Log, class T> __device__ __forceinline__ void differentiate(Pair<T>& pair, const RowGradient& row) {
    pair.grad.transform([&](int j, float (&g)[kPerVector<T>]) {
        float r[kPerVector<T>];
        widen<T>(pair.result.vectors[j], r);
#pragma unroll
        for (int u = 0; u < kPerVector<T>; ++u)
            g[u] = takes_part<Log>(r[u]) ? gradient_of<Log>(g[u], r[u], row) : 0.0f;
    });
}

// `a.log` is the same for all threads and looked at once for a segment: one kernel serves both functions, or there
// would be twice as many to compile.
template <class T> __device__ __forceinline__ double sum_products(const SoftmaxArgs& a, const Pair<T>& pair) {
    return a.log ? sum_products<true>(pair) : sum_products<false>(pair);
}
template <class T> __device__ __forceinline__ double sum_temperature(const SoftmaxArgs& a, const Pair<T>& pair,
                                                                     const RowGradient& row) {
    return a.log ? sum_temperature<true>(pair, row) : sum_temperature<false>(pair, row);
}
template <class T> __device__ __forceinline__ void write_segment(const SoftmaxArgs& a, Pair<T>& pair,
                                                                 const RowGradient& known, int64_t row, int64_t start) {
    pair.grad.slots = slots_before<T>(a.width, start);
    if (!known.defined()) pair.grad.fill(start, a.vocab, known.instead(), 0.0f);
    else if (a.log) differentiate<true>(pair, known);
    else differentiate<false>(pair, known);
    store_segment<true>(pair.grad, static_cast<T*>(a.out) + row * a.width, start, a.width);
}

struct Parts {
    double *products = nullptr, *temperatures = nullptr;  // (N, segments)
};

// What a row needs before it is written, by one warp: the same order whoever made the parts.
__device__ __forceinline__ void merge_products(const SoftmaxArgs& a, int64_t row, const double* products, int segments,
                                               RowGradient& to) {
    const double total = sum_over_segments(products, segments);
    if (lane_index() != 0) return;
    to = {float(1.0 / a.temperatures.row(row)[0]), float(total), static_cast<const float*>(a.logsumexp)[row]};
}

__device__ __forceinline__ void finish_temperature(const SoftmaxArgs& a, int64_t row, const double* parts,
                                                   int segments) {
    const RowGradient known{0, 0, static_cast<const float*>(a.logsumexp)[row]};
    const double sum = sum_over_segments(parts, segments);
    if (lane_index() == 0) a.grad_temperature[row] = known.defined() ? sum : double(known.instead());
}

template <class T> __global__ void __launch_bounds__(kThreads, 2)
    softmax_gradient_rows(const SoftmaxArgs a, const Parts all, const TwoLooks plan) {
    constexpr int kUints = kSegmentBytes / 16;
    extern __shared__ uint4 kept_pairs[];
    __shared__ BlockSums memory;
    __shared__ RowGradient known;
    const int64_t row = blockIdx.x;
    const int segments = int(plan.segments), last = segments - 1, first_kept = last - plan.kept;
    const Source<T> source(a, row);

    Pair<T> pair;
    for (int s = 0; s < segments; ++s) {
        source.load(pair, int64_t(s) * kSegmentLength<T>, a.vocab, s >= first_kept);
        if (s >= first_kept && s < last) {
            keep(pair.grad, kept_pairs + 2 * (s - first_kept) * kUints);
            keep(pair.result, kept_pairs + (2 * (s - first_kept) + 1) * kUints);
        }
        const double sum = block_sum(sum_products(a, pair), memory, s);
        if (threadIdx.x == 0) all.products[row * segments + s] = sum;
    }
    __syncthreads();
    if (warp_index() == 0) merge_products(a, row, all.products + row * segments, segments, known);
    __syncthreads();
    for (int s = last; s >= 0; --s) {
        const int64_t start = int64_t(s) * kSegmentLength<T>;
        if (s < first_kept) {
            source.load(pair, start, a.vocab, true);
        } else if (s < last) {
            take_back(pair.grad, kept_pairs + 2 * (s - first_kept) * kUints);
            take_back(pair.result, kept_pairs + (2 * (s - first_kept) + 1) * kUints);
        }
        if (a.grad_temperature) {
            const double sum = block_sum(sum_temperature(a, pair, known), memory, s);
            if (threadIdx.x == 0) all.temperatures[row * segments + s] = sum;
        }
        write_segment(a, pair, known, row, start);
    }
    for (int64_t s = segments; s < plan.written; ++s) {
        pair.result.fill(s * kSegmentLength<T>, a.vocab, 0.0f, -infinity());
        write_segment(a, pair, known, row, s * kSegmentLength<T>);
    }
    if (!a.grad_temperature) return;
    __syncthreads();
    if (warp_index() == 0) finish_temperature(a, row, all.temperatures + row * segments, segments);
}

template <class T> __global__ void __launch_bounds__(kThreads, 2)
    softmax_gradient_segments(const SoftmaxArgs a, double* products, const TwoLooks plan) {
    __shared__ BlockSums memory;
    const int64_t row = blockIdx.x / plan.segments, s = blockIdx.x % plan.segments;
    Pair<T> pair;
    Source<T>(a, row).load(pair, s * kSegmentLength<T>, a.vocab, false);
    const double sum = block_sum(sum_products(a, pair), memory, 0);
    if (threadIdx.x == 0) products[blockIdx.x] = sum;
}

template <class T> __global__ void __launch_bounds__(kThreads, 2)
    softmax_gradient_write(const SoftmaxArgs a, const Parts all, const TwoLooks plan) {
    __shared__ BlockSums memory;
    __shared__ RowGradient known;
    const int64_t block = int64_t(gridDim.x) - 1 - blockIdx.x;
    const int64_t row = block / plan.written, s = block % plan.written, start = s * kSegmentLength<T>;
    Pair<T> pair;  // on its way while the first warp merges
    Source<T>(a, row).load(pair, start, a.vocab, true);
    if (warp_index() == 0)
        merge_products(a, row, all.products + row * plan.segments, int(plan.segments), known);
    __syncthreads();
    if (a.grad_temperature && s < plan.segments) {
        const double sum = block_sum(sum_temperature(a, pair, known), memory, 0);
        if (threadIdx.x == 0) all.temperatures[row * plan.segments + s] = sum;
    }
    write_segment(a, pair, known, row, start);
}

__global__ void __launch_bounds__(kThreads) finish_temperatures(const SoftmaxArgs a, const Parts all, int segments) {
    const int64_t row = int64_t(blockIdx.x) * kWarps + warp_index();
    if (row < a.logits.rows) finish_temperature(a, row, all.temperatures + row * segments, segments);
}

template <class T> int launch(const SoftmaxArgs& args, const Parts& parts, const TwoLooks& plan, Stream stream) {
    const int64_t rows = args.logits.rows;
    if (!plan.split) {
        const auto kernel = softmax_gradient_rows<T>;
        if (const int error = allow_shared(kernel, plan.shared_bytes)) return error;
        kernel<<<unsigned(rows), kThreads, plan.shared_bytes, stream>>>(args, parts, plan);
        return int(cudaGetLastError());
    }
    const unsigned blocks = unsigned(rows * plan.segments);
    softmax_gradient_segments<T><<<blocks, kThreads, 0, stream>>>(args, parts.products, plan);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return int(error);
    softmax_gradient_write<T><<<unsigned(rows * plan.written), kThreads, 0, stream>>>(args, parts, plan);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return int(error);
    if (!args.grad_temperature) return 0;
    finish_temperatures<<<unsigned(divide_up(rows, kWarps)), kThreads, 0, stream>>>(args, parts, int(plan.segments));
    return int(cudaGetLastError());
}

size_t carve(Parts& parts, void* workspace, const SoftmaxArgs& args, const TwoLooks& plan) {
    Carver carver(workspace);
    parts.products = carver.take<double>(args.logits.rows * plan.segments);
    if (args.grad_temperature) parts.temperatures = carver.take<double>(args.logits.rows * plan.segments);
    return carver.used();
}

}  // namespace

size_t softmax_backward_workspace(const SoftmaxArgs& args) {
    Parts parts;
    return carve(parts, nullptr, args, plan_two_looks(args.logits, args.vocab, args.width, 2));
}

int launch_softmax_backward(const SoftmaxArgs& args, void* workspace, Stream stream) {
    if (args.logits.rows == 0) return 0;
    const TwoLooks plan = plan_two_looks(args.logits, args.vocab, args.width, 2);
    if (args.logits.rows > kMostBlocks / (plan.split ? plan.written : 1)) return int(cudaErrorInvalidConfiguration);
    Parts parts;
    carve(parts, workspace, args, plan);
    return with_storage(args.logits.dtype,
                        [&](auto storage) { return launch<decltype(storage)>(args, parts, plan, stream); });
}

}  // namespace fastcalib::cuda
