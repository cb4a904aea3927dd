// statistics: backward. One read of the logits and one write, whatever the upstream gradients. Not yet run on a GPU.
//
// The derivatives are those of csrc/cpu/statistics_backward.h: with y = z - max z and t = c y,
//     dz_v = sum_k p (constant + linear t + square t^2 + power p) + unit + slope y + terms at selected tokens and at
//     the maximum.
// A warp per row turns the upstream gradients into these coefficients; then a block per 32 KiB of a row does the rest.
// Selected tokens are written a second time, by the block that wrote their column, with all their terms added before
// rounding.
#include "kernels.h"
#include "store.cuh"

namespace fastcalib::cuda {
namespace {

struct __align__(16) Polynomial {
    float c, log2_s0, constant, linear;  // p = 2^(c y - log2_s0)
    float square, power, unused[2];
};

struct RowGradient {
    enum Kind : int { kZero, kNaN, kSimple, kGeneral };
    double top_gradient;  // of the first of the largest logits
    int64_t top_column;   // -1: not wanted
    float max, unit, slope;
    int kind;
};

struct Prepared {
    RowGradient* rows = nullptr;        // (N,)
    Polynomial* polynomials = nullptr;  // (N, K)
};

__global__ void __launch_bounds__(128) prepare_gradient(const StatisticsBackwardArgs a, const Prepared prepared) {
    const int64_t row = (int64_t(blockIdx.x) * 128 + threadIdx.x) / 32;
    if (row >= a.logits.rows) return;
    const int lane = lane_index();
    const int64_t n_rows = a.logits.rows, k_count = a.temperatures.count;
    const float* saved = static_cast<const float*>(a.saved) + row * (3 + 2 * k_count);
    const float* up_token = static_cast<const float*>(a.grad_log_prob);
    const auto field = [&](const void* data, int f, int64_t k) {
        return double(static_cast<const float*>(data)[(f * n_rows + row) * k_count + k]);
    };
    RowGradient g{0.0, -1, saved[0], 0, 0, RowGradient::kZero};
    if (row_is_skipped(a.selected, row)) {
        if (lane == 0) prepared.rows[row] = g;
        return;
    }
    const double up_sum = static_cast<const float*>(a.grad_scalars)[row];
    const double up_std = static_cast<const float*>(a.grad_scalars)[n_rows + row];
    const double std = static_cast<const float*>(a.scalars)[n_rows + row], n = saved[2];
    const double slope = std > 0 && up_std != 0 ? up_std / ((n - 1) * std) : 0,
                 unit = up_sum - slope * double(saved[1]);
    bool any = up_sum != 0 || up_std != 0, general = unit != 0 || slope != 0 || k_count > 1;
    const int64_t begin = a.selected.ids ? a.selected.begin(row) : 0, end = a.selected.ids ? a.selected.end(row) : 0;
    for (int64_t k = 0; k < k_count; ++k) {
        double g_tokens = 0;
        bool any_token = false;
        for (int64_t i = begin + lane; i < end; i += 32) {
            const double v = up_token[i * k_count + k];
            any_token |= v != 0;
            if (kind_of(a.selected, a.vocab, i) == Token::kGood) g_tokens += v;
        }
        g_tokens = warp_sum(g_tokens);
        any |= __any_sync(kAllLanes, any_token);
        const double b = 1.0 / a.temperatures.row(row)[k], c = kLog2e * b, y1 = saved[3 + k_count + k];
        const double g_l = field(a.grad_rows, 0, k), g_h = field(a.grad_rows, 1, k), g_m = field(a.grad_rows, 2, k),
                     g_c = field(a.grad_rows, 3, k), g_e = field(a.grad_rows, 4, k), g_v = field(a.grad_rows, 5, k);
        const double max_prob = field(a.rows, 2, k), collision = field(a.rows, 3, k), var = field(a.rows, 5, k);
        any |= g_l != 0 || g_h != 0 || g_m != 0 || g_c != 0 || g_e != 0 || g_v != 0;
        const double linear = b * g_e - b * b * g_h + 2 * g_v, square = b * g_v;  // in y - E
        Polynomial q;
        q.c = float(c);
        q.log2_s0 = float(double(saved[3 + k]) * kLog2e);
        q.constant = float(b * (g_l - g_tokens) + g_e - 2 * b * g_c * collision - b * g_m * max_prob - b * g_v * var -
                           linear * y1 + square * y1 * y1);
        q.linear = float((linear - 2 * square * y1) / c);
        q.square = float(square / (c * c));
        q.power = float(2 * b * g_c);
        q.unused[0] = q.unused[1] = 0;
        general |= q.linear != 0 || q.square != 0 || q.power != 0;
        g.top_gradient += b * g_m * max_prob;
        if (lane == 0) prepared.polynomials[row * k_count + k] = q;
    }
    g.unit = float(unit);
    g.slope = float(slope);
    if (any) g.kind = general ? RowGradient::kGeneral : RowGradient::kSimple;
    // A row without a softmax: saved[2] tells "all -inf" from NaN.
    if (any && isnan(g.max)) g.kind = saved[2] == 0 ? RowGradient::kZero : RowGradient::kNaN;
    if (g.kind < RowGradient::kSimple) g.top_gradient = 0;
    if (g.top_gradient != 0) g.top_column = a.argmax[row];
    if (lane == 0) prepared.rows[row] = g;
}

__device__ __forceinline__ float gradient_of(float z, const RowGradient& g, const Polynomial* polynomials,
                                             int64_t k_count) {
    const float y = z - g.max;
    float sum = z > -infinity() ? g.unit + g.slope * y : 0.0f;
    for (int64_t k = 0; k < k_count; ++k) {
        const Polynomial q = polynomials[k];
        const float t = fmaxf(y * q.c, -504.0f), p = power_of_two(t - q.log2_s0);
        sum += p * (q.constant + t * (q.linear + t * q.square) + q.power * p);
    }
    return sum;
}

// All gradient of z at `column` that comes through log p of selected tokens: those at positions from `i` on.
__device__ __forceinline__ double token_gradient(const StatisticsBackwardArgs& a, int64_t row, int64_t column,
                                                 int64_t i, int64_t end) {
    const double* temperature = a.temperatures.row(row);
    const float* up_token = static_cast<const float*>(a.grad_log_prob);
    double total = 0;
    for (; i < end; ++i) {
        if (a.selected.ids[i] != column) continue;
        double sum = 0;
        for (int64_t k = 0; k < a.temperatures.count; ++k)
            sum += 1.0 / temperature[k] * double(up_token[i * a.temperatures.count + k]);
        total += sum;
    }
    return total;
}

template <class T> __device__ __forceinline__ void rewrite(const StatisticsBackwardArgs& a, const RowGradient& g,
                                                           const Polynomial* polynomials, int64_t row, int64_t column,
                                                           double more) {
    const float z = to_float(a.logits.row<const T>(row)[column]);
    if (!(z > -infinity())) return;
    const float value = float(double(gradient_of(z, g, polynomials, a.temperatures.count)) + more);
    float pair[kPerWord<T>] = {value};
    const uint32_t word = narrow(pair, T());
    T* to = a.out.row<T>(row) + column;
    if constexpr (kPerWord<T> == 1) *to = __uint_as_float(word);
    else to->bits = uint16_t(word);
}

// Selected tokens within [start, end of the segment), and the maximum. A token selected twice gets all its terms at
// once, from the thread of its first place in the row's list.
template <class T> __device__ __forceinline__ void rewrite_selected(const StatisticsBackwardArgs& a,
                                                                    const RowGradient& g, const Polynomial* polynomials,
                                                                    int64_t row, int64_t start) {
    const int64_t stop = min(start + kSegmentLength<T>, a.vocab);
    const bool top_here = g.top_gradient != 0 && g.top_column >= start && g.top_column < stop;
    const int64_t begin = a.selected.ids ? a.selected.begin(row) : 0, end = a.selected.ids ? a.selected.end(row) : 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        const int64_t id = a.selected.ids[i];
        if (id < start || id >= stop || id == a.selected.ignore_index) continue;
        bool repeated = false;
        for (int64_t j = begin; j < i && !repeated; ++j) repeated = a.selected.ids[j] == id;
        if (repeated) continue;
        double more = token_gradient(a, row, id, i, end);
        if (top_here && id == g.top_column) more += g.top_gradient;
        rewrite<T>(a, g, polynomials, row, id, more);
    }
    if (threadIdx.x != 0 || !top_here) return;
    for (int64_t i = begin; i < end; ++i)
        if (a.selected.ids[i] == g.top_column && g.top_column != a.selected.ignore_index) return;  // done above
    rewrite<T>(a, g, polynomials, row, g.top_column, g.top_gradient);
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
    constexpr int kPer = kPerVector<T>;
    Segment<T> segment;
    {
        const auto [row, start] = Place<T>(segments);
        if (prepared.rows[row].kind >= RowGradient::kSimple) segment.load(a.logits.row<const T>(row), start, a.vocab);
    }
    const auto [row, start] = Place<T>(segments);
    const RowGradient g = prepared.rows[row];
    const Polynomial* polynomials = prepared.polynomials + row * a.temperatures.count;
    T* out = a.out.row<T>(row);
    const int slots = int(min(int64_t(kVectors), (a.width - start + kStride<T> - 1) / kStride<T>));
    segment.slots = slots;  // the padding too is written: it holds -inf, hence 0
    if (g.kind == RowGradient::kSimple) {
        const Polynomial q = polynomials[0];
        // dz = constant p; a masked logit gives 2^-inf = 0.
        segment.transform([&](int, float (&z)[kPer]) {
#pragma unroll
            for (int u = 0; u < kPer; ++u) z[u] = q.constant * power_of_two((z[u] - g.max) * q.c - q.log2_s0);
        });
    } else if (g.kind == RowGradient::kGeneral) {
        segment.transform([&](int, float (&z)[kPer]) {
            float y[kPer], sum[kPer];
#pragma unroll
            for (int u = 0; u < kPer; ++u) {
                y[u] = z[u] - g.max;
                sum[u] = z[u] > -infinity() ? g.unit + g.slope * y[u] : 0.0f;
            }
            for (int64_t k = 0; k < a.temperatures.count; ++k) {
                const Polynomial q = polynomials[k];
#pragma unroll
                for (int u = 0; u < kPer; ++u) {
                    const float t = fmaxf(y[u] * q.c, -504.0f), p = power_of_two(t - q.log2_s0);
                    sum[u] += p * (q.constant + t * (q.linear + t * q.square) + q.power * p);
                }
            }
#pragma unroll
            for (int u = 0; u < kPer; ++u) z[u] = sum[u];
        });
    } else {
        segment.fill(start, a.vocab, g.kind == RowGradient::kZero ? 0.0f : __int_as_float(0x7fc00000), 0.0f);
    }
    store_segment(segment, out, start, a.width);
}

template <class T> __global__ void __launch_bounds__(kThreads, 3)
    write_gradient(const StatisticsBackwardArgs a, const Prepared prepared, int segments) {
    write_segment<T>(a, prepared, segments);
    const auto [row, start] = Place<T>(segments);
    const RowGradient g = prepared.rows[row];
    if (g.kind < RowGradient::kSimple || (!a.selected.ids && g.top_gradient == 0)) return;
    __syncthreads();  // the columns below are written twice, in this order
    rewrite_selected<T>(a, g, prepared.polynomials + row * a.temperatures.count, row, start);
}

size_t carve(Prepared& prepared, void* workspace, const StatisticsBackwardArgs& args) {
    Carver carver(workspace);
    prepared.rows = carver.take<RowGradient>(args.logits.rows);
    prepared.polynomials = carver.take<Polynomial>(args.logits.rows * args.temperatures.count);
    return carver.used();
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
