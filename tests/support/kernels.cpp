// SPDX-License-Identifier: MIT
/// @file
/// The kernels, compiled once for all files of a test program (`RVQKV_SEPARATE_KERNELS`).
#include "rvqkv/simd/compile_kernels.hpp"
