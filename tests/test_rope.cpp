// SPDX-License-Identifier: MIT
/// @file
/// Rotary embedding: known values, both kinds of pairs, part of a head, tables of frequencies, huge and negative
/// positions, the way back, and the same bits at every SIMD level and however calls are split.
#include "rvqkv/attend/rope.hpp"

#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace {

rvqkv::rope make_rope(const rvqkv::rope_config& config, std::size_t head_dim) {
    return rvqkv::rope::create(config, head_dim).value();
}

/// One row turned as plainly as it can be said, in long double.
std::vector<float> turned(const rvqkv::rope_config& config, const std::vector<float>& row, std::int64_t position) {
    const std::size_t dims = config.dims == 0 ? row.size() : config.dims;
    std::vector<float> out = row;
    for (std::size_t i = 0; i < dims / 2; ++i) {
        const double frequency = config.frequencies.empty()
                                     ? std::pow(config.base, -2.0 * static_cast<double>(i) / static_cast<double>(dims))
                                     : config.frequencies[i];
        const long double angle = static_cast<long double>(position) * static_cast<long double>(frequency) *
                                  static_cast<long double>(config.position_scale);
        const bool split = config.pairs == rvqkv::rope_pairs::half_split;
        const std::size_t first = split ? i : 2 * i;
        const std::size_t second = split ? i + dims / 2 : 2 * i + 1;
        const long double a = static_cast<long double>(row[first]);
        const long double b = static_cast<long double>(row[second]);
        const long double factor = static_cast<long double>(config.attention_factor);
        out[first] = static_cast<float>(factor * (a * std::cos(angle) - b * std::sin(angle)));
        out[second] = static_cast<float>(factor * (a * std::sin(angle) + b * std::cos(angle)));
    }
    return out;
}

/// Largest difference, of numbers whose size is about 1.
double distance(const std::vector<float>& a, const std::vector<float>& b) {
    REQUIRE(a.size() == b.size());
    double most = 0.0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        most = std::max(most, static_cast<double>(std::fabs(a[i] - b[i])));
    }
    return most;
}

// Two products and a sum of numbers up to 4, each rounded to 24 bits, as are cosine and sine.
constexpr double tolerance = 4.0 * 4.0 * 0x1p-24;

std::vector<float> bounded_numbers(test::random_source& random, std::size_t count) {
    std::vector<float> numbers(count);
    for (float& number : numbers) {
        number = random.uniform(-4.0F, 4.0F);
    }
    return numbers;
}

}  // namespace

TEST_CASE("rope: turns (1, 0) at position 1 by one radian", "[attend][unit]") {
    const auto rope = make_rope({}, 2);
    float row[] = {1.0F, 0.0F};
    rope.turn({row, 1, 2}, 1);
    CHECK(row[0] == 0.54030230586813977F);
    CHECK(row[1] == 0.84147098480789651F);
}

TEST_CASE("rope: pairs are half a head apart, or side by side", "[attend][unit]") {
    rvqkv::rope_config config;
    config.base = 100.0;  // the second pair turns by a tenth
    std::vector<float> row = {1, 2, 3, 4};
    make_rope(config, 4).turn({row.data(), 1, 4}, 1);
    CHECK(row[0] == Approx(std::cos(1.0) - 3 * std::sin(1.0)));
    CHECK(row[1] == Approx(2 * std::cos(0.1) - 4 * std::sin(0.1)));
    CHECK(row[2] == Approx(std::sin(1.0) + 3 * std::cos(1.0)));
    CHECK(row[3] == Approx(2 * std::sin(0.1) + 4 * std::cos(0.1)));

    config.pairs = rvqkv::rope_pairs::interleaved;
    row = {1, 2, 3, 4};
    make_rope(config, 4).turn({row.data(), 1, 4}, 1);
    CHECK(row[0] == Approx(std::cos(1.0) - 2 * std::sin(1.0)));
    CHECK(row[1] == Approx(std::sin(1.0) + 2 * std::cos(1.0)));
    CHECK(row[2] == Approx(3 * std::cos(0.1) - 4 * std::sin(0.1)));
    CHECK(row[3] == Approx(3 * std::sin(0.1) + 4 * std::cos(0.1)));
}

TEST_CASE("rope: turns as its definition says, far out and before the start", "[attend][differential]") {
    test::random_source random(1);
    CAPTURE(test::seed());
    for (int round = 0; round < 60; ++round) {
        rvqkv::rope_config config;
        config.pairs = round % 2 == 0 ? rvqkv::rope_pairs::half_split : rvqkv::rope_pairs::interleaved;
        const std::size_t head_dim = 2 * random.integer(1, 160);  // more than one block of pairs, too
        config.dims = round % 3 == 0 ? 0 : 2 * random.integer(1, head_dim / 2);
        config.base = round % 5 == 0 ? 500000.0 : 10000.0;
        config.position_scale = round % 4 == 0 ? 0.25 : 1.0;
        if (round % 7 == 0) {
            config.frequencies.resize((config.dims == 0 ? head_dim : config.dims) / 2);
            for (double& frequency : config.frequencies) {
                frequency = static_cast<double>(random.uniform(0.0F, 1.0F));
            }
        }
        CAPTURE(head_dim, config.dims, config.base, config.position_scale, config.frequencies.size());
        const auto rope = make_rope(config, head_dim);
        for (const std::int64_t position : {std::int64_t{0}, std::int64_t{31}, std::int64_t{32}, std::int64_t{-1},
                                            std::int64_t{4097}, std::int64_t{-40000}, std::int64_t{1000003}}) {
            CAPTURE(position);
            const std::vector<float> row = bounded_numbers(random, head_dim);
            std::vector<float> got = row;
            rope.turn({got.data(), 1, head_dim}, position);
            CHECK(distance(got, turned(config, row, position)) <= tolerance);
            rope.turn_back({got.data(), 1, head_dim}, position);
            CHECK(distance(got, row) <= 2 * tolerance);
        }
    }
}

TEST_CASE("rope: the attention factor goes with the position, not with a shift", "[attend][unit]") {
    rvqkv::rope_config config;
    config.dims = 2;
    config.attention_factor = 2.0;
    const auto rope = make_rope(config, 4);
    const std::vector<float> row = {1, 1, 5, 7};
    std::vector<float> got = row;
    rope.turn({got.data(), 1, 4}, 0);
    CHECK(got == std::vector<float>{2, 2, 5, 7});
    rope.shift({got.data(), 1, 4}, 12);
    CHECK(distance(got, turned(config, row, 12)) <= tolerance);
    rope.turn_back({got.data(), 1, 4}, 12);
    CHECK(distance(got, row) <= tolerance);
}

TEST_CASE("rope: a row's bits follow from its position, not from the call or the SIMD level", "[attend][property]") {
    test::random_source random(2);
    CAPTURE(test::seed());
    for (const auto pairs : {rvqkv::rope_pairs::half_split, rvqkv::rope_pairs::interleaved}) {
        rvqkv::rope_config config;
        config.pairs = pairs;
        config.dims = 90;
        const auto rope = make_rope(config, 100);
        const std::size_t heads = 3;
        const std::size_t tokens = 70;
        const std::vector<float> rows = bounded_numbers(random, tokens * heads * 100);
        std::vector<float> single = rows;
        for (std::size_t i = 0; i < tokens * heads; ++i) {
            rope.turn({single.data() + i * 100, 1, 100}, static_cast<std::int64_t>(i / heads) - 20);
        }
        for (const rvqkv::simd_level level : test::levels()) {
            CAPTURE(rvqkv::name_of(level));
            std::vector<float> whole = rows;
            rope.turn({whole.data(), tokens * heads, 100}, -20, heads, *rvqkv::kernels_for(level).value());
            CHECK(test::bits_of(whole) == test::bits_of(single));
        }
    }
}

TEST_CASE("rope: fills cosines and sines of a position", "[attend][unit]") {
    const auto rope = make_rope({}, 128);
    std::vector<float> cosines(64);
    std::vector<float> sines(64);
    rope.angles(-77777, cosines.data(), sines.data());
    for (std::size_t pair = 0; pair < 64; ++pair) {
        const double angle = -77777.0 * std::pow(10000.0, -static_cast<double>(pair) / 64.0);
        CHECK(std::fabs(static_cast<double>(cosines[pair]) - std::cos(angle)) < 0x1p-24);
        CHECK(std::fabs(static_cast<double>(sines[pair]) - std::sin(angle)) < 0x1p-24);
    }
}

TEST_CASE("rope: positions at the ends of their type are no undefined behaviour", "[attend][unit]") {
    const auto rope = make_rope({}, 8);
    std::vector<float> rows(3 * 8, 1.0F);
    rope.turn({rows.data(), 3, 8}, std::numeric_limits<std::int64_t>::max());
    rope.turn_back({rows.data(), 3, 8}, std::numeric_limits<std::int64_t>::min());
    for (const float number : rows) {
        CHECK(std::isfinite(number));
    }
}

TEST_CASE("rope: one that was not configured turns nothing", "[attend][unit]") {
    std::vector<float> row = {1, 2, 3, 4};
    rvqkv::rope().turn({row.data(), 1, 4}, 100);
    CHECK(row == std::vector<float>{1, 2, 3, 4});
}

TEST_CASE("rope: refuses configurations that make no sense", "[attend][unit]") {
    const auto message = [](const rvqkv::rope_config& config, std::size_t head_dim) {
        return rvqkv::rope::create(config, head_dim).error().message;
    };
    rvqkv::rope_config config;
    CHECK(message(config, 7) == "rope dims is 7, must be even and from 2 to head_dim 7");
    CHECK(message(config, 0) == "rope dims is 0, must be even and from 2 to head_dim 0");
    config.dims = 10;
    CHECK(message(config, 8) == "rope dims is 10, must be even and from 2 to head_dim 8");
    config.dims = 4;
    config.frequencies = {1.0};
    CHECK(message(config, 8) == "rope has 1 frequencies, must have one for each of 2 pairs");
    config.frequencies = {1.0, std::numeric_limits<double>::infinity()};
    CHECK(message(config, 8) == "a rope frequency is not finite");
    config.frequencies.clear();
    config.base = 0.0;
    CHECK(message(config, 8) == "rope base is 0.000000, must be finite and above 0");
    config.base = 10000.0;
    config.attention_factor = -1.0;
    CHECK(message(config, 8) == "rope attention_factor is -1.000000, must be finite and above 0");
    config.attention_factor = 1.0;
    config.position_scale = std::numeric_limits<double>::quiet_NaN();
    CHECK(message(config, 8) == "rope position_scale is nan, must be finite and above 0");
}
