// SPDX-License-Identifier: MIT
/// @file
/// What the benchmarks compute on, the same numbers for us and for every rival: the `.npy` files that prepare.py made
/// of a real model's keys, and codebooks trained on them.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/quantize/codebook.hpp"

#include <cstddef>
#include <string>
#include <vector>

namespace bench {

/// The paper's shape, its cheaper sister, and the small codebooks that stay in registers. prepare.py trains these.
inline constexpr rvqkv::codebook_shape paper{8, 2048, 32};
inline constexpr rvqkv::codebook_shape light{10, 256, 32};
inline constexpr rvqkv::codebook_shape small_shapes[] = {{3, 256, 8}, {3, 128, 8}, {4, 64, 8}, {5, 16, 8}, {3, 16, 4}};

/// Where the files are; to be set before anything below is called.
void set_data_folder(std::string folder);

/// Vectors `[n, dim]` that no codebook was trained on, or those that they were trained on. Exits with a message when
/// the file is missing.
const rvqkv::aligned_buffer<float>& held_out_vectors(std::size_t dim);
const rvqkv::aligned_buffer<float>& training_vectors(std::size_t dim);

/// Trained weights `[depths, codewords, dim]`.
const rvqkv::aligned_buffer<float>& weights(const rvqkv::codebook_shape& shape);

/// Equal codebooks in different memory. A decode step uses those of one layer after the other, so that none is found in
/// the caches near the core; taking these in turn does the same.
inline constexpr std::size_t copies = 4;
const std::vector<rvqkv::residual_codebook<>>& codebooks(const rvqkv::codebook_shape& shape);

/// "codewords:2048/dim:32/rows:64", with "depths:8/" in front where all depths take part.
std::string label(const rvqkv::codebook_shape& shape, std::size_t rows, bool with_depths = true);

/// One level's name as benchmarks carry it: "level:avx2".
std::string level_label(rvqkv::simd_level level);

}  // namespace bench
