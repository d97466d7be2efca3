// SPDX-License-Identifier: MIT
/// @file
/// The part of the function table that attention uses.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/row_packing.hpp"

#include <cstddef>
#include <cstdint>
#include <type_traits>

RVQKV_NAMESPACE_BEGIN

/// Pairs of places in a row that stand at regular distances: `(first + i * step, second + i * step)` for `i < count`,
/// to be turned by angle number `angle + i`.
struct channel_pairs {
    std::size_t first = 0;
    std::size_t second = 0;
    std::size_t step = 1;
    std::size_t count = 0;
    std::size_t angle = 0;
};

/// Rows of numbers in memory, neighbours `stride` apart.
template <class T>
struct row_block {
    T* data = nullptr;
    std::size_t count = 0;
    std::size_t stride = 0;
};

/// Weights of `[query, row]`: distances between neighbours.
struct weight_strides {
    std::size_t row = 0;
    std::size_t column = 1;
};

/// Four numbers side by side, of four queries.
using float4 = float __attribute__((vector_size(16)));

/// Where rows of codes lie: one for each place, in each of some tiles.
struct code_rows {
    const std::byte* const* tiles = nullptr;  ///< `[count]`: where each tile's part of the first row begins.
    std::size_t count = 0;
    std::size_t row = 0;   ///< Bytes from the first row to the wanted one.
    std::size_t next = 0;  ///< Bytes to the row that is wanted next: prefetched.
    unsigned bits = 8;     ///< From 8 to 12.
};

/// Sums of pairs that turn with the position, `a cos(angle) + b sin(angle)`, for the tokens of some tiles. From the
/// middle of a tile on, cosines are the same on both sides and sines opposite: the tokens behind it give those before
/// it. Pairs that turn little within a tile are taken together, as a polynomial of the place in the tile.
struct turning_pairs {
    static constexpr std::size_t span = 16;      ///< Tiles whose angles are in `middles`.
    static constexpr std::size_t terms = 6;      ///< Of the polynomial's even part, and of its odd part.
    static constexpr std::size_t few_terms = 3;  ///< Of either for the slowest pairs, which need no more.
    static constexpr std::size_t most_rows = 4;  ///< Rows that any level works on at once.

    std::size_t fast = 0;  ///< Pairs that are summed one by one, before the others.
    std::size_t slow = 0;
    std::size_t slowest = 0;  ///< Of the slow ones, the last.
    /// Cosines and sines of the angles from the first tile's first token to the tiles' middles: `[pairs, 2, span]`.
    const float* middles = nullptr;
    /// Even and odd functions, from the middle on: the fast pairs' cosines and sines, then Chebyshev polynomials.
    /// `[columns, 2, tile_tokens / 2]`
    const float* functions = nullptr;
    /// The slow pairs' cosines and sines as sums of the polynomials: `[slow, 2, terms]`.
    const float* series = nullptr;

    [[nodiscard]] std::size_t pairs() const noexcept { return fast + slow; }
    [[nodiscard]] std::size_t columns() const noexcept { return fast + (slow == 0 ? 0 : terms); }
    /// Floats of scratch that the kernel needs.
    [[nodiscard]] std::size_t factors() const noexcept { return columns() * 2 * most_rows * span; }
};

/// The inner loops of attention at one SIMD level. Sums are added in an order of the level's own.
struct attention_kernels {
    /// Turns the pairs of each of `rows` rows, in place: `(a, b)` becomes `(a cos - b sin, a sin + b cos)`. Row `i`
    /// takes its cosines and sines `angle_stride` numbers further than row `i - 1`. All levels give the same bits.
    void (*turn)(float* x, std::size_t rows, std::size_t stride, const channel_pairs* pairs, std::size_t runs,
                 const float* cosines, const float* sines, std::size_t angle_stride);

    /// The largest number that is none; -infinity if there is none.
    float (*largest)(const float* x, std::size_t count);
    /// `x[i] = exp(x[i] - shift)` within 2 ulp, 0 below the smallest normal number; a NaN stays one. Returns the sum.
    /// Precondition: `x[i] <= shift`, where they are numbers.
    float (*exponentials)(float* x, std::size_t count, float shift);
    /// `x[i] = cap * tanh(x[i] / cap)`, within `cap * 2^-22`.
    void (*soft_cap)(float* x, std::size_t count, float cap);

    /// `x[i] *= by[i]`, but 0 stays 0 whatever it is multiplied by.
    void (*multiply)(float* x, const float* by, std::size_t count);

    /// The codes of one tile. `bits` is from 1 to 16; reads `8 * bits` bytes.
    void (*unpack_tile)(const std::byte* packed, unsigned bits, code_t* codes);

    /// Smallest and largest of some numbers, NaNs aside.
    void (*range)(const float* x, std::size_t count, float* low, float* high);
    /// `entries[i]`: four queries' `(products[q * stride + i] - low[q]) * inverse[q]`, rounded, 16 bits each.
    void (*pack_entries)(const float* products, std::size_t stride, std::size_t count, const float* low,
                         const float* inverse, std::uint64_t* entries);
    /// The way back for up to four queries: `out[q * stride + i] = (start[q] + step[q] * sum) * scales[i]`.
    void (*unpack_sums)(const std::uint64_t* sums, std::size_t count, std::size_t queries, const float* start,
                        const float* step, const float* scales, float* out, std::size_t stride);
    /// `sums[t] += entries[code of token t]`, from two rows of codes (of the same tiles) with a table each.
    void (*add_entries)(const code_rows& first, const std::uint64_t* first_entries, const code_rows& second,
                        const std::uint64_t* second_entries, std::uint64_t* sums);
    /// `bins[code of token t] += weights[t]`.
    void (*add_weights)(const code_rows& codes, const float4* weights, float4* bins);

    /// `out[q * out_stride + i]` gains `constants[q]` and the sum of row `q` of `pairs` (`a` of every pair, then `b`),
    /// for token `i` of up to `turning_pairs::span` tiles. `factors` is scratch.
    void (*add_bias)(const turning_pairs& table, row_block<const float> pairs, const float* constants,
                     std::size_t tiles, float* factors, float* out, std::size_t out_stride);

    /// The loops over rows of keys and values.
    template <class T>
    struct row_kernels {
        /// `out[q * out_stride + i] = <rows[i], queries[q]>`.
        void (*scores)(row_block<const T> rows, row_block<const float> queries, std::size_t dim, float* out,
                       std::size_t out_stride);
        /// `sums[q] += weights[q * strides.row + i * strides.column] * rows[i]`, summed over i.
        void (*add)(row_block<const T> rows, const float* weights, weight_strides strides, std::size_t dim,
                    row_block<float> sums);
        /// `out[q * out_stride + c] = <codeword c, queries[q]>`, of `blocks` blocks of codewords `[blocks, dim, 16]`
        /// that stand side by side.
        void (*products)(const T* codewords, std::size_t blocks, row_block<const float> queries, std::size_t dim,
                         float* out, std::size_t out_stride);
    };
    row_kernels<float> float32_rows;
    row_kernels<float16> float16_rows;
    row_kernels<bfloat16> bfloat16_rows;

    /// The loops for one type of rows.
    template <class T>
    [[nodiscard]] const row_kernels<T>& rows() const noexcept {
        if constexpr (std::is_same_v<T, float>) {
            return float32_rows;
        } else if constexpr (std::is_same_v<T, float16>) {
            return float16_rows;
        } else {
            return bfloat16_rows;
        }
    }
};

RVQKV_NAMESPACE_END
