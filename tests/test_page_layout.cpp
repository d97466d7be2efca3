// SPDX-License-Identifier: MIT
/// @file
/// Where scales, codes and exact numbers lie in a page: rows apart, aligned and without gaps.
#include "rvqkv/attend/page_layout.hpp"

#include "support/catch.hpp"

#include <cstddef>
#include <memory>
#include <set>
#include <vector>

namespace {

std::shared_ptr<const rvqkv::codec> make_codec(std::size_t head_dim, rvqkv::codebook_shape shape,
                                               rvqkv::scale_kind scale, rvqkv::dtype scale_type) {
    rvqkv::codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = shape;
    spec.scale = scale;
    spec.scale_type = scale_type;
    const std::vector<float> weights(shape.size(), 1.0F);
    return rvqkv::make_codec<float>(spec, weights).value();
}

}  // namespace

TEST_CASE("coded_layout: a head's scales, then its rows of codes, depth outermost", "[cache][unit]") {
    // 128 tokens x 3 heads x 2 groups of 3-bit codes: a row is 48 bytes, a head's scales 256.
    const auto codec = make_codec(8, {3, 5, 4}, rvqkv::scale_kind::rms, rvqkv::dtype::float16);
    const rvqkv::coded_layout layout(*codec, 3, 128, 3, 64);
    CHECK(layout.begin() == 64);
    CHECK(layout.heads() == 3);
    CHECK(layout.groups() == 2);
    CHECK(layout.depths() == 3);
    CHECK(layout.bits() == 3);
    CHECK(layout.has_scales());
    CHECK(layout.scales(0) == 64);
    CHECK(layout.head_bytes() == 256 + 6 * 48);
    CHECK(layout.scales(2) == 64 + 2 * (256 + 6 * 48));
    CHECK(layout.scale_bytes() == 3 * 256);
    CHECK(layout.row_bytes() == 48);
    CHECK(layout.row(0, 0, 0) == 64 + 256);
    CHECK(layout.row(0, 0, 1) == 64 + 256 + 48);
    CHECK(layout.row(1, 0, 0) == 64 + 256 + 2 * 48);
    CHECK(layout.row(0, 1, 0) == layout.scales(1) + 256);
    CHECK(layout.code_bytes() == 3 * 6 * 48);
    CHECK(layout.end() == 64 + 768 + 18 * 48);
}

TEST_CASE("coded_layout: takes the codec's bits and not one more, at every width", "[cache][property]") {
    for (unsigned bits = 1; bits <= 16; ++bits) {
        for (const std::size_t heads : {1U, 3U, 8U}) {
            const auto codec =
                make_codec(6, {2, std::size_t{1} << bits, 2}, rvqkv::scale_kind::max_abs, rvqkv::dtype::bfloat16);
            const rvqkv::coded_layout layout(*codec, heads, 64, 2, 0);
            CAPTURE(bits, heads);
            CHECK(layout.end() * 8 == 64 * heads * codec->bits_per_row());
            for (std::size_t head = 0; head < heads; ++head) {
                CHECK(layout.row(1, head, 2) % 8 == 0);
                CHECK(layout.scales(head) % 8 == 0);
            }
        }
    }
}

TEST_CASE("coded_layout: fewer depths are the same pieces with their ends cut off", "[cache][unit]") {
    const auto codec = make_codec(6, {5, 37, 3}, rvqkv::scale_kind::std_dev, rvqkv::dtype::float32);
    const rvqkv::coded_layout whole(*codec, 2, 192, 5, 128);
    for (std::size_t depths = 1; depths <= 5; ++depths) {
        const rvqkv::coded_layout cut(*codec, 2, 192, depths, 128);
        CHECK(cut.scales(1) == 128 + cut.head_bytes());
        CHECK(cut.row(depths - 1, 1, 1) - cut.scales(1) == whole.row(depths - 1, 1, 1) - whole.scales(1));
        CHECK(cut.head_bytes() == whole.row(depths, 0, 0) - whole.scales(0));
        CHECK(cut.end() == 128 + 2 * cut.head_bytes());
    }
}

TEST_CASE("coded_layout: a codec without scales has no bytes for them", "[cache][unit]") {
    const auto codec = make_codec(8, {2, 256, 4}, rvqkv::scale_kind::none, rvqkv::dtype::float32);
    const rvqkv::coded_layout layout(*codec, 2, 64, 2, 8);
    CHECK_FALSE(layout.has_scales());
    CHECK(layout.scale_bytes() == 0);
    CHECK(layout.row(0, 0, 0) == 8);
    CHECK(layout.end() == 8 + 2 * 2 * 2 * 64);
}

TEST_CASE("exact_layout: a head's tokens side by side", "[cache][unit]") {
    const rvqkv::exact_layout layout(3, 10, 64, rvqkv::dtype::float16, 128);
    CHECK(layout.begin() == 128);
    CHECK(layout.row(0, 0) == 128);
    CHECK(layout.row(0, 1) == 128 + 20);
    CHECK(layout.row(1, 0) == 128 + 64 * 20);
    CHECK(layout.end() == 128 + 3 * 64 * 20);
    CHECK(layout.heads() == 3);
    CHECK(layout.head_dim() == 10);
    CHECK(layout.type() == rvqkv::dtype::float16);
}
