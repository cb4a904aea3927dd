// ranks: for thresholds t_j of a row, count z > t_j and z = t_j and sum the probability of z > t_j, without sorting V.
//
// The thresholds are sorted once. A block of the row is first filtered: what lies below the lowest threshold touches nothing
// else. The survivors are either compared with every threshold (few thresholds), or placed among them: an affine table
// of the sorted thresholds gives the neighbourhood, a branchless binary search of a few fixed steps the place, a histogram
// the count; suffix sums turn places into counts. The table is only ever a hint, so no distribution of thresholds can make
// a result wrong, only the number of steps grow.
#pragma once
#include <algorithm>
#include <cmath>

#include "rank_plan.h"

namespace fastcalib::FASTCALIB_ISA {

constexpr int kCopies = 2;  // histogram copies: neighbouring elements often share a bin

// Probabilities of n values (a multiple of the vector length) at temperature k.
template <class S>
void probabilities(const RankPlan<typename S::real>& plan, int64_t k, const typename S::real* values, int64_t n,
                   typename S::real* out) {
    using real = typename S::real;
    const auto m = S::set(real(plan.max)), c = S::set(real(plan.c[k])), shift = S::set(real(plan.log2_s0[k]));
    for (int64_t i = 0; i < n; i += S::lanes)
        S::store(out + i, S::exp2_or_zero((S::load(values + i) - m) * c - shift));
}

// Compare n values (padded with NaN, which compares false) with G bounds.
template <class S, class T, int G>
FC_INLINE void compare(const T* values, int64_t n, const typename S::real* bounds,
                       typename RankScratch<S>::Counter* counters) {
    typename S::vec bound[G];
    typename S::count above[G], least[G];
    for (int g = 0; g < G; ++g) {
        bound[g] = S::set(bounds[g]);
        above[g] = counters[g].above;
        least[g] = counters[g].least;
    }
    for (int64_t i = 0; i < n; i += S::lanes) {
        const auto v = S::load(values + i);
        prefetch(reinterpret_cast<const char*>(values + i) + 4096);
        for (int g = 0; g < G; ++g) {
            above[g] = S::add_greater(above[g], v, bound[g]);
            least[g] = S::add_not_less(least[g], v, bound[g]);
        }
    }
    for (int g = 0; g < G; ++g) counters[g] = {above[g], least[g]};
}

// Straight from memory, n a multiple of 4 vectors: four streams a quarter apart keep more reads under way than one.
template <class S, class T>
FC_INLINE void compare_streams(const T* x, int64_t n, typename S::real bound, typename RankScratch<S>::Counter& counter) {
    const int64_t quarter = n / 4;
    const auto least = S::set(bound);
    typename S::count above[4], not_less[4];
    for (int s = 0; s < 4; ++s) above[s] = not_less[s] = S::no_count();
    for (int64_t i = 0; i < quarter; i += S::lanes)
        for (int s = 0; s < 4; ++s) {
            const T* at = x + s * quarter + i;
            prefetch(reinterpret_cast<const char*>(at) + 4096);
            const auto v = S::load(at);
            above[s] = S::add_greater(above[s], v, least);
            not_less[s] = S::add_not_less(not_less[s], v, least);
        }
    for (int s = 0; s < 4; ++s) {
        counter.above = counter.above + above[s];
        counter.least = counter.least + not_less[s];
    }
}

template <class S, class T>
void compare_with_each(const T* values, int64_t n, const RankPlan<typename S::real>& plan,
                       typename RankScratch<S>::Counter* counters) {
    int64_t i = 0;
    for (; i + 4 <= plan.count; i += 4) compare<S, T, 4>(values, n, &plan.bounds[i], counters + i);
    for (; i < plan.count; ++i) compare<S, T, 1>(values, n, &plan.bounds[i], counters + i);
}

template <class S>
void mass_with_each(const typename S::real* values, int64_t n, const RankPlan<typename S::real>& plan,
                    RankScratch<S>& scratch) {
    for (size_t k = 0; k < plan.c.size(); ++k) {
        probabilities<S>(plan, int64_t(k), values, n, scratch.probability);
        for (int64_t j = 0; j < plan.count; ++j) {
            const auto bound = S::set(plan.bounds[j]);
            auto sum = S::set(0);
            for (int64_t i = 0; i < n; i += S::lanes)
                sum = sum + S::where_greater(S::load(values + i), bound, S::load(scratch.probability + i));
            auto& lane = scratch.mass_lanes[k * size_t(plan.count) + size_t(j)].lanes;
            lane = lane + sum;
        }
    }
}

// Place n survivors among the bounds; `filled` is n rounded up to 64.
template <class S>
void place_block(int64_t n, int64_t filled, const RankPlan<typename S::real>& plan, RankScratch<S>& scratch) {
    using real = typename S::real;
    const real *values = scratch.survivors, *bounds = plan.bounds.data();
    int32_t* position = scratch.position;
    bucket_of(values, filled, plan.scale, plan.offset, plan.buckets - 1, position);
    const int32_t* first = plan.first.data();
    const int32_t widest = plan.steps ? 1 << (plan.steps - 1) : 0;
    if constexpr (S::has_gather) {
        // Four vectors at a time: a gather waits long, and the steps of one search depend on each other.
        constexpr int together = 4;
        for (int64_t i = 0; i < filled; i += together * S::lanes) {
            typename S::vec v[together];
            typename S::index at[together];
            for (int u = 0; u < together; ++u) {
                v[u] = S::load(values + i + u * S::lanes);
                at[u] = S::gather(first, S::load_index(position + i + u * S::lanes));
            }
            for (int32_t half = widest; half; half >>= 1)
                for (int u = 0; u < together; ++u)
                    at[u] = S::add_where_less(at[u], S::gather(bounds + half - 1, at[u]), v[u], half);
            for (int u = 0; u < together; ++u)
                S::store_index(position + i + u * S::lanes, S::twice_plus_equal(at[u], S::gather(bounds, at[u]), v[u]));
        }
    } else {
        for (int64_t i = 0; i < filled; ++i) {
            int32_t at = first[position[i]];
            for (int32_t half = widest; half; half >>= 1) at += bounds[at + half - 1] < values[i] ? half : 0;
            position[i] = 2 * at + (bounds[at] == values[i] ? 1 : 0);
        }
    }
    const int64_t bins = 2 * (plan.count + 1);
    uint32_t* histogram = scratch.histogram.data();
    int64_t i = 0;
    for (; i + kCopies <= n; i += kCopies)
        for (int copy = 0; copy < kCopies; ++copy) ++histogram[copy * bins + position[i + copy]];
    for (; i < n; ++i) ++histogram[position[i]];
    for (size_t k = 0; k < plan.c.size(); ++k) {
        probabilities<S>(plan, int64_t(k), values, filled, scratch.probability);
        double* mass = scratch.mass_histogram.data() + int64_t(k) * kCopies * (plan.count + 1);
        for (i = 0; i < n; ++i) mass[(i % kCopies) * (plan.count + 1) + position[i] / 2] += double(scratch.probability[i]);
    }
}

// Widen a block and keep what is not below the lowest bound; returns how many. NaN is dropped.
template <class S, class T>
int64_t keep_survivors(const T* x, int64_t n, typename S::real least, typename S::real* out) {
    using real = typename S::real;
    const auto bound = S::set(least);
    real* to = out;
    int64_t i = 0;
    for (; i + 2 * S::lanes <= n; i += 2 * S::lanes) {
        prefetch(reinterpret_cast<const char*>(x + i) + 4096);
        const auto a = S::load(x + i), b = S::load(x + i + S::lanes);
        if (!S::any_not_less(a, bound) && !S::any_not_less(b, bound)) continue;
        to = S::compress_not_less(to, a, bound);
        to = S::compress_not_less(to, b, bound);
    }
    for (; i < n; ++i) {
        const real v = to_real(x[i]);
        *to = v;
        to += v >= least;
    }
    return to - out;
}

// Counts and masses of one segment, added up from zero: parts of a row merge by addition in order.
template <class S, class T>
FASTCALIB_ONE_BODY void rank_segment(const T* x, int64_t n, const RankPlan<typename S::real>& plan, RankScratch<S>& scratch, RankTotals& part) {
    using real = typename S::real;
    const int64_t m = plan.count, k_count = int64_t(plan.c.size());
    part.clear(m, k_count);
    if (m == 0) return;
    const FlushDenormals flush;
    const bool each = m <= kCompareAll, direct = m <= 2 && k_count == 0;
    if (each) {
        scratch.counters.assign(size_t(m), {S::no_count(), S::no_count()});
        scratch.mass_lanes.assign(size_t(m * k_count), {S::set(0)});
    } else {
        scratch.histogram.assign(size_t(kCopies * 2 * (m + 1)), 0);
        scratch.mass_histogram.assign(size_t(kCopies * (m + 1) * k_count), 0.0);
    }
    int64_t start = 0;
    if (m == 1 && direct) {
        start = n / (4 * S::lanes) * (4 * S::lanes);
        compare_streams<S>(x, start, plan.bounds[0], scratch.counters[0]);
    }
    for (; start < n; start += kBlock) {
        const int64_t length = std::min(kBlock, n - start);
        if (direct && length % S::lanes == 0) {
            compare_with_each<S>(x + start, length, plan, scratch.counters.data());
            continue;
        }
        const int64_t kept = keep_survivors<S>(x + start, length, plan.bounds[0], scratch.survivors);
        if (kept == 0) continue;
        const int64_t filled = (kept + 63) / 64 * 64;  // whole groups of vectors in every instruction set
        for (int64_t i = kept; i < filled; ++i) scratch.survivors[i] = real(NAN);
        if (each) {
            compare_with_each<S>(static_cast<const real*>(scratch.survivors), filled, plan, scratch.counters.data());
            mass_with_each<S>(scratch.survivors, filled, plan, scratch);
        } else {
            place_block<S>(kept, filled, plan, scratch);
        }
    }
    if (each) {
        for (int64_t j = 0; j < m; ++j) {
            part.greater[j] = S::total(scratch.counters[j].above);
            part.not_less[j] = S::total(scratch.counters[j].least);
        }
        for (int64_t i = 0; i < m * k_count; ++i) part.mass[i] = S::reduce_add(scratch.mass_lanes[i].lanes);
        return;
    }
    // An element in place p is greater than the p lowest bounds; an odd bin holds those equal to bound p.
    const int64_t bins = 2 * (m + 1);
    const auto bin = [&](int64_t i) {
        int64_t sum = 0;
        for (int copy = 0; copy < kCopies; ++copy) sum += scratch.histogram[copy * bins + i];
        return sum;
    };
    int64_t above = bin(2 * m) + bin(2 * m + 1);
    for (int64_t j = m - 1; j >= 0; --j) {
        const int64_t equal = bin(2 * j + 1);
        part.greater[j] = above;
        part.not_less[j] = above + equal;
        above += equal + bin(2 * j);
    }
    for (int64_t k = 0; k < k_count; ++k) {
        const double* mass = scratch.mass_histogram.data() + k * kCopies * (m + 1);
        double sum = 0;
        for (int64_t j = m; j > 0; --j) {
            for (int copy = 0; copy < kCopies; ++copy) sum += mass[copy * (m + 1) + j];
            part.mass[k * m + j - 1] = sum;
        }
    }
}

template <class S>
FASTCALIB_ONE_BODY void write_ranks(const RanksArgs& a, int64_t row, const RankPlan<typename S::real>& plan, const RankTotals& total) {
    using real = typename S::real;
    const int64_t begin = a.selected.begin(row), m = a.selected.end(row) - begin, k_count = a.temperatures.count;
    real* mass = static_cast<real*>(a.mass_greater);
    for (int64_t j = 0; j < m; ++j) {
        const int64_t at = begin + j, place = plan.place[j];
        a.n_greater[at] = place < 0 ? 0 : total.greater[place];
        a.n_equal[at] = place < 0 ? 0 : total.not_less[place] - total.greater[place] - (a.selected.ids ? 1 : 0);
        for (int64_t k = 0; k < k_count; ++k)
            mass[at * k_count + k] = place == -1      ? real(0)
                                     : plan.undefined ? real(NAN)
                                     : place < 0      ? real(0)
                                                      : real(std::min(1.0, total.mass[k * plan.count + place]));
    }
}

template <class S, class T>
void rank_row(const RanksArgs& a, int64_t row, const Head* head, const Sums* sums, const Betas& betas,
              RankScratch<S>& scratch) {
    make_plan<S, T>(a, row, head, sums, betas, scratch.plan);
    const T* x = a.logits.row<const T>(row);
    rank_segment<S>(x, std::min(a.vocab, kSegment), scratch.plan, scratch, scratch.total);
    for (int64_t start = kSegment; start < a.vocab; start += kSegment) {
        rank_segment<S>(x + start, std::min(kSegment, a.vocab - start), scratch.plan, scratch, scratch.part);
        scratch.total.add(scratch.part);
    }
    write_ranks<S>(a, row, scratch.plan, scratch.total);
}

// Few long rows: the segments of each row are shared out. `rows` gives the finished state of a row, or null.
template <class S, class T, class RowState>
void rank_split(const RanksArgs& a, int threads, std::vector<RankScratch<S>>& scratch, const RowState& state) {
    const int64_t n_rows = a.logits.rows, segments = segment_count(a.vocab);
    std::vector<RankPlan<typename S::real>> plans(n_rows);
    std::vector<RankTotals> totals(n_rows * segments);
    Betas betas;
    for (int64_t row = 0; row < n_rows; ++row) {
        const auto [head, sums] = state(row);
        if (head) betas.set(a.temperatures.row(row), a.temperatures.count);
        make_plan<S, T>(a, row, head, sums, betas, plans[row]);
    }
    parallel_for(n_rows * segments, threads, 1, [&](int64_t task, int thread) {
        const int64_t row = task / segments, start = task % segments * kSegment;
        rank_segment<S>(a.logits.row<const T>(row) + start, std::min(kSegment, a.vocab - start), plans[row],
                        scratch[thread], totals[task]);
    });
    for (int64_t row = 0; row < n_rows; ++row) {
        for (int64_t s = 1; s < segments; ++s) totals[row * segments].add(totals[row * segments + s]);
        write_ranks<S>(a, row, plans[row], totals[row * segments]);
    }
}

template <class T> int64_t ranks(const RanksArgs& a) {
    using S = typename SimdOf<T>::type;
    const int64_t n_rows = a.logits.rows;
    const bool masses = a.temperatures.count > 0;
    const int threads = int(std::clamp<int64_t>(a.threads, 1, 1024));
    FirstBad bad;
    std::vector<RankScratch<S>> scratch(threads);
    std::vector<Scratch<S>> sums(masses ? threads : 0);
    for (auto& own : sums) own.moments = false;
    if (!split_rows(n_rows, a.vocab, threads)) {
        const Betas none;
        parallel_for(n_rows, threads, rows_per_run(n_rows, a.vocab, threads), [&](int64_t row, int thread) {
            if (!check_ids(a.selected, row, a.vocab, bad)) return;
            Head head;
            if (masses) {
                const FlushDenormals flush;
                Scratch<S>& own = sums[thread];
                own.betas.set(a.temperatures.row(row), a.temperatures.count);
                accumulate_row<S>(a.logits.row<const T>(row), a.vocab, own, head, own.row);
            }
            rank_row<S, T>(a, row, masses ? &head : nullptr, masses ? sums[thread].row.data() : nullptr,
                           masses ? sums[thread].betas : none, scratch[thread]);
        });
        return bad.position();
    }
    for (int64_t row = 0; row < n_rows; ++row)
        if (!check_ids(a.selected, row, a.vocab, bad)) return bad.position();
    SplitState<S> state;
    if (masses) state.template accumulate<T>(a.logits, a.vocab, a.temperatures, threads, sums);
    rank_split<S, T>(a, threads, scratch, [&](int64_t row) { return masses ? state.of(row) : SplitState<S>::none(); });
    return -1;
}

}  // namespace fastcalib::FASTCALIB_ISA
