// SPDX-License-Identifier: MIT
#include "plain_model.hpp"

#include <ggml.h>
#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace llama_example {
namespace {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using matrix_map = Eigen::Map<matrix>;
using const_map = Eigen::Map<const matrix>;
using head_map = Eigen::Map<matrix, 0, Eigen::OuterStride<>>;
using const_head_map = Eigen::Map<const matrix, 0, Eigen::OuterStride<>>;

Eigen::Index index(std::size_t number) {
    return static_cast<Eigen::Index>(number);
}

/// Tokens that one task works on, and queries that share a product.
constexpr std::size_t block_tokens = 128;

/// Calls `body(first, last)` for blocks of tokens.
template <class Body>
void for_blocks(const plain_workers& workers, std::size_t tokens, const Body& body) {
    workers((tokens + block_tokens - 1) / block_tokens,
            [&](std::size_t i) { body(i * block_tokens, std::min(tokens, (i + 1) * block_tokens)); });
}

/// `x W^T` for `W` `[out, in]`.
matrix times(const matrix& x, const float* weights, std::size_t out) {
    matrix product(x.rows(), index(out));
    product.noalias() = x * const_map(weights, index(out), x.cols()).transpose();
    return product;
}

/// Rows divided by their root mean square, times the norm's weights.
matrix normalized(const Eigen::Ref<const matrix>& x, const float* weights, float epsilon) {
    matrix out(x.rows(), x.cols());
    const Eigen::Map<const Eigen::RowVectorXf> scale(weights, x.cols());
    for (Eigen::Index row = 0; row < x.rows(); ++row) {
        const double square = x.row(row).cast<double>().squaredNorm() / static_cast<double>(x.cols());
        out.row(row) = x.row(row).cwiseProduct(scale) / std::sqrt(static_cast<float>(square) + epsilon);
    }
    return out;
}

}  // namespace

// ---- The file ----

plain_model::plain_model(const std::string& path) : path_(path) {
    ggml_context* tensors = nullptr;
    file_.reset(gguf_init_from_file(path.c_str(), {false, &tensors}));
    tensors_.reset(tensors);
    if (!file_) {
        throw std::runtime_error(path + ": cannot be read; give a GGUF model");
    }
    read_shape();
    const std::size_t query_width = shape_.heads * shape_.head_dim;
    const std::size_t key_width = shape_.kv_heads * shape_.head_dim;
    embeddings_ = weights("token_embd.weight", shape_.width, shape_.vocabulary);
    output_norm_ = weights("output_norm.weight", shape_.width);
    const bool has_output = gguf_find_tensor(file_.get(), "output.weight") >= 0;
    output_ = has_output ? weights("output.weight", shape_.width, shape_.vocabulary) : embeddings_;
    for (std::size_t i = 0; i < shape_.layers; ++i) {
        const std::string block = "blk." + std::to_string(i) + ".";
        layer_weights& layer = layers_.emplace_back();
        layer.attention_norm = weights(block + "attn_norm.weight", shape_.width);
        layer.query = weights(block + "attn_q.weight", shape_.width, query_width);
        layer.key = weights(block + "attn_k.weight", shape_.width, key_width);
        layer.value = weights(block + "attn_v.weight", shape_.width, key_width);
        layer.output = weights(block + "attn_output.weight", query_width, shape_.width);
        layer.inner_norm = weights(block + "ffn_norm.weight", shape_.width);
        layer.gate = weights(block + "ffn_gate.weight", shape_.width, shape_.inner);
        layer.up = weights(block + "ffn_up.weight", shape_.width, shape_.inner);
        layer.down = weights(block + "ffn_down.weight", shape_.inner, shape_.width);
    }
    if (const auto all = static_cast<std::size_t>(gguf_get_n_tensors(file_.get())); used_ != all) {
        throw std::runtime_error(path + ": has " + std::to_string(all - used_) +
                                 " tensors (biases, experts, ...) that the plain engine does not know; evaluate it "
                                 "without --engine plain");
    }
}

void plain_model::read_shape() {
    const std::int64_t id = gguf_find_key(file_.get(), "general.architecture");
    const std::string architecture = id < 0 ? "" : gguf_get_val_str(file_.get(), id);
    if (architecture != "llama") {
        throw std::runtime_error(path_ + ": architecture '" + architecture +
                                 "': the plain engine knows 'llama' alone; evaluate it without --engine plain");
    }
    shape_.layers = count("block_count");
    shape_.width = count("embedding_length");
    shape_.inner = count("feed_forward_length");
    shape_.heads = count("attention.head_count");
    shape_.kv_heads = count("attention.head_count_kv", shape_.heads);
    shape_.head_dim = count("attention.key_length", shape_.width / shape_.heads);
    shape_.epsilon = static_cast<float>(number("attention.layer_norm_rms_epsilon", 0.0));
    if (const std::int64_t tokens = gguf_find_key(file_.get(), "tokenizer.ggml.tokens"); tokens >= 0) {
        shape_.vocabulary = gguf_get_arr_n(file_.get(), tokens);
    }
    const std::int64_t scaling = gguf_find_key(file_.get(), "llama.rope.scaling.type");
    if (shape_.epsilon <= 0.0F || shape_.heads % shape_.kv_heads != 0 ||
        count("attention.value_length", shape_.head_dim) != shape_.head_dim ||
        count("rope.dimension_count", shape_.head_dim) != shape_.head_dim || number("attention.scale", 0.0) != 0.0 ||
        (scaling >= 0 && std::string(gguf_get_val_str(file_.get(), scaling)) != "none")) {
        throw std::runtime_error(path_ +
                                 ": is a Llama model of a kind that the plain engine does not know (heads, rotary "
                                 "scaling, scale of scores or epsilon); evaluate it without --engine plain");
    }
    const double base = number("rope.freq_base", 10000.0);
    const bool has_factors = gguf_find_tensor(file_.get(), "rope_freqs.weight") >= 0;
    const std::size_t pairs = shape_.head_dim / 2;
    const float* const factors = has_factors ? weights("rope_freqs.weight", pairs) : nullptr;
    for (std::size_t pair = 0; pair < pairs; ++pair) {
        const double frequency = std::pow(base, -static_cast<double>(pair) / static_cast<double>(pairs));
        shape_.frequencies.push_back(factors == nullptr ? frequency : frequency / static_cast<double>(factors[pair]));
    }
}

double plain_model::number(const std::string& key, double otherwise) const {
    const std::int64_t id = gguf_find_key(file_.get(), ("llama." + key).c_str());
    if (id < 0) {
        return otherwise;
    }
    switch (gguf_get_kv_type(file_.get(), id)) {
        case GGUF_TYPE_UINT32: return gguf_get_val_u32(file_.get(), id);
        case GGUF_TYPE_INT32: return gguf_get_val_i32(file_.get(), id);
        case GGUF_TYPE_FLOAT32: return static_cast<double>(gguf_get_val_f32(file_.get(), id));
        default: throw std::runtime_error(path_ + ": llama." + key + " is no number that the plain engine can read");
    }
}

std::size_t plain_model::count(const std::string& key, std::size_t otherwise) const {
    const auto found = static_cast<std::size_t>(number(key, static_cast<double>(otherwise)));
    if (found == 0) {
        throw std::runtime_error(path_ + ": llama." + key + " is missing or 0: the file is damaged");
    }
    return found;
}

const float* plain_model::weights(const std::string& name, std::size_t columns, std::size_t rows) {
    const ggml_tensor* const tensor = ggml_get_tensor(tensors_.get(), name.c_str());
    if (tensor == nullptr) {
        throw std::runtime_error(path_ + ": has no tensor " + name + "; evaluate it without --engine plain");
    }
    if (tensor->type != GGML_TYPE_F32) {
        throw std::runtime_error(path_ + ": " + name + " is " + ggml_type_name(tensor->type) +
                                 ", the plain engine wants float32: leave --as-it-is out");
    }
    if (tensor->ne[0] != static_cast<std::int64_t>(columns) || tensor->ne[1] != static_cast<std::int64_t>(rows)) {
        throw std::runtime_error(path_ + ": " + name + " is " + std::to_string(tensor->ne[1]) + " x " +
                                 std::to_string(tensor->ne[0]) + ", want " + std::to_string(rows) + " x " +
                                 std::to_string(columns) + ": the file is damaged");
    }
    ++used_;
    return static_cast<const float*>(tensor->data);
}

// ---- The pass ----

void plain_model::read(const std::vector<llama_token>& tokens, plain_attention& attention,
                       const logits_callback& on_logits, const plain_workers& workers) const {
    const std::size_t padded = (tokens.size() + padded_to - 1) / padded_to * padded_to;
    const std::size_t query_width = shape_.heads * shape_.head_dim;
    const std::size_t key_width = shape_.kv_heads * shape_.head_dim;
    matrix x(index(padded), index(shape_.width));
    for (std::size_t i = 0; i < padded; ++i) {
        const auto token = static_cast<std::size_t>(tokens[std::min(i, tokens.size() - 1)]);
        std::copy_n(embeddings_ + token * shape_.width, shape_.width, x.row(index(i)).data());
    }
    matrix queries(x.rows(), index(query_width));
    matrix keys(x.rows(), index(key_width));
    matrix values(x.rows(), index(key_width));
    matrix attended(x.rows(), index(query_width));
    for (std::size_t i = 0; i < shape_.layers; ++i) {
        const layer_weights& layer = layers_[i];
        for_blocks(workers, padded, [&](std::size_t first, std::size_t last) {
            const Eigen::Index begin = index(first);
            const Eigen::Index size = index(last - first);
            const matrix in = normalized(x.middleRows(begin, size), layer.attention_norm, shape_.epsilon);
            queries.middleRows(begin, size) = times(in, layer.query, query_width);
            keys.middleRows(begin, size) = times(in, layer.key, key_width);
            values.middleRows(begin, size) = times(in, layer.value, key_width);
        });
        attention.attend(i, {queries.data(), keys.data(), values.data(), attended.data(), padded});
        for_blocks(workers, padded, [&](std::size_t first, std::size_t last) {
            const Eigen::Index begin = index(first);
            const Eigen::Index size = index(last - first);
            auto rows = x.middleRows(begin, size);
            rows += times(attended.middleRows(begin, size), layer.output, shape_.width);
            const matrix in = normalized(rows, layer.inner_norm, shape_.epsilon);
            matrix gate = times(in, layer.gate, shape_.inner);
            gate.array() /= 1.0F + (-gate.array()).exp();
            gate.array() *= times(in, layer.up, shape_.inner).array();
            rows += times(gate, layer.down, shape_.width);
        });
    }
    constexpr std::size_t most = 2 * block_tokens;  // of which all logits are held
    matrix logits(index(most), index(shape_.vocabulary));
    for (std::size_t done = 0; done < tokens.size(); done += most) {
        const std::size_t count = std::min(most, tokens.size() - done);
        for_blocks(workers, count, [&](std::size_t first, std::size_t last) {
            const auto rows = x.middleRows(index(done + first), index(last - first));
            logits.middleRows(index(first), rows.rows()) =
                times(normalized(rows, output_norm_, shape_.epsilon), output_, shape_.vocabulary);
        });
        on_logits(logits.data(), done, count);
    }
}

// ---- Attention ----

void exact_attention::turn(const float* from, std::size_t heads, std::size_t tokens, std::vector<float>& to) const {
    const std::size_t dims = shape_->head_dim;
    to.resize(tokens * heads * dims);
    for_blocks(*workers_, tokens, [&](std::size_t first, std::size_t last) {
        for (std::size_t token = first; token < last; ++token) {
            for (std::size_t pair = 0; pair < dims / 2; ++pair) {
                const double angle = static_cast<double>(token) * shape_->frequencies[pair];
                const auto cosine = static_cast<float>(std::cos(angle));
                const auto sine = static_cast<float>(std::sin(angle));
                for (std::size_t head = 0; head < heads; ++head) {
                    const std::size_t at = (token * heads + head) * dims + 2 * pair;
                    to[at] = from[at] * cosine - from[at + 1] * sine;
                    to[at + 1] = from[at] * sine + from[at + 1] * cosine;
                }
            }
        }
    });
}

void exact_attention::attend(std::size_t /*layer*/, const plain_rows& rows) {
    const std::size_t dims = shape_->head_dim;
    const Eigen::OuterStride<> query_stride(index(shape_->heads * dims));
    const Eigen::OuterStride<> key_stride(index(shape_->kv_heads * dims));
    turn(rows.queries, shape_->heads, rows.tokens, queries_);
    turn(rows.keys, shape_->kv_heads, rows.tokens, keys_);
    const float scale = 1.0F / std::sqrt(static_cast<float>(dims));
    (*workers_)(shape_->heads, [&](std::size_t head) {
        const std::size_t kv_offset = head * shape_->kv_heads / shape_->heads * dims;
        for (std::size_t first = 0; first < rows.tokens; first += block_tokens) {
            const std::size_t count = std::min(block_tokens, rows.tokens - first);
            const std::size_t offset = first * shape_->heads * dims + head * dims;
            const const_head_map queries(queries_.data() + offset, index(count), index(dims), query_stride);
            const const_head_map keys(keys_.data() + kv_offset, index(first + count), index(dims), key_stride);
            const const_head_map values(rows.values + kv_offset, index(first + count), index(dims), key_stride);
            matrix weights(index(count), index(first + count));
            weights.noalias() = queries * keys.transpose();
            for (std::size_t i = 0; i < count; ++i) {
                auto seen = weights.row(index(i)).head(index(first + i + 1)).array();
                seen = ((seen - seen.maxCoeff()) * scale).exp().eval();
                seen /= seen.sum();
                weights.row(index(i)).tail(index(count - i - 1)).setZero();
            }
            head_map(rows.out + offset, index(count), index(dims), query_stride).noalias() = weights * values;
        }
    });
}

}  // namespace llama_example
