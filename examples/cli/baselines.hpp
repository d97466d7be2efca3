// SPDX-License-Identifier: MIT
/// @file
/// Simple quantizers to compare with: round to nearest in blocks of 32 neighbouring channels, the scale (and the
/// smallest value) of each block in float16. They need no training.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

namespace cli {

struct baseline {
    std::string_view name;
    unsigned bits;      ///< Of each number.
    bool has_smallest;  ///< Codes count from the block's smallest value; otherwise they are signed.
    /// With the block's own numbers counted.
    [[nodiscard]] constexpr double bits_per_value() const noexcept {
        return static_cast<double>(bits) + (has_smallest ? 32.0 : 16.0) / static_cast<double>(block);
    }
    static constexpr std::size_t block = 32;
};

/// `q8_0` and `q4_0` are llama.cpp's block formats; `int3` and `int2` the asymmetric ones that KV cache papers start
/// from.
inline constexpr baseline all_baselines[] = {
    {"q8_0", 8, false}, {"q4_0", 4, false}, {"int3", 3, true}, {"int2", 2, true}};

/// What is read back after `numbers` were stored so, in place. Precondition: a whole number of blocks.
void round_trip(const baseline& how, std::span<float> numbers);

}  // namespace cli
