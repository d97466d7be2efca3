// SPDX-License-Identifier: MIT
/// @file
/// The paper's quantizer for tensors: against the plain oracle, for every element type and layout, split anyhow, on bad
/// numbers and in bad calls.
#include "rvqkv/quantize/vector_quantizer.hpp"

#include "../examples/custom_policies.hpp"
#include "rvqkv/core/thread_pool.hpp"
#include "support/allocation_counter.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"
#include "support/weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using rvqkv::code_t;
using rvqkv::codebook_shape;
using rvqkv::dtype;
using rvqkv::tensor_shape;

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

template <class Weight = float>
rvqkv::residual_codebook<Weight> make_book(const codebook_shape& shape, const std::vector<float>& weights) {
    return rvqkv::residual_codebook<Weight>::create(shape, std::span<const float>(weights)).value();
}

struct coded {
    std::vector<code_t> codes;  ///< `[rows * groups, depths]`
    std::vector<float> scales;  ///< `[rows]`
    friend bool operator==(const coded&, const coded&) = default;
};

template <class Quantizer>
coded make_room(const Quantizer& quantizer, std::size_t rows) {
    return {std::vector<code_t>(rows * quantizer.groups() * quantizer.codebook().depths(), 0xdead),
            std::vector<float>(rows, -99.0F)};
}

template <class Quantizer>
rvqkv::mutable_encoded_view view_of(const Quantizer& quantizer, coded& to, std::size_t first_row = 0) {
    const std::size_t depths = quantizer.codebook().depths();
    return {to.codes.data() + first_row * quantizer.groups() * depths, {depths, 1}, to.scales.data() + first_row};
}

template <class Quantizer>
rvqkv::encoded_view view_of(const Quantizer& quantizer, const coded& from, std::size_t first_row = 0) {
    const std::size_t depths = quantizer.codebook().depths();
    return {from.codes.data() + first_row * quantizer.groups() * depths, {depths, 1}, from.scales.data() + first_row};
}

template <class Quantizer>
coded encode(const Quantizer& quantizer, const rvqkv::tensor_view& x, rvqkv::encode_report* report = nullptr,
             const rvqkv::kernel_table& kernels = rvqkv::best_kernels()) {
    rvqkv::quantizer_workspace workspace;
    coded got = make_room(quantizer, x.rows());
    quantizer.encode(x, view_of(quantizer, got), workspace, report, kernels).value();
    return got;
}

template <class Quantizer>
std::vector<float> decode(const Quantizer& quantizer, const coded& from, const tensor_shape& shape, std::size_t depths,
                          const rvqkv::kernel_table& kernels = rvqkv::best_kernels()) {
    rvqkv::quantizer_workspace workspace;
    std::vector<float> out(shape.tokens * shape.heads * shape.channels, -99.0F);
    quantizer.decode(view_of(quantizer, from), {out.data(), shape}, depths, workspace, kernels).value();
    return out;
}

/// What a call that should fail says; and checks that it is about an argument.
std::string refusal(const rvqkv::status& done) {
    if (done.ok()) {
        return "accepted";
    }
    CHECK(done.error().code == rvqkv::error_code::invalid_argument);
    return done.error().message;
}

template <class Grouping>
inline constexpr bool is_strided = std::is_same_v<Grouping, rvqkv::strided_grouping>;

/// A layout of a [tokens, heads, channels] tensor.
struct layout {
    rvqkv::tensor_strides strides;
    std::size_t first;
    std::size_t size;
};
std::vector<layout> layouts(const tensor_shape& shape) {
    const auto t = static_cast<std::ptrdiff_t>(shape.tokens);
    const auto h = static_cast<std::ptrdiff_t>(shape.heads);
    const auto c = static_cast<std::ptrdiff_t>(shape.channels);
    const std::size_t span = shape.tokens * shape.heads * shape.channels;
    return {
        {{h * c, c, 1}, 0, span},
        {{c, t * c, 1}, 0, span},                                    // heads outermost
        {{1, t, t * h}, 0, span},                                    // channels outermost
        {{2 * h * c, 2 * c, 2}, 1, 2 * span},                        // every other element
        {{-h * c, -c, -1}, span - 1, span},                          // all backwards
        {{h * c, -c, 1}, (shape.heads - 1) * shape.channels, span},  // heads backwards
    };
}
std::size_t place(const layout& lay, std::size_t token, std::size_t head, std::size_t channel) {
    return static_cast<std::size_t>(static_cast<std::ptrdiff_t>(lay.first) +
                                    static_cast<std::ptrdiff_t>(token) * lay.strides.token +
                                    static_cast<std::ptrdiff_t>(head) * lay.strides.head +
                                    static_cast<std::ptrdiff_t>(channel) * lay.strides.channel);
}

}  // namespace

TEMPLATE_TEST_CASE("vector_quantizer: encodes and decodes as the plain oracle does", "[quantize][simd][differential]",
                   rvqkv::strided_grouping, rvqkv::contiguous_grouping) {
    CAPTURE(test::seed());
    test::random_source random(1);
    const std::pair<std::size_t, codebook_shape> settings[] = {{64, {4, 37, 16}}, {128, {8, 64, 32}}, {256, {2, 20, 8}},
                                                               {12, {3, 5, 3}},   {7, {2, 4, 7}},     {5, {2, 9, 1}}};
    for (const auto& [head_dim, shape] : settings) {
        const std::vector<float> weights = test::make_weights(random, shape);
        const auto quantizer = rvqkv::vector_quantizer<rvqkv::std_dev_scale, TestType>::create(
                                   head_dim, make_book(shape, weights), {}, {}, dtype::float32)
                                   .value();
        const reference::codebook book{shape.depths, shape.codewords, shape.dim, weights};
        const tensor_shape tensor{9, 3, head_dim};
        std::vector<float> x = test::gaussian_numbers(random, 27 * head_dim);
        std::fill_n(x.begin() + static_cast<std::ptrdiff_t>(4 * head_dim), head_dim, 0.0F);
        std::fill_n(x.begin() + static_cast<std::ptrdiff_t>(5 * head_dim), head_dim, 0.1F);
        coded expected;
        std::vector<float> restored;
        const coded got = encode(quantizer, {x.data(), tensor});
        for (std::size_t row = 0; row < tensor.tokens * tensor.heads; ++row) {
            const float* const channels = x.data() + row * head_dim;
            // The scale to within its rounding; then everything else to the bit, from the scale that was taken.
            if (head_dim > 1 && row != 5) {
                CHECK(got.scales[row] == Approx(reference::standard_deviation(channels, head_dim)).epsilon(1e-6));
            } else {
                CHECK(got.scales[row] == 1.0F);
            }
            reference::encoded_row coded_row;
            coded_row.scale = got.scales[row];
            std::vector<float> vector(shape.dim);
            const std::size_t groups = head_dim / shape.dim;
            for (std::size_t group = 0; group < groups; ++group) {
                for (std::size_t i = 0; i < shape.dim; ++i) {
                    const std::size_t channel =
                        reference::channel_of(group, i, groups, shape.dim, is_strided<TestType>);
                    vector[i] = channels[channel] / coded_row.scale;
                }
                const auto codes = reference::encode(vector.data(), book).codes;
                coded_row.codes.insert(coded_row.codes.end(), codes.begin(), codes.end());
            }
            expected.codes.insert(expected.codes.end(), coded_row.codes.begin(), coded_row.codes.end());
            expected.scales.push_back(coded_row.scale);
            const auto channels_back = reference::decode_row(coded_row, head_dim, book, is_strided<TestType>);
            restored.insert(restored.end(), channels_back.begin(), channels_back.end());
        }
        for (const rvqkv::simd_level level : test::levels()) {
            CAPTURE(rvqkv::name_of(level), head_dim, shape.dim);
            const rvqkv::kernel_table& kernels = *rvqkv::kernels_for(level).value();
            CHECK(encode(quantizer, {x.data(), tensor}, nullptr, kernels) == expected);
            CHECK(decode(quantizer, expected, tensor, shape.depths, kernels) == restored);
        }
    }
}

TEMPLATE_TEST_CASE("vector_quantizer: reads and writes every element type in every layout", "[quantize][differential]",
                   float, rvqkv::float16, rvqkv::bfloat16) {
    CAPTURE(test::seed());
    test::random_source random(2);
    const codebook_shape shape{3, 20, 8};
    const auto quantizer =
        rvqkv::key_quantizer::create(32, make_book(shape, test::make_weights(random, shape))).value();
    const tensor_shape tensor{5, 3, 32};
    std::vector<float> numbers = test::gaussian_numbers(random, 15 * 32);
    for (float& number : numbers) {
        number = rvqkv::to_float(rvqkv::float_to<TestType>(number));
    }
    const coded expected = encode(quantizer, {numbers.data(), tensor});
    const std::vector<float> restored = decode(quantizer, expected, tensor, 3);
    for (const layout& lay : layouts(tensor)) {
        CAPTURE(lay.strides.token, lay.strides.head, lay.strides.channel);
        std::vector<TestType> data(lay.size, rvqkv::float_to<TestType>(77.0F));
        std::vector<TestType> expected_out = data;
        for (std::size_t token = 0; token < tensor.tokens; ++token) {
            for (std::size_t head = 0; head < tensor.heads; ++head) {
                for (std::size_t channel = 0; channel < tensor.channels; ++channel) {
                    const std::size_t from = (token * tensor.heads + head) * tensor.channels + channel;
                    data[place(lay, token, head, channel)] = rvqkv::float_to<TestType>(numbers[from]);
                    expected_out[place(lay, token, head, channel)] = rvqkv::float_to<TestType>(restored[from]);
                }
            }
        }
        CHECK(encode(quantizer, {data.data() + lay.first, tensor, lay.strides}) == expected);
        std::vector<TestType> out(lay.size, rvqkv::float_to<TestType>(77.0F));
        rvqkv::quantizer_workspace workspace;
        quantizer.decode(view_of(quantizer, expected), {out.data() + lay.first, tensor, lay.strides}, 3, workspace)
            .value();
        CHECK(out == expected_out);
    }
}

TEST_CASE("vector_quantizer: results do not depend on how calls are split, nor on the workspace",
          "[quantize][property]") {
    CAPTURE(test::seed());
    test::random_source random(3);
    const codebook_shape shape{2, 9, 512};
    constexpr std::size_t head_dim = 2048;  // 32 rows are encoded together
    const auto quantizer =
        rvqkv::value_quantizer::create(head_dim, make_book(shape, test::make_weights(random, shape))).value();
    for (const std::size_t tokens : {1U, 10U, 11U, 16U, 33U}) {
        const tensor_shape tensor{tokens, 3, head_dim};
        const std::vector<float> x = test::gaussian_numbers(random, tokens * 3 * head_dim);
        const rvqkv::tensor_view view(x.data(), tensor);
        const coded whole = encode(quantizer, view);
        coded pieces = make_room(quantizer, view.rows());
        std::vector<float> restored(x.size());
        rvqkv::quantizer_workspace workspace;  // one for all calls
        for (std::size_t first = 0; first < tokens;) {
            const std::size_t count = std::min<std::size_t>(random.integer(1, 13), tokens - first);
            quantizer.encode(view.slice_tokens(first, count), view_of(quantizer, pieces, first * 3), workspace).value();
            const rvqkv::mutable_tensor_view out(restored.data(), tensor);
            quantizer
                .decode(view_of(quantizer, std::as_const(pieces), first * 3), out.slice_tokens(first, count), 2,
                        workspace)
                .value();
            first += count;
        }
        CAPTURE(tokens);
        CHECK(pieces == whole);
        CHECK(restored == decode(quantizer, whole, tensor, 2));
        // A call of any length works in 256 KiB and one row.
        quantizer.encode(view, view_of(quantizer, pieces), workspace).value();
        CHECK(pieces == whole);
        CHECK(workspace.bytes() == (1 + std::min<std::size_t>(view.rows(), 32)) * head_dim * sizeof(float));
    }
}

TEST_CASE("vector_quantizer: workers share the rows out and change nothing", "[quantize][threads][property]") {
    CAPTURE(test::seed());
    test::random_source random(17);
    const codebook_shape shape{2, 20, 8};
    const auto quantizer =
        rvqkv::key_quantizer::create(64, make_book(shape, test::make_weights(random, shape))).value();
    // Fewer vectors than one task takes, some, and more than all tasks take at once.
    for (const std::size_t tokens : {0U, 1U, 5U, 100U, 1500U}) {
        const tensor_shape tensor{tokens, 3, 64};
        std::vector<float> x = test::gaussian_numbers(random, tokens * 3 * 64);
        for (std::size_t i = 1000; i < x.size(); i += 20011) {
            x[i] = not_a_number;
        }
        const auto check = [&](const rvqkv::executor& workers) {
            CAPTURE(tokens, workers.concurrency());
            rvqkv::encode_report expected_report;
            const coded expected = encode(quantizer, {x.data(), tensor}, &expected_report);
            rvqkv::quantizer_workspace workspace;
            for (int round = 0; round < 2; ++round) {
                coded got = make_room(quantizer, tokens * 3);
                rvqkv::encode_report report;
                std::size_t allocations = 0;
                bool done = false;
                {
                    const test::allocation_counter counter;
                    done =
                        quantizer.encode({x.data(), tensor}, view_of(quantizer, got), workspace, &report, workers).ok();
                    allocations = counter.allocations();
                }
                CHECK(done);
                CHECK((round == 0 || allocations == 0));
                CHECK(got == expected);
                CHECK(report.nonfinite_values == expected_report.nonfinite_values);
                CHECK(report.nonfinite_rows == expected_report.nonfinite_rows);
                CHECK(report.first_token == expected_report.first_token);
                CHECK(report.first_head == expected_report.first_head);
            }
        };
        check(test::backward_executor(3));
        for (const std::size_t threads : {1U, 2U, 3U, 4U}) {
            check(rvqkv::thread_pool(threads));
        }
    }
}

TEST_CASE("encode_report: of parts of a call in any order, the first place is the first", "[quantize][unit]") {
    const rvqkv::encode_report early{2, 1, 3, 5};
    const rvqkv::encode_report same_token{4, 2, 3, 6};
    const rvqkv::encode_report late{1, 1, 7, 0};
    const rvqkv::encode_report nothing;
    std::vector<rvqkv::encode_report> parts = {nothing, early, same_token, late};
    std::vector<std::size_t> order = {0, 1, 2, 3};
    do {
        rvqkv::encode_report all;
        for (const std::size_t i : order) {
            all.merge(parts[i]);
        }
        CHECK(all.nonfinite_values == 7);
        CHECK(all.nonfinite_rows == 4);
        CHECK(all.first_token == 3);
        CHECK(all.first_head == 5);
    } while (std::next_permutation(order.begin(), order.end()));
}

TEST_CASE("vector_quantizer: fewer depths give the sums of the first codewords", "[quantize][differential]") {
    CAPTURE(test::seed());
    test::random_source random(4);
    const codebook_shape shape{5, 16, 4};
    const std::vector<float> weights = test::make_weights(random, shape);
    const auto quantizer = rvqkv::value_quantizer::create(8, make_book(shape, weights)).value();
    const reference::codebook book{shape.depths, shape.codewords, shape.dim, weights};
    const tensor_shape tensor{4, 1, 8};
    const std::vector<float> x = test::gaussian_numbers(random, 4 * 8);
    const coded got = encode(quantizer, {x.data(), tensor});
    for (std::size_t depths = 0; depths <= shape.depths; ++depths) {
        CAPTURE(depths);
        std::vector<float> expected;
        for (std::size_t vector = 0; vector < 4 * 2; ++vector) {
            for (const float sum : reference::decode(got.codes.data() + vector * shape.depths, book, depths)) {
                expected.push_back(sum * got.scales[vector / 2]);
            }
        }
        CHECK(decode(quantizer, got, tensor, depths) == expected);
    }
}

TEST_CASE("vector_quantizer: codes may lie depth by depth", "[quantize][unit]") {
    CAPTURE(test::seed());
    test::random_source random(5);
    const codebook_shape shape{3, 16, 4};
    const auto quantizer = rvqkv::key_quantizer::create(8, make_book(shape, test::make_weights(random, shape))).value();
    const tensor_shape tensor{50, 2, 8};
    constexpr std::size_t vectors = 200;
    const std::vector<float> x = test::gaussian_numbers(random, 100 * 8);
    const coded expected = encode(quantizer, {x.data(), tensor});
    std::vector<code_t> codes(3 * vectors);
    std::vector<float> scales(100);
    rvqkv::quantizer_workspace workspace;
    quantizer.encode({x.data(), tensor}, {codes.data(), {1, vectors}, scales.data()}, workspace).value();
    for (std::size_t i = 0; i < vectors; ++i) {
        for (std::size_t depth = 0; depth < 3; ++depth) {
            REQUIRE(codes[depth * vectors + i] == expected.codes[i * 3 + depth]);
        }
    }
    std::vector<float> out(x.size());
    quantizer.decode({codes.data(), {1, vectors}, scales.data()}, {out.data(), tensor}, 3, workspace).value();
    CHECK(out == decode(quantizer, expected, tensor, 3));
}

TEST_CASE("vector_quantizer: scales are those of their type, and vectors are divided by what is stored",
          "[quantize][unit]") {
    CAPTURE(test::seed());
    test::random_source random(6);
    const codebook_shape shape{2, 30, 8};
    const auto book = make_book(shape, test::make_weights(random, shape));
    const tensor_shape tensor{20, 2, 16};
    const std::vector<float> x = test::gaussian_numbers(random, 40 * 16);
    for (const dtype stored : {dtype::float32, dtype::float16, dtype::bfloat16}) {
        CAPTURE(rvqkv::name_of(stored));
        const auto quantizer = rvqkv::key_quantizer::create(16, book, {}, {}, stored).value();
        CHECK(quantizer.scale_type() == stored);
        const coded got = encode(quantizer, {x.data(), tensor});
        std::vector<float> divided = x;
        for (std::size_t row = 0; row < 40; ++row) {
            const std::span<const float> channels(x.data() + row * 16, 16);
            const float scale = rvqkv::stored_scale(rvqkv::std_dev_scale{}.measure(channels), stored);
            REQUIRE(got.scales[row] == scale);
            for (std::size_t i = 0; i < 16; ++i) {
                divided[row * 16 + i] /= scale;
            }
        }
        using unscaled = rvqkv::vector_quantizer<rvqkv::no_scale, rvqkv::strided_grouping>;
        CHECK(encode(unscaled::create(16, book).value(), {divided.data(), tensor}).codes == got.codes);
    }
}

TEST_CASE("vector_quantizer: a policy without scales stores none and needs none", "[quantize][unit]") {
    CAPTURE(test::seed());
    test::random_source random(7);
    const codebook_shape shape{2, 30, 8};
    using unscaled = rvqkv::vector_quantizer<rvqkv::no_scale, rvqkv::contiguous_grouping>;
    const auto quantizer = unscaled::create(16, make_book(shape, test::make_weights(random, shape))).value();
    CHECK_FALSE(quantizer.stores_scale());
    CHECK(quantizer.bits_per_row() == 2 * 2 * 5);
    const std::vector<float> x = test::gaussian_numbers(random, 3 * 16);
    std::vector<code_t> codes(3 * 2 * 2);
    std::vector<float> out(x.size());
    rvqkv::quantizer_workspace workspace;
    REQUIRE(quantizer.encode({x.data(), {3, 1, 16}}, {codes.data(), {2, 1}, nullptr}, workspace).ok());
    REQUIRE(quantizer.decode({codes.data(), {2, 1}, nullptr}, {out.data(), {3, 1, 16}}, 2, workspace).ok());
    CHECK(out == decode(quantizer, encode(quantizer, {x.data(), {3, 1, 16}}), {3, 1, 16}, 2));
}

TEST_CASE("vector_quantizer: NaNs and infinities count as 0, are reported with their place, and harm no neighbour",
          "[quantize][unit]") {
    CAPTURE(test::seed());
    test::random_source random(8);
    const codebook_shape shape{3, 37, 8};
    const auto quantizer =
        rvqkv::key_quantizer::create(32, make_book(shape, test::make_weights(random, shape))).value();
    const tensor_shape tensor{6, 3, 32};
    const std::vector<float> clean = test::gaussian_numbers(random, 18 * 32);
    const auto at = [](std::size_t token, std::size_t head, std::size_t channel) {
        return (token * 3 + head) * 32 + channel;
    };
    std::vector<float> bad = clean;
    std::vector<float> zeroed = clean;
    const std::tuple<std::size_t, std::size_t, std::size_t, float> places[] = {
        {2, 1, 0, not_a_number}, {2, 1, 31, infinity}, {2, 2, 7, -infinity}, {5, 0, 3, -not_a_number}};
    for (const auto& [token, head, channel, value] : places) {
        bad[at(token, head, channel)] = value;
        zeroed[at(token, head, channel)] = 0.0F;
    }
    rvqkv::encode_report report;
    const coded got = encode(quantizer, {bad.data(), tensor}, &report);
    CHECK(got == encode(quantizer, {zeroed.data(), tensor}));
    CHECK(report.nonfinite_values == 4);
    CHECK(report.nonfinite_rows == 3);
    CHECK(report.first_token == 2);
    CHECK(report.first_head == 1);
    const coded before = encode(quantizer, {clean.data(), tensor});
    for (std::size_t row = 0; row < 18; ++row) {
        if (row == 7 || row == 8 || row == 15) {
            continue;
        }
        CHECK(got.scales[row] == before.scales[row]);
        CHECK(std::equal(got.codes.begin() + static_cast<std::ptrdiff_t>(row * 12),
                         got.codes.begin() + static_cast<std::ptrdiff_t>((row + 1) * 12),
                         before.codes.begin() + static_cast<std::ptrdiff_t>(row * 12)));
    }
    // What is reconstructed is finite everywhere.
    const std::vector<float> restored = decode(quantizer, got, tensor, 3);
    CHECK(std::all_of(restored.begin(), restored.end(), [](float x) { return std::isfinite(x); }));

    // Reports add up; the first place stays the first.
    (void)encode(quantizer, {clean.data(), tensor}, &report);
    CHECK(report.nonfinite_values == 4);
    const std::vector<float> all_bad(18 * 32, infinity);
    (void)encode(quantizer, {all_bad.data(), tensor}, &report);
    CHECK(report.nonfinite_values == 4 + 18 * 32);
    CHECK(report.nonfinite_rows == 3 + 18);
    CHECK(report.first_token == 2);
    CHECK(report.first_head == 1);
    (void)encode(quantizer, {all_bad.data(), tensor});  // nobody asks for a report
}

TEST_CASE("vector_quantizer: 16-bit NaNs and infinities are found as well", "[quantize][unit]") {
    test::random_source random(9);
    const codebook_shape shape{1, 4, 4};
    const auto quantizer =
        rvqkv::value_quantizer::create(4, make_book(shape, test::make_weights(random, shape))).value();
    const rvqkv::float16 halves[] = {{0x7e00}, {0x3c00}, {0xfc00}, {0x7c01}};
    const rvqkv::bfloat16 brains[] = {{0x7fc0}, {0x3f80}, {0xff80}, {0x7f81}};
    rvqkv::encode_report report;
    (void)encode(quantizer, {halves, {1, 1, 4}}, &report);
    CHECK(report.nonfinite_values == 3);
    (void)encode(quantizer, {brains, {1, 1, 4}}, &report);
    CHECK(report.nonfinite_values == 6);
    CHECK(report.nonfinite_rows == 2);
}

TEST_CASE("vector_quantizer: refuses calls of the wrong shape, and writes nothing", "[quantize][unit]") {
    test::random_source random(10);
    const codebook_shape shape{2, 4, 8};
    const auto quantizer =
        rvqkv::key_quantizer::create(16, make_book(shape, test::make_weights(random, shape))).value();
    const std::vector<float> x(64, 1.0F);
    coded to = make_room(quantizer, 4);
    const coded untouched = to;
    rvqkv::quantizer_workspace workspace;
    for (const std::size_t channels : {0U, 8U, 15U, 32U}) {
        CAPTURE(channels);
        const std::string asked =
            " has " + std::to_string(channels) + " channels per head, this quantizer was made for head_dim 16";
        CHECK(refusal(quantizer.encode({x.data(), {2, 1, channels}}, view_of(quantizer, to), workspace)) ==
              "input" + asked);
        CHECK(to == untouched);
        std::vector<float> out(64, 5.0F);
        CHECK(refusal(quantizer.decode(view_of(quantizer, untouched), {out.data(), {2, 1, channels}}, 2, workspace)) ==
              "output" + asked);
        CHECK(out == std::vector<float>(64, 5.0F));
    }
    rvqkv::mutable_encoded_view no_place = view_of(quantizer, to);
    no_place.scales = nullptr;
    CHECK(refusal(quantizer.encode({x.data(), {4, 1, 16}}, no_place, workspace)) ==
          "scales are missing: the std_dev policy stores one per vector");
    CHECK(to == untouched);
    const coded good = encode(quantizer, {x.data(), {4, 1, 16}});
    std::vector<float> out(64, 5.0F);
    const rvqkv::mutable_tensor_view out_view(out.data(), {4, 1, 16});
    CHECK(refusal(quantizer.decode(view_of(quantizer, good), out_view, 3, workspace)) ==
          "depths to decode is 3, the codebook has 2");
    rvqkv::encoded_view no_scales = view_of(quantizer, good);
    no_scales.scales = nullptr;
    CHECK(refusal(quantizer.decode(no_scales, out_view, 2, workspace)) ==
          "scales are missing: the std_dev policy stores one per vector");
    CHECK(out == std::vector<float>(64, 5.0F));
    CHECK(refusal(quantizer.decode(view_of(quantizer, good), out_view, 2, workspace)) == "accepted");
}

TEST_CASE("vector_quantizer: no tokens or no heads are no work", "[quantize][unit]") {
    test::random_source random(11);
    const codebook_shape shape{2, 4, 8};
    const auto quantizer =
        rvqkv::key_quantizer::create(16, make_book(shape, test::make_weights(random, shape))).value();
    rvqkv::quantizer_workspace workspace;
    const float* const nothing = nullptr;
    float* const nowhere = nullptr;
    for (const tensor_shape& empty : {tensor_shape{0, 4, 16}, tensor_shape{4, 0, 16}}) {
        rvqkv::encode_report report;
        CHECK(quantizer.encode({nothing, empty}, {nullptr, {2, 1}, nullptr}, workspace, &report).ok());
        CHECK(report.nonfinite_rows == 0);
        CHECK(quantizer.decode({nullptr, {2, 1}, nullptr}, {nowhere, empty}, 2, workspace).ok());
    }
}

TEST_CASE("vector_quantizer: refuses a head_dim that its codebook does not divide", "[quantize][unit]") {
    test::random_source random(12);
    const codebook_shape shape{2, 4, 48};
    const auto made = rvqkv::key_quantizer::create(128, make_book(shape, test::make_weights(random, shape)));
    REQUIRE_FALSE(made.ok());
    CHECK(made.error().code == rvqkv::error_code::invalid_argument);
    CHECK(made.error().message == "group_dim is 48, must divide head_dim 128");
}

TEST_CASE("vector_quantizer: the paper's setting takes 368 bits for 128 channels", "[quantize][unit]") {
    const codebook_shape shape{8, 2048, 32};
    const std::vector<float> weights(shape.size(), 0.5F);
    const auto quantizer = rvqkv::key_quantizer::create(128, make_book(shape, weights)).value();
    CHECK(quantizer.head_dim() == 128);
    CHECK(quantizer.groups() == 4);
    CHECK(quantizer.stores_scale());
    CHECK(quantizer.scale_type() == dtype::float16);
    CHECK(quantizer.bits_per_row() == 4 * 8 * 11 + 16);
}

TEST_CASE("vector_quantizer: allocates nothing once it has seen a call as large", "[quantize][unit]") {
    test::random_source random(14);
    const codebook_shape shape{2, 20, 8};
    const auto quantizer =
        rvqkv::key_quantizer::create(64, make_book(shape, test::make_weights(random, shape))).value();
    const tensor_shape tensor{10, 4, 64};
    std::vector<float> x = test::gaussian_numbers(random, 40 * 64);
    coded to = make_room(quantizer, 40);
    rvqkv::quantizer_workspace workspace;
    rvqkv::encode_report report;
    std::ptrdiff_t held = 0;
    {
        const test::allocation_counter counter;
        quantizer.encode({x.data(), tensor}, view_of(quantizer, to), workspace).value();
        held = counter.live_bytes();
    }
    CHECK(static_cast<std::ptrdiff_t>(workspace.bytes()) == held);
    const test::allocation_counter counter;
    const bool encoded = quantizer.encode({x.data(), tensor}, view_of(quantizer, to), workspace, &report).ok();
    const bool decoded = quantizer.decode(view_of(quantizer, std::as_const(to)), {x.data(), tensor}, 2, workspace).ok();
    const std::size_t allocations = counter.allocations();
    CHECK(encoded);
    CHECK(decoded);
    CHECK(allocations == 0);
}

TEST_CASE("vector_quantizer: a workspace that cannot grow is reported, and nothing is written", "[quantize][unit]") {
    test::random_source random(15);
    const codebook_shape shape{2, 20, 8};
    const auto quantizer =
        rvqkv::key_quantizer::create(64, make_book(shape, test::make_weights(random, shape))).value();
    const std::vector<float> x = test::gaussian_numbers(random, 40 * 64);
    coded to = make_room(quantizer, 40);
    const coded untouched = to;
    std::vector<float> out(x.size(), 5.0F);
    rvqkv::quantizer_workspace workspace;
    rvqkv::status encoded;
    rvqkv::status decoded;
    {
        const test::failing_allocations failing(0);
        encoded = quantizer.encode({x.data(), {10, 4, 64}}, view_of(quantizer, to), workspace);
        decoded = quantizer.decode(view_of(quantizer, untouched), {out.data(), {10, 4, 64}}, 2, workspace);
    }
    REQUIRE_FALSE(encoded.ok());
    CHECK(encoded.error().code == rvqkv::error_code::out_of_memory);
    CHECK(to == untouched);
    REQUIRE_FALSE(decoded.ok());
    CHECK(decoded.error().code == rvqkv::error_code::out_of_memory);
    CHECK(out == std::vector<float>(x.size(), 5.0F));
    CHECK(workspace.bytes() == 0);
    CHECK(quantizer.encode({x.data(), {10, 4, 64}}, view_of(quantizer, to), workspace).ok());
}

TEST_CASE("vector_quantizer: huge and tiny tensors come back finite and of their size", "[quantize][property]") {
    CAPTURE(test::seed());
    test::random_source random(16);
    const codebook_shape shape{6, 64, 4};
    const auto book = make_book(shape, test::make_weights(random, shape));
    const tensor_shape tensor{20, 1, 16};
    const std::vector<float> x = test::gaussian_numbers(random, 20 * 16);
    for (const float size : {1.0F, 1e30F, 1e-30F}) {
        CAPTURE(size);
        std::vector<float> sized = x;
        for (float& number : sized) {
            number *= size;
        }
        const auto quantizer = rvqkv::key_quantizer::create(16, book, {}, {}, dtype::float32).value();
        const std::vector<float> back = decode(quantizer, encode(quantizer, {sized.data(), tensor}), tensor, 6);
        double error = 0.0;
        double norm = 0.0;
        for (std::size_t i = 0; i < x.size(); ++i) {
            const double exact = static_cast<double>(sized[i]) / static_cast<double>(size);
            error += std::pow(static_cast<double>(back[i]) / static_cast<double>(size) - exact, 2.0);
            norm += exact * exact;
        }
        CHECK(error < 0.2 * norm);
    }
}

TEST_CASE("vector_quantizer: takes policies of the user's own", "[quantize][unit]") {
    CAPTURE(test::seed());
    test::random_source random(17);
    const codebook_shape shape{2, 16, 4};
    const std::vector<float> weights = test::make_weights(random, shape);
    using custom_quantizer = rvqkv::vector_quantizer<custom::mean_magnitude_scale, custom::strided_pairs_grouping,
                                                     rvqkv::residual_codebook<float, 2, 16, 4>>;
    const auto quantizer =
        custom_quantizer::create(
            8, rvqkv::residual_codebook<float, 2, 16, 4>::create(shape, std::span<const float>(weights)).value(), {},
            {}, dtype::float32)
            .value();
    const std::vector<float> x = test::gaussian_numbers(random, 10 * 8);
    const coded got = encode(quantizer, {x.data(), {10, 1, 8}});
    const reference::codebook book{2, 16, 4, weights};
    const std::size_t order[] = {0, 1, 4, 5, 2, 3, 6, 7};  // pairs dealt in turn
    std::vector<code_t> expected;
    for (std::size_t row = 0; row < 10; ++row) {
        double sum = 0.0;
        for (std::size_t i = 0; i < 8; ++i) {
            sum += static_cast<double>(std::fabs(x[row * 8 + i]));
        }
        CHECK(got.scales[row] == static_cast<float>(sum / 8));
        for (std::size_t group = 0; group < 2; ++group) {
            float vector[4];
            for (std::size_t i = 0; i < 4; ++i) {
                vector[i] = x[row * 8 + order[group * 4 + i]] / got.scales[row];
            }
            const auto codes = reference::encode(vector, book).codes;
            expected.insert(expected.end(), codes.begin(), codes.end());
        }
    }
    CHECK(got.codes == expected);
}
