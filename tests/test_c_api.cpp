// SPDX-License-Identifier: MIT
/// @file
/// The C interface beside the C++ one: the same results bit for bit, the same errors, and no exception.
#include "rvqkv/c_api/compile_c_api.hpp"

#include "rvqkv/cache/kv_cache.hpp"
#include "rvqkv/files/codec_file.hpp"
#include "rvqkv/files/sequence_file.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/rvqkv.h"
#include "support/allocation_counter.hpp"
#include "support/cache_tensors.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/page_sources.hpp"
#include "support/random.hpp"
#include "support/temp_dir.hpp"
#include "support/weights.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace {

using test::shared_codec;

// ---- Handles that free themselves ----

template <auto Free>
struct freed_by {
    template <class Handle>
    void operator()(Handle* handle) const {
        Free(handle);
    }
};
using c_codec = std::unique_ptr<rvqkv_codec, freed_by<rvqkv_codec_free>>;
using c_codecs = std::unique_ptr<rvqkv_codecs, freed_by<rvqkv_codecs_free>>;
using c_cache = std::unique_ptr<rvqkv_cache, freed_by<rvqkv_cache_free>>;
using c_workspace = std::unique_ptr<rvqkv_workspace, freed_by<rvqkv_workspace_free>>;
using c_sequence = std::unique_ptr<rvqkv_sequence, freed_by<rvqkv_sequence_free>>;

/// What `make(handle, error)` makes; the test fails if it does not.
template <class Owner, class Make>
Owner made(const Make& make) {
    typename Owner::pointer handle = nullptr;
    rvqkv_error error;
    const rvqkv_status status = make(&handle, &error);
    INFO(error.message);
    REQUIRE(status == RVQKV_OK);
    REQUIRE(error.status == RVQKV_OK);
    REQUIRE(std::string(error.message).empty());
    REQUIRE(handle != nullptr);
    return Owner(handle);
}

/// What a call says: "ok", or "invalid_argument: layer is 7, ...". The error must say as much as the status.
template <class Call>
std::string said(const Call& call) {
    rvqkv_error error;
    std::memset(&error, 0x55, sizeof error);
    const rvqkv_status status = call(&error);
    REQUIRE(error.status == status);
    const std::string name = rvqkv_status_name(status);
    return status == RVQKV_OK ? name + error.message : name + ": " + error.message;
}

// ---- One model in both languages ----

rvqkv_tensor c_tensor(const rvqkv::tensor_view& view) {
    return {const_cast<void*>(view.data()),
            static_cast<rvqkv_dtype>(view.type()),
            view.tokens(),
            view.heads(),
            view.channels(),
            view.strides().token,
            view.strides().head,
            view.strides().channel};
}

c_codec codec_like(const rvqkv::codec& codec) {
    const rvqkv::codec_spec& from = *codec.spec();
    rvqkv_codec_spec spec;
    rvqkv_codec_spec_init(&spec, sizeof spec);
    spec.head_dim = from.head_dim;
    spec.depths = from.shape.depths;
    spec.codewords = from.shape.codewords;
    spec.group_dim = from.shape.dim;
    spec.scale = static_cast<rvqkv_scale>(from.scale);
    spec.scale_type = static_cast<rvqkv_dtype>(from.scale_type);
    spec.grouping = static_cast<rvqkv_grouping>(from.grouping);
    spec.permutation = from.permutation.data();
    spec.permutation_count = from.permutation.size();
    spec.metric = static_cast<rvqkv_distance>(from.metric);
    spec.weight_type = static_cast<rvqkv_dtype>(from.weight_type);
    return made<c_codec>([&](auto handle, auto error) {
        return rvqkv_codec_create(&spec, codec.weights().data(), spec.weight_type, from.shape.size(), handle, error);
    });
}

rvqkv_layer_config default_layer() {
    rvqkv_layer_config layer;
    rvqkv_layer_config_init(&layer, sizeof layer);
    return layer;
}
rvqkv_cache_config default_cache(const std::vector<rvqkv_layer_config>& layers) {
    rvqkv_cache_config config;
    rvqkv_cache_config_init(&config, sizeof config);
    config.layers = layers.data();
    config.layer_count = layers.size();
    return config;
}
rvqkv_workspace_config default_workspace() {
    rvqkv_workspace_config config;
    rvqkv_workspace_config_init(&config, sizeof config);
    return config;
}
rvqkv_attention_options default_options() {
    rvqkv_attention_options options;
    rvqkv_attention_options_init(&options, sizeof options);
    return options;
}

rvqkv_page_source functions_of(test::counting_source& source) {
    return {&source,
            [](void* context, std::size_t bytes) -> void* {
                return static_cast<test::counting_source*>(context)->allocate(bytes);
            },
            [](void* context, void* memory, std::size_t bytes) {
                static_cast<test::counting_source*>(context)->release(static_cast<std::byte*>(memory), bytes);
            }};
}

constexpr std::size_t heads = 2;
constexpr std::size_t query_heads = 6;
constexpr std::size_t key_dim = 8;
constexpr std::size_t value_dim = 6;
constexpr std::size_t windowed = 1;  // layers: plain, windowed, without a cache, sharing layer 0's

/// A cache with every kind of layer, made of the same numbers by both interfaces.
struct twins {
    explicit twins(test::random_source& random) {
        rvqkv::codec_spec spec;
        spec.head_dim = key_dim;
        spec.shape = {3, 16, 4};
        keys = test::make_codec(random, spec);
        spec.head_dim = value_dim;
        spec.shape = {2, 5, 2};
        spec.scale = rvqkv::scale_kind::max_abs;
        spec.grouping = rvqkv::grouping_kind::permuted;
        spec.permutation = {5, 3, 1, 0, 2, 4};
        spec.weight_type = rvqkv::dtype::bfloat16;
        values = test::make_codec(random, spec);
        mean = test::gaussian_numbers(random, heads * key_dim);

        config.layers.resize(4);
        for (const std::size_t layer : {std::size_t{0}, windowed}) {
            rvqkv::kv_layer_config& each = config.layers[layer];
            each.keys = {keys, heads};
            each.values = {values, heads};
            each.query_heads = query_heads;
            each.coding = layer == 0 ? rvqkv::key_coding::after_rope : rvqkv::key_coding::before_rope;
            each.turned_input = layer != 0;
            each.rope.pairs = rvqkv::rope_pairs::interleaved;
            each.rope.dims = 6;
            each.rope.frequencies = frequencies;
            each.rope.attention_factor = 1.25;
            each.rope.position_scale = 0.5;
        }
        config.layers[0].key_mean = mean;
        config.layers[windowed].sliding_window = 150;
        config.layers[3].shares_layer = 0;
        config.layers[3].query_heads = query_heads;
        config.sink_tokens = 3;
        config.recent_tokens = 20;
        config.exact_type = rvqkv::dtype::bfloat16;
        config.page_budget = 10000000;
        config.source = &source;
        cache.emplace(rvqkv::kv_cache::create(config).value());
        workspace = cache->make_workspace().value();
        attention = cache->make_attention_workspace(3).value();

        const c_codec c_keys = codec_like(*keys);  // freed before the cache
        const c_codec c_values = codec_like(*values);
        std::vector<rvqkv_layer_config> layers(4, default_layer());
        for (const std::size_t layer : {std::size_t{0}, windowed}) {
            rvqkv_layer_config& each = layers[layer];
            each.key_codec = c_keys.get();
            each.value_codec = c_values.get();
            each.key_heads = heads;
            each.value_heads = heads;
            each.query_heads = query_heads;
            each.coding = layer == 0 ? RVQKV_AFTER_ROPE : RVQKV_BEFORE_ROPE;
            each.turned_input = layer != 0;
            each.rope.pairs = RVQKV_INTERLEAVED;
            each.rope.dims = 6;
            each.rope.frequencies = frequencies.data();
            each.rope.frequency_count = frequencies.size();
            each.rope.attention_factor = 1.25;
            each.rope.position_scale = 0.5;
        }
        layers[0].key_mean = mean.data();
        layers[0].key_mean_count = mean.size();
        layers[windowed].sliding_window = 150;
        layers[3].shares_layer = 0;
        layers[3].query_heads = query_heads;
        rvqkv_cache_config c_config = default_cache(layers);
        c_config.sink_tokens = 3;
        c_config.recent_tokens = 20;
        c_config.exact_type = RVQKV_BFLOAT16;
        c_config.page_budget = 10000000;
        c_config.source = functions_of(c_source);
        c = made<c_cache>([&](auto handle, auto error) { return rvqkv_cache_create(&c_config, handle, error); });
    }

    [[nodiscard]] c_workspace new_workspace(const rvqkv_workspace_config* with = nullptr) const {
        return made<c_workspace>(
            [&](auto handle, auto error) { return rvqkv_workspace_create(c.get(), with, handle, error); });
    }
    [[nodiscard]] c_sequence new_sequence() const {
        return made<c_sequence>([&](auto handle, auto error) { return rvqkv_sequence_create(c.get(), handle, error); });
    }

    std::vector<double> frequencies{1.0, 0.3, 0.01};
    std::vector<float> mean;
    shared_codec keys;
    shared_codec values;
    test::counting_source source;
    test::counting_source c_source;
    rvqkv::kv_cache_config config;
    std::optional<rvqkv::kv_cache> cache;
    rvqkv::kv_workspace workspace;
    rvqkv::attention_workspace attention;
    c_cache c;
};

/// A sequence in both languages.
struct pair_of_both {
    rvqkv::kv_sequence real;
    c_sequence c;
};

/// Random operations on both, which must say the same and leave the same.
class pair_of_worlds {
public:
    pair_of_worlds(test::random_source& random, const rvqkv_workspace_config& with)
        : random_(random), twins_(random), workspace_(twins_.new_workspace(&with)) {
        sequences_.push_back({twins_.cache->new_sequence().value(), twins_.new_sequence()});
    }

    void run(std::size_t operations) {
        for (std::size_t i = 0; i < operations; ++i) {
            step(sequences_[random_.integer(0, sequences_.size() - 1)]);
            check(sequences_[random_.integer(0, sequences_.size() - 1)]);
        }
        check_caches();
    }

private:
    void step(pair_of_both& both) {
        const std::size_t choice = random_.integer(0, 40);
        const std::size_t tokens = both.real.tokens(0);
        rvqkv_sequence* const c = both.c.get();
        if (choice == 0) {
            const std::size_t kept = random_.integer(0, tokens + 1);
            same(both.real.truncate(kept), [&](auto error) { return rvqkv_sequence_truncate(c, kept, error); });
        } else if (choice == 1) {
            const std::size_t layer = random_.integer(0, 4);
            const std::size_t kept = random_.integer(tokens - tokens / 8, tokens);
            same(both.real.truncate(layer, kept),
                 [&](auto error) { return rvqkv_sequence_truncate_layer(c, layer, kept, error); });
        } else if (choice < 4) {
            const std::size_t first = random_.integer(0, tokens);
            const std::size_t last = random_.integer(first, tokens);
            const bool shift = random_.integer(0, 1) == 0;
            same(both.real.evict(first, last, shift),
                 [&](auto error) { return rvqkv_sequence_evict(c, first, last, shift, error); });
        } else if (choice == 4) {
            const std::size_t before = random_.integer(0, tokens);
            const std::size_t key_depths = random_.integer(0, 3);
            same(both.real.demote(before, key_depths, 1),
                 [&](auto error) { return rvqkv_sequence_demote(c, before, key_depths, 1, error); });
        } else if (choice == 5) {
            const std::size_t most = both.real.bytes().total() - random_.integer(0, 3000);
            std::size_t before = 12345;
            const auto expected = both.real.demote_to(most, 1, 1);
            same(expected, [&](auto error) { return rvqkv_sequence_demote_to(c, most, 1, 1, &before, error); });
            CHECK(before == (expected ? expected.value() : 12345));
        } else if (choice == 6) {
            const std::size_t room = random_.integer(0, 500);
            same(both.real.reserve(room), [&](auto error) { return rvqkv_sequence_reserve(c, room, error); });
        } else if (choice == 7) {
            both.real.release_spare_pages();
            rvqkv_sequence_release_spare_pages(c);
        } else if (choice == 8 && random_.integer(0, 3) == 0) {
            both.real.clear();
            rvqkv_sequence_clear(c);
        } else if (choice == 9) {
            same(twins_.cache->reserve(100),
                 [&](auto error) { return rvqkv_cache_reserve(twins_.c.get(), 100, error); });
            check_caches();
            twins_.cache->release_free_pages();
            rvqkv_cache_release_free_pages(twins_.c.get());
            check_caches();
        } else if (choice < 12) {
            fork(both);
        } else if (choice < 14) {
            save_and_load(both);
        } else {
            append(both);
        }
    }

    void append(pair_of_both& both) {
        if (both.real.tokens(0) > 400) {
            return;
        }
        const std::size_t count = random_.integer(0, 60);
        for (std::size_t layer = 0; layer < 4; ++layer) {
            const std::size_t wrong = random_.integer(0, 30) == 0 ? 1 : 0;
            test::tensor keys(test::pick(random_, test::all_types), {count, heads, key_dim}, random_);
            test::tensor values(test::pick(random_, test::all_types), {count + wrong, heads, value_dim}, random_);
            keys.fill(random_);
            values.fill(random_);
            if (count > 5) {
                keys.set(5, 1, 3, std::numeric_limits<float>::quiet_NaN());
            }
            const rvqkv_tensor c_keys = c_tensor(keys.view());
            const rvqkv_tensor c_values = c_tensor(values.view());
            rvqkv::kv_encode_report expected;
            rvqkv_append_report report{};
            expected.keys.nonfinite_rows = report.keys.nonfinite_rows = random_.integer(0, 1);
            const bool counts = random_.integer(0, 1) == 0;
            same(both.real.append(layer, keys.view(), values.view(), twins_.workspace, &expected), [&](auto error) {
                return rvqkv_sequence_append(both.c.get(), layer, &c_keys, &c_values, workspace_.get(),
                                             counts ? &report : nullptr, error);
            });
            if (counts) {
                CHECK(report.keys.nonfinite_rows == expected.keys.nonfinite_rows);
                CHECK(report.keys.nonfinite_values == expected.keys.nonfinite_values);
                CHECK(report.keys.first_token == expected.keys.first_token);
                CHECK(report.keys.first_head == expected.keys.first_head);
                CHECK(report.values.nonfinite_rows == expected.values.nonfinite_rows);
            }
        }
    }

    void fork(const pair_of_both& both) {
        if (sequences_.size() > 3) {
            sequences_.erase(sequences_.begin());
            return;
        }
        sequences_.push_back({both.real.fork().value(), made<c_sequence>([&](auto handle, auto error) {
                                  return rvqkv_sequence_fork(both.c.get(), handle, error);
                              })});
    }

    void save_and_load(pair_of_both& both) {
        const std::string path = folder_.file("sequence");
        const std::string c_path = folder_.file("c_sequence");
        const bool incremental = random_.integer(0, 1) == 0;
        rvqkv::save_sequence(both.real, path, {.incremental = incremental}).value();
        REQUIRE(said([&](auto error) {
                    return rvqkv_sequence_save(both.c.get(), c_path.c_str(), incremental, error);
                }) == "ok");
        const std::string bytes = test::read_file(c_path);
        REQUIRE(bytes == test::read_file(path));
        both.real = rvqkv::load_sequence(*twins_.cache, path).value();
        both.c = made<c_sequence>([&](auto handle, auto error) {
            return incremental
                       ? rvqkv_sequence_load(twins_.c.get(), c_path.c_str(), nullptr, handle, error)
                       : rvqkv_sequence_load_memory(twins_.c.get(), bytes.data(), bytes.size(), nullptr, handle, error);
        });
    }

    // ---- Comparing ----

    /// Both must say the same.
    template <class Outcome, class Call>
    void same(const Outcome& expected, const Call& call) {
        CHECK(said(call) == test::message_of(expected));
    }

    void check(const pair_of_both& both) {
        const rvqkv_sequence* const c = both.c.get();
        for (std::size_t layer = 0; layer < 4; ++layer) {
            REQUIRE(rvqkv_sequence_tokens(c, layer) == both.real.tokens(layer));
            REQUIRE(rvqkv_sequence_first_token(c, layer) == both.real.first_token(layer));
            REQUIRE(rvqkv_sequence_next_position(c, layer) == both.real.next_position(layer));
        }
        const rvqkv::kv_sequence_bytes expected = both.real.bytes();
        const rvqkv_sequence_bytes bytes = rvqkv_sequence_memory(c);
        CHECK(bytes.codes == expected.codes);
        CHECK(bytes.scales == expected.scales);
        CHECK(bytes.exact == expected.exact);
        CHECK(bytes.overhead == expected.overhead);
        CHECK(bytes.page_tables == expected.page_tables);
        CHECK(bytes.spare == expected.spare);
        CHECK(bytes.total == expected.total());
        const std::size_t layer = random_.integer(0, 4);
        reconstruct(both, layer);
        attend(both, layer);
    }
    void check_caches() {
        const rvqkv::kv_cache_bytes expected = twins_.cache->bytes();
        const rvqkv_cache_bytes bytes = rvqkv_cache_memory(twins_.c.get());
        CHECK(bytes.pages == expected.pages);
        CHECK(bytes.free_pages == expected.free_pages);
        CHECK(bytes.layers == expected.layers);
        CHECK(bytes.total == expected.total());
        CHECK(bytes.codecs == expected.codecs);
        CHECK(twins_.c_source.live_bytes == twins_.source.live_bytes);
        CHECK(twins_.c_source.allocations == twins_.source.allocations);
    }

    void reconstruct(const pair_of_both& both, std::size_t layer) {
        const bool is_keys = random_.integer(0, 1) == 0;
        const std::size_t tokens = layer < 4 ? both.real.tokens(layer) : 1;
        const std::size_t first = random_.integer(0, tokens);
        const std::size_t depths = random_.integer(0, 1) == 0 ? RVQKV_ALL_DEPTHS : random_.integer(0, 4);
        const rvqkv::tensor_shape shape{tokens - first, heads, is_keys ? key_dim : value_dim};
        test::tensor out(test::pick(random_, test::all_types), shape, random_);
        test::tensor c_out = out;
        const rvqkv_tensor to = c_tensor(c_out.view());
        same(is_keys ? both.real.reconstruct_keys(layer, first, out.view(), twins_.workspace, depths)
                     : both.real.reconstruct_values(layer, first, out.view(), twins_.workspace, depths),
             [&](auto error) {
                 return rvqkv_sequence_reconstruct(both.c.get(), layer, is_keys ? RVQKV_KEYS : RVQKV_VALUES, first, &to,
                                                   depths, workspace_.get(), error);
             });
        CHECK(c_out.is_part_of(out, 0));
    }

    static void mask_some(float* scores, std::size_t tokens, std::size_t head, std::int64_t first) {
        for (std::size_t i = 0; i < tokens; ++i) {
            const auto position = static_cast<std::size_t>(first) + i;
            scores[i] = (position + head) % 5 == 0 ? -std::numeric_limits<float>::infinity() : scores[i];
        }
    }
    void attend(const pair_of_both& both, std::size_t layer) {
        const std::size_t held = layer < 4 ? both.real.tokens(layer) : 1;
        const std::size_t count = random_.integer(0, std::min<std::size_t>(held + 1, 3));
        test::tensor queries(test::pick(random_, test::all_types), {count, query_heads, key_dim}, random_);
        queries.fill(random_);
        test::tensor out(test::pick(random_, test::all_types), {count, query_heads, value_dim}, random_);
        test::tensor c_out = out;
        std::vector<float> slopes = test::gaussian_numbers(random_, query_heads);
        std::vector<float> sinks = test::gaussian_numbers(random_, query_heads + random_.integer(0, 9) / 9);
        rvqkv::attention_options options;
        rvqkv_attention_options c_options = default_options();
        const bool is_plain = random_.integer(0, 1) == 0;
        if (!is_plain) {
            options.scale = c_options.scale = 0.3F;
            options.soft_cap = c_options.soft_cap = 2.0F;
            options.causal = c_options.causal = false;
            options.reading = rvqkv::code_reading::reconstructed;
            c_options.reading = RVQKV_RECONSTRUCTED;
            options.alibi_slopes = slopes;
            options.sink_logits = sinks;
            options.hook.edit = [](void*, const rvqkv::score_block& block) {
                mask_some(block.scores, block.tokens, block.query_head, block.key_position);
            };
            c_options.alibi_slopes = slopes.data();
            c_options.alibi_slope_count = slopes.size();
            c_options.sink_logits = sinks.data();
            c_options.sink_logit_count = sinks.size();
            c_options.hook = [](void* context, const rvqkv_score_block* block) {
                REQUIRE(*static_cast<const int*>(context) == 42);
                mask_some(block->scores, block->tokens, block->query_head, block->key_position);
            };
            c_options.hook_context = &hook_context_;
        }
        const rvqkv_tensor from = c_tensor(queries.view());
        const rvqkv_tensor to = c_tensor(c_out.view());
        const rvqkv_attention_options* const with = is_plain && count == 1 ? nullptr : &c_options;
        same(both.real.attend(layer, queries.view(), out.view(), twins_.attention, options), [&](auto error) {
            return rvqkv_sequence_attend(both.c.get(), layer, &from, &to, workspace_.get(), with, error);
        });
        CHECK(c_out.is_part_of(out, 0));

        const std::size_t rows = count * query_heads;
        std::vector<float> sums(rows + random_.integer(0, 9) / 9, 1.5F);
        std::vector<float> c_sums = sums;
        c_sums.reserve(1);
        const auto expected =
            both.real.attend_partial(layer, queries.view(), out.view(), sums, twins_.attention, options);
        same(expected, [&](auto error) {
            return rvqkv_sequence_attend_partial(both.c.get(), layer, &from, &to, c_sums.data(), c_sums.size(),
                                                 workspace_.get(), with, error);
        });
        CHECK(c_out.is_part_of(out, 0));
        CHECK(c_sums == sums);
        if (!expected) {
            return;
        }
        test::tensor other(rvqkv::dtype::float32, {count, query_heads, value_dim}, random_);
        other.fill(random_);
        const std::vector<float> other_sums = test::gaussian_numbers(random_, rows + 1);
        const rvqkv_tensor c_other = c_tensor(other.view());
        same(rvqkv::merge_partial(out.view(), sums, other.view(), std::span(other_sums).first(sums.size())),
             [&](auto error) {
                 return rvqkv_merge_partial(&to, c_sums.data(), &c_other, other_sums.data(), c_sums.size(), error);
             });
        CHECK(c_out.is_part_of(out, 0));
        CHECK(c_sums == sums);
    }

    test::random_source& random_;
    test::temp_dir folder_;
    twins twins_;
    c_workspace workspace_;
    std::vector<pair_of_both> sequences_;
    int hook_context_ = 42;
};

}  // namespace

TEST_CASE("c_api: random operations give what the C++ interface gives, bit for bit, with any workers",
          "[c_api][differential]") {
    const test::backward_executor backward(5);
    rvqkv_workspace_config with = default_workspace();
    SECTION("alone") {
        with.query_tokens = 3;
    }
    SECTION("threads") {
        with.threads = 3;
    }
    SECTION("the caller's pool") {
        with.workers = {const_cast<test::backward_executor*>(&backward), 5,
                        [](void* pool, std::size_t tasks, void (*task)(void*, std::size_t), void* context) {
                            static_cast<const test::backward_executor*>(pool)->run(tasks, task, context);
                        }};
    }
    test::random_source random(with.threads + with.workers.concurrency);
    pair_of_worlds(random, with).run(400);
}

TEST_CASE("c_api: what the _init functions set are the defaults of C++", "[c_api][unit]") {
    const rvqkv_layer_config layer = default_layer();
    const rvqkv::kv_layer_config expected_layer;
    CHECK(layer.struct_size == sizeof layer);
    CHECK(layer.key_codec == nullptr);
    CHECK(layer.key_heads + layer.value_heads + layer.query_heads + layer.sliding_window == 0);
    CHECK(layer.coding == static_cast<int>(expected_layer.coding));
    CHECK(layer.turned_input == expected_layer.turned_input);
    CHECK(layer.rope.pairs == static_cast<int>(expected_layer.rope.pairs));
    CHECK(layer.rope.dims == expected_layer.rope.dims);
    CHECK(layer.rope.base == expected_layer.rope.base);
    CHECK(layer.rope.position_scale == expected_layer.rope.position_scale);
    CHECK(layer.rope.attention_factor == expected_layer.rope.attention_factor);
    CHECK(layer.block_tokens == expected_layer.block_tokens);
    CHECK(layer.shares_layer == RVQKV_NO_LAYER);
    const rvqkv_cache_config cache = default_cache({});
    const rvqkv::kv_cache_config expected_cache;
    CHECK(cache.page_tokens == expected_cache.page_tokens);
    CHECK(cache.sink_tokens == expected_cache.sink_tokens);
    CHECK(cache.recent_tokens == expected_cache.recent_tokens);
    CHECK(cache.exact_type == static_cast<int>(expected_cache.exact_type));
    CHECK(cache.page_budget == RVQKV_UNLIMITED);
    CHECK(cache.source.allocate == nullptr);
    const rvqkv_attention_options options = default_options();
    CHECK(options.scale == 0.0F);
    CHECK(options.causal);
    CHECK(options.soft_cap == 0.0F);
    CHECK(options.reading == RVQKV_QUICKEST);
    CHECK(options.hook == nullptr);
    rvqkv_codec_spec spec;
    rvqkv_codec_spec_init(&spec, sizeof spec);
    const rvqkv::codec_spec expected;
    CHECK(spec.head_dim == expected.head_dim);
    CHECK(spec.depths == expected.shape.depths);
    CHECK(spec.codewords == expected.shape.codewords);
    CHECK(spec.group_dim == expected.shape.dim);
    CHECK(spec.scale_type == static_cast<int>(expected.scale_type));
    CHECK(spec.grouping == static_cast<int>(expected.grouping));
    CHECK(spec.permutation == nullptr);
    CHECK(default_workspace().query_tokens == 1);
    CHECK(default_workspace().threads == 1);
    // A caller of another version: nothing behind its struct is written to.
    spec.depths = 77;
    rvqkv_codec_spec_init(&spec, offsetof(rvqkv_codec_spec, depths));
    CHECK(spec.depths == 77);
    CHECK(spec.struct_size == offsetof(rvqkv_codec_spec, depths));
    rvqkv_codec_spec_init(nullptr, sizeof spec);
}

TEST_CASE("c_api: versions, names and tensors", "[c_api][unit]") {
    CHECK(std::string(rvqkv_version()) == RVQKV_VERSION_STRING);
    for (const rvqkv::error_code code :
         {rvqkv::error_code::invalid_argument, rvqkv::error_code::unsupported, rvqkv::error_code::out_of_memory,
          rvqkv::error_code::io, rvqkv::error_code::damaged_file}) {
        CHECK(rvqkv_status_name(rvqkv::detail::c_api::status_of(code)) == rvqkv::name_of(code));
    }
    CHECK(std::string(rvqkv_status_name(RVQKV_OK)) == "ok");
    CHECK(std::string(rvqkv_status_name(99)) == "unknown");
    const float numbers[1] = {};
    const rvqkv_tensor tensor = rvqkv_tensor_of(numbers, RVQKV_BFLOAT16, 5, 3, 7);
    CHECK(tensor.data == numbers);
    CHECK(tensor.type == RVQKV_BFLOAT16);
    CHECK((tensor.tokens == 5 && tensor.heads == 3 && tensor.channels == 7));
    CHECK((tensor.token_stride == 21 && tensor.head_stride == 7 && tensor.channel_stride == 1));
}

// ---- Codecs ----

TEST_CASE("c_api: codecs from files are those of C++, and outlive their file's handle", "[c_api][files]") {
    test::random_source random(3);
    const twins both(random);
    const test::temp_dir folder;
    const std::string path = folder.file("codecs");
    rvqkv::codec_set set;
    set.layers[4] = {both.keys, both.values};
    set.layers[9] = {nullptr, both.values};
    set.metadata["model"] = "a model";
    rvqkv::save_codecs(path, set).value();
    const std::string bytes = test::read_file(path);
    for (const bool from_memory : {false, true}) {
        c_codecs codecs = made<c_codecs>([&](auto handle, auto error) {
            return from_memory ? rvqkv_codecs_load_memory(bytes.data(), bytes.size(), handle, error)
                               : rvqkv_codecs_load(path.c_str(), handle, error);
        });
        CHECK(rvqkv_codecs_count(codecs.get()) == 2);
        CHECK(rvqkv_codecs_layer(codecs.get(), 0) == 4);
        CHECK(rvqkv_codecs_layer(codecs.get(), 1) == 9);
        CHECK(rvqkv_codecs_layer(codecs.get(), 2) == RVQKV_NO_LAYER);
        CHECK(rvqkv_codecs_get(codecs.get(), 9, RVQKV_KEYS) == nullptr);
        CHECK(rvqkv_codecs_get(codecs.get(), 5, RVQKV_KEYS) == nullptr);
        CHECK(rvqkv_codecs_get(codecs.get(), 4, 2) == nullptr);
        CHECK(rvqkv_codecs_get(codecs.get(), 9, RVQKV_VALUES) != rvqkv_codecs_get(codecs.get(), 4, RVQKV_VALUES));
        CHECK(std::string(rvqkv_codecs_metadata(codecs.get(), "model")) == "a model");
        CHECK(rvqkv_codecs_metadata(codecs.get(), "no such key") == nullptr);
        const rvqkv_codec* const keys = rvqkv_codecs_get(codecs.get(), 4, RVQKV_KEYS);
        const rvqkv_codec* const values = rvqkv_codecs_get(codecs.get(), 4, RVQKV_VALUES);
        CHECK(*keys->codec->spec() == *both.keys->spec());
        const auto weights = both.values->weights();
        CHECK(std::memcmp(values->codec->weights().data(), weights.data(), weights.size()) == 0);
        rvqkv_codec_spec spec;
        rvqkv_codec_spec_init(&spec, sizeof spec);
        REQUIRE(rvqkv_codec_describe(values, &spec, nullptr) == RVQKV_OK);
        CHECK((spec.head_dim == value_dim && spec.depths == 2 && spec.codewords == 5 && spec.group_dim == 2));
        CHECK((spec.scale == RVQKV_SCALE_MAX_ABS && spec.scale_type == RVQKV_FLOAT16));
        CHECK((spec.grouping == RVQKV_PERMUTED && spec.permutation_count == 6 && spec.permutation[0] == 5));
        CHECK((spec.metric == RVQKV_EUCLIDEAN && spec.weight_type == RVQKV_BFLOAT16));

        std::vector<rvqkv_layer_config> layers(1, default_layer());
        layers[0].key_codec = keys;
        layers[0].value_codec = values;
        layers[0].key_heads = layers[0].value_heads = heads;
        const rvqkv_cache_config config = default_cache(layers);
        const c_cache cache =
            made<c_cache>([&](auto handle, auto error) { return rvqkv_cache_create(&config, handle, error); });
        codecs.reset();
        CHECK(rvqkv_cache_layers(cache.get()) == 1);
        CHECK(rvqkv_cache_memory(cache.get()).codecs == both.keys->bytes() + both.values->bytes());
    }

    rvqkv_codecs* handle = nullptr;
    CHECK(said([&](auto error) { return rvqkv_codecs_load_memory(bytes.data(), 100, &handle, error); }) ==
          test::message_of(rvqkv::load_codecs(std::as_bytes(std::span(bytes).first(100)))));
    CHECK(said([&](auto error) { return rvqkv_codecs_load("/no/such/file", &handle, error); }) ==
          test::message_of(rvqkv::load_codecs(std::filesystem::path("/no/such/file"))));
    CHECK(handle == nullptr);
}

TEST_CASE("c_api: weights of every type make the codec that they make in C++", "[c_api][differential]") {
    test::random_source random(4);
    rvqkv::codec_spec spec;
    spec.head_dim = 8;
    spec.shape = {2, 5, 4};
    const std::vector<float> numbers = test::make_weights(random, spec.shape);
    std::vector<rvqkv::float16> halves;
    std::vector<rvqkv::bfloat16> brains;
    for (const float x : numbers) {
        halves.push_back(rvqkv::to_float16(x));
        brains.push_back(rvqkv::to_bfloat16(x));
    }
    rvqkv_codec_spec c_spec = rvqkv::detail::c_api::describe(spec);
    const auto weights_of = [&](const void* weights, rvqkv_dtype type) {
        const c_codec codec = made<c_codec>([&](auto handle, auto error) {
            return rvqkv_codec_create(&c_spec, weights, type, numbers.size(), handle, error);
        });
        const auto made_of = codec->codec->weights();
        return std::vector<std::byte>(made_of.begin(), made_of.end());
    };
    const auto expected = [&](const auto& weights) {
        const auto codec =
            rvqkv::make_codec(spec, std::span<const std::decay_t<decltype(weights[0])>>(weights)).value();
        return std::vector<std::byte>(codec->weights().begin(), codec->weights().end());
    };
    CHECK(weights_of(numbers.data(), RVQKV_FLOAT32) == expected(numbers));
    CHECK(weights_of(halves.data(), RVQKV_FLOAT16) == expected(halves));
    CHECK(weights_of(brains.data(), RVQKV_BFLOAT16) == expected(brains));

    rvqkv_codec* handle = nullptr;
    const auto create = [&](const auto& change, std::size_t count, rvqkv_dtype type) {
        rvqkv_codec_spec changed = c_spec;
        change(changed);
        handle = reinterpret_cast<rvqkv_codec*>(1);
        std::string text =
            said([&](auto error) { return rvqkv_codec_create(&changed, numbers.data(), type, count, &handle, error); });
        CHECK(handle == nullptr);
        return text;
    };
    const auto nothing = [](rvqkv_codec_spec&) {};
    CHECK(create(nothing, 39, RVQKV_FLOAT32) ==
          test::message_of(rvqkv::make_codec(spec, std::span<const float>(numbers).first(39))));
    CHECK(create(nothing, 40, 3) == "invalid_argument: weights_type is 3, must be from 0 to 2");
    using changed = rvqkv_codec_spec;
    CHECK(create([](changed& c) { c.scale = -1; }, 40, 0) == "invalid_argument: scale is -1, must be from 0 to 4");
    CHECK(create([](changed& c) { c.scale_type = 3; }, 40, 0) ==
          "invalid_argument: scale_type is 3, must be from 0 to 2");
    CHECK(create([](changed& c) { c.grouping = 3; }, 40, 0) == "invalid_argument: grouping is 3, must be from 0 to 2");
    CHECK(create([](changed& c) { c.metric = 2; }, 40, 0) == "invalid_argument: metric is 2, must be from 0 to 1");
    CHECK(create([](changed& c) { c.weight_type = 9; }, 40, 0) ==
          "invalid_argument: weight_type is 9, must be from 0 to 2");
    CHECK(create([](changed& c) { c.head_dim = 9; }, 40, 0).find("invalid_argument: ") == 0);
    CHECK(create([](changed& c) { c.struct_size = 8; }, 40, 0) ==
          "invalid_argument: spec has struct_size 8, must be " + std::to_string(sizeof(changed)) +
              ": set it by the _init function, of the same version of rvqkv.h");
}

// ---- Errors ----

TEST_CASE("c_api: null where something is needed is refused by name", "[c_api][unit]") {
    test::random_source random(5);
    const twins both(random);
    const c_sequence owner = both.new_sequence();
    const c_workspace scratch = both.new_workspace();
    rvqkv_sequence* const sequence = owner.get();
    rvqkv_workspace* const workspace = scratch.get();
    rvqkv_cache* const cache = both.c.get();
    const rvqkv_tensor tensor = rvqkv_tensor_of(nullptr, RVQKV_FLOAT32, 0, heads, key_dim);
    float sums[1] = {};
    rvqkv_codec_spec spec;
    rvqkv_codec_spec_init(&spec, sizeof spec);
    const c_codec owned_codec = codec_like(*both.keys);
    const rvqkv_codec* const codec = owned_codec.get();
    const rvqkv_cache_config config = default_cache({});
    rvqkv_codec* new_codec = nullptr;
    rvqkv_codecs* codecs = nullptr;
    rvqkv_cache* new_cache = nullptr;
    rvqkv_workspace* new_workspace = nullptr;
    rvqkv_sequence* made_here = nullptr;

    /// Calls a function with each of its pointers null in turn.
    const auto refuses = [](std::initializer_list<const char*> names, const auto& call) {
        std::size_t i = 0;
        for (const char* const name : names) {
            const auto unless = [&, at = std::size_t{0}](auto* pointer) mutable {
                return at++ == i ? nullptr : pointer;
            };
            CHECK(said([&](auto error) { return call(unless, error); }) ==
                  "invalid_argument: " + std::string(name) + " is null");
            ++i;
        }
    };
    refuses({"spec", "weights", "codec"}, [&](auto or_null, auto error) {
        const auto* const first = or_null(&spec);
        const auto* const second = or_null(sums);
        return rvqkv_codec_create(first, second, RVQKV_FLOAT32, 1, or_null(&new_codec), error);
    });
    refuses({"codec", "spec"}, [&](auto or_null, auto error) {
        const auto* const first = or_null(codec);
        return rvqkv_codec_describe(first, or_null(&spec), error);
    });
    refuses({"path", "codecs"}, [&](auto or_null, auto error) {
        const char* const first = or_null("a file");
        return rvqkv_codecs_load(first, or_null(&codecs), error);
    });
    refuses({"bytes", "codecs"}, [&](auto or_null, auto error) {
        const float* const first = or_null(sums);
        return rvqkv_codecs_load_memory(first, 4, or_null(&codecs), error);
    });
    refuses({"config", "cache"}, [&](auto or_null, auto error) {
        const auto* const first = or_null(&config);
        return rvqkv_cache_create(first, or_null(&new_cache), error);
    });
    refuses({"cache"}, [&](auto or_null, auto error) { return rvqkv_cache_reserve(or_null(cache), 1, error); });
    refuses({"cache", "workspace"}, [&](auto or_null, auto error) {
        const auto* const first = or_null(cache);
        return rvqkv_workspace_create(first, nullptr, or_null(&new_workspace), error);
    });
    refuses({"cache", "sequence"}, [&](auto or_null, auto error) {
        const auto* const first = or_null(cache);
        return rvqkv_sequence_create(first, or_null(&made_here), error);
    });
    refuses({"sequence", "fork"}, [&](auto or_null, auto error) {
        const auto* const first = or_null(sequence);
        return rvqkv_sequence_fork(first, or_null(&made_here), error);
    });
    refuses({"sequence", "keys", "values", "workspace"}, [&](auto or_null, auto error) {
        auto* const first = or_null(sequence);
        const auto* const second = or_null(&tensor);
        const auto* const third = or_null(&tensor);
        return rvqkv_sequence_append(first, 0, second, third, or_null(workspace), nullptr, error);
    });
    refuses({"sequence", "out", "workspace"}, [&](auto or_null, auto error) {
        auto* const first = or_null(sequence);
        const auto* const second = or_null(&tensor);
        return rvqkv_sequence_reconstruct(first, 0, RVQKV_KEYS, 0, second, 1, or_null(workspace), error);
    });
    refuses({"sequence", "queries", "out", "workspace"}, [&](auto or_null, auto error) {
        auto* const first = or_null(sequence);
        const auto* const second = or_null(&tensor);
        const auto* const third = or_null(&tensor);
        return rvqkv_sequence_attend(first, 0, second, third, or_null(workspace), nullptr, error);
    });
    refuses({"sequence", "queries", "out", "log_sum_exp", "workspace"}, [&](auto or_null, auto error) {
        auto* const first = or_null(sequence);
        const auto* const second = or_null(&tensor);
        const auto* const third = or_null(&tensor);
        auto* const fourth = or_null(sums);
        return rvqkv_sequence_attend_partial(first, 0, second, third, fourth, 1, or_null(workspace), nullptr, error);
    });
    refuses({"out", "log_sum_exp", "other", "other_log_sum_exp"}, [&](auto or_null, auto error) {
        const auto* const first = or_null(&tensor);
        auto* const second = or_null(sums);
        const auto* const third = or_null(&tensor);
        return rvqkv_merge_partial(first, second, third, or_null(sums), 1, error);
    });
    refuses({"sequence"},
            [&](auto or_null, auto error) { return rvqkv_sequence_truncate(or_null(sequence), 0, error); });
    refuses({"sequence"},
            [&](auto or_null, auto error) { return rvqkv_sequence_truncate_layer(or_null(sequence), 0, 0, error); });
    refuses({"sequence"},
            [&](auto or_null, auto error) { return rvqkv_sequence_evict(or_null(sequence), 0, 0, true, error); });
    refuses({"sequence"},
            [&](auto or_null, auto error) { return rvqkv_sequence_demote(or_null(sequence), 0, 1, 1, error); });
    refuses({"sequence"}, [&](auto or_null, auto error) {
        return rvqkv_sequence_demote_to(or_null(sequence), 0, 1, 1, nullptr, error);
    });
    refuses({"sequence"},
            [&](auto or_null, auto error) { return rvqkv_sequence_reserve(or_null(sequence), 1, error); });
    refuses({"sequence", "path"}, [&](auto or_null, auto error) {
        const auto* const first = or_null(sequence);
        return rvqkv_sequence_save(first, or_null("a file"), false, error);
    });
    refuses({"cache", "path", "sequence"}, [&](auto or_null, auto error) {
        const auto* const first = or_null(cache);
        const char* const second = or_null("a file");
        return rvqkv_sequence_load(first, second, nullptr, or_null(&made_here), error);
    });
    refuses({"cache", "bytes", "sequence"}, [&](auto or_null, auto error) {
        const auto* const first = or_null(cache);
        const float* const second = or_null(sums);
        return rvqkv_sequence_load_memory(first, second, 4, nullptr, or_null(&made_here), error);
    });
    CHECK(rvqkv_sequence_truncate(nullptr, 0, nullptr) == RVQKV_INVALID_ARGUMENT);  // without an error to fill

    rvqkv_codec_free(nullptr);
    rvqkv_codecs_free(nullptr);
    rvqkv_cache_free(nullptr);
    rvqkv_workspace_free(nullptr);
    rvqkv_sequence_free(nullptr);
    rvqkv_sequence_clear(nullptr);
    rvqkv_sequence_release_spare_pages(nullptr);
    rvqkv_cache_release_free_pages(nullptr);
    CHECK(rvqkv_codecs_count(nullptr) == 0);
    CHECK(rvqkv_codecs_layer(nullptr, 0) == RVQKV_NO_LAYER);
    CHECK(rvqkv_codecs_get(nullptr, 0, RVQKV_KEYS) == nullptr);
    CHECK(rvqkv_codecs_metadata(nullptr, "model") == nullptr);
    CHECK(rvqkv_cache_layers(nullptr) == 0);
    CHECK(rvqkv_cache_memory(nullptr).total == 0);
    CHECK(rvqkv_sequence_memory(nullptr).total == 0);
    const rvqkv_sequence* const none = nullptr;
    for (const rvqkv_sequence* const each : {none, static_cast<const rvqkv_sequence*>(sequence)}) {
        CHECK(rvqkv_sequence_tokens(each, 4) == 0);
        CHECK(rvqkv_sequence_first_token(each, 4) == 0);
        CHECK(rvqkv_sequence_next_position(each, 4) == 0);
    }
}

TEST_CASE("c_api: arguments that make no sense are refused by name", "[c_api][unit]") {
    test::random_source random(6);
    const twins both(random);
    const c_codec codec = codec_like(*both.keys);
    const auto cache_says = [&](const auto& change) {
        std::vector<rvqkv_layer_config> layers(2, default_layer());
        for (rvqkv_layer_config& layer : layers) {
            layer.key_codec = layer.value_codec = codec.get();
            layer.key_heads = layer.value_heads = 2;
        }
        rvqkv_cache_config config = default_cache(layers);
        change(config, layers[1]);
        rvqkv_cache* made_here = nullptr;
        std::string text = said([&](auto error) { return rvqkv_cache_create(&config, &made_here, error); });
        const c_cache owner(made_here);
        CHECK((made_here != nullptr) == (text == "ok"));
        return text;
    };
    using config = rvqkv_cache_config;
    using layer = rvqkv_layer_config;
    const std::string invalid = "invalid_argument: ";
    CHECK(cache_says([](config&, layer&) {}) == "ok");
    CHECK(cache_says([](config& c, layer&) { c.struct_size = 0; }).find(invalid + "config has struct_size 0") == 0);
    CHECK(cache_says([](config& c, layer&) { c.layers = nullptr; }) == invalid + "layers is null");
    CHECK(cache_says([](config& c, layer&) { c.layer_count = 0; }) ==
          invalid + "layers is empty, a cache needs at least 1");
    CHECK(cache_says([](config& c, layer&) { c.page_tokens = 5; }).find(invalid + "page_tokens is 5") == 0);
    CHECK(cache_says([](config& c, layer&) { c.exact_type = 3; }) == invalid + "exact_type is 3, must be from 0 to 2");
    CHECK(cache_says([](config& c, layer&) { c.exact_type = 0; }).find(invalid + "exact_type is float32") == 0);
    CHECK(cache_says([](config& c, layer&) {
              c.source.allocate = [](void*, std::size_t) -> void* { return nullptr; };
          }) == invalid + "source has one function only, must have allocate and release, or none");
    CHECK(cache_says([](config&, layer& c) {
              c.struct_size = 1;
          }).find(invalid + "layer 1: config has struct_size 1") == 0);
    CHECK(cache_says([](config&, layer& c) { c.coding = 4; }) == invalid + "layer 1: coding is 4, must be from 0 to 3");
    CHECK(cache_says([](config&, layer& c) { c.rope.pairs = 2; }) ==
          invalid + "layer 1: rope pairs is 2, must be from 0 to 1");
    CHECK(cache_says([](config&, layer& c) { c.key_codec = nullptr; }) == invalid + "layer 1: keys have no codec");
    CHECK(cache_says([](config&, layer& c) { c.query_heads = 3; }).find(invalid + "layer 1: query_heads is 3") == 0);

    const auto workspace_says = [&](const auto& change) {
        rvqkv_workspace_config with = default_workspace();
        change(with);
        rvqkv_workspace* made_here = nullptr;
        std::string text =
            said([&](auto error) { return rvqkv_workspace_create(both.c.get(), &with, &made_here, error); });
        const c_workspace owner(made_here);
        CHECK((made_here != nullptr) == (text == "ok"));
        return text;
    };
    using workspace_config = rvqkv_workspace_config;
    const auto run = [](void*, std::size_t, void (*)(void*, std::size_t), void*) {};
    CHECK(workspace_says([](workspace_config&) {}) == "ok");
    CHECK(workspace_says([](workspace_config& c) { c.struct_size = 3; }).find(invalid + "config has struct_size 3") ==
          0);
    CHECK(workspace_says([](workspace_config& c) { c.threads = 0; }) == invalid + "threads is 0, must be at least 1");
    CHECK(workspace_says([&](workspace_config& c) { c.workers.run = run; }) ==
          invalid + "workers.concurrency is 0, must be at least 1");
    CHECK(workspace_says([&](workspace_config& c) {
              c.workers = {nullptr, 2, run};
              c.threads = 2;
          }) == invalid + "threads is 2, must be 1 beside workers");

    const c_sequence sequence = both.new_sequence();
    const c_workspace workspace = both.new_workspace();
    const std::vector<float> numbers(100);
    rvqkv_tensor keys = rvqkv_tensor_of(numbers.data(), RVQKV_FLOAT32, 1, heads, key_dim);
    rvqkv_tensor values = rvqkv_tensor_of(numbers.data(), RVQKV_FLOAT32, 1, heads, value_dim);
    const auto append = [&] {
        return said([&](auto error) {
            return rvqkv_sequence_append(sequence.get(), 0, &keys, &values, workspace.get(), nullptr, error);
        });
    };
    keys.type = 7;
    CHECK(append() == invalid + "keys: type is 7, must be from 0 to 2");
    keys.type = RVQKV_FLOAT32;
    values.data = nullptr;
    CHECK(append() == invalid + "values: data is null");
    values.data = const_cast<float*>(numbers.data());
    CHECK(append() == "ok");
    const auto attend = [&](const rvqkv_tensor& from, const rvqkv_tensor& to, const rvqkv_attention_options* with) {
        return said([&](auto error) {
            return rvqkv_sequence_attend(sequence.get(), 0, &from, &to, workspace.get(), with, error);
        });
    };
    rvqkv_tensor bad = rvqkv_tensor_of(nullptr, RVQKV_FLOAT32, 1, query_heads, key_dim);
    rvqkv_attention_options options = default_options();
    CHECK(attend(bad, values, nullptr) == invalid + "queries: data is null");
    CHECK(attend(values, bad, nullptr) == invalid + "out: data is null");
    options.struct_size += 8;
    CHECK(attend(values, values, &options).find(invalid + "options has struct_size") == 0);
    CHECK(said([&](auto error) {
              return rvqkv_sequence_reconstruct(sequence.get(), 0, 2, 0, &keys, 1, workspace.get(), error);
          }) == invalid + "side is 2, must be RVQKV_KEYS or RVQKV_VALUES");
    CHECK(said([&](auto error) {
              return rvqkv_sequence_reconstruct(sequence.get(), 0, 0, 0, &bad, 1, workspace.get(), error);
          }) == invalid + "out: data is null");
    float sums[heads] = {};
    CHECK(said([&](auto error) { return rvqkv_merge_partial(&bad, sums, &keys, sums, heads, error); }) ==
          invalid + "out: data is null");
    CHECK(said([&](auto error) { return rvqkv_merge_partial(&keys, sums, &bad, sums, heads, error); }) ==
          invalid + "other: data is null");
    rvqkv_codec_spec spec;
    rvqkv_codec_spec_init(&spec, 4);
    CHECK(said([&](auto error) {
              return rvqkv_codec_describe(codec.get(), &spec, error);
          }).find(invalid + "spec has struct_size") == 0);
}

TEST_CASE("c_api: a message is cut where the error ends", "[c_api][unit]") {
    const std::string path = "/no/" + std::string(2000, 'x');
    rvqkv_codecs* codecs = nullptr;
    rvqkv_error error;
    CHECK(rvqkv_codecs_load(path.c_str(), &codecs, &error) == RVQKV_IO);
    CHECK(std::strlen(error.message) == sizeof error.message - 1);
    CHECK(rvqkv_codecs_load(path.c_str(), &codecs, nullptr) == RVQKV_IO);
}

// ---- Memory ----

TEST_CASE("c_api: handles may be freed in any order", "[c_api][unit]") {
    test::random_source random(8);
    twins both(random);
    c_sequence first = both.new_sequence();
    const c_workspace workspace = both.new_workspace();
    const std::vector<float> numbers(300 * heads * key_dim, 1.0F);
    const rvqkv_tensor keys = rvqkv_tensor_of(numbers.data(), RVQKV_FLOAT32, 300, heads, key_dim);
    const rvqkv_tensor values = rvqkv_tensor_of(numbers.data(), RVQKV_FLOAT32, 300, heads, value_dim);
    const auto append = [&](rvqkv_sequence* to) {
        return said(
            [&](auto error) { return rvqkv_sequence_append(to, 0, &keys, &values, workspace.get(), nullptr, error); });
    };
    REQUIRE(append(first.get()) == "ok");
    both.c.reset();
    const c_sequence second =
        made<c_sequence>([&](auto handle, auto error) { return rvqkv_sequence_fork(first.get(), handle, error); });
    first.reset();
    CHECK(append(second.get()) == "ok");
    CHECK(rvqkv_sequence_tokens(second.get(), 0) == 600);
    CHECK(both.c_source.live_bytes > 0);
    rvqkv_sequence* const last = const_cast<c_sequence&>(second).release();
    rvqkv_sequence_free(last);
    CHECK(both.c_source.live_bytes == 0);
}

TEST_CASE("c_api: memory that runs out anywhere is reported, and nothing is lost", "[c_api][unit]") {
    test::random_source random(9);
    const twins both(random);
    const test::temp_dir folder;
    const std::string codec_path = folder.file("codecs");
    const std::string path = folder.file("sequence");
    rvqkv::codec_set set;
    set.layers[0] = {both.keys, both.values};
    rvqkv::save_codecs(codec_path, set).value();
    const c_codec codec = codec_like(*both.keys);
    const c_workspace workspace = both.new_workspace();
    const c_sequence sequence = both.new_sequence();
    const std::vector<float> numbers(200 * heads * key_dim, 1.0F);
    const rvqkv_tensor keys = rvqkv_tensor_of(numbers.data(), RVQKV_FLOAT32, 200, heads, key_dim);
    const rvqkv_tensor values = rvqkv_tensor_of(numbers.data(), RVQKV_FLOAT32, 200, heads, value_dim);

    /// Lets every allocation fail in turn, the first, the second, ..., until the call succeeds. Some must matter.
    const auto survives = [&](const auto& call) {
        std::size_t failures = 0;
        for (bool failed = true; failed;) {
            rvqkv_error error;
            rvqkv_status status = RVQKV_OK;
            {
                const test::failing_allocations failing(failures);
                status = call(&error);
                failed = failing.triggered();
            }
            INFO(rvqkv_status_name(status) << ": " << error.message);
            REQUIRE(status == error.status);
            REQUIRE((status == RVQKV_OUT_OF_MEMORY || status == RVQKV_OK));
            failures += failed ? 1 : 0;
        }
        REQUIRE(failures > 0);
    };
    const auto survives_making = [&](auto free, const auto& call) {
        survives([&](rvqkv_error* error) {
            const auto [handle, status] = call(error);
            const bool is_right = (handle != nullptr) == (status == RVQKV_OK);
            free(handle);
            return is_right ? status : RVQKV_UNSUPPORTED;
        });
    };
    rvqkv_codec_spec spec = rvqkv::detail::c_api::describe(*both.keys->spec());
    const auto weights = both.keys->weights();
    survives_making(rvqkv_codec_free, [&](auto error) {
        rvqkv_codec* handle = nullptr;
        const rvqkv_status status =
            rvqkv_codec_create(&spec, weights.data(), RVQKV_FLOAT32, weights.size() / 4, &handle, error);
        return std::pair(handle, status);
    });
    survives_making(rvqkv_codecs_free, [&](auto error) {
        rvqkv_codecs* handle = nullptr;
        const rvqkv_status status = rvqkv_codecs_load(codec_path.c_str(), &handle, error);
        return std::pair(handle, status);
    });
    std::vector<rvqkv_layer_config> layers(2, default_layer());
    for (rvqkv_layer_config& layer : layers) {
        layer.key_codec = layer.value_codec = codec.get();
        layer.key_heads = layer.value_heads = heads;
        layer.coding = RVQKV_AFTER_ROPE;
        layer.key_mean = both.mean.data();
        layer.key_mean_count = both.mean.size();
    }
    test::counting_source source;
    rvqkv_cache_config config = default_cache(layers);
    config.source = functions_of(source);
    survives_making(rvqkv_cache_free, [&](auto error) {
        rvqkv_cache* handle = nullptr;
        const rvqkv_status status = rvqkv_cache_create(&config, &handle, error);
        return std::pair(handle, status);
    });
    survives_making(rvqkv_workspace_free, [&](auto error) {
        rvqkv_workspace* handle = nullptr;
        const rvqkv_status status = rvqkv_workspace_create(both.c.get(), nullptr, &handle, error);
        return std::pair(handle, status);
    });
    survives_making(rvqkv_sequence_free, [&](auto error) {
        rvqkv_sequence* handle = nullptr;
        const rvqkv_status status = rvqkv_sequence_create(both.c.get(), &handle, error);
        return std::pair(handle, status);
    });
    for (const std::size_t layer : {std::size_t{0}, windowed}) {
        survives([&](auto error) {
            return rvqkv_sequence_append(sequence.get(), layer, &keys, &values, workspace.get(), nullptr, error);
        });
    }
    survives_making(rvqkv_sequence_free, [&](auto error) {
        rvqkv_sequence* handle = nullptr;
        const rvqkv_status status = rvqkv_sequence_fork(sequence.get(), &handle, error);
        return std::pair(handle, status);
    });
    survives([&](auto error) { return rvqkv_sequence_save(sequence.get(), path.c_str(), false, error); });
    survives_making(rvqkv_sequence_free, [&](auto error) {
        rvqkv_sequence* handle = nullptr;
        const rvqkv_status status = rvqkv_sequence_load(both.c.get(), path.c_str(), nullptr, &handle, error);
        return std::pair(handle, status);
    });
    survives([&](auto error) { return rvqkv_sequence_demote(sequence.get(), 200, 1, 1, error); });
    survives([&](auto error) { return rvqkv_sequence_reserve(sequence.get(), 1000, error); });
    rvqkv_sequence_release_spare_pages(sequence.get());

    // Pages, and a budget of them.
    test::counting_source& pages = const_cast<twins&>(both).c_source;
    rvqkv_cache_release_free_pages(both.c.get());
    const std::size_t live = pages.live_bytes;
    const std::size_t tokens = rvqkv_sequence_tokens(sequence.get(), 0);
    std::size_t nth = 0;
    for (;; ++nth) {
        pages.until_failure = nth;
        pages.failed = false;
        rvqkv_error error;
        const rvqkv_status status =
            rvqkv_sequence_append(sequence.get(), 0, &keys, &values, workspace.get(), nullptr, &error);
        pages.until_failure = test::counting_source::never;
        if (!pages.failed) {
            REQUIRE(status == RVQKV_OK);
            break;
        }
        REQUIRE(status == RVQKV_OUT_OF_MEMORY);
        REQUIRE(std::string(error.message) == "out of memory");
        REQUIRE(rvqkv_sequence_tokens(sequence.get(), 0) == tokens);
        rvqkv_cache_release_free_pages(both.c.get());
        REQUIRE(pages.live_bytes == live);
    }
    CHECK(nth > 2);
    CHECK(said([&](auto error) { return rvqkv_sequence_reserve(sequence.get(), 1000000, error); }) ==
          "out_of_memory: out of memory");
    CHECK(said([&](auto error) { return rvqkv_cache_reserve(both.c.get(), 10000000, error); }) ==
          "out_of_memory: out of memory");
}

// ---- Files ----

TEST_CASE("c_api: a damaged sequence is refused, or recovered on request", "[c_api][files]") {
    test::random_source random(10);
    const twins both(random);
    const test::temp_dir folder;
    const std::string path = folder.file("sequence");
    const c_sequence sequence = both.new_sequence();
    const c_workspace workspace = both.new_workspace();
    const std::vector<float> numbers = test::gaussian_numbers(random, 300 * heads * key_dim);
    const rvqkv_tensor keys = rvqkv_tensor_of(numbers.data(), RVQKV_FLOAT32, 300, heads, key_dim);
    const rvqkv_tensor values = rvqkv_tensor_of(numbers.data(), RVQKV_FLOAT32, 300, heads, value_dim);
    for (const std::size_t layer : {std::size_t{0}, windowed}) {
        REQUIRE(rvqkv_sequence_append(sequence.get(), layer, &keys, &values, workspace.get(), nullptr, nullptr) ==
                RVQKV_OK);
    }
    REQUIRE(rvqkv_sequence_save(sequence.get(), path.c_str(), false, nullptr) == RVQKV_OK);

    rvqkv_recovery recovery{true, 1, "untouched"};
    made<c_sequence>([&](auto handle, auto error) {
        return rvqkv_sequence_load(both.c.get(), path.c_str(), &recovery, handle, error);
    });
    CHECK_FALSE(recovery.was_damaged);
    CHECK(recovery.tokens == 300);
    CHECK(std::string(recovery.damage).empty());

    std::string bytes = test::read_file(path);
    bytes[bytes.size() - 1] = static_cast<char>(bytes[bytes.size() - 1] ^ 1);
    test::write_file(path, bytes);
    rvqkv_sequence* refused = nullptr;
    const std::string expected = test::message_of(rvqkv::load_sequence(*both.cache, path));
    CHECK(expected.find("damaged_file: ") == 0);
    CHECK(said([&](auto error) { return rvqkv_sequence_load(both.c.get(), path.c_str(), nullptr, &refused, error); }) ==
          expected);
    CHECK(refused == nullptr);
    const c_sequence rest = made<c_sequence>([&](auto handle, auto error) {
        return rvqkv_sequence_load_memory(both.c.get(), bytes.data(), bytes.size(), &recovery, handle, error);
    });
    rvqkv::sequence_recovery found;
    const auto other = rvqkv::load_sequence(*both.cache, path, {true, &found}).value();
    CHECK(recovery.was_damaged);
    CHECK(recovery.tokens == found.tokens);
    CHECK(rvqkv_sequence_tokens(rest.get(), 0) == other.tokens(0));
    CHECK_FALSE(std::string(recovery.damage).empty());

    CHECK(said([&](auto error) {
              return rvqkv_sequence_save(sequence.get(), folder.file("no/file").c_str(), false, error);
          }).find("io: ") == 0);
    test::write_file(path, std::string(1000, 'x'));  // no sequence: not added to
    const std::string other_file =
        said([&](auto error) { return rvqkv_sequence_save(sequence.get(), path.c_str(), true, error); });
    CHECK(other_file.find("damaged_file: ") == 0);
}
