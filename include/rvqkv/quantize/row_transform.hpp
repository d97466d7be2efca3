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
    float apply(float* channels, float* grouped, std::size_t& nonfinite) const noexcept {
        const std::size_t count = head_dim();
        for (std::size_t i = 0; i < count; ++i) {
            if (!std::isfinite(channels[i])) {
                channels[i] = 0.0F;
                ++nonfinite;
            }
        }
        const float scale = scale_.is_stored() ? stored_scale(scale_.measure({channels, count}), stored_) : 1.0F;
        for (std::size_t i = 0; i < count; ++i) {
            grouped[i] = channels[order_[i]] / scale;
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
          order_(std::move(order)) {}

    std::size_t group_dim_;
    [[no_unique_address]] Scale scale_;
    [[no_unique_address]] Grouping grouping_;
    dtype stored_;
    channel_list order_;  // place among the groups -> channel
};

RVQKV_NAMESPACE_END
