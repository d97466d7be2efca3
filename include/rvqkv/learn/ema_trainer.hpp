// SPDX-License-Identifier: MIT
/// @file
/// The paper's codebook update: exponential moving averages (EMA) of how many vectors a codeword gets and of their sum.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/learn/clusters.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// Defaults are the paper's.
struct ema_config {
    double decay = 0.99;      ///< γ: what each step keeps of the running averages; in (0, 1).
    double epsilon = 1e-5;    ///< ε: added to every cluster size, so that none is zero.
    double clamp = 100.0;     ///< Largest magnitude of a weight.
    double revive_below = 0;  ///< Codewords whose running size falls below this are revived; 0, the paper's, never.
    friend bool operator==(const ema_config&, const ema_config&) = default;

    /// Errors: `invalid_argument` naming the field and its value.
    [[nodiscard]] status validate() const {
        const auto wrong = [](const char* field, double value, const char* range) -> status {
            return error{error_code::invalid_argument,
                         std::string(field) + " is " + std::to_string(value) + ", must be " + range};
        };
        if (!(decay > 0.0 && decay < 1.0)) {
            return wrong("decay", decay, "between 0 and 1");
        }
        if (!(epsilon > 0.0) || !std::isfinite(epsilon)) {
            return wrong("epsilon", epsilon, "finite and above 0");
        }
        if (!(clamp > 0.0) || !std::isfinite(clamp)) {
            return wrong("clamp", clamp, "finite and above 0");
        }
        if (!(revive_below >= 0.0) || !std::isfinite(revive_below)) {
            return wrong("revive_below", revive_below, "finite and at least 0");
        }
        return {};
    }
};

/// All that EMA training carries from step to step, float32 as in the reference code.
struct ema_state {
    std::vector<float> weights;         ///< `[depths, codewords, dim]`: the codebook in use.
    std::vector<float> cluster_sizes;   ///< `[depths, codewords]`: running number of vectors of a codeword.
    std::vector<float> embedding_sums;  ///< `[depths, codewords, dim]`: running sum of those vectors.
    friend bool operator==(const ema_state&, const ema_state&) = default;
};

/// Learns a residual codebook from vectors in the scaled, grouped domain. Any number of micro-batches (`accumulate`)
/// makes one weight update (`step`); assignments use the weights of the last step.
/// Threads: none of its own; not safe to share.
class ema_trainer {
public:
    /// Starts from a codebook, `weights` `[depths, codewords, dim]`: running sizes 1, running sums equal to it.
    /// Errors: `invalid_argument` from the configuration, the shape or weights that are not finite.
    [[nodiscard]] static result<ema_trainer> create(const codebook_shape& shape, std::span<const float> weights,
                                                    const ema_config& config = {},
                                                    distance metric = distance::euclidean) {
        ema_state state;
        state.weights.assign(weights.begin(), weights.end());
        state.embedding_sums = state.weights;
        state.cluster_sizes.assign(shape.depths * shape.codewords, 1.0F);
        return resume(shape, std::move(state), config, metric);
    }

    /// Goes on from a saved state, exactly as if there had been no break.
    /// Errors: as `create`, and for running sums or sizes of the wrong length, not finite or (sizes) below 0.
    [[nodiscard]] static result<ema_trainer> resume(const codebook_shape& shape, ema_state state,
                                                    const ema_config& config = {},
                                                    distance metric = distance::euclidean) {
        if (status wrong = config.validate(); !wrong) {
            return wrong.error();
        }
        auto book = residual_codebook<>::create(shape, std::span<const float>(state.weights), metric);
        if (!book) {
            return book.error();
        }
        const auto check = [](const char* name, const std::vector<float>& values, std::size_t size,
                              float least) -> status {
            if (values.size() != size) {
                return error{error_code::invalid_argument, std::string(name) + " holds " +
                                                               std::to_string(values.size()) + " values, must hold " +
                                                               std::to_string(size)};
            }
            for (std::size_t i = 0; i < size; ++i) {
                if (!(values[i] >= least) || !std::isfinite(values[i])) {
                    return error{error_code::invalid_argument,
                                 std::string(name) + " " + std::to_string(i) + " is " + std::to_string(values[i])};
                }
            }
            return {};
        };
        if (status wrong = check("cluster_sizes", state.cluster_sizes, shape.depths * shape.codewords, 0.0F); !wrong) {
            return wrong.error();
        }
        if (status wrong =
                check("embedding_sums", state.embedding_sums, shape.size(), std::numeric_limits<float>::lowest());
            !wrong) {
            return wrong.error();
        }
        return ema_trainer(std::move(book).value(), std::move(state), config);
    }

    [[nodiscard]] const ema_config& config() const noexcept { return config_; }
    [[nodiscard]] const ema_state& state() const noexcept { return state_; }
    /// The codebook of the last step.
    [[nodiscard]] const residual_codebook<>& codebook() const noexcept { return book_; }

    /// One micro-batch: assigns every vector at every depth and adds the counted ones to the running averages.
    /// Shapes:     `vectors` `[n, dim]`, in place: what the last depth leaves stays in it; `mask` `[n]` (0: not
    ///             counted, still quantized) or empty; `losses` `[n]` or empty: the commitment loss of each vector, the
    ///             sum over the depths of the mean squared residual that the depth leaves; `codes` `[n, depths]` or
    ///             empty.
    /// Preconditions: sizes as said; values finite.
    /// Complexity: `n * depths * codewords * dim` fused multiply-adds, split over `workers`.
    /// Numerics:   the same state at every SIMD level and number of threads.
    /// Paper:      `update_codebook` in vqllm/quantizer/quantize.py; factor (1 - γ) / γ, since `step` multiplies by γ.
    void accumulate(matrix_view<float> vectors, std::span<const std::uint8_t> mask, std::span<float> losses,
                    const executor& workers, std::span<code_t> codes = {}) {
        const codebook_shape shape = codebook().shape();
        RVQKV_ASSERT(vectors.cols == shape.dim && (mask.empty() || mask.size() == vectors.rows));
        RVQKV_ASSERT(losses.empty() || losses.size() == vectors.rows);
        RVQKV_ASSERT(codes.empty() || codes.size() == vectors.rows * shape.depths);
        std::fill(losses.begin(), losses.end(), 0.0F);
        std::vector<code_t> chosen(vectors.rows);
        cluster_sums clusters;
        const float gain = static_cast<float>((1.0 - config_.decay) / config_.decay);
        const kernel_table& kernels = best_kernels();
        // What is left to do of a depth after its search, put off until the rows are in cache for the next.
        const auto finish = [&](std::size_t depth, std::size_t first, std::size_t last) {
            kernels.float32_weights.subtract(vectors.row(first), last - first, vectors.stride,
                                             codebook().weights(depth).data(), shape.dim, chosen.data() + first);
            for (std::size_t i = first; i < last; ++i) {
                if (!losses.empty()) {
                    losses[i] += static_cast<float>(detail::squared_length(vectors.row(i), shape.dim) /
                                                    static_cast<double>(shape.dim));
                }
                if (!codes.empty()) {
                    codes[i * shape.depths + depth] = chosen[i];
                }
            }
        };
        for (std::size_t depth = 0; depth < shape.depths; ++depth) {
            assign_and_sum(vectors, codebook().packed(depth), chosen, mask, clusters, workers,
                           [&](std::size_t first, std::size_t last) {
                               if (depth != 0) {
                                   finish(depth - 1, first, last);
                               }
                           });
            float* const sizes = state_.cluster_sizes.data() + depth * shape.codewords;
            float* const sums = state_.embedding_sums.data() + depth * shape.codewords * shape.dim;
            parallel_ranges(workers, shape.codewords, training_grain, [&](std::size_t first, std::size_t last) {
                for (std::size_t c = first; c < last; ++c) {
                    sizes[c] += gain * static_cast<float>(clusters.counts[c]);
                }
                for (std::size_t i = first * shape.dim; i < last * shape.dim; ++i) {
                    sums[i] += gain * static_cast<float>(clusters.sums[i]);
                }
            });
        }
        parallel_ranges(workers, vectors.rows, training_grain,
                        [&](std::size_t first, std::size_t last) { finish(shape.depths - 1, first, last); });
    }

    /// The weight update. Every depth: sizes and sums decay by γ; with N the sum of the sizes, a codeword becomes its
    /// sum divided by `(size + ε) / (N + codewords * ε) * N`, clamped.
    /// Errors:     `invalid_argument` when a weight is not finite, as after vectors that are not; the state is as it
    ///             was then.
    /// Threads:    none of its own; depths are split over `workers`, without changing a bit of the result.
    /// Complexity: O(weights). Memory: the averages once more while it runs.
    /// Paper:      `weight_update` in vqllm/quantizer/quantize.py.
    [[nodiscard]] status step(const executor& workers = serial_executor()) {
        const codebook_shape shape = codebook().shape();
        const std::size_t depth_size = shape.codewords * shape.dim;
        // On copies: the averages must stay as they are until nothing can fail.
        std::vector<float> all_sizes = state_.cluster_sizes;
        std::vector<float> all_sums = state_.embedding_sums;
        parallel_for(workers, shape.depths, [&](std::size_t depth) {
            const auto sizes = std::span(all_sizes).subspan(depth * shape.codewords, shape.codewords);
            const auto sums = std::span(all_sums).subspan(depth * depth_size, depth_size);
            decay(sizes, sums);
            const double total = std::accumulate(sizes.begin(), sizes.end(), 0.0);
            const double smoothing = total / (total + static_cast<double>(shape.codewords) * config_.epsilon);
            for (std::size_t c = 0; c < shape.codewords; ++c) {
                const double share = 1.0 / ((static_cast<double>(sizes[c]) + config_.epsilon) * smoothing);
                const float* const sum = sums.data() + c * shape.dim;
                float* const weight = state_.weights.data() + depth * depth_size + c * shape.dim;
                for (std::size_t j = 0; j < shape.dim; ++j) {
                    const double mean = static_cast<double>(sum[j]) * share;
                    weight[j] = static_cast<float>(std::min(std::max(mean, -config_.clamp), config_.clamp));
                }
            }
        });
        if (status wrong = book_.assign(std::span<const float>(state_.weights), workers); !wrong) {
            const std::span<const float> before = codebook().weights();
            std::copy(before.begin(), before.end(), state_.weights.begin());
            return wrong;
        }
        state_.cluster_sizes = std::move(all_sizes);
        state_.embedding_sums = std::move(all_sums);
        return {};
    }

private:
    ema_trainer(residual_codebook<> book, ema_state state, const ema_config& config) noexcept
        : book_(std::move(book)), state_(std::move(state)), config_(config) {}

    /// One depth's running averages a step later.
    void decay(std::span<float> sizes, std::span<float> sums) const noexcept {
        const float kept = static_cast<float>(config_.decay);
        for (float& size : sizes) {
            size *= kept;
        }
        for (float& sum : sums) {
            sum *= kept;
        }
        revive(sizes, sums, sums.size() / sizes.size());
    }

    /// A codeword that too few vectors choose takes half of the largest cluster: both halves get half of its size and
    /// its sum, moved apart by a part in a thousand, as faiss splits clusters. The state stays one of averages.
    void revive(std::span<float> sizes, std::span<float> sums, std::size_t dim) const noexcept {
        for (std::size_t dead = 0; dead < sizes.size(); ++dead) {
            if (!(static_cast<double>(sizes[dead]) < config_.revive_below)) {
                continue;
            }
            const std::size_t largest =
                static_cast<std::size_t>(std::max_element(sizes.begin(), sizes.end()) - sizes.begin());
            if (!(static_cast<double>(sizes[largest]) >= 2.0 * config_.revive_below) || largest == dead) {
                return;  // a split would only make two dead codewords
            }
            sizes[largest] *= 0.5F;
            sizes[dead] = sizes[largest];
            for (std::size_t j = 0; j < dim; ++j) {
                const float half = 0.5F * sums[largest * dim + j];
                const float apart = j % 2 == 0 ? 0x1p-10F : -0x1p-10F;
                sums[largest * dim + j] = half * (1.0F - apart);
                sums[dead * dim + j] = half * (1.0F + apart);
            }
        }
    }

    residual_codebook<> book_;
    ema_state state_;
    ema_config config_;
};

RVQKV_NAMESPACE_END
