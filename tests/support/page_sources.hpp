// SPDX-License-Identifier: MIT
/// @file
/// Where a test's pages come from: counted, and none when the test says so.
#pragma once

#include "rvqkv/cache/page_source.hpp"

#include <cstddef>
#include <cstring>
#include <limits>

namespace test {

/// Counts what is taken and given back; fails after as many allocations as it is told. What it gives holds NaNs and
/// codes that no codebook has. One thread at a time, as a cache promises.
class counting_source final : public rvqkv::page_source {
public:
    static constexpr std::size_t never = std::numeric_limits<std::size_t>::max();

    [[nodiscard]] std::byte* allocate(std::size_t bytes) noexcept override {
        if (until_failure == 0) {
            failed = true;
            return nullptr;
        }
        until_failure -= until_failure == never ? 0 : 1;
        std::byte* const memory = heap_.allocate(bytes);
        if (memory != nullptr) {
            std::memset(memory, 0xff, bytes);
            ++allocations;
            live_bytes += bytes;
        }
        return memory;
    }
    void release(std::byte* memory, std::size_t bytes) noexcept override {
        live_bytes -= bytes;
        heap_.release(memory, bytes);
    }

    std::size_t allocations = 0;
    std::size_t live_bytes = 0;
    std::size_t until_failure = never;
    bool failed = false;

private:
    rvqkv::heap_page_source heap_;
};

}  // namespace test
