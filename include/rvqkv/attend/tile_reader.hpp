// SPDX-License-Identifier: MIT
/// @file
/// Tiles of codes back to rows of float32, once for all queries of a KV head: what works for every codec and every
/// state of the keys, and what table readers are measured by.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/readers.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// Unpacks and decodes tiles of one codec.
class tile_decoder {
public:
    explicit tile_decoder(std::shared_ptr<const codec> source, const kernel_table& kernels = best_kernels()) noexcept
        : codec_(std::move(source)), kernels_(&kernels) {}

    [[nodiscard]] const codec& source() const noexcept { return *codec_; }
    [[nodiscard]] const kernel_table& kernels() const noexcept { return *kernels_; }
    /// Codes that `rows` needs room for.
    [[nodiscard]] std::size_t code_count() const noexcept { return codec_->depths() * tile_tokens; }

    /// The scales of tile `tile` (1 where the codec stores none), `[tile_tokens]`.
    void scales(const coded_tiles& tiles, std::size_t tile, float* out) const noexcept {
        const coded_layout& layout = *tiles.layout;
        if (!layout.has_scales()) {
            std::fill_n(out, tile_tokens, 1.0F);
            return;
        }
        const page_tile& place = tiles.tiles.tiles[tile];
        const std::byte* const from =
            place.page + layout.scales(tiles.head) + place.tile * tile_tokens * size_of(layout.scale_type());
        switch (layout.scale_type()) {
            case dtype::float32: std::memcpy(out, from, tile_tokens * sizeof(float)); break;
            case dtype::float16:
                kernels_->from_float16(static_cast<const float16*>(static_cast<const void*>(from)), out, tile_tokens);
                break;
            case dtype::bfloat16:
                kernels_->from_bfloat16(static_cast<const bfloat16*>(static_cast<const void*>(from)), out, tile_tokens);
                break;
        }
    }

    /// The tokens of tile `tile` as rows `[tile_tokens, head_dim]`, channels in the codec's order, without scales.
    /// `codes` has room for `code_count()`.
    void rows(const coded_tiles& tiles, std::size_t tile, code_t* codes, float* out) const noexcept {
        const codebook_shape& shape = codec_->shape();
        const page_tile& place = tiles.tiles.tiles[tile];
        const coded_layout& layout = *tiles.layout;
        for (std::size_t group = 0; group < codec_->groups(); ++group) {
            for (std::size_t depth = 0; depth < tiles.depths; ++depth) {
                const std::byte* const row = place.page + layout.row(depth, tiles.head, group);
                kernels_->attention.unpack_tile(row + place.tile * 8 * layout.bits(), layout.bits(),
                                                codes + depth * tile_tokens);
            }
            if (shape.codewords < std::size_t{1} << layout.bits()) {  // places that hold no token may hold anything
                for (std::size_t i = 0; i < tiles.depths * tile_tokens; ++i) {
                    codes[i] = std::min(codes[i], static_cast<code_t>(shape.codewords - 1));
                }
            }
            decode(out + group * shape.dim, codes, tiles.depths);
        }
    }

private:
    void decode(float* out, const code_t* codes, std::size_t depths) const noexcept {
        switch (codec_->weight_type()) {
            case dtype::float32: decode_as<float>(out, codes, depths); break;
            case dtype::float16: decode_as<float16>(out, codes, depths); break;
            case dtype::bfloat16: decode_as<bfloat16>(out, codes, depths); break;
        }
    }
    template <class Weight>
    void decode_as(float* out, const code_t* codes, std::size_t depths) const noexcept {
        const codebook_shape& shape = codec_->shape();
        const void* const weights = codec_->weights().data();
        kernels_->weights<Weight>().decode(out, tile_tokens, codec_->head_dim(), static_cast<const Weight*>(weights),
                                           shape.codewords, shape.dim, codes, {1, tile_tokens}, depths);
    }

    std::shared_ptr<const codec> codec_;
    const kernel_table* kernels_;
};

/// Scores of reconstructed keys.
class tile_key_reader final : public key_reader {
public:
    explicit tile_key_reader(tile_decoder decoder) noexcept : decoder_(std::move(decoder)) {}
    [[nodiscard]] const tile_decoder& decoder() const noexcept { return decoder_; }
    [[nodiscard]] std::size_t bytes() const noexcept override { return 0; }
    [[nodiscard]] std::size_t scratch_bytes(std::size_t /*rows*/) const noexcept override {
        return 64 + (tile_tokens * (1 + decoder_.source().head_dim())) * sizeof(float) +
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
        const auto as_prepared = [&](std::size_t, float*) { return queries; };
        scores(tiles, as_prepared, out, out_stride, scratch);
    }

    /// The same with a word in between: `adjust(tile, rows)` may change the reconstructed rows of a tile, and returns
    /// the queries that they are multiplied by.
    template <class Adjust>
    void scores(const coded_tiles& tiles, Adjust&& adjust, float* out, std::size_t out_stride,
                std::byte* scratch) const noexcept {
        float* const scales = static_cast<float*>(static_cast<void*>(scratch + 64));
        float* const keys = scales + tile_tokens;
        const std::size_t head_dim = decoder_.source().head_dim();
        code_t* const codes = static_cast<code_t*>(static_cast<void*>(keys + tile_tokens * head_dim));
        const attention_kernels& kernels = decoder_.kernels().attention;
        for (std::size_t tile = 0; tile < tiles.tiles.count; ++tile, out += tile_tokens) {
            decoder_.rows(tiles, tile, codes, keys);
            decoder_.scales(tiles, tile, scales);
            const row_block<const float> queries = adjust(tile, keys);
            kernels.rows<float>().scores({keys, tile_tokens, head_dim}, queries, head_dim, out, out_stride);
            for (std::size_t q = 0; q < queries.count; ++q) {
                kernels.multiply(out + q * out_stride, scales, tile_tokens);
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
    [[nodiscard]] std::size_t bytes() const noexcept override { return 0; }
    [[nodiscard]] std::size_t scratch_bytes(std::size_t rows) const noexcept override {
        return ((rows + tile_tokens) * head_dim() + (1 + rows) * tile_tokens) * sizeof(float) +
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
        float* const scales = values + tile_tokens * head_dim();
        float* const scaled = scales + tile_tokens;
        code_t* const codes = static_cast<code_t*>(static_cast<void*>(scaled + rows * tile_tokens));
        const attention_kernels& kernels = decoder_.kernels().attention;
        for (std::size_t tile = 0; tile < tiles.tiles.count; ++tile, weights += tile_tokens) {
            decoder_.rows(tiles, tile, codes, values);
            decoder_.scales(tiles, tile, scales);
            for (std::size_t row = 0; row < rows; ++row) {
                std::memcpy(scaled + row * tile_tokens, weights + row * weights_stride, tile_tokens * sizeof(float));
                kernels.multiply(scaled + row * tile_tokens, scales, tile_tokens);
            }
            kernels.rows<float>().add({values, tile_tokens, head_dim()}, scaled, {tile_tokens, 1}, head_dim(),
                                      {sums, rows, head_dim()});
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
