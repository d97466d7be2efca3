// SPDX-License-Identifier: MIT
/// @file
/// Rotary position embedding as models define it: which channels form pairs, by which angle a position turns each, and
/// loops that turn rows, and turn them back.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// Which channels are turned together, of the `dims` that are.
enum class rope_pairs {
    half_split,   ///< `(i, i + dims / 2)`: GPT-NeoX, and models as Hugging Face stores them.
    interleaved,  ///< `(2 i, 2 i + 1)`: the paper that introduced it, GPT-J, and Llama in GGUF files.
};

/// How a model turns its keys and queries. The defaults are Llama 2's.
struct rope_config {
    rope_pairs pairs = rope_pairs::half_split;
    std::size_t dims = 0;             ///< The first so many channels are turned, the others left; 0: all.
    double base = 10000.0;            ///< Pair `i` turns by `base^(-2 i / dims)` radians for each position.
    double position_scale = 1.0;      ///< Positions are multiplied by it: 1 / factor for linear scaling.
    std::vector<double> frequencies;  ///< `[dims / 2]` radians for each position, instead of `base` (YaRN, Llama 3).
    double attention_factor = 1.0;    ///< Turned channels are multiplied by it, as YaRN demands.
    friend bool operator==(const rope_config&, const rope_config&) = default;

    /// Errors: `invalid_argument` naming the field and its value.
    [[nodiscard]] status validate(std::size_t head_dim) const {
        const std::size_t turned = dims == 0 ? head_dim : dims;
        if (turned == 0 || turned % 2 != 0 || turned > head_dim) {
            return error{error_code::invalid_argument, "rope dims is " + std::to_string(turned) +
                                                           ", must be even and from 2 to head_dim " +
                                                           std::to_string(head_dim)};
        }
        const std::pair<const char*, double> factors[] = {
            {"base", base}, {"position_scale", position_scale}, {"attention_factor", attention_factor}};
        for (const auto& [name, value] : factors) {
            if (!std::isfinite(value) || value <= 0.0) {
                return error{error_code::invalid_argument, std::string("rope ") + name + " is " +
                                                               std::to_string(value) + ", must be finite and above 0"};
            }
        }
        if (!frequencies.empty() && frequencies.size() != turned / 2) {
            return error{error_code::invalid_argument, "rope has " + std::to_string(frequencies.size()) +
                                                           " frequencies, must have one for each of " +
                                                           std::to_string(turned / 2) + " pairs"};
        }
        for (const double frequency : frequencies) {
            if (!std::isfinite(frequency)) {
                return error{error_code::invalid_argument, "a rope frequency is not finite"};
            }
        }
        return {};
    }
};

/// A `rope_config` made ready for one head_dim.
/// Threads:  immutable; safe to share.
/// Numerics: angles in double, as a function of the position alone: however calls are split, and at every SIMD level,
///           a row turned to a position has the same bits. Positions may be negative.
class rope {
public:
    /// Turns nothing: for models that know no positions.
    rope() = default;

    /// Errors: `invalid_argument` from `rope_config::validate`; `out_of_memory`.
    [[nodiscard]] static result<rope> create(const rope_config& config, std::size_t head_dim) {
        if (status wrong = config.validate(head_dim); !wrong) {
            return wrong.error();
        }
        rope made;
        made.split_ = config.pairs == rope_pairs::half_split;
        made.head_dim_ = head_dim;
        made.pairs_ = (config.dims == 0 ? head_dim : config.dims) / 2;
        made.factor_ = config.attention_factor;
        auto frequencies = aligned_buffer<double>::allocate(made.pairs_);
        auto near = aligned_buffer<double>::allocate(2 * near_positions * made.pairs_);
        if (!frequencies || !near) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        made.frequencies_ = std::move(frequencies).value();
        made.near_ = std::move(near).value();
        for (std::size_t pair = 0; pair < made.pairs_; ++pair) {
            const double frequency =
                config.frequencies.empty()
                    ? std::pow(config.base, -static_cast<double>(pair) / static_cast<double>(made.pairs_))
                    : config.frequencies[pair];
            made.frequencies_[pair] = frequency * config.position_scale;
            for (std::size_t offset = 0; offset < near_positions; ++offset) {
                const double angle = static_cast<double>(offset) * made.frequencies_[pair];
                made.near_[2 * (offset * made.pairs_ + pair)] = std::cos(angle);
                made.near_[2 * (offset * made.pairs_ + pair) + 1] = std::sin(angle);
            }
        }
        return made;
    }

    [[nodiscard]] std::size_t head_dim() const noexcept { return head_dim_; }
    /// Pairs of channels that are turned.
    [[nodiscard]] std::size_t pairs() const noexcept { return pairs_; }
    [[nodiscard]] std::size_t first_channel(std::size_t pair) const noexcept { return split_ ? pair : 2 * pair; }
    [[nodiscard]] std::size_t second_channel(std::size_t pair) const noexcept {
        return split_ ? pair + pairs_ : 2 * pair + 1;
    }
    /// Radians for each position.
    [[nodiscard]] double frequency(std::size_t pair) const noexcept { return frequencies_[pair]; }
    [[nodiscard]] double attention_factor() const noexcept { return factor_; }
    [[nodiscard]] std::size_t bytes() const noexcept { return frequencies_.bytes() + near_.bytes(); }

    /// Cosine and sine of the angles that a position turns by, without the attention factor.
    /// Shapes:   `[pairs]` each. Numerics: exact but for the rounding to float32, up to positions of 10^8.
    void angles(std::int64_t position, float* cosines, float* sines) const noexcept {
        for_each_block([&](block& turned) {
            turned.seek(*this, position);
            turned.write(*this, 1.0, 1.0, cosines + turned.first, sines + turned.first);
        });
    }

    /// What the model does to keys and queries: row `i` is turned to position `first + i / rows_each`, and multiplied
    /// by the attention factor where it is turned. Shapes:     `rows` `[any, head_dim]`; `rows_each` is the number of
    /// heads for `[token, head]` rows side by side. Complexity: O(rows * head_dim), and a cosine and sine for each pair
    /// every 32 positions; no allocation.
    void turn(matrix_view<float> rows, std::int64_t first, std::size_t rows_each = 1,
              const kernel_table& kernels = best_kernels()) const noexcept {
        apply(rows, first, rows_each, factor_, 1.0, kernels);
    }
    /// Undoes `turn`.
    void turn_back(matrix_view<float> rows, std::int64_t first, std::size_t rows_each = 1,
                   const kernel_table& kernels = best_kernels()) const noexcept {
        apply(rows, first, rows_each, 1.0 / factor_, -1.0, kernels);
    }
    /// Turns all rows on by `distance` positions: from where they are, so without the attention factor.
    void shift(matrix_view<float> rows, std::int64_t distance,
               const kernel_table& kernels = best_kernels()) const noexcept {
        apply(rows, distance, rows.rows, 1.0, 1.0, kernels);
    }

private:
    /// Angles of a multiple of so many positions are computed, others added from a table.
    static constexpr std::size_t near_positions = 32;
    /// Pairs that are worked on together: what the stack holds.
    static constexpr std::size_t block_pairs = 128;

    /// The angles of some pairs at one position.
    struct block {
        std::size_t first = 0;
        std::size_t count = 0;
        bool is_set = false;
        std::uint64_t far = 0;   ///< The multiple of `near_positions` that the cosines and sines below belong to.
        std::size_t offset = 0;  ///< The position's distance from it.
        double cosines[block_pairs];
        double sines[block_pairs];

        void seek(const rope& parent, std::int64_t position) noexcept {
            const std::uint64_t bits = static_cast<std::uint64_t>(position);
            offset = static_cast<std::size_t>(bits % near_positions);
            if (is_set && far == bits - offset) {
                return;
            }
            is_set = true;
            far = bits - offset;
            for (std::size_t i = 0; i < count; ++i) {
                const double angle =
                    static_cast<double>(static_cast<std::int64_t>(far)) * parent.frequencies_[first + i];
                cosines[i] = std::cos(angle);
                sines[i] = std::sin(angle);
            }
        }
        void write(const rope& parent, double factor, double direction, float* to_cosines,
                   float* to_sines) const noexcept {
            const double* const near = parent.near_.data() + 2 * (offset * parent.pairs_ + first);
            for (std::size_t i = 0; i < count; ++i) {
                const double cosine = near[2 * i];
                const double sine = near[2 * i + 1];
                to_cosines[i] = static_cast<float>(factor * (cosines[i] * cosine - sines[i] * sine));
                to_sines[i] = static_cast<float>(factor * direction * (sines[i] * cosine + cosines[i] * sine));
            }
        }
    };

    template <class Body>
    void for_each_block(Body&& body) const noexcept {
        for (std::size_t first = 0; first < pairs_; first += block_pairs) {
            block turned;
            turned.first = first;
            turned.count = std::min(block_pairs, pairs_ - first);
            body(turned);
        }
    }

    void apply(matrix_view<float> rows, std::int64_t first, std::size_t rows_each, double factor, double direction,
               const kernel_table& kernels) const noexcept {
        if (pairs_ == 0 || rows.rows == 0) {
            return;
        }
        RVQKV_ASSERT(rows.cols == head_dim_ && rows_each != 0);
        for_each_block([&](block& turned) {
            const channel_pairs places = {first_channel(turned.first), second_channel(turned.first),
                                          split_ ? std::size_t{1} : std::size_t{2}, turned.count, 0};
            float cosines[block_pairs];
            float sines[block_pairs];
            std::uint64_t position = static_cast<std::uint64_t>(first);  // unsigned: may wrap around
            for (std::size_t row = 0; row < rows.rows; row += rows_each, ++position) {
                turned.seek(*this, static_cast<std::int64_t>(position));
                turned.write(*this, factor, direction, cosines, sines);
                kernels.attention.turn(rows.data + row * rows.stride, std::min(rows_each, rows.rows - row), rows.stride,
                                       &places, 1, cosines, sines, 0);
            }
        });
    }

    bool split_ = true;
    std::size_t head_dim_ = 0;
    std::size_t pairs_ = 0;
    double factor_ = 1.0;
    aligned_buffer<double> frequencies_;
    aligned_buffer<double> near_;  // [near_positions, pairs, 2]: cosine and sine
};

RVQKV_NAMESPACE_END
