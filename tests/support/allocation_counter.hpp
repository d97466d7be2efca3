// SPDX-License-Identifier: MIT
/// @file
/// What a piece of code allocates through `operator new`, and what it does when that fails. The test program replaces
/// the global operators (allocation_counter.cpp); counts and failures are per thread.
#pragma once

#include <cstddef>

namespace test {

/// What this thread has allocated and freed since the counter was made. Bytes are those asked for, without padding.
class allocation_counter {
public:
    allocation_counter() noexcept;
    /// Allocations made.
    [[nodiscard]] std::size_t allocations() const noexcept;
    /// Bytes allocated and not freed; negative when older memory was freed.
    [[nodiscard]] std::ptrdiff_t live_bytes() const noexcept;
    /// The most that `live_bytes` has been. One counter at a time: making a counter restarts the peak.
    [[nodiscard]] std::ptrdiff_t peak_bytes() const noexcept;

private:
    std::size_t allocations_;
    std::ptrdiff_t live_bytes_;
};

/// While it lives, this thread's allocation number `nth` (from 0) and all later ones fail, as when memory runs out.
class failing_allocations {
public:
    explicit failing_allocations(std::size_t nth) noexcept;
    failing_allocations(const failing_allocations&) = delete;
    failing_allocations& operator=(const failing_allocations&) = delete;
    ~failing_allocations();
    /// Whether an allocation has failed; a loop over `nth` ends when none has.
    [[nodiscard]] bool triggered() const noexcept;
};

}  // namespace test
