// SPDX-License-Identifier: MIT
/// @file
/// Compiler facts every header leans on: the library's namespace, target regions for SIMD code, assertions.
///
/// The whole library sits in an inline namespace named after the instruction set that the translation unit was
/// compiled for. Without it, a program that links one file built with `-march=x86-64-v4` and one built plainly may keep
/// the wide copy of a shared inline function and die on a plain machine. With it the two never merge, and an object
/// passed between such files is a link error instead of a crash. Define `RVQKV_ABI_TAG` to choose the name yourself.
#pragma once

#include "rvqkv/version.hpp"

#include <bit>

static_assert(std::endian::native == std::endian::little, "rvqkv needs a little-endian machine");

#ifndef RVQKV_ABI_TAG
#if defined(__AVX512F__)
#define RVQKV_ABI_TAG v0_avx512
#elif defined(__AVX2__)
#define RVQKV_ABI_TAG v0_avx2
#elif defined(__AVX__)
#define RVQKV_ABI_TAG v0_avx
#elif defined(__SSE4_1__)
#define RVQKV_ABI_TAG v0_sse4
#else
#define RVQKV_ABI_TAG v0
#endif
#endif

#define RVQKV_NAMESPACE_BEGIN \
    namespace rvqkv {         \
    inline namespace RVQKV_ABI_TAG {
#define RVQKV_NAMESPACE_END \
    }                       \
    }

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define RVQKV_X86 1
#else
#define RVQKV_X86 0
#endif

#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define RVQKV_NEON 1
#else
#define RVQKV_NEON 0
#endif

// A target region compiles what it encloses for a wider instruction set than the command line asked for. Only
// functions of namespaces named after that instruction set may stand inside, and no #include of foreign code.
#define RVQKV_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define RVQKV_TARGET_BEGIN(isa) RVQKV_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define RVQKV_TARGET_END RVQKV_PRAGMA(clang attribute pop)
#define RVQKV_UNROLL RVQKV_PRAGMA(clang loop unroll(full))
#else
#define RVQKV_TARGET_BEGIN(isa)    \
    RVQKV_PRAGMA(GCC push_options) \
    RVQKV_PRAGMA(GCC target(isa))
#define RVQKV_TARGET_END RVQKV_PRAGMA(GCC pop_options)
#define RVQKV_UNROLL RVQKV_PRAGMA(GCC unroll 16)
#endif

#define RVQKV_ALWAYS_INLINE inline __attribute__((always_inline))

/// Checks a precondition of an inner function; compiled out unless `NDEBUG` is missing. Override it before the first
/// include to send failures elsewhere.
#ifndef RVQKV_ASSERT
#include <cassert>
#define RVQKV_ASSERT(condition) assert(condition)
#endif

#if defined(__cpp_exceptions) || defined(__EXCEPTIONS)
#define RVQKV_EXCEPTIONS 1
#else
#define RVQKV_EXCEPTIONS 0
#endif
