// SPDX-License-Identifier: MIT
/// @file
/// A sequence in a file: pages of the cache as they are, so that a conversation goes on where it was saved.
///
/// A file is a record of 64 bytes and one segment, to which later saves may add others:
///
///     record    "rvqkvseq", version, generation, offset, size and checksum of the newest table, end of the contents,
///               checksum of the record
///     segment   a copy of the record; a table; pages, those with a sequence's first tokens first
///     segment   ...
///
/// A table says of every layer how many tokens it has, and of its pages where they lie (in any segment), their checksum
/// and format, and which runs of tokens they hold, with positions; and as text what the cache was like: page size,
/// tiers, how keys are turned, the fingerprint of every codec. `rvqkv/files/sequence_table.hpp` has the records, all
/// little-endian. Of exact pages the tokens that are held are stored, `[side, head, token, channel]`; pages of codes
/// as they are, without what the pool adds at their end. Checksums are XXH3: of 128 bits for pages, 64 for the rest.
///
/// Pages of codes never change, so adding to a file writes only pages that it does not have, behind its end, and a
/// table; what the newest table does not name is of no use any more, and when that would be more than half, the file is
/// written anew. How this stays safe at every moment is told in `rvqkv/files/growing_file.hpp`.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/cache/append_job.hpp"
#include "rvqkv/cache/cache_core.hpp"
#include "rvqkv/cache/cache_layer.hpp"
#include "rvqkv/cache/kv_cache.hpp"
#include "rvqkv/cache/kv_sequence.hpp"
#include "rvqkv/cache/layer_tokens.hpp"
#include "rvqkv/cache/nothrow_array.hpp"
#include "rvqkv/cache/page_pool.hpp"
#include "rvqkv/cache/page_stock.hpp"
#include "rvqkv/cache/run_list.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/files/atomic_file.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/checksum.hpp"
#include "rvqkv/files/growing_file.hpp"
#include "rvqkv/files/mapped_file.hpp"
#include "rvqkv/files/sequence_pages.hpp"
#include "rvqkv/files/sequence_table.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

struct save_sequence_options {
    /// Adds to the file, if there is one: see `save_sequence`.
    bool incremental = false;
};

/// What became of a damaged file.
struct sequence_recovery {
    bool was_damaged = false;
    std::size_t tokens = 0;  ///< Of the sequence, at most in any layer.
    std::string damage;      ///< What is wrong with the file.
};

struct load_sequence_options {
    /// Of a damaged file, takes the longest prefix of tokens whose pages are good in all layers.
    bool recover = false;
    sequence_recovery* recovery = nullptr;  ///< Where to say what was recovered, or null.
};

/// What a file says that it holds.
struct saved_sequence_info {
    struct layer {
        std::size_t tokens = 0;
        std::size_t first_token = 0;  ///< Those before have left the sliding window.
        std::size_t pages = 0;
        std::size_t page_bytes = 0;
    };
    unsigned version = 0;
    std::size_t generation = 0;    ///< Times that the file was saved to, since it was written as a whole.
    std::size_t bytes = 0;         ///< Of the file.
    std::size_t bytes_in_use = 0;  ///< Of these: records, the newest table and its pages.
    std::string description;       ///< Of the cache, a line "layer 3 keys: heads=8 ..." for each layer and side.
    std::vector<layer> layers;
};

namespace detail {

struct sequence_access {
    [[nodiscard]] static cache_core* core(const kv_sequence& of) noexcept { return of.core_ ? &*of.core_ : nullptr; }
    [[nodiscard]] static nothrow_array<layer_tokens>& layers(kv_sequence& of) noexcept { return of.layers_; }
    [[nodiscard]] static const nothrow_array<layer_tokens>& layers(const kv_sequence& of) noexcept {
        return of.layers_;
    }
    [[nodiscard]] static page_stock& stock(kv_sequence& of) noexcept { return of.stock_; }
};

// ---- Saving ----

/// A sequence's pages on their way to a file.
class sequence_saver {
public:
    /// Errors: `out_of_memory`, `invalid_argument` for codecs that a file cannot describe.
    [[nodiscard]] static result<sequence_saver> create(cache_core& core, const nothrow_array<layer_tokens>& layers) {
        auto text = describe_cache(core);
        if (!text) {
            return text.error();
        }
        std::size_t pages = 0;
        std::size_t runs = 0;
        std::size_t scratch = 0;
        for (const layer_tokens& held : layers) {
            for (std::size_t i = 0; i < held.runs.size(); ++i, ++runs) {
                pages += run_list::begins_page(held.runs.runs(), i) ? 1 : 0;
                const page_format& format = *held.runs[i].format;
                scratch = std::max(scratch, format.is_exact ? saved_page_bytes(format, format.tokens) : 0);
            }
        }
        auto table = sequence_table::create(layers.size(), pages, runs, text.value());
        auto sources = nothrow_array<page_source_of>::allocate(pages);
        auto order = nothrow_array<std::size_t>::allocate(pages);
        auto memory = aligned_buffer<std::byte>::allocate(scratch);
        if (!table || !sources || !order || !memory) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        sequence_saver made;
        made.table_ = std::move(table).value();
        made.sources_ = std::move(sources).value();
        made.order_ = std::move(order).value();
        made.scratch_ = std::move(memory).value();
        made.fill(core, layers);
        return made;
    }

    /// Errors: `io`.
    [[nodiscard]] status write_new(const std::filesystem::path& path) {
        sequence_record record;
        record.generation = 1;
        place_pages(record, sizeof(record));
        auto file = atomic_file::create(path);
        if (!file) {
            return file.error();
        }
        if (status done = file.value().write(record.bytes()); !done) {
            return done;
        }
        if (status done = write_segment(record, file.value()); !done) {
            return done;
        }
        return file.value().commit();
    }

    /// Adds to an existing file; false if that is not worth it. Errors: `io`, `invalid_argument` for another cache's,
    /// `damaged_file`, `unsupported`, `out_of_memory`.
    [[nodiscard]] result<bool> add_to(const std::filesystem::path& path) {
        auto file = growing_file::open(path);
        if (!file) {
            return file.error();
        }
        sequence_record record;
        {
            const auto mapped = file.value().map();
            if (!mapped) {
                return mapped.error();
            }
            auto old = find_table(byte_source::view(mapped.value().bytes(), path.string()));
            if (!old) {
                return old.error();
            }
            if (status same = check_description(path.string(), old.value().table.text(), table_.text()); !same) {
                return same.error();
            }
            record = old.value().record;
            if (status done = find_pages(old.value().table.pages()); !done) {
                return done.error();
            }
            const std::size_t segment = sizeof(record) + table_.bytes().size();
            const std::size_t used = sizeof(record) + segment + all_bytes_;
            if (record.end + segment + new_bytes_ > 2 * used) {
                return false;
            }
            if (status done = file.value().begin(record.bytes(), old.value().is_mended, record.end); !done) {
                return done.error();
            }
        }
        ++record.generation;
        place_pages(record, record.end);
        if (status done = write_segment(record, file.value()); !done) {
            return done.error();
        }
        if (status done = file.value().commit(record.bytes()); !done) {
            return done.error();
        }
        return true;
    }

    /// Forgets which pages a file has.
    void forget_pages() noexcept {
        for (page_source_of& source : sources_) {
            source.is_saved = false;
        }
    }

private:
    struct page_source_of {
        const std::byte* page = nullptr;
        const page_format* format = nullptr;
        std::size_t end = 0;  // index of the token behind the page's last
        bool is_saved = false;
    };

    void fill(cache_core& core, const nothrow_array<layer_tokens>& layers) noexcept {
        std::size_t page = 0;
        std::size_t run = 0;
        for (std::size_t i = 0; i < layers.size(); ++i) {
            const layer_tokens& held = layers[i];
            saved_layer& layer = table_.layers()[i];
            layer.tokens = held.tokens;
            layer.dropped = held.dropped;
            std::size_t tokens = held.dropped;
            for (std::size_t first = 0, end = 0; first < held.runs.size(); first = end, ++page, ++layer.pages) {
                do {
                    const page_run& each = held.runs[end++];
                    table_.runs()[run++] = {static_cast<std::uint32_t>(each.first),
                                            static_cast<std::uint32_t>(each.tokens), each.position,
                                            each.coded_position};
                    tokens += each.tokens;
                } while (end < held.runs.size() && held.runs[end].page == held.runs[first].page);
                const page_format& format = *held.runs[first].format;
                sources_[page] = {held.runs[first].page, &format, tokens, false};
                order_[page] = page;
                saved_page& to = table_.pages()[page];
                to.runs = static_cast<std::uint32_t>(end - first);
                if (format.is_exact) {
                    const page_run& last = held.runs[end - 1];
                    to.format = &format == &core.layer(i).sinks().format ? saved_format::sinks : saved_format::exact;
                    to.first = static_cast<std::uint32_t>(held.runs[first].first);
                    to.tokens = static_cast<std::uint32_t>(last.first + last.tokens) - to.first;
                } else {
                    to.format = saved_format::codes;
                    to.key_depths = static_cast<std::uint32_t>(format.coded_keys.depths());
                    to.value_depths = static_cast<std::uint32_t>(format.coded_values.depths());
                }
                const std::span<const std::byte> bytes = bytes_of(page);
                to.bytes = bytes.size();
                to.checksum = checksum128::of(bytes);
                all_bytes_ += bytes.size();
            }
        }
        std::sort(order_.begin(), order_.end(), [this](std::size_t a, std::size_t b) {
            return std::tie(sources_[a].end, a) < std::tie(sources_[b].end, b);
        });
    }
    [[nodiscard]] std::span<const std::byte> bytes_of(std::size_t page) noexcept {
        const page_source_of& source = sources_[page];
        const saved_page& to = table_.pages()[page];
        return gather_page(*source.format, source.page, to.first, to.tokens, scratch_.span());
    }

    /// Lets pages that a file has be those of the table. Errors: `out_of_memory`.
    [[nodiscard]] status find_pages(std::span<const saved_page> saved) {
        const auto by_contents = [](const saved_page& a, const saved_page& b) {
            return std::tie(a.checksum, a.bytes) < std::tie(b.checksum, b.bytes);
        };
        auto known = nothrow_array<saved_page>::allocate(saved.size());
        if (!known) {
            return known.error();
        }
        std::copy(saved.begin(), saved.end(), known.value().data());
        std::sort(known.value().begin(), known.value().end(), by_contents);
        new_bytes_ = 0;
        for (std::size_t i = 0; i < sources_.size(); ++i) {
            saved_page& page = table_.pages()[i];
            auto [first, last] = std::equal_range(known.value().begin(), known.value().end(), page, by_contents);
            // Each page of the file is that of one page here, so that a table never has more bytes than its file.
            while (first != last && first->runs == 0) {
                ++first;
            }
            sources_[i].is_saved = first != last;
            if (first != last) {
                page.offset = first->offset;
                first->runs = 0;
            } else {
                new_bytes_ += page.bytes;
            }
        }
        return {};
    }
    /// Gives new pages their places in a segment that begins at `begin`, and completes the record.
    void place_pages(sequence_record& record, std::size_t begin) noexcept {
        record.table_offset = begin + sizeof(record);
        record.table_bytes = table_.bytes().size();
        record.end = record.table_offset + record.table_bytes;
        for (const std::size_t i : order_) {
            if (!sources_[i].is_saved) {
                table_.pages()[i].offset = record.end;
                record.end += table_.pages()[i].bytes;
            }
        }
        record.table_checksum = checksum64(table_.bytes());
        record.checksum = record.right_checksum();
    }
    template <class File>
    [[nodiscard]] status write_segment(const sequence_record& record, File& file) {
        if (status done = file.write(record.bytes()); !done) {
            return done;
        }
        if (status done = file.write(table_.bytes()); !done) {
            return done;
        }
        for (const std::size_t i : order_) {
            if (status done = sources_[i].is_saved ? status{} : file.write(bytes_of(i)); !done) {
                return done;
            }
        }
        return {};
    }

    sequence_table table_;
    nothrow_array<page_source_of> sources_;
    nothrow_array<std::size_t> order_;  // of pages in the file
    aligned_buffer<std::byte> scratch_;
    std::size_t all_bytes_ = 0;
    std::size_t new_bytes_ = 0;
};

// ---- Loading ----

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

[[nodiscard]] inline result<kv_sequence> load_sequence(const kv_cache& cache, std::span<const std::byte> bytes,
                                                       const std::string& name, const load_sequence_options& options) {
    auto made = cache.new_sequence();
    if (!made) {
        return made;
    }
    cache_core& core = *sequence_access::core(made.value());
    const byte_source file = byte_source::view(bytes, name);
    sequence_recovery recovery;
    auto found = find_table(file);
    if (!found && options.recover && found.error().code != error_code::out_of_memory) {
        recovery.was_damaged = true;
        recovery.damage = found.error().message;
        found = find_any_table(file);
    }
    if (!found) {
        return found.error();
    }
    auto text = describe_cache(core);
    if (!text) {
        return text.error();
    }
    sequence_table& table = found.value().table;
    if (status same = check_description(name, table.text(), text.value()); !same) {
        return same.error();
    }
    if (table.layers().size() != core.layers()) {
        return file.damaged("the table has " + std::to_string(table.layers().size()) + " layers, its text says " +
                            std::to_string(core.layers()));
    }
    sequence_loader loader(file, bytes, core, table);
    if (status done = loader.load(made.value(), options.recover ? &recovery : nullptr); !done) {
        return done.error();
    }
    if (options.recovery != nullptr) {
        if (!options.recover) {
            for (std::size_t i = 0; i < core.layers(); ++i) {
                recovery.tokens = std::max(recovery.tokens, made.value().tokens(i));
            }
        }
        *options.recovery = std::move(recovery);
    }
    return made;
}

}  // namespace detail

/// Saves a sequence to a file, all or nothing: an old file is replaced in one step, when everything is on the disk.
///
/// With `incremental`, a file that a sequence of an equal cache was saved to is added to: pages that it has already
/// are not written again, whichever sequence they come from (an earlier state of this one, one that it was forked
/// from). Interrupted at any moment, the file has its old contents or the new ones. A file that is not there is made.
/// Errors:     `invalid_argument` for a sequence that was moved from, and codecs that a file cannot describe; `io`;
///             `out_of_memory`. Incrementally, also what `load_sequence` reports for the table of the file, which is
///             neither added to nor replaced then. The file has its old contents.
/// Threads:    a reader of the sequence. One writer of a file at a time; who loads it while it is added to may find it
///             damaged.
/// Complexity: a checksum over all pages; incrementally only new ones are written.
[[nodiscard]] inline status save_sequence(const kv_sequence& sequence, const std::filesystem::path& path,
                                          const save_sequence_options& options = {}) {
    detail::cache_core* const core = detail::sequence_access::core(sequence);
    if (core == nullptr) {
        return error{error_code::invalid_argument, path.string() + ": the sequence to save was moved from"};
    }
    auto saver = detail::sequence_saver::create(*core, detail::sequence_access::layers(sequence));
    if (!saver) {
        return saver.error();
    }
    std::error_code ignored;
    if (options.incremental && std::filesystem::exists(path, ignored)) {
        const auto added = saver.value().add_to(path);
        if (!added) {
            return added.error();
        }
        if (added.value()) {
            return {};
        }
        saver.value().forget_pages();
    }
    return saver.value().write_new(path);
}

/// A new sequence of a cache with the tokens that one of an equal cache was saved with. Everything is checked before it
/// is returned: record, table and every page by their checksums, all counts and positions, every code, scale and exact
/// number. The file is mapped into memory: it may be replaced meanwhile, but not cut short.
/// Errors: `damaged_file` saying where; with `recover` only when not even a table is whole. `invalid_argument` for a
///         file of another model, other codebooks or another way of holding them, naming the difference, and for a
///         cache that was moved from; `unsupported` for a version that this library does not read; `io`;
///         `out_of_memory`.
[[nodiscard]] inline result<kv_sequence> load_sequence(const kv_cache& cache, const std::filesystem::path& path,
                                                       const load_sequence_options& options = {}) {
    const auto file = mapped_file::open(path);
    if (!file) {
        return file.error();
    }
    return detail::load_sequence(cache, file.value().bytes(), path.string(), options);
}
/// The same from a file's bytes in memory, which are not needed afterwards.
[[nodiscard]] inline result<kv_sequence> load_sequence(const kv_cache& cache, std::span<const std::byte> bytes,
                                                       const load_sequence_options& options = {}) {
    return detail::load_sequence(cache, bytes, "memory", options);
}

/// What a file says that it holds: its record and table are checked, its pages are not read.
/// Errors: `damaged_file`, `unsupported`, `io`, `out_of_memory`.
[[nodiscard]] inline result<saved_sequence_info> inspect_sequence_file(const std::filesystem::path& path) {
    const auto file = mapped_file::open(path);
    if (!file) {
        return file.error();
    }
    auto found = detail::find_table(byte_source::view(file.value().bytes(), path.string()));
    if (!found) {
        return found.error();
    }
    detail::sequence_table& table = found.value().table;
    saved_sequence_info info;
    info.version = found.value().record.version;
    info.generation = found.value().record.generation;
    info.bytes = file.value().size();
    info.bytes_in_use = 2 * sizeof(detail::sequence_record) + table.bytes().size();
    info.description = table.text();
    std::size_t page = 0;
    for (const detail::saved_layer& saved : table.layers()) {
        saved_sequence_info::layer layer{saved.tokens, saved.dropped, saved.pages, 0};
        for (const std::size_t end = page + saved.pages; page < end; ++page) {
            layer.page_bytes += table.pages()[page].bytes;
        }
        info.bytes_in_use += layer.page_bytes;
        info.layers.push_back(layer);
    }
    return info;
}

RVQKV_NAMESPACE_END
