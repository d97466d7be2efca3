// SPDX-License-Identifier: MIT
/// @file
/// Nearest codeword as one writes it with Eigen: a matrix product, then the best of each row. Plain pointers only, so
/// that nothing else is compiled with this file's flags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bench {

/// `x` `[rows, dim]`, `codewords` `[count, dim]`, `offsets` `[count]` = -|c|^2 / 2; `codes` `[rows]`. `scores`
/// `[rows, count]` is scratch.
void eigen_nearest(const float* x, std::size_t rows, const float* codewords, const float* offsets, std::size_t count,
                   std::size_t dim, float* scores, std::uint16_t* codes);

/// The same for every depth, subtracting in between; `x` is overwritten. `codewords` `[depths, count, dim]`.
void eigen_encode(float* x, std::size_t rows, const float* codewords, const float* offsets, std::size_t depths,
                  std::size_t count, std::size_t dim, float* scores, std::uint16_t* codes);

}  // namespace bench
