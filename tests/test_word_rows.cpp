// SPDX-License-Identifier: MIT
/// @file
/// The loops over rows of 16-bit numbers against plain ones, bit by bit, at every SIMD level that has them.
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/simd/kernels.hpp"

#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <vector>

namespace {

using rvqkv::word_rows_at_once;

template <class T>
std::vector<T> numbers(test::random_source& random, std::size_t count, int most) {
    std::vector<T> made(count);
    for (T& number : made) {
        number = static_cast<T>(static_cast<int>(random.integer(0, 2 * static_cast<std::size_t>(most))) - most);
    }
    return made;
}

/// Calls `body(kernels)` for each level that has them.
template <class Body>
void for_levels(Body&& body) {
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        const rvqkv::word_row_kernels* const kernels = rvqkv::kernels_for(level).value()->word_rows;
        if (kernels != nullptr) {
            body(*kernels);
        }
    }
}

/// As the instruction rounds that multiplies two fractions of 15 bits.
int product(int a, int b) {
    return (a * b + 0x4000) >> 15;
}

}  // namespace

TEST_CASE("word_rows: unpacks and adds up codewords of any depths", "[attend][simd][differential]") {
    test::random_source random(31);
    CAPTURE(test::seed());
    for (int round = 0; round < 30; ++round) {
        const std::size_t dim = 32 * random.integer(1, 2);
        const std::size_t groups = 64 / std::size_t{32} * random.integer(1, 2);
        const std::size_t codewords = random.integer(257, 4096);
        const std::size_t depths = random.integer(1, 5);
        const std::size_t wide_depths = random.integer(1, depths);
        const std::size_t used = random.integer(1, depths);
        const unsigned bits = rvqkv::code_bits(codewords);
        CAPTURE(round, dim, groups, codewords, depths, wide_depths, used);
        const auto wide = numbers<std::int16_t>(random, wide_depths * codewords * dim, 1000);
        const auto narrow = numbers<std::int8_t>(random, (depths - wide_depths) * codewords * dim, 127);
        const auto factors = numbers<std::int16_t>(random, dim, 10);
        const rvqkv::word_codebook book = {wide.data(), narrow.data(), factors.data(), wide_depths, codewords, dim};
        // A row for each depth and group, with a gap in between.
        const std::size_t row_bytes = rvqkv::packed_bytes(rvqkv::tile_tokens, bits);
        const std::size_t depth_stride = groups * (row_bytes + 8) + 16;
        std::vector<std::byte> packed(used * depth_stride);
        std::vector<rvqkv::code_t> codes(groups * used * rvqkv::tile_tokens);
        for (std::size_t group = 0; group < groups; ++group) {
            for (std::size_t depth = 0; depth < used; ++depth) {
                rvqkv::code_t* const row = codes.data() + (group * used + depth) * rvqkv::tile_tokens;
                for (std::size_t i = 0; i < rvqkv::tile_tokens; ++i) {
                    row[i] = static_cast<rvqkv::code_t>(random.integer(0, (1U << bits) - 1));
                }
                rvqkv::pack_codes(row, rvqkv::tile_tokens, bits,
                                  packed.data() + depth * depth_stride + group * (row_bytes + 8));
            }
        }
        std::vector<std::uint16_t> places;
        for (std::size_t at = 0; at < groups * dim; at += rvqkv::word_block) {
            places.push_back(static_cast<std::uint16_t>(at));
        }
        std::shuffle(places.begin(), places.end(), random.engine());
        for_levels([&](const rvqkv::word_row_kernels& kernels) {
            std::vector<rvqkv::code_t> unpacked(codes.size());
            kernels.unpack({packed.data(), depth_stride, row_bytes + 8, used, groups, bits}, book, unpacked.data());
            bool same = true;
            for (std::size_t i = 0; i < codes.size(); ++i) {
                const std::size_t code = std::min<std::size_t>(codes[i], codewords - 1);
                const std::size_t depth = i / rvqkv::tile_tokens % used;
                same = same && unpacked[i] == code * dim / (depth < wide_depths ? 4 : 8);
            }
            CHECK(same);
            const std::size_t first = word_rows_at_once * random.integer(0, rvqkv::tile_tokens / word_rows_at_once - 1);
            std::vector<std::int16_t> rows(word_rows_at_once * groups * dim, 99);
            kernels.decode(book, unpacked.data() + first, used, groups, places.data(), rows.data());
            for (std::size_t i = 0; i < rows.size(); ++i) {
                const std::size_t row = i / (groups * dim);
                const std::size_t place = i % (groups * dim);
                const std::size_t group = place / dim;
                int sum = 0;
                for (std::size_t depth = 0; depth < used; ++depth) {
                    const std::size_t at = (group * used + depth) * rvqkv::tile_tokens + first + row;
                    const std::size_t codeword = std::min<std::size_t>(codes[at], codewords - 1) * dim + place % dim;
                    sum += depth < wide_depths
                               ? wide[depth * codewords * dim + codeword]
                               : factors[place % dim] * narrow[(depth - wide_depths) * codewords * dim + codeword];
                }
                const std::size_t to = places[place / rvqkv::word_block] + place % rvqkv::word_block;
                same = same && rows[row * groups * dim + to] == sum;
            }
            CHECK(same);
        });
    }
}

TEST_CASE("word_rows: rounds to whole steps that fit", "[attend][simd][property]") {
    test::random_source random(32);
    CAPTURE(test::seed());
    const std::uint16_t places[] = {48, 0, 32, 16};
    for (int round = 0; round < 40; ++round) {
        auto x = test::gaussian_numbers(random, 64);
        x[5] *= round % 4 == 0 ? 1e4F : 1.0F;
        for (float& number : x) {
            number *= std::exp(static_cast<float>(round - 20));
        }
        for_levels([&](const rvqkv::word_row_kernels& kernels) {
            std::vector<std::int16_t> rounded(65, 77);
            const float step = kernels.round(x.data(), 64, places, rounded.data());
            CHECK(rounded[64] == 77);
            int total = 0;
            for (std::size_t i = 0; i < 64; ++i) {
                const int number = rounded[places[i / 16] + i % 16];
                total += std::abs(number);
                CHECK(std::fabs(static_cast<float>(number) * step - x[i]) <= 0.501F * step);
            }
            CHECK(total <= 65032);
            CHECK(step > 0.0F);
            std::vector<float> zeros(64, 0.0F);
            CHECK(kernels.round(zeros.data(), 64, nullptr, rounded.data()) == 0.0F);
            CHECK(std::all_of(rounded.begin(), rounded.end() - 1, [](int number) { return number == 0; }));
            for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
                zeros[9] = bad;
                CHECK(std::isnan(kernels.round(zeros.data(), 64, nullptr, rounded.data())));
            }
        });
    }
}

TEST_CASE("word_rows: scores, turned or not, and sums of tiles", "[attend][simd][differential]") {
    test::random_source random(33);
    CAPTURE(test::seed());
    for (int round = 0; round < 20; ++round) {
        const std::size_t dim = 64 * random.integer(1, 3);
        const std::size_t queries = random.integer(1, 9);
        CAPTURE(round, dim, queries);
        const auto rows = numbers<std::int16_t>(random, rvqkv::tile_tokens * dim, 22000);
        const auto query = numbers<std::int16_t>(random, queries * dim, 300);
        const auto steps = test::gaussian_numbers(random, queries);
        const auto scales = test::gaussian_numbers(random, rvqkv::tile_tokens);
        std::vector<std::int16_t> angles(rvqkv::tile_tokens * dim);
        for (std::size_t i = 0; i < angles.size(); ++i) {
            const std::size_t cosine = i % dim < dim / 2 ? i : i - dim / 2;
            const double angle = static_cast<double>(cosine * cosine) * 0.37;
            angles[i] =
                static_cast<std::int16_t>(std::lrint(32767.0 * (i == cosine ? std::cos(angle) : std::sin(angle))));
        }
        for_levels([&](const rvqkv::word_row_kernels& kernels) {
            for (const bool turned : {false, true}) {
                std::vector<float> out(queries * word_rows_at_once + 1, 5.0F);
                kernels.scores(rows.data(), dim, turned ? angles.data() : nullptr, query.data(), queries, steps.data(),
                               scales.data(), out.data(), word_rows_at_once);
                CHECK(out.back() == 5.0F);
                bool same = true;
                for (std::size_t q = 0; q < queries; ++q) {
                    for (std::size_t i = 0; i < word_rows_at_once; ++i) {
                        std::int32_t sum = 0;
                        for (std::size_t c = 0; c < dim / 2; ++c) {
                            int a = rows[i * dim + c];
                            int b = rows[i * dim + dim / 2 + c];
                            if (turned) {
                                const int cosine = angles[i * dim + c];
                                const int sine = angles[i * dim + dim / 2 + c];
                                const int first = product(a, cosine) - product(b, sine);
                                b = product(a, sine) + product(b, cosine);
                                a = first;
                            }
                            sum += a * query[q * dim + c] + b * query[q * dim + dim / 2 + c];
                        }
                        same = same && out[q * word_rows_at_once + i] == static_cast<float>(sum) * scales[i] * steps[q];
                    }
                }
                CHECK(same);
            }
            auto weights = numbers<std::int16_t>(random, queries * rvqkv::tile_tokens, 1000);
            std::vector<float> sums(queries * dim, 3.0F);
            kernels.add(rows.data(), dim, weights.data(), queries, steps.data(), sums.data());
            bool same = true;
            for (std::size_t i = 0; i < sums.size(); ++i) {
                std::int32_t sum = 0;
                for (std::size_t t = 0; t < rvqkv::tile_tokens; ++t) {
                    sum += weights[i / dim * rvqkv::tile_tokens + t] * rows[t * dim + i % dim];
                }
                same = same && sums[i] == std::fma(static_cast<float>(sum), steps[i / dim], 3.0F);
            }
            CHECK(same);
        });
    }
}
