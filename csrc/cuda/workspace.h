// What the CUDA launchers take, and the scratch memory that they need. Plain C++: bindings.cpp is no CUDA source.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../cpu/api.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace fastcalib::cuda {

using Stream = CUstream_st*;

// The caller passes as much memory on the device as these say; nothing is allocated, copied or waited for here, so
// every launch can be captured in a CUDA graph. `selected` is the number of selected tokens or thresholds in all.
size_t statistics_workspace(const StatisticsArgs& args, int64_t selected);
size_t statistics_backward_workspace(const StatisticsBackwardArgs& args);
size_t fused_workspace(const StatisticsArgs& forward, const StatisticsBackwardArgs& backward);
size_t ranks_workspace(const RanksArgs& args, int64_t selected);
size_t softmax_workspace(const SoftmaxArgs& args);
size_t softmax_backward_workspace(const SoftmaxArgs& args);

// Each returns a cudaError_t: 0, or why a launch was refused. All pointers in `args` are memory of the current device.
int launch_statistics(const StatisticsArgs& args, int64_t selected, void* workspace, Stream stream);
int launch_statistics_backward(const StatisticsBackwardArgs& args, void* workspace, Stream stream);
// Both of these in one launch: one selected token a row, and `out` may be the logits. A block takes a row whatever the
// number of rows; with fewer than multiprocessors() the two above keep more of the device busy.
int launch_fused(const StatisticsArgs& forward, const StatisticsBackwardArgs& backward, void* workspace, Stream stream);
int launch_ranks(const RanksArgs& args, int64_t selected, void* workspace, Stream stream);
int launch_softmax(const SoftmaxArgs& args, void* workspace, Stream stream);
int launch_softmax_backward(const SoftmaxArgs& args, void* workspace, Stream stream);

int multiprocessors();  // of the current device
const char* error_name(int error);
const char* compiled_targets();  // such as "sm_80 sm_90": what this build holds machine code for

// Makes a device current, and the one before again at the end.
class OnDevice {
 public:
    explicit OnDevice(int device);
    ~OnDevice();
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

 private:
    int previous_ = -1;
};

}  // namespace fastcalib::cuda
