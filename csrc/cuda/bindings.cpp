// Bindings of the CUDA launchers: raw device pointers, sizes and strides, a stream, and scratch memory from the caller.
//
// Each function is called twice: with workspace 0 it launches nothing and returns the bytes of workspace that the same
// call needs; with a workspace it enqueues its kernels on the stream and returns 0. Nothing here waits for the device.
#include "bindings.h"

#include <stdexcept>
#include <string>

#include "workspace.h"

namespace fastcalib::cuda {
namespace {

template <class T> T* ptr(uintptr_t address) { return reinterpret_cast<T*>(address); }
void* ptr(uintptr_t address) { return reinterpret_cast<void*>(address); }

void check(int error, const char* what) {
    if (error) throw std::runtime_error(std::string(what) + ": CUDA refused a launch: " + error_name(error));
}

int64_t statistics(uintptr_t logits, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                   int64_t vocab, uintptr_t temperature, int64_t temperature_rows, int64_t temperature_count,
                   uintptr_t ids, int64_t selected, int64_t per_row, uintptr_t offsets, int64_t ignore_index,
                   bool ranks, uintptr_t out_rows, uintptr_t scalars, uintptr_t log_prob, uintptr_t argmax,
                   uintptr_t n_greater, uintptr_t n_equal, uintptr_t mass_greater, uintptr_t saved, uintptr_t workspace,
                   int device, uintptr_t stream) {
    StatisticsArgs a;
    a.logits = {ptr(logits), dtype, rows, inner, outer_stride, inner_stride};
    a.vocab = vocab;
    a.temperatures = {ptr<const double>(temperature), temperature_rows, temperature_count};
    a.selected = {ptr<const int64_t>(ids), per_row, ptr<const int64_t>(offsets), ignore_index};
    a.ranks = ranks;
    a.rows = ptr(out_rows);
    a.scalars = ptr(scalars);
    a.log_prob = ptr(log_prob);
    a.argmax = ptr<int64_t>(argmax);
    a.n_greater = ptr<int64_t>(n_greater);
    a.n_equal = ptr<int64_t>(n_equal);
    a.mass_greater = ptr(mass_greater);
    a.saved = ptr(saved);
    const OnDevice here(device);
    if (!workspace) return int64_t(statistics_workspace(a, selected));
    check(launch_statistics(a, selected, ptr(workspace), ptr<CUstream_st>(stream)), "statistics");
    return 0;
}

int64_t statistics_backward(uintptr_t logits, int dtype, int64_t rows, int64_t inner, int64_t outer_stride,
                            int64_t inner_stride, int64_t vocab, int64_t width, uintptr_t temperature,
                            int64_t temperature_rows, int64_t temperature_count, uintptr_t ids, int64_t per_row,
                            uintptr_t offsets, int64_t ignore_index, uintptr_t out_rows, uintptr_t scalars,
                            uintptr_t argmax, uintptr_t saved, uintptr_t grad_rows, uintptr_t grad_scalars,
                            uintptr_t grad_log_prob, uintptr_t out, int64_t to_inner, int64_t to_outer_stride,
                            int64_t to_inner_stride, uintptr_t workspace, int device, uintptr_t stream) {
    StatisticsBackwardArgs a;
    a.logits = {ptr(logits), dtype, rows, inner, outer_stride, inner_stride};
    a.vocab = vocab;
    a.width = width;
    a.temperatures = {ptr<const double>(temperature), temperature_rows, temperature_count};
    a.selected = {ptr<const int64_t>(ids), per_row, ptr<const int64_t>(offsets), ignore_index};
    a.rows = ptr(out_rows);
    a.scalars = ptr(scalars);
    a.argmax = ptr<const int64_t>(argmax);
    a.saved = ptr(saved);
    a.grad_rows = ptr(grad_rows);
    a.grad_scalars = ptr(grad_scalars);
    a.grad_log_prob = ptr(grad_log_prob);
    a.out = {ptr(out), dtype, rows, to_inner, to_outer_stride, to_inner_stride};
    const OnDevice here(device);
    if (!workspace) return int64_t(statistics_backward_workspace(a));
    check(launch_statistics_backward(a, ptr(workspace), ptr<CUstream_st>(stream)), "statistics_backward");
    return 0;
}

int64_t fused(uintptr_t logits, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
              int64_t vocab, int64_t width, uintptr_t temperature, int64_t temperature_rows, int64_t temperature_count,
              uintptr_t ids, int64_t ignore_index, uintptr_t out_rows, uintptr_t scalars, uintptr_t log_prob,
              uintptr_t argmax, uintptr_t saved, uintptr_t grad_rows, uintptr_t grad_scalars, uintptr_t grad_log_prob,
              uintptr_t out, int64_t to_inner, int64_t to_outer_stride, int64_t to_inner_stride, uintptr_t workspace,
              int device, uintptr_t stream) {
    StatisticsArgs f;
    f.logits = {ptr(logits), dtype, rows, inner, outer_stride, inner_stride};
    f.vocab = vocab;
    f.temperatures = {ptr<const double>(temperature), temperature_rows, temperature_count};
    f.selected = {ptr<const int64_t>(ids), 1, nullptr, ignore_index};
    f.rows = ptr(out_rows);
    f.scalars = ptr(scalars);
    f.log_prob = ptr(log_prob);
    f.argmax = ptr<int64_t>(argmax);
    f.saved = ptr(saved);
    StatisticsBackwardArgs a;
    a.logits = f.logits;
    a.vocab = vocab;
    a.width = width;
    a.temperatures = f.temperatures;
    a.selected = f.selected;
    a.rows = f.rows;
    a.scalars = f.scalars;
    a.argmax = f.argmax;
    a.saved = f.saved;
    a.grad_rows = ptr(grad_rows);
    a.grad_scalars = ptr(grad_scalars);
    a.grad_log_prob = ptr(grad_log_prob);
    a.out = {ptr(out), dtype, rows, to_inner, to_outer_stride, to_inner_stride};
    const OnDevice here(device);
    if (!workspace) return int64_t(fused_workspace(f, a));
    check(launch_fused(f, a, ptr(workspace), ptr<CUstream_st>(stream)), "fused");
    return 0;
}

int64_t ranks(uintptr_t logits, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
              int64_t vocab, uintptr_t ids, uintptr_t thresholds, int64_t selected, int64_t per_row, uintptr_t offsets,
              int64_t ignore_index, uintptr_t temperature, int64_t temperature_rows, int64_t temperature_count,
              uintptr_t n_greater, uintptr_t n_equal, uintptr_t mass_greater, uintptr_t workspace, int device,
              uintptr_t stream) {
    RanksArgs a;
    a.logits = {ptr(logits), dtype, rows, inner, outer_stride, inner_stride};
    a.vocab = vocab;
    a.selected = {ptr<const int64_t>(ids), per_row, ptr<const int64_t>(offsets), ignore_index};
    a.thresholds = ptr(thresholds);
    a.temperatures = {ptr<const double>(temperature), temperature_rows, temperature_count};
    a.n_greater = ptr<int64_t>(n_greater);
    a.n_equal = ptr<int64_t>(n_equal);
    a.mass_greater = ptr(mass_greater);
    const OnDevice here(device);
    if (!workspace) return int64_t(ranks_workspace(a, selected));
    check(launch_ranks(a, selected, ptr(workspace), ptr<CUstream_st>(stream)), "ranks");
    return 0;
}

int64_t softmax(uintptr_t logits, int dtype, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                int64_t vocab, int64_t width, uintptr_t temperature, int64_t temperature_rows, uintptr_t out,
                uintptr_t logsumexp, bool log, uintptr_t workspace, int device, uintptr_t stream) {
    SoftmaxArgs a;
    a.logits = {ptr(logits), dtype, rows, inner, outer_stride, inner_stride};
    a.vocab = vocab;
    a.width = width;
    a.temperatures = {ptr<const double>(temperature), temperature_rows, 1};
    a.out = ptr(out);
    a.logsumexp = ptr(logsumexp);
    a.log = log;
    const OnDevice here(device);
    if (!workspace) return int64_t(softmax_workspace(a));
    check(launch_softmax(a, ptr(workspace), ptr<CUstream_st>(stream)), "softmax");
    return 0;
}

int64_t softmax_backward(uintptr_t grad, int dtype, int64_t rows, int64_t inner, int64_t outer_stride,
                         int64_t inner_stride, int64_t vocab, int64_t width, uintptr_t result, uintptr_t logsumexp,
                         uintptr_t temperature, int64_t temperature_rows, uintptr_t out, uintptr_t grad_temperature,
                         bool log, uintptr_t workspace, int device, uintptr_t stream) {
    SoftmaxArgs a;
    a.logits = {ptr(grad), dtype, rows, inner, outer_stride, inner_stride};
    a.vocab = vocab;
    a.width = width;
    a.temperatures = {ptr<const double>(temperature), temperature_rows, 1};
    a.out = ptr(out);
    a.saved = ptr(result);
    a.logsumexp = ptr(logsumexp);
    a.grad_temperature = ptr<double>(grad_temperature);
    a.log = log;
    const OnDevice here(device);
    if (!workspace) return int64_t(softmax_backward_workspace(a));
    check(launch_softmax_backward(a, ptr(workspace), ptr<CUstream_st>(stream)), "softmax_backward");
    return 0;
}

}  // namespace

void bind(pybind11::module_& m) {
    const pybind11::call_guard<pybind11::gil_scoped_release> release;
    m.def("cuda_statistics_forward", &statistics, release);
    m.def("cuda_statistics_backward", &statistics_backward, release);
    m.def("cuda_fused", &fused, release);
    m.def("cuda_ranks", &ranks, release);
    m.def("cuda_softmax_forward", &softmax, release);
    m.def("cuda_softmax_backward", &softmax_backward, release);
    m.def("cuda_multiprocessors", [](int device) {
        const OnDevice here(device);
        return multiprocessors();
    });
    m.def("cuda_targets", [] { return std::string(compiled_targets()); });
}

}  // namespace fastcalib::cuda
