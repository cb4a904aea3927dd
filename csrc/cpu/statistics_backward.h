// statistics: backward. One read of the logits and one write, whatever the upstream gradients.
//
// With y = z - max z, b = 1/T, p = softmax, E = E_p[y], C = sum p^2 and upstream gradients g, for one temperature:
//   logsumexp     dL/dz = b p                                    entropy    dH/dz = -b^2 p (y - E)
//   mean_logit    dE/dz = p (1 + b (y - E))                      collision  dC/dz = 2 b p (p - C)
//   var_logit     dVar/dz = p (b ((y - E)^2 - Var) + 2 (y - E))  log_prob   b (1[v = i] - p)
//   max_prob      b max_prob (1[v = argmax] - p)                 sum 1      std (z - mean) / ((n - 1) std)
// so dz_v = sum_k p (constant + linear y + square y^2 + power p) + unit + slope y + extra terms at selected tokens.
// The kernel takes polynomials in t = c y (clamped where p is 0 anyway, so masked tokens never form 0 * inf).
#pragma once
#include <algorithm>
#include <utility>

#include "segment.h"
#include "api.h"
#include "statistics.h"

namespace fastcalib::FASTCALIB_ISA {

struct Polynomial {
    double c = 0, log2_s0 = 0;                                // p = 2^(c y - log2_s0)
    double constant = 0, linear = 0, square = 0, power = 0;   // in t = c y
};

// Everything the gradient of one row needs.
struct RowGradient {
    enum Kind { kZero, kNaN, kSimple, kGeneral } kind = kZero;
    double max = 0, unit = 0, slope = 0;
    std::vector<Polynomial> terms;
    struct Extra {
        int64_t column;
        double z, gradient;
    };
    std::vector<Extra> extra;

    double value(double z) const {
        if (!(z > -HUGE_VAL)) return 0;
        const double y = z - max;
        double sum = unit + slope * y;
        for (const Polynomial& q : terms) {
            const double t = q.c * y, p = ::exp2(t - q.log2_s0);
            if (p > 0) sum += p * (q.constant + t * (q.linear + t * q.square) + q.power * p);
        }
        return sum;
    }
};

template <class S, class T>
FASTCALIB_ONE_BODY void prepare_gradient(const StatisticsBackwardArgs& a, int64_t row, const Betas& betas, RowGradient& g) {
    using real = typename S::real;
    const int64_t n_rows = a.logits.rows, k_count = betas.count();
    const Fields<const real> rows{static_cast<const real*>(a.rows), n_rows, k_count};
    const Fields<const real> up{static_cast<const real*>(a.grad_rows), n_rows, k_count};
    const real* saved = static_cast<const real*>(a.saved) + row * (3 + 2 * k_count);
    const real* up_token = static_cast<const real*>(a.grad_log_prob);
    const double up_sum = static_cast<const real*>(a.grad_scalars)[row];
    const double up_std = static_cast<const real*>(a.grad_scalars)[n_rows + row];
    g.terms.assign(size_t(k_count), Polynomial());
    g.extra.clear();
    g.max = saved[0];
    g.kind = RowGradient::kZero;
    if (a.selected.skips(row)) return;
    const double std = static_cast<const real*>(a.scalars)[n_rows + row], n = saved[2];
    g.slope = std > 0 && up_std != 0 ? up_std / ((n - 1) * std) : 0;
    g.unit = up_sum - g.slope * double(saved[1]);
    bool any = up_sum != 0 || up_std != 0, general = g.unit != 0 || g.slope != 0 || k_count > 1;
    double top_gradient = 0;
    const T* x = a.logits.row<const T>(row);
    const int64_t begin = a.selected.ids ? a.selected.begin(row) : 0, end = a.selected.ids ? a.selected.end(row) : 0;
    for (int64_t k = 0; k < k_count; ++k) {
        const double b = betas.b[k], y1 = saved[3 + k_count + k];
        const double g_l = up.at(0, row, k), g_h = up.at(1, row, k), g_m = up.at(2, row, k), g_c = up.at(3, row, k),
                     g_e = up.at(4, row, k), g_v = up.at(5, row, k);
        const double max_prob = rows.at(2, row, k), collision = rows.at(3, row, k), var = rows.at(5, row, k);
        double g_tokens = 0;
        for (int64_t i = begin; i < end; ++i)
            if (a.selected.ids[i] != a.selected.ignore_index) g_tokens += up_token[i * k_count + k];
        for (const double v : {g_l, g_h, g_m, g_c, g_e, g_v}) any = any || v != 0;
        for (int64_t i = begin; i < end; ++i) any = any || up_token[i * k_count + k] != 0;
        Polynomial& q = g.terms[k];
        q.c = betas.c[k];
        q.log2_s0 = double(saved[3 + k]) * kLog2e;
        const double linear = b * g_e - b * b * g_h + 2 * g_v, square = b * g_v;  // in y - E
        q.constant = b * (g_l - g_tokens) + g_e - 2 * b * g_c * collision - b * g_m * max_prob - b * g_v * var -
                     linear * y1 + square * y1 * y1;
        q.linear = (linear - 2 * square * y1) / q.c;
        q.square = square / (q.c * q.c);
        q.power = 2 * b * g_c;
        general = general || q.linear != 0 || q.square != 0 || q.power != 0;
        top_gradient += b * g_m * max_prob;
    }
    if (!any) return;
    if (std::isnan(g.max)) {
        g.kind = saved[2] == 0 ? RowGradient::kZero : RowGradient::kNaN;
        return;
    }
    // An upstream NaN or inf takes the general path, whose stores keep a NaN.
    g.kind = general || !std::isfinite(g.terms[0].constant) ? RowGradient::kGeneral : RowGradient::kSimple;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t id = a.selected.ids[i];
        if (id == a.selected.ignore_index) continue;
        double sum = 0;
        for (int64_t k = 0; k < k_count; ++k) sum += betas.b[k] * double(up_token[i * k_count + k]);
        g.extra.push_back({id, double(to_real(x[id])), sum});
    }
    if (top_gradient != 0) {
        // The lowest index of the maximum, as argmax; wanted rarely, so it is looked for again rather than kept.
        g.extra.push_back({first_not_less<S>(x, 0, a.vocab, real(g.max)), g.max, top_gradient});
    }
    // A token selected twice gets the sum of its terms before rounding to the dtype of the gradient.
    std::stable_sort(g.extra.begin(), g.extra.end(), [](const auto& l, const auto& r) { return l.column < r.column; });
}

template <class S, class T, bool Stream>
FC_INLINE void put(T* p, typename S::vec v) {
    if constexpr (Stream) S::stream(p, v);
    else S::store(p, v);
}

// dz = constant p. Finite, since p <= 1 and neither a row with a NaN nor an upstream NaN comes here.
template <class S, class T, bool Stream>
FASTCALIB_ONE_BODY void write_simple(const T* x, T* out, int64_t n, const RowGradient& g) {
    using real = typename S::real;
    using vec = typename S::vec;
    const Polynomial& q = g.terms[0];
    const vec m = S::set(real(g.max)), c = S::set(real(q.c)), shift = S::set(real(q.log2_s0)),
              factor = S::set(real(q.constant));
    const auto one = [&](const T* p) __attribute__((always_inline)) {
        return factor * S::exp2_or_zero((S::load(p) - m) * c - shift);
    };
    int64_t i = 0;
    for (; i + 4 * S::lanes <= n; i += 4 * S::lanes) {
        for (size_t byte = 0; byte < 4 * S::lanes * sizeof(T); byte += 64)
            prefetch(reinterpret_cast<const char*>(x + i) + 4096 + byte);
        for (int u = 0; u < 4; u += 2) {
            const vec a = one(x + i + u * S::lanes), b = one(x + i + (u + 1) * S::lanes);
            if constexpr (Stream) S::stream_pair(out + i + u * S::lanes, a, b);
            else S::store_pair(out + i + u * S::lanes, a, b);
        }
    }
    for (; i + S::lanes <= n; i += S::lanes) put<S, T, Stream>(out + i, one(x + i));
    if (i < n) {
        T tail[S::lanes];
        std::fill(tail, tail + S::lanes, from_real<T>(-HUGE_VAL));
        std::copy(x + i, x + n, tail);
        S::store(tail, one(tail));
        std::copy(tail, tail + (n - i), out + i);
    }
}

template <class S, class T, bool Stream>
FASTCALIB_ONE_BODY void write_general(const T* x, T* out, int64_t n, const RowGradient& g, Scratch<S>& scratch) {
    using real = typename S::real;
    using vec = typename S::vec;
    const vec m = S::set(real(g.max)), unit = S::set(real(g.unit)), slope = S::set(real(g.slope)),
              masked = S::set(-real(INFINITY)), far = S::set(real(S::lowest_exponent * 4));
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t length = std::min(kBlock, n - start);
        const int64_t padded = (length + S::lanes - 1) / S::lanes * S::lanes, whole = length / S::lanes * S::lanes;
        real *z = scratch.values, *sum = scratch.power;
        for (int64_t i = 0; i < whole; i += S::lanes) {
            prefetch(reinterpret_cast<const char*>(x + start + i) + 4096);
            S::store(z + i, S::load(x + start + i));
        }
        for (int64_t i = whole; i < padded; ++i)
            z[i] = i < length ? to_real(x[start + i]) : -real(INFINITY);
        for (int64_t i = 0; i < padded; i += S::lanes) {
            const vec v = S::load(z + i);
            S::store(sum + i, S::where_greater(v, masked, unit + slope * (v - m)));
        }
        for (const Polynomial& q : g.terms) {
            const vec c = S::set(real(q.c)), shift = S::set(real(q.log2_s0)), constant = S::set(real(q.constant)),
                      linear = S::set(real(q.linear)), square = S::set(real(q.square)), power = S::set(real(q.power));
            for (int64_t i = 0; i < padded; i += S::lanes) {
                const vec t = S::max((S::load(z + i) - m) * c, far), p = S::exp2_or_zero(t - shift);
                S::store(sum + i, S::load(sum + i) + p * (constant + t * (linear + t * square) + power * p));
            }
        }
        T* to = out + start;
        for (int64_t i = 0; i < whole; i += S::lanes) put<S, T, Stream>(to + i, S::load(sum + i));
        for (int64_t i = whole; i < length; ++i) to[i] = from_real<T>(double(sum[i]));
    }
}

template <class S, class T>
void write_columns(const StatisticsBackwardArgs& a, int64_t row, int64_t start, int64_t end, const RowGradient& g,
                   Scratch<S>& scratch) {
    const T* x = a.logits.row<const T>(row) + start;
    T* out = a.out.row<T>(row) + start;
    const int64_t n = end - start;
    if (g.kind == RowGradient::kZero || g.kind == RowGradient::kNaN) {
        std::fill(out, out + n, from_real<T>(g.kind == RowGradient::kZero ? 0.0 : double(NAN)));
        return;
    }
    // Streaming stores need whole, aligned vectors.
    const bool stream = a.nontemporal && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    if (g.kind == RowGradient::kSimple)
        stream ? write_simple<S, T, true>(x, out, n, g) : write_simple<S, T, false>(x, out, n, g);
    else
        stream ? write_general<S, T, true>(x, out, n, g, scratch) : write_general<S, T, false>(x, out, n, g, scratch);
}

template <class S, class T> FASTCALIB_ONE_BODY void write_extra(const StatisticsBackwardArgs& a, int64_t row, const RowGradient& g) {
    T* out = a.out.row<T>(row);
    for (int64_t c = a.vocab; c < a.width; ++c) out[c] = from_real<T>(0.0);
    for (size_t i = 0; i < g.extra.size();) {
        const auto& first = g.extra[i];
        double sum = 0;
        size_t j = i;
        for (; j < g.extra.size() && g.extra[j].column == first.column; ++j) sum += g.extra[j].gradient;
        if (first.z > -HUGE_VAL) out[first.column] = from_real<T>(g.value(first.z) + sum);
        i = j;
    }
}

template <class T> void statistics_backward(const StatisticsBackwardArgs& a) {
    using S = typename SimdOf<T>::type;
    const int64_t n_rows = a.logits.rows;
    const int threads = int(std::clamp<int64_t>(a.threads, 1, 1024));
    std::vector<Scratch<S>> scratch(threads);
    if (!split_rows(n_rows, a.vocab, threads)) {
        std::vector<RowGradient> gradient(threads);
        parallel_for(n_rows, threads, rows_per_run(n_rows, a.vocab, threads), [&](int64_t row, int thread) {
            Scratch<S>& own = scratch[thread];
            own.betas.set(a.temperatures.row(row), a.temperatures.count);
            prepare_gradient<S, T>(a, row, own.betas, gradient[thread]);
            const FlushDenormals flush;
            write_columns<S, T>(a, row, 0, a.vocab, gradient[thread], own);
            write_extra<S, T>(a, row, gradient[thread]);
        });
        return;
    }
    const int64_t segments = segment_count(a.vocab);
    std::vector<RowGradient> gradient(n_rows);
    for (int64_t row = 0; row < n_rows; ++row) {
        scratch[0].betas.set(a.temperatures.row(row), a.temperatures.count);
        prepare_gradient<S, T>(a, row, scratch[0].betas, gradient[row]);
    }
    parallel_for(n_rows * segments, threads, 1, [&](int64_t task, int thread) {
        const FlushDenormals flush;
        const int64_t row = task / segments, start = task % segments * kSegment;
        write_columns<S, T>(a, row, start, std::min(a.vocab, start + kSegment), gradient[row], scratch[thread]);
    });
    for (int64_t row = 0; row < n_rows; ++row) write_extra<S, T>(a, row, gradient[row]);
}

// Forward and backward in one go, for upstream gradients that are known beforehand: each row's gradient is written while
// the row is still in the cache. The same bits as one after the other.
template <class T> int64_t statistics_with_gradient(const StatisticsArgs& f, const StatisticsBackwardArgs& a) {
    using S = typename SimdOf<T>::type;
    const int64_t n_rows = f.logits.rows;
    const int threads = int(std::clamp<int64_t>(f.threads, 1, 1024));
    FirstBad bad;
    for (int64_t row = 0; row < n_rows; ++row)  // all of them first: nothing may have been overwritten when an id is bad
        if (!check_ids(f.selected, row, f.vocab, bad)) return bad.position();
    if (split_rows(n_rows, f.vocab, threads)) {
        statistics<T>(f);
        statistics_backward<T>(a);
        return -1;
    }
    std::vector<Scratch<S>> scratch(threads);
    for (auto& own : scratch) own.moments = f.moments;
    std::vector<RowGradient> gradient(threads);
    parallel_for(n_rows, threads, rows_per_run(n_rows, f.vocab, threads), [&](int64_t row, int thread) {
        Scratch<S>& own = scratch[thread];
        own.betas.set(f.temperatures.row(row), f.temperatures.count);
        if (f.selected.skips(row)) {
            skip_row<S>(f, row);
        } else {
            Head head;
            {
                const FlushDenormals flush;
                accumulate_row<S>(f.logits.row<const T>(row), f.vocab, own, head, own.row);
            }
            finish_row<S, T>(f, row, head, own.row.data(), own.betas);
        }
        prepare_gradient<S, T>(a, row, own.betas, gradient[thread]);
        const FlushDenormals flush;
        write_columns<S, T>(a, row, 0, a.vocab, gradient[thread], own);
        write_extra<S, T>(a, row, gradient[thread]);
    });
    return -1;
}

}  // namespace fastcalib::FASTCALIB_ISA
