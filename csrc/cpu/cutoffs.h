// cutoffs: the threshold of each cutoff rule at each temperature, and the number and mass of the logits at or above it, without
// sorting the row. The row is cut into groups of neighbouring values once (grouped.h); a temperature then costs one exponential a
// group, a rule a search among the groups and a look into one.
#pragma once
#include "api.h"
#include "grouped.h"
#include "selection.h"
#include "valid_tokens.h"

namespace fastcalib::FASTCALIB_ISA {

// Masses of a row at one temperature, relative to the maximum: above[g] lies in the groups before g.
struct RowMasses {
    double beta = 0, total = 0, first = 0;  // first: sum of e^(b (z - max)) (z - max)
    std::vector<double> above;              // (groups + 1)
};

template <class Real> void sum_masses(const GroupedRow<Real>& row, double beta, bool entropy, RowMasses& out) {
    const int64_t groups = row.groups;
    out.beta = beta;
    out.above.resize(size_t(groups) + 1);
    double* above = out.above.data();
    const auto all = [](Real) { return true; };
    double first = 0;
    int64_t g = 0;
    if (row.series_serves(beta, 0)) {
        const double* c = row.middle.data();
        const double *m0 = row.moments[0].data(), *m1 = row.moments[1].data(), *m2 = row.moments[2].data(),
                     *m3 = row.moments[3].data(), *m4 = row.moments[4].data();
        const int64_t narrow = row.narrow;
        if (entropy) {
#pragma omp simd reduction(+ : first)
            for (int64_t i = 0; i < narrow; ++i) {
                const double slope = m1[i] + beta * (m2[i] + beta * (1.0 / 2) * (m3[i] + beta * (1.0 / 3) * m4[i]));
                const double e = exp_double(beta * c[i]);
                above[i] = e * series(beta, m0[i], m1[i], m2[i], m3[i], m4[i]);
                first += above[i] * c[i] + e * slope;
            }
        } else {
#pragma omp simd
            for (int64_t i = 0; i < narrow; ++i)
                above[i] = exp_double(beta * c[i]) * series(beta, m0[i], m1[i], m2[i], m3[i], m4[i]);
        }
        g = narrow;
    }
    double total = 0;
    for (int64_t i = 0; i < g; ++i) {
        const double mass = above[i];
        above[i] = total;
        total += mass;
    }
    for (; g < groups; ++g) {
        above[g] = total;
        // All that is left lies below some logit of the group before; far enough down it weighs nothing.
        const double most = g ? double(row.values[row.begin[g - 1]]) - row.max : 0.0;
        if (double(row.finite - row.above[g]) * exp_double(beta * most) < 1e-20 * total) break;
        double mass = 0, moment = 0;
        add_direct(row, g, beta, all, mass, moment);
        total += mass;
        first += moment;
    }
    for (; g <= groups; ++g) above[g] = total;
    out.total = total;
    out.first = first;
}

// A threshold, as a group and what is kept of it.
struct Cut {
    double threshold = -INFINITY;
    int64_t group = 0, kept = 0;
    double moments[kMoments] = {};
};

template <class Real> Cut cut_at(const GroupedRow<Real>& row, int64_t group, Real threshold) {
    Cut cut;
    cut.threshold = double(threshold);
    cut.group = group;
    add_moments(row, group, [=](Real z) { return z >= threshold; }, cut.moments);
    cut.kept = row.above[group] + int64_t(cut.moments[0]);
    return cut;
}

template <class Real> double mass_of(const GroupedRow<Real>& row, const RowMasses& masses, const Cut& cut) {
    double mass = masses.above[cut.group], first = 0;
    const double beta = masses.beta, *m = cut.moments;
    if (row.series_serves(beta, cut.group)) {
        mass += exp_double(beta * row.middle[cut.group]) * series(beta, m[0], m[1], m[2], m[3], m[4]);
    } else {
        const Real threshold = Real(cut.threshold);
        add_direct(row, cut.group, beta, [=](Real z) { return z >= threshold; }, mass, first);
    }
    return std::min(1.0, mass / masses.total);
}

// The smallest logit of a group that is not below the border; +inf if there is none.
template <class Real> Real lowest_kept(const GroupedRow<Real>& row, int64_t group, double border) {
    Real least = Real(INFINITY);
    for (int64_t i = row.begin[group]; i < row.begin[group + 1]; ++i) {
        const Real z = row.values[i];
        if (double(z) >= border && z < least) least = z;
    }
    return least;
}

template <class Real> Cut cut_by_border(const GroupedRow<Real>& row, double border) {
    border = border < row.max ? border : row.max;  // at least the most likely
    // By one logit of each group: those before `group` are kept, that one at least in part, and perhaps some of the next.
    const int64_t group = last_group(row.groups, [&](int64_t g) { return g == 0 || double(row.values[row.begin[g]]) >= border; });
    if (group + 1 < row.groups) {
        const Real next = lowest_kept(row, group + 1, border);
        if (next < Real(INFINITY)) return cut_at(row, group + 1, next);
    }
    return cut_at(row, group, lowest_kept(row, group, border));
}

template <class Real> Cut cut_by_count(GroupedRow<Real>& row, int64_t k) {
    k = std::clamp<int64_t>(k, 1, row.finite);
    const int64_t group = last_group(row.groups, [&](int64_t g) { return row.above[g] < k; });
    row.sort(group);
    int64_t i = row.begin[group], left = k - row.above[group];
    for (; left > int64_t(row.count(i)); ++i) left -= int64_t(row.count(i));
    return cut_at(row, group, row.values[i]);
}

// Keeps what has less than a share p of the mass strictly above it, tied logits together.
template <class Real> Cut cut_by_mass(GroupedRow<Real>& row, const RowMasses& masses, double p) {
    const double target = p * masses.total, beta = masses.beta;
    const int64_t group = last_group(row.groups, [&](int64_t g) { return g == 0 || masses.above[g] < target; });
    row.sort(group);
    const bool by_series = row.series_serves(beta, group);
    const double c = row.middle[group], scale = by_series ? exp_double(beta * c) : 1.0;
    double above = masses.above[group];
    Real threshold = row.values[row.begin[group]];
    for (int64_t i = row.begin[group], end = row.begin[group + 1]; i < end && (i == row.begin[group] || above < target);) {
        threshold = row.values[i];
        double n = 0;
        for (; i < end && row.values[i] == threshold; ++i) n += row.count(i);
        const double d = double(threshold) - row.max;
        const double y = beta * (d - c);
        above += n * (by_series ? scale * (1 + y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4)))) : exp_double(beta * d));
    }
    return cut_at(row, group, threshold);
}

template <class Real> double spread_of(const GroupedRow<Real>& row) {
    const int64_t n = row.begin[row.groups];
    double sum = 0, square = 0;
    for (int64_t i = 0; i < n; ++i) sum += row.count(i) * double(row.values[i]);
    const double mean = sum / double(row.finite);
    for (int64_t i = 0; i < n; ++i) square += row.count(i) * (double(row.values[i]) - mean) * (double(row.values[i]) - mean);
    return row.finite > 1 ? std::sqrt(square / double(row.finite - 1)) : 0.0;
}

// Does what a rule keeps depend on the temperature?
inline bool by_temperature(int rule) { return rule == kTopP || rule == kMinP || rule == kEpsilon || rule == kEta; }

template <class Real>
Cut cut_of(const CutoffsArgs& a, int64_t rule, int64_t size, GroupedRow<Real>& row, const RowMasses* masses) {
    const double value = a.rules[2 * rule + 1];
    switch (int(a.rules[2 * rule])) {
        case kTopK: return cut_by_count(row, value < double(row.finite) ? int64_t(value) : row.finite);
        case kSizeOracle: return cut_by_count(row, size);
        case kTopNSigma: return cut_by_border(row, row.max - value * spread_of(row));
        case kTopP: return value < 1 ? cut_by_mass(row, *masses, value) : cut_by_count(row, row.finite);
        default: break;
    }
    // p >= q is z >= max + T log(q / p_max), and p_max is 1 / total.
    double log_q = std::log(value);
    const double log_total = std::log(masses->total);
    if (int(a.rules[2 * rule]) == kMinP) return cut_by_border(row, row.max + log_q / masses->beta);
    if (int(a.rules[2 * rule]) == kEta) log_q = std::min(log_q, log_q / 2 - (log_total - masses->beta * masses->first / masses->total));
    return cut_by_border(row, row.max + (log_q + log_total) / masses->beta);
}

template <class T> int64_t cutoffs(const CutoffsArgs& a) {
    using S = typename SimdOf<T>::type;
    using real = typename S::real;
    const int64_t n_rows = a.logits.rows, k_count = a.temperatures.count, r_count = a.rule_count, each = k_count * r_count;
    const int threads = int(std::clamp<int64_t>(a.threads, 1, 1024));
    const bool with_sets = a.valid;
    bool entropy = a.tokens;
    for (int64_t r = 0; r < r_count; ++r) entropy = entropy || int(a.rules[2 * r]) == kEta;
    struct Own {
        GroupedRow<real> row;
        RowMasses masses;
        std::vector<Cut> cuts;
        ValidTokens valid;
    };
    std::vector<Own> owns(static_cast<size_t>(threads));
    FirstBad bad;
    parallel_for(n_rows, threads, rows_per_run(n_rows, a.vocab, threads), [&](int64_t r, int thread) {
        if (!check_ids(a.sets, r, a.vocab, bad)) return;
        auto& [row, masses, cuts, valid] = owns[static_cast<size_t>(thread)];
        const double* temperature = a.temperatures.row(r);
        real *threshold = static_cast<real*>(a.threshold) + r * each, *mass = static_cast<real*>(a.mass) + r * each;
        int64_t* kept = a.kept + r * each;
        const int64_t begin = a.sets.offsets ? a.sets.begin(r) : 0, size = a.sets.offsets ? a.sets.end(r) - begin : 0;
        if (with_sets) gather_valid<T, real>(a, r, valid);
        const double warmest = std::max(a.last ? 1.0 : 0.0, *std::max_element(temperature, temperature + k_count));
        group_row<S>(a.logits.row<const T>(r), a.vocab, warmest, row);
        if (row.undefined) {
            std::fill(threshold, threshold + each, real(NAN));
            std::fill(mass, mass + each, real(NAN));
            std::fill(kept, kept + each, 0);
            if (!with_sets) return;
            std::fill(a.keeps + begin * each, a.keeps + (begin + size) * each, 0);
            std::fill(a.kept_valid + r * each, a.kept_valid + (r + 1) * each, 0);
            std::fill(static_cast<real*>(a.valid_mass) + r * each, static_cast<real*>(a.valid_mass) + (r + 1) * each, real(NAN));
            std::fill(a.kept_counts + r * each, a.kept_counts + (r + 1) * each, 0.0);
            if (!a.tokens) return;
            write_ranks_of_undefined<T>(a, r, row.values, valid);
            std::fill(a.below + begin, a.below + begin + size, NAN);
            std::fill(a.log_norm + r * k_count, a.log_norm + (r + 1) * k_count, NAN);
            std::fill(a.entropy + r * k_count, a.entropy + (r + 1) * k_count, NAN);
            return;
        }
        cuts.assign(size_t(r_count), Cut());
        if (a.last) sum_masses(row, 1.0, entropy, masses);
        for (int64_t i = 0; i < r_count; ++i) {
            const int rule = int(a.rules[2 * i]);
            if (rule != kKeepAll && (a.last || !by_temperature(rule))) cuts[i] = cut_of(a, i, size, row, &masses);
        }
        if (with_sets) {
            valid.kept.resize(size_t(each));
            valid.mass.resize(size_t(size) + 1);
        }
        for (int64_t k = 0; k < k_count; ++k) {
            sum_masses(row, 1.0 / temperature[k], entropy, masses);
            if (a.tokens) write_norms(a, r, k, masses.beta, masses.total, masses.first);
            if (with_sets) {
                valid.mass[0] = 0;
                for (int64_t i = 0; i < valid.finite; ++i)
                    valid.mass[i + 1] = valid.mass[i] + exp_double(masses.beta * (valid.logits[i].first - row.max));
            }
            for (int64_t i = 0; i < r_count; ++i) {
                const int rule = int(a.rules[2 * i]);
                const int64_t at = k * r_count + i;
                if (!a.last && by_temperature(rule)) cuts[i] = cut_of(a, i, size, row, &masses);
                const Cut& cut = cuts[i];
                threshold[at] = real(cut.threshold);
                kept[at] = rule == kKeepAll ? row.finite : cut.kept;
                mass[at] = rule == kKeepAll ? real(1) : real(mass_of(row, masses, cut));
                if (!with_sets) continue;
                int64_t n = valid.finite;
                if (rule != kKeepAll)
                    n = std::partition_point(valid.logits.begin(), valid.logits.begin() + valid.finite,
                                             [&](const auto& v) { return v.first >= cut.threshold; }) - valid.logits.begin();
                valid.kept[at] = int32_t(n);
                a.kept_valid[r * each + at] = n;
                a.kept_counts[r * each + at] = valid.counts[n];
                static_cast<real*>(a.valid_mass)[r * each + at] = real(std::min(1.0, valid.mass[n] / masses.total));
            }
        }
        for (int64_t i = 0; with_sets && i < size; ++i) {
            uint8_t* to = a.keeps + (begin + i) * each;
            const int32_t place = valid.place[i], *n = valid.kept.data();
#pragma omp simd
            for (int64_t at = 0; at < each; ++at) to[at] = place < n[at] ? 1 : 0;
        }
        if (!a.tokens) return;
        write_below(a, r, row.max, valid);
        write_ranks_of(a, r, row, valid);
    });
    return bad.position();
}

}  // namespace fastcalib::FASTCALIB_ISA
