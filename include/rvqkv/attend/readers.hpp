// SPDX-License-Identifier: MIT
/// @file
/// What reads codes for attention: scores of keys, sums of values. A reader is made once for a codec and shared by all
/// threads; what belongs to one query block lies in scratch memory of the caller.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/row_packing.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>

RVQKV_NAMESPACE_BEGIN

/// 64 tokens of a page, from number `tile * tile_tokens` on.
struct page_tile {
    const std::byte* page = nullptr;
    std::size_t tile = 0;
};

/// Tiles of pages of one format, in the order of their tokens; any page may hold any of them.
struct page_tiles {
    const page_tile* tiles = nullptr;  ///< `[count + ahead]`
    std::size_t count = 0;
    std::size_t ahead = 0;  ///< Tiles that will be read after these: prefetched, not read.

    /// What is left from tile `first` on, of which `most` are read now.
    [[nodiscard]] page_tiles part(std::size_t first, std::size_t most) const noexcept {
        const std::size_t now = std::min(count - first, most);
        return {tiles + first, now, count + ahead - first - now};
    }
};

/// Tiles of codes of one head.
struct coded_tiles {
    page_tiles tiles;
    const coded_layout* layout = nullptr;
    std::size_t head = 0;
    std::size_t depths = 0;  ///< Depths to read, from the first on: at most the layout's.
};

namespace detail {

/// The stored scales of a tile's tokens, `[tile_tokens]`; 1 where there are none.
inline void load_scales(const page_tile& tile, const coded_layout& layout, std::size_t head,
                        const kernel_table& kernels, float* out) noexcept {
    if (!layout.has_scales()) {
        std::fill_n(out, tile_tokens, 1.0F);
        return;
    }
    const void* const from = tile.page + layout.scales(head) + tile.tile * tile_tokens * size_of(layout.scale_type());
    switch (layout.scale_type()) {
        case dtype::float32: std::memcpy(out, from, tile_tokens * sizeof(float)); break;
        case dtype::float16: kernels.from_float16(static_cast<const float16*>(from), out, tile_tokens); break;
        case dtype::bfloat16: kernels.from_bfloat16(static_cast<const bfloat16*>(from), out, tile_tokens); break;
    }
}
inline void load_scales(const coded_tiles& tiles, std::size_t tile, const kernel_table& kernels, float* out) noexcept {
    load_scales(tiles.tiles.tiles[tile], *tiles.layout, tiles.head, kernels, out);
}

}  // namespace detail

/// Scores of coded keys. Rows are queries that read the same KV head; their channels are in the codec's order.
class key_reader {
public:
    virtual ~key_reader() = default;
    /// Bytes held beside the codec.
    [[nodiscard]] virtual std::size_t bytes() const noexcept = 0;
    /// Bytes of scratch (aligned to 64) that so many rows need.
    [[nodiscard]] virtual std::size_t scratch_bytes(std::size_t rows) const noexcept = 0;
    /// Whether this pays for so many rows and tokens; otherwise tiles are reconstructed.
    [[nodiscard]] virtual bool pays(std::size_t rows, std::size_t tokens) const noexcept = 0;
    /// Makes scratch ready for queries `[rows, head_dim]`, which must stay where they are while scores are asked for.
    virtual void prepare(row_block<const float> queries, std::byte* scratch) const noexcept = 0;
    /// `out[row * out_stride + i]`: score of token `i`, counted over all the tiles, its scale included. Those of tokens
    /// that a page does not hold mean nothing.
    virtual void scores(const coded_tiles& tiles, std::size_t rows, float* out, std::size_t out_stride,
                        std::byte* scratch) const noexcept = 0;

protected:
    key_reader() = default;
    key_reader(const key_reader&) = default;
    key_reader& operator=(const key_reader&) = default;
};

/// Weighted sums of coded values, kept in scratch until they are asked for.
class value_reader {
public:
    virtual ~value_reader() = default;
    /// Bytes held beside the codec.
    [[nodiscard]] virtual std::size_t bytes() const noexcept = 0;
    /// Bytes of scratch (aligned to 64) that so many rows need.
    [[nodiscard]] virtual std::size_t scratch_bytes(std::size_t rows) const noexcept = 0;
    /// Whether this pays for so many rows and tokens; otherwise tiles are reconstructed.
    [[nodiscard]] virtual bool pays(std::size_t rows, std::size_t tokens) const noexcept = 0;
    /// Sums of nothing.
    virtual void begin(std::size_t rows, std::byte* scratch) const noexcept = 0;
    /// Adds tokens; `weights[row * weights_stride + i]` is that of token `i`, counted over all the tiles, without its
    /// scale: not negative, and 0 for tokens that are not wanted.
    virtual void add(const coded_tiles& tiles, std::size_t rows, const float* weights, std::size_t weights_stride,
                     std::byte* scratch) const noexcept = 0;
    /// Multiplies every sum by its row's factor, `[rows]`.
    virtual void rescale(const float* factors, std::size_t rows, std::byte* scratch) const noexcept = 0;
    /// Writes the sums, `[rows, head_dim]`, channels in the codec's order.
    virtual void finish(std::size_t rows, row_block<float> out, std::byte* scratch) const noexcept = 0;

protected:
    value_reader() = default;
    value_reader(const value_reader&) = default;
    value_reader& operator=(const value_reader&) = default;
};

RVQKV_NAMESPACE_END
