// SPDX-License-Identifier: MIT
/// @file
/// Training: k-means (vectors times iterations a second; peers.py times faiss on the same numbers) and EMA.
#include "rvqkv/core/thread_pool.hpp"
#include "rvqkv/learn/ema_trainer.hpp"
#include "rvqkv/learn/kmeans.hpp"
#include "support/data.hpp"

#include <benchmark/benchmark.h>
#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

namespace {

constexpr std::size_t rows = 50000;
constexpr std::size_t dim = 32;
constexpr std::size_t iterations = 5;

void train_kmeans(benchmark::State& state, std::size_t codewords, std::size_t threads) {
    const rvqkv::thread_pool pool(threads);
    const auto x = bench::gaussian(rows * dim, 3);
    std::vector<float> centroids(codewords * dim);
    for (auto _ : state) {
        rvqkv::random_source random(1);
        const auto report = rvqkv::kmeans({x.data(), rows, dim}, codewords, centroids,
                                          {iterations, rvqkv::kmeans_start::sampled}, random, pool);
        benchmark::DoNotOptimize(report.ok());
    }
    state.counters["vectors"] = benchmark::Counter(
        static_cast<double>(rows * iterations) * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
}

void train_ema(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t threads) {
    constexpr std::size_t batch = 8192;
    const rvqkv::thread_pool pool(threads);
    const auto book = bench::codebook(shape);
    auto trainer = rvqkv::ema_trainer::create(shape, book.weights()).value();
    const auto x = bench::gaussian(batch * shape.dim, 3);
    rvqkv::aligned_buffer<float> left(x.size());
    for (auto _ : state) {
        std::copy_n(x.data(), x.size(), left.data());
        trainer.accumulate({left.data(), batch, shape.dim}, {}, {}, pool);
        trainer.step().value();
    }
    state.counters["vectors"] = benchmark::Counter(static_cast<double>(batch) * static_cast<double>(state.iterations()),
                                                   benchmark::Counter::kIsRate);
}

const bool registered = [] {
    for (const std::size_t threads : {std::size_t{1}, std::size_t{2}}) {
        const std::string suffix = "/threads:" + std::to_string(threads);
        for (const std::size_t codewords : {std::size_t{256}, std::size_t{2048}}) {
            benchmark::RegisterBenchmark(("train_kmeans/codewords:" + std::to_string(codewords) +
                                          "/dim:32/rows:" + std::to_string(rows) + suffix)
                                             .c_str(),
                                         train_kmeans, codewords, threads)
                ->Unit(benchmark::kMillisecond)
                ->UseRealTime();
        }
        benchmark::RegisterBenchmark(("train_ema/depths:8/codewords:2048/dim:32/rows:8192" + suffix).c_str(), train_ema,
                                     rvqkv::codebook_shape{8, 2048, 32}, threads)
            ->Unit(benchmark::kMillisecond)
            ->UseRealTime();
    }
    return true;
}();

}  // namespace
