// SPDX-License-Identifier: MIT
/// @file
/// Views over Eigen matrices and back, without a copy. Opt-in: no other header of the library includes Eigen.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/tensor_view.hpp"

#include <Eigen/Core>
#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>

RVQKV_NAMESPACE_BEGIN

namespace detail {

/// The element type that views know, for Eigen's name of it.
template <class Scalar>
struct eigen_element {};
template <>
struct eigen_element<float> {
    static constexpr dtype type = dtype::float32;
};
template <>
struct eigen_element<Eigen::half> {
    static constexpr dtype type = dtype::float16;
};
template <>
struct eigen_element<Eigen::bfloat16> {
    static constexpr dtype type = dtype::bfloat16;
};

/// What `data()` of a (possibly const) expression points to: const where the expression cannot be written.
template <class Expression>
using eigen_pointee = std::remove_pointer_t<decltype(std::declval<Expression&>().data())>;

}  // namespace detail

/// An Eigen matrix, vector, map, reference or block of floats, halfs or bfloat16s that lies in memory: anything with a
/// pointer and strides, but no expression that has yet to be computed, and no temporary matrix.
template <class E>
concept EigenDense = requires(std::remove_reference_t<E>& expression) {
    requires std::is_base_of_v<Eigen::DenseBase<std::remove_cvref_t<E>>, std::remove_cvref_t<E>>;
    requires std::is_lvalue_reference_v<E> ||
        !std::is_base_of_v<Eigen::PlainObjectBase<std::remove_cvref_t<E>>, std::remove_cvref_t<E>>;
    detail::eigen_element<std::remove_const_t<detail::eigen_pointee<std::remove_reference_t<E>>>>::type;
    expression.rowStride();
    expression.colStride();
};

/// A tensor over a matrix: tokens down the rows; heads side by side in the columns, `cols / heads` channels each. The
/// view writes if the expression can be written.
/// Shapes:  `matrix` `[tokens, heads * channels]`, row- or column-major, any strides.
/// Errors:  `invalid_argument` when `heads` does not divide the columns.
/// Threads: as the matrix, which must outlive the view.
template <class E>
requires EigenDense<E&&>
[[nodiscard]] auto tensor_of(E&& matrix, std::size_t heads = 1) {
    using element = detail::eigen_pointee<std::remove_reference_t<E>>;
    using view = basic_tensor_view<!std::is_const_v<element>>;
    const auto cols = static_cast<std::size_t>(matrix.cols());
    if (heads == 0 || cols % heads != 0) {
        return result<view>(error{
            error_code::invalid_argument,
            "heads is " + std::to_string(heads) + ", must divide the matrix's " + std::to_string(cols) + " columns"});
    }
    const std::size_t channels = cols / heads;
    return result<view>(
        view(matrix.data(), detail::eigen_element<std::remove_const_t<element>>::type,
             {static_cast<std::size_t>(matrix.rows()), heads, channels},
             {matrix.rowStride(), matrix.colStride() * static_cast<std::ptrdiff_t>(channels), matrix.colStride()}));
}

/// The rows of a float matrix as a `matrix_view`. The view writes if the expression can be written.
/// Shapes:  `matrix` `[rows, cols]`, any stride between rows.
/// Errors:  `invalid_argument` when neighbours in a row are not side by side in memory; a column-major matrix whose
///          columns are the vectors is viewed by its `transpose()`.
/// Threads: as the matrix, which must outlive the view.
template <class E>
requires EigenDense<E&&> && std::is_same_v < std::remove_const_t<detail::eigen_pointee<std::remove_reference_t<E>>>,
float > [[nodiscard]] auto matrix_of(E&& matrix) {
    using view = matrix_view<detail::eigen_pointee<std::remove_reference_t<E>>>;
    const std::ptrdiff_t cols = matrix.cols();
    if (cols > 1 && matrix.colStride() != 1) {
        return result<view>(error{error_code::invalid_argument,
                                  "columns of the matrix are " + std::to_string(matrix.colStride()) +
                                      " elements apart, must be 1; of a column-major matrix pass the transpose"});
    }
    // With one row there is no distance between rows; whatever Eigen says then, `cols` is right.
    const std::ptrdiff_t stride = matrix.rows() > 1 ? matrix.rowStride() : cols;
    if (stride < cols) {
        return result<view>(error{error_code::invalid_argument, "rows of the matrix are " + std::to_string(stride) +
                                                                    " elements apart, must be at least its " +
                                                                    std::to_string(cols) + " columns"});
    }
    return result<view>(view(matrix.data(), static_cast<std::size_t>(matrix.rows()), static_cast<std::size_t>(cols),
                             static_cast<std::size_t>(stride)));
}

/// A row-major matrix of floats, as `matrix_view` sees memory.
using eigen_matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Eigen's map of a view's rows. Threads: as the view's memory, which must outlive the map.
[[nodiscard]] inline auto eigen_map_of(const matrix_view<float>& view) {
    return Eigen::Map<eigen_matrix, Eigen::Unaligned, Eigen::OuterStride<>>(
        view.data, static_cast<Eigen::Index>(view.rows), static_cast<Eigen::Index>(view.cols),
        Eigen::OuterStride<>(static_cast<Eigen::Index>(view.stride)));
}
/// @copydoc eigen_map_of
[[nodiscard]] inline auto eigen_map_of(const matrix_view<const float>& view) {
    return Eigen::Map<const eigen_matrix, Eigen::Unaligned, Eigen::OuterStride<>>(
        view.data, static_cast<Eigen::Index>(view.rows), static_cast<Eigen::Index>(view.cols),
        Eigen::OuterStride<>(static_cast<Eigen::Index>(view.stride)));
}

RVQKV_NAMESPACE_END
