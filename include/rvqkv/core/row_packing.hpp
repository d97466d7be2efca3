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
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// Tokens that lie side by side wherever pages hold codes; the tokens of a page are a multiple. A tile of a row of
/// codes is `8 * bits` bytes.
inline constexpr std::size_t tile_tokens = 64;

namespace detail {

inline constexpr std::size_t most_tile_bytes = tile_tokens * 16 / 8;

/// `Count` codes, `stride` apart, side by side: `Count / 8 * Bits` bytes.
template <unsigned Bits, std::size_t Count>
inline void pack_column(const code_t* codes, std::size_t stride, std::byte* out) noexcept {
    constexpr unsigned half = 4 * Bits;
    // Eight codes are `Bits` bytes: what is written beyond them the next eight overwrite.
    std::byte packed[Count / 8 * Bits + 16];
    for (std::size_t i = 0; i < Count / 8; ++i) {
        const auto four = [&](const code_t* from) {
            RVQKV_ASSERT(((from[0] | from[stride] | from[2 * stride] | from[3 * stride]) >> Bits) == 0);
            return std::uint64_t{from[0]} | std::uint64_t{from[stride]} << Bits |
                   std::uint64_t{from[2 * stride]} << (2 * Bits) | std::uint64_t{from[3 * stride]} << (3 * Bits);
        };
        const std::uint64_t first = four(codes + 8 * i * stride);
        const std::uint64_t second = four(codes + (8 * i + 4) * stride);
        const std::uint64_t low = half == 64 ? first : first | second << half % 64;
        const std::uint64_t high = half == 64 ? second : second >> (64 - half) % 64;
        std::memcpy(packed + i * Bits, &low, 8);
        std::memcpy(packed + i * Bits + 8, &high, 8);
    }
    std::memcpy(out, packed, Count / 8 * Bits);
}

/// `pack_rows` with a number of bits that the compiler knows.
template <unsigned Bits>
inline void pack_rows_of(const code_t* codes, std::size_t stride, std::size_t columns, std::byte* rows,
                         std::size_t row_stride) noexcept {
    constexpr unsigned joint = Bits <= 4 ? 4 : Bits <= 8 ? 2 : 1;  // neighbouring tokens whose codes fit 16 bits
    std::size_t c = 0;
    for (; joint > 1 && c + 4 <= columns; c += 4) {
        code_t joined[tile_tokens / joint * 4];
        for (std::size_t i = 0; i < tile_tokens / joint; ++i) {
            std::uint64_t four = 0;  // columns
            RVQKV_UNROLL
            for (unsigned t = 0; t < joint; ++t) {
                std::uint64_t of_token = 0;
                std::memcpy(&of_token, codes + (i * joint + t) * stride + c, 8);
                four |= of_token << (t * Bits);
            }
            std::memcpy(joined + 4 * i, &four, 8);
        }
        for (std::size_t j = 0; j < 4; ++j) {
            pack_column<joint * Bits, tile_tokens / joint>(joined + j, 4, rows + (c + j) * row_stride);
        }
    }
    for (; c < columns; ++c) {
        pack_column<Bits, tile_tokens>(codes + c, stride, rows + c * row_stride);
    }
}

}  // namespace detail

/// Packs the codes of 64 tokens: code `c` of token `t`, at `codes[t * stride + c]`, becomes number `t` of row `c`,
/// which is written to the `8 * bits` bytes at `rows + c * row_stride`. Preconditions: `1 <= bits <= 16`; every code
/// fits `bits`. Complexity:    O(64 * columns): about 0.1 ns a code.
inline void pack_rows(const code_t* codes, std::size_t stride, std::size_t columns, unsigned bits, std::byte* rows,
                      std::size_t row_stride) noexcept {
    RVQKV_ASSERT(bits >= 1 && bits <= 16);
    [&]<unsigned... Less>(std::integer_sequence<unsigned, Less...>) {
        (void)((bits == Less + 1 && (detail::pack_rows_of<Less + 1>(codes, stride, columns, rows, row_stride), true)) ||
               ...);
    }
    (std::make_integer_sequence<unsigned, 16>());
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
