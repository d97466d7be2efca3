// SPDX-License-Identifier: MIT
/// @file
/// What the scans of codes by small tables read and write: raw pointers and sizes, as everything in this room.
///
/// A codebook of at most 256 codewords makes tables that fit in a few registers, so that 64 codes are looked up by one
/// or two byte permutations. The scans read tiles of 64 tokens; every number that they add up is an integer, so levels
/// may differ in order and still give the same bits.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/row_packing.hpp"

#include <cstddef>
#include <cstdint>

RVQKV_NAMESPACE_BEGIN

/// Widest code that is looked up in small tables.
inline constexpr unsigned most_scan_bits = 8;
/// Entries of a small table: what a lookup of codes of so many bits can reach.
[[nodiscard]] constexpr std::size_t scan_slots(unsigned bits) noexcept {
    return bits <= 4 ? 16 : bits <= 6 ? 64 : std::size_t{1} << bits;
}

/// The codes of one head, tile by tile; a tile may lie in any page of one format.
struct code_tiles {
    const std::byte* const* rows = nullptr;  ///< `[count + ahead]`: a tile's codes of the first depth and group.
    std::size_t count = 0;
    std::size_t ahead = 0;         ///< Tiles that will be read next; they are only prefetched.
    std::size_t depth_stride = 0;  ///< Bytes from a row to that of the next depth,
    std::size_t group_stride = 0;  ///< and to that of the next group.
    std::size_t depths = 0;
    std::size_t groups = 0;
    unsigned bits = 0;

    [[nodiscard]] const std::byte* row(std::size_t tile, std::size_t depth, std::size_t group) const noexcept {
        return rows[tile] + depth * depth_stride + group * group_stride;
    }
};

/// An entry of a table of scores is `low + score_base * high`, each digit a byte below `score_base`: so many digits can
/// be added before a byte overflows.
inline constexpr unsigned score_base = 43;
inline constexpr std::size_t score_run = 255 / (score_base - 1);
/// Most that the entries of one token may add up to.
inline constexpr unsigned most_score_sum = 65535;

/// What each codeword adds to a token's score, for each of some queries.
struct score_tables {
    const std::uint8_t* digits = nullptr;  ///< `[depths, queries, groups, 2 (low, high), slots]`
    std::size_t queries = 0;
    const float* steps =
        nullptr;  ///< `[queries]`: a score is step * (sum of entries) + start, times the token's scale.
    const float* starts = nullptr;  ///< `[queries]`
};

/// Tiles that are scanned at once, by one group's table after the other.
inline constexpr std::size_t scan_quad = 4;
/// Most tiles of a call: tables, or sums, stay in L1 through them.
inline constexpr std::size_t scan_block = 16;
/// Numbers in which a channel is summed up, to be added in the end: number `i` is of tokens `4 i` to `4 i + 3` of each
/// tile.
inline constexpr std::size_t value_lanes = tile_tokens / 4;
/// Most planes that a token's channel may be the sum of.
inline constexpr std::size_t most_value_planes = 3;

/// Most depths of values.
inline constexpr std::size_t most_value_depths = 16;

/// What each codeword adds to a channel. Depths are added up in bytes as long as these are exact enough: such depths
/// make a plane, and each plane has a step of its own.
struct value_tables {
    const std::int8_t* entries = nullptr;  ///< `[depths, dim, slots]`; the depths of a plane add up to a byte.
    std::size_t dim = 0;
    std::size_t planes = 0;
    std::size_t plane_ends[most_value_planes] = {};  ///< First depth after each plane.
    const float* ratios = nullptr;                   ///< `[planes, dim]`: steps of the planes in those of the last.
};

/// The scans at one SIMD level. All levels give the same bits.
struct small_scan_kernels {
    /// One query's tables and what goes with them. `book` is `[depths, dim, slots]`, slots beyond the codewords filled
    /// with one of these; `products` is room for `depths * groups * (slots + 1)`; `digits` begins at the query's own
    /// first table, those of its next depth are `depth_stride` bytes on; `starts[depth * start_stride]` is for scans of
    /// the depths up to that one.
    void (*fill_scores)(const float* query, const float* book, std::size_t depths, std::size_t groups, std::size_t dim,
                        std::size_t slots, float* products, std::uint8_t* digits, std::size_t depth_stride, float* step,
                        float* starts, std::size_t start_stride);
    /// `scores[query * stride + token] = (sum of the entries * step + start) * scale`; `scales` is `[tokens]`, or null.
    void (*scan_scores)(const code_tiles& tiles, const score_tables& tables, const float* scales, float* scores,
                        std::size_t stride);
    /// Weights times the tokens' scales (null: 1), rounded to bytes `[tiles, rows, tile_tokens]` with `steps`, `[rows,
    /// value_lanes]`. `totals`, `[rows, value_lanes]`, grow by what is rounded. A weight of zero is zero whatever its
    /// scale. Preconditions: at most `scan_block` tiles; no product is below zero.
    void (*round_weights)(const float* weights, std::size_t stride, std::size_t rows, std::size_t tiles,
                          const float* scales, std::uint8_t* rounded, float* steps, float* totals);
    /// Adds the tiles, times their rounded weights, to `sums`, `[groups * dim, rows, value_lanes]`, in steps of the
    /// last plane. `codes` is room for a group's codes, `[depths, scan_block, tile_tokens]`.
    /// Precondition: at most `scan_block` tiles.
    void (*add_values)(const code_tiles& tiles, const value_tables& tables, std::size_t rows,
                       const std::uint8_t* rounded, const float* steps, std::uint8_t* codes, float* sums);
    /// Multiplies the lanes of `sums`, `[count, rows, value_lanes]`, by their row's factor.
    void (*multiply_rows)(float* sums, std::size_t count, std::size_t rows, const float* factors);
    /// `out[i]` = sum of the lanes of `sums[i]`.
    void (*add_lanes)(const float* sums, std::size_t count, float* out);
};

RVQKV_NAMESPACE_END
