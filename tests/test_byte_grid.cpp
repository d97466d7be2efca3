// SPDX-License-Identifier: MIT
/// @file
/// Rounding of codebooks so that a channel is one byte: how little numbers move, and which grids are found.
#include "rvqkv/quantize/byte_grid.hpp"

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

namespace {

using rvqkv::byte_grid;
using rvqkv::codebook_shape;

/// Sum over depths of how many steps a channel's codewords lie apart.
double width_in_steps(const codebook_shape& shape, const std::vector<float>& weights, std::size_t channel, float step) {
    double sum = 0.0;
    for (std::size_t depth = 0; depth < shape.depths; ++depth) {
        float low = std::numeric_limits<float>::infinity();
        float high = -low;
        for (std::size_t c = 0; c < shape.codewords; ++c) {
            const float w = weights[(depth * shape.codewords + c) * shape.dim + channel];
            low = std::min(low, w);
            high = std::max(high, w);
        }
        sum += static_cast<double>(high - low) / static_cast<double>(step);
    }
    return sum;
}

}  // namespace

TEST_CASE("round_to_bytes: the finest power of two whose steps fit a byte, and no number moves further", "[quantize]") {
    CAPTURE(test::seed());
    test::random_source random(1);
    for (const codebook_shape& shape : {codebook_shape{3, 128, 8}, {3, 16, 4}, {1, 1, 3}, {16, 4, 8}, {8, 200, 5}}) {
        CAPTURE(shape.depths, shape.codewords, shape.dim);
        const std::vector<float> before = test::make_weights(random, shape);
        std::vector<float> after = before;
        rvqkv::round_to_bytes(shape, after);
        for (std::size_t channel = 0; channel < shape.dim; ++channel) {
            const float step = byte_grid::finest(shape, before, channel).step;
            CHECK(std::exp2(std::round(std::log2(step))) == step);
            for (std::size_t i = channel; i < before.size(); i += shape.dim) {
                REQUIRE(std::fabs(after[i] - before[i]) <= 0.5F * step);
                REQUIRE(std::fabs(after[i]) <= 256.0F * step);  // also exact in bfloat16
                REQUIRE(std::nearbyint(after[i] / step) * step == after[i]);
            }
            CHECK(width_in_steps(shape, after, channel, step) <= 254.0);
            // Half the step would not fit; a codebook of one codeword needs no more than eight bits of it.
            if (shape.codewords > 1) {
                CHECK(width_in_steps(shape, before, channel, 0.5F * step) >
                      254.0 - 3.0 * static_cast<double>(shape.depths) - 128.0);
            }
            CHECK(byte_grid::of(shape, after, channel).step >= step);
        }
        std::vector<float> again = after;
        rvqkv::round_to_bytes(shape, again);
        CHECK(again == after);
    }
}

TEST_CASE("byte_grid: finds the coarsest grid of a power of two, or none", "[quantize][unit]") {
    const codebook_shape shape{2, 2, 2};
    // Channel 0: multiples of 0.25, -31.75 to 31.75 and 0.5 to 1 apart; channel 1: a number that is off any grid.
    std::vector<float> weights = {-31.0F, 1.0F, 31.0F, 2.0F, 0.5F, 0.1F, 0.75F, 1000.0F};
    CHECK(byte_grid::of(shape, weights, 0).step == 0.25F);
    CHECK(byte_grid::of(shape, weights, 1).step == 0.0F);
    weights[0] = -32.0F;  // 126 steps to either side of the middle at depth 0, and 1 at depth 1
    CHECK(byte_grid::of(shape, weights, 0).step == 0.25F);
    weights[0] = -33.0F;
    CHECK(byte_grid::of(shape, weights, 0).step == 0.0F);
    for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
        weights[0] = bad;
        CHECK(byte_grid::of(shape, weights, 0).step == 0.0F);
    }
}

TEST_CASE("round_to_bytes: zeros, tiny and huge numbers stay finite", "[quantize][property]") {
    const codebook_shape shape{2, 4, 1};
    for (const float size : {0.0F, 1e-44F, 1e-38F, 1e-20F, 1e20F, 1e38F}) {
        CAPTURE(size);
        std::vector<float> weights = {size, -size, 0.3F * size, 0.0F, 0.5F * size, 0.1F * size, -0.2F * size, size};
        rvqkv::round_to_bytes(shape, weights);
        CHECK(std::all_of(weights.begin(), weights.end(), [](float w) { return std::isfinite(w); }));
        CHECK(byte_grid::of(shape, weights, 0).step > 0.0F);
    }
}
