// SPDX-License-Identifier: MIT
/// @file
/// What a cache and its sequences hold together: layers, formats, pages. It lives as long as one of them does.
#pragma once

#include "rvqkv/cache/cache_config.hpp"
#include "rvqkv/cache/cache_layer.hpp"
#include "rvqkv/cache/kv_workspace.hpp"
#include "rvqkv/cache/page_pool.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/nothrow_array.hpp"
#include "rvqkv/core/parallel_for.hpp"

#include <atomic>
#include <cstddef>
#include <new>
#include <string>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {

class cache_core;

/// A counted reference to a core: `std::shared_ptr` would throw for want of memory.
class core_handle {
public:
    core_handle() = default;
    /// Takes over the reference that a new core comes with.
    explicit core_handle(cache_core* core) noexcept : core_(core) {}
    inline core_handle(const core_handle& other) noexcept;
    core_handle(core_handle&& other) noexcept : core_(std::exchange(other.core_, nullptr)) {}
    core_handle& operator=(core_handle other) noexcept {
        std::swap(core_, other.core_);
        return *this;
    }
    inline ~core_handle();

    explicit operator bool() const noexcept { return core_ != nullptr; }
    [[nodiscard]] cache_core* operator->() const noexcept { return core_; }
    [[nodiscard]] cache_core& operator*() const noexcept { return *core_; }

private:
    cache_core* core_ = nullptr;
};

/// Threads: immutable, but for the pool and the layers' lists of formats, which lock.
class cache_core {
public:
    cache_core(const cache_core&) = delete;
    cache_core& operator=(const cache_core&) = delete;

    /// Errors: `out_of_memory`. Precondition: `config` is valid.
    [[nodiscard]] static result<core_handle> create(kv_cache_config config) {
        auto* const made = new (std::nothrow) cache_core(config);
        if (made == nullptr) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        core_handle core(made);
        auto layers = nothrow_array<cache_layer>::allocate(config.layers.size());
        if (!layers) {
            return layers.error();
        }
        made->layers_ = std::move(layers).value();
        for (std::size_t i = 0; i < made->layers_.size(); ++i) {
            if (status done = made->layers_[i].create(std::move(config.layers[i]), config, i, made->pool_); !done) {
                return done.error();
            }
            const cache_layer& layer = made->layers_[i];
            for (const page_kind* kind : {&layer.sinks(), &layer.exact(), &layer.coded()}) {
                if (kind->pages != nullptr) {
                    made->sizes_ = std::max(made->sizes_, kind->pages->index() + 1);
                }
            }
        }
        for (cache_layer& layer : made->layers_) {
            if (status done = layer.make_attention(made->layers_[layer.owner()]); !done) {
                return done.error();
            }
        }
        return core;
    }

    [[nodiscard]] page_pool& pool() noexcept { return pool_; }
    [[nodiscard]] std::size_t layers() const noexcept { return layers_.size(); }
    [[nodiscard]] cache_layer& layer(std::size_t i) noexcept { return layers_[i]; }
    [[nodiscard]] std::size_t page_tokens() const noexcept { return page_tokens_; }
    /// Sizes of pages that appends need: the pool's first ones.
    [[nodiscard]] std::size_t sizes() const noexcept { return sizes_; }

    /// Makes an attention workspace large enough for every layer. Errors: `out_of_memory`.
    [[nodiscard]] status reserve(attention_workspace& workspace, std::size_t query_tokens,
                                 std::size_t concurrency) const {
        for (const cache_layer& layer : layers_) {
            if (layer.attention() == nullptr) {
                continue;
            }
            if (status grown = layer.attention()->reserve(workspace, query_tokens, concurrency); !grown) {
                return grown;
            }
        }
        return {};
    }
    /// Makes a workspace large enough for every layer. Errors: `out_of_memory`.
    [[nodiscard]] status reserve(kv_workspace& workspace, const executor& workers) const {
        for (const cache_layer& layer : layers_) {
            if (status grown = layer.reserve(workspace, workers.concurrency(), workers); !grown) {
                return grown;
            }
        }
        return {};
    }

    /// Makes sure that pages for so many tokens can be taken without asking the source. Errors: `out_of_memory`.
    [[nodiscard]] status reserve_pages(std::size_t tokens) {
        for (std::size_t size = 0; size < sizes_; ++size) {
            page_class* pages = nullptr;
            std::size_t count = 0;
            for (const cache_layer& layer : layers_) {
                const page_needs needs = layer.needs(tokens);
                for (const auto& [kind, needed] :
                     {std::pair{&layer.sinks(), needs.sinks}, std::pair{&layer.exact(), needs.exact},
                      std::pair{&layer.coded(), needs.coded}}) {
                    if (kind->pages != nullptr && kind->pages->index() == size) {
                        pages = kind->pages;
                        count += needed;
                    }
                }
            }
            if (status taken = pages == nullptr ? status{} : pool_.reserve(*pages, count); !taken) {
                return taken;
            }
        }
        return {};
    }

    /// Bytes besides pages and codecs.
    [[nodiscard]] std::size_t bytes() const noexcept {
        std::size_t bytes = sizeof(cache_core) + layers_.bytes();
        for (const cache_layer& layer : layers_) {
            bytes += layer.bytes();
        }
        return bytes;
    }
    /// Bytes of the codecs, each counted once.
    [[nodiscard]] std::size_t codec_bytes() const noexcept {
        const auto codec_at = [this](std::size_t i) {
            const kv_layer_config& config = layers_[i / 2].config();
            return (i % 2 == 0 ? config.keys : config.values).codec.get();
        };
        std::size_t bytes = 0;
        for (std::size_t i = 0; i < 2 * layers(); ++i) {
            std::size_t first = 0;
            while (codec_at(first) != codec_at(i)) {
                ++first;
            }
            bytes += first == i && codec_at(i) != nullptr ? codec_at(i)->bytes() : 0;
        }
        return bytes;
    }

    void share() noexcept { references_.fetch_add(1, std::memory_order_relaxed); }
    void drop() noexcept {
        if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            delete this;
        }
    }

private:
    explicit cache_core(const kv_cache_config& config) noexcept
        : pool_(config.source, config.page_budget), page_tokens_(config.page_tokens) {}
    ~cache_core() = default;

    std::atomic<std::size_t> references_{1};
    page_pool pool_;
    nothrow_array<cache_layer> layers_;
    std::size_t page_tokens_;
    std::size_t sizes_ = 0;
};

inline core_handle::core_handle(const core_handle& other) noexcept : core_(other.core_) {
    if (core_ != nullptr) {
        core_->share();
    }
}
inline core_handle::~core_handle() {
    if (core_ != nullptr) {
        core_->drop();
    }
}

}  // namespace detail
RVQKV_NAMESPACE_END
