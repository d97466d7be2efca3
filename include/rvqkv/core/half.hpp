// SPDX-License-Identifier: MIT
/// @file
/// 16-bit storage types, `float16` (IEEE 754 binary16) and `bfloat16`, and their exact conversions, one value at a
/// time. Arrays are converted by the vectorized `convert` of `rvqkv/simd/convert.hpp`, bit for bit the same.
#pragma once

#include "rvqkv/core/config.hpp"

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>

RVQKV_NAMESPACE_BEGIN

/// The bits of an IEEE 754 binary16 number. Storage only: no arithmetic.
struct float16 {
    std::uint16_t bits = 0;
    friend bool operator==(float16, float16) = default;
};

/// The bits of a bfloat16 number: the upper half of a float32. Storage only: no arithmetic.
struct bfloat16 {
    std::uint16_t bits = 0;
    friend bool operator==(bfloat16, bfloat16) = default;
};

/// Exact; NaN stays NaN (made quiet, as hardware does).
[[nodiscard]] constexpr float to_float(float16 value) noexcept {
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000U) << 16U;
    const std::uint32_t exponent = (value.bits >> 10U) & 0x1fU;
    const std::uint32_t fraction = value.bits & 0x3ffU;
    if (exponent == 0x1f) {
        return std::bit_cast<float>(sign | 0x7f800000U | (fraction << 13U) | (fraction != 0 ? 0x400000U : 0U));
    }
    if (exponent != 0) {
        return std::bit_cast<float>(sign | ((exponent + 112U) << 23U) | (fraction << 13U));
    }
    const float magnitude = static_cast<float>(fraction) * 0x1p-24F;  // subnormal: exact in float32
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
}

/// Exact.
[[nodiscard]] constexpr float to_float(bfloat16 value) noexcept {
    return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16U);
}
[[nodiscard]] constexpr float to_float(float value) noexcept {
    return value;
}

/// Rounds to nearest, ties to even; beyond the range gives infinity; NaN stays NaN.
[[nodiscard]] constexpr float16 to_float16(float value) noexcept {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16U) & 0x8000U;
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    const auto make = [sign](std::uint32_t rest) { return float16{static_cast<std::uint16_t>(sign | rest)}; };
    if (magnitude > 0x7f800000U) {
        return make(0x7e00U | ((magnitude >> 13U) & 0x3ffU));
    }
    if (magnitude >= 0x477ff000U) {  // 65520 and above round to infinity
        return make(0x7c00U);
    }
    if (magnitude >= 0x38800000U) {  // normal in binary16
        return make((magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13U) & 1U)) >> 13U);
    }
    if (magnitude < 0x33000000U) {  // below half of the smallest subnormal
        return make(0);
    }
    // Subnormal: shift the full 24-bit significand right and round what falls off.
    const std::uint32_t shift = 126U - (magnitude >> 23U);
    const std::uint32_t significand = (magnitude & 0x7fffffU) | 0x800000U;
    const std::uint32_t kept = significand >> shift;
    const std::uint32_t dropped = significand & ((1U << shift) - 1U);
    const std::uint32_t half = 1U << (shift - 1U);
    return make(kept + ((dropped > half || (dropped == half && (kept & 1U) != 0U)) ? 1U : 0U));
}

/// Rounds to nearest, ties to even; NaN stays NaN (made quiet).
[[nodiscard]] constexpr bfloat16 to_bfloat16(float value) noexcept {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    if ((bits & 0x7fffffffU) > 0x7f800000U) {
        return {static_cast<std::uint16_t>((bits >> 16U) | 0x40U)};
    }
    return {static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16U) & 1U)) >> 16U)};
}

/// `float_to<T>(x)`: `x` as a `float`, `float16` or `bfloat16`.
template <class T>
[[nodiscard]] constexpr T float_to(float value) noexcept;
template <>
constexpr float float_to<float>(float value) noexcept {
    return value;
}
template <>
constexpr float16 float_to<float16>(float value) noexcept {
    return to_float16(value);
}
template <>
constexpr bfloat16 float_to<bfloat16>(float value) noexcept {
    return to_bfloat16(value);
}

/// Element types of tensors, scales and codebook weights.
enum class dtype : std::uint8_t { float32, float16, bfloat16 };

[[nodiscard]] constexpr std::size_t size_of(dtype type) noexcept {
    return type == dtype::float32 ? 4 : 2;
}
[[nodiscard]] constexpr std::string_view name_of(dtype type) noexcept {
    switch (type) {
        case dtype::float32: return "float32";
        case dtype::float16: return "float16";
        case dtype::bfloat16: return "bfloat16";
    }
    return "unknown";
}

template <class T>
inline constexpr dtype dtype_of = dtype::float32;
template <>
inline constexpr dtype dtype_of<float16> = dtype::float16;
template <>
inline constexpr dtype dtype_of<bfloat16> = dtype::bfloat16;

/// `float`, `float16` and `bfloat16`.
template <class T>
concept TensorElement = std::is_same_v<T, float> || std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>;

RVQKV_NAMESPACE_END
