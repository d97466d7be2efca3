// SPDX-License-Identifier: MIT
/// @file
/// The quantizer behind a door: the same codes as in front of it, and every wrong description refused.
#include "rvqkv/quantize/codec.hpp"

#include "../examples/custom_policies.hpp"
#include "rvqkv/core/thread_pool.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using rvqkv::code_t;
using rvqkv::codec_spec;
using rvqkv::dtype;
using rvqkv::tensor_shape;

static_assert(!std::is_copy_constructible_v<rvqkv::codec>);
static_assert(std::has_virtual_destructor_v<rvqkv::codec>);

codec_spec small_spec() {
    codec_spec spec;
    spec.head_dim = 16;
    spec.shape = {3, 20, 4};
    return spec;
}

std::vector<float> small_weights() {
    test::random_source random(1);
    return test::gaussian_numbers(random, small_spec().shape.size());
}

struct coded {
    std::vector<code_t> codes;
    std::vector<float> scales;
    std::vector<float> restored;
    friend bool operator==(const coded&, const coded&) = default;
};

/// There and back, through a codec or a quantizer.
template <class Coder>
coded there_and_back(const Coder& coder, std::size_t depths, const std::vector<float>& x, const tensor_shape& shape) {
    const std::size_t rows = shape.tokens * shape.heads;
    coded got{std::vector<code_t>(rows * coder.groups() * depths), std::vector<float>(rows),
              std::vector<float>(x.size())};
    rvqkv::quantizer_workspace workspace;
    coder.encode({x.data(), shape}, {got.codes.data(), {depths, 1}, got.scales.data()}, workspace, nullptr).value();
    coder.decode({got.codes.data(), {depths, 1}, got.scales.data()}, {got.restored.data(), shape}, depths, workspace)
        .value();
    return got;
}

std::string refusal(const codec_spec& spec) {
    const rvqkv::status valid = spec.validate();
    const std::vector<float> weights(std::min<std::size_t>(spec.shape.size(), 1000), 1.0F);
    if (valid.ok()) {
        return "accepted";
    }
    CHECK(valid.error().code == rvqkv::error_code::invalid_argument);
    // Nothing is made from a wrong description, and the message is the same.
    const auto made = rvqkv::make_codec<float>(spec, weights);
    REQUIRE_FALSE(made.ok());
    CHECK(made.error().message == valid.error().message);
    return valid.error().message;
}

template <class Change>
std::string refusal_when(Change change) {
    codec_spec spec = small_spec();
    change(spec);
    return refusal(spec);
}

}  // namespace

TEST_CASE("codec_spec: is the paper's for keys unless told otherwise", "[quantize][unit]") {
    const codec_spec spec;
    CHECK(spec.validate().ok());
    CHECK(spec.groups() == 4);
    CHECK(spec.bits_per_row() == 368);
    CHECK(spec.bits_per_value() == 2.875);
    CHECK(spec == codec_spec{});
}

TEST_CASE("codec_spec: counts the bits of every setting", "[quantize][unit]") {
    codec_spec spec = small_spec();  // 4 groups x 3 depths x 5 bits, and the scale
    CHECK(spec.bits_per_row() == 60 + 16);
    CHECK(spec.bits_per_value() == 4.75);
    spec.scale_type = dtype::float32;
    CHECK(spec.bits_per_row() == 60 + 32);
    spec.scale = rvqkv::scale_kind::none;
    CHECK(spec.bits_per_row() == 60);
    spec.shape.dim = 0;
    CHECK(spec.groups() == 0);
    CHECK_FALSE(spec == small_spec());
}

TEST_CASE("codec_spec: refuses what makes no codec, naming field and value", "[quantize][unit]") {
    CHECK(refusal_when([](codec_spec&) {}) == "accepted");
    CHECK(refusal_when([](codec_spec& s) { s.shape.depths = 0; }) == "depths is 0, must be from 1 to 256");
    CHECK(refusal_when([](codec_spec& s) { s.shape.depths = 257; }) == "depths is 257, must be from 1 to 256");
    CHECK(refusal_when([](codec_spec& s) { s.shape.codewords = 0; }) == "codewords is 0, must be from 1 to 65536");
    CHECK(refusal_when([](codec_spec& s) { s.shape.codewords = 65537; }) ==
          "codewords is 65537, must be from 1 to 65536");
    CHECK(refusal_when([](codec_spec& s) { s.shape.dim = 0; }) == "group_dim is 0, must be from 1 to 4096");
    CHECK(refusal_when([](codec_spec& s) { s.shape.dim = 5000; }) == "group_dim is 5000, must be from 1 to 4096");
    CHECK(refusal_when([](codec_spec& s) { s.shape.dim = 5; }) == "group_dim is 5, must divide head_dim 16");
    CHECK(refusal_when([](codec_spec& s) { s.shape.dim = 32; }) == "group_dim is 32, must divide head_dim 16");
    CHECK(refusal_when([](codec_spec& s) { s.head_dim = 0; }) == "head_dim is 0, must be from 1 to 65535");
    CHECK(refusal_when([](codec_spec& s) { s.head_dim = 65536; }) == "head_dim is 65536, must be from 1 to 65535");
    CHECK(refusal_when([](codec_spec& s) { s.head_dim = std::numeric_limits<std::size_t>::max(); }) ==
          "head_dim is 18446744073709551615, must be from 1 to 65535");
    CHECK(refusal_when([](codec_spec& s) {
              s.permutation = {0, 1};
          }) == "permutation is given, but grouping is strided, not permuted");
    CHECK(refusal_when([](codec_spec& s) { s.grouping = rvqkv::grouping_kind::permuted; }) ==
          "permutation has 0 entries, must have head_dim 16");
    CHECK(refusal_when([](codec_spec& s) {
              s.grouping = rvqkv::grouping_kind::permuted;
              s.permutation.assign(17, 0);
          }) == "permutation has 17 entries, must have head_dim 16");
    CHECK(
        refusal_when([](codec_spec& s) {
            s.grouping = rvqkv::grouping_kind::permuted;
            s.permutation = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 14};
        }) ==
        "permuted grouping puts channel 14 at place 3 of group 3: every channel below head_dim 16 must appear exactly "
        "once");
    CHECK(refusal_when([](codec_spec& s) {
              s.head_dim = 0;
              s.grouping = rvqkv::grouping_kind::permuted;
          }) == "head_dim is 0, must be from 1 to 65535");
}

TEST_CASE("make_codec: refuses weights that do not fit the description", "[quantize][unit]") {
    const codec_spec spec = small_spec();
    std::vector<float> weights = small_weights();
    weights.pop_back();
    const auto short_of_one = rvqkv::make_codec<float>(spec, weights);
    REQUIRE_FALSE(short_of_one.ok());
    CHECK(short_of_one.error().message == "codebook has 239 weights, depths x codewords x group_dim asks 240");
    weights.push_back(1e6F);
    CHECK(rvqkv::make_codec<float>(spec, weights).ok());
    codec_spec half = spec;
    half.weight_type = dtype::float16;
    const auto overflown = rvqkv::make_codec<float>(half, weights);
    REQUIRE_FALSE(overflown.ok());
    CHECK(overflown.error().message == "codebook weight 3 of codeword 19 at depth 2 is not finite in float16");
}

TEMPLATE_TEST_CASE("make_codec: codes as the quantizer of the same description does", "[quantize][differential]", float,
                   rvqkv::float16, rvqkv::bfloat16) {
    CAPTURE(test::seed());
    const tensor_shape shape{7, 2, 16};
    test::random_source random(2);
    const std::vector<float> x = test::gaussian_numbers(random, 14 * 16);
    const std::vector<float> weights = small_weights();
    codec_spec spec = small_spec();
    spec.weight_type = rvqkv::dtype_of<TestType>;
    std::vector<TestType> stored;
    stored.reserve(weights.size());
    for (const float weight : weights) {
        stored.push_back(rvqkv::float_to<TestType>(weight));
    }
    const auto check = [&](const auto& scale, const auto& grouping) {
        using scale_type = std::remove_cvref_t<decltype(scale)>;
        using grouping_type = std::remove_cvref_t<decltype(grouping)>;
        using quantizer_type = rvqkv::vector_quantizer<scale_type, grouping_type, rvqkv::residual_codebook<TestType>>;
        const auto quantizer = quantizer_type::create(spec.head_dim,
                                                      rvqkv::residual_codebook<TestType>::create(
                                                          spec.shape, std::span<const float>(weights), spec.metric)
                                                          .value(),
                                                      scale, grouping, spec.scale_type)
                                   .value();
        const auto codec = rvqkv::make_codec<float>(spec, weights).value();
        CAPTURE(scale.name(), grouping.name(), rvqkv::name_of(spec.metric), rvqkv::name_of(spec.scale_type));
        const coded expected = there_and_back(quantizer, 3, x, shape);
        CHECK(there_and_back(*codec, 3, x, shape) == expected);
        // Stored weights make the same codec again.
        CHECK(there_and_back(*rvqkv::make_codec<TestType>(spec, stored).value(), 3, x, shape) == expected);

        CHECK(codec->head_dim() == 16);
        CHECK(codec->shape() == spec.shape);
        CHECK(codec->groups() == 4);
        CHECK(codec->depths() == 3);
        CHECK(codec->bits_per_code() == 5);
        CHECK(codec->stores_scale() == scale.is_stored());
        CHECK(codec->scale_type() == spec.scale_type);
        CHECK(codec->weight_type() == spec.weight_type);
        for (std::size_t place = 0; place < 16; ++place) {
            CHECK(codec->channel_order()[place] == grouping.channel(place / 4, place % 4, 4, 4));
        }
        CHECK(codec->bits_per_row() == spec.bits_per_row());
        CHECK(codec->bits_per_row() == quantizer.bits_per_row());
        CHECK(codec->bytes() == quantizer.codebook().bytes());
        REQUIRE(codec->spec() != nullptr);
        CHECK(*codec->spec() == spec);
        const auto bytes = std::as_bytes(std::span<const TestType>(stored));
        CHECK(std::equal(codec->weights().begin(), codec->weights().end(), bytes.begin(), bytes.end()));
    };
    check(rvqkv::std_dev_scale{}, rvqkv::strided_grouping{});
    spec.grouping = rvqkv::grouping_kind::contiguous;
    spec.scale_type = dtype::bfloat16;
    check(rvqkv::std_dev_scale{}, rvqkv::contiguous_grouping{});
    spec.scale = rvqkv::scale_kind::rms;
    spec.scale_type = dtype::float32;
    spec.metric = rvqkv::distance::cosine;
    check(rvqkv::rms_scale{}, rvqkv::contiguous_grouping{});
    spec.scale = rvqkv::scale_kind::l2_norm;
    spec.grouping = rvqkv::grouping_kind::permuted;
    spec.permutation = {15, 1, 13, 3, 11, 5, 9, 7, 0, 2, 4, 6, 8, 10, 12, 14};
    check(rvqkv::l2_norm_scale{}, rvqkv::permuted_grouping(spec.permutation));
    spec.scale = rvqkv::scale_kind::max_abs;
    check(rvqkv::max_abs_scale{}, rvqkv::permuted_grouping(spec.permutation));
    spec.scale = rvqkv::scale_kind::none;
    check(rvqkv::no_scale{}, rvqkv::permuted_grouping(spec.permutation));
}

TEST_CASE("codec: passes reports, truncation and refusals through the door", "[quantize][unit]") {
    const auto codec = rvqkv::make_codec<float>(small_spec(), small_weights()).value();
    std::vector<float> x(2 * 16, 1.0F);
    x[20] = std::numeric_limits<float>::quiet_NaN();
    std::vector<code_t> codes(2 * 4 * 3);
    std::vector<float> scales(2);
    rvqkv::quantizer_workspace workspace;
    rvqkv::encode_report report;
    codec->encode({x.data(), {2, 1, 16}}, {codes.data(), {3, 1}, scales.data()}, workspace, &report).value();
    CHECK(report.nonfinite_values == 1);
    CHECK(report.first_token == 1);
    std::vector<float> out(32, 5.0F);
    const rvqkv::encoded_view view{codes.data(), {3, 1}, scales.data()};
    codec->decode(view, {out.data(), {2, 1, 16}}, 0, workspace).value();
    CHECK(out == std::vector<float>(32, 0.0F));
    const rvqkv::status too_deep = codec->decode(view, {out.data(), {2, 1, 16}}, 4, workspace);
    REQUIRE_FALSE(too_deep.ok());
    CHECK(too_deep.error().message == "depths to decode is 4, the codebook has 3");
    const rvqkv::status too_wide =
        codec->encode({x.data(), {1, 1, 32}}, {codes.data(), {3, 1}, scales.data()}, workspace);
    REQUIRE_FALSE(too_wide.ok());
    CHECK(too_wide.error().message == "input has 32 channels per head, this quantizer was made for head_dim 16");
    const rvqkv::status no_place = codec->encode({x.data(), {1, 1, 16}}, {codes.data(), {3, 1}, nullptr}, workspace);
    REQUIRE_FALSE(no_place.ok());
    CHECK(no_place.error().message == "scales are missing: the std_dev policy stores one per vector");
    CHECK(codec->decode({nullptr, {3, 1}, nullptr}, {out.data(), {0, 1, 16}}, 3, workspace).ok());
}

TEST_CASE("first_depths: gives the codes that the whole codec begins with", "[quantize][unit]") {
    CAPTURE(test::seed());
    test::random_source random(5);
    const std::vector<float> x = test::gaussian_numbers(random, 9 * 16);
    for (const dtype type : {dtype::float32, dtype::float16, dtype::bfloat16}) {
        codec_spec spec = small_spec();
        spec.weight_type = type;
        const auto whole = rvqkv::make_codec<float>(spec, small_weights()).value();
        CHECK(rvqkv::first_depths(whole, 3).value() == whole);
        const auto cut = rvqkv::first_depths(whole, 2).value();
        CHECK(cut->spec()->shape == rvqkv::codebook_shape{2, 20, 4});
        CHECK(cut->weight_type() == type);
        const coded of_whole = there_and_back(*whole, 3, x, {9, 1, 16});
        const coded of_cut = there_and_back(*cut, 2, x, {9, 1, 16});
        CHECK(of_cut.scales == of_whole.scales);
        std::vector<code_t> first;
        for (std::size_t i = 0; i < of_whole.codes.size(); i += 3) {
            first.insert(first.end(), {of_whole.codes[i], of_whole.codes[i + 1]});
        }
        CHECK(of_cut.codes == first);
        const auto none = rvqkv::first_depths(whole, 0);
        REQUIRE_FALSE(none.ok());
        CHECK(none.error().message == "depths to keep is 0, must be between 1 and the codec's 3");
        CHECK_FALSE(rvqkv::first_depths(whole, 4).ok());
    }
}

TEST_CASE("codec: workers share the rows out and change nothing", "[quantize][threads][unit]") {
    test::random_source random(3);
    const auto codec = rvqkv::make_codec<float>(small_spec(), small_weights()).value();
    const std::vector<float> x = test::gaussian_numbers(random, 200 * 2 * 16);
    const auto codes_with = [&](const rvqkv::executor& workers) {
        std::vector<code_t> codes(200 * 2 * 4 * 3);
        std::vector<float> scales(400);
        rvqkv::quantizer_workspace workspace;
        codec->encode({x.data(), {200, 2, 16}}, {codes.data(), {3, 1}, scales.data()}, workspace, nullptr, workers)
            .value();
        return codes;
    };
    CHECK(codes_with(rvqkv::thread_pool(3)) == codes_with(rvqkv::serial_executor()));
}

TEST_CASE("make_codec: takes a quantizer of the user's own policies", "[quantize][unit]") {
    CAPTURE(test::seed());
    const codec_spec spec = small_spec();
    const std::vector<float> weights = small_weights();
    using quantizer_type = rvqkv::vector_quantizer<custom::mean_magnitude_scale, custom::strided_pairs_grouping>;
    const auto quantizer =
        quantizer_type::create(spec.head_dim,
                               rvqkv::residual_codebook<>::create(spec.shape, std::span<const float>(weights)).value())
            .value();
    const std::shared_ptr<const rvqkv::codec> codec = rvqkv::make_codec(quantizer);
    CHECK(codec->spec() == nullptr);  // no file can name these policies
    CHECK(rvqkv::first_depths(codec, 3).value() == codec);
    const auto cut = rvqkv::first_depths(codec, 2);
    REQUIRE_FALSE(cut.ok());
    CHECK(cut.error().code == rvqkv::error_code::unsupported);
    CHECK(codec->bits_per_row() == 76);
    CHECK(codec->bytes() == quantizer.codebook().bytes());
    CHECK(codec->weights().size() == spec.shape.size() * sizeof(float));
    CHECK(codec->weight_type() == dtype::float32);
    REQUIRE(codec->channel_order().size() == 16);
    CHECK(codec->channel_order()[5] == custom::strided_pairs_grouping().channel(1, 1, 4, 4));
    test::random_source random(3);
    const std::vector<float> x = test::gaussian_numbers(random, 5 * 16);
    CHECK(there_and_back(*codec, 3, x, {5, 1, 16}) == there_and_back(quantizer, 3, x, {5, 1, 16}));
}
