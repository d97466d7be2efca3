// SPDX-License-Identifier: MIT
// The eight-bit pass of the integer search, part of integer_search.inl: it keeps, of each group of 64 codewords, the
// best of each lane ("quad": four codewords), and lists the quads that can hold the nearest codewords.

/// Numbers of groups, in the order in which they are visited.
struct group_list {
    std::uint8_t groups[segment_groups];
    std::size_t count = 0;
};

/// Bit `g` alone, for each group.
struct bit_table {
    std::int32_t of[segment_groups];
};
inline constexpr bit_table group_bits = [] {
    bit_table table{};
    for (std::size_t g = 0; g < segment_groups; ++g) {
        table.of[g] = static_cast<std::int32_t>(std::uint32_t{1} << g);
    }
    return table;
}();

/// The groups whose bits are set.
inline group_list listed(std::uint32_t groups) {
    group_list list;
    for (; groups != 0; groups &= groups - 1) {
        list.groups[list.count++] = static_cast<std::uint8_t>(__builtin_ctz(groups));
    }
    return list;
}

/// Eight-bit scores of `Rows` rows against one group: what each lane's best can be at most, and (over all groups) what
/// it is at least. `place` is the first row's place of the group in the workspace, `turn` which half of the marks is
/// next.
template <int Rows>
__attribute__((noinline)) inline void coarse_group(const std::int8_t* x, const std::uint8_t* codewords,
                                                   const float* offsets, const float* group_step, std::size_t quarters,
                                                   std::size_t first_row, std::size_t place, std::size_t turn,
                                                   workspace& work) {
    constexpr int per_block = static_cast<int>(search_block) / lanes;  // registers that one block of codewords takes
    constexpr int per_group = 4 * per_block;
    for (int first = 0; first < per_group; first += sum_registers) {
        ireg sums[Rows][sum_registers];
        RVQKV_UNROLL
        for (int v = 0; v < Rows; ++v) {
            RVQKV_UNROLL
            for (int w = 0; w < sum_registers; ++w) {
                sums[v][w] = broadcast(work.facts[first_row + static_cast<std::size_t>(v)].start);
            }
        }
        const std::int8_t* value = x;
        const std::uint8_t* channel = codewords + first * lanes * 4;
        for (std::size_t j = 0; j < quarters; ++j) {
            ireg c[sum_registers];
            RVQKV_UNROLL
            for (int w = 0; w < sum_registers; ++w) {
                c[w] = load(channel + w * lanes * 4);
            }
            RVQKV_UNROLL
            for (int v = 0; v < Rows; ++v) {
                std::int32_t four = 0;
                std::memcpy(&four, value + v * 4, 4);
                const ireg row = broadcast(four);
                RVQKV_UNROLL
                for (int w = 0; w < sum_registers; ++w) {
                    add_products(sums[v][w], c[w], row);
                }
            }
            channel += integer_group * 4;
            value += Rows * 4;
        }
        const reg step = broadcast(group_step);
        RVQKV_UNROLL
        for (int v = 0; v < Rows; ++v) {
            const reg row_step = broadcast(&work.facts[first_row + static_cast<std::size_t>(v)].coarse_step);
            const std::size_t at = place + static_cast<std::size_t>(v) * segment_groups;
            reg best[per_block];
            RVQKV_UNROLL
            for (int w = 0; w < sum_registers; ++w) {
                const reg score = fma(as_floats(sums[v][w]), row_step, load(offsets + (first + w) * lanes));
                best[w % per_block] = w < per_block ? score : max(best[w % per_block], score);
            }
            RVQKV_UNROLL
            for (int part = 0; part < per_block; ++part) {
                float* const to = work.upper + at * search_block + part * lanes;
                if (first > 0) {
                    best[part] = max(best[part], load(to));
                }
                if (first + sum_registers < per_group) {
                    store(to, best[part]);
                    continue;
                }
                const reg scaled = multiply(best[part], step);
                store(to, add(scaled, broadcast(work.upper_bounds + at)));
                float* const least =
                    work.lower + (first_row + static_cast<std::size_t>(v)) * marks + turn + part * lanes;
                store(least, max(load(least), add(scaled, broadcast(work.lower_bounds + at))));
            }
        }
    }
}

/// The same for one group after the other.
template <int Rows>
inline void coarse_tile(const std::int8_t* x, const integer_codebook& book, std::size_t quarters,
                        std::size_t first_group, const group_list& list, std::size_t first_row, workspace& work) {
    const std::uint8_t* const codewords = book.coarse + first_group * integer_group * quarters * 4;
    const float* const offsets = book.coarse_offsets + first_group * integer_group;
    const float* const steps = book.coarse_steps + first_group;
    std::size_t turn = 0;
    for (std::size_t i = 0; i < list.count; ++i) {
        const std::size_t g = list.groups[i];
        coarse_group<Rows>(x, codewords + g * integer_group * quarters * 4, offsets + g * integer_group, steps + g,
                           quarters, first_row, first_row * segment_groups + g, turn, work);
        turn ^= search_block;
    }
}

/// `coarse_tile` for a number of rows that is known at run time, at most `Rows`.
template <int Rows>
inline void coarse_rows(std::size_t rows, const std::int8_t* x, const integer_codebook& book, std::size_t quarters,
                        std::size_t first_group, const group_list& list, std::size_t first_row, workspace& work) {
    if (rows == Rows) {
        coarse_tile<Rows>(x, book, quarters, first_group, list, first_row, work);
    } else if constexpr (Rows > 1) {
        coarse_rows<Rows - 1>(rows, x, book, quarters, first_group, list, first_row, work);
    }
}

/// The `count`-th largest of `Of` numbers; if some are equal, perhaps a smaller one. Precondition: `1 <= count <= Of`.
template <int Of>
inline float largest_but(const float* numbers, std::size_t count) {
    const float none = -__builtin_inff();
    const float enough = static_cast<float>(count) - 1.0F;
    reg top = broadcast(&none);
    for (int part = 0; part < Of; part += lanes) {
        const reg value = load(numbers + part);
        ireg ahead = broadcast(0);
        RVQKV_UNROLL
        for (int i = 0; i < Of; ++i) {
            ahead = add_where(greater(broadcast(numbers + i), value), ahead, broadcast(1));
        }
        top = max(top, select(at_least(to_floats(ahead), broadcast(&enough)), value, broadcast(&none)));
    }
    return largest(top);
}

/// A score that `count` codewords reach, by the marks of a row; the fewer they are, the fewer marks do.
inline float reached_by(const float* row_marks, std::size_t count) {
    if (count > search_block / 4) {
        return largest_but<static_cast<int>(marks)>(row_marks, count);
    }
    alignas(64) float folded[search_block];
    reg top = load(row_marks);
    for (std::size_t part = 0; part < search_block; part += lanes) {
        const reg best = max(load(row_marks + part), load(row_marks + search_block + part));
        store(folded + part, best);
        top = max(top, best);
    }
    return count == 1 ? largest(top) : largest_but<static_cast<int>(search_block)>(folded, count);
}

/// A score that `count` codewords of a family's rows reach with their leads, by the rows' marks and the products of the
/// shifted rows with the center; from it, what scores of each row must reach to be among them. The rows are those of
/// the family in this chunk.
inline void set_joint_limits(std::size_t first_row, std::size_t rows, std::size_t count, const float* leads,
                             std::size_t dim, const integer_codebook& book, workspace& work) {
    const float zero = 0.0F;
    const float none = -__builtin_inff();
    const std::size_t fine_dim = integer_fine_dim(dim);
    alignas(64) float reached[chunk_rows * search_block];
    float ahead[chunk_rows];  // of the row's shifted scores to the family's
    float largest_lead = 0.0F;
    float lost = 0.0F;
    for (std::size_t i = 0; i < rows; ++i) {
        const std::size_t v = first_row + i;
        reg products = broadcast(&zero);
        for (std::size_t j = 0; j < fine_dim; j += lanes) {
            products = fma(load(work.shifted + v * fine_dim + j), load(book.center + j), products);
        }
        const float product = sum(products);
        ahead[i] = leads[i] + product;
        const float magnitude = __builtin_fabsf(leads[i]) + __builtin_fabsf(product);
        largest_lead = magnitude > largest_lead ? magnitude : largest_lead;
        lost = work.facts[v].norm > lost ? work.facts[v].norm : lost;
        const float* const row_marks = work.lower + v * marks;
        for (std::size_t part = 0; part < search_block; part += lanes) {
            const reg best = max(load(row_marks + part), load(row_marks + search_block + part));
            const reg shown = add(best, broadcast(ahead + i));
            store(reached + i * search_block + part, work.facts[v].usable ? shown : broadcast(&none));
        }
    }
    float limit = none;
    for (std::size_t k = 0; k < count; ++k) {
        reg top = broadcast(&none);
        for (std::size_t at = 0; at < rows * search_block; at += lanes) {
            top = max(top, load(reached + at));
        }
        limit = largest(top);
        for (std::size_t at = 0; at < rows * search_block; at += lanes) {
            const reg value = load(reached + at);
            store(reached + at, select(at_least(value, broadcast(&limit)), broadcast(&none), value));
        }
    }
    lost *= static_cast<float>(dim + 24) * 6.0e-8F * book.center_norm;
    for (std::size_t i = 0; i < rows; ++i) {
        // Twice: the row that reaches the limit, and the one that is compared with it.
        const float joint = limit - ahead[i] - 2.0F * lost - 1e-6F * (__builtin_fabsf(limit) + largest_lead);
        float& own = work.limits[first_row + i];
        own = joint > own ? joint : own;
    }
}

/// What scores of a chunk's rows must reach to be among the `count` best, of their own or of their family.
inline void set_limits(std::size_t rows, std::size_t count, row_families families, std::size_t first_row_number,
                       std::size_t dim, const integer_codebook& book, workspace& work) {
    const bool joint = families.leads != nullptr && families.rows > 1;
    for (std::size_t v = 0; v < rows; ++v) {
        work.limits[v] = joint ? -__builtin_inff() : reached_by(work.lower + v * marks, count);
    }
    for (std::size_t v = 0; v < rows && joint;) {
        const std::size_t left = families.rows - (first_row_number + v) % families.rows;
        const std::size_t members = left < rows - v ? left : rows - v;
        set_joint_limits(v, members, count, families.leads + first_row_number + v, dim, book, work);
        v += members;
    }
}

/// Which quads of a row can hold one of its `count` nearest codewords, whose scores reach `limit`: bit `g` of lane `l`
/// says group `g`, lane `l`. `list` names those that have been visited; `in_order`: they are the first ones, for which
/// the loop without the list saves 3 % of a search under GCC 12.
inline void flag_quads(const float* upper, float limit, const group_list& list, bool in_order, std::int32_t* flags) {
    const reg least = broadcast(&limit);
    for (std::size_t part = 0; part < search_block; part += lanes) {
        ireg of_lane = broadcast(0);
        if (in_order) {
            ireg bit = broadcast(1);
            for (std::size_t g = 0; g < list.count; ++g) {
                of_lane = add_where(at_least(load(upper + g * search_block + part), least), of_lane, bit);
                bit = add(bit, bit);
            }
        }
        for (std::size_t i = in_order ? list.count : 0; i < list.count; ++i) {
            const std::size_t g = list.groups[i];
            const ireg bit = broadcast(group_bits.of[g]);
            of_lane = add_where(at_least(load(upper + g * search_block + part), least), of_lane, bit);
        }
        store(flags + part, of_lane);
    }
}

/// Appends the flagged quads of a row to the candidates and returns their new number. If they are too many, the row's
/// are left out and `ok` turns false.
inline std::size_t list_quads(std::size_t row, std::size_t first_group, std::size_t count, bool& ok, workspace& work) {
    const std::int32_t* const flags = work.flags + row * search_block;
    unsigned flagged = 0;
    for (std::size_t part = 0; part < search_block; part += lanes) {
        flagged |= nonzero(load(flags + part)) << part;
    }
    const std::size_t start = count;
    while (flagged != 0) {
        const auto lane = static_cast<std::size_t>(__builtin_ctz(flagged));
        flagged &= flagged - 1;
        auto groups = static_cast<std::uint32_t>(flags[lane]);
        do {
            if (count - start == most_quads) {
                ok = false;
                return start;
            }
            const std::size_t group = first_group + static_cast<std::size_t>(__builtin_ctz(groups));
            groups &= groups - 1;
            work.quads[count] = static_cast<std::uint16_t>(group * search_block + lane);
            work.rows[count++] = static_cast<std::uint8_t>(row);
        } while (groups != 0);
    }
    return count;
}

/// The eight-bit pass of the rows of a tile, less the groups that cannot hold the nearest codeword of any of them: what
/// the row's most promising group holds shows which. `products` are each row's with the groups' centers.
/// Returns the groups that it has visited.
inline group_list visit_reaching(std::size_t first_row, std::size_t rows, const integer_codebook& book, std::size_t dim,
                                 std::size_t segment, std::size_t groups, const float* const* products,
                                 workspace& work) {
    const std::size_t quarters = (dim + 3) / 4;
    const std::int8_t* const x = work.coarse + first_row * quarters * 4;
    const std::uint32_t all = ~std::uint32_t{0} >> (segment_groups - groups);
    std::uint32_t visited = 0;
    for (std::size_t v = first_row; v < first_row + rows; ++v) {
        float* const reaches = work.reaches + v * segment_groups;
        set_reaches(work.facts[v], book, segment, dim, products[v], reaches);
        for (std::size_t g = groups; g < segment_groups; ++g) {
            reaches[g] = -__builtin_inff();
        }
        visited |= first_group(reaches) & all;
    }
    group_list list = listed(visited);
    coarse_rows<sum_rows>(rows, x, book, quarters, segment, list, first_row, work);
    std::uint32_t wanted = 0;
    for (std::size_t v = first_row; v < first_row + rows; ++v) {
        wanted |= groups_reaching(work.reaches + v * segment_groups, reached_by(work.lower + v * marks, 1));
    }
    const group_list rest = listed(wanted & all & ~visited);
    coarse_rows<sum_rows>(rows, x, book, quarters, segment, rest, first_row, work);
    for (std::size_t i = 0; i < rest.count; ++i) {
        list.groups[list.count++] = rest.groups[i];
    }
    return list;
}
