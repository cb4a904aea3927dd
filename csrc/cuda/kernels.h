// Kernels and launches that more than one source uses, and how the workspace is laid out.
#pragma once
#include <algorithm>

#include "rows.cuh"
#include "workspace.h"

namespace fastcalib::cuda {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns of a segment: 32 KiB of logits.
inline int64_t segment_length(int dtype) {
    return dtype == kFloat32 ? kSegmentLength<float> : kSegmentLength<BFloat16>;
}

// Hands out the workspace, each part at a multiple of 256 bytes; from a null start it only counts.
class Carver {
 public:
    explicit Carver(void* start) : start_(static_cast<char*>(start)) {}
    template <class T> T* take(int64_t count) {
        T* part = start_ ? reinterpret_cast<T*>(start_ + used_) : nullptr;
        used_ += size_t(divide_up(count * int64_t(sizeof(T)), 256) * 256);
        return part;
    }
    size_t used() const { return used_; }

 private:
    char* start_;
    size_t used_ = 0;
};

// How thresholds are sorted and held: by a warp, or by a block of CUB's radix sort. A row with more than `capacity` of
// them is read once for each full set, with the same results: all that is counted are whole numbers.
struct ThresholdPlan {
    int capacity = 32, copies = 32;
    int64_t chunks = 1;
};
ThresholdPlan plan_thresholds(int64_t rows, int64_t selected, bool ragged, bool masses, int shared_bytes);

// What the current device has; the fallbacks are what every GPU since sm_80 has.
struct Device {
    int multiprocessors = 64, shared_bytes = 99 * 1024, l2_bytes = 3 << 20;
};
Device current_device();

// Lay the parts out in a workspace, or with a null one find its size. Without splits, nothing is counted.
size_t carve(Partial& partial, void* workspace, const Matrix& logits, int64_t vocab, int64_t k_count, int64_t selected,
             const ThresholdPlan& plan, int64_t splits);

// Sort each row's thresholds (thresholds.cu).
int launch_thresholds(const RanksArgs& args, const Partial& partial, const ThresholdPlan& plan, Stream stream);
// Merge each row's segments and write what depends on no threshold (finish.cu).
int launch_finish_rows(const StatisticsArgs& args, const Partial& partial, Stream stream);
// Merge counts and masses, and put them back in the order of the thresholds.
int launch_finish_ranks(const RanksArgs& args, const Partial& partial, int64_t splits, int64_t most, Stream stream);

// Call with the storage type of a dtype code.
template <class Call> int with_storage(int dtype, const Call& call) {
    if (dtype == kFloat32) return call(float());
    if (dtype == kBFloat16) return call(BFloat16());
    if (dtype == kFloat16) return call(Float16());
    return int(cudaErrorInvalidValue);
}

}  // namespace fastcalib::cuda
