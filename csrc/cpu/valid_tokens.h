// The valid tokens of a row: in order of their logits, and where these lie among all logits of the row.
#pragma once
#include <utility>
#include <vector>

#include "api.h"
#include "grouped.h"

namespace fastcalib::FASTCALIB_ISA {

// From the largest logit to the smallest, with running sums.
struct ValidTokens {
    std::vector<std::pair<double, int64_t>> logits;  // and which of the set's tokens
    std::vector<double> counts, mass;                // of the first i
    std::vector<int32_t> place, kept;                // of each token, from the largest; how many are kept by each of (K, R)
    int64_t finite = 0;                              // tokens that can be drawn

    int64_t size() const { return int64_t(logits.size()); }
};

template <class T, class Real> void gather_valid(const CutoffsArgs& a, int64_t r, ValidTokens& valid) {
    const int64_t begin = a.sets.begin(r), n = a.sets.end(r) - begin;
    const T* x = a.logits.row<const T>(r);
    valid.logits.resize(size_t(n));
    for (int64_t i = 0; i < n; ++i) {
        const double z = double(to_real(x[a.sets.ids[begin + i]]));
        valid.logits[i] = {z == z ? z : -INFINITY, i};  // a NaN cannot be sorted; its row is undefined anyway
    }
    std::sort(valid.logits.begin(), valid.logits.end(), [](const auto& p, const auto& q) {
        return p.first > q.first || (p.first == q.first && p.second < q.second);
    });
    valid.counts.resize(size_t(n) + 1);
    valid.place.resize(size_t(n));
    valid.counts[0] = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t token = valid.logits[i].second;
        valid.place[token] = int32_t(i);
        valid.counts[i + 1] = valid.counts[i] + (a.counts ? a.counts[begin + token] : 1.0);
    }
    valid.finite = 0;
    while (valid.finite < n && valid.logits[valid.finite].first > -INFINITY) ++valid.finite;
    a.total_counts[r] = valid.counts[size_t(n)];
}

// The last group for which holds() is true; it holds for the first, and from some group on no more.
template <class Holds> int64_t last_group(int64_t groups, const Holds& holds) {
    int64_t low = 0, high = groups;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        (holds(middle) ? low : high) = middle;
    }
    return low;
}

// How many logits of a row lie above one of them, and how many are equal to it, itself among them.
struct Rank {
    int64_t greater = 0, equal = 0;
};

template <class Real> Rank rank_of(const GroupedRow<Real>& row, Real z) {
    // By one logit of each group: z lies in this group or in the next.
    const int64_t group = last_group(row.groups, [&](int64_t g) { return g == 0 || row.values[row.begin[g]] >= z; });
    const int64_t from = row.begin[group], to = row.begin[std::min(group + 2, row.groups)];
    const Real* values = row.values.data();
    int64_t greater = 0, equal = 0;
    if (row.often.empty()) {
#pragma omp simd reduction(+ : greater, equal)
        for (int64_t i = from; i < to; ++i) greater += values[i] > z, equal += values[i] == z;
    } else {
        for (int64_t i = from; i < to; ++i) {
            greater += values[i] > z ? row.often[i] : 0;
            equal += values[i] == z ? row.often[i] : 0;
        }
    }
    return {row.above[group] + greater, equal};
}

inline void write_rank(const CutoffsArgs& a, int64_t r, int64_t token, const Rank& rank) {
    const int64_t at = a.sets.begin(r) + token;
    a.n_greater[at] = rank.greater;
    a.n_equal[at] = rank.equal - 1;
}

template <class Real> void write_ranks_of(const CutoffsArgs& a, int64_t r, const GroupedRow<Real>& row, const ValidTokens& valid) {
    Rank rank;
    for (int64_t i = 0; i < valid.size(); ++i) {
        const auto [z, token] = valid.logits[i];
        if (i == valid.finite) rank = {row.finite, a.vocab - row.finite};
        if (i < valid.finite && (i == 0 || z != valid.logits[i - 1].first)) rank = rank_of(row, Real(z));
        write_rank(a, r, token, rank);
    }
}

// Of a row without a softmax: infinite logits are ranked like others, next to a NaN nothing is.
template <class T, class Real>
void write_ranks_of_undefined(const CutoffsArgs& a, int64_t r, std::vector<Real>& scratch, const ValidTokens& valid) {
    const T* x = a.logits.row<const T>(r);
    bool numbers = true;
    scratch.resize(size_t(a.vocab));
    for (int64_t i = 0; i < a.vocab; ++i) {
        scratch[i] = to_real(x[i]);
        numbers = numbers && scratch[i] == scratch[i];
    }
    if (numbers) std::sort(scratch.begin(), scratch.end(), Descending());
    for (const auto& [z, token] : valid.logits) {
        if (!numbers) {
            write_rank(a, r, token, {-1, 1});
            continue;
        }
        const auto [from, to] = std::equal_range(scratch.begin(), scratch.end(), Real(z), Descending());
        write_rank(a, r, token, {from - scratch.begin(), to - from});
    }
}

// How far below the maximum the valid tokens lie.
inline void write_below(const CutoffsArgs& a, int64_t r, double max, const ValidTokens& valid) {
    for (const auto& [z, token] : valid.logits) a.below[a.sets.begin(r) + token] = z - max;
}

// Of the row at temperature k, from the sums of e^(b (z - max)) and of that times z - max.
inline void write_norms(const CutoffsArgs& a, int64_t r, int64_t k, double beta, double total, double first) {
    const int64_t at = r * a.temperatures.count + k;
    a.log_norm[at] = std::log(std::max(total, 1.0));  // the largest alone is 1; the series may lack 1e-11
    a.entropy[at] = a.log_norm[at] - beta * first / total;
}

}  // namespace fastcalib::FASTCALIB_ISA
