// SPDX-License-Identifier: MIT
#include "rvqkv/learn/random.hpp"

#include "support/catch.hpp"

#include <array>
#include <cstddef>
#include <cstdint>

TEST_CASE("random_source: repeats the published SplitMix64 sequence", "[learn][unit]") {
    rvqkv::random_source random(1234567);
    CHECK(random.next() == 6457827717110365317U);
    CHECK(random.next() == 3203168211198807973U);
    CHECK(random.next() == 9817491932198370423U);
}

TEST_CASE("random_source: goes on from its state", "[learn][unit]") {
    rvqkv::random_source random(7);
    static_cast<void>(random.next());
    rvqkv::random_source resumed(random.state());
    CHECK(random.next() == resumed.next());
}

TEST_CASE("random_source: below and uniform stay in range and reach all of it", "[learn][property]") {
    rvqkv::random_source random(42);
    std::array<std::size_t, 7> seen{};
    double sum = 0.0;
    constexpr int draws = 70000;
    for (int i = 0; i < draws; ++i) {
        ++seen.at(random.below(seen.size()));
        const double value = random.uniform();
        REQUIRE(value >= 0.0);
        REQUIRE(value < 1.0);
        sum += value;
    }
    for (const std::size_t count : seen) {
        CHECK(count > 9600);  // 10000 expected, standard deviation 93
        CHECK(count < 10400);
    }
    CHECK(sum / draws == Approx(0.5).margin(0.006));
    CHECK(random.below(1) == 0);
}

TEST_CASE("random_source: below is uniform for ranges that do not divide 2^64", "[learn][property]") {
    rvqkv::random_source random(43);
    constexpr std::size_t quarter = std::size_t{1} << 62U;
    int low = 0;
    for (int i = 0; i < 9000; ++i) {
        low += random.below(3 * quarter) < quarter ? 1 : 0;
    }
    CHECK(low > 2800);  // 3000 expected, standard deviation 45; without drawing again 4500
    CHECK(low < 3200);
}
