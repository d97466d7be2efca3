// SPDX-License-Identifier: MIT
#include "support/attention_data.hpp"

#include "rvqkv/quantize/byte_grid.hpp"

#include <sys/mman.h>
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>

namespace bench {
namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20U;
constexpr std::size_t head_values = (longest_context + dense_ahead) * head_dim;

const std::uint16_t* dense_data() {
    static const arena memory(2 * kv_heads * head_values * sizeof(std::uint16_t));
    static const auto* const filled = [] {
        std::mt19937_64 random(5);
        for (std::size_t i = 0; i < 2 * kv_heads * head_values * sizeof(std::uint16_t); i += sizeof(std::uint64_t)) {
            const std::uint64_t numbers = 0x3000300030003000U + (random() & 0x8bff8bff8bff8bffU);
            std::memcpy(memory.data() + i, &numbers, sizeof(numbers));
        }
        return reinterpret_cast<const std::uint16_t*>(memory.data());
    }();
    return filled;
}

}  // namespace

arena::arena(std::size_t bytes)
    : bytes_((bytes + huge_page - 1) / huge_page * huge_page),
      data_(static_cast<std::byte*>(std::aligned_alloc(huge_page, bytes_))) {
    if (data_ == nullptr) {
        std::abort();
    }
    madvise(data_, bytes_, MADV_HUGEPAGE);
    std::memset(data_, 0, bytes_);
}

arena::~arena() {
    std::free(data_);
}

rvqkv::kv_layer_config layer_config(const preset& given) {
    rvqkv::codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = given.shape;
    spec.weight_type = rvqkv::dtype::bfloat16;
    const auto trained = weights(given.shape).span();
    std::vector<float> of_values(trained.begin(), trained.end());
    if (given.shape.codewords <= 256) {
        rvqkv::round_to_bytes(given.shape, of_values);
    }
    rvqkv::kv_layer_config config;
    config.keys = {rvqkv::make_codec(spec, trained).value(), kv_heads};
    config.values = {rvqkv::make_codec(spec, std::span<const float>(of_values)).value(), kv_heads};
    config.query_heads = query_heads;
    config.coding = given.coding;
    if (given.has_mean) {
        config.key_mean.assign(kv_heads * head_dim, 0.5F);
    }
    return config;
}

const std::vector<float>& attention_queries() {
    static const std::vector<float> queries = [] {
        std::mt19937 random(7);
        std::normal_distribution<float> normal;
        std::vector<float> made(query_heads * head_dim);
        std::generate(made.begin(), made.end(), [&] { return normal(random); });
        return made;
    }();
    return queries;
}

const std::uint16_t* dense_keys(std::size_t head) {
    return dense_data() + 2 * head * head_values;
}

const std::uint16_t* dense_values(std::size_t head) {
    return dense_keys(head) + head_values;
}

void dense_head(const std::uint16_t* keys, const std::uint16_t* values, std::size_t tokens, std::size_t head,
                float* out) {
    constexpr std::size_t size = dense_group * head_dim;
    const float* const given = attention_queries().data() + head * size;
    float queries[size];
    std::transform(given, given + size, queries,
                   [](float number) { return number / std::sqrt(static_cast<float>(head_dim)); });
    dense_attention(keys, values, tokens, queries, out);
}

std::string context_label(std::size_t tokens, std::size_t threads) {
    return "/tokens:" + std::to_string(tokens) + "/threads:" + std::to_string(threads);
}

}  // namespace bench
