// SPDX-License-Identifier: MIT
/// @file
/// Registers of AVX-512 (F, BW, DQ, VL) for the shared loops of `kernels.inl`.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/simd/avx2.hpp"
#include "rvqkv/simd/generic.hpp"
#include "rvqkv/simd/kernel_table.hpp"
#include "rvqkv/simd/word_rows.hpp"

#if RVQKV_X86

#include <immintrin.h>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

RVQKV_NAMESPACE_BEGIN
RVQKV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {

inline constexpr simd_level level = simd_level::avx512;
inline constexpr int lanes = 16;
inline constexpr int tile_side = 4;
inline constexpr int tile_sums = 16;
inline constexpr int tile_rows = 4;
inline constexpr int tile_registers = 4;
using reg = __m512;
using ireg = __m512i;
using mask = __mmask16;

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
    // Each number to the upper half of its lane, in one step.
    const __m512i places = _mm512_setr_epi32(0x00000, 0x10000, 0x20000, 0x30000, 0x40000, 0x50000, 0x60000, 0x70000,
                                             0x80000, 0x90000, 0xa0000, 0xb0000, 0xc0000, 0xd0000, 0xe0000, 0xf0000);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaaU, places, _mm512_castsi256_si512(bits)));
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
/// The value, in a register from here on: GCC 12 would read it anew from memory for each use.
inline reg keep(reg value) {
    asm("" : "+v"(value));
    return value;
}
inline reg broadcast(const float* from) {
    return _mm512_set1_ps(*from);
}
inline reg fma(reg a, reg b, reg c) {
    return _mm512_fmadd_ps(a, b, c);
}
inline float fma(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}
inline reg add(reg a, reg b) {
    return _mm512_add_ps(a, b);
}
inline reg subtract(reg a, reg b) {
    return _mm512_sub_ps(a, b);
}
inline ireg load(const std::int32_t* from) {
    return _mm512_loadu_si512(from);
}
inline void store(std::int32_t* to, ireg value) {
    _mm512_storeu_si512(to, value);
}
inline ireg broadcast(std::int32_t value) {
    return _mm512_set1_epi32(value);
}
inline mask greater(reg a, reg b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}
inline reg select(mask where, reg yes, reg no) {
    return _mm512_mask_mov_ps(no, where, yes);
}
/// Bit `i` says lane `i`.
inline unsigned bits(mask where) {
    return where;
}
/// Where `score` beats `best`, takes it and notes the code. The maximum gives `best` for a NaN and for a tie.
inline void keep_greater(reg score, ireg code, reg& best, ireg& best_code) {
    best_code = _mm512_mask_mov_epi32(best_code, _mm512_cmp_ps_mask(score, best, _CMP_GT_OQ), code);
    best = _mm512_maskz_max_ps(all, score, best);
}
inline ireg add(ireg a, ireg b) {
    return _mm512_add_epi32(a, b);
}
inline void store(code_t* to, ireg value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(all, value));
}
/// Turns each quarter's four registers of four numbers on their side.
inline void turn(const reg (&in)[4], reg (&out)[4]) {
    const __m512d low01 = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(all, in[0], in[1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(all, in[0], in[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(all, in[2], in[3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(all, in[2], in[3]));
    out[0] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, low01, low23));
    out[1] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, low01, low23));
    out[2] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, high01, high23));
    out[3] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, high01, high23));
}
/// Four neighbouring channels of 16 rows, turned on their side.
inline void transpose(const float* from, std::size_t stride, float* to, std::size_t to_stride) {
    reg rows[4];
    RVQKV_UNROLL
    for (int i = 0; i < 4; ++i) {
        const float* const row = from + static_cast<std::size_t>(i) * stride;
        rows[i] = _mm512_castps128_ps512(_mm_loadu_ps(row));
        rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0x00f0, _mm_loadu_ps(row + 4 * stride));
        rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0x0f00, _mm_loadu_ps(row + 8 * stride));
        rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0xf000, _mm_loadu_ps(row + 12 * stride));
    }
    reg channels[4];
    turn(rows, channels);
    RVQKV_UNROLL
    for (int i = 0; i < 4; ++i) {
        store(to + static_cast<std::size_t>(i) * to_stride, channels[i]);
    }
}

// Narrower registers, for decoding.
using reg8 = avx2::reg;
using reg4 = avx2::reg4;
using interleaved = reg;
inline reg8 add(reg8 a, reg8 b) {
    return _mm256_add_ps(a, b);
}
inline reg4 add(reg4 a, reg4 b) {
    return _mm_add_ps(a, b);
}
inline reg8 subtract(reg8 a, reg8 b) {
    return _mm256_sub_ps(a, b);
}
inline reg4 subtract(reg4 a, reg4 b) {
    return _mm_sub_ps(a, b);
}
inline void store(float* to, reg8 value) {
    _mm256_storeu_ps(to, value);
}
inline void store(float* to, reg4 value) {
    _mm_storeu_ps(to, value);
}
template <class Reg, class T>
inline Reg load_as(const T* from) {
    if constexpr (sizeof(Reg) == sizeof(reg)) {
        return load(from);
    } else {
        return avx2::load_as<Reg>(from);
    }
}

#include "rvqkv/simd/lookup.inl"

// What follows is for the integer search (`integer_search.inl`).

inline reg load_first(const float* from, std::size_t count) {
    return _mm512_maskz_loadu_ps(count < 16 ? static_cast<__mmask16>((1U << count) - 1U) : all, from);
}
inline ireg load(const std::uint8_t* from) {
    return _mm512_loadu_si512(from);
}
inline ireg load(const std::int16_t* from) {
    return _mm512_loadu_si512(from);
}
inline void store(std::int8_t* to, ireg value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtsepi32_epi8(all, value));
}
inline void store(std::int16_t* to, ireg value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtsepi32_epi16(all, value));
}
inline reg multiply(reg a, reg b) {
    return _mm512_mul_ps(a, b);
}
inline reg max(reg a, reg b) {
    return _mm512_maskz_max_ps(all, a, b);
}
inline reg magnitude(reg value) {
    return _mm512_andnot_ps(_mm512_set1_ps(-0.0F), value);
}
inline ireg to_integers(reg value) {
    return _mm512_maskz_cvtps_epi32(all, value);
}
inline reg to_floats(ireg value) {
    return _mm512_maskz_cvtepi32_ps(all, value);
}
inline reg as_floats(ireg value) {
    return _mm512_castsi512_ps(value);
}
inline reg square_roots(reg value) {
    return _mm512_maskz_sqrt_ps(all, value);
}
inline mask at_least(reg a, reg b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}
inline mask is_before(reg score, ireg code, reg other, ireg other_code) {
    const mask equal = _mm512_cmp_ps_mask(score, other, _CMP_EQ_OQ);
    return static_cast<mask>(greater(score, other) | _mm512_mask_cmplt_epi32_mask(equal, code, other_code));
}
inline ireg add_where(mask where, ireg a, ireg b) {
    return _mm512_mask_add_epi32(a, where, a, b);
}
inline unsigned nonzero(ireg value) {
    return _mm512_test_epi32_mask(value, value);
}
inline float sum(reg value) {
    return avx2::sum(_mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, value, 0),  //
                                   _mm512_maskz_extractf32x8_ps(0xff, value, 1)));
}
inline float largest(reg value) {
    return avx2::largest(
        _mm256_max_ps(_mm512_maskz_extractf32x8_ps(0xff, value, 0), _mm512_maskz_extractf32x8_ps(0xff, value, 1)));
}
inline ireg multiply_pairs(ireg a, ireg b) {
    return _mm512_madd_epi16(a, b);
}
inline __m128i sum_each(const ireg* four) {
    const ireg left = add(_mm512_maskz_unpacklo_epi32(all, four[0], four[1]),  //
                          _mm512_maskz_unpackhi_epi32(all, four[0], four[1]));
    const ireg right =
        add(_mm512_maskz_unpacklo_epi32(all, four[2], four[3]), _mm512_maskz_unpackhi_epi32(all, four[2], four[3]));
    const ireg both = add(_mm512_maskz_unpacklo_epi64(0xff, left, right),  //
                          _mm512_maskz_unpackhi_epi64(0xff, left, right));
    const __m256i half = _mm256_add_epi32(_mm512_maskz_extracti32x8_epi32(0xff, both, 0),
                                          _mm512_maskz_extracti32x8_epi32(0xff, both, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// What follows is for attention (`attention.inl`).

inline constexpr int product_side = 16;
inline constexpr int query_side = 4;
inline constexpr int value_queries = 4;
inline constexpr int value_side = 4;
inline void unpack_tile(const std::byte* packed, unsigned bits, code_t* codes) {
    if (bits < 4) {
        avx2::unpack_tile(packed, bits, codes);
        return;
    }
    // Sixteen codes are `bits` words of 16 bits. Each code lies in two neighbouring ones, shifted.
    const __m512i begins = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(static_cast<int>(bits)));
    const __m512i words =
        _mm512_add_epi32(_mm512_mullo_epi32(_mm512_maskz_srli_epi32(all, begins, 4), _mm512_set1_epi32(0x10001)),
                         _mm512_set1_epi32(0x10000));
    const __m512i shifts = _mm512_and_si512(begins, _mm512_set1_epi32(15));
    const __m512i ones = _mm512_set1_epi32((1 << bits) - 1);
    const std::size_t last = std::size_t{8} * bits - 32;  // no load reaches beyond the tile
    for (std::size_t first = 0; first < tile_tokens; first += 16) {
        const std::size_t begin = first / 8 * bits;
        const std::size_t from = begin < last ? begin : last;
        const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + from));
        const __m512i places = _mm512_add_epi16(words, _mm512_set1_epi16(static_cast<short>((begin - from) / 2)));
        const __m512i pairs = _mm512_maskz_permutexvar_epi16(0xffffffffU, places, _mm512_castsi256_si512(some));
        const __m512i shifted = _mm512_maskz_srlv_epi32(all, pairs, shifts);
        store(codes + first, _mm512_and_si512(shifted, ones));
    }
}
inline reg reverse(reg value) {
    return _mm512_maskz_permutexvar_ps(all, _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                       value);
}
inline reg divide(reg a, reg b) {
    return _mm512_div_ps(a, b);
}
inline void store_sums(float* to, const reg* four) {
    reg8 halves[4];
    RVQKV_UNROLL
    for (int i = 0; i < 4; ++i) {
        halves[i] = add(_mm512_maskz_extractf32x8_ps(0xff, four[i], 0), _mm512_maskz_extractf32x8_ps(0xff, four[i], 1));
    }
    store(to, avx2::sums_of(halves));
}
/// Whole numbers up to 65535 as the lower and upper half of 32 bits, and back.
inline reg halves(reg low, reg high) {
    return as_floats(_mm512_or_si512(to_integers(low), _mm512_maskz_slli_epi32(all, to_integers(high), 16)));
}
inline reg low_half(reg both) {
    return to_floats(_mm512_and_si512(_mm512_castps_si512(both), _mm512_set1_epi32(0xffff)));
}
inline reg high_half(reg both) {
    return to_floats(_mm512_maskz_srli_epi32(all, _mm512_castps_si512(both), 16));
}
inline reg power_of_two(reg whole) {
    return _mm512_castsi512_ps(
        _mm512_maskz_slli_epi32(all, _mm512_add_epi32(to_integers(whole), _mm512_set1_epi32(127)), 23));
}

/// `2 * lanes` floats, even and odd ones apart, and back.
inline void split(const float* from, reg& even, reg& odd) {
    const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = _mm512_permutex2var_ps(load(from), places, load(from + lanes));
    odd = _mm512_permutex2var_ps(load(from), _mm512_add_epi32(places, _mm512_set1_epi32(1)), load(from + lanes));
}
inline void join(float* to, reg even, reg odd) {
    const __m512i places = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    store(to, _mm512_permutex2var_ps(even, places, odd));
    store(to + lanes, _mm512_permutex2var_ps(even, _mm512_add_epi32(places, _mm512_set1_epi32(8)), odd));
}
using generic::small_scan;

namespace words {
inline void add_pairs(ireg& sums, ireg a, ireg b) {
    sums = add(sums, _mm512_madd_epi16(a, b));
}
#include "rvqkv/simd/word_rows.inl"
}  // namespace words
inline constexpr const word_row_kernels* word_rows = &words::word_loops;

// What follows is for whole rows (`rows.inl`).

inline constexpr int wide_lanes = 8;
using wide = __m512d;
inline void widen(reg value, wide (&doubles)[2]) {
    doubles[0] = _mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, value, 0));
    doubles[1] = _mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, value, 1));
}
inline wide add(wide a, wide b) {
    return _mm512_add_pd(a, b);
}
inline wide fma(wide a, wide b, wide c) {
    return _mm512_fmadd_pd(a, b, c);
}
inline void store(double* to, wide value) {
    _mm512_storeu_pd(to, value);
}
/// Sixteen groups of 4 or 8 channels at a time.
template <int Quads>
inline void divide_groups(const float* in, float by, std::size_t groups, float* out) {
    const reg divisor = broadcast(&by);
    for (std::size_t group = 0; group < groups; group += lanes) {
        reg channels[Quads][4];
        RVQKV_UNROLL
        for (int c = 0; c < 4 * Quads; ++c) {
            const reg some = load(in + static_cast<std::size_t>(c) * groups + group);
            channels[c / 4][c % 4] = divide(as_floats(in_store_order(_mm512_castps_si512(some))), divisor);
        }
        store_rows(out + group * 4 * Quads, channels);
    }
}
inline bool divide_turned(const float* in, float by, std::size_t groups, std::size_t dim, float* out) {
    if (groups % lanes != 0 || (dim != 4 && dim != 8)) {
        return false;
    }
    dim == 4 ? divide_groups<1>(in, by, groups, out) : divide_groups<2>(in, by, groups, out);
    return true;
}

#include "rvqkv/simd/kernels.inl"

/// The integer search without VNNI: 16-bit sums of two products may not overflow, so codewords have seven bits.
namespace plain {

namespace float32 = avx512;
inline constexpr simd_level integer_level = simd_level::avx512;
inline constexpr std::int32_t most_coarse_zero = 64;
inline constexpr int sum_rows = 6;
inline constexpr int sum_registers = 4;

inline void add_products(ireg& sums, ireg codewords, ireg row) {
    const ireg pairs = _mm512_maddubs_epi16(codewords, row);
    sums = add(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

#include "rvqkv/simd/integer_search.inl"

}  // namespace plain
}  // namespace avx512
RVQKV_TARGET_END
RVQKV_NAMESPACE_END

#endif
