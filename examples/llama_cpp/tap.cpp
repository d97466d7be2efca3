// SPDX-License-Identifier: MIT
#include "tap.hpp"

#include "engine.hpp"

#include <ggml-cpu.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string_view>

namespace llama_example {
namespace {

/// The layer of "Kcur-12" for `prefix` "Kcur-"; false for other names.
bool parse_layer(const char* name, std::string_view prefix, std::size_t& layer) {
    const std::string_view text(name);
    if (text.substr(0, prefix.size()) != prefix) {
        return false;
    }
    const auto [end, failed] = std::from_chars(text.data() + prefix.size(), text.data() + text.size(), layer);
    return failed == std::errc() && end == text.data() + text.size();
}

/// The layer that a name of any kind ends with.
bool parse_layer(const char* name, std::size_t& layer) {
    const char* const dash = std::strrchr(name, '-');
    return dash != nullptr && parse_layer(dash, "-", layer);
}

/// `[channels, heads, tokens]` of float32 in memory of ours as a view.
rvqkv::mutable_tensor_view view_of(const ggml_tensor& node, const std::string& what) {
    ggml_backend_buffer* const buffer = node.view_src != nullptr ? node.view_src->buffer : node.buffer;
    if (node.type != GGML_TYPE_F32 || node.ne[3] != 1 || node.nb[0] != sizeof(float) || node.data == nullptr ||
        (buffer != nullptr && !ggml_backend_buffer_is_host(buffer))) {
        throw std::runtime_error(what + " (" + node.name + ") are " + ggml_type_name(node.type) +
                                 " in a layout that cannot be read: want float32 in main memory, one sequence");
    }
    const auto elements = [](std::size_t bytes) { return static_cast<std::ptrdiff_t>(bytes / sizeof(float)); };
    return {static_cast<float*>(node.data),
            {static_cast<std::size_t>(node.ne[2]), static_cast<std::size_t>(node.ne[1]),
             static_cast<std::size_t>(node.ne[0])},
            {elements(node.nb[2]), elements(node.nb[1]), 1}};
}

/// Rotary embedding of a node, its angles measured: the node's own operation turns `(1, 0)` of every pair by one
/// position. So every kind of scaling is what the model has.
rvqkv::rope_config measure(const ggml_tensor& node) {
    std::int32_t numbers[16];
    std::memcpy(numbers, node.op_params, sizeof numbers);
    const auto real = [&](std::size_t i) {
        float value = 0.0F;
        std::memcpy(&value, numbers + i, sizeof value);
        return value;
    };
    const int dims = numbers[1];
    const int mode = numbers[2];
    if (mode != GGML_ROPE_TYPE_NORMAL && mode != GGML_ROPE_TYPE_NEOX) {
        throw std::runtime_error(std::string(node.name) + ": rotary embedding of kind " + std::to_string(mode) +
                                 " is not known here; give a model of text alone");
    }
    const ggml_tensor* const factors = node.src[2];
    const std::size_t head_dim = static_cast<std::size_t>(node.ne[0]);
    std::vector<char> memory(std::size_t{1} << 20U);
    const std::unique_ptr<ggml_context, void (*)(ggml_context*)> context(
        ggml_init({memory.size(), memory.data(), false}), ggml_free);
    ggml_tensor* const unit = ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, node.ne[0], 1, 1);
    ggml_tensor* const position = ggml_new_tensor_1d(context.get(), GGML_TYPE_I32, 1);
    ggml_tensor* own_factors = nullptr;
    if (factors != nullptr) {
        own_factors = ggml_new_tensor_1d(context.get(), GGML_TYPE_F32, factors->ne[0]);
        ggml_backend_tensor_get(factors, own_factors->data, 0, ggml_nbytes(factors));
    }
    rvqkv::rope_config config;
    config.pairs = mode == GGML_ROPE_TYPE_NEOX ? rvqkv::rope_pairs::half_split : rvqkv::rope_pairs::interleaved;
    config.dims = static_cast<std::size_t>(dims);
    const std::size_t pairs = config.dims / 2;
    const bool is_split = mode == GGML_ROPE_TYPE_NEOX;
    float* const channels = static_cast<float*>(unit->data);
    std::memset(channels, 0, head_dim * sizeof(float));
    for (std::size_t pair = 0; pair < pairs; ++pair) {
        channels[is_split ? pair : 2 * pair] = 1.0F;
    }
    static_cast<std::int32_t*>(position->data)[0] = 1;
    ggml_tensor* const turned = ggml_rope_ext(context.get(), unit, position, own_factors, dims, mode, numbers[4],
                                              real(5), real(6), real(7), real(8), real(9), real(10));
    ggml_cgraph* const graph = ggml_new_graph_custom(context.get(), 16, false);
    ggml_build_forward_expand(graph, turned);
    ggml_graph_compute_with_ctx(context.get(), graph, 1);
    const float* const out = static_cast<const float*>(turned->data);
    for (std::size_t pair = 0; pair < pairs; ++pair) {
        const double x = static_cast<double>(out[is_split ? pair : 2 * pair]);
        const double y = static_cast<double>(out[is_split ? pair + pairs : 2 * pair + 1]);
        config.frequencies.push_back(std::atan2(y, x));
        config.attention_factor = std::hypot(x, y);
    }
    if (std::fabs(config.attention_factor - 1.0) < 1e-6) {
        config.attention_factor = 1.0;
    }
    return config;
}

/// Collects what the graph has; wants no data.
struct graph_survey {
    model_attention layers;
    std::size_t context_tokens = 0;
    std::size_t window = 0;
    std::exception_ptr failure;

    static bool callback(ggml_tensor* node, bool ask, void* self) {
        graph_survey& survey = *static_cast<graph_survey*>(self);
        if (ask) {
            try {
                survey.note(*node);
            } catch (...) {
                survey.failure = std::current_exception();
            }
        }
        return false;
    }
    void note(const ggml_tensor& node) {
        std::size_t layer = 0;
        if (parse_layer(node.name, "Kcur-", layer) && layer < layers.size()) {
            note_keys(layers[layer], node);
        } else if (parse_layer(node.name, "Vcur-", layer) && layer < layers.size()) {
            attention_layer& found = layers[layer];
            found.value_name = node.name;
            found.value_op = node.op;
            found.values = {0, static_cast<std::size_t>(node.ne[1]), static_cast<std::size_t>(node.ne[0])};
        } else if (parse_layer(node.name, "kq-", layer) && layer < layers.size() && node.op == GGML_OP_MUL_MAT) {
            const ggml_tensor* cells = node.src[0];
            while (cells->view_src != nullptr) {
                cells = cells->view_src;
            }
            // A layer with a sliding window has cells for that only.
            layers[layer].sliding_window = static_cast<std::size_t>(cells->ne[1]) < context_tokens ? window : 0;
        }
    }
    /// Several nodes have the name, as one is made of the other: what rotary embedding starts from is it, or the last
    /// in a layer without.
    static void note_keys(attention_layer& found, const ggml_tensor& node) {
        const bool is_rope = node.op == GGML_OP_ROPE;
        if (found.turns && !is_rope) {
            return;
        }
        const ggml_tensor& keys = is_rope ? *node.src[0] : node;
        if (is_rope) {
            found.turns = true;
            found.rope = measure(node);
        }
        found.key_name = keys.name;
        found.key_op = keys.op;
        found.keys = {0, static_cast<std::size_t>(keys.ne[1]), static_cast<std::size_t>(keys.ne[0])};
    }
};

}  // namespace

model_attention find_attention(const loaded_model& model, int threads) {
    graph_survey survey;
    survey.layers.resize(model.layers());
    survey.window = static_cast<std::size_t>(std::max(0, llama_model_n_swa(model.get())));
    survey.context_tokens = 512 + 2 * ((survey.window + 255) / 256 * 256);  // more than a sliding window needs
    llama_context_params options = llama_context_default_params();
    options.n_ctx = static_cast<std::uint32_t>(survey.context_tokens);
    options.swa_full = false;
    options.n_batch = 1;
    options.n_ubatch = 1;
    options.n_threads = threads;
    options.n_threads_batch = threads;
    options.cb_eval = &graph_survey::callback;
    options.cb_eval_user_data = &survey;
    options.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    const std::unique_ptr<llama_context, void (*)(llama_context*)> context(llama_init_from_model(model.get(), options),
                                                                           llama_free);
    llama_token token = 0;
    if (!context || llama_decode(context.get(), llama_batch_get_one(&token, 1)) != 0) {
        throw std::runtime_error(model.path() + ": cannot be evaluated" + last_complaint());
    }
    if (survey.failure) {
        std::rethrow_exception(survey.failure);
    }
    for (std::size_t layer = 0; layer < survey.layers.size(); ++layer) {
        const attention_layer& found = survey.layers[layer];
        if (found.keys.heads == 0 || found.values.heads == 0) {
            throw std::runtime_error(model.path() + ": architecture '" + model.architecture() +
                                     "' is not supported: its graph has no " +
                                     (found.keys.heads == 0 ? "Kcur-" : "Vcur-") + std::to_string(layer) +
                                     " before rotary embedding; give a model of the Llama, Qwen or Gemma families");
        }
    }
    return survey.layers;
}

bool kv_tap::callback(ggml_tensor* node, bool ask, void* self) {
    kv_tap& tap = *static_cast<kv_tap*>(self);
    if (ask) {
        return tap.wants(*node);
    }
    const auto start = std::chrono::steady_clock::now();
    try {
        tap.visit(*node);
    } catch (...) {
        tap.failure_ = std::current_exception();
        return false;
    }
    tap.seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return true;
}

void kv_tap::rethrow() {
    if (failure_) {
        std::rethrow_exception(std::exchange(failure_, nullptr));
    }
}

bool kv_tap::wants(const ggml_tensor& node) const {
    std::size_t layer = 0;
    if (failure_ || !is_active() || !parse_layer(node.name, layer) || layer >= attention_->size()) {
        return false;
    }
    const attention_layer& known = (*attention_)[layer];
    if ((node.op == known.key_op && known.key_name == node.name) ||
        (node.op == known.value_op && known.value_name == node.name)) {
        return true;
    }
    return wants_scores() && node.op == GGML_OP_MUL_MAT &&
           (parse_layer(node.name, "kq-", layer) || parse_layer(node.name, "kqv-", layer));
}

void kv_tap::visit(ggml_tensor& node) {
    std::size_t layer = 0;
    if (parse_layer(node.name, "kq-", layer)) {
        on_scores(layer, &node);
    } else if (parse_layer(node.name, "kqv-", layer)) {
        on_outputs(layer, &node);
    } else if (parse_layer(node.name, layer)) {
        if ((*attention_)[layer].key_name == node.name && (*attention_)[layer].key_op == node.op) {
            on_keys(layer, view_of(node, "layer " + std::to_string(layer) + ": keys"));
        } else {
            on_values(layer, view_of(node, "layer " + std::to_string(layer) + ": values"));
        }
    }
}

}  // namespace llama_example
