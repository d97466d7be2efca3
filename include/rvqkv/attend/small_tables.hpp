// SPDX-License-Identifier: MIT
/// @file
/// Attention on codes of small codebooks (up to 256 codewords), straight from the pages: keys by tables of what each
/// codeword adds to a score, values by tables of what it adds to a channel. The tables fit in registers and the L1
/// cache, and the codes are all that comes from memory.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/readers.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "rvqkv/simd/kernels.hpp"
#include "rvqkv/simd/small_scan.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>

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
        to.tiles = {to.rows, from.count, ahead,        layout.heads() * groups * layout.row_bytes(), layout.row_bytes(),
                    depths,  groups,     layout.bits()};
    }

    /// The tokens' scales in float32, or null if there are none.
    [[nodiscard]] static const float* load_scales(const page_tiles& from, const coded_layout& layout, std::size_t head,
                                                  const kernel_table& kernels, float* scales) noexcept {
        if (!layout.has_scales()) {
            return nullptr;
        }
        const std::size_t bytes = tile_tokens * size_of(layout.scale_type());
        const auto at = [&](std::size_t i) {
            return from.tiles[i].page + layout.scales(head) + from.tiles[i].tile * bytes;
        };
        for (std::size_t i = from.count; i < std::min(2 * from.count, from.count + from.ahead); ++i) {
            for (std::size_t line = 0; line < bytes; line += 64) {
                __builtin_prefetch(at(i) + line);
            }
        }
        for (std::size_t i = 0; i < from.count; ++i) {
            float* const out = scales + i * tile_tokens;
            switch (layout.scale_type()) {
                case dtype::float32: std::memcpy(out, at(i), bytes); break;
                case dtype::float16:
                    kernels.from_float16(reinterpret_cast<const float16*>(at(i)), out, tile_tokens);
                    break;
                case dtype::bfloat16:
                    kernels.from_bfloat16(reinterpret_cast<const bfloat16*>(at(i)), out, tile_tokens);
                    break;
            }
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

/// Scores of queries with the keys that codes stand for, by tables: `<query, codeword>` is worked out once for each
/// place and codeword, rounded, and what is left for each token is to add up entries. Immutable; any number of threads
/// may use one, each with scratch memory of its own. Numerics: an entry is rounded to 1/1848 of the widest table's
/// range; the entries' sum is exact. Scores are the same bits
///           at every SIMD level.
class small_key_tables {
public:
    /// Whether there can be tables for such a codebook.
    [[nodiscard]] static bool supports(const codebook_shape& shape) noexcept {
        return shape.codewords != 0 && code_bits(shape.codewords) <= most_scan_bits && shape.depths != 0 &&
               shape.depths <= most_value_depths && shape.dim != 0;
    }
    /// Tables for heads of `head_dim` channels with the codebook `[depths, codewords, dim]`.
    /// Errors: `unsupported` where `supports` says no; `invalid_argument` for sizes that do not fit; `out_of_memory`.
    template <TensorElement Weight>
    [[nodiscard]] static result<small_key_tables> create(const codebook_shape& shape, std::span<const Weight> weights,
                                                         std::size_t head_dim) {
        auto checked = detail::small_tables_shape::create(shape, weights.size(), head_dim);
        if (!checked) {
            return checked.error();
        }
        small_key_tables made(checked.value());
        auto book = aligned_buffer<float>::allocate(shape.depths * shape.dim * made.shape_.slots);
        if (!book) {
            return book.error();
        }
        made.book_ = std::move(book).value();
        float* at = made.book_.data();
        for (std::size_t depth = 0; depth < shape.depths; ++depth) {
            for (std::size_t j = 0; j < shape.dim; ++j) {
                for (std::size_t c = 0; c < made.shape_.slots; ++c) {
                    const std::size_t codeword = c < shape.codewords ? c : 0;
                    *at++ = to_float(weights[(depth * shape.codewords + codeword) * shape.dim + j]);
                }
            }
        }
        return made;
    }
    [[nodiscard]] std::size_t bytes() const noexcept { return book_.bytes(); }

    /// Bytes of scratch memory, aligned to 64, for so many queries.
    [[nodiscard]] std::size_t scratch_bytes(std::size_t queries) const noexcept {
        return parts(nullptr, queries).bytes;
    }

    /// Makes the tables of `queries` queries `[queries, head_dim]`, channels in the codec's order, rows side by side.
    void prepare(const float* x, std::size_t queries, std::byte* scratch,
                 const kernel_table& kernels = best_kernels()) const noexcept {
        const scratch_parts to = parts(scratch, queries);
        const std::size_t head_dim = shape_.groups * shape_.book.dim;
        const std::size_t table_bytes = shape_.groups * 2 * shape_.slots;
        for (std::size_t i = 0; i < queries; ++i, x += head_dim) {
            kernels.small_scan->fill_scores(x, book_.data(), shape_.book.depths, shape_.groups, shape_.book.dim,
                                            shape_.slots, to.products, to.digits + i * table_bytes,
                                            queries * table_bytes, to.steps + i, to.starts + i, queries);
            float zeros = 0.0F;  // or NaN
            for (std::size_t j = 0; j < head_dim; ++j) {
                zeros += 0.0F * x[j];
            }
            for (std::size_t depth = 0; depth < shape_.book.depths; ++depth) {
                to.starts[depth * queries + i] += zeros;
            }
        }
    }

    /// `scores[i * stride + token]`, of query `i` with each token of the tiles, the token's scale included; by the
    /// first `depths` depths. Scores of tokens that the page does not hold mean nothing, and may be NaN. Preconditions:
    /// `prepare` filled the scratch memory for as many queries; the tiles' pages have this layout.
    void scores(page_tiles tiles, const coded_layout& layout, std::size_t head, std::size_t depths, std::size_t queries,
                float* scores, std::size_t stride, std::byte* scratch,
                const kernel_table& kernels = best_kernels()) const noexcept {
        constexpr std::size_t at_once = detail::small_tables_shape::most_tiles;
        const scratch_parts from = parts(scratch, queries);
        RVQKV_ASSERT(depths >= 1);
        const score_tables tables = {from.digits, queries, from.steps, from.starts + (depths - 1) * queries};
        for (std::size_t first = 0; first < tiles.count; first += at_once) {
            const page_tiles now = tiles.part(first, at_once);
            detail::small_tables_shape::located located;
            shape_.locate(now, layout, head, depths, located);
            alignas(64) float scales[at_once * tile_tokens];
            const float* const scale = detail::small_tables_shape::load_scales(now, layout, head, kernels, scales);
            kernels.small_scan->scan_scores(located.tiles, tables, scale, scores + first * tile_tokens, stride);
        }
    }

private:
    explicit small_key_tables(const detail::small_tables_shape& shape) noexcept : shape_(shape) {}

    struct scratch_parts {
        float* steps;
        float* starts;
        float* products;
        std::uint8_t* digits;
        std::size_t bytes;
    };
    [[nodiscard]] scratch_parts parts(std::byte* scratch, std::size_t queries) const noexcept {
        detail::small_tables_shape::carver memory(scratch);
        const std::size_t entries = shape_.book.depths * shape_.groups * shape_.slots;
        scratch_parts made{};
        made.steps = memory.take<float>(queries);
        made.starts = memory.take<float>(shape_.book.depths * queries);
        made.products = memory.take<float>(entries + shape_.book.depths * shape_.groups);
        made.digits = memory.take<std::uint8_t>(2 * queries * entries);
        made.bytes = memory.used();
        return made;
    }

    detail::small_tables_shape shape_;
    aligned_buffer<float> book_;  // [depths, dim, slots]
};

/// Sums of the values that codes stand for, times weights, by tables. Immutable, as `small_key_tables` is.
/// Numerics: weights are rounded to 1/255 of the largest of 64 (four neighbours in each of 16 tiles); a value to bytes,
/// or a sum of up to three bytes where
///           one step would lose more than `most_error`. Sums are the same bits at every SIMD level.
class small_value_tables {
public:
    /// Error of a value, relative to the standard deviation, for which another plane is made.
    static constexpr float most_error = 0.011F;

    /// Whether there can be tables for such a codebook.
    [[nodiscard]] static bool supports(const codebook_shape& shape) noexcept {
        return small_key_tables::supports(shape);
    }
    /// @copydoc small_key_tables::create
    template <TensorElement Weight>
    [[nodiscard]] static result<small_value_tables> create(const codebook_shape& shape, std::span<const Weight> weights,
                                                           std::size_t head_dim) {
        auto checked = detail::small_tables_shape::create(shape, weights.size(), head_dim);
        if (!checked) {
            return checked.error();
        }
        small_value_tables made(checked.value());
        auto entries = aligned_buffer<std::int8_t>::allocate(shape.depths * shape.dim * made.shape_.slots);
        auto numbers = aligned_buffer<float>::allocate((2 * shape.depths + most_value_planes + 1) * shape.dim);
        if (!entries || !numbers) {
            return entries ? numbers.error() : entries.error();
        }
        made.entries_ = std::move(entries).value();
        made.numbers_ = std::move(numbers).value();
        made.build([&](std::size_t depth, std::size_t codeword, std::size_t j) {
            return to_float(weights[(depth * shape.codewords + codeword) * shape.dim + j]);
        });
        return made;
    }
    [[nodiscard]] std::size_t bytes() const noexcept { return entries_.bytes() + numbers_.bytes(); }
    [[nodiscard]] std::size_t planes() const noexcept { return planes_; }
    /// What rounding the values loses, relative to their standard deviation.
    [[nodiscard]] float error() const noexcept { return error_; }

    /// Bytes of scratch memory, aligned to 64, for so many rows of weights.
    [[nodiscard]] std::size_t scratch_bytes(std::size_t rows) const noexcept { return parts(nullptr, rows).bytes; }

    /// Starts sums of `rows` rows at zero.
    void begin(std::size_t rows, std::byte* scratch) const noexcept {
        const scratch_parts to = parts(scratch, rows);
        std::memset(to.sums, 0, channels() * rows * value_lanes * sizeof(float));
        std::memset(to.totals, 0, shape_.book.depths * rows * value_lanes * sizeof(float));
    }

    /// Adds each token of the tiles, by its first `depths` depths, times its scale and `weights[row * stride + token]`.
    /// Preconditions: `begin` came before; the tiles' pages have this layout; weights are not negative, and zero for
    /// tokens
    ///                that the page does not hold.
    void add(page_tiles tiles, const coded_layout& layout, std::size_t head, std::size_t depths, const float* weights,
             std::size_t stride, std::size_t rows, std::byte* scratch,
             const kernel_table& kernels = best_kernels()) const noexcept {
        const scratch_parts to = parts(scratch, rows);
        RVQKV_ASSERT(depths >= 1);
        value_tables tables;
        tables.entries = entries_.data();
        tables.dim = shape_.book.dim;
        tables.planes = planes_;
        std::copy_n(plane_ends_, most_value_planes, tables.plane_ends);
        tables.ratios = numbers_.data();
        for (std::size_t first = 0; first < tiles.count; first += scan_block) {
            const page_tiles now = tiles.part(first, scan_block);
            detail::small_tables_shape::located located;
            shape_.locate(now, layout, head, depths, located);
            alignas(64) float scales[scan_block * tile_tokens];
            const float* const scale = detail::small_tables_shape::load_scales(now, layout, head, kernels, scales);
            kernels.small_scan->round_weights(weights + first * tile_tokens, stride, rows, now.count, scale, to.rounded,
                                              to.steps, to.totals + (depths - 1) * rows * value_lanes);
            kernels.small_scan->add_values(located.tiles, tables, rows, to.rounded, to.steps, to.codes, to.sums);
        }
    }

    /// Multiplies each row's sums by its factor.
    void rescale(const float* factors, std::size_t rows, std::byte* scratch,
                 const kernel_table& kernels = best_kernels()) const noexcept {
        const scratch_parts to = parts(scratch, rows);
        kernels.small_scan->multiply_rows(to.sums, channels(), rows, factors);
        kernels.small_scan->multiply_rows(to.totals, shape_.book.depths, rows, factors);
    }

    /// Writes the sums, `[rows, head_dim]`, channels in the codec's order. The scratch memory stays as it is.
    void finish(float* out, std::size_t rows, std::byte* scratch,
                const kernel_table& kernels = best_kernels()) const noexcept {
        const scratch_parts from = parts(scratch, rows);
        const std::size_t dim = shape_.book.dim;
        const float* const steps = numbers_.data() + most_value_planes * dim;
        const float* const means = steps + dim;
        kernels.small_scan->add_lanes(from.sums, channels() * rows, from.out);
        kernels.small_scan->add_lanes(from.totals, shape_.book.depths * rows, from.weights);
        for (std::size_t row = 0; row < rows; ++row) {
            for (std::size_t j = 0; j < dim; ++j) {
                float mean = 0.0F;
                for (std::size_t depth = 0; depth < shape_.book.depths; ++depth) {
                    mean += from.weights[depth * rows + row] * means[depth * dim + j];
                }
                for (std::size_t g = 0; g < shape_.groups; ++g) {
                    const std::size_t channel = g * dim + j;
                    out[row * channels() + channel] = from.out[channel * rows + row] * steps[j] + mean;
                }
            }
        }
    }

private:
    explicit small_value_tables(const detail::small_tables_shape& shape) noexcept : shape_(shape) {}
    [[nodiscard]] std::size_t channels() const noexcept { return shape_.groups * shape_.book.dim; }

    struct scratch_parts {
        float* sums;
        float* totals;
        float* out;
        float* weights;
        float* steps;
        std::uint8_t* rounded;
        std::uint8_t* codes;
        std::size_t bytes;
    };
    [[nodiscard]] scratch_parts parts(std::byte* scratch, std::size_t rows) const noexcept {
        detail::small_tables_shape::carver memory(scratch);
        scratch_parts made{};
        made.sums = memory.take<float>(channels() * rows * value_lanes);
        made.totals = memory.take<float>(shape_.book.depths * rows * value_lanes);
        made.out = memory.take<float>(channels() * rows);
        made.weights = memory.take<float>(shape_.book.depths * rows);
        made.steps = memory.take<float>(rows * value_lanes);
        made.rounded = memory.take<std::uint8_t>(scan_block * rows * tile_tokens);
        made.codes = memory.take<std::uint8_t>(shape_.groups * (shape_.book.depths * scan_block + 1) * tile_tokens);
        made.bytes = memory.used();
        return made;
    }

    /// Range of one depth's channel: what its entries are centered by, and half its width.
    struct range {
        float middle;
        float half;
    };
    template <class WeightAt>
    [[nodiscard]] range range_of(WeightAt weight, std::size_t depth, std::size_t j) const {
        float low = weight(depth, 0, j);
        float high = low;
        for (std::size_t c = 1; c < shape_.book.codewords; ++c) {
            low = std::min(low, weight(depth, c, j));
            high = std::max(high, weight(depth, c, j));
        }
        return {0.5F * low + 0.5F * high, 0.5F * high - 0.5F * low};
    }
    /// Step of a channel of the plane of depths [first, end): their entries may not leave a byte.
    template <class WeightAt>
    [[nodiscard]] float step_of(WeightAt weight, std::size_t first, std::size_t end, std::size_t j) const {
        float half = 0.0F;
        for (std::size_t depth = first; depth < end; ++depth) {
            half += range_of(weight, depth, j).half;
        }
        return std::max(half / (127.0F - 0.5F * static_cast<float>(end - first)), 1e-30F);
    }
    template <class WeightAt>
    void build(WeightAt weight) {
        const std::size_t depths = shape_.book.depths;
        const std::size_t dim = shape_.book.dim;
        double signal = 0.0;
        for (std::size_t depth = 0; depth < depths; ++depth) {
            for (std::size_t j = 0; j < dim; ++j) {
                double sum = 0.0;
                double squares = 0.0;
                for (std::size_t c = 0; c < shape_.book.codewords; ++c) {
                    const double w = static_cast<double>(weight(depth, c, j));
                    sum += w;
                    squares += w * w;
                }
                const double count = static_cast<double>(shape_.book.codewords);
                signal += std::max(squares / count - sum / count * (sum / count), 0.0);
            }
        }
        // Noise of the plane of depths [first, end).
        const auto noise = [&](std::size_t first, std::size_t end) {
            double squares = 0.0;
            for (std::size_t j = 0; j < dim; ++j) {
                const double step = static_cast<double>(step_of(weight, first, end, j));
                squares += step * step;
            }
            return squares * static_cast<double>(end - first) / 12.0;
        };
        const double wanted = signal * static_cast<double>(most_error) * static_cast<double>(most_error);
        double least = noise(0, depths);
        plane_ends_[0] = depths;
        planes_ = 1;
        for (std::size_t planes = 2; planes <= std::min(most_value_planes, depths) && least > wanted; ++planes) {
            for (std::size_t a = 1; a < depths; ++a) {
                for (std::size_t b = planes == 2 ? depths : a + 1; b < (planes == 2 ? depths + 1 : depths); ++b) {
                    const double sum = noise(0, a) + noise(a, b) + (b < depths ? noise(b, depths) : 0.0);
                    if (sum < least) {
                        least = sum;
                        planes_ = planes;
                        plane_ends_[0] = a;
                        plane_ends_[1] = b;
                        plane_ends_[2] = depths;
                    }
                }
            }
        }
        error_ = signal > 0.0 ? static_cast<float>(std::sqrt(least / signal)) : 0.0F;

        float* const ratios = numbers_.data();
        float* const steps = ratios + most_value_planes * dim;
        float* const means = steps + dim;
        for (std::size_t j = 0; j < dim; ++j) {
            std::size_t first = planes_ == 1 ? 0 : plane_ends_[planes_ - 2];
            steps[j] = step_of(weight, first, depths, j);
            first = 0;
            for (std::size_t p = 0; p < planes_; ++p) {
                const float step = step_of(weight, first, plane_ends_[p], j);
                ratios[p * dim + j] = step / steps[j];
                for (std::size_t depth = first; depth < plane_ends_[p]; ++depth) {
                    round_entries(weight, depth, j, step, means);
                }
                first = plane_ends_[p];
            }
        }
    }
    /// One channel's entries of one depth, and what they lack on average.
    template <class WeightAt>
    void round_entries(WeightAt weight, std::size_t depth, std::size_t j, float step, float* means) {
        const std::size_t dim = shape_.book.dim;
        const float middle = range_of(weight, depth, j).middle;
        std::int8_t* const entries = entries_.data() + (depth * dim + j) * shape_.slots;
        double lost = 0.0;
        for (std::size_t c = 0; c < shape_.slots; ++c) {
            const float w = weight(depth, c < shape_.book.codewords ? c : 0, j);
            const float entry = std::nearbyint((w - middle) / step);
            entries[c] = static_cast<std::int8_t>(entry);
            if (c < shape_.book.codewords) {
                lost += static_cast<double>(w) - static_cast<double>(entry) * static_cast<double>(step);
            }
        }
        // With the depths before it: what a token of so many depths is to get.
        means[depth * dim + j] = static_cast<float>(lost / static_cast<double>(shape_.book.codewords)) +
                                 (depth == 0 ? 0.0F : means[(depth - 1) * dim + j]);
    }

    detail::small_tables_shape shape_;
    aligned_buffer<std::int8_t> entries_;  // [depths, dim, slots]
    aligned_buffer<float> numbers_;        // ratios [most_value_planes, dim], steps [dim], means [depths, dim]
    std::size_t planes_ = 0;
    std::size_t plane_ends_[most_value_planes] = {};
    float error_ = 0.0F;
};

RVQKV_NAMESPACE_END
