// SPDX-License-Identifier: MIT
// What the integer search knows of its rows, part of integer_search.inl: rounded copies, and bounds on what they lost.

/// What the bounds need to know of a row. Lengths are of the shifted row, and upper bounds.
struct alignas(32) row_facts {
    float norm;
    float square;        ///< Squared length, but for rounding.
    float coarse_error;  ///< |row - its eight-bit copy|
    float coarse_step;   ///< Of the eight-bit copy.
    float rounding;      ///< How far float32 sums may be from the sum in real numbers.
    std::int32_t start;  ///< What sums start from; undoes what was added to weights.
    bool usable;         ///< Finite, and neither tiny nor huge.
};

struct workspace {
    alignas(64) float upper[chunk_rows * segment_groups * 16];    ///< [row, group, lane]: no score is above.
    alignas(64) float lower[chunk_rows * marks];                  ///< [row, group % 2, lane]: some score is not below.
    alignas(64) float upper_bounds[chunk_rows * segment_groups];  ///< [row, group]: from the sums to `upper`,
    alignas(64) float lower_bounds[chunk_rows * segment_groups];  ///< and to `lower`.
    alignas(64) float products[batch_rows * segment_groups];      ///< [row, group]: with the groups' centers
    alignas(64) float reaches[chunk_rows * segment_groups];       ///< [row, group]: no codeword's score is above.
    alignas(64) float shifted[chunk_rows * most_integer_dim];     ///< [row, integer_fine_dim]
    alignas(64) std::int8_t coarse[chunk_rows * most_integer_dim];  ///< [tile, channel / 4, row of the tile, 4]
    alignas(64) std::int16_t fine[chunk_rows * most_integer_dim];   ///< [row, integer_fine_dim]
    alignas(64) std::int32_t flags[chunk_rows * 16];                ///< [row, lane]
    alignas(64) float scores[chunk_rows * most_quads * 4];          ///< 16-bit scores of the candidates
    std::uint16_t quads[chunk_rows * most_quads];                   ///< The candidates, row by row.
    std::uint8_t rows[chunk_rows * most_quads];                     ///< Whose they are.
    row_facts facts[chunk_rows];
    float limits[chunk_rows];  ///< 16-bit scores below cannot be among the best.
};

inline float square_root(float value) {
    return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(value)));
}

/// The channels from `j` on of a row that is shifted by the codebook's center; zeros behind the last.
inline reg shifted_part(const float* x, std::size_t dim, std::size_t j, const integer_codebook& book) {
    const std::size_t left = dim > j ? dim - j : 0;
    return subtract(load_first(x + (dim - left), left), load(book.center + j));
}

/// Shifts a row by the codebook's center and measures it.
inline void measure_row(const float* x, std::size_t dim, const integer_codebook& book, float* shifted,
                        row_facts& facts) {
    const float zero = 0.0F;
    reg tops = broadcast(&zero);
    reg squares = tops;
    for (std::size_t j = 0; j < integer_fine_dim(dim); j += lanes) {
        const reg value = shifted_part(x, dim, j, book);
        tops = max(tops, magnitude(value));
        squares = fma(value, value, squares);
        store(shifted + j, value);
    }
    const float top = largest(tops);  // may have lost a NaN; the squares have not
    facts.square = sum(squares);
    facts.norm = square_root(facts.square) * 1.0001F;  // the factor is above the rounding of the sum itself
    // Outside, the bounds would have to care for overflow and denormals.
    facts.usable = top > 1e-10F && top < 1e10F && facts.norm < 1e12F;
    facts.coarse_step = facts.usable ? top * (1.0F / 127.0F) : 1.0F;
    facts.rounding =
        static_cast<float>(dim + 24) * 6.0e-8F * (2.0F * (facts.norm + book.center_norm) * book.norm + book.offset);
}

/// Rounds a shifted row to eight bits and to 16, these in steps of 1/32000 of its length: then no sum of products can
/// leave 32 bits. `in_tile` rows stand in the row's tile of eight-bit copies.
inline void round_row(const float* shifted, std::size_t dim, std::size_t in_tile, const integer_codebook& book,
                      std::int8_t* coarse, std::int16_t* fine, row_facts& facts) {
    const float zero = 0.0F;
    const float minus_step = -facts.coarse_step;
    const float inverse = 1.0F / facts.coarse_step;
    const float fine_inverse = 32000.0F / facts.norm;
    const reg none = broadcast(&zero);
    reg errors = none;
    ireg total = broadcast(0);
    const std::size_t quarters = (dim + 3) / 4;
    for (std::size_t j = 0; j < integer_fine_dim(dim); j += lanes) {
        const reg value = facts.usable ? load(shifted + j) : none;
        const ireg rounded = to_integers(multiply(value, broadcast(&inverse)));
        const reg lost = fma(to_floats(rounded), broadcast(&minus_step), value);
        errors = fma(lost, lost, errors);
        total = add(total, rounded);
        std::int8_t bytes[lanes];
        store(bytes, rounded);
        for (std::size_t i = 0; i < lanes / 4 && j / 4 + i < quarters; ++i) {
            std::memcpy(coarse + (j / 4 + i) * in_tile * 4, bytes + i * 4, 4);
        }
        store(fine + j, to_integers(multiply(value, broadcast(&fine_inverse))));
    }
    facts.coarse_error = square_root(sum(errors)) * 1.0001F + 1e-5F * facts.coarse_step;
    facts.start = magic_bits - book.coarse_zero * static_cast<std::int32_t>(sum(to_floats(total)));
}

/// Products of `Rows` shifted rows with the centers of 32 groups, in float32.
template <int Rows>
inline void multiply_centers(const float* shifted, std::size_t fine_dim, const float* centers, std::size_t dim,
                             float* products) {
    constexpr int registers = static_cast<int>(segment_groups) / lanes;
    const float zero = 0.0F;
    reg sums[Rows][registers];
    RVQKV_UNROLL
    for (int v = 0; v < Rows; ++v) {
        RVQKV_UNROLL
        for (int w = 0; w < registers; ++w) {
            sums[v][w] = broadcast(&zero);
        }
    }
    for (std::size_t j = 0; j < dim; ++j) {
        reg center[registers];
        RVQKV_UNROLL
        for (int w = 0; w < registers; ++w) {
            const int lane = w * lanes;
            center[w] = load(centers + (static_cast<std::size_t>(lane / 16) * dim + j) * 16 + lane % 16);
        }
        RVQKV_UNROLL
        for (int v = 0; v < Rows; ++v) {
            const reg value = broadcast(shifted + static_cast<std::size_t>(v) * fine_dim + j);
            RVQKV_UNROLL
            for (int w = 0; w < registers; ++w) {
                sums[v][w] = fma(value, center[w], sums[v][w]);
            }
        }
    }
    RVQKV_UNROLL
    for (int v = 0; v < Rows; ++v) {
        RVQKV_UNROLL
        for (int w = 0; w < registers; ++w) {
            store(products + v * static_cast<int>(segment_groups) + w * lanes, sums[v][w]);
        }
    }
}

/// From eight-bit sums to bounds of the scores, for each of 32 groups. `products` are those with the groups' centers,
/// null if they have none.
inline void set_bounds(const row_facts& facts, const integer_codebook& book, std::size_t first_group,
                       const float* products, float* upper, float* lower) {
    const float length = facts.norm + facts.coarse_error;
    const float magic_error = 6.0F;
    const float minus_magic = -magic;
    for (std::size_t g = 0; g < segment_groups; g += lanes) {
        const reg unit = multiply(broadcast(&facts.coarse_step), load(book.coarse_steps + first_group + g));
        reg bound = fma(unit, broadcast(&magic_error), broadcast(&facts.rounding));
        bound = fma(broadcast(&facts.coarse_error), load(book.norms + first_group + g), bound);
        bound = fma(broadcast(&length), load(book.coarse_errors + first_group + g), bound);
        reg shift = multiply(unit, broadcast(&minus_magic));
        if (products != nullptr) {
            shift = add(shift, load(products + g));
        }
        store(upper + g, add(shift, bound));
        store(lower + g, subtract(shift, bound));
    }
}

/// What no score of a group's codewords is above, for each of 32 groups, by the triangle inequality: a codeword is at
/// least as far as the group's center, less the group's radius. With half squared distances h, a score is
/// |row|^2 / 2 - h + (offset + |codeword|^2 / 2).
inline void set_reaches(const row_facts& facts, const integer_codebook& book, std::size_t first_group, std::size_t dim,
                        const float* products, float* reaches) {
    const float zero = 0.0F;
    const float minus_two = -2.0F;
    const float minus_half = -0.4999F;  // a little less, for the rounding of the distance
    const float length = facts.norm + book.norm;
    const float lost = static_cast<float>(dim + 24) * 6.0e-8F * 2.0F * length * length;
    const float nearer = facts.square - lost;
    const float above = 0.5F * facts.square + lost + facts.rounding;
    for (std::size_t g = 0; g < segment_groups; g += lanes) {
        const reg square = fma(broadcast(&minus_two), load(products + g),
                               add(load(book.center_squares + first_group + g), broadcast(&nearer)));
        const reg center_distance = square_roots(max(square, broadcast(&zero)));
        const reg distance = max(subtract(center_distance, load(book.norms + first_group + g)), broadcast(&zero));
        const reg top = add(load(book.tops + first_group + g), broadcast(&above));
        store(reaches + g, fma(multiply(distance, distance), broadcast(&minus_half), top));
    }
}

/// Bit `g` says that group `g`'s reach is at least `limit`.
inline std::uint32_t groups_reaching(const float* reaches, float limit) {
    std::uint32_t found = 0;
    for (std::size_t g = 0; g < segment_groups; g += lanes) {
        found |= bits(at_least(load(reaches + g), broadcast(&limit))) << g;
    }
    return found;
}

/// The group with the farthest reach, as a bit.
inline std::uint32_t first_group(const float* reaches) {
    reg top = load(reaches);
    for (std::size_t g = lanes; g < segment_groups; g += lanes) {
        top = max(top, load(reaches + g));
    }
    const std::uint32_t at_top = groups_reaching(reaches, largest(top));
    return at_top & (~at_top + 1);
}

/// Puts rows with a group's center nearest that is the same side by side (`order`: their numbers), so that tiles of
/// them have many groups in common that they need not look at. Precondition: one segment of groups.
inline void sort_rows(const float* x, std::size_t rows, std::size_t stride, std::size_t dim,
                      const integer_codebook& book, std::size_t groups, std::uint8_t* order, workspace& work) {
    const float minus_half = -0.5F;
    const std::size_t fine_dim = integer_fine_dim(dim);
    std::uint8_t nearest_group[batch_rows];
    std::uint8_t ends[segment_groups] = {};
    for (std::size_t first = 0; first < rows; first += center_rows) {
        const std::size_t count = rows - first < center_rows ? rows - first : center_rows;
        for (std::size_t v = 0; v < count; ++v) {
            const float* const row = x + (first + v) * stride;
            for (std::size_t j = 0; j < fine_dim; j += lanes) {
                store(work.shifted + v * fine_dim + j, shifted_part(row, dim, j, book));
            }
        }
        float* const products = work.products + first * segment_groups;
        multiply_centers<center_rows>(work.shifted, fine_dim, book.group_centers, dim, products);
        for (std::size_t v = 0; v < count; ++v) {
            alignas(64) float nearness[segment_groups];
            for (std::size_t g = 0; g < segment_groups; g += lanes) {
                const reg product = load(products + v * segment_groups + g);
                store(nearness + g, fma(load(book.center_squares + g), broadcast(&minus_half), product));
            }
            for (std::size_t g = groups; g < segment_groups; ++g) {
                nearness[g] = -__builtin_inff();
            }
            const auto group = static_cast<std::uint8_t>(__builtin_ctz(first_group(nearness) | 1U << (groups - 1)));
            nearest_group[first + v] = group;
            ++ends[group];
        }
    }
    std::uint8_t place = 0;
    for (std::uint8_t& end : ends) {
        place = static_cast<std::uint8_t>(place + end);
        end = static_cast<std::uint8_t>(place - end);
    }
    for (std::size_t v = 0; v < rows; ++v) {
        order[ends[nearest_group[v]]++] = static_cast<std::uint8_t>(v);
    }
}
