// SPDX-License-Identifier: MIT
/// @file
/// The README's program: loads codecs from a file, compresses one layer's keys and values, reads them back.
#include <rvqkv/files.hpp>
#include <rvqkv/rvqkv.hpp>

#include <cstdio>
#include <vector>

int main(int argc, char** argv) {  // NOLINT(bugprone-exception-escape): what fails ends it, with a message
    const rvqkv::codec_set file = rvqkv::load_codecs(argc > 1 ? argv[1] : "model.codecs").value();
    const rvqkv::layer_codecs& codecs = file.layers.begin()->second;  // of the first layer
    const std::size_t tokens = 512, heads = 3, head_dim = codecs.key->head_dim();
    std::vector<float> keys(tokens * heads * head_dim, 1.0F), values = keys;  // the engine's; float16, bfloat16 do, too

    rvqkv::kv_cache_config config;
    config.layers = {{{codecs.key, heads}, {codecs.value, heads}}};
    rvqkv::kv_cache cache = rvqkv::kv_cache::create(config).value();
    rvqkv::kv_sequence chat = cache.new_sequence().value();
    rvqkv::kv_workspace workspace = cache.make_workspace().value();
    const rvqkv::tensor_shape shape{tokens, heads, head_dim};
    chat.append(0, {keys.data(), shape}, {values.data(), shape}, workspace).value();
    chat.reconstruct_keys(0, 100, {keys.data(), {50, heads, head_dim}}, workspace).value();  // tokens 100 to 149
    std::printf("%zu bytes, %zu in float16\n", chat.bytes().total(), 4 * keys.size());
}
