// SPDX-License-Identifier: MIT
#include "sequence_state.hpp"

#include "engine.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace llama_example {
namespace {

class reader {
public:
    explicit reader(std::span<const std::uint8_t> bytes) : bytes_(bytes) {}
    template <class T>
    [[nodiscard]] T take() {
        T value{};
        copy(&value, sizeof value);
        return value;
    }
    void copy(void* to, std::size_t size) {
        if (bytes_.size() < size) {
            throw std::runtime_error("the sequence state ends too early");
        }
        std::memcpy(to, bytes_.data(), size);
        bytes_ = bytes_.subspan(size);
    }
    template <class T>
    void expect(T value, const char* what) {
        if (const T found = take<T>(); found != value) {
            throw std::runtime_error(std::string("the sequence state has ") + what + " " + std::to_string(found) +
                                     ", not " + std::to_string(value) +
                                     ": it is of another version of llama.cpp, or of another kind of cache");
        }
    }
    [[nodiscard]] std::size_t left() const noexcept { return bytes_.size(); }

private:
    std::span<const std::uint8_t> bytes_;
};

class writer {
public:
    template <class T>
    void put(const T& value) {
        put(&value, sizeof value);
    }
    void put(const void* from, std::size_t size) {
        const auto* const bytes = static_cast<const std::uint8_t*>(from);
        bytes_.insert(bytes_.end(), bytes, bytes + size);
    }
    [[nodiscard]] std::vector<std::uint8_t> take() && { return std::move(bytes_); }

private:
    std::vector<std::uint8_t> bytes_;
};

/// Layers that see all tokens (or, `has_window`, those that do not).
std::vector<std::size_t> layers_of(const model_attention& attention, bool has_window) {
    std::vector<std::size_t> layers;
    for (std::size_t layer = 0; layer < attention.size(); ++layer) {
        if ((attention[layer].sliding_window != 0) == has_window) {
            layers.push_back(layer);
        }
    }
    return layers;
}

/// Cells of a sliding window are used again and again, so they are in any order.
void sort_positions(std::vector<llama_pos>& positions) {
    std::sort(positions.begin(), positions.end());
    for (std::size_t i = 1; i < positions.size(); ++i) {
        if (positions[i] != positions[i - 1] + 1) {
            throw std::runtime_error("the sequence state has a gap before position " + std::to_string(positions[i]) +
                                     ": only sequences without gaps can be saved");
        }
    }
}

std::size_t row_values(const rvqkv::tensor_shape& shape) {
    return shape.heads * shape.channels;
}

}  // namespace

sequence_state sequence_state::take_apart(std::span<const std::uint8_t> bytes, const model_attention& attention) {
    reader in(bytes);
    sequence_state state;
    state.mark = in.take<std::uint32_t>();
    in.expect<llama_seq_id>(0, "sequence");
    for (const bool has_window : {false, true}) {
        const std::vector<std::size_t> layers = layers_of(attention, has_window);
        if (layers.empty() && has_window) {
            continue;
        }
        part& now = state.parts.emplace_back();
        in.expect<std::uint32_t>(1, "streams");
        now.positions.resize(in.take<std::uint32_t>());
        for (llama_pos& position : now.positions) {
            position = in.take<llama_pos>();
            in.expect<std::uint32_t>(1, "sequences in a cell");
            in.expect<llama_seq_id>(0, "sequence");
        }
        const std::vector<llama_pos> cells = now.positions;
        sort_positions(now.positions);
        if (now.positions.empty()) {
            throw std::runtime_error("the sequence state has no tokens");
        }
        in.expect<std::uint32_t>(0, "transposed values");
        in.expect<std::uint32_t>(static_cast<std::uint32_t>(layers.size()), "layers");
        for (const std::size_t layer : layers) {
            now.layers.push_back({layer, {}, {}});
        }
        for (const bool is_key : {true, false}) {
            for (layer_rows& rows : now.layers) {
                const attention_layer& known = attention[rows.layer];
                const std::size_t values = row_values(is_key ? known.keys : known.values);
                in.expect<std::int32_t>(GGML_TYPE_F16, "type");
                in.expect<std::uint64_t>(values * sizeof(rvqkv::float16), "bytes of a row");
                std::vector<rvqkv::float16>& to = is_key ? rows.keys : rows.values;
                to.resize(cells.size() * values);
                for (const llama_pos position : cells) {
                    const auto place = static_cast<std::size_t>(position - now.positions.front());
                    in.copy(to.data() + place * values, values * sizeof(rvqkv::float16));
                }
            }
        }
    }
    if (in.left() != 0) {
        throw std::runtime_error("the sequence state has " + std::to_string(in.left()) +
                                 " bytes more than are known: it is of another version of llama.cpp");
    }
    return state;
}

std::vector<std::uint8_t> sequence_state::put_together(const model_attention& attention) const {
    writer out;
    out.put(mark);
    out.put(llama_seq_id{0});
    for (const part& now : parts) {
        out.put(std::uint32_t{1});
        out.put(static_cast<std::uint32_t>(now.positions.size()));
        for (const llama_pos position : now.positions) {
            out.put(position);
            out.put(std::uint32_t{1});
            out.put(llama_seq_id{0});
        }
        out.put(std::uint32_t{0});
        out.put(static_cast<std::uint32_t>(now.layers.size()));
        for (const bool is_key : {true, false}) {
            for (const layer_rows& rows : now.layers) {
                const attention_layer& known = attention[rows.layer];
                out.put(std::int32_t{GGML_TYPE_F16});
                out.put(std::uint64_t{row_values(is_key ? known.keys : known.values) * sizeof(rvqkv::float16)});
                const std::vector<rvqkv::float16>& from = is_key ? rows.keys : rows.values;
                out.put(from.data(), from.size() * sizeof(rvqkv::float16));
            }
        }
    }
    return std::move(out).take();
}

std::vector<std::uint8_t> get_state(llama_context* context) {
    std::vector<std::uint8_t> bytes(llama_state_seq_get_size(context, 0));
    if (bytes.empty() || llama_state_seq_get_data(context, bytes.data(), bytes.size(), 0) != bytes.size()) {
        throw std::runtime_error("llama.cpp cannot save the sequence" + last_complaint());
    }
    return bytes;
}

void set_state(llama_context* context, std::span<const std::uint8_t> bytes) {
    if (llama_state_seq_set_data(context, bytes.data(), bytes.size(), 0) != bytes.size()) {
        throw std::runtime_error("llama.cpp cannot restore the sequence" + last_complaint());
    }
}

rvqkv::kv_cache make_cache(const model_attention& attention, const rvqkv::model_codecs& codecs) {
    rvqkv::kv_cache_config config;
    for (std::size_t layer = 0; layer < attention.size(); ++layer) {
        const attention_layer& known = attention[layer];
        rvqkv::kv_layer_config made;
        made.keys = {codecs.at(layer).key, known.keys.heads};
        made.values = {codecs.at(layer).value, known.values.heads};
        made.sliding_window = known.sliding_window;
        if (known.turns) {
            made.coding = rvqkv::key_coding::before_rope;
            made.rope = known.rope;
        }
        config.layers.push_back(std::move(made));
    }
    return rvqkv::kv_cache::create(std::move(config)).value();
}

void append(rvqkv::kv_sequence& sequence, const sequence_state& state, const model_attention& attention,
            rvqkv::kv_workspace& workspace, const rvqkv::executor& workers) {
    for (const sequence_state::part& part : state.parts) {
        const auto tokens = part.positions.size();
        for (const sequence_state::layer_rows& rows : part.layers) {
            const attention_layer& known = attention[rows.layer];
            const auto shaped = [&](const rvqkv::tensor_shape& shape, std::size_t count) {
                return rvqkv::tensor_shape{count, shape.heads, shape.channels};
            };
            const auto missing = static_cast<std::size_t>(part.positions.front()) - sequence.tokens(rows.layer);
            constexpr std::size_t piece = 256;
            const std::vector<rvqkv::float16> zeros(std::min(piece, missing) *
                                                    std::max(row_values(known.keys), row_values(known.values)));
            for (std::size_t done = 0; done < missing; done += piece) {
                const std::size_t count = std::min(piece, missing - done);
                sequence
                    .append(rows.layer, {zeros.data(), shaped(known.keys, count)},
                            {zeros.data(), shaped(known.values, count)}, workspace, nullptr, workers)
                    .value();
            }
            rvqkv::kv_encode_report report;
            sequence
                .append(rows.layer, {rows.keys.data(), shaped(known.keys, tokens)},
                        {rows.values.data(), shaped(known.values, tokens)}, workspace, &report, workers)
                .value();
            if (report.keys.nonfinite_rows + report.values.nonfinite_rows != 0) {
                throw std::runtime_error("layer " + std::to_string(rows.layer) +
                                         ": keys or values of the sequence are not finite in float16");
            }
        }
    }
}

void reconstruct(const rvqkv::kv_sequence& sequence, sequence_state& state, const model_attention& attention,
                 rvqkv::kv_workspace& workspace) {
    for (sequence_state::part& part : state.parts) {
        const auto first = static_cast<std::size_t>(part.positions.front());
        const std::size_t tokens = part.positions.size();
        for (sequence_state::layer_rows& rows : part.layers) {
            const attention_layer& known = attention[rows.layer];
            sequence
                .reconstruct_keys(rows.layer, first,
                                  {rows.keys.data(), {tokens, known.keys.heads, known.keys.channels}}, workspace)
                .value();
            sequence
                .reconstruct_values(rows.layer, first,
                                    {rows.values.data(), {tokens, known.values.heads, known.values.channels}},
                                    workspace)
                .value();
        }
    }
}

}  // namespace llama_example
