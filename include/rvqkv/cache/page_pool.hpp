// SPDX-License-Identifier: MIT
/// @file
/// The pages that all sequences of a cache share: counted references, free pages kept by size, a lock only where a page
/// is taken or given back.
#pragma once

#include "rvqkv/cache/page_source.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <mutex>
#include <new>
#include <utility>

RVQKV_NAMESPACE_BEGIN

class page_pool;

/// The pages of one size in a pool.
class page_class {
public:
    /// Bytes of a page, without what the pool keeps with it; a multiple of 64.
    [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }
    /// Number of the size in its pool, in the order in which sizes were first asked for.
    [[nodiscard]] std::size_t index() const noexcept { return index_; }
    [[nodiscard]] page_pool& pool() const noexcept { return *pool_; }

private:
    friend class page_pool;
    friend class page_chain;

    /// What precedes a page's bytes in its memory.
    struct header {
        std::atomic<std::uint32_t> references;
        page_class* of;
        header* next;  // in a list of free pages or a `page_chain`
    };

    page_class(page_pool& pool, std::size_t bytes, std::size_t index, page_class* next) noexcept
        : pool_(&pool), bytes_(bytes), index_(index), next_(next) {}

    page_pool* pool_;
    std::size_t bytes_;
    std::size_t index_;
    page_class* next_;
    header* free_ = nullptr;
    std::size_t free_pages_ = 0;
    std::size_t used_pages_ = 0;
};

/// Bytes of a pool, those that it keeps with each page included.
struct page_pool_bytes {
    std::size_t used = 0;     ///< Of pages that somebody refers to.
    std::size_t free = 0;     ///< Of pages kept for later.
    std::size_t classes = 0;  ///< The pool's record of sizes.
    [[nodiscard]] std::size_t total() const noexcept { return used + free + classes; }
};

/// Reference-counted pages of a few sizes.
///
/// A page is aligned to 64 bytes and preceded by 64 bytes in which the pool keeps the count, so that a plain pointer to
/// a page is all that its users hold. A page whose last reference is dropped stays in the pool until it is taken again
/// or `release_free_pages` gives it back to the source; free pages of all sizes go back by themselves when the source
/// has no memory left, or the budget none.
///
/// Threads: all functions may be called at any time from any thread.
class page_pool {
    using header = page_class::header;

public:
    static constexpr std::size_t unlimited = std::numeric_limits<std::size_t>::max();
    /// Bytes in front of each page.
    static constexpr std::size_t header_bytes = buffer_alignment;
    static_assert(sizeof(header) <= header_bytes);

    /// `source` may be null: `operator new`. The pool takes no more than `budget` bytes from it at a time.
    explicit page_pool(page_source* source = nullptr, std::size_t budget = unlimited) noexcept
        : source_(source != nullptr ? source : &heap_), budget_(budget) {}
    page_pool(const page_pool&) = delete;
    page_pool& operator=(const page_pool&) = delete;
    /// Precondition: nobody refers to a page any more.
    ~page_pool() {
        release_free_pages();
        while (classes_ != nullptr) {
            RVQKV_ASSERT(classes_->used_pages_ == 0);
            delete std::exchange(classes_, classes_->next_);
        }
    }

    /// Bytes that a page of so many has.
    [[nodiscard]] static constexpr std::size_t rounded(std::size_t bytes) noexcept {
        return (bytes + buffer_alignment - 1) / buffer_alignment * buffer_alignment;
    }
    /// The pages of `bytes` bytes each, rounded up to a multiple of 64; valid as long as the pool.
    /// Errors: `out_of_memory`. Complexity: O(sizes).
    [[nodiscard]] result<page_class*> size(std::size_t bytes) {
        const std::lock_guard lock(mutex_);
        bytes = rounded(bytes);
        for (page_class* each = classes_; each != nullptr; each = each->next_) {
            if (each->bytes_ == bytes) {
                return each;
            }
        }
        auto* const made =
            new (std::nothrow) page_class(*this, bytes, classes_ == nullptr ? 0 : classes_->index_ + 1, classes_);
        if (made == nullptr) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        classes_ = made;
        return made;
    }

    /// A page with one reference, of any content; null when there is no memory.
    [[nodiscard]] std::byte* take(page_class& of) noexcept {
        const std::lock_guard lock(mutex_);
        header* taken = of.free_;
        if (taken != nullptr) {
            of.free_ = taken->next;
            --of.free_pages_;
        } else if (taken = allocate(of); taken == nullptr) {
            return nullptr;
        }
        ++of.used_pages_;
        taken->next = nullptr;
        taken->references.store(1, std::memory_order_relaxed);
        return page_of(taken);
    }
    /// One reference more. Precondition: the caller has one.
    static void share(const std::byte* page) noexcept {
        header_of(page)->references.fetch_add(1, std::memory_order_relaxed);
    }
    /// One reference less.
    static void drop(const std::byte* page) noexcept {
        header* const dropped = header_of(page);
        if (dropped->references.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            page_class& of = *dropped->of;
            const std::lock_guard lock(of.pool_->mutex_);
            --of.used_pages_;
            ++of.free_pages_;
            dropped->next = of.free_;
            of.free_ = dropped;
        }
    }
    /// References to a page. Who holds all of them may write to it: nobody else can come by one.
    [[nodiscard]] static std::size_t references(const std::byte* page) noexcept {
        return header_of(page)->references.load(std::memory_order_acquire);
    }
    /// The pages of this one's size.
    [[nodiscard]] static page_class& class_of(const std::byte* page) noexcept { return *header_of(page)->of; }

    /// Makes sure that `pages` pages can be taken without asking the source.
    /// Errors: `out_of_memory`; the pool may keep more free pages than before.
    [[nodiscard]] status reserve(page_class& of, std::size_t pages) {
        const std::lock_guard lock(mutex_);
        while (of.free_pages_ < pages) {
            header* const made = allocate_within_budget(of);
            if (made == nullptr) {
                return error{error_code::out_of_memory, "out of memory"};
            }
            made->next = std::exchange(of.free_, made);
            ++of.free_pages_;
        }
        return {};
    }
    /// Gives pages that nobody refers to back to the source.
    void release_free_pages() noexcept {
        const std::lock_guard lock(mutex_);
        release_free();
    }

    [[nodiscard]] page_pool_bytes bytes() const noexcept {
        const std::lock_guard lock(mutex_);
        page_pool_bytes bytes;
        for (const page_class* each = classes_; each != nullptr; each = each->next_) {
            bytes.used += each->used_pages_ * (header_bytes + each->bytes_);
            bytes.free += each->free_pages_ * (header_bytes + each->bytes_);
            bytes.classes += sizeof(page_class);
        }
        return bytes;
    }

private:
    friend class page_chain;

    [[nodiscard]] static std::byte* page_of(header* of) noexcept {
        return reinterpret_cast<std::byte*>(of) + header_bytes;
    }
    [[nodiscard]] static header* header_of(const std::byte* page) noexcept {
        return reinterpret_cast<header*>(const_cast<std::byte*>(page) - header_bytes);
    }

    [[nodiscard]] header* allocate(page_class& of) noexcept {
        header* made = allocate_within_budget(of);
        if (made == nullptr && release_free()) {
            made = allocate_within_budget(of);
        }
        return made;
    }
    [[nodiscard]] header* allocate_within_budget(page_class& of) noexcept {
        const std::size_t bytes = header_bytes + of.bytes_;
        std::byte* const memory = bytes <= budget_ - held_ ? source_->allocate(bytes) : nullptr;
        if (memory == nullptr) {
            return nullptr;
        }
        held_ += bytes;
        return ::new (memory) header{{0}, &of, nullptr};
    }
    /// Whether there was any.
    bool release_free() noexcept {
        bool any = false;
        for (page_class* each = classes_; each != nullptr; each = each->next_) {
            any = any || each->free_ != nullptr;
            for (; each->free_ != nullptr; --each->free_pages_) {
                header* const released = std::exchange(each->free_, each->free_->next);
                held_ -= header_bytes + each->bytes_;
                source_->release(reinterpret_cast<std::byte*>(released), header_bytes + each->bytes_);
            }
        }
        return any;
    }

    mutable std::mutex mutex_;
    heap_page_source heap_;
    page_source* source_;
    std::size_t budget_;
    std::size_t held_ = 0;
    page_class* classes_ = nullptr;  // the latest first
};

/// Pages of any sizes that one owner holds for later use, each with one reference: a list that needs no memory.
/// Threads: one at a time.
class page_chain {
public:
    page_chain() = default;
    page_chain(page_chain&& other) noexcept
        : first_(std::exchange(other.first_, nullptr)),
          size_(std::exchange(other.size_, 0)),
          bytes_(std::exchange(other.bytes_, 0)) {}
    page_chain& operator=(page_chain&& other) noexcept {
        std::swap(first_, other.first_);
        std::swap(size_, other.size_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~page_chain() { clear(); }

    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    /// Of the pages, and of what the pool keeps with them.
    [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }
    /// Precondition: the caller holds the only reference, which the chain takes over.
    void push(std::byte* page) noexcept {
        RVQKV_ASSERT(page_pool::references(page) == 1);
        page_class::header* const pushed = page_pool::header_of(page);
        pushed->next = first_;
        first_ = pushed;
        ++size_;
        bytes_ += page_pool::header_bytes + pushed->of->bytes();
    }
    /// The last one pushed, and its reference; null when there is none.
    [[nodiscard]] std::byte* pop() noexcept {
        if (first_ == nullptr) {
            return nullptr;
        }
        --size_;
        bytes_ -= page_pool::header_bytes + first_->of->bytes();
        return page_pool::page_of(std::exchange(first_, first_->next));
    }
    /// Gives all pages back to their pool.
    void clear() noexcept {
        while (std::byte* const page = pop()) {
            page_pool::drop(page);
        }
    }

private:
    page_class::header* first_ = nullptr;
    std::size_t size_ = 0;
    std::size_t bytes_ = 0;
};

RVQKV_NAMESPACE_END
