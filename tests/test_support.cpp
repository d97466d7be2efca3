// SPDX-License-Identifier: MIT
/// @file
/// The tools of the tests themselves, where an error would make other tests blind.
#include "support/allocation_counter.hpp"
#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"
#include "support/temp_dir.hpp"

#include <filesystem>
#include <new>
#include <vector>

TEST_CASE("allocation_counter: counts the bytes asked for, live and at the peak", "[support][unit]") {
    std::size_t allocations = 0;
    std::ptrdiff_t held = 0;
    std::ptrdiff_t freed = 0;
    std::ptrdiff_t peak = 0;
    {
        const test::allocation_counter counter;
        void* const small = ::operator new(24);
        void* const aligned = ::operator new (1000, std::align_val_t{64});
        held = counter.live_bytes();
        ::operator delete(small);
        ::operator delete (aligned, std::align_val_t{64});
        freed = counter.live_bytes();
        peak = counter.peak_bytes();
        allocations = counter.allocations();
    }
    CHECK(allocations == 2);
    CHECK(held == 1024);
    CHECK(freed == 0);
    CHECK(peak == 1024);
}

TEST_CASE("failing_allocations: fails the n-th allocation, and says so", "[support][unit]") {
    bool first_worked = false;
    bool second_failed = false;
    bool nothrow_failed = false;
    bool triggered = false;
    {
        const test::failing_allocations failing(1);
        ::operator delete(::operator new(8));
        first_worked = !failing.triggered();
        try {
            ::operator delete(::operator new(8));
        } catch (const std::bad_alloc&) {
            second_failed = true;
        }
        nothrow_failed = ::operator new(8, std::nothrow) == nullptr;
        triggered = failing.triggered();
    }
    CHECK(first_worked);
    CHECK(second_failed);
    CHECK(nothrow_failed);
    CHECK(triggered);
    CHECK_NOTHROW(std::vector<int>(8));
}

TEST_CASE("random_source: repeats from its seed, and salts tell sources apart", "[support][unit]") {
    test::random_source first(1);
    test::random_source same(1);
    test::random_source other(2);
    const std::vector<float> numbers = test::gaussian_numbers(first, 16);
    CHECK(numbers == test::gaussian_numbers(same, 16));
    CHECK(numbers != test::gaussian_numbers(other, 16));
}

TEST_CASE("levels: generic is always there", "[support][unit]") {
    CHECK(test::levels().front() == rvqkv::simd_level::generic);
}

TEST_CASE("temp_dir: holds files, and is gone afterwards", "[support][unit]") {
    std::filesystem::path path;
    {
        const test::temp_dir folder;
        path = folder.path();
        test::write_file(folder.file("bytes"), std::string_view("a\0b", 3));
        CHECK(test::read_file(folder.file("bytes")) == std::string("a\0b", 3));
    }
    CHECK_FALSE(std::filesystem::exists(path));
}

TEST_CASE("reference: takes the codewords that a vector is made of", "[support][unit]") {
    const reference::codebook book{2, 2, 2, {4, 0, 0, 4, /**/ 1, 0, 0, -1}};
    const std::vector<float> x = {0, 3};
    const reference::encoded coded = reference::encode(x.data(), book);
    CHECK(coded.codes == std::vector<std::uint16_t>{1, 1});
    CHECK(coded.residual == std::vector<float>{0, 0});
    CHECK(reference::decode(coded.codes.data(), book, 2) == x);
}
