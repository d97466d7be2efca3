// SPDX-License-Identifier: MIT
/// @file
/// The law of grouping policies, over all of them and the example's, the paper's two formulas, and how policies that
/// break the law are refused.
#include "rvqkv/quantize/grouping.hpp"

#include "../examples/custom_policies.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace {

rvqkv::channel_list shuffled_channels(std::size_t head_dim) {
    rvqkv::channel_list order(head_dim);
    std::iota(order.begin(), order.end(), std::uint16_t{0});
    test::random_source random(head_dim);
    std::shuffle(order.begin(), order.end(), random.engine());
    return order;
}

/// `any_grouping` of one kind, as a type that the laws can make.
template <rvqkv::grouping_kind Kind>
struct any_grouping_of : rvqkv::any_grouping {
    using any_grouping::any_grouping;
    any_grouping_of() : any_grouping(Kind) {}
};

/// A policy for heads of `head_dim` channels.
template <class Grouping>
Grouping make_grouping(std::size_t head_dim) {
    if constexpr (std::is_same_v<Grouping, rvqkv::permuted_grouping>) {
        return rvqkv::permuted_grouping(shuffled_channels(head_dim));
    } else if constexpr (std::is_same_v<Grouping, any_grouping_of<rvqkv::grouping_kind::permuted>>) {
        return {rvqkv::grouping_kind::permuted, shuffled_channels(head_dim)};
    } else {
        return {};
    }
}

using every_policy =
    std::tuple<rvqkv::contiguous_grouping, rvqkv::strided_grouping, rvqkv::permuted_grouping,
               any_grouping_of<rvqkv::grouping_kind::contiguous>, any_grouping_of<rvqkv::grouping_kind::strided>,
               any_grouping_of<rvqkv::grouping_kind::permuted>, custom::strided_pairs_grouping>;

/// A policy that does as it is told.
struct scripted_grouping {
    std::vector<std::size_t> channels;
    static constexpr std::string_view name() noexcept { return "scripted"; }
    std::size_t channel(std::size_t group, std::size_t i, std::size_t, std::size_t group_dim) const noexcept {
        return channels[group * group_dim + i];
    }
};

template <class Grouping>
std::string refusal(const Grouping& grouping, std::size_t head_dim, std::size_t group_dim) {
    const auto order = rvqkv::channel_order(grouping, head_dim, group_dim);
    if (order.ok()) {
        return "accepted";
    }
    CHECK(order.error().code == rvqkv::error_code::invalid_argument);
    return order.error().message;
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("GroupingPolicy law: every channel stands at one place", "[quantize][law]", every_policy) {
    static_assert(rvqkv::GroupingPolicy<TestType>);
    for (std::size_t groups = 1; groups <= 17; ++groups) {
        for (const std::size_t group_dim : {1U, 2U, 3U, 4U, 7U, 8U, 16U, 31U, 32U, 64U, 128U}) {
            CAPTURE(groups, group_dim);
            const std::size_t head_dim = groups * group_dim;
            const auto grouping = make_grouping<TestType>(head_dim);
            std::vector<int> seen(head_dim, 0);
            for (std::size_t group = 0; group < groups; ++group) {
                for (std::size_t i = 0; i < group_dim; ++i) {
                    const std::size_t channel = grouping.channel(group, i, groups, group_dim);
                    REQUIRE(channel < head_dim);
                    ++seen[channel];
                }
            }
            REQUIRE(seen == std::vector<int>(head_dim, 1));
            REQUIRE(rvqkv::channel_order(grouping, head_dim, group_dim).ok());
        }
    }
    CHECK_FALSE(make_grouping<TestType>(4).name().empty());
}

TEMPLATE_LIST_TEST_CASE("channel_order: tabulates the policy, place by place", "[quantize][unit]", every_policy) {
    constexpr std::size_t groups = 6;
    constexpr std::size_t group_dim = 4;
    const auto grouping = make_grouping<TestType>(groups * group_dim);
    const rvqkv::channel_list order = rvqkv::channel_order(grouping, groups * group_dim, group_dim).value();
    REQUIRE(order.size() == groups * group_dim);
    for (std::size_t group = 0; group < groups; ++group) {
        for (std::size_t i = 0; i < group_dim; ++i) {
            CHECK(order[group * group_dim + i] == grouping.channel(group, i, groups, group_dim));
        }
    }
}

TEST_CASE("contiguous_grouping, strided_grouping: deal channels as the paper does", "[quantize][unit]") {
    using order = rvqkv::channel_list;
    CHECK(rvqkv::channel_order(rvqkv::contiguous_grouping{}, 6, 3).value() == order{0, 1, 2, 3, 4, 5});
    CHECK(rvqkv::channel_order(rvqkv::strided_grouping{}, 6, 3).value() == order{0, 2, 4, 1, 3, 5});
    constexpr std::size_t head_dim = 128;
    constexpr std::size_t group_dim = 32;
    constexpr std::size_t groups = head_dim / group_dim;
    for (std::size_t group = 0; group < groups; ++group) {
        for (std::size_t i = 0; i < group_dim; ++i) {
            REQUIRE(rvqkv::contiguous_grouping{}.channel(group, i, groups, group_dim) ==
                    reference::channel_of(group, i, groups, group_dim, false));
            REQUIRE(rvqkv::strided_grouping{}.channel(group, i, groups, group_dim) ==
                    reference::channel_of(group, i, groups, group_dim, true));
        }
    }
}

TEST_CASE("strided_grouping: keeps both halves of a rotary pair in one group", "[quantize][property]") {
    constexpr std::size_t head_dim = 128;
    constexpr std::size_t group_dim = 32;
    const auto order = rvqkv::channel_order(rvqkv::strided_grouping{}, head_dim, group_dim).value();
    std::vector<std::size_t> group_of(head_dim);
    for (std::size_t place = 0; place < head_dim; ++place) {
        group_of[order[place]] = place / group_dim;
    }
    for (std::size_t channel = 0; channel < head_dim / 2; ++channel) {
        REQUIRE(group_of[channel] == group_of[channel + head_dim / 2]);
    }
}

TEST_CASE("strided_pairs_grouping: makes the strided groups of heads whose rotary pairs are neighbours",
          "[quantize][property]") {
    constexpr std::size_t head_dim = 64;
    constexpr std::size_t group_dim = 16;
    const auto pairs = rvqkv::channel_order(custom::strided_pairs_grouping{}, head_dim, group_dim).value();
    const auto strided = rvqkv::channel_order(rvqkv::strided_grouping{}, head_dim, group_dim).value();
    for (std::size_t group = 0; group < head_dim / group_dim; ++group) {
        std::set<std::size_t> of_pairs;
        std::set<std::size_t> of_strided;
        for (std::size_t i = 0; i < group_dim; ++i) {
            of_pairs.insert(pairs[group * group_dim + i]);
            // Channel j of a pair (j, j + head_dim / 2) stands at 2 j, its partner beside it.
            const std::size_t channel = strided[group * group_dim + i];
            of_strided.insert(channel < head_dim / 2 ? 2 * channel : 2 * (channel - head_dim / 2) + 1);
        }
        CHECK(of_pairs == of_strided);
    }
}

TEST_CASE("channel_order: refuses sizes that make no groups", "[quantize][unit]") {
    const rvqkv::strided_grouping strided;
    CHECK(refusal(strided, 0, 1) == "head_dim is 0, must be from 1 to 65535");
    CHECK(refusal(strided, 65536, 1) == "head_dim is 65536, must be from 1 to 65535");
    CHECK(refusal(strided, 128, 0) == "group_dim is 0, must divide head_dim 128");
    CHECK(refusal(strided, 128, 48) == "group_dim is 48, must divide head_dim 128");
    CHECK(refusal(strided, 128, 256) == "group_dim is 256, must divide head_dim 128");
    CHECK(refusal(strided, 1, 1) == "accepted");
    CHECK(refusal(strided, 65535, 65535) == "accepted");
    CHECK(refusal(strided, 65535, 1) == "accepted");
}

TEST_CASE("channel_order: refuses a policy that names a channel twice or none", "[quantize][unit]") {
    CHECK(refusal(scripted_grouping{{3, 2, 1, 0}}, 4, 2) == "accepted");
    CHECK(refusal(scripted_grouping{{0, 1, 2, 1}}, 4, 2) ==
          "scripted grouping puts channel 1 at place 1 of group 1: every channel below head_dim 4 must appear exactly "
          "once");
    CHECK(refusal(scripted_grouping{{0, 1, 4, 3}}, 4, 2) ==
          "scripted grouping puts channel 4 at place 0 of group 1: every channel below head_dim 4 must appear exactly "
          "once");
}

TEST_CASE("permuted_grouping: refuses an order of another length", "[quantize][unit]") {
    using rvqkv::permuted_grouping;
    CHECK(refusal(permuted_grouping({1, 0, 3, 2}), 4, 2) == "accepted");
    CHECK(refusal(permuted_grouping({1, 0, 3, 3}), 4, 2).find("puts channel 3 at place 1 of group 1") !=
          std::string::npos);
    for (const permuted_grouping& wrong :
         {permuted_grouping(), permuted_grouping({1, 0}), permuted_grouping({1, 0, 3, 2, 4})}) {
        CAPTURE(wrong.order().size());
        CHECK(refusal(wrong, 4, 2).find("every channel below head_dim 4 must appear exactly once") !=
              std::string::npos);
        CHECK(refusal(rvqkv::any_grouping(rvqkv::grouping_kind::permuted, wrong.order()), 4, 2) != "accepted");
    }
}

TEST_CASE("any_grouping: is each of the policies", "[quantize][unit]") {
    CHECK(rvqkv::any_grouping().kind() == rvqkv::grouping_kind::contiguous);
    CHECK(rvqkv::name_of(rvqkv::grouping_kind::contiguous) == "contiguous");
    CHECK(rvqkv::name_of(rvqkv::grouping_kind::strided) == "strided");
    CHECK(rvqkv::name_of(rvqkv::grouping_kind::permuted) == "permuted");
    CHECK(std::size(rvqkv::all_grouping_kinds) == 3);
    const rvqkv::channel_list order = shuffled_channels(24);
    const auto table = [&order](rvqkv::grouping_kind kind) {
        const rvqkv::any_grouping any(kind, order);
        CHECK(any.kind() == kind);
        CHECK(any.name() == rvqkv::name_of(kind));
        CHECK(any.order() == order);
        return rvqkv::channel_order(any, 24, 8).value();
    };
    CHECK(table(rvqkv::grouping_kind::contiguous) == rvqkv::channel_order(rvqkv::contiguous_grouping{}, 24, 8).value());
    CHECK(table(rvqkv::grouping_kind::strided) == rvqkv::channel_order(rvqkv::strided_grouping{}, 24, 8).value());
    CHECK(table(rvqkv::grouping_kind::permuted) == order);
    CHECK(rvqkv::channel_order(rvqkv::permuted_grouping(order), 24, 8).value() == order);
}
