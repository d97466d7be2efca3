// SPDX-License-Identifier: MIT
/// @file
/// What the benchmarks compute on: the same numbers for us and for every rival.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/quantize/codebook.hpp"

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>

namespace bench {

/// `count` numbers drawn from N(0, 1).
inline rvqkv::aligned_buffer<float> gaussian(std::size_t count, std::uint64_t seed) {
    std::mt19937_64 engine(seed);
    std::normal_distribution<float> normal;
    rvqkv::aligned_buffer<float> numbers(count);
    for (float& number : numbers.span()) {
        number = normal(engine);
    }
    return numbers;
}

/// A codebook whose depths shrink as trained ones do: what is left after a depth is about 0.7 of what was there.
inline rvqkv::residual_codebook<> codebook(const rvqkv::codebook_shape& shape, std::uint64_t seed = 1) {
    rvqkv::aligned_buffer<float> weights = gaussian(shape.size(), seed);
    float size = 0.6F;
    for (std::size_t depth = 0; depth < shape.depths; ++depth, size *= 0.7F) {
        for (float& weight : weights.span().subspan(depth * shape.codewords * shape.dim, shape.codewords * shape.dim)) {
            weight *= size;
        }
    }
    return rvqkv::residual_codebook<>::create(shape, std::span<const float>(weights.span())).value();
}

}  // namespace bench
