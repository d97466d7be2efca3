// SPDX-License-Identifier: MIT
// Weighted sums of values by small tables: part of small_scan.inl, which says what this needs.

inline void round_weights(const float* weights, std::size_t stride, std::size_t rows, std::size_t tiles,
                          const float* scales, std::uint8_t* rounded, float* steps, float* totals) {
    const float most = 255.0F;
    const float per_most = 1.0F / 255.0F;
    const float least = 1e-30F;
    const std::size_t tile_step = rows * tile_tokens;
    for (std::size_t v = 0; v < rows; ++v, weights += stride, rounded += tile_tokens, steps += value_lanes) {
        for (std::size_t i = 0; i < tile_tokens; i += lanes) {
            float* const total_at = totals + v * value_lanes + i % value_lanes;
            reg total = load(total_at);
            reg highest = broadcast(&least);
            alignas(64) float products[scan_block * lanes];
            for (std::size_t k = 0; k < tiles; ++k) {
                const std::size_t at = k * tile_tokens + i;
                reg value = load(weights + at);
                if (scales != nullptr) {
                    value = multiply_nonzero(value, load(scales + at));
                }
                total = add(total, value);
                highest = max(value, highest);
                store(products + k * lanes, value);
            }
            store(total_at, total);
            highest = max_of_quads(highest);
            const reg inverse = divide(broadcast(&most), highest);
            for (std::size_t k = 0; k < tiles; ++k) {
                store(rounded + k * tile_step + i, to_integers(multiply(load(products + k * lanes), inverse)));
            }
            store_quads(steps + i / 4, multiply(highest, broadcast(&per_most)));
        }
    }
}

/// Tables of two channels for each of some depths, whose entries are added up.
template <int Slots, int Depths>
struct channel_tables {
    small_table<Slots> first;
    small_table<Slots> second;
    channel_tables<Slots, Depths - 1> others;

    channel_tables(const std::int8_t* first_table, const std::int8_t* second_table, std::size_t stride)
        : first(first_table), second(second_table), others(first_table + stride, second_table + stride, stride) {}
    /// `codes` are a register's; those of the next depth stand `block_tokens` further.
    RVQKV_ALWAYS_INLINE void look_up(const std::uint8_t* codes, breg& first_value, breg& second_value) const {
        const breg code = keep(load_bytes(codes));
        breg first_others;
        breg second_others;
        others.look_up(codes + block_tokens, first_others, second_others);
        first_value = add_bytes(first.at(code), first_others);
        second_value = add_bytes(second.at(code), second_others);
    }
};
template <int Slots>
struct channel_tables<Slots, 1> {
    small_table<Slots> first;
    small_table<Slots> second;

    channel_tables(const std::int8_t* first_table, const std::int8_t* second_table, std::size_t)
        : first(first_table), second(second_table) {}
    RVQKV_ALWAYS_INLINE void look_up(const std::uint8_t* codes, breg& first_value, breg& second_value) const {
        const breg code = keep(load_bytes(codes));
        first_value = first.at(code);
        second_value = second.at(code);
    }
};

/// Adds one row's products of two channels.
RVQKV_ALWAYS_INLINE void add_row(const std::uint8_t* weights, breg first_value, breg second_value, ireg& first,
                                 ireg& second) {
    const breg weight = keep(load_bytes(weights));
    add_products(first, weight, first_value);
    add_products(second, weight, second_value);
}
RVQKV_ALWAYS_INLINE void finish_row(const float* steps, reg ratio, ireg products, float* sums) {
    store(sums, fma(to_floats(products), multiply(load(steps), ratio), load(sums)));
}

/// Rows of codes that will be read in the next block: fetched from memory one by one while others are computed on, for
/// all at once would wait for each other; and tile by tile, as they lie.
struct rows_ahead {
    const std::byte* first;   // rows to fetch now, `stride` apart,
    const std::byte* second;  // and others
    std::size_t stride;

    RVQKV_ALWAYS_INLINE void fetch(std::size_t i) const {
        prefetch(first + i * stride);
        prefetch(second + i * stride);
    }
};

/// Adds two channels by `Depths` depths, whose entries add up to bytes, to the sums of 1, 2 or 4 rows of weights.
/// `codes` is `[Depths, scan_block, tile_tokens]`, `weights` `[tiles, rows, tile_tokens]`.
template <int Slots, int Depths, int Rows>
inline void add_channels(const std::uint8_t* codes, std::size_t tiles, rows_ahead ahead, const std::int8_t* first,
                         const std::int8_t* second, std::size_t depth_size, const std::uint8_t* weights,
                         std::size_t tile_step, const float* steps, const float* ratios, float* first_sums,
                         float* second_sums) {
    const channel_tables<Slots, Depths> tables(first, second, depth_size);
    for (std::size_t lane = 0; lane < tile_tokens; lane += static_cast<std::size_t>(byte_lanes)) {
        // No arrays: compilers would put some of them on the stack.
        ireg first0 = broadcast(0);
        ireg first1 = broadcast(0);
        ireg first2 = broadcast(0);
        ireg first3 = broadcast(0);
        ireg second0 = broadcast(0);
        ireg second1 = broadcast(0);
        ireg second2 = broadcast(0);
        ireg second3 = broadcast(0);
        const std::uint8_t* code_at = codes + lane;
        const std::uint8_t* weight_at = weights + lane;
        breg first_value;
        breg second_value;
        tables.look_up(code_at, first_value, second_value);
        for (std::size_t tile = 0; tile < tiles; ++tile, weight_at += tile_step) {
            ahead.fetch(tile);
            // One tile ahead, so that products need not wait.
            code_at += tile + 1 < tiles ? tile_tokens : 0;
            breg next_first;
            breg next_second;
            tables.look_up(code_at, next_first, next_second);
            add_row(weight_at, first_value, second_value, first0, second0);
            if constexpr (Rows > 1) {
                add_row(weight_at + tile_tokens, first_value, second_value, first1, second1);
            }
            if constexpr (Rows > 2) {
                add_row(weight_at + 2 * tile_tokens, first_value, second_value, first2, second2);
                add_row(weight_at + 3 * tile_tokens, first_value, second_value, first3, second3);
            }
            first_value = next_first;
            second_value = next_second;
        }
        const reg first_ratio = broadcast(ratios);
        const reg second_ratio = broadcast(ratios + 1);
        const float* const step = steps + lane / 4;
        float* const first_sum = first_sums + lane / 4;
        float* const second_sum = second_sums + lane / 4;
        finish_row(step, first_ratio, first0, first_sum);
        finish_row(step, second_ratio, second0, second_sum);
        if constexpr (Rows > 1) {
            finish_row(step + value_lanes, first_ratio, first1, first_sum + value_lanes);
            finish_row(step + value_lanes, second_ratio, second1, second_sum + value_lanes);
        }
        if constexpr (Rows > 2) {
            finish_row(step + 2 * value_lanes, first_ratio, first2, first_sum + 2 * value_lanes);
            finish_row(step + 2 * value_lanes, second_ratio, second2, second_sum + 2 * value_lanes);
            finish_row(step + 3 * value_lanes, first_ratio, first3, first_sum + 3 * value_lanes);
            finish_row(step + 3 * value_lanes, second_ratio, second3, second_sum + 3 * value_lanes);
        }
    }
}

/// Shares the rows of the next block out over the calls of `add_channels`: each fetches as many groups of one tile and
/// depth as there are tiles, or of two.
class value_prefetcher {
public:
    value_prefetcher(const code_tiles& tiles, std::size_t calls)
        : tiles_(tiles),
          end_(tiles.count + (tiles.ahead < tiles.count ? tiles.ahead : tiles.count)),
          tile_(tiles.count),
          two_((end_ - tile_) * tiles.depths * ((tiles.groups + tiles.count - 1) / tiles.count) > calls) {}
    /// What the next call is to fetch.
    rows_ahead next() {
        const std::byte* const first = advance();
        return {first, two_ ? advance() : first, tile_ == end_ ? 0 : tiles_.group_stride};
    }

private:
    const std::byte* advance() {
        if (tile_ == end_) {
            return tiles_.rows[0];
        }
        const std::byte* const row = tiles_.row(tile_, depth_, group_);
        group_ += tiles_.count;
        if (group_ >= tiles_.groups) {
            group_ = 0;
            if (++depth_ == tiles_.depths) {
                depth_ = 0;
                ++tile_;
            }
        }
        return row;
    }

    const code_tiles& tiles_;
    std::size_t end_;
    std::size_t tile_;
    std::size_t depth_ = 0;
    std::size_t group_ = 0;
    bool two_;
};

/// What the channels of a group are added to, and by what.
struct value_group {
    const std::uint8_t* codes;  // [depths, scan_block, tile_tokens]
    std::size_t tiles;
    std::size_t rows;
    const std::uint8_t* weights;
    const float* steps;
    float* sums;
};

/// Adds a group's channels by `Depths` depths from `depth` on, which are of plane `plane`.
template <int Slots, int Depths>
inline void add_depths(const value_group& group, const value_tables& tables, std::size_t depth, std::size_t plane,
                       value_prefetcher& prefetcher) {
    const std::size_t rows = group.rows;
    const std::size_t channel_step = rows * value_lanes;
    const std::size_t dim = tables.dim;
    const std::uint8_t* const codes = group.codes + depth * block_tokens;
    const std::int8_t* entries = tables.entries + depth * dim * Slots;
    const float* ratios = tables.ratios + plane * dim;
    float* sums = group.sums;
    for (std::size_t j = 0; j < dim; j += 2, entries += 2 * Slots, ratios += 2, sums += 2 * channel_step) {
        // A last channel without a neighbour is its own, whose sums nobody reads.
        alignas(64) float unread[4 * value_lanes];
        const bool alone = j + 1 == dim;
        const std::int8_t* const other = alone ? entries : entries + Slots;
        const float both[] = {ratios[0], alone ? 0.0F : ratios[1]};
        std::size_t row = 0;
        const rows_ahead ahead = prefetcher.next();
        const auto add_rows = [&](auto count) {
            for (; row + count <= rows; row += count) {
                if (alone) {
                    std::memset(unread, 0, sizeof unread);
                }
                add_channels<Slots, Depths, count>(codes, group.tiles, ahead, entries, other, dim * Slots,
                                                   group.weights + row * tile_tokens, rows * tile_tokens,
                                                   group.steps + row * value_lanes, both, sums + row * value_lanes,
                                                   alone ? unread : sums + channel_step + row * value_lanes);
            }
        };
        add_rows(std::integral_constant<int, 4>());
        add_rows(std::integral_constant<int, 2>());
        add_rows(std::integral_constant<int, 1>());
    }
}

/// Calls `body(depth, count, plane)` for depths that are added up together.
template <int Slots, class Body>
inline void for_each_sum(const value_tables& tables, std::size_t depths, Body&& body) {
    constexpr std::size_t most = Slots == 256 ? 2 : 3;  // depths whose tables stay in registers
    std::size_t depth = 0;
    for (std::size_t plane = 0; plane < tables.planes; ++plane) {
        const std::size_t end = tables.plane_ends[plane] < depths ? tables.plane_ends[plane] : depths;
        while (depth < end) {
            const std::size_t count = end - depth < most ? end - depth : most;
            body(depth, count, plane);
            depth += count;
        }
    }
}

/// One row of codes of each tile, unpacked.
template <int Slots>
RVQKV_ALWAYS_INLINE void unpack_rows(const unpacker<Slots>& codes_of, const std::byte* const* rows, std::size_t tiles,
                                     std::size_t offset, std::uint8_t* codes) {
    for (std::size_t i = 0; i < tiles; ++i, codes += tile_tokens) {
        codes_of.unpack(rows[i] + offset, codes);
    }
}

template <int Slots>
inline void add_values_of(const code_tiles& tiles, const value_tables& tables, std::size_t rows,
                          const std::uint8_t* weights, const float* steps, std::uint8_t* codes, float* sums) {
    const unpacker<Slots> codes_of(tiles.bits);
    // Copies: for all that a compiler knows, writing codes could change what the tiles say.
    const std::size_t depths = tiles.depths;
    const std::size_t tile_count = tiles.count;
    const std::byte* const* const first_rows = tiles.rows;
    const std::size_t depth_stride = tiles.depth_stride;
    const std::size_t group_stride = tiles.group_stride;
    std::size_t sums_of_depths = 0;
    for_each_sum<Slots>(tables, depths, [&](std::size_t, std::size_t, std::size_t) { ++sums_of_depths; });
    value_prefetcher prefetcher(tiles, tiles.groups * ((tables.dim + 1) / 2) * sums_of_depths);
    for (std::size_t g = 0; g < tiles.groups; ++g) {
        // Just before they are used: codes of all groups would not stay in L1.
        for (std::size_t depth = 0; depth < depths; ++depth) {
            unpack_rows(codes_of, first_rows, tile_count, depth * depth_stride + g * group_stride,
                        codes + depth * block_tokens);
        }
        const value_group group = {codes, tile_count, rows, weights, steps, sums + g * tables.dim * rows * value_lanes};
        for_each_sum<Slots>(tables, depths, [&](std::size_t depth, std::size_t count, std::size_t plane) {
            if (count == 3) {
                add_depths<Slots, 3>(group, tables, depth, plane, prefetcher);
            } else if (count == 2) {
                add_depths<Slots, 2>(group, tables, depth, plane, prefetcher);
            } else {
                add_depths<Slots, 1>(group, tables, depth, plane, prefetcher);
            }
        });
    }
}

inline void add_values(const code_tiles& tiles, const value_tables& tables, std::size_t rows,
                       const std::uint8_t* weights, const float* steps, std::uint8_t* codes, float* sums) {
    switch (scan_slots(tiles.bits)) {
        case 16: return add_values_of<16>(tiles, tables, rows, weights, steps, codes, sums);
        case 64: return add_values_of<64>(tiles, tables, rows, weights, steps, codes, sums);
        case 128: return add_values_of<128>(tiles, tables, rows, weights, steps, codes, sums);
        default: return add_values_of<256>(tiles, tables, rows, weights, steps, codes, sums);
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
