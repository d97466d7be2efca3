// SPDX-License-Identifier: MIT
/// @file
/// Everything that makes the codec of one layer's keys or values out of its tensors: a bounded sample, k-means for each
/// depth, EMA training.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/learn/ema_trainer.hpp"
#include "rvqkv/learn/kmeans.hpp"
#include "rvqkv/learn/progress.hpp"
#include "rvqkv/learn/random.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/quantize/row_transform.hpp"
#include "rvqkv/quantize/rows.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// Defaults are the paper's.
struct trainer_config {
    codec_spec spec;              ///< The codec to be made.
    kmeans_config kmeans;         ///< Of the initialization.
    ema_config ema;               ///< Of the training after it.
    std::size_t sample = 100000;  ///< Most vectors (groups) that k-means sees, drawn uniformly from all observed.
    std::uint64_t seed = 0;       ///< Of every random choice.
    friend bool operator==(const trainer_config&, const trainer_config&) = default;

    /// Errors: `invalid_argument` naming the field and its value.
    [[nodiscard]] status validate() const {
        if (status wrong = spec.validate(); !wrong) {
            return wrong;
        }
        if (status wrong = ema.validate(); !wrong) {
            return wrong;
        }
        if (sample < spec.shape.codewords) {
            return error{error_code::invalid_argument, "sample is " + std::to_string(sample) +
                                                           ", must be at least the number of codewords, " +
                                                           std::to_string(spec.shape.codewords)};
        }
        if (sample > most_sampled_values / spec.shape.dim) {
            return error{error_code::invalid_argument, "sample is " + std::to_string(sample) + ", must be at most " +
                                                           std::to_string(most_sampled_values / spec.shape.dim)};
        }
        return {};
    }

    /// Most float32 values that a sample may hold (16 GiB); memory for all of them is asked for at once.
    static constexpr std::size_t most_sampled_values = std::size_t{1} << 32U;
};

/// Everything a `codebook_trainer` carries, for saving and resuming. Either vectors are still being sampled or turned
/// into codewords (`sample` is not empty), or EMA training is under way (`ema.weights` is whole).
struct trainer_state {
    std::uint64_t random = 0;       ///< State of the random source.
    std::uint64_t observed = 0;     ///< Vectors offered to the sample so far.
    std::uint64_t steps = 0;        ///< EMA steps taken.
    std::uint64_t depths_done = 0;  ///< Depths whose codewords k-means has found.
    std::vector<float> sample;      ///< `[n, dim]`: the sample, minus the codewords of the depths done.
    ema_state ema;                  ///< Empty until k-means is through.
    friend bool operator==(const trainer_state&, const trainer_state&) = default;
};

/// What a micro-batch showed.
struct batch_report {
    std::size_t tokens = 0;            ///< Tokens that were counted (mask).
    double commitment_loss = 0.0;      ///< Mean over those tokens of the paper's commitment loss.
    std::size_t nonfinite_values = 0;  ///< NaNs and infinities, taken as 0.
};

/// Trains one codec: `observe` tensors, `initialize` once, then any number of rounds of `accumulate` and `step`.
/// Threads: none of its own (it uses the executor given); not safe to share.
class codebook_trainer {
public:
    /// Errors: `invalid_argument` from `trainer_config::validate`.
    [[nodiscard]] static result<codebook_trainer> create(const trainer_config& config) {
        trainer_state state;
        state.random = config.seed;
        return resume(config, std::move(state));
    }

    /// Goes on from a saved state: what follows is the same as without the break.
    /// Errors: `invalid_argument` for a configuration or state that makes no sense.
    [[nodiscard]] static result<codebook_trainer> resume(const trainer_config& config, trainer_state state) {
        if (status wrong = config.validate(); !wrong) {
            return wrong.error();
        }
        auto transform =
            transform_type::create(config.spec.head_dim, config.spec.shape.dim, any_scale(config.spec.scale),
                                   any_grouping(config.spec.grouping, config.spec.permutation), config.spec.scale_type);
        if (!transform) {
            return transform.error();
        }
        codebook_trainer trainer(config, std::move(transform).value());
        const codebook_shape& shape = config.spec.shape;
        if (state.depths_done > shape.depths) {
            return error{error_code::invalid_argument, "depths_done is " + std::to_string(state.depths_done) +
                                                           ", the codec has " + std::to_string(shape.depths)};
        }
        const std::uint64_t kept =
            state.depths_done == shape.depths ? 0 : std::min<std::uint64_t>(state.observed, config.sample) * shape.dim;
        if (state.sample.size() != kept) {
            return error{error_code::invalid_argument, "sample holds " + std::to_string(state.sample.size()) +
                                                           " values, after " + std::to_string(state.observed) +
                                                           " vectors and " + std::to_string(state.depths_done) +
                                                           " depths it must hold " + std::to_string(kept)};
        }
        if (!std::all_of(state.sample.begin(), state.sample.end(), [](float v) { return std::isfinite(v); })) {
            return error{error_code::invalid_argument, "sample holds a value that is not finite"};
        }
        if (state.depths_done == shape.depths) {
            auto ema = ema_trainer::resume(shape, std::move(state.ema), config.ema, config.spec.metric);
            if (!ema) {
                return ema.error();
            }
            trainer.ema_ = std::move(ema).value();
            state.ema = {};
        } else if (state.ema.weights.size() != state.depths_done * shape.codewords * shape.dim) {
            return error{error_code::invalid_argument,
                         "weights hold " + std::to_string(state.ema.weights.size()) + " values, " +
                             std::to_string(state.depths_done) + " depths of k-means make " +
                             std::to_string(state.depths_done * shape.codewords * shape.dim)};
        }
        trainer.random_ = random_source(state.random);
        trainer.state_ = std::move(state);
        return trainer;
    }

    [[nodiscard]] const trainer_config& config() const noexcept { return config_; }
    /// A copy of all that must be saved to go on later.
    [[nodiscard]] trainer_state state() const {
        trainer_state copy = state_;
        copy.random = random_.state();
        if (ema_) {
            copy.ema = ema_->state();
        }
        return copy;
    }
    /// Whether k-means is through, so that `accumulate`, `step` and `make` may be called.
    [[nodiscard]] bool initialized() const noexcept { return ema_.has_value(); }
    /// Vectors offered to the sample so far.
    [[nodiscard]] std::uint64_t observed() const noexcept { return state_.observed; }
    /// EMA steps taken.
    [[nodiscard]] std::uint64_t steps() const noexcept { return state_.steps; }

    /// Offers the vectors of a tensor to the sample for k-means: a uniform draw of `config().sample` from all that was
    /// ever offered (reservoir sampling), so memory does not grow with the text.
    /// Shapes: `x` `[token, head, head_dim]`; `mask` `[token]` (0: skip) or empty.
    /// Errors: `invalid_argument` for a wrong shape, or after `initialize` has begun. NaNs and infinities count as 0.
    [[nodiscard]] status observe(const tensor_view& x, std::span<const std::uint8_t> mask = {}) {
        if (status wrong = check(x, mask); !wrong) {
            return wrong;
        }
        if (state_.depths_done != 0) {
            return error{error_code::invalid_argument, "observe was called after initialize: the sample is closed"};
        }
        const std::size_t dim = transform_.group_dim();
        state_.sample.reserve(config_.sample * dim);  // growing would hold it twice; pages untouched cost nothing
        std::vector<float> channels(transform_.head_dim());
        std::vector<float> grouped(transform_.head_dim());
        std::size_t nonfinite = 0;
        for (std::size_t token = 0; token < x.tokens(); ++token) {
            if (!mask.empty() && mask[token] == 0) {
                continue;
            }
            for (std::size_t head = 0; head < x.heads(); ++head) {
                load_row(x, token, head, channels.data());
                transform_.apply(channels.data(), grouped.data(), nonfinite);
                for (std::size_t group = 0; group < transform_.groups(); ++group) {
                    keep(grouped.data() + group * dim);
                }
            }
        }
        return {};
    }

    /// K-means, depth after depth, each on what the depths before left of the sample; frees the sample at the end.
    /// Called again after a stop (`keep_going` false), it goes on with the next depth.
    /// Errors: `invalid_argument` when fewer vectors than codewords were observed, or when it is through already.
    [[nodiscard]] status initialize(const executor& workers, const progress_callback& progress = {}) {
        const codebook_shape& shape = config_.spec.shape;
        if (ema_) {
            return error{error_code::invalid_argument, "initialize was called twice"};
        }
        const matrix_view<float> sample(state_.sample.data(), state_.sample.size() / shape.dim, shape.dim);
        while (state_.depths_done < shape.depths) {
            const std::size_t depth = state_.depths_done;
            std::vector<float> centroids(shape.codewords * shape.dim);
            bool keep_going = true;
            random_source random = random_;
            const auto report = kmeans(sample, shape.codewords, centroids, config_.kmeans, random, workers,
                                       [&](const training_progress& inner) {
                                           const std::size_t each = config_.kmeans.iterations;
                                           if (progress && !progress({depth * each + inner.done, shape.depths * each,
                                                                      depth, inner.mean_squared_error})) {
                                               keep_going = false;
                                           }
                                           return true;
                                       });
            if (!report) {
                return report.error();
            }
            auto book = residual_codebook<>::create({1, shape.codewords, shape.dim}, std::span<const float>(centroids),
                                                    config_.spec.metric);
            if (!book) {
                return book.error();
            }
            state_.ema.weights.insert(state_.ema.weights.end(), centroids.begin(), centroids.end());
            const residual_quantizer<> quantizer(std::move(book).value());
            std::vector<code_t> codes(sample.rows);
            parallel_ranges(workers, sample.rows, training_grain, [&](std::size_t first, std::size_t last) {
                quantizer.encode_depth(0, sample.slice_rows(first, last - first),
                                       std::span(codes).subspan(first, last - first));
            });
            random_ = random;
            ++state_.depths_done;
            if (!keep_going) {
                break;
            }
        }
        if (state_.depths_done == shape.depths) {
            state_.sample = std::vector<float>();  // unlike `= {}`, gives the memory back
            auto ema = ema_trainer::create(shape, state_.ema.weights, config_.ema, config_.spec.metric);
            if (!ema) {
                return ema.error();
            }
            ema_ = std::move(ema).value();
            state_.ema = {};
        }
        return {};
    }

    /// One EMA micro-batch; several may precede one `step`.
    /// Shapes:     `x` `[token, head, head_dim]`; `mask` `[token]` (0: padding, not counted) or empty.
    /// Errors:     `invalid_argument` for a wrong shape or before `initialize` is through; `out_of_memory`. The state
    ///             is as before then.
    /// Complexity: `tokens * heads * head_dim * depths * codewords` fused multiply-adds; memory: the micro-batch in
    ///             float32.
    [[nodiscard]] result<batch_report> accumulate(const tensor_view& x, std::span<const std::uint8_t> mask,
                                                  const executor& workers) {
        if (status wrong = check(x, mask); !wrong) {
            return wrong.error();
        }
        if (!ema_) {
            return error{error_code::invalid_argument, "accumulate was called before initialize was through"};
        }
        const std::size_t head_dim = transform_.head_dim();
        const std::size_t groups = transform_.groups();
        if (status wrong = batch_.reserve(x.rows() * head_dim); !wrong) {
            return wrong.error();
        }
        batch_report report;
        std::vector<std::size_t> nonfinite(x.tokens(), 0);
        parallel_ranges(workers, x.tokens(), 64, [&](std::size_t first, std::size_t last) {
            std::vector<float> channels(head_dim);
            for (std::size_t token = first; token < last; ++token) {
                for (std::size_t head = 0; head < x.heads(); ++head) {
                    load_row(x, token, head, channels.data());
                    transform_.apply(channels.data(), batch_.data() + (token * x.heads() + head) * head_dim,
                                     nonfinite[token]);
                }
            }
        });
        const std::size_t per_token = x.heads() * groups;
        std::vector<std::uint8_t> vector_mask;
        if (!mask.empty()) {
            vector_mask.reserve(x.tokens() * per_token);
            for (const std::uint8_t counted : mask) {
                vector_mask.insert(vector_mask.end(), per_token, counted);
            }
        }
        std::vector<float> losses(x.tokens() * per_token);
        ema_->accumulate({batch_.data(), losses.size(), transform_.group_dim()}, vector_mask, losses, workers);
        double total = 0.0;
        for (std::size_t token = 0; token < x.tokens(); ++token) {
            report.nonfinite_values += nonfinite[token];
            if (!mask.empty() && mask[token] == 0) {
                continue;
            }
            ++report.tokens;
            for (std::size_t i = 0; i < per_token; ++i) {
                total += static_cast<double>(losses[token * per_token + i]) / static_cast<double>(per_token);
            }
        }
        report.commitment_loss = report.tokens == 0 ? 0.0 : total / static_cast<double>(report.tokens);
        return report;
    }

    /// The EMA weight update that closes a round of micro-batches.
    /// Errors: `invalid_argument` before `initialize` is through; `out_of_memory`.
    [[nodiscard]] status step(const executor& workers = serial_executor()) {
        if (!ema_) {
            return error{error_code::invalid_argument, "step was called before initialize was through"};
        }
        if (status wrong = ema_->step(workers); !wrong) {
            return wrong;
        }
        ++state_.steps;
        return {};
    }

    /// The codec that training has arrived at.
    /// Errors: `invalid_argument` before `initialize` is through, or when a weight does not fit `spec.weight_type`.
    [[nodiscard]] result<std::shared_ptr<const codec>> make() const {
        if (!ema_) {
            return error{error_code::invalid_argument, "make was called before initialize was through"};
        }
        return make_codec(config_.spec, std::span<const float>(ema_->state().weights));
    }

private:
    using transform_type = row_transform<any_scale, any_grouping>;

    codebook_trainer(const trainer_config& config, transform_type transform)
        : config_(config), transform_(std::move(transform)) {}

    status check(const tensor_view& x, std::span<const std::uint8_t> mask) const {
        if (x.channels() != transform_.head_dim()) {
            return error{error_code::invalid_argument, "input has " + std::to_string(x.channels()) +
                                                           " channels per head, the codec's head_dim is " +
                                                           std::to_string(transform_.head_dim())};
        }
        if (!mask.empty() && mask.size() != x.tokens()) {
            return error{error_code::invalid_argument, "mask has " + std::to_string(mask.size()) +
                                                           " entries, the input has " + std::to_string(x.tokens()) +
                                                           " tokens"};
        }
        return {};
    }

    /// Algorithm R (Vitter, 1985).
    void keep(const float* vector) {
        const std::size_t dim = transform_.group_dim();
        const std::uint64_t number = state_.observed++;
        if (number < config_.sample) {
            state_.sample.insert(state_.sample.end(), vector, vector + dim);
            return;
        }
        const std::size_t place = random_.below(static_cast<std::size_t>(number) + 1);
        if (place < config_.sample) {
            std::copy_n(vector, dim, state_.sample.data() + place * dim);
        }
    }

    trainer_config config_;
    transform_type transform_;
    random_source random_;
    trainer_state state_;
    std::optional<ema_trainer> ema_;
    aligned_buffer<float> batch_;
};

RVQKV_NAMESPACE_END
