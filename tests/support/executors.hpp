// SPDX-License-Identifier: MIT
/// @file
/// Executors that an engine might bring.
#pragma once

#include "rvqkv/core/parallel_for.hpp"

#include <cstddef>

namespace test {

/// Claims as many workers as it is told and runs everything on the calling thread, the last task first.
class backward_executor final : public rvqkv::executor {
public:
    explicit backward_executor(std::size_t workers = 64) noexcept : workers_(workers) {}
    [[nodiscard]] std::size_t concurrency() const noexcept override { return workers_; }
    void run(std::size_t tasks, void (*task)(void*, std::size_t), void* context) const override {
        while (tasks > 0) {
            task(context, --tasks);
        }
    }

private:
    std::size_t workers_;
};

}  // namespace test
