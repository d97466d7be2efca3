// SPDX-License-Identifier: MIT
/// @file
/// The KV cache against the codec itself: whatever the shapes, splits, ranges and failures, it gives back what
/// `codec::encode` and `codec::decode` of the same tokens give, and holds the bytes that it says.
#include "rvqkv/cache/kv_cache.hpp"

#include "rvqkv/core/thread_pool.hpp"
#include "support/allocation_counter.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using rvqkv::dtype;
using rvqkv::kv_cache;
using rvqkv::kv_cache_config;
using shared_codec = std::shared_ptr<const rvqkv::codec>;

constexpr dtype all_types[] = {dtype::float32, dtype::float16, dtype::bfloat16};

template <class T, std::size_t Count>
const T& pick(test::random_source& random, const T (&choices)[Count]) {
    return choices[random.integer(0, Count - 1)];
}

/// A tensor with memory of its own, in any type and any order of axes, with gaps between elements.
class tensor {
public:
    tensor(dtype type, rvqkv::tensor_shape shape) : tensor(type, shape, nullptr) {}
    tensor(dtype type, rvqkv::tensor_shape shape, test::random_source& random) : tensor(type, shape, &random) {}

    [[nodiscard]] std::size_t tokens() const { return shape_.tokens; }
    [[nodiscard]] rvqkv::mutable_tensor_view view() {
        return {memory_.data() + static_cast<std::ptrdiff_t>(rvqkv::size_of(type_)) * origin_, type_, shape_, strides_};
    }
    [[nodiscard]] rvqkv::tensor_view view() const {
        return {memory_.data() + static_cast<std::ptrdiff_t>(rvqkv::size_of(type_)) * origin_, type_, shape_, strides_};
    }
    [[nodiscard]] rvqkv::tensor_view slice(std::size_t first, std::size_t count) const {
        return view().slice_tokens(first, count);
    }

    void set(std::size_t token, std::size_t head, std::size_t channel, float value) {
        std::byte* const at = element(token, head, channel);
        switch (type_) {
            case dtype::float32: std::memcpy(at, &value, 4); break;
            case dtype::float16: store(at, rvqkv::to_float16(value)); break;
            case dtype::bfloat16: store(at, rvqkv::to_bfloat16(value)); break;
        }
    }
    /// The bits of an element.
    [[nodiscard]] std::uint32_t bits(std::size_t token, std::size_t head, std::size_t channel) const {
        std::uint32_t value = 0;
        std::memcpy(&value, const_cast<tensor*>(this)->element(token, head, channel), rvqkv::size_of(type_));
        return value;
    }
    void fill(test::random_source& random) {
        for (std::size_t token = 0; token < shape_.tokens; ++token) {
            for (std::size_t head = 0; head < shape_.heads; ++head) {
                for (std::size_t channel = 0; channel < shape_.channels; ++channel) {
                    set(token, head, channel, random.gaussian());
                }
            }
        }
    }
    /// Whether this is tokens `[first, first + tokens())` of another tensor, bit for bit.
    [[nodiscard]] bool is_part_of(const tensor& whole, std::size_t first) const {
        for (std::size_t token = 0; token < shape_.tokens; ++token) {
            if (!same_token(token, whole, first + token)) {
                return false;
            }
        }
        return true;
    }
    [[nodiscard]] bool same_token(std::size_t token, const tensor& other, std::size_t other_token) const {
        for (std::size_t head = 0; head < shape_.heads; ++head) {
            if (!same_row(token, head, other, other_token)) {
                return false;
            }
        }
        return true;
    }
    [[nodiscard]] bool same_row(std::size_t token, std::size_t head, const tensor& other,
                                std::size_t other_token) const {
        for (std::size_t channel = 0; channel < shape_.channels; ++channel) {
            if (bits(token, head, channel) != other.bits(other_token, head, channel)) {
                return false;
            }
        }
        return true;
    }

private:
    static constexpr std::byte gap{0xa5};

    tensor(dtype type, rvqkv::tensor_shape shape, test::random_source* random) : type_(type), shape_(shape) {
        // From the innermost axis to the outermost; random ones may run backwards and leave gaps.
        std::array<std::size_t, 3> order = {2, 1, 0};
        if (random != nullptr) {
            std::shuffle(order.begin(), order.end(), random->engine());
        }
        const std::array<std::size_t, 3> extents = {shape.tokens, shape.heads, shape.channels};
        const std::array<std::ptrdiff_t*, 3> strides = {&strides_.token, &strides_.head, &strides_.channel};
        std::size_t size = 1;
        for (const std::size_t axis : order) {
            size *= random != nullptr ? random->integer(1, 2) : 1;
            const bool backwards = random != nullptr && random->integer(0, 3) == 0;
            *strides[axis] = backwards ? -static_cast<std::ptrdiff_t>(size) : static_cast<std::ptrdiff_t>(size);
            if (backwards && extents[axis] > 0) {
                origin_ += static_cast<std::ptrdiff_t>(size * (extents[axis] - 1));
            }
            size *= extents[axis];
        }
        memory_.assign((size + 1) * rvqkv::size_of(type), gap);
    }
    template <class T>
    static void store(std::byte* at, T value) {
        std::memcpy(at, &value, sizeof(T));
    }
    [[nodiscard]] std::byte* element(std::size_t token, std::size_t head, std::size_t channel) {
        return static_cast<std::byte*>(view().row(token, head)) + static_cast<std::ptrdiff_t>(rvqkv::size_of(type_)) *
                                                                      static_cast<std::ptrdiff_t>(channel) *
                                                                      strides_.channel;
    }

    dtype type_;
    rvqkv::tensor_shape shape_;
    rvqkv::tensor_strides strides_;
    std::ptrdiff_t origin_ = 0;
    std::vector<std::byte> memory_;
};

/// Fewest and most codewords of each code width from 1 to 16 bits, so most are no power of two.
std::vector<std::size_t> all_codewords() {
    std::vector<std::size_t> counts = {1, 2, 37, 2048};
    for (unsigned bits = 2; bits <= 16; ++bits) {
        counts.push_back((std::size_t{1} << (bits - 1)) + 1);
        counts.push_back(std::size_t{1} << bits);
    }
    return counts;
}

shared_codec make_codec(test::random_source& random, const rvqkv::codec_spec& spec) {
    const std::vector<float> weights = test::gaussian_numbers(random, spec.shape.size());
    return rvqkv::make_codec<float>(spec, weights).value();
}

/// A small codec of random policies and types.
shared_codec random_codec(test::random_source& random, std::size_t codewords) {
    constexpr rvqkv::distance metrics[] = {rvqkv::distance::euclidean, rvqkv::distance::cosine};
    rvqkv::codec_spec spec;
    const std::size_t groups = random.integer(1, 4);
    spec.shape = {random.integer(1, codewords > 4096 ? 2 : 4), codewords, random.integer(1, 6)};
    spec.head_dim = groups * spec.shape.dim;
    spec.scale = pick(random, rvqkv::all_scale_kinds);
    spec.scale_type = pick(random, all_types);
    spec.grouping = pick(random, rvqkv::all_grouping_kinds);
    if (spec.grouping == rvqkv::grouping_kind::permuted) {
        spec.permutation.resize(spec.head_dim);
        std::iota(spec.permutation.begin(), spec.permutation.end(), std::uint16_t{0});
        std::shuffle(spec.permutation.begin(), spec.permutation.end(), random.engine());
    }
    spec.metric = pick(random, metrics);
    spec.weight_type = pick(random, all_types);
    return make_codec(random, spec);
}

/// The paper's policies at a size of one's own.
shared_codec plain_codec(test::random_source& random, std::size_t head_dim, rvqkv::codebook_shape shape) {
    rvqkv::codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = shape;
    return make_codec(random, spec);
}

kv_cache make_cache(const kv_cache_config& config) {
    return kv_cache::create(config).value();
}
kv_cache_config one_layer(shared_codec keys, std::size_t key_heads, shared_codec values, std::size_t value_heads,
                          std::size_t page_tokens = 64) {
    return {{{{std::move(keys), key_heads}, {std::move(values), value_heads}}}, page_tokens};
}

/// A side of a layer with its input, for what the codec itself makes of it.
struct side {
    shared_codec codec;
    std::size_t heads;
    tensor input;

    side(shared_codec codec_, std::size_t heads_, dtype type, std::size_t tokens, test::random_source& random)
        : codec(std::move(codec_)), heads(heads_), input(type, {tokens, heads_, codec->head_dim()}, random) {
        input.fill(random);
    }
    [[nodiscard]] tensor expected(dtype type, std::size_t depths, rvqkv::encode_report* report = nullptr) const {
        const std::size_t rows = input.tokens() * heads;
        std::vector<rvqkv::code_t> codes(rows * codec->groups() * codec->depths());
        std::vector<float> scales(rows);
        const rvqkv::code_strides strides{codec->depths(), 1};
        rvqkv::quantizer_workspace workspace;
        tensor out(type, {input.tokens(), heads, codec->head_dim()});
        codec->encode(input.view(), {codes.data(), strides, scales.data()}, workspace, report).value();
        codec->decode({codes.data(), strides, scales.data()}, out.view(), depths, workspace).value();
        return out;
    }
};

/// Some tokens of a side's input.
struct tensor_part {
    std::size_t first;
    std::size_t count;
    [[nodiscard]] rvqkv::tensor_view of(const side& whole) const { return whole.input.slice(first, count); }
};

/// A layer's keys or values, wholly.
tensor all_keys(const kv_cache& cache, std::size_t layer, dtype type = dtype::float32) {
    tensor out(type, {cache.tokens(layer), cache.keys(layer).heads, cache.keys(layer).codec->head_dim()});
    cache.reconstruct_keys(layer, 0, out.view()).value();
    return out;
}
tensor all_values(const kv_cache& cache, std::size_t layer, dtype type = dtype::float32) {
    tensor out(type, {cache.tokens(layer), cache.values(layer).heads, cache.values(layer).codec->head_dim()});
    cache.reconstruct_values(layer, 0, out.view()).value();
    return out;
}

/// Appends everything from the layer's token on, in pieces of up to `most` tokens.
void append_rest(kv_cache& cache, std::size_t layer, const tensor& keys, const tensor& values,
                 test::random_source& random, std::size_t most) {
    while (cache.tokens(layer) < keys.tokens()) {
        const std::size_t first = cache.tokens(layer);
        const std::size_t count = std::min(keys.tokens() - first, random.integer(0, most));
        cache.append(layer, keys.slice(first, count), values.slice(first, count)).value();
    }
}

bool same_pages(const kv_cache& a, const kv_cache& b, std::size_t layer) {
    for (std::size_t i = 0; i * a.page_tokens() < a.tokens(layer); ++i) {
        const auto left = a.page(layer, i);
        const auto right = b.page(layer, i);
        if (left.size() != right.size() || std::memcmp(left.data(), right.data(), left.size()) != 0) {
            return false;
        }
    }
    return a.tokens(layer) == b.tokens(layer);
}

std::string message_of(const rvqkv::status& result) {
    return result.ok() ? "ok" : std::string(rvqkv::name_of(result.error().code)) + ": " + result.error().message;
}

/// Everything that a caller can see of a cache.
struct snapshot {
    std::vector<std::size_t> tokens;
    std::vector<std::size_t> capacities;
    std::size_t bytes;
    std::vector<tensor> contents;

    explicit snapshot(const kv_cache& cache) : bytes(cache.bytes().total()) {
        for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
            tokens.push_back(cache.tokens(layer));
            capacities.push_back(cache.capacity(layer));
            contents.push_back(all_keys(cache, layer));
            contents.push_back(all_values(cache, layer));
        }
    }
    [[nodiscard]] bool operator==(const snapshot& other) const {
        if (tokens != other.tokens || capacities != other.capacities || bytes != other.bytes) {
            return false;
        }
        for (std::size_t i = 0; i < contents.size(); ++i) {
            if (!contents[i].is_part_of(other.contents[i], 0)) {
                return false;
            }
        }
        return true;
    }
};

}  // namespace

TEST_CASE("kv_cache: gives back what the codec gives, for any shape, type, policy and code width",
          "[cache][differential]") {
    test::random_source random(1);
    CAPTURE(test::seed());
    const std::vector<std::size_t> codewords = all_codewords();
    for (std::size_t round = 0; round < 2 * codewords.size(); ++round) {
        const std::size_t tokens = random.integer(1, 40);
        const side keys(random_codec(random, codewords[round % codewords.size()]), random.integer(1, 3),
                        pick(random, all_types), tokens, random);
        const side values(random_codec(random, codewords[(round * 7 + 3) % codewords.size()]), random.integer(1, 3),
                          pick(random, all_types), tokens, random);
        const std::size_t page_tokens = random.integer(1, 16);
        CAPTURE(round, tokens, page_tokens, keys.codec->shape().codewords, values.codec->shape().codewords);
        kv_cache cache = make_cache(one_layer(keys.codec, keys.heads, values.codec, values.heads, page_tokens));
        append_rest(cache, 0, keys.input, values.input, random, random.integer(1, tokens));
        REQUIRE(cache.tokens(0) == tokens);

        rvqkv::kv_workspace workspace;  // passed on from read to read, of any size
        for (int read = 0; read < 6; ++read) {
            const std::size_t first = random.integer(0, tokens);
            const std::size_t count = random.integer(0, tokens - first);
            const dtype type = pick(random, all_types);
            const std::size_t key_depths = random.integer(0, keys.codec->depths());
            const std::size_t value_depths = random.integer(0, values.codec->depths());
            CAPTURE(first, count, rvqkv::name_of(type), key_depths, value_depths);
            tensor out_keys(type, {count, keys.heads, keys.codec->head_dim()}, random);
            tensor out_values(type, {count, values.heads, values.codec->head_dim()}, random);
            CHECK(cache.reconstruct_keys(0, first, out_keys.view(), workspace, key_depths).ok());
            CHECK(cache.reconstruct_values(0, first, out_values.view(), value_depths).ok());
            CHECK(out_keys.is_part_of(keys.expected(type, key_depths), first));
            CHECK(out_values.is_part_of(values.expected(type, value_depths), first));
        }
        CHECK(all_keys(cache, 0).is_part_of(keys.expected(dtype::float32, keys.codec->depths()), 0));
        CHECK(all_values(cache, 0).is_part_of(values.expected(dtype::float32, values.codec->depths()), 0));
    }
}

TEST_CASE("kv_cache: blocks and pages cross as they like", "[cache][differential]") {
    test::random_source random(2);
    CAPTURE(test::seed());
    struct shape {
        std::size_t heads;
        std::size_t head_dim;
        std::size_t page_tokens;
    };
    // Blocks are 65536 numbers: here 5 tokens, 1 token, and 1 token that is more than a block.
    for (const shape& each : {shape{50, 256, 3}, shape{200, 256, 2}, shape{300, 256, 64}}) {
        CAPTURE(each.heads, each.head_dim, each.page_tokens);
        const std::size_t tokens = 13;
        const side keys(plain_codec(random, each.head_dim, {2, 5, 32}), each.heads, dtype::float32, tokens, random);
        const side values(plain_codec(random, 8, {1, 3, 4}), 2, dtype::float16, tokens, random);
        kv_cache cache = make_cache(one_layer(keys.codec, each.heads, values.codec, 2, each.page_tokens));
        cache.append(0, keys.input.slice(0, 2), values.input.slice(0, 2)).value();
        cache.append(0, keys.input.slice(2, tokens - 2), values.input.slice(2, tokens - 2)).value();
        CHECK(all_keys(cache, 0).is_part_of(keys.expected(dtype::float32, 2), 0));
        CHECK(all_values(cache, 0).is_part_of(values.expected(dtype::float32, 1), 0));
    }
}

TEST_CASE("kv_cache: every range of a few pages", "[cache][property]") {
    test::random_source random(3);
    CAPTURE(test::seed());
    const std::size_t tokens = 11;
    const side keys(plain_codec(random, 6, {3, 5, 3}), 3, dtype::float32, tokens, random);
    const side values(plain_codec(random, 4, {2, 37, 2}), 1, dtype::bfloat16, tokens, random);
    kv_cache cache = make_cache(one_layer(keys.codec, 3, values.codec, 1, 3));
    cache.append(0, keys.input.view(), values.input.view()).value();
    const tensor expected = keys.expected(dtype::float32, 3);
    for (std::size_t first = 0; first <= tokens; ++first) {
        for (std::size_t count = 0; first + count <= tokens; ++count) {
            tensor out(dtype::float32, {count, 3, 6}, random);
            CAPTURE(first, count);
            CHECK(cache.reconstruct_keys(0, first, out.view()).ok());
            CHECK(out.is_part_of(expected, first));
        }
    }
}

TEST_CASE("kv_cache: the same bytes however the appends are split", "[cache][property]") {
    test::random_source random(4);
    CAPTURE(test::seed());
    for (const std::size_t codewords : all_codewords()) {
        const std::size_t tokens = random.integer(1, 30);
        const side keys(random_codec(random, codewords), random.integer(1, 3), pick(random, all_types), tokens, random);
        const side values(random_codec(random, 37), random.integer(1, 3), pick(random, all_types), tokens, random);
        const kv_cache_config config =
            one_layer(keys.codec, keys.heads, values.codec, values.heads, random.integer(1, 12));
        CAPTURE(codewords, tokens, config.page_tokens);
        kv_cache whole = make_cache(config);
        whole.append(0, keys.input.view(), values.input.view()).value();
        kv_cache split = make_cache(config);
        append_rest(split, 0, keys.input, values.input, random, random.integer(1, 8));
        CHECK(same_pages(whole, split, 0));
        CHECK(whole.bytes().codes == split.bytes().codes);
        CHECK(whole.bytes().scales == split.bytes().scales);
    }
}

TEST_CASE("kv_cache: layers are apart, and each may have its own shape", "[cache][unit]") {
    test::random_source random(5);
    CAPTURE(test::seed());
    const side wide(plain_codec(random, 16, {2, 16, 4}), 3, dtype::float32, 9, random);
    const side narrow(plain_codec(random, 4, {4, 100, 2}), 1, dtype::float32, 9, random);
    kv_cache cache = make_cache({{{{wide.codec, 3}, {narrow.codec, 1}},
                                  {{narrow.codec, 1}, {wide.codec, 3}},
                                  {{wide.codec, 3}, {wide.codec, 3}}},
                                 4});
    CHECK(cache.layers() == 3);
    CHECK(cache.page_tokens() == 4);
    CHECK(cache.keys(1).codec == narrow.codec);
    CHECK(cache.values(1).heads == 3);
    cache.append(0, wide.input.view(), narrow.input.view()).value();
    cache.append(1, narrow.input.slice(0, 5), wide.input.slice(0, 5)).value();
    CHECK(cache.tokens(0) == 9);
    CHECK(cache.tokens(1) == 5);
    CHECK(cache.tokens(2) == 0);
    CHECK(all_keys(cache, 0).is_part_of(wide.expected(dtype::float32, 2), 0));
    CHECK(all_values(cache, 0).is_part_of(narrow.expected(dtype::float32, 4), 0));
    CHECK(all_keys(cache, 1).is_part_of(narrow.expected(dtype::float32, 4), 0));
    CHECK(all_values(cache, 1).is_part_of(wide.expected(dtype::float32, 2), 0));
    const auto page = cache.page(0, 2);
    CHECK(page.size() % rvqkv::buffer_alignment == 0);
    CHECK(reinterpret_cast<std::uintptr_t>(page.data()) % rvqkv::buffer_alignment == 0);
    CHECK(page.size() - cache.values_layout(0).end() < rvqkv::buffer_alignment);

    kv_cache moved = std::move(cache);
    CHECK(moved.tokens(0) == 9);
    CHECK(all_keys(moved, 0).is_part_of(wide.expected(dtype::float32, 2), 0));
    cache = std::move(moved);
    CHECK(all_keys(cache, 1).is_part_of(narrow.expected(dtype::float32, 4), 0));
}

TEST_CASE("kv_cache: what is appended after truncate or clear is as in a fresh cache", "[cache][property]") {
    test::random_source random(6);
    CAPTURE(test::seed());
    const std::size_t tokens = 13;
    const side keys(plain_codec(random, 6, {3, 5, 3}), 3, dtype::float32, tokens, random);
    const side values(plain_codec(random, 4, {2, 100, 2}), 1, dtype::float32, tokens, random);
    const side other_keys(keys.codec, 3, dtype::float32, tokens, random);
    const side other_values(values.codec, 1, dtype::float32, tokens, random);
    const kv_cache_config config = one_layer(keys.codec, 3, values.codec, 1, 5);
    for (std::size_t kept = 0; kept <= tokens; ++kept) {
        CAPTURE(kept);
        kv_cache cache = make_cache(config);
        cache.append(0, keys.input.slice(0, kept), values.input.slice(0, kept)).value();
        cache.append(0, other_keys.input.slice(kept, tokens - kept), other_values.input.slice(kept, tokens - kept))
            .value();
        const std::size_t capacity = cache.capacity(0);
        if (kept == 0) {
            cache.clear();
        } else {
            CHECK(cache.truncate(0, kept).ok());
        }
        CHECK(cache.tokens(0) == kept);
        CHECK(cache.capacity(0) == capacity);
        append_rest(cache, 0, keys.input, values.input, random, 4);
        CHECK(all_keys(cache, 0).is_part_of(keys.expected(dtype::float32, 3), 0));
        CHECK(all_values(cache, 0).is_part_of(values.expected(dtype::float32, 2), 0));
    }
}

TEST_CASE("kv_cache: truncate of all layers rolls a half-done pass back, or does nothing", "[cache][unit]") {
    test::random_source random(7);
    const side s(plain_codec(random, 4, {1, 4, 2}), 2, dtype::float32, 8, random);
    kv_cache_config config;
    config.layers.assign(3, {{s.codec, 2}, {s.codec, 2}});
    kv_cache cache = make_cache(config);
    for (std::size_t layer = 0; layer < 3; ++layer) {
        cache.append(layer, s.input.slice(0, 5), s.input.slice(0, 5)).value();
    }
    cache.append(0, s.input.slice(5, 1), s.input.slice(5, 1)).value();
    CHECK(message_of(cache.truncate(6)) == "invalid_argument: layer 1: cannot truncate to 6 tokens, it holds 5");
    CHECK(cache.tokens(0) == 6);
    CHECK(cache.truncate(5).ok());
    CHECK(cache.tokens(0) == 5);
    CHECK(cache.tokens(2) == 5);
    CHECK(message_of(cache.truncate(1, 6)) == "invalid_argument: layer 1: cannot truncate to 6 tokens, it holds 5");
    CHECK(message_of(cache.truncate(3, 0)) == "invalid_argument: layer is 3, the cache has 3");
    CHECK(cache.truncate(1, 0).ok());
    CHECK(cache.tokens(1) == 0);
    CHECK(cache.tokens(2) == 5);
    cache.clear();
    CHECK(cache.tokens(0) + cache.tokens(1) + cache.tokens(2) == 0);
}

TEST_CASE("kv_cache: says how many bytes it holds", "[cache][property]") {
    test::random_source random(8);
    CAPTURE(test::seed());
    for (int round = 0; round < 12; ++round) {
        const std::size_t tokens = 90;
        const side keys(random_codec(random, 37), random.integer(1, 4), dtype::float32, tokens, random);
        const side values(random_codec(random, 2048), random.integer(1, 4), dtype::float16, tokens, random);
        kv_cache_config config;
        config.page_tokens = random.integer(1, 20);
        config.layers.assign(random.integer(1, 130), {{keys.codec, keys.heads}, {values.codec, values.heads}});
        CAPTURE(round, config.page_tokens, config.layers.size());

        const test::allocation_counter counter;
        const auto held = [&counter] { return static_cast<std::size_t>(counter.live_bytes()); };
        {
            kv_cache cache = make_cache(config);
            CHECK(held() == cache.bytes().total());
            CHECK(cache.bytes().codecs == keys.codec->bytes() + values.codec->bytes());
            CHECK(cache.bytes().codes == 0);
            CHECK(cache.bytes().free_pages == 0);

            cache.reserve(17).value();
            CHECK(held() == cache.bytes().total());
            CHECK(cache.bytes().codes == 0);
            CHECK(cache.bytes().free_pages > 0);

            for (std::size_t first = 0; first < tokens; first += 9) {
                for (const std::size_t layer : {std::size_t{0}, config.layers.size() - 1}) {
                    if (cache.tokens(layer) == first) {
                        cache.append(layer, keys.input.slice(first, 9), values.input.slice(first, 9)).value();
                    }
                }
                CHECK(held() == cache.bytes().total());
            }
            const auto& layout = cache.keys_layout(0);
            const std::size_t pages = (tokens + config.page_tokens - 1) / config.page_tokens;
            const std::size_t layers = config.layers.size() == 1 ? 1 : 2;
            CHECK(cache.bytes().codes == layers * pages * (layout.code_bytes() + cache.values_layout(0).code_bytes()));
            CHECK(cache.bytes().scales ==
                  layers * pages * (layout.scale_bytes() + cache.values_layout(0).scale_bytes()));

            cache.truncate(0, 1).value();
            CHECK(held() == cache.bytes().total());
            const std::size_t before = held();
            const std::size_t free = cache.bytes().free_pages;
            cache.release_free_pages();
            CHECK(held() == cache.bytes().total());
            CHECK(before - held() == free);
            CHECK(cache.bytes().free_pages == 0);
            CHECK(cache.capacity(0) == config.page_tokens);

            const kv_cache moved = std::move(cache);
            CHECK(held() == moved.bytes().total());
        }
        CHECK(counter.live_bytes() == 0);
    }
}

TEST_CASE("kv_cache: a long sequence takes the codec's bits and less than 1 % more", "[cache][unit]") {
    test::random_source random(9);
    const std::size_t tokens = 4096;
    const side s(plain_codec(random, 64, {4, 16, 32}), 8, dtype::float16, 64, random);
    kv_cache cache = make_cache(one_layer(s.codec, 8, s.codec, 8));
    for (std::size_t first = 0; first < tokens; first += 64) {
        cache.append(0, s.input.view(), s.input.view()).value();
    }
    const rvqkv::kv_cache_bytes bytes = cache.bytes();
    const std::size_t formula = 2 * tokens * 8 * s.codec->bits_per_row() / 8;
    CHECK(bytes.codes + bytes.scales == formula);
    CHECK(bytes.total() - bytes.workspace > formula);
    CHECK(bytes.total() - bytes.workspace < formula + formula / 100);
}

TEST_CASE("kv_cache: no allocation once reserved, and bounded scratch memory before", "[cache][property]") {
    test::random_source random(10);
    const std::size_t tokens = 400;
    const side keys(plain_codec(random, 64, {2, 5, 32}), 8, dtype::float16, tokens, random);
    const side values(plain_codec(random, 32, {3, 37, 16}), 4, dtype::bfloat16, tokens, random);
    kv_cache_config config;
    config.layers.assign(120, {{keys.codec, 8}, {values.codec, 4}});  // names of late layers are long
    kv_cache cache = make_cache(config);

    const std::size_t before = cache.bytes().total();
    std::ptrdiff_t peak = 0;
    {
        const test::allocation_counter counter;
        cache.append(119, keys.input.view(), values.input.view()).value();
        peak = counter.peak_bytes();
    }
    const std::size_t pages = (tokens + 63) / 64;
    CHECK(static_cast<std::size_t>(peak) <= cache.bytes().total() - before + 16 * pages);

    cache.clear();
    cache.reserve(tokens).value();
    rvqkv::kv_workspace workspace = cache.make_workspace().value();
    tensor out(dtype::float16, {tokens, 8, 64});
    tensor out_values(dtype::float16, {tokens, 4, 32});
    std::size_t allocations = 0;
    rvqkv::kv_encode_report report;
    {
        const test::allocation_counter counter;
        cache.append(119, keys.input.slice(0, 150), values.input.slice(0, 150), &report).value();
        for (std::size_t first = 150; first < tokens; ++first) {
            cache.append(119, keys.input.slice(first, 1), values.input.slice(first, 1)).value();
        }
        cache.reconstruct_keys(119, 0, out.view(), workspace).value();
        cache.reconstruct_values(119, 0, out_values.view(), workspace, 1).value();
        cache.truncate(119, 7).value();
        cache.truncate(0).value();
        allocations = counter.allocations();
    }
    CHECK(allocations == 0);
}

TEST_CASE("kv_cache: whichever allocation fails, create and reserve leave nothing behind", "[cache][unit]") {
    test::random_source random(11);
    const side s(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, 6, random);
    kv_cache_config config;
    config.page_tokens = 4;
    config.layers.assign(3, {{s.codec, 2}, {s.codec, 2}});

    std::size_t failures = 0;
    for (std::size_t nth = 0;; ++nth) {
        CAPTURE(nth);
        bool made = false;
        bool triggered = false;
        bool out_of_memory = false;
        const test::allocation_counter counter;
        {
            const test::failing_allocations failing(nth);
            const auto cache = kv_cache::create(config);
            made = cache.ok();
            out_of_memory = !made && cache.error().code == rvqkv::error_code::out_of_memory;
            triggered = failing.triggered();
        }
        REQUIRE(counter.live_bytes() == 0);
        if (!triggered) {
            CHECK(made);
            break;
        }
        CHECK(out_of_memory);
        ++failures;
    }
    CHECK(failures == 4);  // the layers' records; three parts of the workspace

    failures = 0;
    for (std::size_t nth = 0;; ++nth) {
        CAPTURE(nth);
        kv_cache cache = make_cache(config);
        cache.append(1, s.input.view(), s.input.view()).value();
        const snapshot before(cache);
        bool done = false;
        bool triggered = false;
        {
            const test::failing_allocations failing(nth);
            done = cache.reserve(20).ok();
            triggered = failing.triggered();
        }
        if (!triggered) {
            CHECK(done);
            CHECK(cache.capacity(0) == 20);
            break;
        }
        CHECK_FALSE(done);
        CHECK(snapshot(cache) == before);
        ++failures;
    }
    CHECK(failures == 1 + 3 * 2 + 5 + 3 + 5);  // a list; for each layer two lists, and the pages
}

TEST_CASE("kv_cache: whichever allocation fails, append and reconstruct change nothing", "[cache][unit]") {
    test::random_source random(12);
    CAPTURE(test::seed());
    const std::size_t tokens = 20;
    const side keys(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, tokens, random);
    const side values(plain_codec(random, 6, {3, 100, 2}), 1, dtype::float32, tokens, random);
    const kv_cache_config config = one_layer(keys.codec, 2, values.codec, 1, 4);
    const tensor expected_keys = keys.expected(dtype::float32, 2);

    std::size_t failures = 0;
    for (const std::size_t held : {0U, 3U, 4U, 9U}) {
        for (std::size_t nth = 0;; ++nth) {
            CAPTURE(held, nth);
            kv_cache cache = make_cache(config);
            cache.append(0, keys.input.slice(0, held), values.input.slice(0, held)).value();
            const snapshot before(cache);
            rvqkv::kv_encode_report report;
            report.keys.nonfinite_rows = 77;
            bool done = false;
            bool triggered = false;
            bool out_of_memory = false;
            {
                const test::failing_allocations failing(nth);
                const rvqkv::status result = cache.append(0, keys.input.slice(held, tokens - held),
                                                          values.input.slice(held, tokens - held), &report);
                done = result.ok();
                out_of_memory = !done && result.error().code == rvqkv::error_code::out_of_memory;
                triggered = failing.triggered();
            }
            CHECK(report.keys.nonfinite_rows == 77);
            if (!triggered) {
                REQUIRE(done);
                CHECK(all_keys(cache, 0).is_part_of(expected_keys, 0));
                break;
            }
            CHECK(out_of_memory);
            CHECK(snapshot(cache) == before);
            ++failures;
            append_rest(cache, 0, keys.input, values.input, random, 9);
            CHECK(all_keys(cache, 0).is_part_of(expected_keys, 0));
        }
    }
    CHECK(failures > 10);

    kv_cache cache = make_cache(config);
    cache.append(0, keys.input.view(), values.input.view()).value();
    const tensor untouched(dtype::float32, {tokens, 2, 8});
    for (std::size_t nth = 0;; ++nth) {
        CAPTURE(nth);
        tensor out(dtype::float32, {tokens, 2, 8});
        bool done = false;
        bool triggered = false;
        {
            const test::failing_allocations failing(nth);
            done = cache.reconstruct_keys(0, 0, out.view()).ok();
            triggered = failing.triggered();
        }
        CHECK(done == !triggered);
        CHECK(out.is_part_of(done ? expected_keys : untouched, 0));
        if (!triggered) {
            CHECK(nth == 3);
            break;
        }
    }
}

TEST_CASE("kv_cache: workers share an append out and change nothing", "[cache][threads][property]") {
    test::random_source random(16);
    CAPTURE(test::seed());
    const std::size_t tokens = 700;
    const side keys(plain_codec(random, 64, {2, 37, 16}), 3, dtype::float16, tokens, random);
    side values(plain_codec(random, 1024, {2, 5, 32}), 2, dtype::float32, tokens, random);
    values.input.set(650, 1, 3, std::numeric_limits<float>::infinity());
    values.input.set(90, 0, 5, std::numeric_limits<float>::infinity());
    for (const std::size_t page_tokens : {1U, 13U, 64U}) {
        const kv_cache_config config = one_layer(keys.codec, 3, values.codec, 2, page_tokens);
        kv_cache expected = make_cache(config);
        rvqkv::kv_encode_report expected_report;
        expected.append(0, keys.input.view(), values.input.view(), &expected_report).value();
        const auto check = [&](const rvqkv::executor& workers) {
            CAPTURE(page_tokens, workers.concurrency());
            kv_cache cache = make_cache(config);
            cache.reserve(tokens, workers).value();
            const std::size_t before = cache.bytes().total();
            rvqkv::kv_encode_report report;
            for (const auto& [first, count] : {std::pair{0, 0}, {0, 7}, {7, 1}, {8, 692}}) {
                const auto from = static_cast<std::size_t>(first);
                const tensor_part part{from, static_cast<std::size_t>(count)};
                rvqkv::kv_encode_report found;
                std::size_t allocations = 0;
                bool done = false;
                {
                    const test::allocation_counter counter;
                    done = cache.append(0, part.of(keys), part.of(values), &found, workers).ok();
                    allocations = counter.allocations();
                }
                CHECK(done);
                CHECK(allocations == 0);
                report.keys.add(found.keys, from);
                report.values.add(found.values, from);
            }
            CHECK(same_pages(cache, expected, 0));
            CHECK(cache.bytes().total() == before);
            CHECK(report.keys.nonfinite_rows == 0);
            CHECK(report.values.nonfinite_rows == 2);
            CHECK(report.values.first_token == 90);
            CHECK(report.values.first_token == expected_report.values.first_token);
        };
        check(test::backward_executor(3));
        for (const std::size_t threads : {1U, 2U, 3U, 4U}) {
            check(rvqkv::thread_pool(threads));
        }
    }
}

TEST_CASE("kv_cache: whichever allocation fails, an append with more workers changes nothing", "[cache][unit]") {
    test::random_source random(17);
    const side keys(plain_codec(random, 64, {2, 5, 16}), 3, dtype::float32, 400, random);
    const side values(plain_codec(random, 32, {2, 5, 32}), 2, dtype::float32, 400, random);
    const test::backward_executor workers(4);
    for (std::size_t nth = 0;; ++nth) {
        CAPTURE(nth);
        REQUIRE(nth < 100);
        kv_cache cache = make_cache(one_layer(keys.codec, 3, values.codec, 2));
        cache.append(0, keys.input.slice(0, 10), values.input.slice(0, 10)).value();
        const snapshot before(cache);
        bool done = false;
        bool triggered = false;
        {
            const test::failing_allocations failing(nth);
            done = cache.append(0, keys.input.slice(10, 390), values.input.slice(10, 390), nullptr, workers).ok();
            triggered = failing.triggered();
        }
        CHECK(done == !triggered);
        if (!triggered) {
            CHECK(nth > 3);
            CHECK(cache.bytes().workspace >
                  kv_cache(make_cache(one_layer(keys.codec, 3, values.codec, 2))).bytes().workspace);
            break;
        }
        CHECK(snapshot(cache) == before);
    }
}

TEST_CASE("kv_cache: a codec of one's own that fails half-way changes nothing", "[cache][unit]") {
    using plain_quantizer = rvqkv::vector_quantizer<rvqkv::std_dev_scale, rvqkv::contiguous_grouping>;
    // Encodes as usual, but only a given number of times.
    class tiring_codec final : public rvqkv::codec_of<plain_quantizer> {
    public:
        tiring_codec(plain_quantizer inner, std::size_t& left)
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
        std::size_t* left_;
    };

    test::random_source random(13);
    CAPTURE(test::seed());
    const std::vector<float> weights = test::gaussian_numbers(random, 2 * 5 * 32);
    auto book = rvqkv::residual_codebook<>::create<float>({2, 5, 32}, weights).value();
    std::size_t left = 100;
    const auto codec =
        std::make_shared<const tiring_codec>(plain_quantizer::create(256, std::move(book)).value(), left);
    const std::size_t tokens = 40;  // in blocks of 16
    const side keys(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, tokens, random);
    const side values(codec, 16, dtype::float32, tokens, random);
    const tensor expected = values.expected(dtype::float32, 2);
    tensor nan_keys(dtype::float32, {37, 2, 8});
    nan_keys.fill(random);
    nan_keys.set(0, 0, 0, std::numeric_limits<float>::quiet_NaN());
    for (std::size_t blocks = 0; blocks < 3; ++blocks) {
        CAPTURE(blocks);
        left = 100;
        kv_cache cache = make_cache(one_layer(keys.codec, 2, codec, 16, 8));
        cache.append(0, keys.input.slice(0, 3), values.input.slice(0, 3)).value();
        const snapshot before(cache);
        left = blocks;
        rvqkv::kv_encode_report report;
        CHECK(message_of(cache.append(0, nan_keys.view(), values.input.slice(3, 37), &report)) ==
              "out_of_memory: tired");
        CHECK(report.keys.nonfinite_rows == 0);
        CHECK(snapshot(cache) == before);
        left = 100;
        cache.append(0, keys.input.slice(3, 37), values.input.slice(3, 37)).value();
        CHECK(all_values(cache, 0).is_part_of(expected, 0));
    }
}

TEST_CASE("kv_cache: a configuration that makes no sense is refused by name", "[cache][unit]") {
    test::random_source random(14);
    const shared_codec codec = plain_codec(random, 8, {2, 5, 4});
    const auto message = [](const kv_cache_config& config) {
        const auto made = kv_cache::create(config);
        return made.ok() ? std::string("ok") : made.error().message;
    };
    CHECK(message({}) == "layers is empty, a cache needs at least 1");
    CHECK(message(one_layer(codec, 1, codec, 1, 0)) == "page_tokens is 0, must be from 1 to 65536");
    CHECK(message(one_layer(codec, 1, codec, 1, 65537)) == "page_tokens is 65537, must be from 1 to 65536");
    CHECK(message(one_layer(nullptr, 1, codec, 1)) == "layer 0 keys: codec is null");
    CHECK(message(one_layer(codec, 1, nullptr, 1)) == "layer 0 values: codec is null");
    CHECK(message(one_layer(codec, 0, codec, 1)) == "layer 0 keys: heads is 0, must be from 1 to 65536");
    kv_cache_config config;
    config.layers.assign(3, {{codec, 1}, {codec, 1}});
    config.layers[2].values.heads = 70000;
    CHECK(message(config) == "layer 2 values: heads is 70000, must be from 1 to 65536");
    config.layers[2].values.heads = 65536;
    CHECK(message(config) == "ok");
}

TEST_CASE("kv_cache: a bad RVQKV_SIMD is a failure of create, not an exception later", "[cache][unit]") {
    test::random_source random(18);
    const shared_codec codec = plain_codec(random, 8, {2, 5, 4});
    const char* const wanted = std::getenv("RVQKV_SIMD");
    const std::string restored = wanted == nullptr ? "" : wanted;
    ::setenv("RVQKV_SIMD", "sse9", 1);
    const auto made = kv_cache::create(one_layer(codec, 1, codec, 1));
    ::setenv("RVQKV_SIMD", restored.c_str(), 1);  // an empty one counts as none
    REQUIRE_FALSE(made.ok());
    CHECK(made.error().message == "RVQKV_SIMD=sse9: not one of generic, neon, avx2, avxvnni, avx512, avx512vnni, avx512vbmi");
    CHECK(kv_cache::create(one_layer(codec, 1, codec, 1)).ok());
}

TEST_CASE("kv_cache: a tensor or range that does not fit is refused by name", "[cache][unit]") {
    test::random_source random(15);
    const side keys(plain_codec(random, 8, {2, 5, 4}), 2, dtype::float32, 6, random);
    const side values(plain_codec(random, 6, {3, 5, 2}), 3, dtype::float32, 6, random);
    kv_cache cache = make_cache(one_layer(keys.codec, 2, values.codec, 3, 4));
    cache.append(0, keys.input.slice(0, 5), values.input.slice(0, 5)).value();
    const snapshot before(cache);

    const auto append = [&](std::size_t layer, rvqkv::tensor_shape k, rvqkv::tensor_shape v) {
        const tensor k_input(dtype::float16, k);
        const tensor v_input(dtype::float16, v);
        return message_of(cache.append(layer, k_input.view(), v_input.view()));
    };
    CHECK(append(1, {1, 2, 8}, {1, 3, 6}) == "invalid_argument: layer is 1, the cache has 1");
    CHECK(append(0, {1, 3, 8}, {1, 3, 6}) == "invalid_argument: layer 0 keys: heads is 3, must be 2");
    CHECK(append(0, {1, 2, 6}, {1, 3, 6}) ==
          "invalid_argument: layer 0 keys: channels is 6, must be the codec's head_dim 8");
    CHECK(append(0, {1, 2, 8}, {1, 2, 6}) == "invalid_argument: layer 0 values: heads is 2, must be 3");
    CHECK(append(0, {1, 2, 8}, {1, 3, 8}) ==
          "invalid_argument: layer 0 values: channels is 8, must be the codec's head_dim 6");
    CHECK(append(0, {2, 2, 8}, {1, 3, 6}) == "invalid_argument: layer 0 values: tokens is 1, must be the keys' 2");
    CHECK(append(0, {0, 2, 8}, {0, 2, 6}) == "invalid_argument: layer 0 values: heads is 2, must be 3");
    CHECK(append(0, {0, 2, 8}, {0, 3, 6}) == "ok");
    // More tokens than memory can hold, without the memory to show for it.
    const float zeros[8] = {};
    const std::size_t many = std::numeric_limits<std::size_t>::max() - 2;
    CHECK(message_of(cache.append(0, {zeros, {many, 2, 8}, {0, 0, 1}}, {zeros, {many, 3, 6}, {0, 0, 1}})) ==
          "out_of_memory: out of memory");
    CHECK(message_of(cache.append(0, {zeros, {many / 2, 2, 8}, {0, 0, 1}}, {zeros, {many / 2, 3, 6}, {0, 0, 1}})) ==
          "out_of_memory: out of memory");
    CHECK(message_of(cache.reserve(many)) == "out_of_memory: out of memory");

    const auto keys_of = [&](std::size_t layer, std::size_t first, rvqkv::tensor_shape shape, std::size_t depths) {
        tensor out(dtype::float32, shape);
        const tensor untouched(dtype::float32, shape);
        std::string message = message_of(cache.reconstruct_keys(layer, first, out.view(), depths));
        CHECK((message == "ok" || out.is_part_of(untouched, 0)));
        return message;
    };
    constexpr std::size_t all = kv_cache::all_depths;
    CHECK(keys_of(0, 0, {5, 2, 8}, all) == "ok");
    CHECK(keys_of(0, 5, {0, 2, 8}, all) == "ok");
    CHECK(keys_of(0, 0, {5, 2, 8}, 2) == "ok");
    CHECK(keys_of(1, 0, {5, 2, 8}, all) == "invalid_argument: layer is 1, the cache has 1");
    CHECK(keys_of(0, 0, {6, 2, 8}, all) ==
          "invalid_argument: layer 0 keys: first_token is 0 and the output has 6 tokens, the layer holds 5");
    CHECK(keys_of(0, 6, {0, 2, 8}, all) ==
          "invalid_argument: layer 0 keys: first_token is 6 and the output has 0 tokens, the layer holds 5");
    CHECK(keys_of(0, std::numeric_limits<std::size_t>::max(), {2, 2, 8}, all).find("first_token is 1844") !=
          std::string::npos);
    CHECK(keys_of(0, 0, {5, 1, 8}, all) == "invalid_argument: layer 0 keys: heads is 1, must be 2");
    CHECK(keys_of(0, 0, {5, 2, 9}, all) ==
          "invalid_argument: layer 0 keys: channels is 9, must be the codec's head_dim 8");
    CHECK(keys_of(0, 0, {5, 2, 8}, 3) == "invalid_argument: layer 0 keys: depths is 3, the codec has 2");
    tensor out(dtype::float32, {5, 3, 6});
    CHECK(message_of(cache.reconstruct_values(0, 1, out.view())) ==
          "invalid_argument: layer 0 values: first_token is 1 and the output has 5 tokens, the layer holds 5");
    CHECK(snapshot(cache) == before);
}

TEST_CASE("kv_cache: NaN and infinity are reported, and harm no neighbour", "[cache][property]") {
    test::random_source random(16);
    CAPTURE(test::seed());
    const std::size_t tokens = 50;
    side keys(plain_codec(random, 256, {2, 37, 32}), 16, dtype::float32, tokens, random);  // blocks of 16 tokens
    side values(plain_codec(random, 8, {2, 5, 4}), 2, dtype::bfloat16, tokens, random);
    const kv_cache_config config = one_layer(keys.codec, 16, values.codec, 2, 7);
    kv_cache clean = make_cache(config);
    clean.append(0, keys.input.view(), values.input.view()).value();

    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const auto spoil = [&](float first, float second) {
        keys.input.set(37, 5, 9, first);
        keys.input.set(37, 5, 255, second);
        keys.input.set(44, 0, 0, second);
        values.input.set(3, 1, 2, first);
    };
    spoil(nan, -infinity);
    kv_cache cache = make_cache(config);
    rvqkv::kv_encode_report report;
    cache.append(0, keys.input.slice(0, 2), values.input.slice(0, 2), &report).value();
    CHECK(report.keys.nonfinite_rows == 0);
    CHECK(report.values.nonfinite_rows == 0);
    cache.append(0, keys.input.slice(2, tokens - 2), values.input.slice(2, tokens - 2), &report).value();
    CHECK(report.keys.nonfinite_values == 3);
    CHECK(report.keys.nonfinite_rows == 2);
    CHECK(report.keys.first_token == 35);
    CHECK(report.keys.first_head == 5);
    CHECK(report.values.nonfinite_values == 1);
    CHECK(report.values.nonfinite_rows == 1);
    CHECK(report.values.first_token == 1);
    CHECK(report.values.first_head == 1);

    const tensor with_nan = all_keys(cache, 0);
    const tensor without = all_keys(clean, 0);
    for (std::size_t token = 0; token < tokens; ++token) {
        for (std::size_t head = 0; head < 16; ++head) {
            if (!((token == 37 && head == 5) || (token == 44 && head == 0)) &&
                !with_nan.same_row(token, head, without, token)) {
                CAPTURE(token, head);
                CHECK(with_nan.same_row(token, head, without, token));
            }
        }
    }
    spoil(0.0F, 0.0F);
    kv_cache zeroed = make_cache(config);
    zeroed.append(0, keys.input.view(), values.input.view()).value();
    CHECK(same_pages(cache, zeroed, 0));

    // Reports add up, the first place stays.
    spoil(infinity, infinity);
    cache.append(0, keys.input.view(), values.input.view(), &report).value();
    CHECK(report.keys.nonfinite_values == 6);
    CHECK(report.keys.nonfinite_rows == 4);
    CHECK(report.keys.first_token == 35);
}

TEST_CASE("kv_cache: readers run side by side, also while another layer is written", "[cache][threads]") {
    test::random_source random(17);
    CAPTURE(test::seed());
    const std::size_t tokens = 60;
    const side keys(plain_codec(random, 16, {3, 37, 4}), 2, dtype::float32, tokens, random);
    const side values(plain_codec(random, 8, {2, 5, 4}), 1, dtype::float16, tokens, random);
    kv_cache cache = make_cache({{{{keys.codec, 2}, {values.codec, 1}}, {{keys.codec, 2}, {values.codec, 1}}}, 7});
    cache.append(0, keys.input.view(), values.input.view()).value();
    const tensor expected_keys = keys.expected(dtype::float32, 3);
    const tensor expected_values = values.expected(dtype::bfloat16, 1);

    std::array<int, 4> good = {};
    std::vector<std::thread> threads;
    for (std::size_t reader = 0; reader < good.size(); ++reader) {
        threads.emplace_back([&, reader] {
            rvqkv::kv_workspace workspace;
            for (std::size_t first = 0; first < 20; ++first) {
                tensor out_keys(dtype::float32, {tokens - first - reader, 2, 16});
                tensor out_values(dtype::bfloat16, {tokens - first, 1, 8});
                const bool read = cache.reconstruct_keys(0, first, out_keys.view(), workspace).ok() &&
                                  cache.reconstruct_values(0, first, out_values.view(), 1).ok();
                good[reader] +=
                    read && out_keys.is_part_of(expected_keys, first) && out_values.is_part_of(expected_values, first)
                        ? 1
                        : 0;
            }
        });
    }
    for (std::size_t first = 0; first < tokens; ++first) {
        cache.append(1, keys.input.slice(first, 1), values.input.slice(first, 1)).value();
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    CHECK(good == std::array<int, 4>{20, 20, 20, 20});
    CHECK(all_keys(cache, 1).is_part_of(expected_keys, 0));
}
