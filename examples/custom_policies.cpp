// SPDX-License-Identifier: MIT
/// @file
/// A scaling and a grouping policy of one's own (custom_policies.hpp), composed to a quantizer beside the paper's, and
/// both behind the same `codec` interface that caches use. Prints bits and error of each.
#include "custom_policies.hpp"

#include <rvqkv/rvqkv.hpp>

#include <cstddef>
#include <cstdio>
#include <exception>
#include <memory>
#include <random>
#include <utility>
#include <vector>

namespace {

constexpr std::size_t head_dim = 64;
constexpr rvqkv::codebook_shape shape{6, 256, 16};
constexpr rvqkv::tensor_shape tokens{256, 2, head_dim};

/// Codewords at random, finer from depth to depth: enough to see policies work. Real ones are learned.
rvqkv::residual_codebook<> make_codebook(std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<float> weights(shape.size());
    float size = 1.0F;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        if (i != 0 && i % (shape.codewords * shape.dim) == 0) {
            size *= 0.8F;
        }
        weights[i] = i / shape.dim % shape.codewords == 0 ? 0.0F : size * normal(random);  // codeword 0: change nothing
    }
    return rvqkv::residual_codebook<>::create(shape, std::span<const float>(weights)).value();
}

/// Keys whose rotary pairs are neighbours of like size, with a few outliers among the channels.
std::vector<float> make_keys(std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<float> keys(tokens.tokens * tokens.heads * tokens.channels);
    for (std::size_t i = 0; i < keys.size(); ++i) {
        keys[i] = (i % head_dim / 2 == 5 ? 4.0F : 1.0F) * normal(random);
    }
    return keys;
}

/// Squared error of the reconstruction, relative to the keys'.
double relative_error(const rvqkv::codec& codec, const std::vector<float>& keys) {
    const std::size_t rows = tokens.tokens * tokens.heads;
    std::vector<rvqkv::code_t> codes(rows * codec.groups() * codec.depths());
    std::vector<float> scales(rows);
    std::vector<float> restored(keys.size());
    const rvqkv::code_strides strides{codec.depths(), 1};
    rvqkv::quantizer_workspace workspace;
    codec.encode({keys.data(), tokens}, {codes.data(), strides, scales.data()}, workspace).value();
    codec.decode({codes.data(), strides, scales.data()}, {restored.data(), tokens}, codec.depths(), workspace).value();
    double error = 0.0;
    double size = 0.0;
    for (std::size_t i = 0; i < keys.size(); ++i) {
        const double key = static_cast<double>(keys[i]);
        const double difference = key - static_cast<double>(restored[i]);
        error += difference * difference;
        size += key * key;
    }
    return error / size;
}

}  // namespace

int main() try {
    std::mt19937 random(1);
    const rvqkv::residual_codebook<> codebook = make_codebook(random);
    const std::vector<float> keys = make_keys(random);

    using custom_quantizer = rvqkv::vector_quantizer<custom::mean_magnitude_scale, custom::strided_pairs_grouping>;
    const std::pair<const char*, std::shared_ptr<const rvqkv::codec>> codecs[] = {
        {"std_dev, strided (the paper's)", rvqkv::make_codec(rvqkv::key_quantizer::create(head_dim, codebook).value())},
        {"mean_magnitude, strided_pairs", rvqkv::make_codec(custom_quantizer::create(head_dim, codebook).value())},
    };
    for (const auto& [name, codec] : codecs) {
        std::printf("%-32s %6.3f bits per value, relative squared error %.4f\n", name,
                    static_cast<double>(codec->bits_per_row()) / static_cast<double>(head_dim),
                    relative_error(*codec, keys));
    }
    return 0;
} catch (const std::exception& failure) {
    std::fprintf(stderr, "custom_policies: %s\n", failure.what());
    return 1;
}
