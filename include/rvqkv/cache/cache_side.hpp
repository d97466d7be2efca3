// SPDX-License-Identifier: MIT
/// @file
/// One side (the keys or the values) of one layer of the cache: the way of its tokens into pages and back.
#pragma once

#include "rvqkv/attend/layer_config.hpp"
#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/cache/exact_rows.hpp"
#include "rvqkv/cache/key_positions.hpp"
#include "rvqkv/cache/kv_workspace.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/row_packing.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/quantize/rows.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// Exact rows of tokens that follow each other, `[head, token, channel]`: in a page, or in scratch memory. Token and
/// coded position are those of the first.
template <class Number>
struct exact_block {
    Number* data = nullptr;
    std::size_t head_stride = 0;  // in numbers
};

/// Where the tokens of a block are: in the sequence now, and where their keys were turned to.
struct token_positions {
    std::int64_t now = 0;
    std::int64_t coded = 0;
    /// Those of the token `count` later.
    [[nodiscard]] token_positions after(std::size_t count, bool coded_positions_follow) const noexcept {
        const auto distance = static_cast<std::int64_t>(count);
        return {now + distance, coded_positions_follow ? coded + distance : coded};
    }
};

/// Threads: immutable; each caller brings scratch memory of its own.
class cache_side {
public:
    cache_side() = default;
    /// `name` and `layer` are for messages.
    cache_side(const kv_side_config& config, const char* name, std::size_t layer, std::size_t page_tokens,
               dtype exact_type, key_positions positions) noexcept
        : codec_(config.codec),
          heads_(config.heads),
          exact_type_(exact_type),
          block_tokens_(
              std::min(page_tokens, tile_tokens * std::max<std::size_t>(1, block_values / (tile_tokens * width())))),
          positions_(std::move(positions)),
          name_(name),
          layer_(layer) {}

    [[nodiscard]] const rvqkv::codec& codec() const noexcept { return *codec_; }
    [[nodiscard]] std::size_t heads() const noexcept { return heads_; }
    [[nodiscard]] std::size_t head_dim() const noexcept { return codec_->head_dim(); }
    [[nodiscard]] const key_positions& positions() const noexcept { return positions_; }
    /// Tokens that are encoded or decoded together: a multiple of `tile_tokens`, a page at most.
    [[nodiscard]] std::size_t block_tokens() const noexcept { return block_tokens_; }

    /// "layer 3 keys: " and a text, as an error.
    [[nodiscard]] error wrong(const std::string& text) const {
        return {error_code::invalid_argument, "layer " + std::to_string(layer_) + " " + name_ + ": " + text};
    }
    /// Errors: `invalid_argument` for other heads or channels than this side's.
    [[nodiscard]] status check(const tensor_shape& shape) const {
        if (shape.heads != heads_) {
            return wrong("heads is " + std::to_string(shape.heads) + ", must be " + std::to_string(heads_));
        }
        if (shape.channels != head_dim()) {
            return wrong("channels is " + std::to_string(shape.channels) + ", must be the codec's head_dim " +
                         std::to_string(head_dim()));
        }
        return {};
    }

    /// Makes room for a block of tokens, which so many workers share out. Errors: `out_of_memory`.
    [[nodiscard]] status reserve(kv_scratch& scratch, std::size_t workers) const {
        const std::size_t rows = block_tokens_ * heads_;
        if (status grown = scratch.quantizer.reserve(rows + 2 * workers, head_dim()); !grown) {
            return grown;
        }
        if (status grown = scratch.codes.reserve(rows * codec_->groups() * codec_->depths()); !grown) {
            return grown;
        }
        if (status grown = scratch.scales.reserve(rows); !grown) {
            return grown;
        }
        if (status grown = scratch.rows.reserve(rows * head_dim()); !grown) {
            return grown;
        }
        if (positions_.has_mean()) {
            if (status grown = scratch.means.reserve(key_positions::mean_tokens * width()); !grown) {
                return grown;
            }
        }
        return scratch.exact.reserve(rows * head_dim());
    }

    /// Rounds tokens `[first, first + count)` of a tensor into exact rows, the first of them at position `at`.
    /// NaNs and infinities become 0 and are added to `report`. Preconditions: `scratch` is reserved, at most
    /// `block_tokens()` tokens.
    void store_exact(const tensor_view& x, std::size_t first, std::size_t count, exact_block<std::uint16_t> out,
                     token_positions at, kv_scratch& scratch, encode_report& report) const {
        const kernel_table& kernels = best_kernels();
        const bool turned = positions_.changes(at.now, at.coded);
        if (!turned && x.type() == exact_type_ && x.strides().channel == 1) {
            copy_exact(x, first, count, out, report, kernels);
            return;
        }
        const std::size_t at_once = turned ? count : 1;
        const bool direct = !turned && x.type() == dtype::float32 && x.strides().channel == 1;
        float* const rows = scratch.rows.data();
        for (std::size_t done = 0; done < count; done += at_once) {
            if (direct && round_token(x, first + done, out, done, kernels)) {
                continue;
            }
            for (std::size_t i = 0; i < at_once * heads_; ++i) {
                const std::size_t token = first + done + i / heads_;
                load_row(x, token, i % heads_, rows + i * head_dim(), kernels);
                if (const std::size_t found = zero_nonfinite(rows + i * head_dim(), head_dim(), kernels); found != 0) {
                    report.add({found, 1, token, i % heads_});
                }
            }
            if (turned) {
                positions_.store(rows, count, at.now, at.coded);
            }
            for (std::size_t i = 0; i < at_once * heads_; ++i) {
                round_row(rows + i * head_dim(),
                          out.data + (i % heads_) * out.head_stride + (done + i / heads_) * head_dim(), head_dim(),
                          exact_type_, kernels);
            }
        }
    }

    /// Encodes exact rows as tokens `[slot, slot + count)` of a page of codes; the rest of the last tile becomes zeros.
    /// Preconditions: `slot` is a multiple of `tile_tokens`, `count` at most `block_tokens()`; `scratch` is reserved,
    ///                and `in` not in its rows. Errors: those of the codec; the page may have been written to then.
    [[nodiscard]] status encode(exact_block<const std::uint16_t> in, std::size_t count, std::int64_t coded_position,
                                std::byte* page, const coded_layout& layout, std::size_t slot, kv_scratch& scratch,
                                const executor& workers) const {
        const std::size_t rows = count * heads_;
        tensor_view x(in.data, exact_type_, {count, heads_, head_dim()},
                      {static_cast<std::ptrdiff_t>(head_dim()), static_cast<std::ptrdiff_t>(in.head_stride), 1});
        if (positions_.has_mean()) {
            widen(in, count, scratch.rows.data());
            positions_.add_mean(-1.0F, scratch.rows.data(), count, coded_position, scratch.means.data());
            x = tensor_view(static_cast<const float*>(scratch.rows.data()), {count, heads_, head_dim()});
        }
        const std::size_t plane = rows * codec_->groups();
        float* const scales = codec_->stores_scale() ? scratch.scales.data() : nullptr;
        if (status encoded =
                codec_->encode(x, {scratch.codes.data(), {1, plane}, scales}, scratch.quantizer, nullptr, workers);
            !encoded) {
            return encoded;
        }
        store_scales(scales, count, page, layout, slot);
        for (std::size_t depth = 0; depth < layout.depths(); ++depth) {
            store_codes(scratch.codes.data() + depth * plane, count, page, layout, depth, slot);
        }
        return {};
    }

    /// Reconstructs tokens `[slot, slot + out.tokens())` of a page into `out`, as they would be given now.
    /// Preconditions: at most `block_tokens()` tokens; `scratch` is reserved. Errors: those of the codec.
    [[nodiscard]] status read(const std::byte* page, const page_format& format, bool is_keys, std::size_t slot,
                              token_positions at, const mutable_tensor_view& out, std::size_t depths,
                              kv_scratch& scratch) const {
        const std::size_t count = out.tokens();
        const bool turned = positions_.changes(at.now, at.coded);
        float* const rows = scratch.rows.data();
        if (format.is_exact) {
            const exact_layout& layout = is_keys ? format.exact_keys : format.exact_values;
            widen({numbers(page + layout.row(0, slot)), (layout.row(1, 0) - layout.row(0, 0)) / 2}, count, rows);
        } else {
            const coded_layout& layout = is_keys ? format.coded_keys : format.coded_values;
            const bool direct = !turned && !positions_.has_mean();
            const mutable_tensor_view to = direct ? out : mutable_tensor_view(rows, {count, heads_, head_dim()});
            const encoded_view codes = load(page, layout, slot, count, std::min(depths, layout.depths()), scratch);
            if (status decoded = codec_->decode(codes, to, std::min(depths, layout.depths()), scratch.quantizer);
                !decoded || direct) {
                return decoded;
            }
            if (positions_.has_mean()) {
                positions_.add_mean(1.0F, rows, count, at.coded, scratch.means.data());
            }
        }
        if (turned) {
            positions_.restore(rows, count, at.now, at.coded);
        }
        for (std::size_t i = 0; i < count * heads_; ++i) {
            store_row(rows + i * head_dim(), out, i / heads_, i % heads_);
        }
        return {};
    }

    [[nodiscard]] static const std::uint16_t* numbers(const std::byte* at) noexcept {
        return reinterpret_cast<const std::uint16_t*>(at);
    }
    [[nodiscard]] static std::uint16_t* numbers(std::byte* at) noexcept { return reinterpret_cast<std::uint16_t*>(at); }

private:
    /// Numbers of one token.
    [[nodiscard]] std::size_t width() const noexcept { return heads_ * head_dim(); }

    /// Rounds float32 rows; false when a number is not finite, or beyond the exact type.
    [[nodiscard]] bool round_token(const tensor_view& x, std::size_t token, exact_block<std::uint16_t> out,
                                   std::size_t to, const kernel_table& kernels) const {
        bool finite = true;
        for (std::size_t head = 0; head < heads_; ++head) {
            finite =
                round_finite(static_cast<const float*>(x.row(token, head)),
                             out.data + head * out.head_stride + to * head_dim(), head_dim(), exact_type_, kernels) &&
                finite;
        }
        return finite;
    }

    void copy_exact(const tensor_view& x, std::size_t first, std::size_t count, exact_block<std::uint16_t> out,
                    encode_report& report, const kernel_table& kernels) const {
        for (std::size_t token = 0; token < count; ++token) {
            for (std::size_t head = 0; head < heads_; ++head) {
                std::uint16_t* const to = out.data + head * out.head_stride + token * head_dim();
                std::memcpy(to, x.row(first + token, head), head_dim() * sizeof(std::uint16_t));
                if (has_nonfinite(to, head_dim(), exact_type_, kernels)) {
                    const std::uint16_t infinity = exact_type_ == dtype::float16 ? 0x7c00U : 0x7f80U;
                    std::size_t found = 0;
                    for (std::size_t i = 0; i < head_dim(); ++i) {
                        if ((to[i] & 0x7fffU) >= infinity) {
                            to[i] = 0;
                            ++found;
                        }
                    }
                    report.add({found, 1, first + token, head});
                }
            }
        }
    }

    /// Exact rows as float32 `[token, head, head_dim]`.
    void widen(exact_block<const std::uint16_t> in, std::size_t count, float* rows) const {
        const kernel_table& kernels = best_kernels();
        for (std::size_t i = 0; i < count * heads_; ++i) {
            widen_row(in.data + (i % heads_) * in.head_stride + (i / heads_) * head_dim(), rows + i * head_dim(),
                      head_dim(), exact_type_, kernels);
        }
    }

    /// Into the page: each head's scales side by side, zeros behind the last in its tile.
    void store_scales(const float* scales, std::size_t count, std::byte* page, const coded_layout& layout,
                      std::size_t slot) const {
        if (!layout.has_scales()) {
            return;
        }
        const std::size_t bytes = size_of(layout.scale_type());
        float tile[tile_tokens];
        for (std::size_t head = 0; head < heads_; ++head) {
            std::byte* const to = page + layout.scales(head) + slot * bytes;
            for (std::size_t first = 0; first < count; first += tile_tokens) {
                for (std::size_t i = 0; i < tile_tokens; ++i) {
                    tile[i] = first + i < count ? scales[(first + i) * heads_ + head] : 0.0F;
                }
                switch (layout.scale_type()) {
                    case dtype::float32: convert(tile, reinterpret_cast<float*>(to) + first, tile_tokens); break;
                    case dtype::float16: convert(tile, reinterpret_cast<float16*>(to) + first, tile_tokens); break;
                    case dtype::bfloat16: convert(tile, reinterpret_cast<bfloat16*>(to) + first, tile_tokens); break;
                }
            }
        }
    }

    /// One depth's codes `[token, head, group]` into the page's rows, tile by tile. Places of a tile that no token
    /// takes become 0.
    void store_codes(const code_t* codes, std::size_t count, std::byte* page, const coded_layout& layout,
                     std::size_t depth, std::size_t slot) const {
        const std::size_t groups = layout.groups();
        const std::size_t places = heads_ * groups;
        for (std::size_t first = 0; first < count; first += tile_tokens) {
            const std::size_t held = std::min(tile_tokens, count - first);
            for (std::size_t head = 0; head < heads_; ++head) {
                const code_t* const from = codes + first * places + head * groups;
                std::byte* const to = page + layout.row(depth, head, 0) + (slot + first) / 8 * layout.bits();
                if (held == tile_tokens) {
                    pack_rows(from, places, groups, layout.bits(), to, layout.row_bytes());
                    continue;
                }
                for (std::size_t group = 0; group < groups; ++group) {
                    code_t tile[tile_tokens] = {};
                    for (std::size_t i = 0; i < held; ++i) {
                        tile[i] = from[i * places + group];
                    }
                    pack_codes(tile, tile_tokens, layout.bits(), to + group * layout.row_bytes());
                }
            }
        }
    }

    /// Scales and codes of tokens of a page, as a codec reads them.
    [[nodiscard]] encoded_view load(const std::byte* page, const coded_layout& layout, std::size_t slot,
                                    std::size_t count, std::size_t depths, kv_scratch& scratch) const {
        const std::size_t places = heads_ * layout.groups();
        const std::size_t plane = count * places;
        code_t tile[tile_tokens];
        for (std::size_t depth = 0; depth < depths; ++depth) {
            code_t* const codes = scratch.codes.data() + depth * plane;
            for (std::size_t first = 0; first < count; first += tile_tokens) {
                const std::size_t held = std::min(tile_tokens, count - first);
                for (std::size_t place = 0; place < places; ++place) {
                    const std::size_t row = layout.row(depth, place / layout.groups(), place % layout.groups());
                    unpack_codes(page + row, slot + first, held, layout.bits(), tile);
                    for (std::size_t i = 0; i < held; ++i) {
                        codes[(first + i) * places + place] = tile[i];
                    }
                }
            }
        }
        return {scratch.codes.data(), {1, plane}, load_scales(page, layout, slot, count, scratch)};
    }
    [[nodiscard]] const float* load_scales(const std::byte* page, const coded_layout& layout, std::size_t slot,
                                           std::size_t count, kv_scratch& scratch) const {
        if (!layout.has_scales()) {
            return nullptr;
        }
        const std::size_t bytes = size_of(layout.scale_type());
        float tile[tile_tokens];
        for (std::size_t head = 0; head < heads_; ++head) {
            for (std::size_t first = 0; first < count; first += tile_tokens) {
                const std::size_t held = std::min(tile_tokens, count - first);
                const std::byte* const from = page + layout.scales(head) + (slot + first) * bytes;
                switch (layout.scale_type()) {
                    case dtype::float32: convert(reinterpret_cast<const float*>(from), tile, held); break;
                    case dtype::float16: convert(reinterpret_cast<const float16*>(from), tile, held); break;
                    case dtype::bfloat16: convert(reinterpret_cast<const bfloat16*>(from), tile, held); break;
                }
                for (std::size_t i = 0; i < held; ++i) {
                    scratch.scales.data()[(first + i) * heads_ + head] = tile[i];
                }
            }
        }
        return scratch.scales.data();
    }

    std::shared_ptr<const rvqkv::codec> codec_;
    std::size_t heads_ = 0;
    dtype exact_type_ = dtype::float16;
    std::size_t block_tokens_ = 0;
    key_positions positions_;
    const char* name_ = "";
    std::size_t layer_ = 0;
};

}  // namespace detail
RVQKV_NAMESPACE_END
