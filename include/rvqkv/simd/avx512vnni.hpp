// SPDX-License-Identifier: MIT
/// @file
/// The level above AVX-512: its kernels, with the nearest codewords found by eight-bit dot products (VNNI).
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/simd/avx512.hpp"
#include "rvqkv/simd/kernel_table.hpp"

#if RVQKV_X86

#include <immintrin.h>
#include <cstddef>
#include <cstdint>
#include <cstring>

RVQKV_NAMESPACE_BEGIN
RVQKV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
namespace avx512 {
namespace vnni {

namespace float32 = avx512;
inline constexpr simd_level integer_level = simd_level::avx512vnni;
inline constexpr std::int32_t most_coarse_zero = 128;
inline constexpr int sum_rows = 6;  // 6 x 4 sums + 4 codewords + 1 row value of 32 registers
inline constexpr int sum_registers = 4;

inline void add_products(ireg& sums, ireg codewords, ireg row) {
#if defined(__clang__)
    sums = _mm512_dpbusd_epi32(sums, codewords, row);
#else
    // GCC 12 copies every sum when it allocates registers for the intrinsic, and then spills half of them.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codewords), "v"(row));
#endif
}

#include "rvqkv/simd/integer_search.inl"

}  // namespace vnni
}  // namespace avx512
RVQKV_TARGET_END
RVQKV_NAMESPACE_END

#endif
