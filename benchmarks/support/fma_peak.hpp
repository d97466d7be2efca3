// SPDX-License-Identifier: MIT
/// @file
/// The machine's own ceiling: fused multiply-adds that depend on nothing but registers.
#pragma once

#include "rvqkv/simd/kernels.hpp"

#include <cstddef>

namespace bench {

/// Runs `rounds` rounds and returns how many multiply-adds that was.
using fma_loop = double (*)(std::size_t rounds);

#define BENCH_FMA_LOOP(chains)                                                    \
    inline double fma_peak(std::size_t rounds) {                                  \
        reg sums[chains];                                                         \
        float start[lanes] = {};                                                  \
        for (int i = 0; i < chains; ++i) {                                        \
            start[0] = static_cast<float>(i);                                     \
            sums[i] = load(start);                                                \
        }                                                                         \
        const float half = 0.5F;                                                  \
        const reg factor = broadcast(&half);                                      \
        for (std::size_t round = 0; round < rounds; ++round) {                    \
            RVQKV_UNROLL                                                          \
            for (int i = 0; i < chains; ++i) {                                    \
                sums[i] = fma(sums[i], factor, factor);                           \
            }                                                                     \
        }                                                                         \
        for (int i = 1; i < chains; ++i) {                                        \
            sums[0] = add(sums[0], sums[i]);                                      \
        }                                                                         \
        store(start, sums[0]);                                                    \
        volatile float sink = start[0];                                           \
        static_cast<void>(sink);                                                  \
        return static_cast<double>(rounds) * static_cast<double>(chains) * lanes; \
    }

#if RVQKV_X86
RVQKV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
using namespace rvqkv::avx512;
BENCH_FMA_LOOP(16)
}  // namespace avx512
RVQKV_TARGET_END
RVQKV_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
using namespace rvqkv::avx2;
BENCH_FMA_LOOP(12)
}  // namespace avx2
RVQKV_TARGET_END
#endif
#if RVQKV_NEON
namespace neon {
using namespace rvqkv::neon;
BENCH_FMA_LOOP(16)
}  // namespace neon
#endif
#undef BENCH_FMA_LOOP

/// The loop for a level; null for `generic`, which has no ceiling of its own.
inline fma_loop fma_loop_of(rvqkv::simd_level level) {
    switch (level) {
#if RVQKV_X86
        case rvqkv::simd_level::avx512: return avx512::fma_peak;
        case rvqkv::simd_level::avx2: return avx2::fma_peak;
#endif
#if RVQKV_NEON
        case rvqkv::simd_level::neon: return neon::fma_peak;
#endif
        default: return nullptr;
    }
}

}  // namespace bench
