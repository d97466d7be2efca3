// SPDX-License-Identifier: MIT
/// @file
/// Where the pages of a cache come from: an engine's own memory, an arena over a buffer, or `operator new`.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <new>
#include <span>

RVQKV_NAMESPACE_BEGIN

/// A caller's memory for pages. Derive from it to place pages in an engine's own pool, in huge pages, in shared memory.
/// Threads: a cache makes one call at a time; a source that serves several caches must bear calls from each.
class page_source {
public:
    virtual ~page_source() = default;
    /// Memory aligned to 64 bytes, of any content; null when there is none. `bytes` is a multiple of 64.
    [[nodiscard]] virtual std::byte* allocate(std::size_t bytes) noexcept = 0;
    /// Takes back what `allocate(bytes)` gave.
    virtual void release(std::byte* memory, std::size_t bytes) noexcept = 0;

protected:
    page_source() = default;
    page_source(const page_source&) = default;
    page_source& operator=(const page_source&) = default;
};

/// Pages from `operator new`: what a cache uses when it is given no source. Threads: any number of callers.
class heap_page_source final : public page_source {
public:
    [[nodiscard]] std::byte* allocate(std::size_t bytes) noexcept override {
        return static_cast<std::byte*>(::operator new (bytes, std::align_val_t{buffer_alignment}, std::nothrow));
    }
    void release(std::byte* memory, std::size_t /*bytes*/) noexcept override {
        ::operator delete (memory, std::align_val_t{buffer_alignment});
    }
};

/// Pages from a caller's buffer and nothing else, first fit; neighbours that are free grow together again.
/// Preconditions: the buffer outlives the arena, and the arena all caches that use it.
/// Threads:       any number of callers. Complexity: O(free blocks), few where pages are of few sizes.
class arena_page_source final : public page_source {
public:
    /// Up to 63 bytes at each end are lost to alignment.
    explicit arena_page_source(std::span<std::byte> memory) noexcept {
        const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
        const std::size_t skipped = (buffer_alignment - address % buffer_alignment) % buffer_alignment;
        if (memory.size() >= skipped + buffer_alignment) {
            const std::size_t bytes = (memory.size() - skipped) / buffer_alignment * buffer_alignment;
            free_ = ::new (memory.data() + skipped) block{bytes, nullptr};
            free_bytes_ = bytes;
        }
    }
    arena_page_source(const arena_page_source&) = delete;
    arena_page_source& operator=(const arena_page_source&) = delete;

    /// Bytes that no page uses, in pieces of any size.
    [[nodiscard]] std::size_t free_bytes() const noexcept {
        const std::lock_guard lock(mutex_);
        return free_bytes_;
    }

    [[nodiscard]] std::byte* allocate(std::size_t bytes) noexcept override {
        const std::lock_guard lock(mutex_);
        bytes = rounded(bytes);
        for (block** link = &free_; *link != nullptr; link = &(*link)->next) {
            block* const found = *link;
            if (found->bytes < bytes) {
                continue;
            }
            auto* const memory = reinterpret_cast<std::byte*>(found);
            *link =
                found->bytes == bytes ? found->next : ::new (memory + bytes) block{found->bytes - bytes, found->next};
            free_bytes_ -= bytes;
            return memory;
        }
        return nullptr;
    }

    void release(std::byte* memory, std::size_t bytes) noexcept override {
        const std::lock_guard lock(mutex_);
        bytes = rounded(bytes);
        free_bytes_ += bytes;
        block* before = nullptr;
        block* after = free_;
        while (after != nullptr && std::less<>()(reinterpret_cast<std::byte*>(after), memory)) {
            before = after;
            after = after->next;
        }
        block* made = ::new (memory) block{bytes, after};
        join(made);
        if (before == nullptr) {
            free_ = made;
        } else {
            before->next = made;
            join(before);
        }
    }

private:
    /// Free blocks form a list in the order of their addresses, inside themselves.
    struct block {
        std::size_t bytes;
        block* next;
    };

    static constexpr std::size_t rounded(std::size_t bytes) noexcept {
        return (bytes + buffer_alignment - 1) / buffer_alignment * buffer_alignment;
    }
    /// Takes the next block in, if it begins where this one ends.
    static void join(block* one) noexcept {
        if (one->next != nullptr &&
            reinterpret_cast<std::byte*>(one) + one->bytes == reinterpret_cast<std::byte*>(one->next)) {
            one->bytes += one->next->bytes;
            one->next = one->next->next;
        }
    }

    mutable std::mutex mutex_;
    block* free_ = nullptr;
    std::size_t free_bytes_ = 0;
};

RVQKV_NAMESPACE_END
