// fastcalib._C: thin bindings of raw pointers, sizes and strides. No torch headers, so one build serves every torch.
// fastcalib/ops/ is the only caller and keeps the tensors alive; the GIL is released while kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#if defined(FASTCALIB_HAVE_CUDA)
#include "cuda/bindings.h"
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;
using namespace fastcalib;

namespace {

template <class T> T* ptr(uintptr_t address) { return reinterpret_cast<T*>(address); }
void* ptr(uintptr_t address) { return reinterpret_cast<void*>(address); }

// What every operation takes, as fastcalib/ops/ passes it: a matrix as RowLayout.args() lists it.
Matrix matrix(uintptr_t data, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride) {
    return {ptr(data), dtype, rows, inner, outer_stride, inner_stride};
}
Temperatures temperatures(uintptr_t data, int64_t rows, int64_t count) { return {ptr<const double>(data), rows, count}; }
Selection selection(uintptr_t ids, int64_t per_row, uintptr_t offsets, int64_t ignore_index) {
    return {ptr<const int64_t>(ids), per_row, ptr<const int64_t>(offsets), ignore_index};
}

int64_t statistics(uintptr_t logits, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                   int64_t vocab, uintptr_t temperature, int64_t temperature_rows, int64_t temperature_count, uintptr_t ids,
                   int64_t per_row, uintptr_t offsets, int64_t ignore_index, bool ranks, bool moments, uintptr_t out_rows,
                   uintptr_t scalars, uintptr_t log_prob, uintptr_t argmax, uintptr_t n_greater, uintptr_t n_equal,
                   uintptr_t mass_greater, uintptr_t saved, int threads) {
    StatisticsArgs a;
    a.logits = matrix(logits, dtype, rows, inner, outer_stride, inner_stride);
    a.vocab = vocab;
    a.temperatures = temperatures(temperature, temperature_rows, temperature_count);
    a.selected = selection(ids, per_row, offsets, ignore_index);
    a.ranks = ranks;
    a.moments = moments;
    a.rows = ptr(out_rows);
    a.scalars = ptr(scalars);
    a.log_prob = ptr(log_prob);
    a.argmax = ptr<int64_t>(argmax);
    a.n_greater = ptr<int64_t>(n_greater);
    a.n_equal = ptr<int64_t>(n_equal);
    a.mass_greater = ptr(mass_greater);
    a.saved = ptr(saved);
    a.threads = threads;
    return kernels().statistics(a);
}

void statistics_backward(uintptr_t logits, int dtype, int64_t rows, int64_t inner, int64_t outer_stride,
                         int64_t inner_stride, int64_t vocab, int64_t width, uintptr_t temperature,
                         int64_t temperature_rows, int64_t temperature_count, uintptr_t ids, int64_t per_row,
                         uintptr_t offsets, int64_t ignore_index, uintptr_t out_rows, uintptr_t scalars, uintptr_t saved,
                         uintptr_t grad_rows, uintptr_t grad_scalars, uintptr_t grad_log_prob, uintptr_t out,
                         int64_t to_inner, int64_t to_outer_stride, int64_t to_inner_stride, bool nontemporal,
                         int threads) {
    StatisticsBackwardArgs a;
    a.logits = matrix(logits, dtype, rows, inner, outer_stride, inner_stride);
    a.vocab = vocab;
    a.width = width;
    a.temperatures = temperatures(temperature, temperature_rows, temperature_count);
    a.selected = selection(ids, per_row, offsets, ignore_index);
    a.rows = ptr(out_rows);
    a.scalars = ptr(scalars);
    a.saved = ptr(saved);
    a.grad_rows = ptr(grad_rows);
    a.grad_scalars = ptr(grad_scalars);
    a.grad_log_prob = ptr(grad_log_prob);
    a.out = matrix(out, dtype, rows, to_inner, to_outer_stride, to_inner_stride);
    a.nontemporal = nontemporal;
    a.threads = threads;
    kernels().statistics_backward(a);
}

int64_t statistics_with_gradient(uintptr_t logits, int dtype, int64_t rows, int64_t inner, int64_t outer_stride,
                                 int64_t inner_stride, int64_t vocab, int64_t width, uintptr_t temperature,
                                 int64_t temperature_rows, int64_t temperature_count, uintptr_t ids, int64_t per_row,
                                 uintptr_t offsets, int64_t ignore_index, bool moments, uintptr_t out_rows,
                                 uintptr_t scalars, uintptr_t log_prob, uintptr_t argmax, uintptr_t saved,
                                 uintptr_t grad_rows, uintptr_t grad_scalars, uintptr_t grad_log_prob, uintptr_t out,
                                 int64_t to_inner, int64_t to_outer_stride, int64_t to_inner_stride, int threads) {
    StatisticsArgs f;
    f.logits = matrix(logits, dtype, rows, inner, outer_stride, inner_stride);
    f.vocab = vocab;
    f.temperatures = temperatures(temperature, temperature_rows, temperature_count);
    f.selected = selection(ids, per_row, offsets, ignore_index);
    f.moments = moments;
    f.rows = ptr(out_rows);
    f.scalars = ptr(scalars);
    f.log_prob = ptr(log_prob);
    f.argmax = ptr<int64_t>(argmax);
    f.saved = ptr(saved);
    f.threads = threads;
    StatisticsBackwardArgs a;
    a.logits = f.logits;
    a.vocab = vocab;
    a.width = width;
    a.temperatures = f.temperatures;
    a.selected = f.selected;
    a.rows = f.rows;
    a.scalars = f.scalars;
    a.saved = f.saved;
    a.grad_rows = ptr(grad_rows);
    a.grad_scalars = ptr(grad_scalars);
    a.grad_log_prob = ptr(grad_log_prob);
    a.out = matrix(out, dtype, rows, to_inner, to_outer_stride, to_inner_stride);
    a.threads = threads;
    return kernels().statistics_with_gradient(f, a);
}

void statistics_chunk(uintptr_t logits, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                      int64_t columns, int64_t first, uintptr_t temperature, int64_t temperature_rows,
                      int64_t temperature_count, uintptr_t ids, int64_t per_row, uintptr_t offsets, int64_t ignore_index,
                      bool moments, uintptr_t heads, uintptr_t sums, uintptr_t chosen, int threads) {
    StatisticsChunkArgs a;
    a.logits = matrix(logits, dtype, rows, inner, outer_stride, inner_stride);
    a.columns = columns;
    a.first = first;
    a.temperatures = temperatures(temperature, temperature_rows, temperature_count);
    a.selected = selection(ids, per_row, offsets, ignore_index);
    a.moments = moments;
    a.heads = ptr<Head>(heads);
    a.sums = ptr<Sums>(sums);
    a.chosen = ptr<double>(chosen);
    a.threads = threads;
    kernels().statistics_chunk(a);
}

void statistics_from_state(int dtype, int64_t rows, uintptr_t temperature, int64_t temperature_rows,
                           int64_t temperature_count, uintptr_t ids, int64_t per_row, uintptr_t offsets,
                           int64_t ignore_index, uintptr_t heads, uintptr_t sums, uintptr_t chosen, uintptr_t out_rows,
                           uintptr_t scalars, uintptr_t log_prob, uintptr_t argmax, uintptr_t saved) {
    StatisticsArgs a;
    a.logits = matrix(0, dtype, rows, 1, 0, 0);
    a.temperatures = temperatures(temperature, temperature_rows, temperature_count);
    a.selected = selection(ids, per_row, offsets, ignore_index);
    a.chosen = ptr<const double>(chosen);
    a.rows = ptr(out_rows);
    a.scalars = ptr(scalars);
    a.log_prob = ptr(log_prob);
    a.argmax = ptr<int64_t>(argmax);
    a.saved = ptr(saved);
    kernels().statistics_from_state(a, ptr<const Head>(heads), ptr<const Sums>(sums));
}

int64_t ranks(uintptr_t logits, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
              int64_t vocab, uintptr_t ids, uintptr_t thresholds, int64_t per_row, uintptr_t offsets, int64_t ignore_index,
              uintptr_t temperature, int64_t temperature_rows, int64_t temperature_count, uintptr_t n_greater,
              uintptr_t n_equal, uintptr_t mass_greater, int threads) {
    RanksArgs a;
    a.logits = matrix(logits, dtype, rows, inner, outer_stride, inner_stride);
    a.vocab = vocab;
    a.selected = selection(ids, per_row, offsets, ignore_index);
    a.thresholds = ptr(thresholds);
    a.temperatures = temperatures(temperature, temperature_rows, temperature_count);
    a.n_greater = ptr<int64_t>(n_greater);
    a.n_equal = ptr<int64_t>(n_equal);
    a.mass_greater = ptr(mass_greater);
    a.threads = threads;
    return kernels().ranks(a);
}

int64_t cutoffs(uintptr_t logits, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                int64_t vocab, uintptr_t temperature, int64_t temperature_rows, int64_t temperature_count, uintptr_t rules,
                int64_t rule_count, bool last, uintptr_t ids, uintptr_t offsets, uintptr_t counts, uintptr_t threshold,
                uintptr_t kept, uintptr_t mass, bool valid, uintptr_t keeps, uintptr_t kept_valid, uintptr_t valid_mass,
                uintptr_t kept_counts, uintptr_t total_counts, bool tokens, uintptr_t n_greater, uintptr_t n_equal,
                uintptr_t below, uintptr_t log_norm, uintptr_t entropy, int threads) {
    CutoffsArgs a;
    a.logits = matrix(logits, dtype, rows, inner, outer_stride, inner_stride);
    a.vocab = vocab;
    a.temperatures = temperatures(temperature, temperature_rows, temperature_count);
    a.rules = ptr<const double>(rules);
    a.rule_count = rule_count;
    a.last = last;
    a.sets = selection(ids, 0, offsets, 0);  // 0 is a token: no id passes for one to ignore
    a.counts = ptr<const double>(counts);
    a.threshold = ptr(threshold);
    a.kept = ptr<int64_t>(kept);
    a.mass = ptr(mass);
    a.valid = valid;
    a.keeps = ptr<uint8_t>(keeps);
    a.kept_valid = ptr<int64_t>(kept_valid);
    a.valid_mass = ptr(valid_mass);
    a.kept_counts = ptr<double>(kept_counts);
    a.total_counts = ptr<double>(total_counts);
    a.tokens = tokens;
    a.n_greater = ptr<int64_t>(n_greater);
    a.n_equal = ptr<int64_t>(n_equal);
    a.below = ptr<double>(below);
    a.log_norm = ptr<double>(log_norm);
    a.entropy = ptr<double>(entropy);
    a.threads = threads;
    return kernels().cutoffs(a);
}

void softmax_forward(uintptr_t logits, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                     int64_t vocab, int64_t width, uintptr_t temperature, int64_t temperature_rows, uintptr_t out,
                     uintptr_t logsumexp, bool log, int threads) {
    SoftmaxArgs a;
    a.logits = matrix(logits, dtype, rows, inner, outer_stride, inner_stride);
    a.vocab = vocab;
    a.width = width;
    a.temperatures = temperatures(temperature, temperature_rows, 1);
    a.out = ptr(out);
    a.logsumexp = ptr(logsumexp);
    a.log = log;
    a.threads = threads;
    kernels().softmax(a);
}

void softmax_backward(uintptr_t grad, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                      int64_t vocab, int64_t width, uintptr_t result, uintptr_t logsumexp, uintptr_t temperature,
                      int64_t temperature_rows, uintptr_t out, uintptr_t grad_temperature, bool log, int threads) {
    SoftmaxArgs a;
    a.logits = matrix(grad, dtype, rows, inner, outer_stride, inner_stride);
    a.vocab = vocab;
    a.width = width;
    a.temperatures = temperatures(temperature, temperature_rows, 1);
    a.out = ptr(out);
    a.saved = ptr(result);
    a.logsumexp = ptr(logsumexp);
    a.grad_temperature = ptr<double>(grad_temperature);
    a.log = log;
    a.threads = threads;
    kernels().softmax_backward(a);
}

// Both matrices share dtype and number of rows.
PairArgs pair(uintptr_t student, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
              uintptr_t teacher, int64_t teacher_inner, int64_t teacher_outer_stride, int64_t teacher_inner_stride, int64_t vocab,
              uintptr_t temperature, int64_t temperature_rows, uintptr_t teacher_temperature, int64_t teacher_temperature_rows,
              uintptr_t lam, int64_t lam_count, uintptr_t ignored, uintptr_t mass, uintptr_t norms, int threads) {
    PairArgs a;
    a.student = matrix(student, dtype, rows, inner, outer_stride, inner_stride);
    a.teacher = matrix(teacher, dtype, rows, teacher_inner, teacher_outer_stride, teacher_inner_stride);
    a.vocab = vocab;
    a.temperatures = temperatures(temperature, temperature_rows, 1);
    a.teacher_temperatures = temperatures(teacher_temperature, teacher_temperature_rows, 1);
    a.lam = ptr<const double>(lam);
    a.lam_count = lam_count;
    a.ignored = ptr<const uint8_t>(ignored);
    a.mass = ptr<double>(mass);
    a.norms = ptr<double>(norms);
    a.threads = threads;
    return a;
}

void pr_divergence_forward(uintptr_t student, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                           uintptr_t teacher, int64_t teacher_inner, int64_t teacher_outer_stride, int64_t teacher_inner_stride,
                           int64_t vocab, uintptr_t temperature, int64_t temperature_rows, uintptr_t teacher_temperature,
                           int64_t teacher_temperature_rows, uintptr_t lam, int64_t lam_count, uintptr_t ignored, uintptr_t mass,
                           uintptr_t norms, int threads, uintptr_t alpha, uintptr_t beta) {
    PairArgs a = pair(student, dtype, rows, inner, outer_stride, inner_stride, teacher, teacher_inner, teacher_outer_stride,
                      teacher_inner_stride, vocab, temperature, temperature_rows, teacher_temperature, teacher_temperature_rows, lam,
                      lam_count, ignored, mass, norms, threads);
    a.alpha = ptr(alpha);
    a.beta = ptr(beta);
    kernels().pr_divergence(a);
}

void pr_divergence_backward(uintptr_t student, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                            uintptr_t teacher, int64_t teacher_inner, int64_t teacher_outer_stride, int64_t teacher_inner_stride,
                            int64_t vocab, uintptr_t temperature, int64_t temperature_rows, uintptr_t teacher_temperature,
                            int64_t teacher_temperature_rows, uintptr_t lam, int64_t lam_count, uintptr_t ignored, uintptr_t mass,
                            uintptr_t norms, int threads, uintptr_t grad_alpha, uintptr_t grad_beta, uintptr_t grad_student,
                            int64_t student_width, uintptr_t grad_teacher, int64_t teacher_width, uintptr_t grad_temperature) {
    PairBackwardArgs a;
    a.forward = pair(student, dtype, rows, inner, outer_stride, inner_stride, teacher, teacher_inner, teacher_outer_stride,
                     teacher_inner_stride, vocab, temperature, temperature_rows, teacher_temperature, teacher_temperature_rows, lam,
                     lam_count, ignored, mass, norms, threads);
    a.grad_alpha = ptr(grad_alpha);
    a.grad_beta = ptr(grad_beta);
    a.grad_student = ptr(grad_student);
    a.grad_teacher = ptr(grad_teacher);
    a.student_width = student_width;
    a.teacher_width = teacher_width;
    a.grad_temperature = ptr<double>(grad_temperature);
    kernels().pr_divergence_backward(a);
}

// Ask for huge pages under a large fresh buffer: a first touch then faults once per 2 MB instead of once per 4 KB.
void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = size_t(2) << 20, begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
    if (end > begin) (void)madvise(ptr(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)address, (void)bytes;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    const py::call_guard<py::gil_scoped_release> release;
    m.def("statistics_forward", &statistics, release);
    m.def("statistics_backward", &statistics_backward, release);
    m.def("statistics_with_gradient", &statistics_with_gradient, release);
    m.def("statistics_chunk", &statistics_chunk, release);
    m.def("statistics_from_state", &statistics_from_state, release);
    m.attr("statistics_head_bytes") = sizeof(Head);
    m.attr("statistics_sums_bytes") = sizeof(Sums);
    m.def("ranks", &ranks, release);
    m.def("cutoffs", &cutoffs, release);
    m.def("softmax_forward", &softmax_forward, release);
    m.def("softmax_backward", &softmax_backward, release);
    m.def("pr_divergence_forward", &pr_divergence_forward, release);
    m.def("pr_divergence_backward", &pr_divergence_backward, release);
    m.def("advise_huge_pages", &advise_huge_pages, release);
#if defined(FASTCALIB_HAVE_CUDA)
    fastcalib::cuda::bind(m);
#endif
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("isas", &available_isas);
    m.def("set_isa", &set_isa);
    m.def("compiler", [] {
#if defined(__clang__)
        return std::string("clang " __clang_version__);
#elif defined(__GNUC__)
        return std::string("gcc " __VERSION__);
#else
        return std::string("unknown");
#endif
    });
    m.def("openmp", [] {
#if defined(_OPENMP)
        return true;
#else
        return false;
#endif
    });
}
