// SPDX-License-Identifier: MIT
/// @file
/// Where keys and values leave and enter the model: llama.cpp's evaluation callback, which sees every node of the graph
/// when it has been computed and may change what it holds.
#pragma once

#include <rvqkv/attend/rope.hpp>
#include <rvqkv/core/tensor_view.hpp>

#include <ggml.h>

#include <cstddef>
#include <exception>
#include <string>
#include <vector>

namespace llama_example {

class loaded_model;

/// What is known of a layer's attention.
struct attention_layer {
    std::string key_name;  ///< The node that holds keys before rotary embedding: its name and operation.
    ggml_op key_op = GGML_OP_NONE;
    std::string value_name;
    ggml_op value_op = GGML_OP_NONE;
    rvqkv::tensor_shape keys;  ///< Heads and channels of a token.
    rvqkv::tensor_shape values;
    rvqkv::rope_config rope;         ///< As the graph has it, frequencies measured.
    bool turns = false;              ///< Whether it has rotary embedding at all.
    std::size_t sliding_window = 0;  ///< Tokens that a query sees, its own included; 0: all.
};

/// The attention of every layer.
using model_attention = std::vector<attention_layer>;

/// Finds keys and values in the model's graph, by evaluating it for one token.
/// Throws `std::runtime_error` naming what is missing.
[[nodiscard]] model_attention find_attention(const loaded_model& model, int threads);

/// Base of what looks at a model from within. Whatever an override throws ends the evaluation, and is thrown again by
/// the decoder.
class kv_tap {
public:
    explicit kv_tap(const model_attention& attention) : attention_(&attention) {}
    kv_tap(const kv_tap&) = delete;
    kv_tap& operator=(const kv_tap&) = delete;
    virtual ~kv_tap() = default;

    /// For llama.cpp.
    static bool callback(ggml_tensor* node, bool ask, void* self);
    /// Position of the first token of the batch that comes.
    void begin(std::size_t first_position) noexcept { first_position_ = first_position; }
    void rethrow();

    /// Seconds spent in overrides.
    [[nodiscard]] double seconds() const noexcept { return seconds_; }

protected:
    /// Whether anything is wanted at all.
    [[nodiscard]] virtual bool is_active() const noexcept { return true; }
    /// Keys before rotary embedding, and values, `[token, head, channel]` in place: what is written is what the model
    /// goes on with.
    virtual void on_keys(std::size_t layer, const rvqkv::mutable_tensor_view& keys) = 0;
    virtual void on_values(std::size_t layer, const rvqkv::mutable_tensor_view& values) = 0;
    /// Whether scores and outputs are wanted, too (of a context without flash attention).
    [[nodiscard]] virtual bool wants_scores() const noexcept { return false; }
    /// `scores` `[head, query, cell]` = `cells` times queries, before mask and softmax.
    virtual void on_scores(std::size_t /*layer*/, ggml_tensor* /*scores*/) {}
    /// `out` `[head, query, channel]` = probabilities times values.
    virtual void on_outputs(std::size_t /*layer*/, ggml_tensor* /*out*/) {}

    [[nodiscard]] const model_attention& attention() const noexcept { return *attention_; }
    [[nodiscard]] std::size_t first_position() const noexcept { return first_position_; }

private:
    [[nodiscard]] bool wants(const ggml_tensor& node) const;
    void visit(ggml_tensor& node);

    const model_attention* attention_;
    std::size_t first_position_ = 0;
    double seconds_ = 0.0;
    std::exception_ptr failure_;
};

}  // namespace llama_example
