// SPDX-License-Identifier: MIT
/// @file
/// What a cache is told when it is made, and what of it makes no sense.
#pragma once

#include "rvqkv/attend/layer_config.hpp"
#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/cache/page_source.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/quantize/codec.hpp"

#include <cstddef>
#include <limits>
#include <string>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// A cache's layers, and how it holds tokens by their age: the first ones and the latest ones exactly, those between as
/// codes. For 32 equal layers of 8 heads: `config.layers.assign(32, {{key_codec, 8}, {value_codec, 8}})`. The paper's
/// plain setting, codes alone: `sink_tokens = 0`, `recent_tokens = 0`.
struct kv_cache_config {
    std::vector<kv_layer_config> layers;
    std::size_t page_tokens = 64;         ///< Tokens of a page, which are coded together; a multiple of 64.
    std::size_t sink_tokens = 4;          ///< A sequence's first tokens, which stay exact: models look at them a lot.
    std::size_t recent_tokens = 64;       ///< The latest tokens, exact at least as long as so many are no later.
    dtype exact_type = dtype::float16;    ///< Of exact tokens, and of what is coded; or bfloat16.
    page_source* source = nullptr;        ///< Where pages come from: null is `operator new`. It outlives the cache.
    std::size_t page_budget = unlimited;  ///< Most bytes of pages at a time, all sequences together.

    static constexpr std::size_t unlimited = std::numeric_limits<std::size_t>::max();

    /// Errors: `invalid_argument` naming the layer, side and field that makes no sense, and its value.
    [[nodiscard]] status validate() const {
        if (layers.empty()) {
            return wrong("layers is empty, a cache needs at least 1");
        }
        if (page_tokens == 0 || page_tokens > most || page_tokens % tile_tokens != 0) {
            return wrong("page_tokens is " + std::to_string(page_tokens) + ", must be a multiple of " +
                         std::to_string(tile_tokens) + " from " + std::to_string(tile_tokens) + " to " +
                         std::to_string(most));
        }
        for (const auto& [name, value] :
             {std::pair{"sink_tokens", sink_tokens}, std::pair{"recent_tokens", recent_tokens}}) {
            if (value > most) {
                return wrong(std::string(name) + " is " + std::to_string(value) + ", must be from 0 to " +
                             std::to_string(most));
            }
        }
        if (size_of(exact_type) != 2) {
            return wrong("exact_type is " + std::string(name_of(exact_type)) + ", must be float16 or bfloat16");
        }
        for (std::size_t i = 0; i < layers.size(); ++i) {
            if (status bad = validate_layer(i); !bad) {
                return bad;
            }
        }
        return {};
    }

private:
    // Enough for any model, and no product of extents overflows.
    static constexpr std::size_t most = 65536;
    static constexpr std::size_t most_page_values = std::size_t{1} << 40U;

    [[nodiscard]] static error wrong(const std::string& text) { return {error_code::invalid_argument, text}; }

    [[nodiscard]] status validate_layer(std::size_t i) const {
        const kv_layer_config& layer = layers[i];
        const std::string where = "layer " + std::to_string(i);
        if (layer.shares_layer != kv_layer_config::no_layer) {
            if (layer.shares_layer >= i || layers[layer.shares_layer].is_empty()) {
                return wrong(where + ": shares_layer is " + std::to_string(layer.shares_layer) +
                             ", must be an earlier layer that has a cache of its own");
            }
            if (!layer.is_empty()) {
                return wrong(where + ": shares layer " + std::to_string(layer.shares_layer) +
                             "'s cache, so it must have no codecs and no heads");
            }
            const std::size_t window = layers[layer.shares_layer].sliding_window;
            if (window != 0 && (layer.sliding_window == 0 || layer.sliding_window > window)) {
                return wrong(where + ": sliding_window is " + std::to_string(layer.sliding_window) + ", but layer " +
                             std::to_string(layer.shares_layer) + " keeps " + std::to_string(window) + " tokens only");
            }
            return {};
        }
        if (layer.is_empty()) {
            return {};
        }
        if (status bad = layer.validate(); !bad) {
            return error{bad.error().code, where + ": " + bad.error().message};
        }
        for (const kv_side_config* side : {&layer.keys, &layer.values}) {
            std::size_t values = 0;
            if (side->heads > most ||
                __builtin_mul_overflow(page_tokens * side->heads, side->codec->head_dim(), &values) ||
                values > most_page_values) {
                return wrong(where + (side == &layer.keys ? " keys: " : " values: ") + std::to_string(side->heads) +
                             " heads of " + std::to_string(side->codec->head_dim()) +
                             " channels are more than a page can hold");
            }
        }
        if (layer.coding == key_coding::block_relative &&
            (layer.block_tokens % page_tokens != 0 || layer.block_tokens < sink_tokens)) {
            return wrong(where + ": block_tokens is " + std::to_string(layer.block_tokens) +
                         ", must be a multiple of page_tokens " + std::to_string(page_tokens) +
                         " and no less than sink_tokens " + std::to_string(sink_tokens));
        }
        return {};
    }
};

RVQKV_NAMESPACE_END
