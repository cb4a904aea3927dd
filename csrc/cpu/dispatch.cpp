#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastcalib {

namespace baseline {
extern const Kernels kernels;
}
#if defined(FASTCALIB_HAVE_AVX2)
namespace avx2 {
extern const Kernels kernels;
}
#endif
#if defined(FASTCALIB_HAVE_AVX512)
namespace avx512 {
extern const Kernels kernels;
}
#endif
#if defined(FASTCALIB_HAVE_AVX512BF16)
namespace avx512bf16 {
extern const Kernels kernels;
}
#endif

namespace {

// What -march=x86-64-v3 and -v4 let the compiler use, as far as our loops could.
std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> found;
#if defined(FASTCALIB_HAVE_AVX512)
    const bool avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx2") &&
        __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#if defined(FASTCALIB_HAVE_AVX512BF16)
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512bf16::kernels);
#endif
    if (avx512) found.push_back(&avx512::kernels);
#endif
#if defined(FASTCALIB_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("bmi2"))
        found.push_back(&avx2::kernels);
#endif
    found.push_back(&baseline::kernels);
    return found;
}

const Kernels* find(const std::string& name) {
    std::string names;
    for (const Kernels* k : runnable()) {
        if (name == k->name) return k;
        names += names.empty() ? k->name : std::string(", ") + k->name;
    }
    throw std::invalid_argument("instruction set '" + name + "' is not one that this build and machine have: " + names);
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* k : runnable()) names.push_back(k->name);
    return names;
}

const Kernels& kernels() {
    const Kernels* k = chosen.load(std::memory_order_acquire);
    if (!k) {
        const char* name = std::getenv("FASTCALIB_ISA");
        k = name && *name ? find(name) : runnable().front();
        chosen.store(k, std::memory_order_release);
    }
    return *k;
}

void set_isa(const std::string& name) { chosen.store(find(name), std::memory_order_release); }

}  // namespace fastcalib
