// SPDX-License-Identifier: MIT
/// @file
/// Conversion of arrays: every SIMD level gives the bits of the scalar functions, whatever the length and alignment.
#include "rvqkv/simd/convert.hpp"

#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

template <class Half>
std::vector<std::uint16_t> bits_of(const std::vector<Half>& halves) {
    std::vector<std::uint16_t> bits;
    bits.reserve(halves.size());
    for (const Half half : halves) {
        bits.push_back(half.bits);
    }
    return bits;
}

/// Where two lists of bits part, or their length: for lists too long to be printed.
template <class T>
std::size_t first_difference(const std::vector<T>& got, const std::vector<T>& expected) {
    REQUIRE(got.size() == expected.size());
    return static_cast<std::size_t>(std::mismatch(got.begin(), got.end(), expected.begin()).first - got.begin());
}

/// Every exponent and sign with the fractions around which rounding turns, NaNs and infinities included, then random
/// patterns.
std::vector<float> hard_floats(std::size_t random_patterns) {
    std::vector<float> floats;
    for (std::uint32_t top = 0; top < 512; ++top) {
        for (const std::uint32_t low : {0x0U,      0x1U,      0xfffU,    0x1000U,   0x1001U,   0x2fffU,   0x3000U,
                                        0x3001U,   0x7fffU,   0x8000U,   0x8001U,   0x17fffU,  0x18000U,  0x18001U,
                                        0x3fffffU, 0x400000U, 0x400001U, 0x7fe000U, 0x7fefffU, 0x7ff000U, 0x7fffffU}) {
            floats.push_back(std::bit_cast<float>((top << 23U) | low));
        }
    }
    test::random_source random(2);
    for (std::size_t i = 0; i < random_patterns; ++i) {
        floats.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random.engine()())));
    }
    // Half the random ones once more, where binary16 has its numbers.
    for (std::size_t i = 0; i < random_patterns / 2; ++i) {
        const auto bits = static_cast<std::uint32_t>(random.engine()());
        floats.push_back(std::bit_cast<float>((bits & 0x80ffffffU) + 0x32000000U + (bits >> 24U) % 24 * 0x800000U));
    }
    return floats;
}

template <class Half>
std::vector<Half> all_patterns() {
    std::vector<Half> patterns(65536);
    for (std::uint32_t i = 0; i < 65536; ++i) {
        patterns[i].bits = static_cast<std::uint16_t>(i);
    }
    return patterns;
}

}  // namespace

TEMPLATE_TEST_CASE("convert: every half becomes the float it is, at every level", "[simd][differential]",
                   rvqkv::float16, rvqkv::bfloat16) {
    const std::vector<TestType> in = all_patterns<TestType>();
    std::vector<float> expected;
    expected.reserve(in.size());
    for (const TestType half : in) {
        expected.push_back(rvqkv::to_float(half));
    }
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        std::vector<float> out(in.size());
        rvqkv::convert(in.data(), out.data(), in.size(), *rvqkv::kernels_for(level).value());
        CHECK(first_difference(test::bits_of(out), test::bits_of(expected)) == in.size());
    }
}

TEMPLATE_TEST_CASE("convert: floats round as the scalar functions do, at every level", "[simd][differential]",
                   rvqkv::float16, rvqkv::bfloat16) {
    CAPTURE(test::seed());
    const std::vector<float> in = hard_floats(200000);
    std::vector<TestType> expected;
    expected.reserve(in.size());
    for (const float x : in) {
        expected.push_back(rvqkv::float_to<TestType>(x));
    }
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        std::vector<TestType> out(in.size());
        rvqkv::convert(in.data(), out.data(), in.size(), *rvqkv::kernels_for(level).value());
        CHECK(first_difference(bits_of(out), bits_of(expected)) == in.size());
    }
}

TEMPLATE_TEST_CASE("convert: writes `count` elements and no more, at any alignment", "[simd][unit]", rvqkv::float16,
                   rvqkv::bfloat16) {
    const std::vector<float> floats = hard_floats(0);
    const std::vector<TestType> halves = all_patterns<TestType>();
    for (const rvqkv::simd_level level : test::levels()) {
        const rvqkv::kernel_table& kernels = *rvqkv::kernels_for(level).value();
        for (std::size_t count = 0; count <= 50; ++count) {
            for (const std::size_t offset : {0U, 1U, 3U}) {
                CAPTURE(rvqkv::name_of(level), count, offset);
                // Exactly as large as needed, so that a sanitizer sees every access beyond.
                const std::vector<float> some_floats(
                    floats.begin() + 100, floats.begin() + 100 + static_cast<std::ptrdiff_t>(count + offset));
                const std::vector<TestType> some_halves(
                    halves.begin() + 31000, halves.begin() + 31000 + static_cast<std::ptrdiff_t>(count + offset));
                std::vector<TestType> narrow(offset + count, TestType{0x1234});
                std::vector<float> wide(offset + count, -77.0F);
                rvqkv::convert(some_floats.data() + offset, narrow.data() + offset, count, kernels);
                rvqkv::convert(some_halves.data() + offset, wide.data() + offset, count, kernels);
                std::vector<TestType> expected_narrow(offset, TestType{0x1234});
                std::vector<float> expected_wide(offset, -77.0F);
                for (std::size_t i = offset; i < offset + count; ++i) {
                    expected_narrow.push_back(rvqkv::float_to<TestType>(some_floats[i]));
                    expected_wide.push_back(rvqkv::to_float(some_halves[i]));
                }
                REQUIRE(bits_of(narrow) == bits_of(expected_narrow));
                REQUIRE(test::bits_of(wide) == test::bits_of(expected_wide));

                std::vector<TestType> guarded(count + 1, TestType{0x1234});
                std::vector<float> guarded_wide(count + 1, -77.0F);
                rvqkv::convert(some_floats.data(), guarded.data(), count, kernels);
                rvqkv::convert(some_halves.data(), guarded_wide.data(), count, kernels);
                REQUIRE(guarded[count].bits == 0x1234);
                REQUIRE(guarded_wide[count] == -77.0F);
            }
        }
    }
}

TEST_CASE("convert: float to float is a copy, NaN payloads included", "[simd][unit]") {
    const std::vector<float> in = hard_floats(100);
    std::vector<float> out(in.size() + 1, 5.0F);
    rvqkv::convert(in.data(), out.data(), in.size());
    CHECK(out.back() == 5.0F);
    out.pop_back();
    CHECK(test::bits_of(out) == test::bits_of(in));
    rvqkv::convert(static_cast<const float*>(nullptr), static_cast<float*>(nullptr), 0);
}

TEST_CASE("convert: takes the machine's best level by itself", "[simd][unit]") {
    const std::vector<float> in = {1.0F, -0.1F, 1e9F};
    std::vector<rvqkv::float16> out(3);
    rvqkv::convert(in.data(), out.data(), in.size());
    CHECK(bits_of(out) == std::vector<std::uint16_t>{0x3c00, 0xae66, 0x7c00});
}

TEMPLATE_TEST_CASE("convert: rounds every float there is as the scalar function does", "[simd][slow][differential]",
                   rvqkv::float16, rvqkv::bfloat16) {
    constexpr std::size_t block = 65536;
    const std::size_t blocks = test::rounds(65536, 64);
    std::vector<float> in(block);
    std::vector<TestType> out(block);
    std::vector<TestType> expected(block);
    const auto levels = test::levels();
    for (std::size_t i = 0; i < blocks; ++i) {
        const auto first = static_cast<std::uint32_t>(i * 65536 / blocks * block);
        for (std::uint32_t j = 0; j < block; ++j) {
            in[j] = std::bit_cast<float>(first + j);
            expected[j] = rvqkv::float_to<TestType>(in[j]);
        }
        for (const rvqkv::simd_level level : levels) {
            rvqkv::convert(in.data(), out.data(), block, *rvqkv::kernels_for(level).value());
            if (out != expected) {
                CAPTURE(rvqkv::name_of(level), first);
                REQUIRE(first_difference(bits_of(out), bits_of(expected)) == block);
            }
        }
    }
    CHECK(blocks > 0);
}
