// pr_divergence: backward, one read of both rows and one write for each side that needs a gradient. Formulas: pr_divergence.h.
#pragma once
#include "pr_divergence.h"

namespace fastcalib::FASTCALIB_ISA {

// What upstreams say about one row: an element with u thresholds above it gets Q_v prefix[0][u] and P_v prefix[1][u].
template <class S> struct PairUpstream {
    enum Kind { kZero, kNaN, kValue } kind = kZero;
    double total[2] = {0, 0};           // sum g A, sum h B
    std::vector<typename S::real> each[2];  // g and h, in the order of the thresholds
};

template <class S>
FASTCALIB_ONE_BODY void prepare_pair(const PairBackwardArgs& a, int64_t row, PairScratch<S>& own, PairUpstream<S>& up) {
    using real = typename S::real;
    const PairArgs& f = a.forward;
    const int64_t count = f.lam_count, n = f.student.rows;
    const double b[2] = {1.0 / f.temperatures.row(row)[0], 1.0 / f.teacher_temperatures.row(row)[0]};
    const double* norms = f.norms + 4 * row;
    const real* g_alpha = static_cast<const real*>(a.grad_alpha) + row * count;
    const real* g_beta = static_cast<const real*>(a.grad_beta) + row * count;
    own.pair.set(f.lam, norms, b[0], b[1]);
    up.kind = PairUpstream<S>::kZero;
    if (is_ignored(f.ignored, row)) return;
    bool any = false;
    for (int64_t k = 0; k < count; ++k) any = any || g_alpha[k] != 0 || g_beta[k] != 0;
    if (!any) return;
    if (!has_pair(norms)) {
        // Masked throughout: no gradient. A NaN: NaN.
        up.kind = std::isnan(norms[1]) || std::isnan(norms[3]) ? PairUpstream<S>::kNaN : PairUpstream<S>::kZero;
        return;
    }
    up.kind = PairUpstream<S>::kValue;
    for (int side = 0; side < 2; ++side) {
        const double scale = b[side] * ::exp2(-own.pair.log2_s0[side]);
        refill(up.each[side], count, real(0));
        std::vector<double> value(size_t(count), 0.0);
        double total = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t k = own.pair.order[size_t(i)];
            const double lam = f.lam[k], ga = double(g_alpha[k]), gb = double(g_beta[k]);
            // alpha_0 = 0 and beta_inf = 0 whatever Q; beta_0 depends on P alone, alpha_inf on Q alone.
            double g = 0;
            if (side == 0 && lam > 0) g = std::isinf(lam) ? ga : ga + gb / lam;
            if (side == 1 && !std::isinf(lam)) g = ga * lam + gb;
            total += g * f.mass[(side * n + row) * count + k];
            value[size_t(i)] = scale * g;
            up.each[side][size_t(i)] = real(value[size_t(i)]);
        }
        up.total[side] = scale * total;
        refill(own.prefix[side], own.pair.padded, real(0));
        double sum = 0;
        for (int64_t i = 0; i <= count; ++i) {  // u = i: student the first i of them, teacher the others
            if (side == 0) {
                own.prefix[side][size_t(i)] = real(sum - up.total[side]);
                if (i < count) sum += value[size_t(i)];
            } else {
                const int64_t u = count - i;
                own.prefix[side][size_t(u)] = real(sum - up.total[side]);
                if (u > 0) sum += value[size_t(u - 1)];
            }
        }
    }
}

// Gradients of a segment; adds sum y dz to temperature[side] where asked for.
template <class S, class T, int Side, bool Distances>
FC_INLINE void write_pair(PairScratch<S>& s, const PairUpstream<S>& up, bool search, int64_t n, int64_t whole, T* out,
                          double* temperature) {
    using real = typename S::real;
    using vec = typename S::vec;
    const vec total = S::set(real(up.total[Side])), zero = S::set(0), masked = S::set(-real(INFINITY));
    const int64_t count = s.pair.count;
    real* e = Side == 0 ? s.q : s.p;
    vec moment = zero;
    for (int64_t i = 0; i < whole; i += S::lanes) {
        vec sum;
        if (search) {
            if constexpr (S::has_gather) {
                sum = S::gather(s.prefix[Side].data(), S::load_index(s.above + i));
            } else {
                real value[S::lanes];
                for (int lane = 0; lane < S::lanes; ++lane) value[lane] = s.prefix[Side][size_t(s.above[i + lane])];
                sum = S::load(value);
            }
        } else {
            const vec d = S::load(s.d + i);
            sum = zero;
            for (int64_t k = 0; k < count; ++k) {
                const vec theta = S::set(s.pair.theta[size_t(k)]), g = S::set(up.each[Side][size_t(k)]);
                sum = sum + (Side == 0 ? S::where_greater(theta, d, g) : S::where_not_greater(theta, d, g));
            }
            sum = sum - total;
        }
        const vec gradient = sum * S::load(e + i);
        S::store(e + i, gradient);
        if constexpr (Distances) {  // at -inf and beyond the row the gradient is 0, and 0 * inf must not be formed
            const vec y = S::load(s.y[Side] + i);
            moment = moment + S::where_greater(y, masked, gradient * y);
        }
    }
    if constexpr (Distances) temperature[Side] += S::reduce_add(moment);
    if (!out) return;
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) S::store(out + i, S::load(e + i));
    for (; i < n; ++i) out[i] = from_real<T>(double(e[i]));
}

template <class S, class T, bool Distances>
FASTCALIB_ONE_BODY void pair_gradient(const T* student, const T* teacher, int64_t n, PairScratch<S>& s, const PairUpstream<S>& up,
                                      T* to_student, T* to_teacher, double* temperature) {
    const bool search = s.pair.count >= search_backward_from<S>(s.pair.places.same > 0);
    for (int64_t start = 0; start < n; start += pair_block<S>()) {
        const int64_t length = std::min(pair_block<S>(), n - start);
        const int64_t whole = load_pair<S, Distances>(student + start, teacher + start, length, s);
        if (search) find_places(s, whole);
        if (to_student || Distances)
            write_pair<S, T, 0, Distances>(s, up, search, length, whole, to_student ? to_student + start : nullptr, temperature);
        if (to_teacher || Distances)
            write_pair<S, T, 1, Distances>(s, up, search, length, whole, to_teacher ? to_teacher + start : nullptr, temperature);
    }
}

template <class T> void pr_divergence_backward(const PairBackwardArgs& a) {
    using S = typename SimdOf<T>::type;
    const PairArgs& f = a.forward;
    const int64_t n_rows = f.student.rows, segments = segment_count(f.vocab);
    const int threads = int(std::clamp<int64_t>(f.threads, 1, 1024));
    const bool split = split_rows(n_rows, f.vocab, threads);
    std::vector<PairScratch<S>> scratch(threads);
    for (auto& own : scratch) own.pair.set_order(f.lam, f.lam_count);
    std::vector<PairUpstream<S>> upstream(threads);
    std::vector<double> temperature(a.grad_temperature ? size_t(2 * n_rows * segments) : 0, 0.0);
    T *to_student = static_cast<T*>(a.grad_student), *to_teacher = static_cast<T*>(a.grad_teacher);
    const auto write = [&](int64_t row, int64_t segment, PairScratch<S>& own, const PairUpstream<S>& up) {
        const FlushDenormals flush;
        const int64_t start = segment * kSegment, end = std::min(f.vocab, start + kSegment), n = end - start;
        T* out[2] = {to_student ? to_student + row * a.student_width : nullptr,
                     to_teacher ? to_teacher + row * a.teacher_width : nullptr};
        const int64_t widths[2] = {a.student_width, a.teacher_width};
        for (int side = 0; side < 2; ++side) {
            if (!out[side]) continue;
            if (end == f.vocab) std::fill(out[side] + f.vocab, out[side] + widths[side], from_real<T>(0.0));
            out[side] += start;
            if (up.kind != up.kValue) std::fill(out[side], out[side] + n, from_real<T>(up.kind == up.kZero ? 0.0 : double(NAN)));
        }
        double* moments = temperature.empty() ? nullptr : temperature.data() + 2 * (row * segments + segment);
        if (up.kind != up.kValue) {
            if (moments && up.kind == up.kNaN) moments[0] = moments[1] = double(NAN);
            return;
        }
        const T *x = f.student.row<const T>(row) + start, *y = f.teacher.row<const T>(row) + start;
        if (moments) pair_gradient<S, T, true>(x, y, n, own, up, out[0], out[1], moments);
        else pair_gradient<S, T, false>(x, y, n, own, up, out[0], out[1], moments);
    };
    if (split) {
        parallel_for(n_rows * segments, threads, 1, [&](int64_t task, int thread) {
            prepare_pair<S>(a, task / segments, scratch[thread], upstream[thread]);
            write(task / segments, task % segments, scratch[thread], upstream[thread]);
        });
    } else {
        parallel_for(n_rows, threads, rows_per_run(n_rows, f.vocab, threads), [&](int64_t row, int thread) {
            prepare_pair<S>(a, row, scratch[thread], upstream[thread]);
            for (int64_t s = 0; s < segments; ++s) write(row, s, scratch[thread], upstream[thread]);
        });
    }
    if (!a.grad_temperature) return;
    for (int64_t row = 0; row < n_rows; ++row)
        for (int side = 0; side < 2; ++side) {
            double sum = 0;
            for (int64_t s = 0; s < segments; ++s) sum += temperature[size_t(2 * (row * segments + s) + side)];
            a.grad_temperature[2 * row + side] = -sum / (side ? f.teacher_temperatures : f.temperatures).row(row)[0];
        }
}

}  // namespace fastcalib::FASTCALIB_ISA
