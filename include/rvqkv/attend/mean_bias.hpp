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

/// A query's bias is a sum over pairs of `a cos + b sin` of the position's angle (see `turning_pairs`).
/// Threads:  immutable; safe to share.
/// Numerics: as float32 sums; the polynomial of the slow pairs errs by 10^-7 of their lengths.
class mean_bias {
public:
    mean_bias() = default;

    /// Errors: `out_of_memory`.
    [[nodiscard]] static result<mean_bias> create(const rope& source, const kernel_table& kernels) {
        mean_bias made;
        made.kernels_ = &kernels;
        const std::size_t fast = pairs_above(source, most_angle);
        made.shape_.fast = source.pairs() - fast <= turning_pairs::terms ? source.pairs() : fast;  // if it pays
        made.shape_.slow = source.pairs() - made.shape_.fast;
        made.shape_.slowest = std::min(made.shape_.slow, source.pairs() - pairs_above(source, most_angle_of_few));
        auto middles = aligned_buffer<float>::allocate(source.pairs() * 2 * turning_pairs::span);
        auto functions = aligned_buffer<float>::allocate(made.shape_.columns() * tile_tokens);
        auto series = aligned_buffer<float>::allocate(made.shape_.slow * 2 * turning_pairs::terms);
        if (!middles || !functions || !series) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        made.middles_ = std::move(middles).value();
        made.functions_ = std::move(functions).value();
        made.series_ = std::move(series).value();
        made.fill(source);
        return made;
    }

    [[nodiscard]] std::size_t bytes() const noexcept { return middles_.bytes() + functions_.bytes() + series_.bytes(); }

    /// Scratch memory for some rows of queries, and where they were last.
    struct scratch {
        float* terms = nullptr;      // [row, 2, pairs]: a and b
        float* constants = nullptr;  // [row]: of channels that are not turned
        float* turned = nullptr;     // [row, 2, pairs]: turned back to a span's start
        float* factors = nullptr;
        tile_rope::cursor first;  // where heads begin: mostly the same for all
        tile_rope::cursor cursor;
        bool has_begun = false;

        scratch() = default;
        scratch(const mean_bias& parent, const tile_rope& plain, std::size_t rows,
                detail::scratch_dealer& dealer) noexcept
            : terms(dealer.take<float>(rows * 2 * parent.pairs())),
              constants(dealer.take<float>(rows)),
              turned(dealer.take<float>(rows * 2 * parent.pairs())),
              factors(dealer.take<float>(parent.shape_.factors())),
              first(plain, dealer.take<std::byte>(tile_rope::cursor::scratch_bytes(parent.pairs()))),
              cursor(plain, dealer.take<std::byte>(tile_rope::cursor::scratch_bytes(parent.pairs()))) {}
    };

    /// Makes scratch ready for queries `[rows, head_dim]` and a head's mean `[head_dim]`, both in the model's order.
    void prepare(row_block<const float> queries, const float* mean, std::size_t head_dim, const tile_rope& plain,
                 scratch& to) const noexcept {
        to.has_begun = false;
        for (std::size_t row = 0; row < queries.count; ++row) {
            const float* const query = queries.data + row * queries.stride;
            float* const out = to.terms + row * 2 * pairs();
            float constant = 0.0F;
            for (std::size_t i = 2 * pairs(); i < head_dim; ++i) {  // turned channels come first, in any form of pairs
                constant += query[i] * mean[i];
            }
            to.constants[row] = constant;
            for (std::size_t pair = 0; pair < pairs(); ++pair) {
                const std::size_t first = plain.first_place(pair);
                const std::size_t second = plain.second_place(pair);
                out[pair] = query[first] * mean[first] + query[second] * mean[second];
                out[pairs() + pair] = query[second] * mean[first] - query[first] * mean[second];
            }
        }
    }

    /// `out[row * out_stride + i]` gains the bias of token `i`, counted over all tiles; `positions` are those of the
    /// tiles' first tokens.
    void add(const std::int64_t* positions, std::size_t tiles, std::size_t rows, float* out, std::size_t out_stride,
             scratch& with) const noexcept {
        turning_pairs table = shape_;
        table.middles = middles_.data();
        table.functions = functions_.data();
        table.series = series_.data();
        const channel_pairs places = {0, pairs(), 1, pairs(), 0};
        for (std::size_t tile = 0; tile < tiles;) {
            const std::size_t count = neighbours(positions + tile, tiles - tile);
            if (pairs() != 0) {
                seek(positions[tile], with);
                std::memcpy(with.turned, with.terms, rows * 2 * pairs() * sizeof(float));
                with.cursor.turn_back(with.turned, rows, 2 * pairs(), &places, 1);
            }
            kernels_->attention.add_bias(table, {with.turned, rows, 2 * pairs()}, with.constants, count, with.factors,
                                         out + tile * tile_tokens, out_stride);
            tile += count;
        }
    }

private:
    /// How far (in radians, from the middle of a tile) pairs may turn for polynomials of so many terms: the next one
    /// is 2 * (angle / 2)^terms / terms! then, 10^-7.
    static constexpr double most_angle = 2.6;
    static constexpr double most_angle_of_few = 0.36;
    static constexpr std::size_t half = tile_tokens / 2;

    [[nodiscard]] std::size_t pairs() const noexcept { return shape_.pairs(); }

    /// Tiles from the first on that follow each other, as many as the kernel takes.
    [[nodiscard]] static std::size_t neighbours(const std::int64_t* positions, std::size_t tiles) noexcept {
        std::size_t count = 1;
        while (count < tiles && count < turning_pairs::span &&
               positions[count] == positions[0] + static_cast<std::int64_t>(count * tile_tokens)) {
            ++count;
        }
        return count;
    }

    static void seek(std::int64_t position, scratch& with) noexcept {
        if (!with.has_begun) {
            with.has_begun = true;
            with.first.start(position);
            with.cursor.follow(with.first);
        }
        with.cursor.seek(position);
    }

    /// Pairs up to the last that turns further.
    [[nodiscard]] static std::size_t pairs_above(const rope& source, double angle) noexcept {
        std::size_t above = 0;
        for (std::size_t pair = 0; pair < source.pairs(); ++pair) {
            if (std::fabs(source.frequency(pair)) * static_cast<double>(half) > angle) {
                above = pair + 1;
            }
        }
        return above;
    }

    void fill(const rope& source) noexcept {
        for (std::size_t pair = 0; pair < pairs(); ++pair) {
            float* const middles = middles_.data() + pair * 2 * turning_pairs::span;
            for (std::size_t tile = 0; tile < turning_pairs::span; ++tile) {
                const double middle = static_cast<double>(tile * tile_tokens + half) - 0.5;
                const double angle = middle * source.frequency(pair);
                middles[tile] = static_cast<float>(source.attention_factor() * std::cos(angle));
                middles[turning_pairs::span + tile] = static_cast<float>(source.attention_factor() * std::sin(angle));
            }
        }
        for (std::size_t i = 0; i < half; ++i) {
            const double place = static_cast<double>(i) + 0.5;
            const auto entry = [&](std::size_t column, std::size_t odd) -> float& {
                return functions_[(2 * column + odd) * half + i];
            };
            for (std::size_t pair = 0; pair < shape_.fast; ++pair) {
                entry(pair, 0) = static_cast<float>(std::cos(place * source.frequency(pair)));
                entry(pair, 1) = static_cast<float>(std::sin(place * source.frequency(pair)));
            }
            const double angle = std::acos(place / static_cast<double>(half));
            for (std::size_t column = shape_.fast; column < shape_.columns(); ++column) {
                const auto term = static_cast<double>(2 * (column - shape_.fast));
                entry(column, 0) = static_cast<float>(std::cos(term * angle));
                entry(column, 1) = static_cast<float>(std::cos((term + 1.0) * angle));
            }
        }
        for (std::size_t i = 0; i < shape_.slow; ++i) {
            const double most = static_cast<double>(half) * source.frequency(shape_.fast + i);
            for (std::size_t k = 0; k < turning_pairs::terms; ++k) {
                float* const weights = series_.data() + i * 2 * turning_pairs::terms + k;
                weights[0] = static_cast<float>(term_of(2 * k, most, [](double x) { return std::cos(x); }));
                weights[turning_pairs::terms] =
                    static_cast<float>(term_of(2 * k + 1, most, [](double x) { return std::sin(x); }));
            }
        }
    }

    /// The factor of Chebyshev's polynomial `k` in `function(most * x)`, from its values at enough points.
    template <class Function>
    [[nodiscard]] static double term_of(std::size_t k, double most, Function&& function) noexcept {
        constexpr std::size_t points = 32;
        double sum = 0.0;
        for (std::size_t i = 0; i < points; ++i) {
            const double angle = (static_cast<double>(i) + 0.5) * 3.14159265358979323846 / static_cast<double>(points);
            sum += function(most * std::cos(angle)) * std::cos(static_cast<double>(k) * angle);
        }
        return sum * (k == 0 ? 1.0 : 2.0) / static_cast<double>(points);
    }

    const kernel_table* kernels_ = nullptr;
    turning_pairs shape_;  // its pointers are unset: this may move
    aligned_buffer<float> middles_;
    aligned_buffer<float> functions_;
    aligned_buffer<float> series_;
};

RVQKV_NAMESPACE_END
