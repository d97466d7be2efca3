// SPDX-License-Identifier: MIT
/// @file
/// Residual quantization of plain vectors: depth by depth, take the nearest codeword of what is left and subtract it.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "rvqkv/quantize/nearest_codeword.hpp"
#include "rvqkv/quantize/scale.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// Scratch memory of beam search, reused from call to call. Threads: one per thread.
class beam_workspace {
public:
    /// Makes room for beams of `width` paths with a codebook of this shape.
    /// Errors: `out_of_memory`, and it is as it was.
    [[nodiscard]] status reserve(std::size_t width, const codebook_shape& shape) {
        const std::size_t paths = vectors_at_once * width;
        for (const status& grown : {residuals.reserve(2 * paths * shape.dim), scores.reserve(paths * width),
                                    codes.reserve(paths * (width + 1)), sums.reserve(2 * paths), leads.reserve(paths),
                                    steps.reserve(paths * shape.depths)}) {
            if (!grown) {
                return grown.error();
            }
        }
        return {};
    }
    [[nodiscard]] std::size_t bytes() const noexcept {
        return residuals.bytes() + scores.bytes() + codes.bytes() + sums.bytes() + leads.bytes() + steps.bytes();
    }

private:
    template <class>
    friend class residual_quantizer;

    static constexpr std::size_t vectors_at_once = 60;  // whole chunks of the search; paths of five fill the L2 cache

    /// A path's last step.
    struct step {
        code_t code;
        std::uint16_t parent;  ///< The path that it goes on from, among its vector's.
    };
    aligned_buffer<float> residuals;  ///< `[2, vector, path, dim]`: before and after a depth
    aligned_buffer<float> scores;     ///< `[vector, path, width]`
    aligned_buffer<code_t> codes;     ///< `[vector, path, width]`, then `[vector, path]`: the ones taken
    aligned_buffer<double> sums;      ///< `[2, vector, path]`: scores of the path's codewords
    aligned_buffer<float> leads;      ///< `[vector, path]`: sums less that of the vector's first path
    aligned_buffer<step> steps;       ///< `[depth, vector, path]`
};

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
        RVQKV_ASSERT(squared_errors.empty() || squared_errors.size() == book_.depths());
        for (std::size_t depth = 0; depth < book_.depths(); ++depth) {
            encode_depth(depth, vectors, codes + depth * strides.depth, strides.vector, true, kernels);
            add_squared_errors(vectors, depth, squared_errors);
        }
    }

    /// The codes of `encode`, a subtraction sooner: what the last depth leaves is not worked out.
    /// Shapes, Preconditions, Errors: as `encode`; `vectors` are overwritten, and hold nothing of use in the end.
    void encode_codes(matrix_view<float> vectors, code_t* codes, code_strides strides,
                      const kernel_table& kernels = best_kernels()) const {
        for (std::size_t depth = 0; depth < book_.depths(); ++depth) {
            encode_depth(depth, vectors, codes + depth * strides.depth, strides.vector, depth + 1 < book_.depths(),
                         kernels);
        }
    }

    /// Beam search: at every depth the `width` best paths so far are kept, not one; the best at the end is taken.
    /// Costs about `width` times `encode` and finds a smaller error.
    /// Shapes, Preconditions: as `encode`; `vectors` are overwritten in the same way, but not after an error.
    /// Errors:        `invalid_argument` for a width of 0 or over 256, `unsupported` for a codebook of cosine distance
    ///                (its scores do not measure the error); `out_of_memory` when the workspace cannot grow (it never
    ///                does after one call as wide with this codebook). Rows that are not finite get some valid codes.
    /// Complexity:    `n * (1 + (depths - 1) * width) * codewords * dim` multiply-adds.
    /// Numerics:      the same codes at every SIMD level. A path's error is `|x|^2 - 2 * (sum of its scores)`, in
    ///                double; of equal ones the earlier path's, then the lower code's, goes first. Width 1 is `encode`.
    [[nodiscard]] status encode_beam(matrix_view<float> vectors, code_t* codes, code_strides strides, std::size_t width,
                                     beam_workspace& workspace, std::span<double> squared_errors = {},
                                     const kernel_table& kernels = best_kernels()) const {
        RVQKV_ASSERT(vectors.cols == book_.dim());
        RVQKV_ASSERT(squared_errors.empty() || squared_errors.size() == book_.depths());
        if (width == 0 || width > 256) {
            return error{error_code::invalid_argument,
                         "beam width is " + std::to_string(width) + ", must be from 1 to 256"};
        }
        if (book_.metric() != distance::euclidean) {
            return error{error_code::unsupported, "beam search needs a codebook of euclidean distance"};
        }
        if (width == 1) {
            encode(vectors, codes, strides, squared_errors, kernels);
            return {};
        }
        if (status grown = workspace.reserve(width, book_.shape()); !grown) {
            return grown;
        }
        for (std::size_t first = 0; first < vectors.rows; first += beam_workspace::vectors_at_once) {
            const std::size_t count = std::min(beam_workspace::vectors_at_once, vectors.rows - first);
            encode_paths(vectors.slice_rows(first, count), codes + first * strides.vector, strides, width, workspace,
                         squared_errors, kernels);
        }
        return {};
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
    /// One depth of a batch: depth is the outer loop, so that its codebook stays in cache while all vectors pass.
    void encode_depth(std::size_t depth, matrix_view<float> vectors, code_t* codes, std::size_t stride, bool subtract,
                      const kernel_table& kernels) const {
        RVQKV_ASSERT(vectors.cols == book_.dim());
        constexpr std::size_t chunk = 480;  // whole chunks of the search; 1 KiB of stack
        code_t chosen[chunk];
        for (std::size_t first = 0; first < vectors.rows; first += chunk) {
            const std::size_t count = std::min(chunk, vectors.rows - first);
            const matrix_view<float> part = vectors.slice_rows(first, count);
            const std::span<code_t> found(stride == 1 ? codes + first : chosen, count);
            if (subtract) {
                encode_depth(depth, part, found, kernels);
            } else {
                nearest_codeword(part, book_.packed(depth), found, {}, kernels);
            }
            for (std::size_t i = 0; stride != 1 && i < count; ++i) {
                codes[(first + i) * stride] = chosen[i];
            }
        }
    }

    /// Adds what a depth left to its error, if errors are asked for.
    static void add_squared_errors(matrix_view<const float> left, std::size_t depth, std::span<double> squared_errors) {
        for (std::size_t i = 0; !squared_errors.empty() && i < left.rows; ++i) {
            squared_errors[depth] += detail::squared_norm({left.row(i), left.cols});
        }
    }

    /// Beam search for as many vectors as the workspace holds.
    void encode_paths(matrix_view<float> vectors, code_t* codes, code_strides strides, std::size_t width,
                      beam_workspace& work, std::span<double> squared_errors, const kernel_table& kernels) const {
        const std::size_t dim = book_.dim();
        const std::size_t most = beam_workspace::vectors_at_once * width;  // paths
        const std::size_t wanted = std::min(width, book_.codewords());
        float* residuals = work.residuals.data();
        float* next_residuals = residuals + most * dim;
        double* sums = work.sums.data();
        double* next_sums = sums + most;
        code_t* const taken = work.codes.data() + most * width;
        for (std::size_t i = 0; i < vectors.rows; ++i) {
            std::copy_n(vectors.row(i), dim, residuals + i * dim);
            sums[i] = 0.0;
        }
        std::size_t paths = 1;  // of each vector
        for (std::size_t depth = 0; depth < book_.depths(); ++depth) {
            const std::size_t kept = std::min(width, paths * wanted);
            for (std::size_t i = 0; i < vectors.rows * paths; ++i) {
                work.leads[i] = static_cast<float>(sums[i] - sums[i - i % paths]);
            }
            const bool merged = kept == wanted;  // else some lists go into the merged one whole
            kernels.nearest_several(residuals, vectors.rows * paths, dim, book_.packed(depth), wanted,
                                    {paths, merged ? work.leads.data() : nullptr}, work.codes.data(),
                                    work.scores.data());
            for (std::size_t i = 0; i < vectors.rows; ++i) {
                const std::size_t from = i * paths;
                const std::size_t to = i * kept;
                keep_best(work.scores.data() + from * wanted, work.codes.data() + from * wanted, sums + from, paths,
                          wanted, kept, work.steps.data() + depth * most + i * width, next_sums + to);
                for (std::size_t path = 0; path < kept; ++path) {
                    const auto& step = work.steps[depth * most + i * width + path];
                    std::copy_n(residuals + (from + step.parent) * dim, dim, next_residuals + (to + path) * dim);
                    taken[to + path] = step.code;
                }
            }
            kernels.weights<typename Book::weight_type>().subtract(next_residuals, vectors.rows * kept, dim,
                                                                   book_.weights(depth).data(), dim, taken);
            std::swap(residuals, next_residuals);
            std::swap(sums, next_sums);
            paths = kept;
        }
        for (std::size_t i = 0; i < vectors.rows; ++i) {
            std::size_t path = 0;  // the best; paths are sorted
            for (std::size_t depth = book_.depths(); depth-- > 0;) {
                const auto& step = work.steps[depth * most + i * width + path];
                codes[i * strides.vector + depth * strides.depth] = step.code;
                path = step.parent;
            }
        }
        subtract_path(vectors, codes, strides, work, squared_errors, kernels);
    }

    /// The `kept` best of `paths` lists of `wanted` codewords, each sorted by falling score, by sum of scores.
    static void keep_best(const float* scores, const code_t* codes, const double* sums, std::size_t paths,
                          std::size_t wanted, std::size_t kept, beam_workspace::step* steps, double* kept_sums) {
        std::array<std::uint16_t, 256> heads{};
        for (std::size_t k = 0; k < kept; ++k) {
            std::size_t best = paths;
            double best_sum = 0.0;
            for (std::size_t path = 0; path < paths; ++path) {
                if (heads[path] == wanted) {
                    continue;
                }
                const double sum = sums[path] + static_cast<double>(scores[path * wanted + heads[path]]);
                if (best == paths || sum > best_sum) {
                    best = path;
                    best_sum = sum;
                }
            }
            steps[k] = {codes[best * wanted + heads[best]], static_cast<std::uint16_t>(best)};
            kept_sums[k] = best_sum;
            ++heads[best];
        }
    }

    /// Subtracts the chosen codewords depth by depth, as `encode` does.
    void subtract_path(matrix_view<float> vectors, const code_t* codes, code_strides strides, beam_workspace& work,
                       std::span<double> squared_errors, const kernel_table& kernels) const {
        code_t* const chosen = work.codes.data();
        for (std::size_t depth = 0; depth < book_.depths(); ++depth) {
            for (std::size_t i = 0; i < vectors.rows; ++i) {
                chosen[i] = codes[i * strides.vector + depth * strides.depth];
            }
            kernels.weights<typename Book::weight_type>().subtract(vectors.data, vectors.rows, vectors.stride,
                                                                   book_.weights(depth).data(), book_.dim(), chosen);
            add_squared_errors(vectors, depth, squared_errors);
        }
    }

    Book book_;
};

RVQKV_NAMESPACE_END
