// SPDX-License-Identifier: MIT
/// @file
/// A forward pass of the Llama family in plain C++, which owes nothing to llama.cpp's: what another engine measures can
/// be checked against it. It goes layer by layer over a whole window, so that all products are of matrices.
#pragma once

#include <gguf.h>
#include <llama.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace llama_example {

/// Calls `task(i)` for every `i < tasks`, shared out over threads. Not the library's executor: matrix products are
/// compiled for this processor, and the library keeps code of different compiler options apart.
using plain_workers = std::function<void(std::size_t tasks, const std::function<void(std::size_t)>& task)>;

/// Sizes of a model, and how it turns keys and queries: channels `(2 i, 2 i + 1)`, all of them.
struct plain_shape {
    std::size_t layers = 0;
    std::size_t width = 0;
    std::size_t inner = 0;
    std::size_t heads = 0;
    std::size_t kv_heads = 0;
    std::size_t head_dim = 0;
    std::size_t vocabulary = 0;
    float epsilon = 0.0F;
    std::vector<double> frequencies;  ///< `[head_dim / 2]`, radians for each position.
};

/// A layer's queries `[token, head, channel]`, keys and values `[token, kv head, channel]` of a window, before rotary
/// embedding, and room for the output `[token, head, channel]`.
struct plain_rows {
    const float* queries = nullptr;
    const float* keys = nullptr;
    const float* values = nullptr;
    float* out = nullptr;
    std::size_t tokens = 0;
};

/// How a window's tokens attend to each other.
class plain_attention {
public:
    plain_attention() = default;
    plain_attention(const plain_attention&) = delete;
    plain_attention& operator=(const plain_attention&) = delete;
    virtual ~plain_attention() = default;
    /// Called for one layer after the other, from the first on for every window.
    virtual void attend(std::size_t layer, const plain_rows& rows) = 0;
};

/// Softmax of exact scores in float32.
class exact_attention : public plain_attention {
public:
    exact_attention(const plain_shape& shape, const plain_workers& workers) : shape_(&shape), workers_(&workers) {}
    void attend(std::size_t layer, const plain_rows& rows) override;

private:
    void turn(const float* from, std::size_t heads, std::size_t tokens, std::vector<float>& to) const;

    const plain_shape* shape_;
    const plain_workers* workers_;
    std::vector<float> queries_;
    std::vector<float> keys_;
};

/// A GGUF file with float32 weights.
class plain_model {
public:
    /// A window's number of tokens is made a multiple of this by tokens behind it, which nothing sees.
    static constexpr std::size_t padded_to = 64;

    /// Throws `std::runtime_error` for an architecture, a setting or a weight that is not known here, and for one that
    /// is missing or not float32.
    explicit plain_model(const std::string& path);

    [[nodiscard]] const plain_shape& shape() const noexcept { return shape_; }

    /// Called with the logits `[count, vocabulary]` of tokens `first` and on.
    using logits_callback = std::function<void(const float* logits, std::size_t first, std::size_t count)>;
    /// Reads a window.
    void read(const std::vector<llama_token>& tokens, plain_attention& attention, const logits_callback& on_logits,
              const plain_workers& workers) const;

private:
    struct deleter {
        void operator()(gguf_context* file) const noexcept { gguf_free(file); }
        void operator()(ggml_context* context) const noexcept { ggml_free(context); }
    };
    /// Matrices `[out, in]`, and norms.
    struct layer_weights {
        const float* attention_norm = nullptr;
        const float* query = nullptr;
        const float* key = nullptr;
        const float* value = nullptr;
        const float* output = nullptr;
        const float* inner_norm = nullptr;
        const float* gate = nullptr;
        const float* up = nullptr;
        const float* down = nullptr;
    };

    void read_shape();
    [[nodiscard]] double number(const std::string& key, double otherwise) const;
    [[nodiscard]] std::size_t count(const std::string& key, std::size_t otherwise = 0) const;
    [[nodiscard]] const float* weights(const std::string& name, std::size_t columns, std::size_t rows = 1);

    std::string path_;
    std::unique_ptr<gguf_context, deleter> file_;
    std::unique_ptr<ggml_context, deleter> tensors_;
    std::size_t used_ = 0;  ///< Tensors of the file.
    plain_shape shape_;
    const float* embeddings_ = nullptr;
    const float* output_norm_ = nullptr;
    const float* output_ = nullptr;
    std::vector<layer_weights> layers_;
};

}  // namespace llama_example
