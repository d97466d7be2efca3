// SPDX-License-Identifier: MIT
/// @file
/// Eight-bit and 16-bit copies of a codebook, with bounds on what rounding lost: what the integer search reads.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/simd_level.hpp"
#include "rvqkv/simd/kernel_table.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// From which size a codebook has integer copies: below, the float32 search is about as quick.
inline constexpr std::size_t least_integer_codewords = 256;
inline constexpr std::size_t least_integer_dim = 16;
/// Weights of one depth, likewise; products of seven bits are slower.
[[nodiscard]] constexpr std::size_t least_integer_weights(unsigned bits) noexcept {
    return bits == 8 ? 8192 : 16384;
}

/// Integer copies of all depths of a codebook. Threads: immutable once made.
class integer_copies {
public:
    /// Bits of the coarse copies that the level in use multiplies: eight with VNNI; seven where products are added in
    /// 16 bits, which twice 127 x 127 fits in; 0 if it searches in float32.
    [[nodiscard]] static unsigned coarse_bits() {
        const result<simd_level> chosen = choose_simd_level();
        switch (chosen ? chosen.value() : best_available_level()) {
            case simd_level::generic:
            case simd_level::neon: return 0;
            case simd_level::avx2:
            case simd_level::avx512: return 7;
            case simd_level::avxvnni:
            case simd_level::avx512vnni:
            case simd_level::avx512vbmi: return 8;
        }
        return 0;
    }
    /// Whether codebooks of this size have integer copies in this process.
    [[nodiscard]] static bool wanted(std::size_t codewords, std::size_t dim) {
        if (codewords < least_integer_codewords || dim < least_integer_dim || dim > most_integer_dim) {
            return false;  // without asking the processor and the environment
        }
        const unsigned bits = coarse_bits();
        return bits != 0 && codewords * dim >= least_integer_weights(bits);
    }

    /// Copies for `depths` depths, still to be filled by `build`.
    /// Preconditions: `bits`, of the coarse copies, is 7 or 8.
    /// Errors:        `out_of_memory`.
    [[nodiscard]] static result<integer_copies> create(std::size_t depths, std::size_t codewords, std::size_t dim,
                                                       unsigned bits = coarse_bits()) {
        RVQKV_ASSERT(bits == 7 || bits == 8);
        integer_copies copies;
        copies.coarse_zero_ = 1 << (bits - 1);
        copies.groups_ = (codewords + integer_group - 1) / integer_group;
        copies.dim_ = dim;
        auto coarse = aligned_buffer<std::uint8_t>::allocate(depths * copies.coarse_size());
        auto fine = aligned_buffer<std::int16_t>::allocate(depths * copies.fine_size());
        auto codes = aligned_buffer<code_t>::allocate(depths * copies.places());
        auto floats = aligned_buffer<float>::allocate(depths * copies.float_size());
        auto views = aligned_buffer<integer_codebook>::allocate(depths);
        if (!coarse || !fine || !codes || !floats || !views) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        copies.coarse_ = std::move(coarse).value();
        copies.fine_ = std::move(fine).value();
        copies.codes_ = std::move(codes).value();
        copies.floats_ = std::move(floats).value();
        copies.views_ = std::move(views).value();
        return copies;
    }

    /// Fills one depth from its search layout, anew if need be. A depth whose numbers are all tiny or somewhere huge
    /// gets no copies: `view` is null for it.
    /// Complexity: O(codewords * dim), times log codewords if they have a structure; no allocation.
    void build(std::size_t depth, const packed_codebook& book) noexcept {
        const depth_parts parts = parts_of(depth);
        const bool was_split = views_[depth].group_centers != nullptr;
        views_[depth] = {};
        const float largest = find_center(book, parts.center);
        if (!(largest > 1e-10F && largest < 1e10F)) {
            return;  // the bounds would have to care for overflow and denormal numbers
        }
        integer_codebook view;
        view.coarse = parts.coarse;
        view.coarse_offsets = parts.coarse_offsets;
        view.coarse_steps = parts.coarse_steps;
        view.coarse_errors = parts.coarse_errors;
        view.norms = parts.norms;
        view.center_squares = parts.center_squares;
        view.tops = parts.tops;
        view.fine = parts.fine;
        view.fine_offsets = parts.fine_offsets;
        view.codes = parts.codes;
        view.center = parts.center;
        view.coarse_zero = coarse_zero_;
        view.norm = sort_into_groups(book, parts, was_split, view.group_centers) * margin;
        view.fine_step = view.norm / 32000.0F;
        view.center_norm = std::sqrt(squared_length(parts.center)) * margin;
        view.half_root_dim = 0.51F * std::sqrt(static_cast<float>(dim_));
        for (std::size_t group = 0; group < groups_; ++group) {
            fill_group(group, largest, book, parts, view);
        }
        views_[depth] = view;
    }

    /// One depth's copies; null when there are none.
    [[nodiscard]] const integer_codebook* view(std::size_t depth) const noexcept {
        return views_.size() != 0 && views_[depth].coarse != nullptr ? &views_[depth] : nullptr;
    }
    [[nodiscard]] std::size_t bytes() const noexcept {
        return coarse_.bytes() + fine_.bytes() + codes_.bytes() + floats_.bytes() + views_.bytes();
    }

private:
    static constexpr float margin = 1.0001F;  // above the rounding of the bounds themselves
    static constexpr std::size_t strip = 16;  // channels at a time; loops of known length become registers

    /// Where one depth's numbers are.
    struct depth_parts {
        std::uint8_t* coarse;
        std::int16_t* fine;
        code_t* codes;
        float* coarse_offsets;
        float* fine_offsets;
        float* coarse_steps;
        float* coarse_errors;
        float* norms;
        float* center_squares;
        float* tops;
        float* center;
        float* group_centers;
    };
    [[nodiscard]] depth_parts parts_of(std::size_t depth) noexcept {
        float* const floats = floats_.data() + depth * float_size();
        float* const center = floats + 2 * places();
        float* const group_centers = center + integer_fine_dim(dim_);
        float* const steps = group_centers + centers_size();
        return {coarse_.data() + depth * coarse_size(),
                fine_.data() + depth * fine_size(),
                codes_.data() + depth * places(),
                floats,
                floats + places(),
                steps,
                steps + groups_,
                steps + 2 * groups_,
                steps + 3 * groups_,
                steps + 4 * groups_,
                center,
                group_centers};
    }

    [[nodiscard]] float squared_length(const float* row) const noexcept {
        float sum = 0.0F;
        for (std::size_t j = 0; j < dim_; ++j) {
            sum += row[j] * row[j];
        }
        return sum;
    }
    /// A codeword's channels, one after the other: where they stand, or copied to `buffer`.
    [[nodiscard]] const float* row_of(const packed_codebook& book, std::size_t code, float* buffer) const noexcept {
        if (book.rows != nullptr && book.row_type == dtype::float32) {
            return static_cast<const float*>(book.rows) + code * dim_;
        }
        const float* const at = book.interleaved + code / search_block * dim_ * search_block + code % search_block;
        for (std::size_t j = 0; j < dim_; ++j) {
            buffer[j] = at[j * search_block];
        }
        return buffer;
    }
    /// Nearest integer; no call, whatever the target. Precondition: `|value| < 2^22`.
    static float round(float value) noexcept {
        constexpr float shift = 12582912.0F;  // 1.5 * 2^23: numbers of this size have no fraction
        return (value + shift) - shift;
    }
    [[nodiscard]] std::size_t places() const noexcept { return groups_ * integer_group; }
    [[nodiscard]] std::size_t quarters() const noexcept { return (dim_ + 3) / 4; }
    [[nodiscard]] std::size_t coarse_size() const noexcept { return places() * quarters() * 4; }
    [[nodiscard]] std::size_t fine_size() const noexcept { return places() * integer_fine_dim(dim_); }
    [[nodiscard]] std::size_t centers_size() const noexcept {
        return (groups_ + 31) / 32 * 32 * dim_;  // read 32 at a time
    }
    /// Offsets twice; the center; those of the groups; five numbers of each group, read of 32 at a time.
    [[nodiscard]] std::size_t float_size() const noexcept {
        return (2 * places() + integer_fine_dim(dim_) + centers_size() + 5 * groups_ + 32 + 15) / 16 * 16;
    }

    /// The mean of the codewords. Returns the largest magnitude of a weight.
    float find_center(const packed_codebook& book, float* center) const noexcept {
        float largest = 0.0F;
        for (std::size_t j = 0; j < dim_; ++j) {
            // Codewords beyond the last are zeros in the search layout.
            float sums[search_block] = {};
            float tops[search_block] = {};
            for (std::size_t block = 0; block < book.blocks(); ++block) {
                const float* const weights = book.interleaved + (block * dim_ + j) * search_block;
                for (std::size_t lane = 0; lane < search_block; ++lane) {
                    sums[lane] += weights[lane];
                    const float magnitude = std::fabs(weights[lane]);
                    tops[lane] = magnitude > tops[lane] ? magnitude : tops[lane];
                }
            }
            float sum = 0.0F;
            for (std::size_t lane = 0; lane < search_block; ++lane) {
                sum += sums[lane];
                largest = std::max(largest, tops[lane]);
            }
            center[j] = sum / static_cast<float>(book.codewords);
        }
        return largest;
    }

    /// Orders the codewords (`parts.codes`) such that groups have small bounds: by length, as suits residuals, or if
    /// that tells them little apart by neighbourhood, each group around its own center, which `group_centers` then
    /// points to. `was_split`: `parts.codes` are neighbourhoods from before the weights changed, and may go on being
    /// so. Returns the length of the longest codeword, shifted or not.
    float sort_into_groups(const packed_codebook& book, const depth_parts& parts, bool was_split,
                           const float*& group_centers) const noexcept {
        float* const keys = parts.coarse_offsets;  // free until the groups are filled
        code_t* const order = parts.codes;
        auto* const split = reinterpret_cast<code_t*>(parts.fine);  // free until the groups are filled
        for (std::size_t i = 0; was_split && i < book.codewords; ++i) {
            split[i] = parts.codes[place_of(i / integer_group, i % integer_group)];
        }
        float longest = 0.0F;
        float variance = 0.0F;          // of all channels
        float largest_variance = 0.0F;  // of one
        for (std::size_t block = 0; block < book.blocks(); ++block) {
            float lengths[search_block] = {};
            float shifted_lengths[search_block] = {};
            for (std::size_t j = 0; j < dim_; ++j) {
                const float* const weights = book.interleaved + (block * dim_ + j) * search_block;
                const float center = parts.center[j];
                for (std::size_t lane = 0; lane < search_block; ++lane) {
                    const float shifted = weights[lane] - center;
                    lengths[lane] += weights[lane] * weights[lane];
                    shifted_lengths[lane] += shifted * shifted;
                }
            }
            const std::size_t first = block * search_block;
            for (std::size_t c = first; c < std::min(first + search_block, book.codewords); ++c) {
                longest = std::max({longest, lengths[c - first], shifted_lengths[c - first]});
                keys[c] = shifted_lengths[c - first];
                order[c] = static_cast<code_t>(c);
            }
        }
        for (std::size_t j = 0; j < dim_; ++j) {
            float sums[search_block] = {};
            for (std::size_t block = 0; block < book.codewords / search_block; ++block) {
                const float* const weights = book.interleaved + (block * dim_ + j) * search_block;
                for (std::size_t lane = 0; lane < search_block; ++lane) {
                    const float shifted = weights[lane] - parts.center[j];
                    sums[lane] += shifted * shifted;
                }
            }
            float sum = 0.0F;
            for (const float lane : sums) {
                sum += lane;
            }
            variance += sum;
            largest_variance = std::max(largest_variance, sum);
        }
        partition_groups(keys, order, book.codewords);
        float by_length = 0.0F;
        float farthest = 0.0F;
        for (std::size_t first = 0; first < book.codewords; first += integer_group) {
            for (std::size_t i = first; i < std::min(first + integer_group, book.codewords); ++i) {
                farthest = std::max(farthest, keys[order[i]]);
            }
            by_length += std::sqrt(farthest);
        }
        // Groups by neighbourhood cost a product with each center, and time now: only where they may gain much.
        const bool alike = by_length > 0.5F * std::sqrt(farthest) * static_cast<float>(groups_);
        const bool stretched = largest_variance * static_cast<float>(dim_) > 5.0F * variance;
        if (groups_ >= 4 && alike && stretched) {
            float by_center = was_split ? center_groups(book, parts, split) : by_length;
            if (by_center >= 0.85F * by_length) {
                for (std::size_t c = 0; c < book.codewords; ++c) {
                    split[c] = static_cast<code_t>(c);
                }
                split_in_halves(book, keys, split, book.codewords);
                by_center = center_groups(book, parts, split);
            }
            if (by_center < 0.85F * by_length) {
                std::copy_n(split, book.codewords, order);
                group_centers = parts.group_centers;
            }
        }
        return std::sqrt(longest);
    }

    /// Partitions `order` by rising key into groups; inside of a group the order is any.
    static void partition_groups(const float* keys, code_t* order, std::size_t count) noexcept {
        if (count > integer_group) {
            const std::size_t half = halve(keys, order, count);
            partition_groups(keys, order, half);
            partition_groups(keys, order + half, count - half);
        }
    }
    /// Puts the lower half, in whole groups, first. Returns its size.
    static std::size_t halve(const float* keys, code_t* order, std::size_t count) noexcept {
        const std::size_t half = (count / 2 + integer_group - 1) / integer_group * integer_group;
        std::nth_element(order, order + half, order + count,
                         [keys](code_t a, code_t b) { return keys[a] != keys[b] ? keys[a] < keys[b] : a < b; });
        return half;
    }

    /// Partitions codewords along the direction in which they differ most (nearly: two steps of power iteration from
    /// the channel of largest variance), and each half again, down to one group.
    void split_in_halves(const packed_codebook& book, float* keys, code_t* order, std::size_t count) const noexcept {
        if (count <= integer_group) {
            return;
        }
        float buffer[most_integer_dim];
        float mean[most_integer_dim] = {};
        float direction[most_integer_dim] = {};
        float next[most_integer_dim] = {};
        for (std::size_t i = 0; i < count; ++i) {
            const float* const row = row_of(book, order[i], buffer);
            for (std::size_t j = 0; j < dim_; ++j) {
                mean[j] += row[j];
            }
        }
        for (std::size_t j = 0; j < dim_; ++j) {
            mean[j] /= static_cast<float>(count);
        }
        for (std::size_t i = 0; i < count; ++i) {
            const float* const row = row_of(book, order[i], buffer);
            for (std::size_t j = 0; j < dim_; ++j) {
                next[j] += (row[j] - mean[j]) * (row[j] - mean[j]);
            }
        }
        direction[std::max_element(next, next + dim_) - next] = 1.0F;
        for (int round = 0; round < 2; ++round) {
            std::fill_n(next, dim_, 0.0F);
            for (std::size_t i = 0; i < count; ++i) {
                const float* const row = row_of(book, order[i], buffer);
                const float along = project(row, mean, direction);
                for (std::size_t j = 0; j < dim_; ++j) {
                    next[j] += along * (row[j] - mean[j]);
                }
            }
            const float length = std::sqrt(squared_length(next));
            for (std::size_t j = 0; j < dim_ && length > 0.0F; ++j) {
                direction[j] = next[j] / length;
            }
        }
        for (std::size_t i = 0; i < count; ++i) {
            keys[order[i]] = project(row_of(book, order[i], buffer), mean, direction);
        }
        const std::size_t half = halve(keys, order, count);
        split_in_halves(book, keys, order, half);
        split_in_halves(book, keys, order + half, count - half);
    }
    [[nodiscard]] float project(const float* row, const float* mean, const float* direction) const noexcept {
        float sums[4] = {};  // one alone would wait for each addition
        std::size_t j = 0;
        for (; j + 4 <= dim_; j += 4) {
            for (std::size_t i = 0; i < 4; ++i) {
                sums[i] += (row[j + i] - mean[j + i]) * direction[j + i];
            }
        }
        for (; j < dim_; ++j) {
            sums[0] += (row[j] - mean[j]) * direction[j];
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    /// Where codeword `i` of a group stands in `codes` and the 16-bit copy: four of a lane make a quad.
    static std::size_t place_of(std::size_t group, std::size_t i) noexcept {
        return (group * search_block + i % search_block) * 4 + i / search_block;
    }
    /// `center_group` of all groups; returns the sum.
    float center_groups(const packed_codebook& book, const depth_parts& parts, const code_t* order) const noexcept {
        float sum = 0.0F;
        for (std::size_t group = 0; group < groups_; ++group) {
            sum += center_group(book, parts, order, group);
        }
        return sum;
    }
    /// Notes the mean of a group's codewords, shifted, and returns the largest distance from it.
    float center_group(const packed_codebook& book, const depth_parts& parts, const code_t* order,
                       std::size_t group) const noexcept {
        const std::size_t first = group * integer_group;
        const std::size_t count = std::min(integer_group, book.codewords - first);
        float buffer[most_integer_dim];
        float mean[most_integer_dim] = {};
        for (std::size_t i = 0; i < count; ++i) {
            const float* const row = row_of(book, order[first + i], buffer);
            for (std::size_t j = 0; j < dim_; ++j) {
                mean[j] += row[j];
            }
        }
        for (std::size_t j = 0; j < dim_; ++j) {
            mean[j] /= static_cast<float>(count);
            parts.group_centers[(group / search_block * dim_ + j) * search_block + group % search_block] =
                mean[j] - parts.center[j];
        }
        float farthest = 0.0F;
        for (std::size_t i = 0; i < count; ++i) {
            const float* const row = row_of(book, order[first + i], buffer);
            float distance = 0.0F;
            for (std::size_t j = 0; j < dim_; ++j) {
                distance += (row[j] - mean[j]) * (row[j] - mean[j]);
            }
            farthest = std::max(farthest, distance);
        }
        return std::sqrt(farthest);
    }

    /// Rounds the codewords of a group; its places beyond the last codeword are padding, which never wins.
    void fill_group(std::size_t group, float largest, const packed_codebook& book, const depth_parts& parts,
                    integer_codebook& view) const noexcept {
        const std::size_t fine_dim = integer_fine_dim(dim_);
        const std::size_t count = std::min(integer_group, book.codewords - group * integer_group);
        code_t order[integer_group];
        std::copy_n(parts.codes + group * integer_group, count, order);
        alignas(64) float center[most_integer_dim] = {};
        alignas(64) float group_center[most_integer_dim] = {};
        std::copy_n(parts.center, dim_, center);
        for (std::size_t j = 0; j < dim_ && view.group_centers != nullptr; ++j) {
            group_center[j] =
                view.group_centers[(group / search_block * dim_ + j) * search_block + group % search_block];
        }
        alignas(64) float weights[integer_group][most_integer_dim];  // shifted; zeros behind the last channel
        float top = 0.0F;
        for (std::size_t i = 0; i < count; ++i) {
            float buffer[most_integer_dim];
            const float* const row = row_of(book, order[i], buffer);
            float tops[strip] = {};
            for (std::size_t first = 0; first < fine_dim; first += strip) {
                float part[strip] = {};
                std::copy_n(row + first, std::min(strip, dim_ - std::min(dim_, first)), part);
                for (std::size_t j = 0; j < strip; ++j) {
                    const float weight = part[j] - center[first + j];
                    const float rest = std::fabs(weight - group_center[first + j]);
                    weights[i][first + j] = weight;
                    tops[j] = rest > tops[j] ? rest : tops[j];
                }
            }
            for (const float one : tops) {
                top = std::max(top, one);
            }
        }
        // Not so small that offsets overflow in steps.
        const float step = std::max(top, largest * 1e-6F) / static_cast<float>(coarse_zero_ - 1);
        const float steps_in_one = 1.0F / step;
        const float fine_steps_in_one = 1.0F / view.fine_step;
        float norm = 0.0F;
        float error = 0.0F;
        float highest = -std::numeric_limits<float>::infinity();
        for (std::size_t i = 0; i < integer_group; ++i) {
            const std::size_t place = place_of(group, i);
            if (i >= count) {
                parts.codes[place] = 0;
                parts.fine_offsets[place] = -std::numeric_limits<float>::infinity();
                parts.coarse_offsets[group * integer_group + i] = -std::numeric_limits<float>::infinity();
                continue;
            }
            std::uint8_t* const coarse = parts.coarse + (group * quarters() * integer_group + i) * 4;
            float products[strip] = {};
            float lengths[strip] = {};
            float squares[strip] = {};
            float errors[strip] = {};
            for (std::size_t first = 0; first < fine_dim; first += strip) {
                std::uint8_t bytes[strip];
                std::int16_t words[strip];
                for (std::size_t j = 0; j < strip; ++j) {
                    const float weight = weights[i][first + j];
                    const float rest = weight - group_center[first + j];
                    const float coarse_weight = round(rest * steps_in_one);
                    const float lost = rest - coarse_weight * step;
                    products[j] += weight * center[first + j];
                    lengths[j] += weight * weight;
                    squares[j] += rest * rest;
                    errors[j] += lost * lost;
                    bytes[j] = static_cast<std::uint8_t>(coarse_zero_ + static_cast<int>(coarse_weight));
                    words[j] = static_cast<std::int16_t>(round(weight * fine_steps_in_one));
                }
                std::copy_n(words, strip, parts.fine + place * fine_dim + first);
                for (std::size_t j = 0; j < strip && first + j < dim_; j += 4) {
                    std::copy_n(bytes + j, 4, coarse + (first + j) / 4 * integer_group * 4);
                }
            }
            float product = 0.0F;
            float length = 0.0F;
            float square = 0.0F;
            float lost = 0.0F;
            for (std::size_t j = 0; j < strip; ++j) {
                product += products[j];
                length += lengths[j];
                square += squares[j];
                lost += errors[j];
            }
            norm = std::max(norm, square);
            error = std::max(error, lost);
            // <x, c> + offset = <x - m, c - m> + (offset + <m, c - m>) + <x, m>; the last is the same for all c.
            const float offset = book.offsets[order[i]] + product;
            highest = std::max(highest, offset + 0.5F * length);
            parts.codes[place] = order[i];
            parts.fine_offsets[place] = offset;
            parts.coarse_offsets[group * integer_group + i] = offset * steps_in_one;
            view.offset = std::max({view.offset, std::fabs(book.offsets[order[i]]), std::fabs(offset)});
        }
        parts.coarse_steps[group] = step;
        parts.coarse_errors[group] = std::sqrt(error) * margin;
        parts.norms[group] = std::sqrt(norm) * margin;
        parts.center_squares[group] = squared_length(group_center);
        parts.tops[group] = highest;
    }

    std::size_t groups_ = 0;
    std::size_t dim_ = 0;
    std::int32_t coarse_zero_ = 0;
    aligned_buffer<std::uint8_t> coarse_;
    aligned_buffer<std::int16_t> fine_;
    aligned_buffer<code_t> codes_;
    aligned_buffer<float> floats_;
    aligned_buffer<integer_codebook> views_;
};

RVQKV_NAMESPACE_END
