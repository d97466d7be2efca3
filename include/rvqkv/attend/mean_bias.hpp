// SPDX-License-Identifier: MIT
/// @file
/// What the mean that was taken out of coded keys adds to scores: <query, turn(mean, position)>, for all positions of a
/// tile, from a table and without a byte from the cache.
#pragma once

#include "rvqkv/attend/rope.hpp"
#include "rvqkv/attend/tile_rope.hpp"
#include "rvqkv/attend/token_chunk.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// A query's bias is a sum over pairs of `a cos + b sin` of the position's angle. Pairs that turn little within a tile
/// are taken together: their sum is a polynomial of the place in the tile. Threads:  immutable; safe to share.
/// Numerics: as float32 sums; the polynomial errs by 10^-7 of the terms.
class mean_bias {
public:
    mean_bias() = default;

    /// `plain` is `source` for channels in the model's order. Errors: `out_of_memory`.
    [[nodiscard]] static result<mean_bias> create(const rope& source, const tile_rope& plain,
                                                  const kernel_table& kernels) {
        mean_bias made;
        made.kernels_ = &kernels;
        made.pairs_ = source.pairs();
        made.find_fast(source);
        auto table = aligned_buffer<float>::allocate(tile_tokens * made.columns());
        auto series = aligned_buffer<float>::allocate(terms * 2 * made.slow());
        if (!table || !series) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        made.table_ = std::move(table).value();
        made.series_ = std::move(series).value();
        made.fill(source, plain);
        return made;
    }

    [[nodiscard]] std::size_t bytes() const noexcept { return table_.bytes() + series_.bytes(); }

    /// Scratch memory for some rows of queries.
    struct scratch {
        float* terms = nullptr;      // [row, 2 * pairs]: a and b of fast pairs, then of slow ones
        float* constants = nullptr;  // [row]: of channels that are not turned
        float* turned = nullptr;     // [row, 2 * pairs]
        float* series = nullptr;     // [row, terms]
        float* columns = nullptr;    // [row, columns]
        float* bias = nullptr;       // [row, tile_tokens]
        std::byte* cursor = nullptr;

        scratch() = default;
        scratch(const mean_bias& parent, std::size_t rows, detail::scratch_dealer& dealer) noexcept
            : terms(dealer.take<float>(rows * 2 * parent.pairs_)),
              constants(dealer.take<float>(rows)),
              turned(dealer.take<float>(rows * 2 * parent.pairs_)),
              series(dealer.take<float>(rows * mean_bias::terms)),
              columns(dealer.take<float>(rows * parent.columns())),
              bias(dealer.take<float>(rows * tile_tokens)),
              cursor(dealer.take<std::byte>(tile_rope::cursor::scratch_bytes(parent.pairs_))) {}
    };

    /// Makes scratch ready for queries `[rows, head_dim]` and a head's mean `[head_dim]`, both in the model's order.
    void prepare(row_block<const float> queries, const float* mean, std::size_t head_dim, const tile_rope& plain,
                 const scratch& to) const noexcept {
        for (std::size_t row = 0; row < queries.count; ++row) {
            const float* const query = queries.data + row * queries.stride;
            float* const out = to.terms + row * 2 * pairs_;
            float constant = 0.0F;
            for (std::size_t i = 2 * pairs_; i < head_dim; ++i) {  // turned channels come first, in any form of pairs
                constant += query[i] * mean[i];
            }
            to.constants[row] = constant;
            for (std::size_t pair = 0; pair < pairs_; ++pair) {
                const std::size_t first = plain.first_place(pair);
                const std::size_t second = plain.second_place(pair);
                float* const a = pair < fast_ ? out + pair : out + fast_ + pair;
                a[0] = query[first] * mean[first] + query[second] * mean[second];
                a[pair < fast_ ? fast_ : slow()] = query[second] * mean[first] - query[first] * mean[second];
            }
        }
    }

    /// `out[row * out_stride + i]` gains the bias of token `i`, counted over all tiles; `positions` are those of the
    /// tiles' first tokens.
    void add(const std::int64_t* positions, std::size_t tiles, std::size_t rows, const tile_rope& plain, float* out,
             std::size_t out_stride, const scratch& with) const noexcept {
        std::fill_n(with.bias, rows * tile_tokens, 0.0F);
        const channel_pairs places[] = {{0, fast_, 1, fast_, 0}, {2 * fast_, 2 * fast_ + slow(), 1, slow(), fast_}};
        tile_rope::cursor cursor(plain, with.cursor);
        for (std::size_t tile = 0; tile < tiles; ++tile, out += tile_tokens) {
            if (pairs_ != 0) {
                cursor.seek(positions[tile]);
                std::memcpy(with.turned, with.terms, rows * 2 * pairs_ * sizeof(float));
                cursor.turn_back(with.turned, rows, 2 * pairs_, places, 2);
                fill_columns(rows, with);
                kernels_->attention.rows<float>().products(table_.data(), tile_tokens / search_block,
                                                           {with.columns, rows, columns()}, columns(), with.bias,
                                                           tile_tokens);
            }
            for (std::size_t row = 0; row < rows; ++row) {
                kernels_->attention.add(out + row * out_stride, with.bias + row * tile_tokens, with.constants[row],
                                        tile_tokens);
            }
        }
    }

private:
    /// Terms of the polynomial, and how far (in radians, from the middle of a tile) it may be used: the next term is
    /// 0.5^8 / 8! then.
    static constexpr std::size_t terms = 8;
    static constexpr double most_angle = 0.5;
    static constexpr double half = static_cast<double>(tile_tokens) / 2.0;

    [[nodiscard]] std::size_t slow() const noexcept { return pairs_ - fast_; }
    [[nodiscard]] std::size_t columns() const noexcept { return 2 * fast_ + (slow() == 0 ? 0 : terms); }

    void find_fast(const rope& source) noexcept {
        for (std::size_t pair = 0; pair < pairs_; ++pair) {
            if (std::fabs(source.frequency(pair)) * half > most_angle) {
                fast_ = pair + 1;
            }
        }
        fast_ = 2 * slow() <= terms ? pairs_ : fast_;
    }

    void fill(const rope& source, const tile_rope& plain) noexcept {
        for (std::size_t token = 0; token < tile_tokens; ++token) {
            const auto entry = [&](std::size_t column) -> float& {
                return table_[(token / search_block * columns() + column) * search_block + token % search_block];
            };
            for (std::size_t i = 0; i < fast_; ++i) {
                entry(i) = plain.table()[token * 2 * pairs_ + i];
                entry(fast_ + i) = plain.table()[token * 2 * pairs_ + pairs_ + i];
            }
            double power = 1.0;
            for (std::size_t k = 2 * fast_; k < columns(); ++k) {
                entry(k) = static_cast<float>(power);
                power *= (static_cast<double>(token) - half) / half;
            }
        }
        // a cos(t) + b sin(t) around the middle of the tile: its k-th derivative is turned by k quarters.
        for (std::size_t i = 0; i < slow(); ++i) {
            const double middle = half * source.frequency(fast_ + i);
            double factor = source.attention_factor();
            for (std::size_t k = 0; k < terms; ++k) {
                const double angle = middle + static_cast<double>(k) * 1.57079632679489661923;
                series_[k * 2 * slow() + i] = static_cast<float>(factor * std::cos(angle));
                series_[k * 2 * slow() + slow() + i] = static_cast<float>(factor * std::sin(angle));
                factor *= middle / static_cast<double>(k + 1);
            }
        }
    }

    void fill_columns(std::size_t rows, const scratch& with) const noexcept {
        if (slow() != 0) {
            kernels_->attention.rows<float>().scores({series_.data(), terms, 2 * slow()},
                                                     {with.turned + 2 * fast_, rows, 2 * pairs_}, 2 * slow(),
                                                     with.series, terms);
        }
        for (std::size_t row = 0; row < rows; ++row) {
            float* const to = with.columns + row * columns();
            std::memcpy(to, with.turned + row * 2 * pairs_, 2 * fast_ * sizeof(float));
            if (slow() != 0) {
                std::memcpy(to + 2 * fast_, with.series + row * terms, terms * sizeof(float));
            }
        }
    }

    const kernel_table* kernels_ = nullptr;
    std::size_t pairs_ = 0;
    std::size_t fast_ = 0;          // pairs before this are summed one by one
    aligned_buffer<float> table_;   // [tile_tokens / 16, columns, 16]
    aligned_buffer<float> series_;  // [terms, 2 * slow]
};

RVQKV_NAMESPACE_END
