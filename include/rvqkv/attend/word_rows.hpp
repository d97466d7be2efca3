// SPDX-License-Identifier: MIT
/// @file
/// Attention on codes of large codebooks (2048 codewords of 32 channels in the paper) by rows of 16-bit whole numbers:
/// tiles are reconstructed from copies of the codewords that fit the second cache, turned and multiplied as they are.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/readers.hpp"
#include "rvqkv/attend/tile_reader.hpp"
#include "rvqkv/attend/tile_rope.hpp"
#include "rvqkv/attend/token_chunk.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// A codec's codewords in whole numbers, and tiles made of them.
/// Numerics: all sums are multiples of one step, of which the largest sum that codes can make has 22000. Leading depths
///           are rounded to it; the others to 8 bits, each channel by its own largest weight in them: as many of them
///           as lose less than 1/256 of what vectors measure (root mean squares, codewords taken as equally likely).
class word_decoder {
public:
    static constexpr std::size_t most_dim = 1024;
    static constexpr std::size_t most_group_dim = 64;
    static constexpr std::size_t most_depths = 12;

    /// Whether this serves the codec, where the kernels have it.
    [[nodiscard]] static bool supports(const codec& source, const kernel_table& kernels) noexcept {
        const codebook_shape& shape = source.shape();
        return kernels.word_rows != nullptr && shape.codewords > 256 && shape.codewords <= 4096 &&
               shape.depths <= most_depths && shape.dim % 32 == 0 && shape.dim <= most_group_dim &&
               source.head_dim() % 64 == 0 && source.head_dim() <= most_dim;
    }

    /// Precondition: `supports`. Errors: `out_of_memory`.
    [[nodiscard]] static result<word_decoder> create(std::shared_ptr<const codec> source, const kernel_table& kernels) {
        word_decoder made;
        made.codec_ = std::move(source);
        made.kernels_ = &kernels;
        switch (made.codec_->weight_type()) {
            case dtype::float32: return make<float>(std::move(made));
            case dtype::float16: return make<float16>(std::move(made));
            case dtype::bfloat16: return make<bfloat16>(std::move(made));
        }
        return made;
    }

    [[nodiscard]] const codec& source() const noexcept { return *codec_; }
    [[nodiscard]] const word_row_kernels& kernels() const noexcept { return *kernels_->word_rows; }
    [[nodiscard]] const kernel_table& all_kernels() const noexcept { return *kernels_; }
    [[nodiscard]] std::size_t bytes() const noexcept { return wide_.bytes() + narrow_.bytes() + factors_.bytes(); }
    [[nodiscard]] std::size_t dim() const noexcept { return codec_->head_dim(); }
    /// What rows are counted in.
    [[nodiscard]] float step() const noexcept { return step_; }
    [[nodiscard]] std::size_t code_count() const noexcept { return codec_->groups() * codec_->depths() * tile_tokens; }

    void unpack(const coded_tiles& tiles, std::size_t tile, code_t* codes) const noexcept {
        kernels().unpack(codes_of(tiles, tile), book(), codes);
    }
    /// Rows [first, first + word_rows_at_once) of a tile from what `unpack` left; block `b` at place `places[b]`. A
    /// share of the next tile's codes is fetched from memory.
    void decode(const coded_tiles& tiles, std::size_t tile, const code_t* codes, std::size_t first,
                const std::uint16_t* places, std::int16_t* rows) const noexcept {
        if (tile + 2 < tiles.tiles.count + tiles.tiles.ahead) {
            prefetch(codes_of(tiles, tile + 2), first / word_rows_at_once);
            prefetch_scales(tiles, tile + 2, first);
        }
        if (tiles.depths == 0) {
            std::fill_n(rows, word_rows_at_once * dim(), std::int16_t{0});
            return;
        }
        kernels().decode(book(), codes + first, tiles.depths, codec_->groups(), places, rows);
    }

private:
    static constexpr float most_sum =
        22000.0F;  // with what rounding adds, and turned by half a right angle, 16 bits still
    static constexpr float most_byte = 127.0F;
    static constexpr double most_loss = 1.0 / 256;

    word_decoder() = default;

    [[nodiscard]] word_codebook book() const noexcept {
        const codebook_shape& shape = codec_->shape();
        return {wide_.data(), narrow_.data(), factors_.data(), wide_depths_, shape.codewords, shape.dim};
    }
    [[nodiscard]] tile_codes codes_of(const coded_tiles& tiles, std::size_t tile) const noexcept {
        const coded_layout& layout = *tiles.layout;
        const page_tile& place = tiles.tiles.tiles[tile];
        const std::size_t begin = layout.row(0, tiles.head, 0);
        return {place.page + begin + place.tile * 8 * layout.bits(),
                layout.row(1, tiles.head, 0) - begin,
                layout.row_bytes(),
                tiles.depths,
                layout.groups(),
                layout.bits()};
    }
    // Inlined always: GCC 12 takes a function that only prefetches for one that does nothing, and drops its calls.
    RVQKV_ALWAYS_INLINE static void prefetch_scales(const coded_tiles& tiles, std::size_t tile,
                                                    std::size_t first) noexcept {
        const coded_layout& layout = *tiles.layout;
        const page_tile& place = tiles.tiles.tiles[tile];
        if (layout.has_scales()) {
            __builtin_prefetch(place.page + layout.scales(tiles.head) +
                               (place.tile * tile_tokens + first) * size_of(layout.scale_type()));
        }
    }
    RVQKV_ALWAYS_INLINE static void prefetch(const tile_codes& codes, std::size_t part) noexcept {
        constexpr std::size_t parts = tile_tokens / word_rows_at_once;
        const std::size_t bytes = std::size_t{8} * codes.bits;
        for (std::size_t i = part; i < codes.depths * codes.groups; i += parts) {
            const std::byte* const row =
                codes.first + i / codes.groups * codes.depth_stride + i % codes.groups * codes.group_stride;
            __builtin_prefetch(row);
            __builtin_prefetch(row + bytes / 2);
            __builtin_prefetch(row + bytes - 1);
        }
    }

    /// Each depth's and channel's largest weight.
    using weight_sizes = std::array<std::array<float, most_group_dim>, most_depths>;
    /// Each depth's sum of squares.
    using depth_squares = std::array<double, most_depths>;

    template <class Weight>
    [[nodiscard]] static result<word_decoder> make(word_decoder made) {
        const codebook_shape& shape = made.codec_->shape();
        const auto* const weights = static_cast<const Weight*>(static_cast<const void*>(made.codec_->weights().data()));
        const std::size_t depth_size = shape.codewords * shape.dim;
        weight_sizes most{};
        depth_squares squares{};
        for (std::size_t i = 0; i < shape.depths * depth_size; ++i) {
            const std::size_t depth = i / depth_size;
            const float weight = to_float(weights[i]);
            float& largest = most[depth][i % shape.dim];
            largest = std::max(largest, std::fabs(weight));
            squares[depth] += static_cast<double>(weight) * static_cast<double>(weight);
        }
        made.choose_steps(most, squares);
        auto wide = aligned_buffer<std::int16_t>::allocate(made.wide_depths_ * depth_size);
        auto narrow = aligned_buffer<std::int8_t>::allocate((shape.depths - made.wide_depths_) * depth_size);
        auto factors = aligned_buffer<std::int16_t>::allocate(shape.dim);
        if (!wide || !narrow || !factors) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        made.wide_ = std::move(wide).value();
        made.narrow_ = std::move(narrow).value();
        made.factors_ = std::move(factors).value();
        const auto rounded = [&](std::size_t i, float step) { return std::lrint(to_float(weights[i]) / step); };
        for (std::size_t i = 0; i < made.wide_.size(); ++i) {
            made.wide_[i] = static_cast<std::int16_t>(rounded(i, made.step_));
        }
        for (std::size_t j = 0; j < shape.dim; ++j) {
            made.factors_[j] = static_cast<std::int16_t>(made.factor(most, made.wide_depths_, j));
        }
        for (std::size_t i = 0; i < made.narrow_.size(); ++i) {
            const float step = made.step_ * static_cast<float>(made.factors_[i % shape.dim]);
            made.narrow_[i] = static_cast<std::int8_t>(rounded(made.wide_.size() + i, step));
        }
        return made;
    }

    /// Steps in which a channel's weights have 8 bits, from a depth on.
    [[nodiscard]] float factor(const weight_sizes& most, std::size_t first_depth, std::size_t j) const noexcept {
        float largest = 0.0F;
        for (std::size_t depth = first_depth; depth < codec_->shape().depths; ++depth) {
            largest = std::max(largest, most[depth][j]);
        }
        return std::max(1.0F, std::ceil(largest / (most_byte * step_)));
    }

    void choose_steps(const weight_sizes& most, const depth_squares& squares) noexcept {
        const codebook_shape& shape = codec_->shape();
        float reach = 0.0F;
        for (std::size_t j = 0; j < shape.dim; ++j) {
            float sum = 0.0F;
            for (std::size_t depth = 0; depth < shape.depths; ++depth) {
                sum += most[depth][j];
            }
            reach = std::max(reach, sum);
        }
        step_ = reach > 0.0F ? reach / most_sum : 1.0F;
        double allowed = 0.0;
        for (const double square : squares) {
            allowed += square / static_cast<double>(shape.codewords) * most_loss * most_loss;
        }
        const auto loss = [&](std::size_t wide_depths) {
            double sum = 0.0;
            for (std::size_t j = 0; j < shape.dim; ++j) {
                const double rounding = static_cast<double>(step_ * factor(most, wide_depths, j));
                sum += rounding * rounding / 12.0;
            }
            return sum * static_cast<double>(shape.depths - wide_depths);
        };
        wide_depths_ = shape.depths;
        while (wide_depths_ > 1 && loss(wide_depths_ - 1) <= allowed) {
            --wide_depths_;
        }
    }

    std::shared_ptr<const codec> codec_;
    const kernel_table* kernels_ = nullptr;
    std::size_t wide_depths_ = 0;
    float step_ = 1.0F;
    aligned_buffer<std::int16_t> wide_;
    aligned_buffer<std::int8_t> narrow_;
    aligned_buffer<std::int16_t> factors_;
};

/// Where each block of channels goes.
using word_places = std::array<std::uint16_t, word_decoder::most_dim / word_block>;
[[nodiscard]] inline word_places places_as_they_are() noexcept {
    word_places places{};
    for (std::size_t i = 0; i < places.size(); ++i) {
        places[i] = static_cast<std::uint16_t>(i * word_block);
    }
    return places;
}

/// Where blocks of channels that turn together go: the first channels of all pairs, then the second ones.
struct word_turn {
    word_places places{};                 ///< `[blocks]`
    bool serves = false;                  ///< Whether whole blocks of channels, in the codec's order, form pairs.
    aligned_buffer<std::int16_t> angles;  ///< `[tile_tokens, head_dim]`; see `word_row_kernels::scores`.
    float factor = 1.0F;                  ///< What turned rows are to be multiplied by.

    /// Precondition: `dim <= word_decoder::most_dim`. Errors: `out_of_memory`.
    [[nodiscard]] static result<word_turn> create(const tile_rope& rope, std::size_t dim, double attention_factor) {
        word_turn made;
        const std::size_t half = dim / 2;
        if (rope.angles() != half) {
            return made;
        }
        word_places places{};
        for (std::size_t angle = 0; angle < half; angle += word_block) {
            const std::size_t first = rope.first_place(angle);
            const std::size_t second = rope.second_place(angle);
            for (std::size_t i = 0; i < word_block; ++i) {
                if (first % word_block != 0 || second % word_block != 0 || rope.first_place(angle + i) != first + i ||
                    rope.second_place(angle + i) != second + i) {
                    return made;
                }
            }
            places[first / word_block] = static_cast<std::uint16_t>(angle);
            places[second / word_block] = static_cast<std::uint16_t>(half + angle);
        }
        auto angles = aligned_buffer<std::int16_t>::allocate(tile_tokens * dim);
        if (!angles) {
            return angles.error();
        }
        made.places = places;
        made.serves = true;
        made.angles = std::move(angles).value();
        for (std::size_t i = 0; i < tile_tokens * dim; ++i) {
            const double unit = static_cast<double>(rope.table()[i]) / attention_factor;
            made.angles[i] = static_cast<std::int16_t>(std::lrint(32767.0 * unit));
        }
        made.factor = static_cast<float>(attention_factor);
        return made;
    }
};

}  // namespace detail

/// Scores of keys reconstructed in whole numbers, turned to their positions if asked.
/// Numerics: keys as `detail::word_decoder` says, queries rounded to 16 bits (by half of 1/65000 of the sum of their
///           magnitudes, 1/65534 of the largest at least), cosines to 1/65534, turned keys to 1/22000 of their reach.
class word_key_reader final : public key_reader {
public:
    /// `turn` is left unset where keys are read as they are.
    explicit word_key_reader(detail::word_decoder decoder, detail::word_turn turn = {}) noexcept
        : decoder_(std::move(decoder)), turn_(std::move(turn)) {
        if (!turn_.serves) {
            turn_.places = detail::places_as_they_are();
        }
    }
    [[nodiscard]] std::size_t bytes() const noexcept override {
        return sizeof(*this) + decoder_.bytes() + turn_.angles.bytes();
    }
    [[nodiscard]] std::size_t scratch_bytes(std::size_t rows) const noexcept override {
        return scratch(nullptr, rows).bytes;
    }
    [[nodiscard]] bool pays(std::size_t /*rows*/, std::size_t /*tokens*/) const noexcept override { return true; }
    void prepare(row_block<const float> queries, std::byte* memory) const noexcept override {
        round(queries, scratch(memory, queries.count));
    }
    void scores(const coded_tiles& tiles, std::size_t rows, float* out, std::size_t out_stride,
                std::byte* memory) const noexcept override {
        scores(
            tiles, rows, [](std::size_t, const scratch_parts&) {}, out, out_stride, scratch(memory, rows));
    }
    /// The same for keys that are turned: `queries(tile)` gives those of a tile, turned back by its position.
    template <class Queries>
    void turned_scores(const coded_tiles& tiles, std::size_t rows, Queries&& queries, float* out,
                       std::size_t out_stride, std::byte* memory) const noexcept {
        const auto prepare_tile = [&](std::size_t tile, const scratch_parts& to) { round(queries(tile), to); };
        scores(tiles, rows, prepare_tile, out, out_stride, scratch(memory, rows));
    }

private:
    struct scratch_parts {
        std::int16_t* queries;  // [rows, dim]
        float* steps;           // [rows]
        std::int16_t* keys;     // [word_rows_at_once, dim]
        code_t* codes;
        std::size_t bytes;
    };
    [[nodiscard]] scratch_parts scratch(std::byte* memory, std::size_t rows) const noexcept {
        detail::scratch_dealer dealer(memory);
        scratch_parts parts{};
        parts.queries = dealer.take<std::int16_t>(rows * decoder_.dim());
        parts.steps = dealer.take<float>(rows);
        parts.keys = dealer.take<std::int16_t>(word_rows_at_once * decoder_.dim());
        parts.codes = dealer.take<code_t>(decoder_.code_count());
        parts.bytes = dealer.used();
        return parts;
    }
    void round(row_block<const float> queries, const scratch_parts& to) const noexcept {
        for (std::size_t row = 0; row < queries.count; ++row) {
            to.steps[row] = decoder_.kernels().round(queries.data + row * queries.stride, decoder_.dim(),
                                                     turn_.places.data(), to.queries + row * decoder_.dim());
        }
    }
    template <class PrepareTile>
    void scores(const coded_tiles& tiles, std::size_t rows, PrepareTile&& prepare_tile, float* out,
                std::size_t out_stride, const scratch_parts& work) const noexcept {
        const std::size_t dim = decoder_.dim();
        for (std::size_t tile = 0; tile < tiles.tiles.count; ++tile, out += tile_tokens) {
            float scales[tile_tokens];
            detail::load_scales(tiles, tile, decoder_.all_kernels(), scales);
            for (float& scale : scales) {
                scale *= decoder_.step() * turn_.factor;
            }
            prepare_tile(tile, work);
            decoder_.unpack(tiles, tile, work.codes);
            for (std::size_t first = 0; first < tile_tokens; first += word_rows_at_once) {
                decoder_.decode(tiles, tile, work.codes, first, turn_.places.data(), work.keys);
                const std::int16_t* const angles =
                    turn_.angles.size() == 0 ? nullptr : turn_.angles.data() + first * dim;
                decoder_.kernels().scores(work.keys, dim, angles, work.queries, rows, work.steps, scales + first,
                                          out + first, out_stride);
            }
        }
    }

    detail::word_decoder decoder_;
    detail::word_turn turn_;
};

/// Sums of values reconstructed in whole numbers.
/// Numerics: values as `detail::word_decoder` says; of the weights of a tile, each is rounded by half of 1/65000 of
///           their sum (1/65534 of the largest, if that is more); float32 sums of tiles.
class word_value_reader final : public value_reader {
public:
    explicit word_value_reader(detail::word_decoder decoder) noexcept : decoder_(std::move(decoder)) {}
    [[nodiscard]] std::size_t bytes() const noexcept override { return sizeof(*this) + decoder_.bytes(); }
    [[nodiscard]] std::size_t scratch_bytes(std::size_t rows) const noexcept override {
        return scratch(nullptr, rows).bytes;
    }
    [[nodiscard]] bool pays(std::size_t /*rows*/, std::size_t /*tokens*/) const noexcept override { return true; }
    void begin(std::size_t rows, std::byte* memory) const noexcept override {
        std::fill_n(scratch(memory, rows).sums, rows * decoder_.dim(), 0.0F);
    }
    void add(const coded_tiles& tiles, std::size_t rows, const float* weights, std::size_t weights_stride,
             std::byte* memory) const noexcept override {
        const scratch_parts work = scratch(memory, rows);
        const std::size_t dim = decoder_.dim();
        for (std::size_t tile = 0; tile < tiles.tiles.count; ++tile, weights += tile_tokens) {
            float scales[tile_tokens];
            detail::load_scales(tiles, tile, decoder_.all_kernels(), scales);
            for (std::size_t row = 0; row < rows; ++row) {
                float scaled[tile_tokens];
                std::memcpy(scaled, weights + row * weights_stride, sizeof(scaled));
                decoder_.all_kernels().attention.multiply(scaled, scales, tile_tokens);
                work.steps[row] = decoder_.step() * decoder_.kernels().round(scaled, tile_tokens, nullptr,
                                                                             work.weights + row * tile_tokens);
            }
            decoder_.unpack(tiles, tile, work.codes);
            for (std::size_t first = 0; first < tile_tokens; first += word_rows_at_once) {
                decoder_.decode(tiles, tile, work.codes, first, places_.data(), work.values + first * dim);
            }
            decoder_.kernels().add(work.values, dim, work.weights, rows, work.steps, work.sums);
        }
    }
    void rescale(const float* factors, std::size_t rows, std::byte* memory) const noexcept override {
        float* const sums = scratch(memory, rows).sums;
        for (std::size_t i = 0; i < rows * decoder_.dim(); ++i) {
            sums[i] *= factors[i / decoder_.dim()];
        }
    }
    void finish(std::size_t rows, row_block<float> out, std::byte* memory) const noexcept override {
        const float* const sums = scratch(memory, rows).sums;
        for (std::size_t row = 0; row < rows; ++row) {
            std::memcpy(out.data + row * out.stride, sums + row * decoder_.dim(), decoder_.dim() * sizeof(float));
        }
    }

private:
    struct scratch_parts {
        float* sums;            // [rows, dim]
        std::int16_t* weights;  // [rows, tile_tokens]
        float* steps;           // [rows]
        std::int16_t* values;   // [tile_tokens, dim]
        code_t* codes;
        std::size_t bytes;
    };
    [[nodiscard]] scratch_parts scratch(std::byte* memory, std::size_t rows) const noexcept {
        detail::scratch_dealer dealer(memory);
        scratch_parts parts{};
        parts.sums = dealer.take<float>(rows * decoder_.dim());
        parts.weights = dealer.take<std::int16_t>(rows * tile_tokens);
        parts.steps = dealer.take<float>(rows);
        parts.values = dealer.take<std::int16_t>(tile_tokens * decoder_.dim());
        parts.codes = dealer.take<code_t>(decoder_.code_count());
        parts.bytes = dealer.used();
        return parts;
    }

    detail::word_decoder decoder_;
    detail::word_places places_ = detail::places_as_they_are();
};

RVQKV_NAMESPACE_END
