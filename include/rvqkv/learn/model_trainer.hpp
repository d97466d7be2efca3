// SPDX-License-Identifier: MIT
/// @file
/// A whole model's training: one `codebook_trainer` for each layer's keys and one for its values.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/learn/codebook_trainer.hpp"
#include "rvqkv/learn/progress.hpp"
#include "rvqkv/quantize/codec.hpp"

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// Configurations of one layer. Give sides different seeds, or the same: they never share random numbers.
struct layer_trainer_config {
    trainer_config key;
    trainer_config value;
};

/// Training of all layers with the calls of `codebook_trainer`; layers are the model's numbers and need not be
/// consecutive.
/// Threads: none of its own; not safe to share.
class model_trainer {
public:
    /// The two trainers of a layer.
    struct layer_trainers {
        codebook_trainer key;
        codebook_trainer value;
    };

    /// Errors: `invalid_argument` naming layer, side, field and value.
    [[nodiscard]] static result<model_trainer> create(const std::map<std::size_t, layer_trainer_config>& layers) {
        model_trainer model;
        for (const auto& [layer, config] : layers) {
            auto key = codebook_trainer::create(config.key);
            if (!key) {
                return in(layer, "key", key.error());
            }
            auto value = codebook_trainer::create(config.value);
            if (!value) {
                return in(layer, "value", value.error());
            }
            model.layers_.emplace(layer, layer_trainers{std::move(key).value(), std::move(value).value()});
        }
        return model;
    }

    /// Takes over trainers made (or resumed) one by one.
    explicit model_trainer(std::map<std::size_t, layer_trainers> layers) : layers_(std::move(layers)) {}

    [[nodiscard]] const std::map<std::size_t, layer_trainers>& layers() const noexcept { return layers_; }
    /// The trainers, for work on one at a time; the constructor above takes them back.
    [[nodiscard]] std::map<std::size_t, layer_trainers> release() && { return std::move(layers_); }

    /// Errors: as `codebook_trainer::observe`, and for a layer that is not trained.
    [[nodiscard]] status observe(std::size_t layer, const tensor_view& keys, const tensor_view& values,
                                 std::span<const std::uint8_t> mask = {}) {
        layer_trainers* const trainers = find(layer);
        if (trainers == nullptr) {
            return unknown(layer);
        }
        if (status wrong = trainers->key.observe(keys, mask); !wrong) {
            return in(layer, "key", wrong.error());
        }
        if (status wrong = trainers->value.observe(values, mask); !wrong) {
            return in(layer, "value", wrong.error());
        }
        return {};
    }

    /// K-means for every layer and side that is not through yet; progress counts over all of them. After a stop, call
    /// it again to go on.
    [[nodiscard]] status initialize(const executor& workers, const progress_callback& progress = {}) {
        training_progress all;
        for (const auto& [layer, trainers] : layers_) {
            for (const codebook_trainer* side : {&trainers.key, &trainers.value}) {
                const std::size_t work = side->config().kmeans.iterations * side->config().spec.shape.depths;
                all.total += work;
                all.done += side->initialized() ? work : 0;
            }
        }
        for (auto& [layer, trainers] : layers_) {
            const std::size_t number = layer;
            for (codebook_trainer* side : {&trainers.key, &trainers.value}) {
                if (side->initialized()) {
                    continue;
                }
                bool keep_going = true;
                const std::size_t before = all.done;
                const status wrong = side->initialize(workers, [&](const training_progress& inner) {
                    all.done = before + inner.done;
                    all.depth = inner.depth;
                    all.mean_squared_error = inner.mean_squared_error;
                    keep_going = !progress || progress(all);
                    return keep_going;
                });
                if (!wrong) {
                    return in(number, side == &trainers.key ? "key" : "value", wrong.error());
                }
                if (!keep_going) {
                    return {};
                }
            }
        }
        return {};
    }

    /// Reports of a layer's two sides.
    struct layer_report {
        batch_report key;
        batch_report value;
    };
    /// Errors: as `codebook_trainer::accumulate`, and for a layer that is not trained. When values fail, keys have been
    ///         accumulated already.
    [[nodiscard]] result<layer_report> accumulate(std::size_t layer, const tensor_view& keys, const tensor_view& values,
                                                  std::span<const std::uint8_t> mask, const executor& workers) {
        layer_trainers* const trainers = find(layer);
        if (trainers == nullptr) {
            return unknown(layer);
        }
        auto key = trainers->key.accumulate(keys, mask, workers);
        if (!key) {
            return in(layer, "key", key.error());
        }
        auto value = trainers->value.accumulate(values, mask, workers);
        if (!value) {
            return in(layer, "value", value.error());
        }
        return layer_report{key.value(), value.value()};
    }

    /// The EMA weight update of every layer and side.
    [[nodiscard]] status step(const executor& workers = serial_executor()) {
        for (auto& [layer, trainers] : layers_) {
            if (status wrong = trainers.key.step(workers); !wrong) {
                return in(layer, "key", wrong.error());
            }
            if (status wrong = trainers.value.step(workers); !wrong) {
                return in(layer, "value", wrong.error());
            }
        }
        return {};
    }

    /// The codecs that training has arrived at.
    [[nodiscard]] result<model_codecs> make() const {
        model_codecs codecs;
        for (const auto& [layer, trainers] : layers_) {
            auto key = trainers.key.make();
            if (!key) {
                return in(layer, "key", key.error());
            }
            auto value = trainers.value.make();
            if (!value) {
                return in(layer, "value", value.error());
            }
            codecs[layer] = {std::move(key).value(), std::move(value).value()};
        }
        return codecs;
    }

private:
    model_trainer() = default;

    layer_trainers* find(std::size_t layer) {
        const auto found = layers_.find(layer);
        return found == layers_.end() ? nullptr : &found->second;
    }
    static error unknown(std::size_t layer) {
        return {error_code::invalid_argument, "layer " + std::to_string(layer) + " is not among those trained"};
    }
    static error in(std::size_t layer, const char* side, const error& cause) {
        return {cause.code, "layer " + std::to_string(layer) + ", " + side + ": " + cause.message};
    }

    std::map<std::size_t, layer_trainers> layers_;
};

RVQKV_NAMESPACE_END
