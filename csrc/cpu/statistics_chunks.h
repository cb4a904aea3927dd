// statistics of a matrix that never exists as a whole: chunks of its columns come one after the other (logits of a linear
// layer, say), each merged into the state of its row, in order. The states live with the caller between calls.
#pragma once
#include <new>

#include "statistics.h"

namespace fastcalib::FASTCALIB_ISA {

// One chunk into the states; the first one (a.first == 0) makes them. A row all of whose tokens are ignored is not read.
template <class T> void statistics_chunk(const StatisticsChunkArgs& a) {
    using S = typename SimdOf<T>::type;
    const int64_t n_rows = a.logits.rows, k_count = a.temperatures.count;
    const int threads = int(std::clamp<int64_t>(a.threads, 1, 1024));
    std::vector<Scratch<S>> scratch(threads);
    for (auto& own : scratch) own.moments = a.moments;
    parallel_for(n_rows, threads, rows_per_run(n_rows, a.columns, threads), [&](int64_t row, int thread) {
        Head& head = a.heads[row];
        Sums* sums = a.sums + row * k_count;
        if (a.first == 0) {
            new (&head) Head();
            for (int64_t k = 0; k < k_count; ++k) new (sums + k) Sums();
        }
        if (a.selected.skips(row)) return;
        const T* x = a.logits.row<const T>(row);
        if (a.selected.ids) {
            for (int64_t i = a.selected.begin(row); i < a.selected.end(row); ++i) {
                const int64_t column = a.selected.ids[i] - a.first;
                if (column >= 0 && column < a.columns) a.chosen[i] = double(to_real(x[column]));
            }
        }
        if (head.undefined) return;
        Scratch<S>& own = scratch[thread];
        own.betas.set(a.temperatures.row(row), k_count);
        Head next;
        const FlushDenormals flush;
        accumulate_row<S>(x, a.columns, own, next, own.row);
        if (next.argmax >= 0) next.argmax += a.first;
        merge(head, sums, next, own.row.data(), own.betas.c.data(), int(k_count));
    });
}

// The results, once every chunk is in. The statistics' arguments name no logits, but the selected ones' values.
template <class T> void statistics_from_state(const StatisticsArgs& a, const Head* heads, const Sums* sums) {
    using S = typename SimdOf<T>::type;
    Betas betas;
    for (int64_t row = 0; row < a.logits.rows; ++row) {
        if (a.selected.skips(row)) {
            skip_row<S>(a, row);
            continue;
        }
        betas.set(a.temperatures.row(row), a.temperatures.count);
        finish_row<S, T>(a, row, heads[row], sums + row * a.temperatures.count, betas);
    }
}

}  // namespace fastcalib::FASTCALIB_ISA
