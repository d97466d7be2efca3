// SPDX-License-Identifier: MIT
/// @file
/// Residual quantization of plain vectors: depth by depth, take the nearest codeword of what is left and subtract it.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "rvqkv/quantize/nearest_codeword.hpp"
#include "rvqkv/quantize/scale.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// Encodes and decodes vectors with a `residual_codebook`.
/// Threads: all members are const and safe to call concurrently.
template <class Book = residual_codebook<>>
class residual_quantizer {
public:
    using codebook_type = Book;

    explicit residual_quantizer(Book book) noexcept : book_(std::move(book)) {}
    [[nodiscard]] const Book& codebook() const noexcept { return book_; }

    /// One depth: the nearest codeword of each row, which is then subtracted from it.
    /// Shapes:        `residuals` `[n, dim]`, read and overwritten; `codes` `[n]`.
    /// Preconditions: `depth < depths`, `residuals.cols == dim`, `codes.size() == n`.
    /// Errors, Complexity, Numerics: as `nearest_codeword`; the subtraction is float32.
    void encode_depth(std::size_t depth, matrix_view<float> residuals, std::span<code_t> codes,
                      const kernel_table& kernels = best_kernels()) const {
        nearest_codeword(residuals, book_.packed(depth), codes, {}, kernels);
        kernels.weights<typename Book::weight_type>().subtract(residuals.data, residuals.rows, residuals.stride,
                                                               book_.weights(depth).data(), book_.dim(), codes.data());
    }

    /// Greedy encoding of a batch, in place: what is left after the last depth stays in `vectors`.
    /// Shapes:        `vectors` `[n, dim]`; `codes` `[n, depths]` with `strides`; `squared_errors` empty or `[depths]`,
    ///                to which the squared residual left after each depth, summed over the batch, is added.
    /// Preconditions: `vectors.cols == dim`.
    /// Errors:        none; rows that are not finite get some valid codes.
    /// Complexity:    `n * depths * codewords * dim` fused multiply-adds; no allocation.
    /// Numerics:      the same codes at every SIMD level.
    /// Paper:         arXiv 2410.15704, section 3; reference code: `quantize` in vqllm/quantizer/utils.py.
    void encode(matrix_view<float> vectors, code_t* codes, code_strides strides, std::span<double> squared_errors = {},
                const kernel_table& kernels = best_kernels()) const {
        RVQKV_ASSERT(vectors.cols == book_.dim());
        RVQKV_ASSERT(squared_errors.empty() || squared_errors.size() == book_.depths());
        constexpr std::size_t chunk = 480;  // whole chunks of the search; 1 KiB of stack
        code_t chosen[chunk];
        // Depth is the outer loop: one depth's codebook stays in cache while all vectors pass.
        for (std::size_t depth = 0; depth < book_.depths(); ++depth) {
            for (std::size_t first = 0; first < vectors.rows; first += chunk) {
                const std::size_t count = std::min(chunk, vectors.rows - first);
                const matrix_view<float> part = vectors.slice_rows(first, count);
                encode_depth(depth, part, {chosen, count}, kernels);
                for (std::size_t i = 0; i < count; ++i) {
                    codes[(first + i) * strides.vector + depth * strides.depth] = chosen[i];
                }
            }
            if (!squared_errors.empty()) {
                for (std::size_t i = 0; i < vectors.rows; ++i) {
                    squared_errors[depth] += detail::squared_norm({vectors.row(i), vectors.cols});
                }
            }
        }
    }

    /// Sum of the codewords of the first `depths` depths (0 gives zeros).
    /// Shapes:        `codes` `[n, depths]` with `strides`; `vectors` `[n, dim]`.
    /// Preconditions: `depths <= codebook().depths()`, `vectors.cols == dim`, every code below `codewords`.
    /// Errors:        none.
    /// Complexity:    `n * depths * dim` additions; no allocation.
    /// Numerics:      float32, added in the order of the depths: the same bits at every SIMD level.
    void decode(const code_t* codes, code_strides strides, matrix_view<float> vectors, std::size_t depths,
                const kernel_table& kernels = best_kernels()) const {
        RVQKV_ASSERT(depths <= book_.depths() && vectors.cols == book_.dim());
        kernels.weights<typename Book::weight_type>().decode(vectors.data, vectors.rows, vectors.stride,
                                                             book_.weights().data(), book_.codewords(), book_.dim(),
                                                             codes, strides, depths);
    }

private:
    Book book_;
};

RVQKV_NAMESPACE_END
