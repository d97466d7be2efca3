// SPDX-License-Identifier: MIT
#include "codecs.hpp"

#include <stdexcept>
#include <utility>

namespace llama_example {
namespace {

/// Strided groups of the channels in half-split order, as the interleaved order has them.
rvqkv::channel_list strided_pairs(std::size_t head_dim, std::size_t group_dim) {
    const std::size_t groups = head_dim / group_dim;
    const std::size_t half = head_dim / 2;
    rvqkv::channel_list order(head_dim);
    for (std::size_t group = 0; group < groups; ++group) {
        for (std::size_t i = 0; i < group_dim; ++i) {
            const std::size_t split = rvqkv::strided_grouping().channel(group, i, groups, group_dim);
            const std::size_t interleaved = split < half ? 2 * split : 2 * (split - half) + 1;
            order[group * group_dim + i] = static_cast<std::uint16_t>(interleaved);
        }
    }
    return order;
}

}  // namespace

rvqkv::codec_spec paper_spec(const attention_layer& layer, bool is_key, const rvqkv::codebook_shape& shape) {
    rvqkv::codec_spec spec;
    spec.head_dim = is_key ? layer.keys.channels : layer.values.channels;
    spec.shape = shape;
    spec.weight_type = rvqkv::dtype::float16;
    if (!is_key) {
        spec.grouping = rvqkv::grouping_kind::contiguous;
    } else if (layer.turns && layer.rope.pairs == rvqkv::rope_pairs::interleaved &&
               layer.rope.dims == layer.keys.channels && spec.head_dim % shape.dim == 0) {
        spec.grouping = rvqkv::grouping_kind::permuted;
        spec.permutation = strided_pairs(spec.head_dim, shape.dim);
    }
    return spec;
}

rvqkv::codec_set load_codecs_for(const std::string& path, const std::string& fingerprint,
                                 const model_attention& attention) {
    rvqkv::codec_set set = rvqkv::load_codecs(path).value();
    const auto made_for = set.metadata.find("model_fingerprint");
    if (made_for == set.metadata.end()) {
        throw std::runtime_error(path +
                                 ": does not say which model it was made for; make it with `rvqkv_llama calibrate`");
    }
    if (made_for->second != fingerprint) {
        throw std::runtime_error(path + ": was made for the model " + set.metadata["model"] + " with fingerprint " +
                                 made_for->second + ", this one's is " + fingerprint +
                                 "; calibrate this model, or give the one that the codecs are for");
    }
    for (std::size_t layer = 0; layer < attention.size(); ++layer) {
        const auto found = set.layers.find(layer);
        if (found == set.layers.end() || !found->second.key || !found->second.value ||
            found->second.key->head_dim() != attention[layer].keys.channels ||
            found->second.value->head_dim() != attention[layer].values.channels) {
            throw std::runtime_error(path + ": has no codecs of layer " + std::to_string(layer) + " for heads of " +
                                     std::to_string(attention[layer].keys.channels) + " and " +
                                     std::to_string(attention[layer].values.channels) + " channels; calibrate again");
        }
    }
    return set;
}

rvqkv::model_codecs first_depths(const rvqkv::model_codecs& whole, std::size_t depths) {
    rvqkv::model_codecs cut;
    for (const auto& [layer, both] : whole) {
        cut[layer] = {rvqkv::first_depths(both.key, depths).value(), rvqkv::first_depths(both.value, depths).value()};
    }
    return cut;
}

}  // namespace llama_example
