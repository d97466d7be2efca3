// SPDX-License-Identifier: MIT
/// @file
/// Random inputs that repeat: every number follows from `test::seed()`, which `RVQKV_TEST_SEED` replaces.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <random>
#include <string_view>
#include <vector>

namespace test {

/// Seed of this run.
[[nodiscard]] inline std::uint64_t seed() {
    static const std::uint64_t value = [] {
        const char* const wanted = std::getenv("RVQKV_TEST_SEED");
        return wanted != nullptr ? std::strtoull(wanted, nullptr, 0) : 20241015ULL;
    }();
    return value;
}

/// `full`, or the percentage of it that `RVQKV_TEST_SIZE` names, at least `least`: how many rounds a slow test does.
[[nodiscard]] inline std::size_t rounds(std::size_t full, std::size_t least = 1) {
    const char* const percent = std::getenv("RVQKV_TEST_SIZE");
    if (percent == nullptr) {
        return full;
    }
    const std::size_t part = full * std::strtoull(percent, nullptr, 10) / 100;
    return part < least ? least : part;
}

/// A generator for one test; `salt` tells apart several in one run.
class random_source {
public:
    explicit random_source(std::uint64_t salt = 0) : engine_(seed() + 0x9e3779b97f4a7c15ULL * salt) {}

    [[nodiscard]] float gaussian() { return normal_(engine_); }
    /// In [low, high).
    [[nodiscard]] float uniform(float low, float high) {
        return std::uniform_real_distribution<float>(low, high)(engine_);
    }
    /// In [low, high], both included.
    [[nodiscard]] std::size_t integer(std::size_t low, std::size_t high) {
        return std::uniform_int_distribution<std::size_t>(low, high)(engine_);
    }
    [[nodiscard]] std::mt19937_64& engine() noexcept { return engine_; }

private:
    std::mt19937_64 engine_;
    std::normal_distribution<float> normal_;
};

/// Shapes of data that quantizers meet, and some that they should survive.
enum class family { gaussian, cauchy, constant, zero, huge, denormal };
inline constexpr family all_families[] = {family::gaussian, family::cauchy, family::constant,
                                          family::zero,     family::huge,   family::denormal};

[[nodiscard]] constexpr std::string_view name_of(family kind) {
    switch (kind) {
        case family::gaussian: return "gaussian";
        case family::cauchy: return "cauchy";
        case family::constant: return "constant";
        case family::zero: return "zero";
        case family::huge: return "huge";
        case family::denormal: return "denormal";
    }
    return "unknown";
}

/// `count` finite numbers of a family. `huge` squares without overflow over some thousand channels.
[[nodiscard]] inline std::vector<float> make_numbers(random_source& random, family kind, std::size_t count) {
    std::vector<float> numbers(count);
    for (float& number : numbers) {
        switch (kind) {
            case family::gaussian: number = random.gaussian(); break;
            case family::cauchy: number = std::tan(1.57F * random.uniform(-1.0F, 1.0F)); break;
            case family::constant: number = 0.75F; break;
            case family::zero: number = 0.0F; break;
            case family::huge: number = 1e17F * random.gaussian(); break;
            case family::denormal: number = 16.0F * std::numeric_limits<float>::denorm_min() * random.gaussian(); break;
        }
    }
    return numbers;
}

[[nodiscard]] inline std::vector<float> gaussian_numbers(random_source& random, std::size_t count) {
    return make_numbers(random, family::gaussian, count);
}

/// Small whole numbers in floats: sums and products of them are exact, so results must be equal bit for bit.
[[nodiscard]] inline std::vector<float> whole_numbers(random_source& random, std::size_t count, int limit = 8) {
    std::vector<float> numbers(count);
    std::uniform_int_distribution<int> distribution(-limit, limit);
    for (float& number : numbers) {
        number = static_cast<float>(distribution(random.engine()));
    }
    return numbers;
}

}  // namespace test
