// SPDX-License-Identifier: MIT
#include "plain_cache.hpp"

#include "commands.hpp"

#include <stdexcept>
#include <utility>

namespace llama_example {
namespace {

rvqkv::kv_cache make_cache(const plain_shape& shape, const rvqkv::model_codecs& codecs, const exact_tokens& exact) {
    rvqkv::kv_cache_config config;
    config.sink_tokens = exact.sinks;
    config.recent_tokens = exact.recent;
    config.page_tokens = cache_page_tokens;
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
        rvqkv::kv_layer_config made;
        made.keys = {codecs.at(layer).key, shape.kv_heads};
        made.values = {codecs.at(layer).value, shape.kv_heads};
        made.query_heads = shape.heads;
        made.coding = rvqkv::key_coding::before_rope;
        made.turned_input = false;
        made.rope.pairs = rvqkv::rope_pairs::interleaved;
        made.rope.frequencies = shape.frequencies;
        config.layers.push_back(std::move(made));
    }
    return rvqkv::kv_cache::create(std::move(config)).value();
}

}  // namespace

cached_attention::cached_attention(const plain_shape& shape, const rvqkv::model_codecs& codecs,
                                   const exact_tokens& exact, const rvqkv::executor& workers)
    : shape_(&shape),
      workers_(&workers),
      one_by_one_(exact.recent != 0 || exact.page != 1),
      cache_(make_cache(shape, codecs, exact)),
      sequence_(cache_.new_sequence().value()),
      workspace_(cache_.make_workspace(workers).value()) {}

void cached_attention::attend(std::size_t layer, const plain_rows& rows) {
    const stopwatch watch;
    if (layer == 0) {
        sequence_.clear();
    }
    const std::size_t query_width = shape_->heads * shape_->head_dim;
    const std::size_t key_width = shape_->kv_heads * shape_->head_dim;
    const std::size_t step = one_by_one_ ? 1 : rows.tokens;
    rvqkv::kv_encode_report report;
    for (std::size_t first = 0; first < rows.tokens; first += step) {
        const rvqkv::tensor_shape keys{step, shape_->kv_heads, shape_->head_dim};
        const rvqkv::tensor_shape queries{step, shape_->heads, shape_->head_dim};
        sequence_
            .append(layer, {rows.keys + first * key_width, keys}, {rows.values + first * key_width, keys}, workspace_,
                    &report, *workers_)
            .value();
        sequence_
            .attend(layer, {rows.queries + first * query_width, queries}, {rows.out + first * query_width, queries},
                    attention_, {}, *workers_)
            .value();
    }
    if (report.keys.nonfinite_rows + report.values.nonfinite_rows != 0) {
        throw std::runtime_error("layer " + std::to_string(layer) +
                                 ": keys or values are not finite: the model is damaged, or its numbers overflow");
    }
    seconds_ += watch.seconds();
}

}  // namespace llama_example
