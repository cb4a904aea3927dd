// Devices, and how the workspace is laid out.
#include "kernels.h"

namespace fastcalib::cuda {

Device current_device() {
    Device device;
    int index = 0, value = 0;
    if (cudaGetDevice(&index) != cudaSuccess) return device;
    if (cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, index) == cudaSuccess && value > 0)
        device.multiprocessors = value;
    if (cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) == cudaSuccess)
        device.shared_bytes = std::max(device.shared_bytes, value);
    if (cudaDeviceGetAttribute(&value, cudaDevAttrL2CacheSize, index) == cudaSuccess && value > 0)
        device.l2_bytes = value;
    return device;
}

size_t carve(Partial& partial, void* workspace, const Matrix& logits, int64_t vocab, int64_t k_count, int64_t selected,
             const ThresholdPlan& plan, int64_t splits) {
    const int64_t rows = logits.rows, length = segment_length(logits.dtype), segments = divide_up(vocab, length);
    const bool counting = splits > 0;
    partial.nnz = selected;
    partial.k_count = k_count;
    partial.segments = segments;
    partial.segment_length = length;
    partial.chunks = plan.chunks;
    Carver carver(workspace);
    partial.heads = carver.take<SegmentHead>(rows * segments);
    partial.sums_data = carver.take<double>(rows * segments * k_count * 4);
    if (!counting) return carver.used();
    if (k_count) partial.weights_data = carver.take<double>(rows * segments * k_count);
    partial.keys = carver.take<float>(selected);
    partial.place = carver.take<int32_t>(selected);
    partial.limits = carver.take<int32_t>(rows * plan.chunks);
    partial.counts_data = carver.take<uint2>(splits * selected);
    partial.masses_data = carver.take<uint64_t>(segments * k_count * selected);
    return carver.used();
}

OnDevice::OnDevice(int device) {
    int current = 0;
    if (cudaGetDevice(&current) != cudaSuccess || current == device) return;
    if (cudaSetDevice(device) == cudaSuccess) previous_ = current;
}

OnDevice::~OnDevice() {
    if (previous_ >= 0) (void)cudaSetDevice(previous_);
}

int multiprocessors() { return current_device().multiprocessors; }

const char* error_name(int error) { return cudaGetErrorString(cudaError_t(error)); }

const char* compiled_targets() {
#if defined(FASTCALIB_CUDA_TARGETS)
    return FASTCALIB_CUDA_TARGETS;
#else
    return "";
#endif
}

}  // namespace fastcalib::cuda
