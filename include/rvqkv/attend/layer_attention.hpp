// SPDX-License-Identifier: MIT
/// @file
/// Attention of one layer over its pages: exact tokens and codes in one softmax, codes read as they are.
#pragma once

#include "rvqkv/attend/attention_options.hpp"
#include "rvqkv/attend/attention_scan.hpp"
#include "rvqkv/attend/large_tables.hpp"
#include "rvqkv/attend/layer_config.hpp"
#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/small_readers.hpp"
#include "rvqkv/attend/tile_reader.hpp"
#include "rvqkv/attend/tile_rope.hpp"
#include "rvqkv/attend/word_rows.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>
#include <span>
#include <string>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// Attention for one layer's configuration: codecs' tables, rotary tables, how queries meet stored keys.
/// Threads: immutable; any number of callers at once, with one workspace each.
class layer_attention {
public:
    /// Errors:     `invalid_argument` from `kv_layer_config::validate`, and when keys and values differ in heads;
    ///             `out_of_memory`.
    /// Complexity: O(weights) where a codec is read through tables.
    [[nodiscard]] static result<layer_attention> create(const kv_layer_config& config,
                                                        const kernel_table& kernels = best_kernels()) {
        return create(config, config.query_heads, config.sliding_window, kernels);
    }
    /// The same for a layer that reads this layer's cache with query heads and a window of its own.
    [[nodiscard]] static result<layer_attention> create(const kv_layer_config& config, std::size_t query_heads,
                                                        std::size_t sliding_window,
                                                        const kernel_table& kernels = best_kernels()) {
        if (status wrong = config.validate(); !wrong) {
            return wrong.error();
        }
        if (status wrong = config.validate_query_heads(query_heads); !wrong) {
            return wrong.error();
        }
        if (config.keys.heads != config.values.heads) {
            return error{error_code::invalid_argument,
                         "attention needs as many heads of values as of keys: " + std::to_string(config.values.heads) +
                             " and " + std::to_string(config.keys.heads)};
        }
        layer_attention made;
        detail::attention_parts& parts = made.parts_;
        parts.kernels = &kernels;
        parts.heads = config.keys.heads;
        parts.group = query_heads == 0 ? 1 : query_heads / config.keys.heads;
        parts.key_codec = config.keys.codec;
        parts.value_codec = config.values.codec;
        parts.key_dim = parts.key_codec->head_dim();
        parts.value_dim = parts.value_codec->head_dim();
        parts.window = sliding_window;
        parts.coding = config.coding;
        parts.turned_input = config.coding == key_coding::as_given || config.turned_input;
        if (status wrong = made.make_rope(config); !wrong) {
            return wrong.error();
        }
        auto mean = aligned_buffer<float>::allocate(config.key_mean.size());
        if (!mean) {
            return mean.error();
        }
        parts.mean = std::move(mean).value();
        if (auto bias = mean_bias::create(parts.rope, kernels); bias) {
            parts.bias = std::move(bias).value();
        } else {
            return bias.error();
        }
        std::copy(config.key_mean.begin(), config.key_mean.end(), parts.mean.data());
        if (status wrong = made.make_readers(); !wrong) {
            return wrong.error();
        }
        if (status wrong = made.make_tables(); !wrong) {
            return wrong.error();
        }
        return made;
    }

    [[nodiscard]] std::size_t heads() const noexcept { return parts_.heads; }
    [[nodiscard]] std::size_t query_heads() const noexcept { return parts_.heads * parts_.group; }
    [[nodiscard]] std::size_t key_dim() const noexcept { return parts_.key_dim; }
    [[nodiscard]] std::size_t value_dim() const noexcept { return parts_.value_dim; }
    /// Bytes held beside the codecs.
    [[nodiscard]] std::size_t bytes() const noexcept {
        const auto held = [](const auto& part) { return part == nullptr ? std::size_t{0} : part->bytes(); };
        return parts_.rope.bytes() + parts_.plain.bytes() + parts_.coded.bytes() + parts_.mean.bytes() +
               parts_.bias.bytes() + held(parts_.key_tiles) + held(parts_.key_words) + held(parts_.key_tables) +
               held(parts_.value_tiles) + held(parts_.value_words) + held(parts_.value_tables);
    }

    /// Makes room in a workspace for calls of up to so many query tokens by so many workers, which then allocate
    /// nothing.
    /// Errors: `out_of_memory`, and it is as it was.
    [[nodiscard]] status reserve(attention_workspace& workspace, std::size_t query_tokens,
                                 std::size_t concurrency = 1) const {
        return workspace.memory.reserve(std::min(concurrency, tasks(query_tokens)) *
                                        detail::attention_scan::scratch_bytes(parts_, block_rows(query_tokens)));
    }

    /// Softmax attention of some query tokens over the tokens of `runs`.
    /// Shapes:     `queries` `[query token, query head, key_dim]`, `out` `[query token, query head, value_dim]`, any
    ///             types and strides; query token `i` is at `first_position + i`.
    /// Errors:     `invalid_argument` for other shapes, a run outside its page, or options that do not fit;
    ///             `out_of_memory` when the workspace cannot grow. Nothing is written then. Queries that are not
    ///             finite spoil their own results only.
    /// Preconditions: pages are laid out as their formats say, for this configuration, and no one writes to them.
    /// Threads:    none of its own; KV heads (and blocks of queries) are shared out over `workers`.
    /// Numerics:   float32, and as `attention_options::reading` says; results do not depend on the workers. A query
    ///             that sees no token gives zeros.
    [[nodiscard]] status attend(std::span<const page_run> runs, const tensor_view& queries, std::int64_t first_position,
                                const mutable_tensor_view& out, attention_workspace& workspace,
                                const attention_options& options = {},
                                const executor& workers = serial_executor()) const {
        return attend(runs, queries, first_position, out, nullptr, workspace, options, workers);
    }

    /// The same over a part of the tokens, to be put together with others by `merge_partial`: also gives the logarithm
    /// of each query's sum of exp(score), -infinity where it saw no token. Sink logits belong into one part only.
    /// Shapes: `log_sum_exp` `[query token, query head]`.
    /// Errors: as `attend`, and `invalid_argument` for another size of `log_sum_exp`.
    [[nodiscard]] status attend_partial(std::span<const page_run> runs, const tensor_view& queries,
                                        std::int64_t first_position, const mutable_tensor_view& out,
                                        std::span<float> log_sum_exp, attention_workspace& workspace,
                                        const attention_options& options = {},
                                        const executor& workers = serial_executor()) const {
        if (log_sum_exp.size() != queries.rows()) {
            return error{error_code::invalid_argument, "log_sum_exp has " + std::to_string(log_sum_exp.size()) +
                                                           " places, must have one for each of " +
                                                           std::to_string(queries.rows()) + " queries"};
        }
        return attend(runs, queries, first_position, out, log_sum_exp.data(), workspace, options, workers);
    }

private:
    layer_attention() = default;

    [[nodiscard]] static error out_of_memory() { return {error_code::out_of_memory, "out of memory"}; }

    /// Whether there was memory for it.
    template <class Reader, class Base, class... Arguments>
    [[nodiscard]] static bool make(std::unique_ptr<const Base>& to, Arguments&&... arguments) {
        to.reset(new (std::nothrow) Reader(std::forward<Arguments>(arguments)...));
        return to != nullptr;
    }

    [[nodiscard]] status make_rope(const kv_layer_config& config) {
        if (config.coding == key_coding::as_given) {
            return {};
        }
        auto turned = rope::create(config.rope, parts_.key_dim);
        if (!turned) {
            return turned.error();
        }
        auto order = aligned_buffer<std::uint16_t>::allocate(parts_.key_dim);
        if (!order) {
            return order.error();
        }
        std::iota(order.value().data(), order.value().data() + parts_.key_dim, std::uint16_t{0});
        auto plain = tile_rope::create(turned.value(), order.value().span(), *parts_.kernels);
        auto coded = tile_rope::create(turned.value(), parts_.key_codec->channel_order(), *parts_.kernels);
        if (!plain || !coded) {
            return out_of_memory();
        }
        parts_.rope = std::move(turned).value();
        parts_.plain = std::move(plain).value();
        parts_.coded = std::move(coded).value();
        return {};
    }

    /// What reads every codec, and large codebooks by rows of whole numbers.
    [[nodiscard]] status make_readers() {
        const kernel_table& kernels = *parts_.kernels;
        if (!make<tile_key_reader>(parts_.key_tiles, tile_decoder(parts_.key_codec, kernels)) ||
            !make<tile_value_reader>(parts_.value_tiles, tile_decoder(parts_.value_codec, kernels))) {
            return out_of_memory();
        }
        if (detail::word_decoder::supports(*parts_.key_codec, kernels)) {
            detail::word_turn turn;
            const bool turns = parts_.coding == key_coding::before_rope;
            if (turns) {
                auto made = detail::word_turn::create(parts_.coded, parts_.key_dim, parts_.rope.attention_factor());
                if (!made) {
                    return made.error();
                }
                turn = std::move(made).value();
            }
            if (!turns || turn.serves) {
                auto decoder = detail::word_decoder::create(parts_.key_codec, kernels);
                if (!decoder || !make<word_key_reader>(parts_.key_words, std::move(decoder).value(), std::move(turn))) {
                    return out_of_memory();
                }
            }
        }
        if (detail::word_decoder::supports(*parts_.value_codec, kernels)) {
            auto decoder = detail::word_decoder::create(parts_.value_codec, kernels);
            if (!decoder || !make<word_value_reader>(parts_.value_words, std::move(decoder).value())) {
                return out_of_memory();
            }
        }
        return {};
    }

    /// The quicker readers that there are for the codecs' shapes.
    [[nodiscard]] status make_tables() {
        if (detail::small_tables_pay(*parts_.key_codec, *parts_.kernels) && parts_.coding != key_coding::before_rope) {
            auto tables = small_key_reader::create(*parts_.key_codec, *parts_.kernels);
            if (!tables) {
                return tables.error();
            }
            parts_.key_tables = std::move(tables).value();
        }
        if (detail::small_tables_pay(*parts_.value_codec, *parts_.kernels)) {
            auto tables = small_value_reader::create(*parts_.value_codec, *parts_.kernels);
            if (!tables) {
                return tables.error();
            }
            parts_.value_tables = std::move(tables).value();
        }
        if (large_key_tables::supports(parts_.key_codec->shape()) && parts_.coding != key_coding::before_rope) {
            auto tables = large_key_tables::create(parts_.key_codec, *parts_.kernels);
            if (!tables) {
                return tables.error();
            }
            parts_.key_tables = std::move(tables).value();
            parts_.chunk_tokens = large_chunk_tokens;
        }
        if (large_value_tables::supports(parts_.value_codec->shape()) && parts_.value_words == nullptr) {
            if (!make<large_value_tables>(parts_.value_tables, parts_.value_codec, *parts_.kernels)) {
                return out_of_memory();
            }
            parts_.chunk_tokens = large_chunk_tokens;
        }
        return {};
    }

    /// Rows of queries that are worked on together, of one KV head.
    [[nodiscard]] std::size_t block_rows(std::size_t query_tokens) const noexcept {
        return std::clamp(query_tokens * parts_.group, std::size_t{1}, detail::attention_scan::most_rows);
    }
    [[nodiscard]] std::size_t blocks(std::size_t query_tokens) const noexcept {
        const std::size_t rows = block_rows(query_tokens);
        return (query_tokens * parts_.group + rows - 1) / rows;
    }
    [[nodiscard]] std::size_t tasks(std::size_t query_tokens) const noexcept {
        return parts_.heads * blocks(query_tokens);
    }

    [[nodiscard]] status attend(std::span<const page_run> runs, const tensor_view& queries, std::int64_t first_position,
                                const mutable_tensor_view& out, float* log_sum_exp, attention_workspace& workspace,
                                const attention_options& options, const executor& workers) const {
        if (status wrong = check(runs, queries, out, options); !wrong) {
            return wrong;
        }
        const std::size_t tokens = queries.tokens();
        if (tokens == 0) {
            return {};
        }
        const std::size_t rows = block_rows(tokens);
        const std::size_t at_once = std::min(workers.concurrency(), tasks(tokens));
        if (status grown = reserve(workspace, tokens, at_once); !grown) {
            return grown;
        }
        detail::attention_call call;
        call.runs = runs;
        call.queries = &queries;
        call.first_position = first_position;
        call.out = &out;
        call.log_sum_exp = log_sum_exp;
        call.options = &options;
        call.scale = options.scale != 0.0F ? options.scale : 1.0F / std::sqrt(static_cast<float>(parts_.key_dim));
        const std::size_t scratch = detail::attention_scan::scratch_bytes(parts_, rows);
        std::atomic<std::size_t> next{0};
        parallel_for(workers, at_once, [&](std::size_t worker) {
            detail::attention_scan scan(parts_, rows, workspace.memory.data() + worker * scratch);
            for (std::size_t task = next.fetch_add(1); task < tasks(tokens); task = next.fetch_add(1)) {
                const std::size_t first = task % blocks(tokens) * rows;
                scan.run(call, task / blocks(tokens), first, std::min(rows, tokens * parts_.group - first));
            }
        });
        return {};
    }

    [[nodiscard]] status check(std::span<const page_run> runs, const tensor_view& queries,
                               const mutable_tensor_view& out, const attention_options& options) const {
        const auto wrong = [](std::string message) { return error{error_code::invalid_argument, std::move(message)}; };
        if (queries.heads() != query_heads() || queries.channels() != key_dim()) {
            return wrong("queries have " + std::to_string(queries.heads()) + " heads of " +
                         std::to_string(queries.channels()) + " channels, the layer has " +
                         std::to_string(query_heads()) + " of " + std::to_string(key_dim()));
        }
        if (out.shape() != tensor_shape{queries.tokens(), query_heads(), value_dim()}) {
            return wrong("out has " + std::to_string(out.tokens()) + " tokens of " + std::to_string(out.heads()) +
                         " heads of " + std::to_string(out.channels()) + " channels, must have " +
                         std::to_string(queries.tokens()) + " of " + std::to_string(query_heads()) + " of " +
                         std::to_string(value_dim()));
        }
        for (const auto& [name, list] :
             {std::pair("alibi_slopes", options.alibi_slopes), std::pair("sink_logits", options.sink_logits)}) {
            if (!list.empty() && list.size() != query_heads()) {
                return wrong(std::string(name) + " has " + std::to_string(list.size()) +
                             " entries, must have one for each of " + std::to_string(query_heads()) + " query heads");
            }
        }
        for (std::size_t i = 0; i < runs.size(); ++i) {
            const page_run& run = runs[i];
            if (run.page == nullptr || run.format == nullptr || run.first > run.format->tokens ||
                run.tokens > run.format->tokens - run.first) {
                return wrong("run " + std::to_string(i) + " does not lie in its page");
            }
        }
        return {};
    }

    detail::attention_parts parts_;
};

RVQKV_NAMESPACE_END
