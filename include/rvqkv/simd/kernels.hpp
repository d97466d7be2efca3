// SPDX-License-Identifier: MIT
/// @file
/// Run-time dispatch: the function table of a level, and the one to use on this machine.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/simd_level.hpp"
#include "rvqkv/simd/avx2.hpp"
#include "rvqkv/simd/avx512.hpp"
#include "rvqkv/simd/avx512vnni.hpp"
#include "rvqkv/simd/avxvnni.hpp"
#include "rvqkv/simd/generic.hpp"
#include "rvqkv/simd/kernel_table.hpp"
#include "rvqkv/simd/neon.hpp"

#include <string>

RVQKV_NAMESPACE_BEGIN

/// The table of one level.
/// Errors: `unsupported` when this machine lacks the level.
[[nodiscard]] inline result<const kernel_table*> kernels_for(simd_level level) {
    if (!is_available(level)) {
        return error{error_code::unsupported,
                     "SIMD level " + std::string(name_of(level)) + " is not available on this machine"};
    }
    switch (level) {
#if RVQKV_X86
        case simd_level::avx2: return &avx2::plain::kernels;
        case simd_level::avxvnni: return &avx2::vnni::kernels;
        case simd_level::avx512: return &avx512::plain::kernels;
        case simd_level::avx512vnni: return &avx512::vnni::kernels;
#endif
#if RVQKV_NEON
        case simd_level::neon: return &neon::kernels;
#endif
        default: return &generic::kernels;
    }
}

/// The table of `choose_simd_level()`, decided once.
/// Errors: throws what `choose_simd_level` reports (a bad `RVQKV_SIMD`), again on every call. Threads: safe.
[[nodiscard]] inline const kernel_table& best_kernels() {
    static const kernel_table& chosen = *kernels_for(choose_simd_level().value()).value();
    return chosen;
}

RVQKV_NAMESPACE_END
