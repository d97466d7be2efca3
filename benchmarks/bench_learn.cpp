// SPDX-License-Identifier: MIT
/// @file
/// Training on one thread and on two: k-means (vectors times iterations a second) and one step of EMA.
#include "rvqkv/core/thread_pool.hpp"
#include "rvqkv/learn/ema_trainer.hpp"
#include "rvqkv/learn/kmeans.hpp"
#include "support/counters.hpp"
#include "support/data.hpp"

#include <benchmark/benchmark.h>
#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

namespace {

// peers.py has the same.
constexpr std::size_t kmeans_rows = 32768;
constexpr std::size_t kmeans_iterations = 5;
constexpr std::size_t ema_rows = 4096;

void train_kmeans(benchmark::State& state, std::size_t codewords, std::size_t threads) {
    const rvqkv::thread_pool pool(threads);
    constexpr std::size_t dim = bench::paper.dim;
    const rvqkv::matrix_view<const float> x(bench::training_vectors(dim).data(), kmeans_rows, dim);
    std::vector<float> centroids(codewords * dim);
    for (auto _ : state) {
        rvqkv::random_source random(1);
        const auto report =
            rvqkv::kmeans(x, codewords, centroids, {kmeans_iterations, rvqkv::kmeans_start::sampled}, random, pool);
        benchmark::DoNotOptimize(report.ok());
    }
    bench::set_vectors(state, kmeans_rows * kmeans_iterations);
}

void train_ema(benchmark::State& state, std::size_t threads) {
    const rvqkv::thread_pool pool(threads);
    auto trainer = rvqkv::ema_trainer::create(bench::paper, bench::weights(bench::paper).span()).value();
    rvqkv::aligned_buffer<float> left(ema_rows * bench::paper.dim);
    for (auto _ : state) {
        std::copy_n(bench::held_out_vectors(bench::paper.dim).data(), left.size(), left.data());
        trainer.accumulate({left.data(), ema_rows, bench::paper.dim}, {}, {}, pool);
        trainer.step(pool).value();
    }
    bench::set_vectors(state, ema_rows);
}

/// One thread is timed by its processor time like everything else; two only a clock on the wall can time.
void add(const std::string& name, std::size_t threads, const auto& body) {
    auto* const added = benchmark::RegisterBenchmark((name + "/threads:" + std::to_string(threads)).c_str(), body);
    added->Unit(benchmark::kMillisecond);
    if (threads > 1) {
        added->UseRealTime();
    }
}

const bool registered = [] {
    for (const std::size_t threads : {std::size_t{1}, std::size_t{2}}) {
        for (const std::size_t codewords : {std::size_t{256}, std::size_t{2048}}) {
            add("train_kmeans/" + bench::label({1, codewords, bench::paper.dim}, kmeans_rows, false), threads,
                [=](benchmark::State& state) { train_kmeans(state, codewords, threads); });
        }
        add("train_ema/" + bench::label(bench::paper, ema_rows), threads,
            [=](benchmark::State& state) { train_ema(state, threads); });
    }
    return true;
}();

}  // namespace
