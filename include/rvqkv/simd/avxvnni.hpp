// SPDX-License-Identifier: MIT
/// @file
/// The level above AVX2: its kernels, with the nearest codewords found by eight-bit dot products (AVX-VNNI).
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/simd/avx2.hpp"
#include "rvqkv/simd/kernel_table.hpp"

#if RVQKV_X86

#include <immintrin.h>
#include <cstddef>
#include <cstdint>
#include <cstring>

RVQKV_NAMESPACE_BEGIN
RVQKV_TARGET_BEGIN("avx2,fma,f16c,avxvnni")
namespace avx2 {
namespace vnni {

namespace float32 = avx2;
inline constexpr simd_level integer_level = simd_level::avxvnni;
inline constexpr std::int32_t most_coarse_zero = 128;
inline constexpr int sum_rows = 6;  // 6 x 2 sums + 2 codewords + 1 row value of 16 registers
inline constexpr int sum_registers = 2;

inline void add_products(ireg& sums, ireg codewords, ireg row) {
#if defined(__clang__)
    sums = _mm256_dpbusd_avx_epi32(sums, codewords, row);
#else
    // GCC 12 copies every sum when it allocates registers for the intrinsic, and then spills half of them.
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(codewords), "x"(row));
#endif
}

#include "rvqkv/simd/integer_search.inl"

}  // namespace vnni
}  // namespace avx2
RVQKV_TARGET_END
RVQKV_NAMESPACE_END

#endif
