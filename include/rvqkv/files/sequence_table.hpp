// SPDX-License-Identifier: MIT
/// @file
/// The record and the table of a saved sequence's file, as they lie in it; `rvqkv/files/sequence_file.hpp` says what
/// they are for. All numbers are little-endian and stand at multiples of 8 bytes.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/checksum.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// Version 2 has pages in which all that belongs to a head lies together.
inline constexpr std::uint32_t sequence_file_version = 2;

namespace detail {

/// What a file begins with, and each of its segments.
struct sequence_record {
    static constexpr std::array<char, 8> right_magic = {'r', 'v', 'q', 'k', 'v', 's', 'e', 'q'};

    std::array<char, 8> magic = right_magic;
    std::uint32_t version = sequence_file_version;
    std::uint32_t reserved = 0;
    std::uint64_t generation = 0;    ///< 1 for a new file, and one more each time that it is added to.
    std::uint64_t table_offset = 0;  ///< Of the newest table, which follows a copy of the record.
    std::uint64_t table_bytes = 0;
    std::uint64_t end = 0;  ///< Of what belongs to the file.
    std::uint64_t table_checksum = 0;
    std::uint64_t checksum = 0;  ///< Of the bytes before.
    friend bool operator==(const sequence_record&, const sequence_record&) = default;

    [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return std::as_bytes(std::span(this, 1)); }
    [[nodiscard]] std::uint64_t right_checksum() const noexcept {
        return checksum64(bytes().first(sizeof(sequence_record) - sizeof(checksum)));
    }
    /// Whether it is what somebody has written, of this version.
    [[nodiscard]] bool is_whole() const noexcept {
        return magic == right_magic && version == sequence_file_version && reserved == 0 &&
               checksum == right_checksum() && end % 8 == 0 && table_offset % 8 == 0 &&
               table_offset >= 2 * sizeof(sequence_record) && table_bytes <= end && table_offset <= end - table_bytes;
    }
};
static_assert(sizeof(sequence_record) == 64);

/// What a layer holds: its pages are the next ones of the table.
struct saved_layer {
    std::uint64_t tokens = 0;
    std::uint64_t dropped = 0;
    std::uint64_t pages = 0;
};
static_assert(sizeof(saved_layer) == 24);

enum class saved_format : std::uint32_t { sinks, exact, codes };

/// A page: its runs are the next ones of the table.
struct saved_page {
    std::uint64_t offset = 0;
    std::uint64_t bytes = 0;
    checksum128 checksum;
    saved_format format = saved_format::codes;
    std::uint32_t key_depths = 0;    ///< Of codes.
    std::uint32_t value_depths = 0;  ///< Of codes.
    std::uint32_t first = 0;         ///< Exact tokens that are stored: the first one's number in the page,
    std::uint32_t tokens = 0;        ///< and how many.
    std::uint32_t runs = 0;
};
static_assert(sizeof(saved_page) == 56);

struct saved_run {
    std::uint32_t first = 0;
    std::uint32_t tokens = 0;
    std::int64_t position = 0;
    std::int64_t coded_position = 0;
};
static_assert(sizeof(saved_run) == 24);

/// The table in the form that a file has: counts, layers, pages, runs, and a text that says what the cache was like.
class sequence_table {
    struct counts {
        std::uint64_t layers = 0;
        std::uint64_t pages = 0;
        std::uint64_t runs = 0;
        std::uint64_t text = 0;
    };

public:
    sequence_table() = default;
    /// Errors: `out_of_memory`.
    [[nodiscard]] static result<sequence_table> create(std::size_t layers, std::size_t pages, std::size_t runs,
                                                       std::string_view text) {
        const counts has{layers, pages, runs, text.size()};
        auto bytes = aligned_buffer<std::byte>::allocate(size_of(has));
        if (!bytes) {
            return bytes.error();
        }
        sequence_table made;
        made.bytes_ = std::move(bytes).value();
        made.counts_ = has;
        std::memcpy(made.bytes_.data(), &has, sizeof(has));
        std::copy(text.begin(), text.end(), reinterpret_cast<char*>(made.bytes_.data() + made.text_offset()));
        return made;
    }
    /// The table that a record names. Errors: `damaged_file`, `out_of_memory`.
    [[nodiscard]] static result<sequence_table> read(const byte_source& file, const sequence_record& record) {
        // No more memory than the file has bytes.
        if (record.table_bytes < sizeof(counts) || record.table_bytes > file.size() ||
            record.table_offset > file.size() - record.table_bytes) {
            return file.damaged("the file ends at byte " + std::to_string(file.size()) + ", in its table");
        }
        sequence_record copy;
        if (status done = file.read(record.table_offset - sizeof(copy), writable_bytes(copy)); !done) {
            return done.error();
        }
        if (copy != record) {
            return file.damaged("the record at byte " + std::to_string(record.table_offset - sizeof(copy)) +
                                " is not that at the file's start");
        }
        auto bytes = aligned_buffer<std::byte>::allocate(record.table_bytes);
        if (!bytes) {
            return bytes.error();
        }
        sequence_table made;
        made.bytes_ = std::move(bytes).value();
        if (status done = file.read(record.table_offset, made.bytes_.span()); !done) {
            return done.error();
        }
        if (checksum64(made.bytes()) != record.table_checksum) {
            return file.damaged("the table's checksum is not the one recorded");
        }
        std::memcpy(&made.counts_, made.bytes_.data(), sizeof(made.counts_));
        const counts& has = made.counts_;
        const std::size_t most = made.bytes_.size();
        if (has.layers > most / sizeof(saved_layer) || has.pages > most / sizeof(saved_page) ||
            has.runs > most / sizeof(saved_run) || has.text > most || size_of(has) != most) {
            return file.damaged("the table has " + std::to_string(most) + " bytes, which is not what its counts say");
        }
        return made;
    }

    [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return bytes_.span(); }
    [[nodiscard]] std::span<saved_layer> layers() noexcept { return part<saved_layer>(sizeof(counts), counts_.layers); }
    [[nodiscard]] std::span<saved_page> pages() noexcept { return part<saved_page>(pages_offset(), counts_.pages); }
    [[nodiscard]] std::span<saved_run> runs() noexcept { return part<saved_run>(runs_offset(), counts_.runs); }
    [[nodiscard]] std::string_view text() const noexcept {
        return {reinterpret_cast<const char*>(bytes_.data() + text_offset()), counts_.text};
    }

    /// Checks what must hold of any table. Errors: `damaged_file` naming layer and page.
    [[nodiscard]] status check(const byte_source& file, const sequence_record& record) {
        constexpr std::uint64_t most_tokens = std::uint64_t{1} << 48U;
        const auto wrong = [&file](std::size_t layer, std::size_t page, const char* what) {
            return file.damaged("layer " + std::to_string(layer) + " page " + std::to_string(page) + ": " + what);
        };
        std::uint64_t all_bytes = 0;
        std::size_t page = 0;
        std::size_t run = 0;
        for (std::size_t i = 0; i < counts_.layers; ++i) {
            const saved_layer& layer = layers()[i];
            std::uint64_t tokens = layer.dropped;
            std::int64_t position = 0;
            if (layer.tokens > most_tokens || layer.dropped > layer.tokens || layer.pages > counts_.pages - page) {
                return wrong(i, 0, "the layer's counts make no sense");
            }
            for (const std::size_t end = page + layer.pages; page < end; ++page) {
                const saved_page& each = pages()[page];
                // Pages have room in the file one beside the other, so they take no more memory than it has bytes.
                if (each.bytes > record.end - all_bytes || each.offset > record.end - each.bytes ||
                    each.offset < sizeof(sequence_record)) {
                    return wrong(i, page, "its bytes lie outside the file");
                }
                all_bytes += each.bytes;
                if (each.runs == 0 || each.runs > counts_.runs - run) {
                    return wrong(i, page, "its number of runs makes no sense");
                }
                for (const std::size_t runs_end = run + each.runs; run < runs_end; ++run) {
                    const saved_run& at = runs()[run];
                    if (at.tokens == 0 || at.tokens > layer.tokens - tokens || at.position < position ||
                        at.position < static_cast<std::int64_t>(tokens) ||
                        at.position > static_cast<std::int64_t>(most_tokens) || at.coded_position < 0 ||
                        at.coded_position > static_cast<std::int64_t>(most_tokens)) {
                        return wrong(i, page, "tokens or positions of its runs make no sense");
                    }
                    tokens += at.tokens;
                    position = at.position + at.tokens;
                }
            }
            if (tokens != layer.tokens || (layer.pages == 0 && layer.tokens != 0)) {
                return wrong(i, page, "the runs do not hold the layer's tokens");
            }
        }
        return page == counts_.pages && run == counts_.runs ? status{}
                                                            : file.damaged("the table has pages of no layer");
    }

    /// The bytes of an object that a file is read into.
    template <class T>
    [[nodiscard]] static std::span<std::byte> writable_bytes(T& object) noexcept {
        static_assert(std::is_trivially_copyable_v<T>);
        return std::as_writable_bytes(std::span(&object, 1));
    }

private:
    [[nodiscard]] static std::size_t size_of(const counts& has) noexcept {
        return sizeof(counts) + has.layers * sizeof(saved_layer) + has.pages * sizeof(saved_page) +
               has.runs * sizeof(saved_run) + (has.text + 7) / 8 * 8;
    }
    [[nodiscard]] std::size_t pages_offset() const noexcept {
        return sizeof(counts) + counts_.layers * sizeof(saved_layer);
    }
    [[nodiscard]] std::size_t runs_offset() const noexcept {
        return pages_offset() + counts_.pages * sizeof(saved_page);
    }
    [[nodiscard]] std::size_t text_offset() const noexcept { return runs_offset() + counts_.runs * sizeof(saved_run); }
    template <class T>
    [[nodiscard]] std::span<T> part(std::size_t offset, std::size_t count) noexcept {
        return {reinterpret_cast<T*>(bytes_.data() + offset), count};
    }

    aligned_buffer<std::byte> bytes_;
    counts counts_;
};

/// A file's newest table, and the record that names it.
struct newest_table {
    sequence_record record;
    sequence_table table;
    bool is_mended = false;  ///< The record at the file's start was not whole; its copy was.
};

/// The record that says what the file holds: see `rvqkv/files/growing_file.hpp`.
/// Errors: `damaged_file`; `unsupported` for another version.
[[nodiscard]] inline result<newest_table> find_record(const byte_source& file) {
    newest_table found;
    if (status done = file.read(0, sequence_table::writable_bytes(found.record)); !done) {
        return done.error();
    }
    if (found.record.magic != sequence_record::right_magic) {
        return file.damaged("begins with " + in_quotes({found.record.magic.data(), found.record.magic.size()}) +
                            ", a saved sequence begins with 'rvqkvseq'");
    }
    if (found.record.version != sequence_file_version) {
        return error{error_code::unsupported, file.name() + ": saved sequence of version " +
                                                  std::to_string(found.record.version) + ", this library reads " +
                                                  std::to_string(sequence_file_version)};
    }
    if (found.record.is_whole()) {
        return found;
    }
    found.is_mended = true;
    if (status done = file.read(file.size() - sizeof(found.record), sequence_table::writable_bytes(found.record));
        !done) {
        return done.error();
    }
    if (!found.record.is_whole() || found.record.end != file.size() - sizeof(found.record)) {
        return file.damaged("the record at its start is not what its checksum says");
    }
    return found;
}

/// Errors: `damaged_file`, `unsupported`, `out_of_memory`.
[[nodiscard]] inline result<newest_table> find_table(const byte_source& file) {
    auto found = find_record(file);
    if (!found) {
        return found;
    }
    const sequence_record& record = found.value().record;
    if (record.end > file.size()) {
        return file.damaged("the file ends at byte " + std::to_string(file.size()) + ", its contents at " +
                            std::to_string(record.end));
    }
    auto table = sequence_table::read(file, record);
    if (!table) {
        return table.error();
    }
    found.value().table = std::move(table).value();
    if (status good = found.value().table.check(file, record); !good) {
        return good.error();
    }
    return found;
}

/// The newest table that is whole, of a file that is not. Errors: as `find_table` when there is none.
[[nodiscard]] inline result<newest_table> find_any_table(const byte_source& file) {
    auto best = find_table(file);
    if (best || best.error().code == error_code::out_of_memory) {
        return best;
    }
    // Of each segment the first bytes are a record that names its table.
    for (std::size_t at = sizeof(sequence_record); at + sizeof(sequence_record) <= file.size(); at += 8) {
        newest_table found;
        if (!file.read(at, sequence_table::writable_bytes(found.record)).ok() || !found.record.is_whole() ||
            found.record.table_offset != at + sizeof(sequence_record) ||
            (best.ok() && best.value().record.generation >= found.record.generation)) {
            continue;
        }
        auto table = sequence_table::read(file, found.record);
        if (!table && table.error().code == error_code::out_of_memory) {
            return table.error();
        }
        if (table && table.value().check(file, found.record).ok()) {
            found.table = std::move(table).value();
            best = std::move(found);
        }
    }
    return best;
}

}  // namespace detail
RVQKV_NAMESPACE_END
