// SPDX-License-Identifier: MIT
// The inner loops, written once and compiled for every instruction set: included inside that set's namespace and target
// region, after its `reg` type and the loads, stores and conversions below have been defined there:
//   reg: `lanes` floats;   ireg: `lanes` 32-bit integers;   mask: a truth for each lane
//   load(float*) load(float16*) load(bfloat16*)  store(float*, reg)  store(float16*, reg)  store(bfloat16*, reg)
//   load(int32_t*)  store(int32_t*, ireg)  store(code_t*, ireg)
//   broadcast, fma(a, b, c) = a * b + c rounded once, add, subtract, keep_greater, keep (in a register)
//   transpose: turns four channels of `lanes` rows on their side
//   tile_side, tile_sums: a tile of the search is at most that wide, and keeps at most that many registers of sums
//   small_scan: its scans by small tables, or the portable ones
//   word_rows: its loops over rows of 16-bit numbers, or null
//   rows.inl uses doubles besides: wide, wide_lanes, widen; and divide_turned
//   reg8, reg4, load_as: as decode.inl says; subtract for them where they are narrower than reg
//   several.inl uses greater, select, bits, tile_rows and tile_registers besides
// No include guard: that is the point.

#include "rvqkv/simd/search.inl"

/// Codewords that fill one register, narrower than `reg`.
template <class Reg, class Weight>
inline void subtract_narrow(float* x, std::size_t rows, std::size_t stride, const Weight* codewords,
                            const code_t* codes) {
    constexpr std::size_t width = sizeof(Reg) / sizeof(float);
    for (std::size_t i = 0; i < rows; ++i) {
        float* const row = x + i * stride;
        store(row, subtract(load_as<Reg>(row), load_as<Reg>(codewords + codes[i] * width)));
    }
}

template <class Weight>
inline void subtract_codewords(float* x, std::size_t rows, std::size_t stride, const Weight* codewords, std::size_t dim,
                               const code_t* codes) {
    if (sizeof(reg8) < sizeof(reg) && dim == 8) {
        return subtract_narrow<reg8>(x, rows, stride, codewords, codes);
    }
    if (sizeof(reg4) < sizeof(reg) && dim == 4) {
        return subtract_narrow<reg4>(x, rows, stride, codewords, codes);
    }
    for (std::size_t i = 0; i < rows; ++i) {
        float* const row = x + i * stride;
        const Weight* const codeword = codewords + codes[i] * dim;
        std::size_t j = 0;
        for (; j + lanes <= dim; j += lanes) {
            store(row + j, subtract(load(row + j), load(codeword + j)));
        }
        for (; j < dim; ++j) {
            row[j] -= to_float(codeword[j]);
        }
    }
}

template <class From, class To>
inline void convert(const From* in, To* out, std::size_t count) {
    std::size_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        store(out + i, load(in + i));
    }
    for (; i < count; ++i) {
        out[i] = float_to<To>(to_float(in[i]));
    }
}

#include "rvqkv/simd/decode.inl"

#include "rvqkv/simd/several.inl"

#include "rvqkv/simd/large_tables.inl"

#include "rvqkv/simd/attention.inl"

#include "rvqkv/simd/rows.inl"

inline constexpr kernel_table kernels = {
    level,
    nearest,
    nearest_several,
    {subtract_codewords<float>, decode<float>},
    {subtract_codewords<float16>, decode<float16>},
    {subtract_codewords<bfloat16>, decode<bfloat16>},
    convert<float16, float>,
    convert<float, float16>,
    convert<bfloat16, float>,
    convert<float, bfloat16>,
    attention,
    &small_scan,
    word_rows,
    {round_finite<float16>, round_finite<bfloat16>, all_finite<float>, all_finite<float16>, all_finite<bfloat16>,
     moments, divide_row, divide_strided},
};
