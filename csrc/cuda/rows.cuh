// What kernels share about rows: their selected tokens, single logits, and where parts of a row wait in the workspace.
#pragma once
#include "../cpu/api.h"
#include "segment.cuh"
#include "sums.cuh"

namespace fastcalib::cuda {

// One logit of a row of any dtype; for the few that are gathered.
__device__ __forceinline__ float logit_at(const Matrix& logits, int64_t row, int64_t column) {
    if (logits.dtype == kBFloat16) return to_float(logits.row<const BFloat16>(row)[column]);
    if (logits.dtype == kFloat16) return to_float(logits.row<const Float16>(row)[column]);
    return logits.row<const float>(row)[column];
}

constexpr double kMassUnit = 0x1p-34;  // of what places.cuh counts masses in

enum class Token { kGood, kIgnored, kBad };

__device__ __forceinline__ Token kind_of(const Selection& selected, int64_t vocab, int64_t i) {
    const int64_t id = selected.ids[i];
    if (id == selected.ignore_index) return Token::kIgnored;
    return id >= 0 && id < vocab ? Token::kGood : Token::kBad;
}

// All of a row's tokens are ignored: it is not read. The first token settles it nearly always. Uniform over a block.
__device__ __forceinline__ bool row_is_skipped(const Selection& selected, int64_t row) {
    if (!selected.ids) return false;
    const int64_t begin = selected.begin(row), end = selected.end(row);
    for (int64_t i = begin; i < end; ++i)
        if (selected.ids[i] != selected.ignore_index) return false;
    return begin != end;
}

// Places in the workspace. nnz is the number of selected tokens or thresholds of all rows.
struct Partial {
    int64_t nnz = 0, k_count = 0, segments = 0, segment_length = 0, chunks = 0;
    SegmentHead* heads = nullptr;     // (N, segments)
    double* sums_data = nullptr;      // (N, segments, K, 4): s0, s1, s2, r2
    double* weights_data = nullptr;   // (N, segments, K): from a segment's mass in whole numbers to probability
    float* keys = nullptr;            // (nnz,): thresholds of each chunk of each row, ascending
    int32_t* place = nullptr;         // (nnz,): of each threshold among the keys of its row, or a Place
    int32_t* limits = nullptr;        // (N, chunks): number of keys
    uint2* counts_data = nullptr;     // (splits, nnz): logits greater than a key, and equal to it
    uint64_t* masses_data = nullptr;  // (segments, K, nnz): mass greater than a key, in units of kMassUnit

    __device__ SegmentHead* head(int64_t row, int64_t segment) const { return heads + row * segments + segment; }
    __device__ double* sums(int64_t row, int64_t segment, int64_t k) const {
        return sums_data + ((row * segments + segment) * k_count + k) * 4;
    }
    __device__ double* weight(int64_t row, int64_t segment, int64_t k) const {
        return weights_data + (row * segments + segment) * k_count + k;
    }
    __device__ int32_t* limit(int64_t row, int64_t chunk) const { return limits + row * chunks + chunk; }
    __device__ uint2* counts(int64_t split, int64_t i) const { return counts_data + split * nnz + i; }
    __device__ uint64_t* masses(int64_t segment, int64_t k, int64_t i) const {
        return masses_data + (segment * k_count + k) * nnz + i;
    }
};

enum Place : int32_t { kIgnoredPlace = -1, kNaNPlace = -2, kBadPlace = -3 };

}  // namespace fastcalib::cuda
