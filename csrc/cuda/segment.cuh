// A segment of a row in the registers of one block: the only code that reads logits from memory.
//
// A row is cut every 32 KiB, whatever the batch: 256 threads hold 8 vectors of 16 bytes each, all in flight at once.
// Every later pass (maximum, spread, exponentials at K temperatures, places among thresholds) runs over registers, so
// the logits are read once and the maximum is known before the first exponential. Which thread holds which column
// depends on the column alone, also where the row does not start at a multiple of 16 bytes: so results do not depend on
// alignment either.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastcalib::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32, kVectors = 8;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < infinity(); }  // false for NaN
__device__ __forceinline__ int lane_index() { return int(threadIdx.x % 32); }
__device__ __forceinline__ int warp_index() { return int(threadIdx.x / 32); }

// How 16 bytes of logits become float32. T is the storage: float, or 16 bits of a tag type.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// Volatile: else compilers widen a segment once and keep 64 numbers in registers from one pass to the next.
__device__ __forceinline__ void widen(uint32_t word, float (&out)[1], float) { out[0] = __uint_as_float(word); }
__device__ __forceinline__ void widen(uint32_t word, float (&out)[2], BFloat16) {
    asm volatile("shl.b32 %0, %1, 16;" : "=f"(out[0]) : "r"(word));
    asm volatile("and.b32 %0, %1, 0xffff0000;" : "=f"(out[1]) : "r"(word));
}
__device__ __forceinline__ void widen(uint32_t word, float (&out)[2], Float16) {
    asm volatile("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;\n\t}"
        : "=f"(out[0]), "=f"(out[1])
        : "r"(word));
}

// Round to nearest even, like the rest of the field; a NaN stays one.
__device__ __forceinline__ uint32_t narrow(const float (&in)[1], float) { return __float_as_uint(in[0]); }
__device__ __forceinline__ uint32_t narrow(const float (&in)[2], BFloat16) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(in[1]), "f"(in[0]));
    return word;
}
__device__ __forceinline__ uint32_t narrow(const float (&in)[2], Float16) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(in[1]), "f"(in[0]));
    return word;
}

template <class T> constexpr int kPerWord = 4 / int(sizeof(T));
template <class T> constexpr int kPerVector = 16 / int(sizeof(T));
template <class T> constexpr int kStride = kThreads * kPerVector<T>;  // columns of one vector of every thread
template <class T> constexpr int kSegmentLength = kVectors * kStride<T>;

template <class T> __device__ __forceinline__ uint32_t storage_bits(const T& x);
template <> __device__ __forceinline__ uint32_t storage_bits(const float& x) { return __float_as_uint(x); }
template <> __device__ __forceinline__ uint32_t storage_bits(const BFloat16& x) { return x.bits; }
template <> __device__ __forceinline__ uint32_t storage_bits(const Float16& x) { return x.bits; }

// -inf, repeated over a word: what stands where the row has no column. It changes neither a maximum nor a sum of
// powers.
template <class T> constexpr uint32_t kMaskedWord = 0xff800000u;
template <> constexpr uint32_t kMaskedWord<BFloat16> = 0xff80ff80u;
template <> constexpr uint32_t kMaskedWord<Float16> = 0xfc00fc00u;

template <class T> __device__ __forceinline__ uint4 masked_vector() {
    return make_uint4(kMaskedWord<T>, kMaskedWord<T>, kMaskedWord<T>, kMaskedWord<T>);
}

template <class T> __device__ __forceinline__ float to_float(const T& x) {
    float wide[kPerWord<T>];
    widen(storage_bits(x), wide, T());
    return wide[0];
}

__device__ __forceinline__ uint32_t& word_of(uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

template <class T> __device__ __forceinline__ void widen(const uint4& v, float (&out)[kPerVector<T>]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        float part[kPerWord<T>];
        widen(words[w], part, T());
#pragma unroll
        for (int i = 0; i < kPerWord<T>; ++i) out[w * kPerWord<T> + i] = part[i];
    }
}

template <class T> __device__ __forceinline__ uint4 narrow(const float (&in)[kPerVector<T>]) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        float part[kPerWord<T>];
#pragma unroll
        for (int i = 0; i < kPerWord<T>; ++i) part[i] = in[w * kPerWord<T> + i];
        words[w] = narrow(part, T());
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// The 16 bytes that start `bytes` (0 to 15, a multiple of 2) into the 32 bytes of (low, high).
__device__ __forceinline__ uint4 shifted(const uint4& low, const uint4& high, int bytes) {
    uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = bytes & 8 ? w[i + 2] : w[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = bytes & 4 ? w[i + 1] : w[i];
    const int bits = (bytes & 2) * 8;
    return make_uint4(__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
                      __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits));
}

// A choice of words, which stay in registers; of vectors, compilers make a choice of addresses in local memory.
__device__ __forceinline__ uint4 choose(bool first, const uint4& a, const uint4& b) {
    return make_uint4(first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w);
}

__device__ __forceinline__ uint4 from_lane(const uint4& v, int lane) {
    return make_uint4(__shfl_sync(kAllLanes, v.x, lane), __shfl_sync(kAllLanes, v.y, lane),
                      __shfl_sync(kAllLanes, v.z, lane), __shfl_sync(kAllLanes, v.w, lane));
}
__device__ __forceinline__ uint4 from_next_lane(const uint4& v) {
    return make_uint4(__shfl_down_sync(kAllLanes, v.x, 1), __shfl_down_sync(kAllLanes, v.y, 1),
                      __shfl_down_sync(kAllLanes, v.z, 1), __shfl_down_sync(kAllLanes, v.w, 1));
}
__device__ __forceinline__ uint4 from_previous_lane(const uint4& v) {
    return make_uint4(__shfl_up_sync(kAllLanes, v.x, 1), __shfl_up_sync(kAllLanes, v.y, 1),
                      __shfl_up_sync(kAllLanes, v.z, 1), __shfl_up_sync(kAllLanes, v.w, 1));
}

// Elements by which the row is off a multiple of 16 bytes.
template <class T> __device__ __forceinline__ int misalignment(const T* row) {
    return int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// `ReadOnly` says that nobody writes to the row while the kernel runs, which a gradient in its place does.
template <bool ReadOnly, class T> __device__ __forceinline__ uint4 load_vector(const T* row, int64_t column) {
    const uint4* from = reinterpret_cast<const uint4*>(row + column);
    if constexpr (ReadOnly) return __ldg(from);
    else return __ldcg(from);
}

// The same, of what nobody reads after: the caches give its place away first.
template <class T> __device__ __forceinline__ uint4 load_last_time(const T* row, int64_t column) {
    return __ldcs(reinterpret_cast<const uint4*>(row + column));
}

// A vector that hangs over an end of the row: its elements are read one by one, and no byte outside the row is touched.
template <class T> __device__ __forceinline__ uint4 load_elements(const T* row, int64_t column, int64_t vocab) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        words[w] = kMaskedWord<T>;
#pragma unroll
        for (int i = 0; i < kPerWord<T>; ++i) {
            const int64_t at = column + w * kPerWord<T> + i;
            if (at < 0 || at >= vocab) continue;
            if constexpr (kPerWord<T> == 1) words[w] = storage_bits(row[at]);
            else words[w] = (words[w] & ~(0xffffu << 16 * i)) | storage_bits(row[at]) << 16 * i;
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// One vector of every slot from column `first` on, near the ends of the row. Of one thread at most slot 0 hangs over
// the start and one other over the end.
template <bool ReadOnly, class T>
__device__ __forceinline__ void load_at_ends(const T* row, int64_t first, int64_t vocab, uint4 (&out)[kVectors]) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
        const int64_t column = first + j * kStride<T>;
        const bool whole = column >= 0 && column + kPerVector<T> <= vocab;
        out[j] = masked_vector<T>();
        if (whole) out[j] = load_vector<ReadOnly>(row, column);
    }
    if (first < 0) out[0] = load_elements(row, first, vocab);
    const int64_t left = vocab - first, slot = left / kStride<T>, rest = left % kStride<T>;
    if (left <= 0 || slot >= kVectors || rest == 0 || rest >= kPerVector<T> || (slot == 0 && first < 0)) return;
    const uint4 tail = load_elements(row, first + slot * kStride<T>, vocab);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) out[j] = choose(j == slot, tail, out[j]);
}

template <class T> struct Segment {
    static constexpr int kPer = kPerVector<T>;
    uint4 vectors[kVectors];
    int slots;  // vectors of a thread that hold any column

    // Columns [start, start + kSegmentLength) of a row of `vocab`; what is missing is -inf. All lanes take part.
    // `last_time` says that nobody will look at them again. OneAddress saves registers nearly everywhere; ptxas tells.
    template <bool OneAddress = true, bool ReadOnly = true>
    __device__ __forceinline__ void load(const T* row, int64_t start, int64_t vocab, bool last_time = false) {
        const int64_t left = vocab - start;
        slots = left >= kSegmentLength<T> ? kVectors : int((left + kStride<T> - 1) / kStride<T>);
        // Where the row starts `shift` elements behind a multiple of 16 bytes, aligned vectors are read and each lane's
        // columns are cut out of its own and the next lane's.
        const int shift = misalignment(row);
        int64_t first = start + int64_t(threadIdx.x) * kPer - shift;
        // One address and offsets, instead of 8 addresses that wait from segment to segment.
        if constexpr (OneAddress) asm volatile("" : "+l"(first));
        const bool inside = start >= shift && left >= kSegmentLength<T> + (shift ? kPer - shift : 0);
        if (inside && last_time) {
#pragma unroll
            for (int j = 0; j < kVectors; ++j) vectors[j] = load_last_time(row, first + j * kStride<T>);
        } else if (inside) {
#pragma unroll
            for (int j = 0; j < kVectors; ++j) vectors[j] = load_vector<ReadOnly>(row, first + j * kStride<T>);
        } else {
            load_at_ends<ReadOnly>(row, first, vocab, vectors);
        }
        if (shift == 0) return;
        // Lane 31 lacks a neighbour: what it needs for slot j, lane j reads.
        const int lane = lane_index();
        const int64_t column = start + (threadIdx.x / 32 * 32 + 32) * kPer + lane * kStride<T> - shift;
        uint4 extra = make_uint4(0, 0, 0, 0);
        if (lane < slots) {
            if (inside || column + kPer <= vocab) extra = load_vector<ReadOnly>(row, column);
            else extra = load_elements(row, column, vocab);
        }
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            if (j >= slots) {  // the aligned vector may hold the last columns: no padding's, where that is written too
                vectors[j] = masked_vector<T>();
                continue;
            }
            const uint4 next = choose(lane == 31, from_lane(extra, j), from_next_lane(vectors[j]));
            vectors[j] = shifted(vectors[j], next, shift * int(sizeof(T)));
        }
    }

    // Call body(number of the vector, its values) for each vector.
    template <class Body> __device__ __forceinline__ void each_vector(const Body& body) const {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            if (j >= slots) continue;
            float z[kPer];
            widen<T>(vectors[j], z);
            body(j, z);
        }
    }

    // Call body(number of the vector, its values) for each vector, and keep what it leaves there.
    template <class Body> __device__ __forceinline__ void transform(const Body& body) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            if (j >= slots) continue;
            float z[kPer];
            widen<T>(vectors[j], z);
            body(j, z);
            vectors[j] = narrow<T>(z);
        }
    }

    // One value in the real columns and one in the padding, of a segment that starts at column `start`.
    __device__ __forceinline__ void fill(int64_t start, int64_t vocab, float inside, float outside) {
        // 32 bits, one number for all elements: 64 columns of 64 bits each do not fit the registers.
        int left = int(max(int64_t(0), min(int64_t(kSegmentLength<T>), vocab - start))) - int(threadIdx.x) * kPer;
        asm volatile("" : "+r"(left));
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            float z[kPer];
#pragma unroll
            for (int u = 0; u < kPer; ++u) z[u] = j * kStride<T> + u < left ? inside : outside;
            vectors[j] = narrow<T>(z);
        }
    }

    // Column, counted from the start of the segment, of element u of vector j of this thread.
    __device__ __forceinline__ static int column(int j, int u) { return j * kStride<T> + int(threadIdx.x) * kPer + u; }
};

}  // namespace fastcalib::cuda
