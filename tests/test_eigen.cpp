// SPDX-License-Identifier: MIT
/// @file
/// Views over Eigen's matrices, maps, references and blocks, and maps over views.
#include "rvqkv/interop/eigen.hpp"

#include "rvqkv/quantize/rows.hpp"
#include "rvqkv/quantize/vector_quantizer.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using row_major = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using column_major = Eigen::MatrixXf;
using any_stride = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;

// What may be viewed: what lies in memory, has an element type that the library knows, and lives on.
template <class E>
constexpr bool viewable = rvqkv::EigenDense<E>;
static_assert(viewable<row_major&> && viewable<const column_major&>);
static_assert(viewable<Eigen::VectorXf&> && viewable<Eigen::RowVectorXf&> && viewable<Eigen::ArrayXXf&>);
static_assert(viewable<Eigen::Matrix<Eigen::half, 4, 4>&> && viewable<Eigen::Matrix<Eigen::bfloat16, 4, 4>&>);
static_assert(viewable<Eigen::Map<row_major>> && viewable<Eigen::Map<const row_major>>);
static_assert(viewable<Eigen::Ref<column_major>&> && viewable<const Eigen::Ref<const column_major>&>);
static_assert(viewable<Eigen::Block<row_major>> && viewable<Eigen::Transpose<column_major>>);
static_assert(!viewable<row_major>);  // a temporary's memory is gone before the view is used
static_assert(!viewable<Eigen::MatrixXd&> && !viewable<Eigen::MatrixXi&>);
static_assert(!viewable<decltype(std::declval<column_major&>() + std::declval<column_major&>())>);
static_assert(!viewable<std::vector<float>&> && !viewable<int>);

// A view writes if its expression does.
template <class E>
using tensor_type = std::remove_cvref_t<decltype(rvqkv::tensor_of(std::declval<E>()).value())>;
static_assert(std::is_same_v<tensor_type<row_major&>, rvqkv::mutable_tensor_view>);
static_assert(std::is_same_v<tensor_type<const row_major&>, rvqkv::tensor_view>);
static_assert(std::is_same_v<tensor_type<Eigen::Map<row_major>>, rvqkv::mutable_tensor_view>);
static_assert(std::is_same_v<tensor_type<Eigen::Map<const row_major>>, rvqkv::tensor_view>);
static_assert(std::is_same_v<tensor_type<Eigen::Block<row_major>>, rvqkv::mutable_tensor_view>);
static_assert(std::is_same_v<tensor_type<Eigen::Block<const row_major>>, rvqkv::tensor_view>);
static_assert(std::is_same_v<tensor_type<Eigen::Ref<row_major>&>, rvqkv::mutable_tensor_view>);
static_assert(std::is_same_v<tensor_type<const Eigen::Ref<const row_major>&>, rvqkv::tensor_view>);

/// A matrix whose element (i, j) is `100 i + j`.
template <class Matrix>
Matrix numbered(Eigen::Index rows, Eigen::Index cols) {
    Matrix matrix(rows, cols);
    for (Eigen::Index i = 0; i < rows; ++i) {
        for (Eigen::Index j = 0; j < cols; ++j) {
            matrix(i, j) = static_cast<typename Matrix::Scalar>(static_cast<float>(100 * i + j));
        }
    }
    return matrix;
}

/// Every element of the tensor is that of the matrix.
template <class Expression>
void check_tensor(const rvqkv::tensor_view& tensor, const Expression& matrix, std::size_t heads) {
    REQUIRE(tensor.tokens() == static_cast<std::size_t>(matrix.rows()));
    REQUIRE(tensor.heads() == heads);
    REQUIRE(tensor.channels() * heads == static_cast<std::size_t>(matrix.cols()));
    std::vector<float> row(tensor.channels());
    for (std::size_t token = 0; token < tensor.tokens(); ++token) {
        for (std::size_t head = 0; head < heads; ++head) {
            rvqkv::load_row(tensor, token, head, row.data());
            for (std::size_t channel = 0; channel < row.size(); ++channel) {
                const auto column = static_cast<Eigen::Index>(head * row.size() + channel);
                REQUIRE(row[channel] == static_cast<float>(matrix(static_cast<Eigen::Index>(token), column)));
            }
        }
    }
}

template <class Expression>
void check_matrix(const rvqkv::matrix_view<const float>& view, const Expression& matrix) {
    REQUIRE(view.rows == static_cast<std::size_t>(matrix.rows()));
    REQUIRE(view.cols == static_cast<std::size_t>(matrix.cols()));
    REQUIRE(view.stride >= view.cols);
    for (std::size_t i = 0; i < view.rows; ++i) {
        for (std::size_t j = 0; j < view.cols; ++j) {
            REQUIRE(view.row(i)[j] == matrix(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j)));
        }
    }
}

}  // namespace

TEMPLATE_TEST_CASE("tensor_of: views matrices of either order, blocks, transposes and strided maps", "[interop][unit]",
                   row_major, column_major) {
    TestType matrix = numbered<TestType>(5, 12);
    for (const std::size_t heads : {1U, 2U, 3U, 12U}) {
        CAPTURE(heads);
        check_tensor(rvqkv::tensor_of(matrix, heads).value(), matrix, heads);
        check_tensor(rvqkv::tensor_of(std::as_const(matrix), heads).value(), matrix, heads);
    }
    check_tensor(rvqkv::tensor_of(matrix.block(1, 3, 3, 6), 2).value(), matrix.block(1, 3, 3, 6), 2);
    check_tensor(rvqkv::tensor_of(matrix.transpose(), 5).value(), matrix.transpose(), 5);
    check_tensor(rvqkv::tensor_of(matrix.row(2), 4).value(), matrix.row(2), 4);
    check_tensor(rvqkv::tensor_of(matrix.col(2)).value(), matrix.col(2), 1);
    const std::vector<float> data = [] {
        std::vector<float> numbers(200);
        for (std::size_t i = 0; i < numbers.size(); ++i) {
            numbers[i] = static_cast<float>(i);
        }
        return numbers;
    }();
    const Eigen::Map<const TestType, Eigen::Unaligned, any_stride> strided(data.data() + 1, 4, 6, any_stride(30, 3));
    check_tensor(rvqkv::tensor_of(strided, 3).value(), strided, 3);
    const Eigen::Map<const TestType, Eigen::Unaligned, any_stride> backwards(data.data() + 199, 4, 6,
                                                                             any_stride(-30, -3));
    check_tensor(rvqkv::tensor_of(backwards, 2).value(), backwards, 2);
}

TEST_CASE("tensor_of: views vectors and fixed sizes", "[interop][unit]") {
    Eigen::VectorXf column = numbered<row_major>(7, 1);
    check_tensor(rvqkv::tensor_of(column).value(), column, 1);
    Eigen::RowVectorXf row = numbered<row_major>(1, 8);
    check_tensor(rvqkv::tensor_of(row, 2).value(), row, 2);
    Eigen::Matrix<float, 3, 4, Eigen::RowMajor> fixed = numbered<row_major>(3, 4);
    check_tensor(rvqkv::tensor_of(fixed, 2).value(), fixed, 2);
    Eigen::ArrayXXf array = numbered<row_major>(3, 4);
    check_tensor(rvqkv::tensor_of(array, 2).value(), array, 2);
    row_major none(0, 4);
    CHECK(rvqkv::tensor_of(none, 2).value().rows() == 0);
}

TEMPLATE_TEST_CASE("tensor_of: knows Eigen's 16-bit types", "[interop][unit]", Eigen::half, Eigen::bfloat16) {
    using matrix_type = Eigen::Matrix<TestType, Eigen::Dynamic, Eigen::Dynamic>;
    const matrix_type matrix = numbered<matrix_type>(2, 6);
    const auto tensor = rvqkv::tensor_of(matrix, 2).value();
    CHECK(tensor.type() == (std::is_same_v<TestType, Eigen::half> ? rvqkv::dtype::float16 : rvqkv::dtype::bfloat16));
    check_tensor(tensor, matrix, 2);
}

TEST_CASE("tensor_of: writes through to the matrix", "[interop][unit]") {
    column_major matrix = column_major::Zero(4, 6);
    const rvqkv::mutable_tensor_view tensor = rvqkv::tensor_of(matrix.bottomRows(2), 2).value();
    const float channels[] = {1, 2, 3};
    rvqkv::store_row(channels, tensor, 1, 1);
    column_major expected = column_major::Zero(4, 6);
    expected.row(3).tail(3) << 1, 2, 3;
    CHECK(matrix == expected);
}

TEST_CASE("tensor_of: refuses a number of heads that does not divide the columns", "[interop][unit]") {
    const row_major matrix = numbered<row_major>(2, 12);
    for (const std::size_t heads : {0U, 5U, 24U}) {
        const auto tensor = rvqkv::tensor_of(matrix, heads);
        REQUIRE_FALSE(tensor.ok());
        CHECK(tensor.error().code == rvqkv::error_code::invalid_argument);
        CHECK(tensor.error().message == "heads is " + std::to_string(heads) + ", must divide the matrix's 12 columns");
    }
}

TEST_CASE("matrix_of: views rows that are contiguous, whatever lies between them", "[interop][unit]") {
    row_major matrix = numbered<row_major>(5, 12);
    check_matrix(rvqkv::matrix_of(matrix).value(), matrix);
    check_matrix(rvqkv::matrix_of(std::as_const(matrix)).value(), matrix);
    check_matrix(rvqkv::matrix_of(matrix.block(1, 3, 3, 6)).value(), matrix.block(1, 3, 3, 6));
    CHECK(rvqkv::matrix_of(matrix.block(1, 3, 3, 6)).value().stride == 12);
    check_matrix(rvqkv::matrix_of(matrix.row(2)).value(), matrix.row(2));
    check_matrix(rvqkv::matrix_of(matrix.col(2)).value(), matrix.col(2));
    column_major columns = numbered<column_major>(12, 5);
    check_matrix(rvqkv::matrix_of(columns.transpose()).value(), columns.transpose());
    check_matrix(rvqkv::matrix_of(columns.col(1)).value(), columns.col(1));
    Eigen::VectorXf vector = numbered<row_major>(7, 1);
    check_matrix(rvqkv::matrix_of(vector).value(), vector);
    Eigen::RowVectorXf row = numbered<row_major>(1, 7);
    check_matrix(rvqkv::matrix_of(row).value(), row);
    column_major one_row = numbered<column_major>(1, 7);  // which says that rows are one element apart
    check_matrix(rvqkv::matrix_of(one_row).value(), one_row);
    Eigen::Ref<row_major> reference(matrix);
    check_matrix(rvqkv::matrix_of(reference).value(), matrix);
    static_assert(std::is_same_v<decltype(rvqkv::matrix_of(matrix).value().data), float*>);
    static_assert(std::is_same_v<decltype(rvqkv::matrix_of(std::as_const(matrix)).value().data), const float*>);
}

TEST_CASE("matrix_of: refuses strides that a matrix_view cannot say", "[interop][unit]") {
    const column_major matrix = numbered<column_major>(5, 12);
    const auto columns = rvqkv::matrix_of(matrix);
    REQUIRE_FALSE(columns.ok());
    CHECK(columns.error().code == rvqkv::error_code::invalid_argument);
    CHECK(columns.error().message ==
          "columns of the matrix are 5 elements apart, must be 1; of a column-major matrix pass the transpose");
    CHECK_FALSE(rvqkv::matrix_of(matrix.row(0)).ok());
    std::vector<float> data(100);
    const Eigen::Map<row_major, Eigen::Unaligned, any_stride> backwards(data.data() + 60, 4, 6, any_stride(-20, 1));
    const auto rows = rvqkv::matrix_of(backwards);
    REQUIRE_FALSE(rows.ok());
    CHECK(rows.error().message == "rows of the matrix are -20 elements apart, must be at least its 6 columns");
    const Eigen::Map<row_major, Eigen::Unaligned, any_stride> overlapping(data.data(), 4, 6, any_stride(5, 1));
    CHECK_FALSE(rvqkv::matrix_of(overlapping).ok());
}

TEST_CASE("eigen_map_of: maps the rows of a view, to read or to write", "[interop][unit]") {
    std::vector<float> data(40);
    for (std::size_t i = 0; i < data.size(); ++i) {
        data[i] = static_cast<float>(i);
    }
    const rvqkv::matrix_view<float> view(data.data() + 1, 3, 4, 11);
    auto map = rvqkv::eigen_map_of(view);
    REQUIRE(map.rows() == 3);
    REQUIRE(map.cols() == 4);
    CHECK(map(2, 3) == 26.0F);
    CHECK(map.data() == data.data() + 1);
    map.row(1).setConstant(-1.0F);
    CHECK(data[12] == -1.0F);
    CHECK(data[15] == -1.0F);
    CHECK(data[16] == 16.0F);
    const auto read = rvqkv::eigen_map_of(rvqkv::matrix_view<const float>(view));
    CHECK(read == map);
    CHECK(rvqkv::matrix_of(map).value().data == view.data);
    CHECK(rvqkv::matrix_of(map).value().stride == 11);
    CHECK(rvqkv::matrix_of(read).value().stride == 11);
}

TEST_CASE("tensor_of: hands keys in an Eigen matrix to a quantizer", "[interop][unit]") {
    test::random_source random(1);
    const rvqkv::codebook_shape shape{2, 16, 4};
    const std::vector<float> weights = test::gaussian_numbers(random, shape.size());
    const auto quantizer = rvqkv::key_quantizer::create(
                               8, rvqkv::residual_codebook<>::create(shape, std::span<const float>(weights)).value())
                               .value();
    const std::vector<float> numbers = test::gaussian_numbers(random, 10 * 2 * 8);
    const column_major keys = Eigen::Map<const row_major>(numbers.data(), 10, 16);
    std::vector<rvqkv::code_t> codes(20 * 2 * 2);
    std::vector<rvqkv::code_t> expected(codes.size());
    std::vector<float> scales(20);
    rvqkv::quantizer_workspace workspace;
    quantizer.encode({numbers.data(), {10, 2, 8}}, {expected.data(), {2, 1}, scales.data()}, workspace).value();
    quantizer.encode(rvqkv::tensor_of(keys, 2).value(), {codes.data(), {2, 1}, scales.data()}, workspace).value();
    CHECK(codes == expected);
    row_major restored(10, 16);
    column_major also_restored(10, 16);
    const rvqkv::encoded_view view{codes.data(), {2, 1}, scales.data()};
    quantizer.decode(view, rvqkv::tensor_of(restored, 2).value(), 2, workspace).value();
    quantizer.decode(view, rvqkv::tensor_of(also_restored, 2).value(), 2, workspace).value();
    CHECK(restored == also_restored);
    CHECK((restored - keys).squaredNorm() < keys.squaredNorm());
}
