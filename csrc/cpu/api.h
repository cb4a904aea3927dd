// What the kernels take: plain structs of pointers, sizes and strides. No torch, no Python.
#pragma once
#include <cstdint>

#include "../row_state.h"

namespace fastcalib {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Row r starts at data + (r / inner) * outer_stride + (r % inner) * inner_stride, in elements; columns are adjacent.
struct Matrix {
    void* data = nullptr;
    int dtype = kFloat32;
    int64_t rows = 0, inner = 1, outer_stride = 0, inner_stride = 0;

    template <class T> FASTCALIB_HD T* row(int64_t r) const {
        return static_cast<T*>(data) + (r / inner) * outer_stride + (r % inner) * inner_stride;
    }
};

// K temperatures, the same for all rows (rows == 1) or its own set for each.
struct Temperatures {
    const double* data = nullptr;
    int64_t rows = 0, count = 0;
    FASTCALIB_HD const double* row(int64_t r) const { return data + (rows == 1 ? 0 : r * count); }
};

// Selected tokens: ids of row r are [begin(r), end(r)), either per_row each or ragged by offsets.
struct Selection {
    const int64_t* ids = nullptr;  // null: no selection
    int64_t per_row = 0;
    const int64_t* offsets = nullptr;
    int64_t ignore_index = -100;
    FASTCALIB_HD int64_t begin(int64_t r) const { return offsets ? offsets[r] : r * per_row; }
    FASTCALIB_HD int64_t end(int64_t r) const { return offsets ? offsets[r + 1] : (r + 1) * per_row; }
    // A row all of whose tokens are ignored is not read at all.
    bool skips(int64_t r) const {
        if (!ids || begin(r) == end(r)) return false;
        for (int64_t i = begin(r); i < end(r); ++i)
            if (ids[i] != ignore_index) return false;
        return true;
    }
};

// Results are float, or double for float64 logits; `void*` stands for either.
struct StatisticsArgs {
    Matrix logits;
    int64_t vocab = 0;
    Temperatures temperatures;
    Selection selected;
    bool ranks = false, moments = true;  // moments: false leaves entropy, collision, mean, variance, sum and spread at 0
    void *rows = nullptr, *scalars = nullptr, *log_prob = nullptr;  // (6, N, K), (2, N), (nnz, K)
    int64_t *argmax = nullptr, *n_greater = nullptr, *n_equal = nullptr;
    void *mass_greater = nullptr, *saved = nullptr;  // (nnz, K), (N, 3 + 2K): max, mean - max, n; log s0 and s1/s0 each
    const double* chosen = nullptr;  // (nnz,): logits of the selected tokens where the logits themselves are gone
    int threads = 1;
};

// Some neighbouring columns of a matrix, on their way into the states of its rows.
struct StatisticsChunkArgs {
    Matrix logits;
    int64_t columns = 0, first = 0;  // how many, and which column of the whole the first of them is
    Temperatures temperatures;
    Selection selected;  // ids count in the whole
    bool moments = true;
    Head* heads = nullptr;     // (N,), kept by the caller from chunk to chunk, as are
    Sums* sums = nullptr;      // (N, K)
    double* chosen = nullptr;  // (nnz,)
    int threads = 1;
};

struct StatisticsBackwardArgs {
    Matrix logits;
    int64_t vocab = 0, width = 0;  // real columns, and all columns: the rest gets gradient 0
    Temperatures temperatures;
    Selection selected;
    const void *rows = nullptr, *scalars = nullptr, *saved = nullptr;
    const int64_t* argmax = nullptr;  // CUDA only: that of forward, for the gradient of the maximum
    const void *grad_rows = nullptr, *grad_scalars = nullptr, *grad_log_prob = nullptr;
    Matrix out;
    bool nontemporal = false;
    int threads = 1;
};

struct RanksArgs {
    Matrix logits;
    int64_t vocab = 0;
    Selection selected;                // ids, or null ids with thresholds
    const void* thresholds = nullptr;  // statistics dtype
    Temperatures temperatures;         // count == 0: no masses
    int64_t *n_greater = nullptr, *n_equal = nullptr;
    void* mass_greater = nullptr;
    int threads = 1;
};

// Codes of the cutoff rules, as in fastcalib/ops/_cutoff_rules.py.
enum CutoffRule : int { kKeepAll = 0, kTopK = 1, kTopP = 2, kMinP = 3, kEpsilon = 4, kEta = 5, kTopNSigma = 6, kSizeOracle = 7 };

struct CutoffsArgs {
    Matrix logits;
    int64_t vocab = 0;
    Temperatures temperatures;
    const double* rules = nullptr;  // (R, 2): code and number
    int64_t rule_count = 0;
    bool last = false;              // the rules look at temperature 1, the masses at all of them
    Selection sets;                 // null offsets: none
    const double* counts = nullptr;  // (nnz,), or null: one each
    void *threshold = nullptr, *mass = nullptr;  // (N, K, R)
    int64_t* kept = nullptr;
    bool valid = false;        // what follows is written
    uint8_t* keeps = nullptr;  // (nnz, K, R)
    int64_t* kept_valid = nullptr;
    void* valid_mass = nullptr;
    double *kept_counts = nullptr, *total_counts = nullptr;  // (N, K, R), (N,)
    bool tokens = false;       // so is what follows; needs `valid`
    int64_t *n_greater = nullptr, *n_equal = nullptr;  // (nnz,); -1 above a token next to a NaN
    double* below = nullptr;                           // (nnz,): logit less the row's maximum
    double *log_norm = nullptr, *entropy = nullptr;    // (N, K): of e^(b (z - max)), and of the softmax
    int threads = 1;
};

struct SoftmaxArgs {
    Matrix logits;  // forward: logits; backward: gradient of the output
    int64_t vocab = 0, width = 0;
    Temperatures temperatures;
    void* out = nullptr;             // (N, width) contiguous: result, or gradient of the logits
    void* logsumexp = nullptr;       // (N,): written forward; -inf for a row of -inf, NaN for an undefined one
    const void* saved = nullptr;     // backward: the forward result, (N, width) contiguous
    double* grad_temperature = nullptr;  // backward: (N,), or null
    bool log = false;
    int threads = 1;
};

// Two matrices over the same vocabulary, the student's Q and the teacher's P, and L values of lam in any order.
struct PairArgs {
    Matrix student, teacher;
    int64_t vocab = 0;
    Temperatures temperatures, teacher_temperatures;
    const double* lam = nullptr;
    int64_t lam_count = 0;
    const uint8_t* ignored = nullptr;     // (N,), or null: rows that are not read
    void *alpha = nullptr, *beta = nullptr;  // (N, L)
    double *mass = nullptr, *norms = nullptr;  // (2, N, L): Q where Q < lam P, P elsewhere; (N, 4): max and log2 s0 of each side
    int threads = 1;
};

struct PairBackwardArgs {
    PairArgs forward;  // mass and norms as written forward; alpha and beta are not looked at
    const void *grad_alpha = nullptr, *grad_beta = nullptr;
    void *grad_student = nullptr, *grad_teacher = nullptr;  // (N, width) contiguous, or null
    int64_t student_width = 0, teacher_width = 0;
    double* grad_temperature = nullptr;  // (N, 2), or null
};

// One instruction set's kernels. Functions that gather ids return the position of the first bad id, or -1.
struct Kernels {
    const char* name;
    int64_t (*statistics)(const StatisticsArgs&);
    void (*statistics_backward)(const StatisticsBackwardArgs&);
    int64_t (*statistics_with_gradient)(const StatisticsArgs&, const StatisticsBackwardArgs&);
    void (*statistics_chunk)(const StatisticsChunkArgs&);
    void (*statistics_from_state)(const StatisticsArgs&, const Head*, const Sums*);
    int64_t (*ranks)(const RanksArgs&);
    int64_t (*cutoffs)(const CutoffsArgs&);
    void (*softmax)(const SoftmaxArgs&);
    void (*softmax_backward)(const SoftmaxArgs&);
    void (*pr_divergence)(const PairArgs&);
    void (*pr_divergence_backward)(const PairBackwardArgs&);
};

}  // namespace fastcalib
