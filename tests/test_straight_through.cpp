// SPDX-License-Identifier: MIT
#include "rvqkv/learn/straight_through.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace {

using quantizer_type = rvqkv::vector_quantizer<rvqkv::any_scale, rvqkv::any_grouping>;
constexpr rvqkv::tensor_shape shape{3, 2, 8};
constexpr std::size_t count = 3 * 2 * 8;

quantizer_type make(rvqkv::scale_kind scale, rvqkv::grouping_kind grouping, test::random_source& random) {
    constexpr rvqkv::codebook_shape book{3, 9, 4};
    const std::vector<float> weights = test::gaussian_numbers(random, book.size());
    return quantizer_type::create(8, rvqkv::residual_codebook<>::create(book, std::span<const float>(weights)).value(),
                                  rvqkv::any_scale(scale), rvqkv::any_grouping(grouping), rvqkv::dtype::float32)
        .value();
}

/// The function whose derivative is asked for, in double, with residuals and codewords held where they are at `x0`:
/// sum of `weight * output` and `loss_weight * commitment loss`.
double surrogate(const quantizer_type& quantizer, const std::vector<double>& x, const std::vector<float>& x0,
                 const std::vector<float>& weights, const std::vector<float>& loss_weights) {
    const std::size_t dim = 4;
    const std::size_t depths = 3;
    double total = 0.0;
    for (std::size_t row = 0; row < 6; ++row) {
        std::vector<float> channels(x0.begin() + static_cast<std::ptrdiff_t>(row * 8),
                                    x0.begin() + static_cast<std::ptrdiff_t>(row * 8 + 8));
        std::vector<float> residual(8);
        std::size_t nonfinite = 0;
        quantizer.transform().apply(channels.data(), residual.data(), nonfinite);
        std::vector<double> taken(8 * depths);  // codewords subtracted before each depth's residual, summed
        std::vector<float> z0 = residual;
        std::vector<rvqkv::code_t> codes(2);
        for (std::size_t depth = 0; depth < depths; ++depth) {
            quantizer.residual().encode_depth(depth, {residual.data(), 2, dim}, codes);
            for (std::size_t i = 0; i < 8; ++i) {
                taken[depth * 8 + i] = static_cast<double>(z0[i]) - static_cast<double>(residual[i]);
            }
        }
        double scale = 1.0;
        double mean = 0.0;
        double squares = 0.0;
        double top = 0.0;
        for (std::size_t i = 0; i < 8; ++i) {
            mean += x[row * 8 + i] / 8;
            squares += x[row * 8 + i] * x[row * 8 + i];
            top = std::max(top, std::fabs(x[row * 8 + i]));
        }
        switch (quantizer.transform().scale().kind()) {
            case rvqkv::scale_kind::std_dev: scale = std::sqrt((squares - 8 * mean * mean) / 7); break;
            case rvqkv::scale_kind::rms: scale = std::sqrt(squares / 8); break;
            case rvqkv::scale_kind::l2_norm: scale = std::sqrt(squares); break;
            case rvqkv::scale_kind::max_abs: scale = top; break;
            case rvqkv::scale_kind::none: break;
        }
        for (std::size_t place = 0; place < 8; ++place) {
            const std::size_t channel = quantizer.transform().grouping().channel(place / dim, place % dim, 2, dim);
            const double z = x[row * 8 + channel] / scale;
            const double output = (z - static_cast<double>(residual[place])) * scale;
            total += static_cast<double>(weights[row * 8 + channel]) * output;
            for (std::size_t depth = 0; depth < depths; ++depth) {
                const double left = z - taken[depth * 8 + place];
                total += static_cast<double>(loss_weights[row / 2]) * left * left / 16;
            }
        }
    }
    return total;
}

}  // namespace

TEST_CASE("straight_through_gradient: the derivative of the surrogate, by finite differences",
          "[learn][differential]") {
    CAPTURE(test::seed());
    test::random_source random(51);
    for (const rvqkv::scale_kind scale : rvqkv::all_scale_kinds) {
        CAPTURE(rvqkv::name_of(scale));
        const quantizer_type quantizer = make(scale, rvqkv::grouping_kind::strided, random);
        const std::vector<float> x = test::gaussian_numbers(random, count);
        const std::vector<float> weights = test::gaussian_numbers(random, count);
        const std::vector<float> loss_weights = {0.25F, -1.0F, 2.0F};
        std::vector<float> gradient(count);
        rvqkv::straight_through_gradient(quantizer, {x.data(), shape}, {weights.data(), shape}, loss_weights, {},
                                         {gradient.data(), shape})
            .value();
        for (std::size_t i = 0; i < count; ++i) {
            std::vector<double> moved(x.begin(), x.end());
            constexpr double step = 1e-4;
            moved[i] += step;
            const double up = surrogate(quantizer, moved, x, weights, loss_weights);
            moved[i] -= 2 * step;
            const double down = surrogate(quantizer, moved, x, weights, loss_weights);
            CHECK(std::fabs(static_cast<double>(gradient[i]) - (up - down) / (2 * step)) < 2e-3);
        }
    }
}

TEST_CASE("straight_through_gradient: without scale and loss the output's gradient passes unchanged", "[learn][unit]") {
    test::random_source random(52);
    const quantizer_type quantizer = make(rvqkv::scale_kind::none, rvqkv::grouping_kind::contiguous, random);
    const std::vector<float> x = test::gaussian_numbers(random, count);
    const std::vector<float> weights = test::gaussian_numbers(random, count);
    std::vector<float> gradient(count);
    rvqkv::straight_through_gradient(quantizer, {x.data(), shape}, {weights.data(), shape}, {}, {},
                                     {gradient.data(), shape})
        .value();
    CHECK(gradient == weights);

    // A masked token keeps the straight-through part and loses the commitment part.
    const std::vector<float> loss_weights(3, 5.0F);
    const std::vector<std::uint8_t> mask = {1, 0, 1};
    rvqkv::straight_through_gradient(quantizer, {x.data(), shape}, {weights.data(), shape}, loss_weights, mask,
                                     {gradient.data(), shape})
        .value();
    for (std::size_t i = 0; i < count; ++i) {
        CHECK((gradient[i] == weights[i]) == (i / 16 == 1));
    }
}

TEST_CASE("straight_through_gradient: constant and zero rows give finite gradients", "[learn][unit]") {
    test::random_source random(53);
    for (const rvqkv::scale_kind scale : rvqkv::all_scale_kinds) {
        const quantizer_type quantizer = make(scale, rvqkv::grouping_kind::strided, random);
        std::vector<float> x(count, 0.1F);
        std::fill(x.begin(), x.begin() + 8, 0.0F);
        x[20] = std::numeric_limits<float>::quiet_NaN();
        const std::vector<float> weights(count, 1.0F);
        const std::vector<float> loss_weights(3, 1.0F);
        std::vector<float> gradient(count);
        rvqkv::straight_through_gradient(quantizer, {x.data(), shape}, {weights.data(), shape}, loss_weights, {},
                                         {gradient.data(), shape})
            .value();
        for (const float value : gradient) {
            CHECK(std::isfinite(value));
        }
    }
}

TEST_CASE("straight_through_gradient: shapes that disagree are refused", "[learn][unit]") {
    test::random_source random(54);
    const quantizer_type quantizer = make(rvqkv::scale_kind::rms, rvqkv::grouping_kind::strided, random);
    std::vector<float> x(count);
    const rvqkv::tensor_view view(x.data(), shape);
    const rvqkv::mutable_tensor_view out(x.data(), shape);
    const std::vector<float> two(2);
    CHECK(!rvqkv::straight_through_gradient(quantizer, {x.data(), {6, 2, 4}}, view, {}, {}, out).ok());
    CHECK(!rvqkv::straight_through_gradient(quantizer, view, {x.data(), {2, 3, 8}}, {}, {}, out).ok());
    CHECK(!rvqkv::straight_through_gradient(quantizer, view, view, {}, {}, {x.data(), {2, 2, 8}}).ok());
    CHECK(!rvqkv::straight_through_gradient(quantizer, view, view, two, {}, out).ok());
    const std::vector<std::uint8_t> mask(4);
    CHECK(!rvqkv::straight_through_gradient(quantizer, view, view, {}, mask, out).ok());
}
