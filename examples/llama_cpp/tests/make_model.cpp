// SPDX-License-Identifier: MIT
/// @file
/// Writes a tiny model with random weights, so that the program can be tried in seconds without a download:
/// make_model FILE SEED [KIND], where KIND is one of
///  - llama: the default; fused: with one matrix for queries, keys and values; scaled: with Llama 3's frequency
///  factors;
///  - qwen2: with biases; qwen3: with norms of queries and keys;
///  - gemma3: with these and sliding windows in all layers but the last;
///  - plm: with keys and values made of one short vector, which its graph gives other names;
///  - nan: a llama with a weight that is no number; unheard: of an architecture that nobody knows.
#include <ggml-cpu.h>
#include <ggml.h>
#include <gguf.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
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
constexpr std::int64_t latent = 32;  // of plm

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
        std::fputs("usage: make_model FILE SEED [KIND]\n", stderr);
        return 2;
    }
    std::mt19937 random(static_cast<unsigned>(std::atoi(argv[2])));
    const std::string kind = argc > 3 ? argv[3] : "llama";
    const bool is_qwen2 = kind == "qwen2";
    const bool is_gemma = kind == "gemma3";
    const bool is_plm = kind == "plm";
    const bool has_head_norms = kind == "qwen3" || is_gemma;
    const bool is_family = is_qwen2 || is_plm || has_head_norms;
    const std::string architecture = is_family ? kind : kind == "unheard" ? "unheard-of" : "llama";
    const std::uint32_t layers = is_gemma ? 6 : 2;
    ggml_context* const context = ggml_init({std::size_t{16} << 20U, nullptr, false});
    gguf_context* const file = gguf_init_empty();
    gguf_set_val_str(file, "general.architecture", architecture.c_str());
    gguf_set_val_str(file, "general.name", "tiny");
    gguf_set_val_u32(file, (architecture + ".context_length").c_str(), 2048);
    gguf_set_val_u32(file, (architecture + ".embedding_length").c_str(), width);
    gguf_set_val_u32(file, (architecture + ".block_count").c_str(), layers);
    gguf_set_val_u32(file, (architecture + ".feed_forward_length").c_str(), inner);
    gguf_set_val_u32(file, (architecture + ".attention.head_count").c_str(), heads);
    gguf_set_val_u32(file, (architecture + ".attention.head_count_kv").c_str(), is_plm ? heads : kv_heads);
    gguf_set_val_u32(file, (architecture + ".rope.dimension_count").c_str(), is_plm ? head_dim / 2 : head_dim);
    gguf_set_val_f32(file, (architecture + ".attention.layer_norm_rms_epsilon").c_str(), 1e-5F);
    gguf_set_val_u32(file, (architecture + ".attention.key_length").c_str(), head_dim);
    gguf_set_val_u32(file, (architecture + ".attention.value_length").c_str(), head_dim);
    if (is_plm) {
        gguf_set_val_u32(file, "plm.attention.kv_lora_rank", latent);
    }
    if (is_gemma) {
        gguf_set_val_u32(file, "gemma3.attention.sliding_window", 48);
        gguf_set_val_f32(file, "gemma3.rope.freq_base", 1000000.0F);
    }
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
        if (kind == "nan" && name == "blk.1.attn_k.weight") {
            numbers[0] = std::numeric_limits<float>::quiet_NaN();
        }
        gguf_add_tensor(file, tensor);
    };
    const float usual = 1.0F / std::sqrt(static_cast<float>(width));
    add("token_embd.weight", width, static_cast<std::int64_t>(tokens.size()), 1.0F);
    add("output_norm.weight", width, 0, 0.1F);
    if (kind == "scaled") {
        add("rope_freqs.weight", head_dim / 2, 0, 0.2F);
    }
    if (!is_plm) {
        add("output.weight", width, static_cast<std::int64_t>(tokens.size()), usual);
    }
    for (std::uint32_t layer = 0; layer < layers; ++layer) {
        const std::string block = "blk." + std::to_string(layer) + ".";
        add(block + "attn_norm.weight", width, 0, 0.1F);
        if (kind == "fused") {
            add(block + "attn_qkv.weight", width, width + 2 * head_dim * kv_heads, usual);
        } else if (is_plm) {
            add(block + "attn_q.weight", width, width, usual);
            add(block + "attn_kv_a_mqa.weight", width, latent + head_dim / 2, usual);
            add(block + "attn_kv_a_norm.weight", latent, 0, 0.1F);
            add(block + "attn_kv_b.weight", latent, heads * (head_dim / 2 + head_dim), usual);
        } else {
            add(block + "attn_q.weight", width, width, usual);
            add(block + "attn_k.weight", width, head_dim * kv_heads, usual);
            add(block + "attn_v.weight", width, head_dim * kv_heads, usual);
        }
        if (is_qwen2) {
            add(block + "attn_q.bias", width, 0, 1.0F);
            add(block + "attn_k.bias", head_dim * kv_heads, 0, 1.0F);
            add(block + "attn_v.bias", head_dim * kv_heads, 0, 1.0F);
        }
        if (has_head_norms) {
            add(block + "attn_q_norm.weight", head_dim, 0, 0.1F);
            add(block + "attn_k_norm.weight", head_dim, 0, 0.1F);
        }
        if (is_gemma) {
            add(block + "post_attention_norm.weight", width, 0, 0.1F);
            add(block + "post_ffw_norm.weight", width, 0, 0.1F);
        }
        add(block + "attn_output.weight", width, width, usual);
        add(block + "ffn_norm.weight", width, 0, 0.1F);
        if (!is_plm) {
            add(block + "ffn_gate.weight", width, inner, usual);
        }
        add(block + "ffn_up.weight", width, inner, usual);
        add(block + "ffn_down.weight", inner, width, usual);
    }
    const bool is_written = gguf_write_to_file(file, argv[1], false);
    gguf_free(file);
    ggml_free(context);
    return is_written ? 0 : 1;
}
