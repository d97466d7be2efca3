// SPDX-License-Identifier: MIT
/// @file
/// A sequence against the codec itself: whatever the shapes, splits, ranges and failures, it gives back what was given,
/// exactly while tokens are first or recent, and else as the codec gives it back.
#include "rvqkv/cache/kv_sequence.hpp"

#include "rvqkv/cache/kv_cache.hpp"
#include "rvqkv/core/thread_pool.hpp"
#include "support/allocation_counter.hpp"
#include "support/cache_tensors.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/page_sources.hpp"
#include "support/random.hpp"

#include <sys/wait.h>
#include <unistd.h>
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using rvqkv::dtype;
using rvqkv::key_coding;
using rvqkv::kv_cache;
using rvqkv::kv_cache_config;
using rvqkv::kv_sequence;
using rvqkv::kv_workspace;
using test::message_of;
using test::plain_codec;
using test::shared_codec;
using test::tensor;

constexpr std::size_t all = kv_sequence::all_depths;

/// A side of a layer with its input.
struct side {
    shared_codec codec;
    std::size_t heads;
    tensor input;

    side(shared_codec codec_, std::size_t heads_, dtype type, std::size_t tokens, test::random_source& random)
        : codec(std::move(codec_)), heads(heads_), input(type, {tokens, heads_, codec->head_dim()}, random) {
        input.fill(random);
    }
    [[nodiscard]] rvqkv::kv_side_config config() const { return {codec, heads}; }
    /// All tokens rounded to the cache's type, and what the codec makes of them.
    [[nodiscard]] tensor exact(dtype exact_type, dtype type = dtype::float32) const {
        return input.as(exact_type).as(type);
    }
    [[nodiscard]] tensor coded(dtype exact_type, dtype type = dtype::float32, std::size_t depths = all) const {
        return test::round_trip(*codec, input.as(exact_type), type, std::min(depths, codec->depths()));
    }
};

kv_cache_config one_layer(const side& keys, const side& values) {
    kv_cache_config config;
    config.layers = {{keys.config(), values.config()}};
    return config;
}
/// Without exact tokens, but for those of the last page.
kv_cache_config plain(kv_cache_config config) {
    config.sink_tokens = 0;
    config.recent_tokens = 0;
    return config;
}
kv_cache make_cache(const kv_cache_config& config) {
    return kv_cache::create(config).value();
}

tensor all_keys(const kv_sequence& sequence, std::size_t layer, dtype type = dtype::float32, std::size_t depths = all) {
    const auto& config = sequence.layer_config(layer).keys;
    const std::size_t first = sequence.first_token(layer);
    tensor out(type, {sequence.tokens(layer) - first, config.heads, config.codec->head_dim()});
    kv_workspace workspace;
    sequence.reconstruct_keys(layer, first, out.view(), workspace, depths).value();
    return out;
}
tensor all_values(const kv_sequence& sequence, std::size_t layer, dtype type = dtype::float32,
                  std::size_t depths = all) {
    const auto& config = sequence.layer_config(layer).values;
    const std::size_t first = sequence.first_token(layer);
    tensor out(type, {sequence.tokens(layer) - first, config.heads, config.codec->head_dim()});
    kv_workspace workspace;
    sequence.reconstruct_values(layer, first, out.view(), workspace, depths).value();
    return out;
}

/// Appends everything from the layer's token on, in pieces of up to `most` tokens.
void append_rest(kv_sequence& sequence, std::size_t layer, const tensor& keys, const tensor& values,
                 kv_workspace& workspace, test::random_source& random, std::size_t most) {
    while (sequence.tokens(layer) < keys.tokens()) {
        const std::size_t first = sequence.tokens(layer);
        const std::size_t count = std::min(keys.tokens() - first, random.integer(0, most));
        sequence.append(layer, keys.slice(first, count), values.slice(first, count), workspace).value();
    }
}

/// Whether two sequences hold the same tokens in the same formats, pages of codes byte for byte.
bool same_runs(const kv_sequence& a, const kv_sequence& b, std::size_t layer) {
    const auto left = a.runs(layer);
    const auto right = b.runs(layer);
    return a.tokens(layer) == b.tokens(layer) &&
           std::equal(left.begin(), left.end(), right.begin(), right.end(),
                      [](const rvqkv::page_run& x, const rvqkv::page_run& y) {
                          return x.format->is_exact == y.format->is_exact && x.format->bytes == y.format->bytes &&
                                 x.first == y.first && x.tokens == y.tokens && x.position == y.position &&
                                 x.coded_position == y.coded_position &&
                                 (x.format->is_exact || std::memcmp(x.page, y.page, x.format->coded_values.end()) == 0);
                      });
}

/// Everything that a caller can see of a sequence.
struct snapshot {
    std::vector<std::size_t> tokens;
    std::vector<tensor> contents;
    std::size_t codes;
    std::size_t exact;
    std::size_t pages;

    snapshot(const kv_sequence& sequence, const kv_cache& cache)
        : codes(sequence.bytes().codes), exact(sequence.bytes().exact), pages(cache.bytes().pages) {
        for (std::size_t layer = 0; layer < sequence.layers(); ++layer) {
            tokens.push_back(sequence.tokens(layer));
            contents.push_back(all_keys(sequence, layer));
            contents.push_back(all_values(sequence, layer));
        }
    }
    [[nodiscard]] bool operator==(const snapshot& other) const {
        bool same = tokens == other.tokens && codes == other.codes && exact == other.exact && pages == other.pages;
        for (std::size_t i = 0; same && i < contents.size(); ++i) {
            same = contents[i].is_part_of(other.contents[i], 0);
        }
        return same;
    }
};

}  // namespace

TEST_CASE("kv_sequence: gives back what the codec gives, for any shape, type, policy and code width",
          "[cache][differential]") {
    test::random_source random(1);
    CAPTURE(test::seed());
    std::vector<std::size_t> codewords = {1, 2, 37, 2048};
    for (unsigned bits = 2; bits <= 16; ++bits) {
        codewords.push_back((std::size_t{1} << (bits - 1)) + 1);
        codewords.push_back(std::size_t{1} << bits);
    }
    for (std::size_t round = 0; round < codewords.size(); ++round) {
        const std::size_t page_tokens = 64 * random.integer(1, 3);
        const std::size_t tokens = page_tokens + random.integer(0, 40);
        const side keys(test::random_codec(random, codewords[round]), random.integer(1, 3),
                        pick(random, test::all_types), tokens, random);
        const side values(test::random_codec(random, codewords[(round * 7 + 3) % codewords.size()]),
                          random.integer(1, 3), pick(random, test::all_types), tokens, random);
        kv_cache_config config = plain(one_layer(keys, values));
        config.page_tokens = page_tokens;
        config.exact_type = random.integer(0, 1) == 0 ? dtype::float16 : dtype::bfloat16;
        const kv_cache cache = make_cache(config);
        kv_sequence sequence = cache.new_sequence().value();
        kv_workspace workspace;  // grows as it must
        CAPTURE(round, tokens, page_tokens, keys.codec->shape().codewords, values.codec->shape().codewords);
        append_rest(sequence, 0, keys.input, values.input, workspace, random, random.integer(1, tokens));
        REQUIRE(sequence.tokens(0) == tokens);
        CHECK(sequence.runs(0).size() == (tokens + page_tokens - 1) / page_tokens);

        for (int read = 0; read < 6; ++read) {
            const std::size_t first = random.integer(0, tokens);
            const std::size_t count = random.integer(0, tokens - first);
            const std::size_t in_codes = first < page_tokens ? std::min(count, page_tokens - first) : 0;
            const dtype type = pick(random, test::all_types);
            const std::size_t key_depths = random.integer(0, keys.codec->depths());
            CAPTURE(first, count, rvqkv::name_of(type), key_depths);
            const auto check = [&](const side& of, bool is_keys, std::size_t depths) {
                tensor out(type, {count, of.heads, of.codec->head_dim()}, random);
                CHECK((is_keys ? sequence.reconstruct_keys(0, first, out.view(), workspace, depths)
                               : sequence.reconstruct_values(0, first, out.view(), workspace, depths))
                          .ok());
                const tensor coded = of.coded(config.exact_type, type, depths);
                const tensor exact = of.exact(config.exact_type, type);
                bool same = true;
                for (std::size_t i = 0; i < count; ++i) {
                    same = same && out.same_token(i, i < in_codes ? coded : exact, first + i);
                }
                CHECK(same);
            };
            check(keys, true, key_depths);
            check(values, false, all);
        }
    }
}

TEST_CASE("kv_sequence: first and recent tokens are exact, the others codes", "[cache][property]") {
    test::random_source random(2);
    CAPTURE(test::seed());
    const std::size_t tokens = 400;
    const side keys(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, tokens, random);
    const side values(plain_codec(random, 6, {3, 37, 2}), 1, dtype::bfloat16, tokens, random);
    const tensor exact = keys.exact(dtype::float16);
    const tensor coded = keys.coded(dtype::float16);
    const tensor exact_values = values.exact(dtype::float16);
    const tensor coded_values = values.coded(dtype::float16);
    for (const std::size_t sinks : {0U, 4U, 70U}) {
        for (const std::size_t recent : {0U, 1U, 64U, 100U, 1000U}) {
            kv_cache_config config = one_layer(keys, values);
            config.sink_tokens = sinks;
            config.recent_tokens = recent;
            const kv_cache cache = make_cache(config);
            kv_sequence sequence = cache.new_sequence().value();
            kv_workspace workspace = cache.make_workspace().value();
            for (std::size_t held = 1; held <= tokens; ++held) {
                sequence.append(0, keys.input.slice(held - 1, 1), values.input.slice(held - 1, 1), workspace).value();
                if (held % 37 != 0 && held != tokens) {
                    continue;
                }
                // Whole pages behind the sinks, in front of the recent tokens.
                const std::size_t old = held < sinks + recent ? 0 : (held - sinks - recent) / 64 * 64;
                const tensor out = all_keys(sequence, 0);
                const tensor out_values = all_values(sequence, 0);
                CAPTURE(sinks, recent, held, old);
                bool same = true;
                for (std::size_t i = 0; i < held; ++i) {
                    const bool is_coded = i >= sinks && i < sinks + old;
                    same = same && out.same_token(i, is_coded ? coded : exact, i) &&
                           out_values.same_token(i, is_coded ? coded_values : exact_values, i);
                }
                CHECK(same);
            }
        }
    }
}

TEST_CASE("kv_sequence: the same pages however appends are split, whoever works", "[cache][threads][property]") {
    test::random_source random(4);
    CAPTURE(test::seed());
    const std::size_t tokens = 700;
    const side keys(plain_codec(random, 64, {2, 37, 16}), 3, dtype::float16, tokens, random);
    // Blocks are 65536 numbers: here 64 tokens, so that pages of 192 tokens have three.
    const side values(plain_codec(random, 1024, {2, 5, 32}), 2, dtype::float32, tokens, random);
    for (const std::size_t page_tokens : {64U, 192U}) {
        for (const bool is_plain : {true, false}) {
            kv_cache_config config = one_layer(keys, values);
            config = is_plain ? plain(config) : config;
            config.page_tokens = page_tokens;
            config.layers[0].key_mean.assign(3 * 64, 0.25F);
            const kv_cache cache = make_cache(config);
            kv_workspace workspace = cache.make_workspace().value();
            kv_sequence whole = cache.new_sequence().value();
            whole.append(0, keys.input.view(), values.input.view(), workspace).value();
            kv_sequence split = cache.new_sequence().value();
            append_rest(split, 0, keys.input, values.input, workspace, random, 90);
            CHECK(same_runs(whole, split, 0));
            CHECK(whole.bytes().codes == split.bytes().codes);

            const auto check = [&](const rvqkv::executor& workers) {
                CAPTURE(page_tokens, is_plain, workers.concurrency());
                kv_workspace own = cache.make_workspace(workers).value();
                kv_sequence sequence = cache.new_sequence().value();
                sequence.reserve(tokens).value();
                std::size_t allocations = 0;
                {
                    const test::allocation_counter counter;
                    for (const std::size_t part : {500U, 7U, 63U, 130U}) {
                        const std::size_t first = sequence.tokens(0);
                        sequence
                            .append(0, keys.input.slice(first, part), values.input.slice(first, part), own, nullptr,
                                    workers)
                            .value();
                    }
                    allocations = counter.allocations();
                }
                CHECK(allocations == 0);
                CHECK(same_runs(whole, sequence, 0));
            };
            check(test::backward_executor(3));
            check(test::backward_executor(100));
            for (const std::size_t threads : {1U, 2U, 4U}) {
                check(rvqkv::thread_pool(threads));
            }
        }
    }
}

TEST_CASE("kv_sequence: layers are apart, may lack a cache, or share one", "[cache][unit]") {
    test::random_source random(5);
    CAPTURE(test::seed());
    const side wide(plain_codec(random, 16, {2, 16, 4}), 3, dtype::float32, 90, random);
    const side narrow(plain_codec(random, 4, {4, 100, 2}), 1, dtype::float32, 90, random);
    kv_cache_config config;
    config.layers = {{wide.config(), narrow.config()}, {}, {}, {narrow.config(), wide.config()}};
    config.layers[2].shares_layer = 0;
    config = plain(config);
    const kv_cache cache = make_cache(config);
    kv_sequence sequence = cache.new_sequence().value();
    kv_workspace workspace = cache.make_workspace().value();
    CHECK(sequence.layers() == 4);
    sequence.append(0, wide.input.view(), narrow.input.view(), workspace).value();
    sequence.append(3, narrow.input.slice(0, 70), wide.input.slice(0, 70), workspace).value();
    CHECK(sequence.tokens(0) == 90);
    CHECK(sequence.tokens(1) == 0);
    CHECK(sequence.tokens(2) == 90);
    CHECK(sequence.tokens(3) == 70);
    CHECK(sequence.runs(2).data() == sequence.runs(0).data());
    CHECK(sequence.runs(1).empty());
    CHECK(all_keys(sequence, 0).same_token(5, wide.coded(dtype::float16), 5));
    CHECK(all_values(sequence, 3).same_token(5, wide.coded(dtype::float16), 5));
    tensor shared(dtype::float32, {90, 3, 16});
    CHECK(sequence.reconstruct_keys(2, 0, shared.view(), workspace).ok());
    CHECK(shared.is_part_of(all_keys(sequence, 0), 0));
    for (const rvqkv::page_run& run : sequence.runs(0)) {
        CHECK(reinterpret_cast<std::uintptr_t>(run.page) % rvqkv::buffer_alignment == 0);
    }

    const auto append = [&](std::size_t layer) {
        return message_of(sequence.append(layer, wide.input.view(), narrow.input.view(), workspace));
    };
    CHECK(append(1) == "invalid_argument: layer 1 has no cache: it was configured without heads");
    CHECK(append(2) == "invalid_argument: layer 2 shares the cache of layer 0: write to that one");
    CHECK(append(4) == "invalid_argument: layer is 4, the cache has 4");
    CHECK(message_of(sequence.truncate(2, 0)) ==
          "invalid_argument: layer 2 shares the cache of layer 0: write to that one");
    CHECK(message_of(sequence.reconstruct_keys(1, 0, shared.view(), workspace)) ==
          "invalid_argument: layer 1 has no cache: it was configured without heads");
    CHECK(message_of(sequence.truncate(71)) == "invalid_argument: layer 3: cannot truncate to 71 tokens, it holds 70");
    CHECK(sequence.tokens(0) == 90);
    CHECK(sequence.truncate(70).ok());
    CHECK(sequence.tokens(2) == 70);
    CHECK(message_of(sequence.evict(10, 71)) == "invalid_argument: layer 0: cannot evict tokens 10 to 71, it holds 70");
    CHECK(message_of(sequence.evict(10, 9)) == "invalid_argument: layer 0: cannot evict tokens 10 to 9, it holds 70");
}

TEST_CASE("kv_sequence: a tensor or range that does not fit is refused by name", "[cache][unit]") {
    test::random_source random(15);
    const side keys(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, 6, random);
    const side values(plain_codec(random, 6, {3, 5, 2}), 3, dtype::float32, 6, random);
    const kv_cache cache = make_cache(one_layer(keys, values));
    kv_sequence sequence = cache.new_sequence().value();
    kv_workspace workspace = cache.make_workspace().value();
    sequence.append(0, keys.input.slice(0, 5), values.input.slice(0, 5), workspace).value();
    const snapshot before(sequence, cache);

    const auto append = [&](rvqkv::tensor_shape k, rvqkv::tensor_shape v) {
        const tensor k_input(dtype::float16, k);
        const tensor v_input(dtype::float16, v);
        return message_of(sequence.append(0, k_input.view(), v_input.view(), workspace));
    };
    CHECK(append({1, 3, 8}, {1, 3, 6}) == "invalid_argument: layer 0 keys: heads is 3, must be 2");
    CHECK(append({1, 2, 6}, {1, 3, 6}) ==
          "invalid_argument: layer 0 keys: channels is 6, must be the codec's head_dim 8");
    CHECK(append({1, 2, 8}, {1, 2, 6}) == "invalid_argument: layer 0 values: heads is 2, must be 3");
    CHECK(append({2, 2, 8}, {1, 3, 6}) == "invalid_argument: layer 0 values: tokens is 1, must be the keys' 2");
    CHECK(append({0, 2, 8}, {0, 2, 6}) == "invalid_argument: layer 0 values: heads is 2, must be 3");
    CHECK(append({0, 2, 8}, {0, 3, 6}) == "ok");
    // More tokens than memory can hold, without the memory to show for it.
    const float zeros[8] = {};
    const std::size_t most = std::numeric_limits<std::size_t>::max();
    for (const std::size_t many : {most - 2, most / 2}) {
        CHECK(message_of(sequence.append(0, {zeros, {many, 2, 8}, {0, 0, 1}}, {zeros, {many, 3, 6}, {0, 0, 1}},
                                         workspace)) == "out_of_memory: out of memory");
    }
    CHECK(message_of(sequence.reserve(most)) == "out_of_memory: out of memory");

    const auto keys_of = [&](std::size_t first, rvqkv::tensor_shape shape, std::size_t depths) {
        tensor out(dtype::float32, shape);
        const tensor untouched(dtype::float32, shape);
        std::string message = message_of(sequence.reconstruct_keys(0, first, out.view(), workspace, depths));
        CHECK((message == "ok" || out.is_part_of(untouched, 0)));
        return message;
    };
    CHECK(keys_of(0, {5, 2, 8}, all) == "ok");
    CHECK(keys_of(5, {0, 2, 8}, all) == "ok");
    CHECK(keys_of(0, {6, 2, 8}, all) ==
          "invalid_argument: layer 0 keys: first_token is 0 and the output has 6 tokens, the layer holds 5");
    CHECK(keys_of(6, {0, 2, 8}, all) ==
          "invalid_argument: layer 0 keys: first_token is 6 and the output has 0 tokens, the layer holds 5");
    CHECK(keys_of(most, {2, 2, 8}, all).find("first_token is 1844") != std::string::npos);
    CHECK(keys_of(0, {5, 1, 8}, all) == "invalid_argument: layer 0 keys: heads is 1, must be 2");
    CHECK(keys_of(0, {5, 2, 8}, 3) == "invalid_argument: layer 0 keys: depths is 3, the codec has 2");
    CHECK(message_of(sequence.demote(5, 0, 1)) == "invalid_argument: key_depths is 0, must be at least 1");
    CHECK(message_of(sequence.demote_to(5, 1, 0)) == "invalid_argument: value_depths is 0, must be at least 1");
    CHECK(snapshot(sequence, cache) == before);
}

TEST_CASE("kv_sequence: what was moved from refuses every operation", "[cache][unit]") {
    test::random_source random(6);
    const side s(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, 6, random);
    const kv_cache cache = make_cache(one_layer(s, s));
    kv_workspace workspace = cache.make_workspace().value();
    kv_sequence old = cache.new_sequence().value();
    old.append(0, s.input.view(), s.input.view(), workspace).value();
    kv_sequence sequence = std::move(old);
    CHECK(sequence.tokens(0) == 6);
    const std::string message = "invalid_argument: the sequence was moved from: it has no cache any more";
    tensor out(dtype::float32, {1, 2, 8});
    // NOLINTBEGIN(bugprone-use-after-move,clang-analyzer-cplusplus.Move): that is what is tested
    CHECK(old.layers() == 0);
    CHECK(message_of(old.append(0, s.input.view(), s.input.view(), workspace)) == message);
    CHECK(message_of(old.reconstruct_keys(0, 0, out.view(), workspace)) == message);
    CHECK(message_of(old.reconstruct_values(0, 0, out.view(), workspace)) == message);
    CHECK(message_of(old.truncate(0, 0)) == message);
    CHECK(message_of(old.truncate(0)) == message);
    CHECK(message_of(old.evict(0, 0)) == message);
    CHECK(message_of(old.demote(0, 1, 1)) == message);
    CHECK(message_of(old.demote_to(0, 1, 1)) == message);
    CHECK(message_of(old.reserve(1)) == message);
    CHECK(message_of(old.fork()) == message);
    old.clear();
    old.release_spare_pages();
    CHECK(old.bytes().total() == 0);
    // NOLINTEND(bugprone-use-after-move,clang-analyzer-cplusplus.Move)
    kv_sequence other = cache.new_sequence().value();
    other.append(0, s.input.slice(0, 1), s.input.slice(0, 1), workspace).value();
    other = std::move(sequence);
    CHECK(other.tokens(0) == 6);
    CHECK(cache.bytes().pages == other.bytes().total() - other.bytes().page_tables);
}

TEST_CASE("kv_sequence: forks share pages, copy what they write to, and die in any order", "[cache][unit]") {
    test::random_source random(7);
    CAPTURE(test::seed());
    const side keys(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, 300, random);
    const side other(keys.codec, 2, dtype::float32, 300, random);
    const kv_cache cache = make_cache(one_layer(keys, keys));
    kv_workspace workspace = cache.make_workspace().value();
    for (const std::size_t shared : {2U, 4U, 68U, 100U, 200U}) {
        CAPTURE(shared);
        std::optional<kv_sequence> first = cache.new_sequence().value();
        first->append(0, keys.input.slice(0, shared), keys.input.slice(0, shared), workspace).value();
        const std::size_t pages = cache.bytes().pages;
        std::optional<kv_sequence> second = first->fork().value();
        std::optional<kv_sequence> third = second->fork().value();
        CHECK(cache.bytes().pages == pages);
        CHECK(second->bytes().codes == first->bytes().codes);

        const auto rest = [&](const side& s) { return s.input.slice(shared, 300 - shared); };
        first->append(0, rest(keys), rest(keys), workspace).value();
        second->append(0, rest(other), rest(other), workspace).value();
        CHECK(third->tokens(0) == shared);
        kv_sequence alone = cache.new_sequence().value();
        alone.append(0, keys.input.view(), keys.input.view(), workspace).value();
        CHECK(same_runs(*first, alone, 0));
        CHECK(all_keys(*first, 0).is_part_of(all_keys(alone, 0), 0));
        kv_sequence mixed = cache.new_sequence().value();
        mixed.append(0, keys.input.slice(0, shared), keys.input.slice(0, shared), workspace).value();
        mixed.append(0, rest(other), rest(other), workspace).value();
        CHECK(same_runs(*second, mixed, 0));
        CHECK(all_keys(*second, 0).is_part_of(all_keys(mixed, 0), 0));

        first.reset();
        CHECK(all_keys(*second, 0).is_part_of(all_keys(mixed, 0), 0));
        const tensor before = all_keys(*third, 0);
        second.reset();
        CHECK(all_keys(*third, 0).is_part_of(before, 0));
        third->append(0, rest(keys), rest(keys), workspace).value();
        CHECK(same_runs(*third, alone, 0));
    }
    CHECK(cache.bytes().pages == 0);
}

TEST_CASE("kv_sequence: what is appended after a rollback is as if nothing else had been", "[cache][property]") {
    test::random_source random(9);
    CAPTURE(test::seed());
    const std::size_t tokens = 260;
    const side keys(plain_codec(random, 6, {3, 5, 3}), 3, dtype::float32, tokens, random);
    const side other(keys.codec, 3, dtype::float32, tokens, random);
    const kv_cache cache = make_cache(one_layer(keys, keys));
    kv_workspace workspace = cache.make_workspace().value();
    kv_sequence fresh = cache.new_sequence().value();
    fresh.append(0, keys.input.view(), keys.input.view(), workspace).value();
    // A draft that is not taken back into pages of codes leaves no trace.
    kv_sequence drafted = cache.new_sequence().value();
    while (drafted.tokens(0) < tokens) {
        const std::size_t held = drafted.tokens(0);
        const std::size_t draft = std::min<std::size_t>(tokens - held, random.integer(0, 30));
        drafted.append(0, keys.input.slice(held, 1), keys.input.slice(held, 1), workspace).value();
        if (held + 1 + draft <= tokens) {
            drafted.append(0, other.input.slice(held + 1, draft), other.input.slice(held + 1, draft), workspace)
                .value();
            if ((held + 1 + draft - 4) / 64 == (held + 1 - 4) / 64) {
                drafted.truncate(0, held + 1).value();
            } else {
                drafted.truncate(held + 1).value();
            }
        }
    }
    CHECK(drafted.tokens(0) == tokens);
    CHECK(all_keys(drafted, 0).is_part_of(all_keys(fresh, 0), 0));
    // One that goes back into them starts a page there.
    for (const std::size_t kept : {0U, 1U, 4U, 5U, 50U, 68U, 100U, 199U}) {
        CAPTURE(kept);
        kv_sequence cut = fresh.fork().value();
        cut.truncate(kept).value();
        CHECK(cut.tokens(0) == kept);
        CHECK(all_keys(cut, 0).is_part_of(all_keys(fresh, 0), 0));
        append_rest(cut, 0, keys.input, keys.input, workspace, random, 40);
        const tensor exact = keys.exact(dtype::float16);
        const tensor coded = keys.coded(dtype::float16);
        const tensor out = all_keys(cut, 0);
        for (std::size_t i = 0; i < tokens; ++i) {
            CHECK((out.same_token(i, exact, i) || out.same_token(i, coded, i)));
        }
        CHECK(out.same_token(tokens - 64, exact, tokens - 64));
    }
}

TEST_CASE("kv_sequence: no allocation once reserved, whatever a decode loop does", "[cache][property]") {
    test::random_source random(10);
    const std::size_t tokens = 600;
    const side keys(plain_codec(random, 64, {2, 5, 32}), 8, dtype::float16, tokens, random);
    const side values(plain_codec(random, 32, {3, 37, 16}), 4, dtype::bfloat16, tokens, random);
    for (const std::size_t recent : {0U, 64U, 100U}) {
        kv_cache_config config;
        config.layers.assign(12, {keys.config(), values.config()});
        config.layers[1].coding = key_coding::block_relative;
        config.layers[1].key_mean.assign(8 * 64, 0.1F);
        config.layers[2].coding = key_coding::before_rope;
        config.layers[3].sliding_window = 100;
        config.recent_tokens = recent;
        const kv_cache cache = make_cache(config);
        kv_workspace workspace = cache.make_workspace().value();
        kv_sequence sequence = cache.new_sequence().value();
        kv_sequence thief = cache.new_sequence().value();
        sequence.reserve(tokens).value();
        tensor out(dtype::float16, {tokens, 8, 64});
        tensor out_values(dtype::float16, {tokens, 4, 32});
        const auto append = [&](kv_sequence& to, std::size_t first, std::size_t count) {
            for (std::size_t layer = 0; layer < 12; ++layer) {
                to.append(layer, keys.input.slice(first, count), values.input.slice(first, count), workspace).value();
            }
        };
        std::size_t allocations = 0;
        {
            const test::allocation_counter counter;
            append(sequence, 0, 250);
            while (sequence.tokens(0) < tokens) {
                const std::size_t held = sequence.tokens(0);
                append(sequence, held, 1);
                if (held % 16 == 5 && held + 5 <= tokens && recent != 0) {
                    append(sequence, held + 1, 4);
                    sequence.truncate(held + 2).value();
                }
            }
            sequence.reconstruct_keys(11, 0, out.view(), workspace).value();
            sequence.reconstruct_values(1, 0, out_values.view(), workspace, 1).value();
            if (recent != 0) {
                sequence.evict(4, 132).value();
                append(sequence, 0, 64);
                append(sequence, 64, 64);
            }
            sequence.clear();
            allocations = counter.allocations();
        }
        CHECK(allocations == 0);
        // Others cannot take what it keeps.
        append(thief, 0, 600);
        {
            const test::allocation_counter counter;
            for (std::size_t layer = 0; layer < 12; ++layer) {
                const std::size_t count = layer == 3 ? 60 : 200;
                for (std::size_t first = 0; first < 600; first += count) {
                    sequence.append(layer, keys.input.slice(first, count), values.input.slice(first, count), workspace)
                        .value();
                }
            }
            allocations = counter.allocations();
        }
        CHECK(allocations == 0);
        // Pages that are cut hold less, so as many tokens need more of them.
        sequence.evict(10, 100).value();
        sequence.evict(300, 350).value();
        sequence.reserve(tokens).value();
        {
            const test::allocation_counter counter;
            append(sequence, 460, 60);
            append(sequence, 520, 80);
            allocations = counter.allocations();
        }
        CHECK(sequence.tokens(0) == tokens);
        CHECK(allocations == 0);
    }
}

TEST_CASE("kv_sequence: 32k tokens of Llama 3 8B take what the formula says and less than 1 % more", "[cache][unit]") {
    test::random_source random(11);
    const side s(plain_codec(random, 128, {3, 65, 8}), 8, dtype::float16, 64, random);  // 7 bits
    kv_cache_config config = one_layer(s, s);
    const kv_cache cache = make_cache(config);
    kv_workspace workspace = cache.make_workspace().value();
    kv_sequence sequence = cache.new_sequence().value();
    sequence.append(0, s.input.slice(0, 4), s.input.slice(0, 4), workspace).value();
    for (std::size_t held = 4; held < 32768; held += 64) {
        sequence.append(0, s.input.view(), s.input.view(), workspace).value();
    }
    const std::size_t tokens = sequence.tokens(0);
    CHECK(tokens == 32768 + 4);
    const rvqkv::kv_sequence_bytes bytes = sequence.bytes();
    const std::size_t coded = 2 * (tokens - 4 - 64) * 8 * s.codec->bits_per_row() / 8;
    const std::size_t exact = 2 * (4 + 64) * 8 * 128 * 2;
    CHECK(bytes.codes + bytes.scales == coded);
    CHECK(bytes.exact == exact);
    CHECK(bytes.total() < coded + exact + (coded + exact) / 100);
    CHECK(cache.bytes().pages + bytes.page_tables == bytes.total());
    // At worst a page less one token waits to become codes.
    sequence.append(0, s.input.slice(0, 63), s.input.slice(0, 63), workspace).value();
    const std::size_t waiting = std::size_t{2} * 64 * 8 * 128 * 2;
    CHECK(sequence.bytes().total() < coded + exact + waiting + (coded + exact) / 100);
}

TEST_CASE("kv_sequence: a sliding window lets go of pages, and of nothing that a token may see", "[cache][unit]") {
    test::random_source random(13);
    CAPTURE(test::seed());
    const std::size_t tokens = 1000;
    const std::size_t window = 150;
    const side s(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, tokens, random);
    kv_cache_config config = one_layer(s, s);
    config.layers[0].sliding_window = window;
    config.layers.push_back({s.config(), s.config()});
    const kv_cache cache = make_cache(config);
    kv_workspace workspace = cache.make_workspace().value();
    kv_sequence sequence = cache.new_sequence().value();
    std::size_t most = 0;
    while (sequence.tokens(0) < tokens) {
        const std::size_t held = sequence.tokens(0);
        const std::size_t count = std::min(tokens - held, random.integer(1, 20));
        for (const std::size_t layer : {0U, 1U}) {
            sequence.append(layer, s.input.slice(held, count), s.input.slice(held, count), workspace).value();
        }
        const std::size_t first = sequence.first_token(0);
        // The first of the tokens just appended sees `window` tokens, and 64 may be rolled back.
        CHECK((first == 0 || first + window + 64 <= held + 1));
        CHECK(sequence.first_token(1) == 0);
        CHECK(sequence.tokens(0) == sequence.tokens(1));
        most = std::max(most, sequence.tokens(0) - first);
        if (held % 50 < 3 && held > 64) {
            CHECK(sequence.truncate(sequence.tokens(0) - 10).ok());
        }
    }
    CHECK(most < window + 64 + 64 + 2 * 20);
    const std::size_t first = sequence.first_token(0);
    tensor out(dtype::float32, {tokens - first, 2, 8});
    CHECK(sequence.reconstruct_keys(0, first, out.view(), workspace).ok());
    CHECK(out.same_token(tokens - first - 1, s.exact(dtype::float16), tokens - 1));
    CHECK(message_of(sequence.reconstruct_keys(0, first - 1, out.view(), workspace)) ==
          "invalid_argument: layer 0 keys: first_token is " + std::to_string(first - 1) + ", tokens before " +
              std::to_string(first) + " have left the sliding window");
    CHECK(message_of(sequence.truncate(first + 20)) ==
          "invalid_argument: layer 0: cannot truncate to " + std::to_string(first + 20) +
              " tokens: the sliding window of 150 has let go of tokens before " + std::to_string(first) +
              " that the next one must see; keep more, or none");
    CHECK(sequence.tokens(1) == tokens);
    CHECK(sequence.truncate(first + window - 1).ok());
    CHECK(message_of(sequence.evict(first + 10, first + 140)).find("layer 0: cannot evict tokens") !=
          std::string::npos);
    CHECK(sequence.evict(10, first).ok());
    CHECK(sequence.tokens(0) == 10 + window - 1);
    CHECK(sequence.first_token(0) == 10);
    CHECK(sequence.truncate(0).ok());
    CHECK(sequence.first_token(0) == 0);
    CHECK(cache.bytes().pages == 0);
}

TEST_CASE("kv_sequence: even a window of one token keeps a token to go on from", "[cache][unit]") {
    test::random_source random(23);
    const side s(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, 100, random);
    kv_cache_config config = one_layer(s, s);
    config.layers[0].sliding_window = 1;
    const kv_cache cache = make_cache(config);
    kv_workspace workspace = cache.make_workspace().value();
    kv_sequence sequence = cache.new_sequence().value();
    for (int i = 0; i < 4; ++i) {
        sequence.append(0, s.input.view(), s.input.view(), workspace).value();
    }
    const std::size_t first = sequence.first_token(0);
    CHECK(first > 0);
    CHECK_FALSE(sequence.truncate(first).ok());
    CHECK(sequence.truncate(first + 1).ok());
    CHECK(sequence.next_position(0) == static_cast<std::int64_t>(first + 1));
    CHECK(sequence.truncate(0).ok());
    CHECK(sequence.next_position(0) == 0);
}

TEST_CASE("kv_sequence: keys come back turned to where they are now, whichever way they are stored",
          "[cache][property]") {
    test::random_source random(14);
    CAPTURE(test::seed());
    const std::size_t tokens = 300;
    const side keys(plain_codec(random, 16, {2, 37, 4}), 2, dtype::float32, tokens, random);  // before rotary embedding
    rvqkv::rope_config rope_config;
    rope_config.base = 500.0;
    rope_config.attention_factor = 1.125;
    const rvqkv::rope rope = rvqkv::rope::create(rope_config, 16).value();
    const tensor flat = keys.input.as(dtype::float32);
    const auto turned = [&](std::size_t token, std::int64_t position) {
        std::vector<float> rows(2 * 16);
        for (std::size_t i = 0; i < rows.size(); ++i) {
            rows[i] = flat.number(token, i / 16, i % 16);
        }
        rope.turn({rows.data(), 2, 16, 16}, position, 2);
        return rows;
    };
    tensor given(dtype::float32, {tokens, 2, 16});
    for (std::size_t token = 0; token < tokens; ++token) {
        const std::vector<float> rows = turned(token, static_cast<std::int64_t>(token));
        for (std::size_t i = 0; i < rows.size(); ++i) {
            given.set(token, i / 16, i % 16, rows[i]);
        }
    }
    for (const key_coding coding : {key_coding::before_rope, key_coding::after_rope, key_coding::block_relative}) {
        for (const bool is_turned : {true, false}) {
            for (const std::size_t recent : {0U, 1000U}) {
                kv_cache_config config = one_layer(keys, keys);
                config.recent_tokens = recent;
                rvqkv::kv_layer_config& layer = config.layers[0];
                layer.coding = coding;
                layer.turned_input = is_turned;
                layer.rope = rope_config;
                layer.block_tokens = 128;
                const kv_cache cache = make_cache(config);
                kv_workspace workspace = cache.make_workspace().value();
                kv_sequence sequence = cache.new_sequence().value();
                sequence.append(0, (is_turned ? given : flat).view(), keys.input.view(), workspace).value();
                const tensor at_first = all_keys(sequence, 0);
                sequence.evict(20, 90).value();
                sequence.append(0, (is_turned ? given : flat).slice(230, 70), keys.input.slice(230, 70), workspace)
                    .value();
                CHECK(sequence.next_position(0) == 300);
                const tensor out = all_keys(sequence, 0);
                CAPTURE(static_cast<int>(coding), is_turned, recent);
                double worst = 0.0;
                for (std::size_t i = 0; i < tokens; ++i) {
                    const std::size_t token = i < 20 ? i : i < 230 ? i + 70 : i;
                    const std::vector<float> wanted = turned(token, static_cast<std::int64_t>(i));
                    for (std::size_t k = 0; k < wanted.size(); ++k) {
                        const float value = is_turned ? wanted[k] : flat.number(token, k / 16, k % 16);
                        worst = std::max(worst, std::abs(static_cast<double>(out.number(i, k / 16, k % 16) - value)));
                    }
                }
                // Exact tokens come back but for rounding; codes as far off as this codec leaves them.
                CHECK(worst < (recent == 0 ? 5.0 : 0.01));
                // Shifting costs nothing: what was coded turns as a whole.
                if (is_turned) {
                    CHECK(out.same_token(10, at_first, 10));
                } else if (coding == key_coding::before_rope) {
                    CHECK(out.same_token(100, at_first, 170));
                }
            }
        }
    }
}

TEST_CASE("kv_sequence: a mean of the keys is taken out of the codes and added again", "[cache][property]") {
    test::random_source random(15);
    CAPTURE(test::seed());
    const std::size_t tokens = 128;
    side keys(plain_codec(random, 16, {2, 37, 4}), 2, dtype::float32, tokens, random);
    const side values(keys.codec, 2, dtype::float32, tokens, random);
    std::vector<float> mean(2 * 16);
    for (std::size_t i = 0; i < mean.size(); ++i) {
        mean[i] = 20.0F * random.gaussian();
    }
    for (std::size_t token = 0; token < tokens; ++token) {
        for (std::size_t i = 0; i < mean.size(); ++i) {
            keys.input.set(token, i / 16, i % 16,
                           values.input.as(dtype::float32).number(token, i / 16, i % 16) + mean[i]);
        }
    }
    const auto error_with = [&](const std::vector<float>& key_mean) {
        kv_cache_config config = plain(one_layer(keys, values));
        config.layers[0].key_mean = key_mean;
        const kv_cache cache = make_cache(config);
        kv_workspace workspace = cache.make_workspace().value();
        kv_sequence sequence = cache.new_sequence().value();
        sequence.append(0, keys.input.view(), values.input.view(), workspace).value();
        const tensor out = all_keys(sequence, 0);
        double sum = 0.0;
        for (std::size_t token = 0; token < tokens; ++token) {
            for (std::size_t i = 0; i < mean.size(); ++i) {
                const auto off =
                    static_cast<double>(out.number(token, i / 16, i % 16) - keys.input.number(token, i / 16, i % 16));
                sum += off * off;
            }
        }
        return sum;
    };
    CHECK(error_with(mean) < 0.1 * error_with({}));
}

TEST_CASE("kv_sequence: demoted pages give what fewer depths give, and others keep theirs", "[cache][unit]") {
    test::random_source random(16);
    CAPTURE(test::seed());
    const std::size_t tokens = 4 + 64 * 5;
    const side keys(plain_codec(random, 8, {4, 5, 4}), 2, dtype::float32, tokens, random);
    const side values(plain_codec(random, 6, {3, 37, 2}), 1, dtype::float32, tokens, random);
    const kv_cache cache = make_cache(one_layer(keys, values));
    kv_workspace workspace = cache.make_workspace().value();
    kv_sequence sequence = cache.new_sequence().value();
    sequence.append(0, keys.input.view(), values.input.view(), workspace).value();
    const kv_sequence fork = sequence.fork().value();
    const snapshot before(fork, cache);
    const tensor whole_keys = all_keys(sequence, 0);
    const tensor whole_values = all_values(sequence, 0);
    const std::size_t codes = sequence.bytes().codes;

    sequence.demote(4 + 64 * 2 + 63, 1, 2).value();  // two pages; the third ends a token later
    CHECK(sequence.bytes().codes < codes);
    const tensor few_keys = keys.coded(dtype::float16, dtype::float32, 1);
    const tensor few_values = values.coded(dtype::float16, dtype::float32, 2);
    const auto check = [&](std::size_t demoted_pages) {
        const tensor out_keys = all_keys(sequence, 0);
        const tensor out_values = all_values(sequence, 0);
        bool same = true;
        for (std::size_t i = 0; i < tokens; ++i) {
            const bool is_demoted = i >= 4 && i < 4 + 64 * demoted_pages;
            same = same && out_keys.same_token(i, is_demoted ? few_keys : whole_keys, i) &&
                   out_values.same_token(i, is_demoted ? few_values : whole_values, i);
        }
        CHECK(same);
    };
    check(2);
    CHECK(all_keys(fork, 0).is_part_of(whole_keys, 0));
    sequence.demote(4 + 64 * 2, 4, 3).value();  // what is gone stays gone
    check(2);

    const std::size_t total = sequence.bytes().total();
    CHECK(sequence.demote_to(total, 1, 2).value() == 0);
    CHECK(sequence.demote_to(total - 1, 1, 2).value() == 4 + 64 * 3);
    CHECK(sequence.bytes().total() < total);
    check(3);
    const auto impossible = sequence.demote_to(100, 1, 2);
    REQUIRE_FALSE(impossible.ok());
    CHECK(impossible.error().message.find("most_bytes is 100, with 1 and 2 depths the sequence takes ") == 0);
    check(3);
    CHECK(sequence.demote_to(sequence.bytes().total() - 1, 1, 2).value() == 4 + 64 * 4);
    check(4);
    CHECK(all_keys(fork, 0).is_part_of(whole_keys, 0));
}

TEST_CASE("kv_sequence: outside their runs, pages hold codes of the codebook and finite numbers", "[cache][unit]") {
    test::random_source random(22);
    CAPTURE(test::seed());
    const side s(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, 200, random);
    test::counting_source source;
    kv_cache_config config = one_layer(s, s);
    config.source = &source;
    config.recent_tokens = 0;
    config.layers[0].coding = key_coding::block_relative;
    config.layers[0].block_tokens = 128;
    const kv_cache cache = make_cache(config);
    kv_workspace workspace = cache.make_workspace().value();
    kv_sequence sequence = cache.new_sequence().value();
    sequence.append(0, s.input.slice(0, 2), s.input.slice(0, 2), workspace).value();  // sinks with room
    sequence.append(0, s.input.slice(2, 100), s.input.slice(2, 100), workspace).value();
    sequence.truncate(4 + 30)
        .value();  // into a page of codes: the next one is 64 tokens long, the one after ends early
    sequence.append(0, s.input.slice(34, 110), s.input.slice(34, 110), workspace).value();
    std::size_t cut = 0;
    for (const rvqkv::page_run& run : sequence.runs(0)) {
        cut += !run.format->is_exact && run.tokens < 64 ? 1 : 0;
        if (run.format->is_exact) {
            const auto* const numbers = reinterpret_cast<const std::uint16_t*>(run.page);
            CHECK(std::all_of(numbers, numbers + run.format->bytes / 2,
                              [](std::uint16_t bits) { return (bits & 0x7c00U) != 0x7c00U; }));
            continue;
        }
        for (const rvqkv::coded_layout& layout : {run.format->coded_keys, run.format->coded_values}) {
            const std::size_t places = layout.depths() * layout.groups();
            for (std::size_t row = 0; row < layout.heads() * places; ++row) {
                std::array<rvqkv::code_t, 64> codes = {};
                const std::size_t at = layout.row(0, row / places, 0) + row % places * layout.row_bytes();
                rvqkv::unpack_codes(run.page + at, 0, 64, layout.bits(), codes.data());
                CHECK(*std::max_element(codes.begin(), codes.end()) < 5);
            }
        }
    }
    CHECK(cut == 2);
}

TEST_CASE("kv_sequence: NaN and infinity are reported, stored as 0, and harm no neighbour", "[cache][property]") {
    test::random_source random(17);
    CAPTURE(test::seed());
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const std::size_t tokens = 200;
    for (const dtype type : {dtype::float32, dtype::float16, dtype::bfloat16}) {
        for (const key_coding coding : {key_coding::as_given, key_coding::before_rope}) {
            side keys(plain_codec(random, 32, {2, 37, 8}), 3, type, tokens, random);
            side values(plain_codec(random, 8, {2, 5, 4}), 2, type, tokens, random);
            kv_cache_config config = one_layer(keys, values);
            config.layers[0].coding = coding;
            const kv_cache cache = make_cache(config);
            const auto spoil = [&](float first, float second) {
                keys.input.set(37, 2, 9, first);
                keys.input.set(37, 2, 31, second);
                keys.input.set(44, 0, 0, second);
                keys.input.set(198, 1, 5, first);
                values.input.set(3, 1, 2, first);
            };
            rvqkv::kv_encode_report report;
            const auto fill = [&](std::size_t split, const rvqkv::executor& workers) {
                kv_workspace workspace;
                kv_sequence sequence = cache.new_sequence().value();
                report = {};
                sequence.append(0, keys.input.slice(0, split), values.input.slice(0, split), workspace, &report)
                    .value();
                rvqkv::kv_encode_report found;
                sequence
                    .append(0, keys.input.slice(split, tokens - split), values.input.slice(split, tokens - split),
                            workspace, &found, workers)
                    .value();
                report.keys.add(found.keys, split);
                report.values.add(found.values, split);
                return sequence;
            };
            spoil(nan, -infinity);
            CAPTURE(rvqkv::name_of(type), static_cast<int>(coding));
            for (const std::size_t split : {0U, 40U, 150U}) {
                CAPTURE(split);
                const kv_sequence dirty = fill(split, test::backward_executor(2));
                CHECK(report.keys.nonfinite_values == 4);
                CHECK(report.keys.nonfinite_rows == 3);
                CHECK(report.keys.first_token == 37);
                CHECK(report.keys.first_head == 2);
                CHECK(report.values.nonfinite_values == 1);
                CHECK(report.values.first_token == 3);
                CHECK(report.values.first_head == 1);
                spoil(0.0F, 0.0F);
                const kv_sequence clean = fill(split, rvqkv::serial_executor());
                CHECK(report.keys.nonfinite_rows == 0);
                CHECK(same_runs(dirty, clean, 0));
                CHECK(all_keys(dirty, 0).is_part_of(all_keys(clean, 0), 0));
                CHECK(all_values(dirty, 0).is_part_of(all_values(clean, 0), 0));
                spoil(nan, -infinity);
            }
        }
    }
    // Numbers beyond float16 become its largest.
    const side huge(plain_codec(random, 8, {2, 5, 4}), 1, dtype::float32, 2, random);
    tensor x(dtype::float32, {1, 1, 8});
    for (std::size_t i = 0; i < 8; ++i) {
        x.set(0, 0, i, i % 2 == 0 ? 1e20F : -65520.0F);
    }
    const kv_cache cache = make_cache(one_layer(huge, huge));
    kv_sequence sequence = cache.new_sequence().value();
    kv_workspace workspace;
    rvqkv::kv_encode_report report;
    sequence.append(0, x.view(), x.view(), workspace, &report).value();
    CHECK(report.keys.nonfinite_rows == 0);
    CHECK(all_keys(sequence, 0).number(0, 0, 0) == 65504.0F);
    CHECK(all_keys(sequence, 0).number(0, 0, 1) == -65504.0F);
}

TEST_CASE("kv_sequence: whichever allocation fails, whatever is done changes nothing", "[cache][fault][unit]") {
    test::random_source random(18);
    CAPTURE(test::seed());
    const std::size_t tokens = 400;
    const side keys(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, tokens, random);
    const side values(plain_codec(random, 6, {3, 100, 2}), 1, dtype::float32, tokens, random);
    const test::backward_executor workers(3);
    test::counting_source source;
    kv_cache_config config = one_layer(keys, values);
    config.layers.push_back(config.layers[0]);
    config.source = &source;
    const kv_cache cache = make_cache(config);
    const auto check = [&](const char* what, bool reserves, const auto& operation) {
        for (const bool pages_fail : {true, false}) {
            for (std::size_t nth = 0;; ++nth) {
                CAPTURE(what, reserves, pages_fail, nth);
                REQUIRE(nth < 200);
                kv_workspace workspace;
                kv_sequence sequence = cache.new_sequence().value();
                for (const std::size_t layer : {0U, 1U}) {
                    sequence.append(layer, keys.input.slice(0, 150), values.input.slice(0, 150), workspace).value();
                }
                if (reserves) {
                    sequence.reserve(200).value();
                }
                kv_cache(cache).release_free_pages();
                const kv_sequence fork = sequence.fork().value();
                const snapshot before(sequence, cache);
                source.failed = false;
                source.until_failure = pages_fail ? nth : test::counting_source::never;
                bool done = false;
                bool failed = false;
                bool out_of_memory = false;
                kv_workspace own;
                {
                    std::optional<test::failing_allocations> failing;
                    if (!pages_fail) {
                        failing.emplace(nth);
                    }
                    const rvqkv::status result = operation(sequence, own);
                    done = result.ok();
                    out_of_memory = !done && result.error().code == rvqkv::error_code::out_of_memory;
                    failed = pages_fail ? source.failed : failing->triggered();
                }
                source.until_failure = test::counting_source::never;
                if (done) {
                    break;  // perhaps after a second try, with free pages given back
                }
                CHECK(failed);
                CHECK(out_of_memory);
                CHECK(snapshot(sequence, cache) == before);
                CHECK(operation(sequence, own).ok());
            }
        }
    };
    const auto append = [&](kv_sequence& sequence, kv_workspace& workspace) {
        return sequence.append(0, keys.input.slice(150, 250), values.input.slice(150, 250), workspace, nullptr,
                               workers);
    };
    for (const bool reserves : {false, true}) {
        check("append", reserves, append);
        check("append one", reserves, [&](kv_sequence& sequence, kv_workspace& workspace) {
            return sequence.append(0, keys.input.slice(150, 1), values.input.slice(150, 1), workspace);
        });
        check("reserve", reserves, [](kv_sequence& sequence, kv_workspace&) { return sequence.reserve(1000); });
        check("evict", reserves, [](kv_sequence& sequence, kv_workspace&) { return sequence.evict(10, 20); });
        check("demote", reserves, [](kv_sequence& sequence, kv_workspace&) { return sequence.demote(400, 1, 1); });
        check("fork", reserves, [](kv_sequence& sequence, kv_workspace&) {
            const auto made = sequence.fork();
            return made.ok() ? rvqkv::status() : rvqkv::status(made.error());
        });
    }
    CHECK(cache.bytes().pages == 0);
}

TEST_CASE("kv_sequence: a codec of one's own that fails half-way changes nothing", "[cache][unit]") {
    using plain_quantizer = rvqkv::vector_quantizer<rvqkv::std_dev_scale, rvqkv::contiguous_grouping>;
    // Encodes as usual, but only a given number of times.
    class tiring_codec final : public rvqkv::codec_of<plain_quantizer> {
    public:
        tiring_codec(plain_quantizer inner, std::atomic<std::size_t>& left)
            : rvqkv::codec_of<plain_quantizer>(std::move(inner)), left_(&left) {}
        [[nodiscard]] rvqkv::status encode(const rvqkv::tensor_view& x, rvqkv::mutable_encoded_view out,
                                           rvqkv::quantizer_workspace& workspace, rvqkv::encode_report* report,
                                           const rvqkv::executor& workers) const override {
            if (*left_ == 0) {
                return rvqkv::error{rvqkv::error_code::out_of_memory, "tired"};
            }
            --*left_;
            return rvqkv::codec_of<plain_quantizer>::encode(x, out, workspace, report, workers);
        }

    private:
        std::atomic<std::size_t>* left_;
    };
    test::random_source random(19);
    CAPTURE(test::seed());
    const std::vector<float> weights = test::gaussian_numbers(random, 2 * 5 * 4);
    auto book = rvqkv::residual_codebook<>::create<float>({2, 5, 4}, weights).value();
    std::atomic<std::size_t> left{100};
    const auto codec = std::make_shared<const tiring_codec>(plain_quantizer::create(8, std::move(book)).value(), left);
    const std::size_t tokens = 400;
    const side keys(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, tokens, random);
    side values(codec, 2, dtype::float32, tokens, random);
    values.input.set(200, 0, 0, std::numeric_limits<float>::quiet_NaN());
    const rvqkv::thread_pool pool(2);
    const rvqkv::serial_executor serial;
    for (const rvqkv::executor* const workers :
         {static_cast<const rvqkv::executor*>(&serial), static_cast<const rvqkv::executor*>(&pool)}) {
        for (std::size_t encoded = 0; encoded < 4; ++encoded) {
            CAPTURE(encoded);
            left = 100;
            const kv_cache cache = make_cache(one_layer(keys, values));
            kv_workspace workspace = cache.make_workspace().value();
            kv_sequence sequence = cache.new_sequence().value();
            sequence.append(0, keys.input.slice(0, 130), values.input.slice(0, 130), workspace).value();
            const snapshot before(sequence, cache);
            left = encoded;
            rvqkv::kv_encode_report report;
            CHECK(message_of(sequence.append(0, keys.input.slice(130, 270), values.input.slice(130, 270), workspace,
                                             &report, *workers)) == "out_of_memory: tired");
            CHECK(report.values.nonfinite_rows == 0);
            CHECK(snapshot(sequence, cache) == before);
            left = 100;
            sequence.append(0, keys.input.slice(130, 270), values.input.slice(130, 270), workspace, &report, *workers)
                .value();
            CHECK(report.values.first_token == 70);
        }
    }
}

TEST_CASE("kv_sequence: readers run side by side, and sequences of one cache are independent", "[cache][threads]") {
    test::random_source random(20);
    CAPTURE(test::seed());
    const std::size_t tokens = 300;
    const side keys(plain_codec(random, 16, {3, 37, 4}), 2, dtype::float32, tokens, random);
    const side values(plain_codec(random, 8, {2, 5, 4}), 1, dtype::float16, tokens, random);
    const kv_cache cache = make_cache(one_layer(keys, values));
    kv_workspace first_workspace = cache.make_workspace().value();
    kv_sequence read = cache.new_sequence().value();
    read.append(0, keys.input.view(), values.input.view(), first_workspace).value();
    const tensor expected = all_keys(read, 0);
    kv_sequence prompt = read.fork().value();
    prompt.truncate(150).value();

    std::atomic<int> good{0};
    std::vector<std::thread> threads;
    for (std::size_t reader = 0; reader < 2; ++reader) {
        threads.emplace_back([&, reader] {
            kv_workspace workspace;
            bool same = true;
            for (std::size_t first = reader; first < 40; ++first) {
                tensor out(dtype::float32, {tokens - first, 2, 16});
                same = same && read.reconstruct_keys(0, first, out.view(), workspace).ok() &&
                       out.is_part_of(expected, first);
            }
            good += same ? 1 : 0;
        });
    }
    for (std::size_t writer = 0; writer < 3; ++writer) {
        threads.emplace_back([&, writer] {
            kv_workspace workspace;
            bool same = true;
            for (int round = 0; round < 6; ++round) {
                kv_sequence mine = prompt.fork().value();
                while (mine.tokens(0) < tokens) {
                    const std::size_t held = mine.tokens(0);
                    const std::size_t count = std::min(tokens - held, 3 + 5 * writer);
                    same =
                        same &&
                        mine.append(0, keys.input.slice(held, count), values.input.slice(held, count), workspace).ok();
                }
                same = same && mine.demote(100, 1, 1).ok() && mine.evict(10, 20).ok() && mine.truncate(200).ok();
                const kv_sequence other = mine.fork().value();
                same = same && other.tokens(0) == 200 && other.bytes().total() > 0 && cache.bytes().pages > 0;
            }
            good += same ? 1 : 0;
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    CHECK(good == 5);
    CHECK(all_keys(read, 0).is_part_of(expected, 0));
}

#ifndef NDEBUG
TEST_CASE("kv_sequence: two writers at once end a debug build", "[cache][unit]") {
    // Writes to the sequence from within its own append.
    class meddling_executor final : public rvqkv::executor {
    public:
        explicit meddling_executor(kv_sequence& sequence) : sequence_(sequence) {}
        [[nodiscard]] std::size_t concurrency() const noexcept override { return 2; }
        void run(std::size_t tasks, void (*task)(void*, std::size_t), void* context) const override {
            sequence_.clear();
            rvqkv::serial_executor().run(tasks, task, context);
        }

    private:
        kv_sequence& sequence_;
    };
    test::random_source random(21);
    const side s(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, 300, random);
    const kv_cache cache = make_cache(plain(one_layer(s, s)));
    kv_sequence sequence = cache.new_sequence().value();
    kv_workspace workspace;
    const ::pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        std::signal(SIGABRT, SIG_DFL);
        (void)std::freopen("/dev/null", "w", stderr);
        (void)sequence.append(0, s.input.view(), s.input.view(), workspace, nullptr, meddling_executor(sequence));
        ::_exit(0);
    }
    int outcome = 0;
    REQUIRE(::waitpid(child, &outcome, 0) == child);
    CHECK(WIFSIGNALED(outcome));
    CHECK(WTERMSIG(outcome) == SIGABRT);
}
#endif
