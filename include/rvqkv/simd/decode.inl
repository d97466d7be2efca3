// SPDX-License-Identifier: MIT
// Codes to vectors, part of kernels.inl. Beside what that file names:
//   reg8, reg4: registers of 8 and 4 floats where those are narrower than `reg`, else `reg` itself
//   interleaved: 2 * lanes floats, even and odd ones apart, as bfloat16 come apart most quickly; or `reg` itself
//   load_as<Reg>(pointer), and add and store for those types
//   has_lookup: whether there is `decode_small`, a quicker form for some shapes

/// `Registers` registers of `Rows` rows at a time: the sums stay in registers over all depths.
template <class Reg, int Registers, int Rows, class Weight, class Dim, class Step>
RVQKV_ALWAYS_INLINE void decode_tile(float* x, std::size_t stride, const Weight* weights, std::size_t depth_size,
                                     Dim dim, const code_t* codes, Step row_step, std::size_t depth_step,
                                     std::size_t depths) {
    constexpr std::size_t width = sizeof(Reg) / sizeof(float);
    Reg sums[Rows][Registers];
    RVQKV_UNROLL
    for (int v = 0; v < Rows; ++v) {
        const Weight* const codeword = weights + codes[static_cast<std::size_t>(v) * row_step] * dim;
        RVQKV_UNROLL
        for (int w = 0; w < Registers; ++w) {
            sums[v][w] = load_as<Reg>(codeword + static_cast<std::size_t>(w) * width);
        }
    }
    for (std::size_t k = 1; k < depths; ++k) {
        weights += depth_size;
        codes += depth_step;
        RVQKV_UNROLL
        for (int v = 0; v < Rows; ++v) {
            const Weight* const codeword = weights + codes[static_cast<std::size_t>(v) * row_step] * dim;
            RVQKV_UNROLL
            for (int w = 0; w < Registers; ++w) {
                sums[v][w] = add(sums[v][w], load_as<Reg>(codeword + static_cast<std::size_t>(w) * width));
            }
        }
    }
    RVQKV_UNROLL
    for (int v = 0; v < Rows; ++v, x += stride) {
        RVQKV_UNROLL
        for (int w = 0; w < Registers; ++w) {
            store(x + static_cast<std::size_t>(w) * width, sums[v][w]);
        }
    }
}

/// All rows of a strip that is `Registers` registers wide.
template <class Reg, int Registers, class Weight, class Dim, class Step>
inline void decode_tiles(float* x, std::size_t rows, std::size_t stride, const Weight* weights, std::size_t depth_size,
                         Dim dim, const code_t* codes, Step row_step, std::size_t depth_step, std::size_t depths) {
    constexpr std::size_t at_once = Registers * sizeof(Reg) > sizeof(reg) ? 2 : 8;
    std::size_t i = 0;
    for (; i + at_once <= rows; i += at_once) {
        decode_tile<Reg, Registers, at_once>(x + i * stride, stride, weights, depth_size, dim, codes + i * row_step,
                                             row_step, depth_step, depths);
    }
    for (; i < rows; ++i) {
        decode_tile<Reg, Registers, 1>(x + i * stride, stride, weights, depth_size, dim, codes + i * row_step, row_step,
                                       depth_step, depths);
    }
}

/// The same, with compile-time extents where they are known: rows of one strip, codes side by side.
template <class Reg, int Registers, class Weight>
inline void decode_strip(float* x, std::size_t rows, std::size_t stride, const Weight* weights, std::size_t depth_size,
                         std::size_t dim, const code_t* codes, code_strides strides, std::size_t depths) {
    constexpr std::size_t width = Registers * sizeof(Reg) / sizeof(float);
    using whole = std::integral_constant<std::size_t, width>;
    using one = std::integral_constant<std::size_t, 1>;
    if (dim == width && strides.vector == 1) {
        decode_tiles<Reg, Registers>(x, rows, stride, weights, depth_size, whole(), codes, one(), strides.depth,
                                     depths);
    } else if (dim == width) {
        decode_tiles<Reg, Registers>(x, rows, stride, weights, depth_size, whole(), codes, strides.vector,
                                     strides.depth, depths);
    } else {
        decode_tiles<Reg, Registers>(x, rows, stride, weights, depth_size, dim, codes, strides.vector, strides.depth,
                                     depths);
    }
}

template <class Weight>
inline void decode(float* x, std::size_t rows, std::size_t stride, const Weight* weights, std::size_t codewords,
                   std::size_t dim, const code_t* codes, code_strides strides, std::size_t depths) {
    const auto strip = [&](auto reg_type, auto registers, std::size_t& j) {
        using Reg = decltype(reg_type);
        constexpr std::size_t width = registers * sizeof(Reg) / sizeof(float);
        for (; j + width <= dim; j += width) {
            decode_strip<Reg, registers>(x + j, rows, stride, weights + j, codewords * dim, dim, codes, strides,
                                         depths);
        }
    };
    if (depths == 0) {
        for (std::size_t i = 0; i < rows; ++i) {
            for (std::size_t j = 0; j < dim; ++j) {
                x[i * stride + j] = 0.0F;
            }
        }
        return;
    }
    if constexpr (has_lookup) {
        const std::size_t done = decode_small(x, rows, stride, weights, codewords, dim, codes, strides, depths);
        x += done * stride;
        codes += done * strides.vector;
        rows -= done;
    }
    std::size_t j = 0;
    if constexpr (std::is_same_v<Weight, bfloat16> && sizeof(interleaved) > sizeof(reg)) {
        strip(interleaved(), std::integral_constant<int, 2>(), j);
        strip(interleaved(), std::integral_constant<int, 1>(), j);
    } else {
        strip(reg(), std::integral_constant<int, 4>(), j);
        strip(reg(), std::integral_constant<int, 2>(), j);
    }
    strip(reg(), std::integral_constant<int, 1>(), j);
    if constexpr (sizeof(reg8) < sizeof(reg)) {
        strip(reg8(), std::integral_constant<int, 1>(), j);
    }
    if constexpr (sizeof(reg4) < sizeof(reg)) {
        strip(reg4(), std::integral_constant<int, 1>(), j);
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
