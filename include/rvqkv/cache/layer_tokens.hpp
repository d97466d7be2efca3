// SPDX-License-Identifier: MIT
/// @file
/// What one sequence holds of one layer, and how tokens leave it: by rollback, out of the middle, behind a window, or
/// into pages of fewer depths.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/cache/cache_bytes.hpp"
#include "rvqkv/cache/cache_layer.hpp"
#include "rvqkv/cache/kv_workspace.hpp"
#include "rvqkv/cache/page_pool.hpp"
#include "rvqkv/cache/page_stock.hpp"
#include "rvqkv/cache/run_list.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {

struct layer_tokens {
    static constexpr std::size_t all_depths = std::numeric_limits<std::size_t>::max();

    run_list runs;
    std::size_t tokens = 0;
    std::size_t dropped = 0;  ///< The first so many have left the sliding window.

    /// Of the token that comes next.
    [[nodiscard]] std::int64_t next_position() const noexcept { return runs.empty() ? 0 : end_position(runs.back()); }
    [[nodiscard]] static std::int64_t end_position(const page_run& run) noexcept {
        return run.position + static_cast<std::int64_t>(run.tokens);
    }

    /// Runs that no token sees any more that comes next or after up to `window_slack` tokens are rolled back.
    [[nodiscard]] std::size_t runs_behind_window(const cache_layer& layer) const noexcept {
        std::size_t behind = 0;
        if (layer.config().sliding_window != 0) {
            const std::int64_t first =
                first_seen(layer, next_position()) - static_cast<std::int64_t>(layer.window_slack());
            while (behind + 1 < runs.size() && end_position(runs[behind]) <= first) {
                ++behind;
            }
        }
        return behind;
    }
    /// Lets go of the first runs.
    void drop_runs(std::size_t count, page_stock& stock) noexcept {
        for (std::size_t i = 0; i < count; ++i) {
            dropped += runs[i].tokens;
        }
        erase_runs(0, count, stock);
    }

    /// Errors: `invalid_argument` when fewer tokens are held, or none that the next one must see.
    [[nodiscard]] status check_truncate(const cache_layer& layer, std::size_t kept) const {
        if (kept > tokens) {
            return layer.wrong(": cannot truncate to " + std::to_string(kept) + " tokens, it holds " +
                               std::to_string(tokens));
        }
        if (dropped == 0 || kept == tokens || kept == 0) {
            return {};
        }
        if (kept <= dropped || runs[0].position > first_seen(layer, position_of(kept - 1) + 1)) {
            return layer.wrong(": cannot truncate to " + std::to_string(kept) + " tokens: the sliding window of " +
                               std::to_string(layer.config().sliding_window) + " has let go of tokens before " +
                               std::to_string(dropped) + " that the next one must see; keep more, or none");
        }
        return {};
    }
    /// Drops the tokens from index `kept` on. Precondition: `check_truncate`.
    void truncate(std::size_t kept, page_stock& stock) noexcept {
        while (tokens > kept && !runs.empty()) {
            page_run& last = runs[runs.size() - 1];
            const std::size_t cut = std::min(last.tokens, tokens - kept);
            tokens -= cut;
            if (cut == last.tokens) {
                erase_runs(runs.size() - 1, runs.size(), stock);
            } else {
                last.tokens -= cut;
            }
        }
        tokens = kept;
        dropped = std::min(dropped, kept);
    }

    /// Errors: `invalid_argument` for a range that is not held, or tokens missing that the next one must see then.
    [[nodiscard]] status check_evict(const cache_layer& layer, std::size_t first, std::size_t last, bool shift) const {
        if (first > last || last > tokens) {
            return layer.wrong(": cannot evict tokens " + std::to_string(first) + " to " + std::to_string(last) +
                               ", it holds " + std::to_string(tokens));
        }
        if (last == tokens) {
            return check_truncate(layer, first);
        }
        const auto gap = static_cast<std::int64_t>(last - first);
        if (!shift || first == last || first == 0 || last <= dropped) {
            return {};  // nothing that has left the window comes nearer
        }
        const std::int64_t seen = first_seen(layer, next_position() - gap);
        const bool is_covered =
            position_of(last) - gap <= seen || (first > dropped && runs[0].position <= seen) || dropped == 0;
        if (!is_covered) {
            return layer.wrong(": cannot evict tokens " + std::to_string(first) + " to " + std::to_string(last) +
                               ": tokens before " + std::to_string(dropped) +
                               ", which are gone, would come back into the sliding window of " +
                               std::to_string(layer.config().sliding_window));
        }
        return {};
    }
    /// Drops tokens `[first, last)`. Preconditions: `check_evict`, and room for two runs more.
    void evict(const cache_layer& layer, std::size_t first, std::size_t last, bool shift, page_stock& stock) noexcept {
        if (last == tokens) {
            truncate(first, stock);
            return;
        }
        const bool follows = layer.keys().positions().follows();
        const std::size_t begin = split_at(first, follows);
        const std::size_t end = split_at(last, follows);
        erase_runs(begin, end, stock);
        for (std::size_t i = begin; shift && i < runs.size(); ++i) {
            runs[i].position -= static_cast<std::int64_t>(last - first);
        }
        dropped -= std::min(last, dropped) - std::min(first, dropped);
        tokens -= last - first;
    }

    /// Replaces, in a copy of the runs, pages of codes that lie before a token by pages of fewer depths.
    /// Errors: `out_of_memory`.
    [[nodiscard]] status demote(cache_layer& layer, run_list& copy, std::size_t before, std::size_t key_depths,
                                std::size_t value_depths) const {
        status outcome;
        for_each_page(before, [&](std::size_t first, std::size_t end) {
            const page_format& from = *copy[first].format;
            const std::size_t keys = std::min(key_depths, from.coded_keys.depths());
            const std::size_t values = std::min(value_depths, from.coded_values.depths());
            if (!outcome.ok() || (keys == from.coded_keys.depths() && values == from.coded_values.depths())) {
                return;
            }
            const auto kind = layer.demoted(keys, values);
            std::byte* const page = kind.ok() ? kind.value()->pages->pool().take(*kind.value()->pages) : nullptr;
            if (page == nullptr) {
                outcome = error{error_code::out_of_memory, "out of memory"};
                return;
            }
            const page_format& to = kind.value()->format;
            copy_side(copy[first].page, from.coded_keys, page, to.coded_keys);
            copy_side(copy[first].page, from.coded_values, page, to.coded_values);
            for (std::size_t i = first; i < end; ++i) {
                if (i != first) {
                    page_pool::share(page);
                }
                page_pool::drop(std::exchange(copy[i].page, page));
                copy[i].format = &to;
            }
        });
        return outcome;
    }
    /// Bytes that this would save.
    [[nodiscard]] std::size_t saved_bytes(const cache_layer& layer, std::size_t before, std::size_t key_depths,
                                          std::size_t value_depths) const noexcept {
        std::size_t saved = 0;
        for_each_page(before, [&](std::size_t first, std::size_t) {
            const page_format& format = *runs[first].format;
            saved += format.bytes - layer.coded_bytes(std::min(key_depths, format.coded_keys.depths()),
                                                      std::min(value_depths, format.coded_values.depths()));
        });
        return saved;
    }

    /// Reconstructs tokens from index `first` on: see `kv_sequence::reconstruct_keys`.
    [[nodiscard]] status read(const cache_layer& layer, bool is_keys, std::size_t first, const mutable_tensor_view& out,
                              std::size_t depths, kv_workspace& workspace) const {
        const cache_side& side = layer.side(is_keys);
        if (status bad = side.check(out.shape()); !bad) {
            return bad;
        }
        if (first > tokens || out.tokens() > tokens - first) {
            return side.wrong("first_token is " + std::to_string(first) + " and the output has " +
                              std::to_string(out.tokens()) + " tokens, the layer holds " + std::to_string(tokens));
        }
        if (first < dropped && out.tokens() != 0) {
            return side.wrong("first_token is " + std::to_string(first) + ", tokens before " + std::to_string(dropped) +
                              " have left the sliding window");
        }
        if (depths != all_depths && depths > side.codec().depths()) {
            return side.wrong("depths is " + std::to_string(depths) + ", the codec has " +
                              std::to_string(side.codec().depths()));
        }
        if (status grown = layer.reserve(workspace, 1, serial_executor()); !grown) {
            return grown;
        }
        std::size_t begin = dropped;
        std::size_t done = 0;
        for (const page_run& run : runs.runs()) {
            while (done < out.tokens() && first + done < begin + run.tokens) {
                const std::size_t in_run = first + done - begin;
                const std::size_t count = std::min({run.tokens - in_run, out.tokens() - done, side.block_tokens()});
                const token_positions at =
                    token_positions{run.position, run.coded_position}.after(in_run, side.positions().follows());
                if (status wrong = side.read(run.page, *run.format, is_keys, run.first + in_run, at,
                                             out.slice_tokens(done, count), depths, workspace.task(0));
                    !wrong) {
                    return wrong;
                }
                done += count;
            }
            begin += run.tokens;
        }
        return {};
    }

    /// Pages that it lacks to hold `count` tokens in all.
    [[nodiscard]] page_needs needs(const cache_layer& layer, std::size_t count) const noexcept {
        page_needs held;
        std::size_t coded_tokens = dropped;
        for (std::size_t i = 0; i < runs.size(); ++i) {
            const page_run& run = runs[i];
            const bool is_sink = run.format == &layer.sinks().format;
            const std::size_t pages = run_list::begins_page(runs.runs(), i) ? 1 : 0;
            (is_sink ? held.sinks : run.format->is_exact ? held.exact : held.coded) += pages;
            coded_tokens += run.format->is_exact ? 0 : run.tokens;
        }
        // Pages that a rollback or an eviction has cut hold fewer tokens than others.
        const page_needs whole = layer.needs(count);
        const page_needs rest = layer.needs(count - std::min(count, coded_tokens));
        return {whole.sinks - std::min(whole.sinks, held.sinks), whole.exact - std::min(whole.exact, held.exact),
                std::min(rest.coded, layer.most_coded() - std::min(layer.most_coded(), held.coded))};
    }
    void add_to(kv_sequence_bytes& bytes) const noexcept {
        bytes.page_tables += runs.bytes();
        for (std::size_t i = 0; i < runs.size(); ++i) {
            if (run_list::begins_page(runs.runs(), i)) {
                bytes.add(*runs[i].format);
            }
        }
    }

private:
    void erase_runs(std::size_t first, std::size_t end, page_stock& stock) noexcept {
        for (std::size_t i = first; i < end; ++i) {
            stock.give(runs[i].page);
        }
        runs.erase(first, end);
    }
    /// Position of the first token that one at `position` sees.
    [[nodiscard]] static std::int64_t first_seen(const cache_layer& layer, std::int64_t position) noexcept {
        return position - static_cast<std::int64_t>(layer.config().sliding_window) + 1;
    }
    /// Precondition: `dropped <= token < tokens`.
    [[nodiscard]] std::int64_t position_of(std::size_t token) const noexcept {
        std::size_t begin = dropped;
        std::size_t i = 0;
        for (; begin + runs[i].tokens <= token; ++i) {
            begin += runs[i].tokens;
        }
        return runs[i].position + static_cast<std::int64_t>(token - begin);
    }
    /// Makes a run begin at a token, and returns its number; that of the first run for a token that is gone.
    [[nodiscard]] std::size_t split_at(std::size_t token, bool follows) noexcept {
        std::size_t begin = dropped;
        std::size_t i = 0;
        while (i < runs.size() && begin + runs[i].tokens <= token) {
            begin += runs[i++].tokens;
        }
        if (i < runs.size() && begin < token) {
            runs.split(i++, token - begin, follows);
        }
        return i;
    }
    /// Calls `body(first run, end)` for the runs of each page of codes whose tokens have an index below `before`.
    template <class Body>
    void for_each_page(std::size_t before, const Body& body) const {
        std::size_t index = dropped;
        for (std::size_t first = 0, end = 0; first < runs.size(); first = end) {
            do {
                index += runs[end++].tokens;
            } while (end < runs.size() && runs[end].page == runs[first].page);
            if (index > before) {
                return;
            }
            if (!runs[first].format->is_exact) {
                body(first, end);
            }
        }
    }
    /// Scales, and the codes of as many depths as there is room for: they are what a head's piece begins with.
    static void copy_side(const std::byte* from, const coded_layout& layout, std::byte* to, const coded_layout& fewer) {
        for (std::size_t head = 0; head < layout.heads(); ++head) {
            std::memcpy(to + fewer.scales(head), from + layout.scales(head), fewer.head_bytes());
        }
    }
};

}  // namespace detail
RVQKV_NAMESPACE_END
