// SPDX-License-Identifier: MIT
#include "product_rivals.hpp"

#include <Eigen/Core>

#include <algorithm>
#include <limits>

#if BENCH_OPENBLAS
#include <cblas.h>
#endif

namespace bench {
namespace {

constexpr std::size_t part_rows = 64;

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using rows_view = Eigen::Map<const matrix>;

Eigen::Index index(std::size_t value) {
    return static_cast<Eigen::Index>(value);
}

void multiply_eigen(const float* x, std::size_t rows, const float* codewords, std::size_t count, std::size_t dim,
                    float* scores) {
    Eigen::Map<matrix>(scores, index(rows), index(count)).noalias() =
        rows_view(x, index(rows), index(dim)) * rows_view(codewords, index(count), index(dim)).transpose();
}

#if BENCH_OPENBLAS
void multiply_openblas(const float* x, std::size_t rows, const float* codewords, std::size_t count, std::size_t dim,
                       float* scores) {
    const auto size = [](std::size_t value) { return static_cast<blasint>(value); };
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, size(rows), size(count), size(dim), 1.0F, x, size(dim),
                codewords, size(dim), 0.0F, scores, size(count));
}
#endif

constexpr product all_products[] = {
    {"eigen", multiply_eigen},
#if BENCH_OPENBLAS
    {"openblas", multiply_openblas},
#endif
};

// Four registers of maxima side by side, so that the compiler's code waits for none of them. Eigen's own maxCoeff(&at)
// takes one value after the other.
constexpr std::size_t lanes = 16;
constexpr std::size_t chains = 4;
using floats = float __attribute__((vector_size(lanes * sizeof(float)), aligned(sizeof(float))));
using integers = std::int32_t __attribute__((vector_size(lanes * sizeof(std::int32_t))));

std::uint16_t best_of_row(const float* products, const float* offsets, std::size_t count) {
    floats best[chains];
    integers at[chains];
    for (std::size_t i = 0; i < chains; ++i) {
        best[i] = floats{} - std::numeric_limits<float>::infinity();
        at[i] = integers{};
    }
    std::size_t c = 0;
    for (; c + lanes * chains <= count; c += lanes * chains) {
        for (std::size_t i = 0; i < chains; ++i) {
            const floats score = *reinterpret_cast<const floats*>(products + c + i * lanes) +
                                 *reinterpret_cast<const floats*>(offsets + c + i * lanes);
            const integers better = score > best[i];
            best[i] = better ? score : best[i];
            at[i] = better ? integers{} + static_cast<std::int32_t>(c + i * lanes) : at[i];
        }
    }
    float top = -std::numeric_limits<float>::infinity();
    std::size_t code = 0;
    const auto offer = [&](float score, std::size_t candidate) {
        if (score > top || (score == top && candidate < code)) {
            top = score;
            code = candidate;
        }
    };
    if (c > 0) {
        for (std::size_t i = 0; i < chains; ++i) {
            for (std::size_t lane = 0; lane < lanes; ++lane) {
                offer(best[i][lane], static_cast<std::size_t>(at[i][lane]) + lane);
            }
        }
    }
    for (; c < count; ++c) {
        offer(products[c] + offsets[c], c);
    }
    return static_cast<std::uint16_t>(code);
}

}  // namespace

std::span<const product> products() {
#if BENCH_OPENBLAS
    openblas_set_num_threads(1);
#endif
    return all_products;
}

std::size_t scratch_of(std::size_t count) {
    return part_rows * count;
}

void product_nearest(const product& product, const float* x, std::size_t rows, const float* codewords,
                     const float* offsets, std::size_t count, std::size_t dim, float* scores, std::uint16_t* codes) {
    for (std::size_t first = 0; first < rows; first += part_rows) {
        const std::size_t part = std::min(part_rows, rows - first);
        product.multiply(x + first * dim, part, codewords, count, dim, scores);
        for (std::size_t i = 0; i < part; ++i) {
            codes[first + i] = best_of_row(scores + i * count, offsets, count);
        }
    }
}

void product_encode(const product& product, float* x, std::size_t rows, const float* codewords, const float* offsets,
                    std::size_t depths, std::size_t count, std::size_t dim, float* scores, std::uint16_t* codes) {
    Eigen::Map<matrix> left(x, index(rows), index(dim));
    for (std::size_t depth = 0; depth < depths; ++depth) {
        const float* const book = codewords + depth * count * dim;
        std::uint16_t* const chosen = codes + depth * rows;
        product_nearest(product, x, rows, book, offsets + depth * count, count, dim, scores, chosen);
        const rows_view weights(book, index(count), index(dim));
        for (std::size_t i = 0; i < rows; ++i) {
            left.row(index(i)) -= weights.row(chosen[i]);
        }
    }
}

bool agree(std::span<const std::uint16_t> a, std::span<const std::uint16_t> b) {
    std::size_t different = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        different += a[i] != b[i] ? 1 : 0;
    }
    return a.size() == b.size() && different <= a.size() / 100;
}

}  // namespace bench
