// SPDX-License-Identifier: MIT
/// @file
/// Registers of AVX2 with FMA and F16C for the shared loops of `kernels.inl`.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/simd/generic.hpp"
#include "rvqkv/simd/kernel_table.hpp"

#if RVQKV_X86

#include <immintrin.h>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

RVQKV_NAMESPACE_BEGIN
RVQKV_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {

inline constexpr simd_level level = simd_level::avx2;
inline constexpr int lanes = 8;
inline constexpr int tile_side = 3;
inline constexpr int tile_sums = 12;
inline constexpr int tile_rows = 6;
inline constexpr int tile_registers = 2;
using reg = __m256;
using ireg = __m256i;
using mask = __m256;

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
/// The value, in a register from here on: GCC 12 would read it anew from memory for each use.
inline reg keep(reg value) {
    asm("" : "+x"(value));
    return value;
}
inline reg broadcast(const float* from) {
    return _mm256_broadcast_ss(from);
}
inline reg fma(reg a, reg b, reg c) {
    return _mm256_fmadd_ps(a, b, c);
}
inline float fma(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}
inline reg add(reg a, reg b) {
    return _mm256_add_ps(a, b);
}
inline reg subtract(reg a, reg b) {
    return _mm256_sub_ps(a, b);
}
inline ireg load(const std::int32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline void store(std::int32_t* to, ireg value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
}
inline ireg broadcast(std::int32_t value) {
    return _mm256_set1_epi32(value);
}
inline mask greater(reg a, reg b) {
    return _mm256_cmp_ps(a, b, _CMP_GT_OQ);
}
inline reg select(mask where, reg yes, reg no) {
    return _mm256_blendv_ps(no, yes, where);
}
/// Bit `i` says lane `i`.
inline unsigned bits(mask where) {
    return static_cast<unsigned>(_mm256_movemask_ps(where));
}
/// Where `score` beats `best`, takes it and notes the code. The maximum gives `best` for a NaN and for a tie.
inline void keep_greater(reg score, ireg code, reg& best, ireg& best_code) {
    const __m256i better = _mm256_castps_si256(_mm256_cmp_ps(score, best, _CMP_GT_OQ));
    best_code = _mm256_blendv_epi8(best_code, code, better);
    best = _mm256_max_ps(score, best);
}
inline ireg add(ireg a, ireg b) {
    return _mm256_add_epi32(a, b);
}
inline void store(code_t* to, ireg value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1)));
}
/// Four neighbouring channels of 8 rows.
inline void transpose(const float* from, std::size_t stride, float* to, std::size_t to_stride) {
    reg rows[4];
    RVQKV_UNROLL
    for (int i = 0; i < 4; ++i) {
        const float* const row = from + static_cast<std::size_t>(i) * stride;
        rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(row + 4 * stride), 1);
    }
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(rows[0], rows[1]));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(rows[0], rows[1]));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(rows[2], rows[3]));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(rows[2], rows[3]));
    store(to, _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)));
    store(to + to_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23)));
    store(to + 2 * to_stride, _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23)));
    store(to + 3 * to_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23)));
}

// Narrower and wider rows of floats, for decoding.
using reg8 = reg;
using reg4 = __m128;
struct interleaved {
    reg even;
    reg odd;
};
inline reg4 add(reg4 a, reg4 b) {
    return _mm_add_ps(a, b);
}
inline reg4 subtract(reg4 a, reg4 b) {
    return _mm_sub_ps(a, b);
}
inline interleaved add(interleaved a, interleaved b) {
    return {_mm256_add_ps(a.even, b.even), _mm256_add_ps(a.odd, b.odd)};
}
inline void store(float* to, reg4 value) {
    _mm_storeu_ps(to, value);
}
inline void store(float* to, interleaved value) {
    const __m256 low = _mm256_unpacklo_ps(value.even, value.odd);
    const __m256 high = _mm256_unpackhi_ps(value.even, value.odd);
    _mm256_storeu_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(to + lanes, _mm256_permute2f128_ps(low, high, 0x31));
}
template <class Reg, class T>
inline Reg load_as(const T* from) {
    if constexpr (sizeof(Reg) == sizeof(reg)) {
        return load(from);
    } else if constexpr (sizeof(Reg) == sizeof(interleaved)) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000U));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)), _mm256_castsi256_ps(_mm256_and_si256(bits, upper))};
    } else if constexpr (std::is_same_v<T, float>) {
        return _mm_loadu_ps(from);
    } else {
        const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        if constexpr (std::is_same_v<T, float16>) {
            return _mm_cvtph_ps(bits);
        } else {
            return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16));
        }
    }
}

inline constexpr bool has_lookup = false;

// What follows is for the integer search (`integer_search.inl`).

inline reg load_first(const float* from, std::size_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane));
}
inline ireg load(const std::uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline ireg load(const std::int16_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline void store(std::int16_t* to, ireg value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packs_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1)));
}
inline void store(std::int8_t* to, ireg value) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
}
inline reg multiply(reg a, reg b) {
    return _mm256_mul_ps(a, b);
}
inline reg max(reg a, reg b) {
    return _mm256_max_ps(a, b);
}
inline reg magnitude(reg value) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), value);
}
inline ireg to_integers(reg value) {
    return _mm256_cvtps_epi32(value);
}
inline reg to_floats(ireg value) {
    return _mm256_cvtepi32_ps(value);
}
inline reg as_floats(ireg value) {
    return _mm256_castsi256_ps(value);
}
inline reg square_roots(reg value) {
    return _mm256_sqrt_ps(value);
}
inline mask at_least(reg a, reg b) {
    return _mm256_cmp_ps(a, b, _CMP_GE_OQ);
}
inline mask is_before(reg score, ireg code, reg other, ireg other_code) {
    const mask lower = _mm256_castsi256_ps(_mm256_cmpgt_epi32(other_code, code));
    return _mm256_or_ps(greater(score, other), _mm256_and_ps(_mm256_cmp_ps(score, other, _CMP_EQ_OQ), lower));
}
inline ireg add_where(mask where, ireg a, ireg b) {
    return _mm256_add_epi32(a, _mm256_and_si256(_mm256_castps_si256(where), b));
}
inline unsigned nonzero(ireg value) {
    return bits(_mm256_castsi256_ps(_mm256_cmpeq_epi32(value, _mm256_setzero_si256()))) ^ 0xffU;
}
inline float sum(reg value) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest(reg value) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline ireg multiply_pairs(ireg a, ireg b) {
    return _mm256_madd_epi16(a, b);
}
inline __m128i sum_each(const ireg* four) {
    const ireg both = _mm256_hadd_epi32(_mm256_hadd_epi32(four[0], four[1]), _mm256_hadd_epi32(four[2], four[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}

// What follows is for attention (`attention.inl`).

inline constexpr int product_side = 4;
inline constexpr int query_side = 2;
inline constexpr int value_queries = 4;
inline constexpr int value_side = 2;
inline reg reverse(reg value) {
    return _mm256_permutevar8x32_ps(value, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
inline reg divide(reg a, reg b) {
    return _mm256_div_ps(a, b);
}
inline reg4 sums_of(const reg* four) {
    const reg both = _mm256_hadd_ps(_mm256_hadd_ps(four[0], four[1]), _mm256_hadd_ps(four[2], four[3]));
    return _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
}
inline void store_sums(float* to, const reg* four) {
    store(to, sums_of(four));
}
/// Whole numbers up to 65535 as the lower and upper half of 32 bits, and back.
inline reg halves(reg low, reg high) {
    return as_floats(_mm256_or_si256(to_integers(low), _mm256_slli_epi32(to_integers(high), 16)));
}
inline reg low_half(reg both) {
    return to_floats(_mm256_and_si256(_mm256_castps_si256(both), _mm256_set1_epi32(0xffff)));
}
inline reg high_half(reg both) {
    return to_floats(_mm256_srli_epi32(_mm256_castps_si256(both), 16));
}
inline reg power_of_two(reg whole) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(to_integers(whole), _mm256_set1_epi32(127)), 23));
}
inline void unpack_tile(const std::byte* packed, unsigned bits, code_t* codes) {
    if (bits == 1) {
        unpack_codes(packed, 0, tile_tokens, bits, codes);
        return;
    }
    // Eight codes are `bits` bytes; four of them begin at the first byte, the others in the middle. Of each, the four
    // bytes from its first bit on (three are enough), shifted to its place.
    const __m256i step = _mm256_set1_epi32(static_cast<int>(bits));
    const int odd = static_cast<int>(bits % 2 * 4);
    const __m256i begins = _mm256_add_epi32(_mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3), step),
                                            _mm256_setr_epi32(0, 0, 0, 0, odd, odd, odd, odd));
    const __m256i each = _mm256_set1_epi32(0x01010101);
    const __m256i bytes = _mm256_add_epi32(_mm256_mullo_epi32(_mm256_srli_epi32(begins, 3), each),  //
                                           _mm256_set1_epi32(0x03020100));
    const __m256i shifts = _mm256_and_si256(begins, _mm256_set1_epi32(7));
    const __m256i ones = _mm256_set1_epi32((1 << bits) - 1);
    const std::size_t last = std::size_t{8} * bits - 16;  // no load reaches beyond the tile
    for (std::size_t eight = 0; eight < tile_tokens / 8; ++eight) {
        const std::size_t first = eight * bits;
        const std::size_t second = first + bits / 2;
        const std::size_t from_first = first < last ? first : last;
        const std::size_t from_second = second < last ? second : last;
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + from_first));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + from_second));
        const __m128i skip_low = _mm_set1_epi8(static_cast<char>(first - from_first));
        const __m128i skip_high = _mm_set1_epi8(static_cast<char>(second - from_second));
        const __m256i skips = _mm256_inserti128_si256(_mm256_castsi128_si256(skip_low), skip_high, 1);
        const __m256i words = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1),
                                                  _mm256_add_epi8(bytes, skips));
        store(codes + 8 * eight, _mm256_and_si256(_mm256_srlv_epi32(words, shifts), ones));
    }
}

/// `2 * lanes` floats, even and odd ones apart, and back.
inline void split(const float* from, reg& even, reg& odd) {
    const reg low = _mm256_permute2f128_ps(load(from), load(from + lanes), 0x20);
    const reg high = _mm256_permute2f128_ps(load(from), load(from + lanes), 0x31);
    even = _mm256_shuffle_ps(low, high, 0x88);
    odd = _mm256_shuffle_ps(low, high, 0xdd);
}
inline void join(float* to, reg even, reg odd) {
    const reg low = _mm256_unpacklo_ps(even, odd);
    const reg high = _mm256_unpackhi_ps(even, odd);
    store(to, _mm256_permute2f128_ps(low, high, 0x20));
    store(to + lanes, _mm256_permute2f128_ps(low, high, 0x31));
}
using generic::small_scan;
inline constexpr const word_row_kernels* word_rows = nullptr;

// What follows is for whole rows (`rows.inl`).

inline constexpr int wide_lanes = 4;
using wide = __m256d;
inline void widen(reg value, wide (&doubles)[2]) {
    doubles[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(value));
    doubles[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1));
}
inline wide add(wide a, wide b) {
    return _mm256_add_pd(a, b);
}
inline wide fma(wide a, wide b, wide c) {
    return _mm256_fmadd_pd(a, b, c);
}
inline void store(double* to, wide value) {
    _mm256_storeu_pd(to, value);
}
inline bool divide_turned(const float* /*in*/, float /*by*/, std::size_t /*groups*/, std::size_t /*dim*/,
                          float* /*out*/) {
    return false;
}

#include "rvqkv/simd/kernels.inl"

/// The integer search without VNNI: 16-bit sums of two products may not overflow, so codewords have seven bits.
namespace plain {

namespace float32 = avx2;
inline constexpr simd_level integer_level = simd_level::avx2;
inline constexpr std::int32_t most_coarse_zero = 64;
inline constexpr int sum_rows = 4;  // 4 x 2 sums + 2 codewords + 1 row value + ones + products of 16 registers
inline constexpr int sum_registers = 2;

inline void add_products(ireg& sums, ireg codewords, ireg row) {
    const ireg pairs = _mm256_maddubs_epi16(codewords, row);
    sums = add(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#include "rvqkv/simd/integer_search.inl"

}  // namespace plain
}  // namespace avx2
RVQKV_TARGET_END
RVQKV_NAMESPACE_END

#endif
