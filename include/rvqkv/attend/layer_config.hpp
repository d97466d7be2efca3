// SPDX-License-Identifier: MIT
/// @file
/// One layer of a model as its cache sees it: heads, formats, and what positions do to the keys.
#pragma once

#include "rvqkv/attend/rope.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/quantize/codec.hpp"

#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <string>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// A layer's keys, or its values: what codes them, and how many heads they have. Sides may differ in everything.
struct kv_side_config {
    std::shared_ptr<const rvqkv::codec> codec;
    std::size_t heads = 0;  ///< KV heads, not query heads.
};

/// In which state keys are stored.
enum class key_coding {
    as_given,        ///< The cache knows no positions: attention multiplies queries and keys as they come.
    before_rope,     ///< Not turned; turned when they are read, which makes shifting positions exact. The paper's way.
    after_rope,      ///< Turned to their position: attention can read codes through tables.
    block_relative,  ///< Turned by their distance from their block's start; the query takes the rest, block by block.
};

/// One layer. For a model's 32 equal layers of 8 KV heads: `layers.assign(32, {{key_codec, 8}, {value_codec, 8}})`.
struct kv_layer_config {
    kv_side_config keys;
    kv_side_config values;
    std::size_t query_heads = 0;  ///< A multiple of the KV heads, which are then as many for keys and values; 0: equal.
    std::size_t sliding_window = 0;  ///< Tokens that a query sees, its own included; 0: all.
    key_coding coding = key_coding::as_given;
    bool turned_input = true;  ///< Whether keys and queries come after rotary embedding (not for `as_given`).
    rope_config rope = {};     ///< Not for `as_given`.
    /// `[head, head_dim]` before rotary embedding, taken out of what is coded; or empty.
    std::vector<float> key_mean = {};
    std::size_t block_tokens = 1024;  ///< For `block_relative`.
    /// The layer whose keys and values this one reads, too, instead of having its own: an earlier one. The rest of the
    /// configuration is that one's then, and here only `query_heads` and `sliding_window` may be set, the window no
    /// wider than that one's.
    std::size_t shares_layer = no_layer;
    static constexpr std::size_t no_layer = std::numeric_limits<std::size_t>::max();

    /// Without codecs and heads: a layer without attention, or one that shares another's cache.
    [[nodiscard]] bool is_empty() const noexcept {
        return keys.heads == 0 && values.heads == 0 && keys.codec == nullptr && values.codec == nullptr;
    }

    /// Whether so many query heads can read this cache. Errors: `invalid_argument`.
    [[nodiscard]] status validate_query_heads(std::size_t count) const {
        if (count != 0 && (keys.heads != values.heads || count % keys.heads != 0)) {
            return error{error_code::invalid_argument,
                         "query_heads is " + std::to_string(count) + ", must be a multiple of the KV heads: " +
                             std::to_string(keys.heads) + " of keys, " + std::to_string(values.heads) + " of values"};
        }
        return {};
    }
    /// Errors: `invalid_argument` naming the field and its value.
    [[nodiscard]] status validate() const {
        const auto wrong = [](std::string message) { return error{error_code::invalid_argument, std::move(message)}; };
        if (keys.codec == nullptr || values.codec == nullptr) {
            return wrong(std::string(keys.codec == nullptr ? "keys" : "values") + " have no codec");
        }
        if (keys.heads == 0 || values.heads == 0) {
            return wrong(std::string(keys.heads == 0 ? "keys" : "values") + ".heads is 0, must be at least 1");
        }
        if (status bad = validate_query_heads(query_heads); !bad) {
            return bad;
        }
        const std::size_t mean_size = keys.heads * keys.codec->head_dim();
        if (!key_mean.empty() && key_mean.size() != mean_size) {
            return wrong("key_mean has " + std::to_string(key_mean.size()) +
                         " numbers, must have heads x head_dim = " + std::to_string(mean_size));
        }
        for (const float number : key_mean) {
            if (!std::isfinite(number)) {
                return wrong("a number of key_mean is not finite");
            }
        }
        if (coding == key_coding::block_relative && block_tokens == 0) {
            return wrong("block_tokens is 0, must be at least 1");
        }
        return coding == key_coding::as_given ? status() : rope.validate(keys.codec->head_dim());
    }
};

RVQKV_NAMESPACE_END
