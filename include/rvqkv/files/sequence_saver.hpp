// SPDX-License-Identifier: MIT
/// @file
/// A sequence's way into a file: `rvqkv/files/sequence_file.hpp` says what the file is like.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/cache/cache_core.hpp"
#include "rvqkv/cache/layer_tokens.hpp"
#include "rvqkv/cache/run_list.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/nothrow_array.hpp"
#include "rvqkv/files/atomic_file.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/checksum.hpp"
#include "rvqkv/files/growing_file.hpp"
#include "rvqkv/files/sequence_pages.hpp"
#include "rvqkv/files/sequence_table.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <tuple>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {

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

}  // namespace detail
RVQKV_NAMESPACE_END
