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

}  // namespace

extern "C" {

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
