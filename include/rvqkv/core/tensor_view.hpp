// SPDX-License-Identifier: MIT
/// @file
/// Non-owning views over an engine's memory: `tensor_view` for `[token, head, channel]` of any element type and any
/// strides, `matrix_view` for float32 rows.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"

#include <cstddef>
#include <type_traits>

RVQKV_NAMESPACE_BEGIN

/// Extents of a `[token, head, channel]` tensor.
struct tensor_shape {
    std::size_t tokens = 0;
    std::size_t heads = 0;
    std::size_t channels = 0;
    friend bool operator==(const tensor_shape&, const tensor_shape&) = default;
};

/// Distances, in elements (not bytes), between neighbours along each axis; may be negative.
struct tensor_strides {
    std::ptrdiff_t token = 0;
    std::ptrdiff_t head = 0;
    std::ptrdiff_t channel = 1;
    friend bool operator==(const tensor_strides&, const tensor_strides&) = default;
};

/// The view behind `tensor_view` (reads) and `mutable_tensor_view` (writes). The element type is a run-time value,
/// taken from the pointer given; nothing is owned or copied. Pointers need the alignment of their element only.
/// Threads: any number of readers.
template <bool Mutable>
class basic_tensor_view {
    using pointer = std::conditional_t<Mutable, void*, const void*>;

public:
    basic_tensor_view() = default;

    /// A contiguous tensor: `data[(token * heads + head) * channels + channel]`.
    template <class T>
    requires TensorElement<std::remove_const_t<T>> &&
        (!Mutable || !std::is_const_v<T>)basic_tensor_view(T* data, tensor_shape shape) noexcept
        : basic_tensor_view(data, shape,
                            {static_cast<std::ptrdiff_t>(shape.heads * shape.channels),
                             static_cast<std::ptrdiff_t>(shape.channels), 1}) {}

    /// A strided tensor: `data[token * strides.token + head * strides.head + channel * strides.channel]`.
    template <class T>
    requires TensorElement<std::remove_const_t<T>> &&
        (!Mutable || !std::is_const_v<T>)basic_tensor_view(T* data, tensor_shape shape, tensor_strides strides) noexcept
        : data_(data), shape_(shape), strides_(strides), type_(dtype_of<std::remove_const_t<T>>) {}

    /// The same with the element type known at run time only.
    basic_tensor_view(pointer data, dtype type, tensor_shape shape, tensor_strides strides) noexcept
        : data_(data), shape_(shape), strides_(strides), type_(type) {}

    /// A writable view reads as well.
    operator basic_tensor_view<false>() const noexcept  // NOLINT: conversion intended
        requires Mutable {
        return {data_, type_, shape_, strides_};
    }

    [[nodiscard]] pointer data() const noexcept { return data_; }
    [[nodiscard]] dtype type() const noexcept { return type_; }
    [[nodiscard]] const tensor_shape& shape() const noexcept { return shape_; }
    [[nodiscard]] const tensor_strides& strides() const noexcept { return strides_; }
    [[nodiscard]] std::size_t tokens() const noexcept { return shape_.tokens; }
    [[nodiscard]] std::size_t heads() const noexcept { return shape_.heads; }
    [[nodiscard]] std::size_t channels() const noexcept { return shape_.channels; }
    /// Head vectors: tokens x heads.
    [[nodiscard]] std::size_t rows() const noexcept { return shape_.tokens * shape_.heads; }

    /// First channel of one token's one head.
    [[nodiscard]] pointer row(std::size_t token, std::size_t head) const noexcept {
        RVQKV_ASSERT(token < shape_.tokens && head < shape_.heads);
        using byte = std::conditional_t<Mutable, std::byte, const std::byte>;
        const std::ptrdiff_t offset =
            static_cast<std::ptrdiff_t>(token) * strides_.token + static_cast<std::ptrdiff_t>(head) * strides_.head;
        return static_cast<byte*>(data_) + offset * static_cast<std::ptrdiff_t>(size_of(type_));
    }

    /// The `count` tokens from `first` on. Precondition: they lie inside.
    [[nodiscard]] basic_tensor_view slice_tokens(std::size_t first, std::size_t count) const noexcept {
        RVQKV_ASSERT(first + count <= shape_.tokens);
        basic_tensor_view part = *this;
        part.shape_.tokens = count;
        if (count != 0 && shape_.heads != 0) {
            part.data_ = row(first, 0);
        }
        return part;
    }

private:
    pointer data_ = nullptr;
    tensor_shape shape_;
    tensor_strides strides_;
    dtype type_ = dtype::float32;
};

/// Keys, values or queries to read, `[token, head, channel]`.
using tensor_view = basic_tensor_view<false>;
/// Where reconstructed keys or values go.
using mutable_tensor_view = basic_tensor_view<true>;

/// Rows of float (or const float) numbers, `stride` elements apart.
template <class T>
struct matrix_view {
    T* data = nullptr;
    std::size_t rows = 0;
    std::size_t cols = 0;
    std::size_t stride = 0;  ///< Elements from one row to the next, at least `cols`.

    matrix_view() = default;
    matrix_view(T* data_, std::size_t rows_, std::size_t cols_) noexcept : matrix_view(data_, rows_, cols_, cols_) {}
    matrix_view(T* data_, std::size_t rows_, std::size_t cols_, std::size_t stride_) noexcept
        : data(data_), rows(rows_), cols(cols_), stride(stride_) {}
    /// A writable view reads as well.
    operator matrix_view<const T>() const noexcept  // NOLINT: conversion intended
        requires(!std::is_const_v<T>) {
        return {data, rows, cols, stride};
    }

    [[nodiscard]] T* row(std::size_t i) const noexcept {
        RVQKV_ASSERT(i < rows);
        return data + i * stride;
    }
    /// The `count` rows from `first` on. Precondition: they lie inside.
    [[nodiscard]] matrix_view slice_rows(std::size_t first, std::size_t count) const noexcept {
        RVQKV_ASSERT(first + count <= rows);
        return {data + first * stride, count, cols, stride};
    }
};

RVQKV_NAMESPACE_END
