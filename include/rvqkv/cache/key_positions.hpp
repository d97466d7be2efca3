// SPDX-License-Identifier: MIT
/// @file
/// What a layer's way of storing keys means for their positions: how a key is turned before it is stored, how it is
/// turned back, and what becomes of the mean that is taken out of the codes.
#pragma once

#include "rvqkv/attend/layer_config.hpp"
#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/rope.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/tensor_view.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// Threads: immutable; safe to share.
class key_positions {
public:
    /// Tokens of which means are turned together.
    static constexpr std::size_t mean_tokens = 16;

    /// For values, which know no positions.
    key_positions() = default;
    /// Errors: what `rope::create` reports.
    [[nodiscard]] static result<key_positions> create(const kv_layer_config& config) {
        key_positions made;
        made.coding_ = config.coding;
        made.turned_input_ = config.turned_input;
        made.heads_ = config.keys.heads;
        made.head_dim_ = config.keys.codec->head_dim();
        made.block_tokens_ = config.block_tokens;
        if (config.coding != key_coding::as_given) {
            auto turner = rope::create(config.rope, made.head_dim_);
            if (!turner) {
                return turner.error();
            }
            made.rope_ = std::move(turner).value();
        }
        if (!config.key_mean.empty()) {
            auto mean = aligned_buffer<float>::allocate(config.key_mean.size());
            if (!mean) {
                return mean.error();
            }
            made.mean_ = std::move(mean).value();
            std::copy(config.key_mean.begin(), config.key_mean.end(), made.mean_.data());
        }
        return made;
    }

    [[nodiscard]] std::size_t bytes() const noexcept { return rope_.bytes() + mean_.bytes(); }
    [[nodiscard]] bool has_mean() const noexcept { return mean_.size() != 0; }
    /// Whether the tokens of a run were turned to positions that follow each other, or none was turned.
    [[nodiscard]] bool follows() const noexcept {
        return coding_ == key_coding::after_rope || coding_ == key_coding::block_relative;
    }

    /// `coded_position` of a run that is begun behind another, or null at the start.
    [[nodiscard]] std::int64_t begin_run(std::int64_t position, const page_run* before) const noexcept {
        if (coding_ == key_coding::block_relative && before != nullptr) {
            const std::int64_t next = before->coded_position + static_cast<std::int64_t>(before->tokens);
            return next < static_cast<std::int64_t>(block_tokens_) ? next : 0;
        }
        return coding_ == key_coding::after_rope ? position : 0;
    }
    /// Tokens that a run may have, the first of which was turned to `coded_position`: no page crosses a block.
    [[nodiscard]] std::size_t most_tokens(std::int64_t coded_position) const noexcept {
        return coding_ == key_coding::block_relative ? block_tokens_ - static_cast<std::size_t>(coded_position)
                                                     : std::numeric_limits<std::size_t>::max();
    }

    /// Whether keys given at a position differ from those that are stored, and are given back.
    [[nodiscard]] bool changes(std::int64_t position, std::int64_t coded_position) const noexcept {
        switch (coding_) {
            case key_coding::as_given: return false;
            case key_coding::before_rope: return turned_input_;
            case key_coding::after_rope:
            case key_coding::block_relative: break;
        }
        return !turned_input_ || position != coded_position;
    }
    /// Makes keys as they are given those that are stored. Shapes: `rows` `[tokens, heads, head_dim]`, of tokens that
    /// follow each other from these positions on.
    void store(float* rows, std::size_t tokens, std::int64_t position, std::int64_t coded_position) const noexcept {
        if (!changes(position, coded_position)) {
            return;
        }
        const matrix_view<float> all = view(rows, tokens);
        if (coding_ == key_coding::before_rope) {
            rope_.turn_back(all, position, heads_);
        } else if (turned_input_) {
            rope_.shift(all, coded_position - position);
        } else {
            rope_.turn(all, coded_position, heads_);
        }
    }
    /// Makes keys as they are stored those that would be given now. Shapes: as `store`.
    void restore(float* rows, std::size_t tokens, std::int64_t position, std::int64_t coded_position) const noexcept {
        if (!changes(position, coded_position)) {
            return;
        }
        const matrix_view<float> all = view(rows, tokens);
        if (coding_ == key_coding::before_rope) {
            rope_.turn(all, position, heads_);
        } else if (turned_input_) {
            rope_.shift(all, position - coded_position);
        } else {
            rope_.turn_back(all, coded_position, heads_);
        }
    }

    /// Adds the mean `factor` (1 or -1) times to keys as they are stored.
    /// Shapes: `rows` as `store`; `scratch` `[mean_tokens, heads, head_dim]`. Precondition: `has_mean()`.
    void add_mean(float factor, float* rows, std::size_t tokens, std::int64_t coded_position,
                  float* scratch) const noexcept {
        const std::size_t width = mean_.size();
        for (std::size_t first = 0; first < tokens; first += mean_tokens) {
            const std::size_t count = std::min(mean_tokens, tokens - first);
            for (std::size_t i = 0; i < count; ++i) {
                std::copy_n(mean_.data(), width, scratch + i * width);
            }
            if (follows()) {
                rope_.turn(view(scratch, count), coded_position + static_cast<std::int64_t>(first), heads_);
            }
            float* const to = rows + first * width;
            for (std::size_t i = 0; i < count * width; ++i) {
                to[i] += factor * scratch[i];
            }
        }
    }

private:
    [[nodiscard]] matrix_view<float> view(float* rows, std::size_t tokens) const noexcept {
        return {rows, tokens * heads_, head_dim_, head_dim_};
    }

    key_coding coding_ = key_coding::as_given;
    bool turned_input_ = true;
    std::size_t heads_ = 0;
    std::size_t head_dim_ = 0;
    std::size_t block_tokens_ = 0;
    rope rope_;
    aligned_buffer<float> mean_;  // [head, head_dim]
};

}  // namespace detail
RVQKV_NAMESPACE_END
