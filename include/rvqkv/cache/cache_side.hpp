// SPDX-License-Identifier: MIT
/// @file
/// One side (the keys or the values) of one layer of the KV cache: what codes it, and the way of its tokens into pages
/// and back, block by block.
#pragma once

#include "rvqkv/cache/page_layout.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/codec.hpp"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>

RVQKV_NAMESPACE_BEGIN

/// A layer's keys, or its values: what codes them, and how many heads they have. Sides may differ in everything.
struct kv_side_config {
    std::shared_ptr<const rvqkv::codec> codec;
    std::size_t heads = 0;  ///< KV heads, not query heads.
};

/// Scratch memory of one writer or reader: one block of tokens (those of `block_values` numbers, or one token if it has
/// more) for each worker, however many tokens a call asks for. Threads: one for each caller.
struct kv_workspace {
    quantizer_workspace quantizer;
    aligned_buffer<code_t> codes;  ///< `[depth, token, head, group]`
    aligned_buffer<float> scales;  ///< `[token, head]`
    [[nodiscard]] std::size_t bytes() const noexcept { return quantizer.bytes() + codes.bytes() + scales.bytes(); }
};

namespace detail {

class cache_side {
public:
    cache_side() = default;
    /// `name` and `layer` are for messages; `begin` is where this side begins in each page.
    cache_side(const kv_side_config& config, const char* name, std::size_t layer, std::size_t page_tokens,
               std::size_t begin) noexcept
        : config_(config),
          layout_(*config.codec, config.heads, page_tokens, begin),
          page_tokens_(page_tokens),
          block_tokens_(std::max<std::size_t>(1, block_values / (config.heads * config.codec->head_dim()))),
          name_(name),
          layer_(layer) {}

    [[nodiscard]] const kv_side_config& config() const noexcept { return config_; }
    [[nodiscard]] const side_layout& layout() const noexcept { return layout_; }

    /// "layer 3 keys: " and a text, as an error.
    [[nodiscard]] error wrong(const std::string& text) const {
        return {error_code::invalid_argument, "layer " + std::to_string(layer_) + " " + name_ + ": " + text};
    }
    /// Errors: `invalid_argument` for other heads or channels than this side's.
    [[nodiscard]] status check(const tensor_shape& shape) const {
        if (shape.heads != config_.heads) {
            return wrong("heads is " + std::to_string(shape.heads) + ", must be " + std::to_string(config_.heads));
        }
        if (shape.channels != config_.codec->head_dim()) {
            return wrong("channels is " + std::to_string(shape.channels) + ", must be the codec's head_dim " +
                         std::to_string(config_.codec->head_dim()));
        }
        return {};
    }

    /// Makes room for the blocks of `tokens` tokens, one for each worker. Errors: `out_of_memory`.
    [[nodiscard]] status reserve(kv_workspace& workspace, std::size_t tokens, const executor& workers) const {
        const codec& codec = *config_.codec;
        const std::size_t blocks = workers.concurrency();
        const std::size_t rows = std::min(tokens, block_tokens_) * config_.heads;
        if (status grown = workspace.quantizer.reserve(rows, codec.head_dim(), blocks); !grown) {
            return grown;
        }
        if (status grown = workspace.codes.reserve(blocks * rows * codec.groups() * codec.depths()); !grown) {
            return grown;
        }
        return workspace.scales.reserve(blocks * rows);
    }

    /// Encodes tokens as numbers `first` and on, into the pages whose start `page(i)` gives.
    /// Errors: `out_of_memory`; some tokens have been written then.
    template <class Page>
    [[nodiscard]] status encode(const tensor_view& x, std::size_t first, const Page& page, kv_workspace& workspace,
                                encode_report& report, const executor& workers) const {
        if (status grown = reserve(workspace, x.tokens(), workers); !grown) {
            return grown;
        }
        const std::size_t at_once = block_tokens_ * workers.concurrency();
        for (std::size_t done = 0; done < x.tokens(); done += at_once) {
            const std::size_t count = std::min(at_once, x.tokens() - done);
            const mutable_encoded_view block = view(workspace, count);
            encode_report found;
            if (status encoded =
                    config_.codec->encode(x.slice_tokens(done, count), block, workspace.quantizer, &found, workers);
                !encoded) {
                return encoded;
            }
            report.add(found, done);
            for_each_page(first + done, count, workers, [&](std::size_t i, std::size_t within, piece part) {
                const mutable_encoded_view from = slice(block, part.first);
                layout_.store(page(i), within, part.count, {from.codes, from.strides, from.scales});
            });
        }
        return {};
    }

    /// Decodes tokens from number `first` on, from the pages whose start `page(i)` gives.
    /// Errors: `out_of_memory`, before anything is written.
    template <class Page>
    [[nodiscard]] status decode(std::size_t first, const Page& page, const mutable_tensor_view& out, std::size_t depths,
                                kv_workspace& workspace) const {
        const serial_executor serial;
        if (status grown = reserve(workspace, out.tokens(), serial); !grown) {
            return grown;
        }
        for (std::size_t done = 0; done < out.tokens(); done += block_tokens_) {
            const std::size_t count = std::min(block_tokens_, out.tokens() - done);
            const mutable_encoded_view block = view(workspace, count);
            for_each_page(first + done, count, serial, [&](std::size_t i, std::size_t within, piece part) {
                layout_.load(page(i), within, part.count, depths, slice(block, part.first));
            });
            if (status decoded = config_.codec->decode({block.codes, block.strides, block.scales},
                                                       out.slice_tokens(done, count), depths, workspace.quantizer);
                !decoded) {
                return decoded;
            }
        }
        return {};
    }

private:
    /// Tokens of a block that lie in one page.
    struct piece {
        std::size_t first;
        std::size_t count;
    };

    /// Calls `body(page, first token in the page, piece)` for each page that `count` > 0 tokens meet. Pages share no
    /// byte, so they may be written at the same time.
    template <class Body>
    void for_each_page(std::size_t first, std::size_t count, const executor& workers, const Body& body) const {
        const std::size_t first_page = first / page_tokens_;
        const std::size_t last_page = (first + count - 1) / page_tokens_;
        parallel_for(workers, last_page - first_page + 1, [&](std::size_t i) {
            const std::size_t page = first_page + i;
            const std::size_t begin = std::max(first, page * page_tokens_);
            const std::size_t end = page == last_page ? first + count : (page + 1) * page_tokens_;
            body(page, begin - page * page_tokens_, piece{begin - first, end - begin});
        });
    }

    /// A block of tokens in the workspace: each depth's codes in one run, as pages hold them.
    [[nodiscard]] mutable_encoded_view view(kv_workspace& workspace, std::size_t tokens) const noexcept {
        return {workspace.codes.data(),
                {1, tokens * layout_.codes_per_token()},
                config_.codec->stores_scale() ? workspace.scales.data() : nullptr};
    }
    /// A block from its token number `first` on.
    [[nodiscard]] mutable_encoded_view slice(mutable_encoded_view block, std::size_t first) const noexcept {
        return {block.codes + first * layout_.codes_per_token(), block.strides,
                block.scales == nullptr ? nullptr : block.scales + first * config_.heads};
    }

    kv_side_config config_;
    side_layout layout_;
    std::size_t page_tokens_ = 1;
    std::size_t block_tokens_ = 1;
    const char* name_ = "";
    std::size_t layer_ = 0;
};

}  // namespace detail
RVQKV_NAMESPACE_END
