// SPDX-License-Identifier: MIT
/// @file
/// The cache in an engine's loop, with the attention shape of Llama-3-8B and random numbers for a model: a prompt at
/// once, then token by token, each step attending on the codes; a fork, a rejected draft, a context that is full and
/// shifts, a conversation that is saved, and restored where it was. After the set-up nothing is allocated but for the
/// fork and the file.
#include <rvqkv/files.hpp>
#include <rvqkv/rvqkv.hpp>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <memory>
#include <random>
#include <span>
#include <utility>
#include <vector>

namespace {

constexpr std::size_t layers = 2;  // of 32
constexpr std::size_t query_heads = 32;
constexpr std::size_t heads = 8;
constexpr std::size_t head_dim = 128;
constexpr std::size_t prompt = 1000;
constexpr std::size_t steps = 64;
constexpr std::size_t draft = 4;
constexpr std::size_t context = 1040;  // tokens that the model takes

/// Stands in for `load_codecs`: codewords at random, not learned, so errors are large.
std::shared_ptr<const rvqkv::codec> random_codec(rvqkv::grouping_kind grouping, std::mt19937& random) {
    rvqkv::codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = {3, 128, 8};
    spec.grouping = grouping;
    std::normal_distribution<float> normal(0.0F, 0.5F);
    std::vector<float> weights(spec.shape.size());
    for (float& weight : weights) {
        weight = normal(random);
    }
    return rvqkv::make_codec(spec, std::span<const float>(weights)).value();
}

/// The model: random projections, and sums in place of everything behind attention.
class model {
public:
    explicit model(rvqkv::kv_workspace workspace, rvqkv::attention_workspace attention)
        : workspace_(std::move(workspace)),
          attention_(std::move(attention)),
          keys_(prompt * heads * head_dim),
          values_(prompt * heads * head_dim),
          queries_(draft * query_heads * head_dim),
          out_(queries_.size()) {}

    /// Takes tokens into the cache without asking for their outputs, as a prompt's but for the last.
    void read(rvqkv::kv_sequence& chat, std::size_t tokens) {
        for (std::size_t layer = 0; layer < layers; ++layer) {
            append(chat, layer, tokens);
        }
    }
    /// Takes up to `draft` tokens and lets each attend to itself and all before.
    double step(rvqkv::kv_sequence& chat, std::size_t tokens) {
        for (std::size_t layer = 0; layer < layers; ++layer) {
            append(chat, layer, tokens);
            project(queries_.data(), tokens * query_heads * head_dim);
            const rvqkv::tensor_shape shape{tokens, query_heads, head_dim};
            chat.attend(layer, {queries_.data(), shape}, {out_.data(), shape}, attention_).value();
            sum_ += static_cast<double>(rvqkv::to_float(out_[0]));
        }
        return sum_;
    }
    /// Whether the last token attends to two sequences with the same result, in all layers.
    bool attends_alike(const rvqkv::kv_sequence& one, const rvqkv::kv_sequence& other) {
        bool is_same = true;
        const rvqkv::tensor_shape shape{1, query_heads, head_dim};
        std::vector<rvqkv::bfloat16> out(query_heads * head_dim);
        for (std::size_t layer = 0; layer < layers; ++layer) {
            project(queries_.data(), out.size());
            one.attend(layer, {queries_.data(), shape}, {out_.data(), shape}, attention_).value();
            other.attend(layer, {queries_.data(), shape}, {out.data(), shape}, attention_).value();
            is_same = is_same && std::memcmp(out.data(), out_.data(), out.size() * sizeof out[0]) == 0;
        }
        return is_same;
    }

private:
    void append(rvqkv::kv_sequence& chat, std::size_t layer, std::size_t tokens) {
        project(keys_.data(), tokens * heads * head_dim);
        project(values_.data(), tokens * heads * head_dim);
        const rvqkv::tensor_shape shape{tokens, heads, head_dim};
        chat.append(layer, {keys_.data(), shape}, {values_.data(), shape}, workspace_).value();
    }
    void project(rvqkv::bfloat16* out, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i) {
            out[i] = rvqkv::to_bfloat16(normal_(random_));
        }
    }

    rvqkv::kv_workspace workspace_;
    rvqkv::attention_workspace attention_;
    std::vector<rvqkv::bfloat16> keys_;
    std::vector<rvqkv::bfloat16> values_;
    std::vector<rvqkv::bfloat16> queries_;
    std::vector<rvqkv::bfloat16> out_;
    std::mt19937 random_{2};
    std::normal_distribution<float> normal_;
    double sum_ = 0.0;
};

}  // namespace

int main() try {
    std::mt19937 random(1);
    rvqkv::kv_cache_config config;
    for (std::size_t layer = 0; layer < layers; ++layer) {
        rvqkv::kv_layer_config each;
        each.keys = {random_codec(rvqkv::grouping_kind::strided, random), heads};
        each.values = {random_codec(rvqkv::grouping_kind::contiguous, random), heads};
        each.query_heads = query_heads;
        each.coding = rvqkv::key_coding::after_rope;
        each.rope.base = 500000.0;
        config.layers.push_back(each);
    }
    rvqkv::kv_cache cache = rvqkv::kv_cache::create(config).value();
    model llama(cache.make_workspace().value(), cache.make_attention_workspace(draft).value());
    rvqkv::kv_sequence chat = cache.new_sequence().value();
    chat.reserve(context + draft).value();

    llama.read(chat, prompt - 1);
    double sum = llama.step(chat, 1);
    std::printf("prompt: %zu tokens\n", chat.tokens(0));

    rvqkv::kv_sequence other = chat.fork().value();  // another answer to the same prompt, sharing its pages
    sum += llama.step(other, 1);
    std::printf("fork: %zu tokens, and %zu of the first\n", other.tokens(0), chat.tokens(0));

    for (std::size_t step = 0; step < steps; ++step) {
        if (chat.tokens(0) == context) {
            // Full: the oldest but for the sinks make room, and what is left moves up.
            chat.evict(config.sink_tokens, config.sink_tokens + context / 4).value();
            std::printf("shift: %zu tokens are left, the next is at position %lld\n", chat.tokens(0),
                        static_cast<long long>(chat.next_position(0)));
        }
        sum += llama.step(chat, 1);
        if (step % 16 == 15) {  // a draft goes in at once, is rejected but for its first token, and is taken back
            const std::size_t kept = chat.tokens(0) + 1;
            sum += llama.step(chat, draft);
            chat.truncate(kept).value();
        }
    }

    // The conversation rests in a file, to which a later save adds what is new, and goes on from there.
    const std::filesystem::path file = "engine_loop.sequence";
    rvqkv::save_sequence(chat, file).value();
    sum += llama.step(chat, 1);
    rvqkv::save_sequence(chat, file, {.incremental = true}).value();
    rvqkv::kv_sequence restored = rvqkv::load_sequence(cache, file).value();
    const bool is_same = llama.attends_alike(chat, restored);
    std::printf("restored: %zu tokens from %zu bytes, attention %s\n", restored.tokens(0),
                static_cast<std::size_t>(std::filesystem::file_size(file)), is_same ? "the same" : "differs");
    std::filesystem::remove(file);
    sum += llama.step(restored, 1);

    const rvqkv::kv_sequence_bytes bytes = chat.bytes();
    const std::size_t exact = layers * chat.tokens(0) * 2 * heads * head_dim * sizeof(rvqkv::bfloat16);
    std::printf("%zu tokens: %zu bytes of codes and scales, %zu of exact tokens, %zu as bfloat16\n", chat.tokens(0),
                bytes.codes + bytes.scales, bytes.exact, exact);
    return std::isfinite(sum) && is_same ? 0 : 1;
} catch (const std::exception& failure) {
    std::fprintf(stderr, "engine_loop: %s\n", failure.what());
    return 1;
}
