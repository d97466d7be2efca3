// SPDX-License-Identifier: MIT
/// @file
/// The pages of one layer of the KV cache, in order; every allocation may fail, and then nothing has changed.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// An owning array of default-made elements: where `std::vector` would throw for want of memory, this returns a status.
template <class T>
class nothrow_array {
    static_assert(alignof(T) <= buffer_alignment);

public:
    nothrow_array() = default;
    nothrow_array(nothrow_array&&) noexcept = default;
    nothrow_array& operator=(nothrow_array&&) noexcept = default;
    ~nothrow_array() { std::destroy_n(data(), size()); }

    /// Errors: `out_of_memory`, also when the size in bytes overflows.
    [[nodiscard]] static result<nothrow_array> allocate(std::size_t size) {
        constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
        auto storage = aligned_buffer<std::byte>::allocate(size <= most / sizeof(T) ? size * sizeof(T) : most);
        if (!storage) {
            return storage.error();
        }
        nothrow_array made;
        made.storage_ = std::move(storage).value();
        std::uninitialized_value_construct_n(made.data(), size);
        return made;
    }

    [[nodiscard]] T* data() noexcept { return reinterpret_cast<T*>(storage_.data()); }
    [[nodiscard]] const T* data() const noexcept { return reinterpret_cast<const T*>(storage_.data()); }
    [[nodiscard]] std::size_t size() const noexcept { return storage_.size() / sizeof(T); }
    [[nodiscard]] std::size_t bytes() const noexcept { return storage_.bytes(); }
    [[nodiscard]] T& operator[](std::size_t i) noexcept {
        RVQKV_ASSERT(i < size());
        return data()[i];
    }
    [[nodiscard]] const T& operator[](std::size_t i) const noexcept {
        RVQKV_ASSERT(i < size());
        return data()[i];
    }
    [[nodiscard]] T* begin() noexcept { return data(); }
    [[nodiscard]] T* end() noexcept { return data() + size(); }
    [[nodiscard]] const T* begin() const noexcept { return data(); }
    [[nodiscard]] const T* end() const noexcept { return data() + size(); }

private:
    aligned_buffer<std::byte> storage_;
};

/// Pages of equal size, each its own allocation. Growing has two steps: `prepare` allocates all that is missing and
/// changes nothing, `adopt` cannot fail.
class page_table {
public:
    using page_type = aligned_buffer<std::byte>;

    page_table() = default;
    explicit page_table(std::size_t page_bytes) noexcept : page_bytes_(page_bytes) {}

    /// Pages held.
    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    [[nodiscard]] std::size_t page_bytes() const noexcept { return page_bytes_; }
    /// Bytes of the table itself, without the pages.
    [[nodiscard]] std::size_t table_bytes() const noexcept { return slots_.bytes(); }
    [[nodiscard]] std::byte* page(std::size_t i) noexcept {
        RVQKV_ASSERT(i < size_);
        return slots_[i].data();
    }
    [[nodiscard]] const std::byte* page(std::size_t i) const noexcept {
        RVQKV_ASSERT(i < size_);
        return slots_[i].data();
    }

    /// What a table lacks to hold more pages.
    struct growth {
        nothrow_array<page_type> pages;  ///< The new ones, zeroed.
        nothrow_array<page_type> slots;  ///< A wider table; empty if there is room.
    };

    /// Allocates what is missing to `count` pages; nothing if as many are held.
    /// Errors: `out_of_memory`.
    [[nodiscard]] result<growth> prepare(std::size_t count) const {
        growth more;
        if (count <= size_) {
            return more;
        }
        if (count > slots_.size()) {
            auto slots = nothrow_array<page_type>::allocate(std::max(count, 2 * slots_.size()));
            if (!slots) {
                return slots.error();
            }
            more.slots = std::move(slots).value();
        }
        auto pages = nothrow_array<page_type>::allocate(count - size_);
        if (!pages) {
            return pages.error();
        }
        more.pages = std::move(pages).value();
        for (page_type& each : more.pages) {
            auto page = page_type::allocate(page_bytes_);
            if (!page) {
                return page.error();
            }
            each = std::move(page).value();
        }
        return more;
    }

    /// Precondition: `more` was prepared by this table, which has not changed since.
    void adopt(growth more) noexcept {
        if (more.slots.size() != 0) {
            std::move(slots_.begin(), slots_.begin() + size_, more.slots.begin());
            slots_ = std::move(more.slots);
        }
        for (page_type& page : more.pages) {
            slots_[size_++] = std::move(page);
        }
    }

    /// Frees the pages from number `count` on. The table keeps its width.
    void shrink(std::size_t count) noexcept {
        for (; size_ > count; --size_) {
            slots_[size_ - 1] = page_type();
        }
    }

private:
    nothrow_array<page_type> slots_;  // those from size_ on are empty
    std::size_t size_ = 0;
    std::size_t page_bytes_ = 0;
};

}  // namespace detail
RVQKV_NAMESPACE_END
