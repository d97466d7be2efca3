// SPDX-License-Identifier: MIT
/// @file
/// Registers of AArch64 Advanced SIMD for the shared loops of `kernels.inl`. Every AArch64 machine has it: no target
/// region, no detection.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/simd/generic.hpp"
#include "rvqkv/simd/kernel_table.hpp"

#if RVQKV_NEON

#include <arm_neon.h>
#include <cstddef>
#include <cstdint>
#include <type_traits>

RVQKV_NAMESPACE_BEGIN
namespace neon {

inline constexpr simd_level level = simd_level::neon;
inline constexpr int lanes = 4;
inline constexpr int tile_side = 4;
inline constexpr int tile_sums = 16;
inline constexpr int tile_rows = 6;
inline constexpr int tile_registers = 4;
using reg = float32x4_t;
using ireg = int32x4_t;
using mask = uint32x4_t;

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
/// The value, in a register from here on: GCC 12 would read it anew from memory for each use.
inline reg keep(reg value) {
    asm("" : "+w"(value));
    return value;
}
inline reg broadcast(const float* from) {
    return vld1q_dup_f32(from);
}
inline reg fma(reg a, reg b, reg c) {
    return vfmaq_f32(c, a, b);
}
inline float fma(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}
inline reg add(reg a, reg b) {
    return vaddq_f32(a, b);
}
inline reg subtract(reg a, reg b) {
    return vsubq_f32(a, b);
}
inline reg multiply(reg a, reg b) {
    return vmulq_f32(a, b);
}
inline ireg load(const std::int32_t* from) {
    return vld1q_s32(from);
}
inline void store(std::int32_t* to, ireg value) {
    vst1q_s32(to, value);
}
inline ireg broadcast(std::int32_t value) {
    return vdupq_n_s32(value);
}
inline mask greater(reg a, reg b) {
    return vcgtq_f32(a, b);
}
inline reg select(mask where, reg yes, reg no) {
    return vbslq_f32(where, yes, no);
}
/// Bit `i` says lane `i`.
inline unsigned bits(mask where) {
    const std::uint32_t weights[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(where, vld1q_u32(weights)));
}
/// Where `score` beats `best`, takes it and notes the code.
inline void keep_greater(reg score, ireg code, reg& best, ireg& best_code) {
    const uint32x4_t better = vcgtq_f32(score, best);
    best_code = vbslq_s32(better, code, best_code);
    best = vbslq_f32(better, score, best);
}
inline ireg add(ireg a, ireg b) {
    return vaddq_s32(a, b);
}
inline void store(code_t* to, ireg value) {
    vst1_u16(to, vmovn_u32(vreinterpretq_u32_s32(value)));
}
/// Four neighbouring channels of 4 rows, turned on their side.
inline void transpose(const float* from, std::size_t stride, float* to, std::size_t to_stride) {
    const float32x4x2_t first = vtrnq_f32(load(from), load(from + stride));
    const float32x4x2_t second = vtrnq_f32(load(from + 2 * stride), load(from + 3 * stride));
    store(to, vcombine_f32(vget_low_f32(first.val[0]), vget_low_f32(second.val[0])));
    store(to + to_stride, vcombine_f32(vget_low_f32(first.val[1]), vget_low_f32(second.val[1])));
    store(to + 2 * to_stride, vcombine_f32(vget_high_f32(first.val[0]), vget_high_f32(second.val[0])));
    store(to + 3 * to_stride, vcombine_f32(vget_high_f32(first.val[1]), vget_high_f32(second.val[1])));
}

// What follows is for attention (`attention.inl`).

inline constexpr int product_side = 4;
inline constexpr int query_side = 4;
inline constexpr int value_queries = 4;
inline constexpr int value_side = 4;
inline void unpack_tile(const std::byte* packed, unsigned bits, code_t* codes) {
    unpack_codes(packed, 0, tile_tokens, bits, codes);
}
inline reg reverse(reg value) {
    const reg swapped = vrev64q_f32(value);
    return vextq_f32(swapped, swapped, 2);
}
inline reg divide(reg a, reg b) {
    return vdivq_f32(a, b);
}
inline reg max(reg a, reg b) {
    return select(greater(a, b), a, b);
}
inline mask at_least(reg a, reg b) {
    return vcgeq_f32(a, b);
}
inline float sum(reg value) {
    return vaddvq_f32(value);
}
inline float largest(reg value) {
    return vmaxvq_f32(value);
}
inline void store_sums(float* to, const reg* four) {
    store(to, vpaddq_f32(vpaddq_f32(four[0], four[1]), vpaddq_f32(four[2], four[3])));
}
/// Whole numbers up to 65535 as the lower and upper half of 32 bits, and back.
inline reg halves(reg low, reg high) {
    return vreinterpretq_f32_u32(vsliq_n_u32(vcvtq_u32_f32(low), vcvtq_u32_f32(high), 16));
}
inline reg low_half(reg both) {
    return vcvtq_f32_u32(vandq_u32(vreinterpretq_u32_f32(both), vdupq_n_u32(0xffff)));
}
inline reg high_half(reg both) {
    return vcvtq_f32_u32(vshrq_n_u32(vreinterpretq_u32_f32(both), 16));
}
inline reg power_of_two(reg whole) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(whole), vdupq_n_s32(127)), 23));
}

/// `2 * lanes` floats, even and odd ones apart, and back.
inline void split(const float* from, reg& even, reg& odd) {
    const float32x4x2_t both = vld2q_f32(from);
    even = both.val[0];
    odd = both.val[1];
}
inline void join(float* to, reg even, reg odd) {
    const float32x4x2_t both = {{even, odd}};  // the intrinsic is a macro for some compilers
    vst2q_f32(to, both);
}

// Decoding knows no other registers here.
using reg8 = reg;
using reg4 = reg;
using interleaved = reg;
template <class Reg, class T>
inline Reg load_as(const T* from) {
    return load(from);
}

inline constexpr bool has_lookup = false;

using generic::small_scan;
inline constexpr const word_row_kernels* word_rows = nullptr;

// What follows is for whole rows (`rows.inl`).

inline constexpr int wide_lanes = 2;
using wide = float64x2_t;
inline void widen(reg value, wide (&doubles)[2]) {
    doubles[0] = vcvt_f64_f32(vget_low_f32(value));
    doubles[1] = vcvt_high_f64_f32(value);
}
inline wide add(wide a, wide b) {
    return vaddq_f64(a, b);
}
inline wide fma(wide a, wide b, wide c) {
    return vfmaq_f64(c, a, b);
}
inline void store(double* to, wide value) {
    vst1q_f64(to, value);
}
inline bool divide_turned(const float* /*in*/, float /*by*/, std::size_t /*groups*/, std::size_t /*dim*/,
                          float* /*out*/) {
    return false;
}

#include "rvqkv/simd/kernels.inl"

}  // namespace neon
RVQKV_NAMESPACE_END

#endif
