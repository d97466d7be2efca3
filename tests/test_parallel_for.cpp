// SPDX-License-Identifier: MIT
/// @file
/// The hook for threads: every task once, and ranges that nobody's thread count changes.
#include "rvqkv/core/parallel_for.hpp"

#include "support/catch.hpp"
#include "support/executors.hpp"

#include <cstddef>
#include <limits>
#include <utility>
#include <vector>

namespace {

using range = std::pair<std::size_t, std::size_t>;

}  // namespace

TEST_CASE("serial_executor: runs every task in order on this thread", "[core][unit]") {
    const rvqkv::serial_executor serial;
    CHECK(serial.concurrency() == 1);
    std::vector<std::size_t> order;
    rvqkv::parallel_for(serial, 5, [&](std::size_t i) { order.push_back(i); });
    CHECK(order == std::vector<std::size_t>{0, 1, 2, 3, 4});
    rvqkv::parallel_for(serial, 0, [&](std::size_t i) { order.push_back(i); });
    CHECK(order.size() == 5);
}

TEST_CASE("parallel_for: goes through the executor it is given", "[core][unit]") {
    std::vector<std::size_t> order;
    rvqkv::parallel_for(test::backward_executor(), 3, [&](std::size_t i) { order.push_back(i); });
    CHECK(order == std::vector<std::size_t>{2, 1, 0});
}

TEST_CASE("parallel_for: calls the body itself, not a copy, const or not", "[core][unit]") {
    struct counter {
        std::size_t calls = 0;
        mutable std::size_t const_calls = 0;
        void operator()(std::size_t) { ++calls; }
        void operator()(std::size_t) const { ++const_calls; }
    };
    counter body;
    rvqkv::parallel_for(rvqkv::serial_executor(), 4, body);
    rvqkv::parallel_for(rvqkv::serial_executor(), 3, std::as_const(body));
    CHECK(body.calls == 4);
    CHECK(body.const_calls == 3);
}

TEST_CASE("parallel_ranges: cover everything once, in pieces of the grain", "[core][unit]") {
    const auto ranges = [](const rvqkv::executor& workers, std::size_t count, std::size_t grain) {
        std::vector<range> list;
        rvqkv::parallel_ranges(workers, count, grain,
                               [&](std::size_t first, std::size_t last) { list.emplace_back(first, last); });
        return list;
    };
    const rvqkv::serial_executor serial;
    CHECK(ranges(serial, 0, 4).empty());
    CHECK(ranges(serial, 1, 4) == std::vector<range>{{0, 1}});
    CHECK(ranges(serial, 4, 4) == std::vector<range>{{0, 4}});
    CHECK(ranges(serial, 9, 4) == std::vector<range>{{0, 4}, {4, 8}, {8, 9}});
    CHECK(ranges(serial, 3, 1) == std::vector<range>{{0, 1}, {1, 2}, {2, 3}});
    // "All at once" is not too large a grain.
    CHECK(ranges(serial, 9, std::numeric_limits<std::size_t>::max()) == std::vector<range>{{0, 9}});
    // The pieces are the same whoever runs them, and however many at a time.
    CHECK(ranges(test::backward_executor(), 9, 4) == std::vector<range>{{8, 9}, {4, 8}, {0, 4}});
}
