// SPDX-License-Identifier: MIT
// The exact integer search. Eight-bit dot products find the few codewords that can be nearest, 16-bit ones settle
// nearly all the rest, and float32 decides what is left. The codes are those of the float32 search, always: every
// estimate comes with a bound on its distance from the float32 score, and only what lies outside is dropped.
//
// Included inside a namespace within that of a level (`float32`), where are defined:
//   add_products(sums, codewords, row): unsigned by signed bytes, the products of four channels added to each lane
//   most_coarse_zero: up to which `integer_codebook::coarse_zero` these do not overflow
//   sum_rows, sum_registers: the rows and registers of codewords that the eight-bit pass has sums for at a time; the
//     registers are whole blocks, and divide a group
//   integer_level: what the table of kernels says it is
// and in that of the level, beside what `kernels.inl` asks for:
//   load(uint8_t*), load(int16_t*): a register full;   load_first: zeros beyond `count` lanes
//   store(int8_t*, ireg), store(int16_t*, ireg): `lanes` of them, saturated
//   multiply, max, magnitude, to_integers (nearest), to_floats, as_floats (the same bits), sum, largest (of the lanes)
//   at_least, add_where, nonzero (bit `i` says lane `i`), is_before: greater, or equal and of lower code
//   multiply_pairs: 16-bit products, added in pairs;   sum_each: the sums of the lanes of each of four registers
// No include guard: that is the point.

inline constexpr std::size_t batch_rows = 192;     // rows that are sorted together
inline constexpr std::size_t chunk_rows = 12;      // rows that are searched together; their maxima fill half of L1
inline constexpr std::size_t segment_groups = 32;  // groups that are searched together: 2,048 codewords
inline constexpr std::size_t marks = 32;           // scores of a row, each reached by another codeword
inline constexpr std::size_t max_several = 16;     // codewords of a list beyond which float32 is used
inline constexpr int center_rows = lanes / 4;      // whose products with groups' centers fit in registers
inline constexpr std::size_t most_quads = 64;      // candidates of a row beyond which float32 is quicker

/// Eight-bit sums start from the bits of this float, so that they are its value plus the sum: no conversion. Holds for
/// sums below 2^22, which 256 channels cannot reach.
inline constexpr float magic = 12582912.0F;  // 1.5 * 2^23
inline constexpr std::int32_t magic_bits = 0x4b400000;

#include "rvqkv/simd/integer_rows.inl"

#include "rvqkv/simd/integer_candidates.inl"

#include "rvqkv/simd/integer_settle.inl"

/// Searches a codebook that has integer copies: the `count` nearest codewords of each row. `scores` may be null if that
/// is one.
inline void search(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book, std::size_t count,
                   row_families families, code_t* codes, float* scores) {
    const integer_codebook& integers = *book.integers;
    const std::size_t all_groups = (book.codewords + integer_group - 1) / integer_group;
    const std::size_t quarters = (book.dim + 3) / 4;
    const std::size_t fine_dim = integer_fine_dim(book.dim);
    const bool need_score = scores != nullptr || all_groups > segment_groups;
    const bool has_centers = integers.group_centers != nullptr;
    const bool may_skip = count == 1 && has_centers;
    const bool may_sort = may_skip && all_groups <= segment_groups;
    workspace work;
    group_list whole = listed(~std::uint32_t{0});
    std::uint8_t order[batch_rows];
    for (std::size_t first = 0; first < rows; first += chunk_rows) {
        const std::size_t in_batch = first % batch_rows;
        if (in_batch == 0) {
            const std::size_t left = rows - first < batch_rows ? rows - first : batch_rows;
            if (may_sort) {
                sort_rows(x + first * stride, left, stride, book.dim, integers, all_groups, order, work);
            } else {
                for (std::size_t v = 0; v < left; ++v) {
                    order[v] = static_cast<std::uint8_t>(v);
                }
            }
        }
        const std::size_t in_chunk = rows - first < chunk_rows ? rows - first : chunk_rows;
        std::size_t numbers[chunk_rows];
        const float* chunk_x[chunk_rows];
        for (std::size_t v = 0; v < in_chunk; ++v) {
            numbers[v] = first - in_batch + order[in_batch + v];
            chunk_x[v] = x + numbers[v] * stride;
        }
        found best[chunk_rows];
        for (std::size_t v = 0; v < in_chunk; ++v) {
            measure_row(chunk_x[v], book.dim, integers, work.shifted + v * fine_dim, work.facts[v]);
            best[v] = {-__builtin_inff(), max_codewords, work.facts[v].usable};
        }
        for (std::size_t v = 0; v < in_chunk; ++v) {
            const std::size_t tile = v / sum_rows * sum_rows;
            round_row(work.shifted + v * fine_dim, book.dim, in_chunk - tile < sum_rows ? in_chunk - tile : sum_rows,
                      integers, work.coarse + tile * quarters * 4 + (v - tile) * 4, work.fine + v * fine_dim,
                      work.facts[v]);
        }
        for (std::size_t i = first * count; count > 1 && i < (first + in_chunk) * count; ++i) {
            codes[i] = 0;  // these are in order
            scores[i] = -__builtin_inff();
        }
        for (std::size_t segment = 0; segment < all_groups; segment += segment_groups) {
            const std::size_t groups = all_groups - segment < segment_groups ? all_groups - segment : segment_groups;
            whole.count = groups;
            for (std::size_t v = 0; v < in_chunk && has_centers && !may_sort; v += center_rows) {
                multiply_centers<center_rows>(work.shifted + v * fine_dim, fine_dim,
                                              integers.group_centers + segment * book.dim, book.dim,
                                              work.products + v * segment_groups);
            }
            const float* products[chunk_rows];
            for (std::size_t v = 0; v < in_chunk; ++v) {
                products[v] = work.products + (may_sort ? order[in_batch + v] : v) * segment_groups;
            }
            for (std::size_t v = 0; v < in_chunk; ++v) {
                set_bounds(work.facts[v], integers, segment, has_centers ? products[v] : nullptr,
                           work.upper_bounds + v * segment_groups, work.lower_bounds + v * segment_groups);
                for (std::size_t i = 0; i < marks; ++i) {
                    work.lower[v * marks + i] = -__builtin_inff();
                }
            }
            group_list visited[(chunk_rows + sum_rows - 1) / sum_rows];
            for (std::size_t v = 0; v < in_chunk; v += sum_rows) {
                const std::size_t in_tile = in_chunk - v < sum_rows ? in_chunk - v : sum_rows;
                if (may_skip) {
                    visited[v / sum_rows] =
                        visit_reaching(v, in_tile, integers, book.dim, segment, groups, products, work);
                } else {
                    coarse_rows<sum_rows>(in_tile, work.coarse + v * quarters * 4, integers, quarters, segment, whole,
                                          v, work);
                }
            }
            set_limits(in_chunk, count, families, first, book.dim, integers, work);
            for (std::size_t v = 0; v < in_chunk; ++v) {
                flag_quads(work.upper + v * segment_groups * 16, work.limits[v],
                           may_skip ? visited[v / sum_rows] : whole, !may_skip, work.flags + v * 16);
            }
            std::size_t candidates = 0;
            for (std::size_t v = 0; v < in_chunk; ++v) {
                // Not -infinity, which padding would reach.
                work.limits[v] = work.limits[v] > -__FLT_MAX__ ? work.limits[v] : -__FLT_MAX__;
                if (best[v].ok) {
                    candidates = list_quads(v, segment, candidates, best[v].ok, work);
                }
            }
            score_quads(integers, fine_dim, candidates, work);
            if (count == 1) {
                settle(chunk_x, in_chunk, book, candidates, need_score, best, work);
            } else {
                settle_several(chunk_x, in_chunk, book, candidates, count, segment == 0, best, codes + first * count,
                               scores + first * count, work);
            }
        }
        for (std::size_t v = 0; v < in_chunk; ++v) {
            const std::size_t at = numbers[v] * count;
            if (!best[v].ok) {
                if (count == 1) {
                    float32::nearest(chunk_x[v], 1, stride, book, codes + at,
                                     scores == nullptr ? nullptr : scores + at);
                } else {
                    float32::nearest_several(chunk_x[v], 1, stride, book, count, {}, codes + at, scores + at);
                }
            } else if (count == 1) {
                codes[at] = static_cast<code_t>(best[v].code);
                if (scores != nullptr) {
                    scores[at] = best[v].score;
                }
            }
        }
    }
}

inline bool has_copies(const packed_codebook& book) {
    return book.integers != nullptr && book.integers->coarse_zero <= most_coarse_zero;
}

inline void nearest(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book, code_t* codes,
                    float* scores) {
    if (has_copies(book)) {
        search(x, rows, stride, book, 1, {}, codes, scores);
    } else {
        float32::nearest(x, rows, stride, book, codes, scores);
    }
}

inline void nearest_several(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book,
                            std::size_t count, row_families families, code_t* codes, float* scores) {
    if (has_copies(book) && count <= max_several) {
        search(x, rows, stride, book, count, families, codes, scores);
    } else {
        float32::nearest_several(x, rows, stride, book, count, families, codes, scores);
    }
}

inline constexpr kernel_table kernels = [] {
    kernel_table table = float32::kernels;
    table.level = integer_level;
    table.nearest = nearest;
    table.nearest_several = nearest_several;
    return table;
}();
