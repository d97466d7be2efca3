// SPDX-License-Identifier: MIT
/// @file
/// The 16-bit types, one value at a time, against plain arithmetic in double and against the machine's own conversion.
#include "rvqkv/core/half.hpp"

#include "rvqkv/core/simd_level.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#if RVQKV_X86
#include <immintrin.h>
#endif

namespace {

/// A binary format as IEEE 754 describes it.
struct format {
    int fraction_bits;
    int least_exponent;     ///< Of normal numbers.
    int greatest_exponent;  ///< The same.
};
constexpr format binary16{10, -14, 15};
constexpr format brain16{7, -126, 127};

/// The number that a 16-bit pattern stands for. Not for NaN.
double value_of(std::uint16_t bits, const format& type) {
    const int fraction = bits & ((1 << type.fraction_bits) - 1);
    const int exponent = (bits & 0x7fff) >> type.fraction_bits;
    const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
    if (exponent == type.greatest_exponent * 2 + 1) {
        return sign * std::numeric_limits<double>::infinity();
    }
    const int hidden = exponent == 0 ? 0 : 1 << type.fraction_bits;
    const int scale = (exponent == 0 ? 1 : exponent) - type.greatest_exponent - type.fraction_bits;
    return sign * std::ldexp(static_cast<double>(hidden + fraction), scale);
}

bool is_nan(std::uint16_t bits, const format& type) {
    return (bits & 0x7fff) > (((1 << (15 - type.fraction_bits)) - 1) << type.fraction_bits);
}

/// `x` rounded to the format: to the nearest multiple of its last place, ties to the even one, by the C library.
double rounded(float x, const format& type) {
    if (x == 0.0F || std::isinf(x)) {
        return static_cast<double>(x);
    }
    const double exact = static_cast<double>(x);
    const int exponent = std::max(std::ilogb(exact), type.least_exponent);
    const double near =
        std::ldexp(std::nearbyint(std::ldexp(exact, type.fraction_bits - exponent)), exponent - type.fraction_bits);
    return std::fabs(near) >= std::ldexp(1.0, type.greatest_exponent + 1) ? std::copysign(HUGE_VAL, exact) : near;
}

/// Floats that sit on, between and beside the numbers of a format, and random ones of every exponent.
std::vector<float> hard_floats(const format& type) {
    std::vector<float> floats;
    for (std::uint32_t bits = 0; bits < 65536; ++bits) {
        const auto pattern = static_cast<std::uint16_t>(bits);
        const auto next = static_cast<std::uint16_t>(bits + 1);
        if (is_nan(pattern, type) || is_nan(next, type) || (next & 0x7fffU) == 0) {
            continue;
        }
        double above = value_of(next, type);
        if (std::isinf(above)) {
            above = std::copysign(std::ldexp(1.0, type.greatest_exponent + 1), above);
        }
        const auto exact = static_cast<float>(value_of(pattern, type));
        const auto middle = static_cast<float>((value_of(pattern, type) + above) / 2);
        floats.insert(floats.end(),
                      {exact, std::nextafter(middle, -HUGE_VALF), middle, std::nextafter(middle, HUGE_VALF)});
    }
    test::random_source random(1);
    for (int i = 0; i < 200000; ++i) {
        const auto x = std::bit_cast<float>(static_cast<std::uint32_t>(random.engine()()));
        if (!std::isnan(x)) {
            floats.push_back(x);
        }
    }
    constexpr float infinity = std::numeric_limits<float>::infinity();
    floats.insert(floats.end(), {0.0F, -0.0F, infinity, -infinity, std::numeric_limits<float>::max(),
                                 std::numeric_limits<float>::lowest(), std::numeric_limits<float>::denorm_min()});
    return floats;
}

/// NaNs of many payloads, quiet and signaling.
std::vector<std::uint32_t> nan_patterns() {
    std::vector<std::uint32_t> patterns;
    for (std::uint32_t payload = 1; payload < 0x800000U; payload = payload * 2 + payload / 3 + 1) {
        patterns.push_back(0x7f800000U | payload);
        patterns.push_back(0xff800000U | payload);
    }
    for (std::uint32_t bit = 0; bit < 23; ++bit) {
        patterns.push_back(0x7f800000U | (1U << bit));
        patterns.push_back(0xff800000U | (1U << bit));
    }
    return patterns;
}

static_assert(rvqkv::to_float(rvqkv::float16{0x3c00}) == 1.0F);
static_assert(rvqkv::to_float(rvqkv::bfloat16{0x3f80}) == 1.0F);
static_assert(rvqkv::to_float16(-2.0F).bits == 0xc000);
static_assert(rvqkv::to_bfloat16(-2.0F).bits == 0xc000);
static_assert(sizeof(rvqkv::float16) == 2 && sizeof(rvqkv::bfloat16) == 2);
static_assert(rvqkv::TensorElement<float> && rvqkv::TensorElement<rvqkv::float16> &&
              rvqkv::TensorElement<rvqkv::bfloat16> && !rvqkv::TensorElement<double>);

#if RVQKV_X86
__attribute__((target("f16c"))) float hardware_to_float(std::uint16_t bits) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}
__attribute__((target("f16c"))) std::uint16_t hardware_to_float16(float value) {
    return static_cast<std::uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT), 0));
}
const bool has_hardware = rvqkv::is_available(rvqkv::simd_level::avx2);
#elif RVQKV_NEON
float hardware_to_float(std::uint16_t bits) {
    return static_cast<float>(std::bit_cast<__fp16>(bits));
}
std::uint16_t hardware_to_float16(float value) {
    return std::bit_cast<std::uint16_t>(static_cast<__fp16>(value));
}
const bool has_hardware = true;
#else
float hardware_to_float(std::uint16_t bits) {
    return rvqkv::to_float(rvqkv::float16{bits});
}
std::uint16_t hardware_to_float16(float value) {
    return rvqkv::to_float16(value).bits;
}
const bool has_hardware = false;
#endif

}  // namespace

TEST_CASE("to_float: gives the number of every 16-bit pattern", "[core][unit]") {
    std::size_t wrong = 0;
    std::size_t wrong_nan = 0;
    for (std::uint32_t i = 0; i < 65536; ++i) {
        const auto bits = static_cast<std::uint16_t>(i);
        const float half = rvqkv::to_float(rvqkv::float16{bits});
        const float brain = rvqkv::to_float(rvqkv::bfloat16{bits});
        if (is_nan(bits, binary16)) {
            wrong_nan += std::isnan(half) && std::signbit(half) == (bits >> 15U != 0) ? 0 : 1;
        } else {
            wrong += test::bits_of(half) == test::bits_of(static_cast<float>(value_of(bits, binary16))) ? 0 : 1;
        }
        if (is_nan(bits, brain16)) {
            wrong_nan += std::isnan(brain) && std::signbit(brain) == (bits >> 15U != 0) ? 0 : 1;
        } else {
            wrong += test::bits_of(brain) == test::bits_of(static_cast<float>(value_of(bits, brain16))) ? 0 : 1;
        }
    }
    CHECK(wrong == 0);
    CHECK(wrong_nan == 0);
}

TEST_CASE("to_float16, to_bfloat16: bring every pattern back", "[core][unit]") {
    std::size_t wrong = 0;
    for (std::uint32_t i = 0; i < 65536; ++i) {
        const auto bits = static_cast<std::uint16_t>(i);
        // A NaN comes back with its payload, made quiet.
        const std::uint32_t half = bits | (is_nan(bits, binary16) ? 0x200U : 0U);
        const std::uint32_t brain = bits | (is_nan(bits, brain16) ? 0x40U : 0U);
        wrong += rvqkv::to_float16(rvqkv::to_float(rvqkv::float16{bits})).bits == half ? 0 : 1;
        wrong += rvqkv::to_bfloat16(rvqkv::to_float(rvqkv::bfloat16{bits})).bits == brain ? 0 : 1;
    }
    CHECK(wrong == 0);
}

TEST_CASE("to_float16: rounds to nearest, ties to even", "[core][differential]") {
    CAPTURE(test::seed());
    std::vector<float> wrong;
    for (const float x : hard_floats(binary16)) {
        const auto expected = static_cast<float>(rounded(x, binary16));
        if (test::bits_of(rvqkv::to_float(rvqkv::to_float16(x))) != test::bits_of(expected)) {
            wrong.push_back(x);
        }
    }
    CAPTURE(wrong);
    CHECK(wrong.empty());
}

TEST_CASE("to_bfloat16: rounds to nearest, ties to even", "[core][differential]") {
    CAPTURE(test::seed());
    std::vector<float> wrong;
    for (const float x : hard_floats(brain16)) {
        const auto expected = static_cast<float>(rounded(x, brain16));
        if (test::bits_of(rvqkv::to_float(rvqkv::to_bfloat16(x))) != test::bits_of(expected)) {
            wrong.push_back(x);
        }
    }
    CAPTURE(wrong);
    CHECK(wrong.empty());
}

TEST_CASE("to_float16, to_bfloat16: keep NaN a NaN of the same sign, quiet", "[core][unit]") {
    std::size_t wrong = 0;
    for (const std::uint32_t pattern : nan_patterns()) {
        const auto x = std::bit_cast<float>(pattern);
        const std::uint16_t half = rvqkv::to_float16(x).bits;
        const std::uint16_t brain = rvqkv::to_bfloat16(x).bits;
        wrong += is_nan(half, binary16) && (half & 0x200) != 0 && half >> 15U == pattern >> 31U ? 0 : 1;
        wrong += is_nan(brain, brain16) && (brain & 0x40) != 0 && brain >> 15U == pattern >> 31U ? 0 : 1;
    }
    CHECK(wrong == 0);
}

TEST_CASE("float16: converts as the machine does, bit for bit", "[core][differential]") {
    if (!has_hardware) {
        WARN("this machine has no conversion of its own");
        return;
    }
    std::size_t wrong = 0;
    for (std::uint32_t i = 0; i < 65536; ++i) {
        const auto bits = static_cast<std::uint16_t>(i);
        const std::uint32_t expected = test::bits_of(hardware_to_float(bits));
        wrong += test::bits_of(rvqkv::to_float(rvqkv::float16{bits})) == expected ? 0 : 1;
    }
    CHECK(wrong == 0);
    for (const float x : hard_floats(binary16)) {
        wrong += rvqkv::to_float16(x).bits == hardware_to_float16(x) ? 0 : 1;
    }
    CHECK(wrong == 0);
    for (const std::uint32_t pattern : nan_patterns()) {
        const auto x = std::bit_cast<float>(pattern);
        wrong += rvqkv::to_float16(x).bits == hardware_to_float16(x) ? 0 : 1;
    }
    CHECK(wrong == 0);
}

TEST_CASE("float_to: goes to each element type", "[core][unit]") {
    CHECK(rvqkv::float_to<float>(0.1F) == 0.1F);
    CHECK(rvqkv::float_to<rvqkv::float16>(0.1F).bits == 0x2e66);
    CHECK(rvqkv::float_to<rvqkv::bfloat16>(0.1F).bits == 0x3dcd);
    CHECK(rvqkv::to_float(0.1F) == 0.1F);
}

TEST_CASE("dtype: knows its name, size and C++ type", "[core][unit]") {
    CHECK(rvqkv::name_of(rvqkv::dtype::float32) == "float32");
    CHECK(rvqkv::name_of(rvqkv::dtype::float16) == "float16");
    CHECK(rvqkv::name_of(rvqkv::dtype::bfloat16) == "bfloat16");
    CHECK(rvqkv::name_of(static_cast<rvqkv::dtype>(9)) == "unknown");
    CHECK(rvqkv::size_of(rvqkv::dtype::float32) == sizeof(float));
    CHECK(rvqkv::size_of(rvqkv::dtype::float16) == sizeof(rvqkv::float16));
    CHECK(rvqkv::size_of(rvqkv::dtype::bfloat16) == sizeof(rvqkv::bfloat16));
    CHECK(rvqkv::dtype_of<float> == rvqkv::dtype::float32);
    CHECK(rvqkv::dtype_of<rvqkv::float16> == rvqkv::dtype::float16);
    CHECK(rvqkv::dtype_of<rvqkv::bfloat16> == rvqkv::dtype::bfloat16);
}
