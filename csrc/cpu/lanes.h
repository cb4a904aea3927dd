// What a thread keeps while it sums a row: temperatures, vectors of partial sums, the spread of the logits, scratch memory.
#pragma once
#include <algorithm>
#include <vector>

#include "../row_state.h"
#include "counts.h"
#include "schedule.h"
#include "simd.h"

namespace fastcalib::FASTCALIB_ISA {

// Temperatures further apart than this share nothing: where their common y ends, 2^-126 (y c)^2 would not be negligible.
constexpr double kWidest = 1e9;

// 1/T of each temperature of a row in the units of the kernels, and whether 1/T is an arithmetic progression.
struct Betas {
    std::vector<double> b, c;  // 1/T; log2(e)/T
    double step = 0;           // progression: c[k] = c_least + k * step, counted from the end that is smallest
    bool arithmetic = false, ascending = true;
    bool far_apart = false;    // more than kWidest

    void set(const double* temperatures, int64_t count) {
        b.resize(count);
        c.resize(count);
        for (int64_t k = 0; k < count; ++k) {
            b[k] = 1.0 / temperatures[k];
            c[k] = kLog2e * b[k];
        }
        arithmetic = far_apart = false;
        if (count == 1) return;
        const auto [least, most] = std::minmax_element(c.begin(), c.end());
        far_apart = *most > kWidest * *least;
        if (count < 4 || far_apart) return;
        const double d = (c[count - 1] - c[0]) / double(count - 1);
        for (int64_t k = 1; k < count; ++k)
            // A deviation of 1e-11 c moves an exponent by at most 1e-9, far below float32.
            if (!(std::fabs(c[k] - (c[0] + double(k) * d)) <= 1e-11 * std::fabs(c[k]))) return;
        arithmetic = d != 0;
        ascending = d > 0;
        step = std::fabs(d);
    }
    int64_t count() const { return int64_t(b.size()); }
};

// Fetches the next block bit by bit while this one is summed, so that memory and arithmetic overlap.
struct Ahead {
    const char* at;
    int64_t bytes;  // a step: as many as one vector of logits
    FC_INLINE void next() {
        prefetch(at + 4096);
        at += bytes;
    }
};

// Sum and sum of squares of z - center over a block: they make the spread of the logits, and they are NaN or infinite
// wherever a logit is. The center lies near the mean, not at the maximum, or one large logit would cancel all digits.
template <class S> struct Spread {
    typename S::vec center, sum, square;
    explicit Spread(typename S::vec near) : center(near), sum(S::set(0)), square(S::set(0)) {}
    FC_INLINE void add(typename S::vec z) {
        const auto d = z - center;
        sum = sum + d;
        square = square + d * d;
    }
};

// s0, s1, s2, r2 of one temperature, lane by lane.
template <class S> struct Lanes {
    typename S::vec s0, s1, s2, r2;
    FC_INLINE void clear() { s0 = s1 = s2 = r2 = S::set(0); }
    FC_INLINE void add(typename S::vec e, typename S::vec t) {
        const auto et = e * t;
        s0 = s0 + e;
        s1 = s1 + et;
        s2 = s2 + et * t;
        r2 = r2 + e * e;
    }
    // With the square shared by all temperatures.
    FC_INLINE void add(typename S::vec e, typename S::vec y, typename S::vec y2) {
        s0 = s0 + e;
        s1 = s1 + e * y;
        s2 = s2 + e * y2;
        r2 = r2 + e * e;
    }
    FC_INLINE void add(const Lanes& o, typename S::vec unit) {
        s0 = s0 + o.s0;
        s1 = s1 + o.s1 * unit;
        s2 = s2 + o.s2 * unit * unit;
        r2 = r2 + o.r2;
    }
    FC_INLINE void add(const Lanes& o) {
        s0 = s0 + o.s0;
        s1 = s1 + o.s1;
        s2 = s2 + o.s2;
        r2 = r2 + o.r2;
    }
    // Move to a maximum that is larger by -d / c: the vector form of Sums::shift.
    FC_INLINE void shift(double d) {
        using real = typename S::real;
        d = d > kLowestShift ? d : kLowestShift;
        const real r = real(::exp2(d));
        if (r == 0) return clear();  // d^2 could overflow to inf * 0
        const auto dv = S::set(real(d)), rv = S::set(r);
        s2 = rv * (s2 + dv * (s1 + s1 + dv * s0));
        s1 = rv * (s1 + dv * s0);
        s0 = rv * s0;
        r2 = rv * rv * r2;
    }
    Sums total() const { return {S::reduce_add(s0), S::reduce_add(s1), S::reduce_add(s2), S::reduce_add(r2)}; }
};

// So many blocks are added up in float32 lanes before their sums go to double: equal terms round the same way each time, so the
// error grows with their number.
constexpr int64_t kBlocksInLanes = 16;

template <class S> struct Scratch {
    using real = typename S::real;
    alignas(64) real values[kBlock + 64];
    alignas(64) real power[kBlock + 64], ratio[kBlock + 64], below[kBlock + 64];
    std::vector<Lanes<S>> sums;  // of the last blocks of a segment, one per temperature
    int64_t blocks = 0;          // how many
    std::vector<Sums> segment, row;
    Counts counts;  // of 16-bit logits
    Betas betas;
    bool moments = true;  // false: s0 alone is wanted (no entropy, variance, collision, nor the spread of the logits)

    void clear_sums(Sums* out) {
        sums.resize(betas.b.size());
        for (auto& l : sums) l.clear();
        std::fill(out, out + sums.size(), Sums());
        blocks = 0;
    }
    // To a maximum that is larger by `rise`.
    void raise_sums(Sums* out, double rise) {
        for (size_t k = 0; k < sums.size(); ++k) {
            sums[k].shift(-betas.c[k] * rise);
            out[k].shift(-betas.c[k] * rise);
        }
    }
    void flush_sums(Sums* out) {
        for (size_t k = 0; k < sums.size(); ++k) {
            out[k].add(sums[k].total());
            sums[k].clear();
        }
        blocks = 0;
    }
    void block_is_in(Sums* out) {
        if (++blocks == kBlocksInLanes) flush_sums(out);
    }
};

}  // namespace fastcalib::FASTCALIB_ISA
