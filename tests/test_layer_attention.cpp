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

using rvqkv::code_reading;
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

void check_answer(const result& got, const test::attention_answer& expected, code_reading reading) {
    const bool is_rounded = reading == code_reading::quickest;
    const double tolerance = is_rounded ? expected.table_tolerance : expected.tolerance;
    const double score_tolerance = is_rounded ? expected.table_score_tolerance : expected.score_tolerance;
    REQUIRE(got.out.size() == expected.out.size());
    double worst = 0.0;
    for (std::size_t i = 0; i < got.out.size(); ++i) {
        const double error = std::fabs(static_cast<double>(got.out[i]) - expected.out[i]);
        worst = error <= worst ? worst : error;  // a NaN is the worst
    }
    CHECK(worst <= tolerance);
    for (std::size_t i = 0; i < got.log_sum_exp.size(); ++i) {
        if (std::isinf(expected.log_sum_exp[i])) {
            CHECK(got.log_sum_exp[i] == -std::numeric_limits<float>::infinity());
        } else {
            CHECK(std::fabs(static_cast<double>(got.log_sum_exp[i]) - expected.log_sum_exp[i]) <= score_tolerance * 2);
        }
    }
}

/// At every SIMD level, however codes are read.
void check_attention(test::layer_pages& pages, std::size_t query_tokens, std::int64_t first_position,
                     rvqkv::attention_options options = {}) {
    const std::vector<float> queries = random_queries(pages, query_tokens);
    const test::attention_answer expected =
        test::oracle_attention(pages, queries, query_tokens, first_position, options);
    for (const rvqkv::simd_level level : test::levels()) {
        CAPTURE(rvqkv::name_of(level));
        const auto attention =
            rvqkv::layer_attention::create(pages.config(), *rvqkv::kernels_for(level).value()).value();
        for (const code_reading reading : {code_reading::quickest, code_reading::reconstructed}) {
            CAPTURE(static_cast<int>(reading));
            options.reading = reading;
            check_answer(attend(attention, pages.runs(), queries, query_tokens, first_position, options), expected,
                         reading);
        }
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

TEST_CASE("layer_attention: parts merge into the whole, and a sink counts once", "[attend][differential]") {
    CAPTURE(test::seed());
    test::random_source random(4);
    test::layer_pages pages(small_config(random, key_coding::after_rope), 5);
    add_usual_runs(pages, 0);
    const std::vector<float> queries = random_queries(pages, 2);
    const std::vector<float> sinks = {1.0F, 0.5F, -1.0F, 2.0F};
    rvqkv::attention_options with_sink;
    with_sink.sink_logits = sinks;
    const auto expected = test::oracle_attention(pages, queries, 2, usual_tokens, with_sink);
    const auto attention = rvqkv::layer_attention::create(pages.config()).value();
    result merged = attend(attention, pages.runs().subspan(0, 2), queries, 2, usual_tokens, with_sink);
    const result rest = attend(attention, pages.runs().subspan(2), queries, 2, usual_tokens);
    const rvqkv::tensor_shape shape{2, 4, 8};
    rvqkv::merge_partial({merged.out.data(), shape}, merged.log_sum_exp, {rest.out.data(), shape}, rest.log_sum_exp)
        .value();
    check_answer(merged, expected, code_reading::quickest);
}

TEST_CASE("layer_attention: a hook sees every score and may change or mask it", "[attend][unit]") {
    CAPTURE(test::seed());
    test::random_source random(6);
    test::layer_pages pages(small_config(random, key_coding::before_rope), 7);
    add_usual_runs(pages, 0);
    const std::vector<float> queries = random_queries(pages, 2);
    const auto attention = rvqkv::layer_attention::create(pages.config()).value();
    struct seen_scores {
        std::size_t scores = 0;
        bool in_place = true;
    } seen;
    rvqkv::attention_options options;
    options.reading = code_reading::reconstructed;
    options.hook.context = &seen;
    options.hook.edit = [](void* context, const rvqkv::score_block& block) {
        auto& record = *static_cast<seen_scores*>(context);
        record.scores += block.tokens;
        record.in_place = record.in_place && block.query_head < 4 && block.query_token < 2 &&
                          block.query_position == static_cast<std::int64_t>(usual_tokens + block.query_token);
        for (std::size_t i = 0; i < block.tokens; ++i) {
            // All but the token at position 100, of which the score does not matter then.
            block.scores[i] = block.key_position + static_cast<std::int64_t>(i) == 100
                                  ? block.scores[i]
                                  : -std::numeric_limits<float>::infinity();
        }
    };
    const result got = attend(attention, pages.runs(), queries, 2, usual_tokens, options);
    CHECK(seen.scores == 2 * 4 * usual_tokens);
    CHECK(seen.in_place);
    for (std::size_t i = 0; i < got.out.size(); ++i) {
        const std::size_t head = i / 8 % 4;
        CHECK(static_cast<double>(got.out[i]) == Approx(pages.tokens()[100].values[head / 2][i % 8]).epsilon(1e-6));
    }
}

TEST_CASE("layer_attention: queries that see no token give zeros", "[attend][unit]") {
    CAPTURE(test::seed());
    test::random_source random(8);
    test::layer_pages pages(small_config(random, key_coding::as_given), 9);
    add_usual_runs(pages, 10);
    const std::vector<float> queries = random_queries(pages, 2);
    const auto attention = rvqkv::layer_attention::create(pages.config()).value();
    for (const auto runs : {pages.runs(), pages.runs().subspan(0, 0)}) {
        const result got = attend(attention, runs, queries, 2, 3);
        CHECK(got.out == std::vector<float>(2 * 4 * 8, 0.0F));
        CHECK(got.log_sum_exp == std::vector<float>(8, -std::numeric_limits<float>::infinity()));
    }
    const result none = attend(attention, pages.runs(), {}, 0, 3);
    CHECK(none.out.empty());
}

TEST_CASE("layer_attention: a query that is not finite spoils no other", "[attend][unit]") {
    CAPTURE(test::seed());
    test::random_source random(10);
    for (const key_coding coding : all_codings) {
        test::layer_pages pages(small_config(random, coding), 11);
        add_usual_runs(pages, 0);
        std::vector<float> queries = random_queries(pages, 2);
        const auto attention = rvqkv::layer_attention::create(pages.config()).value();
        const result whole = attend(attention, pages.runs(), queries, 2, usual_tokens);
        for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                                -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::max()}) {
            std::vector<float> some = queries;
            some[5 * 16 + 3] = bad;  // head 1 of token 1
            const result got = attend(attention, pages.runs(), some, 2, usual_tokens);
            for (std::size_t i = 0; i < whole.out.size(); ++i) {
                if (i / 8 != 5) {
                    CHECK(test::bits_of(got.out[i]) == test::bits_of(whole.out[i]));
                }
            }
            CHECK((std::isfinite(bad) || std::isnan(got.out[5 * 8])));
        }
    }
}

TEST_CASE("layer_attention: workers change nothing", "[attend][threads][property]") {
    CAPTURE(test::seed());
    test::random_source random(12);
    test::layer_pages pages(small_config(random, key_coding::before_rope), 13);
    add_usual_runs(pages, 0);
    for (const std::size_t tokens : {std::size_t{1}, std::size_t{40}}) {
        const std::vector<float> queries = random_queries(pages, tokens);
        const auto attention = rvqkv::layer_attention::create(pages.config()).value();
        const auto with = [&](const rvqkv::executor& workers) {
            std::vector<float> out(tokens * 4 * 8);
            rvqkv::attention_workspace workspace;
            attention
                .attend(pages.runs(), {queries.data(), {tokens, 4, 16}}, usual_tokens - 20,
                        {out.data(), {tokens, 4, 8}}, workspace, {}, workers)
                .value();
            return test::bits_of(out);
        };
        CHECK(with(rvqkv::thread_pool(3)) == with(rvqkv::serial_executor()));
    }
}

TEST_CASE("layer_attention: allocates nothing once the workspace is reserved", "[attend][unit]") {
    CAPTURE(test::seed());
    test::random_source random(14);
    for (const key_coding coding : all_codings) {
        test::layer_pages pages(small_config(random, coding), 15);
        add_usual_runs(pages, 0);
        const std::vector<float> queries = random_queries(pages, 3);
        const auto attention = rvqkv::layer_attention::create(pages.config()).value();
        rvqkv::attention_workspace workspace;
        attention.reserve(workspace, 3).value();
        std::vector<float> out(3 * 4 * 8);
        const std::size_t bytes = workspace.bytes();
        const test::allocation_counter counter;
        for (const std::size_t tokens : {std::size_t{3}, std::size_t{1}}) {
            attention
                .attend(pages.runs(), {queries.data(), {tokens, 4, 16}}, usual_tokens, {out.data(), {tokens, 4, 8}},
                        workspace)
                .value();
        }
        CHECK(counter.allocations() == 0);
        CHECK(workspace.bytes() == bytes);
    }
}

TEST_CASE("layer_attention: reads and writes tensors of any type and strides", "[attend][unit]") {
    CAPTURE(test::seed());
    test::random_source random(16);
    test::layer_pages pages(small_config(random, key_coding::after_rope), 17);
    add_usual_runs(pages, 0);
    std::vector<float> queries = random_queries(pages, 1);
    std::vector<rvqkv::bfloat16> stored(2 * queries.size());
    for (std::size_t i = 0; i < queries.size(); ++i) {
        stored[2 * i] = rvqkv::to_bfloat16(queries[i]);
        queries[i] = rvqkv::to_float(stored[2 * i]);
    }
    const auto attention = rvqkv::layer_attention::create(pages.config()).value();
    const result expected = attend(attention, pages.runs(), queries, 1, usual_tokens);
    std::vector<rvqkv::float16> out(4 * 8 + 4);
    rvqkv::attention_workspace workspace;
    attention
        .attend(pages.runs(), {stored.data(), {1, 4, 16}, {128, 32, 2}}, usual_tokens,
                {out.data(), {1, 4, 8}, {36, 9, 1}}, workspace)
        .value();
    for (std::size_t i = 0; i < expected.out.size(); ++i) {
        CHECK(out[i / 8 * 9 + i % 8] == rvqkv::to_float16(expected.out[i]));
    }
}

TEST_CASE("layer_attention: refuses what does not fit", "[attend][unit]") {
    CAPTURE(test::seed());
    test::random_source random(18);
    const rvqkv::kv_layer_config config = small_config(random, key_coding::after_rope);
    const auto refusal = [&](auto change) {
        rvqkv::kv_layer_config changed = config;
        change(changed);
        const auto made = rvqkv::layer_attention::create(changed);
        return made.ok() ? std::string("accepted") : made.error().message;
    };
    CHECK(refusal([](auto&) {}) == "accepted");
    CHECK(refusal([](auto& c) { c.keys.codec = nullptr; }) == "keys have no codec");
    CHECK(refusal([](auto& c) { c.values.heads = 0; }) == "values.heads is 0, must be at least 1");
    CHECK(refusal([](auto& c) { c.query_heads = 5; }) ==
          "query_heads is 5, must be a multiple of the KV heads: 2 of keys, 2 of values");
    CHECK(refusal([](auto& c) { c.values.heads = 1; }) ==
          "query_heads is 4, must be a multiple of the KV heads: 2 of keys, 1 of values");
    CHECK(refusal([](auto& c) {
              c.query_heads = 0;
              c.values.heads = 1;
          }) == "attention needs as many heads of values as of keys: 1 and 2");
    CHECK(refusal([](auto& c) { c.key_mean.resize(3); }) == "key_mean has 3 numbers, must have heads x head_dim = 32");
    CHECK(refusal([](auto& c) { c.key_mean.assign(32, std::numeric_limits<float>::infinity()); }) ==
          "a number of key_mean is not finite");
    CHECK(refusal([](auto& c) { c.rope.dims = 18; }) == "rope dims is 18, must be even and from 2 to head_dim 16");
    CHECK(refusal([](auto& c) {
              c.coding = key_coding::block_relative;
              c.block_tokens = 0;
          }) == "block_tokens is 0, must be at least 1");

    const auto attention = rvqkv::layer_attention::create(config).value();
    CHECK(attention.bytes() > 0);
    std::vector<float> numbers(1000);
    std::vector<float> sums(4);
    rvqkv::attention_workspace workspace;
    const auto message = [&](rvqkv::tensor_shape queries, rvqkv::tensor_shape out,
                             std::span<const rvqkv::page_run> runs, const rvqkv::attention_options& options) {
        const auto done =
            attention.attend(runs, {numbers.data(), queries}, 0, {numbers.data(), out}, workspace, options);
        return done.ok() ? std::string("accepted") : done.error().message;
    };
    CHECK(message({1, 4, 16}, {1, 4, 8}, {}, {}) == "accepted");
    CHECK(message({1, 2, 16}, {1, 4, 8}, {}, {}) == "queries have 2 heads of 16 channels, the layer has 4 of 16");
    CHECK(message({1, 4, 16}, {2, 4, 8}, {}, {}) == "out has 2 tokens of 4 heads of 8 channels, must have 1 of 4 of 8");
    rvqkv::attention_options options;
    options.sink_logits = {sums.data(), 3};
    CHECK(message({1, 4, 16}, {1, 4, 8}, {}, options) ==
          "sink_logits has 3 entries, must have one for each of 4 query heads");
    rvqkv::page_format format;
    format.tokens = 64;
    const std::byte page{};
    const rvqkv::page_run outside = {&page, &format, 10, 55, 0, 0};
    CHECK(message({1, 4, 16}, {1, 4, 8}, {&outside, 1}, {}) == "run 0 does not lie in its page");
    const auto few = attention.attend_partial({}, {numbers.data(), {1, 4, 16}}, 0, {numbers.data(), {1, 4, 8}},
                                              {sums.data(), 3}, workspace);
    REQUIRE_FALSE(few.ok());
    CHECK(few.error().message == "log_sum_exp has 3 places, must have one for each of 4 queries");
}

TEST_CASE("layer_attention: large codebooks, through tables and without", "[attend][differential]") {
    CAPTURE(test::seed());
    test::random_source random(20);
    for (std::size_t round = 0; round < 6; ++round) {
        rvqkv::kv_layer_config config;
        rvqkv::codec_spec keys = spec_of(32, {3, round % 2 == 0 ? std::size_t{2048} : std::size_t{300}, 8});
        rvqkv::codec_spec values = spec_of(48, {2, round % 2 == 0 ? std::size_t{1000} : std::size_t{2048}, 16});
        keys.weight_type = static_cast<rvqkv::dtype>(round % 3);
        values.weight_type = static_cast<rvqkv::dtype>((round + 1) % 3);
        values.scale = round == 0 ? rvqkv::scale_kind::none : rvqkv::scale_kind::rms;
        config.keys = {test::random_codec(random, keys), 1};
        config.values = {test::random_codec(random, values), 1};
        config.query_heads = 1 + 2 * (round % 4);
        config.coding = all_codings[round % 4];
        config.rope.base = 500.0;
        CAPTURE(round, static_cast<int>(config.coding));
        test::layer_pages pages(config, 30 + round);
        std::int64_t position = 0;
        for (const std::size_t count : {std::size_t{2500}, std::size_t{3100}, std::size_t{1}, std::size_t{4200}}) {
            const std::size_t page_tokens = (count + 163) / 64 * 64;
            const std::int64_t base = count == 1 ? 50 : 0;  // tables are made anew behind it
            pages.add_coded(page_tokens, 70, count, position, position - base, count == 3100 ? 2 : 3, 2);
            position += static_cast<std::int64_t>(count);
        }
        pages.add_exact(64, 0, 50, rvqkv::dtype::float16, position, position);
        check_attention(pages, 1, position + 50);
    }
}

TEST_CASE("layer_attention: scores that rise from chunk to chunk", "[attend][differential]") {
    CAPTURE(test::seed());
    test::random_source random(22);
    // Values by small tables, by rows of whole numbers, by large tables, and by reconstruction.
    for (const rvqkv::codebook_shape& values :
         {rvqkv::codebook_shape{3, 16, 8}, rvqkv::codebook_shape{3, 300, 32}, rvqkv::codebook_shape{2, 300, 16}}) {
        rvqkv::kv_layer_config config;
        config.keys = {test::random_codec(random, spec_of(16, {2, 20, 8})), 1};
        config.values = {test::random_codec(random, spec_of(64, values)), 1};
        config.query_heads = 8;
        CAPTURE(values.codewords, values.dim);
        test::layer_pages pages(config, 50);
        std::int64_t position = 0;
        for (std::size_t page = 0; page < 12; ++page, position += 256) {
            pages.add_coded(256, 0, 256, position, position, 2, values.depths);
        }
        // The latest tokens weigh most: what was summed up before is made smaller again and again, but does not vanish.
        const std::vector<float> slopes(8, 0.003F);
        rvqkv::attention_options options;
        options.alibi_slopes = slopes;
        check_attention(pages, 2, position - 2, options);
        const std::vector<float> queries = random_queries(pages, 2);
        const auto expected = test::oracle_attention(pages, queries, 2, position - 2, options);
        const auto attention = rvqkv::layer_attention::create(config).value();
        const result got = attend(attention, pages.runs(), queries, 2, position - 2, options);
        double error = 0.0;
        double size = 0.0;
        for (std::size_t i = 0; i < got.out.size(); ++i) {
            error += std::pow(static_cast<double>(got.out[i]) - expected.out[i], 2.0);
            size += std::pow(expected.out[i], 2.0);
        }
        CHECK(std::sqrt(error / size) <= 0.01);
    }
}

TEST_CASE("layer_attention: whichever allocation fails, create says so and leaves nothing behind", "[attend][unit]") {
    test::random_source random(21);
    for (const std::size_t codewords : {std::size_t{16}, std::size_t{300}}) {
        for (const key_coding coding : all_codings) {
            rvqkv::kv_layer_config config;
            config.keys = {test::random_codec(random, spec_of(32, {2, codewords, 8})), 2};
            config.values = config.keys;
            config.coding = coding;
            config.key_mean.assign(64, 0.5F);
            std::size_t nth = 0;
            for (bool failed = true; failed; ++nth) {
                CAPTURE(codewords, static_cast<int>(coding), nth);
                const test::allocation_counter counter;
                bool made = false;
                bool is_right = false;
                {
                    const test::failing_allocations failing(nth);
                    const auto attention = rvqkv::layer_attention::create(config);
                    made = attention.ok();
                    is_right = made || attention.error().code == rvqkv::error_code::out_of_memory;
                    failed = failing.triggered();
                }
                REQUIRE(is_right);
                REQUIRE(made == !failed);
                REQUIRE(counter.live_bytes() == 0);
            }
            CHECK(nth > 3);
        }
    }
}

TEST_CASE("layer_attention: large codebooks by rows of whole numbers", "[attend][differential]") {
    CAPTURE(test::seed());
    test::random_source random(21);
    for (std::size_t round = 0; round < 8; ++round) {
        rvqkv::kv_layer_config config;
        rvqkv::codec_spec keys = spec_of(128, {4, round % 2 == 0 ? std::size_t{512} : std::size_t{300}, 32});
        rvqkv::codec_spec values = spec_of(64, {3, 400, 64});
        keys.weight_type = static_cast<rvqkv::dtype>(round % 3);
        keys.grouping = round < 6 ? rvqkv::grouping_kind::strided : rvqkv::grouping_kind::contiguous;
        // Depths that become smaller, as trained ones do: those in 8 bits are among them.
        std::vector<float> weights = test::make_weights(random, keys.shape);
        for (std::size_t i = 0; i < weights.size(); ++i) {
            const std::size_t depth = i / (keys.shape.codewords * keys.shape.dim);
            weights[i] *= std::pow(0.2F, static_cast<float>(depth));
        }
        config.keys = {rvqkv::make_codec<float>(keys, weights).value(), 1};
        config.values = {test::random_codec(random, values), 1};
        config.query_heads = 1 + round;
        config.coding = round % 4 == 3 ? key_coding::as_given : key_coding::before_rope;
        config.rope.pairs = static_cast<rvqkv::rope_pairs>(round / 4);  // interleaved ones in neighbouring groups
        config.rope.attention_factor = round % 2 == 0 ? 1.0 : 1.3;
        CAPTURE(round, static_cast<int>(config.coding));
        test::layer_pages pages(config, 40 + round);
        add_usual_runs(pages, 1000);
        check_attention(pages, 2, 1000 + usual_tokens);
        // Roundings are many and small: results are far closer than the worst that they may add up to.
        const std::vector<float> queries = random_queries(pages, 1);
        const auto expected = test::oracle_attention(pages, queries, 1, 1000 + usual_tokens, {});
        const auto attention = rvqkv::layer_attention::create(config).value();
        const result got = attend(attention, pages.runs(), queries, 1, 1000 + usual_tokens);
        double error = 0.0;
        double size = 0.0;
        for (std::size_t i = 0; i < got.out.size(); ++i) {
            error += std::pow(static_cast<double>(got.out[i]) - expected.out[i], 2.0);
            size += std::pow(expected.out[i], 2.0);
        }
        CHECK(std::sqrt(error / size) <= 0.008);
    }
}
