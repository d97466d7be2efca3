// SPDX-License-Identifier: MIT
/// @file
/// What a mean adds to scores, against sums in double: every form of rotary embedding, tiles that follow each other and
/// tiles that do not, at every SIMD level.
#include "rvqkv/attend/mean_bias.hpp"

#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {

/// Rotary embedding of a head, and the memory of a bias for some rows.
struct biased_head {
    rvqkv::rope rope;
    rvqkv::tile_rope plain;
    rvqkv::mean_bias bias;
    std::vector<std::byte> memory;
    rvqkv::mean_bias::scratch scratch;

    biased_head(const rvqkv::rope_config& config, std::size_t head_dim, std::size_t rows,
                const rvqkv::kernel_table& kernels)
        : rope(rvqkv::rope::create(config, head_dim).value()) {
        std::vector<std::uint16_t> order(head_dim);
        std::iota(order.begin(), order.end(), std::uint16_t{0});
        plain = rvqkv::tile_rope::create(rope, order, kernels).value();
        bias = rvqkv::mean_bias::create(rope, kernels).value();
        rvqkv::detail::scratch_dealer counter;
        static_cast<void>(rvqkv::mean_bias::scratch(bias, plain, rows, counter));
        memory.resize(counter.used());
        rvqkv::detail::scratch_dealer dealer(memory.data());
        scratch = rvqkv::mean_bias::scratch(bias, plain, rows, dealer);
    }
};

/// `<query, turn(mean, position)>`, and the sum of the lengths of its terms.
struct biased_score {
    double value = 0.0;
    double terms = 0.0;
};
biased_score expected_bias(const rvqkv::rope& rope, const float* query, const float* mean, std::size_t head_dim,
                           std::int64_t position) {
    biased_score score;
    for (std::size_t i = 2 * rope.pairs(); i < head_dim; ++i) {
        const double product = static_cast<double>(query[i]) * static_cast<double>(mean[i]);
        score.value += product;
        score.terms += std::fabs(product);
    }
    for (std::size_t pair = 0; pair < rope.pairs(); ++pair) {
        const double angle = static_cast<double>(position) * rope.frequency(pair);
        const auto first = rope.first_channel(pair);
        const auto second = rope.second_channel(pair);
        const auto a = static_cast<double>(mean[first]);
        const auto b = static_cast<double>(mean[second]);
        const auto x = static_cast<double>(query[first]);
        const auto y = static_cast<double>(query[second]);
        score.value += rope.attention_factor() * (x * (a * std::cos(angle) - b * std::sin(angle)) +
                                                  y * (a * std::sin(angle) + b * std::cos(angle)));
        score.terms += rope.attention_factor() * std::hypot(a, b) * std::hypot(x, y);
    }
    return score;
}

rvqkv::rope_config random_rope(test::random_source& random, std::size_t head_dim) {
    rvqkv::rope_config config;
    config.pairs = static_cast<rvqkv::rope_pairs>(random.integer(0, 1));
    config.dims = random.integer(0, 1) == 0 ? 0 : 2 * random.integer(1, head_dim / 2);
    constexpr double bases[] = {10000.0, 500000.0, 100.0};
    config.base = bases[random.integer(0, 2)];
    config.position_scale = random.integer(0, 2) == 0 ? 0.125 : 1.0;
    config.attention_factor = random.integer(0, 1) == 0 ? 1.0 : 1.3;
    if (random.integer(0, 3) == 0) {
        config.frequencies.resize((config.dims == 0 ? head_dim : config.dims) / 2);
        for (double& frequency : config.frequencies) {
            frequency = static_cast<double>(random.uniform(-0.15F, 0.15F));
        }
        std::sort(config.frequencies.begin(), config.frequencies.end(),
                  [](double a, double b) { return std::fabs(a) > std::fabs(b); });
    }
    return config;
}

}  // namespace

TEST_CASE("mean_bias: adds what the turned mean adds, as float32 sums would", "[attend][simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(1);
    double worst = 0.0;
    for (std::size_t round = 0; round < test::rounds(40); ++round) {
        const std::size_t head_dim = round == 0 ? 128 : 2 * random.integer(1, 80);
        const rvqkv::rope_config config = random_rope(random, head_dim);
        const std::size_t rows = random.integer(1, 7);
        const std::size_t tiles = random.integer(1, 40);
        const std::size_t stride = tiles * rvqkv::tile_tokens + random.integer(0, 9);
        std::vector<std::int64_t> positions(tiles);
        auto position = static_cast<std::int64_t>(random.integer(0, 200000)) - 2000;
        for (std::int64_t& first : positions) {
            first = position;
            position += random.integer(0, 9) == 0 ? static_cast<std::int64_t>(random.integer(0, 5000)) - 2500
                                                  : static_cast<std::int64_t>(rvqkv::tile_tokens);
        }
        CAPTURE(round, head_dim, config.dims, config.base, config.position_scale, config.frequencies.size(), rows,
                tiles);
        for (std::size_t head = 0; head < 2; ++head) {  // the second goes back to where the first began
            const std::vector<float> queries = test::gaussian_numbers(random, rows * head_dim);
            const std::vector<float> mean = test::gaussian_numbers(random, head_dim);
            for (const rvqkv::simd_level level : test::levels()) {
                CAPTURE(rvqkv::name_of(level));
                biased_head with(config, head_dim, rows, *rvqkv::kernels_for(level).value());
                std::vector<float> out;
                for (std::size_t time = 0; time <= head; ++time) {
                    out.assign(rows * stride, 1.0F);
                    with.bias.prepare({queries.data(), rows, head_dim}, mean.data(), head_dim, with.plain,
                                      with.scratch);
                    const std::size_t some = tiles / 2;  // in two calls, as chunks are
                    with.bias.add(positions.data(), some, rows, out.data(), stride, with.scratch);
                    with.bias.add(positions.data() + some, tiles - some, rows, out.data() + some * rvqkv::tile_tokens,
                                  stride, with.scratch);
                }
                bool beside = false;
                for (std::size_t row = 0; row < rows; ++row) {
                    for (std::size_t i = 0; i < stride; ++i) {
                        const float got = out[row * stride + i];
                        if (i >= tiles * rvqkv::tile_tokens) {
                            beside = beside || got < 1.0F || got > 1.0F;
                            continue;
                        }
                        const auto place = static_cast<std::int64_t>(i % rvqkv::tile_tokens);
                        const biased_score score =
                            expected_bias(with.rope, queries.data() + row * head_dim, mean.data(), head_dim,
                                          positions[i / rvqkv::tile_tokens] + place);
                        const double error = std::fabs(static_cast<double>(got) - 1.0 - score.value);
                        worst = std::max(worst, error / (1.0 + score.terms));
                    }
                }
                CHECK_FALSE(beside);
            }
        }
    }
    CAPTURE(worst);
    CHECK(worst <= 0x1p-21);
}

TEST_CASE("mean_bias: a model without positions has the same bias everywhere", "[attend][unit]") {
    CAPTURE(test::seed());
    test::random_source random(2);
    const std::vector<float> query = test::gaussian_numbers(random, 24);
    const std::vector<float> mean = test::gaussian_numbers(random, 24);
    const rvqkv::rope none;
    const rvqkv::tile_rope plain;
    const double expected = std::inner_product(query.begin(), query.end(), mean.begin(), 0.0);
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        const auto bias = rvqkv::mean_bias::create(none, *rvqkv::kernels_for(level).value()).value();
        alignas(64) std::byte memory[1024];
        rvqkv::detail::scratch_dealer dealer(memory);
        rvqkv::mean_bias::scratch scratch(bias, plain, 1, dealer);
        REQUIRE(dealer.used() <= sizeof(memory));
        bias.prepare({query.data(), 1, 24}, mean.data(), 24, plain, scratch);
        const std::vector<std::int64_t> positions = {7, 71};
        std::vector<float> out(2 * rvqkv::tile_tokens);
        bias.add(positions.data(), 2, 1, out.data(), out.size(), scratch);
        for (const float got : out) {
            CHECK(static_cast<double>(got) == Approx(expected).epsilon(1e-5));
        }
    }
}

TEST_CASE("mean_bias: does not depend on what its scratch was used for before", "[attend][property]") {
    CAPTURE(test::seed());
    test::random_source random(3);
    const std::vector<float> query = test::gaussian_numbers(random, 64);
    const std::vector<float> mean = test::gaussian_numbers(random, 64);
    std::vector<std::int64_t> positions(20);
    const auto add = [&](biased_head& with, std::int64_t first) {
        for (std::int64_t& position : positions) {
            position = first;
            first += static_cast<std::int64_t>(rvqkv::tile_tokens);
        }
        std::vector<float> out(positions.size() * rvqkv::tile_tokens);
        with.bias.prepare({query.data(), 1, 64}, mean.data(), 64, with.plain, with.scratch);
        with.bias.add(positions.data(), positions.size(), 1, out.data(), out.size(), with.scratch);
        return out;
    };
    const rvqkv::kernel_table& kernels = rvqkv::best_kernels();
    biased_head used({}, 64, 1, kernels);
    // Where a worker's last head began, or went on, may be some tiles before where its next begins.
    for (const std::int64_t first : {0, 64, 640, 640, 1000000, 1000000 + 64 * 17, 64}) {
        CAPTURE(first);
        biased_head fresh({}, 64, 1, kernels);
        CHECK(add(used, first) == add(fresh, first));
    }
}
