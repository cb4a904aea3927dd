// Writing a segment back: 128-bit stores wherever the row in memory allows, whatever its alignment.
#pragma once
#include "segment.cuh"

namespace fastcalib::cuda {

// Elements [from, to) of a vector, one by one, as far as they lie before column `width`. `column` is that of element 0.
template <class T> __device__ __forceinline__ void store_elements(T* row, int64_t column, const uint4& v, int from,
                                                                  int to, int64_t width) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int u = 0; u < kPerVector<T>; ++u) {
        if (u < from || u >= to || column + u >= width) continue;
        if constexpr (kPerWord<T> == 1) row[column + u] = __uint_as_float(words[u]);
        else row[column + u].bits = uint16_t(words[u / 2] >> 16 * (u % 2));
    }
}

// One instruction: written as an assignment, compilers took one of eight apart into four stores.
// `Streaming` marks its place in the caches as the first to be given away.
template <bool Streaming> __device__ __forceinline__ void store_vector(void* to, const uint4& v) {
    if constexpr (Streaming)
        asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                     : "memory");
    else
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                     : "memory");
}

// Slots of a segment that hold columns before `width`: as many are written.
template <class T> __device__ __forceinline__ int slots_before(int64_t width, int64_t start) {
    return int(min(int64_t(kVectors), (width - start + kStride<T> - 1) / kStride<T>));
}

// Each lane's vector of logits starts `shift` elements behind a multiple of 16 bytes in the output. A lane therefore
// writes the aligned vector that begins with the last elements of the lane before it; what hangs over the ends of the
// 512 bytes of a warp, or over the end of the row, is written element by element.
template <bool Streaming = false, class T>
__device__ __forceinline__ void store_segment(const Segment<T>& segment, T* row, int64_t start, int64_t width) {
    constexpr int kPer = kPerVector<T>;
    const int shift = misalignment(row), lane = lane_index();
    const int64_t first = start + int64_t(threadIdx.x) * kPer;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
        if (j >= segment.slots) continue;
        const uint4 own = segment.vectors[j];
        const int64_t column = first + j * kStride<T> - shift;
        uint4 v = own;
        if (shift) v = shifted(from_previous_lane(own), own, (kPer - shift) * int(sizeof(T)));
        const bool whole = (lane > 0 || shift == 0) && column + kPer <= width;
        if (whole) store_vector<Streaming>(row + column, v);
        else store_elements(row, column, v, lane == 0 ? shift : 0, kPer, width);
        // The last elements of lane 31 have no next lane to write them.
        if (shift && lane == 31) {
            const uint4 rest = shifted(own, own, (kPer - shift) * int(sizeof(T)));
            store_elements(row, column + kPer, rest, 0, shift, width);
        }
    }
}

}  // namespace fastcalib::cuda
