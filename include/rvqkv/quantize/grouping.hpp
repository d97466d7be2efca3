// SPDX-License-Identifier: MIT
/// @file
/// Channel-grouping policies: which channels of a head's vector are quantized together. Layout only, no arithmetic.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

namespace detail {

/// `std::allocator` under a name of the library's own: a `std::vector` of plain numbers with it is a type of the
/// library, whose code the linker does not merge with that of a file compiled for another instruction set (see
/// core/config.hpp).
template <class T>
struct tagged_allocator : std::allocator<T> {
    using value_type = T;
    template <class Other>
    struct rebind {
        using other = tagged_allocator<Other>;
    };
    tagged_allocator() = default;
    template <class Other>
    tagged_allocator(const tagged_allocator<Other>& /*other*/) noexcept {}  // NOLINT: conversion intended
};

}  // namespace detail

/// Numbers of channels. A `std::vector` but for its allocator.
using channel_list = std::vector<std::uint16_t, detail::tagged_allocator<std::uint16_t>>;

/// A small value that deals the `groups * group_dim` channels of a head to groups: `channel(group, i, groups,
/// group_dim)` is the channel that stands at place `i` of `group`. Law, checked whenever a quantizer is made: every
/// channel appears exactly once.
template <class G>
concept GroupingPolicy = std::semiregular<G> &&
    requires(const G grouping, std::size_t group, std::size_t i, std::size_t groups, std::size_t group_dim) {
    { grouping.name() }
    noexcept->std::convertible_to<std::string_view>;
    { grouping.channel(group, i, groups, group_dim) }
    noexcept->std::same_as<std::size_t>;
};

/// Neighbouring channels form a group: group `g` holds channels `g * group_dim + i`. The paper's choice for values.
struct contiguous_grouping {
    [[nodiscard]] static constexpr std::string_view name() noexcept { return "contiguous"; }
    [[nodiscard]] constexpr std::size_t channel(std::size_t group, std::size_t i, std::size_t /*groups*/,
                                                std::size_t group_dim) const noexcept {
        return group * group_dim + i;
    }
};

/// Channels `groups` apart form a group: group `g` holds channels `i * groups + g`. The paper's choice for keys ("non-
/// contiguous"), which brings both halves of a rotary pair `(i, i + head_dim / 2)` together.
/// Paper: arXiv 2410.15704, section 3; reference code: `quantize_key` in vqllm/quantizer/utils.py.
struct strided_grouping {
    [[nodiscard]] static constexpr std::string_view name() noexcept { return "strided"; }
    [[nodiscard]] constexpr std::size_t channel(std::size_t group, std::size_t i, std::size_t groups,
                                                std::size_t /*group_dim*/) const noexcept {
        return i * groups + group;
    }
};

/// Any assignment: `order[group * group_dim + i]` is the channel. An order of another length than the head names none.
class permuted_grouping {
public:
    permuted_grouping() = default;
    explicit permuted_grouping(channel_list order) noexcept : order_(std::move(order)) {}
    [[nodiscard]] static constexpr std::string_view name() noexcept { return "permuted"; }
    /// With an order of the wrong length, a channel that does not exist, which the check below reports.
    [[nodiscard]] std::size_t channel(std::size_t group, std::size_t i, std::size_t groups,
                                      std::size_t group_dim) const noexcept {
        const std::size_t head_dim = groups * group_dim;
        return order_.size() == head_dim ? order_[group * group_dim + i] : head_dim;
    }
    [[nodiscard]] const channel_list& order() const noexcept { return order_; }

private:
    channel_list order_;
};

/// The policies above by run-time value, as files and command lines name them.
enum class grouping_kind { contiguous, strided, permuted };
inline constexpr grouping_kind all_grouping_kinds[] = {grouping_kind::contiguous, grouping_kind::strided,
                                                       grouping_kind::permuted};

/// One of the policies above, chosen at run time.
class any_grouping {
public:
    any_grouping() = default;
    /// `order` is read for `grouping_kind::permuted` only.
    any_grouping(grouping_kind kind, channel_list order = {}) noexcept  // NOLINT: conversion intended
        : kind_(kind), permuted_(std::move(order)) {}
    [[nodiscard]] grouping_kind kind() const noexcept { return kind_; }
    [[nodiscard]] const channel_list& order() const noexcept { return permuted_.order(); }
    [[nodiscard]] std::string_view name() const noexcept {
        switch (kind_) {
            case grouping_kind::contiguous: return contiguous_grouping::name();
            case grouping_kind::strided: return strided_grouping::name();
            case grouping_kind::permuted: break;
        }
        return permuted_grouping::name();
    }
    [[nodiscard]] std::size_t channel(std::size_t group, std::size_t i, std::size_t groups,
                                      std::size_t group_dim) const noexcept {
        switch (kind_) {
            case grouping_kind::contiguous: return contiguous_grouping{}.channel(group, i, groups, group_dim);
            case grouping_kind::strided: return strided_grouping{}.channel(group, i, groups, group_dim);
            case grouping_kind::permuted: break;
        }
        return permuted_.channel(group, i, groups, group_dim);
    }

private:
    grouping_kind kind_ = grouping_kind::contiguous;
    permuted_grouping permuted_;
};

[[nodiscard]] inline std::string_view name_of(grouping_kind kind) noexcept {
    return any_grouping(kind).name();
}

static_assert(GroupingPolicy<contiguous_grouping> && GroupingPolicy<strided_grouping> &&
              GroupingPolicy<permuted_grouping> && GroupingPolicy<any_grouping>);

/// The whole assignment as a table: entry `group * group_dim + i` is a channel.
/// Errors: `invalid_argument` when sizes are zero or too large, `group_dim` does not divide `head_dim`, or the policy
/// names a channel twice or out of range.
template <GroupingPolicy Grouping>
[[nodiscard]] result<channel_list> channel_order(const Grouping& grouping, std::size_t head_dim,
                                                 std::size_t group_dim) {
    if (head_dim == 0 || head_dim > 65535) {
        return error{error_code::invalid_argument,
                     "head_dim is " + std::to_string(head_dim) + ", must be from 1 to 65535"};
    }
    if (group_dim == 0 || head_dim % group_dim != 0) {
        return error{error_code::invalid_argument, "group_dim is " + std::to_string(group_dim) +
                                                       ", must divide head_dim " + std::to_string(head_dim)};
    }
    const std::size_t groups = head_dim / group_dim;
    channel_list order(head_dim);
    channel_list seen(head_dim, 0);
    for (std::size_t group = 0; group < groups; ++group) {
        for (std::size_t i = 0; i < group_dim; ++i) {
            const std::size_t channel = grouping.channel(group, i, groups, group_dim);
            if (channel >= head_dim || seen[channel] != 0) {
                return error{error_code::invalid_argument,
                             std::string(grouping.name()) + " grouping puts channel " + std::to_string(channel) +
                                 " at place " + std::to_string(i) + " of group " + std::to_string(group) +
                                 ": every channel below head_dim " + std::to_string(head_dim) +
                                 " must appear exactly once"};
            }
            seen[channel] = 1;
            order[group * group_dim + i] = static_cast<std::uint16_t>(channel);
        }
    }
    return order;
}

RVQKV_NAMESPACE_END
