// SPDX-License-Identifier: MIT
// Scans of codes by small tables, compiled for every instruction set that looks bytes up in registers; part of that
// level's header. Beside what kernels.inl names:
//   breg: `byte_lanes` bytes, each a token's;   scan_strips: as many of them are summed up at once
//   unpacker(bits).unpack(row, codes): 64 codes to bytes
//   small_table<Slots>(table).at(codes)
//   load_bytes, store_bytes; add_bytes, add_words, subtract_words, multiply_words, upper_bytes (of words, as words),
//   to_upper_bytes; store_zipped(uint16_t*, even, odd): words of two registers in turn
//   load_words(uint16_t*): as floats;   add_products(ireg&, breg weights, breg values): dot products of four bytes
//   max, min, largest, smallest, multiply, divide, to_integers, to_floats, store(uint8_t*, ireg)
//   multiply_nonzero(a, b): 0 where `a` is 0;   max_of_quads: the largest of four neighbours, in each of them;
//   store_quads: every fourth number;   sum_of_lanes(float*): of `value_lanes`, halves first

inline constexpr std::size_t quad_tokens = scan_quad * tile_tokens;
inline constexpr std::size_t scan_groups = 16;       // whose codes stand unpacked
inline constexpr std::size_t value_quads_ahead = 2;  // that are prefetched
inline constexpr std::size_t scan_queries = 8;       // whose sums stand on the stack

inline void prefetch(const std::byte* from) {
    __builtin_prefetch(from);
}

/// Products of one group's channels with all codewords of a depth, `Registers` registers of them at a time.
template <int Registers>
RVQKV_ALWAYS_INLINE void multiply_codewords(const float* channels, const float* book, std::size_t dim,
                                            std::size_t slots, float* products, reg& highest, reg& lowest) {
    const float zero = 0.0F;
    for (std::size_t c = 0; c < slots; c += Registers * lanes) {
        reg value[Registers];
        RVQKV_UNROLL
        for (int w = 0; w < Registers; ++w) {
            value[w] = broadcast(&zero);
        }
        for (std::size_t j = 0; j < dim; ++j) {
            const reg channel = broadcast(channels + j);
            RVQKV_UNROLL
            for (int w = 0; w < Registers; ++w) {
                value[w] = fma(channel, load(book + j * slots + c + w * lanes), value[w]);
            }
        }
        RVQKV_UNROLL
        for (int w = 0; w < Registers; ++w) {
            store(products + c + w * lanes, value[w]);
            highest = max(value[w], highest);
            lowest = min(value[w], lowest);
        }
    }
}

inline void fill_scores(const float* query, const float* book, std::size_t depths, std::size_t groups, std::size_t dim,
                        std::size_t slots, float* products, std::uint8_t* digits, std::size_t depth_stride, float* step,
                        float* starts, std::size_t start_stride) {
    const float most_float = 3.4e38F;
    const float least_float = -most_float;
    float* const lows = products + depths * groups * slots;
    float start = 0.0F;
    float widest = 0.0F;
    float sum_of_ranges = 0.0F;
    for (std::size_t depth = 0; depth < depths; ++depth) {
        for (std::size_t g = 0; g < groups; ++g) {
            const std::size_t place = depth * groups + g;
            reg highest = broadcast(&least_float);
            reg lowest = broadcast(&most_float);
            if (slots == 16) {
                multiply_codewords<16 / lanes>(query + g * dim, book + depth * dim * slots, dim, slots,
                                               products + place * slots, highest, lowest);
            } else {
                multiply_codewords<64 / lanes>(query + g * dim, book + depth * dim * slots, dim, slots,
                                               products + place * slots, highest, lowest);
            }
            const float low = smallest(lowest);
            const float range = largest(highest) - low;
            lows[place] = low;
            start += low;
            widest = range > widest ? range : widest;
            sum_of_ranges += range;
        }
        starts[depth * start_stride] = start;
    }
    const float places = static_cast<float>(depths * groups);  // rounding may add half a step at each
    const float by_entry = widest / static_cast<float>(score_base * score_base - 1);
    const float by_sum = sum_of_ranges / (static_cast<float>(most_score_sum) - places);
    *step = by_entry > by_sum ? by_entry : by_sum;
    const float inverse = *step > 1e-30F ? 1.0F / *step : 0.0F;
    const float per_base = 1.0F / static_cast<float>(score_base);
    constexpr unsigned half_base = score_base / 2;
    const float middle = -static_cast<float>(half_base) * per_base;
    const float minus_base = -static_cast<float>(score_base);
    for (std::size_t depth = 0; depth < depths; ++depth) {
        std::uint8_t* table = digits + depth * depth_stride;
        for (std::size_t g = 0; g < groups; ++g, table += 2 * slots) {
            const std::size_t place = depth * groups + g;
            const float offset = -lows[place] * inverse;
            for (std::size_t c = 0; c < slots; c += lanes) {
                const reg entry = to_floats(
                    to_integers(fma(load(products + place * slots + c), broadcast(&inverse), broadcast(&offset))));
                const ireg high = to_integers(fma(entry, broadcast(&per_base), broadcast(&middle)));
                store(table + c, to_integers(fma(to_floats(high), broadcast(&minus_base), entry)));
                store(table + slots + c, high);
            }
        }
    }
}

/// One query's entries of a group for `scan_strips` registers of tokens, in two digits.
template <int Slots>
RVQKV_ALWAYS_INLINE void look_up(const std::uint8_t* table, const std::uint8_t* codes, breg (&low)[scan_strips],
                                 breg (&high)[scan_strips]) {
    const small_table<Slots> low_table(table);
    const small_table<Slots> high_table(table + Slots);
    RVQKV_UNROLL
    for (int s = 0; s < scan_strips; ++s) {
        const breg code = keep(load_bytes(codes + s * byte_lanes));
        low[s] = low_table.at(code);
        high[s] = high_table.at(code);
    }
}

/// Adds one query's entries of `groups` groups to the sums of a quad: of even tokens, with 256 times the odd ones' on
/// top, and of odd tokens, register by register. `next` is where rows of another quad begin.
template <int Slots>
inline void add_entries(const std::uint8_t* table, const std::uint8_t* codes, std::size_t groups, const std::byte* next,
                        std::size_t next_stride, std::uint16_t* sums) {
    constexpr std::size_t width = static_cast<std::size_t>(byte_lanes);
    const breg base = broadcast_words(static_cast<std::int16_t>(score_base));
    for (std::size_t at = 0; at < quad_tokens; at += scan_strips * width, codes += scan_strips * width) {
        breg even[scan_strips];
        breg odd[scan_strips];
        RVQKV_UNROLL
        for (int s = 0; s < scan_strips; ++s) {
            even[s] = load_bytes(sums + s * byte_lanes);
            odd[s] = load_bytes(sums + s * byte_lanes + byte_lanes / 2);
        }
        for (std::size_t g = 0; g < groups;) {
            const std::size_t end = groups - g < score_run ? groups : g + score_run;
            breg low[scan_strips];
            breg high[scan_strips];
            prefetch(next + g * next_stride);
            look_up<Slots>(table + g * 2 * Slots, codes + g * quad_tokens, low, high);
            for (++g; g < end; ++g) {
                breg more_low[scan_strips];
                breg more_high[scan_strips];
                prefetch(next + g * next_stride);
                look_up<Slots>(table + g * 2 * Slots, codes + g * quad_tokens, more_low, more_high);
                RVQKV_UNROLL
                for (int s = 0; s < scan_strips; ++s) {
                    low[s] = add_bytes(low[s], more_low[s]);
                    high[s] = add_bytes(high[s], more_high[s]);
                }
            }
            RVQKV_UNROLL
            for (int s = 0; s < scan_strips; ++s) {
                even[s] = add_words(even[s], add_words(low[s], multiply_words(high[s], base)));
                odd[s] = add_words(odd[s], add_words(upper_bytes(low[s]), multiply_words(upper_bytes(high[s]), base)));
            }
        }
        RVQKV_UNROLL
        for (int s = 0; s < scan_strips; ++s) {
            store_bytes(sums + s * byte_lanes, even[s]);
            store_bytes(sums + s * byte_lanes + byte_lanes / 2, odd[s]);
        }
        sums += scan_strips * width;
    }
}

/// Sums to scores.
inline void finish_scores(const std::uint16_t* sums, std::size_t tokens, const float* step, const float* start,
                          const float* scales, float* scores) {
    constexpr std::size_t width = static_cast<std::size_t>(byte_lanes);
    const reg steps = broadcast(step);
    const reg starts = broadcast(start);
    for (std::size_t at = 0; at < tokens; at += width) {
        alignas(64) std::uint16_t in_order[width];
        const breg odd = load_bytes(sums + at + width / 2);
        store_zipped(in_order, subtract_words(load_bytes(sums + at), to_upper_bytes(odd)), odd);
        for (std::size_t i = 0; i < width; i += lanes) {
            const reg score = fma(load_words(in_order + i), steps, starts);
            store(scores + at + i, scales == nullptr ? score : multiply(score, load(scales + at + i)));
        }
    }
}

/// Where the rows of a quad begin that will be read a block's depth later.
inline void rows_ahead(const code_tiles& tiles, std::size_t first, std::size_t in_block, std::size_t depth,
                       std::size_t group, const std::byte* (&next)[scan_quad]) {
    const bool last = depth + 1 == tiles.depths;
    for (std::size_t k = 0; k < scan_quad; ++k) {
        const std::size_t tile = first + k + (last ? in_block : 0);
        next[k] = tile < tiles.count + tiles.ahead ? tiles.row(tile, last ? 0 : depth + 1, group)
                                                   : tiles.row(first, depth, group);
    }
}

template <int Slots>
inline void scan_scores_of(const code_tiles& tiles, const score_tables& tables, const float* scales, float* scores,
                           std::size_t stride) {
    constexpr std::size_t block = scan_block;
    const unpacker codes_of(tiles.bits);
    for (std::size_t first = 0; first < tiles.count; first += block) {
        const std::size_t in_block = tiles.count - first < block ? tiles.count - first : block;
        for (std::size_t q0 = 0; q0 < tables.queries; q0 += scan_queries) {
            const std::size_t queries = tables.queries - q0 < scan_queries ? tables.queries - q0 : scan_queries;
            alignas(64) std::uint16_t sums[scan_queries][block * tile_tokens];
            std::memset(sums, 0, queries * sizeof sums[0]);
            for (std::size_t depth = 0; depth < tiles.depths; ++depth) {
                for (std::size_t g0 = 0; g0 < tiles.groups; g0 += scan_groups) {
                    const std::size_t groups = tiles.groups - g0 < scan_groups ? tiles.groups - g0 : scan_groups;
                    for (std::size_t quad = 0; quad < in_block; quad += scan_quad) {
                        alignas(64) std::uint8_t codes[scan_groups * quad_tokens];
                        for (std::size_t k = 0; k < scan_quad; ++k) {
                            const std::size_t tile = quad + k < in_block ? quad + k : quad;
                            const std::byte* row = tiles.row(first + tile, depth, g0);
                            for (std::size_t g = 0; g < groups; ++g, row += tiles.group_stride) {
                                codes_of.unpack(row, codes + g * quad_tokens + k * tile_tokens);
                            }
                        }
                        const std::byte* next[scan_quad];
                        rows_ahead(tiles, first + quad, in_block, depth, g0, next);
                        for (std::size_t k = queries; k < scan_quad; ++k) {
                            for (std::size_t g = 0; g < groups; ++g) {
                                prefetch(next[k] + g * tiles.group_stride);
                            }
                        }
                        for (std::size_t q = 0; q < queries; ++q) {
                            const std::uint8_t* const table =
                                tables.digits + (((depth * tables.queries + q0 + q) * tiles.groups + g0) * 2) * Slots;
                            add_entries<Slots>(table, codes, groups, next[q % scan_quad], tiles.group_stride,
                                               sums[q] + quad * tile_tokens);
                        }
                    }
                }
            }
            for (std::size_t q = 0; q < queries; ++q) {
                finish_scores(sums[q], in_block * tile_tokens, tables.steps + q0 + q, tables.starts + q0 + q,
                              scales == nullptr ? nullptr : scales + first * tile_tokens,
                              scores + (q0 + q) * stride + first * tile_tokens);
            }
        }
    }
}

inline void scan_scores(const code_tiles& tiles, const score_tables& tables, const float* scales, float* scores,
                        std::size_t stride) {
    switch (scan_slots(tiles.bits)) {
        case 16: return scan_scores_of<16>(tiles, tables, scales, scores, stride);
        case 64: return scan_scores_of<64>(tiles, tables, scales, scores, stride);
        case 128: return scan_scores_of<128>(tiles, tables, scales, scores, stride);
        default: return scan_scores_of<256>(tiles, tables, scales, scores, stride);
    }
}

inline void round_weights(const float* weights, std::size_t stride, std::size_t rows, std::size_t tiles,
                          const float* scales, std::uint8_t* rounded, float* steps, float* totals) {
    const float most = 255.0F;
    const float per_most = 1.0F / 255.0F;
    const float least = 1e-30F;
    const float zero = 0.0F;
    for (std::size_t first = 0; first < tiles; first += scan_quad) {
        const std::size_t in_quad = tiles - first < scan_quad ? tiles - first : scan_quad;
        for (std::size_t v = 0; v < rows; ++v, rounded += quad_tokens, steps += value_lanes) {
            const float* const row = weights + v * stride + first * tile_tokens;
            for (std::size_t i = 0; i < tile_tokens; i += lanes) {
                float* const total_at = totals + v * value_lanes + i % value_lanes;
                reg total = load(total_at);
                reg value[scan_quad];
                reg highest = broadcast(&least);
                RVQKV_UNROLL
                for (std::size_t k = 0; k < scan_quad; ++k) {
                    const std::size_t at = k * tile_tokens + i;
                    value[k] = k < in_quad ? load(row + at) : broadcast(&zero);
                    if (scales != nullptr && k < in_quad) {
                        value[k] = multiply_nonzero(value[k], load(scales + first * tile_tokens + at));
                    }
                    total = add(total, value[k]);
                    highest = max(value[k], highest);
                }
                highest = max_of_quads(highest);
                const reg inverse = divide(broadcast(&most), highest);
                RVQKV_UNROLL
                for (std::size_t k = 0; k < scan_quad; ++k) {
                    store(rounded + k * tile_tokens + i, to_integers(multiply(value[k], inverse)));
                }
                store_quads(steps + i / 4, multiply(highest, broadcast(&per_most)));
                store(total_at, total);
            }
        }
    }
}

/// The entries of the depths [depth, end) added up, for `Channels` channels.
template <int Slots, int Channels>
RVQKV_ALWAYS_INLINE void add_plane(const std::int8_t* table, std::size_t depth_size, std::size_t depth, std::size_t end,
                                   const std::uint8_t* codes, breg (&value)[Channels][scan_quad]) {
    if (depth == end) {
        RVQKV_UNROLL
        for (int c = 0; c < Channels; ++c) {
            RVQKV_UNROLL
            for (std::size_t k = 0; k < scan_quad; ++k) {
                value[c][k] = broadcast_words(0);
            }
        }
        return;
    }
    table += depth * depth_size;
    codes += depth * quad_tokens;
    RVQKV_UNROLL
    for (int c = 0; c < Channels; ++c) {
        const small_table<Slots> entries(table + c * Slots);
        RVQKV_UNROLL
        for (std::size_t k = 0; k < scan_quad; ++k) {
            value[c][k] = entries.at(load_bytes(codes + k * tile_tokens));
        }
    }
    for (++depth; depth < end; ++depth) {
        table += depth_size;
        codes += quad_tokens;
        RVQKV_UNROLL
        for (int c = 0; c < Channels; ++c) {
            const small_table<Slots> entries(table + c * Slots);
            RVQKV_UNROLL
            for (std::size_t k = 0; k < scan_quad; ++k) {
                value[c][k] = add_bytes(value[c][k], entries.at(load_bytes(codes + k * tile_tokens)));
            }
        }
    }
}

/// Adds the products of `Channels` channels with `Rows` rows of weights.
template <int Planes, int Channels, int Rows>
RVQKV_ALWAYS_INLINE void add_rows(const breg (&value)[Planes][Channels][scan_quad], const std::uint8_t* weights,
                                  const float* steps, const float* ratios, std::size_t dim, float* sums,
                                  std::size_t channel_step) {
    ireg products[Planes][Channels][Rows];
    RVQKV_UNROLL
    for (int p = 0; p < Planes; ++p) {
        RVQKV_UNROLL
        for (int c = 0; c < Channels; ++c) {
            RVQKV_UNROLL
            for (int v = 0; v < Rows; ++v) {
                products[p][c][v] = broadcast(0);
            }
        }
    }
    RVQKV_UNROLL
    for (int k = 0; k < static_cast<int>(scan_quad); ++k) {
        RVQKV_UNROLL
        for (int v = 0; v < Rows; ++v) {
            const breg weight =
                load_bytes(weights + (v * static_cast<int>(scan_quad) + k) * static_cast<int>(tile_tokens));
            RVQKV_UNROLL
            for (int p = 0; p < Planes; ++p) {
                RVQKV_UNROLL
                for (int c = 0; c < Channels; ++c) {
                    add_products(products[p][c][v], weight, value[p][c][k]);
                }
            }
        }
    }
    RVQKV_UNROLL
    for (int c = 0; c < Channels; ++c) {
        RVQKV_UNROLL
        for (int v = 0; v < Rows; ++v) {
            reg sum = to_floats(products[Planes - 1][c][v]);
            RVQKV_UNROLL
            for (int p = 0; p + 1 < Planes; ++p) {
                sum = fma(to_floats(products[p][c][v]), broadcast(ratios + static_cast<std::size_t>(p) * dim + c), sum);
            }
            float* const to = sums + static_cast<std::size_t>(c) * channel_step + v * static_cast<int>(value_lanes);
            store(to, fma(sum, load(steps + v * static_cast<int>(value_lanes)), load(to)));
        }
    }
}

/// Adds one group's channels, `Channels` at a time, by its codes `[depths, quad_tokens]`.
template <int Slots, int Planes, int Channels>
inline void add_group(const std::uint8_t* codes, const std::int8_t* entries, const std::size_t* ends, std::size_t dim,
                      const float* ratios, std::size_t rows, const std::uint8_t* weights, const float* steps,
                      float* sums) {
    const std::size_t channel_step = rows * value_lanes;
    const std::size_t depth_size = dim * Slots;
    for (std::size_t j = 0; j < dim; j += Channels) {
        for (std::size_t at = 0; at < tile_tokens; at += static_cast<std::size_t>(byte_lanes)) {
            breg value[Planes][Channels][scan_quad];
            add_plane<Slots, Channels>(entries, depth_size, 0, ends[0], codes + at, value[0]);
            if constexpr (Planes > 1) {
                add_plane<Slots, Channels>(entries, depth_size, ends[0], ends[1], codes + at, value[1]);
            }
            if constexpr (Planes > 2) {
                add_plane<Slots, Channels>(entries, depth_size, ends[1], ends[2], codes + at, value[2]);
            }
            std::size_t row = 0;
            for (; row + 2 <= rows; row += 2) {
                add_rows<Planes, Channels, 2>(value, weights + row * quad_tokens + at,
                                              steps + row * value_lanes + at / 4, ratios, dim,
                                              sums + row * value_lanes + at / 4, channel_step);
            }
            if (row < rows) {
                add_rows<Planes, Channels, 1>(value, weights + row * quad_tokens + at,
                                              steps + row * value_lanes + at / 4, ratios, dim,
                                              sums + row * value_lanes + at / 4, channel_step);
            }
        }
        entries += Channels * Slots;
        ratios += Channels;
        sums += Channels * channel_step;
    }
}

/// Adds all tiles, a quad at a time.
template <int Slots, int Planes, int Channels>
inline void add_values_of(const code_tiles& tiles, const value_tables& tables, std::size_t rows,
                          const std::uint8_t* weights, const float* steps, float* sums) {
    const unpacker codes_of(tiles.bits);
    const std::size_t depths = tiles.depths;
    const std::size_t depth_stride = tiles.depth_stride;
    const std::size_t groups = tiles.groups;
    std::size_t ends[most_value_planes];
    for (std::size_t p = 0; p < most_value_planes; ++p) {
        ends[p] = tables.plane_ends[p] < depths ? tables.plane_ends[p] : depths;
    }
    for (std::size_t first = 0; first < tiles.count; first += scan_quad) {
        const std::byte* now[scan_quad];
        const std::byte* next[scan_quad];
        for (std::size_t k = 0; k < scan_quad; ++k) {
            now[k] = tiles.rows[first + k < tiles.count ? first + k : first];
            const std::size_t ahead = first + k + value_quads_ahead * scan_quad;
            next[k] = ahead < tiles.count + tiles.ahead ? tiles.rows[ahead] : now[k];
        }
        for (std::size_t g = 0; g < groups; ++g) {
            alignas(64) std::uint8_t codes[most_value_depths * quad_tokens];
            std::size_t row = g * tiles.group_stride;
            for (std::size_t depth = 0; depth < depths; ++depth, row += depth_stride) {
                RVQKV_UNROLL
                for (std::size_t k = 0; k < scan_quad; ++k) {
                    codes_of.unpack(now[k] + row, codes + depth * quad_tokens + k * tile_tokens);
                    prefetch(next[k] + row);
                }
            }
            add_group<Slots, Planes, Channels>(codes, tables.entries, ends, tables.dim, tables.ratios, rows, weights,
                                               steps, sums + g * tables.dim * rows * value_lanes);
        }
        weights += rows * quad_tokens;
        steps += rows * value_lanes;
    }
}

template <int Slots>
inline void add_values_by_planes(const code_tiles& tiles, const value_tables& tables, std::size_t rows,
                                 const std::uint8_t* weights, const float* steps, float* sums) {
    if (tables.planes == 3) {
        add_values_of<Slots, 3, 1>(tiles, tables, rows, weights, steps, sums);
    } else if (tables.dim % 2 != 0) {
        if (tables.planes == 2) {
            add_values_of<Slots, 2, 1>(tiles, tables, rows, weights, steps, sums);
        } else {
            add_values_of<Slots, 1, 1>(tiles, tables, rows, weights, steps, sums);
        }
    } else if (tables.planes == 2) {
        add_values_of<Slots, 2, 2>(tiles, tables, rows, weights, steps, sums);
    } else {
        add_values_of<Slots, 1, 2>(tiles, tables, rows, weights, steps, sums);
    }
}

inline void add_values(const code_tiles& tiles, const value_tables& tables, std::size_t rows,
                       const std::uint8_t* weights, const float* steps, float* sums) {
    switch (scan_slots(tiles.bits)) {
        case 16: return add_values_by_planes<16>(tiles, tables, rows, weights, steps, sums);
        case 64: return add_values_by_planes<64>(tiles, tables, rows, weights, steps, sums);
        case 128: return add_values_by_planes<128>(tiles, tables, rows, weights, steps, sums);
        default: return add_values_by_planes<256>(tiles, tables, rows, weights, steps, sums);
    }
}

inline void add_lanes(const float* sums, std::size_t count, float* out) {
    for (std::size_t i = 0; i < count; ++i) {
        out[i] = sum_of_lanes(sums + i * value_lanes);
    }
}

inline void multiply_rows(float* sums, std::size_t count, std::size_t rows, const float* factors) {
    for (std::size_t i = 0; i < count; ++i) {
        for (std::size_t v = 0; v < rows; ++v, sums += value_lanes) {
            const reg factor = broadcast(factors + v);
            for (std::size_t lane = 0; lane < value_lanes; lane += lanes) {
                store(sums + lane, multiply(factor, load(sums + lane)));
            }
        }
    }
}

inline constexpr small_scan_kernels small_scan = {fill_scores, scan_scores,   round_weights,
                                                  add_values,  multiply_rows, add_lanes};
