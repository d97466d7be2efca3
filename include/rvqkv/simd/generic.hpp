// SPDX-License-Identifier: MIT
/// @file
/// Plain C++ "registers" for the shared loops of `kernels.inl`: the fallback for machines without FMA, giving the same
/// bits as all others, and a second opinion in tests.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/simd/kernel_table.hpp"

#include <bit>
#include <cstddef>
#include <cstdint>

RVQKV_NAMESPACE_BEGIN
namespace generic {

inline constexpr simd_level level = simd_level::generic;
inline constexpr int lanes = 16;
inline constexpr int tile_rows = 1;
inline constexpr int tile_registers = 1;
struct reg {
    float lane[lanes];
};

/// `a * b + c` rounded once, on any machine. Where the target has the instruction the compiler uses it; elsewhere a
/// library call would cost ten times this: the product of two floats is exact in double, the sum is rounded to odd
/// (so that the second rounding, to float, cannot go wrong; Boldo and Melquiond, 2008).
inline float fused_multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    const double product = static_cast<double>(a) * static_cast<double>(b);
    const double addend = static_cast<double>(c);
    const double sum = product + addend;
    const double part = sum - product;
    const double lost = (product - (sum - part)) + (addend - part);  // exactly what the sum left out
    std::uint64_t bits = std::bit_cast<std::uint64_t>(sum);
    const bool inexact = lost < 0.0 || lost > 0.0;  // false for NaN
    const std::uint64_t even = ~bits & 1U;
    const std::uint64_t towards_zero = static_cast<std::uint64_t>((lost < 0.0) == (sum > 0.0));
    bits += inexact ? even - 2U * (even & towards_zero) : 0U;
    return static_cast<float>(std::bit_cast<double>(bits));
#endif
}

template <class T>
inline reg load(const T* from) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = to_float(from[i]);
    }
    return value;
}
template <class T>
inline void store(T* to, const reg& value) {
    for (int i = 0; i < lanes; ++i) {
        to[i] = float_to<T>(value.lane[i]);
    }
}
inline reg broadcast(const float* from) {
    reg value;
    for (float& lane : value.lane) {
        lane = *from;
    }
    return value;
}
inline reg fma(const reg& a, const reg& b, const reg& c) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = fused_multiply_add(a.lane[i], b.lane[i], c.lane[i]);
    }
    return value;
}
inline reg add(const reg& a, const reg& b) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = a.lane[i] + b.lane[i];
    }
    return value;
}
inline reg subtract(const reg& a, const reg& b) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = a.lane[i] - b.lane[i];
    }
    return value;
}
/// Where `score` beats `best`, takes it and notes the block.
inline void keep_greater(const reg& score, std::int32_t block, float* best, std::int32_t* best_block) {
    for (int i = 0; i < lanes; ++i) {
        const bool better = score.lane[i] > best[i];
        best[i] = better ? score.lane[i] : best[i];
        best_block[i] = better ? block : best_block[i];
    }
}

#include "rvqkv/simd/kernels.inl"

}  // namespace generic
RVQKV_NAMESPACE_END
