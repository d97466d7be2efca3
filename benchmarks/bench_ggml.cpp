// SPDX-License-Identifier: MIT
/// @file
/// Attention of one decode step as llama.cpp computes it on the CPU: ggml's flash attention, one thread, over caches
/// of its formats. The rival of the attention rows.
#include "dense_attention.hpp"
#include "support/attention_data.hpp"
#include "support/counters.hpp"

#include <benchmark/benchmark.h>
#include <ggml-cpu.h>
#include <ggml.h>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace {

constexpr std::size_t checked_tokens = bench::contexts[0];
constexpr auto channels = static_cast<std::int64_t>(bench::head_dim);

std::uint16_t bits_of(float number) {
    return rvqkv::to_float16(number).bits;
}

/// The keys or values of a KV head, float32 `[checked_tokens, 128]`: those that the dense kernel reads.
std::vector<float> head_data(std::size_t head, bool is_keys) {
    std::vector<float> numbers(checked_tokens * bench::head_dim);
    for (std::size_t token = 0; token < checked_tokens; ++token) {
        for (std::size_t c = 0; c < bench::head_dim; ++c) {
            const std::size_t block = token / bench::dense_block;
            const std::size_t lane = token % bench::dense_block;
            const std::uint16_t bits =
                is_keys ? bench::dense_keys(head)[(block * bench::head_dim + c) * bench::dense_block + lane]
                        : bench::dense_values(head)[token * bench::head_dim + c];
            rvqkv::float16 number;
            number.bits = bits;
            numbers[token * bench::head_dim + c] = rvqkv::to_float(number);
        }
    }
    return numbers;
}

/// Keys and values in one of ggml's formats, each head's tokens side by side: what suits ggml best. Numbers repeat
/// after 4,096 tokens, which changes nothing about the work.
class ggml_cache {
public:
    explicit ggml_cache(ggml_type type)
        : type_(type),
          row_bytes_(ggml_row_size(type, channels)),
          memory_(2 * bench::kv_heads * bench::longest_context * row_bytes_) {
        for (std::size_t head = 0; head < bench::kv_heads; ++head) {
            for (const bool is_keys : {true, false}) {
                const std::vector<float> numbers = head_data(head, is_keys);
                std::byte* const to = data(head, is_keys);
                ggml_quantize_chunk(type, numbers.data(), to, 0, checked_tokens, channels, nullptr);
                for (std::size_t token = checked_tokens; token < bench::longest_context; token += checked_tokens) {
                    std::memcpy(to + token * row_bytes_, to, checked_tokens * row_bytes_);
                }
            }
        }
    }

    [[nodiscard]] ggml_type type() const { return type_; }
    [[nodiscard]] std::byte* data(std::size_t head, bool is_keys) const {
        return memory_.data() + ((is_keys ? 0 : bench::kv_heads) + head) * bench::longest_context * row_bytes_;
    }
    [[nodiscard]] ggml_tensor* tensor(ggml_context* context, std::size_t tokens, bool is_keys) const {
        ggml_tensor* const made = ggml_new_tensor_3d(context, type_, channels, static_cast<std::int64_t>(tokens),
                                                     static_cast<std::int64_t>(bench::kv_heads));
        made->data = data(0, is_keys);
        made->nb[2] = bench::longest_context * row_bytes_;
        made->nb[3] = made->nb[2] * bench::kv_heads;
        return made;
    }
    /// Numbers as ggml reads them back, in the dense kernel's formats.
    [[nodiscard]] std::vector<std::uint16_t> dense(std::size_t head, bool is_keys) const {
        std::vector<std::uint16_t> halves((checked_tokens + bench::dense_ahead) * bench::head_dim);
        std::vector<float> row(bench::head_dim);
        for (std::size_t token = 0; token < checked_tokens; ++token) {
            ggml_get_type_traits(type_)->to_float(data(head, is_keys) + token * row_bytes_, row.data(), channels);
            const std::size_t block = token / bench::dense_block;
            const std::size_t lane = token % bench::dense_block;
            for (std::size_t c = 0; c < bench::head_dim; ++c) {
                halves[is_keys ? (block * bench::head_dim + c) * bench::dense_block + lane
                               : token * bench::head_dim + c] = bits_of(row[c]);
            }
        }
        return halves;
    }

private:
    ggml_type type_;
    std::size_t row_bytes_;
    bench::arena memory_;
};

/// One decode step's graph: a single node, on one thread.
class ggml_step {
public:
    ggml_step(const ggml_cache& cache, std::size_t tokens) : out_(bench::query_heads * bench::head_dim) {
        ggml_cpu_init();
        context_.reset(ggml_init({std::size_t{1} << 20U, nullptr, true}));
        ggml_tensor* const queries = ggml_new_tensor_3d(context_.get(), GGML_TYPE_F32, channels, 1,
                                                        static_cast<std::int64_t>(bench::query_heads));
        queries->data = const_cast<float*>(bench::attention_queries().data());
        // No mask: with one query, the newest token's, nothing is masked, and this is quicker.
        ggml_tensor* const result = ggml_flash_attn_ext(
            context_.get(), queries, cache.tensor(context_.get(), tokens, true),
            cache.tensor(context_.get(), tokens, false), nullptr, 1.0F / std::sqrt(static_cast<float>(channels)), 0, 0);
        result->data = out_.data();
        graph_ = ggml_new_graph(context_.get());
        ggml_build_forward_expand(graph_, result);
        ggml_threadpool_params params = ggml_threadpool_params_default(1);
        threads_.reset(ggml_threadpool_new(&params));
        plan_ = ggml_graph_plan(graph_, 1, threads_.get());
        work_.resize(plan_.work_size);
        plan_.work_data = work_.data();
    }

    bool run() { return ggml_graph_compute(graph_, &plan_) == GGML_STATUS_SUCCESS; }
    /// `[query head, channel]`
    [[nodiscard]] const std::vector<float>& out() const { return out_; }

private:
    struct deleter {
        void operator()(ggml_context* context) const { ggml_free(context); }
        void operator()(ggml_threadpool* threads) const { ggml_threadpool_free(threads); }
    };
    std::vector<float> out_;
    std::vector<std::uint8_t> work_;
    std::unique_ptr<ggml_context, deleter> context_;
    std::unique_ptr<ggml_threadpool, deleter> threads_;
    ggml_cgraph* graph_ = nullptr;
    ggml_cplan plan_{};
};

/// Error of ggml's attention over its own cache, relative to the dense kernel's over the same numbers. ggml rounds
/// queries to eight bits where the cache is quantized, and sums values in float16 where it is float16.
float error_of(const ggml_cache& cache) {
    ggml_step step(cache, checked_tokens);
    if (!step.run()) {
        return INFINITY;
    }
    constexpr std::size_t size = bench::dense_group * bench::head_dim;
    float error = 0.0F;
    float total = 0.0F;
    for (std::size_t head = 0; head < bench::kv_heads; ++head) {
        float expected[size];
        bench::dense_head(cache.dense(head, true).data(), cache.dense(head, false).data(), checked_tokens, head,
                          expected);
        for (std::size_t i = 0; i < size; ++i) {
            const float apart = step.out()[head * size + i] - expected[i];
            error += apart * apart;
            total += expected[i] * expected[i];
        }
    }
    return std::sqrt(error / total);
}

struct checked_cache {
    ggml_cache cache;
    float error;
    explicit checked_cache(ggml_type type) : cache(type), error(error_of(cache)) {}
};

/// Each format's cache is made and checked once.
const checked_cache& cache_of(ggml_type type) {
    static std::map<ggml_type, checked_cache> made;
    return made.try_emplace(type, type).first->second;
}

void on_ggml(benchmark::State& state, ggml_type type, std::size_t tokens) {
    const checked_cache& checked = cache_of(type);
    if (!(checked.error < 0.02F)) {
        state.SkipWithError(("differs from dense attention by " + std::to_string(checked.error)).c_str());
        return;
    }
    ggml_step step(checked.cache, tokens);
    for (auto _ : state) {
        step.run();
        benchmark::ClobberMemory();
    }
    bench::set_tokens(state, tokens);
}

const bool registered = [] {
    if (!bench::has_dense_attention()) {
        return false;
    }
    for (const std::size_t tokens : bench::contexts) {
        for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
            const std::string name = std::string("attention/rival:ggml ") + ggml_type_name(type);
            benchmark::RegisterBenchmark((name + bench::context_label(tokens)).c_str(), on_ggml, type, tokens)
                ->Unit(benchmark::kMillisecond);
        }
    }
    return true;
}();

}  // namespace
