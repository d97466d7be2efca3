// SPDX-License-Identifier: MIT
// The inner loops of attention, part of kernels.inl. Beside what that file names:
//   split(pointer, even, odd): 2 * lanes floats, even and odd ones apart; join: the way back
//   multiply, divide, max (its second number if one is NaN), at_least, sum, largest
//   power_of_two: of whole numbers from -126 to 0
//   store_sums(pointer, four): the sums of four registers
//   query_side, value_queries, value_side: queries of a tile of scores, and of sums; registers of a strip of sums
//   unpack_tile
//   halves, low_half, high_half

/// Both numbers of `lanes` pairs. The sine is negated, not the product: exact either way, and one step less.
inline void turn_pair(reg& a, reg& b, reg cosine, reg sine) {
    const reg negative = subtract(subtract(sine, sine), sine);
    const reg turned = fma(a, cosine, multiply(b, negative));
    b = fma(a, sine, multiply(b, cosine));
    a = turned;
}
inline void turn_pair(float& a, float& b, float cosine, float sine) {
    const float product = b * -sine;
    const float turned = fma(a, cosine, product);
    const float other = b * cosine;
    b = fma(a, sine, other);
    a = turned;
}

inline void turn(float* x, std::size_t rows, std::size_t stride, const channel_pairs* pairs, std::size_t runs,
                 const float* cosines, const float* sines, std::size_t angle_stride) {
    constexpr std::size_t width = lanes;
    for (std::size_t row = 0; row < rows; ++row, x += stride, cosines += angle_stride, sines += angle_stride) {
        for (std::size_t run = 0; run < runs; ++run) {
            const channel_pairs& places = pairs[run];
            float* const first = x + places.first;
            float* const second = x + places.second;
            const float* const cosine = cosines + places.angle;
            const float* const sine = sines + places.angle;
            std::size_t i = 0;
            if (places.step == 1) {
                for (; i + width <= places.count; i += width) {
                    reg a = load(first + i);
                    reg b = load(second + i);
                    turn_pair(a, b, load(cosine + i), load(sine + i));
                    store(first + i, a);
                    store(second + i, b);
                }
            } else if (places.step == 2 && places.second == places.first + 1) {
                for (; i + width <= places.count; i += width) {
                    reg a;
                    reg b;
                    split(first + 2 * i, a, b);
                    turn_pair(a, b, load(cosine + i), load(sine + i));
                    join(first + 2 * i, a, b);
                }
            }
            for (; i < places.count; ++i) {
                turn_pair(first[i * places.step], second[i * places.step], cosine[i], sine[i]);
            }
        }
    }
}

// ---- Softmax ----

/// For numbers up to 0: exp(x) = 2^n * exp(r) with |r| <= ln 2 / 2, where seven terms of the series err by 2^-27.
inline reg exponential(reg x) {
    const reg lowest = constant(-87.33654F);  // the smallest normal number's logarithm
    const reg rounder = constant(0x1.8p23F);  // a float this large has no fraction
    const reg inside = max(x, lowest);
    const reg n = subtract(fma(inside, constant(0x1.715476p0F), rounder), rounder);
    reg r = fma(n, constant(-0x1.62e4p-1F), inside);  // ln 2 in two parts, the first so short that n times it is exact
    r = fma(n, constant(-0x1.7f7d1cp-20F), r);
    reg series = constant(1.0F / 5040.0F);
    RVQKV_UNROLL
    for (const float term : {1.0F / 720.0F, 1.0F / 120.0F, 1.0F / 24.0F, 1.0F / 6.0F, 0.5F, 1.0F, 1.0F}) {
        series = fma(series, r, constant(term));
    }
    const reg below = max(constant(0.0F), x);  // 0, or NaN
    return select(at_least(x, lowest), multiply(series, power_of_two(n)), below);
}

/// Runs `body(register, first, count)` over all numbers; what a register has beyond the last is `filler`.
template <class Body>
RVQKV_ALWAYS_INLINE void for_each_register(const float* x, std::size_t count, float filler, Body&& body) {
    constexpr std::size_t width = lanes;
    std::size_t i = 0;
    for (; i + width <= count; i += width) {
        body(load(x + i), i, width);
    }
    if (i < count) {
        float rest[width];
        for (std::size_t lane = 0; lane < width; ++lane) {
            rest[lane] = i + lane < count ? x[i + lane] : filler;
        }
        body(load(rest), i, count - i);
    }
}
inline void store_first(float* to, reg value, std::size_t count) {
    if (count == static_cast<std::size_t>(lanes)) {
        store(to, value);
        return;
    }
    float numbers[lanes];
    store(numbers, value);
    for (std::size_t lane = 0; lane < count; ++lane) {
        to[lane] = numbers[lane];
    }
}

inline float largest_number(const float* x, std::size_t count) {
    const float none = -__builtin_inff();
    reg top = constant(none);
    for_each_register(x, count, none, [&](reg value, std::size_t, std::size_t) { top = max(value, top); });
    return largest(top);
}

inline float exponentials(float* x, std::size_t count, float shift) {
    const reg shifts = constant(shift);
    reg sums = constant(0.0F);
    for_each_register(x, count, -__builtin_inff(), [&](reg value, std::size_t first, std::size_t part) {
        const reg result = exponential(subtract(value, shifts));
        sums = add(sums, result);
        store_first(x + first, result, part);
    });
    return sum(sums);
}

/// tanh(y) = (1 - e) / (1 + e) with e = exp(-2 |y|).
inline void soft_cap(float* x, std::size_t count, float cap) {
    const reg zero = constant(0.0F);
    const reg one = constant(1.0F);
    for_each_register(x, count, 0.0F, [&](reg value, std::size_t first, std::size_t part) {
        const reg magnitudes = max(value, subtract(zero, value));
        const reg e = exponential(multiply(divide(magnitudes, constant(cap)), constant(-2.0F)));
        const reg capped = multiply(divide(subtract(one, e), add(one, e)), constant(cap));
        store_first(x + first, select(at_least(value, zero), capped, subtract(zero, capped)), part);
    });
}

inline void multiply_numbers(float* x, const float* by, std::size_t count) {
    constexpr std::size_t width = lanes;
    std::size_t i = 0;
    for (; i + width <= count; i += width) {
        const reg value = load(x + i);
        const reg zero = constant(0.0F);
        const reg magnitude = max(value, subtract(zero, value));
        store(x + i, select(at_least(zero, magnitude), zero, multiply(value, load(by + i))));
    }
    for (; i < count; ++i) {
        x[i] = x[i] <= 0.0F && x[i] >= 0.0F ? 0.0F : x[i] * by[i];
    }
}

// ---- Rows of keys and values ----

template <int Queries, int Rows, class T>
RVQKV_ALWAYS_INLINE void score_tile(const T* rows, std::size_t stride, const float* queries, std::size_t query_stride,
                                    std::size_t dim, float* out, std::size_t out_stride) {
    constexpr std::size_t width = lanes;
    reg sums[Queries][Rows];
    RVQKV_UNROLL
    for (int q = 0; q < Queries; ++q) {
        RVQKV_UNROLL
        for (int i = 0; i < Rows; ++i) {
            sums[q][i] = constant(0.0F);
        }
    }
    std::size_t j = 0;
    for (; j + width <= dim; j += width) {
        reg keys[Rows];
        RVQKV_UNROLL
        for (int i = 0; i < Rows; ++i) {
            keys[i] = keep(load(rows + static_cast<std::size_t>(i) * stride + j));
        }
        RVQKV_UNROLL
        for (int q = 0; q < Queries; ++q) {
            const reg query = keep(load(queries + static_cast<std::size_t>(q) * query_stride + j));
            RVQKV_UNROLL
            for (int i = 0; i < Rows; ++i) {
                sums[q][i] = fma(query, keys[i], sums[q][i]);
            }
        }
    }
    RVQKV_UNROLL
    for (int q = 0; q < Queries; ++q) {
        float* const to = out + static_cast<std::size_t>(q) * out_stride;
        if constexpr (Rows == 4) {
            store_sums(to, sums[q]);
        } else {
            RVQKV_UNROLL
            for (int i = 0; i < Rows; ++i) {
                to[i] = sum(sums[q][i]);
            }
        }
        for (std::size_t tail = j; tail < dim; ++tail) {
            const float query = queries[static_cast<std::size_t>(q) * query_stride + tail];
            for (std::size_t i = 0; i < Rows; ++i) {
                to[i] = fma(query, to_float(rows[i * stride + tail]), to[i]);
            }
        }
    }
}

template <int Rows, class T>
inline void score_rows(const T* rows, std::size_t stride, row_block<const float> queries, std::size_t dim, float* out,
                       std::size_t out_stride) {
    std::size_t q = 0;
    const auto tiles = [&](auto side) {
        for (; q + side <= queries.count; q += side) {
            score_tile<side, Rows>(rows, stride, queries.data + q * queries.stride, queries.stride, dim,
                                   out + q * out_stride, out_stride);
        }
    };
    tiles(std::integral_constant<int, query_side>());
    if constexpr (query_side > 2) {
        tiles(std::integral_constant<int, 2>());
    }
    tiles(std::integral_constant<int, 1>());
}

template <class T>
inline void scores(row_block<const T> rows, row_block<const float> queries, std::size_t dim, float* out,
                   std::size_t out_stride) {
    constexpr std::size_t ahead = 24;  // rows that are fetched from memory before they are due
    std::size_t i = 0;
    for (; i + 4 <= rows.count; i += 4) {
        const T* const first = rows.data + i * rows.stride;
        if constexpr (sizeof(T) == 2) {  // rows of floats are scratch, which caches hold
            for (std::size_t row = ahead; row < ahead + 4; ++row) {
                for (std::size_t j = 0; j < dim; j += 32) {
                    __builtin_prefetch(first + row * rows.stride + j);
                }
            }
        }
        score_rows<4>(first, rows.stride, queries, dim, out + i, out_stride);
    }
    for (; i < rows.count; ++i) {
        score_rows<1>(rows.data + i * rows.stride, rows.stride, queries, dim, out + i, out_stride);
    }
}

/// A strip of `Width` registers of the sums of some queries: in registers over all rows.
template <int Queries, int Width, class T>
RVQKV_ALWAYS_INLINE void add_tile(row_block<const T> rows, const float* weights, weight_strides strides, float* sums,
                                  std::size_t sums_stride) {
    constexpr std::size_t width = lanes;
    constexpr std::size_t ahead = 48;
    reg totals[Queries][Width];
    RVQKV_UNROLL
    for (int q = 0; q < Queries; ++q) {
        RVQKV_UNROLL
        for (int w = 0; w < Width; ++w) {
            totals[q][w] = load(sums + static_cast<std::size_t>(q) * sums_stride + static_cast<std::size_t>(w) * width);
        }
    }
    const T* row = rows.data;
    for (std::size_t i = 0; i < rows.count; ++i, row += rows.stride) {
        reg values[Width];
        if constexpr (sizeof(T) == 2) {
            for (std::size_t j = 0; j < Width * width; j += 32) {
                __builtin_prefetch(row + ahead * rows.stride + j);
            }
        }
        RVQKV_UNROLL
        for (int w = 0; w < Width; ++w) {
            values[w] = keep(load(row + static_cast<std::size_t>(w) * width));
        }
        RVQKV_UNROLL
        for (int q = 0; q < Queries; ++q) {
            const reg weight =
                keep(broadcast(weights + static_cast<std::size_t>(q) * strides.row + i * strides.column));
            RVQKV_UNROLL
            for (int w = 0; w < Width; ++w) {
                totals[q][w] = fma(weight, values[w], totals[q][w]);
            }
        }
    }
    RVQKV_UNROLL
    for (int q = 0; q < Queries; ++q) {
        RVQKV_UNROLL
        for (int w = 0; w < Width; ++w) {
            store(sums + static_cast<std::size_t>(q) * sums_stride + static_cast<std::size_t>(w) * width, totals[q][w]);
        }
    }
}

template <class T>
inline void add_rows(row_block<const T> rows, const float* weights, weight_strides strides, std::size_t dim,
                     row_block<float> sums) {
    constexpr std::size_t at_once = 64;  // rows that stay in the nearest cache while strip after strip is read
    for (std::size_t first = 0; first < rows.count; first += at_once) {
        const std::size_t count = rows.count - first < at_once ? rows.count - first : at_once;
        const float* const some_weights = weights + first * strides.column;
        std::size_t j = 0;
        const auto strips = [&](auto strip) {
            constexpr std::size_t width = strip * static_cast<std::size_t>(lanes);
            for (; j + width <= dim; j += width) {
                const row_block<const T> part = {rows.data + first * rows.stride + j, count, rows.stride};
                std::size_t q = 0;
                const auto tiles = [&](auto side) {
                    for (; q + side <= sums.count; q += side) {
                        add_tile<side, strip>(part, some_weights + q * strides.row, strides,
                                              sums.data + q * sums.stride + j, sums.stride);
                    }
                };
                tiles(std::integral_constant<int, value_queries>());
                tiles(std::integral_constant<int, 1>());
            }
        };
        strips(std::integral_constant<int, value_side>());
        if constexpr (value_side > 2) {
            strips(std::integral_constant<int, 2>());
        }
        strips(std::integral_constant<int, 1>());
        for (; j < dim; ++j) {
            for (std::size_t q = 0; q < sums.count; ++q) {
                float total = sums.data[q * sums.stride + j];
                for (std::size_t i = 0; i < count; ++i) {
                    const float value = to_float(rows.data[(first + i) * rows.stride + j]);
                    total = fma(some_weights[q * strides.row + i * strides.column], value, total);
                }
                sums.data[q * sums.stride + j] = total;
            }
        }
    }
}

#include "rvqkv/simd/mean_bias.inl"

inline constexpr attention_kernels attention = {
    turn,
    largest_number,
    exponentials,
    soft_cap,
    multiply_numbers,
    unpack_tile,
    range,
    pack_entries,
    unpack_sums,
    add_entries,
    add_weights,
    add_bias,
    {scores<float>, add_rows<float>, products<float>},
    {scores<float16>, add_rows<float16>, products<float16>},
    {scores<bfloat16>, add_rows<bfloat16>, products<bfloat16>},
};
