// SPDX-License-Identifier: MIT
/// @file
/// An owning array whose allocation may fail without an exception.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"

#include <cstddef>
#include <limits>
#include <memory>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// An owning array of default-made elements: where `std::vector` would throw for want of memory, this returns a status.
template <class T>
class nothrow_array {
    // NOLINTBEGIN(bugprone-sizeof-expression): elements may be pointers
    static_assert(alignof(T) <= buffer_alignment);

public:
    nothrow_array() = default;
    nothrow_array(nothrow_array&&) noexcept = default;
    nothrow_array& operator=(nothrow_array&&) noexcept = default;
    ~nothrow_array() { std::destroy_n(data(), size()); }

    /// Errors: `out_of_memory`, also when the size in bytes overflows.
    [[nodiscard]] static result<nothrow_array> allocate(std::size_t size) {
        constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
        auto storage = aligned_buffer<std::byte>::allocate(size <= most / sizeof(T) ? size * sizeof(T) : most);
        if (!storage) {
            return storage.error();
        }
        nothrow_array made;
        made.storage_ = std::move(storage).value();
        std::uninitialized_value_construct_n(made.data(), size);
        return made;
    }

    [[nodiscard]] T* data() noexcept { return reinterpret_cast<T*>(storage_.data()); }
    [[nodiscard]] const T* data() const noexcept { return reinterpret_cast<const T*>(storage_.data()); }
    [[nodiscard]] std::size_t size() const noexcept { return storage_.size() / sizeof(T); }
    [[nodiscard]] std::size_t bytes() const noexcept { return storage_.bytes(); }
    [[nodiscard]] T& operator[](std::size_t i) noexcept {
        RVQKV_ASSERT(i < size());
        return data()[i];
    }
    [[nodiscard]] const T& operator[](std::size_t i) const noexcept {
        RVQKV_ASSERT(i < size());
        return data()[i];
    }
    [[nodiscard]] T* begin() noexcept { return data(); }
    [[nodiscard]] T* end() noexcept { return data() + size(); }
    [[nodiscard]] const T* begin() const noexcept { return data(); }
    [[nodiscard]] const T* end() const noexcept { return data() + size(); }

    // NOLINTEND(bugprone-sizeof-expression)

private:
    aligned_buffer<std::byte> storage_;
};

}  // namespace detail
RVQKV_NAMESPACE_END
