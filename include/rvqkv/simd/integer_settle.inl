// SPDX-License-Identifier: MIT
// The end of the integer search, part of integer_search.inl: 16-bit scores of the candidates, and float32 scores of
// those that these cannot tell apart.

/// 16-bit scores of a quad, without the offsets: four 32-bit sums.
inline __m128i fine_quad(const std::int16_t* x, const std::int16_t* codewords, std::size_t fine_dim) {
    ireg sums[4];
    RVQKV_UNROLL
    for (int w = 0; w < 4; ++w) {
        sums[w] = multiply_pairs(load(x), load(codewords + static_cast<std::size_t>(w) * fine_dim));
    }
    for (std::size_t j = 2 * lanes; j < fine_dim; j += 2 * lanes) {
        RVQKV_UNROLL
        for (int w = 0; w < 4; ++w) {
            const std::int16_t* const codeword = codewords + static_cast<std::size_t>(w) * fine_dim;
            sums[w] = add(sums[w], multiply_pairs(load(x + j), load(codeword + j)));
        }
    }
    return sum_each(sums);
}

/// The float32 score, as `float32::nearest` computes it.
inline float exact_score(const float* x, const packed_codebook& book, std::size_t code) {
    alignas(64) float buffer[most_integer_dim];
    const float* const codeword = codeword_part(book, code, 0, book.dim, buffer);
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
inline void settle(const float* const* x, std::size_t rows, const packed_codebook& book, std::size_t candidates,
                   bool need_score, found* best, workspace& work) {
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
                const float score = exact_score(x[v], book, code);
                if (score > best[v].score || (score == best[v].score && code < best[v].code)) {
                    best[v] = {score, code, true};
                }
            }
        }
    }
}

/// Float32 scores of one row and eight codewords, side by side: one alone would wait for each of its sums.
inline void exact_scores_of_eight(const float* x, const packed_codebook& book, const std::int32_t* codes,
                                  float* scores) {
    alignas(64) float buffers[8][most_integer_dim];
    const float* rows[8];
    alignas(32) float sums[8];
    for (std::size_t i = 0; i < 8; ++i) {
        rows[i] = codeword_part(book, static_cast<std::size_t>(codes[i]), 0, book.dim, buffers[i]);
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

/// Fills a row's sorted list, empty yet, from at most `Most` survivors: each goes where its rank says. Reads whole
/// registers.
template <int Most>
inline void place_sorted(const std::int32_t* found_codes, const float* found_scores, std::size_t found_count,
                         std::size_t count, code_t* codes, float* scores) {
    constexpr int registers = Most / lanes;
    ireg rank[registers];
    RVQKV_UNROLL
    for (int part = 0; part < registers; ++part) {
        rank[part] = broadcast(0);
    }
    for (std::size_t i = 0; i < found_count; ++i) {
        const reg score = broadcast(found_scores + i);
        const ireg code = broadcast(found_codes[i]);
        RVQKV_UNROLL
        for (int part = 0; part < registers; ++part) {
            const mask before =
                is_before(score, code, load(found_scores + part * lanes), load(found_codes + part * lanes));
            rank[part] = add_where(before, rank[part], broadcast(1));
        }
    }
    alignas(64) std::int32_t ranks[Most];
    RVQKV_UNROLL
    for (int part = 0; part < registers; ++part) {
        store(ranks + part * lanes, rank[part]);
    }
    code_t sorted_codes[Most];
    float sorted_scores[Most];
    for (std::size_t i = 0; i < found_count; ++i) {
        sorted_codes[ranks[i]] = static_cast<code_t>(found_codes[i]);
        sorted_scores[ranks[i]] = found_scores[i];
    }
    for (std::size_t i = 0; i < count && i < found_count; ++i) {
        codes[i] = sorted_codes[i];
        scores[i] = sorted_scores[i];
    }
}

/// Of four integers those whose bit is set, side by side.
inline __m128i first_where(unsigned where, __m128i four) {
    struct shuffles {
        alignas(16) std::uint8_t bytes[16][16];
    };
    static constexpr shuffles table = [] {
        shuffles made{};
        for (unsigned set = 0; set < 16; ++set) {
            unsigned to = 0;
            for (unsigned from = 0; from < 16; ++from) {
                if ((set >> from / 4 & 1U) != 0) {
                    made.bytes[set][to++] = static_cast<std::uint8_t>(from);
                }
            }
        }
        return made;
    }();
    return _mm_shuffle_epi8(four, _mm_load_si128(reinterpret_cast<const __m128i*>(table.bytes[where])));
}

/// The same for the `count` nearest of each row, into the sorted lists `codes` and `scores`.
inline void settle_several(const float* const* x, std::size_t rows, const packed_codebook& book, std::size_t candidates,
                           std::size_t count, bool lists_are_empty, const found* best, code_t* codes, float* scores,
                           workspace& work) {
    const integer_codebook& integers = *book.integers;
    for (std::size_t v = 0; v < rows; ++v) {
        work.limits[v] -= fine_bound(work.facts[v], integers);
    }
    constexpr std::size_t most = chunk_rows * most_quads * 4 + 32;
    alignas(64) std::int32_t found_codes[most];
    alignas(64) float found_scores[most];
    std::size_t ends[chunk_rows] = {};
    std::size_t survivors = 0;
    for (std::size_t i = 0; i < candidates; ++i) {
        const unsigned above = above_limit(work, i);
        const __m128i quad_codes = _mm_cvtepu16_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(integers.codes + work.quads[i] * std::size_t{4})));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(found_codes + survivors), first_where(above, quad_codes));
        survivors += static_cast<unsigned>(__builtin_popcount(above));
        ends[work.rows[i]] = survivors;
    }
    for (std::size_t i = survivors; i < survivors + 8; ++i) {
        found_codes[i] = 0;  // what the last eight of a row take along
    }
    std::size_t first = 0;
    for (std::size_t v = 0; v < rows; ++v) {
        for (; first < ends[v]; first += 8) {
            exact_scores_of_eight(x[v], book, found_codes + first, found_scores + first);
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
            place_sorted<16>(found_codes + first, found_scores + first, found_count, count, codes + v * count,
                             scores + v * count);
        } else if (lists_are_empty && found_count <= 32) {
            place_sorted<32>(found_codes + first, found_scores + first, found_count, count, codes + v * count,
                             scores + v * count);
        } else {
            for (std::size_t i = first; i < ends[v]; ++i) {
                insert_sorted(found_scores[i], static_cast<code_t>(found_codes[i]), count, codes + v * count,
                              scores + v * count);
            }
        }
        first = ends[v];
    }
}
