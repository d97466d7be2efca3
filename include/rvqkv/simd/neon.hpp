// SPDX-License-Identifier: MIT
/// @file
/// Registers of AArch64 Advanced SIMD for the shared loops of `kernels.inl`. Every AArch64 machine has it: no target
/// region, no detection.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/simd/kernel_table.hpp"

#if RVQKV_NEON

#include <arm_neon.h>
#include <cstddef>
#include <cstdint>

RVQKV_NAMESPACE_BEGIN
namespace neon {

inline constexpr simd_level level = simd_level::neon;
inline constexpr int lanes = 4;
inline constexpr int tile_rows = 6;
inline constexpr int tile_registers = 4;  // 6 x 4 sums + 4 codewords + 1 row value of 32 registers
using reg = float32x4_t;

inline reg load(const float* from) {
    return vld1q_f32(from);
}
inline reg load(const float16* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)));
}
inline reg load(const bfloat16* from) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&from->bits), 16));
}
inline void store(float* to, reg value) {
    vst1q_f32(to, value);
}
inline void store(float16* to, reg value) {
    vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32(value)));
}
inline void store(bfloat16* to, reg value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t is_number = vceqq_f32(value, value);
    vst1_u16(&to->bits, vshrn_n_u32(vbslq_u32(is_number, rounded, quiet), 16));
}
inline reg broadcast(const float* from) {
    return vld1q_dup_f32(from);
}
inline reg fma(reg a, reg b, reg c) {
    return vfmaq_f32(c, a, b);
}
inline reg add(reg a, reg b) {
    return vaddq_f32(a, b);
}
inline reg subtract(reg a, reg b) {
    return vsubq_f32(a, b);
}
/// Where `score` beats `best`, takes it and notes the block.
inline void keep_greater(reg score, std::int32_t block, float* best, std::int32_t* best_block) {
    const float32x4_t held = vld1q_f32(best);
    const uint32x4_t better = vcgtq_f32(score, held);
    vst1q_f32(best, vbslq_f32(better, score, held));
    vst1q_s32(best_block, vbslq_s32(better, vdupq_n_s32(block), vld1q_s32(best_block)));
}

#include "rvqkv/simd/kernels.inl"

}  // namespace neon
RVQKV_NAMESPACE_END

#endif
