// SPDX-License-Identifier: MIT
/// @file
/// Codes of 1 to 16 bits packed tightly, without a bit lost between them. Code `i` fills bits `[i * bits, (i + 1) *
/// bits)` of the byte string, least significant bit first; so 8-bit codes are plain bytes and 16-bit codes plain
/// little-endian words.
#pragma once

#include "rvqkv/core/config.hpp"

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

RVQKV_NAMESPACE_BEGIN

/// Index of a codeword in its codebook.
using code_t = std::uint16_t;

/// Most codewords that a codebook may hold: what a `code_t` can tell apart.
inline constexpr std::size_t max_codewords = 65536;

/// Bits that a code of a codebook with this many codewords takes: `ceil(log2(codewords))`, at least 1.
[[nodiscard]] constexpr unsigned code_bits(std::size_t codewords) noexcept {
    return codewords <= 2 ? 1U : static_cast<unsigned>(std::bit_width(codewords - 1));
}

/// Bytes that `count` codes of `bits` bits take.
[[nodiscard]] constexpr std::size_t packed_bytes(std::size_t count, unsigned bits) noexcept {
    return (count * bits + 7) / 8;
}

/// Writes `count` codes as numbers `first`, `first + 1`, ... of a packed string; bits of other codes stay as they are.
/// Preconditions: `1 <= bits <= 16`; `packed` holds `packed_bytes(first + count, bits)` bytes; every code fits `bits`.
/// Complexity:    O(count), no allocation.
/// Threads:       strings apart are independent; two neighbours may share a byte, so one writer per string.
inline void pack_codes(const code_t* codes, std::size_t count, unsigned bits, std::byte* packed,
                       std::size_t first = 0) noexcept {
    RVQKV_ASSERT(bits >= 1 && bits <= 16);
    if (count == 0) {
        return;
    }
    const std::size_t start = first * bits;
    std::byte* out = packed + start / 8;
    if (bits == 16) {
        std::memcpy(out, codes, count * sizeof(code_t));
        return;
    }
    if (bits == 8) {
        for (std::size_t i = 0; i < count; ++i) {
            out[i] = static_cast<std::byte>(codes[i]);
        }
        return;
    }
    // Bits gather in `pending`, full bytes leave it. The first and last byte keep their neighbours' bits.
    unsigned held = static_cast<unsigned>(start % 8);
    std::uint32_t pending = static_cast<std::uint32_t>(*out) & ((1U << held) - 1U);
    for (std::size_t i = 0; i < count; ++i) {
        RVQKV_ASSERT((codes[i] >> bits) == 0);
        pending |= static_cast<std::uint32_t>(codes[i]) << held;
        held += bits;
        for (; held >= 8; held -= 8) {
            *out++ = static_cast<std::byte>(pending & 0xffU);
            pending >>= 8U;
        }
    }
    if (held != 0) {
        const std::uint32_t keep = static_cast<std::uint32_t>(*out) & ~((1U << held) - 1U) & 0xffU;
        *out = static_cast<std::byte>(keep | pending);
    }
}

/// Reads the `count` codes from number `first` on.
/// Preconditions: `1 <= bits <= 16`; `packed` holds `packed_bytes(first + count, bits)` bytes.
/// Complexity:    O(count), no allocation.
/// Threads:       any number of readers.
inline void unpack_codes(const std::byte* packed, std::size_t first, std::size_t count, unsigned bits,
                         code_t* codes) noexcept {
    RVQKV_ASSERT(bits >= 1 && bits <= 16);
    if (count == 0) {
        return;
    }
    const std::size_t start = first * bits;
    const std::byte* in = packed + start / 8;
    if (bits == 16) {
        std::memcpy(codes, in, count * sizeof(code_t));
        return;
    }
    if (bits == 8) {
        for (std::size_t i = 0; i < count; ++i) {
            codes[i] = static_cast<code_t>(in[i]);
        }
        return;
    }
    const unsigned skip = static_cast<unsigned>(start % 8);
    std::uint32_t pending = static_cast<std::uint32_t>(*in++) >> skip;
    unsigned held = 8 - skip;
    const std::uint32_t mask = (1U << bits) - 1U;
    for (std::size_t i = 0; i < count; ++i) {
        for (; held < bits; held += 8) {
            pending |= static_cast<std::uint32_t>(*in++) << held;
        }
        codes[i] = static_cast<code_t>(pending & mask);
        pending >>= bits;
        held -= bits;
    }
}

RVQKV_NAMESPACE_END
