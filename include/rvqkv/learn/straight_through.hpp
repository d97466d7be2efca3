// SPDX-License-Identifier: MIT
/// @file
/// Gradients through the quantizer, for finetuning a model together with its quantized cache: the straight-through
/// estimator and the commitment loss.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/rows.hpp"
#include "rvqkv/quantize/scale.hpp"
#include "rvqkv/quantize/vector_quantizer.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// Derivative of a scale by each channel of the row that it was measured on, `out` `[channels]`; zeros where the scale
/// was replaced by 1. One overload for each policy; a policy of the user's own needs one to be trained through.
/// @{
inline void scale_gradient(const std_dev_scale& /*policy*/, std::span<const float> row, float scale,
                           std::span<float> out) noexcept {
    double mean = 0.0;
    double squares = 0.0;
    for (const float value : row) {
        mean += static_cast<double>(value) / static_cast<double>(row.size());
    }
    for (const float value : row) {
        squares += (static_cast<double>(value) - mean) * (static_cast<double>(value) - mean);
    }
    const double divisor = static_cast<double>(row.size() - 1) * static_cast<double>(scale);
    for (std::size_t i = 0; i < row.size(); ++i) {
        out[i] = squares > 0.0 ? static_cast<float>((static_cast<double>(row[i]) - mean) / divisor) : 0.0F;
    }
}
inline void scale_gradient(const rms_scale& /*policy*/, std::span<const float> row, float scale,
                           std::span<float> out) noexcept {
    for (std::size_t i = 0; i < row.size(); ++i) {
        out[i] = row[i] / (static_cast<float>(row.size()) * scale);
    }
}
inline void scale_gradient(const l2_norm_scale& /*policy*/, std::span<const float> row, float scale,
                           std::span<float> out) noexcept {
    for (std::size_t i = 0; i < row.size(); ++i) {
        out[i] = row[i] / scale;
    }
}
inline void scale_gradient(const max_abs_scale& /*policy*/, std::span<const float> row, float /*scale*/,
                           std::span<float> out) noexcept {
    std::fill(out.begin(), out.end(), 0.0F);
    const auto top =
        std::max_element(row.begin(), row.end(), [](float a, float b) { return std::fabs(a) < std::fabs(b); });
    if (top != row.end() && *top != 0.0F) {
        out[static_cast<std::size_t>(top - row.begin())] = *top > 0.0F ? 1.0F : -1.0F;
    }
}
inline void scale_gradient(const no_scale& /*policy*/, std::span<const float> /*row*/, float /*scale*/,
                           std::span<float> out) noexcept {
    std::fill(out.begin(), out.end(), 0.0F);
}
inline void scale_gradient(const any_scale& policy, std::span<const float> row, float scale,
                           std::span<float> out) noexcept {
    switch (policy.kind()) {
        case scale_kind::std_dev: return scale_gradient(std_dev_scale{}, row, scale, out);
        case scale_kind::rms: return scale_gradient(rms_scale{}, row, scale, out);
        case scale_kind::l2_norm: return scale_gradient(l2_norm_scale{}, row, scale, out);
        case scale_kind::max_abs: return scale_gradient(max_abs_scale{}, row, scale, out);
        case scale_kind::none: return scale_gradient(no_scale{}, row, scale, out);
    }
}
/// @}

/// What flows back through `quantized = quantizer(x)` and its commitment loss. In the scaled domain the quantizer's
/// output hands its gradient on unchanged (straight-through; the residual is a constant), the commitment loss of a
/// token adds `2 / (heads * head_dim)` times the sum of the residuals that the depths leave, and the division by the
/// scale and the multiplication with it are differentiated as they are.
/// Shapes:     `x`, `gradient_out` (by the quantized tensor) and `gradient_in` (by `x`, written) `[token, head,
///             head_dim]`; `gradient_loss` `[token]`, by each token's commitment loss, or empty for none; `mask`
///             `[token]` or empty: tokens with 0 get no commitment gradient.
/// Errors:     `invalid_argument` for shapes that disagree. NaNs and infinities in `x` count as 0.
/// Complexity: that of encoding.
/// Paper:      arXiv 2410.15704, section 3; reference code: `FastQuantizer.backward` in
///             vqllm/quantizer/quantize_kernel.py, and autograd through `x.std()` in vqllm/quantizer/utils.py.
template <class Quantizer>
[[nodiscard]] status straight_through_gradient(const Quantizer& quantizer, const tensor_view& x,
                                               const tensor_view& gradient_out, std::span<const float> gradient_loss,
                                               std::span<const std::uint8_t> mask,
                                               const mutable_tensor_view& gradient_in) {
    if (x.channels() != quantizer.head_dim()) {
        return error{error_code::invalid_argument, "input has " + std::to_string(x.channels()) +
                                                       " channels per head, this quantizer was made for head_dim " +
                                                       std::to_string(quantizer.head_dim())};
    }
    if (gradient_out.shape() != x.shape() || gradient_in.shape() != x.shape()) {
        return error{error_code::invalid_argument, "gradients must have the shape of the input"};
    }
    if ((!gradient_loss.empty() && gradient_loss.size() != x.tokens()) ||
        (!mask.empty() && mask.size() != x.tokens())) {
        return error{error_code::invalid_argument,
                     "gradient_loss and mask must be empty or hold one value for each of " +
                         std::to_string(x.tokens()) + " tokens"};
    }
    const std::size_t head_dim = quantizer.head_dim();
    const auto& transform = quantizer.transform();
    const std::size_t groups = quantizer.groups();
    std::vector<float> row(head_dim);
    std::vector<float> residual(head_dim);      // scaled domain, grouped; after the last depth: what no codeword took
    std::vector<float> residual_sum(head_dim);  // of what each depth leaves
    std::vector<float> ungrouped(head_dim);
    std::vector<float> gradient(head_dim);
    std::vector<float> by_scale(head_dim);
    std::vector<code_t> codes(groups);
    for (std::size_t token = 0; token < x.tokens(); ++token) {
        const bool counted = !gradient_loss.empty() && (mask.empty() || mask[token] != 0);
        const double pull = counted ? 2.0 * static_cast<double>(gradient_loss[token]) /
                                          (static_cast<double>(x.heads()) * static_cast<double>(head_dim))
                                    : 0.0;
        for (std::size_t head = 0; head < x.heads(); ++head) {
            std::size_t nonfinite = 0;
            load_row(x, token, head, row.data());
            const float scale = transform.apply(row.data(), residual.data(), nonfinite);
            std::fill(residual_sum.begin(), residual_sum.end(), 0.0F);
            for (std::size_t depth = 0; depth < quantizer.codebook().depths(); ++depth) {
                quantizer.residual().encode_depth(depth, {residual.data(), groups, transform.group_dim()}, codes);
                for (std::size_t i = 0; i < head_dim; ++i) {
                    residual_sum[i] += residual[i];
                }
            }
            // With z = x / s: output = (z - residual) * s and loss = f(z), so
            //   d/dx = g + c / s + ds * (-<g, residual> - <c, z> / s),   c = pull * residual_sum.
            load_row(gradient_out, token, head, gradient.data());
            double by_s = 0.0;
            transform.restore(residual.data(), 1.0F, ungrouped.data());
            for (std::size_t i = 0; i < head_dim; ++i) {
                by_s -= static_cast<double>(gradient[i]) * static_cast<double>(ungrouped[i]);
            }
            transform.restore(residual_sum.data(), 1.0F, ungrouped.data());
            const double s = static_cast<double>(scale);
            for (std::size_t i = 0; i < head_dim; ++i) {
                const double commitment = pull * static_cast<double>(ungrouped[i]) / s;
                by_s -= commitment * static_cast<double>(row[i]) / s;
                gradient[i] += static_cast<float>(commitment);
            }
            scale_gradient(transform.scale(), row, scale, by_scale);
            for (std::size_t i = 0; i < head_dim; ++i) {
                gradient[i] += static_cast<float>(by_s * static_cast<double>(by_scale[i]));
            }
            store_row(gradient.data(), gradient_in, token, head);
        }
    }
    return {};
}

RVQKV_NAMESPACE_END
