// SPDX-License-Identifier: MIT
/// @file
/// The fused multiply-add of the generic level against std::fma, on numbers chosen to break a double rounding. Where
/// the target has the instruction, the compiler uses it and both sides are the same.
#include "rvqkv/simd/generic.hpp"

#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float largest = std::numeric_limits<float>::max();
constexpr float least = std::numeric_limits<float>::denorm_min();

struct triple {
    float a;
    float b;
    float c;
};

bool same(float x, float y) {
    return test::bits_of(x) == test::bits_of(y) || (std::isnan(x) && std::isnan(y));
}

/// The triples on which the two differ.
std::vector<std::vector<float>> differences(const std::vector<triple>& inputs) {
    std::vector<std::vector<float>> list;
    for (const triple& in : inputs) {
        if (!same(rvqkv::generic::fused_multiply_add(in.a, in.b, in.c), std::fma(in.a, in.b, in.c))) {
            list.push_back({in.a, in.b, in.c});
        }
    }
    return list;
}

void check_same(const std::vector<triple>& inputs) {
    const auto wrong = differences(inputs);
    CAPTURE(wrong);
    REQUIRE(wrong.empty());
}

/// How many triples go wrong when the sum is rounded to double and then to float, so that a set proves that it is hard.
std::size_t broken_by_double_rounding(const std::vector<triple>& inputs) {
    std::size_t count = 0;
    for (const triple& in : inputs) {
        const volatile double product = static_cast<double>(in.a) * static_cast<double>(in.b);
        const auto twice = static_cast<float>(product + static_cast<double>(in.c));
        count += same(twice, std::fma(in.a, in.b, in.c)) ? 0 : 1;
    }
    return count;
}

/// `c + a * b` just beside the middle between two floats, by less than a double can tell: the product is half of the
/// last place of `c`, times `(1 + t) * (1 - t) = 1 - t^2`, or times `1 / (1 - t^2)`, roughly, from above.
std::vector<triple> beside_a_middle(test::random_source& random, int exponent, std::size_t count) {
    std::vector<triple> inputs;
    for (std::size_t i = 0; i < count; ++i) {
        const float sign = random.integer(0, 1) == 0 ? 1.0F : -1.0F;
        const float c =
            sign * std::ldexp(1.0F + std::ldexp(static_cast<float>(random.integer(0, 0x7fffff)), -23), exponent);
        const int half = std::max(exponent - 24, -150);
        const float t = std::ldexp(static_cast<float>(random.integer(1, 255)), -23);
        const int split = static_cast<int>(random.integer(0, 20)) - 10;
        const float a = std::ldexp(1.0F + t, half / 2 + split);
        const float b = std::ldexp(1.0F - t, half - half / 2 - split);
        // Towards zero and away from it; below the middle, and (from the next float inwards) above it.
        inputs.push_back({a, b, c});
        inputs.push_back({a, -b, c});
        inputs.push_back({-a, -b, -c});
        inputs.push_back({a, 3 * b, c});
        inputs.push_back({a, -3 * b, c});
    }
    return inputs;
}

/// The same where results are denormal: the last place is that of the smallest number.
std::vector<triple> beside_a_denormal_middle(test::random_source& random, std::size_t count) {
    std::vector<triple> inputs;
    for (std::size_t i = 0; i < count; ++i) {
        const float c = least * static_cast<float>(random.integer(0, 0xffffff));
        const float t = std::ldexp(static_cast<float>(random.integer(1, 255)), -23);
        const int split = static_cast<int>(random.integer(0, 40)) - 20;
        const float a = std::ldexp(1.0F + t, -75 + split);
        const float b = std::ldexp(1.0F - t, -75 - split);
        inputs.push_back({a, b, c});
        inputs.push_back({a, -b, c});
        inputs.push_back({a, b, -c});
        inputs.push_back({a, 3 * b, c});
    }
    return inputs;
}

}  // namespace

TEST_CASE("fused_multiply_add: rounds once, beside the middle between floats", "[simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(1);
    std::size_t broken = 0;
    for (int exponent = -125; exponent <= 127; ++exponent) {
        CAPTURE(exponent);
        const std::vector<triple> inputs = beside_a_middle(random, exponent, 200);
        broken += broken_by_double_rounding(inputs);
        check_same(inputs);
    }
    CHECK(broken > 10000);
}

TEST_CASE("fused_multiply_add: rounds once, among denormal numbers", "[simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(2);
    const std::vector<triple> inputs = beside_a_denormal_middle(random, 20000);
    CHECK(broken_by_double_rounding(inputs) > 1000);
    check_same(inputs);
}

TEST_CASE("fused_multiply_add: rounds once, when the sum is one below a power of two", "[simd][differential]") {
    // The last place halves below a power of two, and so does the middle.
    std::vector<triple> inputs;
    for (int exponent = -100; exponent <= 100; ++exponent) {
        for (int k = 12; k <= 23; ++k) {
            for (const int half : {exponent - 24, exponent - 25, exponent - 26, exponent - 53, exponent - 54}) {
                const float t = std::ldexp(1.0F, -k);
                const float a = std::ldexp(1.0F + t, half / 2);
                const float b = std::ldexp(1.0F - t, half - half / 2);
                for (const float c : {std::ldexp(1.0F, exponent), std::nextafter(std::ldexp(1.0F, exponent), 0.0F)}) {
                    inputs.insert(inputs.end(), {{a, b, c}, {a, -b, c}, {a, b, -c}, {-a, b, -c}});
                }
            }
        }
    }
    CHECK(broken_by_double_rounding(inputs) > 1000);
    check_same(inputs);
}

TEST_CASE("fused_multiply_add: agrees on all pairs and triples of special numbers", "[simd][differential]") {
    const float numbers[] = {
        0.0F,    1.0F,   1.5F,      0x1.fffffep0F, 0x1.000002p0F, 3.0F,
        1e20F,   1e-20F, 0x1p-126F, 0x1p-75F,      0x1p-24F,      0x1p24F,
        0x1p64F, least,  3 * least, largest,       infinity,      std::numeric_limits<float>::quiet_NaN()};
    std::vector<triple> inputs;
    for (const float a : numbers) {
        for (const float b : numbers) {
            for (const float c : numbers) {
                inputs.insert(inputs.end(), {{a, b, c}, {-a, b, c}, {a, b, -c}, {-a, b, -c}});
            }
        }
    }
    check_same(inputs);
}

TEST_CASE("fused_multiply_add: agrees on random bit patterns, and under cancellation", "[simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(3);
    std::vector<triple> inputs;
    const auto pattern = [&] { return std::bit_cast<float>(static_cast<std::uint32_t>(random.engine()())); };
    for (int i = 0; i < 200000; ++i) {
        inputs.push_back({pattern(), pattern(), pattern()});
        const float a = random.gaussian();
        const float b = random.gaussian();
        inputs.push_back({a, b, -(a * b)});
        inputs.push_back({a, b, std::nextafter(-(a * b), infinity)});
        inputs.push_back({a, b, random.gaussian() * std::ldexp(1.0F, static_cast<int>(random.integer(0, 60)) - 30)});
    }
    check_same(inputs);
}
