// SPDX-License-Identifier: MIT
/// @file
/// The codebook: weights as stored, the search layout beside them, extents fixed or free, and everything it refuses.
#include "rvqkv/quantize/codebook.hpp"

#include "rvqkv/simd/kernels.hpp"

#include "support/allocation_counter.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/weights.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace {

using rvqkv::codebook_shape;
using rvqkv::residual_codebook;

template <class Weight, class Source>
residual_codebook<Weight> make_book(const codebook_shape& shape, const std::vector<Source>& weights,
                                    rvqkv::distance metric = rvqkv::distance::euclidean) {
    return residual_codebook<Weight>::create(shape, std::span<const Source>(weights), metric).value();
}

/// Why `Book` does not take the shape or weights.
template <class Book = residual_codebook<>>
std::string refusal(const codebook_shape& shape, const std::vector<float>& weights) {
    const auto book = Book::create(shape, std::span<const float>(weights));
    if (book.ok()) {
        return "accepted";
    }
    CHECK(book.error().code == rvqkv::error_code::invalid_argument);
    return book.error().message;
}

template <class Weight>
std::vector<float> as_floats(std::span<const Weight> weights) {
    std::vector<float> floats;
    floats.reserve(weights.size());
    for (const Weight weight : weights) {
        floats.push_back(rvqkv::to_float(weight));
    }
    return floats;
}

constexpr codebook_shape shapes[] = {{1, 1, 1}, {2, 16, 3}, {3, 17, 4}, {2, 37, 8}, {1, 64, 33}, {4, 5, 1}};

}  // namespace

TEMPLATE_TEST_CASE("residual_codebook: holds its weights, rounded to the type that stores them", "[quantize][unit]",
                   float, rvqkv::float16, rvqkv::bfloat16) {
    CAPTURE(test::seed());
    test::random_source random(1);
    for (const codebook_shape& shape : shapes) {
        CAPTURE(shape.depths, shape.codewords, shape.dim);
        const std::vector<float> weights = test::gaussian_numbers(random, shape.size());
        std::vector<float> expected;
        expected.reserve(weights.size());
        for (const float weight : weights) {
            expected.push_back(rvqkv::to_float(rvqkv::float_to<TestType>(weight)));
        }
        const auto book = make_book<TestType>(shape, weights);
        CHECK(book.shape() == shape);
        CHECK(book.depths() == shape.depths);
        CHECK(book.codewords() == shape.codewords);
        CHECK(book.dim() == shape.dim);
        CHECK(book.code_bits() == rvqkv::code_bits(shape.codewords));
        CHECK(book.metric() == rvqkv::distance::euclidean);
        CHECK(test::bits_of(as_floats(book.weights())) == test::bits_of(expected));
        CHECK(book.weight_bytes() == shape.size() * sizeof(TestType));
        for (std::size_t depth = 0; depth < shape.depths; ++depth) {
            CHECK(book.weights(depth).data() == book.weights().data() + depth * shape.codewords * shape.dim);
            CHECK(book.weights(depth).size() == shape.codewords * shape.dim);
            for (std::size_t code = 0; code < shape.codewords; ++code) {
                const auto codeword = book.codeword(depth, static_cast<rvqkv::code_t>(code));
                REQUIRE(codeword.data() == book.weights(depth).data() + code * shape.dim);
                REQUIRE(codeword.size() == shape.dim);
            }
        }
    }
}

TEMPLATE_TEST_CASE("residual_codebook: takes weights of any element type", "[quantize][unit]", rvqkv::float16,
                   rvqkv::bfloat16) {
    std::vector<TestType> weights;
    weights.reserve(12);
    for (int i = 0; i < 12; ++i) {
        weights.push_back(rvqkv::float_to<TestType>(0.1F * static_cast<float>(i)));
    }
    CHECK(as_floats(make_book<float>({2, 3, 2}, weights).weights()) == as_floats<TestType>(weights));
    CHECK(as_floats(make_book<TestType>({2, 3, 2}, weights).weights()) == as_floats<TestType>(weights));
}

TEMPLATE_TEST_CASE("residual_codebook: lays codewords out for the search in blocks of 16", "[quantize][unit]", float,
                   rvqkv::float16, rvqkv::bfloat16) {
    CAPTURE(test::seed());
    test::random_source random(2);
    for (const codebook_shape& shape : shapes) {
        for (const rvqkv::distance metric : {rvqkv::distance::euclidean, rvqkv::distance::cosine}) {
            const bool cosine = metric == rvqkv::distance::cosine;
            CAPTURE(shape.depths, shape.codewords, shape.dim, cosine);
            std::vector<float> weights = test::gaussian_numbers(random, shape.size());
            std::fill_n(weights.begin(), shape.dim, 0.0F);  // a zero codeword has no direction
            const auto book = make_book<TestType>(shape, weights, metric);
            CHECK(book.metric() == metric);
            for (std::size_t depth = 0; depth < shape.depths; ++depth) {
                const rvqkv::packed_codebook packed = book.packed(depth);
                REQUIRE(packed.codewords == shape.codewords);
                REQUIRE(packed.dim == shape.dim);
                REQUIRE(packed.blocks() == (shape.codewords + 15) / 16);
                CHECK(reinterpret_cast<std::uintptr_t>(packed.interleaved) % 64 == 0);
                CHECK(reinterpret_cast<std::uintptr_t>(packed.offsets) % 64 == 0);
                for (std::size_t c = 0; c < packed.blocks() * 16; ++c) {
                    const float* const lane = packed.interleaved + c / 16 * shape.dim * 16 + c % 16;
                    if (c >= shape.codewords) {
                        REQUIRE(packed.offsets[c] == -std::numeric_limits<float>::infinity());
                        for (std::size_t j = 0; j < shape.dim; ++j) {
                            REQUIRE(lane[j * 16] == 0.0F);
                        }
                        continue;
                    }
                    const auto codeword = book.codeword(depth, static_cast<rvqkv::code_t>(c));
                    double squares = 0.0;
                    for (const TestType weight : codeword) {
                        squares += std::pow(static_cast<double>(rvqkv::to_float(weight)), 2.0);
                    }
                    const double length = cosine && squares > 0.0 ? std::sqrt(squares) : 1.0;
                    REQUIRE(packed.offsets[c] == (cosine ? 0.0F : static_cast<float>(-squares / 2)));
                    for (std::size_t j = 0; j < shape.dim; ++j) {
                        const auto weight = static_cast<double>(rvqkv::to_float(codeword[j]));
                        REQUIRE(lane[j * 16] == static_cast<float>(weight / length));
                    }
                }
            }
        }
    }
}

TEST_CASE("residual_codebook: says how many bytes it holds", "[quantize][unit]") {
    const std::vector<float> weights(3 * 20 * 8, 1.0F);
    const test::allocation_counter counter;
    const auto book = make_book<rvqkv::float16>({3, 20, 8}, weights);
    const std::ptrdiff_t held = counter.live_bytes();
    CHECK(static_cast<std::ptrdiff_t>(book.bytes()) == held);
    CHECK(book.bytes() == 3 * 20 * 8 * 2 + 3 * 32 * 8 * 4 + 3 * 32 * 4);
}

TEST_CASE("residual_codebook: copies are their own", "[quantize][unit]") {
    const auto book = make_book<float>({1, 2, 2}, std::vector<float>{1, 2, 3, 4});
    const auto copy = book;  // NOLINT(performance-unnecessary-copy-initialization): the copy is what is tested
    CHECK(copy.weights().data() != book.weights().data());
    CHECK(copy.packed(0).interleaved != book.packed(0).interleaved);
    CHECK(as_floats(copy.weights()) == as_floats(book.weights()));
    CHECK(copy.packed(0).offsets[1] == book.packed(0).offsets[1]);
}

TEST_CASE("residual_codebook: refuses shapes that are out of range, and weights of another number",
          "[quantize][unit]") {
    CHECK(refusal({0, 4, 2}, {}) == "depths is 0, must be from 1 to 256");
    CHECK(refusal({257, 4, 2}, {}) == "depths is 257, must be from 1 to 256");
    CHECK(refusal({1, 0, 2}, {}) == "codewords is 0, must be from 1 to 65536");
    CHECK(refusal({1, 65537, 2}, {}) == "codewords is 65537, must be from 1 to 65536");
    CHECK(refusal({1, 4, 0}, {}) == "group_dim is 0, must be from 1 to 4096");
    CHECK(refusal({1, 4, 4097}, {}) == "group_dim is 4097, must be from 1 to 4096");
    constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
    CHECK(refusal({most, most, most}, {}).substr(0, 9) == "depths is");
    CHECK(refusal({2, 3, 4}, std::vector<float>(23)) ==
          "codebook has 23 weights, depths x codewords x group_dim asks 24");
    CHECK(refusal({2, 3, 4}, std::vector<float>(25)) ==
          "codebook has 25 weights, depths x codewords x group_dim asks 24");
    CHECK(refusal({2, 3, 4}, std::vector<float>(24)) == "accepted");
    CHECK(codebook_shape{256, 65536, 4096}.validate().ok());
    CHECK(codebook_shape{}.validate().ok());  // the paper's
    CHECK(codebook_shape{} == codebook_shape{8, 2048, 32});
}

TEST_CASE("residual_codebook: refuses weights that are not finite, naming the place", "[quantize][unit]") {
    std::vector<float> weights(2 * 3 * 4, 1.0F);
    weights[1 * 12 + 2 * 4 + 3] = std::numeric_limits<float>::quiet_NaN();
    CHECK(refusal({2, 3, 4}, weights) == "codebook weight 3 of codeword 2 at depth 1 is not finite in float32");
    weights.back() = 1.0F;
    weights[4] = -std::numeric_limits<float>::infinity();
    CHECK(refusal({2, 3, 4}, weights) == "codebook weight 0 of codeword 1 at depth 0 is not finite in float32");
    weights[4] = 70000.0F;  // too large for binary16 alone
    CHECK(refusal({2, 3, 4}, weights) == "accepted");
    CHECK(refusal<residual_codebook<rvqkv::bfloat16>>({2, 3, 4}, weights) == "accepted");
    CHECK(refusal<residual_codebook<rvqkv::float16>>({2, 3, 4}, weights) ==
          "codebook weight 0 of codeword 1 at depth 0 is not finite in float16");
}

TEST_CASE("residual_codebook: fixed extents hold at compile time, and refuse other shapes", "[quantize][unit]") {
    using fixed = residual_codebook<float, 2, 3, 4>;
    const std::vector<float> weights(24, 0.5F);
    const auto book = fixed::create({2, 3, 4}, std::span<const float>(weights)).value();
    CHECK(book.depths() == 2);
    CHECK(book.codewords() == 3);
    CHECK(book.dim() == 4);
    CHECK(book.packed(1).dim == 4);
    CHECK(refusal<fixed>({3, 2, 4}, weights) == "depths is 3, this codebook type is fixed to 2");
    CHECK(refusal<fixed>({2, 4, 3}, weights) == "codewords is 4, this codebook type is fixed to 3");
    CHECK(refusal<fixed>({2, 3, 5}, weights) == "group_dim is 5, this codebook type is fixed to 4");
    using fixed_dim = residual_codebook<rvqkv::bfloat16, rvqkv::dynamic_extent, rvqkv::dynamic_extent, 4>;
    CHECK(refusal<fixed_dim>({3, 2, 4}, weights) == "accepted");
    CHECK(refusal<fixed_dim>({3, 4, 2}, weights) == "group_dim is 2, this codebook type is fixed to 4");
    static_assert(std::is_same_v<fixed::weight_type, float>);
    static_assert(std::is_same_v<fixed_dim::weight_type, rvqkv::bfloat16>);
}

TEST_CASE("residual_codebook: reports that memory ran out, wherever it did", "[quantize][unit]") {
    const std::vector<float> weights(2 * 20 * 4, 1.0F);
    std::size_t failures = 0;
    for (std::size_t nth = 0;; ++nth) {
        bool ok = true;
        bool triggered = false;
        rvqkv::error_code code{};
        {
            const test::failing_allocations failing(nth);
            const auto book = residual_codebook<>::create({2, 20, 4}, std::span<const float>(weights));
            triggered = failing.triggered();
            ok = book.ok();
            if (!ok) {
                code = book.error().code;
            }
        }
        CHECK(ok != triggered);
        if (!triggered) {
            break;
        }
        CHECK(code == rvqkv::error_code::out_of_memory);
        ++failures;
    }
    CHECK(failures == 3);
}

TEST_CASE("distance: has names", "[quantize][unit]") {
    CHECK(rvqkv::name_of(rvqkv::distance::euclidean) == "euclidean");
    CHECK(rvqkv::name_of(rvqkv::distance::cosine) == "cosine");
}

TEST_CASE("residual_codebook: assign takes other weights in the same memory", "[quantize][unit]") {
    test::random_source random(31);
    const rvqkv::codebook_shape shape{2, 600, 16};
    const std::vector<float> first = test::make_weights(random, shape);
    const std::vector<float> second = test::make_weights(random, shape);
    auto book = rvqkv::residual_codebook<>::create(shape, std::span<const float>(first)).value();
    const auto expected = rvqkv::residual_codebook<>::create(shape, std::span<const float>(second)).value();
    const std::vector<float> x = test::gaussian_numbers(random, 50 * shape.dim);
    const auto search = [&](const rvqkv::residual_codebook<>& in) {
        std::vector<rvqkv::code_t> codes(100);
        for (std::size_t depth = 0; depth < 2; ++depth) {
            rvqkv::best_kernels().nearest(x.data(), 50, shape.dim, in.packed(depth), codes.data() + depth * 50,
                                          nullptr);
        }
        return codes;
    };
    const std::vector<rvqkv::code_t> before = search(book);
    std::vector<float> bad = second;
    bad.back() = std::numeric_limits<float>::infinity();
    CHECK_FALSE(book.assign(std::span<const float>(bad)).ok());
    CHECK_FALSE(book.assign(std::span<const float>(second).first(5)).ok());
    CHECK(std::equal(first.begin(), first.end(), book.weights().begin()));
    CHECK(search(book) == before);
    const test::allocation_counter counter;
    const bool assigned = book.assign(std::span<const float>(second)).ok();
    CHECK(counter.allocations() == 0);
    REQUIRE(assigned);
    CHECK(std::equal(second.begin(), second.end(), book.weights().begin()));
    CHECK(search(book) == search(expected));
}
