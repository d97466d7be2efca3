// SPDX-License-Identifier: MIT
/// @file
/// The thread pool: every task once, many callers, the same results at any number of threads, and work that goes on
/// when the system grants no threads.
#include "rvqkv/core/thread_pool.hpp"

#include "support/allocation_counter.hpp"
#include "support/catch.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__GLIBC__)
#include <pthread.h>
#endif

namespace {

/// Calls of each task; plain integers, so that a task run twice at once is a race that a sanitizer sees.
std::vector<int> calls_of_each(const rvqkv::executor& workers, std::size_t tasks) {
    std::vector<int> calls(tasks, 0);
    rvqkv::parallel_for(workers, tasks, [&](std::size_t i) { ++calls[i]; });
    return calls;
}

/// A sum whose rounding depends on the order of the additions.
float rough_sum(const rvqkv::executor& workers) {
    constexpr std::size_t count = 10000;
    constexpr std::size_t grain = 77;
    std::vector<float> parts((count + grain - 1) / grain, 0.0F);
    rvqkv::parallel_ranges(workers, count, grain, [&](std::size_t first, std::size_t last) {
        float sum = 0.0F;
        for (std::size_t i = first; i < last; ++i) {
            sum += 1.0F / static_cast<float>(i + 1);
        }
        parts[first / grain] = sum;
    });
    return std::accumulate(parts.begin(), parts.end(), 0.0F);
}

}  // namespace

TEST_CASE("thread_pool: runs every task once", "[core][threads][unit]") {
    for (const std::size_t threads : {1U, 2U, 3U, 8U}) {
        const rvqkv::thread_pool pool(threads);
        CHECK(pool.concurrency() == threads);
        for (const std::size_t tasks : {0U, 1U, 2U, 7U, 8U, 9U, 1000U}) {
            CAPTURE(threads, tasks);
            CHECK(calls_of_each(pool, tasks) == std::vector<int>(tasks, 1));
        }
    }
}

TEST_CASE("thread_pool: takes the machine's threads when told no number", "[core][threads][unit]") {
    const rvqkv::thread_pool pool;
    CHECK(pool.concurrency() == std::max(1U, std::thread::hardware_concurrency()));
    CHECK(calls_of_each(pool, 10) == std::vector<int>(10, 1));
}

TEST_CASE("thread_pool: starts and stops without work", "[core][threads][unit]") {
    for (int i = 0; i < 20; ++i) {
        const rvqkv::thread_pool pool(4);
    }
    SUCCEED();
}

TEST_CASE("thread_pool: runs as many tasks at a time as it has threads", "[core][threads][unit]") {
    constexpr std::size_t threads = 3;
    const rvqkv::thread_pool pool(threads);
    for (int round = 0; round < 20; ++round) {
        // Each task waits for all others to have begun; the deadline is there for a pool that is broken.
        std::atomic<std::size_t> begun{0};
        std::atomic<std::size_t> met{0};
        const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
        rvqkv::parallel_for(pool, threads, [&](std::size_t) {
            ++begun;
            while (begun < threads && std::chrono::steady_clock::now() < deadline) {
                std::this_thread::yield();
            }
            met += begun == threads ? 1 : 0;
        });
        REQUIRE(met == threads);
    }
}

TEST_CASE("thread_pool: serves several callers, one after another", "[core][threads][unit]") {
    const rvqkv::thread_pool pool(3);
    constexpr std::size_t callers = 4;
    constexpr std::size_t runs = 50;
    std::atomic<std::size_t> ready{0};
    std::vector<std::size_t> good_runs(callers, 0);
    std::vector<std::thread> threads;
    for (std::size_t caller = 0; caller < callers; ++caller) {
        threads.emplace_back([&, caller] {
            ++ready;
            while (ready < callers) {  // all callers at once
                std::this_thread::yield();
            }
            for (std::size_t i = 0; i < runs; ++i) {
                std::vector<int> calls(2 + (caller * 7 + i) % 30, 0);
                rvqkv::parallel_for(pool, calls.size(), [&calls](std::size_t task) {
                    std::this_thread::yield();  // long enough for another caller to come
                    ++calls[task];
                });
                good_runs[caller] += calls == std::vector<int>(calls.size(), 1) ? 1 : 0;
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    CHECK(good_runs == std::vector<std::size_t>(callers, runs));
}

TEST_CASE("thread_pool: results do not depend on the number of threads", "[core][threads][property]") {
    const float expected = rough_sum(rvqkv::serial_executor());
    for (const std::size_t threads : {1U, 2U, 5U}) {
        const rvqkv::thread_pool pool(threads);
        for (int round = 0; round < 10; ++round) {
            CHECK(rough_sum(pool) == expected);
        }
    }
}

TEST_CASE("thread_pool: goes on with the threads it got, when memory for more ran out", "[core][threads][unit]") {
    // Allocation 0 is the list of threads, which a pool cannot do without; each thread takes one more.
    for (std::size_t granted = 0; granted < 4; ++granted) {
        CAPTURE(granted);
        std::unique_ptr<rvqkv::thread_pool> pool;
        bool triggered = false;
        {
            void* const memory = ::operator new(sizeof(rvqkv::thread_pool));
            const test::failing_allocations failing(1 + granted);
            pool.reset(::new (memory) rvqkv::thread_pool(5));
            triggered = failing.triggered();
        }
        CHECK(triggered);
        CHECK(pool->concurrency() == 1 + granted);
        CHECK(calls_of_each(*pool, 100) == std::vector<int>(100, 1));
    }
}

#if defined(__GLIBC__)
TEST_CASE("thread_pool: works alone when the system grants no thread", "[core][threads][unit]") {
    pthread_attr_t usual;
    REQUIRE(pthread_getattr_default_np(&usual) == 0);
    pthread_attr_t greedy = usual;
    REQUIRE(pthread_attr_setstacksize(&greedy, std::size_t{1} << 48U) == 0);  // more than there are addresses
    REQUIRE(pthread_setattr_default_np(&greedy) == 0);
    {
        const rvqkv::thread_pool pool(4);
        REQUIRE(pthread_setattr_default_np(&usual) == 0);
        CHECK(pool.concurrency() == 1);
        CHECK(calls_of_each(pool, 100) == std::vector<int>(100, 1));
    }
    const rvqkv::thread_pool pool(4);
    CHECK(pool.concurrency() == 4);
    pthread_attr_destroy(&usual);
}
#endif
