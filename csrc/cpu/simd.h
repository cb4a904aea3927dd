// The SIMD layer: one vector type F32 with the few operations the kernels need, and F64, a scalar stand-in with the same
// face for float64 logits. Arithmetic itself is written with + - * on the compiler's vector types.
// Compiled once per instruction set; FASTCALIB_ISA names the namespace.
#pragma once
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FC_INLINE inline __attribute__((always_inline))

namespace fastcalib::FASTCALIB_ISA {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

FC_INLINE float to_real(float v) { return v; }
FC_INLINE double to_real(double v) { return v; }
FC_INLINE float to_real(bfloat16 v) { return std::bit_cast<float>(uint32_t(v.bits) << 16); }
FC_INLINE float to_real(float16 v) {
    const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
    if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
    if (rest < 0x400) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(float(rest) * 0x1p-24f));  // subnormal
    return std::bit_cast<float>(sign | ((rest << 13) + (112u << 23)));
}
template <class T> FC_INLINE T from_real(double v);
template <> FC_INLINE float from_real<float>(double v) { return float(v); }
template <> FC_INLINE double from_real<double>(double v) { return v; }
FC_INLINE bfloat16 round_bfloat16(float v) {
    const uint32_t u = std::bit_cast<uint32_t>(v);
    if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t(0x7fc0)};
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
FC_INLINE float16 round_float16(float v) {
    const uint32_t u = std::bit_cast<uint32_t>(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to inf
    if (magnitude < 0x38800000) {                                    // subnormal: let the adder round
        const float r = std::bit_cast<float>(magnitude) + 0.5f;
        return {uint16_t(sign | (std::bit_cast<uint32_t>(r) - 0x3f000000))};
    }
    return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
}
template <> FC_INLINE bfloat16 from_real<bfloat16>(double v) { return round_bfloat16(float(v)); }
template <> FC_INLINE float16 from_real<float16>(double v) { return round_float16(float(v)); }

// Flush results to zero for the life of a kernel on this thread: products of tiny probabilities would run 20 times slower.
// Inputs are left alone, so that comparisons still tell a denormal logit from 0.
struct FlushDenormals {
#if defined(__x86_64__)
    unsigned saved = _mm_getcsr();
    FlushDenormals() { _mm_setcsr((saved | 0x8000) & ~0x40u); }
    ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

FC_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// 2^f on [-1/2, 1/2], relative error 9e-8 (minimax, degree 5).
template <class V> FC_INLINE V exp2_fraction(V f, V c5, V c4, V c3, V c2, V c1, V one) {
    V p = c5 * f + c4;
    p = p * f + c3;
    p = p * f + c2;
    p = p * f + c1;
    return p * f + one;
}

struct F32 {
    using real = float;
#if defined(__AVX512F__)
    using vec = __m512;
    static constexpr int lanes = 16;
    static constexpr int chains = 2;  // independent accumulators: hides the latency of additions
    static FC_INLINE vec set(float v) { return _mm512_set1_ps(v); }
    static FC_INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
    static FC_INLINE vec load(const bfloat16* p) {
        const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
    static FC_INLINE vec load(const float16* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    // 32 logits in an order of their own: the even ones, then the odd ones. Half the work of two loads in order.
    static FC_INLINE void load_any_order(const bfloat16* p, vec& even, vec& odd) {
        const __m512i raw = _mm512_loadu_si512(p);
        even = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
        odd = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(int32_t(0xffff0000))));
    }
#if defined(__AVX512BF16__)
    static FC_INLINE __m256i narrow_bfloat16(vec v) { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
    static FC_INLINE __m256i narrow_bfloat16(vec v) {
        const __m512i u = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
        r = _mm512_srli_epi32(r, 16);
        r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
        return _mm512_cvtepi32_epi16(r);
    }
#endif
    static FC_INLINE void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
    static FC_INLINE void store(bfloat16* p, vec v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(v));
    }
    static FC_INLINE void store(float16* p, vec v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
    }
#if defined(__AVX512BF16__)
    static FC_INLINE __m512i narrow_pair(vec a, vec b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }
#else
    // Two vectors of numbers that are no NaN, rounded to bfloat16 as one full line: the upper halves are picked by one permute.
    static FC_INLINE __m512i narrow_pair(vec a, vec b) {
        const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff);
        __m512i u = _mm512_castps_si512(a), v = _mm512_castps_si512(b);
        u = _mm512_add_epi32(_mm512_add_epi32(u, half), _mm512_and_si512(_mm512_srli_epi32(u, 16), one));
        v = _mm512_add_epi32(_mm512_add_epi32(v, half), _mm512_and_si512(_mm512_srli_epi32(v, 16), one));
        alignas(64) static constexpr uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                         33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
        return _mm512_permutex2var_epi16(u, _mm512_load_si512(odd), v);
    }
#endif
    static FC_INLINE void store_pair(bfloat16* p, vec a, vec b) { _mm512_storeu_si512(p, narrow_pair(a, b)); }
    static FC_INLINE void stream_pair(bfloat16* p, vec a, vec b) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow_pair(a, b));
    }
    static FC_INLINE void stream(float* p, vec v) { _mm512_stream_ps(p, v); }
    static FC_INLINE void stream(bfloat16* p, vec v) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(v));
    }
    static FC_INLINE void stream(float16* p, vec v) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
    }
    // a where a > b, else b: a NaN in a is replaced, a NaN in b stays.
    static FC_INLINE vec max(vec a, vec b) { return _mm512_max_ps(a, b); }
    static FC_INLINE float reduce_max(vec v) { return _mm512_reduce_max_ps(v); }
    static FC_INLINE double reduce_add(vec v) {
        const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
        return _mm512_reduce_add_pd(
            _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(high)));
    }
    static FC_INLINE bool any_not_less(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ) != 0; }
    static FC_INLINE vec where_greater(vec a, vec b, vec v) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), v);
    }
    static FC_INLINE vec where_not_greater(vec a, vec b, vec v) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NGT_UQ), v);
    }
    // 2^t for t in [-126, 127].
    static constexpr bool exp2_passes_nan = true;
    static FC_INLINE vec exp2(vec t) {
        const vec n = _mm512_roundscale_ps(t, 8);
        return _mm512_scalef_ps(poly(t - n), n);
    }
    // 2^t for any finite t <= 127; 2^-126 or less below -126. Runs under FlushDenormals, as does the next.
    static FC_INLINE vec exp2_finite(vec t) { return exp2(t); }
    // 2^t, exactly 0 below -126 (t may be -inf), for t <= 127.
    static FC_INLINE vec exp2_or_zero(vec t) { return exp2(_mm512_max_ps(t, set(-200.f))); }
    static FC_INLINE float* compress_not_less(float* out, vec v, vec bound) {
        const __mmask16 m = _mm512_cmp_ps_mask(v, bound, _CMP_GE_OQ);
        _mm512_storeu_ps(out, _mm512_maskz_compress_ps(m, v));
        return out + __builtin_popcount(m);
    }
    // Counters of 32 keys, in two copies: is any not 0?
    static FC_INLINE bool any_of_32(const uint16_t* a, const uint16_t* b) {
        const __m512i either = _mm512_or_si512(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
        return _mm512_test_epi64_mask(either, either) != 0;
    }
    // Of 16 keys from `first` on those with a count: the keys and their counts; returns how many.
    static constexpr int key_lanes = 16;
    static FC_INLINE int keep_counted(const uint16_t* a, const uint16_t* b, uint16_t first, uint16_t* key, float* count) {
        const auto wide = [](const uint16_t* p) __attribute__((always_inline)) {
            return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        };
        const __m512i n = _mm512_add_epi32(wide(a), wide(b));
        const __mmask16 some = _mm512_test_epi32_mask(n, n);
        const __m512i up = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i keys = _mm512_maskz_compress_epi32(some, _mm512_add_epi32(_mm512_set1_epi32(first), up));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(key), _mm512_cvtepi32_epi16(keys));
        _mm512_storeu_ps(count, _mm512_maskz_compress_ps(some, _mm512_cvtepi32_ps(n)));
        return __builtin_popcount(some);
    }
    using count = __m512i;
    static FC_INLINE count no_count() { return _mm512_setzero_si512(); }
    static FC_INLINE count add_greater(count n, vec a, vec b) {
        return _mm512_mask_sub_epi32(n, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), n, _mm512_set1_epi32(-1));
    }
    static FC_INLINE count add_not_less(count n, vec a, vec b) {
        return _mm512_mask_sub_epi32(n, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), n, _mm512_set1_epi32(-1));
    }
    static FC_INLINE int64_t total(count n) { return _mm512_reduce_add_epi32(n); }
    static constexpr bool has_gather = true;
    using index = __m512i;
    static FC_INLINE index load_index(const int32_t* p) { return _mm512_loadu_si512(p); }
    static FC_INLINE void store_index(int32_t* p, index i) { _mm512_storeu_si512(p, i); }
    static FC_INLINE index gather(const int32_t* base, index i) { return _mm512_i32gather_epi32(i, base, 4); }
    static FC_INLINE vec gather(const float* base, index i) { return _mm512_i32gather_ps(i, base, 4); }
    // Truncated to [0, top]; 0 for a NaN.
    static FC_INLINE index truncate_within(vec x, vec top) {
        return _mm512_cvttps_epi32(_mm512_min_ps(_mm512_max_ps(x, _mm512_setzero_ps()), top));
    }
    static FC_INLINE index add_where_less(index i, vec a, vec b, int32_t n) {
        return _mm512_mask_add_epi32(i, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), i, _mm512_set1_epi32(n));
    }
    static FC_INLINE index twice_plus_equal(index i, vec a, vec b) {
        const index two = _mm512_add_epi32(i, i);
        return _mm512_mask_sub_epi32(two, _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), two, _mm512_set1_epi32(-1));
    }
#elif defined(__AVX2__)
    using vec = __m256;
    static constexpr int lanes = 8;
    static constexpr int chains = 2;
    static FC_INLINE vec set(float v) { return _mm256_set1_ps(v); }
    static FC_INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
    static FC_INLINE vec load(const bfloat16* p) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    }
    static FC_INLINE vec load(const float16* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static FC_INLINE void load_any_order(const bfloat16* p, vec& even, vec& odd) {
        const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        even = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
        odd = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(int32_t(0xffff0000))));
    }
    static FC_INLINE __m128i narrow_bfloat16(vec v) {
        const __m256i u = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
        return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    }
    static FC_INLINE void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
    static FC_INLINE void store(bfloat16* p, vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bfloat16(v)); }
    static FC_INLINE void store(float16* p, vec v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
    }
    static FC_INLINE void stream(float* p, vec v) { _mm256_stream_ps(p, v); }
    static FC_INLINE void stream(bfloat16* p, vec v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bfloat16(v)); }
    static FC_INLINE void stream(float16* p, vec v) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
    }
    static FC_INLINE vec max(vec a, vec b) { return _mm256_max_ps(a, b); }
    static FC_INLINE bool any_not_less(vec a, vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)) != 0; }
    static FC_INLINE vec where_greater(vec a, vec b, vec v) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), v); }
    static FC_INLINE vec where_not_greater(vec a, vec b, vec v) {
        return _mm256_andnot_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), v);
    }
    using count = __m256i;
    static FC_INLINE count no_count() { return _mm256_setzero_si256(); }
    static FC_INLINE count add_greater(count n, vec a, vec b) {
        return _mm256_sub_epi32(n, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
    }
    static FC_INLINE count add_not_less(count n, vec a, vec b) {
        return _mm256_sub_epi32(n, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
    }
    static constexpr bool has_gather = true;
    using index = __m256i;
    static FC_INLINE index load_index(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static FC_INLINE void store_index(int32_t* p, index i) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), i); }
    static FC_INLINE index gather(const int32_t* base, index i) { return _mm256_i32gather_epi32(base, i, 4); }
    static FC_INLINE vec gather(const float* base, index i) { return _mm256_i32gather_ps(base, i, 4); }
    static FC_INLINE index truncate_within(vec x, vec top) {
        return _mm256_cvttps_epi32(_mm256_min_ps(_mm256_max_ps(x, _mm256_setzero_ps()), top));
    }
    static FC_INLINE index add_where_less(index i, vec a, vec b, int32_t n) {
        const index less = _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ));
        return _mm256_add_epi32(i, _mm256_and_si256(less, _mm256_set1_epi32(n)));
    }
    static FC_INLINE index twice_plus_equal(index i, vec a, vec b) {
        return _mm256_sub_epi32(_mm256_add_epi32(i, i), _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
    }
    using integers = __m256i;
    static FC_INLINE integers as_integers(vec v) { return _mm256_castps_si256(v); }
    static FC_INLINE vec add_exponent(vec p, integers n) {
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(n, 23)));
    }
#else
    // Baseline: four lanes of the compiler's own vectors, SSE2 on x86-64 and NEON on aarch64 from the same lines.
    typedef float vec __attribute__((vector_size(16)));
    typedef int32_t count __attribute__((vector_size(16)));
    typedef float unaligned_vec __attribute__((vector_size(16), aligned(4), may_alias));
    static constexpr int lanes = 4;
    static constexpr int chains = 2;
    static FC_INLINE vec set(float v) { return vec{v, v, v, v}; }
    static FC_INLINE vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
    template <class T> static FC_INLINE vec load(const T* p) {
        return vec{to_real(p[0]), to_real(p[1]), to_real(p[2]), to_real(p[3])};
    }
    static FC_INLINE void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }
    template <class T> static FC_INLINE void store(T* p, vec v) {
        for (int i = 0; i < 4; ++i) p[i] = from_real<T>(v[i]);
    }
    template <class T> static FC_INLINE void stream(T* p, vec v) { store(p, v); }
    static FC_INLINE vec max(vec a, vec b) { return a > b ? a : b; }
    static FC_INLINE bool any(count m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
    static FC_INLINE bool any_not_less(vec a, vec b) { return any(a >= b); }
    static FC_INLINE vec where_greater(vec a, vec b, vec v) { return (vec)((a > b) & (count)v); }
    static FC_INLINE vec where_not_greater(vec a, vec b, vec v) { return (vec)(~(a > b) & (count)v); }
    static constexpr bool has_gather = false;
    static FC_INLINE count no_count() { return count{0, 0, 0, 0}; }
    static FC_INLINE count add_greater(count n, vec a, vec b) { return n - (a > b); }
    static FC_INLINE count add_not_less(count n, vec a, vec b) { return n - (a >= b); }
    typedef uint32_t integers __attribute__((vector_size(16)));  // they may wrap around: see sum_once
    static FC_INLINE integers as_integers(vec v) { return (integers)v; }
    static FC_INLINE vec add_exponent(vec p, integers n) { return (vec)((integers)p + (n << 23)); }
#endif

#if !defined(__AVX512F__)
    static FC_INLINE double reduce_add(vec v) {
        float value[lanes];
        std::memcpy(value, &v, sizeof v);
        double sum = 0;
        for (int i = 0; i < lanes; ++i) sum += value[i];
        return sum;
    }
    static FC_INLINE float reduce_max(vec v) {
        float top = v[0];
        for (int i = 1; i < lanes; ++i) top = v[i] > top ? v[i] : top;
        return top;
    }
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    static constexpr bool exp2_passes_nan = false;  // the sum of integers may turn its bits into a number's
    static FC_INLINE vec exp2(vec t) {
        const vec magic = set(12582912.f), r = t + magic;
        return add_exponent(poly(t - (r - magic)), as_integers(r));
    }
    static FC_INLINE vec exp2_finite(vec t) { return exp2(max(t, set(lowest_exponent))); }
    static FC_INLINE vec exp2_or_zero(vec t) {
        const vec lowest = set(-126.f);
        return where_greater(t, lowest, exp2(max(t, lowest)));
    }
    static FC_INLINE float* compress_not_less(float* out, vec v, vec bound) {
        alignas(32) float value[lanes], least[lanes];
        store(value, v);
        store(least, bound);
        for (int i = 0; i < lanes; ++i) {
            *out = value[i];
            out += value[i] >= least[i];
        }
        return out;
    }
    static FC_INLINE int64_t total(count n) {
        int32_t value[lanes];
        std::memcpy(value, &n, sizeof value);
        int64_t sum = 0;
        for (int i = 0; i < lanes; ++i) sum += value[i];
        return sum;
    }
#endif
#if !defined(__AVX512F__)
    static FC_INLINE bool any_of_32(const uint16_t* a, const uint16_t* b) {
        uint64_t words[16], any = 0;
        std::memcpy(words, a, 64);
        std::memcpy(words + 8, b, 64);
        for (const uint64_t word : words) any |= word;
        return any != 0;
    }
    static constexpr int key_lanes = 1;
    static FC_INLINE int keep_counted(const uint16_t* a, const uint16_t* b, uint16_t first, uint16_t* key, float* count) {
        const int n = int(*a) + int(*b);
        *key = first;
        *count = float(n);
        return n != 0;
    }
#endif
    template <class T> static FC_INLINE void load_any_order(const T* p, vec& a, vec& b) {
        a = load(p);
        b = load(p + lanes);
    }
    template <class T> static FC_INLINE void store_pair(T* p, vec a, vec b) {
        store(p, a);
        store(p + lanes, b);
    }
    template <class T> static FC_INLINE void stream_pair(T* p, vec a, vec b) {
        stream(p, a);
        stream(p + lanes, b);
    }
    static FC_INLINE vec poly(vec f) {
        return exp2_fraction(f, set(0.001326472731307149f), set(0.009671512991189957f), set(0.05550733581185341f),
                             set(0.24022242426872253f), set(0.6931470036506653f), set(1.f));
    }
    static constexpr float lowest = -FLT_MAX;
    static constexpr float lowest_exponent = -126.f;
};

// float64 logits run the same kernels one number at a time on the C library's exp2: exact rather than fast.
struct F64 {
    using real = double;
    using vec = double;
    static constexpr int lanes = 1;
    static constexpr int chains = 1;
    static FC_INLINE vec set(double v) { return v; }
    static FC_INLINE vec load(const double* p) { return *p; }
    static FC_INLINE void store(double* p, vec v) { *p = v; }
    static FC_INLINE void stream(double* p, vec v) { *p = v; }
    static FC_INLINE void store_pair(double* p, vec a, vec b) { p[0] = a, p[1] = b; }
    static FC_INLINE void stream_pair(double* p, vec a, vec b) { p[0] = a, p[1] = b; }
    static FC_INLINE vec max(vec a, vec b) { return a > b ? a : b; }
    static FC_INLINE double reduce_max(vec v) { return v; }
    static FC_INLINE bool any_not_less(vec a, vec b) { return a >= b; }
    static FC_INLINE vec where_greater(vec a, vec b, vec v) { return a > b ? v : 0.0; }
    static FC_INLINE vec where_not_greater(vec a, vec b, vec v) { return a > b ? 0.0 : v; }
    static FC_INLINE vec exp2(vec t) { return ::exp2(t); }
    static FC_INLINE vec exp2_finite(vec t) { return ::exp2(t); }
    static FC_INLINE vec exp2_or_zero(vec t) { return t > lowest_exponent ? ::exp2(t) : 0.0; }
    static FC_INLINE double* compress_not_less(double* out, vec v, vec bound) {
        *out = v;
        return out + (v >= bound);
    }
    static constexpr bool has_gather = false;
    using count = int64_t;
    static FC_INLINE count no_count() { return 0; }
    static FC_INLINE count add_greater(count n, vec a, vec b) { return n + (a > b); }
    static FC_INLINE count add_not_less(count n, vec a, vec b) { return n + (a >= b); }
    static FC_INLINE int64_t total(count n) { return n; }
    static FC_INLINE double reduce_add(vec v) { return v; }
    static constexpr double lowest = -DBL_MAX;
    static constexpr double lowest_exponent = -1022.0;
};

template <class T> struct SimdOf {
    using type = F32;
};
template <> struct SimdOf<double> {
    using type = F64;
};

}  // namespace fastcalib::FASTCALIB_ISA
