// SPDX-License-Identifier: MIT
/// @file
/// Attention of one decode step on codes, one layer of Llama-3-8B's shape (8 KV heads of 128 channels, 32 query heads),
/// beside dense attention over float16 keys and values in memory of the same kind. Codes are random: what they are
/// changes nothing about the work.
#include "dense_attention.hpp"
#include "rvqkv/attend/layer_attention.hpp"
#include "rvqkv/core/thread_pool.hpp"
#include "support/counters.hpp"
#include "support/data.hpp"

#include <benchmark/benchmark.h>
#include <sys/mman.h>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr std::size_t heads = 8;
constexpr std::size_t query_heads = heads * bench::dense_group;
constexpr std::size_t head_dim = bench::dense_head_dim;
constexpr std::size_t page_tokens = 64;

/// Zeroed memory in huge pages where the system has them: what an engine's arena is.
class arena {
public:
    explicit arena(std::size_t bytes) : bytes_((bytes + huge - 1) / huge * huge) {
        void* const memory = std::aligned_alloc(huge, bytes_);
        if (memory == nullptr) {
            std::abort();
        }
        madvise(memory, bytes_, MADV_HUGEPAGE);
        std::memset(memory, 0, bytes_);
        data_ = static_cast<std::byte*>(memory);
    }
    arena(const arena&) = delete;
    arena& operator=(const arena&) = delete;
    ~arena() { std::free(data_); }
    [[nodiscard]] std::byte* data() const noexcept { return data_; }
    [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

private:
    static constexpr std::size_t huge = std::size_t{2} << 20U;
    std::byte* data_;
    std::size_t bytes_;
};

struct preset {
    const char* name;
    rvqkv::codebook_shape shape;
    rvqkv::key_coding coding;
    bool has_mean;
};

constexpr preset presets[] = {
    {"attention_fast", {3, 128, 8}, rvqkv::key_coding::after_rope, false},
    {"attention_fast_mean", {3, 128, 8}, rvqkv::key_coding::after_rope, true},
    {"attention_smallest", {3, 16, 4}, rvqkv::key_coding::after_rope, false},
    {"attention_paper", {8, 2048, 32}, rvqkv::key_coding::before_rope, false},
    {"attention_paper_tables", {8, 2048, 32}, rvqkv::key_coding::after_rope, false},
};

std::vector<float> random_queries(std::size_t count) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    std::vector<float> queries(count);
    std::generate(queries.begin(), queries.end(), [&] { return normal(random); });
    return queries;
}

/// A layer's codes for so many tokens.
class coded_layer {
public:
    coded_layer(const preset& given, std::size_t tokens) {
        rvqkv::codec_spec spec;
        spec.head_dim = head_dim;
        spec.shape = given.shape;
        spec.weight_type = rvqkv::dtype::bfloat16;
        const auto codec = rvqkv::make_codec(spec, bench::weights(given.shape).span()).value();
        rvqkv::kv_layer_config config;
        config.keys = {codec, heads};
        config.values = {codec, heads};
        config.query_heads = query_heads;
        config.coding = given.coding;
        if (given.has_mean) {
            config.key_mean.assign(heads * head_dim, 0.5F);
        }
        attention_ = std::make_unique<rvqkv::layer_attention>(rvqkv::layer_attention::create(config).value());
        format_.tokens = page_tokens;
        format_.coded_keys = {*codec, heads, page_tokens, given.shape.depths, 0};
        format_.coded_values = {*codec, heads, page_tokens, given.shape.depths, format_.coded_keys.end()};
        format_.bytes = (format_.coded_values.end() + 63) / 64 * 64;
        const std::size_t pages = tokens / page_tokens;
        memory_ = std::make_unique<arena>(pages * format_.bytes);
        std::mt19937 random(3);
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
    [[nodiscard]] const std::vector<rvqkv::page_run>& runs() const { return runs_; }

private:
    /// Every codebook here has a power of two of codewords: any bits are codes.
    static void fill(std::byte* page, const rvqkv::coded_layout& side, std::mt19937& random) {
        const auto one = rvqkv::to_float16(1.0F);
        for (std::size_t i = 0; i < side.scale_bytes(); i += sizeof(one)) {
            std::memcpy(page + side.begin() + i, &one, sizeof(one));
        }
        for (std::size_t i = side.row(0, 0, 0); i < side.end(); i += 4) {
            const auto bits = static_cast<std::uint32_t>(random());
            std::memcpy(page + i, &bits, sizeof(bits));
        }
    }

    std::unique_ptr<rvqkv::layer_attention> attention_;
    rvqkv::page_format format_;
    std::unique_ptr<arena> memory_;
    std::vector<rvqkv::page_run> runs_;
};

void on_codes(benchmark::State& state, const preset& given, std::size_t tokens, std::size_t threads) {
    const coded_layer layer(given, tokens);
    const rvqkv::thread_pool pool(threads);
    const std::vector<float> queries = random_queries(query_heads * head_dim);
    std::vector<float> out(query_heads * head_dim);
    rvqkv::attention_workspace workspace;
    const rvqkv::tensor_shape shape{1, query_heads, head_dim};
    for (auto _ : state) {
        layer.attention()
            .attend(layer.runs(), {queries.data(), shape}, static_cast<std::int64_t>(tokens - 1), {out.data(), shape},
                    workspace, {}, pool)
            .value();
        benchmark::ClobberMemory();
    }
    bench::set_tokens(state, tokens);
}

void on_float16(benchmark::State& state, std::size_t tokens, std::size_t threads) {
    const std::size_t head_values = (tokens + bench::dense_ahead) * head_dim;
    const arena memory(2 * heads * head_values * sizeof(std::uint16_t));
    auto* const keys = reinterpret_cast<std::uint16_t*>(memory.data());
    std::mt19937 random(5);
    for (std::size_t i = 0; i < 2 * heads * head_values; ++i) {
        keys[i] = static_cast<std::uint16_t>(0x3000U + (random() & 0x8bffU));  // magnitudes from 1/8 to 2
    }
    const std::uint16_t* const values = keys + heads * head_values;
    std::vector<float> queries = random_queries(query_heads * head_dim);
    for (float& query : queries) {
        query *= 0.088388F;
    }
    std::vector<float> out(query_heads * head_dim);
    std::vector<float> scores(threads * bench::dense_group * tokens);
    const rvqkv::thread_pool pool(threads);
    for (auto _ : state) {
        rvqkv::parallel_for(pool, threads, [&](std::size_t part) {
            for (std::size_t head = part; head < heads; head += threads) {
                bench::dense_attention(keys + head * head_values, values + head * head_values, tokens,
                                       queries.data() + head * bench::dense_group * head_dim,
                                       scores.data() + part * bench::dense_group * tokens,
                                       out.data() + head * bench::dense_group * head_dim);
            }
        });
        benchmark::ClobberMemory();
    }
    bench::set_tokens(state, tokens);
    // Of the memory's speed: 2 bytes for each of 128 channels, keys and values, of 8 heads.
    bench::set_bytes(state, tokens * 2 * heads * head_dim * sizeof(std::uint16_t));
}

const bool registered = [] {
    if (!bench::has_dense_attention()) {
        return false;
    }
    for (const std::size_t tokens : {std::size_t{4096}, std::size_t{32768}, std::size_t{131072}}) {
        for (const std::size_t threads : {std::size_t{1}, std::size_t{2}}) {
            const std::string label = "/tokens:" + std::to_string(tokens) + "/threads:" + std::to_string(threads);
            const auto add = [&](const std::string& name, const auto& body) {
                auto* const added = benchmark::RegisterBenchmark(name.c_str(), body);
                added->Unit(benchmark::kMillisecond);
                if (threads > 1) {
                    added->UseRealTime();
                }
            };
            for (const preset& given : presets) {
                add(given.name + label,
                    [&given, tokens, threads](benchmark::State& state) { on_codes(state, given, tokens, threads); });
            }
            add("attention_dense" + label,
                [tokens, threads](benchmark::State& state) { on_float16(state, tokens, threads); });
        }
    }
    return true;
}();

}  // namespace
