// A row of logits cut into groups of neighbouring values, in descending order from group to group: what a sort would give, as far
// as sums over all logits above a border need it, for the price of two reads. Each group keeps the moments of its logits around
// its middle c, so that its mass at any temperature is a short series in b (z - c) and one exponential:
//     sum 2^(..) = e^(b (c - max)) sum_i n_i e^(b (z_i - c)) = e^(b (c - max)) (m0 + b m1 + b^2/2 m2 + b^3/6 m3 + b^4/24 m4)
// Groups are so narrow that five terms reach 1e-11 at ordinary temperatures. At colder ones only the logits near the maximum
// have any mass, and their exponentials are taken one by one.
//
// float32 and float64 are dealt out to buckets of equal width below the maximum (a counting sort); of 16-bit logits each value
// is counted, and the few thousand different ones come out sorted. All sums are in double, in an order that the row alone sets.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "distinct.h"
#include "schedule.h"
#include "simd.h"

namespace fastcalib::FASTCALIB_ISA {

constexpr int64_t kMostBuckets = 4096;
constexpr int64_t kBucketSize = 16;   // logits in a bucket on average, where there are not more than the most
constexpr int kMoments = 5;
constexpr int kSpare = 8;             // room after the values, so that whole vectors of them can be read
// Half a group's width times 1/T, up to which the series is used: what it leaves out is below 0.016^5 / 5! = 9e-12.
constexpr double kSeriesLimit = 0.016;
// Logits this many temperatures below the maximum have no mass: a vocabulary of 2^31 of them weighs 3e-19 of one at the maximum.
constexpr double kReach = 64;
constexpr int64_t kCountFrom = 16384;  // columns from which 16-bit logits are counted: the table has 65,536 places to look at

struct Descending {
    template <class A> bool operator()(const A& a, const A& b) const { return a > b; }
};

// e^x for x <= 1, to a few units in the last place; exactly 0 below 1e-307.
FC_INLINE double exp_double(double x) {
    double t = x * kLog2e;
    t = t > -1020.0 ? t : -1020.0;
    const double r = t + 0x1.8p52, y = (t - (r - 0x1.8p52)) * kLn2;  // r holds the nearest integer in its low bits
    double p = 1.0 / 479001600;
    p = p * y + 1.0 / 39916800;
    p = p * y + 1.0 / 3628800;
    p = p * y + 1.0 / 362880;
    p = p * y + 1.0 / 40320;
    p = p * y + 1.0 / 5040;
    p = p * y + 1.0 / 720;
    p = p * y + 1.0 / 120;
    p = p * y + 1.0 / 24;
    p = p * y + 1.0 / 6;
    p = p * y + 0.5;
    p = p * y + 1.0;
    p = p * y + 1.0;
    const double e = std::bit_cast<double>((std::bit_cast<uint64_t>(r) << 52) + std::bit_cast<uint64_t>(p));
    return t > -1020.0 ? e : 0.0;
}

// e^(b d) summed over logits with the moments m around d = 0.
FC_INLINE double series(double b, double m0, double m1, double m2, double m3, double m4) {
    return m0 + b * (m1 + b * (1.0 / 2) * (m2 + b * (1.0 / 3) * (m3 + b * (1.0 / 4) * m4)));
}

template <class Real> struct GroupedRow {
    using real = Real;
    std::vector<Real> values;    // finite logits; of 16-bit ones the different values
    std::vector<int32_t> often;  // how often each occurs; empty: once each
    std::vector<int32_t> begin;  // (groups + 1): group g holds values [begin[g], begin[g + 1])
    std::vector<int64_t> above;  // (groups + 1): logits in the groups before
    std::vector<double> middle;  // c - max
    std::vector<double> moments[kMoments];
    std::vector<uint8_t> sorted;
    int64_t groups = 0, narrow = 0;  // groups from `narrow` on (one at most) are of any width
    int64_t finite = 0;
    double max = 0, half_width = 0;
    bool undefined = false;

    std::vector<uint32_t> histogram;  // scratch
    alignas(64) int32_t position[kBlock + 64];

    double count(int64_t i) const { return often.empty() ? 1.0 : double(often[i]); }
    bool series_serves(double beta, int64_t group) const { return group < narrow && beta * half_width <= kSeriesLimit; }

    void open_group(int64_t first, double c, int64_t logits_before) {
        begin[groups] = int32_t(first);
        above[groups] = logits_before;
        middle[groups] = c;
        sorted[groups] = 0;
        ++groups;
    }
    void make_room(int64_t most) {
        begin.resize(size_t(most) + 1);
        above.resize(size_t(most) + 1);
        middle.resize(size_t(most));
        sorted.resize(size_t(most));
        for (auto& m : moments) m.resize(size_t(most));
        groups = 0;
    }
    void sort(int64_t group) {
        if (sorted[group]) return;
        Real *from = values.data() + begin[group], *to = values.data() + begin[group + 1];
        if (!std::is_sorted(from, to, Descending())) std::sort(from, to, Descending());
        sorted[group] = 1;
    }
    // How far below the maximum the buckets reach: what a sample of the row says, so that a few far below do not widen them all.
    static double reach_of(std::vector<Real>& sample, double max, double warmest, bool whole) {
        std::sort(sample.begin(), sample.end(), Descending());
        while (!sample.empty() && !(double(sample.back()) > max - kReach * warmest)) sample.pop_back();
        double reach = 0;
        if (!sample.empty()) reach = whole ? max - double(sample.back()) : 1.25 * (max - double(sample[sample.size() * 49 / 50]));
        return reach > 0 ? reach : kReach * warmest;
    }
};

// Moments of what keep() lets through of a group.
template <class Real, class Keep>
FC_INLINE void add_moments(const GroupedRow<Real>& row, int64_t group, const Keep& keep, double* m) {
    // First down from the maximum, then from the middle: their sum would be rounded to the maximum where that is large.
    const double max = row.max, c = row.middle[group];
    const Real* z = row.values.data();
    double m0 = 0, m1 = 0, m2 = 0, m3 = 0, m4 = 0;
    if (row.often.empty()) {
#pragma omp simd reduction(+ : m0, m1, m2, m3, m4)
        for (int64_t i = row.begin[group]; i < row.begin[group + 1]; ++i) {
            const double n = keep(z[i]) ? 1.0 : 0.0, d = double(z[i]) - max - c, nd = n * d, d2 = d * d;
            m0 += n, m1 += nd, m2 += n * d2, m3 += nd * d2, m4 += n * d2 * d2;
        }
    } else {
        const int32_t* often = row.often.data();
        for (int64_t i = row.begin[group]; i < row.begin[group + 1]; ++i) {
            const double n = keep(z[i]) ? double(often[i]) : 0.0, d = double(z[i]) - max - c, nd = n * d, d2 = d * d;
            m0 += n, m1 += nd, m2 += n * d2, m3 += nd * d2, m4 += n * d2 * d2;
        }
    }
    m[0] = m0, m[1] = m1, m[2] = m2, m[3] = m3, m[4] = m4;
}

typedef double Eight __attribute__((vector_size(64)));
template <class Real> struct EightOf { typedef Real type __attribute__((vector_size(8 * sizeof(Real)))); };
constexpr Eight kLane = {0, 1, 2, 3, 4, 5, 6, 7};

// Groups hold a few dozen logits: always whole vectors of them, those of the next group as zeros, and no tail.
template <class Real> void all_moments(GroupedRow<Real>& row) {
    constexpr int lanes = kSpare;
    for (int64_t g = 0; g < row.narrow; ++g) {
        if (!row.often.empty()) {
            double m[kMoments];
            add_moments(row, g, [](Real) { return true; }, m);
            for (int i = 0; i < kMoments; ++i) row.moments[i][g] = m[i];
            continue;
        }
        const Real* z = row.values.data() + row.begin[g];
        const int64_t n = row.begin[g + 1] - row.begin[g];
        const double max = row.max, c = row.middle[g];
        Eight m1 = {}, m2 = {}, m3 = {}, m4 = {};
        for (int64_t i = 0; i < n; i += lanes) {
            typename EightOf<Real>::type few;
            std::memcpy(&few, z + i, sizeof few);
            Eight d = __builtin_convertvector(few, Eight) - max - c;
            if (n - i < lanes) d = kLane < double(n - i) ? d : Eight{};
            const Eight d2 = d * d;
            m1 += d, m2 += d2, m3 += d * d2, m4 += d2 * d2;
        }
        double s1 = 0, s2 = 0, s3 = 0, s4 = 0;
        for (int lane = 0; lane < lanes; ++lane) s1 += m1[lane], s2 += m2[lane], s3 += m3[lane], s4 += m4[lane];
        row.moments[0][g] = double(n), row.moments[1][g] = s1, row.moments[2][g] = s2, row.moments[3][g] = s3, row.moments[4][g] = s4;
    }
}

// Mass, and the sum of e^(b (z - max)) (z - max), of what keep() lets through of a group, exponential by exponential.
template <class Real, class Keep>
FC_INLINE void add_direct(const GroupedRow<Real>& row, int64_t group, double beta, const Keep& keep, double& mass, double& first) {
    const Real* z = row.values.data();
    const int32_t* often = row.often.data();
    const bool once = row.often.empty();
    const double max = row.max;
    double s0 = 0, s1 = 0;
#pragma omp simd reduction(+ : s0, s1)
    for (int64_t i = row.begin[group]; i < row.begin[group + 1]; ++i) {
        const double below = double(z[i]) - max, d = below > -1e300 ? below : -1e300, n = keep(z[i]) ? (once ? 1.0 : double(often[i])) : 0.0;
        const double e = n * exp_double(beta * d);
        s0 += e;
        s1 += e * d;
    }
    mass += s0;
    first += s1;
}

// Maximum and number of the finite logits; a NaN or +inf leaves the row undefined.
template <class S, class T> void look(const T* x, int64_t vocab, GroupedRow<typename S::real>& row) {
    using real = typename S::real;
    const auto least = S::set(-real(INFINITY));
    auto top = least;
    auto finite = S::no_count(), numbers = S::no_count();
    int64_t i = 0, more_finite = 0, more_numbers = 0;
    for (; i + S::lanes <= vocab; i += S::lanes) {
        prefetch(reinterpret_cast<const char*>(x + i) + 4096);
        const auto z = S::load(x + i);
        top = S::max(z, top);
        finite = S::add_greater(finite, z, least);
        numbers = S::add_not_less(numbers, z, least);
    }
    real max = S::reduce_max(top);
    for (; i < vocab; ++i) {
        const real z = to_real(x[i]);
        max = z > max ? z : max;
        more_finite += z > -real(INFINITY);
        more_numbers += z >= -real(INFINITY);
    }
    row.finite = S::total(finite) + more_finite;
    row.max = double(max);
    row.undefined = S::total(numbers) + more_numbers != vocab || max == real(INFINITY) || row.finite == 0;
}

// Bucket of each of n logits; the one after the last is for -inf. Rounding is monotone, so no bucket overlaps the next.
template <class T, class Real>
__attribute__((noinline)) void buckets_of(const T* x, int64_t n, Real max, Real scale, int32_t last, int32_t* out) {
    const Real end = Real(last);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const Real z = to_real(x[i]);
        Real t = (max - z) * scale;
        t = t < end ? t : end;  // a NaN (inf * 0) belongs to the lowest logits too
        out[i] = int32_t(t) + (z == -Real(INFINITY) ? 1 : 0);
    }
}

template <class S, class T> void group_by_buckets(const T* x, int64_t vocab, double warmest, GroupedRow<typename S::real>& row) {
    using real = typename S::real;
    look<S>(x, vocab, row);
    if (row.undefined) return;
    row.often.clear();
    const int64_t buckets = std::clamp<int64_t>(int64_t(std::bit_ceil(uint64_t(vocab / kBucketSize + 1))), 16, kMostBuckets);
    const int64_t last = buckets - 1, samples = std::min<int64_t>(vocab, 256);
    row.values.resize(size_t(samples));
    for (int64_t i = 0; i < samples; ++i) row.values[i] = to_real(x[i * (vocab / samples)]);
    const double reach = row.reach_of(row.values, row.max, warmest, vocab == samples), width = reach / double(last);
    real scale = real(1.0 / width);
    if (!std::isfinite(scale)) scale = 0;
    row.half_width = scale > 0 ? width / 2 : INFINITY;

    // Two copies of the counts: neighbours often fall into the same bucket.
    row.histogram.assign(size_t(2 * (buckets + 1)), 0);
    uint32_t *even = row.histogram.data(), *odd = even + buckets + 1;
    const auto for_each_block = [&](const auto& use) __attribute__((always_inline)) {
        for (int64_t start = 0; start < vocab; start += kBlock) {
            const int64_t n = std::min(kBlock, vocab - start);
            buckets_of(x + start, n, real(row.max), scale, int32_t(last), row.position);
            use(x + start, n);
        }
    };
    for_each_block([&](const T*, int64_t n) __attribute__((always_inline)) {
        int64_t i = 0;
        for (; i + 2 <= n; i += 2) ++even[row.position[i]], ++odd[row.position[i + 1]];
        if (i < n) ++even[row.position[i]];
    });
    row.make_room(buckets);
    int64_t next = 0;
    for (int64_t b = 0; b < buckets; ++b) {
        const int64_t n = int64_t(even[b]) + odd[b];
        even[b] = uint32_t(next);
        if (n) row.open_group(next, -(double(b) + 0.5) * width, next);
        next += n;
    }
    even[buckets] = uint32_t(next);  // -inf: written after all others and not looked at again
    row.begin[row.groups] = int32_t(next);
    row.above[row.groups] = next;
    row.narrow = row.groups - (row.begin[row.groups - 1] < int64_t(vocab) && row.middle[row.groups - 1] < -double(last) * width);
    row.values.resize(size_t(vocab + kSpare));
    real* to = row.values.data();
    for_each_block([&](const T* from, int64_t n) __attribute__((always_inline)) {
        for (int64_t i = 0; i < n; ++i) to[even[row.position[i]]++] = to_real(from[i]);
    });
    all_moments(row);
}

// 16-bit logits: how often each bit pattern occurs, then the patterns from the largest number to the smallest.
template <class T> void group_by_counts(const T* x, int64_t vocab, double warmest, GroupedRow<float>& row) {
    constexpr int64_t finite = finite_keys<T>();
    row.histogram.resize(size_t(2 * kKeys));  // zero: what was counted is cleared below
    uint32_t *even = row.histogram.data(), *odd = even + kKeys;
    std::fill(row.histogram.begin(), row.histogram.end(), 0);
    const auto* keys = reinterpret_cast<const uint16_t*>(x);
    int64_t i = 0;
    for (; i + 4 <= vocab; i += 4) {
        if (i % 32 == 0) prefetch(reinterpret_cast<const char*>(keys + i) + 4096);
        uint64_t four;
        std::memcpy(&four, keys + i, 8);
        ++even[four & 0xffff];
        ++odd[four >> 16 & 0xffff];
        ++even[four >> 32 & 0xffff];
        ++odd[four >> 48];
    }
    for (; i < vocab; ++i) ++even[keys[i]];
    row.values.clear();
    row.often.clear();
    row.finite = 0;
    const auto take = [&](int64_t key) {
        const uint32_t n = even[key] + odd[key];
        if (!n) return;
        const auto bits = uint16_t(key);
        T value;
        std::memcpy(&value, &bits, sizeof value);
        row.values.push_back(to_real(value));
        row.often.push_back(int32_t(n));
        row.finite += n;
    };
    const auto any = [&](int64_t first) {
        uint32_t found = 0;
        for (int64_t k = first; k < first + kKeyGroup; ++k) found |= even[k] | odd[k];
        return found != 0;
    };
    for (int64_t first = finite - kKeyGroup; first >= 0; first -= kKeyGroup)
        if (any(first))
            for (int64_t key = first + kKeyGroup - 1; key >= first; --key) take(key);
    for (int64_t first = kNegative; first < kNegative + finite; first += kKeyGroup)
        if (any(first))
            for (int64_t key = first; key < first + kKeyGroup; ++key) take(key);
    row.undefined = row.finite == 0 || row.finite + even[kNegative + finite] + odd[kNegative + finite] != vocab;
    if (row.undefined) return;

    const int64_t different = int64_t(row.values.size());
    row.max = double(row.values[0]);
    int64_t near = 0, seen = 0, n = 0;  // as reach_of, with all logits for a sample
    while (n < different && double(row.values[n]) > row.max - kReach * warmest) near += row.often[n++];
    for (n = 0; seen + row.often[n] <= near * 49 / 50; ++n) seen += row.often[n];
    double reach = 1.25 * (row.max - double(row.values[n]));
    if (!(reach > 0)) reach = kReach * warmest;
    const double width = reach / double(kMostBuckets - 1);
    row.half_width = width / 2;
    row.make_room(different);
    int64_t before = 0;
    for (int64_t first = 0; first < different;) {
        row.open_group(first, double(row.values[first]) - row.max - width / 2, before);
        row.sorted[row.groups - 1] = 1;
        const double end = double(row.values[first]) - width;
        for (; first < different && double(row.values[first]) >= end; ++first) before += row.often[first];
    }
    row.begin[row.groups] = int32_t(different);
    row.above[row.groups] = before;
    row.narrow = row.groups;
    all_moments(row);
}

template <class S, class T> void group_row(const T* x, int64_t vocab, double warmest, GroupedRow<typename S::real>& row) {
    if constexpr (sizeof(T) == 2)
        if (vocab >= kCountFrom) return group_by_counts(x, vocab, warmest, row);
    group_by_buckets<S>(x, vocab, warmest, row);
}

}  // namespace fastcalib::FASTCALIB_ISA
