// SPDX-License-Identifier: MIT
/// @file
/// What llama.cpp's sequence state says, taken apart: positions, and keys and values of every layer as the cache holds
/// them; and put together again.
#pragma once

#include "tap.hpp"

#include <rvqkv/cache/kv_cache.hpp>
#include <rvqkv/core/half.hpp>
#include <rvqkv/quantize/codec.hpp>

#include <llama.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace llama_example {

/// A sequence of a context with a float16 cache and flash attention: `[token, head, channel]`, keys after rotary
/// embedding.
///
/// The state begins with a mark and the sequence's number. A part follows for layers that see all tokens, and one for
/// those with a sliding window, if there are any: streams (1), cells; of each cell position, sequences (1) and their
/// numbers; whether values are transposed (no), layers; of each layer the keys' type, bytes of a row, rows; then the
/// same of the values. All numbers little-endian.
struct sequence_state {
    struct layer_rows {
        std::size_t layer = 0;
        std::vector<rvqkv::float16> keys;
        std::vector<rvqkv::float16> values;
    };
    struct part {
        std::vector<llama_pos> positions;  ///< Rising by 1, in whichever order the cells are.
        std::vector<layer_rows> layers;
    };
    std::uint32_t mark = 0;
    std::vector<part> parts;

    /// Throws `std::runtime_error` for a state that is not as above.
    [[nodiscard]] static sequence_state take_apart(std::span<const std::uint8_t> bytes,
                                                   const model_attention& attention);
    [[nodiscard]] std::vector<std::uint8_t> put_together(const model_attention& attention) const;
};

/// A context's sequence 0 as bytes, by llama.cpp's own function, and back.
[[nodiscard]] std::vector<std::uint8_t> get_state(llama_context* context);
void set_state(llama_context* context, std::span<const std::uint8_t> bytes);

/// The library's cache for a model. Keys are un-turned before they are coded, and turned again when they are read.
[[nodiscard]] rvqkv::kv_cache make_cache(const model_attention& attention, const rvqkv::model_codecs& codecs);

/// Adds a state's tokens to a sequence. Where tokens have left a sliding window, zeros stand for them, which the
/// sequence drops.
void append(rvqkv::kv_sequence& sequence, const sequence_state& state, const model_attention& attention,
            rvqkv::kv_workspace& workspace, const rvqkv::executor& workers);

/// Replaces a state's keys and values by those that a sequence holds of its positions.
void reconstruct(const rvqkv::kv_sequence& sequence, sequence_state& state, const model_attention& attention,
                 rvqkv::kv_workspace& workspace);

}  // namespace llama_example
