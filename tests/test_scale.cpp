// SPDX-License-Identifier: MIT
/// @file
/// The laws of scaling policies, over all of them and the example's, and what each one measures.
#include "rvqkv/quantize/scale.hpp"

#include "../examples/custom_policies.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

#include <cmath>
#include <cstddef>
#include <limits>
#include <tuple>
#include <vector>

namespace {

constexpr float largest = std::numeric_limits<float>::max();
constexpr float least = std::numeric_limits<float>::denorm_min();

/// `any_scale` of one kind, as a type that the laws can make.
template <rvqkv::scale_kind Kind>
struct any_scale_of : rvqkv::any_scale {
    any_scale_of() : any_scale(Kind) {}
};

using every_policy =
    std::tuple<rvqkv::std_dev_scale, rvqkv::rms_scale, rvqkv::l2_norm_scale, rvqkv::max_abs_scale, rvqkv::no_scale,
               any_scale_of<rvqkv::scale_kind::std_dev>, any_scale_of<rvqkv::scale_kind::rms>,
               any_scale_of<rvqkv::scale_kind::l2_norm>, any_scale_of<rvqkv::scale_kind::max_abs>,
               any_scale_of<rvqkv::scale_kind::none>, custom::mean_magnitude_scale>;

using std_dev_policies = std::tuple<rvqkv::std_dev_scale, any_scale_of<rvqkv::scale_kind::std_dev>>;

constexpr std::size_t counts[] = {1, 2, 3, 7, 16, 64, 127, 128, 255, 256};

}  // namespace

TEMPLATE_LIST_TEST_CASE("ScalePolicy law: the measure of finite numbers is finite and above zero", "[quantize][law]",
                        every_policy) {
    CAPTURE(test::seed());
    static_assert(rvqkv::ScalePolicy<TestType>);
    const TestType policy{};
    test::random_source random(1);
    for (const test::family kind : test::all_families) {
        for (const std::size_t count : counts) {
            CAPTURE(test::name_of(kind), count);
            const float scale = policy.measure(test::make_numbers(random, kind, count));
            CHECK(scale > 0.0F);
            CHECK(std::isfinite(scale));
        }
    }
    for (const float extreme : {largest, -largest, least, -least, 0x1p126F, 0x1p-126F}) {
        for (const std::size_t count : {1U, 2U, 3U, 128U, 4096U, 65535U}) {
            CAPTURE(extreme, count);
            std::vector<float> row(count, extreme);
            const float of_equals = policy.measure(row);
            CHECK(of_equals > 0.0F);
            CHECK(std::isfinite(of_equals));
            for (std::size_t i = 0; i < count; i += 2) {
                row[i] = -extreme;
            }
            const float of_opposites = policy.measure(row);
            CHECK(of_opposites > 0.0F);
            CHECK(std::isfinite(of_opposites));
        }
    }
    const float of_nothing = policy.measure({});
    CHECK(of_nothing > 0.0F);
    CHECK(std::isfinite(of_nothing));
}

TEMPLATE_LIST_TEST_CASE("ScalePolicy law: a row of zeros gives 1", "[quantize][law]", every_policy) {
    for (const std::size_t count : counts) {
        CAPTURE(count);
        CHECK(TestType{}.measure(std::vector<float>(count, 0.0F)) == 1.0F);
        CHECK(TestType{}.measure(std::vector<float>(count, -0.0F)) == 1.0F);
    }
}

TEMPLATE_LIST_TEST_CASE("ScalePolicy law: the measure grows with the row, or is always 1", "[quantize][law]",
                        every_policy) {
    CAPTURE(test::seed());
    const TestType policy{};
    test::random_source random(2);
    for (const std::size_t count : {2U, 3U, 64U, 128U}) {
        for (const float offset : {0.0F, 5.0F}) {
            std::vector<float> row = test::gaussian_numbers(random, count);
            for (float& value : row) {
                value += offset;
            }
            const float scale = policy.measure(row);
            for (const float factor : {2.0F, 0.25F, -1.0F, -3.0F, 0.1F, 1e15F, 1e-15F, -0x1p100F}) {
                CAPTURE(count, offset, factor);
                std::vector<float> stretched = row;
                for (float& value : stretched) {
                    value *= factor;
                }
                const float stretched_scale = policy.measure(stretched);
                if (policy.is_stored()) {
                    // The margin is for the rounding of the stretched numbers, all below 16.
                    const float size = std::fabs(factor);
                    CHECK(stretched_scale == Approx(size * scale).epsilon(1e-5).margin(1e-5 * size));
                } else {
                    CHECK(stretched_scale == 1.0F);
                    CHECK(scale == 1.0F);
                }
            }
        }
    }
}

TEMPLATE_LIST_TEST_CASE("ScalePolicy law: the measure is a function of the row", "[quantize][law]", every_policy) {
    test::random_source random(3);
    const std::vector<float> row = test::gaussian_numbers(random, 128);
    const TestType policy{};
    const TestType copy = policy;
    CHECK(policy.measure(row) == copy.measure(row));
    CHECK(policy.name() == copy.name());
    CHECK_FALSE(policy.name().empty());
}

TEMPLATE_LIST_TEST_CASE("std_dev_scale: a constant row gives exactly 1", "[quantize][unit]", std_dev_policies) {
    for (const float constant : {0.1F, -0.1F, 0.3F, 1.0F / 3.0F, 1.0F, 1e-30F, 1e30F, 12345.678F, least, 3 * least,
                                 0x1.fffffep-127F, largest, -largest}) {
        for (std::size_t count = 1; count <= 300; ++count) {
            REQUIRE(TestType{}.measure(std::vector<float>(count, constant)) == 1.0F);
        }
    }
}

TEST_CASE("std_dev_scale: divides by one less than the number of channels", "[quantize][unit]") {
    const rvqkv::std_dev_scale policy;
    CHECK(policy.measure(std::vector<float>{1.0F, 3.0F}) == std::sqrt(2.0F));
    CHECK(policy.measure(std::vector<float>{2.0F, 4.0F, 4.0F, 4.0F, 5.0F, 5.0F, 7.0F, 9.0F}) ==
          Approx(std::sqrt(32.0 / 7.0)).epsilon(1e-7));
    // Differences beyond float32, and squares below it.
    CHECK(policy.measure(std::vector<float>{largest, -largest}) == largest);  // the measure itself is beyond
    CHECK(policy.measure(std::vector<float>{largest, -largest, largest, 0.0F}) ==
          Approx(static_cast<double>(largest) * std::sqrt(2.75 / 3.0)).epsilon(1e-6));
    CHECK(policy.measure(std::vector<float>{0x1p-140F, -0x1p-140F, 0.0F}) == 0x1p-140F);
}

TEST_CASE("std_dev_scale: agrees with the plain formula, however far the mean is from zero",
          "[quantize][differential]") {
    CAPTURE(test::seed());
    test::random_source random(4);
    for (const float mean : {0.0F, -3.0F, 1e3F, 1e6F}) {
        for (const std::size_t count : {2U, 3U, 16U, 64U, 128U, 256U, 1000U}) {
            CAPTURE(mean, count);
            std::vector<float> row = test::gaussian_numbers(random, count);
            for (float& value : row) {
                value += mean;
            }
            const auto expected = static_cast<double>(reference::standard_deviation(row.data(), count));
            CHECK(rvqkv::std_dev_scale{}.measure(row) == Approx(expected).epsilon(1e-6));
            row[0] = 1e4F;  // an outlier where differences are measured from
            const auto with_outlier = static_cast<double>(reference::standard_deviation(row.data(), count));
            CHECK(rvqkv::std_dev_scale{}.measure(row) == Approx(with_outlier).epsilon(1e-6));
        }
    }
}

TEST_CASE("rms_scale, l2_norm_scale, max_abs_scale: measure what they say", "[quantize][unit]") {
    const std::vector<float> row = {3.0F, -4.0F, 0.0F, 0.0F};
    CHECK(rvqkv::rms_scale{}.measure(row) == 2.5F);
    CHECK(rvqkv::l2_norm_scale{}.measure(row) == 5.0F);
    CHECK(rvqkv::max_abs_scale{}.measure(row) == 4.0F);
    CHECK(rvqkv::no_scale{}.measure(row) == 1.0F);
    // Too large for float32 gives the largest; squares that float32 does not hold are no hindrance.
    CHECK(rvqkv::l2_norm_scale{}.measure(std::vector<float>(100, largest)) == largest);
    CHECK(rvqkv::rms_scale{}.measure(std::vector<float>(100, largest)) == largest);
    CHECK(rvqkv::rms_scale{}.measure(std::vector<float>(100, 1e-40F)) == 1e-40F);
    CHECK(rvqkv::l2_norm_scale{}.measure(std::vector<float>(4, 1e-40F)) == 2 * 1e-40F);
    CHECK(rvqkv::max_abs_scale{}.measure(std::vector<float>{-least, 0.0F}) == least);
}

TEST_CASE("any_scale: is each of the policies, bit for bit", "[quantize][unit]") {
    test::random_source random(5);
    const std::vector<float> row = test::gaussian_numbers(random, 96);
    const auto check = [&row](rvqkv::scale_kind kind, const auto& policy) {
        const rvqkv::any_scale any(kind);
        CHECK(any.kind() == kind);
        CHECK(any.name() == policy.name());
        CHECK(rvqkv::name_of(kind) == policy.name());
        CHECK(any.is_stored() == policy.is_stored());
        CHECK(test::bits_of(any.measure(row)) == test::bits_of(policy.measure(row)));
    };
    check(rvqkv::scale_kind::std_dev, rvqkv::std_dev_scale{});
    check(rvqkv::scale_kind::rms, rvqkv::rms_scale{});
    check(rvqkv::scale_kind::l2_norm, rvqkv::l2_norm_scale{});
    check(rvqkv::scale_kind::max_abs, rvqkv::max_abs_scale{});
    check(rvqkv::scale_kind::none, rvqkv::no_scale{});
    CHECK(rvqkv::any_scale().kind() == rvqkv::scale_kind::std_dev);  // the paper's
    CHECK(std::size(rvqkv::all_scale_kinds) == 5);
    CHECK(rvqkv::name_of(rvqkv::scale_kind::none) == "none");
    CHECK_FALSE(rvqkv::no_scale{}.is_stored());
    CHECK(rvqkv::std_dev_scale{}.is_stored());
}

TEST_CASE("stored_scale: rounds to the type, but never to zero or infinity", "[quantize][unit]") {
    using rvqkv::dtype;
    using rvqkv::stored_scale;
    for (const float scale : {1.0F, 0.1F, 3.14159F, 1e-3F, 1000.3F}) {
        CAPTURE(scale);
        CHECK(stored_scale(scale, dtype::float32) == scale);
        CHECK(stored_scale(scale, dtype::float16) == rvqkv::to_float(rvqkv::to_float16(scale)));
        CHECK(stored_scale(scale, dtype::bfloat16) == rvqkv::to_float(rvqkv::to_bfloat16(scale)));
    }
    CHECK(stored_scale(0.1F, dtype::float16) != 0.1F);
    CHECK(stored_scale(1e30F, dtype::float16) == 65504.0F);
    CHECK(stored_scale(65519.9F, dtype::float16) == 65504.0F);
    CHECK(stored_scale(65520.0F, dtype::float16) == 65504.0F);  // would round to infinity
    CHECK(stored_scale(1e-30F, dtype::float16) == 0x1p-24F);
    CHECK(stored_scale(0x1p-25F, dtype::float16) == 0x1p-24F);  // would round to zero
    CHECK(stored_scale(largest, dtype::bfloat16) == 0x1.fep127F);
    CHECK(stored_scale(least, dtype::bfloat16) == 0x1p-126F);
    CHECK(stored_scale(largest, dtype::float32) == largest);
    CHECK(stored_scale(least, dtype::float32) == least);
}
