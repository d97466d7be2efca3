// SPDX-License-Identifier: MIT
/// @file
/// The cache in an engine's loop: a prompt at once, a fork that goes on by itself, then token by token, each step
/// reading back what attention needs; a rejected draft is taken back. After the set-up nothing is allocated.
#include <rvqkv/rvqkv.hpp>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <exception>
#include <memory>
#include <random>
#include <vector>

namespace {

constexpr std::size_t layers = 2;
constexpr std::size_t heads = 2;
constexpr std::size_t head_dim = 64;
constexpr std::size_t prompt = 1000;
constexpr std::size_t steps = 64;
constexpr std::size_t draft = 4;

/// Stands in for `load_codecs`: codewords at random, not learned, so errors are large.
std::shared_ptr<const rvqkv::codec> random_codec(rvqkv::grouping_kind grouping, std::mt19937& random) {
    rvqkv::codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = {4, 256, 16};
    spec.grouping = grouping;
    std::normal_distribution<float> normal(0.0F, 0.5F);
    std::vector<float> weights(spec.shape.size());
    for (float& weight : weights) {
        weight = normal(random);
    }
    return rvqkv::make_codec(spec, std::span<const float>(weights)).value();
}

/// Stands in for a layer's projections.
void project(std::vector<rvqkv::bfloat16>& out, std::size_t tokens, std::mt19937& random) {
    std::normal_distribution<float> normal;
    out.resize(tokens * heads * head_dim);
    for (rvqkv::bfloat16& value : out) {
        value = rvqkv::to_bfloat16(normal(random));
    }
}

}  // namespace

int main() try {
    std::mt19937 random(1);
    rvqkv::kv_cache_config config;
    for (std::size_t layer = 0; layer < layers; ++layer) {
        config.layers.push_back({{random_codec(rvqkv::grouping_kind::strided, random), heads},
                                 {random_codec(rvqkv::grouping_kind::contiguous, random), heads}});
    }
    const rvqkv::kv_cache cache = rvqkv::kv_cache::create(config).value();
    rvqkv::kv_workspace workspace = cache.make_workspace().value();
    rvqkv::kv_sequence chat = cache.new_sequence().value();
    chat.reserve(prompt + steps + draft).value();
    std::vector<float> block((prompt + steps) * heads * head_dim);
    std::vector<rvqkv::bfloat16> keys;
    std::vector<rvqkv::bfloat16> values;
    keys.reserve(prompt * heads * head_dim);
    values.reserve(prompt * heads * head_dim);

    double sum = 0.0;  // stands in for attention, which uses every reconstructed number
    for (std::size_t step = 0; step <= steps; ++step) {
        const std::size_t tokens = step == 0 ? prompt : 1;
        for (std::size_t layer = 0; layer < layers; ++layer) {
            project(keys, tokens, random);
            project(values, tokens, random);
            const rvqkv::tensor_shape shape{tokens, heads, head_dim};
            chat.append(layer, {keys.data(), shape}, {values.data(), shape}, workspace).value();
            const std::size_t length = chat.tokens(layer);
            const rvqkv::mutable_tensor_view whole(block.data(), {length, heads, head_dim});
            chat.reconstruct_keys(layer, 0, whole, workspace).value();
            chat.reconstruct_values(layer, 0, whole, workspace).value();
            sum += static_cast<double>(block[length - 1]);
        }
        if (step == 0) {  // another answer to the same prompt would go on from here, sharing its pages
            const rvqkv::kv_sequence other = chat.fork().value();
            sum += static_cast<double>(other.tokens(0));
        }
        if (step % 16 == 15) {  // a draft of four tokens goes in, the model rejects it, and it is taken back
            for (std::size_t layer = 0; layer < layers; ++layer) {
                project(keys, draft, random);
                project(values, draft, random);
                const rvqkv::tensor_shape shape{draft, heads, head_dim};
                chat.append(layer, {keys.data(), shape}, {values.data(), shape}, workspace).value();
            }
            chat.truncate(prompt + step).value();
        }
    }
    const rvqkv::kv_sequence_bytes bytes = chat.bytes();
    const std::size_t exact = layers * chat.tokens(0) * 2 * heads * head_dim * sizeof(rvqkv::bfloat16);
    std::printf("%zu tokens: %zu bytes of codes and scales, %zu of exact tokens, %zu in all, %zu as bfloat16\n",
                chat.tokens(0), bytes.codes + bytes.scales, bytes.exact, bytes.total(), exact);
    return std::isfinite(sum) && chat.tokens(0) == prompt + steps ? 0 : 1;
} catch (const std::exception& failure) {
    std::fprintf(stderr, "kv_cache_loop: %s\n", failure.what());
    return 1;
}
