// SPDX-License-Identifier: MIT
/// @file
/// Loops over one head's vector on its way to the codebooks: rounded to 16 bits, measured, scaled and dealt to groups.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"

#include <cstddef>

RVQKV_NAMESPACE_BEGIN

/// Sums over a row of the differences from its first channel.
struct row_moments {
    double sum = 0.0;
    double squares = 0.0;
};

/// Running sums that `row_kernels::moments` keeps: channel `i` goes to number `i % moment_sums`. In the end the upper
/// half of them is added to the lower one, until one is left.
inline constexpr std::size_t moment_sums = 16;

/// A part of `kernel_table`: all levels give the same bits.
struct row_kernels {
    /// As `kernel_table::to_float16` and `to_bfloat16`; returns whether all results are finite.
    bool (*round_float16)(const float* in, float16* out, std::size_t count);
    bool (*round_bfloat16)(const float* in, bfloat16* out, std::size_t count);
    /// Whether a row holds neither NaN nor infinity.
    bool (*all_finite)(const float* row, std::size_t count);
    bool (*finite_float16)(const float16* row, std::size_t count);
    bool (*finite_bfloat16)(const bfloat16* row, std::size_t count);
    /// The sums of `row[i] * shrink - row[0] * shrink` (rounded to float32) and of its square, in double.
    /// Preconditions: `count > 0`; `shrink` is a power of two that makes no number denormal.
    row_moments (*moments)(const float* row, std::size_t count, float shrink);
    /// `out[i] = in[i] / by`; `in` may be `out`.
    void (*divide)(const float* in, float by, std::size_t count, float* out);
    /// `out[g * dim + i] = in[i * groups + g] / by`.
    void (*divide_strided)(const float* in, float by, std::size_t groups, std::size_t dim, float* out);
};

RVQKV_NAMESPACE_END
