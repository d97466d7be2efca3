// SPDX-License-Identifier: MIT
/// @file
/// The function table: one entry for each inner loop of the library, filled for every instruction set. This room knows
/// raw pointers and sizes only.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/simd_level.hpp"

#include <cstddef>
#include <type_traits>

RVQKV_NAMESPACE_BEGIN

/// Codewords that stand side by side in the search layout, whatever the register width.
inline constexpr std::size_t search_block = 16;

/// One depth's codebook in the layout that the search reads; see `residual_codebook::packed`.
struct packed_codebook {
    const float* interleaved = nullptr;  ///< `[blocks, dim, 16]`: lane `l` of block `b` is codeword `16 b + l`.
    const float* offsets = nullptr;      ///< `[blocks, 16]`: what the score starts from; -infinity beyond `codewords`.
    std::size_t codewords = 0;
    std::size_t dim = 0;
    [[nodiscard]] std::size_t blocks() const noexcept { return (codewords + search_block - 1) / search_block; }
};

/// Codes of `vectors x depths`; neighbours along each axis are the given number of codes apart.
struct code_strides {
    std::size_t vector = 0;
    std::size_t depth = 0;
};

/// The inner loops at one SIMD level. All levels give the same bits.
struct kernel_table {
    simd_level level;

    /// For each of `rows` vectors at `x` (`stride` floats apart): the codeword with the largest score
    /// `offset + <x, codeword>`, lowest index on ties, and (unless null) that score. The products are added in the
    /// order of the channels with one rounding each. A row whose every score is NaN or -infinity gets code 0.
    void (*nearest)(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book, code_t* codes,
                    float* scores);

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
