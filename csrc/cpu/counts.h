// How often each bit pattern of a 16-bit float occurs in a segment of a row.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../row_state.h"
#include "schedule.h"
#include "simd.h"

namespace fastcalib::FASTCALIB_ISA {

constexpr int64_t kKeys = 65536;        // bit patterns of a 16-bit float
constexpr int64_t kNegative = 32768;    // from here on they have the sign bit
constexpr int64_t kDistinct = 1024;     // values handled at a time at most
constexpr int64_t kKeyGroup = 32;       // keys looked at together
static_assert(kSegment <= 65535, "a count must fit 16 bits");

// Counts of one segment. Those that are read are 0 again afterwards; those of NaN and +inf are never read, and stay. Two copies,
// since neighbours often are the same (-inf above all).
struct Counts {
    std::vector<uint16_t> even, odd;
    alignas(64) uint16_t keys[kDistinct + kKeyGroup];  // those of a chunk
    alignas(64) float count[kDistinct + kKeyGroup];    // and how often they occurred
    int64_t filled = 0;
    int64_t begin = 0, end = 0;  // all magnitudes of the segment lie in between

    FASTCALIB_ONE_BODY void add(const uint16_t* x, int64_t n) {
        if (even.empty()) {
            even.assign(kKeys, 0);
            odd.assign(kKeys, 0);
        }
        uint16_t *a = even.data(), *b = odd.data();
        uint16_t smallest = kNegative - 1, greatest = 0;  // magnitudes: keys without the sign
        int64_t i = 0;
        for (; i + kBlock <= n; i += kBlock) {
            const auto* ahead = reinterpret_cast<const char*>(x + i + kBlock);
            for (int64_t j = i; j < i + kBlock; ++j) {
                const uint16_t magnitude = x[j] & 0x7fff;
                smallest = magnitude < smallest ? magnitude : smallest;
                greatest = magnitude > greatest ? magnitude : greatest;
            }
            for (int64_t j = i; j < i + kBlock; j += 4) {
                if (j % 32 == 0) prefetch(ahead + 2 * (j - i));
                uint64_t four;
                std::memcpy(&four, x + j, 8);
                ++a[four & 0xffff];
                ++b[four >> 16 & 0xffff];
                ++a[four >> 32 & 0xffff];
                ++b[four >> 48];
            }
        }
        for (; i < n; ++i) {
            const uint16_t magnitude = x[i] & 0x7fff;
            smallest = std::min(smallest, magnitude);
            greatest = std::max(greatest, magnitude);
            ++a[x[i]];
        }
        begin = smallest / kKeyGroup * kKeyGroup;
        end = (greatest / kKeyGroup + 1) * kKeyGroup;
    }
    bool occurs(int64_t key) const { return (even[key] | odd[key]) != 0; }
    // How many logits had this bit pattern; forgets them.
    int64_t take(int64_t key) {
        const int64_t n = int64_t(even[key]) + odd[key];
        even[key] = odd[key] = 0;
        return n;
    }
    // The largest number of those whose keys, but for the sign, are below `finite`; -1 if there is none.
    template <class S> int64_t largest(int64_t finite) const {
        int64_t first = std::min(end, finite) - kKeyGroup;
        while (first >= begin && !S::any_of_32(&even[first], &odd[first])) first -= kKeyGroup;
        if (first >= begin) {
            int64_t key = first + kKeyGroup - 1;
            while (!occurs(key)) --key;
            return key;
        }
        for (int64_t key = kNegative + begin; key < kNegative + std::min(end, finite); ++key)
            if (occurs(key)) return key;
        return -1;
    }
    // Calls use() for chunk after chunk of the keys below `finite` with one sign that occurred, and forgets them.
    template <class S, class Use> FC_INLINE void for_each_chunk(int64_t sign, int64_t finite, const Use& use) {
        for (int64_t first = sign + begin; first < sign + std::min(end, finite); first += kKeyGroup) {
            uint16_t *a = &even[first], *b = &odd[first];
            if (!S::any_of_32(a, b)) continue;
            for (int64_t i = 0; i < kKeyGroup; i += S::key_lanes)
                filled += S::keep_counted(a + i, b + i, uint16_t(first + i), keys + filled, count + filled);
            std::memset(a, 0, 2 * kKeyGroup);
            std::memset(b, 0, 2 * kKeyGroup);
            if (filled > kTerms * S::lanes - kKeyGroup) use(), filled = 0;
        }
        if (filled) use(), filled = 0;
    }
};

}  // namespace fastcalib::FASTCALIB_ISA
