// SPDX-License-Identifier: MIT
#include "engine.hpp"

#include "tap.hpp"

#include <gguf.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace llama_example {
namespace {

std::string& complaint() {
    static std::string text;
    return text;
}

void keep_complaint(ggml_log_level level, const char* text, void* /*unused*/) {
    if (level == GGML_LOG_LEVEL_ERROR && text != nullptr) {
        complaint() = text;
        while (!complaint().empty() && complaint().back() == '\n') {
            complaint().pop_back();
        }
    }
}

bool ends_with(const std::string& text, const char* end) {
    const std::size_t size = std::strlen(end);
    return text.size() >= size && text.compare(text.size() - size, size, end) == 0;
}

void replace_all(std::string& text, const std::string& from, const std::string& to) {
    std::string out;
    out.reserve(text.size());
    std::size_t at = 0;
    for (std::size_t found = text.find(from); found != std::string::npos; found = text.find(from, at)) {
        out.append(text, at, found - at);
        out += to;
        at = found + from.size();
    }
    out.append(text, at, std::string::npos);
    text = std::move(out);
}

/// "1 @,@ 000 ( 24 in ) , and" as it was: "1,000 (24 in), and".
void undo_wikitext(std::string& text) {
    for (const char* sign : {"-", ",", "."}) {
        replace_all(text, std::string(" @") + sign + "@ ", sign);
    }
    for (const char* sign : {".", ",", ";", ":", "!", "?", ")", "]"}) {
        replace_all(text, std::string(" ") + sign, sign);
    }
    replace_all(text, "( ", "(");
    replace_all(text, "[ ", "[");
    replace_all(text, " 's", "'s");
}

class gguf_file {
public:
    explicit gguf_file(const std::string& path) : path_(path), file_(path, std::ios::binary) {
        if (!file_) {
            throw std::runtime_error(path + ": cannot be read; give a GGUF model");
        }
        context_ = gguf_init_from_file(path.c_str(), {true, nullptr});
        if (context_ == nullptr) {
            throw std::runtime_error(path + ": is no GGUF model, or is damaged" + last_complaint());
        }
    }
    gguf_file(const gguf_file&) = delete;
    gguf_file& operator=(const gguf_file&) = delete;
    ~gguf_file() { gguf_free(context_); }

    [[nodiscard]] std::string text(const std::string& key) const {
        const std::int64_t id = gguf_find_key(context_, key.c_str());
        return id < 0 || gguf_get_kv_type(context_, id) != GGUF_TYPE_STRING ? "" : gguf_get_val_str(context_, id);
    }
    /// A number, or numbers, as bytes.
    [[nodiscard]] std::string bytes(const std::string& key) const {
        const std::int64_t id = gguf_find_key(context_, key.c_str());
        if (id < 0) {
            return "-";
        }
        const gguf_type type = gguf_get_kv_type(context_, id);
        if (type == GGUF_TYPE_UINT32 || type == GGUF_TYPE_INT32 || type == GGUF_TYPE_FLOAT32) {
            return std::string(static_cast<const char*>(gguf_get_val_data(context_, id)), 4);
        }
        if (type == GGUF_TYPE_ARRAY && gguf_get_arr_type(context_, id) != GGUF_TYPE_STRING) {
            return std::string(static_cast<const char*>(gguf_get_arr_data(context_, id)),
                               4 * gguf_get_arr_n(context_, id));
        }
        return "?";
    }
    /// All norms, by name.
    [[nodiscard]] std::map<std::string, std::string> norms() {
        std::map<std::string, std::string> found;
        for (std::int64_t id = 0; id < gguf_get_n_tensors(context_); ++id) {
            const std::string name = gguf_get_tensor_name(context_, id);
            if (ends_with(name, "norm.weight") && gguf_get_tensor_type(context_, id) == GGML_TYPE_F32) {
                std::string data(gguf_get_tensor_size(context_, id), '\0');
                file_.seekg(
                    static_cast<std::streamoff>(gguf_get_data_offset(context_) + gguf_get_tensor_offset(context_, id)));
                if (!file_.read(data.data(), static_cast<std::streamsize>(data.size()))) {
                    throw std::runtime_error(path_ + ": ends within tensor " + name + ": download it again");
                }
                found.emplace(name, std::move(data));
            }
        }
        return found;
    }

private:
    std::string path_;
    std::ifstream file_;
    gguf_context* context_;
};

std::string metadata(llama_model* model, const char* key) {
    char text[256];
    return llama_model_meta_val_str(model, key, text, sizeof text) < 0 ? "" : text;
}

}  // namespace

void start_engine() {
    llama_log_set(keep_complaint, nullptr);
    llama_backend_init();
}

std::string last_complaint() {
    return complaint().empty() ? "" : " (llama.cpp: " + complaint() + ")";
}

std::string hash_of(std::span<const std::byte> bytes) {
    char text[17];
    std::snprintf(text, sizeof text, "%016llx",
                  static_cast<unsigned long long>(XXH3_64bits(bytes.data(), bytes.size())));
    return text;
}

std::string fingerprint_of(const std::string& path) {
    gguf_file file(path);
    const std::string architecture = file.text("general.architecture");
    std::string all = architecture;
    for (const char* key :
         {"block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length",
          "attention.value_length", "rope.freq_base", "rope.dimension_count"}) {
        all += '\n';
        all += file.bytes(architecture + "." + key);
    }
    for (const auto& [name, data] : file.norms()) {
        all.append(1, '\n').append(name).append(1, '\n').append(data);
    }
    return hash_of(std::as_bytes(std::span(all)));
}

std::string expanded_to_float32(const std::string& path, const std::string& folder, int threads) {
    const std::filesystem::path target =
        std::filesystem::path(folder) /
        ("float32-" + fingerprint_of(path) + "-" + std::to_string(std::filesystem::file_size(path)) + ".gguf");
    if (std::filesystem::exists(target)) {
        return target.string();
    }
    std::filesystem::create_directories(folder);
    const std::filesystem::path part = target.string() + ".part";
    llama_model_quantize_params options = llama_model_quantize_default_params();
    options.nthread = threads;
    options.ftype = LLAMA_FTYPE_ALL_F32;
    options.allow_requantize = true;
    if (llama_model_quantize(path.c_str(), part.c_str(), &options) != 0) {
        std::error_code ignored;
        std::filesystem::remove(part, ignored);
        throw std::runtime_error(path + ": cannot be expanded to float32 in " + folder + last_complaint());
    }
    std::filesystem::rename(part, target);
    return target.string();
}

// ---- The model ----

loaded_model::loaded_model(const std::string& path) : path_(path) {
    llama_model_params options = llama_model_default_params();
    options.n_gpu_layers = 0;
    model_.reset(llama_model_load_from_file(path.c_str(), options));
    if (!model_) {
        throw std::runtime_error(path + ": cannot be loaded; give a GGUF model that this llama.cpp knows" +
                                 last_complaint());
    }
    if (llama_model_has_encoder(get()) || llama_model_is_recurrent(get()) || llama_model_is_hybrid(get())) {
        throw std::runtime_error(path + ": architecture '" + architecture() +
                                 "' is no plain decoder: give a model of the Llama, Qwen or Gemma families");
    }
}

std::string loaded_model::architecture() const {
    return metadata(get(), "general.architecture");
}
std::string loaded_model::name() const {
    return metadata(get(), "general.name");
}
std::size_t loaded_model::layers() const {
    return static_cast<std::size_t>(llama_model_n_layer(get()));
}
std::size_t loaded_model::vocabulary() const {
    return static_cast<std::size_t>(llama_vocab_n_tokens(llama_model_get_vocab(get())));
}

std::vector<llama_token> loaded_model::tokenize(const std::string& text) const {
    const llama_vocab* const vocab = llama_model_get_vocab(get());
    std::vector<llama_token> tokens(text.size() + 8);
    const std::int32_t count = llama_tokenize(vocab, text.data(), static_cast<std::int32_t>(text.size()), tokens.data(),
                                              static_cast<std::int32_t>(tokens.size()), false, false);
    if (count < 0) {
        throw std::runtime_error(path_ + ": the text cannot be turned into tokens" + last_complaint());
    }
    tokens.resize(static_cast<std::size_t>(count));
    return tokens;
}

std::string loaded_model::piece(llama_token token) const {
    char text[256];
    const std::int32_t size = llama_token_to_piece(llama_model_get_vocab(get()), token, text, sizeof text, 0, false);
    return size < 0 ? "" : std::string(text, static_cast<std::size_t>(size));
}

std::vector<llama_token> loaded_model::prefix() const {
    const llama_vocab* const vocab = llama_model_get_vocab(get());
    return llama_vocab_get_add_bos(vocab) ? std::vector<llama_token>{llama_vocab_bos(vocab)}
                                          : std::vector<llama_token>{};
}

// ---- Text ----

std::string read_text(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw std::runtime_error(path + ": cannot be read; give a file of text");
    }
    std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (text.find(" @-@ ") != std::string::npos || text.find(" @,@ ") != std::string::npos) {
        undo_wikitext(text);
    }
    if (text.empty()) {
        throw std::runtime_error(path + ": is empty");
    }
    return text;
}

// ---- Contexts ----

decoder::decoder(const loaded_model& model, const cache_format& format, std::size_t tokens, int threads, kv_tap* tap)
    : model_(&model), tap_(tap) {
    llama_context_params options = llama_context_default_params();
    options.n_ctx = static_cast<std::uint32_t>((tokens + 255) / 256 * 256);
    options.n_batch = chunk_tokens;
    options.n_ubatch = chunk_tokens;
    options.n_threads = threads;
    options.n_threads_batch = threads;
    options.type_k = format.type;
    options.type_v = format.type;
    options.flash_attn_type = format.flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    options.swa_full = format.holds_all;
    options.no_perf = true;
    if (tap != nullptr) {
        options.cb_eval = &kv_tap::callback;
        options.cb_eval_user_data = tap;
    }
    if (format.rotated) {
        ::unsetenv("LLAMA_ATTN_ROT_DISABLE");
    } else {
        ::setenv("LLAMA_ATTN_ROT_DISABLE", "1", 1);  // read when a context is made, and nowhere else to be said
    }
    context_.reset(llama_init_from_model(model.get(), options));
    ::unsetenv("LLAMA_ATTN_ROT_DISABLE");
    if (!context_) {
        throw std::runtime_error(model.path() + ": no context of " + std::to_string(tokens) +
                                 " tokens with a cache of " + ggml_type_name(format.type) + last_complaint());
    }
}

void decoder::read(const std::vector<llama_token>& tokens, const logits_callback& on_logits) {
    llama_memory_clear(llama_get_memory(get()), false);
    read_on(tokens, 0, on_logits);
}

void decoder::read_on(const std::vector<llama_token>& tokens, std::size_t first_position,
                      const logits_callback& on_logits) {
    llama_batch batch = llama_batch_init(static_cast<std::int32_t>(chunk_tokens), 0, 1);
    const std::unique_ptr<llama_batch, void (*)(llama_batch*)> guard(
        &batch, [](llama_batch* held) { llama_batch_free(*held); });
    for (std::size_t first = 0; first < tokens.size(); first += chunk_tokens) {
        const std::size_t count = std::min(chunk_tokens, tokens.size() - first);
        batch.n_tokens = static_cast<std::int32_t>(count);
        for (std::size_t i = 0; i < count; ++i) {
            batch.token[i] = tokens[first + i];
            batch.pos[i] = static_cast<llama_pos>(first_position + first + i);
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = static_cast<std::int8_t>(on_logits || first + i + 1 == tokens.size());
        }
        if (tap_ != nullptr) {
            tap_->begin(first_position + first);
        }
        const std::int32_t failed = llama_decode(get(), batch);
        if (tap_ != nullptr) {
            tap_->rethrow();
        }
        if (failed != 0) {
            throw std::runtime_error(model_->path() + ": llama_decode failed with " + std::to_string(failed) +
                                     last_complaint());
        }
        if (on_logits) {
            on_logits(llama_get_logits(get()), first, count);
        }
    }
}

}  // namespace llama_example
