// SPDX-License-Identifier: MIT
// Scans of codes by small tables, compiled for every instruction set that looks bytes up in registers; part of that
// level's header. Beside what kernels.inl names:
//   breg: `byte_lanes` bytes, each a token's;   scan_strips: as many of them are summed up at once
//   unpacker<Slots>(bits).unpack(row, codes): 64 codes to bytes, of which a table of so many slots reads what it needs
//   small_table<Slots>(table).at(codes);   load_bytes, keep (in a register), add_bytes
//   add_digits(low, high, sums): adds `low + score_base * high` to a register's words, in an order that
//   order_sums(sums, words) undoes;   load_words(uint16_t*): as floats
//   add_products(ireg&, breg weights, breg values): dot products of four bytes
//   max, min, largest, smallest, multiply, divide, to_integers, to_floats, store(uint8_t*, ireg)
//   multiply_nonzero(a, b): 0 where `a` is 0;   max_of_quads: the largest of four neighbours, in each of them;
//   store_quads: every fourth number;   sum_of_lanes(float*): of `value_lanes`, halves first

inline constexpr std::size_t quad_tokens = scan_quad * tile_tokens;
inline constexpr std::size_t block_tokens = scan_block * tile_tokens;
inline constexpr std::size_t scan_groups = 16;  // whose codes stand unpacked
inline constexpr std::size_t scan_queries = 8;  // whose sums stand on the stack

// Always inlined: GCC takes a function that only prefetches for one without effect, and drops calls of it.
RVQKV_ALWAYS_INLINE void prefetch(const std::byte* from) {
    __builtin_prefetch(from);
}

#include "rvqkv/simd/small_keys.inl"

#include "rvqkv/simd/small_values.inl"

inline constexpr small_scan_kernels small_scan = {fill_scores, scan_scores,   round_weights,
                                                  add_values,  multiply_rows, add_lanes};
