// SPDX-License-Identifier: MIT
/// @file
/// Two policies of a user's own. The library knows neither; `custom_policies.cpp` puts them to work.
#pragma once

#include <rvqkv/quantize/grouping.hpp>
#include <rvqkv/quantize/scale.hpp>

#include <cmath>
#include <cstddef>
#include <span>
#include <string_view>

namespace custom {

/// Scales by the mean magnitude of the channels, which a single outlier moves less than it moves a mean square.
struct mean_magnitude_scale {
    static constexpr std::string_view name() noexcept { return "mean_magnitude"; }
    static constexpr bool is_stored() noexcept { return true; }
    float measure(std::span<const float> row) const noexcept {
        double sum = 0.0;  // in double: the sum of any number of floats is finite
        for (const float value : row) {
            sum += std::fabs(static_cast<double>(value));
        }
        const auto mean = static_cast<float>(sum / static_cast<double>(row.size()));
        return mean > 0.0F ? mean : 1.0F;  // nothing to divide by, an empty row included
    }
};

/// The paper's strided groups for engines whose rotary pairs are neighbours, channels `(2i, 2i + 1)`, as in GGUF files
/// of the Llama family: deals out whole pairs, every `groups`-th to a group.
struct strided_pairs_grouping {
    static constexpr std::string_view name() noexcept { return "strided_pairs"; }
    std::size_t channel(std::size_t group, std::size_t i, std::size_t groups, std::size_t group_dim) const noexcept {
        const bool single = i + 1 == group_dim && group_dim % 2 == 1;  // the last of an odd number has no partner
        return single ? i * groups + group : (i / 2 * groups + group) * 2 + i % 2;
    }
};

static_assert(rvqkv::ScalePolicy<mean_magnitude_scale>);
static_assert(rvqkv::GroupingPolicy<strided_pairs_grouping>);

}  // namespace custom
