// SPDX-License-Identifier: MIT
#include "rvqkv/core/thread_pool.hpp"
#include "rvqkv/learn/clusters.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

namespace {

/// What the step should make of some rows, said plainly.
struct expected_step {
    std::vector<rvqkv::code_t> codes;
    std::vector<double> sums;
    std::vector<std::size_t> counts;

    expected_step(rvqkv::matrix_view<const float> x, const rvqkv::packed_codebook& book,
                  const std::vector<std::uint8_t>& mask)
        : codes(x.rows), sums(book.codewords * x.cols, 0.0), counts(book.codewords, 0) {
        rvqkv::nearest_codeword(x, book, codes);
        for (std::size_t i = 0; i < x.rows; ++i) {
            if (!mask.empty() && mask[i] == 0) {
                continue;
            }
            ++counts[codes[i]];
            for (std::size_t j = 0; j < x.cols; ++j) {
                sums[codes[i] * x.cols + j] += static_cast<double>(x.row(i)[j]);
            }
        }
    }
};

void check_step(rvqkv::matrix_view<const float> x, const rvqkv::packed_codebook& book,
                const std::vector<std::uint8_t>& mask, const rvqkv::executor& workers) {
    const expected_step expected(x, book, mask);
    std::vector<rvqkv::code_t> codes(x.rows);
    std::vector<int> prepared(x.rows, 0);
    rvqkv::cluster_sums clusters;
    clusters.clear(3, 3);  // what is there before does not matter
    clusters.counts[0] = 7;
    rvqkv::assign_and_sum(x, book, codes, mask, clusters, workers, [&](std::size_t first, std::size_t last) {
        for (std::size_t i = first; i < last; ++i) {
            ++prepared[i];
        }
    });
    CHECK(codes == expected.codes);
    CHECK(clusters.counts == expected.counts);
    CHECK(clusters.sums == expected.sums);
    CHECK(prepared == std::vector<int>(x.rows, 1));
}

}  // namespace

TEST_CASE("assign_and_sum: codes, counts and sums, bit for bit whoever runs the tasks", "[learn][threads][property]") {
    CAPTURE(test::seed());
    test::random_source random(1);
    constexpr std::size_t most_rows = 5000;
    for (const std::size_t dim : {1U, 5U, 8U, 32U}) {
        const std::vector<float> weights = test::gaussian_numbers(random, 50 * dim);
        const auto book = rvqkv::residual_codebook<>::create({1, 50, dim}, std::span<const float>(weights)).value();
        const std::vector<float> x = test::gaussian_numbers(random, most_rows * (dim + 1));
        for (const std::size_t rows : {0U, 1U, 480U, 481U, 5000U}) {
            CAPTURE(dim, rows);
            const rvqkv::matrix_view<const float> view(x.data(), rows, dim, dim + 1);
            std::vector<std::uint8_t> mask(rows);
            for (std::uint8_t& counted : mask) {
                counted = static_cast<std::uint8_t>(random.integer(0, 2));
            }
            check_step(view, book.packed(0), {}, rvqkv::serial_executor());
            check_step(view, book.packed(0), mask, rvqkv::serial_executor());
            check_step(view, book.packed(0), mask, test::backward_executor());
            for (const std::size_t threads : {2U, 5U}) {
                const rvqkv::thread_pool pool(threads);
                check_step(view, book.packed(0), mask, pool);
            }
        }
    }
}

TEST_CASE("in_order: takes every result once and in order, never two at a time", "[learn][threads][property]") {
    constexpr std::size_t tasks = 2000;
    std::vector<std::size_t> all(tasks);
    std::iota(all.begin(), all.end(), std::size_t{0});
    const auto taken = [](const rvqkv::executor& workers) {
        rvqkv::detail::in_order results(tasks);
        std::vector<std::size_t> order;  // no lock of its own: two takers at a time would be a race
        rvqkv::parallel_for(workers, tasks,
                            [&](std::size_t i) { results.end(i, [&order](std::size_t k) { order.push_back(k); }); });
        return order;
    };
    CHECK(taken(rvqkv::serial_executor()) == all);
    CHECK(taken(test::backward_executor()) == all);
    for (const std::size_t threads : {2U, 4U}) {
        const rvqkv::thread_pool pool(threads);
        CHECK(taken(pool) == all);
    }
}

TEST_CASE("squared_distance, squared_length: of every number of channels", "[learn][unit]") {
    test::random_source random(2);
    for (std::size_t dim = 0; dim < 40; ++dim) {
        CAPTURE(dim);
        const std::vector<float> a = test::whole_numbers(random, dim);
        const std::vector<float> b = test::whole_numbers(random, dim);
        double distance = 0.0;
        double length = 0.0;
        for (std::size_t j = 0; j < dim; ++j) {
            distance += static_cast<double>((a[j] - b[j]) * (a[j] - b[j]));
            length += static_cast<double>(a[j] * a[j]);
        }
        CHECK(rvqkv::detail::squared_distance(a.data(), b.data(), dim) == distance);
        CHECK(rvqkv::detail::squared_length(a.data(), dim) == length);
    }
}
