// SPDX-License-Identifier: MIT
/// @file
/// Attention over pages of codes and exact tokens against a plain one in double: every state of the keys, every option,
/// runs that begin and end anywhere, at every SIMD level.
#include "rvqkv/attend/layer_attention.hpp"

#include "rvqkv/core/thread_pool.hpp"
#include "support/allocation_counter.hpp"
#include "support/attention_oracle.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace {

using rvqkv::key_coding;

constexpr key_coding all_codings[] = {key_coding::as_given, key_coding::before_rope, key_coding::after_rope,
                                      key_coding::block_relative};

rvqkv::codec_spec spec_of(std::size_t head_dim, rvqkv::codebook_shape shape) {
    rvqkv::codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = shape;
    return spec;
}

/// 2 KV heads of 16 key and 8 value channels, 4 query heads.
rvqkv::kv_layer_config small_config(test::random_source& random, key_coding coding) {
    rvqkv::kv_layer_config config;
    config.keys = {test::random_codec(random, spec_of(16, {3, 20, 4})), 2};
    config.values = {test::random_codec(random, spec_of(8, {2, 16, 8})), 2};
    config.query_heads = 4;
    config.coding = coding;
    config.rope.base = 100.0;
    return config;
}

/// Sinks, a page of codes, one cut at both ends, recent tokens: positions from `first` on without a gap.
void add_usual_runs(test::layer_pages& pages, std::int64_t first) {
    const std::size_t key_depths = pages.config().keys.codec->depths();
    const std::size_t value_depths = pages.config().values.codec->depths();
    pages.add_exact(4, 0, 4, rvqkv::dtype::bfloat16, first, first);
    pages.add_coded(64, 0, 64, first + 4, first + 4, key_depths, value_depths);
    pages.add_coded(192, 37, 110, first + 68, first - 3, std::max<std::size_t>(1, key_depths - 1), value_depths);
    pages.add_exact(64, 10, 41, rvqkv::dtype::float16, first + 178, first + 170);
}
constexpr std::size_t usual_tokens = 219;

std::vector<float> random_queries(test::layer_pages& pages, std::size_t tokens) {
    const std::size_t heads = pages.config().query_heads == 0 ? pages.config().keys.heads : pages.config().query_heads;
    return test::gaussian_numbers(pages.random(), tokens * heads * pages.config().keys.codec->head_dim());
}

struct result {
    std::vector<float> out;
    std::vector<float> log_sum_exp;
};

result attend(const rvqkv::layer_attention& attention, std::span<const rvqkv::page_run> runs,
              const std::vector<float>& queries, std::size_t tokens, std::int64_t first_position,
              const rvqkv::attention_options& options = {}) {
    const std::size_t heads = attention.query_heads();
    result got{std::vector<float>(tokens * heads * attention.value_dim(), 99.0F), std::vector<float>(tokens * heads)};
    rvqkv::attention_workspace workspace;
    attention
        .attend_partial(runs, {queries.data(), {tokens, heads, attention.key_dim()}}, first_position,
                        {got.out.data(), {tokens, heads, attention.value_dim()}}, got.log_sum_exp, workspace, options)
        .value();
    return got;
}

void check_answer(const result& got, const test::attention_answer& expected) {
    REQUIRE(got.out.size() == expected.out.size());
    double worst = 0.0;
    for (std::size_t i = 0; i < got.out.size(); ++i) {
        const double error = std::fabs(static_cast<double>(got.out[i]) - expected.out[i]);
        worst = error <= worst ? worst : error;  // a NaN is the worst
    }
    CHECK(worst <= expected.tolerance);
    for (std::size_t i = 0; i < got.log_sum_exp.size(); ++i) {
        if (std::isinf(expected.log_sum_exp[i])) {
            CHECK(got.log_sum_exp[i] == -std::numeric_limits<float>::infinity());
        } else {
            CHECK(std::fabs(static_cast<double>(got.log_sum_exp[i]) - expected.log_sum_exp[i]) <=
                  expected.score_tolerance * 2);
        }
    }
}

/// At every SIMD level.
void check_attention(test::layer_pages& pages, std::size_t query_tokens, std::int64_t first_position,
                     const rvqkv::attention_options& options = {}) {
    const std::vector<float> queries = random_queries(pages, query_tokens);
    const test::attention_answer expected =
        test::oracle_attention(pages, queries, query_tokens, first_position, options);
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        const auto attention =
            rvqkv::layer_attention::create(pages.config(), *rvqkv::kernels_for(level).value()).value();
        check_answer(attend(attention, pages.runs(), queries, query_tokens, first_position, options), expected);
    }
}

}  // namespace

TEST_CASE("layer_attention: gives what plain attention gives, in every state of the keys", "[attend][differential]") {
    CAPTURE(test::seed());
    test::random_source random(1);
    for (const key_coding coding : all_codings) {
        for (const bool turned_input : {true, false}) {
            for (const bool has_mean : {false, true}) {
                rvqkv::kv_layer_config config = small_config(random, coding);
                config.turned_input = turned_input;
                if (has_mean) {
                    config.key_mean = test::gaussian_numbers(random, 2 * 16);
                }
                CAPTURE(static_cast<int>(coding), turned_input, has_mean);
                test::layer_pages pages(config, 2);
                add_usual_runs(pages, 5);
                check_attention(pages, 1, 5 + usual_tokens);
                check_attention(pages, 3, 5 + usual_tokens - 3);
            }
        }
    }
}

TEST_CASE("layer_attention: random shapes, forms of rotary embedding and options", "[attend][differential]") {
    CAPTURE(test::seed());
    test::random_source random(3);
    constexpr std::size_t dims[] = {2, 8, 16, 24, 40, 64, 80, 128};
    for (std::size_t round = 0; round < test::rounds(60); ++round) {
        rvqkv::kv_layer_config config;
        const auto side = [&] {
            rvqkv::codec_spec spec;
            spec.head_dim = dims[random.integer(0, 7)];
            do {
                spec.shape.dim = std::size_t{1} << random.integer(0, 5);
            } while (spec.head_dim % spec.shape.dim != 0);
            spec.shape.depths = random.integer(1, 4);
            spec.shape.codewords = random.integer(1, round % 4 == 0 ? 600 : 40);
            spec.grouping = static_cast<rvqkv::grouping_kind>(random.integer(0, 2));
            if (spec.grouping == rvqkv::grouping_kind::permuted) {
                for (std::size_t i = 0; i < spec.head_dim; ++i) {
                    spec.permutation.push_back(static_cast<std::uint16_t>(i));
                }
                std::shuffle(spec.permutation.begin(), spec.permutation.end(), random.engine());
            }
            spec.scale = random.integer(0, 3) == 0 ? rvqkv::scale_kind::none : rvqkv::scale_kind::rms;
            spec.scale_type = static_cast<rvqkv::dtype>(random.integer(0, 2));
            spec.weight_type = static_cast<rvqkv::dtype>(random.integer(0, 2));
            return test::random_codec(random, spec);
        };
        const std::size_t heads = random.integer(1, 3);
        config.keys = {side(), heads};
        config.values = {side(), heads};
        config.query_heads = random.integer(0, 3) == 0 ? 0 : heads * random.integer(1, 9);
        config.coding = all_codings[random.integer(0, 3)];
        config.turned_input = random.integer(0, 1) == 0;
        config.sliding_window = random.integer(0, 2) == 0 ? random.integer(1, 250) : 0;
        config.rope.pairs = static_cast<rvqkv::rope_pairs>(random.integer(0, 1));
        const std::size_t key_dim = config.keys.codec->head_dim();
        config.rope.dims = random.integer(0, 1) == 0 ? 0 : 2 * random.integer(1, key_dim / 2);
        config.rope.attention_factor = random.integer(0, 1) == 0 ? 1.0 : 0.9;
        if (random.integer(0, 1) == 0) {
            config.key_mean = test::gaussian_numbers(random, heads * key_dim);
        }
        const std::size_t query_heads = config.query_heads == 0 ? heads : config.query_heads;
        rvqkv::attention_options options;
        std::vector<float> slopes;
        std::vector<float> sinks;
        if (random.integer(0, 3) == 0) {
            slopes = test::gaussian_numbers(random, query_heads);
            for (float& slope : slopes) {
                slope = std::fabs(slope) * 0.1F;
            }
            options.alibi_slopes = slopes;
        }
        if (random.integer(0, 3) == 0) {
            sinks = test::gaussian_numbers(random, query_heads);
            options.sink_logits = sinks;
        }
        options.soft_cap = random.integer(0, 3) == 0 ? 2.0F : 0.0F;
        options.scale = random.integer(0, 1) == 0 ? 0.0F : 0.05F;
        options.causal = random.integer(0, 3) != 0;
        CAPTURE(round, heads, query_heads, key_dim, config.values.codec->head_dim(), static_cast<int>(config.coding),
                config.turned_input, config.sliding_window, static_cast<int>(config.rope.pairs), config.rope.dims,
                config.key_mean.size(), slopes.size(), sinks.size(), options.soft_cap, options.causal);

        test::layer_pages pages(config, 100 + round);
        std::int64_t position = static_cast<std::int64_t>(random.integer(0, 100000)) - 1000;
        const std::int64_t start = position;
        for (std::size_t run = 0; run < 6; ++run) {
            const std::size_t page_tokens = 64 * random.integer(1, 4);
            const std::size_t first = random.integer(0, page_tokens - 1);
            const std::size_t count = random.integer(run == 0 ? 1 : 0, page_tokens - first);
            const std::int64_t coded = static_cast<std::int64_t>(random.integer(0, 2) == 0 ? 0 : first);
            const std::int64_t coded_position = random.integer(0, 1) == 0 ? position : coded;
            if (random.integer(0, 1) == 0) {
                pages.add_exact(page_tokens, first, count,
                                random.integer(0, 1) == 0 ? rvqkv::dtype::float16 : rvqkv::dtype::bfloat16, position,
                                coded_position);
            } else {
                pages.add_coded(page_tokens, first, count, position, coded_position,
                                random.integer(1, config.keys.codec->depths()),
                                random.integer(1, config.values.codec->depths()));
            }
            position += static_cast<std::int64_t>(count + random.integer(0, 1) * 20);
        }
        const std::size_t query_tokens = random.integer(1, 5);
        const std::int64_t newest = random.integer(0, 3) == 0 ? start + 20 : position - 2;
        check_attention(pages, query_tokens, newest, options);
    }
}
