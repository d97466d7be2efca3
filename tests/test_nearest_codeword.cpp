// SPDX-License-Identifier: MIT
/// @file
/// The search at every SIMD level against one scalar std::fma loop: the same codes and the same bits of the scores, on
/// any shape, stride and alignment, on ties, and on numbers that overflow or are none.
#include "rvqkv/quantize/nearest_codeword.hpp"

#include "rvqkv/quantize/codebook.hpp"
#include "support/allocation_counter.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <vector>

namespace {

using rvqkv::code_t;
using rvqkv::matrix_view;

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

struct found {
    std::vector<code_t> codes;
    std::vector<float> scores;
};

rvqkv::residual_codebook<> make_book(std::size_t dim, const std::vector<float>& weights,
                                     rvqkv::distance metric = rvqkv::distance::euclidean) {
    return rvqkv::residual_codebook<>::create({1, weights.size() / dim, dim}, std::span<const float>(weights), metric)
        .value();
}

/// The definition, one codeword after another.
found expected_of(matrix_view<const float> x, const std::vector<float>& weights, bool cosine = false) {
    const reference::codebook book{1, weights.size() / x.cols, x.cols, weights, cosine};
    found expected;
    for (std::size_t i = 0; i < x.rows; ++i) {
        const code_t code = reference::nearest_codeword(x.row(i), book, 0);
        const float score = reference::score(x.row(i), book.codeword(0, code), x.cols, cosine);
        expected.codes.push_back(code);
        expected.scores.push_back(score > -infinity ? score : -infinity);  // NaN: no score compared
    }
    return expected;
}

found search(matrix_view<const float> x, const rvqkv::residual_codebook<>& book, rvqkv::simd_level level) {
    found got{std::vector<code_t>(x.rows, 0xdead), std::vector<float>(x.rows, -99.0F)};
    const rvqkv::kernel_table& kernels = *rvqkv::kernels_for(level).value();
    rvqkv::nearest_codeword(x, book.packed(0), got.codes, got.scores, kernels);
    std::vector<code_t> codes(x.rows, 0xdead);
    rvqkv::nearest_codeword(x, book.packed(0), codes, {}, kernels);  // without scores
    CHECK(codes == got.codes);
    return got;
}

void check_all_levels(matrix_view<const float> x, const std::vector<float>& weights, bool cosine = false) {
    const found expected = expected_of(x, weights, cosine);
    const rvqkv::residual_codebook<> book =
        make_book(x.cols, weights, cosine ? rvqkv::distance::cosine : rvqkv::distance::euclidean);
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level), x.rows, x.cols, x.stride, weights.size() / x.cols, cosine);
        const found got = search(x, book, level);
        REQUIRE(got.codes == expected.codes);
        REQUIRE(test::bits_of(got.scores) == test::bits_of(expected.scores));
    }
}

/// A view of exactly the memory that its rows need, so that a sanitizer sees every access beyond: the last row ends
/// with its last column, and the data start `offset` floats into their block.
struct padded_rows {
    padded_rows(const std::vector<float>& values, std::size_t rows, std::size_t cols, std::size_t stride,
                std::size_t offset)
        : storage(offset + (rows == 0 ? 0 : (rows - 1) * stride + cols), not_a_number),
          view(storage.data() + offset, rows, cols, stride) {
        for (std::size_t i = 0; i < rows; ++i) {
            for (std::size_t j = 0; j < cols; ++j) {
                storage[offset + i * stride + j] = values[i * cols + j];
            }
        }
    }
    std::vector<float> storage;
    matrix_view<const float> view;
};

constexpr std::size_t dims[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100, 128, 257};

}  // namespace

TEST_CASE("nearest_codeword: equals the scalar search on random shapes", "[quantize][simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(1);
    for (const std::size_t dim : dims) {
        for (int round = 0; round < 6; ++round) {
            // No more than some 400,000 products a shape, for the sake of builds with sanitizers.
            const std::size_t codewords = random.integer(1, 300);
            const std::size_t rows = std::min<std::size_t>(random.integer(1, 130), 1 + 400000 / (codewords * dim));
            const padded_rows x(test::gaussian_numbers(random, rows * dim), rows, dim, dim + random.integer(0, 5),
                                random.integer(0, 17));
            check_all_levels(x.view, test::gaussian_numbers(random, codewords * dim), round >= 4);
        }
    }
}

TEST_CASE("nearest_codeword: equals the scalar search for every number of rows and of codewords",
          "[quantize][simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(2);
    constexpr std::size_t dim = 3;
    const std::vector<float> weights = test::gaussian_numbers(random, 300 * dim);
    const std::vector<float> numbers = test::gaussian_numbers(random, 130 * dim);
    for (std::size_t rows = 1; rows <= 130;
         ++rows) {  // registers of 4, 8 and 16 rows, one to four at a time, and any rest
        check_all_levels({numbers.data(), rows, dim},
                         {weights.begin(), weights.begin() + static_cast<std::ptrdiff_t>(70 * dim)});
    }
    for (std::size_t codewords = 1; codewords <= 300; ++codewords) {  // blocks of 16, tiles of 1, 2 and 4 blocks
        check_all_levels({numbers.data(), 7, dim},
                         {weights.begin(), weights.begin() + static_cast<std::ptrdiff_t>(codewords * dim)});
    }
}

TEST_CASE("nearest_codeword: equals the scalar search for every number of channels", "[quantize][simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(11);
    std::vector<std::size_t> all_dims(40);
    for (std::size_t i = 0; i < all_dims.size(); ++i) {
        all_dims[i] = i + 1;
    }
    // From 64, 85, 128, 256, 512 and 1024 channels on, fewer registers of rows fit in L1.
    all_dims.insert(all_dims.end(), {63, 64, 65, 85, 86, 127, 128, 129, 255, 256, 257, 341, 342, 512, 513, 1024, 1027});
    for (const std::size_t dim : all_dims) {
        const std::size_t rows = dim > 300 ? 51 : 83;  // more than a chunk of those that are too long
        const padded_rows x(test::gaussian_numbers(random, rows * dim), rows, dim, dim + dim % 3, 1);
        check_all_levels(x.view, test::gaussian_numbers(random, (dim > 300 ? 17 : 37) * dim));
    }
}

TEST_CASE("nearest_codeword: equals the scalar search for every rest of rows, off alignment",
          "[quantize][simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(12);
    struct {
        std::size_t codewords, dim;
    } const shapes[] = {{16, 4}, {64, 8}, {256, 8}, {70, 31}, {130, 32}};  // rests are done in either way
    for (const auto& shape : shapes) {
        const std::vector<float> weights = test::gaussian_numbers(random, shape.codewords * shape.dim);
        const auto book = make_book(shape.dim, weights);
        const padded_rows x(test::gaussian_numbers(random, 97 * shape.dim), 97, shape.dim, shape.dim + 2, 1);
        const found expected = expected_of(x.view, weights);
        for (std::size_t rows = 1; rows <= 97; rows += rows < 34 ? 1 : 3) {
            for (const rvqkv::simd_level level : test::levels()) {
                CAPTURE(rvqkv::name_of(level), shape.codewords, shape.dim, rows);
                // One more place than rows, which must stay as it is.
                std::vector<code_t> codes(rows + 1, 0xdead);
                std::vector<float> scores(rows + 1, -99.0F);
                rvqkv::nearest_codeword({x.view.data, rows, shape.dim, x.view.stride}, book.packed(0),
                                        {codes.data(), rows}, {scores.data(), rows},
                                        *rvqkv::kernels_for(level).value());
                REQUIRE(codes.back() == 0xdead);
                REQUIRE(scores.back() == -99.0F);
                codes.pop_back();
                scores.pop_back();
                const auto end = static_cast<std::ptrdiff_t>(rows);
                REQUIRE(codes == std::vector<code_t>(expected.codes.begin(), expected.codes.begin() + end));
                REQUIRE(test::bits_of(scores) == test::bits_of({expected.scores.data(), rows}));
            }
        }
    }
}

TEST_CASE("nearest_codeword: equals the scalar search around whole blocks of many codewords",
          "[quantize][simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(13);
    constexpr std::size_t dim = 5;
    constexpr std::size_t rows = 53;
    const std::vector<float> x = test::gaussian_numbers(random, rows * dim);
    for (const std::size_t codewords : {1023U, 1024U, 1025U, 2047U, 2048U, 2049U}) {
        std::vector<float> weights = test::gaussian_numbers(random, codewords * dim);
        for (const std::size_t taken : {std::size_t{1}, std::size_t{2}, std::size_t{3}, std::size_t{16}, rows}) {
            check_all_levels({x.data(), taken, dim}, weights);
        }
        // The last codeword is what every row asks for; then its double, the first.
        const std::vector<float> last(weights.end() - dim, weights.end());
        std::vector<float> same;
        for (std::size_t i = 0; i < rows; ++i) {
            same.insert(same.end(), last.begin(), last.end());
        }
        check_all_levels({same.data(), rows, dim}, weights);
        std::copy(last.begin(), last.end(), weights.begin());
        check_all_levels({same.data(), rows, dim}, weights);
    }
}

TEST_CASE("nearest_codeword: equals the scalar search on rows that hold anything, side by side",
          "[quantize][simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(14);
    const float specials[] = {0.0F,         -0.0F,     1.0F,       -1.0F, infinity, -infinity,
                              not_a_number, 0x1p-149F, -0x1p-130F, 3e38F, -3e38F,   1e19F};
    for (std::size_t round = 0; round < 60; ++round) {
        CAPTURE(round);
        const std::size_t dim = random.integer(1, 18);
        const std::size_t codewords = random.integer(1, 70);
        const std::size_t rows = random.integer(1, 90);
        // Few different codewords: ties everywhere, and codewords of zeros, denormals and huge numbers among them.
        std::vector<float> weights = test::whole_numbers(random, codewords * dim, 1);
        for (std::size_t i = 0; i < codewords; i += random.integer(1, 9)) {
            const auto kind = test::all_families[random.integer(0, std::size(test::all_families) - 1)];
            const std::vector<float> numbers = test::make_numbers(random, kind, dim);
            std::copy(numbers.begin(), numbers.end(), weights.begin() + static_cast<std::ptrdiff_t>(i * dim));
        }
        std::vector<float> x = test::whole_numbers(random, rows * dim, 2);
        for (std::size_t i = 0; i < rows; i += random.integer(1, 3)) {
            x[i * dim + random.integer(0, dim - 1)] = specials[random.integer(0, std::size(specials) - 1)];
        }
        check_all_levels({x.data(), rows, dim}, weights, round % 4 == 3);
    }
}

TEST_CASE("nearest_codeword: equals the scalar search at the paper's size", "[quantize][simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(3);
    const std::vector<float> x = test::gaussian_numbers(random, 13 * 32);
    check_all_levels({x.data(), 13, 32}, test::gaussian_numbers(random, 2048 * 32));
}

TEST_CASE("nearest_codeword: finds codes up to the last of 65536", "[quantize][simd][unit]") {
    // The points of a 256 x 256 grid: all scores are exact.
    constexpr std::size_t side = 256;
    std::vector<float> weights;
    for (std::size_t c = 0; c < rvqkv::max_codewords; ++c) {
        const std::size_t row = c / side;
        weights.push_back(static_cast<float>(row) - 128.0F);
        weights.push_back(static_cast<float>(c - row * side) - 128.0F);
    }
    const std::vector<float> x = {-128,       -128,   /**/ -128, 127, /**/ 0,    0,
                                  /**/ 5.25F, -7.25F, /**/ 127,  127, /**/ 9e3F, 9e3F};
    const auto book = make_book(2, weights);
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        CHECK(search({x.data(), x.size() / 2, 2}, book, level).codes ==
              std::vector<code_t>{0, 255, 128 * side + 128, 133 * side + 121, 65535, 65535});
    }
}

TEST_CASE("nearest_codeword: whole numbers give the true nearest, by brute force over distances",
          "[quantize][simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(4);
    for (const std::size_t dim : {1U, 2U, 5U, 16U, 33U}) {
        const std::size_t codewords = random.integer(2, 100);
        const std::vector<float> weights = test::whole_numbers(random, codewords * dim, 3);
        const std::vector<float> x = test::whole_numbers(random, 50 * dim, 4);
        const auto book = make_book(dim, weights);
        std::vector<code_t> expected;
        std::vector<float> scores;
        for (std::size_t i = 0; i < 50; ++i) {
            long best = std::numeric_limits<long>::max();
            code_t code = 0;
            long own = 0;
            for (std::size_t c = 0; c < codewords; ++c) {
                long squares = 0;
                own = 0;
                for (std::size_t j = 0; j < dim; ++j) {
                    const long value = std::lround(x[i * dim + j]);
                    const long difference = value - std::lround(weights[c * dim + j]);
                    squares += difference * difference;
                    own += value * value;
                }
                if (squares < best) {  // the first among equals
                    best = squares;
                    code = static_cast<code_t>(c);
                }
            }
            expected.push_back(code);
            scores.push_back(static_cast<float>(own - best) / 2.0F);  // |x - c|^2 = |x|^2 - 2 * score
        }
        for (const rvqkv::simd_level level : test::levels()) {
            CAPTURE(rvqkv::name_of(level), dim, codewords);
            const found got = search({x.data(), 50, dim}, book, level);
            CHECK(got.codes == expected);
            CHECK(got.scores == scores);
        }
    }
}

TEST_CASE("nearest_codeword: lowest index wins a tie", "[quantize][simd][unit]") {
    // Each codeword stands at two places, in all combinations of lane and block.
    test::random_source random(5);
    constexpr std::size_t dim = 4;
    constexpr std::size_t codewords = 100;
    const std::vector<float> distinct = test::gaussian_numbers(random, codewords * dim);
    for (std::size_t first = 0; first < codewords; first += 3) {
        for (std::size_t second = first + 1; second < codewords; second += 7) {
            std::vector<float> weights = distinct;
            std::copy_n(weights.begin() + static_cast<std::ptrdiff_t>(first * dim), dim,
                        weights.begin() + static_cast<std::ptrdiff_t>(second * dim));
            const std::vector<float> x(weights.begin() + static_cast<std::ptrdiff_t>(first * dim),
                                       weights.begin() + static_cast<std::ptrdiff_t>((first + 1) * dim));
            const auto book = make_book(dim, weights);
            for (const rvqkv::simd_level level : test::levels()) {
                CAPTURE(rvqkv::name_of(level), first, second);
                REQUIRE(search({x.data(), 1, dim}, book, level).codes.front() == first);
            }
        }
    }
}

TEST_CASE("nearest_codeword: equal codewords and zero vectors take code 0", "[quantize][simd][unit]") {
    for (const std::size_t codewords : {1U, 2U, 15U, 16U, 17U, 33U, 70U}) {
        const std::vector<float> x(7 * 5, 0.0F);
        check_all_levels({x.data(), 7, 5}, std::vector<float>(codewords * 5, 0.25F));
        check_all_levels({x.data(), 7, 5}, std::vector<float>(codewords * 5, 0.0F));
        check_all_levels({x.data(), 7, 5}, std::vector<float>(codewords * 5, 0.0F), true);
        const auto book = make_book(5, std::vector<float>(codewords * 5, 0.25F));
        for (const rvqkv::simd_level level : test::levels()) {
            CHECK(search({x.data(), 7, 5}, book, level).codes == std::vector<code_t>(7, 0));
        }
    }
}

TEST_CASE("nearest_codeword: a score of +0 and one of -0 tie", "[quantize][simd][unit]") {
    // <-1, 0> = -0 and <-1, -0> = +0, from an offset of -0.
    const std::vector<float> x = {-1.0F, 1.0F};
    for (const std::vector<float>& weights : {std::vector<float>{0.0F, -0.0F}, std::vector<float>{-0.0F, 0.0F}}) {
        check_all_levels({x.data(), 2, 1}, weights);
        check_all_levels({x.data(), 2, 1}, weights, true);
        const auto book = make_book(1, weights);
        for (const rvqkv::simd_level level : test::levels()) {
            CHECK(search({x.data(), 2, 1}, book, level).codes == std::vector<code_t>{0, 0});
        }
    }
}

TEST_CASE("nearest_codeword: agrees on all families of numbers", "[quantize][simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(6);
    constexpr std::size_t dim = 19;
    for (const test::family vectors : test::all_families) {
        for (const test::family codewords : test::all_families) {
            CAPTURE(test::name_of(vectors), test::name_of(codewords));
            const std::vector<float> x = test::make_numbers(random, vectors, 23 * dim);
            const std::vector<float> weights = test::make_numbers(random, codewords, 45 * dim);
            check_all_levels({x.data(), 23, dim}, weights);
            check_all_levels({x.data(), 23, dim}, weights, true);
        }
    }
}

TEST_CASE("nearest_codeword: scores that overflow give a valid code", "[quantize][simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(7);
    constexpr std::size_t dim = 6;
    std::vector<float> x = test::make_numbers(random, test::family::huge, 40 * dim);
    std::vector<float> weights = test::make_numbers(random, test::family::huge, 37 * dim);
    for (float& number : x) {
        number *= 1e21F;
    }
    check_all_levels({x.data(), 40, dim}, weights);  // inner products of both signs overflow
    for (float& weight : weights) {
        weight *= 1e20F;
    }
    check_all_levels({x.data(), 40, dim}, weights);  // so do the squares of all codewords: no score compares
    const found got = expected_of({x.data(), 40, dim}, weights);
    CHECK(got.codes == std::vector<code_t>(40, 0));
    weights[5 * dim] = 1.0F;  // one codeword of a size to be found
    std::fill_n(weights.begin() + 5 * dim + 1, dim - 1, 0.0F);
    std::fill(x.begin(), x.end(), 2.0F);
    check_all_levels({x.data(), 40, dim}, weights);
    CHECK(expected_of({x.data(), 40, dim}, weights).codes == std::vector<code_t>(40, 5));
}

TEST_CASE("nearest_codeword: rows of NaN and infinity get a valid code and harm no neighbour",
          "[quantize][simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(8);
    constexpr std::size_t dim = 9;
    constexpr std::size_t rows = 75;
    const std::vector<float> clean = test::gaussian_numbers(random, rows * dim);
    for (const std::size_t codewords : {1U, 3U, 16U, 37U, 64U}) {
        const std::vector<float> weights = test::gaussian_numbers(random, codewords * dim);
        const auto book = make_book(dim, weights);
        for (const float bad : {not_a_number, infinity, -infinity}) {
            for (std::size_t at = 0; at < dim; at += 4) {
                std::vector<float> x = clean;
                for (std::size_t row = 0; row < rows; row += 5) {
                    x[row * dim + at] = bad;
                }
                check_all_levels({x.data(), rows, dim}, weights);
                const found before = expected_of({clean.data(), rows, dim}, weights);
                for (const rvqkv::simd_level level : test::levels()) {
                    CAPTURE(rvqkv::name_of(level), codewords, bad, at);
                    const found got = search({x.data(), rows, dim}, book, level);
                    for (std::size_t row = 0; row < rows; ++row) {
                        REQUIRE(got.codes[row] < codewords);
                        if (row % 5 != 0) {
                            REQUIRE(got.codes[row] == before.codes[row]);
                            REQUIRE(got.scores[row] == before.scores[row]);
                        } else if (std::isnan(bad)) {
                            REQUIRE(got.codes[row] == 0);
                            REQUIRE(got.scores[row] == -infinity);
                        }
                    }
                }
            }
        }
    }
}

TEST_CASE("nearest_codeword: cosine asks for the angle alone", "[quantize][simd][unit]") {
    // Long codewords do not win by length, and the zero codeword only when all others point away.
    const std::vector<float> weights = {100, 0, /**/ 1, 1, /**/ 0, 0.001F, /**/ 0, 0};
    const std::vector<float> x = {5, 0.1F, /**/ 3, 2.9F, /**/ 0.1F, 40, /**/ -1, -1};
    const auto book = make_book(2, weights, rvqkv::distance::cosine);
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        const found got = search({x.data(), 4, 2}, book, level);
        CHECK(got.codes == std::vector<code_t>{0, 1, 2, 3});
        CHECK(got.scores[0] == 5.0F);
        CHECK(got.scores[3] == 0.0F);
    }
    check_all_levels({x.data(), 4, 2}, weights, true);
}

TEST_CASE("nearest_codeword: no rows, no work", "[quantize][simd][unit]") {
    const auto book = make_book(2, {1, 2, 3, 4});
    for (const rvqkv::simd_level level : test::levels()) {
        rvqkv::nearest_codeword({nullptr, 0, 2}, book.packed(0), {}, {}, *rvqkv::kernels_for(level).value());
    }
    SUCCEED();
}

TEST_CASE("nearest_codeword: allocates nothing", "[quantize][simd][unit]") {
    test::random_source random(9);
    const std::vector<float> x = test::gaussian_numbers(random, 100 * 8);
    const auto book = make_book(8, test::gaussian_numbers(random, 50 * 8));
    std::vector<code_t> codes(100);
    std::vector<float> scores(100);
    rvqkv::nearest_codeword({x.data(), 1, 8}, book.packed(0), {codes.data(), 1});  // the first call chooses the kernels
    const test::allocation_counter counter;
    rvqkv::nearest_codeword({x.data(), 100, 8}, book.packed(0), codes, scores);
    const std::size_t allocations = counter.allocations();
    CHECK(allocations == 0);
}

TEST_CASE("nearest_codeword: equals the scalar search on many random shapes", "[quantize][simd][slow][differential]") {
    CAPTURE(test::seed());
    test::random_source random(10);
    const std::size_t rounds = test::rounds(2000, 20);
    for (std::size_t round = 0; round < rounds; ++round) {
        CAPTURE(round);
        const std::size_t dim = random.integer(1, 257);
        const std::size_t codewords = random.integer(1, 300);
        const std::size_t rows = random.integer(1, 130);
        const auto kind = test::all_families[random.integer(0, std::size(test::all_families) - 1)];
        const padded_rows x(test::make_numbers(random, kind, rows * dim), rows, dim, dim + random.integer(0, 20),
                            random.integer(0, 17));
        check_all_levels(x.view, test::make_numbers(random, kind, codewords * dim), random.integer(0, 3) == 0);
    }
}
