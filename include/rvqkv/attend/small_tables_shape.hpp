// SPDX-License-Identifier: MIT
/// @file
/// What tables of keys and of values by small codebooks share: the shape, and how codes and scales are found in pages.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/readers.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "rvqkv/simd/kernels.hpp"
#include "rvqkv/simd/small_scan.hpp"

#include <algorithm>
#include <cstddef>
#include <string>

RVQKV_NAMESPACE_BEGIN

namespace detail {

/// What both sides share: the shape, and how codes and scales are found in pages.
struct small_tables_shape {
    codebook_shape book;
    std::size_t groups = 0;
    std::size_t slots = 0;

    [[nodiscard]] static result<small_tables_shape> create(const codebook_shape& book, std::size_t weights,
                                                           std::size_t head_dim) {
        if (book.codewords == 0 || code_bits(book.codewords) > most_scan_bits) {
            return error{error_code::unsupported,
                         "small tables hold 1 to 256 codewords, not " + std::to_string(book.codewords)};
        }
        if (book.depths == 0 || book.depths > most_value_depths) {
            return error{error_code::unsupported, "small tables hold 1 to " + std::to_string(most_value_depths) +
                                                      " depths, not " + std::to_string(book.depths)};
        }
        if (book.dim == 0 || head_dim % book.dim != 0 || head_dim == 0) {
            return error{error_code::invalid_argument, "head_dim " + std::to_string(head_dim) +
                                                           " is not a multiple of the codebook's dim " +
                                                           std::to_string(book.dim)};
        }
        if (weights != book.size()) {
            return error{error_code::invalid_argument,
                         "there are " + std::to_string(weights) + " weights, must be " + std::to_string(book.size())};
        }
        return small_tables_shape{book, head_dim / book.dim, scan_slots(code_bits(book.codewords))};
    }

    /// Tiles that scans are called with, and look ahead.
    static constexpr std::size_t most_tiles = scan_block;
    struct located {
        const std::byte* rows[2 * most_tiles];
        code_tiles tiles;
    };
    void locate(const page_tiles& from, const coded_layout& layout, std::size_t head, std::size_t depths,
                located& to) const noexcept {
        RVQKV_ASSERT(layout.groups() == groups && layout.bits() == code_bits(book.codewords));
        RVQKV_ASSERT(head < layout.heads() && depths <= layout.depths() && depths <= book.depths);
        RVQKV_ASSERT(from.count <= most_tiles);
        const std::size_t ahead = std::min(from.ahead, most_tiles);
        for (std::size_t i = 0; i < from.count + ahead; ++i) {
            to.rows[i] =
                from.tiles[i].page + layout.row(0, head, 0) + from.tiles[i].tile * tile_tokens / 8 * layout.bits();
        }
        to.tiles = {to.rows, from.count, ahead,        groups * layout.row_bytes(), layout.row_bytes(),
                    depths,  groups,     layout.bits()};
    }

    /// The tokens' scales in float32, or null if there are none.
    [[nodiscard]] static const float* load_scales(const page_tiles& from, const coded_layout& layout, std::size_t head,
                                                  const kernel_table& kernels, float* scales) noexcept {
        if (!layout.has_scales()) {
            return nullptr;
        }
        const std::size_t bytes = tile_tokens * size_of(layout.scale_type());
        for (std::size_t i = from.count; i < std::min(2 * from.count, from.count + from.ahead); ++i) {
            const std::byte* const next = from.tiles[i].page + layout.scales(head) + from.tiles[i].tile * bytes;
            for (std::size_t line = 0; line < bytes; line += 64) {
                __builtin_prefetch(next + line);
            }
        }
        for (std::size_t i = 0; i < from.count; ++i) {
            detail::load_scales(from.tiles[i], layout, head, kernels, scales + i * tile_tokens);
        }
        return scales;
    }

    /// Gives out pieces of scratch memory, each at a cache line.
    class carver {
    public:
        explicit carver(std::byte* memory) noexcept : memory_(memory) {}
        template <class T>
        [[nodiscard]] T* take(std::size_t count) noexcept {
            std::byte* const at = memory_ == nullptr ? nullptr : memory_ + used_;
            used_ += (count * sizeof(T) + buffer_alignment - 1) / buffer_alignment * buffer_alignment;
            return reinterpret_cast<T*>(at);
        }
        [[nodiscard]] std::size_t used() const noexcept { return used_; }

    private:
        std::byte* memory_;
        std::size_t used_ = 0;
    };
};

}  // namespace detail

RVQKV_NAMESPACE_END
