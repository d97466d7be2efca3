// SPDX-License-Identifier: MIT
/// @file
/// Residual quantization of plain vectors: against the plain oracle, the greedy guarantee of every depth, and the same
/// bits however the work is split.
#include "rvqkv/quantize/residual_quantizer.hpp"

#include "support/allocation_counter.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"
#include "support/weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

namespace {

using rvqkv::code_strides;
using rvqkv::code_t;
using rvqkv::codebook_shape;

template <class Weight = float>
using quantizer = rvqkv::residual_quantizer<rvqkv::residual_codebook<Weight>>;

template <class Weight = float>
quantizer<Weight> make_quantizer(const codebook_shape& shape, const std::vector<float>& weights,
                                 rvqkv::distance metric = rvqkv::distance::euclidean) {
    return quantizer<Weight>(
        rvqkv::residual_codebook<Weight>::create(shape, std::span<const float>(weights), metric).value());
}

struct outcome {
    std::vector<code_t> codes;     ///< `[n, depths]`
    std::vector<float> residuals;  ///< `[n, dim]`
    std::vector<double> errors;    ///< `[depths]`
};

template <class Weight>
outcome encode(const quantizer<Weight>& quantizer, const std::vector<float>& vectors,
               const rvqkv::kernel_table& kernels = rvqkv::best_kernels()) {
    const std::size_t depths = quantizer.codebook().depths();
    const std::size_t dim = quantizer.codebook().dim();
    const std::size_t rows = vectors.size() / dim;
    outcome got{std::vector<code_t>(rows * depths, 0xdead), vectors, std::vector<double>(depths, 0.0)};
    quantizer.encode({got.residuals.data(), rows, dim}, got.codes.data(), {depths, 1}, got.errors, kernels);
    return got;
}

template <class Weight>
std::vector<float> decode(const quantizer<Weight>& quantizer, const std::vector<code_t>& codes, std::size_t depths,
                          const rvqkv::kernel_table& kernels = rvqkv::best_kernels()) {
    const std::size_t dim = quantizer.codebook().dim();
    const std::size_t rows = codes.size() / quantizer.codebook().depths();
    std::vector<float> vectors(rows * dim, 99.0F);
    quantizer.decode(codes.data(), {quantizer.codebook().depths(), 1}, {vectors.data(), rows, dim}, depths, kernels);
    return vectors;
}

}  // namespace

TEMPLATE_TEST_CASE("residual_quantizer: encodes as the plain oracle does, at every level",
                   "[quantize][simd][differential]", float, rvqkv::float16, rvqkv::bfloat16) {
    CAPTURE(test::seed());
    test::random_source random(1);
    for (const codebook_shape& shape : {codebook_shape{1, 1, 1}, {3, 16, 5}, {4, 37, 8}, {5, 20, 16}, {2, 100, 33}}) {
        for (const rvqkv::distance metric : {rvqkv::distance::euclidean, rvqkv::distance::cosine}) {
            const auto quantizer = make_quantizer<TestType>(shape, test::make_weights(random, shape), metric);
            reference::codebook book{shape.depths, shape.codewords, shape.dim, {}, metric == rvqkv::distance::cosine};
            for (const TestType weight : quantizer.codebook().weights()) {
                book.weights.push_back(rvqkv::to_float(weight));
            }
            constexpr std::size_t rows = 70;
            const std::vector<float> vectors = test::gaussian_numbers(random, rows * shape.dim);
            outcome expected{{}, {}, std::vector<double>(shape.depths, 0.0)};
            for (std::size_t i = 0; i < rows; ++i) {
                const reference::encoded coded = reference::encode(vectors.data() + i * shape.dim, book);
                expected.codes.insert(expected.codes.end(), coded.codes.begin(), coded.codes.end());
                expected.residuals.insert(expected.residuals.end(), coded.residual.begin(), coded.residual.end());
                for (std::size_t depth = 0; depth < shape.depths; ++depth) {
                    for (std::size_t j = 0; j < shape.dim; ++j) {
                        const float left =
                            coded.inputs[depth * shape.dim + j] - book.codeword(depth, coded.codes[depth])[j];
                        expected.errors[depth] += static_cast<double>(left) * static_cast<double>(left);
                    }
                }
            }
            for (const rvqkv::simd_level level : test::levels()) {
                CAPTURE(rvqkv::name_of(level), shape.depths, shape.codewords, shape.dim, rvqkv::name_of(metric));
                const outcome got = encode(quantizer, vectors, *rvqkv::kernels_for(level).value());
                REQUIRE(got.codes == expected.codes);
                REQUIRE(test::bits_of(got.residuals) == test::bits_of(expected.residuals));
                for (std::size_t depth = 0; depth < shape.depths; ++depth) {
                    CHECK(got.errors[depth] == Approx(expected.errors[depth]).epsilon(1e-12));
                }
            }
        }
    }
}

TEST_CASE("residual_quantizer: every depth leaves the least squared error that its codewords can leave",
          "[quantize][property]") {
    CAPTURE(test::seed());
    test::random_source random(2);
    const codebook_shape shape{4, 23, 6};
    std::vector<float> weights = test::whole_numbers(random, shape.size(), 4);
    for (std::size_t depth = 0; depth < shape.depths; ++depth) {
        std::fill_n(weights.begin() + static_cast<std::ptrdiff_t>((depth * shape.codewords + 7) * shape.dim), shape.dim,
                    0.0F);
    }
    const auto quantizer = make_quantizer(shape, weights);
    constexpr std::size_t rows = 200;
    std::vector<float> residuals = test::whole_numbers(random, rows * shape.dim, 9);
    const auto squared = [&](std::size_t row, const float* codeword) {
        double sum = 0.0;  // whole numbers: exact
        for (std::size_t j = 0; j < shape.dim; ++j) {
            const auto left = static_cast<double>(residuals[row * shape.dim + j] - codeword[j]);
            sum += left * left;
        }
        return sum;
    };
    const std::vector<float> zero(shape.dim, 0.0F);
    for (std::size_t depth = 0; depth < shape.depths; ++depth) {
        CAPTURE(depth);
        std::vector<double> least(rows, std::numeric_limits<double>::infinity());
        std::vector<double> before(rows);
        for (std::size_t row = 0; row < rows; ++row) {
            before[row] = squared(row, zero.data());
            for (std::size_t code = 0; code < shape.codewords; ++code) {
                const auto codeword = quantizer.codebook().codeword(depth, static_cast<code_t>(code));
                least[row] = std::min(least[row], squared(row, codeword.data()));
            }
        }
        std::vector<code_t> codes(rows);
        quantizer.encode_depth(depth, {residuals.data(), rows, shape.dim}, codes);
        std::size_t wrong = 0;
        for (std::size_t row = 0; row < rows; ++row) {
            const double left = squared(row, zero.data());
            // A codebook that holds zero can leave things as they are, so no depth makes them worse.
            wrong += left == least[row] && left <= before[row] ? 0 : 1;
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE("residual_quantizer: errors fall from depth to depth over a batch, and add up over calls",
          "[quantize][property]") {
    CAPTURE(test::seed());
    test::random_source random(3);
    const codebook_shape shape{6, 64, 4};
    const auto quantizer = make_quantizer(shape, test::make_weights(random, shape));
    std::vector<float> vectors = test::gaussian_numbers(random, 500 * shape.dim);
    const outcome once = encode(quantizer, vectors);
    // Not for every vector, but for the sum over many vectors and codewords like these.
    CHECK(std::is_sorted(once.errors.rbegin(), once.errors.rend()));
    CHECK(once.errors.back() > 0.0);
    CHECK(once.errors.back() < once.errors.front() / 4);

    std::vector<double> errors(shape.depths, 1000.0);
    std::vector<code_t> codes(500 * shape.depths);
    quantizer.encode({vectors.data(), 500, shape.dim}, codes.data(), {shape.depths, 1}, errors);
    for (std::size_t depth = 0; depth < shape.depths; ++depth) {
        CHECK(errors[depth] == Approx(1000.0 + once.errors[depth]).epsilon(1e-12));
    }
}

TEMPLATE_TEST_CASE("residual_quantizer: what is decoded and what is left make up the input", "[quantize][property]",
                   float, rvqkv::float16, rvqkv::bfloat16) {
    CAPTURE(test::seed());
    test::random_source random(4);
    const codebook_shape shape{5, 40, 12};
    const auto quantizer = make_quantizer<TestType>(shape, test::make_weights(random, shape));
    const std::vector<float> vectors = test::gaussian_numbers(random, 100 * shape.dim);
    const outcome coded = encode(quantizer, vectors);
    const std::vector<float> decoded = decode(quantizer, coded.codes, shape.depths);
    double largest = 0.0;
    for (std::size_t i = 0; i < vectors.size(); ++i) {
        const double whole = static_cast<double>(decoded[i]) + static_cast<double>(coded.residuals[i]);
        largest = std::max(largest, std::fabs(whole - static_cast<double>(vectors[i])));
    }
    // Two roundings a depth, of numbers below 16.
    CHECK(largest <= 2 * 5 * 16 * 0x1p-24);

    // Whole numbers: exactly.
    const auto whole = make_quantizer<TestType>(shape, test::whole_numbers(random, shape.size()));
    const std::vector<float> numbers = test::whole_numbers(random, 100 * shape.dim, 20);
    const outcome whole_coded = encode(whole, numbers);
    std::vector<float> sums = decode(whole, whole_coded.codes, shape.depths);
    for (std::size_t i = 0; i < sums.size(); ++i) {
        sums[i] += whole_coded.residuals[i];
    }
    CHECK(sums == numbers);
}

TEMPLATE_TEST_CASE("residual_quantizer: fewer depths decode to the partial sums, bit for bit",
                   "[quantize][simd][differential]", float, rvqkv::float16, rvqkv::bfloat16) {
    CAPTURE(test::seed());
    test::random_source random(5);
    const codebook_shape shape{6, 30, 21};
    const auto quantizer = make_quantizer<TestType>(shape, test::make_weights(random, shape));
    constexpr std::size_t rows = 33;
    std::vector<code_t> codes(rows * shape.depths);
    for (code_t& code : codes) {
        code = static_cast<code_t>(random.integer(0, shape.codewords - 1));
    }
    for (const rvqkv::simd_level level : test::levels()) {
        const rvqkv::kernel_table& kernels = *rvqkv::kernels_for(level).value();
        std::vector<float> sums(rows * shape.dim, 0.0F);
        for (std::size_t depths = 0; depths <= shape.depths; ++depths) {
            CAPTURE(rvqkv::name_of(level), depths);
            if (depths != 0) {
                for (std::size_t i = 0; i < rows; ++i) {
                    const auto codeword =
                        quantizer.codebook().codeword(depths - 1, codes[i * shape.depths + depths - 1]);
                    for (std::size_t j = 0; j < shape.dim; ++j) {
                        sums[i * shape.dim + j] += rvqkv::to_float(codeword[j]);
                    }
                }
            }
            REQUIRE(test::bits_of(decode(quantizer, codes, depths, kernels)) == test::bits_of(sums));
        }
    }
}

TEST_CASE("residual_quantizer: codes and residuals do not depend on how calls are split, nor on code strides",
          "[quantize][property]") {
    CAPTURE(test::seed());
    test::random_source random(6);
    const codebook_shape shape{3, 20, 4};
    const auto quantizer = make_quantizer(shape, test::make_weights(random, shape));
    for (const std::size_t rows : {1U, 2U, 59U, 60U, 61U, 479U, 480U, 481U, 1000U}) {
        CAPTURE(rows);
        const std::vector<float> vectors = test::gaussian_numbers(random, rows * shape.dim);
        const outcome whole = encode(quantizer, vectors);
        outcome pieces{std::vector<code_t>(whole.codes.size()), vectors, {}};
        for (std::size_t first = 0; first < rows;) {
            const std::size_t count = std::min<std::size_t>(random.integer(1, 100), rows - first);
            quantizer.encode({pieces.residuals.data() + first * shape.dim, count, shape.dim},
                             pieces.codes.data() + first * shape.depths, {shape.depths, 1});
            first += count;
        }
        CHECK(pieces.codes == whole.codes);
        CHECK(pieces.residuals == whole.residuals);

        // Codes of one depth side by side, with a gap after each depth.
        std::vector<code_t> by_depth(shape.depths * (rows + 1), 0xbeef);
        std::vector<float> residuals = vectors;
        const code_strides strides{1, rows + 1};
        quantizer.encode({residuals.data(), rows, shape.dim}, by_depth.data(), strides);
        std::vector<code_t> expected(by_depth.size(), 0xbeef);
        for (std::size_t i = 0; i < rows; ++i) {
            for (std::size_t depth = 0; depth < shape.depths; ++depth) {
                expected[depth * (rows + 1) + i] = whole.codes[i * shape.depths + depth];
            }
        }
        CHECK(by_depth == expected);
        std::vector<float> decoded(vectors.size());
        quantizer.decode(by_depth.data(), strides, {decoded.data(), rows, shape.dim}, shape.depths);
        CHECK(decoded == decode(quantizer, whole.codes, shape.depths));
    }
}

TEST_CASE("residual_quantizer: leaves the padding of rows alone", "[quantize][unit]") {
    CAPTURE(test::seed());
    test::random_source random(7);
    const codebook_shape shape{2, 20, 7};
    constexpr std::size_t rows = 50;
    constexpr std::size_t stride = 10;
    const auto quantizer = make_quantizer(shape, test::make_weights(random, shape));
    const std::vector<float> tight = test::gaussian_numbers(random, rows * shape.dim);
    const outcome expected = encode(quantizer, tight);
    std::vector<float> padded(rows * stride, 1e30F);
    const auto untouched = [](const std::vector<float>& numbers) {
        return static_cast<std::size_t>(std::count(numbers.begin(), numbers.end(), 1e30F));
    };
    for (std::size_t i = 0; i < rows; ++i) {
        std::copy_n(tight.begin() + static_cast<std::ptrdiff_t>(i * shape.dim), shape.dim,
                    padded.begin() + static_cast<std::ptrdiff_t>(i * stride));
    }
    std::vector<code_t> codes(rows * shape.depths);
    std::vector<double> errors(shape.depths, 0.0);
    quantizer.encode({padded.data(), rows, shape.dim, stride}, codes.data(), {shape.depths, 1}, errors);
    CHECK(codes == expected.codes);
    CHECK(errors == expected.errors);
    CHECK(untouched(padded) == rows * (stride - shape.dim));
    quantizer.decode(codes.data(), {shape.depths, 1}, {padded.data(), rows, shape.dim, stride}, shape.depths);
    CHECK(untouched(padded) == rows * (stride - shape.dim));
}

TEST_CASE("residual_quantizer: rows that are not finite get valid codes and harm no neighbour", "[quantize][unit]") {
    CAPTURE(test::seed());
    test::random_source random(8);
    const codebook_shape shape{4, 37, 8};
    const auto quantizer = make_quantizer(shape, test::make_weights(random, shape));
    const std::vector<float> clean = test::gaussian_numbers(random, 64 * shape.dim);
    const outcome expected = encode(quantizer, clean);
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e38F}) {
        std::vector<float> vectors = clean;
        vectors[10 * shape.dim + 3] = bad;
        for (const rvqkv::simd_level level : test::levels()) {
            CAPTURE(rvqkv::name_of(level), bad);
            outcome got = encode(quantizer, vectors, *rvqkv::kernels_for(level).value());
            for (std::size_t depth = 0; depth < shape.depths; ++depth) {
                code_t& code = got.codes[10 * shape.depths + depth];
                CHECK(code < shape.codewords);
                code = expected.codes[10 * shape.depths + depth];
            }
            CHECK(got.codes == expected.codes);
        }
    }
}

TEST_CASE("residual_quantizer: no rows, no work", "[quantize][unit]") {
    const auto quantizer = make_quantizer({1, 2, 2}, {1, 2, 3, 4});
    std::vector<double> errors = {5.0};
    quantizer.encode({nullptr, 0, 2}, nullptr, {1, 1}, errors);
    quantizer.decode(nullptr, {1, 1}, {nullptr, 0, 2}, 1);
    CHECK(errors == std::vector<double>{5.0});
}

TEST_CASE("residual_quantizer: works with a codebook of fixed extents", "[quantize][unit]") {
    using fixed_book = rvqkv::residual_codebook<float, 2, 3, 2>;
    const std::vector<float> weights = {4, 0, 0, 4, 0, 0, /**/ 1, 0, 0, -1, 0, 0};
    const rvqkv::residual_quantizer<fixed_book> fixed(
        fixed_book::create({2, 3, 2}, std::span<const float>(weights)).value());
    std::vector<float> x = {0, 3};
    std::vector<code_t> codes(2);
    fixed.encode({x.data(), 1, 2}, codes.data(), {2, 1});
    CHECK(codes == std::vector<code_t>{1, 1});
    CHECK(x == std::vector<float>{0, 0});
    fixed.decode(codes.data(), {2, 1}, {x.data(), 1, 2}, 2);
    CHECK(x == std::vector<float>{0, 3});
}

TEST_CASE("residual_quantizer: allocates nothing", "[quantize][unit]") {
    test::random_source random(9);
    const codebook_shape shape{3, 20, 4};
    const auto quantizer = make_quantizer(shape, test::make_weights(random, shape));
    std::vector<float> vectors = test::gaussian_numbers(random, 600 * shape.dim);
    std::vector<code_t> codes(600 * shape.depths);
    std::vector<double> errors(shape.depths);
    const rvqkv::kernel_table& kernels = rvqkv::best_kernels();
    const test::allocation_counter counter;
    quantizer.encode({vectors.data(), 600, shape.dim}, codes.data(), {shape.depths, 1}, errors, kernels);
    quantizer.decode(codes.data(), {shape.depths, 1}, {vectors.data(), 600, shape.dim}, 2, kernels);
    const std::size_t allocations = counter.allocations();
    CHECK(allocations == 0);
}
