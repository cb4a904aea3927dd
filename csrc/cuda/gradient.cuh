// Upstream gradients of a row's statistics to the gradient of its logits.
//
// The derivatives are those of csrc/cpu/statistics_backward.h: with y = z - max z and t = c y,
//     dz_v = sum_k p (constant + linear t + square t^2 + power p) + unit + slope y + terms at selected tokens and at
//     the maximum.
#pragma once
#include "kernels.h"
#include "store.cuh"

namespace fastcalib::cuda {

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

inline size_t carve(Prepared& prepared, void* workspace, const StatisticsBackwardArgs& args) {
    Carver carver(workspace);
    prepared.rows = carver.take<RowGradient>(args.logits.rows);
    prepared.polynomials = carver.take<Polynomial>(args.logits.rows * args.temperatures.count);
    return carver.used();
}

// The coefficients of a row from its statistics and their upstream gradients, by one warp.
__device__ __forceinline__ void prepare_row(const StatisticsBackwardArgs& a, const Prepared& prepared, int64_t row) {
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
        g.top_gradient = fma(b * g_m, max_prob, g.top_gradient);
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

// `sum` and what one temperature adds to it at y = z - max. Compilers fuse nothing here (CMakeLists.txt): fmaf does.
__device__ __forceinline__ float add_temperature(float sum, float y, const Polynomial& q) {
    const float t = fmaxf(y * q.c, -504.0f), p = power_of_two(t - q.log2_s0);
    return fmaf(p, fmaf(q.power, p, fmaf(t, fmaf(t, q.square, q.linear), q.constant)), sum);
}

// What does not depend on a temperature; a masked logit has none of it.
__device__ __forceinline__ float flat_gradient(float z, float y, const RowGradient& g) {
    return z > -infinity() ? fmaf(g.slope, y, g.unit) : 0.0f;
}

__device__ __forceinline__ float gradient_of(float z, const RowGradient& g, const Polynomial* polynomials,
                                             int64_t k_count) {
    const float y = z - g.max;
    float sum = flat_gradient(z, y, g);
    for (int64_t k = 0; k < k_count; ++k) sum = add_temperature(sum, y, polynomials[k]);
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
                                                           float z, double more) {
    if (!(z > -infinity())) return;
    const float value = float(double(gradient_of(z, g, polynomials, a.temperatures.count)) + more);
    float pair[kPerWord<T>] = {value};
    const uint32_t word = narrow(pair, T());
    T* to = a.out.row<T>(row) + column;
    if constexpr (kPerWord<T> == 1) *to = __uint_as_float(word);
    else to->bits = uint16_t(word);
}

// Selected tokens within [start, stop), and the maximum: written a second time, with all their terms added before
// rounding. A token selected twice gets them all at once, from the thread of its first place in the row's list.
// logit(column) is what forward saw there.
template <class T, class Logit>
__device__ __forceinline__ void rewrite_selected(const StatisticsBackwardArgs& a, const RowGradient& g,
                                                 const Polynomial* polynomials, int64_t row, int64_t start,
                                                 int64_t stop, const Logit& logit) {
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
        rewrite<T>(a, g, polynomials, row, id, logit(id), more);
    }
    if (threadIdx.x != 0 || !top_here) return;
    for (int64_t i = begin; i < end; ++i)
        if (a.selected.ids[i] == g.top_column && g.top_column != a.selected.ignore_index) return;  // done above
    rewrite<T>(a, g, polynomials, row, g.top_column, logit(g.top_column), g.top_gradient);
}

// The gradient in the place of a segment's logits, in as many slots as hold columns before `width`: the padding too is
// written, it holds -inf, hence 0.
template <class T>
__device__ __forceinline__ void differentiate(const StatisticsBackwardArgs& a, const RowGradient& g,
                                              const Polynomial* polynomials, int64_t start, Segment<T>& segment) {
    constexpr int kPer = kPerVector<T>;
    segment.slots = slots_before<T>(a.width, start);
    if (g.kind == RowGradient::kSimple) {
        const Polynomial q = polynomials[0];
        // dz = constant p; a masked logit gives 2^-inf = 0.
        segment.transform([&](int, float (&z)[kPer]) {
#pragma unroll
            for (int u = 0; u < kPer; ++u) z[u] = q.constant * power_of_two(fmaf(z[u] - g.max, q.c, -q.log2_s0));
        });
    } else if (g.kind == RowGradient::kGeneral) {
        segment.transform([&](int, float (&z)[kPer]) {
            float y[kPer], sum[kPer];
#pragma unroll
            for (int u = 0; u < kPer; ++u) {
                y[u] = z[u] - g.max;
                sum[u] = flat_gradient(z[u], y[u], g);
            }
            for (int64_t k = 0; k < a.temperatures.count; ++k) {
                const Polynomial q = polynomials[k];
#pragma unroll
                for (int u = 0; u < kPer; ++u) sum[u] = add_temperature(sum[u], y[u], q);
            }
#pragma unroll
            for (int u = 0; u < kPer; ++u) z[u] = sum[u];
        });
    } else {
        segment.fill(start, a.vocab, g.kind == RowGradient::kZero ? 0.0f : __int_as_float(0x7fc00000), 0.0f);
    }
}

}  // namespace fastcalib::cuda
