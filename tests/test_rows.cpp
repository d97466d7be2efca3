// SPDX-License-Identifier: MIT
/// @file
/// Rows of tensors to float32 and back: every element type, stride and alignment, at every SIMD level.
#include "rvqkv/quantize/rows.hpp"

#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"

#include <cstddef>
#include <vector>

namespace {

struct layout {
    rvqkv::tensor_strides strides;
    std::size_t first;  ///< Where element [0, 0, 0] lies.
    std::size_t size;   ///< Elements that the tensor spans.
};

/// Ways in which a [3, 2, channels] tensor can lie in memory.
std::vector<layout> layouts(std::size_t channels) {
    const auto n = static_cast<std::ptrdiff_t>(channels);
    const std::size_t span = 6 * channels;
    return {
        {{2 * n, n, 1}, 0, span},                                // contiguous
        {{2 * n + 7, n + 3, 1}, 5, 5 + 3 * (2 * channels + 7)},  // padded, off any alignment
        {{n, 3 * n, 1}, 0, span},                                // heads outermost
        {{1, 3, 6}, 0, span},                                    // channels outermost
        {{4 * n, 2 * n, 2}, 1, 2 * span},                        // every other element
        {{-2 * n, -n, -1}, span - 1, span},                      // backwards
        {{2 * n, n, -1}, channels - 1, span},                    // channels backwards
    };
}

}  // namespace

TEMPLATE_TEST_CASE("load_row, store_row: move one row and nothing else", "[quantize][simd][differential]", float,
                   rvqkv::float16, rvqkv::bfloat16) {
    CAPTURE(test::seed());
    test::random_source random(1);
    for (const std::size_t channels : {1U, 2U, 7U, 8U, 16U, 31U, 64U, 130U}) {
        for (const layout& lay : layouts(channels)) {
            const auto at = [&lay](std::size_t token, std::size_t head, std::size_t channel) {
                return static_cast<std::size_t>(static_cast<std::ptrdiff_t>(lay.first) +
                                                static_cast<std::ptrdiff_t>(token) * lay.strides.token +
                                                static_cast<std::ptrdiff_t>(head) * lay.strides.head +
                                                static_cast<std::ptrdiff_t>(channel) * lay.strides.channel);
            };
            std::vector<TestType> data;
            for (const float number : test::gaussian_numbers(random, lay.size)) {
                data.push_back(rvqkv::float_to<TestType>(number));
            }
            for (const rvqkv::simd_level level : test::levels()) {
                const rvqkv::kernel_table& kernels = *rvqkv::kernels_for(level).value();
                CAPTURE(rvqkv::name_of(level), channels, lay.strides.token, lay.strides.head, lay.strides.channel);
                const rvqkv::tensor_view tensor(data.data() + lay.first, {3, 2, channels}, lay.strides);
                for (std::size_t token = 0; token < 3; ++token) {
                    for (std::size_t head = 0; head < 2; ++head) {
                        std::vector<float> expected;
                        for (std::size_t channel = 0; channel < channels; ++channel) {
                            expected.push_back(rvqkv::to_float(data[at(token, head, channel)]));
                        }
                        std::vector<float> row(channels);
                        rvqkv::load_row(tensor, token, head, row.data(), kernels);
                        REQUIRE(test::bits_of(row) == test::bits_of(expected));
                    }
                }
                std::vector<TestType> written = data;
                std::vector<TestType> expected = data;
                const std::vector<float> row = test::gaussian_numbers(random, channels);
                for (std::size_t channel = 0; channel < channels; ++channel) {
                    expected[at(2, 1, channel)] = rvqkv::float_to<TestType>(row[channel]);
                }
                rvqkv::store_row(row.data(), {written.data() + lay.first, {3, 2, channels}, lay.strides}, 2, 1,
                                 kernels);
                REQUIRE(written == expected);
            }
        }
    }
}

TEST_CASE("load_row: reads a row that stands for all tokens", "[quantize][unit]") {
    const std::vector<float> data = {1, 2, 3, /**/ 4, 5, 6};
    const rvqkv::tensor_view shared(data.data(), {100, 2, 3}, {0, 3, 1});
    std::vector<float> row(3);
    rvqkv::load_row(shared, 99, 1, row.data());
    CHECK(row == std::vector<float>{4, 5, 6});
    const rvqkv::tensor_view flat(data.data(), {1, 1, 3}, {0, 0, 0});
    rvqkv::load_row(flat, 0, 0, row.data());
    CHECK(row == std::vector<float>{1, 1, 1});
}
