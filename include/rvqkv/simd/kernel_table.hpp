// SPDX-License-Identifier: MIT
/// @file
/// The function table: one entry for each inner loop of the library, filled for every instruction set. This room knows
/// raw pointers and sizes only.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/simd_level.hpp"
#include "rvqkv/simd/attention_kernels.hpp"
#include "rvqkv/simd/row_kernels.hpp"
#include "rvqkv/simd/small_scan.hpp"
#include "rvqkv/simd/word_rows.hpp"

#include <cstddef>
#include <cstdint>
#include <type_traits>

RVQKV_NAMESPACE_BEGIN

/// Codewords that stand side by side in the search layout, whatever the register width.
inline constexpr std::size_t search_block = 16;

/// Codewords that stand together in the integer copies of a codebook: four blocks of the search layout.
inline constexpr std::size_t integer_group = 4 * search_block;
/// Channels up to which there are integer copies.
inline constexpr std::size_t most_integer_dim = 256;
/// Channels of the 16-bit copy: whole registers, zeros at the end.
[[nodiscard]] constexpr std::size_t integer_fine_dim(std::size_t dim) noexcept {
    return (dim + 31) / 32 * 32;
}

/// Integer copies of one depth's codebook, for levels that find the nearest codeword by them and settle it in float32.
/// The codewords are shifted by `center` and sorted into groups that have much in common: each has its own step.
/// Place `64 g + 16 w + l` is lane `l` of block `w` of group `g`; its "quad" is `16 g + l`: the four blocks' codewords.
struct integer_codebook {
    const std::uint8_t* coarse = nullptr;   ///< `[groups, dim / 4, 64, 4]`: coarse_zero + weight / coarse_steps.
    const float* coarse_offsets = nullptr;  ///< `[groups, 64]`: offsets of the shifted codewords / coarse_steps.
    const float* coarse_steps = nullptr;    ///< `[groups]`
    const float* coarse_errors = nullptr;   ///< `[groups]`: largest length of codeword - coarse copy.
    const float* norms = nullptr;           ///< `[groups]`: largest length of a codeword that is rounded.
    const float* group_centers = nullptr;   ///< `[groups / 16, dim, 16]`: subtracted from a group before it is rounded
                                            ///< to eight bits; null for none.
    const float* center_squares = nullptr;  ///< `[groups]`: squared lengths of the groups' centers.
    const float* tops = nullptr;            ///< `[groups]`: largest offset + half the squared length of a codeword.
    const std::int16_t* fine = nullptr;     ///< `[quads, 4, integer_fine_dim]`: weight / fine_step.
    const float* fine_offsets = nullptr;    ///< `[quads, 4]`: offsets of the shifted codewords.
    const code_t* codes = nullptr;          ///< `[quads, 4]`: which codewords they are.
    const float* center = nullptr;          ///< `[integer_fine_dim]`
    std::int32_t coarse_zero = 0;           ///< 128: copies of eight bits; 64: of seven, for sums of 16 bits.
    float fine_step = 0.0F;
    float norm = 0.0F;           ///< Largest length of a codeword, shifted or not.
    float offset = 0.0F;         ///< Largest magnitude of an offset, shifted or not.
    float center_norm = 0.0F;    ///< Length of `center`.
    float half_root_dim = 0.0F;  ///< A little over sqrt(dim) / 2: what rounding a row can lose, in steps.
};

/// One depth's codebook in the layout that the search reads; see `residual_codebook::packed`.
struct packed_codebook {
    const float* interleaved = nullptr;  ///< `[blocks, dim, 16]`: lane `l` of block `b` is codeword `16 b + l`.
    const float* offsets = nullptr;      ///< `[blocks, 16]`: what the score starts from; -infinity beyond `codewords`.
    std::size_t codewords = 0;
    std::size_t dim = 0;
    const integer_codebook* integers = nullptr;  ///< Null where the float32 search is quicker.
    const void* rows = nullptr;                  ///< The same weights `[codewords, dim]`, as stored; null for cosine.
    dtype row_type = dtype::float32;             ///< What `rows` points to.
    [[nodiscard]] std::size_t blocks() const noexcept { return (codewords + search_block - 1) / search_block; }
};

/// Codes of `vectors x depths`; neighbours along each axis are the given number of codes apart.
struct code_strides {
    std::size_t vector = 0;
    std::size_t depth = 0;
};

/// Rows whose lists of nearest codewords will be merged: `rows` at a time are a family, and `leads[row]` is added to a
/// row's scores before they are compared. With null each row stands alone.
struct row_families {
    std::size_t rows = 1;
    const float* leads = nullptr;
};

/// The inner loops at one SIMD level. All levels give the same bits.
struct kernel_table {
    simd_level level;

    /// For each of `rows` vectors at `x` (`stride` floats apart): the codeword with the largest score
    /// `offset + <x, codeword>`, lowest index on ties, and (unless null) that score. The products are added in the
    /// order of the channels with one rounding each. A row whose every score is NaN or -infinity gets code 0.
    void (*nearest)(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book, code_t* codes,
                    float* scores);

    /// For each of `rows` vectors: the `count` codewords with the largest scores, by falling score, lowest index first
    /// on ties. `codes` and `scores` are `[rows, count]`. What there is not (scores that are NaN or -infinity, or fewer
    /// codewords) is code 0 with score -infinity; so may be what cannot be among the `count` best of the row's family.
    void (*nearest_several)(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book,
                            std::size_t count, row_families families, code_t* codes, float* scores);

    /// The loops that read codewords, for each type that stores them; `dim` channels, row-major.
    template <class Weight>
    struct weight_kernels {
        /// `x[i] -= codewords[codes[i]]` for each of `rows` vectors.
        void (*subtract)(float* x, std::size_t rows, std::size_t stride, const Weight* codewords, std::size_t dim,
                         const code_t* codes);
        /// `x[i] = sum over the first depths k of weights[k][codes[i, k]]`, added in the order of the depths.
        /// `weights` is `[depths, codewords, dim]`.
        void (*decode)(float* x, std::size_t rows, std::size_t stride, const Weight* weights, std::size_t codewords,
                       std::size_t dim, const code_t* codes, code_strides strides, std::size_t depths);
    };
    weight_kernels<float> float32_weights;
    weight_kernels<float16> float16_weights;
    weight_kernels<bfloat16> bfloat16_weights;

    void (*from_float16)(const float16* in, float* out, std::size_t count);
    void (*to_float16)(const float* in, float16* out, std::size_t count);
    void (*from_bfloat16)(const bfloat16* in, float* out, std::size_t count);
    void (*to_bfloat16)(const float* in, bfloat16* out, std::size_t count);

    attention_kernels attention;
    /// Attention by small tables.
    const small_scan_kernels* small_scan;
    /// Attention on rows of 16-bit numbers; null at levels without.
    const word_row_kernels* word_rows;
    row_kernels rows;

    /// The loops for one weight type.
    template <class Weight>
    [[nodiscard]] const weight_kernels<Weight>& weights() const noexcept {
        if constexpr (std::is_same_v<Weight, float>) {
            return float32_weights;
        } else if constexpr (std::is_same_v<Weight, float16>) {
            return float16_weights;
        } else {
            return bfloat16_weights;
        }
    }
};

RVQKV_NAMESPACE_END
