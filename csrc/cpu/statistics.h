// statistics: forward.
#pragma once
#include "segment.h"
#include "api.h"
#include "ranks.h"
#include "selection.h"

namespace fastcalib::FASTCALIB_ISA {

// Field f of a packed (F, N, K) result.
template <class Real> struct Fields {
    Real* data;
    int64_t rows, count;
    Real& at(int f, int64_t row, int64_t k) const { return data[(f * rows + row) * count + k]; }
};

template <class S, class T>
FASTCALIB_ONE_BODY void finish_row(const StatisticsArgs& a, int64_t row, const Head& head, const Sums* sums, const Betas& betas) {
    using real = typename S::real;
    const int64_t n_rows = a.logits.rows, k_count = betas.count(), stride = 3 + 2 * k_count;
    const Fields<real> rows{static_cast<real*>(a.rows), n_rows, k_count};
    real* scalars = static_cast<real*>(a.scalars);
    real* saved = static_cast<real*>(a.saved) + row * stride;
    real* log_prob = static_cast<real*>(a.log_prob);
    const real nan = real(NAN);
    const bool dead = head.undefined || head.argmax < 0;
    const int64_t begin = a.selected.ids ? a.selected.begin(row) : 0, end = a.selected.ids ? a.selected.end(row) : 0;
    if (dead) {
        for (int64_t k = 0; k < k_count; ++k)
            for (int f = 0; f < 6; ++f) rows.at(f, row, k) = nan;
        scalars[row] = scalars[n_rows + row] = nan;
        a.argmax[row] = -1;
        for (int64_t j = 0; j < stride; ++j) saved[j] = nan;
        saved[2] = head.undefined ? nan : real(0);  // tells "all -inf" (gradient 0) from NaN (gradient NaN)
        for (int64_t i = begin; i < end; ++i)
            for (int64_t k = 0; k < k_count; ++k)
                log_prob[i * k_count + k] = a.selected.ids[i] == a.selected.ignore_index ? real(0) : nan;
        return;
    }
    scalars[row] = head.masked ? -real(INFINITY) : real(head.mean * double(head.n));
    scalars[n_rows + row] = real(head.n > 1 ? std::sqrt(head.m2 / double(head.n - 1)) : 0.0);
    a.argmax[row] = head.argmax;
    saved[0] = real(head.max);
    saved[1] = real(head.mean - head.max);
    saved[2] = real(head.n);
    const T* x = a.chosen ? nullptr : a.logits.row<const T>(row);
    for (int64_t k = 0; k < k_count; ++k) {
        const Sums& s = sums[k];
        const double b = betas.b[k], log_s0 = std::log(s.s0), t1 = s.s1 / s.s0, y1 = t1 / betas.c[k];
        rows.at(0, row, k) = real(b * head.max + log_s0);
        rows.at(1, row, k) = real(log_s0 - kLn2 * t1);
        rows.at(2, row, k) = real(1.0 / s.s0);
        rows.at(3, row, k) = real(s.r2 / (s.s0 * s.s0));
        rows.at(4, row, k) = real(head.max + y1);
        rows.at(5, row, k) = real(std::max(0.0, s.s2 / s.s0 - t1 * t1) / (betas.c[k] * betas.c[k]));
        saved[3 + k] = real(log_s0);
        saved[3 + k_count + k] = real(y1);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t id = a.selected.ids[i];
            if (id == a.selected.ignore_index) {
                log_prob[i * k_count + k] = 0;
                continue;
            }
            const double z = a.chosen ? a.chosen[i] : double(to_real(x[id]));
            log_prob[i * k_count + k] = real(b * (z - head.max) - log_s0);
        }
    }
}

template <class S> void skip_row(const StatisticsArgs& a, int64_t row) {
    using real = typename S::real;
    const int64_t n_rows = a.logits.rows, k_count = a.temperatures.count, stride = 3 + 2 * k_count;
    const Fields<real> rows{static_cast<real*>(a.rows), n_rows, k_count};
    real* scalars = static_cast<real*>(a.scalars);
    for (int64_t k = 0; k < k_count; ++k)
        for (int f = 0; f < 6; ++f) rows.at(f, row, k) = 0;
    scalars[row] = scalars[n_rows + row] = 0;
    a.argmax[row] = -1;
    for (int64_t j = 0; j < stride; ++j) static_cast<real*>(a.saved)[row * stride + j] = 0;
    for (int64_t i = a.selected.begin(row) * k_count; i < a.selected.end(row) * k_count; ++i)
        static_cast<real*>(a.log_prob)[i] = 0;
}

inline RanksArgs ranks_of_selected(const StatisticsArgs& a) {
    RanksArgs r;
    r.logits = a.logits;
    r.vocab = a.vocab;
    r.selected = a.selected;
    r.temperatures = a.temperatures;
    r.n_greater = a.n_greater;
    r.n_equal = a.n_equal;
    r.mass_greater = a.mass_greater;
    return r;
}

template <class T> int64_t statistics(const StatisticsArgs& a) {
    using S = typename SimdOf<T>::type;
    const int64_t n_rows = a.logits.rows;
    FirstBad bad;
    const int threads = int(std::clamp<int64_t>(a.threads, 1, 1024));
    std::vector<Scratch<S>> scratch(threads);
    std::vector<RankScratch<S>> rank_scratch(a.ranks ? threads : 0);
    for (auto& own : scratch) own.moments = a.moments;

    if (!split_rows(n_rows, a.vocab, threads)) {
        parallel_for(n_rows, threads, rows_per_run(n_rows, a.vocab, threads), [&](int64_t row, int thread) {
            if (!check_ids(a.selected, row, a.vocab, bad)) return;
            Scratch<S>& own = scratch[thread];
            RankScratch<S>* ranked = a.ranks ? &rank_scratch[thread] : nullptr;
            own.betas.set(a.temperatures.row(row), a.temperatures.count);
            if (a.selected.skips(row)) {
                skip_row<S>(a, row);
                if (ranked) rank_row<S, T>(ranks_of_selected(a), row, nullptr, nullptr, own.betas, *ranked);
                return;
            }
            Head head;
            {
                const FlushDenormals flush;  // not while results are written: the maximum itself may be a denormal
                accumulate_row<S>(a.logits.row<const T>(row), a.vocab, own, head, own.row);
            }
            finish_row<S, T>(a, row, head, own.row.data(), own.betas);
            // The row is still in the cache.
            if (ranked) rank_row<S, T>(ranks_of_selected(a), row, &head, own.row.data(), own.betas, *ranked);
        });
        return bad.position();
    }

    for (int64_t row = 0; row < n_rows; ++row)
        if (!check_ids(a.selected, row, a.vocab, bad)) return bad.position();
    SplitState<S> state;
    const auto skips = [&](int64_t row) { return a.selected.skips(row); };
    state.template accumulate<T>(a.logits, a.vocab, a.temperatures, threads, scratch, skips);
    Betas betas;
    for (int64_t row = 0; row < n_rows; ++row) {
        if (skips(row)) {
            skip_row<S>(a, row);
            continue;
        }
        betas.set(a.temperatures.row(row), a.temperatures.count);
        const auto [head, sums] = state.of(row);
        finish_row<S, T>(a, row, *head, sums, betas);
    }
    if (a.ranks) rank_split<S, T>(ranks_of_selected(a), threads, rank_scratch, [&](int64_t row) { return state.of(row); });
    return -1;
}

}  // namespace fastcalib::FASTCALIB_ISA
