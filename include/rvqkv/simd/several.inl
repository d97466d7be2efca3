// SPDX-License-Identifier: MIT
// The search for the several best codewords of each vector (the beam), part of kernels.inl.
//
// One pass over the codebook keeps, of every group of 64 codewords, the best score of each lane ("quad": four
// codewords). The `count`-th largest of these is a score that the list surely reaches, so only the quads that are not
// below it are looked at again.

/// Where a codeword goes in a list that is sorted by falling score, lower codes first among equals; it may fall off.
inline void insert_sorted(float score, code_t code, std::size_t count, code_t* codes, float* scores) {
    std::size_t to = count;
    while (to > 0 && (scores[to - 1] < score || (scores[to - 1] == score && codes[to - 1] > code))) {
        --to;
    }
    if (to == count) {
        return;
    }
    for (std::size_t i = count - 1; i > to; --i) {
        scores[i] = scores[i - 1];
        codes[i] = codes[i - 1];
    }
    scores[to] = score;
    codes[to] = code;
}

/// `count` of a codeword's channels from `first` on, one after the other: where they stand, or copied to `buffer`.
inline const float* codeword_part(const packed_codebook& book, std::size_t code, std::size_t first, std::size_t count,
                                  float* buffer) {
    const std::size_t at = code * book.dim + first;
    if (book.rows == nullptr) {  // cosine: normalized codewords are in the search layout only
        const float* const from =
            book.interleaved + (code / search_block * book.dim + first) * search_block + code % search_block;
        for (std::size_t j = 0; j < count; ++j) {
            buffer[j] = from[j * search_block];
        }
    } else if (book.row_type == dtype::float32) {
        return static_cast<const float*>(book.rows) + at;
    } else if (book.row_type == dtype::float16) {
        convert(static_cast<const float16*>(book.rows) + at, buffer, count);
    } else {
        convert(static_cast<const bfloat16*>(book.rows) + at, buffer, count);
    }
    return buffer;
}

/// Scores of a row and four codewords at once: one alone would wait for each of its sums.
inline constexpr std::size_t exact_chains = 4;
inline void exact_scores(const float* x, const packed_codebook& book, const std::int32_t* codes, float* scores) {
    constexpr std::size_t strip = 256;  // channels at a time
    const float* codeword[exact_chains];
    float buffers[exact_chains][strip];
    float sums[exact_chains];
    for (std::size_t i = 0; i < exact_chains; ++i) {
        sums[i] = book.offsets[codes[i]];
    }
    for (std::size_t first = 0; first < book.dim; first += strip) {
        const std::size_t count = book.dim - first < strip ? book.dim - first : strip;
        for (std::size_t i = 0; i < exact_chains; ++i) {
            codeword[i] = codeword_part(book, static_cast<std::size_t>(codes[i]), first, count, buffers[i]);
        }
        for (std::size_t j = 0; j < count; ++j) {
            RVQKV_UNROLL
            for (std::size_t i = 0; i < exact_chains; ++i) {
                sums[i] = fma(x[first + j], codeword[i][j], sums[i]);
            }
        }
    }
    for (std::size_t i = 0; i < exact_chains; ++i) {
        scores[i] = sums[i];
    }
}

inline constexpr std::size_t several_rows = 12;    // rows whose maxima fill half of L1
inline constexpr std::size_t several_groups = 32;  // groups at a time: 2,048 codewords

/// Scores of `Rows` rows against `Registers` registers of codewords of one group, into that group's maxima.
template <int Rows, int Registers>
__attribute__((noinline)) inline void maxima_tile(const float* x, std::size_t stride, const float* codewords,
                                                  const float* offsets, std::size_t dim, float* maxima) {
    constexpr int per_block = static_cast<int>(search_block) / lanes;
    reg sums[Rows][Registers];
    RVQKV_UNROLL
    for (int w = 0; w < Registers; ++w) {
        const reg offset = load(offsets + w * lanes);
        RVQKV_UNROLL
        for (int v = 0; v < Rows; ++v) {
            sums[v][w] = offset;
        }
    }
    const std::size_t block_size = dim * search_block;
    const float* channel = codewords;
    for (std::size_t j = 0; j < dim; ++j, channel += search_block) {
        reg c[Registers];
        RVQKV_UNROLL
        for (int w = 0; w < Registers; ++w) {
            c[w] = keep(load(channel + static_cast<std::size_t>(w / per_block) * block_size + (w % per_block) * lanes));
        }
        RVQKV_UNROLL
        for (int v = 0; v < Rows; ++v) {
            const reg value = broadcast(x + static_cast<std::size_t>(v) * stride + j);
            RVQKV_UNROLL
            for (int w = 0; w < Registers; ++w) {
                sums[v][w] = fma(value, c[w], sums[v][w]);
            }
        }
    }
    RVQKV_UNROLL
    for (int v = 0; v < Rows; ++v) {
        RVQKV_UNROLL
        for (int w = 0; w < Registers; ++w) {
            float* const at = maxima + static_cast<std::size_t>(v) * several_groups * search_block +
                              static_cast<std::size_t>(w % per_block * lanes);
            const reg held = load(at);
            store(at, select(greater(sums[v][w], held), sums[v][w], held));  // a NaN is not greater
        }
    }
}

/// The maxima of `groups` groups from the first block on for up to `several_rows` rows.
inline void find_maxima(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book,
                        std::size_t first_block, std::size_t groups, float* maxima) {
    constexpr int per_block = static_cast<int>(search_block) / lanes;
    constexpr std::size_t blocks_per_tile = static_cast<std::size_t>(tile_registers / per_block);
    for (std::size_t i = 0; i < several_rows * several_groups * search_block; ++i) {
        maxima[i] = -__builtin_inff();
    }
    const std::size_t last = first_block + groups * 4 < book.blocks() ? first_block + groups * 4 : book.blocks();
    for (std::size_t block = first_block; block < last;) {
        const float* const codewords = book.interleaved + block * book.dim * search_block;
        const float* const offsets = book.offsets + block * search_block;
        float* const to = maxima + (block - first_block) / 4 * search_block;
        const auto row_maxima = [&](std::size_t v) { return to + v * several_groups * search_block; };
        const bool whole = block + blocks_per_tile <= last;
        std::size_t v = 0;
        for (; whole && v + tile_rows <= rows; v += tile_rows) {
            maxima_tile<tile_rows, tile_registers>(x + v * stride, stride, codewords, offsets, book.dim, row_maxima(v));
        }
        for (; v < rows; ++v) {
            const float* const row = x + v * stride;
            if (whole) {
                maxima_tile<1, tile_registers>(row, stride, codewords, offsets, book.dim, row_maxima(v));
            } else {
                maxima_tile<1, per_block>(row, stride, codewords, offsets, book.dim, row_maxima(v));
            }
        }
        block += whole ? blocks_per_tile : 1;
    }
}

/// The `count`-th largest of the maxima of a row, or something below; never -infinity.
inline float reached_score(const float* maxima, std::size_t groups, std::size_t count) {
    float limit = -__FLT_MAX__;
    if (count > search_block) {
        return limit;
    }
    float lane_tops[search_block];
    for (std::size_t part = 0; part < search_block; part += lanes) {
        reg top = load(maxima + part);
        for (std::size_t g = 1; g < groups; ++g) {
            const reg next = load(maxima + g * search_block + part);
            top = select(greater(next, top), next, top);
        }
        store(lane_tops + part, top);
    }
    float tops[search_block];
    for (std::size_t lane = 0; lane < search_block; ++lane) {
        const float top = lane_tops[lane];
        std::size_t to = lane;
        for (; to > 0 && tops[to - 1] < top; --to) {
            tops[to] = tops[to - 1];
        }
        tops[to] = top;
    }
    return tops[count - 1] > limit ? tops[count - 1] : limit;
}

/// Takes the best of a row's quads into its sorted list. What cannot be foreseen is done without branches.
inline void take_several(const float* x, const packed_codebook& book, std::size_t first_group, std::size_t groups,
                         const float* maxima, std::size_t count, code_t* codes, float* scores) {
    const float limit = reached_score(maxima, groups, count);
    std::uint32_t reach[several_groups];         // bit for each lane whose maximum is not below the limit
    std::size_t reached_groups[several_groups];  // those with any
    std::size_t reached = 0;
    for (std::size_t g = 0; g < groups; ++g) {
        std::uint32_t below = 0;
        for (std::size_t part = 0; part < search_block; part += lanes) {
            below |= bits(greater(broadcast(&limit), load(maxima + g * search_block + part))) << part;
        }
        reach[g] = ~below & 0xffffU;
        reached_groups[reached] = g;
        reached += reach[g] != 0 ? 1 : 0;
    }
    for (std::size_t i = 0; i < reached; ++i) {
        const std::size_t group = first_group + reached_groups[i];
        for (std::uint32_t quads = reach[reached_groups[i]]; quads != 0; quads &= quads - 1) {
            const std::size_t lane = static_cast<std::size_t>(__builtin_ctz(quads));
            std::int32_t quad[exact_chains];
            for (std::size_t w = 0; w < exact_chains; ++w) {
                const std::size_t code = (group * 4 + w) * search_block + lane;
                quad[w] = static_cast<std::int32_t>(code < book.codewords ? code : book.codewords - 1);
            }
            float exact[exact_chains];
            exact_scores(x, book, quad, exact);
            std::size_t kept[exact_chains];
            std::size_t kept_count = 0;
            for (std::size_t w = 0; w < exact_chains; ++w) {
                const bool once = (group * 4 + w) * search_block + lane < book.codewords;
                kept[kept_count] = w;
                kept_count += once && exact[w] >= limit ? 1 : 0;
            }
            for (std::size_t k = 0; k < kept_count; ++k) {
                insert_sorted(exact[kept[k]], static_cast<code_t>(quad[kept[k]]), count, codes, scores);
            }
        }
    }
}

inline void nearest_several(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book,
                            std::size_t count, row_families, code_t* codes, float* scores) {
    alignas(64) float maxima[several_rows * several_groups * search_block];
    for (std::size_t i = 0; i < rows * count; ++i) {
        codes[i] = 0;
        scores[i] = -__builtin_inff();
    }
    const std::size_t all_groups = (book.blocks() + 3) / 4;
    for (std::size_t first = 0; first < rows; first += several_rows) {
        const std::size_t in_chunk = rows - first < several_rows ? rows - first : several_rows;
        for (std::size_t group = 0; group < all_groups; group += several_groups) {
            const std::size_t groups = all_groups - group < several_groups ? all_groups - group : several_groups;
            find_maxima(x + first * stride, in_chunk, stride, book, group * 4, groups, maxima);
            for (std::size_t v = 0; v < in_chunk; ++v) {
                const std::size_t at = first + v;
                take_several(x + at * stride, book, group, groups, maxima + v * several_groups * search_block, count,
                             codes + at * count, scores + at * count);
            }
        }
    }
}
