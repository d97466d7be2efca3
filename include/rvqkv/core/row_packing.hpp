// SPDX-License-Identifier: MIT
/// @file
/// Codes to packed rows and back, turned on their side: encoders give all codes of a token together, pages of the KV
/// cache hold the codes of 64 tokens at one place together (a tile of a row). Packed as `pack_codes` packs.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>

RVQKV_NAMESPACE_BEGIN

/// Tokens that lie side by side wherever pages hold codes; the tokens of a page are a multiple. A tile of a row of
/// codes is `8 * bits` bytes.
inline constexpr std::size_t tile_tokens = 64;

namespace detail {

inline constexpr std::size_t most_tile_bytes = tile_tokens * 16 / 8;

}  // namespace detail

/// Packs the codes of 64 tokens: code `c` of token `t`, at `codes[t * stride + c]`, becomes number `t` of row `c`,
/// which is written to the `8 * bits` bytes at `rows + c * row_stride`. Preconditions: `1 <= bits <= 16`; every code
/// fits `bits`. Complexity:    O(64 * columns): about 0.2 ns a code.
inline void pack_rows(const code_t* codes, std::size_t stride, std::size_t columns, unsigned bits, std::byte* rows,
                      std::size_t row_stride) noexcept {
    RVQKV_ASSERT(bits >= 1 && bits <= 16);
    const unsigned half = 4 * bits;
    for (std::size_t c = 0; c < columns; ++c) {
        // Eight codes are `bits` bytes: what is written beyond them the next eight overwrite.
        std::byte packed[detail::most_tile_bytes + 16];
        std::byte* out = packed;
        const code_t* in = codes + c;
        for (std::size_t t = 0; t < tile_tokens; t += 8, in += 8 * stride, out += bits) {
            const auto four = [&](const code_t* from) {
                RVQKV_ASSERT(((from[0] | from[stride] | from[2 * stride] | from[3 * stride]) >> bits) == 0);
                return std::uint64_t{from[0]} | std::uint64_t{from[stride]} << bits |
                       std::uint64_t{from[2 * stride]} << (2 * bits) | std::uint64_t{from[3 * stride]} << (3 * bits);
            };
            const std::uint64_t first = four(in);
            const std::uint64_t second = four(in + 4 * stride);
            const std::uint64_t low = half == 64 ? first : first | second << half;
            const std::uint64_t high = half == 64 ? second : second >> (64 - half);
            std::memcpy(out, &low, 8);
            std::memcpy(out + 8, &high, 8);
        }
        std::memcpy(rows + c * row_stride, packed, 8 * bits);
    }
}

/// The way back: writes `codes[t * stride + c]` for 64 tokens and `columns` rows.
/// Preconditions: `1 <= bits <= 16`.
/// Complexity:    O(64 * columns).
inline void unpack_rows(const std::byte* rows, std::size_t row_stride, std::size_t columns, unsigned bits,
                        code_t* codes, std::size_t stride) noexcept {
    RVQKV_ASSERT(bits >= 1 && bits <= 16);
    const unsigned half = 4 * bits;
    const std::uint64_t mask = (std::uint64_t{1} << bits) - 1;
    for (std::size_t c = 0; c < columns; ++c) {
        std::byte packed[detail::most_tile_bytes + 16];
        std::memcpy(packed, rows + c * row_stride, 8 * bits);
        const std::byte* in = packed;
        code_t* out = codes + c;
        for (std::size_t t = 0; t < tile_tokens; t += 8, in += bits, out += 8 * stride) {
            std::uint64_t low = 0;
            std::uint64_t high = 0;
            std::memcpy(&low, in, 8);
            std::memcpy(&high, in + 8, 8);
            const std::uint64_t second = half == 64 ? high : low >> half | high << (64 - half);
            for (unsigned i = 0; i < 4; ++i) {
                out[i * stride] = static_cast<code_t>(low >> (i * bits) & mask);
                out[(i + 4) * stride] = static_cast<code_t>(second >> (i * bits) & mask);
            }
        }
    }
}

RVQKV_NAMESPACE_END
