// One row from the parts of its segments: merged in order by row_state.h's rule, then the formulas of spec section 1,
// in double.
#pragma once
#include "kernels.h"

namespace fastcalib::cuda {

// A row's Head and the Sums of temperature k, from its segments in order.
__device__ __forceinline__ Head merged_row(const Partial& partial, int64_t row, int64_t k, double c, Sums& total) {
    Head head;
    for (int64_t s = 0; s < partial.segments && !head.undefined; ++s) {
        const SegmentHead& part = *partial.head(row, s);
        const double* sums = partial.sums(row, s, k);
        Head next;
        next.max = part.argmax < 0 ? -HUGE_VAL : double(part.top);
        next.argmax = part.argmax < 0 ? -1 : s * partial.segment_length + part.argmax;
        next.n = part.n;
        next.mean = part.mean;
        next.m2 = part.m2;
        next.masked = part.flags & kHasMasked ? 1 : 0;
        next.undefined = part.flags & kIsUndefined;
        const Sums next_sums{sums[0], sums[1], sums[2], sums[3]};
        merge(head, &total, next, &next_sums, &c, 1);
    }
    return head;
}

struct RowOutput {
    float *rows, *scalars, *log_prob, *saved;
    int64_t* argmax;
};

// By one warp, a temperature per lane. Without `a.rows` only the weights of the masses are made.
__device__ __forceinline__ void finish_row(const StatisticsArgs& a, const Partial& partial, int64_t row) {
    const int64_t n_rows = a.logits.rows, k_count = a.temperatures.count, stride = 3 + 2 * k_count;
    const RowOutput out{static_cast<float*>(a.rows), static_cast<float*>(a.scalars), static_cast<float*>(a.log_prob),
                        static_cast<float*>(a.saved) + row * stride, a.argmax};
    const bool wanted = a.rows;
    const int64_t begin = a.selected.ids ? a.selected.begin(row) : 0, end = a.selected.ids ? a.selected.end(row) : 0;
    const int lane = lane_index();
    const float nan = __int_as_float(0x7fc00000), inf = infinity();
    // Writes field after field of a temperature. Volatile: one address that moves on, not six that wait.
    const auto put = [&](float*& at, float value) {
        *at = value;
        at += n_rows * k_count;
        asm volatile("" : "+l"(at));
    };

    if (wanted && row_is_skipped(a.selected, row)) {
        for (int64_t k = lane; k < k_count; k += 32) {
            float* at = out.rows + row * k_count + k;
            for (int f = 0; f < 6; ++f) put(at, 0);
        }
        for (int64_t j = lane; j < stride; j += 32) out.saved[j] = 0;
        for (int64_t i = begin * k_count + lane; i < end * k_count; i += 32) out.log_prob[i] = 0;
        if (lane == 0) {
            out.scalars[row] = out.scalars[n_rows + row] = 0;
            out.argmax[row] = -1;
        }
        return;
    }
    if (!wanted && a.selected.begin(row) == a.selected.end(row)) return;

    for (int64_t first = 0; first < k_count; first += 32) {
        const int64_t k = min(first + lane, k_count - 1);
        const bool mine = first + lane < k_count;
        const double b = 1.0 / a.temperatures.row(row)[k], c = kLog2e * b;
        Sums s;
        const Head head = merged_row(partial, row, k, c, s);
        const bool dead = head.undefined || head.argmax < 0;
        const double log_s0 = dead ? 0.0 : log(s.s0);
        if (partial.weights_data && mine) {
            for (int64_t segment = 0; segment < partial.segments; ++segment) {
                const SegmentHead& part = *partial.head(row, segment);
                const double shift = part.argmax < 0 ? kLowestShift : c * (double(part.top) - head.max);
                *partial.weight(row, segment, k) =
                    dead ? double(nan) : exp2(shift > kLowestShift ? shift : kLowestShift) * (kMassUnit / s.s0);
            }
        }
        if (!wanted) continue;
        float* at = out.rows + row * k_count + k;
        if (mine && dead) {
            for (int f = 0; f < 6; ++f) put(at, nan);
            out.saved[3 + k] = out.saved[3 + k_count + k] = nan;
        } else if (mine) {
            const double t1 = s.s1 / s.s0, y1 = t1 / c;
            put(at, float(b * head.max + log_s0));
            put(at, float(log_s0 - kLn2 * t1));
            put(at, float(1.0 / s.s0));
            put(at, float(s.r2 / (s.s0 * s.s0)));
            put(at, float(head.max + y1));
            put(at, float(fmax(0.0, s.s2 / s.s0 - t1 * t1) / (c * c)));
            out.saved[3 + k] = float(log_s0);
            out.saved[3 + k_count + k] = float(y1);
        }
        if (first == 0 && lane == 0) {
            const double n = double(head.n);
            out.scalars[row] = dead ? nan : head.masked ? -inf : float(head.mean * n);
            out.scalars[n_rows + row] = dead ? nan : head.n > 1 ? float(sqrt(head.m2 / (n - 1))) : 0.0f;
            out.argmax[row] = dead ? -1 : head.argmax;
            out.saved[0] = dead ? nan : float(head.max);
            out.saved[1] = dead ? nan : float(head.mean - head.max);
            // 0 tells "all -inf" (gradient 0) from NaN (gradient NaN)
            out.saved[2] = dead ? (head.undefined ? nan : 0.0f) : float(n);
        }
        // Selected tokens: lanes share out the tokens, and take each other's temperatures in turn.
        const int here = int(min(int64_t(32), k_count - first));
        for (int from = 0; from < here; ++from) {
            const double b_k = __shfl_sync(kAllLanes, b, from), log_s0_k = __shfl_sync(kAllLanes, log_s0, from);
            for (int64_t i = begin + lane; i < end; i += 32) {
                const Token token = kind_of(a.selected, a.vocab, i);
                float value = token == Token::kIgnored ? 0.0f : nan;
                if (token == Token::kGood && !dead)
                    value = float(b_k * (double(logit_at(a.logits, row, a.selected.ids[i])) - head.max) - log_s0_k);
                out.log_prob[i * k_count + first + from] = value;
            }
        }
    }
}

}  // namespace fastcalib::cuda
