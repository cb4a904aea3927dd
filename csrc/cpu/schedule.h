// How work is dealt to threads. Results never depend on it: a row is always summed segment by segment, in order.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../row_state.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastcalib::FASTCALIB_ISA {

constexpr int64_t kTerms = 64;   // added up in one float32 lane before the sum goes up a level
constexpr int64_t kBlock = 2048;  // columns handled at a time at most: the block stays in the first-level cache

inline int64_t segment_count(int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }

inline int thread_index() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Call body(task, thread) for every task; tasks are handed out in runs of `run` neighbours.
template <class Body> void parallel_for(int64_t tasks, int threads, int64_t run, const Body& body) {
    threads = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, (tasks + run - 1) / run)));
    if (threads == 1) {
        for (int64_t i = 0; i < tasks; ++i) body(i, 0);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, run)
    for (int64_t i = 0; i < tasks; ++i) body(i, thread_index());
}

// Rows a thread takes at a time: enough work to hide the hand-over, few enough to balance.
inline int64_t rows_per_run(int64_t rows, int64_t vocab, int threads) {
    return std::clamp<int64_t>(32768 / std::max<int64_t>(vocab, 1), 1, std::max<int64_t>(1, rows / (4 * threads)));
}

// With few rows the segments of one row are shared out instead.
inline bool split_rows(int64_t rows, int64_t vocab, int threads) {
    return threads > 1 && rows < 2 * threads && segment_count(vocab) > 1;
}

}  // namespace fastcalib::FASTCALIB_ISA
