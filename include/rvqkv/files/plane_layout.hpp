// SPDX-License-Identifier: MIT
/// @file
/// Where scales and codes lie in a compressed tensor, depth by depth. Arithmetic and bytes only: memory is owned
/// elsewhere.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/simd/convert.hpp"

#include <cstddef>

RVQKV_NAMESPACE_BEGIN

/// The keys or the values of a fixed number of tokens (a "page"): first the scales, then the codes, depth by depth, so
/// that a reader of fewer depths touches no byte of the others.
///
///     begin()          scales_offset()  scale of [token, head], in the codec's scale type; none if it stores none
///                      plane_offset(0)  codes of depth 0 of [token, head, group], packed at the codec's bits
///                      plane_offset(1)  codes of depth 1
///     end()            ...
///
/// Every part begins at a multiple of 8 bytes from the page's start, itself aligned to 64: up to 7 bytes of padding
/// follow a part, none if a page holds a multiple of 64 tokens. A token's number in the page alone says which bits are
/// its own: writing it changes no bit of another.
class plane_layout {
public:
    /// What the offset of every part is a multiple of.
    static constexpr std::size_t part_alignment = 8;

    plane_layout() = default;
    /// Precondition: `begin` is a multiple of `part_alignment`.
    plane_layout(const codec& codec, std::size_t heads, std::size_t page_tokens, std::size_t begin) noexcept
        : heads_(heads),
          groups_(codec.groups()),
          depths_(codec.depths()),
          bits_(codec.bits_per_code()),
          scale_type_(codec.scale_type()),
          begin_(begin),
          scale_bytes_(codec.stores_scale() ? page_tokens * heads * size_of(codec.scale_type()) : 0),
          plane_bytes_(packed_bytes(page_tokens * heads * codec.groups(), codec.bits_per_code())) {
        RVQKV_ASSERT(begin % part_alignment == 0);
    }

    [[nodiscard]] std::size_t begin() const noexcept { return begin_; }
    [[nodiscard]] std::size_t end() const noexcept { return plane_offset(depths_); }
    [[nodiscard]] std::size_t scales_offset() const noexcept { return begin_; }
    [[nodiscard]] std::size_t plane_offset(std::size_t depth) const noexcept {
        return begin_ + padded(scale_bytes_) + depth * padded(plane_bytes_);
    }
    /// Bytes of a page's scales, and of one depth's codes, without padding.
    [[nodiscard]] std::size_t scale_bytes() const noexcept { return scale_bytes_; }
    [[nodiscard]] std::size_t plane_bytes() const noexcept { return plane_bytes_; }
    /// Bytes of the codes of all depths, without padding.
    [[nodiscard]] std::size_t code_bytes() const noexcept { return depths_ * plane_bytes_; }

    /// Codes of one token at one depth.
    [[nodiscard]] std::size_t codes_per_token() const noexcept { return heads_ * groups_; }

    /// Writes `tokens` tokens as number `first` and on of the page; bits of other tokens stay as they are.
    /// Shapes:        `in` holds codes of all depths, `in.strides.vector == 1`, and scales if the codec stores any.
    /// Preconditions: they fit the page; every code fits its bits.
    void store(std::byte* page, std::size_t first, std::size_t tokens, encoded_view in) const {
        RVQKV_ASSERT(in.strides.vector == 1);
        if (scale_bytes_ != 0) {
            std::byte* const scales = page + scales_offset() + first * heads_ * size_of(scale_type_);
            const std::size_t count = tokens * heads_;
            switch (scale_type_) {
                case dtype::float32: convert(in.scales, reinterpret_cast<float*>(scales), count); break;
                case dtype::float16: convert(in.scales, reinterpret_cast<float16*>(scales), count); break;
                case dtype::bfloat16: convert(in.scales, reinterpret_cast<bfloat16*>(scales), count); break;
            }
        }
        for (std::size_t depth = 0; depth < depths_; ++depth) {
            pack_codes(in.codes + depth * in.strides.depth, tokens * codes_per_token(), bits_,
                       page + plane_offset(depth), first * codes_per_token());
        }
    }

    /// Reads the scales and the codes of the first `depths` depths of `tokens` tokens from number `first` on.
    /// Shapes:        as `store`. Preconditions: they lie in the page; `depths` is at most the codec's.
    void load(const std::byte* page, std::size_t first, std::size_t tokens, std::size_t depths,
              mutable_encoded_view out) const {
        RVQKV_ASSERT(out.strides.vector == 1 && depths <= depths_);
        if (scale_bytes_ != 0) {
            const std::byte* const scales = page + scales_offset() + first * heads_ * size_of(scale_type_);
            const std::size_t count = tokens * heads_;
            switch (scale_type_) {
                case dtype::float32: convert(reinterpret_cast<const float*>(scales), out.scales, count); break;
                case dtype::float16: convert(reinterpret_cast<const float16*>(scales), out.scales, count); break;
                case dtype::bfloat16: convert(reinterpret_cast<const bfloat16*>(scales), out.scales, count); break;
            }
        }
        for (std::size_t depth = 0; depth < depths; ++depth) {
            unpack_codes(page + plane_offset(depth), first * codes_per_token(), tokens * codes_per_token(), bits_,
                         out.codes + depth * out.strides.depth);
        }
    }

private:
    static constexpr std::size_t padded(std::size_t bytes) noexcept {
        return (bytes + part_alignment - 1) / part_alignment * part_alignment;
    }

    std::size_t heads_ = 0;
    std::size_t groups_ = 0;
    std::size_t depths_ = 0;
    unsigned bits_ = 1;
    dtype scale_type_ = dtype::float16;
    std::size_t begin_ = 0;
    std::size_t scale_bytes_ = 0;
    std::size_t plane_bytes_ = 0;
};

RVQKV_NAMESPACE_END
