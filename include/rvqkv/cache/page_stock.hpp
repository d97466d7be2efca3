// SPDX-License-Identifier: MIT
/// @file
/// The pages that a sequence keeps for its later tokens, so that appending need not ask the pool.
#pragma once

#include "rvqkv/cache/cache_layer.hpp"
#include "rvqkv/cache/page_pool.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/nothrow_array.hpp"

#include <algorithm>
#include <cstddef>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// Spare pages by their size. Empty, and keeping none, until `fill`.
class page_stock {
public:
    /// For the first `sizes` sizes of a pool. Errors: `out_of_memory`.
    [[nodiscard]] static result<page_stock> create(std::size_t sizes) {
        auto shelves = nothrow_array<shelf>::allocate(sizes);
        if (!shelves) {
            return shelves.error();
        }
        page_stock made;
        made.shelves_ = std::move(shelves).value();
        return made;
    }

    /// A page with one reference, from here or from the pool; null when there is no memory.
    [[nodiscard]] std::byte* take(const page_kind& kind) noexcept {
        shelf& from = shelves_[kind.pages->index()];
        if (std::byte* const page = from.pages.pop()) {
            ++from.taken;
            return page;
        }
        return kind.pages->pool().take(*kind.pages);
    }
    /// Undoes `take` for a reference to a page taken since the last `settle`: the stock and the pool are as they were.
    void take_back(const std::byte* page) noexcept {
        shelf& to = shelves_[page_pool::class_of(page).index()];
        if (to.taken != 0 && page_pool::references(page) == 1) {
            --to.taken;
            to.pages.push(const_cast<std::byte*>(page));
        } else {
            page_pool::drop(page);
        }
    }
    /// What was taken is in use now.
    void settle() noexcept {
        for (shelf& each : shelves_) {
            each.taken = 0;
        }
    }
    /// Takes over a reference to a page: keeps the page if it is the only one, or drops it.
    void give(const std::byte* page) noexcept {
        const std::size_t size = page_pool::class_of(page).index();
        if (keeps_ && size < shelves_.size() && page_pool::references(page) == 1) {
            shelves_[size].pages.push(const_cast<std::byte*>(page));
        } else {
            page_pool::drop(page);
        }
    }

    /// Asks for so many pages of a kind in the next `fill`.
    void want(const page_kind& kind, std::size_t pages) noexcept {
        if (pages != 0) {
            shelf& wanted = shelves_[kind.pages->index()];
            wanted.of = kind.pages;
            wanted.wanted += pages;
        }
    }
    /// The same, of which all kinds of that size use the same ones: the most that one of them asks for.
    void want_at_once(const page_kind& kind, std::size_t pages) noexcept {
        shelf& wanted = shelves_[kind.pages->index()];
        wanted.of = kind.pages;
        wanted.at_once = std::max(wanted.at_once, pages);
    }
    /// Takes what is wanted and not here from the pool, and keeps all pages given from now on.
    /// Errors: `out_of_memory`, and the stock is as it was.
    [[nodiscard]] status fill() {
        page_chain taken;
        bool is_full = true;
        for (shelf& each : shelves_) {
            const std::size_t wanted = std::exchange(each.wanted, 0) + std::exchange(each.at_once, 0);
            const std::size_t missing = wanted - std::min(wanted, each.pages.size());
            for (std::size_t i = 0; is_full && i < missing; ++i) {
                std::byte* const page = each.of->pool().take(*each.of);
                is_full = page != nullptr;
                if (is_full) {
                    taken.push(page);
                }
            }
        }
        if (!is_full) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        keeps_ = true;
        while (std::byte* const page = taken.pop()) {
            give(page);
        }
        return {};
    }
    /// Gives everything back to the pool, and keeps nothing from now on.
    void clear() noexcept {
        keeps_ = false;
        for (shelf& each : shelves_) {
            each.pages.clear();
        }
    }

    /// Of the pages, and of what the pool keeps with them.
    [[nodiscard]] std::size_t page_bytes() const noexcept {
        std::size_t bytes = 0;
        for (const shelf& each : shelves_) {
            bytes += each.pages.bytes();
        }
        return bytes;
    }
    [[nodiscard]] std::size_t table_bytes() const noexcept { return shelves_.bytes(); }

private:
    struct shelf {
        page_chain pages;
        page_class* of = nullptr;
        std::size_t taken = 0;  // from `pages`, since `settle`
        std::size_t wanted = 0;
        std::size_t at_once = 0;
    };

    nothrow_array<shelf> shelves_;
    bool keeps_ = false;
};

}  // namespace detail
RVQKV_NAMESPACE_END
