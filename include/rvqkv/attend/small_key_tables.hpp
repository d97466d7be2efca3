// SPDX-License-Identifier: MIT
/// @file
/// Scores of queries with keys coded by small codebooks (up to 256 codewords), straight from the pages: tables of what
/// each codeword adds to a score fit in registers and the L1 cache, and the codes are all that comes from memory.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/readers.hpp"
#include "rvqkv/attend/small_tables_shape.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "rvqkv/simd/kernels.hpp"
#include "rvqkv/simd/small_scan.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// Scores of queries with the keys that codes stand for, by tables: `<query, codeword>` is worked out once for each
/// place and codeword, rounded, and what is left for each token is to add up entries. Immutable; any number of threads
/// may use one, each with scratch memory of its own.
/// Numerics: an entry is rounded to 1/1848 of the widest table's range; the entries' sum is exact. Scores are the same
///           bits at every SIMD level.
class small_key_tables {
public:
    /// Whether there can be tables for such a codebook.
    [[nodiscard]] static bool supports(const codebook_shape& shape) noexcept {
        return shape.codewords != 0 && code_bits(shape.codewords) <= most_scan_bits && shape.depths != 0 &&
               shape.depths <= most_value_depths && shape.dim != 0;
    }
    /// Tables for heads of `head_dim` channels with the codebook `[depths, codewords, dim]`.
    /// Errors: `unsupported` where `supports` says no; `invalid_argument` for sizes that do not fit; `out_of_memory`.
    template <TensorElement Weight>
    [[nodiscard]] static result<small_key_tables> create(const codebook_shape& shape, std::span<const Weight> weights,
                                                         std::size_t head_dim) {
        auto checked = detail::small_tables_shape::create(shape, weights.size(), head_dim);
        if (!checked) {
            return checked.error();
        }
        small_key_tables made(checked.value());
        auto book = aligned_buffer<float>::allocate(shape.depths * shape.dim * made.shape_.slots);
        if (!book) {
            return book.error();
        }
        made.book_ = std::move(book).value();
        float* at = made.book_.data();
        for (std::size_t depth = 0; depth < shape.depths; ++depth) {
            for (std::size_t j = 0; j < shape.dim; ++j) {
                for (std::size_t c = 0; c < made.shape_.slots; ++c) {
                    const std::size_t codeword = c < shape.codewords ? c : 0;
                    *at++ = to_float(weights[(depth * shape.codewords + codeword) * shape.dim + j]);
                }
            }
        }
        return made;
    }
    [[nodiscard]] std::size_t bytes() const noexcept { return book_.bytes(); }

    /// The most that a score by the first `depths` depths can be off, before the token's scale, for each unit of the
    /// query's largest magnitude.
    [[nodiscard]] float worst_error(std::size_t depths) const noexcept {
        float widest = 0.0F;
        float ranges = 0.0F;
        float sizes = 0.0F;
        const float* at = book_.data();
        for (std::size_t depth = 0; depth < shape_.book.depths; ++depth) {
            float range = 0.0F;
            for (std::size_t j = 0; j < shape_.book.dim; ++j, at += shape_.slots) {
                const auto [low, high] = std::minmax_element(at, at + shape_.slots);
                range += *high - *low;
                sizes += std::max(std::fabs(*low), std::fabs(*high));
            }
            widest = std::max(widest, range);
            ranges += range;
        }
        const auto groups = static_cast<float>(shape_.groups);
        const float places = groups * static_cast<float>(shape_.book.depths);
        const float step = std::max(widest / static_cast<float>(score_base * score_base - 1),
                                    groups * ranges / (static_cast<float>(most_score_sum) - places));
        return 0.501F * step * groups * static_cast<float>(depths) + 1e-5F * groups * sizes;
    }

    /// Bytes of scratch memory, aligned to 64, for so many queries.
    [[nodiscard]] std::size_t scratch_bytes(std::size_t queries) const noexcept {
        return parts(nullptr, queries).bytes;
    }

    /// Makes the tables of `queries` queries `[queries, head_dim]`, channels in the codec's order, rows side by side.
    void prepare(const float* x, std::size_t queries, std::byte* scratch,
                 const kernel_table& kernels = best_kernels()) const noexcept {
        const scratch_parts to = parts(scratch, queries);
        const std::size_t head_dim = shape_.groups * shape_.book.dim;
        const std::size_t table_bytes = shape_.groups * 2 * shape_.slots;
        for (std::size_t i = 0; i < queries; ++i, x += head_dim) {
            kernels.small_scan->fill_scores(x, book_.data(), shape_.book.depths, shape_.groups, shape_.book.dim,
                                            shape_.slots, to.products, to.digits + i * table_bytes,
                                            queries * table_bytes, to.steps + i, to.starts + i, queries);
            float zeros = 0.0F;  // or NaN
            for (std::size_t j = 0; j < head_dim; ++j) {
                zeros += 0.0F * x[j];
            }
            for (std::size_t depth = 0; depth < shape_.book.depths; ++depth) {
                to.starts[depth * queries + i] += zeros;
            }
        }
    }

    /// `scores[i * stride + token]`, of query `i` with each token of the tiles, the token's scale included; by the
    /// first `depths` depths. Scores of tokens that the page does not hold mean nothing, and may be NaN.
    /// Preconditions: `prepare` filled the scratch memory for as many queries; the tiles' pages have this layout.
    void scores(page_tiles tiles, const coded_layout& layout, std::size_t head, std::size_t depths, std::size_t queries,
                float* scores, std::size_t stride, std::byte* scratch,
                const kernel_table& kernels = best_kernels()) const noexcept {
        constexpr std::size_t at_once = detail::small_tables_shape::most_tiles;
        const scratch_parts from = parts(scratch, queries);
        RVQKV_ASSERT(depths >= 1);
        const score_tables tables = {from.digits, queries, from.steps, from.starts + (depths - 1) * queries};
        for (std::size_t first = 0; first < tiles.count; first += at_once) {
            const page_tiles now = tiles.part(first, at_once);
            detail::small_tables_shape::located located;
            shape_.locate(now, layout, head, depths, located);
            alignas(64) float scales[at_once * tile_tokens];
            const float* const scale = detail::small_tables_shape::load_scales(now, layout, head, kernels, scales);
            kernels.small_scan->scan_scores(located.tiles, tables, scale, scores + first * tile_tokens, stride);
        }
    }

private:
    explicit small_key_tables(const detail::small_tables_shape& shape) noexcept : shape_(shape) {}

    struct scratch_parts {
        float* steps;
        float* starts;
        float* products;
        std::uint8_t* digits;
        std::size_t bytes;
    };
    [[nodiscard]] scratch_parts parts(std::byte* scratch, std::size_t queries) const noexcept {
        detail::small_tables_shape::carver memory(scratch);
        const std::size_t entries = shape_.book.depths * shape_.groups * shape_.slots;
        scratch_parts made{};
        made.steps = memory.take<float>(queries);
        made.starts = memory.take<float>(shape_.book.depths * queries);
        made.products = memory.take<float>(entries + shape_.book.depths * shape_.groups);
        made.digits = memory.take<std::uint8_t>(2 * queries * entries);
        made.bytes = memory.used();
        return made;
    }

    detail::small_tables_shape shape_;
    aligned_buffer<float> book_;  // [depths, dim, slots]
};

RVQKV_NAMESPACE_END
