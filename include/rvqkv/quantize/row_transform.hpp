// SPDX-License-Identifier: MIT
/// @file
/// The way of one head's vector into the domain that codebooks see, scaled and dealt to groups, and back. Encoding and
/// learning share it.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/quantize/grouping.hpp"
#include "rvqkv/quantize/scale.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// A scaling and a grouping policy for one head_dim. Threads: immutable, safe to share.
template <ScalePolicy Scale, GroupingPolicy Grouping>
class row_transform {
public:
    /// `stored` is the type in which scales are kept; vectors are divided by the rounded number.
    /// Errors: `invalid_argument` when `group_dim` does not divide `head_dim`, or the grouping is no permutation.
    [[nodiscard]] static result<row_transform> create(std::size_t head_dim, std::size_t group_dim, Scale scale = {},
                                                      Grouping grouping = {}, dtype stored = dtype::float16) {
        auto order = channel_order(grouping, head_dim, group_dim);
        if (!order) {
            return order.error();
        }
        return row_transform(group_dim, std::move(scale), std::move(grouping), stored, std::move(order).value());
    }

    [[nodiscard]] std::size_t head_dim() const noexcept { return order_.size(); }
    [[nodiscard]] std::size_t group_dim() const noexcept { return group_dim_; }
    [[nodiscard]] std::size_t groups() const noexcept { return head_dim() / group_dim_; }
    [[nodiscard]] const Scale& scale() const noexcept { return scale_; }
    [[nodiscard]] const Grouping& grouping() const noexcept { return grouping_; }
    /// The channel that stands at each place among the groups, `[groups, group_dim]`.
    [[nodiscard]] const channel_list& order() const noexcept { return order_; }
    /// Type in which scales are stored.
    [[nodiscard]] dtype stored_scale_type() const noexcept { return stored_; }

    /// Scales and groups one head's vector.
    /// Shapes:  `channels` `[head_dim]`, whose NaNs and infinities are replaced by 0; `grouped` `[groups, group_dim]`.
    /// Returns: the scale, as it is stored. The number of replaced values is added to `nonfinite`.
    float apply(float* channels, float* grouped, std::size_t& nonfinite,
                const kernel_table& kernels = best_kernels()) const noexcept {
        const std::size_t count = head_dim();
        if (!kernels.rows.all_finite(channels, count)) {
            for (std::size_t i = 0; i < count; ++i) {
                if (!std::isfinite(channels[i])) {
                    channels[i] = 0.0F;
                    ++nonfinite;
                }
            }
        }
        const float scale =
            scale_.is_stored() ? stored_scale(detail::measure(scale_, {channels, count}, kernels), stored_) : 1.0F;
        switch (dealing_) {
            case dealing::contiguous: kernels.rows.divide(channels, scale, count, grouped); break;
            case dealing::strided: kernels.rows.divide_strided(channels, scale, groups(), group_dim_, grouped); break;
            case dealing::other:
                for (std::size_t i = 0; i < count; ++i) {
                    grouped[i] = channels[order_[i]];
                }
                kernels.rows.divide(grouped, scale, count, grouped);
                break;
        }
        return scale;
    }

    /// The way back. Shapes: `grouped` `[groups, group_dim]`; `channels` `[head_dim]`.
    void restore(const float* grouped, float scale, float* channels) const noexcept {
        for (std::size_t i = 0; i < head_dim(); ++i) {
            channels[order_[i]] = grouped[i] * scale;
        }
    }

private:
    row_transform(std::size_t group_dim, Scale scale, Grouping grouping, dtype stored, channel_list order) noexcept
        : group_dim_(group_dim),
          scale_(std::move(scale)),
          grouping_(std::move(grouping)),
          stored_(stored),
          order_(std::move(order)),
          dealing_(dealing_of(order_, group_dim)) {}

    /// The orders for which there are kernels.
    enum class dealing { contiguous, strided, other };
    [[nodiscard]] static dealing dealing_of(const channel_list& order, std::size_t group_dim) noexcept {
        const std::size_t groups = order.size() / group_dim;
        bool contiguous = true;
        bool strided = true;
        for (std::size_t i = 0; i < order.size(); ++i) {
            contiguous = contiguous && order[i] == i;
            strided = strided && order[i] == i % group_dim * groups + i / group_dim;
        }
        return contiguous ? dealing::contiguous : strided ? dealing::strided : dealing::other;
    }

    std::size_t group_dim_;
    [[no_unique_address]] Scale scale_;
    [[no_unique_address]] Grouping grouping_;
    dtype stored_;
    channel_list order_;  // place among the groups -> channel
    dealing dealing_;
};

RVQKV_NAMESPACE_END
