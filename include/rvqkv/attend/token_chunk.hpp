// SPDX-License-Identifier: MIT
/// @file
/// The tokens of a layer in portions: a few thousand at a time, whose scores go through the softmax together.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/readers.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// Deals out memory in pieces aligned to 64 bytes; made without memory, it only counts.
class scratch_dealer {
public:
    explicit scratch_dealer(std::byte* memory = nullptr) noexcept : memory_(memory) {}
    template <class T>
    [[nodiscard]] T* take(std::size_t count) noexcept {
        std::byte* const piece = memory_ == nullptr ? nullptr : memory_ + used_;
        used_ += (count * sizeof(T) + buffer_alignment - 1) / buffer_alignment * buffer_alignment;
        return static_cast<T*>(static_cast<void*>(piece));
    }
    [[nodiscard]] std::size_t used() const noexcept { return used_; }

private:
    std::byte* memory_;
    std::size_t used_ = 0;
};

/// Which tokens queries at positions from `oldest` to `newest` may see.
struct token_filter {
    std::size_t window = 0;  ///< Tokens that a query sees, its own included; 0: all.
    bool causal = true;      ///< Whether it sees none at a later position.

    struct range {
        std::size_t begin = 0;
        std::size_t end = 0;
        [[nodiscard]] std::size_t size() const noexcept { return end - begin; }
    };
    /// The tokens, of `tokens` from `position` on, that any of the queries sees.
    [[nodiscard]] range seen(std::int64_t position, std::size_t tokens, std::int64_t oldest,
                             std::int64_t newest) const noexcept {
        const std::int64_t count = static_cast<std::int64_t>(tokens);
        std::int64_t begin = 0;
        std::int64_t end = count;
        if (window != 0) {
            begin = std::clamp(oldest - static_cast<std::int64_t>(window) + 1 - position, std::int64_t{0}, count);
        }
        if (causal) {
            end = std::clamp(newest + 1 - position, begin, count);
        }
        return {static_cast<std::size_t>(begin), static_cast<std::size_t>(end)};
    }
};

/// Tokens of one run in a chunk. Codes take whole tiles of slots.
struct chunk_piece {
    const page_run* run = nullptr;
    std::size_t first = 0;  ///< In the page.
    std::size_t tokens = 0;
    std::size_t slot = 0;
    std::size_t slots = 0;
    std::size_t skip = 0;  ///< Slots before the first token.
    std::size_t tile = 0;  ///< Number of its first tile in the chunk.
    std::size_t tiles = 0;

    [[nodiscard]] bool is_exact() const noexcept { return run->format->is_exact; }
    /// Of the first slot.
    [[nodiscard]] std::int64_t position() const noexcept {
        return run->position + static_cast<std::int64_t>(first) - static_cast<std::int64_t>(run->first + skip);
    }
};

/// One portion, and where the next begins.
class token_chunk {
public:
    /// Slots that a piece of exact tokens is rounded up to.
    static constexpr std::size_t least_slots = 16;
    /// Tiles that readers are told of before they are due.
    static constexpr std::size_t most_ahead = 16;

    token_chunk(std::size_t slots, scratch_dealer& memory) noexcept
        : slots_(slots),
          pieces_(memory.take<chunk_piece>(slots / least_slots)),
          tiles_(memory.take<page_tile>(slots / tile_tokens + most_ahead)),
          positions_(memory.take<std::int64_t>(slots / tile_tokens + most_ahead)) {}

    /// Before the first portion of what queries at these positions see.
    void begin(std::span<const page_run> runs, token_filter filter, std::int64_t oldest, std::int64_t newest) noexcept {
        runs_ = runs;
        filter_ = filter;
        oldest_ = oldest;
        newest_ = newest;
        next_ = {};
    }

    /// Goes to the next portion. Returns false if no token is left.
    [[nodiscard]] bool advance() noexcept {
        used_ = 0;
        count_ = 0;
        tile_count_ = 0;
        while (used_ < slots_) {
            chunk_piece piece = take(next_, slots_ - used_);
            if (piece.tokens == 0) {
                break;
            }
            piece.slot = used_;
            piece.tile = tile_count_;
            add_tiles(piece, tile_count_);
            used_ += piece.slots;
            tile_count_ += piece.tiles;
            pieces_[count_++] = piece;
        }
        ahead_ = 0;
        place beyond = next_;
        while (count_ != 0 && ahead_ < most_ahead) {
            const chunk_piece piece = take(beyond, (most_ahead - ahead_) * tile_tokens);
            if (piece.tiles == 0 || piece.run->format != pieces_[count_ - 1].run->format) {
                break;
            }
            add_tiles(piece, tile_count_ + ahead_);
            ahead_ += piece.tiles;
        }
        return count_ != 0;
    }

    /// Slots in use: every piece has its own, one after the other.
    [[nodiscard]] std::size_t slots() const noexcept { return used_; }
    [[nodiscard]] std::span<const chunk_piece> pieces() const noexcept { return {pieces_, count_}; }
    /// Number of the piece behind those that can be read together with piece `first`: codes of one format that `alike`
    /// says may go together.
    template <class Alike>
    [[nodiscard]] std::size_t group_end(std::size_t first, Alike&& alike) const noexcept {
        std::size_t end = first + 1;
        while (end < count_ && !pieces_[first].is_exact() && pieces_[end].run->format == pieces_[first].run->format &&
               alike(*pieces_[first].run, *pieces_[end].run)) {
            ++end;
        }
        return end;
    }
    /// The tiles of pieces [first, end), and the positions of their first tokens.
    [[nodiscard]] page_tiles tiles(std::size_t first, std::size_t end) const noexcept {
        const std::size_t tile = pieces_[first].tile;
        return {tiles_ + tile, pieces_[end - 1].tile + pieces_[end - 1].tiles - tile, end == count_ ? ahead_ : 0};
    }
    [[nodiscard]] const std::int64_t* tile_positions(std::size_t first) const noexcept {
        return positions_ + pieces_[first].tile;
    }

    /// Coded tokens from a run on, up to one of codes that `stop` ends at.
    template <class Stop>
    [[nodiscard]] std::size_t coded_tokens(std::size_t first_run, Stop&& stop) const noexcept {
        std::size_t tokens = 0;
        for (std::size_t i = first_run; i < runs_.size(); ++i) {
            if (runs_[i].format->is_exact) {
                continue;
            }
            if (stop(runs_[i])) {
                break;
            }
            tokens += seen(runs_[i]).size();
        }
        return tokens;
    }
    [[nodiscard]] std::size_t run_number(const chunk_piece& piece) const noexcept {
        return static_cast<std::size_t>(piece.run - runs_.data());
    }

private:
    struct place {
        std::size_t run = 0;
        std::size_t token = 0;
    };

    [[nodiscard]] token_filter::range seen(const page_run& run) const noexcept {
        return filter_.seen(run.position, run.tokens, oldest_, newest_);
    }

    /// The next tokens, of one run, as many as `room` slots take.
    [[nodiscard]] chunk_piece take(place& at, std::size_t room) const noexcept {
        chunk_piece piece;
        for (; at.run < runs_.size(); ++at.run, at.token = 0) {
            const page_run& run = runs_[at.run];
            const token_filter::range part = seen(run);
            const std::size_t begin = std::max(at.token, part.begin);
            if (begin >= part.end) {
                continue;
            }
            piece.run = &run;
            const std::size_t unit = piece.is_exact() ? least_slots : tile_tokens;
            if (room < unit) {
                break;
            }
            piece.first = run.first + begin;
            piece.skip = piece.is_exact() ? 0 : piece.first % tile_tokens;
            piece.tokens = std::min(part.end - begin, room / unit * unit - piece.skip);
            piece.slots = (piece.skip + piece.tokens + unit - 1) / unit * unit;
            piece.tiles = piece.is_exact() ? 0 : piece.slots / tile_tokens;
            at.token = begin + piece.tokens;
            break;
        }
        return piece;
    }
    void add_tiles(const chunk_piece& piece, std::size_t number) noexcept {
        for (std::size_t i = 0; i < piece.tiles; ++i) {
            tiles_[number + i] = {piece.run->page, piece.first / tile_tokens + i};
            positions_[number + i] = piece.position() + static_cast<std::int64_t>(i * tile_tokens);
        }
    }

    std::size_t slots_;
    chunk_piece* pieces_;
    page_tile* tiles_;  // of the chunk, then some that follow
    std::int64_t* positions_;
    std::span<const page_run> runs_;
    token_filter filter_;
    std::int64_t oldest_ = 0;
    std::int64_t newest_ = 0;
    place next_;
    std::size_t used_ = 0;
    std::size_t count_ = 0;
    std::size_t tile_count_ = 0;
    std::size_t ahead_ = 0;
};

}  // namespace detail
RVQKV_NAMESPACE_END
