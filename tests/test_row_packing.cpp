// SPDX-License-Identifier: MIT
/// @file
/// Tiles of rows against `pack_codes`, for every width: the same bytes, the way back, and nothing written beside.
#include "rvqkv/core/row_packing.hpp"

#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cstddef>
#include <vector>

using rvqkv::code_t;
using rvqkv::tile_tokens;

TEST_CASE("pack_rows: each row is what pack_codes makes of a column", "[core][differential]") {
    CAPTURE(test::seed());
    test::random_source random(1);
    for (unsigned bits = 1; bits <= 16; ++bits) {
        for (const std::size_t columns : {0U, 1U, 2U, 7U, 32U}) {
            const std::size_t stride = columns + random.integer(0, 5);
            const std::size_t row_stride = 8 * bits * random.integer(1, 3);
            CAPTURE(bits, columns, stride, row_stride);
            std::vector<code_t> codes(tile_tokens * stride + 1);
            for (code_t& code : codes) {
                code = static_cast<code_t>(random.integer(0, (1U << bits) - 1));
            }
            codes[0] = static_cast<code_t>((1U << bits) - 1);
            std::vector<std::byte> expected(columns * row_stride + 1, std::byte{0x5a});
            for (std::size_t c = 0; c < columns; ++c) {
                std::vector<code_t> column(tile_tokens);
                for (std::size_t t = 0; t < tile_tokens; ++t) {
                    column[t] = codes[t * stride + c];
                }
                rvqkv::pack_codes(column.data(), tile_tokens, bits, expected.data() + c * row_stride);
            }
            std::vector<std::byte> rows(expected.size(), std::byte{0x5a});
            rvqkv::pack_rows(codes.data(), stride, columns, bits, rows.data(), row_stride);
            REQUIRE(rows == expected);

            std::vector<code_t> back(codes.size(), 7);
            rvqkv::unpack_rows(rows.data(), row_stride, columns, bits, back.data(), stride);
            for (std::size_t t = 0; t < tile_tokens; ++t) {
                for (std::size_t c = 0; c < stride; ++c) {
                    REQUIRE(back[t * stride + c] == (c < columns ? codes[t * stride + c] : 7));
                }
            }
            REQUIRE(back.back() == 7);
        }
    }
}

TEST_CASE("unpack_rows: reads the row's own bytes only", "[core][unit]") {
    for (unsigned bits = 1; bits <= 16; ++bits) {
        // Memory of their own, so that the address sanitizer sees a read beyond.
        const std::vector<std::byte> rows(8 * bits, std::byte{0xff});
        std::vector<code_t> codes(tile_tokens);
        rvqkv::unpack_rows(rows.data(), rows.size(), 1, bits, codes.data(), 1);
        CHECK(std::count(codes.begin(), codes.end(), static_cast<code_t>((1U << bits) - 1)) == tile_tokens);
    }
}
