// SPDX-License-Identifier: MIT
/// @file
/// The loops of attention over rows and codes at every SIMD level, whatever the shape: right, and nothing written
/// beside.
#include "rvqkv/simd/kernels.hpp"

#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace {

template <class T>
std::vector<T> numbers_as(test::random_source& random, std::size_t count) {
    std::vector<T> numbers;
    for (std::size_t i = 0; i < count; ++i) {
        numbers.push_back(rvqkv::float_to<T>(random.gaussian()));
    }
    return numbers;
}

}  // namespace

TEMPLATE_TEST_CASE("attention_kernels: scores and sums of rows, of any shape", "[attend][simd][differential]", float,
                   rvqkv::float16, rvqkv::bfloat16) {
    test::random_source random(1);
    CAPTURE(test::seed());
    for (int round = 0; round < 60; ++round) {
        const std::size_t rows = random.integer(0, 150);
        const std::size_t queries = random.integer(1, 11);
        const std::size_t dim = random.integer(1, 160);
        const std::size_t stride = dim + random.integer(0, 9);
        const std::size_t query_stride = dim + random.integer(0, 9);
        const std::size_t out_stride = rows + random.integer(0, 9);
        CAPTURE(round, rows, queries, dim, stride, query_stride, out_stride);
        const auto keys = numbers_as<TestType>(random, rows * stride + 1);
        const auto query = test::gaussian_numbers(random, queries * query_stride);
        const auto weights = test::gaussian_numbers(random, queries * out_stride + 1);
        for (const rvqkv::simd_level level : test::levels()) {
            CAPTURE(rvqkv::name_of(level));
            const auto& kernels = rvqkv::kernels_for(level).value()->attention.rows<TestType>();
            std::vector<float> scores(queries * out_stride + 1, 99.0F);
            kernels.scores({keys.data(), rows, stride}, {query.data(), queries, query_stride}, dim, scores.data(),
                           out_stride);
            std::vector<float> sums(queries * query_stride, 1.0F);
            kernels.add({keys.data(), rows, stride}, weights.data(), {out_stride, 1}, dim,
                        {sums.data(), queries, query_stride});
            double worst = 0.0;
            bool beside = scores.back() < 99.0F;
            for (std::size_t q = 0; q < queries; ++q) {
                for (std::size_t i = 0; i < out_stride; ++i) {
                    double expected = i < rows ? 0.0 : 99.0;
                    for (std::size_t j = 0; j < dim && i < rows; ++j) {
                        expected += static_cast<double>(query[q * query_stride + j]) *
                                    static_cast<double>(rvqkv::to_float(keys[i * stride + j]));
                    }
                    worst = std::max(worst, std::fabs(static_cast<double>(scores[q * out_stride + i]) - expected));
                }
                for (std::size_t j = 0; j < query_stride; ++j) {
                    double expected = 1.0;
                    for (std::size_t i = 0; i < rows && j < dim; ++i) {
                        expected += static_cast<double>(weights[q * out_stride + i]) *
                                    static_cast<double>(rvqkv::to_float(keys[i * stride + j]));
                    }
                    worst = std::max(worst, std::fabs(static_cast<double>(sums[q * query_stride + j]) - expected));
                }
            }
            CHECK_FALSE(beside);
            CHECK(worst <= 160.0 * 16.0 * 0x1p-24);  // products up to some 16, added one by one
        }
    }
}

TEST_CASE("attention_kernels: unpacks a tile of any width, and reads no byte beyond", "[attend][simd][property]") {
    test::random_source random(2);
    CAPTURE(test::seed());
    for (unsigned bits = 1; bits <= 16; ++bits) {
        std::vector<rvqkv::code_t> codes(rvqkv::tile_tokens);
        for (rvqkv::code_t& code : codes) {
            code = static_cast<rvqkv::code_t>(random.integer(0, (1U << bits) - 1));
        }
        std::vector<std::byte> packed(rvqkv::packed_bytes(codes.size(), bits));  // address sanitizer sees its end
        rvqkv::pack_codes(codes.data(), codes.size(), bits, packed.data());
        for (const rvqkv::simd_level level : test::levels()) {
            CAPTURE(bits, rvqkv::name_of(level));
            std::vector<rvqkv::code_t> got(rvqkv::tile_tokens + 1, 77);
            rvqkv::kernels_for(level).value()->attention.unpack_tile(packed.data(), bits, got.data());
            CHECK(got.back() == 77);
            got.pop_back();
            CHECK(got == codes);
        }
    }
}

TEST_CASE("attention_kernels: what is multiplied by anything stays 0 if it is", "[attend][simd][unit]") {
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        for (std::size_t count = 0; count < 40; ++count) {
            std::vector<float> x(count + 1, 3.0F);
            std::vector<float> by(count, -2.0F);
            for (std::size_t i = 0; i < count; i += 3) {
                x[i] = i % 2 == 0 ? 0.0F : -0.0F;
                by[i] = std::numeric_limits<float>::quiet_NaN();
            }
            rvqkv::kernels_for(level).value()->attention.multiply(x.data(), by.data(), count);
            for (std::size_t i = 0; i < count; ++i) {
                CHECK(x[i] == (i % 3 == 0 ? 0.0F : -6.0F));
            }
            CHECK(x[count] == 3.0F);
        }
    }
}
