// SPDX-License-Identifier: MIT
/// @file
/// How attention goes over the runs of a layer: one KV head and some queries at a time, in chunks of tokens whose
/// scores go through the softmax together.
#pragma once

#include "rvqkv/attend/attention_options.hpp"
#include "rvqkv/attend/layer_config.hpp"
#include "rvqkv/attend/mean_bias.hpp"
#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/readers.hpp"
#include "rvqkv/attend/rope.hpp"
#include "rvqkv/attend/softmax.hpp"
#include "rvqkv/attend/tile_reader.hpp"
#include "rvqkv/attend/tile_rope.hpp"
#include "rvqkv/attend/token_chunk.hpp"
#include "rvqkv/attend/word_rows.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/rows.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <span>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// What never changes about a layer's attention.
struct attention_parts {
    const kernel_table* kernels = nullptr;
    std::size_t heads = 0;  ///< KV heads.
    std::size_t group = 1;  ///< Query heads of each.
    std::size_t key_dim = 0;
    std::size_t value_dim = 0;
    std::size_t window = 0;
    std::size_t chunk_tokens = 4096;
    key_coding coding = key_coding::as_given;
    bool turned_input = true;
    rvqkv::rope rope;
    tile_rope plain;  ///< For channels in the model's order.
    tile_rope coded;  ///< For channels in the key codec's order.
    aligned_buffer<float> mean;
    mean_bias bias;
    std::shared_ptr<const codec> key_codec;
    std::shared_ptr<const codec> value_codec;
    // What serves always, and what is quicker but rounds; null where it cannot serve.
    std::unique_ptr<const tile_key_reader> key_tiles;
    std::unique_ptr<const word_key_reader> key_words;
    std::unique_ptr<const key_reader> key_tables;
    std::unique_ptr<const value_reader> value_tiles;
    std::unique_ptr<const value_reader> value_words;
    std::unique_ptr<const value_reader> value_tables;
};

/// What one call asks for.
struct attention_call {
    std::span<const page_run> runs;
    const tensor_view* queries = nullptr;
    std::int64_t first_position = 0;
    const mutable_tensor_view* out = nullptr;
    float* log_sum_exp = nullptr;  ///< `[query token, query head]`, or null.
    const attention_options* options = nullptr;
    float scale = 1.0F;
};

/// Some queries of one KV head over all runs. Rows are numbered `query token * group + query head within the group`.
class attention_scan {
public:
    /// Most rows that are worked on together.
    static constexpr std::size_t most_rows = 32;

    /// Bytes of memory for so many rows.
    [[nodiscard]] static std::size_t scratch_bytes(const attention_parts& parts, std::size_t rows) noexcept {
        return attention_scan(parts, rows, nullptr).dealer_.used();
    }

    attention_scan(const attention_parts& parts, std::size_t rows, std::byte* memory) noexcept
        : parts_(parts),
          kernels_(*parts.kernels),
          most_(rows),
          slots_(slots_for(parts, rows)),
          stride_(slots_ + token_chunk::least_slots),
          dealer_(memory),
          chunk_(slots_, dealer_) {
        scratch_dealer& dealer = dealer_;
        const std::size_t pairs = parts.plain.angles();
        const std::size_t wide = std::max(parts.key_dim, parts.value_dim);
        states_ = dealer.take<softmax_row>(rows);
        positions_ = dealer.take<std::int64_t>(rows);
        queries_ = dealer.take<float>(rows * parts.key_dim);
        based_ = dealer.take<float>(rows * parts.key_dim);
        grouped_ = dealer.take<float>(rows * parts.key_dim);
        turned_ = dealer.take<float>(rows * parts.key_dim);
        bias_ =
            parts.mean.size() == 0 ? mean_bias::scratch() : mean_bias::scratch(parts.bias, parts.plain, rows, dealer);
        scores_ = dealer.take<float>(rows * stride_);
        tile_ = dealer.take<float>(tile_tokens * wide);
        sums_ = dealer.take<float>(rows * parts.value_dim);
        coded_sums_ = dealer.take<float>(rows * parts.value_dim);
        factors_ = dealer.take<float>(rows);
        for (std::byte*& cursor : cursors_) {
            cursor = dealer.take<std::byte>(tile_rope::cursor::scratch_bytes(pairs));
        }
        const auto most_scratch = [&](const auto&... readers) {
            return std::max({readers == nullptr ? std::size_t{0} : readers->scratch_bytes(rows)...});
        };
        key_scratch_ = dealer.take<std::byte>(most_scratch(parts.key_tiles, parts.key_words, parts.key_tables));
        value_scratch_ = dealer.take<std::byte>(most_scratch(parts.value_tiles, parts.value_words, parts.value_tables));
    }

    /// Attention of rows [first_row, first_row + rows) of a head, results written.
    void run(const attention_call& call, std::size_t head, std::size_t first_row, std::size_t rows) noexcept {
        RVQKV_ASSERT(rows != 0 && rows <= most_);
        call_ = &call;
        head_ = head;
        first_row_ = first_row;
        rows_ = rows;
        begin();
        while (chunk_.advance()) {
            score();
            weigh();
        }
        finish();
    }

private:
    static constexpr std::int64_t no_base = std::numeric_limits<std::int64_t>::min();

    /// A chunk's scores fit into the second cache; more tokens where each chunk goes through large tables.
    static std::size_t slots_for(const attention_parts& parts, std::size_t rows) noexcept {
        const std::size_t most = parts.chunk_tokens;
        return std::clamp(4 * most / rows / tile_tokens * tile_tokens, std::size_t{512}, most);
    }

    [[nodiscard]] const attention_options& options() const noexcept { return *call_->options; }
    [[nodiscard]] std::size_t query_head(std::size_t row) const noexcept {
        return head_ * parts_.group + (first_row_ + row) % parts_.group;
    }
    [[nodiscard]] std::size_t query_token(std::size_t row) const noexcept { return (first_row_ + row) / parts_.group; }
    [[nodiscard]] float* scores(std::size_t row, const chunk_piece& part) const noexcept {
        return scores_ + row * stride_ + part.slot;
    }

    void begin() noexcept {
        for (std::size_t row = 0; row < rows_; ++row) {
            float* const query = queries_ + row * parts_.key_dim;
            positions_[row] = call_->first_position + static_cast<std::int64_t>(query_token(row));
            load_row(*call_->queries, query_token(row), query_head(row), query, kernels_);
            for (std::size_t i = 0; i < parts_.key_dim; ++i) {
                query[i] *= call_->scale;
            }
            if (!parts_.turned_input) {
                parts_.rope.turn({query, 1, parts_.key_dim}, positions_[row], 1, kernels_);
            }
            states_[row] = options().sink_logits.empty()
                               ? softmax_row()
                               : softmax_row::with_sink(options().sink_logits[query_head(row)]);
        }
        std::fill_n(sums_, rows_ * parts_.value_dim, 0.0F);
        if (parts_.mean.size() != 0) {
            parts_.bias.prepare({queries_, rows_, parts_.key_dim}, parts_.mean.data() + head_ * parts_.key_dim,
                                parts_.key_dim, parts_.plain, bias_);
        }
        filter_ = {parts_.window, options().causal};
        chunk_.begin(call_->runs, filter_, positions_[0], positions_[rows_ - 1]);
        is_first_ = true;
        base_ = no_base;
        keys_ = nullptr;
        choose_values();
        values_->begin(rows_, value_scratch_);
    }

    // ---- Scores ----

    /// By how much more than its own position a stored key was turned back: what the queries are turned back by
    /// instead.
    [[nodiscard]] std::int64_t base_of(const page_run& run) const noexcept {
        const bool turned = parts_.coding == key_coding::after_rope || parts_.coding == key_coding::block_relative;
        return turned ? run.position - run.coded_position : 0;
    }

    void score() noexcept {
        const std::span<const chunk_piece> pieces = chunk_.pieces();
        for (std::size_t i = 0; i < pieces.size();) {
            const std::size_t end =
                chunk_.group_end(i, [&](const page_run& a, const page_run& b) { return base_of(a) == base_of(b); });
            turn_to(base_of(*pieces[i].run));
            if (pieces[i].is_exact()) {
                score_exact(pieces[i]);
            } else {
                score_coded(i, end);
            }
            i = end;
        }
        const bool edits =
            options().soft_cap > 0.0F || !options().alibi_slopes.empty() || options().hook.edit != nullptr;
        for (const chunk_piece& part : pieces) {
            const std::int64_t position = part.position() + static_cast<std::int64_t>(part.skip);
            // Most pieces are seen by every row, all slots of them.
            if (!edits &&
                filter_.seen(position, part.tokens, positions_[rows_ - 1], positions_[0]).size() == part.slots) {
                continue;
            }
            for (std::size_t row = 0; row < rows_; ++row) {
                float* const first = scores(row, part);
                float* const block = first + part.skip;
                edit(row, position, part.tokens, block);
                const auto kept = filter_.seen(position, part.tokens, positions_[row], positions_[row]);
                constexpr float masked = -std::numeric_limits<float>::infinity();
                std::fill(first, block + kept.begin, masked);
                std::fill(block + kept.end, first + part.slots, masked);
            }
        }
    }

    /// Soft cap, ALiBi and the caller's hook.
    void edit(std::size_t row, std::int64_t position, std::size_t tokens, float* block) const noexcept {
        if (options().soft_cap > 0.0F) {
            kernels_.attention.soft_cap(block, tokens, options().soft_cap);
        }
        if (!options().alibi_slopes.empty()) {
            const float slope = options().alibi_slopes[query_head(row)];
            for (std::size_t i = 0; i < tokens; ++i) {
                block[i] += slope * static_cast<float>(position - positions_[row] + static_cast<std::int64_t>(i));
            }
        }
        if (options().hook.edit != nullptr) {
            options().hook.edit(options().hook.context,
                                {query_token(row), query_head(row), positions_[row], position, tokens, block});
        }
    }

    /// Makes queries ready for keys that were turned to positions `base` less than theirs now.
    void turn_to(std::int64_t base) noexcept {
        if (base == base_) {
            return;
        }
        base_ = base;
        keys_ = nullptr;
        std::memcpy(based_, queries_, rows_ * parts_.key_dim * sizeof(float));
        if (base != 0) {
            tile_rope::cursor cursor(parts_.plain, cursors_[0]);
            cursor.seek(base);
            cursor.turn_back(based_, rows_, parts_.key_dim);
        }
    }

    /// Rows of queries with channels in the key codec's order.
    void group(const float* rows, float* out) const noexcept {
        const std::span<const std::uint16_t> order = parts_.key_codec->channel_order();
        for (std::size_t row = 0; row < rows_; ++row, rows += parts_.key_dim, out += parts_.key_dim) {
            for (std::size_t place = 0; place < parts_.key_dim; ++place) {
                out[place] = rows[order[place]];
            }
        }
    }

    void score_exact(const chunk_piece& part) noexcept {
        if (part.run->format->exact_keys.type() == dtype::float16) {
            score_exact_as<float16>(part);
        } else {
            score_exact_as<bfloat16>(part);
        }
    }
    template <class T>
    void score_exact_as(const chunk_piece& part) noexcept {
        const T* const keys = exact_rows<T>(part, part.run->format->exact_keys);
        const std::size_t dim = parts_.key_dim;
        if (parts_.coding != key_coding::before_rope) {
            kernels_.attention.rows<T>().scores({keys, part.tokens, dim}, {based_, rows_, dim}, dim, scores(0, part),
                                                stride_);
            return;
        }
        tile_rope::cursor cursor(parts_.plain, cursors_[0]);
        for (std::size_t first = 0; first < part.tokens; first += tile_tokens) {
            const std::size_t count = std::min(tile_tokens, part.tokens - first);
            convert(keys + first * dim, tile_, count * dim, kernels_);
            parts_.plain.turn(tile_, count, dim, 0);
            cursor.seek(part.position() + static_cast<std::int64_t>(first));
            std::memcpy(turned_, queries_, rows_ * dim * sizeof(float));
            cursor.turn_back(turned_, rows_, dim);
            kernels_.attention.rows<float>().scores({tile_, count, dim}, {turned_, rows_, dim}, dim,
                                                    scores(0, part) + first, stride_);
        }
    }
    template <class T>
    [[nodiscard]] const T* exact_rows(const chunk_piece& part, const exact_layout& layout) const noexcept {
        return static_cast<const T*>(static_cast<const void*>(part.run->page + layout.row(head_, part.first)));
    }

    [[nodiscard]] coded_tiles tiles_of(std::size_t first, std::size_t end, const coded_layout& layout) const noexcept {
        return {chunk_.tiles(first, end), &layout, head_, layout.depths()};
    }

    /// Pieces [first, end) of the chunk: of one format and base.
    void score_coded(std::size_t first, std::size_t end) noexcept {
        const chunk_piece& part = chunk_.pieces()[first];
        const coded_tiles tiles = tiles_of(first, end, part.run->format->coded_keys);
        const std::int64_t* const positions = chunk_.tile_positions(first);
        float* const out = scores(0, part);
        const std::size_t dim = parts_.key_dim;
        if (keys_ == nullptr) {
            choose_keys(part);
            group(based_, grouped_);
            keys_->prepare({grouped_, rows_, dim}, key_scratch_);
        }
        if (parts_.coding == key_coding::before_rope) {
            tile_rope::cursor cursor(parts_.coded, cursors_[1]);
            const auto queries = [&](std::size_t tile) {
                cursor.seek(positions[tile]);
                std::memcpy(turned_, grouped_, rows_ * dim * sizeof(float));
                cursor.turn_back(turned_, rows_, dim);
                return row_block<const float>{turned_, rows_, dim};
            };
            const auto turn = [&](std::size_t tile, std::size_t at, float* rows) {
                parts_.coded.turn(rows, tile_decoder::part_rows, dim, at);
                return at == 0 ? queries(tile) : row_block<const float>{turned_, rows_, dim};
            };
            if (keys_ == parts_.key_words.get()) {
                parts_.key_words->turned_scores(tiles, rows_, queries, out, stride_, key_scratch_);
            } else {
                parts_.key_tiles->scores(tiles, turn, out, stride_, key_scratch_);
            }
        } else {
            keys_->scores(tiles, rows_, out, stride_, key_scratch_);
        }
        if (parts_.mean.size() != 0) {
            parts_.bias.add(positions, tiles.tiles.count, rows_, out, stride_, bias_);
        }
    }

    [[nodiscard]] bool may_round() const noexcept { return options().reading == code_reading::quickest; }
    /// The quickest reader: tables, if enough tokens follow that they serve.
    void choose_keys(const chunk_piece& part) noexcept {
        keys_ = parts_.key_tiles.get();
        if (!may_round()) {
            return;
        }
        if (parts_.key_words != nullptr) {
            keys_ = parts_.key_words.get();
        }
        const auto other_base = [&](const page_run& run) { return base_of(run) != base_; };
        if (parts_.key_tables != nullptr && parts_.coding != key_coding::before_rope &&
            parts_.key_tables->pays(rows_, chunk_.coded_tokens(chunk_.run_number(part), other_base))) {
            keys_ = parts_.key_tables.get();
        }
    }
    void choose_values() noexcept {
        values_ = parts_.value_tiles.get();
        if (!may_round()) {
            return;
        }
        if (parts_.value_words != nullptr) {
            values_ = parts_.value_words.get();
        }
        const auto none = [](const page_run&) { return false; };
        if (parts_.value_tables != nullptr && parts_.value_tables->pays(rows_, chunk_.coded_tokens(0, none))) {
            values_ = parts_.value_tables.get();
        }
    }

    // ---- Softmax and values ----

    /// The scores of the chunk become weights, and its values are added.
    void weigh() noexcept {
        bool rescaled = false;
        for (std::size_t row = 0; row < rows_; ++row) {
            factors_[row] = states_[row].add(scores_ + row * stride_, chunk_.slots(), kernels_);
            rescaled = rescaled || factors_[row] != 1.0F;
        }
        if (rescaled && !is_first_) {
            for (std::size_t i = 0; i < rows_ * parts_.value_dim; ++i) {
                sums_[i] *= factors_[i / parts_.value_dim];
            }
            values_->rescale(factors_, rows_, value_scratch_);
        }
        is_first_ = false;
        const std::span<const chunk_piece> pieces = chunk_.pieces();
        for (std::size_t i = 0; i < pieces.size();) {
            const std::size_t end = chunk_.group_end(i, [](const page_run&, const page_run&) { return true; });
            const page_format& format = *pieces[i].run->format;
            if (!format.is_exact) {
                values_->add(tiles_of(i, end, format.coded_values), rows_, scores(0, pieces[i]), stride_,
                             value_scratch_);
            } else if (format.exact_values.type() == dtype::float16) {
                add_exact<float16>(pieces[i]);
            } else {
                add_exact<bfloat16>(pieces[i]);
            }
            i = end;
        }
    }
    template <class T>
    void add_exact(const chunk_piece& part) noexcept {
        const T* const values = exact_rows<T>(part, part.run->format->exact_values);
        kernels_.attention.rows<T>().add({values, part.tokens, parts_.value_dim}, scores(0, part), {stride_, 1},
                                         parts_.value_dim, {sums_, rows_, parts_.value_dim});
    }

    void finish() noexcept {
        values_->finish(rows_, {coded_sums_, rows_, parts_.value_dim}, value_scratch_);
        const std::span<const std::uint16_t> order = parts_.value_codec->channel_order();
        for (std::size_t row = 0; row < rows_; ++row) {
            float* const sums = sums_ + row * parts_.value_dim;
            const float* const coded = coded_sums_ + row * parts_.value_dim;
            for (std::size_t place = 0; place < parts_.value_dim; ++place) {
                sums[order[place]] += coded[place];
            }
            const float normalizer = states_[row].normalizer();
            for (std::size_t i = 0; i < parts_.value_dim; ++i) {
                sums[i] *= normalizer;
            }
            store_row(sums, *call_->out, query_token(row), query_head(row), kernels_);
            if (call_->log_sum_exp != nullptr) {
                call_->log_sum_exp[query_token(row) * parts_.heads * parts_.group + query_head(row)] =
                    states_[row].log_sum_exp();
            }
        }
    }

    const attention_parts& parts_;
    const kernel_table& kernels_;
    [[maybe_unused]] std::size_t most_;  // for assertions
    std::size_t slots_;
    std::size_t stride_;  // of rows of scores: no power of two, which would crowd a part of the cache
    scratch_dealer dealer_;
    token_chunk chunk_;

    softmax_row* states_ = nullptr;
    std::int64_t* positions_ = nullptr;
    float* queries_ = nullptr;  // [row, key_dim] in the model's order, scaled and turned
    float* based_ = nullptr;    // ... turned back by `base_`
    float* grouped_ = nullptr;  // ... in the codec's order
    float* turned_ = nullptr;   // ... for one tile
    mean_bias::scratch bias_;
    float* scores_ = nullptr;  // [row, slots]
    float* tile_ = nullptr;
    float* sums_ = nullptr;        // [row, value_dim] of exact tokens
    float* coded_sums_ = nullptr;  // [row, value_dim] in the codec's order
    float* factors_ = nullptr;
    std::byte* cursors_[2] = {};
    std::byte* key_scratch_ = nullptr;
    std::byte* value_scratch_ = nullptr;

    const attention_call* call_ = nullptr;
    std::size_t head_ = 0;
    std::size_t first_row_ = 0;
    std::size_t rows_ = 0;
    token_filter filter_;
    bool is_first_ = true;  // whether nothing was summed yet
    std::int64_t base_ = no_base;
    const key_reader* keys_ = nullptr;  // prepared for `grouped_`; null: none yet
    const value_reader* values_ = nullptr;
};

}  // namespace detail
RVQKV_NAMESPACE_END
