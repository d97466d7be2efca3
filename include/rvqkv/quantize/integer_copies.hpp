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

/// Codewords from which a codebook has integer copies: below, the float32 search is as quick.
inline constexpr std::size_t least_integer_codewords = 512;
/// Channels from which a codebook has integer copies.
inline constexpr std::size_t least_integer_dim = 16;

/// Integer copies of all depths of a codebook. Threads: immutable once made.
class integer_copies {
public:
    /// Whether codebooks of this size have integer copies on this machine.
    [[nodiscard]] static bool wanted(std::size_t codewords, std::size_t dim) noexcept {
        return codewords >= least_integer_codewords && dim >= least_integer_dim && dim <= most_integer_dim &&
               is_available(simd_level::avx512vnni);
    }

    /// Copies for `depths` depths, still to be filled by `build`.
    /// Errors: `out_of_memory`.
    [[nodiscard]] static result<integer_copies> create(std::size_t depths, std::size_t codewords, std::size_t dim) {
        integer_copies copies;
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

    /// Fills one depth from its search layout. A depth whose numbers are all tiny or somewhere huge gets no copies:
    /// `view` is null for it.
    /// Errors:     `out_of_memory`; the depth has no copies then.
    /// Complexity: O(codewords * dim * log codewords). Memory: another copy of the depth in float32 while it runs.
    [[nodiscard]] status build(std::size_t depth, const packed_codebook& book) {
        auto floats = aligned_buffer<float>::allocate(book.codewords * (dim_ + 1));
        auto sorted = aligned_buffer<code_t>::allocate(2 * book.codewords);
        if (!floats || !sorted) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        scratch work{floats.value().data(), floats.value().data() + book.codewords * dim_, sorted.value().data(),
                     book.codewords};
        const depth_parts parts = parts_of(depth);
        const float largest = find_center(book, parts.center);
        if (!(largest > 1e-10F && largest < 1e10F)) {
            return {};  // the bounds would have to care for overflow and denormal numbers
        }
        double longest = 0.0;
        for (std::size_t c = 0; c < book.codewords; ++c) {
            double length = 0.0;
            double shifted_length = 0.0;
            float* const row = work.rows + c * dim_;
            for (std::size_t j = 0; j < dim_; ++j) {
                const float weight = book.interleaved[(c / search_block * dim_ + j) * search_block + c % search_block];
                row[j] = weight - parts.center[j];
                length += square(static_cast<double>(weight));
                shifted_length += square(static_cast<double>(row[j]));
            }
            longest = std::max({longest, length, shifted_length});
            work.keys[c] = static_cast<float>(shifted_length);
            work.order[c] = static_cast<code_t>(c);
        }

        integer_codebook view;
        view.coarse = parts.coarse;
        view.coarse_offsets = parts.coarse_offsets;
        view.coarse_steps = parts.coarse_steps;
        view.coarse_errors = parts.coarse_errors;
        view.norms = parts.norms;
        view.fine = parts.fine;
        view.fine_offsets = parts.fine_offsets;
        view.codes = parts.codes;
        view.center = parts.center;
        view.norm = static_cast<float>(std::sqrt(longest) * margin);
        view.fine_step = view.norm / 32000.0F;
        view.center_norm = static_cast<float>(length_of(parts.center) * margin);
        view.half_root_dim = static_cast<float>(0.51 * std::sqrt(static_cast<double>(dim_)));
        view.group_centers = sort_into_groups(work, parts.group_centers) ? parts.group_centers : nullptr;
        for (std::size_t group = 0; group < groups_; ++group) {
            fill_group(group, largest, book, work, parts, view);
        }
        views_[depth] = view;
        return {};
    }

    /// One depth's copies; null when there are none.
    [[nodiscard]] const integer_codebook* view(std::size_t depth) const noexcept {
        return views_.size() != 0 && views_[depth].coarse != nullptr ? &views_[depth] : nullptr;
    }
    [[nodiscard]] std::size_t bytes() const noexcept {
        return coarse_.bytes() + fine_.bytes() + codes_.bytes() + floats_.bytes() + views_.bytes();
    }

private:
    static constexpr double margin = 1.0001;  // above the rounding of the bounds themselves

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
        float* center;
        float* group_centers;
    };
    /// What `build` works with. Groups are runs of `order`.
    struct scratch {
        float* rows;    ///< `[codewords, dim]`: shifted by the center
        float* keys;    ///< `[codewords]`: to sort by
        code_t* order;  ///< `[codewords]`, and as many again to try another one
        std::size_t codewords;
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
                center,
                group_centers};
    }

    static double square(double value) noexcept { return value * value; }
    [[nodiscard]] double length_of(const float* row) const noexcept {
        double sum = 0.0;
        for (std::size_t j = 0; j < dim_; ++j) {
            sum += square(static_cast<double>(row[j]));
        }
        return std::sqrt(sum);
    }
    /// Nearest integer; no call, whatever the target. Precondition: `|value| < 2^22`.
    static float round(float value) noexcept {
        constexpr float shift = 12582912.0F;  // 1.5 * 2^23: numbers of this size have no fraction
        const volatile float shifted = value + shift;
        return shifted - shift;
    }
    [[nodiscard]] std::size_t places() const noexcept { return groups_ * integer_group; }
    [[nodiscard]] std::size_t quarters() const noexcept { return (dim_ + 3) / 4; }
    [[nodiscard]] std::size_t coarse_size() const noexcept { return places() * quarters() * 4; }
    [[nodiscard]] std::size_t fine_size() const noexcept { return places() * integer_fine_dim(dim_); }
    [[nodiscard]] std::size_t centers_size() const noexcept {
        return (groups_ + 31) / 32 * 32 * dim_;  // read 32 at a time
    }
    /// Offsets twice; the center; those of the groups; steps, errors and norms of the groups, read 32 at a time.
    [[nodiscard]] std::size_t float_size() const noexcept {
        return (2 * places() + integer_fine_dim(dim_) + centers_size() + 3 * groups_ + 32 + 15) / 16 * 16;
    }

    /// The mean of the codewords. Returns the largest magnitude of a weight.
    float find_center(const packed_codebook& book, float* center) const noexcept {
        float largest = 0.0F;
        for (std::size_t j = 0; j < dim_; ++j) {
            double sum = 0.0;
            for (std::size_t c = 0; c < book.codewords; ++c) {
                const float weight = book.interleaved[(c / search_block * dim_ + j) * search_block + c % search_block];
                largest = std::max(largest, std::fabs(weight));
                sum += static_cast<double>(weight);
            }
            center[j] = static_cast<float>(sum / static_cast<double>(book.codewords));
        }
        return largest;
    }

    /// Orders the codewords such that groups have small bounds: by length, as suits residuals, or if that tells them
    /// little apart by neighbourhood, each group around its own center. Returns whether groups have centers.
    bool sort_into_groups(scratch& work, float* group_centers) const {
        code_t* const order = work.order;
        const float* const keys = work.keys;
        std::sort(order, order + work.codewords,
                  [keys](code_t a, code_t b) { return keys[a] != keys[b] ? keys[a] < keys[b] : a < b; });
        double by_length = 0.0;
        for (std::size_t first = 0; first < work.codewords; first += integer_group) {
            const std::size_t last = std::min(first + integer_group, work.codewords) - 1;
            by_length += std::sqrt(static_cast<double>(keys[order[last]]));
        }
        const double longest = std::sqrt(static_cast<double>(keys[order[work.codewords - 1]]));
        if (groups_ < 4 || by_length < 0.5 * longest * static_cast<double>(groups_) || !is_stretched(work)) {
            return false;
        }
        code_t* const split = order + work.codewords;
        for (std::size_t c = 0; c < work.codewords; ++c) {
            split[c] = static_cast<code_t>(c);
        }
        split_in_halves(work, split, work.codewords);
        double by_center = 0.0;
        for (std::size_t group = 0; group < groups_; ++group) {
            by_center += center_group(work, split, group, group_centers);
        }
        if (by_center > 0.85 * by_length) {
            return false;
        }
        work.order = split;
        return true;
    }

    /// Whether codewords differ in some channel much more than in the others: the sign that they have a structure.
    [[nodiscard]] bool is_stretched(const scratch& work) const noexcept {
        float variance[most_integer_dim] = {};
        for (std::size_t c = 0; c < work.codewords; ++c) {
            for (std::size_t j = 0; j < dim_; ++j) {
                variance[j] += work.rows[c * dim_ + j] * work.rows[c * dim_ + j];
            }
        }
        float total = 0.0F;
        for (std::size_t j = 0; j < dim_; ++j) {
            total += variance[j];
        }
        return *std::max_element(variance, variance + dim_) * static_cast<float>(dim_) > 5.0F * total;
    }

    /// Sorts codewords along the direction in which they differ most (nearly: two steps of power iteration from the
    /// channel of largest variance), and each half again, down to one group.
    void split_in_halves(const scratch& work, code_t* order, std::size_t count) const {
        if (count <= integer_group) {
            return;
        }
        float mean[most_integer_dim] = {};
        float direction[most_integer_dim] = {};
        float next[most_integer_dim];
        for (std::size_t i = 0; i < count; ++i) {
            for (std::size_t j = 0; j < dim_; ++j) {
                mean[j] += work.rows[order[i] * dim_ + j];
            }
        }
        for (std::size_t j = 0; j < dim_; ++j) {
            mean[j] /= static_cast<float>(count);
        }
        for (std::size_t i = 0; i < count; ++i) {
            for (std::size_t j = 0; j < dim_; ++j) {
                const float offset = work.rows[order[i] * dim_ + j] - mean[j];
                next[j] = i == 0 ? offset * offset : next[j] + offset * offset;
            }
        }
        direction[std::max_element(next, next + dim_) - next] = 1.0F;
        for (int round = 0; round < 2; ++round) {
            std::fill_n(next, dim_, 0.0F);
            for (std::size_t i = 0; i < count; ++i) {
                const float along = project(work.rows + order[i] * dim_, mean, direction);
                for (std::size_t j = 0; j < dim_; ++j) {
                    next[j] += along * (work.rows[order[i] * dim_ + j] - mean[j]);
                }
            }
            const double length = length_of(next);
            for (std::size_t j = 0; j < dim_ && length > 0.0; ++j) {
                direction[j] = static_cast<float>(static_cast<double>(next[j]) / length);
            }
        }
        for (std::size_t i = 0; i < count; ++i) {
            work.keys[order[i]] = project(work.rows + order[i] * dim_, mean, direction);
        }
        const float* const keys = work.keys;
        const std::size_t half = (count / 2 + integer_group - 1) / integer_group * integer_group;
        std::nth_element(order, order + half, order + count,
                         [keys](code_t a, code_t b) { return keys[a] != keys[b] ? keys[a] < keys[b] : a < b; });
        split_in_halves(work, order, half);
        split_in_halves(work, order + half, count - half);
    }
    [[nodiscard]] float project(const float* row, const float* mean, const float* direction) const noexcept {
        float sum = 0.0F;
        for (std::size_t j = 0; j < dim_; ++j) {
            sum += (row[j] - mean[j]) * direction[j];
        }
        return sum;
    }

    /// Notes the mean of a group's codewords and returns the largest distance from it.
    double center_group(const scratch& work, const code_t* order, std::size_t group, float* group_centers) const {
        const std::size_t first = group * integer_group;
        const std::size_t count = std::min(integer_group, work.codewords - first);
        float mean[most_integer_dim] = {};
        for (std::size_t i = 0; i < count; ++i) {
            for (std::size_t j = 0; j < dim_; ++j) {
                mean[j] += work.rows[order[first + i] * dim_ + j];
            }
        }
        for (std::size_t j = 0; j < dim_; ++j) {
            mean[j] /= static_cast<float>(count);
            group_centers[(group / search_block * dim_ + j) * search_block + group % search_block] = mean[j];
        }
        double farthest = 0.0;
        for (std::size_t i = 0; i < count; ++i) {
            double distance = 0.0;
            for (std::size_t j = 0; j < dim_; ++j) {
                distance += square(static_cast<double>(work.rows[order[first + i] * dim_ + j] - mean[j]));
            }
            farthest = std::max(farthest, distance);
        }
        return std::sqrt(farthest);
    }

    /// Rounds the codewords of a group; its places beyond the last codeword are padding, which never wins.
    void fill_group(std::size_t group, float largest, const packed_codebook& book, const scratch& work,
                    const depth_parts& parts, integer_codebook& view) const noexcept {
        const std::size_t fine_dim = integer_fine_dim(dim_);
        const code_t* const order = work.order + group * integer_group;
        const std::size_t count = std::min(integer_group, work.codewords - group * integer_group);
        float group_center[most_integer_dim] = {};
        for (std::size_t j = 0; j < dim_ && view.group_centers != nullptr; ++j) {
            group_center[j] =
                view.group_centers[(group / search_block * dim_ + j) * search_block + group % search_block];
        }
        float top = 0.0F;
        for (std::size_t i = 0; i < count; ++i) {
            for (std::size_t j = 0; j < dim_; ++j) {
                top = std::max(top, std::fabs(work.rows[order[i] * dim_ + j] - group_center[j]));
            }
        }
        const float step = std::max(top, largest * 1e-6F) / 127.0F;  // not so small that offsets overflow in steps
        double norm = 0.0;
        double error = 0.0;
        for (std::size_t i = 0; i < integer_group; ++i) {
            const std::size_t quad = group * search_block + i % search_block;
            const std::size_t place = quad * 4 + i / search_block;
            std::uint8_t* const coarse = parts.coarse + (group * quarters() * integer_group + i) * 4;
            const bool padding = i >= count;
            double offset =
                padding ? -std::numeric_limits<double>::infinity() : static_cast<double>(book.offsets[order[i]]);
            double square_sum = 0.0;
            double error_sum = 0.0;
            for (std::size_t j = 0; j < dim_ && !padding; ++j) {
                const float weight = work.rows[order[i] * dim_ + j];
                const float rest = weight - group_center[j];
                const float coarse_weight = round(rest / step);
                coarse[j / 4 * integer_group * 4 + j % 4] =
                    static_cast<std::uint8_t>(128 + static_cast<int>(coarse_weight));
                parts.fine[place * fine_dim + j] = static_cast<std::int16_t>(round(weight / view.fine_step));
                // <x, c> + offset = <x - m, c - m> + (offset + <m, c - m>) + <x, m>; the last is the same for all c.
                offset += static_cast<double>(weight) * static_cast<double>(parts.center[j]);
                square_sum += square(static_cast<double>(rest));
                error_sum +=
                    square(static_cast<double>(rest) - static_cast<double>(coarse_weight) * static_cast<double>(step));
            }
            norm = std::max(norm, square_sum);
            error = std::max(error, error_sum);
            parts.codes[place] = padding ? code_t{0} : order[i];
            parts.fine_offsets[place] = static_cast<float>(offset);
            parts.coarse_offsets[group * integer_group + i] = static_cast<float>(offset / static_cast<double>(step));
            if (!padding) {
                view.offset =
                    std::max({view.offset, std::fabs(book.offsets[order[i]]), std::fabs(parts.fine_offsets[place])});
            }
        }
        parts.coarse_steps[group] = step;
        parts.coarse_errors[group] = static_cast<float>(std::sqrt(error) * margin);
        parts.norms[group] = static_cast<float>(std::sqrt(norm) * margin);
    }

    std::size_t groups_ = 0;
    std::size_t dim_ = 0;
    aligned_buffer<std::uint8_t> coarse_;
    aligned_buffer<std::int16_t> fine_;
    aligned_buffer<code_t> codes_;
    aligned_buffer<float> floats_;
    aligned_buffer<integer_codebook> views_;
};

RVQKV_NAMESPACE_END
