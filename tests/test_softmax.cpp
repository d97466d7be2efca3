// SPDX-License-Identifier: MIT
/// @file
/// Softmax in pieces: exponentials within their bound at every SIMD level, masks, queries without tokens, and parts
/// merged into the whole.
#include "rvqkv/attend/softmax.hpp"

#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

const rvqkv::kernel_table& table(rvqkv::simd_level level) {
    return *rvqkv::kernels_for(level).value();
}

/// Weights and log-sum-exp in double.
struct plain_softmax {
    std::vector<double> weights;
    double log_sum_exp = 0.0;

    explicit plain_softmax(const std::vector<float>& scores) {
        double top = -std::numeric_limits<double>::infinity();
        for (const float score : scores) {
            top = std::max(top, static_cast<double>(score));
        }
        double sum = 0.0;
        for (const float score : scores) {
            weights.push_back(std::exp(static_cast<double>(score) - top));
            sum += weights.back();
        }
        for (double& weight : weights) {
            weight /= sum;
        }
        log_sum_exp = top + std::log(sum);
    }
};

}  // namespace

TEST_CASE("exponentials: within 2 units in the last place, the same at every level", "[attend][simd][differential]") {
    std::vector<float> inputs;
    for (float x = 0.0F; x > -87.33F; x -= 0.0037F + std::fabs(x) * 1e-5F) {
        inputs.push_back(x);
    }
    std::vector<float> first;
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        std::vector<float> got = inputs;
        const float sum = table(level).attention.exponentials(got.data(), got.size(), 0.0F);
        double worst = 0.0;
        double expected_sum = 0.0;
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            const double expected = std::exp(static_cast<double>(inputs[i]));
            expected_sum += expected;
            const double unit = static_cast<double>(std::nextafter(static_cast<float>(expected), infinity)) -
                                static_cast<double>(static_cast<float>(expected));
            worst = std::max(worst, std::fabs(static_cast<double>(got[i]) - expected) / unit);
        }
        CHECK(worst <= 2.0);
        CHECK(static_cast<double>(sum) == Approx(expected_sum).epsilon(1e-5));
        if (first.empty()) {
            first = got;
        }
        CHECK(test::bits_of(got) == test::bits_of(first));
    }
}

TEST_CASE("exponentials: nothing below the smallest number, NaN stays, nothing written beside",
          "[attend][simd][unit]") {
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        for (std::size_t count = 0; count < 40; ++count) {
            std::vector<float> got(count + 1, 3.0F);
            CHECK(table(level).attention.exponentials(got.data(), count, 3.0F) == static_cast<float>(count));
            CHECK(std::count(got.begin(), got.end(), 1.0F) == static_cast<std::ptrdiff_t>(count));
            CHECK(got[count] == 3.0F);
            CHECK(table(level).attention.largest(got.data(), count) == (count == 0 ? -infinity : 1.0F));
        }
        std::vector<float> got = {-infinity, -88.0F, -1e30F, -std::numeric_limits<float>::max(), 0.0F, not_a_number};
        (void)table(level).attention.exponentials(got.data(), 5, 0.0F);
        CHECK(got[0] == 0.0F);
        CHECK(got[1] == 0.0F);
        CHECK(got[2] == 0.0F);
        CHECK(got[3] == 0.0F);
        CHECK(got[4] == 1.0F);
        got[0] = 5.0F;
        CHECK(table(level).attention.largest(got.data(), 6) == 5.0F);
        CHECK(std::isnan(table(level).attention.exponentials(got.data(), 6, 5.0F)));
        CHECK(std::isnan(got[5]));
    }
}

TEST_CASE("soft_cap: the definition, over all sizes", "[attend][simd][differential]") {
    std::vector<float> inputs = {0.0F, -0.0F, 1e-6F, -1e-6F, 1e30F, -1e30F, infinity, -infinity};
    for (float x = -200.0F; x < 200.0F; x += 0.37F) {
        inputs.push_back(x);
    }
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        std::vector<float> got = inputs;
        table(level).attention.soft_cap(got.data(), got.size(), 30.0F);
        double worst = 0.0;
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            worst = std::max(worst, std::fabs(static_cast<double>(got[i]) -
                                              30.0 * std::tanh(static_cast<double>(inputs[i]) / 30.0)));
        }
        CHECK(worst <= 30.0 * 0x1p-22);
        float number = not_a_number;
        table(level).attention.soft_cap(&number, 1, 30.0F);
        CHECK(std::isnan(number));
    }
}

TEST_CASE("softmax_row: pieces give the weights of the whole", "[attend][differential]") {
    test::random_source random(1);
    CAPTURE(test::seed());
    for (const rvqkv::simd_level level : test::levels()) {
        for (int round = 0; round < 40; ++round) {
            CAPTURE(rvqkv::name_of(level), round);
            const std::size_t count = random.integer(1, 400);
            std::vector<float> scores(count);
            for (float& score : scores) {
                score = random.integer(0, 9) == 0 ? -infinity : 10.0F * random.gaussian();
            }
            scores[random.integer(0, count - 1)] = 1.0F;
            const plain_softmax expected(scores);
            rvqkv::softmax_row row;
            std::vector<float> weights = scores;
            for (std::size_t first = 0; first < count;) {
                const std::size_t part = std::min(count - first, random.integer(1, 100));
                const float factor = row.add(weights.data() + first, part, table(level));
                for (std::size_t i = 0; i < first; ++i) {
                    weights[i] *= factor;
                }
                first += part;
            }
            for (std::size_t i = 0; i < count; ++i) {
                // Twice a rounded difference of scores up to 100, and the sum.
                CHECK(std::fabs(static_cast<double>(weights[i] * row.normalizer()) - expected.weights[i]) <=
                      expected.weights[i] * 1e-5 + 1e-38);
                if (std::isinf(scores[i])) {
                    CHECK(weights[i] == 0.0F);
                }
            }
            CHECK(std::fabs(static_cast<double>(row.log_sum_exp()) - expected.log_sum_exp) <= 1e-5);
        }
    }
}

TEST_CASE("softmax_row: without a token there is nothing", "[attend][unit]") {
    rvqkv::softmax_row row;
    CHECK(row.normalizer() == 0.0F);
    CHECK(row.log_sum_exp() == -infinity);
    std::vector<float> scores(20, -infinity);
    CHECK(row.add(scores.data(), scores.size()) == 1.0F);
    CHECK(scores == std::vector<float>(20, 0.0F));
    CHECK(row.normalizer() == 0.0F);
    CHECK(row.log_sum_exp() == -infinity);
    scores = {-infinity, 2.0F};
    CHECK(row.add(scores.data(), scores.size()) == 0.0F);
    CHECK(row.normalizer() == 1.0F);
    CHECK(row.log_sum_exp() == 2.0F);
}

TEST_CASE("softmax_row: a sink takes its part", "[attend][unit]") {
    auto row = rvqkv::softmax_row::with_sink(1.0F);
    CHECK(row.log_sum_exp() == 1.0F);
    float score = 1.0F;
    CHECK(row.add(&score, 1) == 1.0F);
    CHECK(score * row.normalizer() == 0.5F);
    CHECK(rvqkv::softmax_row::with_sink(-infinity).sum == 0.0F);
}

TEST_CASE("merge_partial: parts make the whole, in any type and number", "[attend][differential]") {
    test::random_source random(2);
    CAPTURE(test::seed());
    constexpr std::size_t heads = 3;
    constexpr std::size_t channels = 300;  // more than are merged at a time
    const std::vector<float> values = test::gaussian_numbers(random, 12 * heads * channels);
    const std::vector<float> scores = test::gaussian_numbers(random, 12 * heads);
    // Attention over tokens [first, last), which the parts share out; one part is empty.
    const auto part = [&](std::size_t first, std::size_t last, std::vector<float>& out, std::vector<float>& sums) {
        out.assign(heads * channels, 0.0F);
        sums.assign(heads, -infinity);
        for (std::size_t head = 0; head < heads && first != last; ++head) {
            std::vector<float> some;
            for (std::size_t t = first; t < last; ++t) {
                some.push_back(scores[t * heads + head]);
            }
            const plain_softmax softmax(some);
            sums[head] = static_cast<float>(softmax.log_sum_exp);
            for (std::size_t i = 0; i < channels; ++i) {
                double sum = 0.0;
                for (std::size_t t = first; t < last; ++t) {
                    sum += softmax.weights[t - first] * static_cast<double>(values[(t * heads + head) * channels + i]);
                }
                out[head * channels + i] = static_cast<float>(sum);
            }
        }
    };
    std::vector<float> whole;
    std::vector<float> whole_sums;
    part(0, 12, whole, whole_sums);
    std::vector<float> merged;
    std::vector<float> sums;
    part(0, 0, merged, sums);
    const rvqkv::tensor_shape shape{1, heads, channels};
    for (const auto& [first, last] : {std::pair(3, 5), std::pair(0, 3), std::pair(7, 7), std::pair(5, 12)}) {
        std::vector<float> other;
        std::vector<float> other_sums;
        part(static_cast<std::size_t>(first), static_cast<std::size_t>(last), other, other_sums);
        rvqkv::merge_partial({merged.data(), shape}, sums, {other.data(), shape}, other_sums).value();
    }
    for (std::size_t i = 0; i < whole.size(); ++i) {
        CHECK(std::fabs(merged[i] - whole[i]) <= 2e-6F);
    }
    for (std::size_t head = 0; head < heads; ++head) {
        CHECK(std::fabs(sums[head] - whole_sums[head]) <= 2e-6F);
    }

    // Sixteen-bit parts and other strides: channels of each head two apart.
    std::vector<rvqkv::float16> half(heads * channels * 2, rvqkv::to_float16(-1.0F));
    for (std::size_t i = 0; i < whole.size(); ++i) {
        half[2 * i] = rvqkv::to_float16(whole[i]);
    }
    std::vector<float> same_sums = whole_sums;
    const rvqkv::tensor_strides strides{2 * heads * channels, 2 * channels, 2};
    rvqkv::merge_partial({half.data(), shape, strides}, same_sums, {whole.data(), shape}, whole_sums).value();
    for (std::size_t i = 0; i < whole.size(); ++i) {
        CHECK(std::fabs(rvqkv::to_float(half[2 * i]) - whole[i]) <= 1e-3F * std::fabs(whole[i]) + 1e-6F);
        CHECK(half[2 * i + 1] == rvqkv::to_float16(-1.0F));
    }
    CHECK(same_sums[0] == Approx(whole_sums[0] + std::log(2.0F)));
}

TEST_CASE("merge_partial: refuses parts that do not fit each other", "[attend][unit]") {
    std::vector<float> out(8);
    std::vector<float> sums(2);
    const auto wrong = rvqkv::merge_partial({out.data(), {1, 2, 4}}, sums, {out.data(), {1, 4, 2}}, sums);
    REQUIRE_FALSE(wrong.ok());
    CHECK(wrong.error().message == "the parts to merge differ in shape");
    const auto few = rvqkv::merge_partial({out.data(), {1, 2, 4}}, {sums.data(), 1}, {out.data(), {1, 2, 4}}, sums);
    REQUIRE_FALSE(few.ok());
    CHECK(few.error().message == "the parts to merge have 1 and 2 sums, must have one for each of 2 rows");
}
