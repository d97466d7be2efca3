// SPDX-License-Identifier: MIT
/// @file
/// Plain C++ "registers" for the shared loops of `kernels.inl`: the fallback for machines without FMA, giving the same
/// bits as all others, and a second opinion in tests.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/simd/kernel_table.hpp"
#include "rvqkv/simd/small_scan.hpp"

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

RVQKV_NAMESPACE_BEGIN
namespace generic {

inline constexpr simd_level level = simd_level::generic;
inline constexpr int lanes = 16;
inline constexpr int tile_side = 1;
inline constexpr int tile_sums = 4;
inline constexpr int tile_rows = 1;
inline constexpr int tile_registers = 1;
struct reg {
    float lane[lanes];
};
struct ireg {
    std::int32_t lane[lanes];
};
struct mask {
    bool lane[lanes];
};

/// `a * b + c` rounded once, on any machine. Where the target has the instruction the compiler uses it; elsewhere a
/// library call would cost ten times this: the product of two floats is exact in double, the sum is rounded to odd
/// (so that the second rounding, to float, cannot go wrong; Boldo and Melquiond, 2008).
inline float fused_multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    const double product = static_cast<double>(a) * static_cast<double>(b);
    const double addend = static_cast<double>(c);
    const double sum = product + addend;
    const double part = sum - product;
    const double lost = (product - (sum - part)) + (addend - part);  // exactly what the sum left out
    std::uint64_t bits = std::bit_cast<std::uint64_t>(sum);
    const bool inexact = lost < 0.0 || lost > 0.0;  // false for NaN
    const std::uint64_t even = ~bits & 1U;
    const std::uint64_t towards_zero = static_cast<std::uint64_t>((lost < 0.0) == (sum > 0.0));
    bits += inexact ? even - 2U * (even & towards_zero) : 0U;
    return static_cast<float>(std::bit_cast<double>(bits));
#endif
}

template <class T>
inline reg load(const T* from) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = to_float(from[i]);
    }
    return value;
}
template <class T>
inline void store(T* to, const reg& value) {
    for (int i = 0; i < lanes; ++i) {
        to[i] = float_to<T>(value.lane[i]);
    }
}
inline const reg& keep(const reg& value) {
    return value;
}
inline reg broadcast(const float* from) {
    reg value;
    for (float& lane : value.lane) {
        lane = *from;
    }
    return value;
}
inline reg fma(const reg& a, const reg& b, const reg& c) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = fused_multiply_add(a.lane[i], b.lane[i], c.lane[i]);
    }
    return value;
}
inline float fma(float a, float b, float c) {
    return fused_multiply_add(a, b, c);
}
inline reg add(const reg& a, const reg& b) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = a.lane[i] + b.lane[i];
    }
    return value;
}
inline reg subtract(const reg& a, const reg& b) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = a.lane[i] - b.lane[i];
    }
    return value;
}
inline reg multiply(const reg& a, const reg& b) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = a.lane[i] * b.lane[i];
    }
    return value;
}
inline ireg load(const std::int32_t* from) {
    ireg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = from[i];
    }
    return value;
}
inline void store(std::int32_t* to, const ireg& value) {
    for (int i = 0; i < lanes; ++i) {
        to[i] = value.lane[i];
    }
}
inline ireg broadcast(std::int32_t from) {
    ireg value;
    for (std::int32_t& lane : value.lane) {
        lane = from;
    }
    return value;
}
inline mask greater(const reg& a, const reg& b) {
    mask value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = a.lane[i] > b.lane[i];
    }
    return value;
}
inline reg select(const mask& where, const reg& yes, const reg& no) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = where.lane[i] ? yes.lane[i] : no.lane[i];
    }
    return value;
}
/// Bit `i` says lane `i`.
inline unsigned bits(const mask& where) {
    unsigned value = 0;
    for (int i = 0; i < lanes; ++i) {
        value |= where.lane[i] ? 1U << static_cast<unsigned>(i) : 0U;
    }
    return value;
}
/// Where `score` beats `best`, takes it and notes the code.
inline void keep_greater(const reg& score, const ireg& code, reg& best, ireg& best_code) {
    for (int i = 0; i < lanes; ++i) {
        const bool better = score.lane[i] > best.lane[i];
        best.lane[i] = better ? score.lane[i] : best.lane[i];
        best_code.lane[i] = better ? code.lane[i] : best_code.lane[i];
    }
}
inline ireg add(const ireg& a, const ireg& b) {
    ireg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = a.lane[i] + b.lane[i];
    }
    return value;
}
inline void store(code_t* to, const ireg& value) {
    for (int i = 0; i < lanes; ++i) {
        to[i] = static_cast<code_t>(value.lane[i]);
    }
}
inline void transpose(const float* from, std::size_t stride, float* to, std::size_t to_stride) {
    for (std::size_t j = 0; j < 4; ++j) {
        for (std::size_t i = 0; i < static_cast<std::size_t>(lanes); ++i) {
            to[j * to_stride + i] = from[i * stride + j];
        }
    }
}

// What follows is for attention (`attention.inl`).

inline constexpr int product_side = 1;
inline constexpr int query_side = 1;
inline constexpr int value_queries = 1;
inline constexpr int value_side = 1;
inline void unpack_tile(const std::byte* packed, unsigned bits, code_t* codes) {
    unpack_codes(packed, 0, tile_tokens, bits, codes);
}
inline reg divide(const reg& a, const reg& b) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = a.lane[i] / b.lane[i];
    }
    return value;
}
inline reg max(const reg& a, const reg& b) {
    return select(greater(a, b), a, b);
}
inline mask at_least(const reg& a, const reg& b) {
    mask value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = a.lane[i] >= b.lane[i];
    }
    return value;
}
inline float sum(const reg& value) {
    float total = 0.0F;
    for (const float lane : value.lane) {
        total += lane;
    }
    return total;
}
inline float largest(const reg& value) {
    float top = value.lane[0];
    for (const float lane : value.lane) {
        top = lane > top ? lane : top;
    }
    return top;
}
inline reg reverse(const reg& value) {
    reg reversed;
    for (int i = 0; i < lanes; ++i) {
        reversed.lane[i] = value.lane[lanes - 1 - i];
    }
    return reversed;
}
inline void store_sums(float* to, const reg* four) {
    for (int i = 0; i < 4; ++i) {
        to[i] = sum(four[i]);
    }
}
/// Whole numbers up to 65535 as the lower and upper half of 32 bits, and back.
inline reg halves(const reg& low, const reg& high) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        const std::uint32_t upper = static_cast<std::uint32_t>(high.lane[i]) << 16U;
        value.lane[i] = std::bit_cast<float>(static_cast<std::uint32_t>(low.lane[i]) | upper);
    }
    return value;
}
inline reg low_half(const reg& both) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = static_cast<float>(std::bit_cast<std::uint32_t>(both.lane[i]) & 0xffffU);
    }
    return value;
}
inline reg high_half(const reg& both) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = static_cast<float>(std::bit_cast<std::uint32_t>(both.lane[i]) >> 16U);
    }
    return value;
}
inline reg power_of_two(const reg& whole) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = std::bit_cast<float>((static_cast<std::int32_t>(whole.lane[i]) + 127) << 23U);
    }
    return value;
}

/// `2 * lanes` floats, even and odd ones apart, and back.
inline void split(const float* from, reg& even, reg& odd) {
    for (int i = 0; i < lanes; ++i) {
        even.lane[i] = from[2 * i];
        odd.lane[i] = from[2 * i + 1];
    }
}
inline void join(float* to, const reg& even, const reg& odd) {
    for (int i = 0; i < lanes; ++i) {
        to[2 * i] = even.lane[i];
        to[2 * i + 1] = odd.lane[i];
    }
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

// What follows is for the scans by small tables (`small_scan.inl`).

inline constexpr int byte_lanes = 64;
inline constexpr int scan_strips = 1;
struct breg {
    std::uint8_t lane[byte_lanes];
};

inline reg min(const reg& a, const reg& b) {
    return select(greater(b, a), a, b);
}
/// `a * b`, and 0 where `a` is 0, whatever `b`.
inline reg multiply_nonzero(const reg& a, const reg& b) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = a.lane[i] == 0.0F ? 0.0F : a.lane[i] * b.lane[i];
    }
    return value;
}
inline reg max_of_quads(const reg& value) {
    reg most = value;
    for (int i = 0; i < lanes; ++i) {
        for (int j = i / 4 * 4; j < i / 4 * 4 + 4; ++j) {
            most.lane[i] = value.lane[j] > most.lane[i] ? value.lane[j] : most.lane[i];
        }
    }
    return most;
}
inline void store_quads(float* to, const reg& value) {
    for (int i = 0; i < lanes; i += 4) {
        to[i / 4] = value.lane[i];
    }
}
inline float smallest(const reg& value) {
    float least = value.lane[0];
    for (const float lane : value.lane) {
        least = lane < least ? lane : least;
    }
    return least;
}
/// To the nearest integer, even on ties; for magnitudes below 2^22.
inline ireg to_integers(const reg& value) {
    constexpr float magic = 0x1.8p23F;
    ireg rounded;
    for (int i = 0; i < lanes; ++i) {
        rounded.lane[i] = std::bit_cast<std::int32_t>(value.lane[i] + magic) - std::bit_cast<std::int32_t>(magic);
    }
    return rounded;
}
inline reg to_floats(const ireg& value) {
    reg floats;
    for (int i = 0; i < lanes; ++i) {
        floats.lane[i] = static_cast<float>(value.lane[i]);
    }
    return floats;
}
inline void store(std::uint8_t* to, const ireg& value) {
    for (int i = 0; i < lanes; ++i) {
        to[i] = static_cast<std::uint8_t>(value.lane[i]);
    }
}
inline breg load_bytes(const void* from) {
    breg value;
    std::memcpy(value.lane, from, sizeof value);
    return value;
}
inline void store_bytes(void* to, const breg& value) {
    std::memcpy(to, value.lane, sizeof value);
}
inline const breg& keep(const breg& value) {
    return value;
}
inline breg add_bytes(const breg& a, const breg& b) {
    breg value;
    for (int i = 0; i < byte_lanes; ++i) {
        value.lane[i] = static_cast<std::uint8_t>(a.lane[i] + b.lane[i]);
    }
    return value;
}
inline void add_digits(const breg& low, const breg& high, std::uint16_t* sums) {
    for (int i = 0; i < byte_lanes; ++i) {
        sums[i] = static_cast<std::uint16_t>(sums[i] + low.lane[i] + score_base * high.lane[i]);
    }
}
inline void order_sums(const std::uint16_t* sums, std::uint16_t* words) {
    std::memcpy(words, sums, byte_lanes * sizeof(std::uint16_t));
}
inline reg load_words(const std::uint16_t* from) {
    reg value;
    for (int i = 0; i < lanes; ++i) {
        value.lane[i] = static_cast<float>(from[i]);
    }
    return value;
}
inline void add_products(ireg& sums, const breg& weights, const breg& values) {
    for (int i = 0; i < byte_lanes; ++i) {
        sums.lane[i / 4] += weights.lane[i] * static_cast<std::int8_t>(values.lane[i]);
    }
}
/// In the order in which registers of 16 and of 8 numbers are halved.
inline float sum_of_lanes(const float* from) {
    float half[8];
    for (int i = 0; i < 8; ++i) {
        half[i] = from[i] + from[i + 8];
    }
    for (int i = 0; i < 4; ++i) {
        half[i] += half[i + 4];
    }
    return (half[0] + half[2]) + (half[1] + half[3]);
}
template <int Slots>
class unpacker {
public:
    explicit unpacker(unsigned bits) : bits_(bits) {}
    void unpack(const std::byte* row, std::uint8_t* codes) const {
        code_t unpacked[tile_tokens];
        unpack_codes(row, 0, tile_tokens, bits_, unpacked);
        for (std::size_t i = 0; i < tile_tokens; ++i) {
            codes[i] = static_cast<std::uint8_t>(unpacked[i]);
        }
    }

private:
    unsigned bits_;
};
template <int Slots>
struct small_table {
    const std::uint8_t* entries;
    explicit small_table(const void* from) : entries(static_cast<const std::uint8_t*>(from)) {}
    breg at(const breg& codes) const {
        breg value;
        for (int i = 0; i < byte_lanes; ++i) {
            value.lane[i] = entries[codes.lane[i]];
        }
        return value;
    }
};

#include "rvqkv/simd/small_scan.inl"

inline constexpr const word_row_kernels* word_rows = nullptr;

// What follows is for whole rows (`rows.inl`).

inline constexpr int wide_lanes = lanes;
struct wide {
    double lane[wide_lanes];
};
inline void widen(const reg& value, wide (&doubles)[1]) {
    for (int i = 0; i < lanes; ++i) {
        doubles[0].lane[i] = static_cast<double>(value.lane[i]);
    }
}
inline wide add(const wide& a, const wide& b) {
    wide value;
    for (int i = 0; i < wide_lanes; ++i) {
        value.lane[i] = a.lane[i] + b.lane[i];
    }
    return value;
}
/// For products that are exact.
inline wide fma(const wide& a, const wide& b, const wide& c) {
    wide value;
    for (int i = 0; i < wide_lanes; ++i) {
        value.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    }
    return value;
}
inline void store(double* to, const wide& value) {
    std::memcpy(to, value.lane, sizeof value.lane);
}
inline bool divide_turned(const float* /*in*/, float /*by*/, std::size_t /*groups*/, std::size_t /*dim*/,
                          float* /*out*/) {
    return false;
}

#include "rvqkv/simd/kernels.inl"

}  // namespace generic
RVQKV_NAMESPACE_END
