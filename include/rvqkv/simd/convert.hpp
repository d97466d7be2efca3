// SPDX-License-Identifier: MIT
/// @file
/// Vectorized conversion of arrays between float32 and the 16-bit storage types.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <cstddef>
#include <cstring>

RVQKV_NAMESPACE_BEGIN

/// `out[i] = in[i]`, exact or rounded to nearest even: bit for bit `to_float`, `to_float16` and `to_bfloat16`.
/// Preconditions: `in` and `out` hold `count` elements and do not overlap; any alignment.
/// Errors:        none, but the first call may throw for a bad `RVQKV_SIMD` (see `best_kernels`).
inline void convert(const float16* in, float* out, std::size_t count, const kernel_table& kernels = best_kernels()) {
    kernels.from_float16(in, out, count);
}
/// @copydoc convert
inline void convert(const bfloat16* in, float* out, std::size_t count, const kernel_table& kernels = best_kernels()) {
    kernels.from_bfloat16(in, out, count);
}
/// @copydoc convert
inline void convert(const float* in, float16* out, std::size_t count, const kernel_table& kernels = best_kernels()) {
    kernels.to_float16(in, out, count);
}
/// @copydoc convert
inline void convert(const float* in, bfloat16* out, std::size_t count, const kernel_table& kernels = best_kernels()) {
    kernels.to_bfloat16(in, out, count);
}
/// @copydoc convert
inline void convert(const float* in, float* out, std::size_t count) {
    if (count != 0) {
        std::memcpy(out, in, count * sizeof(float));
    }
}

RVQKV_NAMESPACE_END
