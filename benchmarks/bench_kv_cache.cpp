// SPDX-License-Identifier: MIT
/// @file
/// The cache as a decode loop meets it: one layer of Llama-3-8B's shape, 8 KV heads of 128 channels.
#include "rvqkv/cache/kv_cache.hpp"
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
    return rvqkv::make_codec(spec, bench::codebook(shape).weights()).value();
}

rvqkv::kv_cache make_cache(const rvqkv::codebook_shape& shape) {
    rvqkv::kv_cache_config config;
    config.layers.push_back({{make_codec(shape, rvqkv::grouping_kind::strided), heads},
                             {make_codec(shape, rvqkv::grouping_kind::contiguous), heads}});
    return rvqkv::kv_cache::create(config).value();
}

void set_tokens(benchmark::State& state, std::size_t tokens) {
    state.counters["tokens"] = benchmark::Counter(static_cast<double>(tokens) * static_cast<double>(state.iterations()),
                                                  benchmark::Counter::kIsRate);
}

void append(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t tokens) {
    rvqkv::kv_cache cache = make_cache(shape);
    cache.reserve(tokens).value();
    const auto keys = bench::gaussian(tokens * heads * head_dim, 4);
    const auto values = bench::gaussian(tokens * heads * head_dim, 5);
    for (auto _ : state) {
        cache.append(0, {keys.data(), {tokens, heads, head_dim}}, {values.data(), {tokens, heads, head_dim}}).value();
        cache.clear();
    }
    set_tokens(state, tokens);
}

void reconstruct(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t tokens) {
    rvqkv::kv_cache cache = make_cache(shape);
    const auto keys = bench::gaussian(tokens * heads * head_dim, 4);
    cache.append(0, {keys.data(), {tokens, heads, head_dim}}, {keys.data(), {tokens, heads, head_dim}}).value();
    rvqkv::aligned_buffer<float> out(tokens * heads * head_dim);
    auto workspace = cache.make_workspace().value();
    for (auto _ : state) {
        cache.reconstruct_keys(0, 0, {out.data(), {tokens, heads, head_dim}}, workspace).value();
        benchmark::ClobberMemory();
    }
    set_tokens(state, tokens);
    state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(out.bytes()));
}

const bool registered = [] {
    for (const rvqkv::codebook_shape& shape :
         {rvqkv::codebook_shape{8, 2048, 32}, rvqkv::codebook_shape{10, 256, 32}}) {
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
