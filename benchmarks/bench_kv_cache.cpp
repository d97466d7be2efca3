// SPDX-License-Identifier: MIT
/// @file
/// The cache as a decode loop meets it: one layer of Llama-3-8B's shape, 8 KV heads of 128 channels.
#include "rvqkv/cache/kv_cache.hpp"
#include "support/counters.hpp"
#include "support/data.hpp"

#include <benchmark/benchmark.h>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace {

constexpr std::size_t heads = 8;
constexpr std::size_t head_dim = 128;

std::shared_ptr<const rvqkv::codec> make_codec(const rvqkv::codebook_shape& shape, rvqkv::grouping_kind grouping) {
    rvqkv::codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = shape;
    spec.grouping = grouping;
    return rvqkv::make_codec(spec, bench::weights(shape).span()).value();
}

rvqkv::kv_cache make_cache(const rvqkv::codebook_shape& shape) {
    rvqkv::kv_cache_config config;
    config.layers.push_back({{make_codec(shape, rvqkv::grouping_kind::strided), heads},
                             {make_codec(shape, rvqkv::grouping_kind::contiguous), heads}});
    return rvqkv::kv_cache::create(config).value();
}

/// Keys or values of so many tokens, from the vectors that all benchmarks share.
rvqkv::aligned_buffer<float> tensor(std::size_t tokens) {
    const auto& vectors = bench::held_out_vectors(bench::paper.dim);
    rvqkv::aligned_buffer<float> numbers(tokens * heads * head_dim);
    for (std::size_t i = 0; i < numbers.size(); ++i) {
        numbers[i] = vectors[i % vectors.size()];
    }
    return numbers;
}

void append(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t tokens) {
    rvqkv::kv_cache cache = make_cache(shape);
    cache.reserve(tokens).value();
    const auto keys = tensor(tokens);
    const auto values = tensor(tokens);
    for (auto _ : state) {
        cache.append(0, {keys.data(), {tokens, heads, head_dim}}, {values.data(), {tokens, heads, head_dim}}).value();
        cache.clear();
    }
    bench::set_tokens(state, tokens);
}

void reconstruct(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t tokens) {
    rvqkv::kv_cache cache = make_cache(shape);
    const auto keys = tensor(tokens);
    cache.append(0, {keys.data(), {tokens, heads, head_dim}}, {keys.data(), {tokens, heads, head_dim}}).value();
    rvqkv::aligned_buffer<float> out(tokens * heads * head_dim);
    auto workspace = cache.make_workspace().value();
    for (auto _ : state) {
        cache.reconstruct_keys(0, 0, {out.data(), {tokens, heads, head_dim}}, workspace).value();
        benchmark::ClobberMemory();
    }
    bench::set_tokens(state, tokens);
}

const bool registered = [] {
    for (const rvqkv::codebook_shape& shape : {bench::paper, bench::light}) {
        const std::string label = "/depths:" + std::to_string(shape.depths) +
                                  "/codewords:" + std::to_string(shape.codewords) + "/dim:32/tokens:";
        benchmark::RegisterBenchmark(("cache_append" + label + "1").c_str(), append, shape, std::size_t{1});
        benchmark::RegisterBenchmark(("cache_append" + label + "256").c_str(), append, shape, std::size_t{256});
        benchmark::RegisterBenchmark(("cache_reconstruct" + label + "1024").c_str(), reconstruct, shape,
                                     std::size_t{1024});
    }
    return true;
}();

}  // namespace
