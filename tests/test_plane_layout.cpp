// SPDX-License-Identifier: MIT
/// @file
/// Where scales and codes lie in a page: parts apart and aligned, every token in its own bits.
#include "rvqkv/files/plane_layout.hpp"

#include "rvqkv/core/aligned_buffer.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <vector>

namespace {

using rvqkv::code_t;

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

/// Codes and scales of some tokens, as `plane_layout` takes them.
struct encoded {
    std::vector<code_t> codes;  // [depth, token, head, group]
    std::vector<float> scales;  // [token, head]
    rvqkv::code_strides strides;

    encoded(const rvqkv::codec& codec, std::size_t tokens, std::size_t heads)
        : codes(codec.depths() * tokens * heads * codec.groups()),
          scales(tokens * heads),
          strides{1, tokens * heads * codec.groups()} {}
    void fill(test::random_source& random, std::size_t codewords) {
        for (code_t& code : codes) {
            code = static_cast<code_t>(random.integer(0, codewords - 1));
        }
        for (float& scale : scales) {
            scale = static_cast<float>(random.integer(1, 200));  // exact in every type
        }
    }
    [[nodiscard]] rvqkv::encoded_view view(std::size_t skip_codes = 0, std::size_t skip_scales = 0) const {
        return {codes.data() + skip_codes, strides, scales.data() + skip_scales};
    }
    [[nodiscard]] rvqkv::mutable_encoded_view room() { return {codes.data(), strides, scales.data()}; }
};

}  // namespace

TEST_CASE("plane_layout: scales first, then one plane for each depth, aligned and without gaps", "[files][unit]") {
    // 6 tokens x 3 heads x 2 groups of 3-bit codes: 108 bits, 14 bytes; 18 scales of 2 bytes.
    const auto codec = make_codec(8, {3, 5, 4}, rvqkv::scale_kind::rms, rvqkv::dtype::float16);
    const rvqkv::plane_layout layout(*codec, 3, 6, 64);
    CHECK(layout.begin() == 64);
    CHECK(layout.scales_offset() == 64);
    CHECK(layout.scale_bytes() == 36);
    CHECK(layout.plane_offset(0) == 64 + 40);
    CHECK(layout.plane_bytes() == 14);
    CHECK(layout.plane_offset(1) == 64 + 40 + 16);
    CHECK(layout.code_bytes() == 3 * 14);
    CHECK(layout.end() == 64 + 40 + 3 * 16);
    CHECK(layout.codes_per_token() == 6);
}

TEST_CASE("plane_layout: pads nothing, if a page holds a multiple of 64 tokens", "[files][property]") {
    for (unsigned bits = 1; bits <= 16; ++bits) {
        for (const std::size_t heads : {1U, 3U, 8U}) {
            const auto codec =
                make_codec(6, {2, std::size_t{1} << bits, 2}, rvqkv::scale_kind::max_abs, rvqkv::dtype::bfloat16);
            const rvqkv::plane_layout layout(*codec, heads, 64, 0);
            CAPTURE(bits, heads);
            CHECK(layout.end() * 8 == 64 * heads * codec->bits_per_row());
        }
    }
}

TEST_CASE("plane_layout: a codec without scales has no bytes for them", "[files][unit]") {
    const auto codec = make_codec(8, {2, 256, 4}, rvqkv::scale_kind::none, rvqkv::dtype::float32);
    const rvqkv::plane_layout layout(*codec, 2, 4, 8);
    CHECK(layout.scale_bytes() == 0);
    CHECK(layout.plane_offset(0) == 8);
    CHECK(layout.end() == 8 + 2 * 16);
}

TEST_CASE("plane_layout: stored tokens load again, and no bit of other tokens or of padding changes",
          "[files][property]") {
    test::random_source random(1);
    CAPTURE(test::seed());
    for (unsigned bits = 1; bits <= 16; ++bits) {
        for (const rvqkv::dtype type : {rvqkv::dtype::float32, rvqkv::dtype::float16, rvqkv::dtype::bfloat16}) {
            const std::size_t codewords = bits == 1 ? 2 : (std::size_t{1} << (bits - 1)) + 1;
            const std::size_t heads = random.integer(1, 3);
            const std::size_t page_tokens = random.integer(1, 9);
            const auto codec = make_codec(4, {2, codewords, 2}, rvqkv::scale_kind::l2_norm, type);
            const rvqkv::plane_layout layout(*codec, heads, page_tokens, 16);
            CAPTURE(bits, rvqkv::name_of(type), heads, page_tokens);
            auto page = rvqkv::aligned_buffer<std::byte>::allocate(layout.end()).value();

            encoded whole(*codec, page_tokens, heads);
            whole.fill(random, codewords);
            // Every token by itself, in any order, over what was there before.
            std::vector<std::size_t> order(page_tokens);
            for (std::size_t i = 0; i < page_tokens; ++i) {
                order[i] = i;
            }
            encoded other(*codec, page_tokens, heads);
            other.fill(random, codewords);
            layout.store(page.data(), 0, page_tokens, other.view());
            std::shuffle(order.begin(), order.end(), random.engine());
            for (const std::size_t token : order) {
                layout.store(page.data(), token, 1, whole.view(token * layout.codes_per_token(), token * heads));
            }

            auto at_once = rvqkv::aligned_buffer<std::byte>::allocate(layout.end()).value();
            layout.store(at_once.data(), 0, page_tokens, whole.view());
            CHECK(std::memcmp(page.data(), at_once.data(), page.bytes()) == 0);

            encoded loaded(*codec, page_tokens, heads);
            layout.load(page.data(), 0, page_tokens, 2, loaded.room());
            CHECK(loaded.codes == whole.codes);
            CHECK(loaded.scales == whole.scales);
        }
    }
}

TEST_CASE("plane_layout: fewer depths are read from a page that ends after them", "[files][property]") {
    test::random_source random(2);
    CAPTURE(test::seed());
    const auto codec = make_codec(6, {5, 37, 3}, rvqkv::scale_kind::std_dev, rvqkv::dtype::float16);
    const rvqkv::plane_layout layout(*codec, 2, 7, 0);
    encoded whole(*codec, 7, 2);
    whole.fill(random, 37);
    auto page = rvqkv::aligned_buffer<std::byte>::allocate(layout.end()).value();
    layout.store(page.data(), 0, 7, whole.view());
    for (std::size_t depths = 0; depths <= 5; ++depths) {
        CAPTURE(depths);
        // An exact copy of what these depths need: address sanitizer sees a read beyond.
        const std::vector<std::byte> cut(page.data(), page.data() + layout.plane_offset(depths));
        encoded loaded(*codec, 7, 2);
        layout.load(cut.data(), 0, 7, depths, loaded.room());
        const auto wanted = static_cast<std::ptrdiff_t>(depths * whole.strides.depth);
        CHECK(std::equal(loaded.codes.begin(), loaded.codes.begin() + wanted, whole.codes.begin()));
        CHECK(std::all_of(loaded.codes.begin() + wanted, loaded.codes.end(), [](code_t code) { return code == 0; }));
        CHECK(loaded.scales == whole.scales);
    }
}
