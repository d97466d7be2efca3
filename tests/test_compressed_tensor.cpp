// SPDX-License-Identifier: MIT
/// @file
/// Compressed tensors: the same numbers as the codec's own, however the work is split, and no byte more than they say.
#include "rvqkv/core/thread_pool.hpp"
#include "rvqkv/files/compressed_tensor.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace {

using rvqkv::codec_spec;
using rvqkv::compressed_tensor;
using rvqkv::dtype;
using rvqkv::error_code;

std::shared_ptr<const rvqkv::codec> make(const codec_spec& spec, std::uint64_t salt = 0) {
    test::random_source random(salt);
    const std::vector<float> weights = test::gaussian_numbers(random, spec.shape.size());
    return rvqkv::make_codec(spec, std::span<const float>(weights)).value();
}

codec_spec make_spec(std::size_t head_dim, rvqkv::codebook_shape shape) {
    codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = shape;
    return spec;
}

/// What the codec itself makes of a tensor: codes and scales never leave their buffers.
std::vector<float> round_trip(const rvqkv::codec& codec, const rvqkv::tensor_view& x, std::size_t depths) {
    std::vector<rvqkv::code_t> codes(x.rows() * codec.groups() * codec.depths());
    std::vector<float> scales(x.rows() + 1);  // not null without rows either
    float* const kept = codec.stores_scale() ? scales.data() : nullptr;
    const rvqkv::code_strides strides{codec.depths(), 1};
    rvqkv::quantizer_workspace workspace;
    codec.encode(x, {codes.data(), strides, kept}, workspace).value();
    std::vector<float> out(x.rows() * x.channels());
    codec.decode({codes.data(), strides, kept}, {out.data(), x.shape()}, depths, workspace).value();
    return out;
}

std::vector<float> decoded(const compressed_tensor& tensor, std::size_t first, std::size_t count, std::size_t depths,
                           const rvqkv::executor& workers = rvqkv::serial_executor()) {
    const rvqkv::tensor_shape shape{count, tensor.shape().heads, tensor.shape().channels};
    std::vector<float> out(count * shape.heads * shape.channels);
    tensor.decode(first, {out.data(), shape}, depths, workers).value();
    return out;
}

std::vector<std::byte> all_bytes(const compressed_tensor& tensor) {
    std::vector<std::byte> bytes(tensor.scales().begin(), tensor.scales().end());
    for (std::size_t depth = 0; depth < tensor.codec()->depths(); ++depth) {
        bytes.insert(bytes.end(), tensor.codes(depth).begin(), tensor.codes(depth).end());
    }
    return bytes;
}

}  // namespace

TEST_CASE("compressed_tensor: reads back what the codec reads back", "[files][differential]") {
    CAPTURE(test::seed());
    test::random_source random(1);
    // Codes of 1, 3, 8 and 11 bits; with scales of every type and without.
    for (const std::size_t codewords : {2U, 5U, 256U, 1100U}) {
        for (const int kind : {0, 1, 2, 3}) {
            codec_spec spec = make_spec(12, {3, codewords, 4});
            spec.scale = kind == 3 ? rvqkv::scale_kind::none : rvqkv::scale_kind::rms;
            spec.scale_type = kind == 0 ? dtype::float16 : kind == 1 ? dtype::bfloat16 : dtype::float32;
            const auto codec = make(spec, codewords);
            const rvqkv::tensor_shape shape{random.integer(1, 200), random.integer(1, 3), 12};
            CAPTURE(codewords, kind, shape.tokens, shape.heads);
            const std::vector<float> x = test::gaussian_numbers(random, shape.tokens * shape.heads * shape.channels);
            const rvqkv::tensor_view view(x.data(), shape);
            compressed_tensor tensor = compressed_tensor::create(codec, shape.tokens, shape.heads).value();
            CHECK(tensor.shape() == shape);
            tensor.encode(0, view, rvqkv::serial_executor()).value();
            for (const std::size_t depths : {0U, 1U, 3U}) {
                CHECK(decoded(tensor, 0, shape.tokens, depths) == round_trip(*codec, view, depths));
            }
            const std::size_t first = random.integer(0, shape.tokens - 1);
            const std::size_t count = random.integer(0, shape.tokens - first);
            CHECK(decoded(tensor, first, count, 3) == round_trip(*codec, view.slice_tokens(first, count), 3));
        }
    }
}

TEST_CASE("compressed_tensor: the same bytes however the tokens are split, at any number of threads",
          "[files][property]") {
    CAPTURE(test::seed());
    test::random_source random(2);
    // 5 bits, 3 codes a token: only every eighth token begins with a whole byte. Blocks are 512 tokens here.
    const auto codec = make(make_spec(64, {2, 20, 64}));
    const rvqkv::tensor_shape shape{2000, 3, 64};
    const std::vector<float> x = test::gaussian_numbers(random, shape.tokens * shape.heads * shape.channels);
    const rvqkv::tensor_view view(x.data(), shape);
    compressed_tensor whole = compressed_tensor::create(codec, shape.tokens, shape.heads).value();
    whole.encode(0, view, rvqkv::serial_executor()).value();
    const rvqkv::thread_pool pool(4);
    compressed_tensor parallel = compressed_tensor::create(codec, shape.tokens, shape.heads).value();
    parallel.encode(0, view, pool).value();
    CHECK(all_bytes(parallel) == all_bytes(whole));
    compressed_tensor split = compressed_tensor::create(codec, shape.tokens, shape.heads).value();
    for (std::size_t first = 0; first < shape.tokens;) {
        const std::size_t count = std::min(shape.tokens - first, random.integer(0, 700));
        split.encode(first, view.slice_tokens(first, count), pool).value();
        first += count;
    }
    CHECK(all_bytes(split) == all_bytes(whole));
    CHECK(decoded(split, 100, 1500, 2, pool) == decoded(whole, 100, 1500, 2));
}

TEST_CASE("compressed_tensor: takes the bits that the codec promises, rounded up to bytes once a depth",
          "[files][unit]") {
    codec_spec spec = make_spec(128, {8, 2048, 32});  // the paper's
    const auto codec = make(spec);
    const compressed_tensor tensor = compressed_tensor::create(codec, 64, 8).value();
    CHECK(8 * (tensor.code_bytes() + tensor.scale_bytes()) == 64 * 8 * spec.bits_per_row());
    CHECK(spec.bits_per_value() == 2.875);
    const compressed_tensor one = compressed_tensor::create(codec, 1, 1).value();
    CHECK(one.code_bytes() == 8 * 6);  // 4 codes of 11 bits in 6 bytes
    CHECK(one.scale_bytes() == 2);
    spec.scale = rvqkv::scale_kind::none;
    CHECK(compressed_tensor::create(make(spec), 64, 8).value().scales().empty());
    const compressed_tensor empty = compressed_tensor::create(codec, 0, 1).value();
    CHECK(empty.code_bytes() + empty.scale_bytes() == 0);
    CHECK(decoded(empty, 0, 0, 8).empty());
}

TEST_CASE("compressed_tensor: NaN and infinity count as 0 and are reported with their place", "[files][unit]") {
    test::random_source random(3);
    const auto codec = make(make_spec(64, {2, 16, 16}));
    const rvqkv::tensor_shape shape{1500, 2, 64};
    std::vector<float> x = test::gaussian_numbers(random, shape.tokens * shape.heads * shape.channels);
    std::vector<float> clean = x;
    for (const std::size_t at : {(1200U * 2U + 1U) * 64U + 5U, (1400U * 2U + 0U) * 64U + 6U}) {
        x[at] = at % 2 == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
        clean[at] = 0.0F;
    }
    const rvqkv::thread_pool pool(3);
    compressed_tensor tensor = compressed_tensor::create(codec, shape.tokens, shape.heads).value();
    rvqkv::encode_report report;
    tensor.encode(0, {x.data(), shape}, pool, &report).value();
    CHECK(report.nonfinite_values == 2);
    CHECK(report.nonfinite_rows == 2);
    CHECK(report.first_token == 1200);
    CHECK(report.first_head == 1);
    compressed_tensor expected = compressed_tensor::create(codec, shape.tokens, shape.heads).value();
    expected.encode(0, {clean.data(), shape}, pool).value();
    CHECK(all_bytes(tensor) == all_bytes(expected));
}

TEST_CASE("compressed_tensor: what does not fit is refused", "[files][unit]") {
    const auto codec = make(make_spec(8, {2, 4, 4}));
    const auto refusal = [](const auto& outcome) {
        REQUIRE_FALSE(outcome.ok());
        CHECK(outcome.error().code == error_code::invalid_argument);
        return outcome.error().message;
    };
    CHECK(refusal(compressed_tensor::create(nullptr, 1, 1)) == "codec is null");
    CHECK(refusal(compressed_tensor::create(codec, 1, 0)) ==
          "1 tokens of 0 heads are not a size that a tensor can have");
    constexpr std::size_t huge = std::numeric_limits<std::size_t>::max();
    for (const std::size_t tokens : {std::size_t{0}, huge / 2, huge}) {
        for (const std::size_t heads : {huge / 300, huge}) {
            CHECK_FALSE(compressed_tensor::create(codec, tokens, heads).ok());
        }
    }
    CHECK(compressed_tensor::create(codec, huge / 1000, 1).error().code == error_code::out_of_memory);

    compressed_tensor tensor = compressed_tensor::create(codec, 10, 2).value();
    const std::vector<std::byte> before = all_bytes(tensor);
    std::vector<float> x(1000, 1.0F);
    const rvqkv::serial_executor serial;
    CHECK(refusal(tensor.encode(0, {x.data(), {1, 3, 8}}, serial)) ==
          "tensor has 3 heads of 8 channels, must have 2 of 8");
    CHECK(refusal(tensor.encode(0, {x.data(), {1, 2, 4}}, serial)) ==
          "tensor has 2 heads of 4 channels, must have 2 of 8");
    CHECK(refusal(tensor.encode(7, {x.data(), {4, 2, 8}}, serial)) == "tokens 7 to 11 are asked for, there are 10");
    CHECK_FALSE(tensor.encode(huge, {x.data(), {4, 2, 8}}, serial).ok());
    CHECK(all_bytes(tensor) == before);
    CHECK(refusal(tensor.decode(11, {x.data(), {0, 2, 8}}, 2, serial)) ==
          "tokens 11 to 11 are asked for, there are 10");
    CHECK(refusal(tensor.decode(0, {x.data(), {1, 2, 8}}, 3, serial)) == "depths to decode is 3, the codec has 2");
}

TEST_CASE("codec_fingerprint: tells codecs apart by everything that they are", "[files][property]") {
    const codec_spec spec = make_spec(8, {2, 4, 4});
    const auto print = [](const codec_spec& each, std::uint64_t salt) {
        return rvqkv::codec_fingerprint(*make(each, salt)).value();
    };
    const std::string base = print(spec, 1);
    CHECK(base.size() == 16);
    CHECK(print(spec, 1) == base);
    std::vector<std::string> prints = {base, print(spec, 2)};
    const auto with = [&](auto change) {
        codec_spec other = spec;
        change(other);
        prints.push_back(print(other, 1));
    };
    with([](codec_spec& s) { s.scale = rvqkv::scale_kind::rms; });
    with([](codec_spec& s) { s.scale_type = dtype::float32; });
    with([](codec_spec& s) { s.grouping = rvqkv::grouping_kind::contiguous; });
    with([](codec_spec& s) { s.metric = rvqkv::distance::cosine; });
    with([](codec_spec& s) { s.weight_type = dtype::float16; });
    with([](codec_spec& s) { s.head_dim = 16; });
    for (const bool swapped : {false, true}) {
        with([&](codec_spec& s) {
            s.grouping = rvqkv::grouping_kind::permuted;
            s.permutation = {0, 1, 2, 3, 4, 5, 6, 7};
            std::swap(s.permutation[6], s.permutation[swapped ? 7 : 6]);
        });
    }
    std::sort(prints.begin(), prints.end());
    CHECK(std::adjacent_find(prints.begin(), prints.end()) == prints.end());

    const std::vector<float> weights(4);
    auto book = rvqkv::residual_codebook<>::create({1, 2, 2}, std::span<const float>(weights)).value();
    using quantizer = rvqkv::vector_quantizer<rvqkv::rms_scale, rvqkv::strided_grouping>;
    const auto own = rvqkv::make_codec(quantizer::create(4, std::move(book)).value());
    CHECK(rvqkv::codec_fingerprint(*own).error().code == error_code::invalid_argument);
}
