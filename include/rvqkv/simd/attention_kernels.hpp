// SPDX-License-Identifier: MIT
/// @file
/// The part of the function table that attention uses.
#pragma once

#include "rvqkv/core/config.hpp"

#include <cstddef>

RVQKV_NAMESPACE_BEGIN

/// Pairs of places in a row that stand at regular distances: `(first + i * step, second + i * step)` for `i < count`,
/// to be turned by angle number `angle + i`.
struct channel_pairs {
    std::size_t first = 0;
    std::size_t second = 0;
    std::size_t step = 1;
    std::size_t count = 0;
    std::size_t angle = 0;
};

/// The inner loops of attention at one SIMD level.
struct attention_kernels {
    /// Turns the pairs of each of `rows` rows, in place: `(a, b)` becomes `(a cos - b sin, a sin + b cos)`. Row `i`
    /// takes its cosines and sines `angle_stride` numbers further than row `i - 1`. All levels give the same bits.
    void (*turn)(float* x, std::size_t rows, std::size_t stride, const channel_pairs* pairs, std::size_t runs,
                 const float* cosines, const float* sines, std::size_t angle_stride);
};

RVQKV_NAMESPACE_END
