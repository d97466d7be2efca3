// SPDX-License-Identifier: MIT
// The search for the nearest codeword, part of kernels.inl. Both forms keep a tile of sums in registers and add one
// channel to all of them at a time:
//   rows in lanes: registers of rows (turned on their side first) x single codewords. The best of each row stays in its
//   lane, so there is nothing to reduce. Every shape runs at the machine's limit, given a register full of rows.
//   codewords in lanes: single rows x registers of codewords. For the rows that are left over, and for rows so long
//   that a register full of them does not fit in L1.

/// Calls `run` with `side`, from 1 to `Side`, as a compile-time number.
template <int Side, class Run>
RVQKV_ALWAYS_INLINE void with_side(std::size_t side, Run run) {
    if constexpr (Side > 1) {
        if (side < static_cast<std::size_t>(Side)) {
            return with_side<Side - 1>(side, run);
        }
    }
    run(std::integral_constant<int, Side>());
}

/// What stands beside `side` registers of rows (or single rows) in a tile: so many single codewords (or registers of
/// them), a power of two.
constexpr int tile_width(int side) {
    int width = 1;
    while (width < static_cast<int>(search_block) && 2 * width * side <= tile_sums) {
        width *= 2;
    }
    return width;
}

/// `Registers` registers of rows, `[channel, row]`, against all codewords.
template <int Registers>
inline void nearest_of_lanes(const float* packed, const packed_codebook& book, code_t* codes, float* scores) {
    constexpr int codewords = tile_width(Registers);
    const float none = -__builtin_inff();
    reg best[Registers];
    ireg best_code[Registers];
    RVQKV_UNROLL
    for (int v = 0; v < Registers; ++v) {
        best[v] = broadcast(&none);
        best_code[v] = broadcast(0);
    }
    ireg code = broadcast(0);
    const ireg one = broadcast(1);
    const float* offset = book.offsets;
    const std::size_t blocks = book.blocks();
    for (std::size_t block = 0; block < blocks; ++block) {
        const float* const weights = book.interleaved + block * book.dim * search_block;
        for (int lane = 0; lane < static_cast<int>(search_block); lane += codewords, offset += codewords) {
            reg sums[Registers][codewords];
            RVQKV_UNROLL
            for (int w = 0; w < codewords; ++w) {
                const reg start = broadcast(offset + w);
                RVQKV_UNROLL
                for (int v = 0; v < Registers; ++v) {
                    sums[v][w] = start;
                }
            }
            const float* x = packed;
            const float* weight = weights + lane;
            for (std::size_t j = 0; j < book.dim; ++j, x += Registers * lanes, weight += search_block) {
                reg values[Registers];
                RVQKV_UNROLL
                for (int v = 0; v < Registers; ++v) {
                    values[v] = load(x + v * lanes);
                }
                RVQKV_UNROLL
                for (int w = 0; w < codewords; ++w) {
                    const reg factor = broadcast(weight + w);
                    RVQKV_UNROLL
                    for (int v = 0; v < Registers; ++v) {
                        sums[v][w] = fma(values[v], factor, sums[v][w]);
                    }
                }
            }
            RVQKV_UNROLL
            for (int w = 0; w < codewords; ++w) {
                RVQKV_UNROLL
                for (int v = 0; v < Registers; ++v) {
                    keep_greater(sums[v][w], code, best[v], best_code[v]);
                }
                code = add(code, one);
            }
        }
    }
    RVQKV_UNROLL
    for (int v = 0; v < Registers; ++v) {
        store(codes + v * lanes, best_code[v]);
        if (scores != nullptr) {
            store(scores + v * lanes, best[v]);
        }
    }
}

/// Turns a register full of rows on its side: channel `j` of row `i` goes to `packed[j * width + i]`.
inline void pack_rows(const float* x, std::size_t stride, std::size_t dim, float* packed, std::size_t width) {
    std::size_t j = 0;
    for (; j + 4 <= dim; j += 4) {
        transpose(x + j, stride, packed + j * width, width);
    }
    for (; j < dim; ++j) {
        for (std::size_t i = 0; i < static_cast<std::size_t>(lanes); ++i) {
            packed[j * width + i] = x[i * stride + j];
        }
    }
}

template <int Registers>
inline void nearest_packed(const float* x, std::size_t stride, const packed_codebook& book, float* packed,
                           code_t* codes, float* scores) {
    constexpr auto width = static_cast<std::size_t>(lanes);
    constexpr std::size_t rows = Registers * width;
    for (std::size_t v = 0; v < rows; v += width) {
        pack_rows(x + v * stride, stride, book.dim, packed + v, rows);
    }
    nearest_of_lanes<Registers>(packed, book, codes, scores);
}

/// `Rows` rows against `Registers` registers of codewords: keeps each lane's best. The running best of a row is 16
/// lanes wide in memory (L1) at every level, so that registers serve the products alone. Not inlined for the same
/// reason: what surrounds it makes GCC 12 spill two of the registers that every product needs, a third of the speed.
template <int Rows, int Registers>
__attribute__((noinline)) inline void nearest_tile(const float* x, std::size_t stride, const float* codewords,
                                                   const float* offsets, std::size_t dim, std::int32_t block,
                                                   float* best, std::int32_t* best_block) {
    constexpr int per_block = static_cast<int>(search_block) / lanes;  // registers that one block of codewords takes
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
        reg values[Rows];
        RVQKV_UNROLL
        for (int v = 0; v < Rows; ++v) {
            values[v] = broadcast(x + static_cast<std::size_t>(v) * stride + j);
        }
        RVQKV_UNROLL
        for (int w = 0; w < Registers; ++w) {
            const float* at = channel + static_cast<std::size_t>(w / per_block) * block_size + (w % per_block) * lanes;
            const reg factor = keep(load(at));
            RVQKV_UNROLL
            for (int v = 0; v < Rows; ++v) {
                sums[v][w] = fma(values[v], factor, sums[v][w]);
            }
        }
    }
    RVQKV_UNROLL
    for (int v = 0; v < Rows; ++v) {
        RVQKV_UNROLL
        for (int part = 0; part < per_block; ++part) {
            const std::size_t lane =
                static_cast<std::size_t>(v) * search_block + static_cast<std::size_t>(part * lanes);
            reg held = load(best + lane);
            ireg held_block = load(best_block + lane);
            RVQKV_UNROLL
            for (int w = part; w < Registers; w += per_block) {
                keep_greater(sums[v][w], broadcast(block + w / per_block), held, held_block);
            }
            store(best + lane, held);
            store(best_block + lane, held_block);
        }
    }
}

/// All rows of a chunk against `Registers` registers of codewords: `Side` rows at a time, but so that no single row is
/// left over.
template <int Side, int Registers>
inline void nearest_column(const float* x, std::size_t rows, std::size_t stride, const float* codewords,
                           const float* offsets, std::size_t dim, std::int32_t block, float* best,
                           std::int32_t* best_block) {
    constexpr auto side = static_cast<std::size_t>(Side);
    while (rows > 0) {
        const std::size_t count = rows <= side ? rows : rows == side + 1 && side > 2 ? side - 1 : side;
        with_side<Side>(count, [&](auto known) {
            nearest_tile<known.value, Registers>(x, stride, codewords, offsets, dim, block, best, best_block);
        });
        rows -= count;
        x += count * stride;
        best += count * search_block;
        best_block += count * search_block;
    }
}

/// Any number of rows, in tiles of up to `Side`.
template <int Side>
inline void nearest_of_rows(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book,
                            code_t* codes, float* scores) {
    constexpr int per_block = static_cast<int>(search_block) / lanes;
    constexpr int most = tile_width(Side) < 8 ? tile_width(Side) : 8;
    constexpr int registers = most < per_block ? per_block : most;
    constexpr std::size_t blocks_per_tile = static_cast<std::size_t>(registers / per_block);
    constexpr std::size_t chunk = 48;  // rows whose running best stays in L1
    alignas(64) float best[chunk * search_block];
    alignas(64) std::int32_t best_block[chunk * search_block];
    const std::size_t blocks = book.blocks();
    for (std::size_t first = 0; first < rows; first += chunk) {
        const std::size_t count = rows - first < chunk ? rows - first : chunk;
        for (std::size_t i = 0; i < count * search_block; ++i) {
            best[i] = -__builtin_inff();
            best_block[i] = 0;
        }
        const float* const chunk_x = x + first * stride;
        std::size_t block = 0;
        for (; block + blocks_per_tile <= blocks; block += blocks_per_tile) {
            nearest_column<Side, registers>(chunk_x, count, stride, book.interleaved + block * book.dim * search_block,
                                            book.offsets + block * search_block, book.dim,
                                            static_cast<std::int32_t>(block), best, best_block);
        }
        for (; blocks_per_tile > 1 && block < blocks; ++block) {
            nearest_column<Side, per_block>(chunk_x, count, stride, book.interleaved + block * book.dim * search_block,
                                            book.offsets + block * search_block, book.dim,
                                            static_cast<std::int32_t>(block), best, best_block);
        }
        // Within a lane the first block won; among lanes of equal score the lowest index wins.
        for (std::size_t v = 0; v < count; ++v) {
            const float* const lane_best = best + v * search_block;
            const std::int32_t* const lane_block = best_block + v * search_block;
            float top = lane_best[0];
            std::int32_t index = lane_block[0] * static_cast<std::int32_t>(search_block);
            for (std::int32_t lane = 1; lane < static_cast<std::int32_t>(search_block); ++lane) {
                const std::int32_t candidate = lane_block[lane] * static_cast<std::int32_t>(search_block) + lane;
                const bool better = lane_best[lane] > top || (lane_best[lane] == top && candidate < index);
                top = better ? lane_best[lane] : top;
                index = better ? candidate : index;
            }
            codes[first + v] = static_cast<code_t>(index);
            if (scores != nullptr) {
                scores[first + v] = top;
            }
        }
    }
}

inline void nearest(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book, code_t* codes,
                    float* scores) {
    constexpr std::size_t packed_size = 4096;  // 16 KiB, half of a small L1
    constexpr auto width = static_cast<std::size_t>(lanes);
    alignas(64) float packed[packed_size];
    const std::size_t fit = packed_size / (width * book.dim);
    const std::size_t side = fit < tile_side ? fit : tile_side;
    const auto take = [&](std::size_t registers) {
        with_side<tile_side>(registers,
                             [&](auto known) { nearest_packed<known.value>(x, stride, book, packed, codes, scores); });
    };
    const auto advance = [&](std::size_t taken) {
        x += taken * stride;
        codes += taken;
        scores = scores == nullptr ? nullptr : scores + taken;
        rows -= taken;
    };
    bool filled = false;
    while (side > 0 && rows >= width) {
        const std::size_t registers = rows / width < side ? rows / width : side;
        take(registers);
        advance(registers * width);
        filled = true;
    }
    // The last few rows: with a small codebook it is quickest to do some of their predecessors again.
    constexpr std::size_t products_per_row = 192;  // fitted
    if (filled && rows > 0 && book.codewords * book.dim <= products_per_row * rows) {
        const std::size_t again = width - rows;
        x -= again * stride;
        codes -= again;
        scores = scores == nullptr ? nullptr : scores - again;
        take(1);
    } else if (rows == 1) {
        nearest_of_rows<1>(x, rows, stride, book, codes, scores);
    } else if (rows > 0) {
        nearest_of_rows<tile_side>(x, rows, stride, book, codes, scores);
    }
}
