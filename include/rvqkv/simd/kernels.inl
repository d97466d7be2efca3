// SPDX-License-Identifier: MIT
// The inner loops, written once and compiled for every instruction set: included inside that set's namespace and target
// region, after its `reg` type and the loads, stores and conversions below have been defined there:
//   reg: `lanes` floats;   ireg: `lanes` 32-bit integers
//   load(float*) load(float16*) load(bfloat16*)  store(float*, reg)  store(float16*, reg)  store(bfloat16*, reg)
//   broadcast, fma(a, b, c) = a * b + c rounded once, add, subtract, keep_greater
//   tile_rows, tile_registers: how many vectors and how many registers of codewords one tile holds
// No include guard: that is the point.

/// Scores `Rows` vectors against `Registers` registers of codewords and keeps each lane's best. The running best of a
/// vector is 16 lanes wide in memory (L1) at every level, so that registers serve the products alone.
template <int Rows, int Registers>
inline void nearest_tile(const float* x, std::size_t stride, const float* codewords, const float* offsets,
                         std::size_t dim, std::int32_t block, float* best, std::int32_t* best_block) {
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
        reg c[Registers];
        RVQKV_UNROLL
        for (int w = 0; w < Registers; ++w) {
            c[w] = load(channel + static_cast<std::size_t>(w / per_block) * block_size + (w % per_block) * lanes);
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
            const std::size_t lane =
                static_cast<std::size_t>(v) * search_block + static_cast<std::size_t>((w % per_block) * lanes);
            keep_greater(sums[v][w], block + w / per_block, best + lane, best_block + lane);
        }
    }
}

/// All rows of a chunk against `Registers` registers of codewords. A function of its own, so that what surrounds it
/// takes no registers from the tile (inlined, GCC 12 spills two of the four codeword registers: a fifth of the speed).
template <int Registers>
__attribute__((noinline)) inline void nearest_column(const float* x, std::size_t rows, std::size_t stride,
                                                     const float* codewords, const float* offsets, std::size_t dim,
                                                     std::int32_t block, float* best, std::int32_t* best_block) {
    std::size_t v = 0;
    const auto at = [&](std::size_t row) { return row * search_block; };
    for (; v + tile_rows <= rows; v += tile_rows) {
        nearest_tile<tile_rows, Registers>(x + v * stride, stride, codewords, offsets, dim, block, best + at(v),
                                           best_block + at(v));
    }
    for (; tile_rows > 2 && v + 2 <= rows; v += 2) {
        nearest_tile<2, Registers>(x + v * stride, stride, codewords, offsets, dim, block, best + at(v),
                                   best_block + at(v));
    }
    for (; v < rows; ++v) {
        nearest_tile<1, Registers>(x + v * stride, stride, codewords, offsets, dim, block, best + at(v),
                                   best_block + at(v));
    }
}

inline void nearest(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book, code_t* codes,
                    float* scores) {
    constexpr std::size_t chunk = 60;  // rows whose running best stays in L1; whole tiles of 4 and of 6
    constexpr std::size_t blocks_per_tile = static_cast<std::size_t>(tile_registers * lanes) / search_block;
    alignas(64) float best[chunk * search_block];
    alignas(64) std::int32_t best_block[chunk * search_block];
    for (std::size_t first = 0; first < rows; first += chunk) {
        const std::size_t count = rows - first < chunk ? rows - first : chunk;
        for (std::size_t i = 0; i < count * search_block; ++i) {
            best[i] = -__builtin_inff();
            best_block[i] = 0;
        }
        const float* const chunk_x = x + first * stride;
        const std::size_t blocks = book.blocks();
        std::size_t block = 0;
        for (; block + blocks_per_tile <= blocks; block += blocks_per_tile) {
            nearest_column<tile_registers>(chunk_x, count, stride, book.interleaved + block * book.dim * search_block,
                                           book.offsets + block * search_block, book.dim,
                                           static_cast<std::int32_t>(block), best, best_block);
        }
        for (; block < blocks; ++block) {
            nearest_column<static_cast<int>(search_block) / lanes>(
                chunk_x, count, stride, book.interleaved + block * book.dim * search_block,
                book.offsets + block * search_block, book.dim, static_cast<std::int32_t>(block), best, best_block);
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

template <class Weight>
inline void subtract_codewords(float* x, std::size_t rows, std::size_t stride, const Weight* codewords, std::size_t dim,
                               const code_t* codes) {
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

/// `Registers` registers of each row at a time stay in registers over all depths.
template <int Registers, class Weight>
inline void decode_strip(float* x, std::size_t rows, std::size_t stride, const Weight* weights, std::size_t codewords,
                         std::size_t dim, const code_t* codes, code_strides strides, std::size_t depths) {
    for (std::size_t i = 0; i < rows; ++i) {
        reg sums[Registers];
        const Weight* book = weights;
        const code_t* code = codes + i * strides.vector;
        RVQKV_UNROLL
        for (int w = 0; w < Registers; ++w) {
            sums[w] = load(book + *code * dim + w * lanes);
        }
        for (std::size_t k = 1; k < depths; ++k) {
            book += codewords * dim;
            code += strides.depth;
            RVQKV_UNROLL
            for (int w = 0; w < Registers; ++w) {
                sums[w] = add(sums[w], load(book + *code * dim + w * lanes));
            }
        }
        RVQKV_UNROLL
        for (int w = 0; w < Registers; ++w) {
            store(x + i * stride + w * lanes, sums[w]);
        }
    }
}

template <class Weight>
inline void decode(float* x, std::size_t rows, std::size_t stride, const Weight* weights, std::size_t codewords,
                   std::size_t dim, const code_t* codes, code_strides strides, std::size_t depths) {
    if (depths == 0) {
        for (std::size_t i = 0; i < rows; ++i) {
            for (std::size_t j = 0; j < dim; ++j) {
                x[i * stride + j] = 0.0F;
            }
        }
        return;
    }
    std::size_t j = 0;
    for (; j + 4 * lanes <= dim; j += 4 * lanes) {
        decode_strip<4>(x + j, rows, stride, weights + j, codewords, dim, codes, strides, depths);
    }
    for (; j + 2 * lanes <= dim; j += 2 * lanes) {
        decode_strip<2>(x + j, rows, stride, weights + j, codewords, dim, codes, strides, depths);
    }
    for (; j + lanes <= dim; j += lanes) {
        decode_strip<1>(x + j, rows, stride, weights + j, codewords, dim, codes, strides, depths);
    }
    for (std::size_t i = 0; j < dim && i < rows; ++i) {
        for (std::size_t tail = j; tail < dim; ++tail) {
            float sum = to_float(weights[codes[i * strides.vector] * dim + tail]);
            for (std::size_t k = 1; k < depths; ++k) {
                const std::size_t code = codes[i * strides.vector + k * strides.depth];
                sum += to_float(weights[(k * codewords + code) * dim + tail]);
            }
            x[i * stride + tail] = sum;
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

inline constexpr kernel_table kernels = {
    level,
    nearest,
    {subtract_codewords<float>, decode<float>},
    {subtract_codewords<float16>, decode<float16>},
    {subtract_codewords<bfloat16>, decode<bfloat16>},
    convert<float16, float>,
    convert<float, float16>,
    convert<bfloat16, float>,
    convert<float, bfloat16>,
};
