// SPDX-License-Identifier: MIT
#include "quantizing_tap.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace llama_example {

quantizing_tap::quantizing_tap(const model_attention& attention, std::size_t tokens, const rvqkv::executor& workers)
    : kv_tap(attention),
      workers_(&workers),
      tokens_(tokens),
      key_errors_(attention.size()),
      value_errors_(attention.size()),
      decoders_(workers.concurrency()) {
    for (const attention_layer& layer : attention) {
        ropes_.push_back(layer.turns ? rvqkv::rope::create(layer.rope, layer.keys.channels).value() : rvqkv::rope());
    }
}

void quantizing_tap::use(const rvqkv::model_codecs* codecs, const exact_tokens& exact) {
    codecs_ = codecs;
    exact_ = exact;
}

void quantizing_tap::on_keys(std::size_t layer, const rvqkv::mutable_tensor_view& keys) {
    errors& kept = key_errors_[layer];
    replace(layer, "keys", *codecs_->at(layer).key, keys, keeps_errors() ? &kept : nullptr);
    if (keeps_errors() && attention()[layer].turns) {
        const std::size_t width = keys.heads() * keys.channels();
        ropes_[layer].turn({kept.data() + first_position() * width, keys.rows(), keys.channels()},
                           static_cast<std::int64_t>(first_position()), keys.heads());
    }
}

void quantizing_tap::on_values(std::size_t layer, const rvqkv::mutable_tensor_view& values) {
    replace(layer, "values", *codecs_->at(layer).value, values, keeps_errors() ? &value_errors_[layer] : nullptr);
}

void quantizing_tap::replace(std::size_t layer, const char* side, const rvqkv::codec& codec,
                             const rvqkv::mutable_tensor_view& rows, errors* kept) {
    const std::size_t width = rows.heads() * rows.channels();
    const std::size_t skipped =
        std::min(rows.tokens(), exact_.sinks - std::min(exact_.sinks, first_position()));  // sinks stay as they are
    const std::size_t count = rows.tokens() - skipped;
    const auto each_row = [&](float* out, const auto& apply) {
        for (std::size_t token = 0; token < rows.tokens(); ++token) {
            for (std::size_t head = 0; head < rows.heads(); ++head) {
                apply(out + token * width + head * rows.channels(), static_cast<const float*>(rows.row(token, head)));
            }
        }
    };
    float* exact = nullptr;
    if (kept != nullptr) {
        kept->resize(tokens_ * width);
        exact = kept->data() + first_position() * width;
        each_row(exact, [&](float* to, const float* from) { std::copy_n(from, rows.channels(), to); });
    }
    if (count != 0) {
        const rvqkv::mutable_tensor_view coded = rows.slice_tokens(skipped, count);
        const std::size_t vectors = coded.rows() * codec.groups();
        codes_.resize(std::max(codes_.size(), vectors * codec.depths()));
        scales_.resize(std::max(scales_.size(), coded.rows()));
        const rvqkv::code_strides strides{codec.depths(), 1};
        rvqkv::encode_report report;
        codec.encode(coded, {codes_.data(), strides, scales_.data()}, workspace_, &report, *workers_).value();
        if (report.nonfinite_rows != 0) {
            throw std::runtime_error("layer " + std::to_string(layer) + ": " + side + " of token " +
                                     std::to_string(first_position() + skipped + report.first_token) +
                                     " of a window, head " + std::to_string(report.first_head) +
                                     ", are not finite: the model is damaged, or its numbers overflow");
        }
        const std::size_t tasks = decoders_.size();
        rvqkv::parallel_for(*workers_, tasks, [&](std::size_t task) {
            const std::size_t first = count * task / tasks;
            const std::size_t size = count * (task + 1) / tasks - first;
            const std::size_t row = first * coded.heads();
            codec
                .decode({codes_.data() + row * codec.groups() * codec.depths(), strides, scales_.data() + row},
                        coded.slice_tokens(first, size), codec.depths(), decoders_[task])
                .value();
        });
    }
    if (kept != nullptr) {
        each_row(exact, [&](float* to, const float* from) {
            for (std::size_t i = 0; i < rows.channels(); ++i) {
                to[i] -= from[i];
            }
        });
    }
}

namespace {

/// The row of a `[head, token, channel]` node in memory.
template <class Node>
auto* row_of(Node* node, std::size_t token, std::size_t head) {
    return reinterpret_cast<float*>(static_cast<char*>(node->data) + token * node->nb[1] + head * node->nb[2]);
}

void check(const ggml_tensor* node) {
    if (node->type != GGML_TYPE_F32 || node->nb[0] != sizeof(float) || node->ne[3] != 1) {
        throw std::runtime_error(std::string(node->name) + ": is " + ggml_type_name(node->type) +
                                 " in a layout that cannot be read: recent tokens cannot be exact with this model");
    }
}

}  // namespace

void quantizing_tap::on_scores(std::size_t layer, ggml_tensor* scores) {
    const ggml_tensor* const queries = scores->src[1];
    check(scores);
    check(queries);
    const rvqkv::tensor_shape& shape = attention()[layer].keys;
    const auto heads = static_cast<std::size_t>(scores->ne[2]);
    const auto count = static_cast<std::size_t>(scores->ne[1]);
    const errors& kept = key_errors_[layer];
    rvqkv::parallel_for(*workers_, heads, [&](std::size_t head) {
        const std::size_t kv_head = head * shape.heads / heads;
        for (std::size_t i = 0; i < count; ++i) {
            const float* const query = row_of(queries, i, head);
            float* const out = row_of(scores, i, head);
            const std::size_t position = first_position() + i;
            for (std::size_t j = first_recent(position); j <= position; ++j) {
                const float* const error = kept.data() + (j * shape.heads + kv_head) * shape.channels;
                float sum = 0.0F;
                for (std::size_t channel = 0; channel < shape.channels; ++channel) {
                    sum += query[channel] * error[channel];
                }
                out[j] += sum;
            }
        }
    });
}

void quantizing_tap::on_outputs(std::size_t layer, ggml_tensor* out) {
    const ggml_tensor* const probabilities = out->src[1];
    check(out);
    check(probabilities);
    const rvqkv::tensor_shape& shape = attention()[layer].values;
    const auto heads = static_cast<std::size_t>(out->ne[2]);
    const auto count = static_cast<std::size_t>(out->ne[1]);
    const errors& kept = value_errors_[layer];
    rvqkv::parallel_for(*workers_, heads, [&](std::size_t head) {
        const std::size_t kv_head = head * shape.heads / heads;
        for (std::size_t i = 0; i < count; ++i) {
            const float* const weights = row_of(probabilities, i, head);
            float* const sum = row_of(out, i, head);
            const std::size_t position = first_position() + i;
            for (std::size_t j = first_recent(position); j <= position; ++j) {
                const float* const error = kept.data() + (j * shape.heads + kv_head) * shape.channels;
                for (std::size_t channel = 0; channel < shape.channels; ++channel) {
                    sum[channel] += weights[j] * error[channel];
                }
            }
        }
    });
}

}  // namespace llama_example
