// SPDX-License-Identifier: MIT
/// @file
/// Writes a tiny Llama model with random weights, so that the program can be tried in seconds without a download:
/// make_model FILE SEED [nan|inf ...]
#include <ggml-cpu.h>
#include <ggml.h>
#include <gguf.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr std::int64_t width = 128;
constexpr std::int64_t inner = 128;
constexpr std::uint32_t heads = 4;
constexpr std::uint32_t kv_heads = 2;
constexpr std::int64_t head_dim = width / heads;
constexpr std::uint32_t layers = 2;

/// What GPT-2's tokenizer calls the byte: printable ones themselves, others letters from U+0100 on.
std::vector<std::string> byte_tokens() {
    std::vector<std::string> tokens;
    unsigned other = 0x100;
    for (unsigned byte = 0; byte < 256; ++byte) {
        const bool printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
        const unsigned code = printable ? byte : other++;
        tokens.push_back(code < 0x80 ? std::string(1, static_cast<char>(code))
                                     : std::string{static_cast<char>(0xc0 | (code >> 6U)),
                                                   static_cast<char>(0x80 | (code & 0x3fU))});
    }
    return tokens;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) {
        std::fputs("usage: make_model FILE SEED [nan]\n", stderr);
        return 2;
    }
    std::mt19937 random(static_cast<unsigned>(std::atoi(argv[2])));
    const bool is_broken = argc > 3 && std::strcmp(argv[3], "nan") == 0;
    ggml_context* const context = ggml_init({std::size_t{16} << 20U, nullptr, false});
    gguf_context* const file = gguf_init_empty();
    gguf_set_val_str(file, "general.architecture", "llama");
    gguf_set_val_str(file, "general.name", "tiny");
    gguf_set_val_u32(file, "llama.context_length", 2048);
    gguf_set_val_u32(file, "llama.embedding_length", width);
    gguf_set_val_u32(file, "llama.block_count", layers);
    gguf_set_val_u32(file, "llama.feed_forward_length", inner);
    gguf_set_val_u32(file, "llama.attention.head_count", heads);
    gguf_set_val_u32(file, "llama.attention.head_count_kv", kv_heads);
    gguf_set_val_u32(file, "llama.rope.dimension_count", head_dim);
    gguf_set_val_f32(file, "llama.attention.layer_norm_rms_epsilon", 1e-5F);
    const std::vector<std::string> tokens = byte_tokens();
    std::vector<const char*> names;
    for (const std::string& token : tokens) {
        names.push_back(token.c_str());
    }
    const std::vector<std::int32_t> types(tokens.size(), 1);  // ordinary
    const char* merges[] = {"h e"};                           // of which none is a token
    gguf_set_val_str(file, "tokenizer.ggml.model", "gpt2");
    gguf_set_val_str(file, "tokenizer.ggml.pre", "gpt-2");
    gguf_set_arr_str(file, "tokenizer.ggml.tokens", names.data(), names.size());
    gguf_set_arr_data(file, "tokenizer.ggml.token_type", GGUF_TYPE_INT32, types.data(), types.size());
    gguf_set_arr_str(file, "tokenizer.ggml.merges", merges, 1);

    const auto add = [&](const std::string& name, std::int64_t columns, std::int64_t rows, float deviation) {
        ggml_tensor* const tensor = rows == 0 ? ggml_new_tensor_1d(context, GGML_TYPE_F32, columns)
                                              : ggml_new_tensor_2d(context, GGML_TYPE_F32, columns, rows);
        ggml_set_name(tensor, name.c_str());
        std::normal_distribution<float> normal(rows == 0 ? 1.0F : 0.0F, deviation);
        float* const numbers = static_cast<float*>(tensor->data);
        for (std::int64_t i = 0; i < ggml_nelements(tensor); ++i) {
            numbers[i] = normal(random);
        }
        if (is_broken && name == "blk.1.attn_k.weight") {
            numbers[0] = std::numeric_limits<float>::quiet_NaN();
        }
        gguf_add_tensor(file, tensor);
    };
    const float usual = 1.0F / std::sqrt(static_cast<float>(width));
    add("token_embd.weight", width, static_cast<std::int64_t>(tokens.size()), 1.0F);
    add("output_norm.weight", width, 0, 0.1F);
    add("output.weight", width, static_cast<std::int64_t>(tokens.size()), usual);
    for (std::uint32_t layer = 0; layer < layers; ++layer) {
        const std::string block = "blk." + std::to_string(layer) + ".";
        add(block + "attn_norm.weight", width, 0, 0.1F);
        add(block + "attn_q.weight", width, width, usual);
        add(block + "attn_k.weight", width, head_dim * kv_heads, usual);
        add(block + "attn_v.weight", width, head_dim * kv_heads, usual);
        add(block + "attn_output.weight", width, width, usual);
        add(block + "ffn_norm.weight", width, 0, 0.1F);
        add(block + "ffn_gate.weight", width, inner, usual);
        add(block + "ffn_up.weight", width, inner, usual);
        add(block + "ffn_down.weight", inner, width, usual);
    }
    const bool is_written = gguf_write_to_file(file, argv[1], false);
    gguf_free(file);
    ggml_free(context);
    return is_written ? 0 : 1;
}
