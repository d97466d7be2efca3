// SPDX-License-Identifier: MIT
/// @file
/// The loops that read codewords and those over whole rows, at every SIMD level and for every weight type, against
/// plain loops: the same bits, whatever the shape, stride and alignment, and nothing written beside. The search has a
/// file of its own, test_nearest_codeword.cpp, and so has conversion.
#include "rvqkv/simd/kernels.hpp"

#include "rvqkv/core/half.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "rvqkv/quantize/scale.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <limits>
#include <vector>

namespace {

using rvqkv::code_t;

template <class Weight>
std::vector<Weight> random_weights(test::random_source& random, std::size_t count) {
    std::vector<Weight> weights;
    for (std::size_t i = 0; i < count; ++i) {
        weights.push_back(rvqkv::float_to<Weight>(random.gaussian()));
    }
    // Zeros of both signs and denormals come through as they are.
    for (std::size_t i = 0; i < count; i += 7) {
        weights[i] = rvqkv::float_to<Weight>(i % 2 == 0 ? -0.0F : -0x1p-24F);
    }
    return weights;
}

std::vector<code_t> random_codes(test::random_source& random, std::size_t count, std::size_t codewords) {
    std::vector<code_t> codes(count);
    for (code_t& code : codes) {
        code = static_cast<code_t>(random.integer(0, codewords - 1));
    }
    return codes;
}

/// The definition: the sum starts from the first codeword, not from 0, so that -0 stays -0. Numbers beside the rows
/// are 99.
template <class Weight>
std::vector<float> decoded(const rvqkv::codebook_shape& shape, const std::vector<Weight>& weights, std::size_t rows,
                           std::size_t stride, std::size_t offset, const std::vector<code_t>& codes,
                           rvqkv::code_strides strides, std::size_t depths) {
    std::vector<float> x(offset + rows * stride, 99.0F);
    for (std::size_t i = 0; i < rows; ++i) {
        for (std::size_t j = 0; j < shape.dim; ++j) {
            float sum = 0.0F;
            for (std::size_t k = 0; k < depths; ++k) {
                const std::size_t code = codes[i * strides.vector + k * strides.depth];
                const float weight = rvqkv::to_float(weights[(k * shape.codewords + code) * shape.dim + j]);
                sum = k == 0 ? weight : sum + weight;
            }
            x[offset + i * stride + j] = sum;
        }
    }
    return x;
}

/// Random weights and codes, and every level against the definition.
template <class Weight>
void check_decode(test::random_source& random, const rvqkv::codebook_shape& shape, std::size_t rows, std::size_t stride,
                  std::size_t offset, rvqkv::code_strides strides, std::size_t depths) {
    const std::vector<Weight> weights = random_weights<Weight>(random, shape.size());
    const std::size_t last = rows == 0 ? 0 : (rows - 1) * strides.vector + (shape.depths - 1) * strides.depth;
    const std::vector<code_t> codes = random_codes(random, last + 1, shape.codewords);
    const std::vector<float> expected = decoded(shape, weights, rows, stride, offset, codes, strides, depths);
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level), shape.codewords, shape.dim, rows, stride, offset, depths, strides.vector);
        std::vector<float> got(offset + rows * stride, 99.0F);
        rvqkv::kernels_for(level).value()->weights<Weight>().decode(got.data() + offset, rows, stride, weights.data(),
                                                                    shape.codewords, shape.dim, codes.data(), strides,
                                                                    depths);
        REQUIRE(test::bits_of(got) == test::bits_of(expected));
    }
}

constexpr std::size_t dims[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 97, 128, 130, 257};

}  // namespace

TEMPLATE_TEST_CASE("kernels: subtract takes each row's codeword away", "[simd][differential]", float, rvqkv::float16,
                   rvqkv::bfloat16) {
    CAPTURE(test::seed());
    test::random_source random(1);
    for (const std::size_t dim : dims) {
        const std::size_t codewords = random.integer(1, 40);
        const std::size_t rows = random.integer(0, 20);
        const std::size_t stride = dim + random.integer(0, 3);
        const std::size_t offset = random.integer(0, 5);  // misaligns the rows
        const std::vector<TestType> weights = random_weights<TestType>(random, codewords * dim);
        const std::vector<code_t> codes = random_codes(random, rows, codewords);
        const std::vector<float> x = test::gaussian_numbers(random, offset + rows * stride);
        std::vector<float> expected = x;
        for (std::size_t i = 0; i < rows; ++i) {
            for (std::size_t j = 0; j < dim; ++j) {
                expected[offset + i * stride + j] -= rvqkv::to_float(weights[codes[i] * dim + j]);
            }
        }
        for (const rvqkv::simd_level level : test::levels()) {
            CAPTURE(rvqkv::name_of(level), dim, rows, stride, offset);
            std::vector<float> got = x;
            rvqkv::kernels_for(level).value()->weights<TestType>().subtract(got.data() + offset, rows, stride,
                                                                            weights.data(), dim, codes.data());
            REQUIRE(test::bits_of(got) == test::bits_of(expected));
        }
    }
}

TEMPLATE_TEST_CASE("kernels: decode adds the codewords of the first depths, in order", "[simd][differential]", float,
                   rvqkv::float16, rvqkv::bfloat16) {
    CAPTURE(test::seed());
    test::random_source random(2);
    for (const std::size_t dim : dims) {
        const rvqkv::codebook_shape shape{random.integer(1, 9), random.integer(1, 40), dim};
        const std::size_t rows = random.integer(0, 20);
        const std::size_t stride = dim + random.integer(0, 3);
        const std::size_t offset = random.integer(0, 5);
        const rvqkv::code_strides layouts[] = {{1, rows}, {shape.depths, 1}, {2, 2 * rows + 1}};
        for (const rvqkv::code_strides strides : layouts) {
            for (const std::size_t depths : {std::size_t{0}, std::size_t{1}, shape.depths}) {
                check_decode<TestType>(random, shape, rows, stride, offset, strides, depths);
            }
        }
    }
}

TEMPLATE_TEST_CASE("kernels: decode of small codebooks, whole registers of rows and any rest", "[simd][differential]",
                   float, rvqkv::float16, rvqkv::bfloat16) {
    CAPTURE(test::seed());
    test::random_source random(3);
    for (const std::size_t dim : {3U, 4U, 8U, 12U, 16U}) {
        for (std::size_t codewords = 1; codewords <= 18; ++codewords) {
            // 32 depths of 4 channels, or 16 of 8, are the most for which tables are made.
            const std::size_t most = 128 / dim;
            const std::size_t shape_depths = codewords == 9    ? most
                                             : codewords == 15 ? most + 1
                                                               : random.integer(1, most);
            const rvqkv::codebook_shape shape{shape_depths, codewords, dim};
            const std::size_t rows = random.integer(0, 15) + (codewords % 4 == 0 ? 50 : 16 * dim);
            const std::size_t depths = random.integer(1, shape.depths);
            const std::size_t offset = codewords % 2;
            check_decode<TestType>(random, shape, rows, dim, offset, {1, rows + 1}, depths);
            check_decode<TestType>(random, shape, rows, dim + codewords % 3, offset, {1, rows}, shape.depths);
            check_decode<TestType>(random, shape, rows, dim, offset, {shape.depths, 1}, depths);
        }
    }
}

TEST_CASE("kernels: rows are measured and dealt to groups with the same bits", "[simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(5);
    for (int round = 0; round < 60; ++round) {
        const std::size_t dim = round % 3 == 0 ? random.integer(1, 40) : std::size_t{4} << random.integer(0, 3);
        const std::size_t groups = round % 2 == 0 ? random.integer(1, 40) : 16 * random.integer(1, 3);
        const std::size_t count = groups * dim;
        const std::size_t offset = random.integer(0, 5);
        const test::family family = test::all_families[static_cast<std::size_t>(round) % std::size(test::all_families)];
        const std::vector<float> numbers = test::make_numbers(random, family, offset + count);
        const float* const row = numbers.data() + offset;
        const float by = 0.37F + random.uniform(0.0F, 1.0F);
        const float shrink = family == test::family::huge ? 0.25F : 1.0F;
        const rvqkv::row_moments moments = rvqkv::detail::moments_of(row, count, shrink);
        std::vector<float> divided(count + 1, 99.0F);
        std::vector<float> dealt(count + 1, 99.0F);
        for (std::size_t i = 0; i < count; ++i) {
            divided[i] = row[i] / by;
            dealt[i % groups * dim + i / groups] = row[i] / by;
        }
        for (const rvqkv::simd_level level : test::levels()) {
            CAPTURE(rvqkv::name_of(level), dim, groups, offset, test::name_of(family));
            const rvqkv::row_kernels& rows = rvqkv::kernels_for(level).value()->rows;
            const rvqkv::row_moments found = rows.moments(row, count, shrink);
            CHECK(found.sum == moments.sum);
            CHECK(found.squares == moments.squares);
            std::vector<float> got(count + 1, 99.0F);
            rows.divide(row, by, count, got.data());
            REQUIRE(test::bits_of(got) == test::bits_of(divided));
            rows.divide_strided(row, by, groups, dim, got.data());
            REQUIRE(test::bits_of(got) == test::bits_of(dealt));
        }
    }
}

TEST_CASE("kernels: rows are rounded, and what is not finite is noticed at any place", "[simd][unit]") {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    for (const rvqkv::simd_level level : test::levels()) {
        const rvqkv::row_kernels& rows = rvqkv::kernels_for(level).value()->rows;
        for (const std::size_t count : {1U, 7U, 16U, 37U}) {
            std::vector<rvqkv::float16> halves(count);
            std::vector<rvqkv::bfloat16> brains(count);
            const auto check = [&](const std::vector<float>& row, bool all, bool half, bool brain) {
                CAPTURE(rvqkv::name_of(level), count);
                CHECK(rows.all_finite(row.data(), count) == all);
                CHECK(rows.round_float16(row.data(), halves.data(), count) == half);
                CHECK(rows.round_bfloat16(row.data(), brains.data(), count) == brain);
                CHECK(rows.finite_float16(halves.data(), count) == half);
                CHECK(rows.finite_bfloat16(brains.data(), count) == brain);
                for (std::size_t i = 0; i < count; ++i) {
                    CHECK(halves[i] == rvqkv::to_float16(row[i]));
                    CHECK(brains[i] == rvqkv::to_bfloat16(row[i]));
                }
            };
            std::vector<float> row(count, -65519.0F);
            check(row, true, true, true);
            for (std::size_t at = 0; at < count; ++at) {
                for (const float bad : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity}) {
                    row[at] = bad;
                    check(row, false, false, false);
                }
                row[at] = 65520.0F;
                check(row, true, false, true);
                row[at] = -std::numeric_limits<float>::max();
                check(row, true, false, false);
                row[at] = 0.1F;
            }
        }
    }
}

TEST_CASE("kernels: NaN and infinity stay in their row", "[simd][unit]") {
    constexpr std::size_t dim = 20;
    const std::vector<float> weights(dim, 1.0F);
    const std::vector<code_t> codes = {0, 0, 0};
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        std::vector<float> x(3 * dim, 3.0F);
        std::fill_n(x.begin() + dim, dim, std::numeric_limits<float>::infinity());
        x[dim + 4] = std::numeric_limits<float>::quiet_NaN();
        rvqkv::kernels_for(level).value()->float32_weights.subtract(x.data(), 3, dim, weights.data(), dim,
                                                                    codes.data());
        CHECK(std::count(x.begin(), x.end(), 2.0F) == 2 * dim);
        CHECK(std::count(x.begin(), x.end(), std::numeric_limits<float>::infinity()) == dim - 1);
    }
}
