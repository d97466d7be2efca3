// SPDX-License-Identifier: MIT
/// @file
/// The level above AVX-512 with VNNI: its kernels, with small tables looked up by byte permutations (VBMI).
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/simd/avx512vnni.hpp"
#include "rvqkv/simd/kernel_table.hpp"
#include "rvqkv/simd/small_scan.hpp"
#include "rvqkv/simd/word_rows.hpp"

#if RVQKV_X86

#include <immintrin.h>
#include <cstddef>
#include <cstdint>
#include <cstring>

RVQKV_NAMESPACE_BEGIN
RVQKV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")
namespace avx512 {
namespace vbmi {

using breg = __m512i;
inline constexpr int byte_lanes = 64;
inline constexpr int scan_strips = 4;  // 4 x (2 queries x 2 digits + codes) + a table of 2 registers of 32
inline constexpr __mmask64 all_bytes = ~__mmask64{0};

inline breg load_bytes(const void* from) {
    return _mm512_loadu_si512(from);
}
inline breg keep(breg value) {
    asm("" : "+v"(value));
    return value;
}
inline void store_bytes(void* to, breg value) {
    _mm512_storeu_si512(to, value);
}
inline breg add_bytes(breg a, breg b) {
    return _mm512_add_epi8(a, b);
}
/// `low + score_base * high` of 64 tokens, added to words in the order in which bytes are interleaved.
inline void add_digits(breg low, breg high, std::uint16_t* sums) {
    const breg factors = _mm512_set1_epi16(static_cast<std::int16_t>(score_base * 256 + 1));
    const breg first = _mm512_maddubs_epi16(_mm512_unpacklo_epi8(low, high), factors);
    const breg second = _mm512_maddubs_epi16(_mm512_unpackhi_epi8(low, high), factors);
    store_bytes(sums, _mm512_add_epi16(load_bytes(sums), first));
    store_bytes(sums + 32, _mm512_add_epi16(load_bytes(sums + 32), second));
}
/// The words of 64 tokens in their order.
inline void order_sums(const std::uint16_t* sums, std::uint16_t* words) {
    const breg first = load_bytes(sums);
    const breg second = load_bytes(sums + 32);
    const breg lower = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    const breg upper = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    store_bytes(words, _mm512_permutex2var_epi64(first, lower, second));
    store_bytes(words + 32, _mm512_permutex2var_epi64(first, upper, second));
}
inline reg load_words(const std::uint16_t* from) {
    return to_floats(load(from));
}
inline void add_products(ireg& sums, breg weights, breg values) {
    vnni::add_products(sums, weights, values);
}
inline reg divide(reg a, reg b) {
    return _mm512_div_ps(a, b);
}
/// `a * b`, and 0 where `a` is 0, whatever `b`.
inline reg multiply_nonzero(reg a, reg b) {
    return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_UQ), a, b);
}
inline reg max_of_quads(reg value) {
    const reg pairs = max(value, _mm512_maskz_permute_ps(all, value, 0xb1));
    return max(pairs, _mm512_maskz_permute_ps(all, pairs, 0x4e));
}
/// Every fourth number.
inline void store_quads(float* to, reg value) {
    _mm_storeu_ps(to, _mm512_maskz_extractf32x4_ps(0xf, _mm512_maskz_compress_ps(0x1111, value), 0));
}
inline void store(std::uint8_t* to, ireg value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtusepi32_epi8(all, value));
}
inline reg min(reg a, reg b) {
    return _mm512_maskz_min_ps(all, a, b);
}
inline float smallest(reg value) {
    return -largest(_mm512_sub_ps(_mm512_setzero_ps(), value));
}
inline float sum_of_lanes(const float* from) {
    return sum(load(from));
}
using avx512::keep;
using avx512::load;
using avx512::store;

/// Where each of 64 packed codes lies: the byte that becomes its own, of the eight that hold it and its neighbours, and
/// the bit of those eight at which it begins.
struct code_places {
    std::uint8_t bytes[64];
    std::uint8_t shifts[64];
};
struct code_places_of_bits {
    alignas(64) code_places of[most_scan_bits + 1];
};
inline constexpr code_places_of_bits code_places_table = [] {
    code_places_of_bits table{};
    for (unsigned bits = 1; bits <= most_scan_bits; ++bits) {
        for (unsigned i = 0; i < 64; ++i) {
            table.of[bits].bytes[i] = static_cast<std::uint8_t>(i / 8 * bits + i % 8);
            table.of[bits].shifts[i] = static_cast<std::uint8_t>(i % 8 * bits);
        }
    }
    return table;
}();

/// 64 codes of up to eight bits to bytes: eight codes are as many bytes as they have bits, moved to a lane of their
/// own. Bits above a code's are cleared where a table would read them.
template <int Slots>
class unpacker {
public:
    explicit unpacker(unsigned bits)
        : row_(first_bytes(8 * bits)),
          code_(_mm512_set1_epi8(static_cast<char>((1U << bits) - 1U))),
          bytes_(load_bytes(code_places_table.of[bits].bytes)),
          shifts_(load_bytes(code_places_table.of[bits].shifts)) {}
    __attribute__((always_inline)) void unpack(const std::byte* row, std::uint8_t* codes) const {
        const breg packed = _mm512_maskz_loadu_epi8(row_, row);
        const breg spread = _mm512_maskz_permutexvar_epi8(all_bytes, bytes_, packed);
        const breg moved = _mm512_maskz_multishift_epi64_epi8(all_bytes, shifts_, spread);
        store_bytes(codes, Slots >= 128 ? moved : _mm512_and_si512(moved, code_));
    }

private:
    static __mmask64 first_bytes(unsigned count) { return count == 64 ? all_bytes : (__mmask64{1} << count) - 1; }

    __mmask64 row_;
    breg code_;
    breg bytes_;
    breg shifts_;
};

template <int Slots>
struct small_table;
template <>
struct small_table<16> {
    breg entries;
    explicit small_table(const void* from)
        : entries(_mm512_maskz_broadcast_i32x4(all, _mm_loadu_si128(static_cast<const __m128i*>(from)))) {}
    breg at(breg codes) const { return _mm512_maskz_shuffle_epi8(all_bytes, entries, codes); }
};
template <>
struct small_table<64> {
    breg entries;
    explicit small_table(const void* from) : entries(load_bytes(from)) {}
    breg at(breg codes) const { return _mm512_maskz_permutexvar_epi8(all_bytes, codes, entries); }
};
template <>
struct small_table<128> {
    breg first;
    breg second;
    explicit small_table(const void* from)
        : first(load_bytes(from)), second(load_bytes(static_cast<const std::byte*>(from) + 64)) {}
    breg at(breg codes) const { return _mm512_permutex2var_epi8(first, codes, second); }
};
template <>
struct small_table<256> {
    small_table<128> lower;
    small_table<128> upper;
    explicit small_table(const void* from) : lower(from), upper(static_cast<const std::byte*>(from) + 128) {}
    breg at(breg codes) const {
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), lower.at(codes), upper.at(codes));
    }
};

#include "rvqkv/simd/small_scan.inl"

namespace words {
inline void add_pairs(ireg& sums, ireg a, ireg b) {
#if defined(__clang__)
    sums = _mm512_dpwssd_epi32(sums, a, b);
#else
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
#endif
}
#include "rvqkv/simd/word_rows.inl"
}  // namespace words

inline constexpr kernel_table kernels = [] {
    kernel_table table = vnni::kernels;
    table.level = simd_level::avx512vbmi;
    table.small_scan = &small_scan;
    table.word_rows = &words::word_loops;
    return table;
}();

}  // namespace vbmi
}  // namespace avx512
RVQKV_TARGET_END
RVQKV_NAMESPACE_END

#endif
