// SPDX-License-Identifier: MIT
/// @file
/// What attention on rows of 16-bit whole numbers reads and writes: keys and values reconstructed from large codebooks
/// whose copies fit the second cache.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"

#include <cstddef>
#include <cstdint>

RVQKV_NAMESPACE_BEGIN

/// Channels come in blocks of so many, which keep together wherever they are moved.
inline constexpr std::size_t word_block = 16;
/// Rows that are reconstructed at a time.
inline constexpr std::size_t word_rows_at_once = 8;

/// A codebook in whole numbers: the first depths in 16 bits, the others in 8 bits with a factor for each channel. Codes
/// are given as `code * dim / 8`, those of the first depths as twice as much.
struct word_codebook {
    const std::int16_t* wide = nullptr;     ///< `[wide_depths, codewords, dim]`
    const std::int8_t* narrow = nullptr;    ///< `[depths - wide_depths, codewords, dim]`
    const std::int16_t* factors = nullptr;  ///< `[dim]`: what numbers of 8 bits are multiplied by.
    std::size_t wide_depths = 0;
    std::size_t codewords = 0;
    std::size_t dim = 0;  ///< A multiple of 32.
};

/// The codes of one head in one tile.
struct tile_codes {
    const std::byte* first = nullptr;  ///< Of the first depth and group.
    std::size_t depth_stride = 0;      ///< Bytes from a row to that of the next depth,
    std::size_t group_stride = 0;      ///< and to that of the next group.
    std::size_t depths = 0;
    std::size_t groups = 0;
    unsigned bits = 0;
};

/// The loops at one SIMD level. Rows have `dim` channels, a multiple of 64, and stand side by side; their sums are
/// exact, so all levels give the same bits.
struct word_row_kernels {
    /// Codes (those that are none: the last one) as the codebook is read by: `[group, depth, tile_tokens]`.
    void (*unpack)(const tile_codes& codes, const word_codebook& book, code_t* out);
    /// `word_rows_at_once` rows from `codes + first` on; block `b` goes to place `places[b]`.
    void (*decode)(const word_codebook& book, const code_t* codes, std::size_t depths, std::size_t groups,
                   const std::uint16_t* places, std::int16_t* rows);
    /// Numbers in steps such that none exceeds 16 bits, nor their sum of magnitudes 65032; block `b` goes to place
    /// `places[b]`. Returns the step: NaN if a number is not finite.
    float (*round)(const float* x, std::size_t count, const std::uint16_t* places, std::int16_t* out);
    /// `out[q * out_stride + i] = <row i, query q> * steps[q] * scales[i]`, of `word_rows_at_once` rows. Unless
    /// `angles` is null, rows are turned first: channel `c` with channel `dim / 2 + c` by an angle of which `angles[c]`
    /// is the cosine, `angles[dim / 2 + c]` the sine, times 32767; those of the next row follow.
    void (*scores)(const std::int16_t* rows, std::size_t dim, const std::int16_t* angles, const std::int16_t* queries,
                   std::size_t query_count, const float* steps, const float* scales, float* out,
                   std::size_t out_stride);
    /// `sums[q * dim + c] += steps[q] * sum of weights[q * tile_tokens + i] * rows[i * dim + c]`, over a tile.
    void (*add)(const std::int16_t* rows, std::size_t dim, const std::int16_t* weights, std::size_t query_count,
                const float* steps, float* sums);
};

RVQKV_NAMESPACE_END
