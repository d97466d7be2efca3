// SPDX-License-Identifier: MIT
// Scores of keys by small tables: part of small_scan.inl, which says what this needs.

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

/// The entries of a group for some queries and `scan_strips` registers of tokens, in two digits: written, or added.
template <int Slots, bool Adds, int Queries>
RVQKV_ALWAYS_INLINE void look_up(const std::uint8_t* table, std::size_t query_step, const std::uint8_t* codes,
                                 breg (&low)[Queries][scan_strips], breg (&high)[Queries][scan_strips]) {
    breg code[scan_strips];
    RVQKV_UNROLL
    for (int s = 0; s < scan_strips; ++s) {
        code[s] = keep(load_bytes(codes + s * byte_lanes));
    }
    RVQKV_UNROLL
    for (int q = 0; q < Queries; ++q, table += query_step) {
        const small_table<Slots> low_table(table);
        RVQKV_UNROLL
        for (int s = 0; s < scan_strips; ++s) {
            const breg entry = low_table.at(code[s]);
            low[q][s] = Adds ? add_bytes(low[q][s], entry) : entry;
        }
        const small_table<Slots> high_table(table + Slots);
        RVQKV_UNROLL
        for (int s = 0; s < scan_strips; ++s) {
            const breg entry = high_table.at(code[s]);
            high[q][s] = Adds ? add_bytes(high[q][s], entry) : entry;
        }
    }
}

/// Adds the entries of `groups` groups to the sums `[Queries, block_tokens]` of a quad. `table` is that of the first
/// query and group, `codes` `[groups, quad_tokens]`. Rows of two tiles that will be read later are fetched on the way.
template <int Slots, int Queries>
inline void add_entries(const std::uint8_t* table, std::size_t query_step, const std::uint8_t* codes,
                        std::size_t groups, const std::byte* const* next, std::size_t next_stride,
                        std::uint16_t* sums) {
    constexpr std::size_t width = static_cast<std::size_t>(byte_lanes);
    for (std::size_t at = 0; at < quad_tokens; at += scan_strips * width) {
        for (std::size_t g = 0; g < groups;) {
            const std::size_t end = groups - g < score_run ? groups : g + score_run;
            breg low[Queries][scan_strips];
            breg high[Queries][scan_strips];
            prefetch(next[0] + g * next_stride);
            prefetch(next[1] + g * next_stride);
            look_up<Slots, false>(table + g * 2 * Slots, query_step, codes + g * quad_tokens + at, low, high);
            for (++g; g < end; ++g) {
                prefetch(next[0] + g * next_stride);
                prefetch(next[1] + g * next_stride);
                look_up<Slots, true>(table + g * 2 * Slots, query_step, codes + g * quad_tokens + at, low, high);
            }
            RVQKV_UNROLL
            for (int q = 0; q < Queries; ++q) {
                RVQKV_UNROLL
                for (int s = 0; s < scan_strips; ++s) {
                    std::uint16_t* const to =
                        sums + static_cast<std::size_t>(q) * block_tokens + at + static_cast<std::size_t>(s) * width;
                    add_digits(low[q][s], high[q][s], to);
                }
            }
        }
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
        order_sums(sums + at, in_order);
        for (std::size_t i = 0; i < width; i += lanes) {
            const reg score = fma(load_words(in_order + i), steps, starts);
            store(scores + at + i, scales == nullptr ? score : multiply(score, load(scales + at + i)));
        }
    }
}

template <int Slots>
inline void scan_scores_of(const code_tiles& tiles, const score_tables& tables, const float* scales, float* scores,
                           std::size_t stride) {
    const unpacker<Slots> codes_of(tiles.bits);
    const std::size_t query_step = tiles.groups * 2 * Slots;
    for (std::size_t q0 = 0; q0 < tables.queries; q0 += scan_queries) {
        const std::size_t queries = tables.queries - q0 < scan_queries ? tables.queries - q0 : scan_queries;
        alignas(64) std::uint16_t sums[scan_queries * block_tokens];
        std::memset(sums, 0, queries * block_tokens * sizeof(std::uint16_t));
        for (std::size_t depth = 0; depth < tiles.depths; ++depth) {
            const bool last = depth + 1 == tiles.depths;
            for (std::size_t g0 = 0; g0 < tiles.groups; g0 += scan_groups) {
                const std::size_t groups = tiles.groups - g0 < scan_groups ? tiles.groups - g0 : scan_groups;
                const std::uint8_t* const table =
                    tables.digits + (depth * tables.queries + q0) * query_step + g0 * 2 * Slots;
                for (std::size_t quad = 0; quad < tiles.count; quad += scan_quad) {
                    alignas(64) std::uint8_t codes[scan_groups * quad_tokens];
                    const std::byte* next[scan_quad];
                    for (std::size_t k = 0; k < scan_quad; ++k) {
                        const std::size_t tile = quad + k < tiles.count ? quad + k : quad;
                        const std::byte* const row = tiles.row(tile, depth, g0);
                        // What is read next of this tile; or what is read first after this block.
                        const std::size_t ahead = last ? quad + k + tiles.count : tile;
                        next[k] = ahead < tiles.count + tiles.ahead ? tiles.row(ahead, last ? 0 : depth + 1, g0) : row;
                        for (std::size_t g = 0; g < groups; ++g) {
                            codes_of.unpack(row + g * tiles.group_stride, codes + g * quad_tokens + k * tile_tokens);
                            if (k >= queries) {
                                prefetch(next[k] + g * tiles.group_stride);
                            }
                        }
                    }
                    std::size_t q = 0;
                    for (; q + 2 <= queries; q += 2) {
                        add_entries<Slots, 2>(table + q * query_step, query_step, codes, groups, next + q % scan_quad,
                                              tiles.group_stride, sums + q * block_tokens + quad * tile_tokens);
                    }
                    if (q < queries) {
                        add_entries<Slots, 1>(table + q * query_step, query_step, codes, groups, next + q % scan_quad,
                                              tiles.group_stride, sums + q * block_tokens + quad * tile_tokens);
                    }
                }
            }
        }
        for (std::size_t q = 0; q < queries; ++q) {
            finish_scores(sums + q * block_tokens, tiles.count * tile_tokens, tables.steps + q0 + q,
                          tables.starts + q0 + q, scales, scores + (q0 + q) * stride);
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
