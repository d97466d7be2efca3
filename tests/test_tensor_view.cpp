// SPDX-License-Identifier: MIT
/// @file
/// Views: addresses, strides, and what may be viewed as what.
#include "rvqkv/core/tensor_view.hpp"

#include "support/catch.hpp"

#include <cstddef>
#include <numeric>
#include <type_traits>
#include <vector>

namespace {

using rvqkv::bfloat16;
using rvqkv::float16;
using rvqkv::matrix_view;
using rvqkv::mutable_tensor_view;
using rvqkv::tensor_shape;
using rvqkv::tensor_strides;
using rvqkv::tensor_view;

static_assert(std::is_constructible_v<tensor_view, const float*, tensor_shape>);
static_assert(std::is_constructible_v<tensor_view, float*, tensor_shape>);
static_assert(std::is_constructible_v<tensor_view, const float16*, tensor_shape, tensor_strides>);
static_assert(!std::is_constructible_v<tensor_view, const double*, tensor_shape>);
static_assert(!std::is_constructible_v<tensor_view, const int*, tensor_shape>);
static_assert(!std::is_constructible_v<mutable_tensor_view, const float*, tensor_shape>);
static_assert(!std::is_constructible_v<mutable_tensor_view, const bfloat16*, tensor_shape, tensor_strides>);
static_assert(std::is_convertible_v<mutable_tensor_view, tensor_view>);
static_assert(!std::is_convertible_v<tensor_view, mutable_tensor_view>);
static_assert(std::is_convertible_v<matrix_view<float>, matrix_view<const float>>);
static_assert(!std::is_convertible_v<matrix_view<const float>, matrix_view<float>>);

}  // namespace

TEST_CASE("tensor_view: is contiguous unless told otherwise", "[core][unit]") {
    std::vector<float> data(2 * 3 * 4);
    std::iota(data.begin(), data.end(), 0.0F);
    const tensor_view view(data.data(), {2, 3, 4});
    CHECK(view.data() == data.data());
    CHECK(view.tokens() == 2);
    CHECK(view.heads() == 3);
    CHECK(view.channels() == 4);
    CHECK(view.rows() == 6);
    CHECK(view.shape() == tensor_shape{2, 3, 4});
    CHECK(view.strides() == tensor_strides{12, 4, 1});
    for (std::size_t token = 0; token < 2; ++token) {
        for (std::size_t head = 0; head < 3; ++head) {
            CHECK(view.row(token, head) == data.data() + (token * 3 + head) * 4);
        }
    }
}

TEST_CASE("tensor_view: takes its element type from the pointer, or as a value", "[core][unit]") {
    float wide[1] = {};
    float16 half[1] = {};
    bfloat16 brain[1] = {};
    CHECK(tensor_view(wide, {1, 1, 1}).type() == rvqkv::dtype::float32);
    CHECK(tensor_view(half, {1, 1, 1}).type() == rvqkv::dtype::float16);
    CHECK(mutable_tensor_view(brain, {1, 1, 1}, {1, 1, 1}).type() == rvqkv::dtype::bfloat16);
    const void* const bytes = half;
    const tensor_view view(bytes, rvqkv::dtype::float16, {1, 1, 1}, {1, 1, 1});
    CHECK(view.type() == rvqkv::dtype::float16);
    CHECK(view.data() == bytes);
}

TEST_CASE("tensor_view: rows lie where strides of any sign and order say", "[core][unit]") {
    std::vector<float16> data(100);
    const auto distance = [&](const void* row) { return static_cast<const float16*>(row) - data.data(); };
    // Heads outermost, as some engines keep them.
    const tensor_view head_major(data.data(), {5, 4, 5}, {5, 25, 1});
    CHECK(distance(head_major.row(3, 2)) == 3 * 5 + 2 * 25);
    // Tokens backwards.
    const mutable_tensor_view backwards(data.data() + 99, {5, 4, 5}, {-20, -5, -1});
    CHECK(distance(backwards.row(0, 0)) == 99);
    CHECK(distance(backwards.row(4, 3)) == 4);
    const tensor_view read = backwards;
    CHECK(read.row(4, 3) == backwards.row(4, 3));
    CHECK(read.shape() == backwards.shape());
    CHECK(read.strides() == backwards.strides());
    CHECK(read.type() == rvqkv::dtype::float16);
}

TEST_CASE("tensor_view: slices tokens", "[core][unit]") {
    std::vector<bfloat16> data(6 * 2 * 3);
    const tensor_view view(data.data(), {6, 2, 3});
    const tensor_view part = view.slice_tokens(2, 3);
    CHECK(part.shape() == tensor_shape{3, 2, 3});
    CHECK(part.strides() == view.strides());
    CHECK(part.row(1, 1) == view.row(3, 1));
    CHECK(part.type() == rvqkv::dtype::bfloat16);
    CHECK(view.slice_tokens(6, 0).rows() == 0);
    CHECK(view.slice_tokens(0, 6).data() == view.data());

    const mutable_tensor_view backwards(data.data() + 35, {6, 2, 3}, {-6, -3, -1});
    CHECK(backwards.slice_tokens(4, 2).row(1, 1) == backwards.row(5, 1));

    const tensor_view headless(data.data(), {6, 0, 3});
    CHECK(headless.slice_tokens(2, 3).shape() == tensor_shape{3, 0, 3});
    CHECK(tensor_view().slice_tokens(0, 0).rows() == 0);
}

TEST_CASE("matrix_view: rows, strides and slices", "[core][unit]") {
    std::vector<float> data(40);
    const matrix_view<float> tight(data.data(), 4, 10);
    CHECK(tight.stride == 10);
    CHECK(tight.row(3) == data.data() + 30);
    const matrix_view<float> padded(data.data() + 1, 3, 10, 13);
    CHECK(padded.row(2) == data.data() + 27);
    const matrix_view<const float> part = padded.slice_rows(1, 2);
    CHECK(part.rows == 2);
    CHECK(part.cols == 10);
    CHECK(part.stride == 13);
    CHECK(part.row(0) == padded.row(1));
    CHECK(padded.slice_rows(3, 0).rows == 0);
    CHECK(matrix_view<float>().rows == 0);
}
