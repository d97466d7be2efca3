// SPDX-License-Identifier: MIT
/// @file
/// Attention on codes of large codebooks (2048 codewords of 32 channels in the paper) through tables in memory: keys by
/// what each codeword adds to the scores of four queries, values by how much weight each codeword gathers.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/readers.hpp"
#include "rvqkv/attend/tile_reader.hpp"
#include "rvqkv/attend/token_chunk.hpp"
#include "rvqkv/attend/word_rows.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// Tokens whose scores should go through the softmax together where tables this large are read for each portion.
inline constexpr std::size_t large_chunk_tokens = 16384;

namespace detail {

/// What both sides share: sizes, and where codes are found.
class large_tables {
public:
    /// Whether there are tables for a codebook of this shape; smaller ones have quicker ways, larger ones leave the
    /// cache.
    [[nodiscard]] static bool supports(const codebook_shape& shape) noexcept {
        return shape.codewords > 256 && shape.codewords <= 4096;
    }

    large_tables(std::shared_ptr<const codec> source, const kernel_table& kernels)
        : source_(std::move(source)), kernels_(&kernels) {}

    [[nodiscard]] const codec& source() const noexcept { return *source_; }
    [[nodiscard]] const attention_kernels& kernels() const noexcept { return kernels_->attention; }
    [[nodiscard]] std::size_t groups() const noexcept { return source().groups(); }
    /// Tables for all depths.
    [[nodiscard]] std::size_t places() const noexcept { return source().depths() * groups(); }
    /// Entries of a table: whatever a code says is one of them.
    [[nodiscard]] std::size_t slots() const noexcept { return std::size_t{1} << source().bits_per_code(); }
    [[nodiscard]] static std::size_t fours(std::size_t rows) noexcept { return (rows + 3) / 4; }
    void scales(const coded_tiles& tiles, std::size_t tile, float* out) const noexcept {
        detail::load_scales(tiles, tile, *kernels_, out);
    }

    /// Tiles that are read at a time: tables are read for every such portion anew.
    static constexpr std::size_t most_tiles = large_chunk_tokens / tile_tokens;
    /// Where `count` tiles from `first` on begin.
    static void locate(const coded_tiles& tiles, std::size_t first, std::size_t count,
                       const std::byte** places) noexcept {
        const std::size_t begin = tiles.layout->row(0, tiles.head, 0);
        for (std::size_t i = 0; i < count; ++i) {
            const page_tile& tile = tiles.tiles.tiles[first + i];
            places[i] = tile.page + begin + tile.tile * 8 * tiles.layout->bits();
        }
    }
    /// The row of codes of a place (depth * groups + group), and of the one that is read `step` later.
    [[nodiscard]] code_rows rows(const coded_tiles& tiles, const std::byte* const* places, std::size_t count,
                                 std::size_t place, std::size_t step) const noexcept {
        const std::size_t begin = tiles.layout->row(0, tiles.head, 0);
        const auto offset = [&](std::size_t at) {
            return tiles.layout->row(at / groups(), tiles.head, at % groups()) - begin;
        };
        const std::size_t last = tiles.depths * groups() - 1;
        return {places, count, offset(place), offset(std::min(place + step, last)), tiles.layout->bits()};
    }

private:
    std::shared_ptr<const codec> source_;
    const kernel_table* kernels_;
};

}  // namespace detail

/// Scores through lookup tables: four queries' entries of 16 bits side by side in a word, added as they are.
/// Numerics: an entry is rounded to 1/65000 of what the tables' ranges add up to; their sum is exact.
class large_key_tables final : public key_reader {
public:
    [[nodiscard]] static bool supports(const codebook_shape& shape) noexcept {
        return detail::large_tables::supports(shape);
    }
    /// Errors: `out_of_memory`.
    [[nodiscard]] static result<std::unique_ptr<const key_reader>> create(std::shared_ptr<const codec> source,
                                                                          const kernel_table& kernels) {
        std::unique_ptr<large_key_tables> made(new (std::nothrow) large_key_tables(std::move(source), kernels));
        if (made == nullptr) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        const codec& codec = made->tables_.source();
        auto weights = aligned_buffer<std::byte>::allocate(codec.depths() * made->blocks() * search_block *
                                                           codec.shape().dim * size_of(codec.weight_type()));
        if (!weights) {
            return weights.error();
        }
        made->weights_ = std::move(weights).value();
        made->least_tokens_ = detail::word_decoder::supports(codec, kernels) ? 20480 : 4096;
        if (codec.weight_type() == dtype::float32) {
            made->interleave<std::uint32_t>();
        } else {
            made->interleave<std::uint16_t>();
        }
        return std::unique_ptr<const key_reader>(std::move(made));
    }

    [[nodiscard]] std::size_t bytes() const noexcept override { return sizeof(*this) + weights_.bytes(); }
    [[nodiscard]] std::size_t scratch_bytes(std::size_t rows) const noexcept override {
        return scratch(nullptr, rows).bytes;
    }
    [[nodiscard]] bool pays(std::size_t rows, std::size_t tokens) const noexcept override {
        // Making tables costs as much as some thousand tokens, and four queries share one.
        return rows <= 8 && tokens >= least_tokens_;
    }

    void prepare(row_block<const float> queries, std::byte* memory) const noexcept override {
        const codec& codec = tables_.source();
        const scratch_parts to = scratch(memory, queries.count);
        const std::size_t groups = tables_.groups();
        const std::size_t padded = 4 * detail::large_tables::fours(queries.count);
        const std::size_t width = blocks() * search_block;
        std::fill_n(to.queries, padded * codec.head_dim(), 0.0F);
        for (std::size_t row = 0; row < queries.count; ++row) {
            std::memcpy(to.queries + row * codec.head_dim(), queries.data + row * queries.stride,
                        codec.head_dim() * sizeof(float));
        }
        for (std::size_t first = 0; first < padded; first += 4) {
            const float* const four = to.queries + first * codec.head_dim();
            for (std::size_t depth = 0; depth < codec.depths(); ++depth) {
                products(depth, {four, 4 * groups, codec.shape().dim}, to.products + depth * 4 * groups * width, width);
            }
            prepare_four(to, first, padded, width);
        }
    }

    void scores(const coded_tiles& tiles, std::size_t rows, float* out, std::size_t out_stride,
                std::byte* memory) const noexcept override {
        const scratch_parts from = scratch(memory, rows);
        const std::size_t places = tiles.depths * tables_.groups();
        const std::byte* located[detail::large_tables::most_tiles];
        for (std::size_t first = 0; first < tiles.tiles.count; first += detail::large_tables::most_tiles) {
            const std::size_t count = std::min(detail::large_tables::most_tiles, tiles.tiles.count - first);
            detail::large_tables::locate(tiles, first, count, located);
            for (std::size_t row = 0; row < rows; row += 4) {
                const std::uint64_t* const entries = from.entries + row / 4 * tables_.places() * tables_.slots();
                std::fill_n(from.sums, count * tile_tokens, std::uint64_t{0});
                for (std::size_t place = 0; place < places; place += 2) {
                    const bool is_single = place + 1 == places;
                    tables_.kernels().add_entries(
                        tables_.rows(tiles, located, count, place, 2), entries + place * tables_.slots(),
                        tables_.rows(tiles, located, count, is_single ? place : place + 1, 2),
                        is_single ? from.zeros : entries + (place + 1) * tables_.slots(), from.sums);
                }
                float* const starts = from.starts + (tiles.depths - 1) * 4 * detail::large_tables::fours(rows) + row;
                for (std::size_t tile = 0; tile < count; ++tile) {
                    float scales[tile_tokens];
                    tables_.scales(tiles, first + tile, scales);
                    tables_.kernels().unpack_sums(
                        from.sums + tile * tile_tokens, tile_tokens, std::min(rows - row, std::size_t{4}), starts,
                        from.steps + row, scales, out + row * out_stride + (first + tile) * tile_tokens, out_stride);
                }
            }
        }
    }

private:
    /// What sums of entries may reach: 65535 less the rounding of each of up to 1024 entries.
    static constexpr float most_sum = 65000.0F;

    large_key_tables(std::shared_ptr<const codec> source, const kernel_table& kernels)
        : tables_(std::move(source), kernels) {}

    [[nodiscard]] std::size_t blocks() const noexcept {
        return (tables_.source().shape().codewords + search_block - 1) / search_block;
    }

    struct scratch_parts {
        float* queries;          // [rows up to a multiple of 4, head_dim]
        float* steps;            // [rows up ...]
        float* starts;           // [depths, rows up ...]: what scores start from, for every number of depths
        float* products;         // [depths, 4, groups, blocks * 16]
        std::uint64_t* entries;  // [rows / 4, places, slots]
        std::uint64_t* zeros;    // [slots]
        std::uint64_t* sums;
        std::size_t bytes;
    };
    [[nodiscard]] scratch_parts scratch(std::byte* memory, std::size_t rows) const noexcept {
        detail::scratch_dealer dealer(memory);
        const codec& codec = tables_.source();
        const std::size_t fours = detail::large_tables::fours(rows);
        scratch_parts parts{};
        parts.queries = dealer.take<float>(4 * fours * codec.head_dim());
        parts.steps = dealer.take<float>(4 * fours);
        parts.starts = dealer.take<float>(codec.depths() * 4 * fours);
        parts.products = dealer.take<float>(4 * tables_.places() * blocks() * search_block);
        parts.entries = dealer.take<std::uint64_t>(fours * tables_.places() * tables_.slots());
        parts.zeros = dealer.take<std::uint64_t>(tables_.slots());
        parts.sums = dealer.take<std::uint64_t>(detail::large_tables::most_tiles * tile_tokens);
        parts.bytes = dealer.used();
        return parts;
    }

    /// Weights in blocks of codewords side by side, zeros at the end.
    template <class Bits>
    void interleave() noexcept {
        const codebook_shape& shape = tables_.source().shape();
        const std::byte* const from = tables_.source().weights().data();
        std::byte* to = weights_.data();
        for (std::size_t depth = 0; depth < shape.depths; ++depth) {
            for (std::size_t block = 0; block < blocks(); ++block) {
                for (std::size_t j = 0; j < shape.dim; ++j) {
                    for (std::size_t lane = 0; lane < search_block; ++lane, to += sizeof(Bits)) {
                        const std::size_t codeword = block * search_block + lane;
                        if (codeword < shape.codewords) {
                            const std::size_t i = (depth * shape.codewords + codeword) * shape.dim + j;
                            std::memcpy(to, from + i * sizeof(Bits), sizeof(Bits));
                        }
                    }
                }
            }
        }
    }

    void products(std::size_t depth, row_block<const float> queries, float* out, std::size_t width) const noexcept {
        const codec& codec = tables_.source();
        const std::size_t size = blocks() * search_block * codec.shape().dim * size_of(codec.weight_type());
        const void* const weights = weights_.data() + depth * size;
        const std::size_t dim = codec.shape().dim;
        switch (codec.weight_type()) {
            case dtype::float32:
                tables_.kernels().rows<float>().products(static_cast<const float*>(weights), blocks(), queries, dim,
                                                         out, width);
                break;
            case dtype::float16:
                tables_.kernels().rows<float16>().products(static_cast<const float16*>(weights), blocks(), queries, dim,
                                                           out, width);
                break;
            case dtype::bfloat16:
                tables_.kernels().rows<bfloat16>().products(static_cast<const bfloat16*>(weights), blocks(), queries,
                                                            dim, out, width);
                break;
        }
    }

    /// Tables of queries [first, first + 4), of which the products are there: a step for each query, so that no sum can
    /// overflow, and each table's least entry is 0.
    void prepare_four(const scratch_parts& to, std::size_t first, std::size_t padded,
                      std::size_t width) const noexcept {
        const codec& codec = tables_.source();
        const attention_kernels& kernels = tables_.kernels();
        const std::size_t groups = tables_.groups();
        float inverse[4];
        for (std::size_t q = 0; q < 4; ++q) {
            float spoiled = 0.0F;  // or NaN, if the query has one or an infinity
            for (std::size_t i = 0; i < codec.head_dim(); ++i) {
                spoiled += 0.0F * to.queries[(first + q) * codec.head_dim() + i];
            }
            float start = spoiled;
            float ranges = 0.0F;
            for (std::size_t depth = 0; depth < codec.depths(); ++depth) {
                for (std::size_t group = 0; group < groups; ++group) {
                    float low = 0.0F;
                    float high = 0.0F;
                    kernels.range(to.products + ((depth * 4 + q) * groups + group) * width, width, &low, &high);
                    start += low;
                    ranges += high - low;
                }
                to.starts[depth * padded + first + q] = start;
            }
            to.steps[first + q] = ranges > 0.0F ? ranges / most_sum : 1.0F;
            inverse[q] = 1.0F / to.steps[first + q];
        }
        for (std::size_t depth = 0; depth < codec.depths(); ++depth) {
            for (std::size_t group = 0; group < groups; ++group) {
                const float* const products = to.products + (depth * 4 * groups + group) * width;
                float low[4];
                for (std::size_t q = 0; q < 4; ++q) {
                    float high = 0.0F;
                    kernels.range(products + q * groups * width, width, &low[q], &high);
                }
                kernels.pack_entries(
                    products, groups * width, width, low, inverse,
                    to.entries + (first / 4 * tables_.places() + depth * groups + group) * tables_.slots());
            }
        }
    }

    detail::large_tables tables_;
    aligned_buffer<std::byte> weights_;  // [depths, blocks, dim, 16], as the codec stores them
    std::size_t least_tokens_ = 4096;    // from which on this is quicker than reconstruction
};

/// Sums of values through bins: every codeword gathers the weights of the tokens that have it, and in the end the
/// codebook is summed once, whatever the number of tokens. Numerics: float32; nothing is rounded but sums.
class large_value_tables final : public value_reader {
public:
    [[nodiscard]] static bool supports(const codebook_shape& shape) noexcept {
        return detail::large_tables::supports(shape);
    }
    large_value_tables(std::shared_ptr<const codec> source, const kernel_table& kernels)
        : tables_(std::move(source), kernels) {}

    [[nodiscard]] std::size_t bytes() const noexcept override { return sizeof(*this); }
    [[nodiscard]] std::size_t scratch_bytes(std::size_t rows) const noexcept override {
        return scratch(nullptr, rows).bytes;
    }
    [[nodiscard]] bool pays(std::size_t rows, std::size_t tokens) const noexcept override {
        return rows <= 8 && tokens >= 4096;  // the codebook is summed for every query once
    }
    void begin(std::size_t rows, std::byte* memory) const noexcept override {
        const scratch_parts to = scratch(memory, rows);
        std::memset(static_cast<void*>(to.bins), 0, bin_count(rows) * sizeof(float4));
        std::fill_n(to.gains, rows, 1.0F);
    }
    void add(const coded_tiles& tiles, std::size_t rows, const float* weights, std::size_t weights_stride,
             std::byte* memory) const noexcept override {
        const scratch_parts to = scratch(memory, rows);
        const std::size_t places = tiles.depths * tables_.groups();
        const std::byte* located[detail::large_tables::most_tiles];
        for (std::size_t first = 0; first < tiles.tiles.count; first += detail::large_tables::most_tiles) {
            const std::size_t count = std::min(detail::large_tables::most_tiles, tiles.tiles.count - first);
            detail::large_tables::locate(tiles, first, count, located);
            for (std::size_t row = 0; row < rows; row += 4) {
                for (std::size_t tile = 0; tile < count; ++tile) {
                    float scaled[4 * tile_tokens] = {};
                    float scales[tile_tokens];
                    tables_.scales(tiles, first + tile, scales);
                    for (std::size_t q = 0; q < std::min(rows - row, std::size_t{4}); ++q) {
                        std::memcpy(scaled + q * tile_tokens,
                                    weights + (row + q) * weights_stride + (first + tile) * tile_tokens,
                                    tile_tokens * sizeof(float));
                        tables_.kernels().multiply(scaled + q * tile_tokens, scales, tile_tokens);
                        for (std::size_t i = 0; i < tile_tokens; ++i) {
                            scaled[q * tile_tokens + i] *= to.gains[row + q];
                        }
                    }
                    float4* const turned = to.weights + tile * tile_tokens;
                    for (std::size_t i = 0; i < tile_tokens; ++i) {
                        turned[i] = float4{scaled[i], scaled[tile_tokens + i], scaled[2 * tile_tokens + i],
                                           scaled[3 * tile_tokens + i]};
                    }
                }
                float4* const bins = to.bins + row / 4 * tables_.places() * tables_.slots();
                for (std::size_t place = 0; place < places; ++place) {
                    tables_.kernels().add_weights(tables_.rows(tiles, located, count, place, 1), to.weights,
                                                  bins + place * tables_.slots());
                }
            }
        }
    }
    void rescale(const float* factors, std::size_t rows, std::byte* memory) const noexcept override {
        // Bins are many: what they hold grows instead of what they held shrinking, within float32's range.
        constexpr float most_gain = 0x1p40F;
        const scratch_parts to = scratch(memory, rows);
        const std::size_t each = tables_.places() * tables_.slots();
        for (std::size_t row = 0; row < rows; row += 4) {
            const std::size_t four = std::min(rows - row, std::size_t{4});
            float4 shrink = {1.0F, 1.0F, 1.0F, 1.0F};
            bool shrinks = false;
            for (std::size_t q = 0; q < four; ++q) {
                float& gain = to.gains[row + q];
                const float grown = gain / factors[row + q];
                const bool fits = grown <= most_gain;
                shrink[q] = fits ? 1.0F : factors[row + q] / gain;
                shrinks = shrinks || !fits;
                gain = fits ? grown : 1.0F;
            }
            for (std::size_t i = 0; shrinks && i < each; ++i) {
                to.bins[row / 4 * each + i] *= shrink;
            }
        }
    }
    void finish(std::size_t rows, row_block<float> out, std::byte* memory) const noexcept override {
        switch (tables_.source().weight_type()) {
            case dtype::float32: return finish_as<float>(rows, out, memory);
            case dtype::float16: return finish_as<float16>(rows, out, memory);
            case dtype::bfloat16: return finish_as<bfloat16>(rows, out, memory);
        }
    }

private:
    struct scratch_parts {
        float4* bins;     // [rows / 4, places, slots]
        float4* weights;  // [token]: scaled, of four queries
        float* gains;     // [row]: what sums are larger by
        std::size_t bytes;
    };
    [[nodiscard]] std::size_t bin_count(std::size_t rows) const noexcept {
        return detail::large_tables::fours(rows) * tables_.places() * tables_.slots();
    }
    [[nodiscard]] scratch_parts scratch(std::byte* memory, std::size_t rows) const noexcept {
        detail::scratch_dealer dealer(memory);
        scratch_parts parts{};
        parts.bins = dealer.take<float4>(bin_count(rows));
        parts.weights = dealer.take<float4>(detail::large_tables::most_tiles * tile_tokens);
        parts.gains = dealer.take<float>(rows);
        parts.bytes = dealer.used();
        return parts;
    }
    template <class Weight>
    void finish_as(std::size_t rows, row_block<float> out, std::byte* memory) const noexcept {
        const scratch_parts from = scratch(memory, rows);
        const codebook_shape& shape = tables_.source().shape();
        const void* const weights = tables_.source().weights().data();
        for (std::size_t row = 0; row < rows; ++row) {
            std::fill_n(out.data + row * out.stride, tables_.source().head_dim(), 0.0F);
        }
        for (std::size_t row = 0; row < rows; row += 4) {
            const std::size_t four = std::min(rows - row, std::size_t{4});
            for (std::size_t place = 0; place < tables_.places(); ++place) {
                const float4* const bins = from.bins + (row / 4 * tables_.places() + place) * tables_.slots();
                const std::size_t depth = place / tables_.groups();
                const std::size_t group = place % tables_.groups();
                tables_.kernels().rows<Weight>().add(
                    {static_cast<const Weight*>(weights) + depth * shape.codewords * shape.dim, shape.codewords,
                     shape.dim},
                    static_cast<const float*>(static_cast<const void*>(bins)), {1, 4}, shape.dim,
                    {out.data + row * out.stride + group * shape.dim, four, out.stride});
            }
        }
        for (std::size_t row = 0; row < rows; ++row) {
            for (std::size_t i = 0; i < tables_.source().head_dim(); ++i) {
                out.data[row * out.stride + i] /= from.gains[row];
            }
        }
    }

    detail::large_tables tables_;
};

RVQKV_NAMESPACE_END
