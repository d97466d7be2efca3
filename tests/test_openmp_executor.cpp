// SPDX-License-Identifier: MIT
/// @file
/// The OpenMP executor, where the compiler has OpenMP: every task once, and the results of one thread.
#include "rvqkv/core/openmp_executor.hpp"

#ifdef _OPENMP

#include "rvqkv/learn/clusters.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <omp.h>
#include <algorithm>
#include <cstddef>
#include <span>
#include <thread>
#include <vector>

TEST_CASE("openmp_executor: runs every task once, on as many threads as it was told", "[core][threads][unit]") {
    CHECK(rvqkv::openmp_executor().concurrency() == static_cast<std::size_t>(omp_get_max_threads()));
    for (const std::size_t threads : {1U, 2U, 3U}) {
        const rvqkv::openmp_executor workers(threads);
        CHECK(workers.concurrency() == threads);
        for (const std::size_t tasks : {0U, 1U, 2U, 7U, 1000U}) {
            CAPTURE(threads, tasks);
            std::vector<int> calls(tasks, 0);
            std::vector<std::size_t> teams(tasks, 0);
            rvqkv::parallel_for(workers, tasks, [&](std::size_t i) {
                ++calls[i];
                teams[i] = static_cast<std::size_t>(omp_get_num_threads());
            });
            CHECK(calls == std::vector<int>(tasks, 1));
            CHECK(teams == std::vector<std::size_t>(tasks, tasks < 2 ? 1 : threads));
        }
    }
}

TEST_CASE("openmp_executor: inside of a parallel region, and from several threads", "[core][threads][unit]") {
    const rvqkv::openmp_executor workers(2);
    constexpr std::size_t callers = 4;
    std::vector<std::vector<int>> calls(callers, std::vector<int>(50, 0));
    const auto run = [&](std::size_t caller) {
        rvqkv::parallel_for(workers, calls[caller].size(), [&](std::size_t i) { ++calls[caller][i]; });
    };
    rvqkv::parallel_for(workers, callers, run);
    std::vector<std::thread> threads;
    for (std::size_t caller = 0; caller < callers; ++caller) {
        threads.emplace_back(run, caller);
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    CHECK(calls == std::vector<std::vector<int>>(callers, std::vector<int>(50, 2)));
}

TEST_CASE("openmp_executor: training gives the same bits as on one thread", "[learn][threads][property]") {
    CAPTURE(test::seed());
    test::random_source random(1);
    const std::vector<float> weights = test::gaussian_numbers(random, 40 * 8);
    const std::vector<float> x = test::gaussian_numbers(random, 5000 * 8);
    const auto book = rvqkv::residual_codebook<>::create({1, 40, 8}, std::span<const float>(weights)).value();
    const auto train = [&](const rvqkv::executor& workers, std::vector<rvqkv::code_t>& codes) {
        rvqkv::cluster_sums clusters;
        codes.resize(5000);
        rvqkv::assign_and_sum({x.data(), 5000, 8}, book.packed(0), codes, {}, clusters, workers,
                              [](std::size_t, std::size_t) {});
        return clusters.sums;
    };
    std::vector<rvqkv::code_t> codes;
    std::vector<rvqkv::code_t> expected_codes;
    const std::vector<double> expected = train(rvqkv::serial_executor(), expected_codes);
    CHECK(train(rvqkv::openmp_executor(3), codes) == expected);
    CHECK(codes == expected_codes);
}

#endif
