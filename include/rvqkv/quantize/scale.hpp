// SPDX-License-Identifier: MIT
/// @file
/// Scaling policies: by which number a head's vector is divided before it is quantized, and multiplied after. Write
/// your own type with the three members of `ScalePolicy`; `examples/custom_policies.cpp` shows one.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/simd/kernel_table.hpp"
#include "rvqkv/simd/row_kernels.hpp"

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>
#include <span>
#include <string_view>

RVQKV_NAMESPACE_BEGIN

/// A small value that measures one head's vector. Laws, which every policy is tested against:
///  - `measure(row)` of finite numbers is finite and above zero; a row of zeros gives 1;
///  - it follows the row: `measure(c * row) == |c| * measure(row)` within rounding (`is_stored()` policies);
///  - a policy that is not stored always measures 1.
/// A policy that also has `measure(row, kernels)`, which must give the same bits, is measured by that.
/// `name()` appears in files, reports and benchmarks; `is_stored()` tells whether each vector's scale is kept.
template <class P>
concept ScalePolicy = std::semiregular<P> && requires(const P policy, std::span<const float> row) {
    { policy.name() }
    noexcept->std::convertible_to<std::string_view>;
    { policy.is_stored() }
    noexcept->std::same_as<bool>;
    { policy.measure(row) }
    noexcept->std::same_as<float>;
};

namespace detail {

/// A measured size as a scale: nothing to divide by (zero, or below float32) gives 1, too large gives the largest
/// float.
[[nodiscard]] inline float scale_from(double size) noexcept {
    const float scale = static_cast<float>(std::min(size, static_cast<double>(std::numeric_limits<float>::max())));
    return scale > 0.0F ? scale : 1.0F;
}

/// Sum of the squares. Numerics: each square is exact in double, so no target rounds it differently.
[[nodiscard]] inline double squared_norm(std::span<const float> row) noexcept {
    double sum = 0.0;
    for (const float value : row) {
        sum += static_cast<double>(value) * static_cast<double>(value);
    }
    return sum;
}

/// `row_kernels::moments` in plain C++.
[[nodiscard]] inline row_moments moments_of(const float* row, std::size_t count, float shrink) noexcept {
    double sums[moment_sums] = {};
    double squares[moment_sums] = {};
    const float first = row[0] * shrink;
    for (std::size_t i = 0; i < count; ++i) {
        const double difference = static_cast<double>(row[i] * shrink - first);
        sums[i % moment_sums] += difference;
        squares[i % moment_sums] += difference * difference;  // exact in double, so no target rounds it differently
    }
    for (std::size_t half = moment_sums / 2; half > 0; half /= 2) {
        for (std::size_t i = 0; i < half; ++i) {
            sums[i] += sums[i + half];
            squares[i] += squares[i + half];
        }
    }
    return {sums[0], squares[0]};
}

/// What a policy measures, by the kernels where it can use them.
template <ScalePolicy Policy>
[[nodiscard]] float measure(const Policy& policy, std::span<const float> row, const kernel_table& kernels) noexcept {
    if constexpr (requires { policy.measure(row, kernels); }) {
        return policy.measure(row, kernels);
    } else {
        return policy.measure(row);
    }
}

}  // namespace detail

/// The paper's scale: the unbiased standard deviation over the channels; exactly 0 becomes 1. The mean is measured but
/// not removed.
/// Numerics: in double, on differences from the first channel, so that a constant row gives exactly 0; added in the
///           order that `row_kernels::moments` says, at every SIMD level.
/// Paper:    arXiv 2410.15704, section 3; reference code: `quantize` in vqllm/quantizer/utils.py.
struct std_dev_scale {
    [[nodiscard]] static constexpr std::string_view name() noexcept { return "std_dev"; }
    [[nodiscard]] static constexpr bool is_stored() noexcept { return true; }
    [[nodiscard]] float measure(std::span<const float> row) const noexcept {
        return measure_by(row, detail::moments_of);
    }
    /// The same bits.
    [[nodiscard]] float measure(std::span<const float> row, const kernel_table& kernels) const noexcept {
        return measure_by(row, kernels.rows.moments);
    }

private:
    template <class Moments>
    [[nodiscard]] static float measure_by(std::span<const float> row, const Moments& moments_of) noexcept {
        if (row.size() < 2) {
            return 1.0F;
        }
        float shrink = 1.0F;
        row_moments moments = moments_of(row.data(), row.size(), shrink);
        if (!std::isfinite(moments.squares)) {  // shrunk, differences of the largest floats stay finite
            shrink = 0.25F;
            moments = moments_of(row.data(), row.size(), shrink);
        }
        const double count = static_cast<double>(row.size());
        const double variance = std::fma(-moments.sum, moments.sum / count, moments.squares) / (count - 1.0);
        return detail::scale_from(std::sqrt(std::max(variance, 0.0)) * (shrink == 1.0F ? 1.0 : 4.0));
    }
};

/// Root of the mean square of the channels.
struct rms_scale {
    [[nodiscard]] static constexpr std::string_view name() noexcept { return "rms"; }
    [[nodiscard]] static constexpr bool is_stored() noexcept { return true; }
    [[nodiscard]] float measure(std::span<const float> row) const noexcept {
        return row.empty() ? 1.0F
                           : detail::scale_from(std::sqrt(detail::squared_norm(row) / static_cast<double>(row.size())));
    }
};

/// Euclidean length of the vector.
struct l2_norm_scale {
    [[nodiscard]] static constexpr std::string_view name() noexcept { return "l2_norm"; }
    [[nodiscard]] static constexpr bool is_stored() noexcept { return true; }
    [[nodiscard]] float measure(std::span<const float> row) const noexcept {
        return detail::scale_from(std::sqrt(detail::squared_norm(row)));
    }
};

/// Largest magnitude among the channels.
struct max_abs_scale {
    [[nodiscard]] static constexpr std::string_view name() noexcept { return "max_abs"; }
    [[nodiscard]] static constexpr bool is_stored() noexcept { return true; }
    [[nodiscard]] float measure(std::span<const float> row) const noexcept {
        float top = 0.0F;
        for (const float value : row) {
            top = std::max(top, std::fabs(value));
        }
        return detail::scale_from(static_cast<double>(top));
    }
};

/// No scaling: nothing measured, nothing stored.
struct no_scale {
    [[nodiscard]] static constexpr std::string_view name() noexcept { return "none"; }
    [[nodiscard]] static constexpr bool is_stored() noexcept { return false; }
    [[nodiscard]] float measure(std::span<const float>) const noexcept { return 1.0F; }
};

/// The policies above by run-time value, as files and command lines name them.
enum class scale_kind { std_dev, rms, l2_norm, max_abs, none };
inline constexpr scale_kind all_scale_kinds[] = {scale_kind::std_dev, scale_kind::rms, scale_kind::l2_norm,
                                                 scale_kind::max_abs, scale_kind::none};

/// One of the policies above, chosen at run time; the switch costs nothing beside quantizing the row.
class any_scale {
    template <class Visitor>
    auto visit(Visitor visitor) const noexcept {
        switch (kind_) {
            case scale_kind::std_dev: return visitor(std_dev_scale{});
            case scale_kind::rms: return visitor(rms_scale{});
            case scale_kind::l2_norm: return visitor(l2_norm_scale{});
            case scale_kind::max_abs: return visitor(max_abs_scale{});
            case scale_kind::none: break;
        }
        return visitor(no_scale{});
    }

public:
    any_scale() = default;
    any_scale(scale_kind kind) noexcept : kind_(kind) {}  // NOLINT: conversion intended
    [[nodiscard]] scale_kind kind() const noexcept { return kind_; }
    [[nodiscard]] std::string_view name() const noexcept {
        return visit([](const auto& policy) -> std::string_view { return policy.name(); });
    }
    [[nodiscard]] bool is_stored() const noexcept {
        return visit([](const auto& policy) { return policy.is_stored(); });
    }
    [[nodiscard]] float measure(std::span<const float> row) const noexcept {
        return visit([row](const auto& policy) { return policy.measure(row); });
    }
    /// The same bits.
    [[nodiscard]] float measure(std::span<const float> row, const kernel_table& kernels) const noexcept {
        return visit([&](const auto& policy) { return detail::measure(policy, row, kernels); });
    }

private:
    scale_kind kind_ = scale_kind::std_dev;
};

[[nodiscard]] inline std::string_view name_of(scale_kind kind) noexcept {
    return any_scale(kind).name();
}

static_assert(ScalePolicy<std_dev_scale> && ScalePolicy<rms_scale> && ScalePolicy<l2_norm_scale> &&
              ScalePolicy<max_abs_scale> && ScalePolicy<no_scale> && ScalePolicy<any_scale>);

/// What a scale becomes when it is stored as `type`: rounded, but neither 0 nor infinite. Vectors are divided by this
/// number, not by the measured one, so that storing it adds no error.
[[nodiscard]] inline float stored_scale(float scale, dtype type) noexcept {
    switch (type) {
        case dtype::float16: return to_float(to_float16(std::clamp(scale, 0x1p-24F, 65504.0F)));
        case dtype::bfloat16: return to_float(to_bfloat16(std::clamp(scale, 0x1p-126F, 0x1.fep127F)));
        case dtype::float32: break;
    }
    return scale;
}

RVQKV_NAMESPACE_END
