// The monoid under every statistic: what is kept of one subset of a row, and how two disjoint subsets merge.
//
// With m = max z, b = 1/T and t = b log2(e) (z - m) <= 0, one temperature keeps
//     s0 = sum 2^t    s1 = sum 2^t t    s2 = sum 2^t t^2    r2 = sum 2^(2t)
// so exponentials are base 2 throughout and y = z - m is t / c with c = b log2(e). Merging moves both sides to the larger
// maximum: t' = t + d with d = c (m_old - m_new) <= 0, hence s0' = r s0, s1' = r (s1 + d s0),
// s2' = r (s2 + 2 d s1 + d^2 s0), r2' = r^2 r2 with r = 2^d. Host and device code include this file.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTCALIB_HD __host__ __device__
#else
#define FASTCALIB_HD
#endif

// One body, one rounding: inlined at two places, the same lines may be contracted to different fused multiply-adds, and a row
// would get other bits when its segments are shared out.
#if defined(__CUDACC__)  // compiled without contraction
#define FASTCALIB_ONE_BODY
#else
#define FASTCALIB_ONE_BODY __attribute__((noinline))
#endif

namespace fastcalib {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
// Below this shift every sum is exactly 0 after rescaling; it keeps d finite when a maximum is -inf or -FLT_MAX.
constexpr double kLowestShift = -100000.0;

// Vocabulary is always cut at multiples of this, whatever the batch or the number of threads, so the bits never change.
constexpr int64_t kSegment = 32768;

struct Sums {
    double s0 = 0, s1 = 0, s2 = 0, r2 = 0;

    FASTCALIB_HD void shift(double d) {
        d = d > kLowestShift ? d : kLowestShift;
        const double r = exp2(d);
        s2 = r * (s2 + 2 * d * s1 + d * d * s0);
        s1 = r * (s1 + d * s0);
        s0 *= r;
        r2 *= r * r;
    }
    FASTCALIB_HD void add(const Sums& o) {
        s0 += o.s0;
        s1 += o.s1;
        s2 += o.s2;
        r2 += o.r2;
    }
};

// What does not depend on the temperature. The spread is over finite logits (Chan's update); NaN and +inf are remembered.
struct Head {
    double max = -HUGE_VAL;
    int64_t argmax = -1;
    int64_t n = 0;  // finite logits
    double mean = 0, m2 = 0;
    int64_t masked = 0;      // logits equal to -inf
    bool undefined = false;  // some NaN or +inf: no softmax

    FASTCALIB_HD void merge_spread(int64_t n_other, double mean_other, double m2_other) {
        if (n_other == 0) return;
        const int64_t total = n + n_other;
        const double delta = mean_other - mean;
        mean += delta * (double(n_other) / double(total));
        m2 += m2_other + delta * delta * (double(n) * (double(n_other) / double(total)));
        n = total;
    }
};

// Merge the state (head_b, b) of later columns into (head_a, a) of earlier ones; ties keep the earlier argmax.
FASTCALIB_HD FASTCALIB_ONE_BODY inline void merge(Head& head_a, Sums* a, const Head& head_b, const Sums* b,
                                                  const double* c, int k_count) {
    head_a.merge_spread(head_b.n, head_b.mean, head_b.m2);
    head_a.masked += head_b.masked;
    head_a.undefined = head_a.undefined || head_b.undefined;
    if (head_b.argmax < 0) return;  // nothing finite on the right
    if (head_a.argmax < 0) {
        head_a.max = head_b.max;
        head_a.argmax = head_b.argmax;
        for (int k = 0; k < k_count; ++k) a[k] = b[k];
        return;
    }
    const bool right = head_b.max > head_a.max;
    const double top = right ? head_b.max : head_a.max;
    for (int k = 0; k < k_count; ++k) {
        Sums other = b[k];
        if (right) a[k].shift(c[k] * (head_a.max - top));
        else other.shift(c[k] * (head_b.max - top));
        a[k].add(other);
    }
    if (right) {
        head_a.max = head_b.max;
        head_a.argmax = head_b.argmax;
    }
}

}  // namespace fastcalib
