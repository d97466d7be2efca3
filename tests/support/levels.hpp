// SPDX-License-Identifier: MIT
/// @file
/// The instruction sets that this machine can run: `for (auto level : test::levels())`, or `GENERATE(from_range(...))`.
#pragma once

#include "rvqkv/core/simd_level.hpp"

#include <vector>

namespace test {

[[nodiscard]] inline std::vector<rvqkv::simd_level> levels() {
    std::vector<rvqkv::simd_level> available;
    for (const rvqkv::simd_level level : rvqkv::all_simd_levels) {
        if (rvqkv::is_available(level)) {
            available.push_back(level);
        }
    }
    return available;
}

}  // namespace test
