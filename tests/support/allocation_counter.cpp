// SPDX-License-Identifier: MIT
/// @file
/// The replaced operators. Every block is preceded by its size, so that bytes are counted exactly.
#include "support/allocation_counter.hpp"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>

namespace {

constexpr std::size_t never = std::numeric_limits<std::size_t>::max();

struct thread_state {
    std::size_t allocations = 0;
    std::ptrdiff_t live_bytes = 0;
    std::ptrdiff_t peak_bytes = 0;
    std::size_t until_failure = never;
    bool triggered = false;
};
thread_local thread_state state;

/// Room for the size in front of a block, as wide as the block's alignment.
constexpr std::size_t header_bytes(std::size_t alignment) {
    return std::max(alignment, std::size_t{__STDCPP_DEFAULT_NEW_ALIGNMENT__});
}

void* allocate(std::size_t size, std::size_t alignment) noexcept {
    if (state.until_failure != never) {
        if (state.until_failure == 0) {
            state.triggered = true;
            return nullptr;
        }
        --state.until_failure;
    }
    constexpr std::size_t most = std::size_t{1} << 38U;  // more than any machine has; sanitizers would end the program
    if (size > most) {
        return nullptr;
    }
    const std::size_t header = header_bytes(alignment);
    void* start = nullptr;
    if (::posix_memalign(&start, header, header + size) != 0) {
        return nullptr;
    }
    auto* const block = static_cast<unsigned char*>(start) + header;
    *(reinterpret_cast<std::size_t*>(block) - 1) = size;
    ++state.allocations;
    state.live_bytes += static_cast<std::ptrdiff_t>(size);
    state.peak_bytes = std::max(state.peak_bytes, state.live_bytes);
    return block;
}

void* allocate_or_throw(std::size_t size, std::size_t alignment) {
    void* const block = allocate(size, alignment);
    if (block == nullptr) {
        throw std::bad_alloc();
    }
    return block;
}

void release(void* block, std::size_t alignment) noexcept {
    if (block == nullptr) {
        return;
    }
    state.live_bytes -= static_cast<std::ptrdiff_t>(*(static_cast<std::size_t*>(block) - 1));
    std::free(static_cast<unsigned char*>(block) - header_bytes(alignment));
}

std::size_t bytes_of(std::align_val_t alignment) {
    return static_cast<std::size_t>(alignment);
}

}  // namespace

// Every form is here: sanitizer runtimes bring their own of those left out, which know nothing of the size in front.
// NOLINTBEGIN(misc-new-delete-overloads)
void* operator new(std::size_t size) {
    return allocate_or_throw(size, 1);
}
void* operator new[](std::size_t size) {
    return allocate_or_throw(size, 1);
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
    return allocate(size, 1);
}
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
    return allocate(size, 1);
}
void* operator new(std::size_t size, std::align_val_t alignment) {
    return allocate_or_throw(size, bytes_of(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
    return allocate_or_throw(size, bytes_of(alignment));
}
void* operator new(std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
    return allocate(size, bytes_of(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
    return allocate(size, bytes_of(alignment));
}
void operator delete(void* block) noexcept {
    release(block, 1);
}
void operator delete[](void* block) noexcept {
    release(block, 1);
}
void operator delete(void* block, std::size_t) noexcept {
    release(block, 1);
}
void operator delete[](void* block, std::size_t) noexcept {
    release(block, 1);
}
void operator delete(void* block, const std::nothrow_t&) noexcept {
    release(block, 1);
}
void operator delete[](void* block, const std::nothrow_t&) noexcept {
    release(block, 1);
}
void operator delete(void* block, std::align_val_t alignment) noexcept {
    release(block, bytes_of(alignment));
}
void operator delete[](void* block, std::align_val_t alignment) noexcept {
    release(block, bytes_of(alignment));
}
void operator delete(void* block, std::size_t, std::align_val_t alignment) noexcept {
    release(block, bytes_of(alignment));
}
void operator delete[](void* block, std::size_t, std::align_val_t alignment) noexcept {
    release(block, bytes_of(alignment));
}
void operator delete(void* block, std::align_val_t alignment, const std::nothrow_t&) noexcept {
    release(block, bytes_of(alignment));
}
void operator delete[](void* block, std::align_val_t alignment, const std::nothrow_t&) noexcept {
    release(block, bytes_of(alignment));
}
// NOLINTEND(misc-new-delete-overloads)

namespace test {

allocation_counter::allocation_counter() noexcept : allocations_(state.allocations), live_bytes_(state.live_bytes) {
    state.peak_bytes = state.live_bytes;
}
std::size_t allocation_counter::allocations() const noexcept {
    return state.allocations - allocations_;
}
std::ptrdiff_t allocation_counter::live_bytes() const noexcept {
    return state.live_bytes - live_bytes_;
}
std::ptrdiff_t allocation_counter::peak_bytes() const noexcept {
    return state.peak_bytes - live_bytes_;
}

failing_allocations::failing_allocations(std::size_t nth) noexcept {
    state.until_failure = nth;
    state.triggered = false;
}
failing_allocations::~failing_allocations() {
    state.until_failure = never;
}
bool failing_allocations::triggered() const noexcept {
    return state.triggered;
}

}  // namespace test
