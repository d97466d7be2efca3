// SPDX-License-Identifier: MIT
// Sums of pairs that turn with the position (see `turning_pairs`), part of attention.inl. Beside what that file names:
//   reverse(reg): its lanes in the opposite order

/// Both numbers of a pair, turned back by the angles to the middles of `lanes` tiles.
struct turned_pair {
    reg even;
    reg odd;
};
RVQKV_ALWAYS_INLINE turned_pair turn_to_middles(const turning_pairs& table, const float* pairs, std::size_t pair,
                                                std::size_t first_tile) {
    const float* const middles = table.middles + pair * 2 * turning_pairs::span + first_tile;
    const reg cosines = load(middles);
    const reg sines = load(middles + turning_pairs::span);
    const reg a = broadcast(pairs + pair);
    const reg b = broadcast(pairs + table.pairs() + pair);
    return {fma(a, cosines, multiply(b, sines)), subtract(multiply(b, cosines), multiply(a, sines))};
}

/// What the first `Terms` even (or odd) polynomials are multiplied by gains what some slow pairs add.
template <int Queries, int Terms, bool IsOdd>
RVQKV_ALWAYS_INLINE void add_series(const turning_pairs& table, row_block<const float> pairs, std::size_t first,
                                    std::size_t end, std::size_t tile, float* factors) {
    constexpr std::size_t side = Queries;
    constexpr std::size_t terms = Terms;
    constexpr std::size_t next = 2 * side * turning_pairs::span;
    float* const to = factors + (IsOdd ? side * turning_pairs::span : 0);
    reg sums[side][terms];
    RVQKV_UNROLL
    for (std::size_t q = 0; q < side; ++q) {
        RVQKV_UNROLL
        for (std::size_t k = 0; k < terms; ++k) {
            sums[q][k] = load(to + k * next + q * turning_pairs::span);
        }
    }
    const float* series = table.series + (2 * (first - table.fast) + (IsOdd ? 1 : 0)) * turning_pairs::terms;
    for (std::size_t pair = first; pair < end; ++pair, series += 2 * turning_pairs::terms) {
        reg turned[side];
        RVQKV_UNROLL
        for (std::size_t q = 0; q < side; ++q) {
            const turned_pair both = turn_to_middles(table, pairs.data + q * pairs.stride, pair, tile);
            turned[q] = keep(IsOdd ? both.odd : both.even);
        }
        RVQKV_UNROLL
        for (std::size_t k = 0; k < terms; ++k) {
            const reg weight = keep(broadcast(series + k));
            RVQKV_UNROLL
            for (std::size_t q = 0; q < side; ++q) {
                sums[q][k] = fma(weight, turned[q], sums[q][k]);
            }
        }
    }
    RVQKV_UNROLL
    for (std::size_t q = 0; q < side; ++q) {
        RVQKV_UNROLL
        for (std::size_t k = 0; k < terms; ++k) {
            store(to + k * next + q * turning_pairs::span, sums[q][k]);
        }
    }
}

/// What the columns are multiplied by, for all tiles of a span: `[column, 2, query, tile]`.
template <int Queries>
inline void bias_factors(const turning_pairs& table, row_block<const float> pairs, std::size_t tiles, float* factors) {
    constexpr std::size_t span = turning_pairs::span;
    constexpr std::size_t side = Queries;
    for (std::size_t tile = 0; tile < tiles; tile += lanes) {
        float* to = factors + tile;
        for (std::size_t pair = 0; pair < table.fast; ++pair, to += 2 * side * span) {
            RVQKV_UNROLL
            for (std::size_t q = 0; q < side; ++q) {
                const turned_pair turned = turn_to_middles(table, pairs.data + q * pairs.stride, pair, tile);
                store(to + q * span, turned.even);
                store(to + (side + q) * span, turned.odd);
            }
        }
        if (table.slow == 0) {
            continue;
        }
        for (std::size_t i = 0; i < turning_pairs::terms * 2 * side; ++i) {
            store(to + i * span, constant(0.0F));
        }
        constexpr int many = turning_pairs::terms;
        constexpr int few = turning_pairs::few_terms;
        const std::size_t slowest = table.pairs() - table.slowest;
        add_series<Queries, many, false>(table, pairs, table.fast, slowest, tile, to);
        add_series<Queries, many, true>(table, pairs, table.fast, slowest, tile, to);
        add_series<Queries, few, false>(table, pairs, slowest, table.pairs(), tile, to);
        add_series<Queries, few, true>(table, pairs, slowest, table.pairs(), tile, to);
    }
}

/// One tile: the even and the odd part of the sum for half the tokens are its values for all.
template <int Queries>
inline void add_bias_tile(const turning_pairs& table, const float* factors, const float* constants, float* out,
                          std::size_t out_stride) {
    constexpr std::size_t side = Queries;
    constexpr std::size_t width = lanes;
    constexpr std::size_t half = tile_tokens / 2;
    constexpr std::size_t span = turning_pairs::span;
    const std::size_t columns = table.columns();
    for (std::size_t first = 0; first < half; first += 2 * width) {
        reg even[side][2];
        reg odd[side][2];
        RVQKV_UNROLL
        for (std::size_t q = 0; q < side; ++q) {
            even[q][0] = even[q][1] = broadcast(constants + q);
            odd[q][0] = odd[q][1] = constant(0.0F);
        }
        const float* column = columns == 0 ? nullptr : table.functions + first;
        const float* factor = factors;
        for (std::size_t i = 0; i < columns; ++i, column += 2 * half, factor += 2 * side * span) {
            const reg even0 = keep(load(column));
            const reg even1 = keep(load(column + width));
            const reg odd0 = keep(load(column + half));
            const reg odd1 = keep(load(column + half + width));
            RVQKV_UNROLL
            for (std::size_t q = 0; q < side; ++q) {
                const reg a = keep(broadcast(factor + q * span));
                const reg b = keep(broadcast(factor + (side + q) * span));
                even[q][0] = fma(a, even0, even[q][0]);
                even[q][1] = fma(a, even1, even[q][1]);
                odd[q][0] = fma(b, odd0, odd[q][0]);
                odd[q][1] = fma(b, odd1, odd[q][1]);
            }
        }
        RVQKV_UNROLL
        for (std::size_t q = 0; q < side; ++q) {
            RVQKV_UNROLL
            for (std::size_t i = 0; i < 2; ++i) {
                float* const after = out + q * out_stride + half + first + i * width;
                float* const before = out + q * out_stride + half - first - (i + 1) * width;
                store(after, add(load(after), add(even[q][i], odd[q][i])));
                store(before, add(load(before), reverse(subtract(even[q][i], odd[q][i]))));
            }
        }
    }
}

inline void add_bias(const turning_pairs& table, row_block<const float> pairs, const float* constants,
                     std::size_t tiles, float* factors, float* out, std::size_t out_stride) {
    std::size_t row = 0;
    const auto rows = [&](auto side) {
        for (; row + side <= pairs.count; row += side) {
            bias_factors<side>(table, {pairs.data + row * pairs.stride, side, pairs.stride}, tiles, factors);
            for (std::size_t tile = 0; tile < tiles; ++tile) {
                add_bias_tile<side>(table, factors + tile, constants + row, out + row * out_stride + tile * tile_tokens,
                                    out_stride);
            }
        }
    };
    rows(std::integral_constant<int, query_side>());
    if constexpr (query_side > 1) {
        rows(std::integral_constant<int, 1>());
    }
}
