// SPDX-License-Identifier: MIT
/// @file
/// Tiles of codes back to rows of float32, once for all queries of a KV head: what works for every codec and every
/// state of the keys, and what table readers are measured by.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/readers.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// Unpacks and decodes tiles of one codec.
/// Numerics: float32 sums of codewords, as `codec::decode` gives them.
class tile_decoder {
public:
    /// Rows that are decoded at a time: they stay in the nearest cache.
    static constexpr std::size_t part_rows = 16;

    tile_decoder(std::shared_ptr<const codec> source, const kernel_table& kernels) noexcept
        : codec_(std::move(source)), kernels_(&kernels) {}

    [[nodiscard]] const codec& source() const noexcept { return *codec_; }
    [[nodiscard]] const kernel_table& kernels() const noexcept { return *kernels_; }
    /// Codes of a tile: `[group, depth, tile_tokens]`.
    [[nodiscard]] std::size_t code_count() const noexcept { return codec_->groups() * codec_->depths() * tile_tokens; }

    /// The codes of tile `tile`.
    void unpack(const coded_tiles& tiles, std::size_t tile, code_t* codes) const noexcept {
        const coded_layout& layout = *tiles.layout;
        const std::size_t bytes = std::size_t{8} * layout.bits();
        const page_tile& place = tiles.tiles.tiles[tile];
        const bool may_exceed = codec_->shape().codewords < std::size_t{1} << layout.bits();
        for (std::size_t group = 0; group < codec_->groups(); ++group) {
            for (std::size_t depth = 0; depth < tiles.depths; ++depth, codes += tile_tokens) {
                const std::size_t row = layout.row(depth, tiles.head, group);
                kernels_->attention.unpack_tile(place.page + row + place.tile * bytes, layout.bits(), codes);
                if (may_exceed) {  // places that hold no token may hold anything
                    for (std::size_t i = 0; i < tile_tokens; ++i) {
                        codes[i] = std::min(codes[i], static_cast<code_t>(codec_->shape().codewords - 1));
                    }
                }
            }
        }
    }

    /// Fetches a part of the codes of the tile behind tile `tile` from memory: all of them, in the course of decoding
    /// one. Inlined always: GCC 12 takes a function that only prefetches for one that does nothing, and drops its
    /// calls.
    RVQKV_ALWAYS_INLINE void prefetch(const coded_tiles& tiles, std::size_t tile, std::size_t first) const noexcept {
        if (tile + 1 >= tiles.tiles.count + tiles.tiles.ahead) {
            return;
        }
        const coded_layout& layout = *tiles.layout;
        const page_tile& next = tiles.tiles.tiles[tile + 1];
        const std::size_t bytes = std::size_t{8} * layout.bits();
        constexpr std::size_t parts = tile_tokens / part_rows;
        const std::size_t rows = codec_->groups() * tiles.depths;
        for (std::size_t i = first / part_rows; i < rows; i += parts) {
            const std::byte* const codes =
                next.page + layout.row(i / codec_->groups(), tiles.head, i % codec_->groups()) + next.tile * bytes;
            __builtin_prefetch(codes);
            __builtin_prefetch(codes + bytes - 1);
        }
    }

    /// Rows [first, first + part_rows) of a tile, channels in the codec's order, without scales. `codes` are what
    /// `unpack` left, of as many depths.
    void decode(const code_t* codes, std::size_t depths, std::size_t first, float* out) const noexcept {
        const codebook_shape& shape = codec_->shape();
        for (std::size_t group = 0; group < codec_->groups(); ++group, out += shape.dim) {
            const code_t* const from = codes + group * depths * tile_tokens + first;
            switch (codec_->weight_type()) {
                case dtype::float32: decode_as<float>(out, from, depths); break;
                case dtype::float16: decode_as<float16>(out, from, depths); break;
                case dtype::bfloat16: decode_as<bfloat16>(out, from, depths); break;
            }
        }
    }

private:
    template <class Weight>
    [[nodiscard]] const Weight* weights() const noexcept {
        return static_cast<const Weight*>(static_cast<const void*>(codec_->weights().data()));
    }
    template <class Weight>
    void decode_as(float* out, const code_t* codes, std::size_t depths) const noexcept {
        const codebook_shape& shape = codec_->shape();
        kernels_->weights<Weight>().decode(out, part_rows, codec_->head_dim(), weights<Weight>(), shape.codewords,
                                           shape.dim, codes, {1, tile_tokens}, depths);
    }

    std::shared_ptr<const codec> codec_;
    const kernel_table* kernels_ = nullptr;
};

/// Scores of reconstructed keys.
class tile_key_reader final : public key_reader {
public:
    explicit tile_key_reader(tile_decoder decoder) noexcept : decoder_(std::move(decoder)) {}
    [[nodiscard]] const tile_decoder& decoder() const noexcept { return decoder_; }
    [[nodiscard]] std::size_t bytes() const noexcept override { return sizeof(*this); }
    [[nodiscard]] std::size_t scratch_bytes(std::size_t /*rows*/) const noexcept override {
        return 64 + (tile_tokens + tile_decoder::part_rows * decoder_.source().head_dim()) * sizeof(float) +
               decoder_.code_count() * sizeof(code_t);
    }
    [[nodiscard]] bool pays(std::size_t /*rows*/, std::size_t /*tokens*/) const noexcept override { return true; }
    void prepare(row_block<const float> queries, std::byte* scratch) const noexcept override {
        std::memcpy(scratch, &queries, sizeof(queries));
    }
    void scores(const coded_tiles& tiles, std::size_t /*rows*/, float* out, std::size_t out_stride,
                std::byte* scratch) const noexcept override {
        row_block<const float> queries;
        std::memcpy(&queries, scratch, sizeof(queries));
        const auto as_prepared = [&](std::size_t, std::size_t, float*) { return queries; };
        scores(tiles, as_prepared, out, out_stride, scratch);
    }

    /// The same with a word in between: `adjust(tile, first, rows)` may change the reconstructed rows of a tile's
    /// tokens [first, first + tile_decoder::part_rows), and returns the queries that they are multiplied by.
    template <class Adjust>
    void scores(const coded_tiles& tiles, Adjust&& adjust, float* out, std::size_t out_stride,
                std::byte* scratch) const noexcept {
        constexpr std::size_t part = tile_decoder::part_rows;
        float* const scales = static_cast<float*>(static_cast<void*>(scratch + 64));
        float* const keys = scales + tile_tokens;
        const std::size_t head_dim = decoder_.source().head_dim();
        code_t* const codes = static_cast<code_t*>(static_cast<void*>(keys + part * head_dim));
        const attention_kernels& kernels = decoder_.kernels().attention;
        for (std::size_t tile = 0; tile < tiles.tiles.count; ++tile) {
            decoder_.unpack(tiles, tile, codes);
            detail::load_scales(tiles, tile, decoder_.kernels(), scales);
            for (std::size_t first = 0; first < tile_tokens; first += part, out += part) {
                decoder_.prefetch(tiles, tile, first);
                decoder_.decode(codes, tiles.depths, first, keys);
                const row_block<const float> queries = adjust(tile, first, keys);
                kernels.rows<float>().scores({keys, part, head_dim}, queries, head_dim, out, out_stride);
                for (std::size_t q = 0; q < queries.count; ++q) {
                    kernels.multiply(out + q * out_stride, scales + first, part);
                }
            }
        }
    }

private:
    tile_decoder decoder_;
};

/// Sums of reconstructed values.
class tile_value_reader final : public value_reader {
public:
    explicit tile_value_reader(tile_decoder decoder) noexcept : decoder_(std::move(decoder)) {}
    [[nodiscard]] std::size_t bytes() const noexcept override { return sizeof(*this); }
    [[nodiscard]] std::size_t scratch_bytes(std::size_t rows) const noexcept override {
        return ((rows + tile_decoder::part_rows) * head_dim() + (1 + rows) * tile_tokens) * sizeof(float) +
               decoder_.code_count() * sizeof(code_t);
    }
    [[nodiscard]] bool pays(std::size_t /*rows*/, std::size_t /*tokens*/) const noexcept override { return true; }
    void begin(std::size_t rows, std::byte* scratch) const noexcept override {
        std::fill_n(floats(scratch), rows * head_dim(), 0.0F);
    }
    void add(const coded_tiles& tiles, std::size_t rows, const float* weights, std::size_t weights_stride,
             std::byte* scratch) const noexcept override {
        float* const sums = floats(scratch);
        float* const values = sums + rows * head_dim();
        float* const scales = values + tile_decoder::part_rows * head_dim();
        float* const scaled = scales + tile_tokens;
        code_t* const codes = static_cast<code_t*>(static_cast<void*>(scaled + rows * tile_tokens));
        const attention_kernels& kernels = decoder_.kernels().attention;
        for (std::size_t tile = 0; tile < tiles.tiles.count; ++tile, weights += tile_tokens) {
            decoder_.unpack(tiles, tile, codes);
            detail::load_scales(tiles, tile, decoder_.kernels(), scales);
            for (std::size_t row = 0; row < rows; ++row) {
                std::memcpy(scaled + row * tile_tokens, weights + row * weights_stride, tile_tokens * sizeof(float));
                kernels.multiply(scaled + row * tile_tokens, scales, tile_tokens);
            }
            for (std::size_t first = 0; first < tile_tokens; first += tile_decoder::part_rows) {
                decoder_.prefetch(tiles, tile, first);
                decoder_.decode(codes, tiles.depths, first, values);
                kernels.rows<float>().add({values, tile_decoder::part_rows, head_dim()}, scaled + first,
                                          {tile_tokens, 1}, head_dim(), {sums, rows, head_dim()});
            }
        }
    }
    void rescale(const float* factors, std::size_t rows, std::byte* scratch) const noexcept override {
        float* const sums = floats(scratch);
        for (std::size_t i = 0; i < rows * head_dim(); ++i) {
            sums[i] *= factors[i / head_dim()];
        }
    }
    void finish(std::size_t rows, row_block<float> out, std::byte* scratch) const noexcept override {
        for (std::size_t row = 0; row < rows; ++row) {
            std::memcpy(out.data + row * out.stride, floats(scratch) + row * head_dim(), head_dim() * sizeof(float));
        }
    }

private:
    static float* floats(std::byte* scratch) noexcept { return static_cast<float*>(static_cast<void*>(scratch)); }
    [[nodiscard]] std::size_t head_dim() const noexcept { return decoder_.source().head_dim(); }

    tile_decoder decoder_;
};

RVQKV_NAMESPACE_END
