// pr_divergence: alpha_lam = sum_v min(lam P_v, Q_v) for many lam between two softmaxes over the same vocabulary.
//
// With t = c (z - max z) of each side (row_state.h), Q_v < lam P_v is the same as
//     d_v = t_q - t_p < theta_lam = log2 lam + log2 s0_q - log2 s0_p
// so one difference of logits is held against all thresholds, and with A = sum_{d < theta} Q_v, B = sum_{d >= theta} P_v
//     alpha = A + lam B,    beta = alpha / lam = A / lam + B.
// lam = 0 and inf are thresholds below and above every finite d: B is then P(supp Q), the recall, and A is Q(supp P),
// the precision.
//
// Backward, b = 1/T, away from ties; dQ_u/dz_v = b Q_v (1[u = v] - Q_u) and the terms with lam P_u do not move:
//     d alpha/dz_v = b Q_v (1[d_v < theta] - A)          for the teacher   lam b_p P_v (1[d_v >= theta] - B)
// Upstreams g over lam add up to two numbers for each element, which depend on d_v alone: how many thresholds lie above it.
// d alpha/dT = -1/T sum_v (z_v - max z) dalpha/dz_v, since sum_v dalpha/dz_v = 0.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "api.h"
#include "places.h"
#include "segment.h"
#include "selection.h"

namespace fastcalib::FASTCALIB_ISA {

// Thresholds from which a search for the place among them is cheaper than a comparison with each: one that has to halve its way,
// and one by a table (places.h).
template <class S> constexpr int64_t search_from(bool table) { return !S::has_gather ? 24 : table ? 28 : 40; }
template <class S> constexpr int64_t search_backward_from(bool table) { return !S::has_gather ? 24 : table ? 20 : 28; }

// vector::assign would be emitted by an instruction set alone where the baseline inlines it (CMakeLists.txt).
template <class Real> void refill(std::vector<Real>& values, int64_t n, Real value) {
    values.resize(size_t(n));
    std::fill(values.begin(), values.end(), value);
}

// The thresholds of one row, falling, and the two sides' normalisers.
template <class S> struct PairRow {
    using real = typename S::real;
    double max[2] = {0, 0}, c[2] = {0, 0}, log2_s0[2] = {0, 0};  // student, teacher
    std::vector<real> theta;                                     // padded with -inf to a power of two
    std::vector<int64_t> order;                                  // theta[i] belongs to lam[order[i]]
    int64_t count = 0, padded = 1;
    Places<real> places;

    void set_order(const double* lam, int64_t n) {
        count = n;
        for (padded = 1; padded <= n; padded *= 2) {}
        order.resize(size_t(n));
        std::iota(order.begin(), order.end(), int64_t(0));
        std::stable_sort(order.begin(), order.end(), [&](int64_t l, int64_t r) { return lam[l] > lam[r]; });
        refill(theta, padded, -real(INFINITY));
    }
    void set(const double* lam, const double* norms, double b_q, double b_p) {
        c[0] = kLog2e * b_q;
        c[1] = kLog2e * b_p;
        for (int side = 0; side < 2; ++side) {
            max[side] = norms[2 * side];
            log2_s0[side] = norms[2 * side + 1];
        }
        for (int64_t i = 0; i < count; ++i) {
            const double value = std::log2(lam[order[size_t(i)]]) + log2_s0[0] - log2_s0[1];
            theta[size_t(i)] = real(std::clamp(value, double(S::lowest), -double(S::lowest)));
        }
        if (count >= search_backward_from<S>(true)) places.set(theta.data(), count, padded);
    }
};

template <class S> struct PairScratch {
    using real = typename S::real;
    using vec = typename S::vec;
    Scratch<S> row;
    PairRow<S> pair;
    alignas(64) real q[kBlock + 64], p[kBlock + 64], d[kBlock + 64], y[2][kBlock + 64];
    alignas(64) int32_t above[kBlock + 64];
    struct Parts {
        vec below, rest;
    };
    std::vector<Parts> lanes;         // A and B of the last blocks, for each threshold
    std::vector<double> bins;         // (4, 2, padded): Q and P by the number of thresholds above, four copies
    std::vector<double> segment, sums;  // (2, count)
    std::vector<real> prefix[2];      // backward: what an element with so many thresholds above it gets
};

template <class S> constexpr int64_t pair_block() { return S::lanes == 1 ? kBlock : kTerms * S::lanes; }

// 2^t of both sides and the difference of the t for a block; columns beyond n up to a whole vector are 0.
template <class S, bool Distances, class T>
FC_INLINE int64_t load_pair(const T* student, const T* teacher, int64_t n, PairScratch<S>& s) {
    using real = typename S::real;
    using vec = typename S::vec;
    const PairRow<S>& pair = s.pair;
    const vec m_q = S::set(real(pair.max[0])), m_p = S::set(real(pair.max[1])), c_q = S::set(real(pair.c[0])),
              c_p = S::set(real(pair.c[1]));
    const auto one = [&](const T* a, const T* b, int64_t i) __attribute__((always_inline)) {
        const vec y_q = S::load(a) - m_q, y_p = S::load(b) - m_p, t_q = y_q * c_q, t_p = y_p * c_p;
        S::store(s.q + i, S::exp2_or_zero(t_q));
        S::store(s.p + i, S::exp2_or_zero(t_p));
        S::store(s.d + i, t_q - t_p);
        if constexpr (Distances) {
            S::store(s.y[0] + i, y_q);
            S::store(s.y[1] + i, y_p);
        }
    };
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) {
        prefetch(reinterpret_cast<const char*>(student + i) + 4096);
        prefetch(reinterpret_cast<const char*>(teacher + i) + 4096);
        one(student + i, teacher + i, i);
    }
    if (i < n) {
        T tail[2][S::lanes];
        for (auto& side : tail) std::fill(side, side + S::lanes, from_real<T>(-HUGE_VAL));
        std::copy(student + i, student + n, tail[0]);
        std::copy(teacher + i, teacher + n, tail[1]);
        one(tail[0], tail[1], i);
        i += S::lanes;
    }
    return i;
}

// How many thresholds lie above each d of the block. A d that is NaN, a token masked on both sides, counts anywhere: it weighs 0.
template <class S> FC_INLINE void find_places(PairScratch<S>& s, int64_t n) {
    s.pair.places.template find<S>(s.d, s.above, n, s.pair.theta.data());
}

template <class S, int G> FC_INLINE void compare_block(PairScratch<S>& s, int64_t n, int64_t first) {
    using vec = typename S::vec;
    vec below[G], rest[G], theta[G];
    for (int g = 0; g < G; ++g) {
        theta[g] = S::set(s.pair.theta[size_t(first + g)]);
        below[g] = rest[g] = S::set(0);
    }
    for (int64_t i = 0; i < n; i += S::lanes) {
        const vec q = S::load(s.q + i), p = S::load(s.p + i), d = S::load(s.d + i);
        for (int g = 0; g < G; ++g) {
            below[g] = below[g] + S::where_greater(theta[g], d, q);
            rest[g] = rest[g] + S::where_not_greater(theta[g], d, p);
        }
    }
    for (int g = 0; g < G; ++g) {
        auto& lane = s.lanes[size_t(first + g)];
        lane.below = lane.below + below[g];
        lane.rest = lane.rest + rest[g];
    }
}

// A and B, unnormalised, of a segment: out (2, count).
template <class S, class T>
FASTCALIB_ONE_BODY void pair_segment(const T* student, const T* teacher, int64_t n, PairScratch<S>& s, double* out) {
    const int64_t count = s.pair.count, padded = s.pair.padded, block = pair_block<S>();
    std::fill(out, out + 2 * count, 0.0);
    const bool search = count >= search_from<S>(s.pair.places.same > 0);
    if (search) s.bins.assign(size_t(8 * padded), 0.0);
    else s.lanes.assign(size_t(count), {S::set(0), S::set(0)});
    int64_t blocks = 0;
    const auto flush = [&] {
        for (int64_t k = 0; k < count; ++k) {
            auto& lane = s.lanes[size_t(k)];
            out[k] += S::reduce_add(lane.below);
            out[count + k] += S::reduce_add(lane.rest);
            lane = {S::set(0), S::set(0)};
        }
        blocks = 0;
    };
    for (int64_t start = 0; start < n; start += block) {
        const int64_t length = std::min(block, n - start);
        const int64_t whole = load_pair<S, false>(student + start, teacher + start, length, s);
        if (search) {
            find_places(s, whole);
            for (int64_t i = 0; i < length; ++i) {
                double* bin = s.bins.data() + (i % 4) * 2 * padded + 2 * s.above[i];
                bin[0] += double(s.q[i]);
                bin[1] += double(s.p[i]);
            }
            continue;
        }
        int64_t k = 0;
        for (; k + 4 <= count; k += 4) compare_block<S, 4>(s, whole, k);
        for (; k < count; ++k) compare_block<S, 1>(s, whole, k);
        if (++blocks == kBlocksInLanes) flush();
    }
    if (!search) return flush();
    // An element with u thresholds above it is in A of the first u and in B of the others.
    const auto bin = [&](int64_t u, int side) {
        double sum = 0;
        for (int64_t copy = 0; copy < 4; ++copy) sum += s.bins[size_t(copy * 2 * padded + 2 * u + side)];
        return sum;
    };
    double sum = 0;
    for (int64_t k = count - 1; k >= 0; --k) out[k] = sum += bin(k + 1, 0);
    sum = 0;
    for (int64_t k = 0; k < count; ++k) out[count + k] = sum += bin(k, 1);
}

inline bool is_ignored(const uint8_t* ignored, int64_t row) { return ignored && ignored[row]; }

// Neither side has a softmax here where one is undefined (NaN) or masked throughout (-inf).
inline bool has_pair(const double* norms) { return std::isfinite(norms[1]) && std::isfinite(norms[3]); }

inline void write_norm(double* to, const Head& head, const Sums& sums) {
    to[0] = head.max;
    to[1] = head.undefined ? double(NAN) : head.argmax < 0 ? -HUGE_VAL : std::log2(sums.s0);
}

template <class S> FASTCALIB_ONE_BODY void finish_pair(const PairArgs& a, int64_t row, const PairRow<S>& pair, const double* sums) {
    using real = typename S::real;
    const int64_t count = a.lam_count, n = a.student.rows;
    real *alpha = static_cast<real*>(a.alpha) + row * count, *beta = static_cast<real*>(a.beta) + row * count;
    double* mass = a.mass + row * count;
    const double* norms = a.norms + 4 * row;
    if (is_ignored(a.ignored, row) || !has_pair(norms)) {
        const double fill = is_ignored(a.ignored, row) ? 0.0 : double(NAN);
        for (int64_t k = 0; k < count; ++k) {
            alpha[k] = beta[k] = real(fill);
            mass[k] = mass[n * count + k] = fill;
        }
        return;
    }
    const double scale_q = ::exp2(-pair.log2_s0[0]), scale_p = ::exp2(-pair.log2_s0[1]);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t k = pair.order[size_t(i)];
        const double lam = a.lam[k], below = sums[i] * scale_q, rest = sums[count + i] * scale_p;
        mass[k] = below;
        mass[n * count + k] = rest;
        // The bounds hold exactly for exact sums; rounding may pass them by a unit.
        alpha[k] = real(std::min(std::isinf(lam) ? below : below + lam * rest, std::min(1.0, lam)));
        beta[k] = real(lam == 0          ? std::min(1.0, rest)
                       : std::isinf(lam) ? 0.0
                                         : std::min(below / lam + rest, std::min(1.0, 1.0 / lam)));
    }
}

template <class T> void pr_divergence(const PairArgs& a) {
    using S = typename SimdOf<T>::type;
    const int64_t n_rows = a.student.rows, segments = segment_count(a.vocab), width = 2 * a.lam_count;
    const int threads = int(std::clamp<int64_t>(a.threads, 1, 1024));
    std::vector<PairScratch<S>> scratch(threads);
    for (auto& own : scratch) {
        own.pair.set_order(a.lam, a.lam_count);
        own.row.moments = false;
    }
    const auto set_pair = [&](PairScratch<S>& own, int64_t row) {
        own.pair.set(a.lam, a.norms + 4 * row, 1.0 / a.temperatures.row(row)[0], 1.0 / a.teacher_temperatures.row(row)[0]);
    };
    const auto sum_segment = [&](int64_t row, int64_t segment, PairScratch<S>& own, double* out) {
        const FlushDenormals flush;
        const int64_t start = segment * kSegment;
        pair_segment<S>(a.student.row<const T>(row) + start, a.teacher.row<const T>(row) + start,
                        std::min(kSegment, a.vocab - start), own, out);
    };
    if (!split_rows(n_rows, a.vocab, threads)) {
        parallel_for(n_rows, threads, rows_per_run(n_rows, a.vocab, threads), [&](int64_t row, int thread) {
            PairScratch<S>& own = scratch[thread];
            double* norms = a.norms + 4 * row;
            std::fill(norms, norms + 4, 0.0);
            own.sums.assign(size_t(width), 0.0);
            own.segment.resize(size_t(width));
            if (!is_ignored(a.ignored, row)) {
                for (int side = 0; side < 2; ++side) {
                    const FlushDenormals flush;
                    own.row.betas.set((side ? a.teacher_temperatures : a.temperatures).row(row), 1);
                    Head head;
                    accumulate_row<S>((side ? a.teacher : a.student).row<const T>(row), a.vocab, own.row, head, own.row.row);
                    write_norm(norms + 2 * side, head, own.row.row[0]);
                }
                set_pair(own, row);
                if (has_pair(norms))
                    for (int64_t s = 0; s < segments; ++s) {
                        sum_segment(row, s, own, own.segment.data());
                        for (int64_t k = 0; k < width; ++k) own.sums[k] += own.segment[k];
                    }
            }
            finish_pair<S>(a, row, own.pair, own.sums.data());
        });
        return;
    }
    const auto ignored = [&](int64_t row) { return is_ignored(a.ignored, row); };
    std::vector<Scratch<S>> row_scratch(threads);
    for (auto& own : row_scratch) own.moments = false;
    for (int side = 0; side < 2; ++side) {
        SplitState<S> state;
        state.template accumulate<T>(side ? a.teacher : a.student, a.vocab, side ? a.teacher_temperatures : a.temperatures, threads,
                                     row_scratch, ignored);
        for (int64_t row = 0; row < n_rows; ++row) {
            write_norm(a.norms + 4 * row + 2 * side, *state.of(row).first, *state.of(row).second);
            if (ignored(row)) std::fill(a.norms + 4 * row, a.norms + 4 * row + 4, 0.0);
        }
    }
    std::vector<double> sums(size_t(n_rows * segments * width), 0.0);
    parallel_for(n_rows * segments, threads, 1, [&](int64_t task, int thread) {
        const int64_t row = task / segments;
        if (ignored(row) || !has_pair(a.norms + 4 * row)) return;
        set_pair(scratch[thread], row);
        sum_segment(row, task % segments, scratch[thread], sums.data() + task * width);
    });
    for (int64_t row = 0; row < n_rows; ++row) {
        std::vector<double> total(size_t(width), 0.0);
        for (int64_t s = 0; s < segments; ++s)
            for (int64_t k = 0; k < width; ++k) total[k] += sums[(row * segments + s) * width + k];
        set_pair(scratch[0], row);
        finish_pair<S>(a, row, scratch[0].pair, total.data());
    }
}

}  // namespace fastcalib::FASTCALIB_ISA
