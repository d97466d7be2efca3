// SPDX-License-Identifier: MIT
/// @file
/// Numbers as bit patterns, for comparisons in which -0 differs from 0 and a NaN equals itself.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <vector>

namespace test {

[[nodiscard]] inline std::uint32_t bits_of(float number) {
    return std::bit_cast<std::uint32_t>(number);
}

[[nodiscard]] inline std::vector<std::uint32_t> bits_of(std::span<const float> numbers) {
    std::vector<std::uint32_t> bits;
    bits.reserve(numbers.size());
    for (const float number : numbers) {
        bits.push_back(bits_of(number));
    }
    return bits;
}

}  // namespace test
