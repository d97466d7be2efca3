// SPDX-License-Identifier: MIT
/// @file
/// Integer copies of codebooks: every codeword stands somewhere once, and the bounds are bounds.
#include "rvqkv/quantize/integer_copies.hpp"

#include "rvqkv/quantize/codebook.hpp"
#include "rvqkv/simd/kernels.hpp"
#include "support/allocation_counter.hpp"
#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"
#include "support/weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <limits>
#include <span>
#include <vector>

namespace {

using rvqkv::codebook_shape;
using rvqkv::integer_codebook;
using rvqkv::integer_group;

/// Copies of a codebook, on any machine.
rvqkv::integer_copies copies_of(const rvqkv::residual_codebook<>& book, unsigned bits = 8) {
    auto copies = rvqkv::integer_copies::create(book.depths(), book.codewords(), book.dim(), bits).value();
    for (std::size_t depth = 0; depth < book.depths(); ++depth) {
        copies.build(depth, book.packed(depth));
    }
    return copies;
}

rvqkv::residual_codebook<> make_book(const codebook_shape& shape, const std::vector<float>& weights,
                                     rvqkv::distance metric = rvqkv::distance::euclidean) {
    return rvqkv::residual_codebook<>::create(shape, std::span<const float>(weights), metric).value();
}

TEST_CASE("integer_copies: each codeword has one place, and its copies are as near as promised",
          "[quantize][property]") {
    CAPTURE(test::seed());
    test::random_source random(820);
    unsigned bits = 7;
    for (const codebook_shape shape :
         {codebook_shape{2, 130, 32}, codebook_shape{1, 64, 16}, codebook_shape{1, 1, 5}, codebook_shape{1, 700, 37}}) {
        for (const rvqkv::distance metric : {rvqkv::distance::euclidean, rvqkv::distance::cosine}) {
            bits = 15 - bits;
            const int zero = bits == 8 ? 128 : 64;
            CAPTURE(shape.codewords, shape.dim, rvqkv::name_of(metric), bits);
            std::vector<float> weights = test::make_weights(random, shape);
            for (std::size_t i = 0; i < weights.size(); ++i) {
                weights[i] += 3.0F * static_cast<float>(i % shape.dim == 1);  // a mean that is not 0
            }
            const auto book = make_book(shape, weights, metric);
            const auto copies = copies_of(book, bits);
            for (std::size_t depth = 0; depth < shape.depths; ++depth) {
                const integer_codebook& view = *copies.view(depth);
                CHECK(view.coarse_zero == zero);
                const rvqkv::packed_codebook packed = book.packed(depth);
                std::vector<std::size_t> places(shape.codewords, 0);
                const std::size_t groups = (shape.codewords + integer_group - 1) / integer_group;
                for (std::size_t place = 0; place < groups * integer_group; ++place) {
                    const std::size_t quad = place / 4;
                    const std::size_t group = quad / 16;
                    const std::size_t in_group = place % 4 * 16 + quad % 16;
                    const float coarse_offset = view.coarse_offsets[group * integer_group + in_group];
                    if (view.fine_offsets[place] == -std::numeric_limits<float>::infinity()) {
                        CHECK(coarse_offset == view.fine_offsets[place]);  // padding, which never wins
                        continue;
                    }
                    const std::size_t code = view.codes[place];
                    REQUIRE(code < shape.codewords);
                    ++places[code];
                    double norm = 0.0;
                    double coarse_error = 0.0;
                    double fine_error = 0.0;
                    double product = 0.0;
                    for (std::size_t j = 0; j < shape.dim; ++j) {
                        const auto center = static_cast<double>(view.center[j]);
                        const double weight =
                            static_cast<double>(packed.interleaved[(code / 16 * shape.dim + j) * 16 + code % 16]) -
                            center;
                        const std::size_t quarters = (shape.dim + 3) / 4;
                        const int byte =
                            view.coarse[((group * quarters + j / 4) * integer_group + in_group) * 4 + j % 4];
                        CHECK(std::abs(byte - zero) < zero);
                        const double coarse = (byte - zero) * static_cast<double>(view.coarse_steps[group]);
                        const double fine = view.fine[place * rvqkv::integer_fine_dim(shape.dim) + j] *
                                            static_cast<double>(view.fine_step);
                        norm += weight * weight;
                        coarse_error += (weight - coarse) * (weight - coarse);
                        fine_error += (weight - fine) * (weight - fine);
                        product += weight * center;
                    }
                    CHECK(std::sqrt(norm) <= static_cast<double>(view.norms[group]));
                    CHECK(std::sqrt(norm) <= static_cast<double>(view.norm));
                    CHECK(std::sqrt(coarse_error) <= static_cast<double>(view.coarse_errors[group]));
                    CHECK(std::sqrt(fine_error) <= static_cast<double>(view.fine_step * view.half_root_dim));
                    const double offset = static_cast<double>(packed.offsets[code]) + product;
                    CHECK(static_cast<double>(view.fine_offsets[place]) == Approx(offset).epsilon(1e-5).margin(1e-5));
                    CHECK(static_cast<double>(coarse_offset * view.coarse_steps[group]) ==
                          Approx(offset).epsilon(1e-5).margin(1e-5));
                    CHECK(std::fabs(view.fine_offsets[place]) <= view.offset);
                }
                CHECK(std::all_of(places.begin(), places.end(), [](std::size_t times) { return times == 1; }));
                CHECK(std::is_sorted(view.norms, view.norms + groups));
            }
        }
    }
}

TEST_CASE("integer_copies: numbers that bounds cannot be given for have no copies", "[quantize][unit]") {
    for (const float weight : {0.0F, 1e-30F, 1e30F}) {
        const codebook_shape shape{2, 70, 16};
        std::vector<float> weights(shape.size(), weight);
        weights[shape.size() / 2] = 1.0F;  // the second depth is usual unless it is huge
        const auto book = make_book(shape, weights);
        const auto copies = copies_of(book);
        CHECK(copies.view(0) == nullptr);
        CHECK((copies.view(1) != nullptr) == (weight < 1.0F));
    }
    CHECK(rvqkv::integer_copies().view(0) == nullptr);
}

TEST_CASE("integer_copies: only large codebooks have them, where the process searches by them", "[quantize][unit]") {
    using rvqkv::integer_copies;
    using rvqkv::simd_level;
    const simd_level level = rvqkv::choose_simd_level().value();
    const bool wide = level == simd_level::avxvnni || level >= simd_level::avx512vnni;
    const bool narrow = level == simd_level::avx2 || level == simd_level::avx512;
    CAPTURE(rvqkv::name_of(level));
    CHECK(integer_copies::coarse_bits() == (wide ? 8U : narrow ? 7U : 0U));
    CHECK(integer_copies::wanted(1024, 16) == (wide || narrow));
    CHECK(integer_copies::wanted(512, 16) == wide);
    CHECK_FALSE(integer_copies::wanted(511, 16));
    CHECK_FALSE(integer_copies::wanted(255, 256));
    CHECK_FALSE(integer_copies::wanted(2048, 15));
    CHECK_FALSE(integer_copies::wanted(2048, 257));
    test::random_source random(821);
    for (const std::size_t codewords : {512U, 1024U}) {
        const codebook_shape shape{1, codewords, 16};
        const auto book = make_book(shape, test::make_weights(random, shape));
        const integer_codebook* const view = book.packed(0).integers;
        REQUIRE((view != nullptr) == integer_copies::wanted(codewords, 16));
        CHECK((view == nullptr || view->coarse_zero == 1 << (integer_copies::coarse_bits() - 1)));
    }
}

/// What a search gives for copies of so many bits (0: none): codes, then lists of 5 with scores.
struct search_results {
    std::vector<rvqkv::code_t> codes;
    std::vector<rvqkv::code_t> list_codes;
    std::vector<float> list_scores;
};
search_results search(rvqkv::simd_level level, const std::vector<float>& x, std::size_t dim,
                      rvqkv::packed_codebook packed, const integer_codebook* integers) {
    constexpr std::size_t count = 5;
    const std::size_t rows = x.size() / dim;
    const rvqkv::kernel_table& kernels = *rvqkv::kernels_for(level).value();
    search_results found{std::vector<rvqkv::code_t>(rows), std::vector<rvqkv::code_t>(rows * count),
                         std::vector<float>(rows * count)};
    packed.integers = integers;
    kernels.nearest(x.data(), rows, dim, packed, found.codes.data(), nullptr);
    kernels.nearest_several(x.data(), rows, dim, packed, count, {}, found.list_codes.data(), found.list_scores.data());
    return found;
}

TEST_CASE("integer_copies: every level finds what float32 finds, by copies of seven bits and of eight",
          "[quantize][differential]") {
    CAPTURE(test::seed());
    test::random_source random(823);
    for (const codebook_shape shape :
         {codebook_shape{1, 300, 32}, codebook_shape{1, 65, 37}, codebook_shape{1, 2200, 16}}) {
        for (const bool signs : {false, true}) {  // weights of one magnitude: the largest sums there are
            std::vector<float> weights = test::make_weights(random, shape);
            std::vector<float> x = test::make_weights(random, codebook_shape{1, 29, shape.dim});
            for (std::size_t j = 0; j < shape.dim; ++j) {
                x[j] = weights[shape.dim + j];  // a codeword itself
            }
            for (std::vector<float>* const values : {&weights, &x}) {
                for (float& value : *values) {
                    value = signs ? std::copysign(1.0F, value) : value;
                }
            }
            const auto book = make_book(shape, weights);
            const search_results expected = search(rvqkv::simd_level::generic, x, shape.dim, book.packed(0), nullptr);
            for (const unsigned bits : {7U, 8U}) {
                const auto copies = copies_of(book, bits);
                REQUIRE(copies.view(0) != nullptr);
                for (const rvqkv::simd_level level : test::levels()) {
                    CAPTURE(shape.codewords, shape.dim, signs, bits, rvqkv::name_of(level));
                    const search_results found = search(level, x, shape.dim, book.packed(0), copies.view(0));
                    CHECK(found.codes == expected.codes);
                    CHECK(found.list_codes == expected.list_codes);
                    CHECK(found.list_scores == expected.list_scores);
                }
            }
        }
    }
}

TEST_CASE("integer_copies: running out of memory is an error", "[quantize][unit]") {
    test::random_source random(822);
    const codebook_shape shape{1, 1100, 16};
    const std::vector<float> weights = test::make_weights(random, shape);
    for (std::size_t nth = 0;; ++nth) {
        const test::failing_allocations failing(nth);
        const auto book = rvqkv::residual_codebook<>::create(shape, std::span<const float>(weights));
        if (!failing.triggered()) {
            CHECK(book.ok());
            break;
        }
        REQUIRE_FALSE(book.ok());
        CHECK(book.error().code == rvqkv::error_code::out_of_memory);
    }
}

}  // namespace
