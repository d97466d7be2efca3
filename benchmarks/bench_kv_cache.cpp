// SPDX-License-Identifier: MIT
/// @file
/// The cache as a decode loop meets it: one layer of Llama-3-8B's shape, 8 KV heads of 128 channels.
#include "rvqkv/cache/kv_cache.hpp"
#include "rvqkv/quantize/residual_quantizer.hpp"
#include "support/counters.hpp"
#include "support/data.hpp"

#include <benchmark/benchmark.h>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

namespace {

constexpr std::size_t heads = 8;
constexpr std::size_t head_dim = 128;
constexpr rvqkv::codebook_shape fast{3, 128, 8};

std::shared_ptr<const rvqkv::codec> make_codec(const rvqkv::codebook_shape& shape, rvqkv::grouping_kind grouping) {
    rvqkv::codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = shape;
    spec.grouping = grouping;
    return rvqkv::make_codec(spec, bench::weights(shape).span()).value();
}

/// With `exact_tokens`, sinks and recent tokens are as by default; else all full pages become codes.
rvqkv::kv_cache make_cache(const rvqkv::codebook_shape& shape, bool exact_tokens) {
    rvqkv::kv_cache_config config;
    config.layers = {{{make_codec(shape, rvqkv::grouping_kind::strided), heads},
                      {make_codec(shape, rvqkv::grouping_kind::contiguous), heads}}};
    if (!exact_tokens) {
        config.sink_tokens = 0;
        config.recent_tokens = 0;
    }
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

/// A decode loop's part: one token at a time, its share of the encoding included.
void append(benchmark::State& state, const rvqkv::codebook_shape& shape) {
    constexpr std::size_t most = 4096;
    const rvqkv::kv_cache cache = make_cache(shape, true);
    auto sequence = cache.new_sequence().value();
    auto workspace = cache.make_workspace().value();
    sequence.reserve(most).value();
    const auto numbers = tensor(1);
    const rvqkv::tensor_view token(numbers.data(), {1, heads, head_dim});
    for (auto _ : state) {
        sequence.append(0, token, token, workspace).value();
        if (sequence.tokens(0) == most) {
            sequence.clear();
        }
    }
    bench::set_tokens(state, 1);
}

/// A prompt at once.
void prefill(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t tokens) {
    const rvqkv::kv_cache cache = make_cache(shape, false);
    auto sequence = cache.new_sequence().value();
    auto workspace = cache.make_workspace().value();
    sequence.reserve(tokens).value();
    const auto keys = tensor(tokens);
    const auto values = tensor(tokens);
    const rvqkv::tensor_shape extents{tokens, heads, head_dim};
    for (auto _ : state) {
        sequence.append(0, {keys.data(), extents}, {values.data(), extents}, workspace).value();
        sequence.clear();
    }
    bench::set_tokens(state, tokens);
}

/// The encoding alone of what `prefill` takes: its vectors scaled and grouped beforehand, codes in planes as in pages.
void encode(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t tokens) {
    const rvqkv::residual_quantizer<> quantizer(
        rvqkv::residual_codebook<>::create(shape, bench::weights(shape).span()).value());
    const std::size_t groups = head_dim / shape.dim;
    const std::size_t rows = tokens * heads * groups;
    const auto numbers = tensor(tokens);
    rvqkv::aligned_buffer<float> keys(numbers.size());
    rvqkv::aligned_buffer<float> values(numbers.size());
    for (std::size_t i = 0; i < numbers.size(); i += head_dim) {
        const float* const from = numbers.data() + i;
        const float mean = std::accumulate(from, from + head_dim, 0.0F) / head_dim;
        float sum = 0.0F;
        for (std::size_t c = 0; c < head_dim; ++c) {
            sum += (from[c] - mean) * (from[c] - mean);
        }
        const float factor = 1.0F / std::sqrt(sum / (head_dim - 1));
        for (std::size_t c = 0; c < head_dim; ++c) {
            values[i + c] = factor * from[c];
            keys[i + c % groups * shape.dim + c / groups] = factor * from[c];
        }
    }
    rvqkv::aligned_buffer<float> left(numbers.size());
    std::vector<rvqkv::code_t> codes(rows * shape.depths);
    for (auto _ : state) {
        for (const auto* side : {&keys, &values}) {
            std::copy_n(side->data(), left.size(), left.data());
            quantizer.encode_codes({left.data(), rows, shape.dim}, codes.data(), {1, rows});
        }
        benchmark::DoNotOptimize(codes.data());
        benchmark::ClobberMemory();
    }
    bench::set_tokens(state, tokens);
}

void reconstruct(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t tokens) {
    const rvqkv::kv_cache cache = make_cache(shape, false);
    auto sequence = cache.new_sequence().value();
    auto workspace = cache.make_workspace().value();
    const auto keys = tensor(tokens);
    const rvqkv::tensor_shape extents{tokens, heads, head_dim};
    sequence.append(0, {keys.data(), extents}, {keys.data(), extents}, workspace).value();
    rvqkv::aligned_buffer<float> out(tokens * heads * head_dim);
    for (auto _ : state) {
        sequence.reconstruct_keys(0, 0, {out.data(), extents}, workspace).value();
        benchmark::ClobberMemory();
    }
    bench::set_tokens(state, tokens);
}

const bool registered = [] {
    for (const rvqkv::codebook_shape& shape : {bench::paper, bench::light, fast}) {
        const std::string label = "/depths:" + std::to_string(shape.depths) +
                                  "/codewords:" + std::to_string(shape.codewords) +
                                  "/dim:" + std::to_string(shape.dim) + "/tokens:";
        benchmark::RegisterBenchmark(("cache_append" + label + "1").c_str(), append, shape);
        benchmark::RegisterBenchmark(("cache_prefill" + label + "256").c_str(), prefill, shape, std::size_t{256});
        benchmark::RegisterBenchmark(("cache_encode" + label + "256").c_str(), encode, shape, std::size_t{256});
        benchmark::RegisterBenchmark(("cache_reconstruct" + label + "1024").c_str(), reconstruct, shape,
                                     std::size_t{1024});
    }
    return true;
}();

}  // namespace
