// SPDX-License-Identifier: MIT
// The inner loops of attention through tables of large codebooks, part of kernels.inl; see attention.inl for what they
// ask of a level.

inline reg constant(float value) {
    return broadcast(&value);
}

/// `Blocks` blocks of codewords and `Count` queries.
template <int Blocks, int Count, class T>
RVQKV_ALWAYS_INLINE void products_tile(const T* block, row_block<const float> queries, std::size_t dim, float* out,
                                       std::size_t out_stride) {
    constexpr int each = static_cast<int>(search_block) / lanes;
    constexpr int parts = Blocks * each;
    reg sums[Count][parts];
    RVQKV_UNROLL
    for (int q = 0; q < Count; ++q) {
        RVQKV_UNROLL
        for (int part = 0; part < parts; ++part) {
            sums[q][part] = constant(0.0F);
        }
    }
    for (std::size_t j = 0; j < dim; ++j, block += search_block) {
        reg weights[parts];
        RVQKV_UNROLL
        for (int part = 0; part < parts; ++part) {
            weights[part] =
                keep(load(block + static_cast<std::size_t>(part / each) * dim * search_block + part % each * lanes));
        }
        RVQKV_UNROLL
        for (int q = 0; q < Count; ++q) {
            const reg number = broadcast(queries.data + static_cast<std::size_t>(q) * queries.stride + j);
            RVQKV_UNROLL
            for (int part = 0; part < parts; ++part) {
                sums[q][part] = fma(number, weights[part], sums[q][part]);
            }
        }
    }
    RVQKV_UNROLL
    for (int q = 0; q < Count; ++q) {
        RVQKV_UNROLL
        for (int part = 0; part < parts; ++part) {
            store(out + static_cast<std::size_t>(q) * out_stride + part * lanes, sums[q][part]);
        }
    }
}

template <class T>
inline void products(const T* codewords, std::size_t blocks, row_block<const float> queries, std::size_t dim,
                     float* out, std::size_t out_stride) {
    std::size_t block = 0;
    // Sums enough for the multipliers' latency: of many queries at once, or of many codewords.
    const auto tiles = [&](auto at_once, auto side) {
        for (; block + at_once <= blocks; block += at_once) {
            const T* const from = codewords + block * dim * search_block;
            float* const to = out + block * search_block;
            row_block<const float> left = queries;
            std::size_t q = 0;
            for (; q + side <= queries.count; q += side, left.data += side * queries.stride) {
                products_tile<at_once, side>(from, left, dim, to + q * out_stride, out_stride);
            }
            for (; q < queries.count; ++q, left.data += queries.stride) {
                products_tile<at_once, 1>(from, left, dim, to + q * out_stride, out_stride);
            }
        }
    };
    if (queries.count < product_side && product_side > 4) {
        tiles(std::integral_constant<int, 4>(), std::integral_constant<int, 4>());
    }
    tiles(std::integral_constant<int, 1>(), std::integral_constant<int, product_side>());
}

/// For at least as many numbers as `search_block`, a multiple of it.
inline void range(const float* x, std::size_t count, float* low, float* high) {
    reg top = constant(-__builtin_inff());
    reg bottom = top;
    for (std::size_t i = 0; i < count; i += lanes) {
        const reg value = load(x + i);
        top = max(value, top);
        bottom = max(subtract(constant(0.0F), value), bottom);
    }
    *low = -largest(bottom);
    *high = largest(top);
}

inline void pack_entries(const float* products, std::size_t stride, std::size_t count, const float* low,
                         const float* inverse, std::uint64_t* entries) {
    const reg zero = constant(0.0F);
    const reg most = constant(-65535.0F);
    const auto entry = [&](std::size_t q, std::size_t i) {
        const reg value = multiply(subtract(load(products + q * stride + i), constant(low[q])), constant(inverse[q]));
        // Not above the largest, nor below 0, nor NaN; then to the nearest whole number.
        const reg inside = max(subtract(zero, max(subtract(zero, value), most)), zero);
        const reg rounder = constant(0x1p23F);
        return subtract(add(inside, rounder), rounder);
    };
    for (std::size_t i = 0; i < count; i += lanes) {
        const reg even = halves(entry(0, i), entry(1, i));
        const reg odd = halves(entry(2, i), entry(3, i));
        join(static_cast<float*>(static_cast<void*>(entries + i)), even, odd);
    }
}

inline void unpack_sums(const std::uint64_t* sums, std::size_t count, std::size_t queries, const float* start,
                        const float* step, const float* scales, float* out, std::size_t stride) {
    for (std::size_t i = 0; i < count; i += lanes) {
        reg even;
        reg odd;
        split(static_cast<const float*>(static_cast<const void*>(sums + i)), even, odd);
        const reg scale = load(scales + i);
        const auto finish = [&](std::size_t q, reg sum) {
            if (q < queries) {
                store(out + q * stride + i, multiply(fma(sum, constant(step[q]), constant(start[q])), scale));
            }
        };
        finish(0, low_half(even));
        finish(1, high_half(even));
        finish(2, low_half(odd));
        finish(3, high_half(odd));
    }
}

/// Eight tokens' codes of `Bits` bits, which fill as many bytes.
template <unsigned Bits>
class eight_codes {
public:
    static_assert(Bits >= 8 && Bits <= 16);
    RVQKV_ALWAYS_INLINE explicit eight_codes(const std::byte* packed) {
        __builtin_memcpy(&first_, packed, 8);
        __builtin_memcpy(&second_, packed + Bits - 8, 8);  // ends where the codes end
    }
    RVQKV_ALWAYS_INLINE std::uint64_t operator[](unsigned i) const {
        constexpr std::uint64_t ones = (std::uint64_t{1} << Bits) - 1U;
        return i < 4 ? (first_ >> i * Bits) & ones : (second_ >> (64U - (8U - i) * Bits)) & ones;
    }

private:
    std::uint64_t first_ = 0;
    std::uint64_t second_ = 0;
};
/// `body(bits)` with the number of bits known at compile time.
template <class Body>
inline void with_bits(unsigned bits, Body&& body) {
    switch (bits) {
        case 8: return body(std::integral_constant<unsigned, 8>());
        case 9: return body(std::integral_constant<unsigned, 9>());
        case 10: return body(std::integral_constant<unsigned, 10>());
        case 11: return body(std::integral_constant<unsigned, 11>());
        case 12: return body(std::integral_constant<unsigned, 12>());
        default: break;
    }
}
/// Fetches codes: those of the row that is read next into the second cache, which keeps them while this row's tables
/// fill the first; and into the first, from there, those of a tile that is soon due.
RVQKV_ALWAYS_INLINE void prefetch_codes(const code_rows& rows, std::size_t tile) {
    constexpr std::size_t ahead = 6;
    const std::size_t middle = 4 * rows.bits;
    const std::size_t last = 8 * rows.bits - 1;
    const std::byte* const later = rows.tiles[tile] + rows.next;
    __builtin_prefetch(later, 0, 2);
    __builtin_prefetch(later + middle, 0, 2);
    __builtin_prefetch(later + last, 0, 2);
    if (tile + ahead < rows.count) {
        const std::byte* const soon = rows.tiles[tile + ahead] + rows.row;
        __builtin_prefetch(soon);
        __builtin_prefetch(soon + middle);
        __builtin_prefetch(soon + last);
    }
}

inline void add_entries(const code_rows& first, const std::uint64_t* first_entries, const code_rows& second,
                        const std::uint64_t* second_entries, std::uint64_t* sums) {
    with_bits(first.bits, [&](auto bits) {
        for (std::size_t tile = 0; tile < first.count; ++tile) {
            const std::byte* packed = first.tiles[tile] + first.row;
            const std::byte* more_packed = second.tiles[tile] + second.row;
            prefetch_codes(first, tile);
            prefetch_codes(second, tile);
            for (std::size_t eight = 0; eight < tile_tokens / 8; ++eight) {
                const eight_codes<bits> codes(packed);
                const eight_codes<bits> more_codes(more_packed);
                RVQKV_UNROLL
                for (unsigned i = 0; i < 8; ++i) {
                    sums[i] += first_entries[codes[i]] + second_entries[more_codes[i]];
                }
                packed += bits;
                more_packed += bits;
                sums += 8;
            }
        }
    });
}

inline void add_weights(const code_rows& rows, const float4* weights, float4* bins) {
    with_bits(rows.bits, [&](auto bits) {
        for (std::size_t tile = 0; tile < rows.count; ++tile) {
            const std::byte* packed = rows.tiles[tile] + rows.row;
            prefetch_codes(rows, tile);
            for (std::size_t eight = 0; eight < tile_tokens / 8; ++eight, packed += bits, weights += 8) {
                const eight_codes<bits> codes(packed);
                RVQKV_UNROLL
                for (unsigned i = 0; i < 8; ++i) {
                    bins[codes[i]] += weights[i];
                }
            }
        }
    });
}
