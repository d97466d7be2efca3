// SPDX-License-Identifier: MIT
// Attention on rows of 16-bit whole numbers, for AVX-512 (see word_rows.hpp). Beside what avx512.hpp defines:
//   add_pairs(sums, a, b): products of 16-bit numbers, two neighbours added to a 32-bit sum
// No include guard: compiled once for each set of instructions.

inline constexpr __mmask32 all_word_lanes = ~__mmask32{0};

/// 64 codes: each lies in two neighbouring words of 16 bits, so both are brought to its lane, and shifted.
class word_unpacker {
public:
    word_unpacker(unsigned bits, const word_codebook& book)
        : loaded_(~__mmask64{0} >> (64U - 4U * bits)),
          bytes_(4U * bits),
          code_(_mm512_set1_epi16(static_cast<short>((1U << bits) - 1U))),
          last_(_mm512_set1_epi16(static_cast<short>(book.codewords - 1))),
          narrow_(_mm512_set1_epi16(static_cast<short>(book.dim / 8))),
          wide_(_mm512_set1_epi16(static_cast<short>(book.dim / 4))) {
        alignas(64) std::uint16_t begins[32];
        for (unsigned i = 0; i < 32; ++i) {
            begins[i] = static_cast<std::uint16_t>(i * bits);
        }
        const __m512i begin = _mm512_load_si512(begins);
        low_ = _mm512_maskz_srli_epi16(all_word_lanes, begin, 4);
        high_ = _mm512_add_epi16(low_, _mm512_set1_epi16(1));
        right_ = _mm512_and_si512(begin, _mm512_set1_epi16(15));
        left_ = _mm512_sub_epi16(_mm512_set1_epi16(16), right_);  // 16 shifts all out
    }
    void unpack(const std::byte* packed, bool is_wide, code_t* codes) const {
        const __m512i factor = is_wide ? wide_ : narrow_;
        RVQKV_UNROLL
        for (int half = 0; half < 2; ++half) {
            const __m512i words = _mm512_maskz_loadu_epi8(loaded_, packed + static_cast<std::size_t>(half) * bytes_);
            const __m512i low = _mm512_maskz_srlv_epi16(
                all_word_lanes, _mm512_maskz_permutexvar_epi16(all_word_lanes, low_, words), right_);
            const __m512i high = _mm512_maskz_sllv_epi16(
                all_word_lanes, _mm512_maskz_permutexvar_epi16(all_word_lanes, high_, words), left_);
            const __m512i code = _mm512_min_epu16(_mm512_and_si512(_mm512_or_si512(low, high), code_), last_);
            _mm512_storeu_si512(codes + 32 * half, _mm512_mullo_epi16(code, factor));
        }
    }

private:
    __mmask64 loaded_;
    std::size_t bytes_;
    __m512i code_;
    __m512i last_;
    __m512i narrow_;
    __m512i wide_;
    __m512i low_;
    __m512i high_;
    __m512i right_;
    __m512i left_;
};

inline void unpack_words(const tile_codes& codes, const word_codebook& book, code_t* out) {
    const word_unpacker unpacker(codes.bits, book);
    for (std::size_t group = 0; group < codes.groups; ++group) {
        for (std::size_t depth = 0; depth < codes.depths; ++depth, out += tile_tokens) {
            unpacker.unpack(codes.first + depth * codes.depth_stride + group * codes.group_stride,
                            depth < book.wide_depths, out);
        }
    }
}

inline ireg load_narrow(const std::int8_t* from) {
    return _mm512_maskz_cvtepi8_epi16(all_word_lanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

/// 32 channels of some rows: sums stay in registers over all depths, the narrow ones first.
template <int Rows>
RVQKV_ALWAYS_INLINE void decode_word_strip(const word_codebook& book, std::size_t j, const code_t* codes,
                                           std::size_t depths, ireg (&sums)[Rows]) {
    const std::size_t depth_size = book.codewords * book.dim;
    const std::size_t wide_depths = book.wide_depths < depths ? book.wide_depths : depths;
    const std::int16_t* wide = book.wide + j;
    std::size_t first_wide = 0;
    if (wide_depths < depths) {
        const code_t* narrow_codes = codes + wide_depths * tile_tokens;
        const std::int8_t* narrow = book.narrow + j;
        RVQKV_UNROLL
        for (int row = 0; row < Rows; ++row) {
            sums[row] = load_narrow(narrow + std::size_t{8} * narrow_codes[row]);
        }
        for (std::size_t depth = wide_depths + 1; depth < depths; ++depth) {
            narrow += depth_size;
            narrow_codes += tile_tokens;
            RVQKV_UNROLL
            for (int row = 0; row < Rows; ++row) {
                sums[row] = _mm512_add_epi16(sums[row], load_narrow(narrow + std::size_t{8} * narrow_codes[row]));
            }
        }
        const ireg factor = load(book.factors + j);
        RVQKV_UNROLL
        for (int row = 0; row < Rows; ++row) {
            sums[row] = _mm512_mullo_epi16(sums[row], factor);
        }
    } else {
        RVQKV_UNROLL
        for (int row = 0; row < Rows; ++row) {
            sums[row] = load(wide + std::size_t{4} * codes[row]);
        }
        first_wide = 1;
    }
    wide += first_wide * depth_size;
    codes += first_wide * tile_tokens;
    for (std::size_t depth = first_wide; depth < wide_depths; ++depth, wide += depth_size, codes += tile_tokens) {
        RVQKV_UNROLL
        for (int row = 0; row < Rows; ++row) {
            sums[row] = _mm512_add_epi16(sums[row], load(wide + std::size_t{4} * codes[row]));
        }
    }
}

inline void decode_rows(const word_codebook& book, const code_t* codes, std::size_t depths, std::size_t groups,
                        const std::uint16_t* places, std::int16_t* rows) {
    constexpr int at_once = word_rows_at_once;
    const std::size_t dim = groups * book.dim;
    for (std::size_t group = 0; group < groups; ++group, codes += depths * tile_tokens) {
        for (std::size_t j = 0; j < book.dim; j += 32, places += 2) {
            ireg sums[at_once];
            decode_word_strip(book, j, codes, depths, sums);
            std::int16_t* const first = rows + places[0];
            std::int16_t* const second = rows + places[1];
            if (second == first + word_block) {
                RVQKV_UNROLL
                for (int i = 0; i < at_once; ++i) {
                    _mm512_storeu_si512(first + static_cast<std::size_t>(i) * dim, sums[i]);
                }
                continue;
            }
            RVQKV_UNROLL
            for (int i = 0; i < at_once; ++i) {
                const std::size_t offset = static_cast<std::size_t>(i) * dim;
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(first + offset),
                                    _mm512_maskz_extracti64x4_epi64(0xff, sums[i], 0));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(second + offset),
                                    _mm512_maskz_extracti64x4_epi64(0xff, sums[i], 1));
            }
        }
    }
}

inline float round_words(const float* x, std::size_t count, const std::uint16_t* places, std::int16_t* out) {
    reg total = _mm512_set1_ps(0.0F);
    reg most = total;
    for (std::size_t i = 0; i < count; i += word_block) {
        const reg size = magnitude(load(x + i));
        total = add(total, size);
        most = max(size, most);
    }
    const float sum_of_all = sum(total);
    const float by_sum = sum_of_all / 65000.0F;
    const float by_most = largest(most) / 32767.0F;
    const float step = by_sum > by_most ? by_sum : by_most;
    const bool has_numbers = step >= 1e-30F && step <= 1e30F && sum_of_all <= 1e35F;
    const reg inverse = _mm512_set1_ps(has_numbers ? 1.0F / step : 0.0F);
    for (std::size_t i = 0; i < count; i += word_block) {
        store(out + (places == nullptr ? i : places[i / word_block]), to_integers(multiply(load(x + i), inverse)));
    }
    return has_numbers ? step : sum_of_all * 0.0F;
}

/// `Rows` rows times `Queries` queries.
template <bool Turned, int Rows, int Queries>
RVQKV_ALWAYS_INLINE void score_words_tile(const std::int16_t* rows, std::size_t dim, const std::int16_t* angles,
                                          const std::int16_t* queries, const float* steps, const float* scales,
                                          float* out, std::size_t out_stride) {
    static_assert(Rows == 4);
    const std::size_t half = dim / 2;
    ireg sums[Queries][Rows];
    RVQKV_UNROLL
    for (int q = 0; q < Queries; ++q) {
        RVQKV_UNROLL
        for (int row = 0; row < Rows; ++row) {
            sums[q][row] = _mm512_setzero_si512();
        }
    }
    for (std::size_t j = 0; j < half; j += 32) {
        ireg first[Rows];
        ireg second[Rows];
        RVQKV_UNROLL
        for (int row = 0; row < Rows; ++row) {
            const std::size_t begin = static_cast<std::size_t>(row) * dim + j;
            first[row] = load(rows + begin);
            second[row] = load(rows + begin + half);
            if constexpr (Turned) {
                const ireg cosine = load(angles + begin);
                const ireg sine = load(angles + begin + half);
                const ireg turned =
                    _mm512_sub_epi16(_mm512_mulhrs_epi16(first[row], cosine), _mm512_mulhrs_epi16(second[row], sine));
                second[row] =
                    _mm512_add_epi16(_mm512_mulhrs_epi16(first[row], sine), _mm512_mulhrs_epi16(second[row], cosine));
                first[row] = turned;
            }
        }
        RVQKV_UNROLL
        for (int q = 0; q < Queries; ++q) {
            const std::int16_t* const query = queries + static_cast<std::size_t>(q) * dim + j;
            const ireg one = load(query);
            const ireg other = load(query + half);
            RVQKV_UNROLL
            for (int row = 0; row < Rows; ++row) {
                add_pairs(sums[q][row], first[row], one);
                add_pairs(sums[q][row], second[row], other);
            }
        }
    }
    const __m128 scale = _mm_loadu_ps(scales);
    RVQKV_UNROLL
    for (int q = 0; q < Queries; ++q) {
        const __m128 total = _mm_mul_ps(_mm_cvtepi32_ps(sum_each(sums[q])), scale);
        _mm_storeu_ps(out + static_cast<std::size_t>(q) * out_stride, _mm_mul_ps(total, _mm_set1_ps(steps[q])));
    }
}
template <bool Turned, int Queries>
inline void score_words_of(const std::int16_t* rows, std::size_t dim, const std::int16_t* angles,
                           const std::int16_t* queries, const float* steps, const float* scales, float* out,
                           std::size_t out_stride) {
    for (std::size_t row = 0; row < word_rows_at_once; row += 4) {
        score_words_tile<Turned, 4, Queries>(rows + row * dim, dim, Turned ? angles + row * dim : nullptr, queries,
                                             steps, scales + row, out + row, out_stride);
    }
}
inline void score_words(const std::int16_t* rows, std::size_t dim, const std::int16_t* angles,
                        const std::int16_t* queries, std::size_t query_count, const float* steps, const float* scales,
                        float* out, std::size_t out_stride) {
    std::size_t q = 0;
    const auto tiles = [&](auto side) {
        for (; q + side <= query_count; q += side) {
            const std::int16_t* const from = queries + q * dim;
            float* const to = out + q * out_stride;
            if (angles == nullptr) {
                score_words_of<false, side>(rows, dim, angles, from, steps + q, scales, to, out_stride);
            } else {
                score_words_of<true, side>(rows, dim, angles, from, steps + q, scales, to, out_stride);
            }
        }
    };
    tiles(std::integral_constant<int, 4>());
    tiles(std::integral_constant<int, 1>());
}

/// 64 channels of `Queries` sums, over a tile: two tokens at a time, their words side by side.
template <int Queries>
RVQKV_ALWAYS_INLINE void add_words_strip(const std::int16_t* rows, std::size_t dim, const std::int16_t* weights,
                                         const float* steps, float* sums) {
    ireg totals[Queries][4];
    RVQKV_UNROLL
    for (int q = 0; q < Queries; ++q) {
        RVQKV_UNROLL
        for (int part = 0; part < 4; ++part) {
            totals[q][part] = _mm512_setzero_si512();
        }
    }
    for (std::size_t i = 0; i < tile_tokens; i += 2, rows += 2 * dim) {
        const ireg left[2] = {load(rows), load(rows + dim)};
        const ireg right[2] = {load(rows + 32), load(rows + dim + 32)};
        const ireg pairs[4] = {_mm512_maskz_unpacklo_epi16(all_word_lanes, left[0], left[1]),
                               _mm512_maskz_unpackhi_epi16(all_word_lanes, left[0], left[1]),
                               _mm512_maskz_unpacklo_epi16(all_word_lanes, right[0], right[1]),
                               _mm512_maskz_unpackhi_epi16(all_word_lanes, right[0], right[1])};
        RVQKV_UNROLL
        for (int q = 0; q < Queries; ++q) {
            std::int32_t two = 0;
            std::memcpy(&two, weights + static_cast<std::size_t>(q) * tile_tokens + i, sizeof(two));
            const ireg weight = _mm512_set1_epi32(two);
            RVQKV_UNROLL
            for (int part = 0; part < 4; ++part) {
                add_pairs(totals[q][part], pairs[part], weight);
            }
        }
    }
    const ireg order = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    RVQKV_UNROLL
    for (int q = 0; q < Queries; ++q) {
        const reg step = _mm512_set1_ps(steps[q]);
        RVQKV_UNROLL
        for (int part = 0; part < 4; ++part) {
            const ireg places = part % 2 == 0 ? order : _mm512_add_epi64(order, _mm512_set1_epi64(4));
            const int from = part / 2 * 2;
            const ireg total = _mm512_permutex2var_epi64(totals[q][from], places, totals[q][from + 1]);
            float* const to = sums + static_cast<std::size_t>(q) * dim + static_cast<std::size_t>(part) * 16;
            store(to, fma(to_floats(total), step, load(to)));
        }
    }
}
inline void add_words_of_tile(const std::int16_t* rows, std::size_t dim, const std::int16_t* weights,
                              std::size_t query_count, const float* steps, float* sums) {
    std::size_t q = 0;
    const auto strips = [&](auto side) {
        for (; q + side <= query_count; q += side) {
            for (std::size_t j = 0; j < dim; j += 64) {
                add_words_strip<side>(rows + j, dim, weights + q * tile_tokens, steps + q, sums + q * dim + j);
            }
        }
    };
    strips(std::integral_constant<int, 4>());
    strips(std::integral_constant<int, 1>());
}

inline constexpr word_row_kernels word_loops = {unpack_words, decode_rows, round_words, score_words, add_words_of_tile};
