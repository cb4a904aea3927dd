// One read of a stretch of a row -> its Head and the Sums of K temperatures (see row_state.h for the symbols).
//
// Block by block. One temperature, the common case, takes one pass: exponentials are summed against the maximum of the
// blocks before, and the block's own maximum is found on the way; the sums move to it afterwards. Only a block that rises
// well above all before it is summed again. Several temperatures, last blocks and float64 take two: a first pass over up to
// 2,048 columns (from memory) finds the maximum, a second (from the first-level cache) sums. Each block's sums are added
// to second-level accumulators, so no float32 sum is longer than a few hundred terms.
#pragma once
#include "lanes.h"

namespace fastcalib::FASTCALIB_ISA {

// A block this many powers of two above the running maximum is summed again. Moving sums down cancels: an element at the old
// maximum weighs 2^-d beside the new one, and the error of s2 is that of the new one's d^2, so it grows as 2^d.
constexpr double kFarAbove = 3.0;

template <class S, class T> FC_INLINE typename S::real max_of(const T* x, int64_t n) {
    typename S::vec top = S::set(-typename S::real(INFINITY));
    for (int64_t i = 0; i < n; i += S::lanes) top = S::max(S::load(x + i), top);
    return S::reduce_max(top);
}

// One temperature, one pass: sums and spread of n logits (a multiple of 2 vectors) relative to `max`; returns their own
// maximum. Without moments only s0 is summed; then a NaN among the logits makes s0 or the spread's sum a NaN.
template <class S, bool Moments, class T>
FASTCALIB_ONE_BODY typename S::real sum_once(const T* x, int64_t n, typename S::real max, double c, Lanes<S>& sums, Spread<S>& spread) {
    using real = typename S::real;
    using vec = typename S::vec;
    const vec m = S::set(max), scale = S::set(real(c)), least = S::set(S::lowest_exponent);
    Lanes<S> lanes[2];
    Spread<S> wide[2] = {Spread<S>(spread.center), Spread<S>(spread.center)};
    vec top[2] = {S::set(-real(INFINITY)), S::set(-real(INFINITY))};
    for (auto& l : lanes) l.clear();
    for (int64_t i = 0; i < n; i += 2 * S::lanes) {
        for (size_t byte = 0; byte < 2 * S::lanes * sizeof(T); byte += 64)
            prefetch(reinterpret_cast<const char*>(x + i) + 4096 + byte);
        vec pair[2];
        S::load_any_order(x + i, pair[0], pair[1]);
        for (int u = 0; u < 2; ++u) {
            const vec z = pair[u], t = (z - m) * scale;
            top[u] = S::max(z, top[u]);
            // The clamp turns -inf into a negligible 2^-126. A NaN does not get through it where the spread tells of it.
            // Far above max, 2^t is out of range and means nothing: the caller sums such a block again.
            if constexpr (Moments) {
                const vec clamped = S::max(t, least);
                wide[u].add(z);
                lanes[u].add(S::exp2(clamped), clamped);
            } else {
                lanes[u].s0 = lanes[u].s0 + S::exp2(S::max(least, t));
                if constexpr (!S::exp2_passes_nan) wide[u].sum = wide[u].sum + t;
            }
        }
    }
    sums = lanes[0];
    sums.add(lanes[1]);
    spread.sum = wide[0].sum + wide[1].sum;
    spread.square = wide[0].square + wide[1].square;
    return S::reduce_max(S::max(top[0], top[1]));
}

// Sums of G neighbouring temperatures over a block of n values, a multiple of the vector length. Several share y and its
// square, and their moments are brought from y to t = c y on the way out.
template <class S, int G, bool WithSpread>
FC_INLINE void sum_block(const typename S::real* values, int64_t n, typename S::real max, const double* c, Lanes<S>* sums,
                         Ahead& ahead, Spread<S>& spread) {
    using real = typename S::real;
    using vec = typename S::vec;
    constexpr int chains = G == 1 ? S::chains : 1;
    Spread<S> odd(spread.center);  // the second chain's
    Lanes<S> lanes[G * chains];
    vec scale[G];
    for (auto& l : lanes) l.clear();
    for (int g = 0; g < G; ++g) scale[g] = S::set(real(c[g]));
    // The clamp turns -inf into a negligible 2^-126; where several share y, it is 2^-126 of the warmest.
    const vec m = S::set(max), least = S::set(S::lowest_exponent);
    const vec floor = S::set(real(S::lowest_exponent / *std::min_element(c, c + G)));
    int64_t i = 0;
    const auto step = [&](int64_t at, int chain) __attribute__((always_inline)) {
        ahead.next();
        const vec z = S::load(values + at);
        if constexpr (WithSpread) (chain ? odd : spread).add(z);
        if constexpr (G == 1) {
            const vec t = S::max((z - m) * scale[0], least);
            lanes[chain].add(S::exp2(t), t);
        } else {
            const vec y = S::max(z - m, floor), y2 = y * y;
            for (int g = 0; g < G; ++g) lanes[g].add(S::exp2_finite(y * scale[g]), y, y2);
        }
    };
    for (; i + chains * S::lanes <= n; i += chains * S::lanes)
        for (int chain = 0; chain < chains; ++chain) step(i + chain * S::lanes, chain);
    for (; i < n; i += S::lanes) step(i, 0);
    // Two chains hide the latency of the additions where one temperature alone would not.
    if constexpr (G == 1)
        for (int chain = 0; chain < chains; ++chain) sums[0].add(lanes[chain]);
    else
        for (int g = 0; g < G; ++g) sums[g].add(lanes[g], scale[g]);
    if constexpr (WithSpread && chains > 1) {
        spread.sum = spread.sum + odd.sum;
        spread.square = spread.square + odd.square;
    }
}

// The same for inverse temperatures in arithmetic progression: 2^(c_k y) = 2^(c_0 y) (2^(step y))^k, so two exponentials
// serve all K. Runs from the smallest c, where every factor is <= 1 and underflow is a clean 0. First the power at c_least
// and the ratio, for the whole block; they wait in the scratch while groups of G temperatures go over it. Two loops, since
// together they have more numbers under way than registers. Moments are in y here and brought to t = c y on the way out.
template <class S, bool WithSpread>
FC_INLINE void powers_of_block(Scratch<S>& scratch, const typename S::real* values, int64_t n, typename S::real max,
                               double c_least, double step, Ahead& ahead, Spread<S>& spread) {
    using real = typename S::real;
    using vec = typename S::vec;
    const vec m = S::set(max), floor = S::set(real(S::lowest_exponent / c_least));
    const vec first = S::set(real(c_least)), distance = S::set(real(step));
    for (int64_t i = 0; i < n; i += S::lanes) {
        ahead.next();
        const vec z = S::load(values + i), y = S::max(z - m, floor);
        if constexpr (WithSpread) spread.add(z);
        S::store(scratch.below + i, y);
        S::store(scratch.power + i, S::exp2_finite(y * first));
        S::store(scratch.ratio + i, S::exp2_finite(y * distance));
    }
}

template <class S, int G>
FC_INLINE void sum_powers(Scratch<S>& scratch, int64_t n, const double* const* c, Lanes<S>* const* sums) {
    using real = typename S::real;
    using vec = typename S::vec;
    Lanes<S> lanes[G];
    for (auto& l : lanes) l.clear();
    for (int64_t i = 0; i < n; i += S::lanes) {
        const vec y = S::load(scratch.below + i), w = S::load(scratch.ratio + i), y2 = y * y;
        vec e = S::load(scratch.power + i);
        for (int g = 0; g < G; ++g) {
            lanes[g].add(e, y, y2);
            e = e * w;
        }
        S::store(scratch.power + i, e);
    }
    for (int g = 0; g < G; ++g) sums[g]->add(lanes[g], S::set(real(*c[g])));
}

// All temperatures over a block, and its spread, which the first group of temperatures takes along.
template <class S, bool WithSpread>
FC_INLINE void sum_temperatures(Scratch<S>& scratch, const typename S::real* values, int64_t n, typename S::real max,
                                Ahead& ahead, Spread<S>& spread) {
    const Betas& betas = scratch.betas;
    const int64_t count = betas.count();
    Lanes<S>* sums = scratch.sums.data();
    if (betas.arithmetic) {  // at least four temperatures
        const auto at = [&](int64_t k) { return betas.ascending ? k : count - 1 - k; };
        const auto group = [&]<int G>(int64_t k) __attribute__((always_inline)) {
            const double* c[G];
            Lanes<S>* to[G];
            for (int g = 0; g < G; ++g) {
                c[g] = &betas.c[at(k + g)];
                to[g] = sums + at(k + g);
            }
            sum_powers<S, G>(scratch, n, c, to);
        };
        // Every 16 temperatures the power is formed anew, so that rounding does not build up.
        for (int64_t k = 0; k < count;) {
            if (k == 0) powers_of_block<S, WithSpread>(scratch, values, n, max, betas.c[at(0)], betas.step, ahead, spread);
            else if (k % 16 == 0)
                powers_of_block<S, false>(scratch, values, n, max, betas.c[at(k)], betas.step, ahead, spread);
            if (k + 4 <= count) {
                group.template operator()<4>(k);
                k += 4;
            } else {
                group.template operator()<1>(k);
                ++k;
            }
        }
        return;
    }
    const auto group = [&]<int G, bool Spreads>(int64_t k) __attribute__((always_inline)) {
        sum_block<S, G, Spreads>(values, n, max, &betas.c[k], sums + k, ahead, spread);
    };
    if (count == 1) return group.template operator()<1, WithSpread>(0);
    if (betas.far_apart) {
        group.template operator()<1, WithSpread>(0);
        for (int64_t k = 1; k < count; ++k) group.template operator()<1, false>(k);
        return;
    }
    if (count < 4) {
        group.template operator()<2, WithSpread>(0);
        if (count == 3) group.template operator()<1, false>(2);
        return;
    }
    group.template operator()<4, WithSpread>(0);
    int64_t k = 4;
    for (; k + 4 <= count; k += 4) group.template operator()<4, false>(k);
    if (k + 2 <= count) {
        group.template operator()<2, false>(k);
        k += 2;
    }
    if (k < count) group.template operator()<1, false>(k);
}

// Spread of a segment with -inf, NaN or overflow in it: one more look, from the cache, in double.
template <class T> __attribute__((noinline)) void careful_spread(const T* x, int64_t n, Head& head) {
    double mean = 0, m2 = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double z = double(to_real(x[i]));
        if (std::isfinite(z)) {
            ++count;
            const double delta = z - mean;
            mean += delta / double(count);
            m2 += delta * (z - mean);
        } else if (z < 0) {
            ++head.masked;
        } else {
            head.undefined = true;
        }
    }
    head.n = count;
    head.mean = mean;
    head.m2 = m2;
}

template <class T> bool any_nan(const T* x, int64_t n) {
    int found = 0;
    for (int64_t i = 0; i < n; ++i) found |= int(to_real(x[i]) != to_real(x[i]));
    return found != 0;
}

// Mean of the finite ones among the first few logits.
template <class T> auto near_mean(const T* x, int64_t n) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double z = double(to_real(x[i]));
        if (std::isfinite(z)) sum += z, ++count;
    }
    return decltype(to_real(*x))(count ? sum / double(count) : 0.0);
}

// Lowest column from `from` on with x >= bound; there is one.
template <class S, class T> int64_t first_not_less(const T* x, int64_t from, int64_t n, typename S::real bound) {
    const auto least = S::set(bound);
    while (from + S::lanes <= n && !S::any_not_less(S::load(x + from), least)) from += S::lanes;
    while (from < n && !(to_real(x[from]) >= bound)) ++from;
    return from;
}

// One temperature has two chains of lanes, several have one.
template <class S> int64_t sum_block_length(int64_t k_count) {
    return S::lanes == 1 ? kBlock : kTerms * S::lanes * (k_count == 1 ? S::chains : 1);
}

template <class S, bool Moments, class T>
FASTCALIB_ONE_BODY void accumulate_each(const T* x, int64_t n, Scratch<S>& scratch, Head& head, Sums* out) {
    using real = typename S::real;
    using vec = typename S::vec;
    const int64_t k_count = scratch.betas.count();
    scratch.clear_sums(out);
    head = Head();
    real max = S::lowest;
    int64_t argmax = -1;
    const real center = near_mean(x, std::min<int64_t>(n, 64));
    double sum = 0, square = 0;  // of z - center
    bool spread_known = true;
    const auto raise = [&](real to, int64_t start) {
        if (argmax >= 0) scratch.raise_sums(out, double(to) - double(max));
        max = to;
        argmax = start;  // of its block; the place within it is looked up once, at the end
    };
    const auto nothing_in = [&](const T* from, int64_t length) {  // all -inf, or NaN, so far
        spread_known = false;
        head.undefined = head.undefined || any_nan(from, length);
    };

    const int64_t block = sum_block_length<S>(k_count);
    int64_t start = 0;
    if constexpr (S::lanes > 1) {
        const double c = scratch.betas.c[0];
        for (; k_count == 1 && start + block <= n; start += block) {
            const T* from = x + start;
            if (argmax < 0) {
                const real first = max_of<S>(from, block);
                if (first == -real(INFINITY)) {
                    nothing_in(from, block);
                    continue;
                }
                raise(first, start);
            }
            Lanes<S> sums;
            Spread<S> spread(S::set(center));
            real block_max = sum_once<S, Moments>(from, block, max, c, sums, spread);
            if (block_max > max && c * (double(block_max) - double(max)) > kFarAbove && block_max < real(INFINITY)) {
                raise(block_max, start);
                block_max = sum_once<S, Moments>(from, block, max, c, sums, spread);
            }
            if (block_max == real(INFINITY)) {
                head.undefined = true;
                return;
            }
            scratch.sums[0].add(sums);
            if (block_max > max) raise(block_max, start);
            scratch.block_is_in(out);
            const double block_sum = S::reduce_add(spread.sum);
            if (!Moments && std::isnan(block_sum)) head.undefined = true;
            sum += block_sum;
            square += S::reduce_add(spread.square);
        }
    }
    for (; start < n; start += block) {
        const int64_t length = std::min(block, n - start), whole = length / S::lanes * S::lanes;
        const T* from = x + start;
        // float32 is read in place; 16-bit logits are widened once, as is a last block that needs padding.
        constexpr bool in_place = std::is_same_v<T, real>;
        const bool copy = !in_place || whole != length;
        vec top[2] = {S::set(-real(INFINITY)), S::set(-real(INFINITY))};
        const auto look = [&](int64_t i, int chain) __attribute__((always_inline)) {
            const vec v = S::load(from + i);
            if (copy) S::store(scratch.values + i, v);
            top[chain] = S::max(v, top[chain]);
        };
        int64_t i = 0;
        for (; i + 2 * S::lanes <= whole; i += 2 * S::lanes) {
            look(i, 0);
            look(i + S::lanes, 1);
        }
        for (; i < whole; i += S::lanes) look(i, 0);
        real block_max = S::reduce_max(S::max(top[0], top[1]));
        if (whole != length) {
            for (; i < length; ++i) {
                const real z = to_real(from[i]);
                scratch.values[i] = z;
                block_max = z > block_max ? z : block_max;
            }
            for (; i % S::lanes; ++i) scratch.values[i] = -real(INFINITY);
        }
        const real* values = copy ? scratch.values : reinterpret_cast<const real*>(from);
        if (block_max > max || (argmax < 0 && block_max == max)) {
            if (block_max == real(INFINITY)) {
                head.undefined = true;
                return;
            }
            raise(block_max, start);
        }
        if (argmax < 0) {
            nothing_in(from, length);
            continue;
        }
        // Sums of several temperatures do not see a NaN, and the spread may become one by overflow.
        if (!Moments && any_nan(from, length)) head.undefined = true;
        Ahead ahead{reinterpret_cast<const char*>(from + length), int64_t(S::lanes * sizeof(T))};
        Spread<S> spread(S::set(center));
        sum_temperatures<S, true>(scratch, values, whole, max, ahead, spread);
        sum += S::reduce_add(spread.sum);
        square += S::reduce_add(spread.square);
        if (whole != length) {
            // The spread would see the padding, so the last few are added to it one by one.
            sum_temperatures<S, false>(scratch, values + whole, S::lanes, max, ahead, spread);
            for (i = whole; i < length; ++i) {
                const double d = double(values[i]) - double(center);
                sum += d;
                square += d * d;
            }
        }
        scratch.block_is_in(out);
    }
    scratch.flush_sums(out);
    if (argmax >= 0) argmax = first_not_less<S>(x, argmax, n, max);
    head.max = argmax >= 0 ? double(max) : -HUGE_VAL;
    head.argmax = argmax;
    if constexpr (!Moments) {
        head.undefined = head.undefined || !std::isfinite(out[0].s0);
        head.n = n;
        return;
    }
    if (spread_known && std::isfinite(sum) && std::isfinite(square)) {
        head.n = n;
        head.mean = double(center) + sum / double(n);
        head.m2 = std::max(0.0, square - sum * (sum / double(n)));
    } else {
        careful_spread(x, n, head);
    }
}

}  // namespace fastcalib::FASTCALIB_ISA
