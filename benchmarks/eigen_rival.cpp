// SPDX-License-Identifier: MIT
#include "eigen_rival.hpp"

#include <Eigen/Core>

namespace bench {
namespace {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using rows_view = Eigen::Map<const matrix>;

Eigen::Index index(std::size_t value) {
    return static_cast<Eigen::Index>(value);
}

}  // namespace

void eigen_nearest(const float* x, std::size_t rows, const float* codewords, const float* offsets, std::size_t count,
                   std::size_t dim, float* scores, std::uint16_t* codes) {
    Eigen::Map<matrix> products(scores, index(rows), index(count));
    products.noalias() =
        rows_view(x, index(rows), index(dim)) * rows_view(codewords, index(count), index(dim)).transpose();
    const Eigen::Map<const Eigen::RowVectorXf> offset(offsets, index(count));
    for (std::size_t i = 0; i < rows; ++i) {
        Eigen::Index best = 0;
        (products.row(index(i)) + offset).maxCoeff(&best);
        codes[i] = static_cast<std::uint16_t>(best);
    }
}

void eigen_encode(float* x, std::size_t rows, const float* codewords, const float* offsets, std::size_t depths,
                  std::size_t count, std::size_t dim, float* scores, std::uint16_t* codes) {
    Eigen::Map<matrix> left(x, index(rows), index(dim));
    for (std::size_t depth = 0; depth < depths; ++depth) {
        const float* const book = codewords + depth * count * dim;
        std::uint16_t* const chosen = codes + depth * rows;
        eigen_nearest(x, rows, book, offsets + depth * count, count, dim, scores, chosen);
        const rows_view weights(book, index(count), index(dim));
        for (std::size_t i = 0; i < rows; ++i) {
            left.row(index(i)) -= weights.row(chosen[i]);
        }
    }
}

}  // namespace bench
