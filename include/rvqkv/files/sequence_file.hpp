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

#include "rvqkv/cache/cache_core.hpp"
#include "rvqkv/cache/kv_cache.hpp"
#include "rvqkv/cache/kv_sequence.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/mapped_file.hpp"
#include "rvqkv/files/sequence_loader.hpp"
#include "rvqkv/files/sequence_pages.hpp"
#include "rvqkv/files/sequence_saver.hpp"
#include "rvqkv/files/sequence_table.hpp"

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

struct save_sequence_options {
    /// Adds to the file, if there is one: see `save_sequence`.
    bool incremental = false;
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
