// SPDX-License-Identifier: MIT
/// @file
/// Softmax of scores that come in pieces, and attention results over parts of a sequence put together.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/rows.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <string>

RVQKV_NAMESPACE_BEGIN

/// The running softmax of one query: numbers are kept relative to the largest score so far, so nothing overflows.
/// A query that met no token has the largest score -infinity and the sum 0.
struct softmax_row {
    float largest = -std::numeric_limits<float>::infinity();
    float sum = 0.0F;  ///< Of exp(score - largest).

    /// Begins with a score that has no value: an attention sink, which takes its part of the weight.
    static softmax_row with_sink(float logit) noexcept {
        return std::isinf(logit) && logit < 0.0F ? softmax_row{} : softmax_row{logit, 1.0F};
    }

    /// Takes scores and leaves weights in their place; scores of -infinity are masked: they get exactly 0.
    /// Returns:  what weights given out before, and sums of values weighted by them, are to be multiplied by.
    /// Numerics: weights within 4 ulp. A NaN among the scores makes the sum one, and so the query's result.
    [[nodiscard]] float add(float* scores, std::size_t count, const kernel_table& kernels = best_kernels()) noexcept {
        const float before = largest;
        largest = std::max(largest, kernels.attention.largest(scores, count));
        const bool none = std::isinf(largest) && largest < 0.0F;
        const float factor = none || before == largest ? 1.0F : std::exp(before - largest);
        sum = sum * factor + kernels.attention.exponentials(scores, count, none ? 0.0F : largest);
        return factor;
    }

    /// What weights become parts of a whole by; 0 where there was no token.
    [[nodiscard]] float normalizer() const noexcept { return sum == 0.0F ? 0.0F : 1.0F / sum; }
    /// Logarithm of the sum of exp(score); -infinity where there was no token.
    [[nodiscard]] float log_sum_exp() const noexcept { return largest + std::log(sum); }
};

/// Adds attention over other tokens to `out`: both are results as `layer_attention::attend_partial` gives them, and so
/// is what it leaves. With every part merged, `out` is attention over all tokens.
/// Shapes:   `out`, `other` `[token, head, channel]`, any types; `log_sum_exp`, `other_log_sum_exp` `[token, head]`.
/// Errors:   `invalid_argument` when shapes differ.
/// Numerics: float32, each result rounded once to the type of `out`.
[[nodiscard]] inline status merge_partial(const mutable_tensor_view& out, std::span<float> log_sum_exp,
                                          const tensor_view& other, std::span<const float> other_log_sum_exp,
                                          const kernel_table& kernels = best_kernels()) {
    if (out.shape() != other.shape()) {
        return error{error_code::invalid_argument, "the parts to merge differ in shape"};
    }
    if (log_sum_exp.size() != out.rows() || other_log_sum_exp.size() != out.rows()) {
        return error{error_code::invalid_argument, "the parts to merge have " + std::to_string(log_sum_exp.size()) +
                                                       " and " + std::to_string(other_log_sum_exp.size()) +
                                                       " sums, must have one for each of " +
                                                       std::to_string(out.rows()) + " rows"};
    }
    constexpr std::size_t most = 256;  // channels at a time: what the stack holds
    float mine[most];
    float theirs[most];
    const auto channels = [](auto view, std::size_t first, std::size_t count) {
        using byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(view.data())>>, const std::byte,
                                        std::byte>;
        const std::ptrdiff_t skip = static_cast<std::ptrdiff_t>(first) * view.strides().channel;
        return decltype(view)(
            static_cast<byte*>(view.data()) + skip * static_cast<std::ptrdiff_t>(size_of(view.type())), view.type(),
            {view.tokens(), view.heads(), count}, view.strides());
    };
    for (std::size_t row = 0; row < out.rows(); ++row) {
        const float largest = std::max(log_sum_exp[row], other_log_sum_exp[row]);
        if (std::isinf(other_log_sum_exp[row]) && other_log_sum_exp[row] < 0.0F) {
            continue;  // no token there
        }
        const float weight = std::exp(log_sum_exp[row] - largest);
        const float other_weight = std::exp(other_log_sum_exp[row] - largest);
        const float normalizer = 1.0F / (weight + other_weight);
        const std::size_t token = row / out.heads();
        const std::size_t head = row % out.heads();
        for (std::size_t first = 0; first < out.channels(); first += most) {
            const std::size_t count = std::min(most, out.channels() - first);
            load_row(channels(tensor_view(out), first, count), token, head, mine, kernels);
            load_row(channels(other, first, count), token, head, theirs, kernels);
            for (std::size_t i = 0; i < count; ++i) {
                mine[i] = (mine[i] * weight + theirs[i] * other_weight) * normalizer;
            }
            store_row(mine, channels(out, first, count), token, head, kernels);
        }
        log_sum_exp[row] = largest + std::log(weight + other_weight);
    }
    return {};
}

RVQKV_NAMESPACE_END
