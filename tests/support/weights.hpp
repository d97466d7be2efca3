// SPDX-License-Identifier: MIT
/// @file
/// Codebooks that nobody trained.
#pragma once

#include "rvqkv/quantize/codebook.hpp"
#include "support/random.hpp"

#include <cstddef>
#include <vector>

namespace test {

/// Random codewords, finer from depth to depth as trained ones are.
[[nodiscard]] inline std::vector<float> make_weights(random_source& random, const rvqkv::codebook_shape& shape) {
    std::vector<float> weights = gaussian_numbers(random, shape.size());
    float size = 1.0F;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        if (i != 0 && i % (shape.codewords * shape.dim) == 0) {
            size *= 0.7F;
        }
        weights[i] *= size;
    }
    return weights;
}

}  // namespace test
