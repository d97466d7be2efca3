// SPDX-License-Identifier: MIT
/// @file
/// Nearest codeword as one writes it with a matrix library: a product, then the best of each row. Plain pointers only,
/// so that nothing else is compiled with this file's flags.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace bench {

/// `scores` `[rows, count]` = `x` `[rows, dim]` times the transpose of `codewords` `[count, dim]`.
struct product {
    const char* name;
    void (*multiply)(const float* x, std::size_t rows, const float* codewords, std::size_t count, std::size_t dim,
                     float* scores);
};

/// Eigen's, and OpenBLAS's when it was there at compile time.
std::span<const product> products();

/// Floats of scratch memory. Rows go in parts whose scores stay in the L2 cache: quicker than all at once.
std::size_t scratch_of(std::size_t count);

/// `offsets` `[count]` = -|c|^2 / 2; `codes` `[rows]`.
void product_nearest(const product& product, const float* x, std::size_t rows, const float* codewords,
                     const float* offsets, std::size_t count, std::size_t dim, float* scores, std::uint16_t* codes);

/// The same for every depth, subtracting in between; `x` is overwritten. `codewords` `[depths, count, dim]`, `offsets`
/// `[depths, count]`, `codes` `[depths, rows]`.
void product_encode(const product& product, float* x, std::size_t rows, const float* codewords, const float* offsets,
                    std::size_t depths, std::size_t count, std::size_t dim, float* scores, std::uint16_t* codes);

/// Whether two searches found the same, but for one in a hundred, which rounding may decide otherwise.
bool agree(std::span<const std::uint16_t> a, std::span<const std::uint16_t> b);

}  // namespace bench
