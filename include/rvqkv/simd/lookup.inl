// SPDX-License-Identifier: MIT
// Decoding with codebooks that fit in a register, part of avx512.hpp: four or eight channels of up to 16 codewords.

template <class From, class To>
inline void convert(const From* in, To* out, std::size_t count);

inline ireg load(const code_t* from) {
    return _mm512_maskz_cvtepu16_epi32(all, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

/// `table[codes]` in each lane, for codes below 16.
inline reg lookup(const float* table, ireg codes) {
    return _mm512_maskz_permutexvar_ps(all, codes, load(table));
}
/// The order in which `store_rows` takes rows from lanes: lane `4 q + i` is row `4 i + q`.
inline ireg in_store_order(ireg rows) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_maskz_permutexvar_epi32(all, order, rows);
}
/// 16 whole rows of 4 or of 8 channels, one after the other.
inline void store_rows(float* to, const reg (&channels)[1][4]) {
    reg rows[4];
    turn(channels[0], rows);
    RVQKV_UNROLL
    for (int i = 0; i < 4; ++i) {
        store(to + i * lanes, rows[i]);
    }
}
inline void store_rows(float* to, const reg (&channels)[2][4]) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    reg left[4];
    reg right[4];
    turn(channels[0], left);
    turn(channels[1], right);
    RVQKV_UNROLL
    for (int i = 0; i < 4; ++i) {
        store(to + 2 * i * lanes, _mm512_permutex2var_ps(left[i], first, right[i]));
        store(to + (2 * i + 1) * lanes, _mm512_permutex2var_ps(left[i], second, right[i]));
    }
}

inline constexpr bool has_lookup = true;
inline constexpr std::size_t lookup_size = 128;  // depths x channels: 8 KiB of tables

/// Each channel of a depth is one register, from which the codes of 16 rows choose.
template <int Quads, class Weight>
inline std::size_t decode_by_lookup(float* x, std::size_t rows, const Weight* weights, std::size_t codewords,
                                    const code_t* codes, std::size_t depth_step, std::size_t depths) {
    constexpr std::size_t width = lanes;
    constexpr std::size_t channels = 4 * Quads;
    alignas(64) float tables[lookup_size * width];
    float codebook[width * channels] = {};
    for (std::size_t k = 0; k < depths; ++k) {
        convert(weights + k * codewords * channels, codebook, codewords * channels);
        for (std::size_t j = 0; j < channels; j += 4) {
            transpose(codebook + j, channels, tables + (k * channels + j) * width, width);
        }
    }
    std::size_t i = 0;
    for (; i + width <= rows; i += width) {
        reg sums[Quads][4];
        const auto for_each_sum = [&](std::size_t k, auto take) {
            const ireg chosen = in_store_order(load(codes + i + k * depth_step));
            const float* const table = tables + k * channels * width;
            RVQKV_UNROLL
            for (int j = 0; j < Quads; ++j) {
                RVQKV_UNROLL
                for (int c = 0; c < 4; ++c) {
                    take(sums[j][c], lookup(table + static_cast<std::size_t>(4 * j + c) * width, chosen));
                }
            }
        };
        for_each_sum(0, [](reg& sum, reg value) { sum = value; });
        for (std::size_t k = 1; k < depths; ++k) {
            for_each_sum(k, [](reg& sum, reg value) { sum = add(sum, value); });
        }
        store_rows(x + i * channels, sums);
    }
    return i;
}

/// As `decode`, for as many rows as there are whole registers full of; 0 when this form does not serve the shape.
template <class Weight>
inline std::size_t decode_small(float* x, std::size_t rows, std::size_t stride, const Weight* weights,
                                std::size_t codewords, std::size_t dim, const code_t* codes, code_strides strides,
                                std::size_t depths) {
    constexpr std::size_t worth = 16;  // rows for each channel that pay for the tables
    if (codewords > lanes || strides.vector != 1 || stride != dim || depths * dim > lookup_size || rows < worth * dim) {
        return 0;
    }
    switch (dim) {
        case 4: return decode_by_lookup<1>(x, rows, weights, codewords, codes, strides.depth, depths);
        case 8: return decode_by_lookup<2>(x, rows, weights, codewords, codes, strides.depth, depths);
        default: return 0;
    }
}
