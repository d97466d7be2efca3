// SPDX-License-Identifier: MIT
/// @file
/// An `executor` on `std::thread`, for programs that bring no pool of their own. Opt-in: nothing else includes it.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/parallel_for.hpp"

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// A fixed number of threads, the caller's included. Tasks must not throw (that ends the program) nor call `run` of
/// the same pool.
/// Threads: one `run` at a time; a second caller waits for the first.
class thread_pool final : public executor {
public:
    /// `threads` = 0 takes as many as the machine has; 1 starts none.
    explicit thread_pool(std::size_t threads = 0) {
        if (threads == 0) {
            threads = std::max<std::size_t>(1, std::thread::hardware_concurrency());
        }
        workers_.reserve(threads - 1);
#if RVQKV_EXCEPTIONS
        try {
#endif
            for (std::size_t i = 1; i < threads; ++i) {
                workers_.emplace_back([this] { serve(); });
            }
#if RVQKV_EXCEPTIONS
        } catch (const std::exception&) {
            // The system grants no more threads, or no memory for them: work goes on with those it gave, with the same
            // results.
        }
#endif
    }
    thread_pool(const thread_pool&) = delete;
    thread_pool& operator=(const thread_pool&) = delete;
    ~thread_pool() override {
        {
            const std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) {
            worker.join();
        }
    }

    [[nodiscard]] std::size_t concurrency() const noexcept override {
        return workers_.size() + 1;
    }

    void run(std::size_t tasks, void (*task)(void*, std::size_t), void* context) const override {
        if (workers_.empty() || tasks < 2) {
            serial_executor().run(tasks, task, context);
            return;
        }
        const std::lock_guard one_caller(caller_mutex_);
        std::unique_lock lock(mutex_);
        job_ = {task, context, tasks, 0, 0};
        wake_.notify_all();
        work(lock);
        done_.wait(lock, [this] { return job_.finished == job_.tasks; });
        job_ = {};
    }

private:
    struct job {
        void (*task)(void*, std::size_t) = nullptr;
        void* context = nullptr;
        std::size_t tasks = 0;
        std::size_t next = 0;
        std::size_t finished = 0;
    };

    /// Takes tasks until none is left. Tasks are long (thousands of vectors), so one lock for each costs nothing.
    void work(std::unique_lock<std::mutex>& lock) const noexcept {
        while (job_.next < job_.tasks) {
            const std::size_t index = job_.next++;
            const job current = job_;
            lock.unlock();
            current.task(current.context, index);
            lock.lock();
            if (++job_.finished == job_.tasks) {
                done_.notify_one();
            }
        }
    }
    void serve() const {
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return stopping_ || job_.next < job_.tasks; });
            if (stopping_) {
                return;
            }
            work(lock);
        }
    }

    mutable std::mutex caller_mutex_;
    mutable std::mutex mutex_;
    mutable std::condition_variable wake_;
    mutable std::condition_variable done_;
    mutable job job_;
    bool stopping_ = false;
    std::vector<std::thread> workers_;  // last: they use everything above
};

RVQKV_NAMESPACE_END
