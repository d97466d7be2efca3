// SPDX-License-Identifier: MIT
/// @file
/// The KV cache: what the sequences of a model share.
#pragma once

#include "rvqkv/cache/cache_bytes.hpp"
#include "rvqkv/cache/cache_config.hpp"
#include "rvqkv/cache/cache_core.hpp"
#include "rvqkv/cache/kv_sequence.hpp"
#include "rvqkv/cache/kv_workspace.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/simd_level.hpp"

#include <cstddef>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// The layers of a model, the formats of their pages, and the pages themselves, for any number of sequences. A handle:
/// copies are the same cache, and its sequences keep it alive.
///
/// Threads: all functions may be called at any time from any thread.
class kv_cache {
public:
    /// A cache without sequences. The codecs are shared, the rest of the configuration is the cache's own.
    /// Errors: `invalid_argument` from `kv_cache_config::validate`; `out_of_memory`; what `choose_simd_level` reports
    ///         for a bad `RVQKV_SIMD`.
    [[nodiscard]] static result<kv_cache> create(kv_cache_config config) {
        if (status wrong = config.validate(); !wrong) {
            return wrong.error();
        }
        if (auto level = choose_simd_level(); !level) {
            return level.error();
        }
        auto core = detail::cache_core::create(std::move(config));
        if (!core) {
            return core.error();
        }
        return kv_cache(std::move(core).value());
    }

    /// A sequence without tokens. Errors: `out_of_memory`; `invalid_argument` for a cache that was moved from.
    [[nodiscard]] result<kv_sequence> new_sequence() const {
        return core_ ? kv_sequence::create(core_) : result<kv_sequence>(moved_from());
    }
    /// A workspace large enough for any call on any layer with as many workers, which allocates nothing then.
    /// Errors: `out_of_memory`; `invalid_argument` for a cache that was moved from.
    [[nodiscard]] result<kv_workspace> make_workspace(const executor& workers = serial_executor()) const {
        if (!core_) {
            return moved_from();
        }
        kv_workspace workspace;
        if (status grown = core_->reserve(workspace, workers); !grown) {
            return grown.error();
        }
        return workspace;
    }
    /// A workspace large enough for attention of up to so many query tokens over any layer, with as many workers, which
    /// allocates nothing then.
    /// Errors: `out_of_memory`; `invalid_argument` for a cache that was moved from.
    [[nodiscard]] result<attention_workspace> make_attention_workspace(
        std::size_t query_tokens = 1, const executor& workers = serial_executor()) const {
        if (!core_) {
            return moved_from();
        }
        attention_workspace workspace;
        if (status grown = core_->reserve(workspace, query_tokens, workers.concurrency()); !grown) {
            return grown.error();
        }
        return workspace;
    }

    /// Layers of the model; none after a move.
    [[nodiscard]] std::size_t layers() const noexcept { return core_ ? core_->layers() : 0; }
    /// Precondition: `layer < layers()`.
    [[nodiscard]] const kv_layer_config& layer_config(std::size_t layer) const noexcept {
        return core_->layer(layer).config();
    }
    /// Tokens of a page. Precondition: it was not moved from.
    [[nodiscard]] std::size_t page_tokens() const noexcept { return core_->page_tokens(); }

    /// Takes pages for `tokens` tokens from the source ahead of time, for any sequences to share.
    /// Errors: `out_of_memory`; the cache may have more free pages than before. `invalid_argument` for a cache that was
    ///         moved from.
    [[nodiscard]] status reserve(std::size_t tokens) {
        return core_ ? core_->reserve_pages(tokens) : status(moved_from());
    }
    /// Gives pages that no sequence refers to or keeps back to their source.
    void release_free_pages() noexcept {
        if (core_) {
            core_->pool().release_free_pages();
        }
    }

    /// Memory held, by what it is for. Complexity: O(layers).
    [[nodiscard]] kv_cache_bytes bytes() const noexcept {
        kv_cache_bytes bytes;
        if (core_) {
            const page_pool_bytes pool = core_->pool().bytes();
            bytes.pages = pool.used;
            bytes.free_pages = pool.free;
            bytes.layers = pool.classes + core_->bytes();
            bytes.codecs = core_->codec_bytes();
        }
        return bytes;
    }

private:
    explicit kv_cache(detail::core_handle core) noexcept : core_(std::move(core)) {}
    [[nodiscard]] static error moved_from() { return {error_code::invalid_argument, "the cache was moved from"}; }

    detail::core_handle core_;
};

RVQKV_NAMESPACE_END
