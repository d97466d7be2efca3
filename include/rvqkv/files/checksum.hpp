// SPDX-License-Identifier: MIT
/// @file
/// The checksum of rvqkv's own files: XXH3 with 64 bits, written as 16 lower-case hexadecimal digits.
#pragma once

#include "rvqkv/core/config.hpp"

#include <compare>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#endif
#include <xxhash.h>

RVQKV_NAMESPACE_BEGIN

/// XXH3-64 (seed 0) of bytes that arrive piece by piece; the same as Python's `xxhash.xxh3_64_hexdigest`.
class checksum {
public:
    static constexpr std::size_t digits = 16;

    checksum() noexcept {
        XXH3_INITSTATE(&state_);
        static_cast<void>(XXH3_64bits_reset(&state_));
    }

    void update(std::span<const std::byte> bytes) noexcept {
        if (!bytes.empty()) {
            static_cast<void>(XXH3_64bits_update(&state_, bytes.data(), bytes.size()));
        }
    }

    /// Of the bytes so far.
    [[nodiscard]] std::string hex() const {
        XXH64_hash_t hash = XXH3_64bits_digest(&state_);
        std::string text(digits, '0');
        for (auto digit = text.rbegin(); digit != text.rend(); ++digit, hash >>= 4U) {
            *digit = "0123456789abcdef"[hash & 15U];
        }
        return text;
    }

private:
    XXH3_state_t state_;
};

namespace detail {

/// XXH3-64 of bytes, as a number.
[[nodiscard]] inline std::uint64_t checksum64(std::span<const std::byte> bytes) noexcept {
    return XXH3_64bits(bytes.data(), bytes.size());
}

/// XXH3-128 of bytes: enough to tell contents apart, too.
struct checksum128 {
    std::uint64_t low = 0;
    std::uint64_t high = 0;
    // NOLINTNEXTLINE(modernize-use-nullptr): the comparison's 0 is taken for a pointer
    friend auto operator<=>(const checksum128&, const checksum128&) = default;

    [[nodiscard]] static checksum128 of(std::span<const std::byte> bytes) noexcept {
        const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
        return {hash.low64, hash.high64};
    }
};

}  // namespace detail
RVQKV_NAMESPACE_END
