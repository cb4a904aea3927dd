// Every kernel for one instruction set. This file is compiled several times, with FASTCALIB_ISA naming the set.
#include "api.h"
#include "cutoffs.h"
#include "pr_divergence.h"
#include "pr_divergence_backward.h"
#include "ranks.h"
#include "softmax.h"
#include "statistics.h"
#include "statistics_backward.h"
#include "statistics_chunks.h"

#define FASTCALIB_STRING_(x) #x
#define FASTCALIB_STRING(x) FASTCALIB_STRING_(x)

#if defined(__AVX512BF16__)
namespace fastcalib::avx512 {
extern const Kernels kernels;
}
#endif

namespace fastcalib::FASTCALIB_ISA {

// Call f with the type of the logits. Where only bfloat16 has instructions of its own, `base` serves the other types.
template <class F, class Base> static auto by_dtype(int dtype, const F& f, const Base& base) {
#if defined(__AVX512BF16__)
    return dtype == kBFloat16 ? f(bfloat16()) : base(avx512::kernels);
#else
    (void)base;
    switch (dtype) {
        case kBFloat16: return f(bfloat16());
        case kFloat16: return f(float16());
        case kFloat64: return f(double());
        default: return f(float());
    }
#endif
}

extern const Kernels kernels;
const Kernels kernels = {
    FASTCALIB_STRING(FASTCALIB_ISA),
    [](const StatisticsArgs& a) {
        return by_dtype(a.logits.dtype, [&](auto t) { return statistics<decltype(t)>(a); },
                        [&](const Kernels& k) { return k.statistics(a); });
    },
    [](const StatisticsBackwardArgs& a) {
        by_dtype(a.logits.dtype, [&](auto t) { statistics_backward<decltype(t)>(a); },
                 [&](const Kernels& k) { k.statistics_backward(a); });
    },
    [](const StatisticsArgs& f, const StatisticsBackwardArgs& a) {
        return by_dtype(f.logits.dtype, [&](auto t) { return statistics_with_gradient<decltype(t)>(f, a); },
                        [&](const Kernels& k) { return k.statistics_with_gradient(f, a); });
    },
    [](const StatisticsChunkArgs& a) {
        by_dtype(a.logits.dtype, [&](auto t) { statistics_chunk<decltype(t)>(a); },
                 [&](const Kernels& k) { k.statistics_chunk(a); });
    },
    [](const StatisticsArgs& a, const Head* heads, const Sums* sums) {
        by_dtype(a.logits.dtype, [&](auto t) { statistics_from_state<decltype(t)>(a, heads, sums); },
                 [&](const Kernels& k) { k.statistics_from_state(a, heads, sums); });
    },
    [](const RanksArgs& a) {
        return by_dtype(a.logits.dtype, [&](auto t) { return ranks<decltype(t)>(a); },
                        [&](const Kernels& k) { return k.ranks(a); });
    },
    [](const CutoffsArgs& a) {
        return by_dtype(a.logits.dtype, [&](auto t) { return cutoffs<decltype(t)>(a); },
                        [&](const Kernels& k) { return k.cutoffs(a); });
    },
    [](const SoftmaxArgs& a) {
        by_dtype(a.logits.dtype, [&](auto t) { softmax<decltype(t)>(a); }, [&](const Kernels& k) { k.softmax(a); });
    },
    [](const SoftmaxArgs& a) {
        by_dtype(a.logits.dtype, [&](auto t) { softmax_backward<decltype(t)>(a); },
                 [&](const Kernels& k) { k.softmax_backward(a); });
    },
    [](const PairArgs& a) {
        by_dtype(a.student.dtype, [&](auto t) { pr_divergence<decltype(t)>(a); }, [&](const Kernels& k) { k.pr_divergence(a); });
    },
    [](const PairBackwardArgs& a) {
        by_dtype(a.forward.student.dtype, [&](auto t) { pr_divergence_backward<decltype(t)>(a); },
                 [&](const Kernels& k) { k.pr_divergence_backward(a); });
    },
};

}  // namespace fastcalib::FASTCALIB_ISA
