// Checking selected ids, and the state of few long rows whose segments are shared out among threads.
#pragma once
#include <atomic>
#include <utility>
#include <vector>

#include "segment.h"
#include "api.h"

namespace fastcalib::FASTCALIB_ISA {

// First bad id seen by any thread, lowest position first so that the message does not depend on scheduling.
class FirstBad {
   public:
    void report(int64_t position) {
        int64_t seen = first_.load(std::memory_order_relaxed);
        while ((seen < 0 || position < seen) && !first_.compare_exchange_weak(seen, position)) {
        }
    }
    int64_t position() const { return first_.load(); }

   private:
    std::atomic<int64_t> first_{-1};
};

// True if every id of the row is good; otherwise the first bad one is reported.
inline bool check_ids(const Selection& selected, int64_t row, int64_t vocab, FirstBad& bad) {
    if (!selected.ids) return true;
    for (int64_t i = selected.begin(row); i < selected.end(row); ++i) {
        const int64_t id = selected.ids[i];
        if ((id < 0 || id >= vocab) && id != selected.ignore_index) {
            bad.report(i);
            return false;
        }
    }
    return true;
}

// Every segment of every row is a task; the parts merge in the order that one thread would have taken, so the bits agree.
template <class S> struct SplitState {
    std::vector<Head> heads;
    std::vector<Sums> sums;
    int64_t segments = 0, k_count = 0;

    using Row = std::pair<const Head*, const Sums*>;
    static Row none() { return {nullptr, nullptr}; }
    Row of(int64_t row) const { return {&heads[row * segments], sums.data() + row * segments * k_count}; }

    template <class T, class Skip = bool (*)(int64_t)>
    void accumulate(const Matrix& logits, int64_t vocab, const Temperatures& temperatures, int threads,
                    std::vector<Scratch<S>>& scratch, const Skip& skip = [](int64_t) { return false; }) {
        segments = segment_count(vocab);
        k_count = temperatures.count;
        heads.assign(logits.rows * segments, Head());
        sums.assign(logits.rows * segments * k_count, Sums());
        parallel_for(logits.rows * segments, threads, 1, [&](int64_t task, int thread) {
            const int64_t row = task / segments, start = task % segments * kSegment;
            if (skip(row)) return;
            const FlushDenormals flush;
            Scratch<S>& own = scratch[thread];
            own.betas.set(temperatures.row(row), k_count);
            accumulate_segment<S>(logits.row<const T>(row) + start, std::min(kSegment, vocab - start), own, heads[task],
                                  sums.data() + task * k_count);
            if (heads[task].argmax >= 0) heads[task].argmax += start;
        });
        for (int64_t row = 0; row < logits.rows; ++row) {
            Betas betas;
            betas.set(temperatures.row(row), k_count);
            Head& head = heads[row * segments];
            Sums* total = sums.data() + row * segments * k_count;
            for (int64_t s = 1; s < segments && !head.undefined; ++s)
                merge(head, total, heads[row * segments + s], total + s * k_count, betas.c.data(), int(k_count));
        }
    }
};

}  // namespace fastcalib::FASTCALIB_ISA
