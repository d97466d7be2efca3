// SPDX-License-Identifier: MIT
/// @file
/// One layer as all sequences of a cache share it: what codes it, and the formats of its pages.
#pragma once

#include "rvqkv/attend/layer_attention.hpp"
#include "rvqkv/attend/layer_config.hpp"
#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/cache/cache_config.hpp"
#include "rvqkv/cache/cache_side.hpp"
#include "rvqkv/cache/key_positions.hpp"
#include "rvqkv/cache/kv_workspace.hpp"
#include "rvqkv/cache/page_pool.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// A format, and where its pages come from.
struct page_kind {
    page_format format;
    page_class* pages = nullptr;
};

/// Pages that a layer needs at most for some number of tokens, without rollbacks.
struct page_needs {
    std::size_t sinks = 0;
    std::size_t exact = 0;
    std::size_t coded = 0;
    [[nodiscard]] std::size_t total() const noexcept { return sinks + exact + coded; }
};

/// Threads: immutable, but for `demoted`, which locks.
class cache_layer {
public:
    cache_layer() = default;
    cache_layer(const cache_layer&) = delete;
    cache_layer& operator=(const cache_layer&) = delete;
    ~cache_layer() {
        while (demoted_ != nullptr) {
            delete std::exchange(demoted_, demoted_->next);
        }
    }

    /// Errors: `out_of_memory`, and what `rope::create` reports. Precondition: `cache` is valid, but for its layers.
    [[nodiscard]] status create(kv_layer_config config, const kv_cache_config& cache, std::size_t number,
                                page_pool& pool) {
        config_ = std::move(config);
        number_ = number;
        owner_ = config_.shares_layer != kv_layer_config::no_layer ? config_.shares_layer : number;
        page_tokens_ = cache.page_tokens;
        sink_tokens_ = cache.sink_tokens;
        recent_tokens_ = cache.recent_tokens;
        if (config_.is_empty()) {
            return {};
        }
        auto positions = key_positions::create(config_);
        if (!positions) {
            return positions.error();
        }
        keys_ = cache_side(config_.keys, "keys", number, page_tokens_, cache.exact_type, std::move(positions).value());
        values_ = cache_side(config_.values, "values", number, page_tokens_, cache.exact_type, {});
        if (status made = make_exact(sinks_, sink_tokens_, cache.exact_type, pool); !made) {
            return made;
        }
        if (status made = make_exact(exact_, page_tokens_, cache.exact_type, pool); !made) {
            return made;
        }
        return make_coded(coded_, keys_.codec().depths(), values_.codec().depths(), pool);
    }

    /// Readies attention over the tokens of the layer that owns them, `owner`. Errors: `out_of_memory`.
    [[nodiscard]] status make_attention(cache_layer& owner) {
        kv_layer_config& read = owner.config_;
        if (read.is_empty() || read.keys.heads != read.values.heads) {
            return {};
        }
        // The owner's but for two numbers, which are lent: a copy of all would throw where memory runs out.
        const std::size_t query_heads = std::exchange(read.query_heads, config_.query_heads);
        const std::size_t window = std::exchange(read.sliding_window, config_.sliding_window);
        auto made = layer_attention::create(read);
        read.query_heads = query_heads;
        read.sliding_window = window;
        if (!made) {
            return made.error();
        }
        attention_.reset(new (std::nothrow) layer_attention(std::move(made).value()));
        return attention_ == nullptr ? status(error{error_code::out_of_memory, "out of memory"}) : status{};
    }
    /// Null for a layer whose keys and values have different heads, or none.
    [[nodiscard]] const layer_attention* attention() const noexcept { return attention_.get(); }

    [[nodiscard]] const kv_layer_config& config() const noexcept { return config_; }
    [[nodiscard]] std::size_t number() const noexcept { return number_; }
    /// The layer whose cache this one reads: itself, or another.
    [[nodiscard]] std::size_t owner() const noexcept { return owner_; }
    /// Whether it holds tokens itself.
    [[nodiscard]] bool has_tokens() const noexcept { return keys_.heads() != 0; }
    [[nodiscard]] const cache_side& keys() const noexcept { return keys_; }
    [[nodiscard]] const cache_side& values() const noexcept { return values_; }
    [[nodiscard]] const cache_side& side(bool is_keys) const noexcept { return is_keys ? keys_ : values_; }
    [[nodiscard]] std::size_t page_tokens() const noexcept { return page_tokens_; }
    [[nodiscard]] std::size_t sink_tokens() const noexcept { return sink_tokens_; }
    [[nodiscard]] std::size_t recent_tokens() const noexcept { return recent_tokens_; }
    [[nodiscard]] const page_kind& sinks() const noexcept { return sinks_; }
    [[nodiscard]] const page_kind& exact() const noexcept { return exact_; }
    [[nodiscard]] const page_kind& coded() const noexcept { return coded_; }

    /// Pages of codes of fewer depths. Errors: `out_of_memory`. Precondition: no more than the codecs have.
    [[nodiscard]] result<const page_kind*> demoted(std::size_t key_depths, std::size_t value_depths) {
        const std::lock_guard lock(demoted_mutex_);
        for (const demoted_kind* each = demoted_; each != nullptr; each = each->next) {
            if (each->kind.format.coded_keys.depths() == key_depths &&
                each->kind.format.coded_values.depths() == value_depths) {
                return &each->kind;
            }
        }
        auto made = std::unique_ptr<demoted_kind>(new (std::nothrow) demoted_kind);
        if (made == nullptr) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        if (status done = make_coded(made->kind, key_depths, value_depths, coded_.pages->pool()); !done) {
            return done.error();
        }
        made->next = demoted_;
        demoted_ = made.release();
        return &demoted_->kind;
    }

    /// Bytes of a page of codes of so many depths.
    [[nodiscard]] std::size_t coded_bytes(std::size_t key_depths, std::size_t value_depths) const noexcept {
        return page_pool::rounded(coded_format(key_depths, value_depths).coded_values.end());
    }

    /// Tokens that are kept behind a sliding window, so that as many can be rolled back.
    [[nodiscard]] std::size_t window_slack() const noexcept { return std::max(page_tokens_, recent_tokens_); }
    /// Exact pages, besides sinks, that a sequence holds at most between appends.
    [[nodiscard]] std::size_t most_exact() const noexcept {
        return (recent_tokens_ + page_tokens_ - 1) / page_tokens_ + 1;
    }
    /// Pages of codes that it holds at most, if appends are no longer than a page.
    [[nodiscard]] std::size_t most_coded() const noexcept {
        return config_.sliding_window == 0 ? std::numeric_limits<std::size_t>::max()
                                           : (config_.sliding_window + window_slack()) / page_tokens_ + 2;
    }
    /// What so many tokens need.
    [[nodiscard]] page_needs needs(std::size_t tokens) const noexcept {
        page_needs needs;
        if (!has_tokens() || tokens == 0) {
            return needs;
        }
        const std::size_t others = tokens - std::min(tokens, sink_tokens_);
        needs.sinks = sink_tokens_ == 0 ? 0 : 1;
        needs.exact = std::min(most_exact(), others / page_tokens_ + (others % page_tokens_ != 0 ? 1 : 0));
        needs.coded = std::min(most_coded(), (others - std::min(others, recent_tokens_)) / page_tokens_);
        return needs;
    }

    /// Makes a workspace large enough for `tasks` tasks on this layer at once, or one that `workers` share out.
    /// Errors: `out_of_memory`.
    [[nodiscard]] status reserve(kv_workspace& workspace, std::size_t tasks, const executor& workers) const {
        if (status grown = workspace.reserve(tasks); !grown || !has_tokens()) {
            return grown;
        }
        for (std::size_t i = 0; i < tasks; ++i) {
            for (const cache_side* side : {&keys_, &values_}) {
                if (status grown = side->reserve(workspace.task(i), i == 0 ? workers.concurrency() : 1); !grown) {
                    return grown;
                }
            }
        }
        return {};
    }

    /// Bytes besides the layer itself and its codecs.
    [[nodiscard]] std::size_t bytes() const noexcept {
        std::size_t bytes = config_.key_mean.capacity() * sizeof(float) +
                            config_.rope.frequencies.capacity() * sizeof(double) + keys_.positions().bytes();
        bytes += attention_ == nullptr ? 0 : sizeof(layer_attention) + attention_->bytes();
        const std::lock_guard lock(demoted_mutex_);
        for (const demoted_kind* each = demoted_; each != nullptr; each = each->next) {
            bytes += sizeof(demoted_kind);
        }
        return bytes;
    }

    /// "layer 3" and a text, as an error.
    [[nodiscard]] error wrong(const std::string& text) const {
        return {error_code::invalid_argument, "layer " + std::to_string(number_) + text};
    }

private:
    struct demoted_kind {
        page_kind kind;
        demoted_kind* next = nullptr;
    };

    [[nodiscard]] status take_class(page_kind& kind, std::size_t bytes, page_pool& pool) const {
        auto pages = pool.size(bytes);
        if (!pages) {
            return pages.error();
        }
        kind.pages = pages.value();
        kind.format.bytes = kind.pages->bytes();
        return {};
    }
    [[nodiscard]] status make_exact(page_kind& kind, std::size_t tokens, dtype type, page_pool& pool) const {
        page_format& format = kind.format;
        format.is_exact = true;
        format.tokens = tokens;
        format.exact_keys = exact_layout(keys_.heads(), keys_.head_dim(), tokens, type, 0);
        const std::size_t begin =
            (format.exact_keys.end() + buffer_alignment - 1) / buffer_alignment * buffer_alignment;
        format.exact_values = exact_layout(values_.heads(), values_.head_dim(), tokens, type, begin);
        return tokens == 0 ? status{} : take_class(kind, format.exact_values.end(), pool);
    }
    [[nodiscard]] page_format coded_format(std::size_t key_depths, std::size_t value_depths) const noexcept {
        page_format format;
        format.tokens = page_tokens_;
        format.coded_keys = coded_layout(keys_.codec(), keys_.heads(), page_tokens_, key_depths, 0);
        format.coded_values =
            coded_layout(values_.codec(), values_.heads(), page_tokens_, value_depths, format.coded_keys.end());
        return format;
    }
    [[nodiscard]] status make_coded(page_kind& kind, std::size_t key_depths, std::size_t value_depths,
                                    page_pool& pool) const {
        kind.format = coded_format(key_depths, value_depths);
        return take_class(kind, kind.format.coded_values.end(), pool);
    }

    kv_layer_config config_;
    std::size_t number_ = 0;
    std::size_t owner_ = 0;
    std::size_t page_tokens_ = 0;
    std::size_t sink_tokens_ = 0;
    std::size_t recent_tokens_ = 0;
    cache_side keys_;
    cache_side values_;
    page_kind sinks_;
    page_kind exact_;
    page_kind coded_;
    std::unique_ptr<const layer_attention> attention_;
    mutable std::mutex demoted_mutex_;
    demoted_kind* demoted_ = nullptr;
};

}  // namespace detail
RVQKV_NAMESPACE_END
