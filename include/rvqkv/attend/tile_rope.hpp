// SPDX-License-Identifier: MIT
/// @file
/// Rotary embedding over tiles. A token's angle is that of its tile's start plus that of its place in the tile: keys
/// are turned by the second, from a table that never changes, and queries back by the first, once for each tile.
#pragma once

#include "rvqkv/attend/rope.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/nothrow_array.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// A `rope` for rows whose channels stand in another order. Its "angles" are the pairs, in the order of their places.
/// Threads: immutable; safe to share.
class tile_rope {
    static constexpr std::size_t step_lengths = 5;  // cursors step by 1, 2, 4, ... tiles

public:
    /// Turns nothing.
    tile_rope() = default;

    /// `order[place]` is the channel there, `[head_dim]`.
    /// Errors: `out_of_memory`.
    [[nodiscard]] static result<tile_rope> create(const rope& source, std::span<const std::uint16_t> order,
                                                  const kernel_table& kernels = best_kernels()) {
        tile_rope made;
        made.kernels_ = &kernels;
        made.angles_ = source.pairs();
        auto frequencies = aligned_buffer<double>::allocate((1 + 2 * step_lengths) * made.angles_);
        auto table = aligned_buffer<float>::allocate(tile_tokens * 2 * made.angles_);
        if (!frequencies || !table) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        made.frequencies_ = std::move(frequencies).value();
        made.table_ = std::move(table).value();
        if (status found = made.find_places(source, order); !found) {
            return found.error();
        }
        for (std::size_t i = 0; i < made.angles_; ++i) {
            const double frequency = source.frequency(made.pairs_[i].pair);
            made.frequencies_[i] = frequency;
            for (std::size_t length = 0; length < step_lengths; ++length) {
                const double angle = static_cast<double>(tile_tokens << length) * frequency;
                made.frequencies_[(1 + 2 * length) * made.angles_ + i] = std::cos(angle);
                made.frequencies_[(2 + 2 * length) * made.angles_ + i] = std::sin(angle);
            }
            for (std::size_t token = 0; token < tile_tokens; ++token) {
                const double angle = static_cast<double>(token) * frequency;
                float* const row = made.table_.data() + token * 2 * made.angles_;
                row[i] = static_cast<float>(source.attention_factor() * std::cos(angle));
                row[made.angles_ + i] = static_cast<float>(source.attention_factor() * std::sin(angle));
            }
        }
        return made;
    }

    /// Pairs that are turned.
    [[nodiscard]] std::size_t angles() const noexcept { return angles_; }
    /// Places of the two channels of an angle.
    [[nodiscard]] std::size_t first_place(std::size_t angle) const noexcept { return pairs_[angle].first; }
    [[nodiscard]] std::size_t second_place(std::size_t angle) const noexcept { return pairs_[angle].second; }
    [[nodiscard]] std::size_t bytes() const noexcept {
        return frequencies_.bytes() + table_.bytes() + pairs_.bytes() + runs_.bytes();
    }

    /// Cosines, then sines, of a tile's tokens: `[tile_tokens, 2 * angles]`, times the attention factor.
    [[nodiscard]] const float* table() const noexcept { return table_.data(); }

    /// Turns rows of a tile, from place `first` on, by their places, and multiplies by the attention factor.
    void turn(float* rows, std::size_t count, std::size_t stride, std::size_t first) const noexcept {
        const float* const row = table_.data() + first * 2 * angles_;
        kernels_->attention.turn(rows, count, stride, runs_.data(), run_count_, row, row + angles_, 2 * angles_);
    }

    /// The angles of one position, and of one after the other more quickly. Lives in memory of the caller.
    class cursor {
    public:
        /// Bytes of memory (aligned to 64) for so many angles.
        [[nodiscard]] static std::size_t scratch_bytes(std::size_t angles) noexcept {
            return 2 * angles * (sizeof(double) + sizeof(float));
        }
        cursor() = default;
        cursor(const tile_rope& parent, std::byte* scratch) noexcept
            : parent_(&parent), exact_(static_cast<double*>(static_cast<void*>(scratch))) {}

        /// Goes to a position without a step from another: what it gives does not depend on where it was.
        void start(std::int64_t position) noexcept {
            is_set_ = is_set_ && steps_ == 0;
            if (!is_set_ || position != position_) {
                is_set_ = false;
                seek(position);
            }
        }
        /// Goes where another one is.
        void follow(const cursor& other) noexcept {
            std::copy_n(other.exact_, 2 * parent_->angles_, exact_);
            std::copy_n(other.floats(), 2 * parent_->angles_, floats());
            position_ = other.position_;
            steps_ = other.steps_;
            is_set_ = other.is_set_;
        }
        /// Goes to a position: in few steps if it is some tiles further on, not many.
        void seek(std::int64_t position) noexcept {
            const std::size_t angles = parent_->angles_;
            if (is_set_ && position == position_) {
                return;
            }
            double* const cosines = exact_;
            double* const sines = exact_ + angles;
            // (A way back is a long one, too.)
            const std::uint64_t way = static_cast<std::uint64_t>(position) - static_cast<std::uint64_t>(position_);
            if (is_set_ && way <= longest_way && way % tile_tokens == 0 && steps_ < most_steps) {
                std::uint64_t tiles = way / tile_tokens;
                for (std::size_t length = step_lengths; length-- > 0;) {
                    for (; tiles >> length != 0; tiles -= std::uint64_t{1} << length, ++steps_) {
                        step(length);
                    }
                }
            } else {
                for (std::size_t i = 0; i < angles; ++i) {
                    const double angle = static_cast<double>(position) * parent_->frequencies_[i];
                    cosines[i] = std::cos(angle);
                    sines[i] = std::sin(angle);
                }
                steps_ = 0;
            }
            is_set_ = true;
            position_ = position;
            float* const rounded = floats();
            for (std::size_t i = 0; i < angles; ++i) {
                rounded[i] = static_cast<float>(cosines[i]);
                rounded[angles + i] = static_cast<float>(-sines[i]);
            }
        }
        /// Turns rows back by the position, without the attention factor.
        void turn_back(float* rows, std::size_t count, std::size_t stride) const noexcept {
            turn_back(rows, count, stride, parent_->runs_.data(), parent_->run_count_);
        }
        /// The same for pairs that stand elsewhere.
        void turn_back(float* rows, std::size_t count, std::size_t stride, const channel_pairs* pairs,
                       std::size_t runs) const noexcept {
            parent_->kernels_->attention.turn(rows, count, stride, pairs, runs, floats(), floats() + parent_->angles_,
                                              0);
        }

    private:
        static constexpr unsigned most_steps = 256;  // rounding errors add up: 2^-44 at most
        static constexpr std::uint64_t longest_way = tile_tokens << step_lengths;

        /// `[2, angles]`: cosines and negated sines.
        [[nodiscard]] float* floats() const noexcept {
            return static_cast<float*>(static_cast<void*>(exact_ + 2 * parent_->angles_));
        }
        /// Turns on by `tile_tokens << length` positions.
        void step(std::size_t length) noexcept {
            const std::size_t angles = parent_->angles_;
            double* const cosines = exact_;
            double* const sines = exact_ + angles;
            const double* const cosine = parent_->frequencies_.data() + (1 + 2 * length) * angles;
            const double* const sine = cosine + angles;
            for (std::size_t i = 0; i < angles; ++i) {
                const double turned = cosines[i] * cosine[i] - sines[i] * sine[i];
                sines[i] = sines[i] * cosine[i] + cosines[i] * sine[i];
                cosines[i] = turned;
            }
        }

        const tile_rope* parent_ = nullptr;
        double* exact_ = nullptr;  // [2, angles]: cosines and sines; behind them `floats`
        std::int64_t position_ = 0;
        unsigned steps_ = 0;
        bool is_set_ = false;
    };

private:
    struct pair_places {
        std::size_t first = 0;
        std::size_t second = 0;
        std::size_t pair = 0;
    };

    /// Where the channels of each pair stand, and neighbours put together that loops can take at once.
    [[nodiscard]] status find_places(const rope& source, std::span<const std::uint16_t> order) {
        auto places_of = detail::nothrow_array<std::size_t>::allocate(order.size());
        auto pairs = detail::nothrow_array<pair_places>::allocate(angles_);
        auto runs = detail::nothrow_array<channel_pairs>::allocate(angles_);
        if (!places_of || !pairs || !runs) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        pairs_ = std::move(pairs).value();
        runs_ = std::move(runs).value();
        detail::nothrow_array<std::size_t>& places = places_of.value();
        for (std::size_t place = 0; place < order.size(); ++place) {
            places[order[place]] = place;
        }
        for (std::size_t pair = 0; pair < angles_; ++pair) {
            pairs_[pair] = {places[source.first_channel(pair)], places[source.second_channel(pair)], pair};
        }
        std::sort(pairs_.begin(), pairs_.end(),
                  [](const pair_places& a, const pair_places& b) { return a.first < b.first; });
        for (std::size_t i = 0; i < angles_;) {
            channel_pairs run = {pairs_[i].first, pairs_[i].second, 1, 1, i};
            const auto follows = [&](std::size_t step) {
                const std::size_t next = i + run.count;
                return next < angles_ && pairs_[next].first == run.first + run.count * step &&
                       pairs_[next].second == run.second + run.count * step;
            };
            run.step = follows(2) ? 2 : 1;
            while (follows(run.step)) {
                ++run.count;
            }
            runs_[run_count_++] = run;
            i += run.count;
        }
        return {};
    }

    std::size_t angles_ = 0;
    const kernel_table* kernels_ = nullptr;
    std::size_t run_count_ = 0;
    detail::nothrow_array<pair_places> pairs_;   // by angle
    detail::nothrow_array<channel_pairs> runs_;  // the first `run_count_`: all pairs
    aligned_buffer<double> frequencies_;  // [1 + 2 * step_lengths, angles]: radians for each position; cosines and
                                          // sines of each step
    aligned_buffer<float> table_;
};

RVQKV_NAMESPACE_END
