// SPDX-License-Identifier: MIT
/// @file
/// Attention of one decode step on codes, one layer, beside dense attention over float16 keys and values in memory of
/// the same kind. Codes are random: what they are changes nothing about the work.
#include "dense_attention.hpp"
#include "rvqkv/attend/layer_attention.hpp"
#include "rvqkv/core/thread_pool.hpp"
#include "support/attention_data.hpp"
#include "support/counters.hpp"

#include <benchmark/benchmark.h>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr std::size_t page_tokens = 256;

/// A layer's codes for the longest context.
class coded_layer {
public:
    explicit coded_layer(const bench::preset& given) {
        const rvqkv::kv_layer_config config = bench::layer_config(given);
        attention_ = std::make_unique<rvqkv::layer_attention>(rvqkv::layer_attention::create(config).value());
        const std::size_t depths = given.shape.depths;
        format_.tokens = page_tokens;
        format_.coded_keys = {*config.keys.codec, bench::kv_heads, page_tokens, depths, 0};
        format_.coded_values = {*config.values.codec, bench::kv_heads, page_tokens, depths, format_.coded_keys.end()};
        format_.bytes = (format_.coded_values.end() + 63) / 64 * 64;
        const std::size_t pages = bench::longest_context / page_tokens;
        memory_ = std::make_unique<bench::arena>(pages * format_.bytes);
        std::mt19937_64 random(3);
        for (std::size_t page = 0; page < pages; ++page) {
            std::byte* const at = memory_->data() + page * format_.bytes;
            for (const rvqkv::coded_layout* side : {&format_.coded_keys, &format_.coded_values}) {
                fill(at, *side, random);
            }
            const auto position = static_cast<std::int64_t>(page * page_tokens);
            runs_.push_back({at, &format_, 0, page_tokens, position,
                             given.coding == rvqkv::key_coding::before_rope ? 0 : position});
        }
    }

    [[nodiscard]] const rvqkv::layer_attention& attention() const { return *attention_; }
    [[nodiscard]] std::span<const rvqkv::page_run> runs(std::size_t tokens) const {
        return std::span(runs_).first(tokens / page_tokens);
    }

private:
    static void fill(std::byte* page, const rvqkv::coded_layout& side, std::mt19937_64& random) {
        for (std::size_t i = side.begin(); i < side.end(); i += sizeof(std::uint64_t)) {
            const std::uint64_t bits = random();
            std::memcpy(page + i, &bits, sizeof(bits));
        }
        const auto one = rvqkv::to_float16(1.0F);
        for (std::size_t head = 0; side.has_scales() && head < bench::kv_heads; ++head) {
            for (std::size_t token = 0; token < page_tokens; ++token) {
                std::memcpy(page + side.scales(head) + token * sizeof(one), &one, sizeof(one));
            }
        }
    }

    std::unique_ptr<rvqkv::layer_attention> attention_;
    rvqkv::page_format format_;
    std::unique_ptr<bench::arena> memory_;
    std::vector<rvqkv::page_run> runs_;
};

/// Each preset's codes are made once.
const coded_layer& layer_of(const bench::preset& given) {
    static std::map<std::string, coded_layer> made;
    return made.try_emplace(given.name, given).first->second;
}

void on_codes(benchmark::State& state, const bench::preset& given, std::size_t tokens, std::size_t threads) {
    const coded_layer& layer = layer_of(given);
    const rvqkv::thread_pool pool(threads);
    std::vector<float> out(bench::query_heads * bench::head_dim);
    rvqkv::attention_workspace workspace;
    const rvqkv::tensor_shape shape{1, bench::query_heads, bench::head_dim};
    for (auto _ : state) {
        layer.attention()
            .attend(layer.runs(tokens), {bench::attention_queries().data(), shape},
                    static_cast<std::int64_t>(tokens - 1), {out.data(), shape}, workspace, {}, pool)
            .value();
        benchmark::ClobberMemory();
    }
    bench::set_tokens(state, tokens);
}

void on_float16(benchmark::State& state, std::size_t tokens, std::size_t threads) {
    const rvqkv::thread_pool pool(threads);
    std::vector<float> out(bench::query_heads * bench::head_dim);
    bench::dense_keys(0);  // makes them
    for (auto _ : state) {
        rvqkv::parallel_for(pool, threads, [&](std::size_t part) {
            for (std::size_t head = part; head < bench::kv_heads; head += threads) {
                bench::dense_head(bench::dense_keys(head), bench::dense_values(head), tokens, head,
                                  out.data() + head * bench::dense_group * bench::head_dim);
            }
        });
        benchmark::ClobberMemory();
    }
    bench::set_tokens(state, tokens);
}

const bool registered = [] {
    if (!bench::has_dense_attention()) {
        return false;
    }
    for (const std::size_t tokens : bench::contexts) {
        for (const std::size_t threads : {std::size_t{1}, std::size_t{2}}) {
            const auto add = [&](const std::string& name, const auto& body) {
                auto* const added =
                    benchmark::RegisterBenchmark((name + bench::context_label(tokens, threads)).c_str(), body);
                added->Unit(benchmark::kMillisecond);
                if (threads > 1) {
                    added->UseRealTime();
                }
            };
            for (const bench::preset& given : bench::presets) {
                add(std::string("attention_") + given.name,
                    [&given, tokens, threads](benchmark::State& state) { on_codes(state, given, tokens, threads); });
            }
            add("attention_dense", [tokens, threads](benchmark::State& state) { on_float16(state, tokens, threads); });
        }
    }
    return true;
}();

}  // namespace
