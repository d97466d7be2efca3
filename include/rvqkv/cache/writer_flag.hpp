// SPDX-License-Identifier: MIT
/// @file
/// How debug builds find two threads that write to one sequence at once.
#pragma once

#include "rvqkv/core/config.hpp"

#include <atomic>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// Set while somebody writes. It does not move with what it is part of: nobody writes to that then.
class writer_flag {
public:
    writer_flag() = default;
    writer_flag([[maybe_unused]] writer_flag&& other) noexcept { RVQKV_ASSERT(!other.is_set_.load()); }
    writer_flag& operator=([[maybe_unused]] writer_flag&& other) noexcept {
        RVQKV_ASSERT(!is_set_.load() && !other.is_set_.load());
        return *this;
    }
    ~writer_flag() = default;

private:
    friend class writer_guard;
    std::atomic<bool> is_set_{false};
};

/// Sets the flag while it lives.
class writer_guard {
public:
    explicit writer_guard(writer_flag& flag) noexcept : flag_(flag) {
        [[maybe_unused]] const bool was_set = flag_.is_set_.exchange(true, std::memory_order_acq_rel);
        RVQKV_ASSERT(!was_set && "two writers of one sequence at once");
    }
    writer_guard(const writer_guard&) = delete;
    writer_guard& operator=(const writer_guard&) = delete;
    ~writer_guard() { flag_.is_set_.store(false, std::memory_order_release); }

private:
    writer_flag& flag_;
};

}  // namespace detail
RVQKV_NAMESPACE_END
