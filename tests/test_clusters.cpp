// SPDX-License-Identifier: MIT
#include "rvqkv/core/thread_pool.hpp"
#include "rvqkv/learn/clusters.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

TEST_CASE("assign_nearest: the search of each row, whatever the number of threads", "[learn][threads][property]") {
    CAPTURE(test::seed());
    test::random_source random(1);
    constexpr std::size_t rows = 5000;
    constexpr std::size_t dim = 8;
    const std::vector<float> weights = test::gaussian_numbers(random, 50 * dim);
    const std::vector<float> x = test::gaussian_numbers(random, rows * dim);
    const auto book = rvqkv::residual_codebook<>::create({1, 50, dim}, std::span<const float>(weights)).value();
    const rvqkv::matrix_view<const float> view(x.data(), rows, dim);
    std::vector<rvqkv::code_t> expected(rows);
    std::vector<float> expected_scores(rows);
    rvqkv::nearest_codeword(view, book.packed(0), expected, expected_scores);
    for (const std::size_t threads : {1U, 2U, 5U}) {
        CAPTURE(threads);
        const rvqkv::thread_pool pool(threads);
        std::vector<rvqkv::code_t> codes(rows);
        std::vector<float> scores(rows);
        rvqkv::assign_nearest(view, book.packed(0), codes, scores, pool);
        CHECK(codes == expected);
        CHECK(scores == expected_scores);
        rvqkv::assign_nearest(view, book.packed(0), codes, {}, pool);
        CHECK(codes == expected);
    }
}

TEST_CASE("cluster_sums: counts and sums of the rows that the mask counts, bit for bit at any number of threads",
          "[learn][threads][property]") {
    CAPTURE(test::seed());
    test::random_source random(2);
    constexpr std::size_t rows = 3001;
    constexpr std::size_t dim = 5;
    constexpr std::size_t codewords = 13;
    const std::vector<float> x = test::gaussian_numbers(random, rows * dim);
    std::vector<rvqkv::code_t> codes(rows);
    std::vector<std::uint8_t> mask(rows);
    std::vector<double> sums(codewords * dim, 0.0);
    std::vector<std::size_t> counts(codewords, 0);
    for (std::size_t i = 0; i < rows; ++i) {
        codes[i] = static_cast<rvqkv::code_t>(random.integer(0, codewords - 2));  // the last one stays empty
        mask[i] = static_cast<std::uint8_t>(random.integer(0, 2));
        if (mask[i] != 0) {
            ++counts[codes[i]];
            for (std::size_t j = 0; j < dim; ++j) {
                sums[codes[i] * dim + j] += static_cast<double>(x[i * dim + j]);
            }
        }
    }
    for (const std::size_t threads : {1U, 2U, 3U, 20U}) {
        CAPTURE(threads);
        const rvqkv::thread_pool pool(threads);
        rvqkv::cluster_sums clusters;
        clusters.collect({x.data(), rows, dim}, codes, codewords, mask, pool);
        CHECK(clusters.counts == counts);
        CHECK(clusters.sums == sums);
        clusters.collect({x.data(), rows, dim}, codes, codewords, {}, pool);
        std::size_t all = 0;
        for (const std::size_t count : clusters.counts) {
            all += count;
        }
        CHECK(all == rows);
    }
}
