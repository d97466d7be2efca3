// SPDX-License-Identifier: MIT
/// @file
/// Beam search: the search for several codewords against sorting all scores, the encoder against a plain beam and
/// against trying every path, and the same bits at every level and however the work is split.
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
#include <utility>
#include <vector>

namespace {

using rvqkv::code_t;
using rvqkv::codebook_shape;
using book_type = rvqkv::residual_codebook<>;
using quantizer = rvqkv::residual_quantizer<>;

constexpr float infinity = std::numeric_limits<float>::infinity();

// ---- The search for several codewords ----

struct ranked {
    std::vector<code_t> codes;
    std::vector<float> scores;
};

/// What `nearest_several` promises, from the search layout by sorting.
ranked sort_all(const float* x, std::size_t rows, std::size_t stride, const rvqkv::packed_codebook& book,
                std::size_t count) {
    ranked expected;
    for (std::size_t i = 0; i < rows; ++i) {
        std::vector<std::pair<float, code_t>> all;
        for (std::size_t c = 0; c < book.codewords; ++c) {
            float score = book.offsets[c];
            for (std::size_t j = 0; j < book.dim; ++j) {
                score = std::fma(x[i * stride + j], book.interleaved[(c / 16 * book.dim + j) * 16 + c % 16], score);
            }
            if (score > -infinity) {
                all.emplace_back(-score, static_cast<code_t>(c));
            }
        }
        const std::size_t sorted = std::min(count, all.size());
        std::partial_sort(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(sorted), all.end());
        all.resize(count, {infinity, code_t{0}});
        for (const auto& [score, code] : all) {
            expected.codes.push_back(code);
            expected.scores.push_back(-score);
        }
    }
    return expected;
}

void check_several(const std::vector<float>& x, std::size_t rows, std::size_t stride, const book_type& book,
                   std::size_t count) {
    CAPTURE(rows, stride, count, book.codewords(), book.dim());
    const ranked expected = sort_all(x.data(), rows, stride, book.packed(0), count);
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        ranked got{std::vector<code_t>(rows * count, 0xdead), std::vector<float>(rows * count, 7.0F)};
        rvqkv::kernels_for(level).value()->nearest_several(x.data(), rows, stride, book.packed(0), count, {},
                                                           got.codes.data(), got.scores.data());
        CHECK(got.codes == expected.codes);
        CHECK(test::bits_of(got.scores) == test::bits_of(expected.scores));
    }
}

TEST_CASE("nearest_several: the best scores in order, for any shape", "[simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(801);
    const std::size_t shapes[][2] = {{1, 1},    {5, 3},    {16, 8},    {17, 33},   {100, 16},  {513, 16},
                                     {576, 32}, {600, 40}, {2047, 20}, {2048, 32}, {2049, 17}, {2500, 64}};
    for (const auto& [codewords, dim] : shapes) {
        const codebook_shape shape{1, codewords, dim};
        const auto book = book_type::create(shape, std::span<const float>(test::make_weights(random, shape))).value();
        const std::size_t rows = random.integer(1, 29);
        const std::size_t stride = dim + random.integer(0, 3);
        const std::vector<float> x = test::gaussian_numbers(random, rows * stride);
        for (const std::size_t count :
             {std::size_t{1}, std::size_t{2}, std::size_t{5}, std::size_t{16}, std::size_t{17}}) {
            check_several(x, rows, stride, book, count);
        }
    }
}

TEST_CASE("nearest_several: equal scores come by rising index, bad numbers last", "[simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(802);
    for (const std::size_t codewords : {std::size_t{40}, std::size_t{1100}}) {
        const codebook_shape shape{1, codewords, 16};
        std::vector<float> weights = test::make_weights(random, shape);
        for (std::size_t i = weights.size() / 2; i < weights.size(); ++i) {
            weights[i] = weights[i - weights.size() / 2];  // every codeword twice
        }
        const auto book = book_type::create(shape, std::span<const float>(weights)).value();
        std::vector<float> x = test::gaussian_numbers(random, 20 * 16);
        std::copy_n(weights.begin(), 16, x.begin());
        std::fill_n(x.begin() + 16, 16, 0.0F);
        x[2 * 16 + 3] = std::numeric_limits<float>::quiet_NaN();
        x[3 * 16 + 5] = infinity;
        x[4 * 16 + 5] = -infinity;
        std::fill_n(x.begin() + 5 * 16, 16, 1e30F);
        std::fill_n(x.begin() + 6 * 16, 16, 1e-38F);
        x[7 * 16] = 1e6F;  // an outlier: little is left of the others in eight bits
        check_several(x, 20, 16, book, 4);
        check_several(x, 20, 16, book, 9);
    }
}

TEST_CASE("nearest_several: a codebook of one codeword many times over", "[simd][differential]") {
    test::random_source random(803);
    const codebook_shape shape{1, 2100, 24};
    const std::vector<float> one = test::gaussian_numbers(random, 24);
    std::vector<float> weights;
    for (std::size_t c = 0; c < shape.codewords; ++c) {
        weights.insert(weights.end(), one.begin(), one.end());
    }
    const auto book = book_type::create(shape, std::span<const float>(weights)).value();
    check_several(test::gaussian_numbers(random, 13 * 24), 13, 24, book, 6);
}

/// The `count` best of a family's lists, with the rows' leads: row and code.
std::vector<std::pair<std::size_t, code_t>> merge(const ranked& lists, const std::vector<float>& leads,
                                                  std::size_t first, std::size_t rows, std::size_t count) {
    std::vector<std::pair<double, std::pair<std::size_t, code_t>>> all;
    for (std::size_t i = first * count; i < (first + rows) * count; ++i) {
        if (lists.scores[i] > -infinity) {
            const double lead = static_cast<double>(leads[i / count]);
            all.push_back({-lead - static_cast<double>(lists.scores[i]), {i / count, lists.codes[i]}});
        }
    }
    std::sort(all.begin(), all.end());
    std::vector<std::pair<std::size_t, code_t>> best;
    for (std::size_t i = 0; i < std::min(count, all.size()); ++i) {
        best.push_back(all[i].second);
    }
    return best;
}

TEST_CASE("nearest_several: a family's merged list is that of whole lists", "[simd][differential]") {
    CAPTURE(test::seed());
    test::random_source random(804);
    for (int round = 0; round < 24; ++round) {
        const codebook_shape shape{1, random.integer(500, 2500), random.integer(16, 48)};
        std::vector<float> weights = test::make_weights(random, shape);
        const float mean = round % 3 == 0 ? 4.0F : 0.0F;  // scores shifted by the center differ from row to row then
        for (float& weight : weights) {
            weight += mean;
        }
        const auto book = book_type::create(shape, std::span<const float>(weights)).value();
        const std::size_t family = random.integer(2, 16);
        const std::size_t rows = family * random.integer(1, 5);
        const std::size_t count = random.integer(2, 16);
        std::vector<float> x = test::gaussian_numbers(random, rows * shape.dim);
        std::vector<float> leads = test::gaussian_numbers(random, rows);
        for (std::size_t i = 0; i < rows; ++i) {
            for (std::size_t j = 0; j < shape.dim; ++j) {
                float& value = x[i * shape.dim + j];
                // Paths of one vector are near each other, and so are their lists.
                value = i % family == 0 ? value + mean : x[(i - i % family) * shape.dim + j] + 0.3F * value;
            }
            leads[i] *= round % 2 == 0 ? 0.1F : 3.0F;
        }
        if (round % 4 == 3) {
            x[shape.dim] = std::numeric_limits<float>::quiet_NaN();
            leads[rows - 1] = -infinity;
            std::fill_n(x.begin() + static_cast<std::ptrdiff_t>((rows - 1) * shape.dim), shape.dim, 1e-30F);
        }
        CAPTURE(shape.codewords, shape.dim, family, rows, count, mean);
        const ranked whole = sort_all(x.data(), rows, shape.dim, book.packed(0), count);
        for (const rvqkv::simd_level level : test::levels()) {
            CAPTURE(rvqkv::name_of(level));
            ranked got{std::vector<code_t>(rows * count, 0xdead), std::vector<float>(rows * count, 7.0F)};
            rvqkv::kernels_for(level).value()->nearest_several(x.data(), rows, shape.dim, book.packed(0), count,
                                                               {family, leads.data()}, got.codes.data(),
                                                               got.scores.data());
            for (std::size_t first = 0; first < rows; first += family) {
                CHECK(merge(got, leads, first, family, count) == merge(whole, leads, first, family, count));
            }
        }
    }
}

// ---- The encoder ----

quantizer make_quantizer(test::random_source& random, const codebook_shape& shape) {
    return quantizer(book_type::create(shape, std::span<const float>(test::make_weights(random, shape))).value());
}

struct outcome {
    std::vector<code_t> codes;     ///< `[n, depths]`
    std::vector<float> residuals;  ///< `[n, dim]`
    std::vector<double> errors;    ///< `[depths]`
};

outcome encode(const quantizer& encoder, const std::vector<float>& vectors, std::size_t width,
               const rvqkv::kernel_table& kernels = rvqkv::best_kernels()) {
    const std::size_t depths = encoder.codebook().depths();
    const std::size_t dim = encoder.codebook().dim();
    const std::size_t rows = vectors.size() / dim;
    outcome got{std::vector<code_t>(rows * depths, 0xdead), vectors, std::vector<double>(depths, 0.0)};
    rvqkv::beam_workspace workspace;
    REQUIRE(encoder.encode_beam({got.residuals.data(), rows, dim}, got.codes.data(), {depths, 1}, width, workspace,
                                got.errors, kernels));
    return got;
}

/// Beam search for one vector, as plainly as it can be said.
std::vector<code_t> plain_beam(const reference::codebook& book, const float* x, std::size_t width) {
    struct path {
        std::vector<code_t> codes;
        std::vector<float> residual;
        double sum;
    };
    std::vector<path> paths = {{{}, std::vector<float>(x, x + book.dim), 0.0}};
    for (std::size_t depth = 0; depth < book.depths; ++depth) {
        struct extension {
            double sum;
            std::size_t parent;
            float score;
            code_t code;
        };
        std::vector<extension> all;
        for (std::size_t p = 0; p < paths.size(); ++p) {
            for (std::size_t c = 0; c < book.codewords; ++c) {
                const float score =
                    reference::score(paths[p].residual.data(), book.codeword(depth, c), book.dim, false);
                all.push_back({paths[p].sum + static_cast<double>(score), p, score, static_cast<code_t>(c)});
            }
        }
        std::sort(all.begin(), all.end(), [](const extension& a, const extension& b) {
            if (a.sum != b.sum) {
                return a.sum > b.sum;
            }
            if (a.parent != b.parent) {
                return a.parent < b.parent;
            }
            return a.score != b.score ? a.score > b.score : a.code < b.code;
        });
        all.resize(std::min(all.size(), width));
        std::vector<path> next;
        for (const extension& step : all) {
            path grown = paths[step.parent];
            grown.codes.push_back(step.code);
            grown.sum = step.sum;
            for (std::size_t j = 0; j < book.dim; ++j) {
                grown.residual[j] -= book.codeword(depth, step.code)[j];
            }
            next.push_back(std::move(grown));
        }
        paths = std::move(next);
    }
    return paths.front().codes;
}

TEST_CASE("encode_beam: the paths of a plain beam search, at every level", "[quantize][differential]") {
    CAPTURE(test::seed());
    test::random_source random(810);
    for (const codebook_shape shape :
         {codebook_shape{3, 5, 4}, codebook_shape{4, 40, 8}, codebook_shape{1, 30, 3}, codebook_shape{3, 600, 16}}) {
        const quantizer encoder = make_quantizer(random, shape);
        const std::span<const float> weights = encoder.codebook().weights();
        const reference::codebook plain{shape.depths, shape.codewords, shape.dim, {weights.begin(), weights.end()}};
        const std::vector<float> vectors = test::gaussian_numbers(random, 70 * shape.dim);
        for (const std::size_t width : {std::size_t{2}, std::size_t{5}, std::size_t{8}}) {
            CAPTURE(shape.depths, shape.codewords, shape.dim, width);
            std::vector<code_t> expected;
            for (std::size_t i = 0; i < 70; ++i) {
                const std::vector<code_t> codes = plain_beam(plain, vectors.data() + i * shape.dim, width);
                expected.insert(expected.end(), codes.begin(), codes.end());
            }
            for (const rvqkv::simd_level level : test::levels()) {
                CAPTURE(rvqkv::name_of(level));
                CHECK(encode(encoder, vectors, width, *rvqkv::kernels_for(level).value()).codes == expected);
            }
        }
    }
}

TEST_CASE("encode_beam: a beam as wide as there are paths finds the best of all", "[quantize][property]") {
    CAPTURE(test::seed());
    test::random_source random(811);
    const codebook_shape shape{4, 4, 6};
    const quantizer encoder = make_quantizer(random, shape);
    const std::vector<float> vectors = test::gaussian_numbers(random, 25 * shape.dim);
    const outcome got = encode(encoder, vectors, 64);
    for (std::size_t i = 0; i < 25; ++i) {
        double least = std::numeric_limits<double>::infinity();
        for (std::size_t path = 0; path < 256; ++path) {
            double error = 0.0;
            for (std::size_t j = 0; j < shape.dim; ++j) {
                double left = static_cast<double>(vectors[i * shape.dim + j]);
                for (std::size_t k = 0; k < shape.depths; ++k) {
                    left -= static_cast<double>(
                        encoder.codebook().codeword(k, static_cast<code_t>(path >> (2 * k) & 3U))[j]);
                }
                error += left * left;
            }
            least = std::min(least, error);
        }
        double error = 0.0;
        for (std::size_t j = 0; j < shape.dim; ++j) {
            error += std::pow(static_cast<double>(got.residuals[i * shape.dim + j]), 2);
        }
        CHECK(error == Approx(least).epsilon(1e-4));
    }
}

TEST_CASE("encode_beam: width 1 is the greedy encoder, wider beams leave less", "[quantize][property]") {
    CAPTURE(test::seed());
    test::random_source random(812);
    const codebook_shape shape{6, 64, 16};
    const quantizer encoder = make_quantizer(random, shape);
    const std::vector<float> vectors = test::gaussian_numbers(random, 300 * shape.dim);
    outcome greedy{std::vector<code_t>(300 * shape.depths), vectors, std::vector<double>(shape.depths, 0.0)};
    encoder.encode({greedy.residuals.data(), 300, shape.dim}, greedy.codes.data(), {shape.depths, 1}, greedy.errors);
    const outcome one = encode(encoder, vectors, 1);
    CHECK(one.codes == greedy.codes);
    CHECK(test::bits_of(one.residuals) == test::bits_of(greedy.residuals));
    CHECK(one.errors == greedy.errors);
    double before = greedy.errors.back();
    for (const std::size_t width : {std::size_t{2}, std::size_t{4}, std::size_t{16}}) {
        const double error = encode(encoder, vectors, width).errors.back();
        CHECK(error < before);
        before = error;
    }
}

TEST_CASE("encode_beam: residuals and errors are those of its codes", "[quantize][unit]") {
    CAPTURE(test::seed());
    test::random_source random(813);
    const codebook_shape shape{5, 600, 16};
    const quantizer encoder = make_quantizer(random, shape);
    const std::vector<float> vectors = test::gaussian_numbers(random, 130 * shape.dim);
    const outcome got = encode(encoder, vectors, 3);
    std::vector<float> left = vectors;
    for (std::size_t k = 0; k < shape.depths; ++k) {
        double error = 0.0;
        for (std::size_t i = 0; i < left.size(); ++i) {
            left[i] -= encoder.codebook().codeword(k, got.codes[i / shape.dim * shape.depths + k])[i % shape.dim];
            error += static_cast<double>(left[i]) * static_cast<double>(left[i]);
        }
        CHECK(got.errors[k] == Approx(error).epsilon(1e-5));
    }
    CHECK(test::bits_of(got.residuals) == test::bits_of(left));
}

TEST_CASE("encode_beam: any split of a batch, row stride and code layout give the same codes", "[quantize][property]") {
    CAPTURE(test::seed());
    test::random_source random(814);
    const codebook_shape shape{3, 520, 16};
    const quantizer encoder = make_quantizer(random, shape);
    const std::size_t rows = 150;
    const std::vector<float> vectors = test::gaussian_numbers(random, rows * shape.dim);
    const outcome whole = encode(encoder, vectors, 4);
    const std::size_t stride = shape.dim + 3;
    std::vector<float> padded(rows * stride, 5.0F);
    for (std::size_t i = 0; i < rows; ++i) {
        std::copy_n(vectors.data() + i * shape.dim, shape.dim, padded.data() + i * stride);
    }
    std::vector<code_t> planes(rows * shape.depths);
    rvqkv::beam_workspace workspace;
    for (std::size_t first = 0; first < rows;) {
        const std::size_t count = std::min<std::size_t>(random.integer(1, 70), rows - first);
        REQUIRE(encoder.encode_beam({padded.data() + first * stride, count, shape.dim, stride}, planes.data() + first,
                                    {1, rows}, 4, workspace));
        first += count;
    }
    for (std::size_t i = 0; i < rows; ++i) {
        for (std::size_t k = 0; k < shape.depths; ++k) {
            CHECK(planes[k * rows + i] == whole.codes[i * shape.depths + k]);
        }
        CHECK(padded[i * stride + shape.dim] == 5.0F);
    }
}

TEST_CASE("encode_beam: fewer codewords than the beam is wide, no vectors, vectors of bad numbers",
          "[quantize][unit]") {
    test::random_source random(815);
    const codebook_shape shape{3, 2, 4};
    const quantizer encoder = make_quantizer(random, shape);
    CHECK(encode(encoder, {}, 5).codes.empty());
    std::vector<float> vectors = test::gaussian_numbers(random, 4 * shape.dim);
    vectors[1] = std::numeric_limits<float>::quiet_NaN();
    vectors[5] = infinity;
    vectors[9] = 1e38F;
    for (const code_t code : encode(encoder, vectors, 200).codes) {
        CHECK(code < shape.codewords);
    }
}

TEST_CASE("encode_beam: refuses what it cannot do and leaves the vectors alone", "[quantize][unit]") {
    test::random_source random(816);
    const codebook_shape shape{2, 4, 4};
    const quantizer encoder = make_quantizer(random, shape);
    std::vector<float> vectors = test::gaussian_numbers(random, shape.dim);
    const std::vector<float> before = vectors;
    std::vector<code_t> codes(shape.depths);
    rvqkv::beam_workspace workspace;
    const auto refusal = [&](const auto& of, std::size_t width) {
        const rvqkv::status done =
            of.encode_beam({vectors.data(), 1, shape.dim}, codes.data(), {shape.depths, 1}, width, workspace);
        REQUIRE_FALSE(done.ok());
        CHECK(vectors == before);
        return done.error();
    };
    CHECK(refusal(encoder, 0).message == "beam width is 0, must be from 1 to 256");
    CHECK(refusal(encoder, 257).message == "beam width is 257, must be from 1 to 256");
    const std::span<const float> weights = encoder.codebook().weights();
    const rvqkv::residual_quantizer<> cosine(book_type::create(shape, weights, rvqkv::distance::cosine).value());
    CHECK(refusal(cosine, 2).code == rvqkv::error_code::unsupported);
    for (std::size_t nth = 0;; ++nth) {
        rvqkv::beam_workspace fresh;
        const test::failing_allocations failing(nth);
        const rvqkv::status done =
            encoder.encode_beam({vectors.data(), 1, shape.dim}, codes.data(), {shape.depths, 1}, 3, fresh);
        if (!failing.triggered()) {
            REQUIRE(done);
            break;
        }
        REQUIRE_FALSE(done.ok());
        CHECK(done.error().code == rvqkv::error_code::out_of_memory);
        CHECK(vectors == before);
    }
}

TEST_CASE("encode_beam: allocates on the first call only", "[quantize][unit]") {
    test::random_source random(817);
    const codebook_shape shape{3, 600, 16};
    const quantizer encoder = make_quantizer(random, shape);
    std::vector<float> vectors = test::gaussian_numbers(random, 100 * shape.dim);
    std::vector<code_t> codes(100 * shape.depths);
    rvqkv::beam_workspace workspace;
    const auto run = [&](std::size_t rows) {
        REQUIRE(encoder.encode_beam({vectors.data(), rows, shape.dim}, codes.data(), {shape.depths, 1}, 4, workspace));
    };
    run(1);
    const test::allocation_counter counter;
    run(100);
    CHECK(counter.allocations() == 0);
    CHECK(workspace.bytes() > 0);
}

}  // namespace
