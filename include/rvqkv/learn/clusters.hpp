// SPDX-License-Identifier: MIT
/// @file
/// The step that k-means and EMA training share: assign every vector to its nearest codeword and add it to that
/// codeword's sum, in one pass, over any number of threads without changing a bit of the result.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/nearest_codeword.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <span>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// Rows that one task handles: whole chunks of every search, and few enough to be in cache still when they are added.
inline constexpr std::size_t training_grain = 480;

namespace detail {

// Two doubles: a register on every target. Compilers leave plain loops scalar here, one or the other at -O2.
using double_pair = double __attribute__((vector_size(16)));
using float_pair = float __attribute__((vector_size(8)));

inline double_pair load_pair(const float* from) noexcept {
    float_pair pair;
    std::memcpy(&pair, from, sizeof(pair));
    return __builtin_convertvector(pair, double_pair);
}

/// Numerics: in double.
inline double squared_distance(const float* a, const float* b, std::size_t dim) noexcept {
    double_pair even = {};
    double_pair odd = {};
    std::size_t j = 0;
    for (; dim - j >= 4; j += 4) {
        const double_pair first = load_pair(a + j) - load_pair(b + j);
        const double_pair second = load_pair(a + j + 2) - load_pair(b + j + 2);
        even += first * first;
        odd += second * second;
    }
    even += odd;
    double sum = even[0] + even[1];
    for (; j != dim; ++j) {
        const double difference = static_cast<double>(a[j]) - static_cast<double>(b[j]);
        sum += difference * difference;
    }
    return sum;
}

/// Numerics: in double.
inline double squared_length(const float* row, std::size_t dim) noexcept {
    double_pair even = {};
    double_pair odd = {};
    std::size_t j = 0;
    for (; dim - j >= 4; j += 4) {
        const double_pair first = load_pair(row + j);
        const double_pair second = load_pair(row + j + 2);
        even += first * first;
        odd += second * second;
    }
    even += odd;
    double sum = even[0] + even[1];
    for (; j != dim; ++j) {
        sum += static_cast<double>(row[j]) * static_cast<double>(row[j]);
    }
    return sum;
}

/// `sums[j] += row[j]`.
inline void add_row(double* sums, const float* row, std::size_t dim) noexcept {
    std::size_t j = 0;
    for (; dim - j >= 2; j += 2) {
        double_pair sum;
        std::memcpy(&sum, sums + j, sizeof(sum));
        sum += load_pair(row + j);
        std::memcpy(sums + j, &sum, sizeof(sum));
    }
    if (j != dim) {
        sums[j] += static_cast<double>(row[j]);
    }
}

/// Takes the results of tasks in the order of their numbers, whatever the order in which the tasks end. No task waits:
/// one that ends before its turn leaves its result to be taken with those before it, by whichever thread is at it.
class in_order {
public:
    explicit in_order(std::size_t tasks) : ended_(tasks, false) {}

    /// Task `i` has ended. Calls `take(k)` for every number `k` whose turn has come, never two at a time.
    template <class Take>
    void end(std::size_t i, const Take& take) {
        std::unique_lock lock(mutex_);
        ended_[i] = true;
        if (taking_) {
            return;
        }
        taking_ = true;
        while (next_ < ended_.size() && ended_[next_]) {
            lock.unlock();
            take(next_);
            lock.lock();
            ++next_;
        }
        taking_ = false;
    }

private:
    std::mutex mutex_;
    std::vector<bool> ended_;
    std::size_t next_ = 0;
    bool taking_ = false;
};

}  // namespace detail

/// Sum and number of the vectors of each codeword.
struct cluster_sums {
    std::vector<double> sums;         ///< `[codewords, dim]`
    std::vector<std::size_t> counts;  ///< `[codewords]`

    void clear(std::size_t codewords, std::size_t dim) {
        sums.assign(codewords * dim, 0.0);
        counts.assign(codewords, 0);
    }
    /// Adds rows by their codes, one after the other, but those whose `mask` is 0 (no mask counts all).
    /// Shapes: `x` `[n, dim]`; `codes` `[n]`; `mask` `[n]` or empty.
    void add(matrix_view<const float> x, std::span<const code_t> codes, std::span<const std::uint8_t> mask) noexcept {
        for (std::size_t i = 0; i < x.rows; ++i) {
            if (mask.empty() || mask[i] != 0) {
                ++counts[codes[i]];
                detail::add_row(sums.data() + codes[i] * x.cols, x.row(i), x.cols);
            }
        }
    }
};

/// `codes[i]` becomes the nearest codeword of row `i`, and `clusters` what `cluster_sums::add` makes of all rows.
/// `prepare(first, last)` is called once for each range of rows right before they are searched; it may change them.
/// Shapes:     `x` `[n, dim]`; `codes` `[n]`; `mask` `[n]` or empty.
/// Complexity: the search, split over `workers`; one thread at a time adds, while the others go on searching.
/// Numerics:   sums are in double and in the order of the rows, whatever the number of threads.
template <class Prepare>
void assign_and_sum(matrix_view<const float> x, const packed_codebook& book, std::span<code_t> codes,
                    std::span<const std::uint8_t> mask, cluster_sums& clusters, const executor& workers,
                    const Prepare& prepare) {
    const kernel_table& kernels = best_kernels();
    clusters.clear(book.codewords, x.cols);
    const std::size_t grain = training_grain;
    detail::in_order ranges((x.rows + grain - 1) / grain);
    parallel_ranges(workers, x.rows, grain, [&](std::size_t first, std::size_t last) {
        prepare(first, last);
        nearest_codeword(x.slice_rows(first, last - first), book, codes.subspan(first, last - first), {}, kernels);
        ranges.end(first / grain, [&](std::size_t range) {
            const std::size_t begin = range * grain;
            const std::size_t count = std::min(grain, x.rows - begin);
            clusters.add(x.slice_rows(begin, count), codes.subspan(begin, count),
                         mask.empty() ? mask : mask.subspan(begin, count));
        });
    });
}

RVQKV_NAMESPACE_END
