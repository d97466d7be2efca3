// SPDX-License-Identifier: MIT
/// @file
/// The kernels of all levels that this target has. Where `RVQKV_SEPARATE_KERNELS` is defined (see
/// `rvqkv/simd/kernels.hpp`), exactly one file of the program must include this header.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/simd_level.hpp"
#include "rvqkv/simd/avx2.hpp"
#include "rvqkv/simd/avx512.hpp"
#include "rvqkv/simd/avx512vbmi.hpp"
#include "rvqkv/simd/avx512vnni.hpp"
#include "rvqkv/simd/avxvnni.hpp"
#include "rvqkv/simd/generic.hpp"
#include "rvqkv/simd/kernel_table.hpp"
#include "rvqkv/simd/neon.hpp"

RVQKV_NAMESPACE_BEGIN
namespace detail {

#ifdef RVQKV_SEPARATE_KERNELS
#define RVQKV_KERNELS_INLINE
#else
#define RVQKV_KERNELS_INLINE inline
#endif

// With separate kernels it is an ordinary function, which one file defines for all.
// NOLINTBEGIN(misc-definitions-in-headers)
/// The table of a level; the portable one's for those that this target does not have.
[[nodiscard]] RVQKV_KERNELS_INLINE const kernel_table& table_of(simd_level level) noexcept {
    switch (level) {
#if RVQKV_X86
        case simd_level::avx2: return avx2::plain::kernels;
        case simd_level::avxvnni: return avx2::vnni::kernels;
        case simd_level::avx512: return avx512::plain::kernels;
        case simd_level::avx512vnni: return avx512::vnni::kernels;
        case simd_level::avx512vbmi: return avx512::vbmi::kernels;
#endif
#if RVQKV_NEON
        case simd_level::neon: return neon::kernels;
#endif
        default: return generic::kernels;
    }
}
// NOLINTEND(misc-definitions-in-headers)

#undef RVQKV_KERNELS_INLINE

}  // namespace detail
RVQKV_NAMESPACE_END
