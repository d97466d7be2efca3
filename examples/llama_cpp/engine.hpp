// SPDX-License-Identifier: MIT
/// @file
/// llama.cpp behind types that clean up and throw: a model, a context that reads windows of tokens, text as tokens.
#pragma once

#include <ggml-backend.h>
#include <ggml.h>
#include <llama.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace llama_example {

class kv_tap;

/// Starts llama.cpp, once, and keeps its chatter for error messages.
void start_engine();
/// What llama.cpp last complained about, in brackets, or nothing.
[[nodiscard]] std::string last_complaint();

/// A hash in 16 hexadecimal digits (XXH3).
[[nodiscard]] std::string hash_of(std::span<const std::byte> bytes);

/// What names a model whatever its quantization: a hash of its architecture, its sizes, and those of its weights that
/// every quantization leaves in float32 (the norms).
/// Throws `std::runtime_error` for a file that is no GGUF model.
[[nodiscard]] std::string fingerprint_of(const std::string& path);

/// The same model with all weights in float32, as a file in `folder`; made if it is not there. The quantized file's own
/// arithmetic would put a floor under every divergence.
[[nodiscard]] std::string expanded_to_float32(const std::string& path, const std::string& folder, int threads);

/// Throws `std::runtime_error` if the file cannot be loaded.
class loaded_model {
public:
    explicit loaded_model(const std::string& path);
    [[nodiscard]] llama_model* get() const noexcept { return model_.get(); }
    [[nodiscard]] const std::string& path() const noexcept { return path_; }
    [[nodiscard]] std::string architecture() const;
    [[nodiscard]] std::string name() const;
    [[nodiscard]] std::size_t layers() const;
    [[nodiscard]] std::size_t vocabulary() const;
    /// The text's tokens, without any that the text does not have.
    [[nodiscard]] std::vector<llama_token> tokenize(const std::string& text) const;
    /// Text of a token.
    [[nodiscard]] std::string piece(llama_token token) const;
    /// Tokens that every window begins with: the model's begin-of-text token, if it wants one.
    [[nodiscard]] std::vector<llama_token> prefix() const;

private:
    struct deleter {
        void operator()(llama_model* model) const noexcept { llama_model_free(model); }
    };
    std::string path_;
    std::unique_ptr<llama_model, deleter> model_;
};

/// Reads a file of text; undoes WikiText's spacing ("1 @,@ 000 ( see below )") if it has it.
/// Throws `std::runtime_error` for a file that cannot be read or is empty.
[[nodiscard]] std::string read_text(const std::string& path);

/// How a context holds keys and values.
struct cache_format {
    ggml_type type = GGML_TYPE_F32;
    bool flash_attention = false;
    bool rotated = true;  ///< Whether llama.cpp may rotate heads before it quantizes them.
    /// Whether layers with a sliding window hold every token, so that cells are positions.
    bool holds_all = true;
};

/// Tokens that are read at a time.
inline constexpr std::size_t chunk_tokens = 256;

/// A context, its tokens forgotten at the start of every window.
class decoder {
public:
    /// `tap` sees and may change keys and values on their way, and outlives the decoder; or null.
    decoder(const loaded_model& model, const cache_format& format, std::size_t tokens, int threads, kv_tap* tap);

    /// Called with the logits `[count, vocabulary]` of tokens `first` and on.
    using logits_callback = std::function<void(const float* logits, std::size_t first, std::size_t count)>;
    /// Reads tokens from an empty cache. Without a callback no logits are made. Throws what the tap throws, and
    /// `std::runtime_error` when llama.cpp fails.
    void read(const std::vector<llama_token>& tokens, const logits_callback& on_logits = {});
    /// Reads more tokens behind those that are there; logits of the last one are kept.
    void read_on(const std::vector<llama_token>& tokens, std::size_t first_position,
                 const logits_callback& on_logits = {});
    [[nodiscard]] llama_context* get() const noexcept { return context_.get(); }

private:
    struct deleter {
        void operator()(llama_context* context) const noexcept { llama_free(context); }
    };
    const loaded_model* model_;
    kv_tap* tap_;
    std::unique_ptr<llama_context, deleter> context_;
};

}  // namespace llama_example
