// SPDX-License-Identifier: MIT
/// @file
/// Run-time dispatch: the function table of a level, and the one to use on this machine.
///
/// The kernels of all levels take a compiler some seconds, in every file that includes this. A program of many files
/// may define `RVQKV_SEPARATE_KERNELS` for all of them and compile `rvqkv/simd/compile_kernels.hpp` in one.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/simd_level.hpp"
#include "rvqkv/simd/kernel_table.hpp"

#include <string>

#ifdef RVQKV_SEPARATE_KERNELS
RVQKV_NAMESPACE_BEGIN
namespace detail {
[[nodiscard]] const kernel_table& table_of(simd_level level) noexcept;
}  // namespace detail
RVQKV_NAMESPACE_END
#else
#include "rvqkv/simd/compile_kernels.hpp"
#endif

RVQKV_NAMESPACE_BEGIN

/// The table of one level.
/// Errors: `unsupported` when this machine lacks the level.
[[nodiscard]] inline result<const kernel_table*> kernels_for(simd_level level) {
    if (!is_available(level)) {
        return error{error_code::unsupported,
                     "SIMD level " + std::string(name_of(level)) + " is not available on this machine"};
    }
    return &detail::table_of(level);
}

/// The table of `choose_simd_level()`, decided once.
/// Errors: throws what `choose_simd_level` reports (a bad `RVQKV_SIMD`), again on every call. Threads: safe.
[[nodiscard]] inline const kernel_table& best_kernels() {
    static const kernel_table& chosen = *kernels_for(choose_simd_level().value()).value();
    return chosen;
}

RVQKV_NAMESPACE_END
