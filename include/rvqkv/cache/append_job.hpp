// SPDX-License-Identifier: MIT
/// @file
/// An append, from the tokens given to the runs that hold them: planned, provided with pages and worked out beside the
/// sequence, which changes in the end or not at all.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/cache/cache_layer.hpp"
#include "rvqkv/cache/cache_side.hpp"
#include "rvqkv/cache/kv_workspace.hpp"
#include "rvqkv/cache/layer_tokens.hpp"
#include "rvqkv/cache/page_pool.hpp"
#include "rvqkv/cache/page_stock.hpp"
#include "rvqkv/cache/run_list.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/vector_quantizer.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// What an append found in its input besides numbers; tokens count from the append's first.
struct kv_encode_report {
    encode_report keys;
    encode_report values;
};

namespace detail {

/// Only the latest runs change: those of exact pages, the last of which takes new tokens while it has room, and each of
/// which becomes codes as a whole when all its tokens are older than the recent ones. New tokens that would be so old
/// at once never see an exact page, but go the same way through scratch memory.
class append_job {
public:
    /// New runs besides those of whole pages: the end of the last page, the sinks, a page cut by a block's end, a last
    /// one; and exact runs that may be rewritten.
    static constexpr std::size_t more_runs = 24;

    append_job(const cache_layer& layer, layer_tokens& held, const tensor_view& keys,
               const tensor_view& values) noexcept
        : layer_(layer),
          held_(held),
          keys_(keys),
          values_(values),
          first_position_(held.next_position()),
          kept_(held.runs.size()) {}

    /// Decides which run each token goes to, and in which format. Errors: `out_of_memory`.
    [[nodiscard]] status plan() {
        const run_list& runs = held_.runs;
        while (kept_ > 0 && runs[kept_ - 1].format->is_exact) {
            --kept_;
        }
        rewritten_ = runs.size() - kept_;
        const std::size_t room = 2 * runs.size() - kept_ + keys_.tokens() / layer_.page_tokens() + more_runs;
        if (status grown = held_.runs.reserve(room); !grown) {
            return grown;
        }
        staged_ = held_.runs.spare(room - runs.size());
        std::copy_n(runs.runs().data() + kept_, rewritten_, staged_);
        size_ = rewritten_;
        place_tokens();
        choose_formats();
        return {};
    }

    /// Takes the pages that the plan lacks. Errors: `out_of_memory`, and none is taken.
    [[nodiscard]] status take_pages(page_stock& stock) {
        for (; with_pages_ < size_; with_pages_ = end_of_page(with_pages_)) {
            const std::size_t end = end_of_page(with_pages_);
            if (!lacks_page(with_pages_, end)) {
                continue;
            }
            const page_run& run = staged_[with_pages_];
            std::byte* const page = stock.take(kind_of(run));
            if (page == nullptr) {
                cancel(stock);
                return error{error_code::out_of_memory, "out of memory"};
            }
            const page_run& last = staged_[end - 1];
            if (run.format->is_exact && with_pages_ < rewritten_) {
                std::memcpy(page, run.page, run.format->bytes);  // it was shared: written to on a copy
            } else if (run.format->is_exact || run.first != 0 || last.first + last.tokens != run.format->tokens) {
                std::memset(page, 0, run.format->bytes);  // readers of whole tiles meet nothing but zeros there
            }
            for (std::size_t i = with_pages_; i < end; ++i) {
                staged_[i].page = page;
                if (i != with_pages_) {
                    page_pool::share(page);
                }
            }
            encoded_pages_ += run.format->is_exact ? 0 : 1;
        }
        return {};
    }

    /// Writes the new tokens, and the codes of those that have grown old. Errors: `out_of_memory`, those of a codec.
    [[nodiscard]] status work(kv_workspace& workspace, const executor& workers) {
        const std::size_t sides_blocks = 2 * blocks();
        const std::size_t tasks = encoded_pages_ * sides_blocks;
        // Few blocks are shared out by the codec, many are handed out whole.
        const bool by_blocks = workers.concurrency() > 1 && tasks >= workers.concurrency();
        const serial_executor serial;
        const std::size_t at_once = by_blocks ? workers.concurrency() : 1;
        if (status grown = layer_.reserve(workspace, at_once, workers); !grown) {
            return grown;
        }
        store_exact(workspace.task(0));
        if (!by_blocks) {
            for (std::size_t i = 0; i < size_ * sides_blocks; ++i) {
                if (status done = encode_block(i, workspace.task(0), workers); !done) {
                    return done;
                }
            }
            return {};
        }
        std::atomic<std::size_t> next{0};
        status outcome;
        parallel_for(workers, at_once, [&](std::size_t task) {
            for (std::size_t i = next.fetch_add(1); i < size_ * sides_blocks; i = next.fetch_add(1)) {
                if (status done = encode_block(i, workspace.task(task), serial); !done) {
                    const std::lock_guard lock(mutex_);
                    outcome = std::move(done);
                }
            }
        });
        return outcome;
    }

    /// Gives the pages taken back.
    void cancel(page_stock& stock) noexcept {
        for (std::size_t i = 0; i < with_pages_; ++i) {
            if (is_fresh(i)) {
                stock.take_back(staged_[i].page);
            }
        }
        with_pages_ = 0;
    }
    /// Makes the plan the sequence's state.
    void commit(page_stock& stock) noexcept {
        stock.settle();
        for (std::size_t i = 0; i < rewritten_; ++i) {
            if (is_fresh(i)) {
                stock.give(held_.runs[kept_ + i].page);
            }
        }
        held_.runs.replace_from(kept_, size_);
        held_.tokens += keys_.tokens();
    }
    /// Runs at the start of the list that stay as they are.
    [[nodiscard]] std::size_t kept() const noexcept { return kept_; }
    [[nodiscard]] const kv_encode_report& found() const noexcept { return found_; }

private:
    [[nodiscard]] bool is_sink(const page_run& run) const noexcept { return run.format == &layer_.sinks().format; }
    [[nodiscard]] const page_kind& kind_of(const page_run& run) const noexcept {
        return is_sink(run) ? layer_.sinks() : run.format->is_exact ? layer_.exact() : layer_.coded();
    }
    [[nodiscard]] const key_positions& positions() const noexcept { return layer_.keys().positions(); }
    [[nodiscard]] std::int64_t coded_end(const page_run& run) const noexcept {
        return positions().follows() ? run.coded_position + static_cast<std::int64_t>(run.tokens) : run.coded_position;
    }

    void place_tokens() noexcept {
        std::size_t index = held_.tokens;
        const std::size_t end = index + keys_.tokens();
        const std::size_t sinks = layer_.sink_tokens();
        if (size_ != 0 && is_sink(staged_[size_ - 1]) == (index < sinks)) {
            page_run& last = staged_[size_ - 1];
            const std::size_t room =
                std::min(last.format->tokens - last.first - last.tokens, positions().most_tokens(coded_end(last)));
            extended_ = std::min({room, end - index, index < sinks ? sinks - index : room});
            last.tokens += extended_;
            index += extended_;
        }
        while (index < end) {
            const page_run* before = size_ != 0 ? &staged_[size_ - 1] : kept_ != 0 ? &held_.runs[kept_ - 1] : nullptr;
            if (before != nullptr && is_sink(*before) && index >= sinks) {
                before = nullptr;  // blocks begin behind the sinks
            }
            page_run run;
            run.format = index < sinks ? &layer_.sinks().format : &layer_.exact().format;
            run.position = first_position_ + static_cast<std::int64_t>(index - held_.tokens);
            run.coded_position = positions().begin_run(run.position, before);
            run.tokens = std::min({run.format->tokens, end - index, positions().most_tokens(run.coded_position),
                                   index < sinks ? sinks - index : end - index});
            index += run.tokens;
            staged_[size_++] = run;
        }
    }

    void choose_formats() noexcept {
        const std::size_t tokens = held_.tokens + keys_.tokens();
        std::size_t end = tokens;
        for (std::size_t last = size_; last > 0;) {
            const page_run& run = staged_[last - 1];
            std::size_t first = last;
            std::size_t count = 0;
            do {
                count += staged_[--first].tokens;
            } while (first > 0 && run.page != nullptr && staged_[first - 1].page == run.page);
            const bool is_closed = last != size_ || run.first + run.tokens == layer_.page_tokens() ||
                                   positions().most_tokens(coded_end(run)) == 0;
            if (!is_sink(run) && is_closed && tokens - end >= layer_.recent_tokens()) {
                for (std::size_t i = first; i < last; ++i) {
                    staged_[i].format = &layer_.coded().format;
                }
            }
            end -= count;
            last = first;
        }
    }

    /// End of the staged runs that share the page of run `i`, or will.
    [[nodiscard]] std::size_t end_of_page(std::size_t i) const noexcept {
        std::size_t end = i + 1;
        while (end < size_ && staged_[i].page != nullptr && staged_[end].page == staged_[i].page) {
            ++end;
        }
        return end;
    }
    [[nodiscard]] bool lacks_page(std::size_t first, std::size_t end) const noexcept {
        const page_run& run = staged_[first];
        return run.page == nullptr || !run.format->is_exact ||
               (end == rewritten_ && extended_ != 0 && is_shared(first, end));
    }
    /// Whether others than these runs refer to their page.
    [[nodiscard]] bool is_shared(std::size_t first, std::size_t end) const noexcept {
        return page_pool::references(staged_[first].page) != end - first;
    }
    /// Whether staged run `i` has a page of its own, not the one that the sequence has there.
    [[nodiscard]] bool is_fresh(std::size_t i) const noexcept {
        return i >= rewritten_ || staged_[i].page != held_.runs[kept_ + i].page;
    }

    /// The larger number of blocks that a page has on one of the sides.
    [[nodiscard]] std::size_t blocks() const noexcept {
        const std::size_t block = std::min(layer_.keys().block_tokens(), layer_.values().block_tokens());
        return (layer_.page_tokens() + block - 1) / block;
    }

    /// Tokens of a run that are new: the first one's number in the run, and in the input.
    struct new_tokens {
        std::size_t in_run;
        std::size_t in_input;
    };
    [[nodiscard]] new_tokens new_tokens_of(std::size_t i) const noexcept {
        const page_run& run = staged_[i];
        if (i + 1 == rewritten_) {
            return {run.tokens - extended_, 0};
        }
        return i < rewritten_ ? new_tokens{run.tokens, 0}
                              : new_tokens{0, static_cast<std::size_t>(run.position - first_position_)};
    }
    [[nodiscard]] token_positions positions_at(const page_run& run, std::size_t token) const noexcept {
        return token_positions{run.position, run.coded_position}.after(token, positions().follows());
    }
    [[nodiscard]] const tensor_view& input(bool is_keys) const noexcept { return is_keys ? keys_ : values_; }

    /// Writes the new tokens of runs that stay exact.
    void store_exact(kv_scratch& scratch) {
        for (std::size_t i = rewritten_ == 0 ? 0 : rewritten_ - 1; i < size_; ++i) {
            const page_run& run = staged_[i];
            if (!run.format->is_exact) {
                continue;
            }
            for (const bool is_keys : {true, false}) {
                const new_tokens from = new_tokens_of(i);
                const cache_side& side = layer_.side(is_keys);
                const exact_layout& layout = is_keys ? run.format->exact_keys : run.format->exact_values;
                for (std::size_t done = from.in_run; done < run.tokens; done += side.block_tokens()) {
                    std::byte* const to = const_cast<std::byte*>(run.page) + layout.row(0, run.first + done);
                    side.store_exact(input(is_keys), from.in_input + done - from.in_run,
                                     std::min(side.block_tokens(), run.tokens - done),
                                     {cache_side::numbers(to), head_stride(layout)}, positions_at(run, done), scratch,
                                     is_keys ? found_.keys : found_.values);
                }
            }
        }
    }

    /// Encodes a block of one side of a page, if the plan says so: number `task` of all that there could be.
    [[nodiscard]] status encode_block(std::size_t task, kv_scratch& scratch, const executor& workers) {
        const std::size_t i = task / (2 * blocks());
        const bool is_keys = task % 2 == 0;
        const cache_side& side = layer_.side(is_keys);
        const page_run& run = staged_[i];
        const page_run& last = staged_[end_of_page(i) - 1];
        const std::size_t end = last.first + last.tokens;
        const std::size_t slot = task / 2 % blocks() * side.block_tokens();
        if (run.format->is_exact || !run_list::begins_page({staged_, size_}, i) || slot >= end) {
            return {};
        }
        const std::size_t count = std::min(side.block_tokens(), end - slot);
        const exact_block<const std::uint16_t> rows = exact_rows(i, is_keys, slot, count, scratch);
        const std::int64_t coded = positions().follows() ? run.coded_position + static_cast<std::int64_t>(slot) -
                                                               static_cast<std::int64_t>(run.first)
                                                         : 0;
        return side.encode(rows, count, coded, const_cast<std::byte*>(run.page),
                           is_keys ? run.format->coded_keys : run.format->coded_values, slot, scratch, workers);
    }

    /// Tokens `[slot, slot + count)` of the page that staged run `i` begins, before they are encoded: from the
    /// sequence's page, if they are old, or gathered from there and from the input.
    [[nodiscard]] exact_block<const std::uint16_t> exact_rows(std::size_t i, bool is_keys, std::size_t slot,
                                                              std::size_t count, kv_scratch& scratch) {
        const std::size_t tail = end_of_page(i) - 1;
        const page_run& run = staged_[tail];
        const new_tokens from = new_tokens_of(tail);
        const std::size_t first_new = run.first + from.in_run;
        const exact_layout& layout = is_keys ? layer_.exact().format.exact_keys : layer_.exact().format.exact_values;
        const std::byte* const page = i < rewritten_ ? held_.runs[kept_ + i].page : nullptr;
        if (slot + count <= first_new) {
            return {cache_side::numbers(page + layout.row(0, slot)), head_stride(layout)};
        }
        const cache_side& side = layer_.side(is_keys);
        const std::size_t width = side.head_dim();
        const exact_block<std::uint16_t> rows{scratch.exact.data(), count * width};
        const std::size_t old = first_new > slot ? first_new - slot : 0;
        for (std::size_t head = 0; old != 0 && head < side.heads(); ++head) {
            std::memcpy(rows.data + head * rows.head_stride, page + layout.row(head, slot), old * width * 2);
        }
        encode_report found;
        side.store_exact(input(is_keys), from.in_input + slot + old - first_new, count - old,
                         {rows.data + old * width, rows.head_stride}, positions_at(run, slot + old - run.first),
                         scratch, found);
        if (found.nonfinite_rows != 0) {
            const std::lock_guard lock(mutex_);
            (is_keys ? found_.keys : found_.values).merge(found);
        }
        return {rows.data, rows.head_stride};
    }
    [[nodiscard]] static std::size_t head_stride(const exact_layout& layout) noexcept {
        return (layout.row(1, 0) - layout.row(0, 0)) / 2;
    }

    const cache_layer& layer_;
    layer_tokens& held_;
    const tensor_view& keys_;
    const tensor_view& values_;
    std::int64_t first_position_;
    std::size_t kept_;           // runs before these stay as they are
    std::size_t rewritten_ = 0;  // the sequence's last runs, of which the first staged ones are the successors
    page_run* staged_ = nullptr;
    std::size_t size_ = 0;        // staged
    std::size_t extended_ = 0;    // tokens that the sequence's last run takes
    std::size_t with_pages_ = 0;  // staged runs that have their page
    std::size_t encoded_pages_ = 0;
    std::mutex mutex_;
    kv_encode_report found_;
};

}  // namespace detail
RVQKV_NAMESPACE_END
