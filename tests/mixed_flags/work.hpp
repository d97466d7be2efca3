// SPDX-License-Identifier: MIT
/// @file
/// The work that both files of the program do, each with its own flags. It names no container of the standard library
/// of numbers, so whatever code the linker merges has come from the library.
#pragma once

#include "rvqkv/rvqkv.hpp"

#include <cmath>
#include <cstddef>

/// Holds a tensor in a cache and reads it back; returns the squared error. Static: each file has its own copy.
static double compress() {
    rvqkv::codec_spec spec;
    spec.head_dim = 64;
    spec.shape = {4, 100, 16};
    rvqkv::aligned_buffer<float> weights(spec.shape.size());
    for (std::size_t i = 0; i < weights.size(); ++i) {
        weights[i] = std::sin(static_cast<float>(i * i));
    }
    spec.grouping = rvqkv::grouping_kind::permuted;
    if (rvqkv::make_codec<float>(spec, weights.span()).ok()) {
        return 0;  // there is no permutation
    }
    spec.grouping = rvqkv::grouping_kind::strided;
    const auto codec = rvqkv::make_codec<float>(spec, weights.span()).value();

    rvqkv::kv_cache_config config;
    config.layers.assign(2, {{codec, 2}, {codec, 2}});
    config.recent_tokens = 0;
    auto cache = rvqkv::kv_cache::create(config).value();
    auto sequence = cache.new_sequence().value();
    auto workspace = cache.make_workspace().value();
    const rvqkv::tensor_shape shape{50, 2, spec.head_dim};
    rvqkv::aligned_buffer<float> keys(shape.tokens * shape.heads * shape.channels);
    for (std::size_t i = 0; i < keys.size(); ++i) {
        keys[i] = std::cos(static_cast<float>(3 * i));
    }
    rvqkv::aligned_buffer<rvqkv::float16> restored(keys.size());
    for (int i = 0; i < 3; ++i) {
        sequence.append(0, {keys.data(), shape}, {keys.data(), shape}, workspace).value();
    }
    sequence.truncate(0, 120).value();
    sequence.reconstruct_keys(0, 50, {restored.data(), shape}, workspace).value();
    double sum = 0;
    for (std::size_t i = 0; i < keys.size(); ++i) {
        const double difference = static_cast<double>(keys[i] - rvqkv::to_float(restored[i]));
        sum += difference * difference;
    }
    return sum;
}
