// SPDX-License-Identifier: MIT
/// @file
/// Weighted sums of values coded by small codebooks (up to 256 codewords), straight from the pages: tables of what each
/// codeword adds to a channel fit in registers, and the codes are all that comes from memory.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/readers.hpp"
#include "rvqkv/attend/small_key_tables.hpp"
#include "rvqkv/attend/small_tables_shape.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/quantize/byte_grid.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "rvqkv/simd/kernels.hpp"
#include "rvqkv/simd/small_scan.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// Sums of the values that codes stand for, times weights, by tables. Immutable, as `small_key_tables` is.
/// Numerics: weights are rounded to 1/255 of the largest of 64 (four neighbours in each of 16 tiles); values not at all
///           where each channel lies on a `byte_grid`, else to bytes, or sums of up to three bytes where one step would
///           lose more than `most_error`. Sums are the same bits at every SIMD level.
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
        auto floats = aligned_buffer<float>::allocate(shape.size());
        if (!entries || !numbers || !floats) {
            return !entries ? entries.error() : !numbers ? numbers.error() : floats.error();
        }
        made.entries_ = std::move(entries).value();
        made.numbers_ = std::move(numbers).value();
        std::transform(weights.begin(), weights.end(), floats.value().data(), [](Weight w) { return to_float(w); });
        made.build(floats.value().span());
        return made;
    }
    [[nodiscard]] std::size_t bytes() const noexcept { return entries_.bytes() + numbers_.bytes(); }
    [[nodiscard]] std::size_t planes() const noexcept { return planes_; }
    /// What rounding the values loses, relative to their standard deviation.
    [[nodiscard]] float error() const noexcept { return error_; }
    /// The most that a channel of a token can be off, before its scale, beside what rounding the weights loses.
    [[nodiscard]] float worst_error() const noexcept {
        if (is_exact_) {
            return 0.0F;
        }
        const std::size_t dim = shape_.book.dim;
        const float* const steps = numbers_.data() + most_value_planes * dim;
        float worst = 0.0F;
        for (std::size_t j = 0; j < dim; ++j) {
            float sum = 0.0F;  // half a step for each entry, and as much for what they lack on average
            std::size_t first = 0;
            for (std::size_t p = 0; p < planes_; ++p) {
                sum += static_cast<float>(plane_ends_[p] - first) * numbers_[p * dim + j] * steps[j];
                first = plane_ends_[p];
            }
            worst = std::max(worst, sum);
        }
        return 1.001F * worst;
    }

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
    ///                tokens that the page does not hold.
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
        made.codes = memory.take<std::uint8_t>(shape_.book.depths * scan_block * tile_tokens);
        made.bytes = memory.used();
        return made;
    }

    [[nodiscard]] float weight(std::span<const float> weights, std::size_t depth, std::size_t codeword,
                               std::size_t j) const noexcept {
        return weights[(depth * shape_.book.codewords + codeword) * shape_.book.dim + j];
    }
    /// Step of a channel of the plane of depths [first, end): their entries may not leave a byte.
    [[nodiscard]] float step_of(std::span<const float> weights, std::size_t first, std::size_t end,
                                std::size_t j) const noexcept {
        if (is_exact_) {
            return byte_grid::of(shape_.book, weights, j).step;
        }
        float half = 0.0F;
        for (std::size_t depth = first; depth < end; ++depth) {
            const auto range = detail::weight_range::of(shape_.book, weights, depth, j);
            half += 0.5F * range.high - 0.5F * range.low;
        }
        return std::max(half / (127.0F - 0.5F * static_cast<float>(end - first)), 1e-30F);
    }
    /// The variance of codewords, chosen alike, summed over depths and channels.
    [[nodiscard]] double signal_of(std::span<const float> weights) const noexcept {
        double signal = 0.0;
        for (std::size_t depth = 0; depth < shape_.book.depths; ++depth) {
            for (std::size_t j = 0; j < shape_.book.dim; ++j) {
                double sum = 0.0;
                double squares = 0.0;
                for (std::size_t c = 0; c < shape_.book.codewords; ++c) {
                    const double w = static_cast<double>(weight(weights, depth, c, j));
                    sum += w;
                    squares += w * w;
                }
                const double count = static_cast<double>(shape_.book.codewords);
                signal += std::max(squares / count - sum / count * (sum / count), 0.0);
            }
        }
        return signal;
    }
    /// As few planes as are exact enough, and the best of so many.
    void choose_planes(std::span<const float> weights) noexcept {
        const std::size_t depths = shape_.book.depths;
        plane_ends_[0] = depths;
        planes_ = 1;
        if (is_exact_) {
            return;
        }
        // Noise of the plane of depths [first, end).
        const auto noise = [&](std::size_t first, std::size_t end) {
            double squares = 0.0;
            for (std::size_t j = 0; j < shape_.book.dim; ++j) {
                const double step = static_cast<double>(step_of(weights, first, end, j));
                squares += step * step;
            }
            return squares * static_cast<double>(end - first) / 12.0;
        };
        const double signal = signal_of(weights);
        const double wanted = signal * static_cast<double>(most_error) * static_cast<double>(most_error);
        double least = noise(0, depths);
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
    }
    void build(std::span<const float> weights) noexcept {
        const std::size_t depths = shape_.book.depths;
        const std::size_t dim = shape_.book.dim;
        is_exact_ = true;
        for (std::size_t j = 0; j < dim; ++j) {
            is_exact_ = is_exact_ && byte_grid::of(shape_.book, weights, j).step != 0.0F;
        }
        choose_planes(weights);
        float* const ratios = numbers_.data();
        float* const steps = ratios + most_value_planes * dim;
        float* const means = steps + dim;
        for (std::size_t j = 0; j < dim; ++j) {
            std::size_t first = planes_ == 1 ? 0 : plane_ends_[planes_ - 2];
            steps[j] = step_of(weights, first, depths, j);
            first = 0;
            for (std::size_t p = 0; p < planes_; ++p) {
                const float step = step_of(weights, first, plane_ends_[p], j);
                ratios[p * dim + j] = step / steps[j];
                for (std::size_t depth = first; depth < plane_ends_[p]; ++depth) {
                    round_entries(weights, depth, j, step, means);
                }
                first = plane_ends_[p];
            }
        }
    }
    /// One channel's entries of one depth, and what they lack on average.
    void round_entries(std::span<const float> weights, std::size_t depth, std::size_t j, float step,
                       float* means) noexcept {
        const std::size_t dim = shape_.book.dim;
        const auto range = detail::weight_range::of(shape_.book, weights, depth, j);
        const float middle =
            is_exact_ ? step * byte_grid::middle(range.low, range.high, step) : 0.5F * range.low + 0.5F * range.high;
        std::int8_t* const entries = entries_.data() + (depth * dim + j) * shape_.slots;
        double lost = 0.0;
        for (std::size_t c = 0; c < shape_.slots; ++c) {
            const float w = weight(weights, depth, c < shape_.book.codewords ? c : 0, j);
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
    bool is_exact_ = false;  // all channels lie on a byte_grid
};

RVQKV_NAMESPACE_END
