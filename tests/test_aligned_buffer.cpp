// SPDX-License-Identifier: MIT
/// @file
/// Buffers: aligned, zeroed, counted to the byte, and unharmed when memory runs out.
#include "rvqkv/core/aligned_buffer.hpp"

#include "support/allocation_counter.hpp"
#include "support/catch.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

namespace {

template <class T>
bool is_aligned(const T* data) {
    return reinterpret_cast<std::uintptr_t>(data) % rvqkv::buffer_alignment == 0;
}

/// Memory that the allocator hands out next is not zero by chance.
void soil_the_heap() {
    for (const std::size_t size : {64U, 1024U, 4096U}) {
        rvqkv::aligned_buffer<unsigned char> dirt(size);
        std::fill_n(dirt.data(), size, static_cast<unsigned char>(0xa5));
    }
}

}  // namespace

TEMPLATE_TEST_CASE("aligned_buffer: is aligned to a cache line and zeroed", "[core][unit]", char, std::uint16_t, float,
                   double) {
    for (const std::size_t size : {1U, 3U, 16U, 17U, 256U, 1000U}) {
        CAPTURE(size);
        soil_the_heap();
        const rvqkv::aligned_buffer<TestType> buffer(size);
        CHECK(is_aligned(buffer.data()));
        CHECK(buffer.size() == size);
        CHECK(buffer.bytes() == size * sizeof(TestType));
        CHECK(buffer.span().data() == buffer.data());
        CHECK(buffer.span().size() == size);
        CHECK(std::all_of(buffer.span().begin(), buffer.span().end(), [](TestType x) { return x == TestType{}; }));
    }
}

TEST_CASE("aligned_buffer: takes exactly the bytes it says", "[core][unit]") {
    std::ptrdiff_t held = 0;
    std::ptrdiff_t left = 0;
    {
        const test::allocation_counter counter;
        {
            const rvqkv::aligned_buffer<float> buffer(1001);
            held = counter.live_bytes();
        }
        left = counter.live_bytes();
    }
    CHECK(held == 4004);
    CHECK(left == 0);
}

TEST_CASE("aligned_buffer: an empty one holds no memory", "[core][unit]") {
    const test::allocation_counter counter;
    const rvqkv::aligned_buffer<float> none;
    const rvqkv::aligned_buffer<float> zero(0);
    const rvqkv::aligned_buffer<float> copy(zero);  // NOLINT(performance-unnecessary-copy-initialization)
    const std::size_t allocations = counter.allocations();
    CHECK(allocations == 0);
    CHECK(none.data() == nullptr);
    CHECK(zero.data() == nullptr);
    CHECK(copy.size() == 0);
    CHECK(copy.bytes() == 0);
}

TEST_CASE("aligned_buffer: copies are their own", "[core][unit]") {
    rvqkv::aligned_buffer<int> buffer(3);
    buffer[0] = 1;
    buffer[2] = 3;
    rvqkv::aligned_buffer<int> copy(buffer);
    CHECK(is_aligned(copy.data()));
    CHECK(std::equal(copy.span().begin(), copy.span().end(), buffer.span().begin(), buffer.span().end()));
    copy[0] = 7;
    CHECK(buffer[0] == 1);

    rvqkv::aligned_buffer<int> assigned(5);
    assigned = buffer;
    CHECK(assigned.size() == 3);
    CHECK(std::as_const(assigned)[2] == 3);
    const rvqkv::aligned_buffer<int>& itself = assigned;
    assigned = itself;
    CHECK(assigned.size() == 3);
    CHECK(assigned[2] == 3);
}

TEST_CASE("aligned_buffer: moves without a copy", "[core][unit]") {
    rvqkv::aligned_buffer<int> buffer(3);
    buffer[1] = 2;
    const int* const data = buffer.data();
    rvqkv::aligned_buffer<int> moved(std::move(buffer));
    CHECK(moved.data() == data);
    CHECK(buffer.size() == 0);  // NOLINT(bugprone-use-after-move): a moved-from buffer is empty
    CHECK(buffer.data() == nullptr);
    rvqkv::aligned_buffer<int> assigned;
    assigned = std::move(moved);
    CHECK(assigned.data() == data);
    CHECK(assigned[1] == 2);
    CHECK(assigned.size() == 3);
}

TEST_CASE("aligned_buffer: refuses sizes whose bytes overflow, without asking for memory", "[core][unit]") {
    constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
    // The second wraps around to 8 bytes, the third to 0.
    for (const std::size_t size : {most, most / sizeof(double) + 2, most / sizeof(double) + 1, most / 9}) {
        CAPTURE(size);
        const test::allocation_counter counter;
        const auto made = rvqkv::aligned_buffer<double>::allocate(size);
        const std::size_t allocations = counter.allocations();
        REQUIRE_FALSE(made.ok());
        CHECK(made.error().code == rvqkv::error_code::out_of_memory);
        CHECK(allocations == 0);
    }
}

TEST_CASE("aligned_buffer: reports that memory ran out, and stays as it was", "[core][unit]") {
    rvqkv::aligned_buffer<int> buffer(4);
    buffer[3] = 9;
    const int* const data = buffer.data();
    bool allocated = true;
    bool grown = true;
    rvqkv::error_code reported{};
    {
        const test::failing_allocations failing(0);
        allocated = rvqkv::aligned_buffer<int>::allocate(8).ok();
        const rvqkv::status growth = buffer.reserve(100);
        grown = growth.ok();
        if (!grown) {
            reported = growth.error().code;
        }
    }
    CHECK_FALSE(allocated);
    CHECK_FALSE(grown);
    CHECK(reported == rvqkv::error_code::out_of_memory);
    CHECK(buffer.data() == data);
    CHECK(buffer.size() == 4);
    CHECK(buffer[3] == 9);
    CHECK_THROWS_AS(rvqkv::aligned_buffer<int>(std::numeric_limits<std::size_t>::max()), rvqkv::exception);
}

TEST_CASE("aligned_buffer: reserve grows, and never shrinks", "[core][unit]") {
    rvqkv::aligned_buffer<int> buffer(4);
    buffer[3] = 9;
    const int* const data = buffer.data();
    REQUIRE(buffer.reserve(4).ok());
    REQUIRE(buffer.reserve(1).ok());
    REQUIRE(buffer.reserve(0).ok());
    CHECK(buffer.data() == data);
    CHECK(buffer.size() == 4);
    CHECK(buffer[3] == 9);
    REQUIRE(buffer.reserve(5).ok());
    CHECK(buffer.size() == 5);
    CHECK(is_aligned(buffer.data()));
}
