// SPDX-License-Identifier: MIT
#include "baselines.hpp"

#include <rvqkv/core/half.hpp>

#include <algorithm>
#include <cmath>

namespace cli {
namespace {

float as_float16(float number) {
    return rvqkv::to_float(rvqkv::to_float16(number));
}

/// q8_0: the largest magnitude becomes 127. q4_0: the number of largest magnitude becomes -8, whatever its sign.
void round_trip_signed(unsigned bits, std::span<float> block) {
    const float largest =
        *std::max_element(block.begin(), block.end(), [](float a, float b) { return std::fabs(a) < std::fabs(b); });
    const auto steps = static_cast<float>(1U << (bits - 1U));
    const float step = bits == 8 ? std::fabs(largest) / (steps - 1.0F) : -largest / steps;
    const float stored = as_float16(step);
    for (float& number : block) {
        const float code = step == 0.0F ? 0.0F : std::clamp(std::round(number / step), -steps, steps - 1.0F);
        number = code * stored;
    }
}

void round_trip_from_smallest(unsigned bits, std::span<float> block) {
    const auto [smallest, largest] = std::minmax_element(block.begin(), block.end());
    const auto steps = static_cast<float>((1U << bits) - 1U);
    const float base = as_float16(*smallest);
    const float step = as_float16((*largest - *smallest) / steps);
    for (float& number : block) {
        const float code = step == 0.0F ? 0.0F : std::clamp(std::round((number - base) / step), 0.0F, steps);
        number = base + code * step;
    }
}

}  // namespace

void round_trip(const baseline& how, std::span<float> numbers) {
    for (std::size_t first = 0; first < numbers.size(); first += baseline::block) {
        const std::span<float> block = numbers.subspan(first, baseline::block);
        how.has_smallest ? round_trip_from_smallest(how.bits, block) : round_trip_signed(how.bits, block);
    }
}

}  // namespace cli
