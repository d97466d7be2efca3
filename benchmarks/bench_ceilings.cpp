// SPDX-License-Identifier: MIT
/// @file
/// What this machine can do at most: multiply-adds that depend on nothing but registers, and reading each cache and the
/// main memory. Every other figure is held against these, measured in the same run.
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/simd_level.hpp"
#include "support/attention_data.hpp"
#include "support/counters.hpp"
#include "support/data.hpp"

#include <benchmark/benchmark.h>
#include <unistd.h>
#include <algorithm>
#include <cstddef>
#include <string>

#if RVQKV_X86
#include <immintrin.h>
#elif RVQKV_NEON
#include <arm_neon.h>
#endif

namespace {

/// Runs `rounds` rounds and returns how many multiply-adds that was.
using fma_loop = double (*)(std::size_t rounds);
/// Reads `count` floats, a multiple of 256.
using read_loop = void (*)(const float* from, std::size_t count);

// `chains` independent sums hide the latency of a multiply-add; they must fit the registers. Reading adds into as many.
#define BENCH_CEILINGS(reg, lanes, chains, zero, one, fma, add, load, store)          \
    double fma_peak(std::size_t rounds) {                                             \
        reg sums[chains];                                                             \
        for (int i = 0; i < (chains); ++i) {                                          \
            sums[i] = zero;                                                           \
        }                                                                             \
        reg factor = one;                                                             \
        benchmark::DoNotOptimize(factor);                                             \
        for (std::size_t round = 0; round < rounds; ++round) {                        \
            RVQKV_UNROLL                                                              \
            for (int i = 0; i < (chains); ++i) {                                      \
                sums[i] = fma(sums[i], factor, factor);                               \
            }                                                                         \
        }                                                                             \
        float sink[lanes];                                                            \
        for (int i = 0; i < (chains); ++i) {                                          \
            store(sink, sums[i]);                                                     \
            benchmark::DoNotOptimize(sink);                                           \
        }                                                                             \
        return static_cast<double>(rounds) * static_cast<double>((chains) * (lanes)); \
    }                                                                                 \
    void read_all(const float* from, std::size_t count) {                             \
        reg sums[8];                                                                  \
        for (int i = 0; i < 8; ++i) {                                                 \
            sums[i] = zero;                                                           \
        }                                                                             \
        for (std::size_t at = 0; at < count; at += 8 * (lanes)) {                     \
            RVQKV_UNROLL                                                              \
            for (int i = 0; i < 8; ++i) {                                             \
                sums[i] = add(sums[i], load(from + at + i * (lanes)));                \
            }                                                                         \
        }                                                                             \
        float sink[lanes];                                                            \
        for (int i = 0; i < 8; ++i) {                                                 \
            store(sink, sums[i]);                                                     \
            benchmark::DoNotOptimize(sink);                                           \
        }                                                                             \
    }

#if RVQKV_X86
RVQKV_TARGET_BEGIN("avx512f")
namespace avx512 {
BENCH_CEILINGS(__m512, 16, 16, _mm512_setzero_ps(), _mm512_set1_ps(0.5F), _mm512_fmadd_ps, _mm512_add_ps,
               _mm512_load_ps, _mm512_storeu_ps)
}  // namespace avx512
RVQKV_TARGET_END
RVQKV_TARGET_BEGIN("avx2,fma")
namespace avx2 {
BENCH_CEILINGS(__m256, 8, 12, _mm256_setzero_ps(), _mm256_set1_ps(0.5F), _mm256_fmadd_ps, _mm256_add_ps, _mm256_load_ps,
               _mm256_storeu_ps)
}  // namespace avx2
RVQKV_TARGET_END
#elif RVQKV_NEON
namespace neon {
BENCH_CEILINGS(float32x4_t, 4, 16, vdupq_n_f32(0.0F), vdupq_n_f32(0.5F), vfmaq_f32, vaddq_f32, vld1q_f32, vst1q_f32)
}  // namespace neon
#endif
#undef BENCH_CEILINGS

void measure_fma(benchmark::State& state, fma_loop loop) {
    double done = 0.0;
    for (auto _ : state) {
        done += loop(20000);
    }
    state.counters["flops"] = benchmark::Counter(2.0 * done, benchmark::Counter::kIsRate);
}

void measure_read(benchmark::State& state, read_loop loop, std::size_t bytes) {
    const bench::arena memory(bytes);  // in huge pages, as what is held against this
    const std::size_t count = bytes / sizeof(float) / 256 * 256;
    for (auto _ : state) {
        loop(reinterpret_cast<const float*>(memory.data()), count);
    }
    bench::set_bytes(state, count * sizeof(float));
}

std::size_t cache_bytes(int name, std::size_t otherwise) {
    const long bytes = sysconf(name);
    return bytes > 0 ? static_cast<std::size_t>(bytes) : otherwise;
}

/// Half of the inner caches, somewhat more than the second (of the last, neighbours hold a part), much more than all.
void add_reads(read_loop loop) {
    const std::size_t l1 = cache_bytes(_SC_LEVEL1_DCACHE_SIZE, std::size_t{32} << 10U);
    const std::size_t l2 = cache_bytes(_SC_LEVEL2_CACHE_SIZE, std::size_t{1} << 20U);
    const std::size_t l3 = cache_bytes(_SC_LEVEL3_CACHE_SIZE, std::size_t{16} << 20U);
    benchmark::RegisterBenchmark("memory_read/from:l1", measure_read, loop, l1 / 2);
    benchmark::RegisterBenchmark("memory_read/from:l2", measure_read, loop, l2 / 2);
    benchmark::RegisterBenchmark("memory_read/from:l3", measure_read, loop, std::min(4 * l2, l3 / 2));
    benchmark::RegisterBenchmark("memory_read/from:dram", measure_read, loop,
                                 std::min(std::max(4 * l3, std::size_t{128} << 20U), std::size_t{512} << 20U));
}

const bool registered = [] {
    read_loop widest = nullptr;
    const auto add = [&](rvqkv::simd_level level, fma_loop fma, read_loop read) {
        if (rvqkv::is_available(level)) {
            benchmark::RegisterBenchmark(("fma_peak/" + bench::level_label(level)).c_str(), measure_fma, fma);
            widest = read;
        }
    };
#if RVQKV_X86
    add(rvqkv::simd_level::avx2, avx2::fma_peak, avx2::read_all);
    add(rvqkv::simd_level::avx512, avx512::fma_peak, avx512::read_all);
#elif RVQKV_NEON
    add(rvqkv::simd_level::neon, neon::fma_peak, neon::read_all);
#endif
    if (widest != nullptr) {
        add_reads(widest);
    }
    return true;
}();

}  // namespace
