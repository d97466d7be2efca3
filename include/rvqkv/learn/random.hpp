// SPDX-License-Identifier: MIT
/// @file
/// Random numbers for training: one 64-bit state, the same sequence on every platform (the standard library's
/// distributions promise neither).
#pragma once

#include "rvqkv/core/config.hpp"

#include <cstddef>
#include <cstdint>

RVQKV_NAMESPACE_BEGIN

/// SplitMix64 (Steele, Lea and Flood, 2014). Its whole state is one number, so training state saves and resumes
/// exactly. Threads: one each.
class random_source {
public:
    explicit random_source(std::uint64_t seed = 0) noexcept : state_(seed) {}
    [[nodiscard]] std::uint64_t state() const noexcept { return state_; }

    /// 64 random bits.
    std::uint64_t next() noexcept {
        state_ += 0x9e3779b97f4a7c15U;
        std::uint64_t z = state_;
        z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9U;
        z = (z ^ (z >> 27U)) * 0x94d049bb133111ebU;
        return z ^ (z >> 31U);
    }
    /// Uniform in [0, 1), 53 bits.
    double uniform() noexcept { return static_cast<double>(next() >> 11U) * 0x1p-53; }
    /// Uniform in [0, count). Precondition: `count > 0`. Draws again where the range does not divide 2^64.
    std::size_t below(std::size_t count) noexcept {
        RVQKV_ASSERT(count > 0);
        const std::uint64_t range = count;
        const std::uint64_t rejected = (0 - range) % range;  // 2^64 mod count
        std::uint64_t draw = next();
        while (draw < rejected) {
            draw = next();
        }
        return static_cast<std::size_t>(draw % range);
    }

private:
    std::uint64_t state_;
};

RVQKV_NAMESPACE_END
