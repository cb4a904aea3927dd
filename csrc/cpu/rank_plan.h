// What ranks.h looks for in a row, found out before the row is read: the thresholds in order, and the table that places
// a number among them.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <vector>

#include "segment.h"
#include "api.h"
#include "selection.h"

namespace fastcalib::FASTCALIB_ISA {

constexpr int64_t kCompareAll = 32;  // up to this many distinct thresholds, comparing with each beats searching (Zen 4; Ice Lake: 64)

template <class Real> struct RankPlan {
    std::vector<Real> bounds;      // distinct thresholds in ascending order, padded with +inf
    std::vector<int64_t> place;    // of each threshold among the bounds; -1: ignored, -2: NaN
    std::vector<int32_t> first;    // bucket -> number of bounds in lower buckets
    std::vector<std::pair<Real, int64_t>> sorting, spare;
    int64_t count = 0;             // distinct thresholds
    int32_t buckets = 0;
    int steps = 0;
    Real scale = 0, offset = 0;
    double max = 0;                // of the row, for masses
    std::vector<double> c, log2_s0;
    bool undefined = false;
};

// What a part of the row adds to each bound; parts are added in order.
struct RankTotals {
    std::vector<int64_t> greater, not_less;
    std::vector<double> mass;  // (K, count)
    void clear(int64_t count, int64_t k_count) {
        greater.assign(size_t(count), 0);
        not_less.assign(size_t(count), 0);
        mass.assign(size_t(count * k_count), 0.0);
    }
    void add(const RankTotals& o) {
        for (size_t i = 0; i < greater.size(); ++i) greater[i] += o.greater[i], not_less[i] += o.not_less[i];
        for (size_t i = 0; i < mass.size(); ++i) mass[i] += o.mass[i];
    }
};

template <class S> struct RankScratch {
    using real = typename S::real;
    alignas(64) real survivors[kBlock + 64], probability[kBlock + 64];
    alignas(64) int32_t position[kBlock + 64];
    struct Counter {
        typename S::count above, least;
    };
    struct Mass {
        typename S::vec lanes;
    };
    std::vector<Counter> counters;
    std::vector<Mass> mass_lanes;
    std::vector<uint32_t> histogram;
    std::vector<double> mass_histogram;
    RankPlan<real> plan;
    RankTotals part, total;
};

// The same instructions place thresholds and logits, so both agree on every rounding. n is a multiple of 16.
template <class Real>
__attribute__((noinline)) void bucket_of(const Real* values, int64_t n, Real scale, Real offset, int32_t last, int32_t* out) {
    const Real top = Real(last);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        Real t = values[i] * scale + offset;
        t = t > Real(0) ? t : Real(0);  // NaN (inf * 0) goes to bucket 0 too
        t = t < top ? t : top;
        out[i] = int32_t(t);
    }
}

template <class Real> void plan_buckets(RankPlan<Real>& plan) {
    const int64_t m = plan.count;
    plan.buckets = int32_t(std::clamp<uint64_t>(std::bit_ceil(uint64_t(4 * m)), 64, 65536));
    Real low = 0, high = 0;
    for (int64_t i = 0; i < m; ++i)
        if (std::isfinite(plan.bounds[i])) {
            low = plan.bounds[i];
            break;
        }
    for (int64_t i = m - 1; i >= 0; --i)
        if (std::isfinite(plan.bounds[i])) {
            high = plan.bounds[i];
            break;
        }
    const Real span = high - low;
    plan.scale = span > 0 && std::isfinite(span) ? Real(plan.buckets - 2) / span : Real(0);
    if (!std::isfinite(plan.scale) || !std::isfinite(low * plan.scale)) plan.scale = 0;
    plan.offset = Real(1) - low * plan.scale;
    std::vector<int32_t> bucket(size_t(m + 16));
    plan.bounds.resize(size_t(m + 16), Real(INFINITY));
    bucket_of(plan.bounds.data(), (m + 15) / 16 * 16, plan.scale, plan.offset, plan.buckets - 1, bucket.data());
    plan.first.assign(size_t(plan.buckets) + 1, 0);
    for (int64_t i = 0; i < m; ++i) ++plan.first[bucket[i] + 1];
    const int32_t most = *std::max_element(plan.first.begin(), plan.first.end());
    std::partial_sum(plan.first.begin(), plan.first.end(), plan.first.begin());
    plan.steps = std::bit_width(uint32_t(most));
    plan.bounds.resize(size_t(m) + (size_t(1) << plan.steps) + 16, Real(INFINITY));
}

// Thresholds in ascending order. Many float32 ones go through a radix sort on their bits, six times faster than comparing;
// equal thresholds may come in any order, since they are merged afterwards.
template <class Real>
void sort_thresholds(std::vector<std::pair<Real, int64_t>>& items, std::vector<std::pair<Real, int64_t>>& spare) {
    if constexpr (std::is_same_v<Real, float>) {
        if (items.size() > 256) {
            const auto key = [](float v) {  // monotone in v; -0 and +0 as one, without arithmetic that would flush a denormal
                uint32_t bits = std::bit_cast<uint32_t>(v);
                if (bits == 0x80000000u) bits = 0;
                return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
            };
            spare.resize(items.size());
            for (int shift = 0; shift < 32; shift += 11) {
                uint32_t start[2049] = {};
                for (const auto& item : items) ++start[((key(item.first) >> shift) & 2047) + 1];
                for (int digit = 0; digit < 2048; ++digit) start[digit + 1] += start[digit];
                for (const auto& item : items) spare[start[(key(item.first) >> shift) & 2047]++] = item;
                items.swap(spare);
            }
            return;
        }
    }
    std::sort(items.begin(), items.end());
}

template <class S, class T>
void make_plan(const RanksArgs& a, int64_t row, const Head* head, const Sums* sums, const Betas& betas,
               RankPlan<typename S::real>& plan) {
    using real = typename S::real;
    const T* x = a.logits.row<const T>(row);
    const int64_t begin = a.selected.begin(row), m = a.selected.end(row) - begin;
    plan.place.assign(size_t(m), -1);
    plan.sorting.clear();
    for (int64_t j = 0; j < m; ++j) {
        if (a.selected.ids && a.selected.ids[begin + j] == a.selected.ignore_index) continue;
        const real t = a.selected.ids ? real(to_real(x[a.selected.ids[begin + j]]))
                                      : static_cast<const real*>(a.thresholds)[begin + j];
        if (std::isnan(t)) plan.place[j] = -2;
        else plan.sorting.push_back({t, j});
    }
    sort_thresholds(plan.sorting, plan.spare);
    plan.bounds.clear();
    for (const auto& [t, j] : plan.sorting) {
        if (plan.bounds.empty() || t != plan.bounds.back()) plan.bounds.push_back(t);
        plan.place[j] = int64_t(plan.bounds.size()) - 1;
    }
    plan.count = int64_t(plan.bounds.size());
    if (plan.count > kCompareAll) plan_buckets(plan);
    plan.c.clear();
    plan.log2_s0.clear();
    plan.undefined = false;
    if (!head) return;
    plan.undefined = head->undefined || head->argmax < 0;
    plan.max = head->max;
    for (int64_t k = 0; k < betas.count() && !plan.undefined; ++k) {
        plan.c.push_back(betas.c[k]);
        plan.log2_s0.push_back(std::log2(sums[k].s0));
    }
}

}  // namespace fastcalib::FASTCALIB_ISA
