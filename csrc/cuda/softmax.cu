// softmax and log_softmax with a temperature, forward: the sum of a row's powers, then each of them over it. Two looks
// at the logits (two_looks.cuh says where the second finds them), one write. Not yet run on a GPU.
#include "two_looks.cuh"

namespace fastcalib::cuda {
namespace {

// How a row's logits become results, for all threads of a block.
struct RowScale {
    float top, b, c, inverse, log_s0;
    int defined;
};

__device__ __forceinline__ double inverse_temperature(const SoftmaxArgs& a, int64_t row) {
    return 1.0 / a.temperatures.row(row)[0];
}

// Maximum, sum of powers and kind of one segment. Ends with thread 0 writing; a barrier must follow before others read.
template <class T> __device__ __forceinline__ void sum_segment(const Segment<T>& segment, float c, ReduceMemory& memory,
                                                               SoftmaxPart* part) {
    float own_top;
    const float top = find_top<false>(segment, kSegmentLength<T>, memory, own_top);
    const int flags = threadIdx.x == 0 ? find_flags(memory) : 0;
    sum_powers<false>(segment, top, c, memory.four[0], [](int, const float (&)[kPerVector<T>]) {});
    __syncthreads();
    if (threadIdx.x != 0) return;
    double s0 = memory.four[0][0][0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) s0 += memory.four[0][w][0];
    *part = {s0, top, flags};
}

// A row from its segments, by one warp, always in the same order. Intrinsics, because two kernels share these lines.
__device__ __forceinline__ void merge_segments(const SoftmaxPart* parts, int segments, double b, RowScale& scale,
                                               float* logsumexp) {
    float top = -infinity();
    bool undefined = false;
    for (int s = lane_index(); s < segments; s += 32) {
        top = fmaxf(top, parts[s].top);
        undefined |= parts[s].undefined != 0;
    }
    top = warp_max(top);
    undefined = __any_sync(kAllLanes, undefined);
    const double c = __dmul_rn(kLog2e, b);
    double s0 = 0;
    for (int s = lane_index(); s < segments; s += 32) {
        if (parts[s].top == -infinity()) continue;  // nothing there but masked tokens
        const double shift = __dmul_rn(c, __dadd_rn(double(parts[s].top), -double(top)));
        s0 = __fma_rn(parts[s].s0, exp2(shift), s0);
    }
    s0 = warp_sum(s0);
    if (lane_index() != 0) return;
    const bool defined = !undefined && top > -infinity();
    const double log_s0 = defined ? log(s0) : 0.0;
    scale = {top, float(b), float(c), defined ? float(1.0 / s0) : 0.0f, float(log_s0), defined};
    if (!logsumexp) return;
    *logsumexp = undefined ? __int_as_float(0x7fc00000) : defined ? float(__fma_rn(b, double(top), log_s0)) : top;
}

// What is masked or padding is -inf, which gives exactly 0, or -inf for the logarithm. `log` is the same for all
// threads and looked at once: one kernel serves both functions, or there would be twice as many to compile.
template <class T> __device__ __forceinline__ void write_segment(Segment<T>& segment, const RowScale& scale, bool log,
                                                                 T* out, int64_t start, int64_t vocab, int64_t width) {
    segment.slots = slots_before<T>(width, start);
    if (!scale.defined) {
        segment.fill(start, vocab, __int_as_float(0x7fc00000), log ? -infinity() : 0.0f);
    } else if (log) {
        segment.transform([&](int, float (&z)[kPerVector<T>]) {
#pragma unroll
            for (int u = 0; u < kPerVector<T>; ++u)
                z[u] = __fmaf_rn(__fsub_rn(z[u], scale.top), scale.b, -scale.log_s0);
        });
    } else {
        segment.transform([&](int, float (&z)[kPerVector<T>]) {
#pragma unroll
            for (int u = 0; u < kPerVector<T>; ++u) {
                const float t = __fmul_rn(__fsub_rn(z[u], scale.top), scale.c);
                z[u] = __fmul_rn(power_of_two(t), scale.inverse);
            }
        });
    }
    store_segment<true>(segment, out, start, width);
}

template <class T> __global__ void __launch_bounds__(kThreads, 2)
    softmax_rows(const SoftmaxArgs a, SoftmaxPart* all_parts, const TwoLooks plan) {
    constexpr int kUints = kSegmentBytes / 16;
    extern __shared__ uint4 kept_segments[];
    __shared__ ReduceMemory memory;
    __shared__ RowScale scale;
    const int64_t row = blockIdx.x;
    const int segments = int(plan.segments), last = segments - 1, first_kept = last - plan.kept;
    const double b = inverse_temperature(a, row);
    const float c = float(__dmul_rn(kLog2e, b));
    const T* x = a.logits.row<const T>(row);
    T* out = static_cast<T*>(a.out) + row * a.width;
    SoftmaxPart* parts = all_parts + row * segments;

    Segment<T> segment;
    for (int s = 0; s < segments; ++s) {
        segment.load(x, int64_t(s) * kSegmentLength<T>, a.vocab, s >= first_kept);
        if (s >= first_kept && s < last) keep(segment, kept_segments + (s - first_kept) * kUints);
        sum_segment(segment, c, memory, parts + s);
    }
    __syncthreads();
    if (warp_index() == 0) merge_segments(parts, segments, b, scale, static_cast<float*>(a.logsumexp) + row);
    __syncthreads();
    for (int s = last; s >= 0; --s) {
        const int64_t start = int64_t(s) * kSegmentLength<T>;
        if (s < first_kept) segment.load(x, start, a.vocab, true);
        else if (s < last) take_back(segment, kept_segments + (s - first_kept) * kUints);
        write_segment(segment, scale, a.log, out, start, a.vocab, a.width);
    }
    for (int64_t s = segments; s < plan.written; ++s) {
        segment.fill(s * kSegmentLength<T>, a.vocab, 0.0f, -infinity());
        write_segment(segment, scale, a.log, out, s * kSegmentLength<T>, a.vocab, a.width);
    }
}

template <class T> __global__ void __launch_bounds__(kThreads, 3)
    softmax_segments(const SoftmaxArgs a, SoftmaxPart* parts, const TwoLooks plan) {
    __shared__ ReduceMemory memory;
    const int64_t row = blockIdx.x / plan.segments, s = blockIdx.x % plan.segments;
    Segment<T> segment;
    segment.load(a.logits.row<const T>(row), s * kSegmentLength<T>, a.vocab);
    sum_segment(segment, float(__dmul_rn(kLog2e, inverse_temperature(a, row))), memory, parts + blockIdx.x);
}

template <class T> __global__ void __launch_bounds__(kThreads, 3)
    softmax_write(const SoftmaxArgs a, const SoftmaxPart* parts, const TwoLooks plan) {
    __shared__ RowScale scale;
    const int64_t block = int64_t(gridDim.x) - 1 - blockIdx.x;
    const int64_t row = block / plan.written, s = block % plan.written, start = s * kSegmentLength<T>;
    Segment<T> segment;  // on its way while the first warp merges
    segment.load(a.logits.row<const T>(row), start, a.vocab, true);
    if (warp_index() == 0)
        merge_segments(parts + row * plan.segments, int(plan.segments), inverse_temperature(a, row), scale,
                       s == 0 ? static_cast<float*>(a.logsumexp) + row : nullptr);
    __syncthreads();
    write_segment(segment, scale, a.log, static_cast<T*>(a.out) + row * a.width, start, a.vocab, a.width);
}

template <class T> int launch(const SoftmaxArgs& args, SoftmaxPart* parts, const TwoLooks& plan, Stream stream) {
    const int64_t rows = args.logits.rows;
    if (!plan.split) {
        const auto kernel = softmax_rows<T>;
        if (const int error = allow_shared(kernel, plan.shared_bytes)) return error;
        kernel<<<unsigned(rows), kThreads, plan.shared_bytes, stream>>>(args, parts, plan);
        return int(cudaGetLastError());
    }
    softmax_segments<T><<<unsigned(rows * plan.segments), kThreads, 0, stream>>>(args, parts, plan);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return int(error);
    softmax_write<T><<<unsigned(rows * plan.written), kThreads, 0, stream>>>(args, parts, plan);
    return int(cudaGetLastError());
}

}  // namespace

size_t softmax_workspace(const SoftmaxArgs& args) {
    Carver carver(nullptr);
    carver.take<SoftmaxPart>(args.logits.rows * plan_two_looks(args.logits, args.vocab, args.width, 1).segments);
    return carver.used();
}

int launch_softmax(const SoftmaxArgs& args, void* workspace, Stream stream) {
    if (args.logits.rows == 0) return 0;
    const TwoLooks plan = plan_two_looks(args.logits, args.vocab, args.width, 1);
    if (args.logits.rows > kMostBlocks / (plan.split ? plan.written : 1)) return int(cudaErrorInvalidConfiguration);
    SoftmaxPart* parts = Carver(workspace).take<SoftmaxPart>(args.logits.rows * plan.segments);
    return with_storage(args.logits.dtype,
                        [&](auto storage) { return launch<decltype(storage)>(args, parts, plan, stream); });
}

}  // namespace fastcalib::cuda
