// SPDX-License-Identifier: MIT
/// @file
/// What the sequences of a cache share: its configuration, its pages, its memory.
#include "rvqkv/cache/kv_cache.hpp"

#include "rvqkv/core/thread_pool.hpp"
#include "support/allocation_counter.hpp"
#include "support/cache_tensors.hpp"
#include "support/catch.hpp"
#include "support/page_sources.hpp"
#include "support/random.hpp"

#include <cstddef>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using rvqkv::dtype;
using rvqkv::kv_cache;
using rvqkv::kv_cache_config;
using test::message_of;
using test::shared_codec;

kv_cache_config one_layer(shared_codec keys, std::size_t key_heads, shared_codec values, std::size_t value_heads) {
    kv_cache_config config;
    config.layers = {{{std::move(keys), key_heads}, {std::move(values), value_heads}}};
    return config;
}

}  // namespace

TEST_CASE("kv_cache: a configuration that makes no sense is refused by name", "[cache][unit]") {
    test::random_source random(14);
    const shared_codec codec = test::plain_codec(random, 8, {2, 5, 4});
    const auto refused = [&](const auto& change) {
        kv_cache_config config;
        config.layers.assign(4, {{codec, 2}, {codec, 2}});
        change(config);
        const auto made = kv_cache::create(config);
        return made.ok() ? std::string("ok") : made.error().message;
    };
    using config = kv_cache_config;
    CHECK(refused([](config&) {}) == "ok");
    CHECK(refused([](config& c) { c.layers.clear(); }) == "layers is empty, a cache needs at least 1");
    CHECK(refused([](config& c) { c.page_tokens = 0; }) ==
          "page_tokens is 0, must be a multiple of 64 from 64 to 65536");
    CHECK(refused([](config& c) { c.page_tokens = 100; }) ==
          "page_tokens is 100, must be a multiple of 64 from 64 to 65536");
    CHECK(refused([](config& c) { c.page_tokens = 65600; }) ==
          "page_tokens is 65600, must be a multiple of 64 from 64 to 65536");
    CHECK(refused([](config& c) { c.page_tokens = 65536; }) == "ok");
    CHECK(refused([](config& c) { c.sink_tokens = 70000; }) == "sink_tokens is 70000, must be from 0 to 65536");
    CHECK(refused([](config& c) { c.recent_tokens = 70000; }) == "recent_tokens is 70000, must be from 0 to 65536");
    CHECK(refused([](config& c) { c.exact_type = dtype::float32; }) ==
          "exact_type is float32, must be float16 or bfloat16");
    CHECK(refused([](config& c) { c.layers[1].keys.codec = nullptr; }) == "layer 1: keys have no codec");
    CHECK(refused([](config& c) { c.layers[3].values.heads = 0; }) == "layer 3: values.heads is 0, must be at least 1");
    CHECK(refused([](config& c) { c.layers[2].values.heads = 70000; }) ==
          "layer 2 values: 70000 heads of 8 channels are more than a page can hold");
    CHECK(refused([](config& c) { c.layers[2].query_heads = 3; }).find("layer 2: query_heads is 3") == 0);
    CHECK(refused([](config& c) { c.layers[2].key_mean = {1.0F}; }).find("layer 2: key_mean has 1 numbers") == 0);
    CHECK(refused([](config& c) {
              c.layers[1].coding = rvqkv::key_coding::before_rope;
              c.layers[1].rope.dims = 9;
          }) == "layer 1: rope dims is 9, must be even and from 2 to head_dim 8");
    CHECK(refused([](config& c) {
              c.layers[1].coding = rvqkv::key_coding::block_relative;
              c.layers[1].block_tokens = 100;
          }) == "layer 1: block_tokens is 100, must be a multiple of page_tokens 64 and no less than sink_tokens 4");
    CHECK(refused([](config& c) { c.layers[1] = {}; }) == "ok");
    CHECK(refused([](config& c) {
              c.layers[1] = {};
              c.layers[1].shares_layer = 0;
          }) == "ok");
    CHECK(refused([](config& c) { c.layers[1].shares_layer = 0; }) ==
          "layer 1: shares layer 0's cache, so it must have no codecs and no heads");
    CHECK(refused([](config& c) {
              c.layers[0].sliding_window = 100;
              c.layers[1] = {};
              c.layers[1].shares_layer = 0;
          }) == "layer 1: sliding_window is 0, but layer 0 keeps 100 tokens only");
    const std::string no_owner = "must be an earlier layer that has a cache of its own";
    CHECK(refused([](config& c) {
              c.layers[1] = {};
              c.layers[1].shares_layer = 2;
          }) == "layer 1: shares_layer is 2, " + no_owner);
    CHECK(refused([](config& c) {
              c.layers[1] = {};
              c.layers[2] = {};
              c.layers[2].shares_layer = 1;
          }) == "layer 2: shares_layer is 1, " + no_owner);
}

TEST_CASE("kv_cache: a bad RVQKV_SIMD is a failure of create, not an exception later", "[cache][unit]") {
    test::random_source random(18);
    const shared_codec codec = test::plain_codec(random, 8, {2, 5, 4});
    const char* const wanted = std::getenv("RVQKV_SIMD");
    const std::string restored = wanted == nullptr ? "" : wanted;
    ::setenv("RVQKV_SIMD", "sse9", 1);
    const auto made = kv_cache::create(one_layer(codec, 1, codec, 1));
    ::setenv("RVQKV_SIMD", restored.c_str(), 1);  // an empty one counts as none
    REQUIRE_FALSE(made.ok());
    CHECK(made.error().message.find("RVQKV_SIMD=sse9: not one of generic, neon, avx2") == 0);
    CHECK(kv_cache::create(one_layer(codec, 1, codec, 1)).ok());
}

TEST_CASE("kv_cache: a handle, which its sequences keep alive", "[cache][unit]") {
    test::random_source random(1);
    const shared_codec codec = test::plain_codec(random, 8, {2, 5, 4});
    const long uses = codec.use_count();
    std::optional<kv_cache> cache = kv_cache::create(one_layer(codec, 2, codec, 2)).value();
    CHECK(codec.use_count() > uses);
    CHECK(cache->layers() == 1);
    CHECK(cache->page_tokens() == 64);
    CHECK(cache->layer_config(0).keys.heads == 2);
    kv_cache copy = *cache;
    std::optional<rvqkv::kv_sequence> sequence = copy.new_sequence().value();
    std::optional<rvqkv::kv_sequence> other = cache->new_sequence().value();
    rvqkv::kv_workspace workspace = cache->make_workspace().value();
    cache.reset();
    const kv_cache moved = std::move(copy);
    CHECK(message_of(copy.new_sequence()) == "invalid_argument: the cache was moved from");    // NOLINT
    CHECK(message_of(copy.make_workspace()) == "invalid_argument: the cache was moved from");  // NOLINT
    CHECK(message_of(copy.reserve(1)) == "invalid_argument: the cache was moved from");
    CHECK(copy.layers() == 0);
    CHECK(copy.bytes().total() == 0);
    copy.release_free_pages();
    other.reset();
    test::tensor x(dtype::float32, {200, 2, 8}, random);
    x.fill(random);
    sequence->append(0, x.view(), x.view(), workspace).value();
    copy = moved;
    CHECK(copy.bytes().pages > 0);
    sequence.reset();
    CHECK(copy.bytes().pages == 0);
    CHECK(copy.bytes().free_pages > 0);
    copy.release_free_pages();
    CHECK(copy.bytes().free_pages == 0);
}

TEST_CASE("kv_cache: what it says of its bytes is what it asked for", "[cache][property]") {
    test::random_source random(8);
    CAPTURE(test::seed());
    for (int round = 0; round < 12; ++round) {
        const shared_codec keys = test::random_codec(random, 37);
        const shared_codec values = test::random_codec(random, 2048);
        kv_cache_config config;
        config.page_tokens = 64 * random.integer(1, 3);
        config.sink_tokens = random.integer(0, 5);
        config.recent_tokens = random.integer(0, 150);
        const std::size_t heads = random.integer(1, 4);
        const std::size_t layers = random.integer(1, 40);
        config.layers.assign(layers, {{keys, heads}, {values, 3}});
        CAPTURE(round, config.page_tokens, config.sink_tokens, config.recent_tokens, layers);
        test::tensor k(dtype::float32, {90, heads, keys->head_dim()}, random);
        test::tensor v(dtype::float16, {90, 3, values->head_dim()}, random);
        rvqkv::kv_workspace workspace;

        const test::allocation_counter counter;
        std::size_t workspace_bytes = 0;
        {
            kv_cache cache = kv_cache::create(config).value();
            const auto held = [&] {
                return static_cast<std::size_t>(counter.live_bytes()) - (workspace.bytes() - workspace_bytes);
            };
            CHECK(held() == cache.bytes().total());
            CHECK(cache.bytes().codecs == keys->bytes() + values->bytes());
            CHECK(cache.bytes().pages == 0);
            rvqkv::kv_sequence sequence = cache.new_sequence().value();
            const auto says = [&] { return cache.bytes().total() + sequence.bytes().page_tables; };
            CHECK(held() == says());
            sequence.reserve(100).value();
            CHECK(held() == says());
            CHECK(cache.bytes().pages == sequence.bytes().spare);
            for (int i = 0; i < 4; ++i) {
                sequence.append(layers - 1, k.view(), v.view(), workspace).value();
                CHECK(held() == says());
                const rvqkv::kv_sequence_bytes bytes = sequence.bytes();
                CHECK(bytes.total() == cache.bytes().pages + bytes.page_tables);
            }
            sequence.demote(300, 1, 1).value();
            CHECK(held() == says());
            CHECK(sequence.bytes().total() == cache.bytes().pages + sequence.bytes().page_tables);
            sequence.truncate(layers - 1, 1).value();
            CHECK(held() == says());
            sequence.clear();
            CHECK(sequence.bytes().codes + sequence.bytes().exact == 0);
            sequence.release_spare_pages();
            CHECK(cache.bytes().pages == 0);
            CHECK(held() == says());
            cache.release_free_pages();
            CHECK(cache.bytes().free_pages == 0);
            CHECK(held() == says());
        }
        const auto left = static_cast<std::size_t>(counter.live_bytes());
        CHECK(left == workspace.bytes());
    }
}

TEST_CASE("kv_cache: whichever allocation fails, create and new_sequence leave nothing behind", "[cache][unit]") {
    test::random_source random(11);
    const shared_codec codec = test::plain_codec(random, 8, {2, 5, 4});
    for (std::size_t nth = 0;; ++nth) {
        CAPTURE(nth);
        kv_cache_config config;
        config.layers.assign(3, {{codec, 2}, {codec, 2}});
        config.layers[1].coding = rvqkv::key_coding::after_rope;
        config.layers[2].key_mean.assign(16, 0.5F);
        bool made = false;
        bool triggered = false;
        bool out_of_memory = false;
        {
            const test::allocation_counter counter;
            kv_cache_config given = std::move(config);
            const std::ptrdiff_t before = counter.live_bytes();
            {
                const test::failing_allocations failing(nth);
                auto cache = kv_cache::create(std::move(given));
                if (cache.ok()) {
                    const auto sequence = cache.value().new_sequence();
                    const auto workspace = cache.value().make_workspace();
                    made = sequence.ok() && workspace.ok();
                    out_of_memory = (sequence.ok() || sequence.error().code == rvqkv::error_code::out_of_memory) &&
                                    (workspace.ok() || workspace.error().code == rvqkv::error_code::out_of_memory);
                } else {
                    out_of_memory = cache.error().code == rvqkv::error_code::out_of_memory;
                }
                triggered = failing.triggered();
            }
            REQUIRE(counter.live_bytes() <= before);
        }
        if (!triggered) {
            CHECK(made);
            CHECK(nth > 8);
            break;
        }
        CHECK_FALSE(made);
        CHECK(out_of_memory);
    }
}

TEST_CASE("kv_cache: pages reserved for all sequences are taken before the source is asked", "[cache][unit]") {
    test::random_source random(12);
    const shared_codec codec = test::plain_codec(random, 8, {2, 5, 4});
    test::counting_source source;
    kv_cache_config config;
    config.layers.assign(3, {{codec, 2}, {codec, 2}});
    config.source = &source;
    kv_cache cache = kv_cache::create(config).value();
    test::tensor x(dtype::float32, {500, 2, 8}, random);
    x.fill(random);
    rvqkv::kv_workspace workspace = cache.make_workspace().value();
    cache.reserve(500).value();
    const std::size_t reserved = source.allocations;
    CHECK(reserved == 3 * (1 + 2 + 6));
    rvqkv::kv_sequence sequence = cache.new_sequence().value();
    for (std::size_t layer = 0; layer < 3; ++layer) {
        sequence.append(layer, x.view(), x.view(), workspace).value();
    }
    CHECK(source.allocations == reserved);
    source.until_failure = 0;
    CHECK(message_of(cache.reserve(10000)) == "out_of_memory: out of memory");
    CHECK(sequence.tokens(0) == 500);
}
