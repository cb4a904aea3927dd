// Every kernel for one instruction set. This file is compiled several times, with FASTCALIB_ISA naming the set.
#include "api.h"
#include "ranks.h"
#include "softmax.h"
#include "statistics.h"
#include "statistics_backward.h"

#define FASTCALIB_STRING_(x) #x
#define FASTCALIB_STRING(x) FASTCALIB_STRING_(x)

namespace fastcalib::FASTCALIB_ISA {

template <class F> static auto by_dtype(int dtype, const F& f) {
    switch (dtype) {
        case kBFloat16: return f(bfloat16());
        case kFloat16: return f(float16());
        case kFloat64: return f(double());
        default: return f(float());
    }
}

extern const Kernels kernels;
const Kernels kernels = {
    FASTCALIB_STRING(FASTCALIB_ISA),
    [](const StatisticsArgs& a) { return by_dtype(a.logits.dtype, [&](auto t) { return statistics<decltype(t)>(a); }); },
    [](const StatisticsBackwardArgs& a) {
        by_dtype(a.logits.dtype, [&](auto t) { statistics_backward<decltype(t)>(a); });
    },
    [](const StatisticsArgs& f, const StatisticsBackwardArgs& a) {
        return by_dtype(f.logits.dtype, [&](auto t) { return statistics_with_gradient<decltype(t)>(f, a); });
    },
    [](const RanksArgs& a) { return by_dtype(a.logits.dtype, [&](auto t) { return ranks<decltype(t)>(a); }); },
    [](const SoftmaxArgs& a) { by_dtype(a.logits.dtype, [&](auto t) { softmax<decltype(t)>(a); }); },
    [](const SoftmaxArgs& a) { by_dtype(a.logits.dtype, [&](auto t) { softmax_backward<decltype(t)>(a); }); },
};

}  // namespace fastcalib::FASTCALIB_ISA
