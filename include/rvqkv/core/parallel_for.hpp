// SPDX-License-Identifier: MIT
/// @file
/// The hook through which long work (training, encoding a prompt) is shared out. The library starts no thread by
/// itself: it hands tasks to the caller's `executor`, by default the calling thread alone.
#pragma once

#include "rvqkv/core/config.hpp"

#include <cstddef>
#include <memory>
#include <type_traits>

RVQKV_NAMESPACE_BEGIN

/// Runs numbered tasks. Derive from it to use an engine's own pool; `thread_pool` is a ready one.
class executor {
public:
    virtual ~executor() = default;
    /// How many tasks may run at the same time, at least 1. A hint for sizing the tasks.
    [[nodiscard]] virtual std::size_t concurrency() const noexcept = 0;
    /// Calls `task(context, i)` once for every `i < tasks`, in any order and on any thread, and returns when all are
    /// done. Results of the library never depend on the order.
    virtual void run(std::size_t tasks, void (*task)(void* context, std::size_t index), void* context) const = 0;

protected:
    executor() = default;
    executor(const executor&) = default;
    executor& operator=(const executor&) = default;
};

/// Runs everything in order on the calling thread.
class serial_executor final : public executor {
public:
    [[nodiscard]] std::size_t concurrency() const noexcept override { return 1; }
    void run(std::size_t tasks, void (*task)(void*, std::size_t), void* context) const override {
        for (std::size_t i = 0; i < tasks; ++i) {
            task(context, i);
        }
    }
};

/// Calls `body(i)` for every `i < tasks` through the executor.
template <class Body>
void parallel_for(const executor& workers, std::size_t tasks, Body&& body) {
    using body_type = std::remove_reference_t<Body>;
    workers.run(
        tasks, [](void* context, std::size_t index) { (*static_cast<body_type*>(context))(index); },
        const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

/// Splits `[0, count)` into ranges of `grain` (the last may be shorter) and calls `body(first, last)` for each through
/// the executor. The ranges do not depend on the number of threads, so neither do results combined in their order.
template <class Body>
void parallel_ranges(const executor& workers, std::size_t count, std::size_t grain, Body&& body) {
    RVQKV_ASSERT(grain > 0);
    parallel_for(workers, count / grain + (count % grain != 0 ? 1 : 0), [&](std::size_t i) {
        const std::size_t first = i * grain;
        body(first, count - first < grain ? count : first + grain);
    });
}

RVQKV_NAMESPACE_END
