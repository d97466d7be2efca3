// SPDX-License-Identifier: MIT
/// @file
/// Memory for numbers: aligned to a cache line, no constructors run, allocation failure is a value.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <new>
#include <span>
#include <type_traits>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// A cache line, and the widest SIMD register.
inline constexpr std::size_t buffer_alignment = 64;

/// An owning array of `size()` trivial elements, aligned to 64 bytes, zeroed when made.
template <class T>
class aligned_buffer {
    static_assert(std::is_trivially_copyable_v<T>);

public:
    aligned_buffer() = default;
    /// Errors: throws what `allocate` reports.
    explicit aligned_buffer(std::size_t size) { *this = allocate(size).value(); }

    aligned_buffer(aligned_buffer&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    aligned_buffer& operator=(aligned_buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    aligned_buffer(const aligned_buffer& other) : aligned_buffer(other.size_) {
        if (size_ != 0) {
            std::memcpy(static_cast<void*>(data_), other.data_, size_ * sizeof(T));
        }
    }
    aligned_buffer& operator=(const aligned_buffer& other) {
        aligned_buffer copy(other);
        return *this = std::move(copy);
    }
    ~aligned_buffer() {
        if (data_ != nullptr) {
            ::operator delete (static_cast<void*>(data_), std::align_val_t{buffer_alignment});
        }
    }

    /// Errors: `out_of_memory`, also when the size in bytes overflows.
    [[nodiscard]] static result<aligned_buffer> allocate(std::size_t size) {
        aligned_buffer buffer;
        if (size == 0) {
            return buffer;
        }
        void* memory = nullptr;
        if (size <= std::numeric_limits<std::size_t>::max() / sizeof(T) / 2) {
            memory = ::operator new (size * sizeof(T), std::align_val_t{buffer_alignment}, std::nothrow);
        }
        if (memory == nullptr) {
            return error{error_code::out_of_memory, "out of memory"};  // short enough to need no memory itself
        }
        std::memset(memory, 0, size * sizeof(T));
        buffer.data_ = static_cast<T*>(memory);
        buffer.size_ = size;
        return buffer;
    }

    /// Makes room for at least `size` elements; the contents are lost when it grows.
    /// Errors: `out_of_memory`, and the buffer is as it was.
    [[nodiscard]] status reserve(std::size_t size) {
        if (size <= size_) {
            return {};
        }
        auto grown = allocate(size);
        if (!grown) {
            return grown.error();
        }
        *this = std::move(grown).value();
        return {};
    }

    [[nodiscard]] T* data() noexcept { return data_; }
    [[nodiscard]] const T* data() const noexcept { return data_; }
    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    [[nodiscard]] std::size_t bytes() const noexcept { return size_ * sizeof(T); }
    [[nodiscard]] T& operator[](std::size_t i) noexcept {
        RVQKV_ASSERT(i < size_);
        return data_[i];
    }
    [[nodiscard]] const T& operator[](std::size_t i) const noexcept {
        RVQKV_ASSERT(i < size_);
        return data_[i];
    }
    [[nodiscard]] std::span<T> span() noexcept { return {data_, size_}; }
    [[nodiscard]] std::span<const T> span() const noexcept { return {data_, size_}; }

private:
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

RVQKV_NAMESPACE_END
