// softmax and log_softmax with a temperature. Forward: the row's sums, then a second look (the row is still in the
// second-level cache) that writes. Backward, with p the result and g its gradient:
//   softmax      dz = b p (g - sum g p)          log_softmax   dz = b (g - p sum g)
//   dT = -1/T sum z dz, and since z = T (log p + L) and sum dz = 0:  dT = -sum log p dz
// A masked token (p = 0, log p = -inf) takes no part and gets exactly 0.
#pragma once
#include <limits>

#include "segment.h"
#include "api.h"
#include "selection.h"
#include "statistics_backward.h"

namespace fastcalib::FASTCALIB_ISA {

template <class S, class T> FASTCALIB_ONE_BODY void write_log(const T* x, T* out, int64_t n, double max, double b, double log_s0) {
    using real = typename S::real;
    const auto m = S::set(real(max)), beta = S::set(real(b)), shift = S::set(real(log_s0));
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) {
        prefetch(reinterpret_cast<const char*>(x + i) + 4096);
        S::store(out + i, (S::load(x + i) - m) * beta - shift);
    }
    for (; i < n; ++i) out[i] = from_real<T>(double(std::fma(to_real(x[i]) - real(max), real(b), -real(log_s0))));
}

template <class S, class T>
void write_softmax(const SoftmaxArgs& a, int64_t row, int64_t start, int64_t end, const Head& head, const Sums& sums) {
    T* out = static_cast<T*>(a.out) + row * a.width;
    if (end == a.vocab) std::fill(out + a.vocab, out + a.width, from_real<T>(a.log ? -HUGE_VAL : 0.0));
    if (head.undefined || head.argmax < 0) {
        std::fill(out + start, out + end, from_real<T>(double(NAN)));
        return;
    }
    const T* x = a.logits.row<const T>(row);
    const double b = 1.0 / a.temperatures.row(row)[0];
    if (a.log) {
        write_log<S>(x + start, out + start, end - start, head.max, b, std::log(sums.s0));
        return;
    }
    RowGradient g;  // p itself is the gradient of the logsumexp
    g.max = head.max;
    g.terms.push_back({kLog2e * b, std::log2(sums.s0), 1.0});
    write_simple<S, T, false>(x + start, out + start, end - start, g);
}

template <class S> FASTCALIB_ONE_BODY void write_logsumexp(const SoftmaxArgs& a, int64_t row, const Head& head, const Sums& sums) {
    using real = typename S::real;
    static_cast<real*>(a.logsumexp)[row] = head.undefined    ? real(NAN)
                                           : head.argmax < 0 ? -real(INFINITY)
                                                             : real(head.max / a.temperatures.row(row)[0] + std::log(sums.s0));
}

template <class T> void softmax(const SoftmaxArgs& a) {
    using S = typename SimdOf<T>::type;
    const int64_t n_rows = a.logits.rows, segments = segment_count(a.vocab);
    const int threads = int(std::clamp<int64_t>(a.threads, 1, 1024));
    std::vector<Scratch<S>> scratch(threads);
    if (!split_rows(n_rows, a.vocab, threads)) {
        parallel_for(n_rows, threads, rows_per_run(n_rows, a.vocab, threads), [&](int64_t row, int thread) {
            const FlushDenormals flush;
            Scratch<S>& own = scratch[thread];
            own.betas.set(a.temperatures.row(row), 1);
            Head head;
            accumulate_row<S>(a.logits.row<const T>(row), a.vocab, own, head, own.row);
            write_logsumexp<S>(a, row, head, own.row[0]);
            write_softmax<S, T>(a, row, 0, a.vocab, head, own.row[0]);
        });
        return;
    }
    SplitState<S> state;
    state.template accumulate<T>(a.logits, a.vocab, a.temperatures, threads, scratch);
    for (int64_t row = 0; row < n_rows; ++row) write_logsumexp<S>(a, row, *state.of(row).first, *state.of(row).second);
    parallel_for(n_rows * segments, threads, 1, [&](int64_t task, int) {
        const FlushDenormals flush;
        const int64_t row = task / segments, start = task % segments * kSegment;
        const auto [head, sums] = state.of(row);
        write_softmax<S, T>(a, row, start, std::min(a.vocab, start + kSegment), *head, *sums);
    });
}

// sum g p (softmax) or sum of g over unmasked tokens (log_softmax) of a segment.
template <class S, class T> FASTCALIB_ONE_BODY double dot_segment(const T* grad, const T* result, int64_t n, bool log) {
    using real = typename S::real;
    const auto masked = S::set(log ? -real(INFINITY) : real(0)), zero = S::set(0);
    double total = 0;
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t end = std::min(n, start + kBlock);
        auto sum = zero;
        int64_t i = start;
        for (; i + S::lanes <= end; i += S::lanes) {
            prefetch(reinterpret_cast<const char*>(grad + i) + 4096);
            prefetch(reinterpret_cast<const char*>(result + i) + 4096);
            const auto g = S::load(grad + i), r = S::load(result + i);
            sum = sum + S::where_greater(r, masked, log ? g : g * r);
        }
        total += S::reduce_add(sum);
        for (; i < end; ++i) {
            const double g = double(to_real(grad[i])), r = double(to_real(result[i]));
            if (r > (log ? -HUGE_VAL : 0.0)) total += log ? g : g * r;
        }
    }
    return total;
}

template <class S, class T>
FASTCALIB_ONE_BODY void write_softmax_gradient(const T* grad, const T* result, T* out, int64_t n, bool log, double b, double dot) {
    using real = typename S::real;
    const auto beta = S::set(real(b)), total = S::set(real(dot)), log2e = S::set(real(kLog2e)),
               masked = S::set(-real(INFINITY));
    const auto one = [&](auto g, auto r) __attribute__((always_inline)) {
        if (!log) return beta * (r * (g - total));
        return S::where_greater(r, masked, beta * (g - S::exp2_or_zero(r * log2e) * total));
    };
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) S::store(out + i, one(S::load(grad + i), S::load(result + i)));
    if (i == n) return;
    T g_tail[S::lanes], r_tail[S::lanes];
    std::fill(g_tail, g_tail + S::lanes, from_real<T>(0.0));
    std::fill(r_tail, r_tail + S::lanes, from_real<T>(log ? -HUGE_VAL : 0.0));
    std::copy(grad + i, grad + n, g_tail);
    std::copy(result + i, result + n, r_tail);
    S::store(g_tail, one(S::load(g_tail), S::load(r_tail)));
    std::copy(g_tail, g_tail + (n - i), out + i);
}

// Gradient to the temperature of one segment, in double: asked for rarely, so it need not be fast.
template <class T> FASTCALIB_ONE_BODY double temperature_segment(const T* grad, const T* result, int64_t n, bool log, double b, double dot) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double g = double(to_real(grad[i])), r = double(to_real(result[i]));
        const double log_p = log ? r : std::log(r);
        if (log_p == -HUGE_VAL) continue;
        sum -= log_p * b * (log ? g - std::exp(r) * dot : r * (g - dot));
    }
    return sum;
}

template <class T> void softmax_backward(const SoftmaxArgs& a) {
    using S = typename SimdOf<T>::type;
    using real = typename S::real;
    const int64_t n_rows = a.logits.rows, segments = segment_count(a.vocab);
    const int threads = int(std::clamp<int64_t>(a.threads, 1, 1024));
    const bool split = split_rows(n_rows, a.vocab, threads);
    std::vector<double> dots(n_rows * segments), temperature(n_rows * segments);
    const auto at = [&](int64_t task, auto body) {
        const FlushDenormals flush;
        const int64_t row = task / segments, start = task % segments * kSegment;
        body(row, start, std::min(kSegment, a.vocab - start), a.logits.row<const T>(row) + start,
             static_cast<const T*>(a.saved) + row * a.width + start);
    };
    const auto dot = [&](int64_t task) {
        at(task, [&](int64_t, int64_t, int64_t n, const T* grad, const T* result) {
            dots[task] = dot_segment<S>(grad, result, n, a.log);
        });
    };
    const auto write = [&](int64_t task) {
        at(task, [&](int64_t row, int64_t start, int64_t n, const T* grad, const T* result) {
            T* out = static_cast<T*>(a.out) + row * a.width + start;
            if (start + n == a.vocab) std::fill(out + n, out + (a.width - start), from_real<T>(0.0));
            const real logsumexp = static_cast<const real*>(a.logsumexp)[row];
            if (!(std::fabs(logsumexp) < std::numeric_limits<real>::infinity())) {
                std::fill(out, out + n, from_real<T>(std::isnan(logsumexp) ? double(NAN) : 0.0));
                temperature[task] = std::isnan(logsumexp) ? double(NAN) : 0.0;
                return;
            }
            const double b = 1.0 / a.temperatures.row(row)[0];
            double total = 0;
            for (int64_t s = 0; s < segments; ++s) total += dots[row * segments + s];
            write_softmax_gradient<S>(grad, result, out, n, a.log, b, total);
            if (a.grad_temperature) temperature[task] = temperature_segment(grad, result, n, a.log, b, total);
        });
    };
    if (split) {
        parallel_for(n_rows * segments, threads, 1, [&](int64_t task, int) { dot(task); });
        parallel_for(n_rows * segments, threads, 1, [&](int64_t task, int) { write(task); });
    } else {
        parallel_for(n_rows, threads, rows_per_run(n_rows, a.vocab, threads), [&](int64_t row, int) {
            for (int64_t s = 0; s < segments; ++s) dot(row * segments + s);
            for (int64_t s = 0; s < segments; ++s) write(row * segments + s);
        });
    }
    if (a.grad_temperature)
        for (int64_t row = 0; row < n_rows; ++row) {
            a.grad_temperature[row] = 0;
            for (int64_t s = 0; s < segments; ++s) a.grad_temperature[row] += temperature[row * segments + s];
        }
}

}  // namespace fastcalib::FASTCALIB_ISA
