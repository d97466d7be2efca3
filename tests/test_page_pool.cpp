// SPDX-License-Identifier: MIT
/// @file
/// Pages and where they come from: counted references, free pages that are taken again, and no byte lost.
#include "rvqkv/cache/page_pool.hpp"

#include "rvqkv/cache/page_source.hpp"
#include "support/allocation_counter.hpp"
#include "support/catch.hpp"
#include "support/page_sources.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <thread>
#include <utility>
#include <vector>

namespace {

using rvqkv::page_pool;

bool is_aligned(const std::byte* page) {
    return reinterpret_cast<std::uintptr_t>(page) % rvqkv::buffer_alignment == 0;
}

}  // namespace

TEST_CASE("arena_page_source: pages lie in the buffer, apart, and the whole comes back", "[cache][property]") {
    test::random_source random(1);
    CAPTURE(test::seed());
    std::vector<std::byte> memory(40000);
    for (const std::size_t skipped : {0U, 1U, 63U}) {
        rvqkv::arena_page_source arena{std::span(memory).subspan(skipped)};
        const std::size_t whole = arena.free_bytes();
        CHECK(whole % 64 == 0);
        CHECK(whole + 2 * 64 > memory.size() - skipped);
        struct page {
            std::byte* data;
            std::size_t bytes;
            int mark;
        };
        std::vector<page> pages;
        std::size_t held = 0;
        std::size_t refused = 0;
        for (int i = 0; i < 4000; ++i) {
            if (random.integer(0, 1) == 0) {
                const std::size_t bytes = 64 * random.integer(1, 60);
                std::byte* const data = arena.allocate(bytes);
                if (data == nullptr) {
                    ++refused;
                    continue;
                }
                REQUIRE(is_aligned(data));
                REQUIRE(data >= memory.data() + skipped);
                REQUIRE(data + bytes <= memory.data() + memory.size());
                pages.push_back({data, bytes, i % 251});
                std::memset(data, pages.back().mark, bytes);
                held += bytes;
            } else if (!pages.empty()) {
                std::swap(pages[random.integer(0, pages.size() - 1)], pages.back());
                const page gone = pages.back();
                pages.pop_back();
                REQUIRE(std::all_of(gone.data, gone.data + gone.bytes,
                                    [&](std::byte each) { return each == static_cast<std::byte>(gone.mark); }));
                arena.release(gone.data, gone.bytes);
                held -= gone.bytes;
            }
            REQUIRE(arena.free_bytes() == whole - held);
        }
        CHECK(refused > 0);
        for (const page& each : pages) {
            arena.release(each.data, each.bytes);
        }
        std::byte* const all = arena.allocate(whole);  // all neighbours have grown together again
        CHECK(all != nullptr);
        CHECK(arena.allocate(64) == nullptr);
    }
    CHECK(rvqkv::arena_page_source({}).allocate(64) == nullptr);
    CHECK(rvqkv::arena_page_source(std::span(memory).first(40)).free_bytes() == 0);
}

TEST_CASE("page_pool: a page is free when its last reference is dropped, and taken again", "[cache][unit]") {
    test::counting_source source;
    {
        page_pool pool(&source);
        rvqkv::page_class& small = *pool.size(100).value();
        rvqkv::page_class& large = *pool.size(4096).value();
        CHECK(small.bytes() == 128);
        CHECK(small.index() == 0);
        CHECK(large.index() == 1);
        CHECK(pool.size(128).value() == &small);

        std::byte* const page = pool.take(small);
        REQUIRE(page != nullptr);
        CHECK(is_aligned(page));
        CHECK(&page_pool::class_of(page) == &small);
        CHECK(page_pool::references(page) == 1);
        page_pool::share(page);
        CHECK(page_pool::references(page) == 2);
        page_pool::drop(page);
        CHECK(pool.bytes().used == 128 + page_pool::header_bytes);
        CHECK(pool.bytes().free == 0);
        page_pool::drop(page);
        CHECK(pool.bytes().used == 0);
        CHECK(pool.bytes().free == 128 + page_pool::header_bytes);

        std::byte* const other = pool.take(large);
        CHECK(other != page);
        CHECK(pool.take(small) == page);
        CHECK(source.allocations == 2);
        CHECK(source.live_bytes == pool.bytes().used);
        page_pool::drop(page);
        page_pool::drop(other);
        pool.release_free_pages();
        CHECK(source.live_bytes == 0);
        CHECK(pool.bytes().free == 0);

        CHECK(pool.reserve(small, 3).ok());
        CHECK(pool.reserve(small, 2).ok());
        CHECK(source.allocations == 5);
        CHECK(pool.bytes().free == 3 * (128 + page_pool::header_bytes));
    }
    CHECK(source.live_bytes == 0);
}

TEST_CASE("page_pool: without a source its bytes are those asked of operator new", "[cache][unit]") {
    const test::allocation_counter counter;
    {
        page_pool pool;
        const auto small = pool.size(64).value();
        const auto large = pool.size(640).value();
        std::byte* const pages[] = {pool.take(*small), pool.take(*small), pool.take(*large)};
        page_pool::drop(pages[0]);
        CHECK(static_cast<std::size_t>(counter.live_bytes()) == pool.bytes().total());
        page_pool::drop(pages[1]);
        page_pool::drop(pages[2]);
        CHECK(static_cast<std::size_t>(counter.live_bytes()) == pool.bytes().total());
    }
    CHECK(counter.live_bytes() == 0);
}

TEST_CASE("page_pool: a budget or a source at its end first costs the free pages, then fails", "[cache][unit]") {
    constexpr std::size_t each = 128 + page_pool::header_bytes;
    const auto check = [](page_pool& pool) {
        rvqkv::page_class& small = *pool.size(128).value();
        rvqkv::page_class& large = *pool.size(2 * each - page_pool::header_bytes).value();
        std::byte* const first = pool.take(small);
        std::byte* const second = pool.take(small);
        std::byte* const third = pool.take(small);
        REQUIRE(third != nullptr);
        CHECK(pool.take(small) == nullptr);
        CHECK(pool.reserve(small, 1).error().code == rvqkv::error_code::out_of_memory);
        CHECK(pool.bytes().used == 3 * each);
        page_pool::drop(third);
        CHECK(pool.take(large) == nullptr);
        page_pool::drop(second);
        std::byte* const wide = pool.take(large);  // in place of two small ones
        CHECK(wide != nullptr);
        CHECK(pool.bytes().total() - pool.bytes().classes == 3 * each);
        page_pool::drop(wide);
        page_pool::drop(first);
    };
    page_pool budgeted(nullptr, 3 * each);
    check(budgeted);
    alignas(64) std::array<std::byte, 3 * each> memory;
    rvqkv::arena_page_source arena(memory);
    {
        page_pool pool(&arena);
        check(pool);
    }
    CHECK(arena.free_bytes() == memory.size());
}

TEST_CASE("page_pool: no memory for a size is an error", "[cache][unit]") {
    page_pool pool;
    const test::failing_allocations failing(0);
    CHECK(pool.size(64).error().code == rvqkv::error_code::out_of_memory);
}

TEST_CASE("page_chain: holds pages of any sizes and gives them back", "[cache][unit]") {
    page_pool pool;
    rvqkv::page_class& small = *pool.size(64).value();
    rvqkv::page_class& large = *pool.size(256).value();
    {
        rvqkv::page_chain chain;
        CHECK(chain.pop() == nullptr);
        std::byte* const first = pool.take(small);
        std::byte* const second = pool.take(large);
        chain.push(first);
        chain.push(second);
        CHECK(chain.size() == 2);
        CHECK(chain.bytes() == 64 + 256 + 2 * page_pool::header_bytes);
        CHECK(chain.bytes() == pool.bytes().used);
        rvqkv::page_chain moved = std::move(chain);
        CHECK(moved.pop() == second);
        CHECK(moved.size() == 1);
        page_pool::drop(second);
    }
    CHECK(pool.bytes().used == 0);
}

TEST_CASE("page_pool: threads take, share and drop pages at once", "[cache][threads]") {
    test::counting_source source;
    page_pool pool(&source);
    rvqkv::page_class& small = *pool.size(64).value();
    rvqkv::page_class& large = *pool.size(256).value();
    std::byte* const common = pool.take(small);
    std::atomic<int> good{0};
    std::vector<std::thread> threads;
    for (unsigned char mark = 0; mark < 4; ++mark) {
        threads.emplace_back([&, mark] {
            bool is_good = true;
            for (int i = 0; i < 500; ++i) {
                page_pool::share(common);
                rvqkv::page_class& of = i % 3 == 0 ? large : small;
                std::byte* const page = pool.take(of);
                std::memset(page, mark, of.bytes());
                page_pool::share(page);
                page_pool::drop(page);
                for (std::size_t k = 0; k < of.bytes(); ++k) {
                    is_good = is_good && page[k] == static_cast<std::byte>(mark);
                }
                page_pool::drop(page);
                page_pool::drop(common);
                if (i % 100 == 0) {
                    pool.release_free_pages();
                }
            }
            good += is_good ? 1 : 0;
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    CHECK(good == 4);
    CHECK(page_pool::references(common) == 1);
    CHECK(pool.bytes().used == 64 + page_pool::header_bytes);
    page_pool::drop(common);
}
