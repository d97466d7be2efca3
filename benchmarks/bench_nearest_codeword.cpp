// SPDX-License-Identifier: MIT
/// @file
/// The search at every level beside Eigen and the machine's multiply-add ceiling. Rates are floating-point operations:
/// two for each multiply-add.
#include "eigen_rival.hpp"
#include "rvqkv/quantize/nearest_codeword.hpp"
#include "rvqkv/simd/convert.hpp"
#include "support/data.hpp"
#include "support/fma_peak.hpp"

#include <benchmark/benchmark.h>
#include <cstddef>
#include <string>
#include <vector>

namespace {

struct search_shape {
    std::size_t codewords;
    std::size_t dim;
    std::size_t rows;
    [[nodiscard]] std::string label() const {
        return "codewords:" + std::to_string(codewords) + "/dim:" + std::to_string(dim) +
               "/rows:" + std::to_string(rows);
    }
    [[nodiscard]] double flops() const { return 2.0 * static_cast<double>(codewords * dim * rows); }
};

constexpr search_shape shapes[] = {{2048, 32, 32}, {2048, 32, 1024}, {256, 32, 1024}, {256, 8, 1024}, {16, 4, 1024}};

void set_rate(benchmark::State& state, double flops) {
    state.counters["flops"] =
        benchmark::Counter(flops * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
}

void search(benchmark::State& state, const search_shape& shape, const rvqkv::kernel_table& kernels) {
    const auto book = bench::codebook({1, shape.codewords, shape.dim});
    const auto x = bench::gaussian(shape.rows * shape.dim, 2);
    std::vector<rvqkv::code_t> codes(shape.rows);
    for (auto _ : state) {
        rvqkv::nearest_codeword({x.data(), shape.rows, shape.dim}, book.packed(0), codes, {}, kernels);
        benchmark::DoNotOptimize(codes.data());
        benchmark::ClobberMemory();
    }
    set_rate(state, shape.flops());
}

void search_eigen(benchmark::State& state, const search_shape& shape) {
    const auto book = bench::codebook({1, shape.codewords, shape.dim});
    const auto x = bench::gaussian(shape.rows * shape.dim, 2);
    rvqkv::aligned_buffer<float> scores(shape.rows * shape.codewords);
    std::vector<rvqkv::code_t> codes(shape.rows);
    for (auto _ : state) {
        bench::eigen_nearest(x.data(), shape.rows, book.weights(0).data(), book.packed(0).offsets, shape.codewords,
                             shape.dim, scores.data(), codes.data());
        benchmark::DoNotOptimize(codes.data());
        benchmark::ClobberMemory();
    }
    set_rate(state, shape.flops());
}

void fma_peak(benchmark::State& state, bench::fma_loop loop) {
    double done = 0.0;
    for (auto _ : state) {
        done += loop(100000);
    }
    state.counters["flops"] = benchmark::Counter(2.0 * done, benchmark::Counter::kIsRate);
}

const bool registered = [] {
    for (const rvqkv::simd_level level : rvqkv::all_simd_levels) {
        const auto kernels = rvqkv::kernels_for(level);
        if (!kernels) {
            continue;
        }
        const std::string name(rvqkv::name_of(level));
        if (const bench::fma_loop loop = bench::fma_loop_of(level); loop != nullptr) {
            benchmark::RegisterBenchmark(("fma_peak/level:" + name).c_str(), fma_peak, loop);
        }
        for (const search_shape& shape : shapes) {
            if (level == rvqkv::simd_level::generic && shape.rows * shape.codewords > 100000) {
                continue;  // minutes, and nobody runs it for speed
            }
            benchmark::RegisterBenchmark(("search_f32/level:" + name + "/" + shape.label()).c_str(), search, shape,
                                         *kernels.value());
        }
    }
    for (const search_shape& shape : shapes) {
        benchmark::RegisterBenchmark(("search_f32/rival:eigen/" + shape.label()).c_str(), search_eigen, shape);
    }
    return true;
}();

}  // namespace
