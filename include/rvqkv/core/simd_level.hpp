// SPDX-License-Identifier: MIT
/// @file
/// Instruction sets that the kernels know, what this machine has, and the environment variable `RVQKV_SIMD` that caps
/// the choice (`generic`, `neon`, `avx2`, `avxvnni`, `avx512`, `avx512vnni`, `avx512vbmi`).
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"

#include <cstddef>
#include <cstdlib>
#include <string>
#include <string_view>

#if RVQKV_X86
#include <cpuid.h>
#endif

RVQKV_NAMESPACE_BEGIN

/// Instruction sets in rising order of preference. Every level computes the same codes, bit for bit.
enum class simd_level {
    generic,     ///< Plain C++; runs anywhere.
    neon,        ///< AArch64 Advanced SIMD.
    avx2,        ///< AVX2, FMA and F16C (Intel Haswell, AMD Zen).
    avxvnni,     ///< AVX2 with AVX-VNNI: integer dot products (Intel Alder Lake, AMD Zen 5).
    avx512,      ///< AVX-512 F, BW, DQ and VL (Intel Skylake-SP).
    avx512vnni,  ///< AVX-512 with VNNI: integer dot products (Intel Cascade Lake).
    avx512vbmi,  ///< AVX-512 with VNNI and VBMI: byte permutations (Intel Ice Lake, AMD Zen 4).
};
inline constexpr simd_level all_simd_levels[] = {simd_level::generic,   simd_level::neon,   simd_level::avx2,
                                                 simd_level::avxvnni,   simd_level::avx512, simd_level::avx512vnni,
                                                 simd_level::avx512vbmi};

[[nodiscard]] constexpr std::string_view name_of(simd_level level) noexcept {
    switch (level) {
        case simd_level::generic: return "generic";
        case simd_level::neon: return "neon";
        case simd_level::avx2: return "avx2";
        case simd_level::avxvnni: return "avxvnni";
        case simd_level::avx512: return "avx512";
        case simd_level::avx512vnni: return "avx512vnni";
        case simd_level::avx512vbmi: return "avx512vbmi";
    }
    return "unknown";
}

/// Whether this machine, and its operating system, can run the level.
[[nodiscard]] inline bool is_available(simd_level level) noexcept {
    switch (level) {
        case simd_level::generic: return true;
        case simd_level::neon: return RVQKV_NEON != 0;
#if RVQKV_X86
        case simd_level::avx2:
        case simd_level::avxvnni:
        case simd_level::avx512:
        case simd_level::avx512vnni:
        case simd_level::avx512vbmi: {
            // The builtin also asks the operating system (XCR0); it has no name for F16C on every compiler.
            unsigned eax = 0;
            unsigned ebx = 0;
            unsigned ecx = 0;
            unsigned edx = 0;
            const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1U << 29U)) != 0;
            const bool avx2 = f16c && __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
            if (level == simd_level::avx2) {
                return avx2;
            }
            if (level == simd_level::avxvnni) {  // nor for this
                return avx2 && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && eax >= 1 &&
                       __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1U << 4U)) != 0;
            }
            const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") != 0 &&
                                __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
                                __builtin_cpu_supports("avx512vl") != 0;
            if (level == simd_level::avx512) {
                return avx512;
            }
            const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") != 0;
            return level == simd_level::avx512vnni ? vnni : vnni && __builtin_cpu_supports("avx512vbmi") != 0;
        }
#else
        case simd_level::avx2:
        case simd_level::avxvnni:
        case simd_level::avx512:
        case simd_level::avx512vnni:
        case simd_level::avx512vbmi: return false;
#endif
    }
    return false;
}

/// The last of the levels that this machine can run.
[[nodiscard]] inline simd_level best_available_level() noexcept {
    simd_level best = simd_level::generic;
    for (const simd_level level : all_simd_levels) {
        if (is_available(level)) {
            best = level;
        }
    }
    return best;
}

/// The level to use: the best that is available, or the one that `RVQKV_SIMD` names.
/// Errors: `invalid_argument` for a name that is no level, `unsupported` for one that this machine lacks.
[[nodiscard]] inline result<simd_level> choose_simd_level() {
    if (const char* const wanted = std::getenv("RVQKV_SIMD"); wanted != nullptr && *wanted != '\0') {
        for (const simd_level level : all_simd_levels) {
            if (name_of(level) != wanted) {
                continue;
            }
            if (!is_available(level)) {
                return error{error_code::unsupported,
                             std::string("RVQKV_SIMD=") + wanted + ": this machine does not have that instruction set"};
            }
            return level;
        }
        return error{error_code::invalid_argument,
                     std::string("RVQKV_SIMD=") + wanted +
                         ": not one of generic, neon, avx2, avxvnni, avx512, avx512vnni, avx512vbmi"};
    }
    return best_available_level();
}

RVQKV_NAMESPACE_END
