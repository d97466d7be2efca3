// SPDX-License-Identifier: MIT
/// @file
/// Plain causal attention with rotary embedding: how much a change of keys and values changes what a layer computes.
#pragma once

#include <rvqkv/core/parallel_for.hpp>

#include <cstddef>
#include <vector>

namespace cli {

/// A `[token, head, channel]` tensor in float32.
struct float_tensor {
    std::size_t tokens = 0;
    std::size_t heads = 0;
    std::size_t channels = 0;
    std::vector<float> values;
    [[nodiscard]] float* row(std::size_t token, std::size_t head) {
        return values.data() + (token * heads + head) * channels;
    }
    [[nodiscard]] const float* row(std::size_t token, std::size_t head) const {
        return values.data() + (token * heads + head) * channels;
    }
};

/// How the model sees its tokens.
struct attention_config {
    double rope_theta = 10000.0;  ///< Base of the rotary embedding; 0: the model has none.
    std::size_t window = 2048;    ///< The text was cut into windows of so many positions; tokens see their own only.
    std::size_t first_token = 0;  ///< Number in the text of the tensors' first token.
};

/// Output of every query head for every token: softmax over the earlier tokens of its window and itself, among those
/// given. Keys and queries come without rotary embedding (pairs are channels i and i + channels / 2).
/// Preconditions: all have the same tokens; query heads are a multiple of the others'.
[[nodiscard]] float_tensor attend(const float_tensor& queries, const float_tensor& keys, const float_tensor& values,
                                  const attention_config& config, const rvqkv::executor& workers);

/// Error energy divided by energy: sum (a - b)^2 / sum a^2.
[[nodiscard]] double relative_squared_error(const float_tensor& a, const float_tensor& b);

}  // namespace cli
