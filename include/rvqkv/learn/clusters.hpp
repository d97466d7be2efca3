// SPDX-License-Identifier: MIT
/// @file
/// The two passes that k-means and EMA training share: assign every vector to its nearest codeword, and sum the vectors
/// of each codeword. Both are split over threads without changing a bit of the result.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/nearest_codeword.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// Rows that one task handles; whole chunks of the search.
inline constexpr std::size_t training_grain = 1920;

/// `codes[i]` becomes the nearest codeword of row `i`. Shapes: as `nearest_codeword`. Complexity: as it, split over
/// `workers`.
inline void assign_nearest(matrix_view<const float> x, const packed_codebook& book, std::span<code_t> codes,
                           std::span<float> scores, const executor& workers) {
    const kernel_table& kernels = best_kernels();
    parallel_ranges(workers, x.rows, training_grain, [&](std::size_t first, std::size_t last) {
        nearest_codeword(x.slice_rows(first, last - first), book, codes.subspan(first, last - first),
                         scores.empty() ? scores : scores.subspan(first, last - first), kernels);
    });
}

/// Sum and number of the vectors assigned to each codeword.
struct cluster_sums {
    std::vector<double> sums;         ///< `[codewords, dim]`
    std::vector<std::size_t> counts;  ///< `[codewords]`

    /// Adds up the rows of `x` by their codes, skipping those whose `mask` is 0 (no mask counts all).
    /// Shapes:     `x` `[n, dim]`; `codes` `[n]`; `mask` `[n]` or empty.
    /// Complexity: O(n * dim).
    /// Numerics:   each codeword's rows are added in row order, in double, whatever the number of threads: tasks own
    ///             codewords, not rows.
    void collect(matrix_view<const float> x, std::span<const code_t> codes, std::size_t codewords,
                 std::span<const std::uint8_t> mask, const executor& workers) {
        sums.assign(codewords * x.cols, 0.0);
        counts.assign(codewords, 0);
        const std::size_t tasks = std::min(workers.concurrency(), codewords);
        parallel_for(workers, tasks, [&](std::size_t task) {
            const std::size_t first = codewords * task / tasks;
            const std::size_t last = codewords * (task + 1) / tasks;
            for (std::size_t i = 0; i < x.rows; ++i) {
                const std::size_t code = codes[i];
                if (code < first || code >= last || (!mask.empty() && mask[i] == 0)) {
                    continue;
                }
                ++counts[code];
                double* const sum = sums.data() + code * x.cols;
                const float* const row = x.row(i);
                for (std::size_t j = 0; j < x.cols; ++j) {
                    sum[j] += static_cast<double>(row[j]);
                }
            }
        });
    }
};

RVQKV_NAMESPACE_END
