// SPDX-License-Identifier: MIT
/// @file
/// Scores and weighted sums by small tables against plain arithmetic on the same codes, within the bounds that rounding
/// the tables and the weights implies; all levels bit for bit alike; what pages hold beside the tokens does no harm.
#include "rvqkv/attend/small_key_tables.hpp"
#include "rvqkv/attend/small_value_tables.hpp"

#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"
#include "support/weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <vector>

namespace {

using rvqkv::code_t;
using rvqkv::codebook_shape;
using rvqkv::tile_tokens;

struct scene_spec {
    codebook_shape shape;
    std::size_t head_dim = 64;
    rvqkv::scale_kind scale = rvqkv::scale_kind::rms;
    rvqkv::dtype scale_type = rvqkv::dtype::float16;
    std::size_t heads = 2;
    std::size_t page_tokens = 64;
    std::size_t tiles = 3;
    bool on_byte_grid = false;  // the codebook is rounded for tables
};

/// One side of some pages with random codes and scales, and what they stand for.
class scene {
public:
    scene(test::random_source& random, const scene_spec& of)
        : spec(of), weights(test::make_weights(random, spec.shape)) {
        if (spec.on_byte_grid) {
            rvqkv::round_to_bytes(spec.shape, weights);
        }
        rvqkv::codec_spec of_codec;
        of_codec.head_dim = spec.head_dim;
        of_codec.shape = spec.shape;
        of_codec.scale = spec.scale;
        of_codec.scale_type = spec.scale_type;
        of_codec.grouping = rvqkv::grouping_kind::contiguous;
        const auto codec = rvqkv::make_codec(of_codec, std::span<const float>(weights)).value();
        layout = rvqkv::coded_layout(*codec, spec.heads, spec.page_tokens, spec.shape.depths, 24);
        const std::size_t tiles_of_page = spec.page_tokens / tile_tokens;
        const std::size_t count = (spec.tiles + tiles_of_page - 1) / tiles_of_page;
        for (std::size_t p = 0; p < count; ++p) {
            // A vector of its own for each page, so that a read beyond the end is seen.
            pages.emplace_back(layout.end());
            for (std::byte& byte : pages.back()) {
                byte = static_cast<std::byte>(random.integer(0, 255));
            }
        }
        const std::size_t tokens = count * spec.page_tokens;
        codes.resize(spec.shape.depths * spec.heads * groups() * tokens);
        scales.assign(spec.heads * tokens, 1.0F);
        for (std::size_t h = 0; h < spec.heads; ++h) {
            for (std::size_t g = 0; g < groups(); ++g) {
                for (std::size_t k = 0; k < spec.shape.depths; ++k) {
                    for (std::size_t p = 0; p < count; ++p) {
                        std::vector<code_t> row(spec.page_tokens);
                        for (std::size_t t = 0; t < row.size(); ++t) {
                            row[t] = static_cast<code_t>(random.integer(0, spec.shape.codewords - 1));
                            code(k, h, g, p * row.size() + t) = row[t];
                        }
                        rvqkv::pack_codes(row.data(), row.size(), layout.bits(), pages[p].data() + layout.row(k, h, g));
                    }
                }
            }
            for (std::size_t t = 0; layout.has_scales() && t < tokens; ++t) {
                scales[h * tokens + t] = random.uniform(0.25F, 4.0F);
                std::byte* const at = pages[t / spec.page_tokens].data() + layout.scales(h);
                store_scale(at, t % spec.page_tokens, scales[h * tokens + t]);
            }
        }
        for (std::size_t i = 0; i < spec.tiles; ++i) {
            tiles.push_back({pages[i / tiles_of_page].data(), i % tiles_of_page});
        }
    }

    [[nodiscard]] std::size_t groups() const { return spec.head_dim / spec.shape.dim; }
    [[nodiscard]] std::size_t tokens() const { return spec.tiles * tile_tokens; }
    [[nodiscard]] rvqkv::page_tiles all() const { return {tiles.data(), tiles.size(), 0}; }
    [[nodiscard]] code_t& code(std::size_t k, std::size_t h, std::size_t g, std::size_t t) {
        return codes[((k * spec.heads + h) * groups() + g) * pages.size() * spec.page_tokens + t];
    }
    [[nodiscard]] double scale(std::size_t h, std::size_t t) const {
        return static_cast<double>(scales[h * pages.size() * spec.page_tokens + t]);
    }
    /// A channel as its codes say, without the scale.
    [[nodiscard]] double channel(std::size_t h, std::size_t t, std::size_t i, std::size_t depths) {
        double sum = 0.0;
        for (std::size_t k = 0; k < depths; ++k) {
            sum += weight(k, code(k, h, i / spec.shape.dim, t), i % spec.shape.dim);
        }
        return sum;
    }
    [[nodiscard]] double weight(std::size_t k, std::size_t c, std::size_t j) const {
        return static_cast<double>(weights[(k * spec.shape.codewords + c) * spec.shape.dim + j]);
    }
    void store_scale(std::byte* at, std::size_t token, float& value) const {
        if (spec.scale_type == rvqkv::dtype::float32) {
            std::memcpy(at + 4 * token, &value, 4);
        } else if (spec.scale_type == rvqkv::dtype::float16) {
            const rvqkv::float16 half = rvqkv::to_float16(value);
            std::memcpy(at + 2 * token, &half, 2);
            value = rvqkv::to_float(half);
        } else {
            const rvqkv::bfloat16 half = rvqkv::to_bfloat16(value);
            std::memcpy(at + 2 * token, &half, 2);
            value = rvqkv::to_float(half);
        }
    }

    scene_spec spec;
    std::vector<float> weights;
    rvqkv::coded_layout layout;
    std::vector<std::vector<std::byte>> pages;
    std::vector<code_t> codes;
    std::vector<float> scales;
    std::vector<rvqkv::page_tile> tiles;
};

/// Scratch memory with something else in it.
class scratch_memory {
public:
    explicit scratch_memory(std::size_t bytes) : buffer_(bytes) { std::memset(buffer_.data(), 0xa5, bytes); }
    [[nodiscard]] std::byte* data() { return buffer_.data(); }

private:
    rvqkv::aligned_buffer<std::byte> buffer_;
};

std::vector<float> scores_of(const scene& in, const rvqkv::small_key_tables& keys, const std::vector<float>& queries,
                             std::size_t rows, std::size_t head, std::size_t depths, rvqkv::simd_level level) {
    const rvqkv::kernel_table& kernels = *rvqkv::kernels_for(level).value();
    scratch_memory scratch(keys.scratch_bytes(rows));
    keys.prepare(queries.data(), rows, scratch.data(), kernels);
    std::vector<float> scores(rows * in.tokens(), 99.0F);
    keys.scores(in.all(), in.layout, head, depths, rows, scores.data(), in.tokens(), scratch.data(), kernels);
    return scores;
}

std::vector<float> values_of(const scene& in, const rvqkv::small_value_tables& values,
                             const std::vector<float>& weights, std::size_t rows, std::size_t head, std::size_t depths,
                             rvqkv::simd_level level) {
    const rvqkv::kernel_table& kernels = *rvqkv::kernels_for(level).value();
    scratch_memory scratch(values.scratch_bytes(rows));
    values.begin(rows, scratch.data());
    values.add(in.all(), in.layout, head, depths, weights.data(), in.tokens(), rows, scratch.data(), kernels);
    std::vector<float> out(rows * in.spec.head_dim, 99.0F);
    values.finish(out.data(), rows, scratch.data(), kernels);
    return out;
}

/// Scores and the most that they may be off.
void check_scores(scene& in, const std::vector<float>& queries, const std::vector<float>& scores, std::size_t rows,
                  std::size_t head, std::size_t depths) {
    const auto [all_depths, codewords, dim] = in.spec.shape;
    for (std::size_t v = 0; v < rows; ++v) {
        double widest = 0.0;
        double sum_of_ranges = 0.0;
        double sizes = 0.0;
        for (std::size_t k = 0; k < all_depths; ++k) {
            for (std::size_t g = 0; g < in.groups(); ++g) {
                double low = 1e300;
                double high = -1e300;
                for (std::size_t c = 0; c < codewords; ++c) {
                    double product = 0.0;
                    for (std::size_t j = 0; j < dim; ++j) {
                        product +=
                            in.weight(k, c, j) * static_cast<double>(queries[v * in.spec.head_dim + g * dim + j]);
                    }
                    low = std::min(low, product);
                    high = std::max(high, product);
                }
                widest = std::max(widest, high - low);
                sum_of_ranges += high - low;
                sizes += std::max(std::fabs(low), std::fabs(high));
            }
        }
        const double places = static_cast<double>(all_depths * in.groups());
        const double step = std::max(widest / 1848.0, sum_of_ranges / (65535.0 - places));
        const double used = static_cast<double>(depths * in.groups());
        const double bound = 0.501 * step * used + 1e-5 * sizes;
        double worst = 0.0;
        for (std::size_t t = 0; t < in.tokens(); ++t) {
            double exact = 0.0;
            for (std::size_t i = 0; i < in.spec.head_dim; ++i) {
                exact += in.channel(head, t, i, depths) * static_cast<double>(queries[v * in.spec.head_dim + i]);
            }
            const double error = static_cast<double>(scores[v * in.tokens() + t]) / in.scale(head, t) - exact;
            worst = std::max(worst, std::isnan(error) ? 1e300 : std::fabs(error));
        }
        CAPTURE(v, step);
        REQUIRE(worst <= bound);
    }
}

/// Sums and the most that they may be off.
void check_values(scene& in, const std::vector<float>& weights, const std::vector<float>& out, std::size_t rows,
                  std::size_t head, std::size_t depths) {
    const auto [all_depths, codewords, dim] = in.spec.shape;
    std::vector<double> steps(dim, 0.0);  // at most: if all depths were one plane
    for (std::size_t j = 0; j < dim; ++j) {
        for (std::size_t k = 0; k < all_depths; ++k) {
            double low = 1e300;
            double high = -1e300;
            for (std::size_t c = 0; c < codewords; ++c) {
                low = std::min(low, in.weight(k, c, j));
                high = std::max(high, in.weight(k, c, j));
            }
            steps[j] += (high - low) / 2.0 / (127.0 - 0.5 * static_cast<double>(all_depths));
        }
    }
    for (std::size_t v = 0; v < rows; ++v) {
        double total = 0.0;
        double lost = 0.0;
        const std::size_t block = rvqkv::scan_block * tile_tokens;
        for (std::size_t t = 0; t < in.tokens(); ++t) {
            double most = 0.0;  // of those that share a step
            for (std::size_t other = t / block * block + t % tile_tokens / 4 * 4;
                 other < in.tokens() && other < (t / block + 1) * block;
                 other += other % 4 == 3 ? tile_tokens - 3 : 1) {
                most = std::max(most, static_cast<double>(weights[v * in.tokens() + other]) * in.scale(head, other));
            }
            lost += 0.501 * most / 255.0;
            total += static_cast<double>(weights[v * in.tokens() + t]) * in.scale(head, t);
        }
        for (std::size_t i = 0; i < in.spec.head_dim; ++i) {
            double exact = 0.0;
            for (std::size_t t = 0; t < in.tokens(); ++t) {
                exact += static_cast<double>(weights[v * in.tokens() + t]) * in.scale(head, t) *
                         in.channel(head, t, i, depths);
            }
            const double step = steps[i % dim];
            const double bound =
                total * step * (static_cast<double>(all_depths) + 0.001) + lost * 127.0 * 3.0 * step + 1e-5 * total;
            CAPTURE(v, i, total);
            REQUIRE(std::fabs(static_cast<double>(out[v * in.spec.head_dim + i]) - exact) <= bound);
        }
    }
}

/// The bounds that the tables give of themselves.
void check_worst_errors(scene& in, const rvqkv::small_key_tables& keys, const rvqkv::small_value_tables& values,
                        const std::vector<float>& queries, const std::vector<float>& scores, std::size_t head,
                        std::size_t depths) {
    double largest = 0.0;
    for (std::size_t i = 0; i < in.spec.head_dim; ++i) {
        largest = std::max(largest, std::fabs(static_cast<double>(queries[i])));
    }
    for (std::size_t t = 0; t < in.tokens(); ++t) {
        double exact = 0.0;
        for (std::size_t i = 0; i < in.spec.head_dim; ++i) {
            exact += in.channel(head, t, i, depths) * static_cast<double>(queries[i]);
        }
        const double error = static_cast<double>(scores[t]) / in.scale(head, t) - exact;
        REQUIRE(std::fabs(error) <= static_cast<double>(keys.worst_error(depths)) * largest);
    }
    // A token that has all the weight comes out as it is.
    std::vector<float> weights(in.tokens(), 0.0F);
    weights[5] = 1.0F;
    const auto out = values_of(in, values, weights, 1, head, depths, rvqkv::simd_level::generic);
    for (std::size_t i = 0; i < in.spec.head_dim; ++i) {
        const double error = static_cast<double>(out[i]) / in.scale(head, 5) - in.channel(head, 5, i, depths);
        REQUIRE(std::fabs(error) <= static_cast<double>(values.worst_error()) + 1e-5);
    }
}

std::vector<float> random_weights(test::random_source& random, std::size_t count) {
    std::vector<float> weights(count);
    for (float& weight : weights) {
        weight = random.integer(0, 9) == 0 ? 0.0F : std::exp(2.0F * random.gaussian());
    }
    return weights;
}

/// Everything about one shape.
void check_scene(test::random_source& random, const scene_spec& spec, std::size_t rows, std::size_t depths) {
    scene in(random, spec);
    CAPTURE(spec.shape.depths, spec.shape.codewords, spec.shape.dim, spec.head_dim, rows, depths, spec.page_tokens,
            spec.tiles);
    const auto keys =
        rvqkv::small_key_tables::create(spec.shape, std::span<const float>(in.weights), spec.head_dim).value();
    const auto values =
        rvqkv::small_value_tables::create(spec.shape, std::span<const float>(in.weights), spec.head_dim).value();
    const std::vector<float> queries = test::gaussian_numbers(random, rows * spec.head_dim);
    const std::vector<float> weights = random_weights(random, rows * in.tokens());
    const std::size_t head = spec.heads - 1;
    const auto scores = scores_of(in, keys, queries, rows, head, depths, rvqkv::simd_level::generic);
    check_scores(in, queries, scores, rows, head, depths);
    check_worst_errors(in, keys, values, queries, scores, head, depths);
    const auto sums = values_of(in, values, weights, rows, head, depths, rvqkv::simd_level::generic);
    check_values(in, weights, sums, rows, head, depths);
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        REQUIRE(test::bits_of(scores_of(in, keys, queries, rows, head, depths, level)) == test::bits_of(scores));
        REQUIRE(test::bits_of(values_of(in, values, weights, rows, head, depths, level)) == test::bits_of(sums));
    }
}

}  // namespace

TEST_CASE("small tables: every width of codes, every number of rows", "[attend][differential]") {
    CAPTURE(test::seed());
    test::random_source random(1);
    std::size_t rows = 1;
    for (const std::size_t codewords : {1U, 2U, 3U, 5U, 15U, 16U, 17U, 33U, 64U, 65U, 100U, 128U, 129U, 200U, 256U}) {
        scene_spec spec;
        spec.shape = {3, codewords, 8};
        check_scene(random, spec, rows, 3);
        rows = rows % 9 + 1;
    }
}

TEST_CASE("small tables: head sizes, group sizes, pages, depths fewer than stored", "[attend][differential]") {
    CAPTURE(test::seed());
    test::random_source random(2);
    const codebook_shape shapes[] = {{3, 128, 8}, {3, 16, 4},  {5, 16, 8}, {1, 40, 16},
                                     {2, 256, 2}, {4, 20, 32}, {6, 9, 1},  {16, 4, 8}};
    for (const codebook_shape& shape : shapes) {
        for (const std::size_t head_dim : {32U, 64U, 128U, 256U}) {
            scene_spec spec;
            spec.shape = shape;
            spec.head_dim = head_dim;
            spec.heads = random.integer(1, 3);
            spec.page_tokens = 64 * random.integer(1, 4);
            spec.tiles = random.integer(1, head_dim == 64 ? 21 : 6);
            check_scene(random, spec, random.integer(1, 5), random.integer(1, shape.depths));
        }
    }
}

TEST_CASE("small tables: groups of odd channels, and many planes", "[attend][differential]") {
    CAPTURE(test::seed());
    test::random_source random(3);
    const codebook_shape shapes[] = {{1, 30, 3}, {2, 100, 5}, {3, 12, 7}, {6, 128, 3}, {9, 16, 6}};
    for (const codebook_shape& shape : shapes) {
        scene_spec spec;
        spec.shape = shape;
        spec.head_dim = shape.dim * 9;
        check_scene(random, spec, 3, shape.depths);
    }
}

TEST_CASE("small tables: codebooks on a byte grid are read exactly, by one plane", "[attend][differential]") {
    CAPTURE(test::seed());
    test::random_source random(13);
    const codebook_shape shapes[] = {{3, 128, 8}, {3, 16, 4}, {5, 16, 8},  {1, 40, 16}, {2, 256, 2},
                                     {6, 9, 1},   {16, 4, 8}, {6, 128, 3}, {4, 64, 8}};
    for (const codebook_shape& shape : shapes) {
        scene_spec spec;
        spec.shape = shape;
        spec.head_dim = shape.dim * 9;
        spec.tiles = 18;
        spec.on_byte_grid = true;
        scene in(random, spec);
        const auto values =
            rvqkv::small_value_tables::create(shape, std::span<const float>(in.weights), spec.head_dim).value();
        CHECK(values.planes() == 1);
        CHECK(values.error() == 0.0F);
        CHECK(values.worst_error() == 0.0F);
        check_scene(random, spec, random.integer(1, 9), random.integer(1, shape.depths));
        // One number off the grid, and all channels are rounded as others are.
        in.weights[shape.size() / 2] += 0.3F;
        CHECK(rvqkv::small_value_tables::create(shape, std::span<const float>(in.weights), spec.head_dim)
                  .value()
                  .worst_error() > 0.0F);
    }
}

TEST_CASE("small tables: scales of every type, and none", "[attend][differential]") {
    CAPTURE(test::seed());
    test::random_source random(4);
    for (const rvqkv::dtype type : {rvqkv::dtype::float32, rvqkv::dtype::float16, rvqkv::dtype::bfloat16}) {
        for (const rvqkv::scale_kind kind : {rvqkv::scale_kind::rms, rvqkv::scale_kind::none}) {
            scene_spec spec;
            spec.shape = {3, 16, 4};
            spec.head_dim = 32;
            spec.scale = kind;
            spec.scale_type = type;
            spec.page_tokens = 128;
            spec.tiles = 5;
            check_scene(random, spec, 4, 3);
        }
    }
}

TEST_CASE("small tables: attention on random codebooks is off by less than a hundredth", "[attend][differential]") {
    CAPTURE(test::seed());
    test::random_source random(5);
    const codebook_shape shapes[] = {{3, 128, 8}, {3, 16, 4}, {5, 16, 8}};
    for (const codebook_shape& shape : shapes) {
        scene_spec spec;
        spec.shape = shape;
        spec.head_dim = 128;
        spec.heads = 1;
        spec.page_tokens = 256;
        spec.tiles = 32;
        scene in(random, spec);
        const auto keys = rvqkv::small_key_tables::create(shape, std::span<const float>(in.weights), 128).value();
        const auto values = rvqkv::small_value_tables::create(shape, std::span<const float>(in.weights), 128).value();
        CHECK(values.error() <= rvqkv::small_value_tables::most_error);
        const rvqkv::simd_level level = test::levels().back();
        std::vector<float> queries = test::gaussian_numbers(random, 4 * 128);
        for (float& number : queries) {
            number *= 0.07F;
        }
        std::vector<float> weights = scores_of(in, keys, queries, 4, 0, shape.depths, level);
        std::vector<double> exact(4 * 128, 0.0);
        for (std::size_t v = 0; v < 4; ++v) {
            double sum = 0.0;
            for (std::size_t t = 0; t < in.tokens(); ++t) {
                double score = 0.0;
                for (std::size_t i = 0; i < 128; ++i) {
                    score += in.channel(0, t, i, shape.depths) * static_cast<double>(queries[v * 128 + i]);
                }
                const double weight = std::exp(score * in.scale(0, t));
                sum += weight;
                for (std::size_t i = 0; i < 128; ++i) {
                    exact[v * 128 + i] += weight * in.scale(0, t) * in.channel(0, t, i, shape.depths);
                }
            }
            float total = 0.0F;
            for (std::size_t t = 0; t < in.tokens(); ++t) {
                weights[v * in.tokens() + t] = std::exp(weights[v * in.tokens() + t]);
                total += weights[v * in.tokens() + t];
            }
            for (std::size_t t = 0; t < in.tokens(); ++t) {
                weights[v * in.tokens() + t] /= total;
            }
            for (std::size_t i = 0; i < 128; ++i) {
                exact[v * 128 + i] /= sum;
            }
        }
        const std::vector<float> out = values_of(in, values, weights, 4, 0, shape.depths, level);
        double errors = 0.0;
        double squares = 0.0;
        for (std::size_t i = 0; i < exact.size(); ++i) {
            const double error = static_cast<double>(out[i]) - exact[i];
            errors += error * error;
            squares += exact[i] * exact[i];
        }
        CAPTURE(shape.codewords, shape.depths, values.planes());
        CHECK(std::sqrt(errors / squares) < 0.01);
    }
}

TEST_CASE("small tables: reading tile by tile gives what reading at once gives", "[attend][property]") {
    CAPTURE(test::seed());
    test::random_source random(6);
    scene_spec spec;
    spec.shape = {3, 128, 8};
    spec.page_tokens = 128;
    spec.tiles = 11;
    scene in(random, spec);
    const auto keys = rvqkv::small_key_tables::create(spec.shape, std::span<const float>(in.weights), 64).value();
    const std::vector<float> queries = test::gaussian_numbers(random, 2 * 64);
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        const rvqkv::kernel_table& kernels = *rvqkv::kernels_for(level).value();
        const auto at_once = scores_of(in, keys, queries, 2, 1, 2, level);
        scratch_memory scratch(keys.scratch_bytes(2));
        keys.prepare(queries.data(), 2, scratch.data(), kernels);
        for (const std::size_t step : {1U, 2U, 5U}) {
            std::vector<float> scores(at_once.size());
            for (std::size_t first = 0; first < spec.tiles; first += step) {
                keys.scores(in.all().part(first, step), in.layout, 1, 2, 2, scores.data() + first * tile_tokens,
                            in.tokens(), scratch.data(), kernels);
            }
            CHECK(test::bits_of(scores) == test::bits_of(at_once));
        }
    }
}

TEST_CASE("small tables: sums go on, are rescaled, and finish as often as wanted", "[attend][property]") {
    CAPTURE(test::seed());
    test::random_source random(7);
    scene_spec spec;
    spec.shape = {3, 100, 8};
    spec.tiles = 8;
    scene in(random, spec);
    const auto values = rvqkv::small_value_tables::create(spec.shape, std::span<const float>(in.weights), 64).value();
    const std::vector<float> weights = random_weights(random, 3 * in.tokens());
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        const rvqkv::kernel_table& kernels = *rvqkv::kernels_for(level).value();
        const float factors[] = {0.5F, 0.25F, 2.0F};
        scratch_memory scratch(values.scratch_bytes(3));
        std::vector<float> out(3 * 64);
        const auto sum = [&](const std::vector<float>& by, bool rescaled) {
            values.begin(3, scratch.data());
            for (const std::size_t first : {0U, 4U}) {
                values.add(in.all().part(first, 4), in.layout, 0, 3, by.data() + first * tile_tokens, in.tokens(), 3,
                           scratch.data(), kernels);
                if (first == 0 && rescaled) {
                    values.rescale(factors, 3, scratch.data(), kernels);
                }
            }
            values.finish(out.data(), 3, scratch.data(), kernels);
            return out;
        };
        const std::vector<float> once = sum(weights, false);
        // Powers of two are exact: the second half comes with factors of its own.
        std::vector<float> scaled = weights;
        for (std::size_t v = 0; v < 3; ++v) {
            for (std::size_t t = 0; t < 4 * tile_tokens; ++t) {
                scaled[v * in.tokens() + t] *= factors[v];
            }
        }
        const std::vector<float> expected = sum(scaled, false);
        CHECK(test::bits_of(sum(weights, true)) == test::bits_of(expected));
        values.finish(out.data(), 3, scratch.data(), kernels);
        CHECK(test::bits_of(out) == test::bits_of(expected));
        CHECK(test::bits_of(out) != test::bits_of(once));
    }
}

TEST_CASE("small tables: tokens without weight count for nothing, whatever their scale", "[attend][unit]") {
    test::random_source random(8);
    scene_spec spec;
    spec.shape = {2, 16, 4};
    spec.heads = 1;
    scene in(random, spec);
    const auto values = rvqkv::small_value_tables::create(spec.shape, std::span<const float>(in.weights), 64).value();
    std::vector<float> weights = random_weights(random, in.tokens());
    weights[70] = 0.0F;
    weights[0] = 0.0F;
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        const std::vector<float> before = values_of(in, values, weights, 1, 0, 2, level);
        scene damaged = in;
        for (std::size_t i = 0; i < damaged.tiles.size(); ++i) {
            damaged.tiles[i].page = damaged.pages[i].data();
        }
        float nan = std::numeric_limits<float>::quiet_NaN();
        float infinity = std::numeric_limits<float>::infinity();
        damaged.store_scale(damaged.pages[1].data() + damaged.layout.scales(0), 6, nan);
        damaged.store_scale(damaged.pages[0].data() + damaged.layout.scales(0), 0, infinity);
        CHECK(test::bits_of(values_of(damaged, values, weights, 1, 0, 2, level)) == test::bits_of(before));
    }
}

TEST_CASE("small tables: NaN and infinity come out as NaN", "[attend][unit]") {
    test::random_source random(9);
    scene_spec spec;
    spec.shape = {2, 128, 8};
    scene in(random, spec);
    const auto keys = rvqkv::small_key_tables::create(spec.shape, std::span<const float>(in.weights), 64).value();
    const auto values = rvqkv::small_value_tables::create(spec.shape, std::span<const float>(in.weights), 64).value();
    const auto are_nan = [](std::span<const float> numbers) {
        return std::all_of(numbers.begin(), numbers.end(), [](float number) { return std::isnan(number); });
    };
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
            std::vector<float> queries(2 * 64, 0.5F);
            queries[64 + 9] = bad;
            const std::vector<float> scores = scores_of(in, keys, queries, 2, 0, 2, level);
            const auto first = std::span(scores).first(in.tokens());
            CHECK(std::none_of(first.begin(), first.end(), [](float score) { return std::isnan(score); }));
            CHECK(are_nan(std::span(scores).subspan(in.tokens())));
        }
        std::vector<float> weights(2 * in.tokens(), 0.5F);
        weights[in.tokens() + 9] = std::numeric_limits<float>::quiet_NaN();
        const std::vector<float> out = values_of(in, values, weights, 2, 0, 2, level);
        CHECK(std::none_of(out.begin(), out.begin() + 64, [](float number) { return std::isnan(number); }));
        CHECK(are_nan(std::span(out).subspan(64)));
    }
}

TEST_CASE("small tables: queries and weights of zero", "[attend][unit]") {
    test::random_source random(10);
    scene_spec spec;
    spec.shape = {2, 128, 8};
    scene in(random, spec);
    const auto keys = rvqkv::small_key_tables::create(spec.shape, std::span<const float>(in.weights), 64).value();
    const auto values = rvqkv::small_value_tables::create(spec.shape, std::span<const float>(in.weights), 64).value();
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        for (const float score : scores_of(in, keys, std::vector<float>(64, 0.0F), 1, 0, 2, level)) {
            REQUIRE(score == 0.0F);
        }
        for (const float sum : values_of(in, values, std::vector<float>(in.tokens(), 0.0F), 1, 0, 2, level)) {
            REQUIRE(sum == 0.0F);
        }
    }
}

TEMPLATE_TEST_CASE("small tables: weights of every type", "[attend][unit]", rvqkv::float16, rvqkv::bfloat16) {
    CAPTURE(test::seed());
    test::random_source random(11);
    scene_spec spec;
    spec.shape = {3, 50, 4};
    scene in(random, spec);
    std::vector<TestType> weights;
    for (float& weight : in.weights) {
        weights.push_back(rvqkv::float_to<TestType>(weight));
        weight = rvqkv::to_float(weights.back());
    }
    const auto keys = rvqkv::small_key_tables::create(spec.shape, std::span<const TestType>(weights), 64).value();
    const auto same = rvqkv::small_key_tables::create(spec.shape, std::span<const float>(in.weights), 64).value();
    const std::vector<float> queries = test::gaussian_numbers(random, 64);
    const rvqkv::simd_level level = test::levels().back();
    CHECK(scores_of(in, keys, queries, 1, 0, 3, level) == scores_of(in, same, queries, 1, 0, 3, level));
    const auto values = rvqkv::small_value_tables::create(spec.shape, std::span<const TestType>(weights), 64).value();
    const auto same_values =
        rvqkv::small_value_tables::create(spec.shape, std::span<const float>(in.weights), 64).value();
    const std::vector<float> row(in.tokens(), 0.25F);
    CHECK(values_of(in, values, row, 1, 0, 3, level) == values_of(in, same_values, row, 1, 0, 3, level));
}

TEST_CASE("small tables: what they serve, and what they refuse", "[attend][unit]") {
    CHECK(rvqkv::small_key_tables::supports({3, 128, 8}));
    CHECK(rvqkv::small_value_tables::supports({16, 256, 1}));
    CHECK_FALSE(rvqkv::small_key_tables::supports({3, 257, 8}));
    CHECK_FALSE(rvqkv::small_key_tables::supports({17, 16, 8}));
    CHECK_FALSE(rvqkv::small_value_tables::supports({0, 16, 8}));
    const std::vector<float> weights(3 * 257 * 8, 0.0F);
    const auto create = [&](const codebook_shape& shape, std::size_t count, std::size_t head_dim) {
        return rvqkv::small_key_tables::create(shape, std::span(weights).first(count), head_dim);
    };
    REQUIRE_FALSE(create({3, 257, 8}, weights.size(), 64).ok());
    CHECK(create({3, 257, 8}, weights.size(), 64).error().code == rvqkv::error_code::unsupported);
    CHECK(create({3, 257, 8}, weights.size(), 64).error().message == "small tables hold 1 to 256 codewords, not 257");
    CHECK(create({17, 2, 8}, 272, 64).error().message == "small tables hold 1 to 16 depths, not 17");
    CHECK(create({3, 16, 8}, 384, 60).error().message == "head_dim 60 is not a multiple of the codebook's dim 8");
    CHECK(create({3, 16, 8}, 383, 64).error().message == "there are 383 weights, must be 384");
    const auto values = rvqkv::small_value_tables::create({3, 16, 8}, std::span(weights).first(383), 64);
    REQUIRE_FALSE(values.ok());
    CHECK(values.error().code == rvqkv::error_code::invalid_argument);
}
