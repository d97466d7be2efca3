// SPDX-License-Identifier: MIT
/// @file
/// What lies where in a page of the KV cache. Arithmetic and bytes only: pages are owned elsewhere.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/row_packing.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/simd/attention_kernels.hpp"

#include <cstddef>
#include <cstdint>

RVQKV_NAMESPACE_BEGIN

/// One side (the keys or the values) of a page of codes. The layout is the attention scan's, which goes through one
/// head after the other: all that belongs to a head is one piece of memory. In it, the codes of one place (depth,
/// group) stand side by side for all tokens of the page, packed at the codec's bits; depth is outermost, so that
/// dropping trailing depths is cutting the end of each piece off.
///
///     scales(head)            scale of [token], in the codec's scale type; none if it stores none
///     row(depth, head, group) codes of [token], `row_bytes()` bytes
///
/// Every row begins at a multiple of 8 bytes, without padding. A token's number in the page alone says which bits are
/// its own.
class coded_layout {
public:
    coded_layout() = default;
    /// A side that begins at byte `begin` of the page and holds the first `depths` of the codec's depths.
    /// Preconditions: `page_tokens` is a multiple of `tile_tokens`, `begin` one of 8; `depths <= codec.depths()`.
    coded_layout(const codec& codec, std::size_t heads, std::size_t page_tokens, std::size_t depths,
                 std::size_t begin) noexcept
        : heads_(heads),
          groups_(codec.groups()),
          depths_(depths),
          bits_(codec.bits_per_code()),
          begin_(begin),
          scale_type_(codec.scale_type()),
          head_scale_bytes_(codec.stores_scale() ? page_tokens * size_of(codec.scale_type()) : 0),
          row_bytes_(packed_bytes(page_tokens, codec.bits_per_code())) {
        RVQKV_ASSERT(page_tokens % tile_tokens == 0 && begin % 8 == 0 && depths <= codec.depths());
    }

    [[nodiscard]] std::size_t heads() const noexcept { return heads_; }
    [[nodiscard]] std::size_t groups() const noexcept { return groups_; }
    [[nodiscard]] std::size_t depths() const noexcept { return depths_; }
    [[nodiscard]] unsigned bits() const noexcept { return bits_; }
    [[nodiscard]] bool has_scales() const noexcept { return head_scale_bytes_ != 0; }
    [[nodiscard]] dtype scale_type() const noexcept { return scale_type_; }

    /// Offsets from the page's start, in bytes.
    [[nodiscard]] std::size_t begin() const noexcept { return begin_; }
    [[nodiscard]] std::size_t end() const noexcept { return begin_ + heads_ * head_bytes(); }
    [[nodiscard]] std::size_t scales(std::size_t head) const noexcept { return begin_ + head * head_bytes(); }
    [[nodiscard]] std::size_t row(std::size_t depth, std::size_t head, std::size_t group) const noexcept {
        return scales(head) + head_scale_bytes_ + (depth * groups_ + group) * row_bytes_;
    }
    /// Bytes of what belongs to one head.
    [[nodiscard]] std::size_t head_bytes() const noexcept { return head_scale_bytes_ + depths_ * groups_ * row_bytes_; }
    /// Bytes of one row: the codes of all tokens of the page at one place of one head.
    [[nodiscard]] std::size_t row_bytes() const noexcept { return row_bytes_; }
    /// Bytes of all scales, and of all codes.
    [[nodiscard]] std::size_t scale_bytes() const noexcept { return heads_ * head_scale_bytes_; }
    [[nodiscard]] std::size_t code_bytes() const noexcept { return depths_ * heads_ * groups_ * row_bytes_; }

private:
    std::size_t heads_ = 0;
    std::size_t groups_ = 0;
    std::size_t depths_ = 0;
    unsigned bits_ = 1;
    std::size_t begin_ = 0;
    dtype scale_type_ = dtype::float16;
    std::size_t head_scale_bytes_ = 0;
    std::size_t row_bytes_ = 0;
};

/// One side of a page of exact tokens: `[head, token, channel]` in float16 or bfloat16.
class exact_layout {
public:
    exact_layout() = default;
    /// A side that begins at byte `begin` of the page. Precondition: `type` is a 16-bit one.
    exact_layout(std::size_t heads, std::size_t head_dim, std::size_t page_tokens, dtype type,
                 std::size_t begin) noexcept
        : heads_(heads), head_dim_(head_dim), page_tokens_(page_tokens), type_(type), begin_(begin) {
        RVQKV_ASSERT(size_of(type) == 2);
    }

    [[nodiscard]] std::size_t heads() const noexcept { return heads_; }
    [[nodiscard]] std::size_t head_dim() const noexcept { return head_dim_; }
    [[nodiscard]] dtype type() const noexcept { return type_; }
    [[nodiscard]] std::size_t begin() const noexcept { return begin_; }
    [[nodiscard]] std::size_t end() const noexcept { return row(heads_, 0); }
    /// Offset of a head's token from the page's start, in bytes.
    [[nodiscard]] std::size_t row(std::size_t head, std::size_t token) const noexcept {
        return begin_ + (head * page_tokens_ + token) * head_dim_ * 2;
    }

private:
    std::size_t heads_ = 0;
    std::size_t head_dim_ = 0;
    std::size_t page_tokens_ = 0;
    dtype type_ = dtype::bfloat16;
    std::size_t begin_ = 0;
};

/// How the pages of one kind are laid out: exact ones (sinks, recent tokens) or codes of so many depths. A layer has
/// a few formats; a page never changes its own.
struct page_format {
    bool is_exact = false;
    std::size_t tokens = 0;  ///< That a page can hold.
    std::size_t bytes = 0;   ///< Of a page.
    exact_layout exact_keys;
    exact_layout exact_values;
    coded_layout coded_keys;
    coded_layout coded_values;
};

/// Tokens that follow each other in one page, as readers see them.
struct page_run {
    const std::byte* page = nullptr;      ///< Aligned to 64 bytes.
    const page_format* format = nullptr;  ///< What lies where.
    std::size_t first = 0;                ///< Number of the run's first token in the page.
    std::size_t tokens = 0;
    std::int64_t position = 0;  ///< Of the first token in the sequence, as rotary embedding counts; the others follow.
    std::int64_t coded_position =
        0;  ///< At which the first token's key was turned before it was stored; 0 if it was not.
};

RVQKV_NAMESPACE_END
