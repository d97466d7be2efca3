// SPDX-License-Identifier: MIT
/// @file
/// The runs of one layer of a sequence: which tokens lie in which page, each run holding a reference to its page.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/cache/page_pool.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <span>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// Runs in the order of their tokens. Runs of one page stand side by side.
class run_list {
public:
    run_list() = default;
    run_list(run_list&& other) noexcept : runs_(std::move(other.runs_)), size_(std::exchange(other.size_, 0)) {}
    run_list& operator=(run_list&& other) noexcept {
        std::swap(runs_, other.runs_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~run_list() {
        for (const page_run& run : runs()) {
            page_pool::drop(run.page);
        }
    }

    /// The same runs, sharing their pages, with room for `more` others. Errors: `out_of_memory`.
    [[nodiscard]] result<run_list> share(std::size_t more) const {
        run_list copy;
        if (status grown = copy.reserve(size_ + more); !grown) {
            return grown.error();
        }
        for (const page_run& run : runs()) {
            page_pool::share(run.page);
            copy.runs_[copy.size_++] = run;
        }
        return copy;
    }

    [[nodiscard]] bool empty() const noexcept { return size_ == 0; }
    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    [[nodiscard]] std::size_t capacity() const noexcept { return runs_.size(); }
    [[nodiscard]] std::size_t bytes() const noexcept { return runs_.bytes(); }
    [[nodiscard]] std::span<const page_run> runs() const noexcept { return {runs_.data(), size_}; }
    [[nodiscard]] page_run& operator[](std::size_t i) noexcept {
        RVQKV_ASSERT(i < size_);
        return runs_[i];
    }
    [[nodiscard]] const page_run& operator[](std::size_t i) const noexcept {
        RVQKV_ASSERT(i < size_);
        return runs_[i];
    }
    [[nodiscard]] const page_run& back() const noexcept { return (*this)[size_ - 1]; }
    /// Whether run `i` is the first of those in its page: what is done once for a page is done there.
    [[nodiscard]] static bool begins_page(std::span<const page_run> runs, std::size_t i) noexcept {
        return i == 0 || runs[i - 1].page != runs[i].page;
    }

    /// Makes room for `capacity` runs in all. Errors: `out_of_memory`.
    [[nodiscard]] status reserve(std::size_t capacity) {
        if (capacity <= runs_.size()) {
            return {};
        }
        auto wider = aligned_buffer<page_run>::allocate(std::max(capacity, runs_.size() + runs_.size() / 4));
        if (!wider) {
            return wider.error();
        }
        std::copy_n(runs_.data(), size_, wider.value().data());
        runs_ = std::move(wider).value();
        return {};
    }
    /// Memory behind the last run, where a change of the list is prepared. Precondition: room for `count` runs.
    [[nodiscard]] page_run* spare([[maybe_unused]] std::size_t count) noexcept {
        RVQKV_ASSERT(size_ + count <= runs_.size());
        return runs_.data() + size_;
    }
    /// Replaces the runs from number `first` on by the `count` ones prepared in `spare`, which have their references;
    /// those of the replaced runs are the caller's from now on.
    void replace_from(std::size_t first, std::size_t count) noexcept {
        std::copy_n(runs_.data() + size_, count, runs_.data() + first);
        size_ = first + count;
    }
    /// Splits run `i` in two, the first of `tokens` tokens. Precondition: room for one run more.
    void split(std::size_t i, std::size_t tokens, bool coded_positions_follow) noexcept {
        RVQKV_ASSERT(size_ < runs_.size() && tokens > 0 && tokens < runs_[i].tokens);
        std::copy_backward(runs_.data() + i, runs_.data() + size_, runs_.data() + size_ + 1);
        ++size_;
        page_pool::share(runs_[i].page);
        runs_[i].tokens = tokens;
        page_run& rest = runs_[i + 1];
        rest.first += tokens;
        rest.tokens -= tokens;
        rest.position += static_cast<std::int64_t>(tokens);
        if (coded_positions_follow) {
            rest.coded_position += static_cast<std::int64_t>(tokens);
        }
    }
    /// Removes runs `[first, end)`, whose references the caller has given up.
    void erase(std::size_t first, std::size_t end) noexcept {
        std::copy(runs_.data() + end, runs_.data() + size_, runs_.data() + first);
        size_ -= end - first;
    }

private:
    aligned_buffer<page_run> runs_;
    std::size_t size_ = 0;
};

}  // namespace detail
RVQKV_NAMESPACE_END
