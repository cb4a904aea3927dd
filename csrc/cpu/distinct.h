// Sums over a segment of 16-bit logits at several temperatures: 32,768 logits of a model take a few thousand different
// values, so each value is counted first and the exponentials are taken once for each value and temperature.
#pragma once
#include "accumulate.h"

namespace fastcalib::FASTCALIB_ISA {

// Keys below this, with either sign, are finite numbers.
template <class T> constexpr int64_t finite_keys();
template <> constexpr int64_t finite_keys<bfloat16>() { return 0x7f80; }
template <> constexpr int64_t finite_keys<float16>() { return 0x7c00; }

// Sums of G temperatures over a chunk of values, each as often as its count says; padded with counts of 0.
template <class S, int G, class T>
FC_INLINE void sum_chunk(const Counts& counts, typename S::real max, const double* c, Lanes<S>* sums) {
    using real = typename S::real;
    using vec = typename S::vec;
    Lanes<S> lanes[G];
    vec scale[G];
    for (auto& l : lanes) l.clear();
    for (int g = 0; g < G; ++g) scale[g] = S::set(real(c[g]));
    const vec m = S::set(max), floor = S::set(real(S::lowest_exponent / *std::min_element(c, c + G)));
    for (int64_t i = 0; i < counts.filled; i += S::lanes) {
        const vec z = S::load(reinterpret_cast<const T*>(counts.keys) + i), n = S::load(counts.count + i);
        const vec y = S::max(z - m, floor), ny = n * y, ny2 = ny * y;
        for (int g = 0; g < G; ++g) {
            const vec e = S::exp2_finite(y * scale[g]), ne = n * e;
            lanes[g].s0 = lanes[g].s0 + ne;
            lanes[g].s1 = lanes[g].s1 + ny * e;
            lanes[g].s2 = lanes[g].s2 + ny2 * e;
            lanes[g].r2 = lanes[g].r2 + ne * e;
        }
    }
    for (int g = 0; g < G; ++g) sums[g].add(lanes[g], scale[g]);
}

template <class S, class T>
FASTCALIB_ONE_BODY void accumulate_distinct(const T* x, int64_t n, Scratch<S>& scratch, Head& head, Sums* out) {
    using real = typename S::real;
    const int64_t k_count = scratch.betas.count();
    Counts& counts = scratch.counts;
    scratch.clear_sums(out);
    head = Head();
    counts.add(reinterpret_cast<const uint16_t*>(x), n);
    constexpr int64_t finite = finite_keys<T>();
    const double* c = scratch.betas.c.data();
    const real center = near_mean(x, std::min<int64_t>(n, 64));
    const int64_t largest = counts.largest<S>(finite);
    real max = 0;
    if (largest >= 0) {
        const auto key = uint16_t(largest);
        T value;
        std::memcpy(&value, &key, sizeof value);
        max = to_real(value);
    }
    double finite_logits = 0, sum = 0, square = 0;  // of z - center
    const auto chunk = [&] {
        for (int64_t i = counts.filled; i % S::lanes; ++i) {
            counts.keys[i] = uint16_t(largest);
            counts.count[i] = 0;
        }
        auto number = S::set(0), first = S::set(0), second = S::set(0);
        for (int64_t i = 0; i < counts.filled; i += S::lanes) {
            const auto often = S::load(counts.count + i), d = S::load(reinterpret_cast<const T*>(counts.keys) + i) - S::set(center);
            number = number + often;
            first = first + often * d;
            second = second + often * d * d;
        }
        finite_logits += S::reduce_add(number);
        sum += S::reduce_add(first);
        square += S::reduce_add(second);
        int64_t k = 0;
        for (; !scratch.betas.far_apart && k + 4 <= k_count; k += 4)
            sum_chunk<S, 4, T>(counts, max, c + k, &scratch.sums[k]);
        for (; k < k_count; ++k) sum_chunk<S, 1, T>(counts, max, c + k, &scratch.sums[k]);
        scratch.block_is_in(out);
    };
    counts.for_each_chunk<S>(0, finite, chunk);
    counts.for_each_chunk<S>(kNegative, finite, chunk);
    head.n = int64_t(finite_logits);
    head.masked = counts.take(kNegative + finite);
    if (head.n + head.masked != n) {  // a NaN or +inf; their counts stay, and no one looks at them
        head = Head();
        head.undefined = true;
        return;
    }
    scratch.flush_sums(out);
    if (head.n == 0) return;
    head.max = double(max);
    head.argmax = first_not_less<S>(x, 0, n, max);
    if (std::isfinite(sum) && std::isfinite(square)) {
        head.mean = double(center) + sum / double(head.n);
        head.m2 = std::max(0.0, square - sum * (sum / double(head.n)));
    } else {
        head.masked = 0;  // counted once more there
        careful_spread(x, n, head);
    }
}

}  // namespace fastcalib::FASTCALIB_ISA
