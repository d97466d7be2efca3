// SPDX-License-Identifier: MIT
/// @file
/// K-means for one depth of a codebook.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/learn/clusters.hpp"
#include "rvqkv/learn/progress.hpp"
#include "rvqkv/learn/random.hpp"
#include "rvqkv/quantize/codebook.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// Where k-means starts from.
enum class kmeans_start {
    sampled,    ///< Distinct vectors drawn uniformly: the paper's (scipy's `minit="points"`).
    plus_plus,  ///< k-means++ (Arthur and Vassilvitskii, 2007): each next vector drawn by its squared distance from
                ///< those drawn before. Costs as much as several iterations.
};
[[nodiscard]] constexpr std::string_view name_of(kmeans_start start) noexcept {
    return start == kmeans_start::sampled ? "sampled" : "plus_plus";
}

struct kmeans_config {
    std::size_t iterations = 10;  ///< Lloyd iterations; 10 is the reference code's (scipy's default).
    kmeans_start start = kmeans_start::sampled;
    friend bool operator==(const kmeans_config&, const kmeans_config&) = default;
};

struct kmeans_report {
    std::size_t reseeded = 0;         ///< Codewords that lost all vectors and were placed anew, over all iterations.
    double mean_squared_error = 0.0;  ///< Per value, of the last assignment (before the last update).
};

namespace detail {

/// Picks indices with probability proportional to weights.
class weighted_draw {
public:
    /// Adds up `weights` in place and keeps looking at them. A total of 0 leaves `empty()`.
    explicit weighted_draw(std::span<double> weights) noexcept : cumulative_(weights) {
        double total = 0.0;
        for (double& weight : weights) {
            total += std::max(weight, 0.0);
            weight = total;
        }
    }
    [[nodiscard]] bool empty() const noexcept { return cumulative_.empty() || !(cumulative_.back() > 0.0); }
    /// Precondition: `!empty()`.
    [[nodiscard]] std::size_t pick(random_source& random) const noexcept {
        const double at = random.uniform() * cumulative_.back();
        const auto found = std::upper_bound(cumulative_.begin(), cumulative_.end(), at);
        return std::min(static_cast<std::size_t>(found - cumulative_.begin()), cumulative_.size() - 1);
    }

private:
    std::span<const double> cumulative_;
};

/// `codewords` distinct rows (Floyd's algorithm, in the order drawn).
inline void start_from_samples(matrix_view<const float> x, std::size_t codewords, std::span<float> centroids,
                               random_source& random) {
    std::vector<bool> taken(x.rows, false);
    for (std::size_t c = 0; c < codewords; ++c) {
        const std::size_t last = x.rows - codewords + c;
        std::size_t row = random.below(last + 1);
        if (taken[row]) {
            row = last;
        }
        taken[row] = true;
        std::copy_n(x.row(row), x.cols, centroids.data() + c * x.cols);
    }
}

inline void start_plus_plus(matrix_view<const float> x, std::size_t codewords, std::span<float> centroids,
                            random_source& random, const executor& workers) {
    std::vector<double> nearest(x.rows, std::numeric_limits<double>::max());
    std::vector<double> running(x.rows);
    std::size_t row = random.below(x.rows);
    for (std::size_t c = 0; c < codewords; ++c) {
        float* const centroid = centroids.data() + c * x.cols;
        std::copy_n(x.row(row), x.cols, centroid);
        parallel_ranges(workers, x.rows, training_grain, [&](std::size_t first, std::size_t last) {
            for (std::size_t i = first; i < last; ++i) {
                nearest[i] = std::min(nearest[i], squared_distance(x.row(i), centroid, x.cols));
            }
        });
        std::copy(nearest.begin(), nearest.end(), running.begin());
        const weighted_draw draw(running);
        row = draw.empty() ? random.below(x.rows) : draw.pick(random);
    }
}

/// Sum of the squared lengths of all rows.
inline double squared_lengths(matrix_view<const float> x, const executor& workers) {
    std::vector<double> parts(x.rows / training_grain + 1, 0.0);
    parallel_ranges(workers, x.rows, training_grain, [&](std::size_t first, std::size_t last) {
        double sum = 0.0;
        for (std::size_t i = first; i < last; ++i) {
            sum += squared_length(x.row(i), x.cols);
        }
        parts[first / training_grain] = sum;
    });
    return std::accumulate(parts.begin(), parts.end(), 0.0);
}

/// Squared error of all rows, whose squared lengths add up to `lengths`: with n vectors of sum s, a centroid c adds
/// `n |c|^2 - 2 <c, s>` to these. So the error costs no pass over the rows.
inline double squared_error(double lengths, const cluster_sums& clusters, std::span<const float> centroids) noexcept {
    const std::size_t dim = centroids.size() / clusters.counts.size();
    double error = lengths;
    for (std::size_t c = 0; c < clusters.counts.size(); ++c) {
        const float* const centroid = centroids.data() + c * dim;
        double product = 0.0;
        for (std::size_t j = 0; j < dim; ++j) {
            product += static_cast<double>(centroid[j]) * clusters.sums[c * dim + j];
        }
        error += static_cast<double>(clusters.counts[c]) * squared_length(centroid, dim) - 2.0 * product;
    }
    return std::max(error, 0.0);
}

}  // namespace detail

/// Moves `centroids` to a local minimum of the squared distance from the rows of `x` to their nearest centroid.
/// A codeword that no vector chooses is placed on a vector drawn with probability proportional to its squared error.
/// Shapes:     `x` `[n, dim]`; `centroids` `[codewords, dim]`, overwritten.
/// Errors:     `invalid_argument` when there are fewer vectors than codewords or sizes disagree; then `centroids` are
///             as they were. Values must be finite.
/// Returns:    what happened; `keep_going` false from `progress` stops after that iteration.
/// Complexity: `iterations * n * codewords * dim` fused multiply-adds. Memory: 2 bytes for each vector beside `x` (10
///             while codewords are placed anew, 16 in `plus_plus`), and six times the centroids.
/// Numerics:   the same centroids for a seed at every SIMD level and number of threads (`plus_plus` and codewords
///             placed anew: on one compiler, for it may fuse multiplications with additions). The error reported is a
///             difference of sums of squares in double: exact to some 1e-16 of the mean square of `x`.
/// Paper:      arXiv 2410.15704, section 3; reference code: `init_codebook` in vqllm/quantizer/quantize.py.
[[nodiscard]] inline result<kmeans_report> kmeans(matrix_view<const float> x, std::size_t codewords,
                                                  std::span<float> centroids, const kmeans_config& config,
                                                  random_source& random, const executor& workers,
                                                  const progress_callback& progress = {}) {
    const codebook_shape shape{1, codewords, x.cols};
    if (status wrong = shape.validate(); !wrong) {
        return wrong.error();
    }
    if (centroids.size() != codewords * x.cols) {
        return error{error_code::invalid_argument, "centroids hold " + std::to_string(centroids.size()) +
                                                       " values, codewords x dim asks " +
                                                       std::to_string(codewords * x.cols)};
    }
    if (x.rows < codewords) {
        return error{error_code::invalid_argument,
                     std::to_string(x.rows) + " training vectors for " + std::to_string(codewords) +
                         " codewords: give at least as many vectors as codewords (some tens for each do well)"};
    }
    if (config.start == kmeans_start::plus_plus) {
        detail::start_plus_plus(x, codewords, centroids, random, workers);
    } else {
        detail::start_from_samples(x, codewords, centroids, random);
    }

    auto made = residual_codebook<>::create(shape, std::span<const float>(centroids));
    if (!made) {
        return made.error();
    }
    residual_codebook<> book = std::move(made).value();
    const double lengths = detail::squared_lengths(x, workers);
    std::vector<code_t> codes(x.rows);
    cluster_sums clusters;
    kmeans_report report;
    for (std::size_t iteration = 0; iteration < config.iterations; ++iteration) {
        if (iteration != 0) {
            if (status wrong = book.assign(std::span<const float>(centroids)); !wrong) {
                return wrong.error();
            }
        }
        assign_and_sum(x, book.packed(0), codes, {}, clusters, workers, [](std::size_t, std::size_t) {});
        report.mean_squared_error = detail::squared_error(lengths, clusters, centroids) /
                                    (static_cast<double>(x.rows) * static_cast<double>(x.cols));
        const bool some_empty =
            std::find(clusters.counts.begin(), clusters.counts.end(), std::size_t{0}) != clusters.counts.end();
        std::vector<double> errors;
        if (some_empty) {
            errors.resize(x.rows);
            parallel_ranges(workers, x.rows, training_grain, [&](std::size_t first, std::size_t last) {
                for (std::size_t i = first; i < last; ++i) {
                    errors[i] = detail::squared_distance(x.row(i), centroids.data() + codes[i] * x.cols, x.cols);
                }
            });
        }
        const detail::weighted_draw draw(errors);
        parallel_ranges(workers, codewords, training_grain, [&](std::size_t first, std::size_t last) {
            for (std::size_t c = first; c < last; ++c) {
                if (clusters.counts[c] == 0) {
                    continue;
                }
                const auto count = static_cast<double>(clusters.counts[c]);
                for (std::size_t j = c * x.cols; j < (c + 1) * x.cols; ++j) {
                    centroids[j] = static_cast<float>(clusters.sums[j] / count);
                }
            }
        });
        for (std::size_t c = 0; some_empty && c < codewords; ++c) {
            if (clusters.counts[c] == 0 && !draw.empty()) {
                std::copy_n(x.row(draw.pick(random)), x.cols, centroids.data() + c * x.cols);
                ++report.reseeded;
            }
        }
        if (progress && !progress({iteration + 1, config.iterations, 0, report.mean_squared_error})) {
            break;
        }
    }
    return report;
}

RVQKV_NAMESPACE_END
