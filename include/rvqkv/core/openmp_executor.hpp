// SPDX-License-Identifier: MIT
/// @file
/// An `executor` on OpenMP, for programs that use it already. Opt-in: nothing else includes it.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/parallel_for.hpp"

#include <cstddef>

#ifdef _OPENMP
#include <omp.h>
#endif

RVQKV_NAMESPACE_BEGIN

#ifdef _OPENMP

/// Shares tasks out among the threads of an OpenMP parallel region. Inside of another region it follows OpenMP's rules
/// for nested ones: usually the calling thread then works alone. Tasks must not throw.
/// Threads: any number of callers at once, each with a team of its own.
class openmp_executor final : public executor {
public:
    /// `threads` = 0 takes as many as OpenMP would at the time of each call (`OMP_NUM_THREADS`).
    explicit openmp_executor(std::size_t threads = 0) noexcept : threads_(threads) {}

    [[nodiscard]] std::size_t concurrency() const noexcept override {
        return threads_ != 0 ? threads_ : static_cast<std::size_t>(omp_get_max_threads());
    }

    void run(std::size_t tasks, void (*task)(void*, std::size_t), void* context) const override {
        if (tasks < 2) {
            serial_executor().run(tasks, task, context);
            return;
        }
        const int threads = static_cast<int>(concurrency());
        // One task at a time: they are long, and not all of a length.
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (std::size_t i = 0; i < tasks; ++i) {
            task(context, i);
        }
    }

private:
    std::size_t threads_;
};

#else

/// Exists in files compiled with OpenMP (`-fopenmp`) only: elsewhere it would quietly run everything on one thread.
class __attribute__((unavailable("compile with -fopenmp, or use rvqkv::thread_pool"))) openmp_executor {};

#endif

RVQKV_NAMESPACE_END
