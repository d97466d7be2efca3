// SPDX-License-Identifier: MIT
/// @file
/// Registers of AVX2 with FMA and F16C for the shared loops of `kernels.inl`.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/simd/kernel_table.hpp"

#if RVQKV_X86

#include <immintrin.h>
#include <cstddef>
#include <cstdint>

RVQKV_NAMESPACE_BEGIN
RVQKV_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {

inline constexpr simd_level level = simd_level::avx2;
inline constexpr int lanes = 8;
inline constexpr int tile_rows = 6;
inline constexpr int tile_registers = 2;  // 6 x 2 sums + 2 codewords + 1 row value of 16 registers
using reg = __m256;

inline reg load(const float* from) {
    return _mm256_loadu_ps(from);
}
inline reg load(const float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline reg load(const bfloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store(float* to, reg value) {
    _mm256_storeu_ps(to, value);
}
inline void store(float16* to, reg value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(bfloat16* to, reg value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
}
inline reg broadcast(const float* from) {
    return _mm256_broadcast_ss(from);
}
inline reg fma(reg a, reg b, reg c) {
    return _mm256_fmadd_ps(a, b, c);
}
inline reg add(reg a, reg b) {
    return _mm256_add_ps(a, b);
}
inline reg subtract(reg a, reg b) {
    return _mm256_sub_ps(a, b);
}
/// Where `score` beats `best`, takes it and notes the block. Both are 32-byte aligned.
inline void keep_greater(reg score, std::int32_t block, float* best, std::int32_t* best_block) {
    const __m256 held = _mm256_load_ps(best);
    const __m256 better = _mm256_cmp_ps(score, held, _CMP_GT_OQ);
    _mm256_store_ps(best, _mm256_blendv_ps(held, score, better));
    const __m256 held_block = _mm256_castsi256_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(best_block)));
    const __m256 new_block = _mm256_castsi256_ps(_mm256_set1_epi32(block));
    _mm256_store_si256(reinterpret_cast<__m256i*>(best_block),
                       _mm256_castps_si256(_mm256_blendv_ps(held_block, new_block, better)));
}

#include "rvqkv/simd/kernels.inl"

}  // namespace avx2
RVQKV_TARGET_END
RVQKV_NAMESPACE_END

#endif
