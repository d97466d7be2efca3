// SPDX-License-Identifier: MIT
/// @file
/// Moving one head's vector between an engine's tensor (any element type, any stride) and float32.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/simd/convert.hpp"

#include <cstddef>

RVQKV_NAMESPACE_BEGIN
namespace detail {

template <class T>
void load_elements(const void* row, std::ptrdiff_t stride, std::size_t count, float* out, const kernel_table& kernels) {
    const T* const in = static_cast<const T*>(row);
    if (stride == 1) {
        if constexpr (std::is_same_v<T, float>) {
            convert(in, out, count);
        } else {
            convert(in, out, count, kernels);
        }
        return;
    }
    for (std::size_t i = 0; i < count; ++i) {
        out[i] = to_float(in[static_cast<std::ptrdiff_t>(i) * stride]);
    }
}

template <class T>
void store_elements(const float* in, std::size_t count, void* row, std::ptrdiff_t stride, const kernel_table& kernels) {
    T* const out = static_cast<T*>(row);
    if (stride == 1) {
        if constexpr (std::is_same_v<T, float>) {
            convert(in, out, count);
        } else {
            convert(in, out, count, kernels);
        }
        return;
    }
    for (std::size_t i = 0; i < count; ++i) {
        out[static_cast<std::ptrdiff_t>(i) * stride] = float_to<T>(in[i]);
    }
}

}  // namespace detail

/// The channels of one token's one head as float32. Shapes: `out` `[channels]`. Numerics: exact.
inline void load_row(const tensor_view& tensor, std::size_t token, std::size_t head, float* out,
                     const kernel_table& kernels = best_kernels()) {
    const void* const row = tensor.row(token, head);
    const std::ptrdiff_t stride = tensor.strides().channel;
    switch (tensor.type()) {
        case dtype::float32: return detail::load_elements<float>(row, stride, tensor.channels(), out, kernels);
        case dtype::float16: return detail::load_elements<float16>(row, stride, tensor.channels(), out, kernels);
        case dtype::bfloat16: return detail::load_elements<bfloat16>(row, stride, tensor.channels(), out, kernels);
    }
}

/// Writes the channels of one token's one head. Shapes: `in` `[channels]`. Numerics: rounded to nearest even.
inline void store_row(const float* in, const mutable_tensor_view& tensor, std::size_t token, std::size_t head,
                      const kernel_table& kernels = best_kernels()) {
    void* const row = tensor.row(token, head);
    const std::ptrdiff_t stride = tensor.strides().channel;
    switch (tensor.type()) {
        case dtype::float32: return detail::store_elements<float>(in, tensor.channels(), row, stride, kernels);
        case dtype::float16: return detail::store_elements<float16>(in, tensor.channels(), row, stride, kernels);
        case dtype::bfloat16: return detail::store_elements<bfloat16>(in, tensor.channels(), row, stride, kernels);
    }
}

RVQKV_NAMESPACE_END
