// What this machine's memory allows: the denominators of every ratio in the benchmark.
//
// Plain C++ with `omp simd`, compiled on the fly by bench/ceilings.py (-O3 -march=native -fopenmp) and called through
// ctypes. Nothing here belongs to the product: the yardstick must not improve when the product does.
//
// Each function splits the array into one contiguous part per thread.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLanes = 64;             // elements per step: several vectors, so that the additions overlap
constexpr int64_t kPrefetchBytes = 4096;   // how far ahead the "best" read prefetches
constexpr int64_t kLine = 64;

inline float load(const float* p) { return *p; }
inline float load(const uint16_t* p) { return std::bit_cast<float>(static_cast<uint32_t>(*p) << 16); }  // bfloat16

// Sum of one step of kLanes elements into the accumulators.
template <class T>
inline void add_step(const T* p, float* acc) {
#pragma omp simd
  for (int64_t j = 0; j < kLanes; ++j) acc[j] += load(p + j);
}

template <class T>
double finish(const float* acc, const T* p, int64_t from, int64_t n) {
  double total = 0;
  for (int64_t j = 0; j < kLanes; ++j) total += acc[j];
  for (int64_t i = from; i < n; ++i) total += load(p + i);
  return total;
}

// One stream, no prefetch instruction: what a simple loop over the array reaches.
template <class T>
double sum_plain(const T* p, int64_t n) {
  float acc[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add_step(p + i, acc);
  return finish(acc, p, i, n);
}

// Four streams, prefetched: the fastest read we know how to write.
template <class T>
double sum_best(const T* p, int64_t n) {
  constexpr int kStreams = 4;
  const int64_t quarter = n / kStreams / kLanes * kLanes;
  float acc[kLanes] = {};
  for (int64_t i = 0; i < quarter; i += kLanes) {
    for (int s = 0; s < kStreams; ++s) {
      const T* q = p + s * quarter + i;
      for (int64_t b = 0; b < kLanes * static_cast<int64_t>(sizeof(T)); b += kLine)
        __builtin_prefetch(reinterpret_cast<const char*>(q) + b + kPrefetchBytes, 0, 3);
      add_step(q, acc);
    }
  }
  int64_t i = kStreams * quarter;
  for (; i + kLanes <= n; i += kLanes) add_step(p + i, acc);
  return finish(acc, p, i, n);
}

// Calls f(begin, end) once per thread on parts whose borders are multiples of `grain`.
template <class F>
void split(int64_t n, int threads, int64_t grain, F f) {
  const int64_t part = ((n + threads - 1) / threads + grain - 1) / grain * grain;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    const int64_t begin = std::min<int64_t>(n, t * part), end = std::min<int64_t>(n, begin + part);
    if (begin < end) f(t, begin, end);
  }
}

template <class T, class Sum>
double read(const void* data, int64_t n, int threads, Sum sum) {
  double parts[1024] = {};
  const T* p = static_cast<const T*>(data);
  split(n, std::min(threads, 1024), kLanes, [&](int t, int64_t a, int64_t b) { parts[t] = sum(p + a, b - a); });
  double total = 0;
  for (double x : parts) total += x;
  return total;
}

// What the arithmetic alone costs: the sums that the statistics of one temperature are made of (`moments`), only the sum of
// exponentials, or the gradient (one exponential and one product stored), over a block that stays in the first-level cache,
// as often as the array is long. No tails, no special values: what any kernel of these results has to do at least.
constexpr int64_t kInCache = 2048;

#if defined(__AVX512F__)
using Vec = __m512;
constexpr int64_t kVec = 16;
inline Vec set(float v) { return _mm512_set1_ps(v); }
inline Vec vload(const float* p) { return _mm512_loadu_ps(p); }
inline Vec vload(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
// 32 bfloat16 in any order: even ones, then odd ones.
inline void vload2(const float* p, Vec& a, Vec& b) { a = vload(p), b = vload(p + kVec); }
inline void vload2(const uint16_t* p, Vec& a, Vec& b) {
  const __m512i raw = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
inline void vstore(float* p, Vec v) { _mm512_storeu_ps(p, v); }
#if defined(__AVX512BF16__)
inline void vstore(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
}
#else
inline void vstore(uint16_t* p, Vec v) {
  const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
#endif
inline Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float total(Vec v) { return _mm512_reduce_add_ps(v); }
inline Vec exp2v(Vec t) {
  const Vec n = _mm512_roundscale_ps(t, 8), f = t - n;
  Vec p = set(0.0013265f) * f + set(0.0096715f);
  p = p * f + set(0.0555073f);
  p = p * f + set(0.2402224f);
  p = p * f + set(0.6931470f);
  return _mm512_scalef_ps(p * f + set(1.f), n);
}
#else
constexpr int64_t kVec = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IVec __attribute__((vector_size(64)));
inline Vec set(float v) { return Vec{} + v; }
template <class T> inline Vec vload(const T* p) {
  Vec v;
  for (int j = 0; j < kVec; ++j) v[j] = load(p + j);
  return v;
}
template <class T> inline void vload2(const T* p, Vec& a, Vec& b) { a = vload(p), b = vload(p + kVec); }
inline void vstore(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void vstore(uint16_t* p, Vec v) {
  const IVec u = (IVec)v, r = (u + ((u >> 16) & 1) + 0x7fff) >> 16;
  for (int j = 0; j < kVec; ++j) p[j] = static_cast<uint16_t>(r[j]);
}
inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
inline float total(Vec v) {
  float sum = 0;
  for (int j = 0; j < kVec; ++j) sum += v[j];
  return sum;
}
inline Vec exp2v(Vec t) {
  const Vec r = t + 12582912.f, f = t - (r - 12582912.f);
  Vec p = 0.0013265f * f + 0.0096715f;
  p = p * f + 0.0555073f;
  p = p * f + 0.2402224f;
  p = p * f + 0.6931470f;
  return (Vec)((IVec)(p * f + 1.f) + ((IVec)r << 23));
}
#endif

template <class T, bool Moments>
__attribute__((noinline)) float sums_in_cache(const T* x, float max) {
  constexpr int kChains = 2;
  Vec s0[kChains], s1[kChains], s2[kChains], r2[kChains], sum[kChains], square[kChains], top[kChains];
  for (int u = 0; u < kChains; ++u) s0[u] = s1[u] = s2[u] = r2[u] = sum[u] = square[u] = top[u] = set(0.f);
  const Vec m = set(max), c = set(1.4426950f), least = set(-126.f), center = set(0.1f);
  for (int64_t i = 0; i < kInCache; i += kVec * kChains) {
    Vec pair[kChains];
    vload2(x + i, pair[0], pair[1]);
    for (int u = 0; u < kChains; ++u) {
      const Vec z = pair[u], t = vmax((z - m) * c, least), e = exp2v(t);
      top[u] = vmax(z, top[u]);
      s0[u] = s0[u] + e;
      if (!Moments) continue;
      const Vec d = z - center, et = e * t;
      s1[u] = s1[u] + et;
      s2[u] = s2[u] + et * t;
      r2[u] = r2[u] + e * e;
      sum[u] = sum[u] + d;
      square[u] = square[u] + d * d;
    }
  }
  Vec all = set(0.f);
  for (int u = 0; u < kChains; ++u) all = all + s0[u] + s1[u] + s2[u] + r2[u] + sum[u] + square[u] + top[u];
  return total(all);
}

// Eight temperatures whose inverses are evenly spaced: two exponentials an element, every other power by one product, and the
// four sums of each temperature. In two groups of four, as many sums as fit the registers.
__attribute__((noinline)) float powers_in_cache(const float* x, float max) {
  alignas(64) float below[kInCache], power[kInCache], ratio[kInCache];
  const Vec m = set(max), first = set(0.36f), step = set(0.72f), least = set(-300.f);
  for (int64_t i = 0; i < kInCache; i += kVec) {
    const Vec y = vmax(vload(x + i) - m, least);
    vstore(below + i, y);
    vstore(power + i, exp2v(y * first));
    vstore(ratio + i, exp2v(y * step));
  }
  Vec all = set(0.f);
  for (int group = 0; group < 2; ++group) {
    Vec s0[4], s1[4], s2[4], r2[4];
    for (int g = 0; g < 4; ++g) s0[g] = s1[g] = s2[g] = r2[g] = set(0.f);
    for (int64_t i = 0; i < kInCache; i += kVec) {
      const Vec y = vload(below + i), w = vload(ratio + i), y2 = y * y;
      Vec e = vload(power + i);
      for (int g = 0; g < 4; ++g) {
        s0[g] = s0[g] + e;
        s1[g] = s1[g] + e * y;
        s2[g] = s2[g] + e * y2;
        r2[g] = r2[g] + e * e;
        e = e * w;
      }
      if (group == 0) vstore(power + i, e);
    }
    for (int g = 0; g < 4; ++g) all = all + s0[g] + s1[g] + s2[g] + r2[g];
  }
  return total(all);
}

template <class T>
__attribute__((noinline)) void gradient_in_cache(const T* x, T* out, float shift, float factor) {
  const Vec m = set(shift), c = set(1.4426950f), least = set(-126.f), scale = set(factor);
  for (int64_t i = 0; i < kInCache; i += 2 * kVec)
    for (int u = 0; u < 2; ++u) {
      const int64_t at = i + u * kVec;
      vstore(out + at, scale * exp2v(vmax((vload(x + at) - m) * c, least)));
    }
}

template <class T>
double arithmetic(int64_t n, int threads, int kind) {
  double parts[1024] = {};
  split(n, std::min(threads, 1024), kInCache, [&](int t, int64_t a, int64_t b) {
    alignas(64) T x[kInCache], out[kInCache];
    for (int64_t i = 0; i < kInCache; ++i) {
      const float v = static_cast<float>((i * 2654435761u >> 8) & 0xffff) / 65536.f * 20.f - 10.f;
      if constexpr (sizeof(T) == 4) x[i] = v;
      else x[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(v) >> 16);
    }
    float sum = 0;
    for (int64_t i = a; i < b; i += kInCache) {
      if (kind == 0) sum += sums_in_cache<T, true>(x, 12.f + sum * 0.f);
      else if (kind == 1) sum += sums_in_cache<T, false>(x, 12.f + sum * 0.f);
      else if (kind == 3) {
        if constexpr (sizeof(T) == 4) sum += powers_in_cache(x, 12.f + sum * 0.f);
      }
      else gradient_in_cache(x, out, 12.f, static_cast<float>(i)), sum += static_cast<float>(out[i % kInCache]);
    }
    parts[t] = sum;
  });
  double sum = 0;
  for (double p : parts) sum += p;
  return sum;
}

}  // namespace

extern "C" {

// kind: 0 all sums of the statistics, 1 the sum of exponentials alone, 2 the gradient, 3 eight evenly spaced 1/T
// (float32 only). n: elements.
double ceiling_arithmetic(int64_t n, int threads, int dtype, int kind) {
  return dtype == 1 ? arithmetic<uint16_t>(n, threads, kind) : arithmetic<float>(n, threads, kind);
}

// dtype: 0 float32, 1 bfloat16. best: 0 one stream, 1 four streams with prefetch. n: elements.
double ceiling_read(const void* data, int64_t n, int threads, int dtype, int best) {
  if (dtype == 1)
    return best ? read<uint16_t>(data, n, threads, sum_best<uint16_t>)
                : read<uint16_t>(data, n, threads, sum_plain<uint16_t>);
  return best ? read<float>(data, n, threads, sum_best<float>) : read<float>(data, n, threads, sum_plain<float>);
}

// Reads and writes every 32-bit word where it is. With mask 0 the contents survive (the compiler cannot know).
void ceiling_readwrite(void* data, int64_t nbytes, int threads, uint32_t mask) {
  uint32_t* p = static_cast<uint32_t*>(data);
  split(nbytes / 4, threads, 16, [&](int, int64_t a, int64_t b) {
#pragma omp simd
    for (int64_t i = a; i < b; ++i) p[i] ^= mask;
  });
}

// 1 if ceiling_copy really uses non-temporal stores here, else it is an ordinary copy.
int ceiling_has_nontemporal() {
#if defined(__AVX__)
  return 1;
#else
  return 0;
#endif
}

// Copies with stores that bypass the cache; dst must be 64-byte aligned for that, else it falls back to ordinary stores.
void ceiling_copy(void* dst, const void* src, int64_t nbytes, int threads, int nontemporal) {
  char* d = static_cast<char*>(dst);
  const char* s = static_cast<const char*>(src);
  const bool stream = nontemporal && reinterpret_cast<uintptr_t>(dst) % kLine == 0;
  split(nbytes, threads, kLine, [&](int, int64_t a, int64_t b) {
    int64_t i = a;
#if defined(__AVX512F__)
    if (stream) {
      for (; i + 64 <= b; i += 64) {
        _mm_prefetch(s + i + kPrefetchBytes, _MM_HINT_T0);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(d + i), _mm512_loadu_si512(s + i));
      }
      _mm_sfence();
    }
#elif defined(__AVX__)
    if (stream) {
      for (; i + 64 <= b; i += 64) {
        _mm_prefetch(s + i + kPrefetchBytes, _MM_HINT_T0);
        for (int k = 0; k < 64; k += 32)
          _mm256_stream_si256(reinterpret_cast<__m256i*>(d + i + k),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + i + k)));
      }
      _mm_sfence();
    }
#else
    (void)stream;
#endif
    if (i < b) std::memcpy(d + i, s + i, static_cast<size_t>(b - i));
  });
}

}  // extern "C"
