// A segment of a row by the cheaper of two ways, and a whole row segment by segment.
#pragma once
#include "accumulate.h"
#include "distinct.h"

namespace fastcalib::FASTCALIB_ISA {

// Temperatures from which counting the values first is faster: float16 has eight times as many in the same range, and their
// counts do not fit the first-level cache.
template <class T> constexpr int64_t count_from() { return std::is_same_v<T, float16> ? 7 : 3; }

template <class S, class T> void accumulate_segment(const T* x, int64_t n, Scratch<S>& scratch, Head& head, Sums* out) {
    if constexpr (sizeof(T) == 2) {
        const int64_t k_count = scratch.betas.count();
        if (k_count >= count_from<T>() && n * k_count >= kKeys) return accumulate_distinct<S>(x, n, scratch, head, out);
    }
    scratch.moments ? accumulate_each<S, true>(x, n, scratch, head, out)
                    : accumulate_each<S, false>(x, n, scratch, head, out);
}

// A whole row: its segments in order.
template <class S, class T>
void accumulate_row(const T* x, int64_t vocab, Scratch<S>& scratch, Head& head, std::vector<Sums>& sums) {
    const int64_t k_count = scratch.betas.count();
    sums.resize(size_t(k_count));
    accumulate_segment<S>(x, std::min(vocab, kSegment), scratch, head, sums.data());
    scratch.segment.resize(size_t(k_count));
    for (int64_t start = kSegment; start < vocab && !head.undefined; start += kSegment) {
        Head next;
        accumulate_segment<S>(x + start, std::min(kSegment, vocab - start), scratch, next, scratch.segment.data());
        if (next.argmax >= 0) next.argmax += start;
        merge(head, sums.data(), next, scratch.segment.data(), scratch.betas.c.data(), int(k_count));
    }
}

}  // namespace fastcalib::FASTCALIB_ISA
