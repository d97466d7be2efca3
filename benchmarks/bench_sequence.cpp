// SPDX-License-Identifier: MIT
/// @file
/// A sequence of 32,768 tokens as an engine meets it: attention through `kv_sequence`, one more token, and what it
/// holds. The tokens are random, and were really appended.
#include "rvqkv/cache/kv_cache.hpp"
#include "rvqkv/cache/page_source.hpp"
#include "support/attention_data.hpp"
#include "support/counters.hpp"

#include <benchmark/benchmark.h>
#include <cstddef>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr std::size_t context = 32768;
constexpr std::size_t row_size = bench::kv_heads * bench::head_dim;
constexpr std::size_t piece = 4096;

/// Keys, or values, of `piece` tokens.
const std::vector<float>& random_tokens() {
    static const std::vector<float> numbers = [] {
        std::mt19937 random(11);
        std::normal_distribution<float> normal;
        std::vector<float> made(piece * row_size);
        for (float& number : made) {
            number = normal(random);
        }
        return made;
    }();
    return numbers;
}

rvqkv::tensor_view tokens_view(std::size_t tokens) {
    return {random_tokens().data(), {tokens, bench::kv_heads, bench::head_dim}};
}

/// A cache of one layer over huge pages, with the default sinks and recent tokens, and a sequence that fills it.
struct filled {
    bench::arena memory{std::size_t{128} << 20U};
    rvqkv::arena_page_source source{memory.span()};
    rvqkv::kv_cache_config config;
    rvqkv::kv_cache cache;
    rvqkv::kv_sequence sequence;
    rvqkv::kv_workspace workspace;

    explicit filled(const bench::preset& given)
        : config(configure(given, source)),
          cache(rvqkv::kv_cache::create(config).value()),
          sequence(cache.new_sequence().value()),
          workspace(cache.make_workspace().value()) {
        for (std::size_t tokens = 0; tokens < context; tokens += piece) {
            sequence.append(0, tokens_view(piece), tokens_view(piece), workspace).value();
        }
    }

    static rvqkv::kv_cache_config configure(const bench::preset& given, rvqkv::page_source& source) {
        rvqkv::kv_cache_config made;
        made.layers = {bench::layer_config(given)};
        made.source = &source;
        return made;
    }
};

/// Each preset's sequence is made once.
filled& sequence_of(const bench::preset& given) {
    static std::map<std::string, filled> made;
    return made.try_emplace(given.name, given).first->second;
}

/// What it should take: codes and scales of the tokens whose pages are full and older than the recent ones, and float16
/// for the others.
double bytes_by_formula(const rvqkv::kv_cache_config& config) {
    const rvqkv::codec& codec = *config.layers[0].keys.codec;
    const std::size_t coded =
        (context - config.sink_tokens - config.recent_tokens) / config.page_tokens * config.page_tokens;
    const double code_bytes = static_cast<double>(codec.groups() * codec.depths() * codec.bits_per_code()) / 8;
    const double scale_bytes = codec.stores_scale() ? static_cast<double>(rvqkv::size_of(codec.scale_type())) : 0.0;
    const double exact_bytes = 2.0 * bench::head_dim;
    return 2.0 * bench::kv_heads *
           ((code_bytes + scale_bytes) * static_cast<double>(coded) +
            exact_bytes * static_cast<double>(context - coded));
}

void attend(benchmark::State& state, const bench::preset& given) {
    const filled& held = sequence_of(given);
    auto workspace = held.cache.make_attention_workspace().value();
    std::vector<float> out(bench::query_heads * bench::head_dim);
    const rvqkv::tensor_shape shape{1, bench::query_heads, bench::head_dim};
    for (auto _ : state) {
        held.sequence.attend(0, {bench::attention_queries().data(), shape}, {out.data(), shape}, workspace).value();
        benchmark::ClobberMemory();
    }
    bench::set_tokens(state, context);
    state.counters["held"] = static_cast<double>(held.sequence.bytes().total());
    state.counters["formula"] = bytes_by_formula(held.config);
}

/// One token at a time, its share of the encoding included, at the end of so many.
void append_one(benchmark::State& state, const bench::preset& given, std::size_t tokens) {
    constexpr std::size_t most_more = 4096;
    filled& held = sequence_of(given);
    auto sequence = held.sequence.fork().value();
    sequence.truncate(tokens).value();
    sequence.reserve(tokens + most_more).value();
    for (auto _ : state) {
        if (sequence.tokens(0) == tokens + most_more) {
            state.PauseTiming();
            sequence.truncate(tokens).value();
            state.ResumeTiming();
        }
        sequence.append(0, tokens_view(1), tokens_view(1), held.workspace).value();
    }
    bench::set_tokens(state, 1);
}

const bool registered = [] {
    if (!bench::has_dense_attention()) {
        return false;
    }
    for (const bench::preset* given : {&bench::fast, &bench::smallest, &bench::paper_keys}) {
        benchmark::RegisterBenchmark(
            (std::string("sequence_attend_") + given->name + bench::context_label(context)).c_str(),
            [given](benchmark::State& state) { attend(state, *given); })
            ->Unit(benchmark::kMillisecond);
    }
    for (const std::size_t tokens : {std::size_t{1024}, context}) {
        benchmark::RegisterBenchmark(("append_one" + bench::context_label(tokens)).c_str(),
                                     [tokens](benchmark::State& state) { append_one(state, bench::fast, tokens); });
    }
    return true;
}();

}  // namespace
