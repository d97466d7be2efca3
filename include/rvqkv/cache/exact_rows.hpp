// SPDX-License-Identifier: MIT
/// @file
/// Rows of 16-bit numbers as exact pages hold them: finite, whatever was given.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/simd/convert.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// Whether there is a NaN or an infinity among 16-bit numbers.
[[nodiscard]] inline bool has_nonfinite(const std::uint16_t* row, std::size_t count, dtype type,
                                        const kernel_table& kernels) noexcept {
    return type == dtype::float16 ? !kernels.rows.finite_float16(reinterpret_cast<const float16*>(row), count)
                                  : !kernels.rows.finite_bfloat16(reinterpret_cast<const bfloat16*>(row), count);
}

/// Replaces NaNs and infinities by 0 and returns how many there were.
[[nodiscard]] inline std::size_t zero_nonfinite(float* row, std::size_t count, const kernel_table& kernels) noexcept {
    if (kernels.rows.all_finite(row, count)) {
        return 0;
    }
    std::size_t found = 0;
    for (std::size_t i = 0; i < count; ++i) {
        if (!std::isfinite(row[i])) {
            row[i] = 0.0F;
            ++found;
        }
    }
    return found;
}

/// Rounds numbers to a 16-bit type, and returns whether the results are all finite.
[[nodiscard]] inline bool round_finite(const float* in, std::uint16_t* out, std::size_t count, dtype type,
                                       const kernel_table& kernels) noexcept {
    return type == dtype::float16 ? kernels.rows.round_float16(in, reinterpret_cast<float16*>(out), count)
                                  : kernels.rows.round_bfloat16(in, reinterpret_cast<bfloat16*>(out), count);
}

/// Rounds finite numbers to a 16-bit type; those beyond its range become its largest.
inline void round_row(const float* in, std::uint16_t* out, std::size_t count, dtype type,
                      const kernel_table& kernels) noexcept {
    const std::uint16_t infinity = type == dtype::float16 ? 0x7c00U : 0x7f80U;
    if (!round_finite(in, out, count, type, kernels)) {
        for (std::size_t i = 0; i < count; ++i) {
            if ((out[i] & 0x7fffU) >= infinity) {
                out[i] = static_cast<std::uint16_t>((out[i] & 0x8000U) | (infinity - 1U));
            }
        }
    }
}

/// A 16-bit row as float32: exact.
inline void widen_row(const std::uint16_t* in, float* out, std::size_t count, dtype type,
                      const kernel_table& kernels) noexcept {
    if (type == dtype::float16) {
        convert(reinterpret_cast<const float16*>(in), out, count, kernels);
    } else {
        convert(reinterpret_cast<const bfloat16*>(in), out, count, kernels);
    }
}

}  // namespace detail
RVQKV_NAMESPACE_END
