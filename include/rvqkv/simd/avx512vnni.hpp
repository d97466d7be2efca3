// SPDX-License-Identifier: MIT
/// @file
/// The level above AVX-512: eight-bit dot products (VNNI) find the few codewords that can be nearest, 16-bit ones
/// settle nearly all the rest, and float32 decides what is left. The codes are those of the float32 search, always:
/// every estimate comes with a bound on its distance from the float32 score, and only what lies outside is dropped.
///
/// The eight-bit pass keeps, of each group of 64 codewords, the best of each lane ("quad": four codewords); the 16-bit
/// pass scores the quads that can hold the nearest one.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/simd/avx512.hpp"
#include "rvqkv/simd/kernel_table.hpp"

#if RVQKV_X86

#include <immintrin.h>
#include <cstddef>
#include <cstdint>
#include <cstring>

RVQKV_NAMESPACE_BEGIN
RVQKV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
namespace avx512vnni {

using avx512::all;

inline constexpr int tile_rows = 6;                // 6 x 4 sums + 4 codewords + 1 row value of 32 registers
inline constexpr std::size_t chunk_rows = 12;      // rows that are searched together; their maxima fill half of L1
inline constexpr std::size_t segment_groups = 32;  // groups that are searched together: 2,048 codewords
inline constexpr std::size_t max_several = 16;     // codewords of a list beyond which float32 is used
inline constexpr std::size_t most_quads = 64;      // candidates of a row beyond which float32 is quicker

/// Eight-bit sums start from the bits of this float, so that they are its value plus the sum: no conversion. Holds for
/// sums below 2^22, which 256 channels cannot reach.
inline constexpr float magic = 12582912.0F;  // 1.5 * 2^23
inline constexpr std::int32_t magic_bits = 0x4b400000;

/// What the bounds need to know of a row. Lengths are of the shifted row, and upper bounds.
struct row_facts {
    float norm;
    float coarse_error;  ///< |row - its eight-bit copy|
    float coarse_step;   ///< Of the eight-bit copy.
    float rounding;      ///< How far float32 sums may be from the sum in real numbers.
    std::int32_t start;  ///< What sums start from; undoes the 128 added to weights.
    bool usable;         ///< Finite, and neither tiny nor huge.
};

struct workspace {
    alignas(64) float upper[chunk_rows * segment_groups * 16];      ///< [row, group, lane]: no score is above.
    alignas(64) float lower[chunk_rows * 16];                       ///< [row, lane]: some score is not below.
    alignas(64) float upper_bounds[chunk_rows * segment_groups];    ///< [row, group]: from the sums to `upper`,
    alignas(64) float lower_bounds[chunk_rows * segment_groups];    ///< and to `lower`.
    alignas(64) float products[chunk_rows * segment_groups];        ///< [row, group]: with the groups' centers
    alignas(64) float shifted[chunk_rows * most_integer_dim];       ///< [row, integer_fine_dim]
    alignas(64) std::int8_t coarse[chunk_rows * most_integer_dim];  ///< [tile, channel / 4, row of the tile, 4]
    alignas(64) std::int16_t fine[chunk_rows * most_integer_dim];   ///< [row, integer_fine_dim]
    alignas(64) std::uint32_t flags[chunk_rows * 16];               ///< [row, lane]
    alignas(64) float scores[chunk_rows * most_quads * 4];          ///< 16-bit scores of the candidates
    std::uint16_t quads[chunk_rows * most_quads];                   ///< The candidates, row by row.
    std::uint8_t rows[chunk_rows * most_quads];                     ///< Whose they are.
    row_facts facts[chunk_rows];
    float limits[chunk_rows];  ///< 16-bit scores below cannot be among the best.
};

inline __m256 lower_half(__m512 value) {
    return _mm512_maskz_extractf32x8_ps(0xff, value, 0);
}
inline __m256 upper_half(__m512 value) {
    return _mm512_maskz_extractf32x8_ps(0xff, value, 1);
}
inline __m256i lower_half(__m512i value) {
    return _mm512_maskz_extracti32x8_epi32(0xff, value, 0);
}
inline __m256i upper_half(__m512i value) {
    return _mm512_maskz_extracti32x8_epi32(0xff, value, 1);
}
inline float sum(__m512 value) {
    const __m256 half = _mm256_add_ps(lower_half(value), upper_half(value));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
inline float largest(__m512 value) {
    const __m256 half = _mm256_max_ps(lower_half(value), upper_half(value));
    __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}
inline float square_root(float value) {
    return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(value)));
}
inline __mmask16 first_lanes(std::size_t count) {
    return count < 16 ? static_cast<__mmask16>((1U << count) - 1U) : all;
}

/// Shifts a row by the codebook's center and measures it.
inline void measure_row(const float* x, std::size_t dim, const integer_codebook& book, float* shifted,
                        row_facts& facts) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i tops = _mm512_setzero_si512();  // as integers NaNs are above infinity, and that above numbers
    __m512 squares = _mm512_setzero_ps();
    for (std::size_t j = 0; j < integer_fine_dim(dim); j += 16) {
        const __mmask16 mask = dim > j ? first_lanes(dim - j) : __mmask16{0};
        const __m512 value = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + j), _mm512_load_ps(book.center + j));
        tops = _mm512_maskz_max_epi32(all, tops, _mm512_and_si512(_mm512_castps_si512(value), magnitude));
        squares = _mm512_fmadd_ps(value, value, squares);
        _mm512_store_ps(shifted + j, value);
    }
    const __m256i half = _mm256_max_epi32(lower_half(tops), upper_half(tops));
    __m128i quarter = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    quarter = _mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
    const float top = _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0xb1))));
    facts.usable = top > 1e-10F && top < 1e10F;  // outside, the bounds would have to care for overflow and denormals
    facts.coarse_step = facts.usable ? top * (1.0F / 127.0F) : 1.0F;
    facts.norm = square_root(sum(squares)) * 1.0001F;  // the factor is above the rounding of the sum itself
    facts.rounding =
        static_cast<float>(dim + 24) * 6.0e-8F * ((2.0F * facts.norm + book.center_norm) * book.norm + book.offset);
}

/// Rounds a shifted row to eight bits and to 16, these in steps of 1/32000 of its length: then no sum of products can
/// leave 32 bits. `in_tile` rows stand in the row's tile of eight-bit copies.
inline void round_row(const float* shifted, std::size_t dim, std::size_t in_tile, std::int8_t* coarse,
                      std::int16_t* fine, row_facts& facts) {
    const __mmask16 usable = facts.usable ? all : __mmask16{0};
    const __m512 steps = _mm512_set1_ps(facts.coarse_step);
    const __m512 inverse = _mm512_set1_ps(1.0F / facts.coarse_step);
    const __m512 fine_inverse = _mm512_set1_ps(32000.0F / facts.norm);
    __m512 errors = _mm512_setzero_ps();
    __m512i total = _mm512_setzero_si512();
    const std::size_t quarters = (dim + 3) / 4;
    for (std::size_t j = 0; j < integer_fine_dim(dim); j += 16) {
        const __m512 value = _mm512_maskz_load_ps(usable, shifted + j);
        const __m512i rounded = _mm512_maskz_cvtps_epi32(all, _mm512_mul_ps(value, inverse));
        const __m512 lost = _mm512_fnmadd_ps(_mm512_maskz_cvtepi32_ps(all, rounded), steps, value);
        errors = _mm512_fmadd_ps(lost, lost, errors);
        total = _mm512_add_epi32(total, rounded);
        alignas(16) std::int8_t bytes[16];
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes), _mm512_maskz_cvtsepi32_epi8(all, rounded));
        for (std::size_t i = 0; i < 4 && j / 4 + i < quarters; ++i) {
            std::memcpy(coarse + (j / 4 + i) * in_tile * 4, bytes + i * 4, 4);
        }
        const __m512i fine_rounded = _mm512_maskz_cvtps_epi32(all, _mm512_mul_ps(value, fine_inverse));
        _mm256_store_si256(reinterpret_cast<__m256i*>(fine + j), _mm512_maskz_cvtsepi32_epi16(all, fine_rounded));
    }
    facts.coarse_error = square_root(sum(errors)) * 1.0001F + 1e-5F * facts.coarse_step;
    facts.start = magic_bits - 128 * static_cast<std::int32_t>(sum(_mm512_maskz_cvtepi32_ps(all, total)));
}

/// `sums += codewords * row`, unsigned by signed bytes, four channels to a lane.
inline void add_products(__m512i& sums, __m512i codewords, __m512i row) {
#if defined(__clang__)
    sums = _mm512_dpbusd_epi32(sums, codewords, row);
#else
    // GCC 12 copies every sum when it allocates registers for the intrinsic, and then spills half of them.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codewords), "v"(row));
#endif
}

/// Eight-bit scores of `Rows` rows against one group after the other: what each lane's best can be at most, and
/// over all groups what it is at least.
template <int Rows>
__attribute__((noinline)) inline void coarse_tile(const std::int8_t* x, const integer_codebook& book,
                                                  std::size_t quarters, std::size_t first_group, std::size_t groups,
                                                  const row_facts* facts, const float* upper_bounds,
                                                  const float* lower_bounds, float* upper, float* lower) {
    const std::uint8_t* codewords = book.coarse + first_group * integer_group * quarters * 4;
    const float* offsets = book.coarse_offsets + first_group * integer_group;
    for (std::size_t g = 0; g < groups; ++g) {
        __m512i sums[Rows][4];
        RVQKV_UNROLL
        for (int v = 0; v < Rows; ++v) {
            RVQKV_UNROLL
            for (int w = 0; w < 4; ++w) {
                sums[v][w] = _mm512_set1_epi32(facts[v].start);
            }
        }
        const std::int8_t* value = x;
        for (std::size_t j = 0; j < quarters; ++j) {
            __m512i c[4];
            RVQKV_UNROLL
            for (int w = 0; w < 4; ++w) {
                c[w] = _mm512_load_si512(codewords + w * 64);
            }
            RVQKV_UNROLL
            for (int v = 0; v < Rows; ++v) {
                std::int32_t four = 0;
                std::memcpy(&four, value + v * 4, 4);
                const __m512i row = _mm512_set1_epi32(four);
                RVQKV_UNROLL
                for (int w = 0; w < 4; ++w) {
                    add_products(sums[v][w], c[w], row);
                }
            }
            codewords += integer_group * 4;
            value += Rows * 4;
        }
        __m512 offset[4];
        RVQKV_UNROLL
        for (int w = 0; w < 4; ++w) {
            offset[w] = _mm512_load_ps(offsets + w * 16);
        }
        offsets += integer_group;
        const __m512 step = _mm512_set1_ps(book.coarse_steps[first_group + g]);
        RVQKV_UNROLL
        for (int v = 0; v < Rows; ++v) {
            const __m512 row_step = _mm512_set1_ps(facts[v].coarse_step);
            __m512 scores[4];
            RVQKV_UNROLL
            for (int w = 0; w < 4; ++w) {
                scores[w] = _mm512_fmadd_ps(_mm512_castsi512_ps(sums[v][w]), row_step, offset[w]);
            }
            const __m512 best = _mm512_maskz_max_ps(all, _mm512_maskz_max_ps(all, scores[0], scores[1]),
                                                    _mm512_maskz_max_ps(all, scores[2], scores[3]));
            const __m512 scaled = _mm512_mul_ps(best, step);
            const std::size_t at = static_cast<std::size_t>(v) * segment_groups + g;
            _mm512_store_ps(upper + at * 16, _mm512_add_ps(scaled, _mm512_set1_ps(upper_bounds[at])));
            const __m512 least = _mm512_add_ps(scaled, _mm512_set1_ps(lower_bounds[at]));
            _mm512_store_ps(lower + v * 16, _mm512_maskz_max_ps(all, _mm512_load_ps(lower + v * 16), least));
        }
    }
}

/// `coarse_tile` for a number of rows that is known at run time, at most `Rows`.
template <int Rows>
inline void coarse_rows(std::size_t rows, const std::int8_t* x, const integer_codebook& book, std::size_t quarters,
                        std::size_t first_group, std::size_t groups, std::size_t first_row, workspace& work) {
    if (rows == Rows) {
        const std::size_t at = first_row * segment_groups;
        coarse_tile<Rows>(x, book, quarters, first_group, groups, work.facts + first_row, work.upper_bounds + at,
                          work.lower_bounds + at, work.upper + at * 16, work.lower + first_row * 16);
    } else if constexpr (Rows > 1) {
        coarse_rows<Rows - 1>(rows, x, book, quarters, first_group, groups, first_row, work);
    }
}

/// 16-bit scores of a quad, without the offsets: four 32-bit sums.
inline __m128i fine_quad(const std::int16_t* x, const std::int16_t* codewords, std::size_t fine_dim) {
    __m512i sums[4];
    RVQKV_UNROLL
    for (int w = 0; w < 4; ++w) {
        sums[w] = _mm512_madd_epi16(_mm512_load_si512(x),
                                    _mm512_load_si512(codewords + static_cast<std::size_t>(w) * fine_dim));
    }
    for (std::size_t j = 32; j < fine_dim; j += 32) {
        RVQKV_UNROLL
        for (int w = 0; w < 4; ++w) {
            sums[w] = _mm512_dpwssd_epi32(sums[w], _mm512_load_si512(x + j),
                                          _mm512_load_si512(codewords + static_cast<std::size_t>(w) * fine_dim + j));
        }
    }
    const __m512i left = _mm512_add_epi32(_mm512_maskz_unpacklo_epi32(all, sums[0], sums[1]),
                                          _mm512_maskz_unpackhi_epi32(all, sums[0], sums[1]));
    const __m512i right = _mm512_add_epi32(_mm512_maskz_unpacklo_epi32(all, sums[2], sums[3]),
                                           _mm512_maskz_unpackhi_epi32(all, sums[2], sums[3]));
    const __m512i both = _mm512_add_epi32(_mm512_maskz_unpacklo_epi64(0xff, left, right),
                                          _mm512_maskz_unpackhi_epi64(0xff, left, right));
    const __m256i half = _mm256_add_epi32(lower_half(both), upper_half(both));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/// The float32 score, as `avx512::nearest` computes it.
inline float exact_score(const float* x, const packed_codebook& book, std::size_t code) {
    alignas(64) float buffer[most_integer_dim];
    const float* const codeword = avx512::codeword_part(book, code, 0, book.dim, buffer);
    float score = book.offsets[code];
    for (std::size_t j = 0; j < book.dim; ++j) {
        score = __builtin_fmaf(x[j], codeword[j], score);
    }
    return score;
}

struct found {
    float score;
    std::size_t code;
    bool ok;  ///< false: not a row for this path
};

/// How far the 16-bit scores of a row may be from the float32 scores.
inline float fine_bound(const row_facts& facts, const integer_codebook& book) {
    const float row_error = facts.norm * (1.0F / 32000.0F) * book.half_root_dim;
    return row_error * book.norm + (facts.norm + row_error) * book.fine_step * book.half_root_dim + facts.rounding;
}

/// Products of `Rows` shifted rows with the centers of 32 groups, in float32.
template <int Rows>
inline void multiply_centers(const float* shifted, std::size_t fine_dim, const float* centers, std::size_t dim,
                             float* products) {
    __m512 sums[Rows][2];
    RVQKV_UNROLL
    for (int v = 0; v < Rows; ++v) {
        sums[v][0] = _mm512_setzero_ps();
        sums[v][1] = _mm512_setzero_ps();
    }
    const float* const more_centers = centers + dim * 16;
    for (std::size_t j = 0; j < dim; ++j) {
        const __m512 left = _mm512_load_ps(centers + j * 16);
        const __m512 right = _mm512_load_ps(more_centers + j * 16);
        RVQKV_UNROLL
        for (int v = 0; v < Rows; ++v) {
            const __m512 value = _mm512_set1_ps(shifted[static_cast<std::size_t>(v) * fine_dim + j]);
            sums[v][0] = _mm512_fmadd_ps(value, left, sums[v][0]);
            sums[v][1] = _mm512_fmadd_ps(value, right, sums[v][1]);
        }
    }
    RVQKV_UNROLL
    for (int v = 0; v < Rows; ++v) {
        _mm512_store_ps(products + v * 32, sums[v][0]);
        _mm512_store_ps(products + v * 32 + 16, sums[v][1]);
    }
}

/// From eight-bit sums to bounds of the scores, for each of 32 groups. `products` are those with the groups' centers,
/// null if they have none.
inline void set_bounds(const row_facts& facts, const integer_codebook& book, std::size_t first_group,
                       const float* products, float* upper, float* lower) {
    const __m512 row_step = _mm512_set1_ps(facts.coarse_step);
    const __m512 row_error = _mm512_set1_ps(facts.coarse_error);
    const __m512 length = _mm512_set1_ps(facts.norm + facts.coarse_error);
    for (std::size_t g = 0; g < segment_groups; g += 16) {
        const __m512 unit = _mm512_mul_ps(row_step, _mm512_loadu_ps(book.coarse_steps + first_group + g));
        __m512 bound = _mm512_fmadd_ps(unit, _mm512_set1_ps(6.0F), _mm512_set1_ps(facts.rounding));  // 6: for `magic`
        bound = _mm512_fmadd_ps(row_error, _mm512_loadu_ps(book.norms + first_group + g), bound);
        bound = _mm512_fmadd_ps(length, _mm512_loadu_ps(book.coarse_errors + first_group + g), bound);
        __m512 shift = _mm512_mul_ps(unit, _mm512_set1_ps(-magic));
        if (products != nullptr) {
            shift = _mm512_add_ps(shift, _mm512_load_ps(products + g));
        }
        _mm512_store_ps(upper + g, _mm512_add_ps(shift, bound));
        _mm512_store_ps(lower + g, _mm512_sub_ps(shift, bound));
    }
}

/// The `count`-th largest of 16 numbers; if some are equal, perhaps a smaller one. Precondition: `1 <= count <= 16`.
inline float largest_but(const float* numbers, std::size_t count) {
    const __m512 value = _mm512_load_ps(numbers);
    if (count == 1) {
        return largest(value);
    }
    __m512i ahead = _mm512_setzero_si512();
    RVQKV_UNROLL
    for (int i = 0; i < 16; ++i) {
        const __mmask16 less = _mm512_cmp_ps_mask(value, _mm512_set1_ps(numbers[i]), _CMP_LT_OQ);
        ahead = _mm512_mask_add_epi32(ahead, less, ahead, _mm512_set1_epi32(1));
    }
    const __mmask16 enough = _mm512_cmpge_epi32_mask(ahead, _mm512_set1_epi32(static_cast<int>(count) - 1));
    return largest(_mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), enough, value));
}

/// Which quads of a row can hold one of its `count` nearest codewords: bit `g` of lane `l` says group `g`, lane `l`.
inline void flag_quads(const float* upper, const float* lower, std::size_t groups, std::size_t count,
                       std::uint32_t* flags, float& limit) {
    limit = largest_but(lower, count);
    const __m512 least = _mm512_set1_ps(limit);
    __m512i of_lane = _mm512_setzero_si512();
    __m512i bit = _mm512_set1_epi32(1);
    for (std::size_t g = 0; g < groups; ++g) {
        const __mmask16 can = _mm512_cmp_ps_mask(_mm512_load_ps(upper + g * 16), least, _CMP_GE_OQ);
        of_lane = _mm512_mask_or_epi32(of_lane, can, of_lane, bit);
        bit = _mm512_add_epi32(bit, bit);
    }
    _mm512_store_si512(flags, of_lane);
}

/// Appends the flagged quads of a row to the candidates and returns their new number. If they are too many, the row's
/// are left out and `ok` turns false.
inline std::size_t list_quads(std::size_t row, std::size_t first_group, std::size_t count, bool& ok, workspace& work) {
    const std::uint32_t* const flags = work.flags + row * 16;
    const __m512i of_lane = _mm512_load_si512(flags);
    unsigned lanes = _mm512_test_epi32_mask(of_lane, of_lane);
    const std::size_t start = count;
    while (lanes != 0) {
        const auto lane = static_cast<std::size_t>(__builtin_ctz(lanes));
        lanes &= lanes - 1;
        std::uint32_t groups = flags[lane];
        do {
            if (count - start == most_quads) {
                ok = false;
                return start;
            }
            const std::size_t group = first_group + static_cast<std::size_t>(__builtin_ctz(groups));
            groups &= groups - 1;
            work.quads[count] = static_cast<std::uint16_t>(group * search_block + lane);
            work.rows[count++] = static_cast<std::uint8_t>(row);
        } while (groups != 0);
    }
    return count;
}

/// 16-bit scores of all candidates.
inline void score_quads(const integer_codebook& book, std::size_t fine_dim, std::size_t candidates, workspace& work) {
    for (std::size_t i = 0; i < candidates; ++i) {
        const std::size_t quad = work.quads[i];
        const std::size_t row = work.rows[i];
        const __m128i products = fine_quad(work.fine + row * fine_dim, book.fine + quad * 4 * fine_dim, fine_dim);
        const __m128 unit = _mm_set1_ps(work.facts[row].norm * (1.0F / 32000.0F) * book.fine_step);
        const __m128 scores = _mm_fmadd_ps(_mm_cvtepi32_ps(products), unit, _mm_load_ps(book.fine_offsets + quad * 4));
        _mm_store_ps(work.scores + i * 4, scores);
    }
}

inline unsigned above_limit(const workspace& work, std::size_t candidate) {
    const __m128 limit = _mm_set1_ps(work.limits[work.rows[candidate]]);
    return static_cast<unsigned>(_mm_movemask_ps(_mm_cmpge_ps(_mm_load_ps(work.scores + candidate * 4), limit)));
}

/// The nearest codewords among a segment for all rows that are `ok`, into `best`. Loops without branches, apart from
/// those that no processor can predict: these must not wait for results.
inline void settle(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book,
                   std::size_t candidates, bool need_score, found* best, workspace& work) {
    const integer_codebook& integers = *book.integers;
    for (std::size_t i = 0; i < candidates; ++i) {
        const __m128 scores = _mm_load_ps(work.scores + i * 4);
        __m128 top = _mm_max_ps(scores, _mm_movehl_ps(scores, scores));
        top = _mm_max_ss(top, _mm_movehdup_ps(top));
        float& limit = work.limits[work.rows[i]];
        _mm_store_ss(&limit, _mm_max_ss(top, _mm_load_ss(&limit)));
    }
    for (std::size_t v = 0; v < rows; ++v) {
        work.limits[v] -= 2.0F * fine_bound(work.facts[v], integers);
    }
    std::size_t survivors[chunk_rows] = {};
    std::size_t places[chunk_rows] = {};
    for (std::size_t i = 0; i < candidates; ++i) {
        const std::size_t row = work.rows[i];
        const unsigned above = above_limit(work, i);
        survivors[row] += static_cast<unsigned>(__builtin_popcount(above));
        const std::size_t place = work.quads[i] * std::size_t{4} + static_cast<unsigned>(__builtin_ctz(above | 16U));
        places[row] = above != 0 ? place : places[row];
    }
    for (std::size_t v = 0; v < rows; ++v) {
        if (!best[v].ok) {
            continue;
        }
        if (survivors[v] == 1 && !need_score) {
            best[v].code = integers.codes[places[v]];
            continue;
        }
        for (std::size_t i = 0; i < candidates; ++i) {
            for (unsigned above = work.rows[i] == v ? above_limit(work, i) : 0U; above != 0; above &= above - 1) {
                const std::size_t code = integers.codes[work.quads[i] * 4 + __builtin_ctz(above)];
                const float score = exact_score(x + v * stride, book, code);
                if (score > best[v].score || (score == best[v].score && code < best[v].code)) {
                    best[v] = {score, code, true};
                }
            }
        }
    }
}

/// Float32 scores of one row and eight codewords, side by side: one alone would wait for each of its sums.
inline void exact_scores(const float* x, const packed_codebook& book, const std::int32_t* codes, float* scores) {
    alignas(64) float buffers[8][most_integer_dim];
    const float* rows[8];
    alignas(32) float sums[8];
    for (std::size_t i = 0; i < 8; ++i) {
        rows[i] = avx512::codeword_part(book, static_cast<std::size_t>(codes[i]), 0, book.dim, buffers[i]);
        sums[i] = book.offsets[codes[i]];
    }
    __m256 sum = _mm256_load_ps(sums);
    std::size_t j = 0;
    for (; j + 4 <= book.dim; j += 4) {
        __m256 part[4];
        RVQKV_UNROLL
        for (int i = 0; i < 4; ++i) {
            part[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[i] + j)),
                                           _mm_loadu_ps(rows[i + 4] + j), 1);
        }
        const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(part[0], part[1]));
        const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(part[0], part[1]));
        const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(part[2], part[3]));
        const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(part[2], part[3]));
        sum = _mm256_fmadd_ps(_mm256_broadcast_ss(x + j), _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)), sum);
        sum = _mm256_fmadd_ps(_mm256_broadcast_ss(x + j + 1), _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23)), sum);
        sum =
            _mm256_fmadd_ps(_mm256_broadcast_ss(x + j + 2), _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23)), sum);
        sum =
            _mm256_fmadd_ps(_mm256_broadcast_ss(x + j + 3), _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23)), sum);
    }
    _mm256_storeu_ps(scores, sum);
    for (; j < book.dim; ++j) {
        for (std::size_t i = 0; i < 8; ++i) {
            scores[i] = __builtin_fmaf(x[j], rows[i][j], scores[i]);
        }
    }
}

/// Fills a row's sorted list, empty yet, from at most 16 survivors: each goes where its rank says.
inline void place_sorted(const std::int32_t* found_codes, const float* found_scores, std::size_t found_count,
                         std::size_t count, code_t* codes, float* scores) {
    const __mmask16 used = first_lanes(found_count);
    const __m512 score = _mm512_maskz_loadu_ps(used, found_scores);
    const __m512i code = _mm512_maskz_loadu_epi32(used, found_codes);
    __m512i rank = _mm512_setzero_si512();
    for (std::size_t i = 0; i < found_count; ++i) {
        const __m512 other = _mm512_set1_ps(found_scores[i]);
        const __mmask16 above = _mm512_cmp_ps_mask(other, score, _CMP_GT_OQ);
        const __mmask16 equal = _mm512_cmp_ps_mask(other, score, _CMP_EQ_OQ);
        const __mmask16 before = _mm512_mask_cmplt_epi32_mask(equal, _mm512_set1_epi32(found_codes[i]), code);
        const auto ahead = static_cast<__mmask16>(above | before);
        rank = _mm512_mask_add_epi32(rank, ahead, rank, _mm512_set1_epi32(1));
    }
    alignas(64) std::int32_t ranks[16];
    _mm512_store_si512(ranks, rank);
    code_t sorted_codes[16];
    float sorted_scores[16];
    for (std::size_t i = 0; i < found_count; ++i) {
        sorted_codes[ranks[i]] = static_cast<code_t>(found_codes[i]);
        sorted_scores[ranks[i]] = found_scores[i];
    }
    for (std::size_t i = 0; i < count && i < found_count; ++i) {
        codes[i] = sorted_codes[i];
        scores[i] = sorted_scores[i];
    }
}

/// The same for the `count` nearest of each row, into the sorted lists `codes` and `scores`.
inline void settle_several(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book,
                           std::size_t candidates, std::size_t count, bool lists_are_empty, const found* best,
                           code_t* codes, float* scores, workspace& work) {
    const integer_codebook& integers = *book.integers;
    for (std::size_t v = 0; v < rows; ++v) {
        work.limits[v] -= fine_bound(work.facts[v], integers);
    }
    constexpr std::size_t most = chunk_rows * most_quads * 4 + 8;
    alignas(64) std::int32_t found_codes[most];
    alignas(64) float found_scores[most];
    std::size_t ends[chunk_rows] = {};
    std::size_t survivors = 0;
    for (std::size_t i = 0; i < candidates; ++i) {
        const auto above = static_cast<__mmask8>(above_limit(work, i));
        const __m128i quad_codes = _mm_cvtepu16_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(integers.codes + work.quads[i] * std::size_t{4})));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(found_codes + survivors),
                         _mm_maskz_compress_epi32(above, quad_codes));
        survivors += static_cast<unsigned>(__builtin_popcount(above));
        ends[work.rows[i]] = survivors;
    }
    for (std::size_t i = survivors; i < survivors + 8; ++i) {
        found_codes[i] = 0;  // what the last eight of a row take along
    }
    std::size_t first = 0;
    for (std::size_t v = 0; v < rows; ++v) {
        for (; first < ends[v]; first += 8) {
            exact_scores(x + v * stride, book, found_codes + first, found_scores + first);
        }
        first = ends[v] != 0 ? ends[v] : first;
    }
    first = 0;
    for (std::size_t v = 0; v < rows; ++v) {
        if (!best[v].ok || ends[v] == 0) {
            continue;
        }
        const std::size_t found_count = ends[v] - first;
        if (lists_are_empty && found_count <= 16) {
            place_sorted(found_codes + first, found_scores + first, found_count, count, codes + v * count,
                         scores + v * count);
        } else {
            for (std::size_t i = first; i < ends[v]; ++i) {
                avx512::insert_sorted(found_scores[i], static_cast<code_t>(found_codes[i]), count, codes + v * count,
                                      scores + v * count);
            }
        }
        first = ends[v];
    }
}

/// Searches a codebook that has integer copies: the `count` nearest codewords of each row. `scores` may be null if that
/// is one.
inline void search(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book, std::size_t count,
                   code_t* codes, float* scores) {
    const integer_codebook& integers = *book.integers;
    const std::size_t all_groups = (book.codewords + integer_group - 1) / integer_group;
    const std::size_t quarters = (book.dim + 3) / 4;
    const std::size_t fine_dim = integer_fine_dim(book.dim);
    const bool need_score = scores != nullptr || all_groups > segment_groups;
    workspace work;
    for (std::size_t first = 0; first < rows; first += chunk_rows) {
        const std::size_t in_chunk = rows - first < chunk_rows ? rows - first : chunk_rows;
        const float* const chunk_x = x + first * stride;
        found best[chunk_rows];
        for (std::size_t v = 0; v < in_chunk; ++v) {
            measure_row(chunk_x + v * stride, book.dim, integers, work.shifted + v * fine_dim, work.facts[v]);
            best[v] = {-__builtin_inff(), max_codewords, work.facts[v].usable};
        }
        for (std::size_t v = 0; v < in_chunk; ++v) {
            const std::size_t tile = v / tile_rows * tile_rows;
            round_row(work.shifted + v * fine_dim, book.dim, in_chunk - tile < tile_rows ? in_chunk - tile : tile_rows,
                      work.coarse + tile * quarters * 4 + (v - tile) * 4, work.fine + v * fine_dim, work.facts[v]);
        }
        for (std::size_t i = first * count; count > 1 && i < (first + in_chunk) * count; ++i) {
            codes[i] = 0;
            scores[i] = -__builtin_inff();
        }
        for (std::size_t segment = 0; segment < all_groups; segment += segment_groups) {
            const std::size_t groups = all_groups - segment < segment_groups ? all_groups - segment : segment_groups;
            for (std::size_t v = 0; v < in_chunk && integers.group_centers != nullptr; v += 4) {
                multiply_centers<4>(work.shifted + v * fine_dim, fine_dim, integers.group_centers + segment * book.dim,
                                    book.dim, work.products + v * segment_groups);
            }
            for (std::size_t v = 0; v < in_chunk; ++v) {
                set_bounds(work.facts[v], integers, segment,
                           integers.group_centers != nullptr ? work.products + v * segment_groups : nullptr,
                           work.upper_bounds + v * segment_groups, work.lower_bounds + v * segment_groups);
                _mm512_store_ps(work.lower + v * 16, _mm512_set1_ps(-__builtin_inff()));
            }
            for (std::size_t v = 0; v < in_chunk; v += tile_rows) {
                coarse_rows<tile_rows>(in_chunk - v < tile_rows ? in_chunk - v : tile_rows,
                                       work.coarse + v * quarters * 4, integers, quarters, segment, groups, v, work);
            }
            for (std::size_t v = 0; v < in_chunk; ++v) {
                flag_quads(work.upper + v * segment_groups * 16, work.lower + v * 16, groups, count,
                           work.flags + v * 16, work.limits[v]);
            }
            std::size_t candidates = 0;
            for (std::size_t v = 0; v < in_chunk; ++v) {
                // Not -infinity, which padding would reach.
                work.limits[v] = work.limits[v] > -__FLT_MAX__ ? work.limits[v] : -__FLT_MAX__;
                if (best[v].ok) {
                    candidates = list_quads(v, segment, candidates, best[v].ok, work);
                }
            }
            score_quads(integers, fine_dim, candidates, work);
            if (count == 1) {
                settle(chunk_x, in_chunk, stride, book, candidates, need_score, best, work);
            } else {
                settle_several(chunk_x, in_chunk, stride, book, candidates, count, segment == 0, best,
                               codes + first * count, scores + first * count, work);
            }
        }
        for (std::size_t v = 0; v < in_chunk; ++v) {
            const std::size_t at = (first + v) * count;
            if (!best[v].ok) {
                if (count == 1) {
                    avx512::nearest(chunk_x + v * stride, 1, stride, book, codes + at,
                                    scores == nullptr ? nullptr : scores + at);
                } else {
                    avx512::nearest_several(chunk_x + v * stride, 1, stride, book, count, codes + at, scores + at);
                }
            } else if (count == 1) {
                codes[at] = static_cast<code_t>(best[v].code);
                if (scores != nullptr) {
                    scores[at] = best[v].score;
                }
            }
        }
    }
}

inline void nearest(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book, code_t* codes,
                    float* scores) {
    if (book.integers == nullptr) {
        avx512::nearest(x, rows, stride, book, codes, scores);
    } else {
        search(x, rows, stride, book, 1, codes, scores);
    }
}

inline void nearest_several(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book,
                            std::size_t count, code_t* codes, float* scores) {
    if (book.integers == nullptr || count > max_several) {
        avx512::nearest_several(x, rows, stride, book, count, codes, scores);
    } else {
        search(x, rows, stride, book, count, codes, scores);
    }
}

inline constexpr kernel_table kernels = [] {
    kernel_table table = avx512::kernels;
    table.level = simd_level::avx512vnni;
    table.nearest = nearest;
    table.nearest_several = nearest_several;
    return table;
}();

}  // namespace avx512vnni
RVQKV_TARGET_END
RVQKV_NAMESPACE_END

#endif
