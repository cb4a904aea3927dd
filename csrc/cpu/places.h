// How many of a falling list of thresholds lie above a number: its place among them.
//
// The range of the thresholds is cut into cells of equal width, several for each. A table says how many thresholds lie in
// higher cells than a number's own; those in the same cell, one or two where thresholds are spread evenly, are compared one
// after the other. Number and thresholds go through the same rounded, monotone arithmetic to their cells, so places are exact.
// Where some cell holds so many that this would not pay, a binary search finds the same.
#pragma once
#include <algorithm>
#include <bit>
#include <vector>

#include "simd.h"

namespace fastcalib::FASTCALIB_ISA {

template <class Real> struct Places {
    std::vector<int32_t> higher;  // thresholds in higher cells
    Real low = 0, scale = 0, last = 0;
    int64_t same = 0, padded = 1;  // most thresholds in one cell; 0: too many for the table to pay
    static constexpr int64_t kCells = 4;  // for each threshold

    // 0 for a NaN; the first and last cell take all that lies beyond.
    FC_INLINE int32_t cell(Real d) const {
        Real x = (d - low) * scale;
        x = x > 0 ? x : Real(0);
        return int32_t(x < last ? x : last);
    }

    // theta: ``count`` falling, then -inf up to ``padded``, a power of two beyond count.
    void set(const Real* theta, int64_t count, int64_t padded_count) {
        padded = padded_count;
        const auto finite = [](Real v) { return v > Real(-1e30) && v < Real(1e30); };  // not those of lam = 0 and inf
        int64_t begin = 0, end = count;
        while (begin < end && !finite(theta[begin])) ++begin;
        while (end > begin && !finite(theta[end - 1])) --end;
        same = 0;
        if (begin == end) return;
        const int64_t cells = kCells * padded;
        low = theta[end - 1];
        last = Real(cells - 1);
        scale = theta[begin] > low ? last / (theta[begin] - low) : Real(0);
        if (!(scale < Real(1e30))) return;  // all but equal
        higher.resize(size_t(cells));
        int64_t i = 0, here = 0;
        for (int64_t c = cells - 1; c >= 0; --c, here = 0) {
            higher[size_t(c)] = int32_t(i);
            for (; i < count && cell(theta[i]) == c; ++i) ++here;
            same = std::max(same, here);
        }
        if (same > std::bit_width(uint64_t(padded)) - 3) same = 0;
    }

    template <class S> FC_INLINE void find(const Real* d, int32_t* above, int64_t n, const Real* theta) const {
        if constexpr (S::has_gather) {
            alignas(64) static constexpr int32_t none[16] = {};
            const auto from = S::set(low), by = S::set(scale), top = S::set(last);
            for (int64_t i = 0; i < n; i += 2 * S::lanes) {  // two at once hide the latency of the look-ups
                const auto d0 = S::load(d + i), d1 = S::load(d + i + S::lanes);
                auto at0 = S::load_index(none), at1 = at0;
                if (same > 0) {
                    at0 = S::gather(higher.data(), S::truncate_within((d0 - from) * by, top));
                    at1 = S::gather(higher.data(), S::truncate_within((d1 - from) * by, top));
                    for (int64_t k = 0; k < same; ++k) {
                        at0 = S::add_where_less(at0, d0, S::gather(theta, at0), 1);
                        at1 = S::add_where_less(at1, d1, S::gather(theta, at1), 1);
                    }
                } else {
                    for (int64_t step = padded / 2; step > 0; step /= 2) {
                        at0 = S::add_where_less(at0, d0, S::gather(theta + step - 1, at0), int32_t(step));
                        at1 = S::add_where_less(at1, d1, S::gather(theta + step - 1, at1), int32_t(step));
                    }
                }
                S::store_index(above + i, at0);
                S::store_index(above + i + S::lanes, at1);
            }
        } else {
            for (int64_t i = 0; i < n; ++i) {
                int32_t at = 0;
                if (same > 0) {
                    at = higher[size_t(cell(d[i]))];
                    for (int64_t k = 0; k < same; ++k) at += d[i] < theta[at] ? 1 : 0;
                } else {
                    for (int64_t step = padded / 2; step > 0; step /= 2) at += d[i] < theta[at + step - 1] ? int32_t(step) : 0;
                }
                above[i] = at;
            }
        }
    }
};

}  // namespace fastcalib::FASTCALIB_ISA
