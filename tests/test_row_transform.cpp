// SPDX-License-Identifier: MIT
/// @file
/// One head's vector on its way to the codebooks and back: scaled by the stored number, dealt to groups, and never a
/// NaN on the way.
#include "rvqkv/quantize/row_transform.hpp"

#include "../examples/custom_policies.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

namespace {

template <class Scale, class Grouping>
struct policies {
    using scale = Scale;
    using grouping = Grouping;
};

using every_kind =
    std::tuple<policies<rvqkv::std_dev_scale, rvqkv::strided_grouping>,
               policies<rvqkv::rms_scale, rvqkv::contiguous_grouping>,
               policies<rvqkv::max_abs_scale, rvqkv::any_grouping>, policies<rvqkv::no_scale, rvqkv::strided_grouping>,
               policies<rvqkv::any_scale, rvqkv::contiguous_grouping>,
               policies<custom::mean_magnitude_scale, custom::strided_pairs_grouping>>;

constexpr rvqkv::dtype every_type[] = {rvqkv::dtype::float32, rvqkv::dtype::float16, rvqkv::dtype::bfloat16};

}  // namespace

TEMPLATE_LIST_TEST_CASE("row_transform: divides by the stored scale, deals channels, and finds its way back",
                        "[quantize][property]", every_kind) {
    CAPTURE(test::seed());
    using scale_type = typename TestType::scale;
    using grouping_type = typename TestType::grouping;
    using transform_type = rvqkv::row_transform<scale_type, grouping_type>;
    constexpr std::size_t head_dim = 48;
    constexpr std::size_t group_dim = 8;
    const auto order = rvqkv::channel_order(grouping_type{}, head_dim, group_dim).value();
    test::random_source random(1);
    for (const rvqkv::dtype stored : every_type) {
        const transform_type transform =
            transform_type::create(head_dim, group_dim, scale_type{}, grouping_type{}, stored).value();
        CHECK(transform.head_dim() == head_dim);
        CHECK(transform.group_dim() == group_dim);
        CHECK(transform.groups() == head_dim / group_dim);
        CHECK(transform.stored_scale_type() == stored);
        CHECK(transform.scale().name() == scale_type{}.name());
        CHECK(transform.grouping().name() == grouping_type{}.name());
        for (int round = 0; round < 20; ++round) {
            CAPTURE(rvqkv::name_of(stored), round);
            const std::vector<float> row = test::gaussian_numbers(random, head_dim);
            const scale_type policy{};
            const float measured = policy.measure(row);
            const float expected_scale = policy.is_stored() ? rvqkv::stored_scale(measured, stored) : 1.0F;
            std::vector<float> expected;
            expected.reserve(head_dim);
            for (const std::uint16_t channel : order) {
                expected.push_back(row[channel] / expected_scale);
            }
            std::vector<float> channels = row;
            std::vector<float> grouped(head_dim);
            std::size_t nonfinite = 0;
            const float scale = transform.apply(channels.data(), grouped.data(), nonfinite);
            CHECK(scale == expected_scale);
            CHECK(nonfinite == 0);
            CHECK(channels == row);
            CHECK(test::bits_of(grouped) == test::bits_of(expected));

            std::vector<float> back(head_dim);
            transform.restore(grouped.data(), scale, back.data());
            float largest = 0.0F;
            for (std::size_t i = 0; i < head_dim; ++i) {
                largest = std::max(largest, std::fabs(back[i] - row[i]) / std::fabs(row[i]));
            }
            CHECK(largest <= (policy.is_stored() ? 0x1p-22F : 0.0F));
        }
    }
}

TEST_CASE("row_transform: counts NaNs and infinities and takes them for 0", "[quantize][unit]") {
    using transform_type = rvqkv::row_transform<rvqkv::std_dev_scale, rvqkv::contiguous_grouping>;
    const auto transform = transform_type::create(4, 2).value();
    constexpr float infinity = std::numeric_limits<float>::infinity();
    constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> clean = {0.0F, 1.0F, 0.0F, 0.0F};
    std::vector<float> expected(4);
    std::size_t none = 0;
    const float expected_scale = transform.apply(clean.data(), expected.data(), none);
    CHECK(none == 0);
    for (const std::vector<float>& bad : {std::vector<float>{not_a_number, 1.0F, infinity, -infinity},
                                          std::vector<float>{-not_a_number, 1.0F, 0.0F, not_a_number}}) {
        std::vector<float> channels = bad;
        std::vector<float> grouped(4);
        std::size_t nonfinite = 10;
        const float scale = transform.apply(channels.data(), grouped.data(), nonfinite);
        CHECK(scale == expected_scale);
        CHECK(grouped == expected);
        CHECK(channels == clean);
        CHECK(nonfinite == 10 + (std::isinf(bad[2]) ? 3 : 2));
    }
    std::vector<float> nothing_left(4, not_a_number);
    std::vector<float> grouped(4, 5.0F);
    std::size_t nonfinite = 0;
    CHECK(transform.apply(nothing_left.data(), grouped.data(), nonfinite) == 1.0F);
    CHECK(grouped == std::vector<float>(4, 0.0F));
    CHECK(nonfinite == 4);
}

TEST_CASE("row_transform: rows of any size stay finite, whatever type stores the scale", "[quantize][property]") {
    CAPTURE(test::seed());
    using transform_type = rvqkv::row_transform<rvqkv::any_scale, rvqkv::strided_grouping>;
    constexpr std::size_t head_dim = 64;
    test::random_source random(2);
    for (const rvqkv::scale_kind kind : rvqkv::all_scale_kinds) {
        for (const rvqkv::dtype stored : every_type) {
            const auto transform = transform_type::create(head_dim, 16, kind, {}, stored).value();
            std::vector<std::vector<float>> rows;
            for (const test::family family : test::all_families) {
                rows.push_back(test::make_numbers(random, family, head_dim));
            }
            rows.emplace_back(head_dim, std::numeric_limits<float>::max());
            rows.emplace_back(head_dim, std::numeric_limits<float>::denorm_min());
            rows.back()[5] = -0.0F;
            for (std::vector<float>& row : rows) {
                CAPTURE(rvqkv::name_of(kind), rvqkv::name_of(stored), row[0], row[1]);
                std::vector<float> grouped(head_dim);
                std::size_t nonfinite = 0;
                const float scale = transform.apply(row.data(), grouped.data(), nonfinite);
                CHECK(scale > 0.0F);
                CHECK(std::isfinite(scale));
                CHECK(nonfinite == 0);
                CHECK(std::all_of(grouped.begin(), grouped.end(), [](float x) { return std::isfinite(x); }));
            }
        }
    }
}

TEST_CASE("row_transform: refuses groups that do not fit", "[quantize][unit]") {
    using strided = rvqkv::row_transform<rvqkv::std_dev_scale, rvqkv::strided_grouping>;
    using permuted = rvqkv::row_transform<rvqkv::std_dev_scale, rvqkv::permuted_grouping>;
    const auto wrong_size = strided::create(128, 48);
    REQUIRE_FALSE(wrong_size.ok());
    CHECK(wrong_size.error().code == rvqkv::error_code::invalid_argument);
    CHECK(wrong_size.error().message == "group_dim is 48, must divide head_dim 128");
    const auto wrong_order = permuted::create(4, 2, {}, rvqkv::permuted_grouping({0, 1, 2, 2}));
    REQUIRE_FALSE(wrong_order.ok());
    CHECK(wrong_order.error().message.find("puts channel 2 at place 1 of group 1") != std::string::npos);
    CHECK(permuted::create(4, 2, {}, rvqkv::permuted_grouping({3, 1, 0, 2})).ok());
}
