// SPDX-License-Identifier: MIT
/// @file
/// A sequence's way out of a file: `rvqkv/files/sequence_file.hpp` says what the file is like.
#pragma once

#include "rvqkv/attend/layer_config.hpp"
#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/cache/append_job.hpp"
#include "rvqkv/cache/cache_core.hpp"
#include "rvqkv/cache/cache_layer.hpp"
#include "rvqkv/cache/kv_sequence.hpp"
#include "rvqkv/cache/layer_tokens.hpp"
#include "rvqkv/cache/page_pool.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/nothrow_array.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/checksum.hpp"
#include "rvqkv/files/sequence_pages.hpp"
#include "rvqkv/files/sequence_table.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// What became of a damaged file.
struct sequence_recovery {
    bool was_damaged = false;
    std::size_t tokens = 0;  ///< Of the sequence, at most in any layer.
    std::string damage;      ///< What is wrong with the file.
};

namespace detail {

/// A file's pages on their way into a new sequence.
class sequence_loader {
public:
    sequence_loader(const byte_source& file, std::span<const std::byte> bytes, cache_core& core,
                    sequence_table& table) noexcept
        : file_(file), bytes_(bytes), core_(core), table_(table) {}

    /// Errors: `damaged_file`, `out_of_memory`. With `recovery`, pages that are damaged end the sequence before them.
    [[nodiscard]] status load(kv_sequence& into, sequence_recovery* recovery) {
        nothrow_array<layer_tokens>& layers = sequence_access::layers(into);
        auto kinds = nothrow_array<const page_kind*>::allocate(table_.pages().size());
        if (!kinds) {
            return kinds.error();
        }
        kinds_ = std::move(kinds).value();
        for (const bool loads : {false, true}) {
            page_ = 0;
            run_ = 0;
            for (layer_ = 0; layer_ < layers.size(); ++layer_) {
                if (status done = loads ? load_layer(layers[layer_], recovery) : check_layer(); !done) {
                    return done;
                }
            }
        }
        if (recovery != nullptr) {
            keep_whole(into);
            for (const layer_tokens& held : layers) {
                recovery->tokens = std::max(recovery->tokens, held.tokens);
            }
        }
        return {};
    }

private:
    [[nodiscard]] error damaged(std::string_view what) const {
        return file_.damaged("layer " + std::to_string(layer_) + " page " + std::to_string(page_) + ": " +
                             std::string(what));
    }
    [[nodiscard]] std::span<const saved_run> runs_of(const saved_page& page) const noexcept {
        return table_.runs().subspan(run_, page.runs);
    }

    /// Checks that a layer's pages are such as the cache has, before memory is taken for them.
    [[nodiscard]] status check_layer() {
        cache_layer& layer = core_.layer(layer_);
        const saved_layer& saved = table_.layers()[layer_];
        if ((!layer.has_tokens() && saved.tokens != 0) || (layer.config().sliding_window == 0 && saved.dropped != 0)) {
            return damaged("the layer cannot hold what the table says");
        }
        for (const std::size_t end = page_ + saved.pages; page_ < end; ++page_) {
            const saved_page& page = table_.pages()[page_];
            auto kind = kind_of(layer, page);
            if (!kind) {
                return kind.error();
            }
            const page_format& format = kind.value()->format;
            kinds_[page_] = kind.value();
            const std::uint64_t first = page.first;
            if (format.is_exact ? page.tokens == 0 || first + page.tokens > format.tokens
                                : page.first != 0 || page.tokens != 0) {
                return damaged("its tokens are not those of its format");
            }
            if (page.bytes != saved_page_bytes(format, page.tokens)) {
                return damaged("its size is not that of its format");
            }
            if (status good = check_runs(layer, page, format); !good) {
                return good;
            }
            run_ += page.runs;
        }
        return {};
    }
    /// Errors: `damaged_file`, `out_of_memory`.
    [[nodiscard]] result<const page_kind*> kind_of(cache_layer& layer, const saved_page& page) const {
        const bool is_codes = page.format == saved_format::codes;
        const std::size_t most_keys = layer.keys().codec().depths();
        const std::size_t most_values = layer.values().codec().depths();
        if (is_codes ? page.key_depths == 0 || page.key_depths > most_keys || page.value_depths == 0 ||
                           page.value_depths > most_values
                     : page.key_depths != 0 || page.value_depths != 0 || page.format > saved_format::codes ||
                           (page.format == saved_format::sinks && layer.sink_tokens() == 0)) {
            return damaged("its format is none that the layer has");
        }
        if (!is_codes) {
            return page.format == saved_format::sinks ? &layer.sinks() : &layer.exact();
        }
        return page.key_depths == most_keys && page.value_depths == most_values
                   ? &layer.coded()
                   : layer.demoted(page.key_depths, page.value_depths);
    }
    [[nodiscard]] status check_runs(const cache_layer& layer, const saved_page& page, const page_format& format) const {
        const kv_layer_config& config = layer.config();
        const std::span<const saved_run> runs = runs_of(page);
        const std::uint64_t last = format.is_exact ? page.first + page.tokens : format.tokens;
        std::uint64_t next = page.first;
        for (const saved_run& run : runs) {
            const std::uint64_t first = run.first;
            if (first < next || first + run.tokens > last) {
                return damaged("its runs lie outside of it or across each other");
            }
            next = first + run.tokens;
            // Keys of a page were turned one after the other, from its first token on, or not at all.
            const bool follows = layer.keys().positions().follows();
            const std::int64_t begin = run.coded_position - std::int64_t{run.first};
            if (follows ? begin < 0 || begin != runs[0].coded_position - std::int64_t{runs[0].first}
                        : run.coded_position != 0) {
                return damaged("positions that its keys were turned to make no sense");
            }
            if (config.coding == key_coding::block_relative &&
                static_cast<std::uint64_t>(run.coded_position) + run.tokens > config.block_tokens) {
                return damaged("its keys lie beyond their block");
            }
        }
        return {};
    }

    [[nodiscard]] status load_layer(layer_tokens& held, sequence_recovery* recovery) {
        const saved_layer& saved = table_.layers()[layer_];
        const std::size_t end = page_ + saved.pages;
        std::size_t runs = 0;
        for (std::size_t i = page_; i < end; ++i) {
            runs += table_.pages()[i].runs;
        }
        if (status grown = runs == 0 ? status{} : held.runs.reserve(runs + append_job::more_runs); !grown) {
            return grown;
        }
        held.tokens = saved.dropped;
        held.dropped = saved.dropped;
        const std::size_t runs_end = run_ + runs;
        for (; page_ < end; ++page_) {
            const saved_page& page = table_.pages()[page_];
            if (status done = load_page(held, page); !done) {
                if (recovery == nullptr || done.error().code != error_code::damaged_file) {
                    return done;
                }
                recovery->was_damaged = true;
                if (held.tokens < whole_tokens_) {
                    whole_tokens_ = held.tokens;
                    recovery->damage = done.error().message;
                }
                break;
            }
            run_ += page.runs;
        }
        page_ = end;
        run_ = runs_end;
        return {};
    }
    [[nodiscard]] status load_page(layer_tokens& held, const saved_page& page) const {
        const page_kind& kind = *kinds_[page_];
        if (page.offset > bytes_.size() || page.bytes > bytes_.size() - page.offset) {
            return damaged("the file ends before it does");
        }
        const std::span<const std::byte> bytes = bytes_.subspan(page.offset, page.bytes);
        std::byte* const memory = kind.pages->pool().take(*kind.pages);
        if (memory == nullptr) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        scatter_page(kind.format, bytes, page.first, page.tokens, memory);
        const bool is_same = checksum128::of(bytes) == page.checksum;
        const std::string_view fault =
            is_same ? fault_of_page(core_.layer(layer_), kind.format, memory) : "its checksum is not the one recorded";
        if (!fault.empty()) {
            page_pool::drop(memory);
            return damaged(fault);
        }
        for (const saved_run& run : runs_of(page)) {
            if (&run != runs_of(page).data()) {
                page_pool::share(memory);
            }
            *held.runs.spare(1) = {memory, &kind.format, run.first, run.tokens, run.position, run.coded_position};
            held.runs.replace_from(held.runs.size(), 1);
            held.tokens += run.tokens;
        }
        return {};
    }

    /// Drops the tokens of all layers that are behind the first one that is missing from any.
    void keep_whole(kv_sequence& sequence) noexcept {
        nothrow_array<layer_tokens>& layers = sequence_access::layers(sequence);
        for (std::size_t i = 0; i < layers.size(); ++i) {
            // As if all of it were here: has the window let go of what the next token must see?
            layer_tokens& held = layers[i];
            const std::size_t loaded = std::exchange(held.tokens, table_.layers()[i].tokens);
            if (whole_tokens_ < held.tokens && !held.check_truncate(core_.layer(i), whole_tokens_)) {
                whole_tokens_ = 0;
            }
            held.tokens = loaded;
        }
        for (layer_tokens& held : layers) {
            held.truncate(std::min(held.tokens, whole_tokens_), sequence_access::stock(sequence));
        }
    }

    const byte_source& file_;
    std::span<const std::byte> bytes_;
    cache_core& core_;
    sequence_table& table_;
    nothrow_array<const page_kind*> kinds_;  // of the table's pages
    std::size_t layer_ = 0;
    std::size_t page_ = 0;
    std::size_t run_ = 0;
    std::size_t whole_tokens_ = std::numeric_limits<std::size_t>::max();
};

}  // namespace detail
RVQKV_NAMESPACE_END
