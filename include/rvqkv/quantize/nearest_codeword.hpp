// SPDX-License-Identifier: MIT
/// @file
/// Nearest-codeword search over a batch of vectors.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <span>

RVQKV_NAMESPACE_BEGIN

/// Index of the nearest codeword for each row; lowest index on ties.
/// Shapes:        `x` `[n, dim]`, any row stride; `book` one depth's search layout; `codes` `[n]`; `scores` `[n]` or
///                empty: `<x, c> - |c|^2 / 2` of the codeword taken (cosine: `<x, c / |c|>`), so the squared distance
///                is `|x|^2 - 2 * score`.
/// Preconditions: `x.cols == book.dim`, `codes.size() == x.rows`, `scores` empty or as long.
/// Errors:        none; a row with NaN or infinity, or one so large that every score overflows, gets some code below
///                `codewords`, 0 when no score compares.
/// Threads:       concurrent calls on one codebook are safe.
/// Complexity:    `n * codewords * dim` multiply-adds, of eight-bit integers on x86 for codebooks that have integer
///                copies; no allocation, up to 100 KiB of stack.
/// Numerics:      float32, channels in order, one rounding each: the same bits at every SIMD level.
/// Paper:         arXiv 2410.15704, section 3; reference code: `VQVAEQuantize.decode` in vqllm/quantizer/quantize.py.
inline void nearest_codeword(matrix_view<const float> x, const packed_codebook& book, std::span<code_t> codes,
                             std::span<float> scores = {}, const kernel_table& kernels = best_kernels()) {
    RVQKV_ASSERT(x.cols == book.dim && codes.size() == x.rows && (scores.empty() || scores.size() == x.rows));
    kernels.nearest(x.data, x.rows, x.stride, book, codes.data(), scores.empty() ? nullptr : scores.data());
}

RVQKV_NAMESPACE_END
