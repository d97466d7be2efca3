// SPDX-License-Identifier: MIT
/// @file
/// What the files of this module share: arrays of NumPy and PyTorch as views, results as arrays, names of choices, and
/// the threads that long calls use.
#pragma once

#include <rvqkv/rvqkv.hpp>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace py {

namespace nb = nanobind;

/// Arrays to read and to write, of any library that speaks DLPack; nothing is copied.
using array_in = nb::ndarray<nb::ro, nb::device::cpu>;
using array_out = nb::ndarray<nb::device::cpu>;
using float_array = nb::ndarray<const float, nb::device::cpu, nb::c_contig>;
using code_array = nb::ndarray<const std::uint16_t, nb::device::cpu, nb::c_contig>;
using mask_array = nb::ndarray<const std::uint8_t, nb::device::cpu, nb::c_contig>;

/// The threads that calls share their work out to. The caller keeps the pool alive while it works.
[[nodiscard]] std::shared_ptr<const rvqkv::executor> workers();

[[noreturn]] inline void fail(std::string message) {
    rvqkv::fail({rvqkv::error_code::invalid_argument, std::move(message)});
}

template <bool Mutable, class Array>
[[nodiscard]] rvqkv::basic_tensor_view<Mutable> view_of(const Array& array, const char* name) {
    if (array.ndim() != 3) {
        fail(std::string(name) + " has " + std::to_string(array.ndim()) +
             " dimensions, must have 3: [token, head, channel]");
    }
    rvqkv::dtype type = rvqkv::dtype::float32;
    const nb::dlpack::dtype given = array.dtype();
    const auto is = [&](nb::dlpack::dtype_code code, std::uint8_t bits) {
        return given.code == static_cast<std::uint8_t>(code) && given.bits == bits && given.lanes == 1;
    };
    if (is(nb::dlpack::dtype_code::Float, 16)) {
        type = rvqkv::dtype::float16;
    } else if (is(nb::dlpack::dtype_code::Bfloat, 16)) {
        type = rvqkv::dtype::bfloat16;
    } else if (!is(nb::dlpack::dtype_code::Float, 32)) {
        fail(std::string(name) + " must be of float32, float16 or bfloat16");
    }
    return {array.data(),
            type,
            {array.shape(0), array.shape(1), array.shape(2)},
            {static_cast<std::ptrdiff_t>(array.stride(0)), static_cast<std::ptrdiff_t>(array.stride(1)),
             static_cast<std::ptrdiff_t>(array.stride(2))}};
}
[[nodiscard]] inline rvqkv::tensor_view view(const array_in& array, const char* name) {
    return view_of<false>(array, name);
}
[[nodiscard]] inline rvqkv::mutable_tensor_view view(const array_out& array, const char* name) {
    return view_of<true>(array, name);
}

template <class T, class... Annotations>
[[nodiscard]] std::span<const T> span_of(const nb::ndarray<const T, Annotations...>& array) {
    return {array.data(), array.size()};
}
[[nodiscard]] inline std::span<const std::uint8_t> mask_of(const std::optional<mask_array>& mask) {
    return !mask ? std::span<const std::uint8_t>() : span_of(*mask);
}

/// A NumPy array that owns its numbers.
template <class T>
[[nodiscard]] nb::ndarray<nb::numpy, T> to_numpy(std::vector<T> numbers, std::initializer_list<std::size_t> shape) {
    auto owned = std::make_unique<std::vector<T>>(std::move(numbers));
    T* const data = owned->data();
    nb::capsule owner(owned.get(), [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    (void)owned.release();
    return nb::ndarray<nb::numpy, T>(data, shape, owner);
}

/// Where results go: the caller's tensor, or else a new NumPy array of float32. Either is what the call returns.
class result_tensor {
public:
    result_tensor(nb::object out, std::size_t tokens, std::size_t heads, std::size_t channels) : out_(std::move(out)) {
        if (out_.is_none()) {
            out_ = nb::cast(to_numpy(std::vector<float>(tokens * heads * channels), {tokens, heads, channels}));
        }
        if (!nb::try_cast(out_, array_, false)) {
            fail("out must be a writable tensor in host memory");
        }
    }
    [[nodiscard]] rvqkv::mutable_tensor_view view() const { return view_of<true>(array_, "out"); }
    [[nodiscard]] nb::object object() const { return out_; }

private:
    nb::object out_;
    array_out array_;
};

/// The choice of that name. Errors: names all that there are.
template <class Kind, std::size_t Count>
[[nodiscard]] Kind choice(const Kind (&all)[Count], std::string_view name, const char* field) {
    std::string names;
    for (const Kind each : all) {
        if (rvqkv::name_of(each) == name) {
            return each;
        }
        names += (names.empty() ? "" : ", ") + std::string(rvqkv::name_of(each));
    }
    fail(std::string(field) + " is '" + std::string(name) + "', must be one of: " + names);
}
inline constexpr rvqkv::dtype all_dtypes[] = {rvqkv::dtype::float32, rvqkv::dtype::float16, rvqkv::dtype::bfloat16};
inline constexpr rvqkv::distance all_distances[] = {rvqkv::distance::euclidean, rvqkv::distance::cosine};

/// Throws what a call reports; without the interpreter's lock while it runs.
template <class Call>
decltype(auto) without_lock(const Call& call) {
    const nb::gil_scoped_release release;
    return call();
}

void bind_codec(nb::module_& module);
void bind_learn(nb::module_& module);
void bind_files(nb::module_& module);
void bind_cache(nb::module_& module);

}  // namespace py
