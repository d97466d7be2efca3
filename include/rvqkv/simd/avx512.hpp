// SPDX-License-Identifier: MIT
/// @file
/// Registers of AVX-512 (F, BW, DQ, VL) for the shared loops of `kernels.inl`.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/simd/kernel_table.hpp"

#if RVQKV_X86

#include <immintrin.h>
#include <cstddef>
#include <cstdint>

RVQKV_NAMESPACE_BEGIN
RVQKV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {

inline constexpr simd_level level = simd_level::avx512;
inline constexpr int lanes = 16;
inline constexpr int tile_rows = 4;
inline constexpr int tile_registers = 4;  // 4 x 4 sums + 4 codewords of 32 registers; rows come from memory
using reg = __m512;

// Shifts and conversions are used in their masked form with all lanes on: the same instruction, but GCC 12 takes the
// plain forms' unused source register for uninitialized and warns.
inline constexpr __mmask16 all = 0xffff;

inline reg load(const float* from) {
    return _mm512_loadu_ps(from);
}
inline reg load(const float16* from) {
    return _mm512_maskz_cvtph_ps(all, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline reg load(const bfloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(all, _mm512_maskz_cvtepu16_epi32(all, bits), 16));
}
inline void store(float* to, reg value) {
    _mm512_storeu_ps(to, value);
}
inline void store(float16* to, reg value) {
    const __m256i bits = _mm512_maskz_cvtps_ph(all, value, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
}
inline void store(bfloat16* to, reg value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(all, bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i upper = _mm512_maskz_srli_epi32(all, _mm512_mask_mov_epi32(rounded, is_nan, quiet), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(all, upper));
}
inline reg broadcast(const float* from) {
    return _mm512_set1_ps(*from);
}
inline reg fma(reg a, reg b, reg c) {
    return _mm512_fmadd_ps(a, b, c);
}
inline reg add(reg a, reg b) {
    return _mm512_add_ps(a, b);
}
inline reg subtract(reg a, reg b) {
    return _mm512_sub_ps(a, b);
}
/// Where `score` beats `best`, takes it and notes the block. Both are 64-byte aligned.
inline void keep_greater(reg score, std::int32_t block, float* best, std::int32_t* best_block) {
    const __m512 held = _mm512_load_ps(best);
    const __mmask16 better = _mm512_cmp_ps_mask(score, held, _CMP_GT_OQ);
    _mm512_store_ps(best, _mm512_mask_mov_ps(held, better, score));
    _mm512_store_si512(best_block,
                       _mm512_mask_mov_epi32(_mm512_load_si512(best_block), better, _mm512_set1_epi32(block)));
}

#include "rvqkv/simd/kernels.inl"

}  // namespace avx512
RVQKV_TARGET_END
RVQKV_NAMESPACE_END

#endif
