// SPDX-License-Identifier: MIT
/// @file
/// The KV cache: the keys and values of a sequence, held as codes and given back as numbers.
#pragma once

#include "rvqkv/cache/cache_side.hpp"
#include "rvqkv/cache/page_layout.hpp"
#include "rvqkv/cache/page_table.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/simd_level.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/codec.hpp"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// One layer of the model.
struct kv_layer_config {
    kv_side_config keys;
    kv_side_config values;
};

/// Shape of a cache. For 32 equal layers of 8 heads: `config.layers.assign(32, {{key_codec, 8}, {value_codec, 8}})`.
struct kv_cache_config {
    std::vector<kv_layer_config> layers;
    std::size_t page_tokens = 64;  ///< Tokens of one allocation; a multiple of 64 wastes no padding.

    /// Errors: `invalid_argument` naming the layer, side and field that makes no sense, and its value.
    [[nodiscard]] status validate() const {
        // Enough for any model, and no product of extents overflows.
        constexpr std::size_t most = 65536;
        const auto wrong = [](const std::string& where, std::size_t value) {
            return error{error_code::invalid_argument,
                         where + " is " + std::to_string(value) + ", must be from 1 to " + std::to_string(most)};
        };
        if (layers.empty()) {
            return error{error_code::invalid_argument, "layers is empty, a cache needs at least 1"};
        }
        if (page_tokens == 0 || page_tokens > most) {
            return wrong("page_tokens", page_tokens);
        }
        for (std::size_t i = 0; i < layers.size(); ++i) {
            for (const kv_side_config* side : {&layers[i].keys, &layers[i].values}) {
                if (side->codec != nullptr && side->heads != 0 && side->heads <= most) {
                    continue;
                }
                const std::string where =
                    "layer " + std::to_string(i) + (side == &layers[i].keys ? " keys: " : " values: ");
                if (side->codec == nullptr) {
                    return error{error_code::invalid_argument, where + "codec is null"};
                }
                return wrong(where + "heads", side->heads);
            }
        }
        return {};
    }
};

/// What an append found in its input besides numbers; tokens count from the append's first.
struct kv_encode_report {
    encode_report keys;
    encode_report values;
};

/// Memory that a cache holds, in bytes. A page counts whole as soon as it holds one token.
struct kv_cache_bytes {
    std::size_t codes = 0;        ///< Of pages in use.
    std::size_t scales = 0;       ///< Of pages in use.
    std::size_t padding = 0;      ///< Of pages in use, so that parts are aligned.
    std::size_t page_tables = 0;  ///< Page tables, and the cache's record of each layer.
    std::size_t workspace = 0;    ///< Scratch memory of `append`.
    std::size_t free_pages = 0;   ///< Pages without tokens, kept for later ones.
    /// Sum of the above: all memory that the cache has asked of `operator new`. The `kv_cache` object itself and the
    /// codecs, which others may share, are not in it.
    [[nodiscard]] std::size_t total() const noexcept {
        return codes + scales + padding + page_tables + workspace + free_pages;
    }
    std::size_t codecs = 0;  ///< Not in the total: the codecs, each counted once (`codec::bytes`).
};

/// The compressed keys and values of one sequence, for every layer of a model.
///
/// A layer's tokens lie in pages of `page_tokens` tokens; a page is one allocation, aligned to 64 bytes:
///
///     | keys: scales | keys: depth 0 | depth 1 | ... | values: scales | values: depth 0 | depth 1 | ... |
///
/// with the scales of `[token, head]` as the codec stores them, and in each depth the codes of `[token, head, group]`
/// packed to `codec::bits_per_code()` bits (see `side_layout`). So a reader of fewer depths skips the others, and
/// memory approaches `codec::bits_per_row()` for each head's vector. Above that: padding (none if `page_tokens` is a
/// multiple of 64, but to round the page up to 64 bytes), 16 to 32 bytes of page table for each page, and the empty
/// part of the last page.
///
/// Codes come from `codec::encode` only, or are the zeros of a new page: they are always below `codewords`.
///
/// Threads: one writer (`append`, `reserve`, `truncate`, `clear`, `release_free_pages`) at a time. Any number of
/// readers of a layer at once, each with a workspace of its own, while no writer works on that layer (`reserve`,
/// `clear`, `release_free_pages` and `truncate` without a layer write to all; `bytes` reads all).
/// Errors:  an operation that fails leaves the cache as it was, `bytes()` included.
class kv_cache {
public:
    /// Every depth that the codec has.
    static constexpr std::size_t all_depths = std::numeric_limits<std::size_t>::max();

    /// An empty cache. The codecs are shared, the rest of the configuration is copied.
    /// Errors: `invalid_argument` from `kv_cache_config::validate`; `out_of_memory`; what `choose_simd_level` reports
    ///         for a bad `RVQKV_SIMD`.
    [[nodiscard]] static result<kv_cache> create(const kv_cache_config& config) {
        if (status wrong = config.validate(); !wrong) {
            return wrong.error();
        }
        if (auto level = choose_simd_level(); !level) {
            return level.error();
        }
        auto layers = detail::nothrow_array<layer_record>::allocate(config.layers.size());
        if (!layers) {
            return layers.error();
        }
        kv_cache cache;
        cache.page_tokens_ = config.page_tokens;
        cache.layers_ = std::move(layers).value();
        for (std::size_t i = 0; i < config.layers.size(); ++i) {
            cache.layers_[i] = layer_record(config.layers[i], i, config.page_tokens);
        }
        auto workspace = cache.make_workspace();
        if (!workspace) {
            return workspace.error();
        }
        cache.workspace_ = std::move(workspace).value();
        cache.codec_bytes_ = cache.count_codec_bytes();
        return cache;
    }

    kv_cache(kv_cache&&) noexcept = default;
    kv_cache& operator=(kv_cache&&) noexcept = default;

    [[nodiscard]] std::size_t layers() const noexcept { return layers_.size(); }
    [[nodiscard]] std::size_t page_tokens() const noexcept { return page_tokens_; }
    /// What codes a layer's keys. Precondition: `layer < layers()`.
    [[nodiscard]] const kv_side_config& keys(std::size_t layer) const noexcept { return layers_[layer].keys.config(); }
    /// What codes a layer's values. Precondition: `layer < layers()`.
    [[nodiscard]] const kv_side_config& values(std::size_t layer) const noexcept {
        return layers_[layer].values.config();
    }
    /// Tokens that a layer holds. Precondition: `layer < layers()`.
    [[nodiscard]] std::size_t tokens(std::size_t layer) const noexcept { return layers_[layer].tokens; }
    /// Tokens that a layer can hold before `append` must allocate. Precondition: `layer < layers()`.
    [[nodiscard]] std::size_t capacity(std::size_t layer) const noexcept {
        return layers_[layer].pages.size() * page_tokens_;
    }

    /// Encodes a layer's next tokens and keeps their codes.
    /// Shapes:     `keys` `[token, head, head_dim]` and `values` `[token, head, head_dim]`, each with the heads and
    ///             head_dim of its side, both with the same number of tokens; any element type and strides. No tokens:
    ///             shapes are checked, nothing else is done.
    /// Errors:     `invalid_argument` for a layer or shape that does not fit; `out_of_memory`. The cache, and
    ///             `report`, are as they were then. NaNs and infinities are encoded as 0, and counted in `report`
    ///             if one is given; other vectors are not affected.
    /// Threads:    none of its own; with `workers`, many tokens (a prompt) are split over them, and few are not.
    /// Complexity: as `codec::encode`, and a copy of the codes; independent of the tokens held. Allocates pages that
    ///             `capacity` lacks, scratch memory when there are more workers than in any call before, and nothing
    ///             else, given codecs that ask no more of a `quantizer_workspace` than `vector_quantizer` does; one
    ///             that does allocates that on its first append.
    /// Numerics:   the same codes at every SIMD level, with any workers and however appends are split.
    [[nodiscard]] status append(std::size_t layer, const tensor_view& keys, const tensor_view& values,
                                kv_encode_report* report = nullptr, const executor& workers = serial_executor()) {
        if (status wrong = check_layer(layer); !wrong) {
            return wrong;
        }
        layer_record& record = layers_[layer];
        if (status wrong = record.keys.check(keys.shape()); !wrong) {
            return wrong;
        }
        if (status wrong = record.values.check(values.shape()); !wrong) {
            return wrong;
        }
        if (keys.tokens() != values.tokens()) {
            return record.values.wrong("tokens is " + std::to_string(values.tokens()) + ", must be the keys' " +
                                       std::to_string(keys.tokens()));
        }
        const std::size_t tokens = keys.tokens();
        if (tokens == 0) {
            return {};
        }
        if (tokens > std::numeric_limits<std::size_t>::max() - record.tokens) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        auto prepared = record.pages.prepare(pages_for(record.tokens + tokens));
        if (!prepared) {
            return prepared.error();
        }
        detail::page_table::growth growth = std::move(prepared).value();
        kv_workspace larger;
        if (status grown = grow(larger, workers); !grown) {
            return grown;
        }
        kv_workspace& workspace = larger.bytes() != 0 ? larger : workspace_;
        // Codes go into the free end of the last page and into pages that the table does not know yet: until the
        // commit below, nobody sees them.
        const auto page = [&record, &growth](std::size_t i) {
            const std::size_t held = record.pages.size();
            return i < held ? record.pages.page(i) : growth.pages[i - held].data();
        };
        kv_encode_report found;
        if (status encoded = record.keys.encode(keys, record.tokens, page, workspace, found.keys, workers); !encoded) {
            return encoded;
        }
        if (status encoded = record.values.encode(values, record.tokens, page, workspace, found.values, workers);
            !encoded) {
            return encoded;
        }
        record.pages.adopt(std::move(growth));
        adopt(std::move(larger), workers);
        record.tokens += tokens;
        if (report != nullptr) {
            report->keys.add(found.keys);
            report->values.add(found.values);
        }
        return {};
    }

    /// Reconstructs keys `[first_token, first_token + out.tokens())` of a layer from the first `depths` depths.
    /// Shapes:     `out` `[token, head, head_dim]`, any element type and strides; no tokens is a range, too.
    /// Errors:     `invalid_argument` for a layer, range, shape or number of depths that the cache does not have;
    ///             `out_of_memory` when the workspace cannot grow (one from `make_workspace` need not). Nothing is
    ///             written then.
    /// Threads:    concurrent calls with different workspaces are safe.
    /// Complexity: as `codec::decode`, and a copy of the codes; bytes of depths not asked for are not read.
    /// Numerics:   as `codec::decode`, whatever the range.
    [[nodiscard]] status reconstruct_keys(std::size_t layer, std::size_t first_token, const mutable_tensor_view& out,
                                          kv_workspace& workspace, std::size_t depths = all_depths) const {
        return reconstruct(layer, &layer_record::keys, first_token, out, depths, workspace);
    }
    /// The same with a workspace for this call alone, which is allocated.
    [[nodiscard]] status reconstruct_keys(std::size_t layer, std::size_t first_token, const mutable_tensor_view& out,
                                          std::size_t depths = all_depths) const {
        kv_workspace workspace;
        return reconstruct(layer, &layer_record::keys, first_token, out, depths, workspace);
    }
    /// Reconstructs values; the rest as `reconstruct_keys`.
    [[nodiscard]] status reconstruct_values(std::size_t layer, std::size_t first_token, const mutable_tensor_view& out,
                                            kv_workspace& workspace, std::size_t depths = all_depths) const {
        return reconstruct(layer, &layer_record::values, first_token, out, depths, workspace);
    }
    /// The same with a workspace for this call alone, which is allocated.
    [[nodiscard]] status reconstruct_values(std::size_t layer, std::size_t first_token, const mutable_tensor_view& out,
                                            std::size_t depths = all_depths) const {
        kv_workspace workspace;
        return reconstruct(layer, &layer_record::values, first_token, out, depths, workspace);
    }

    /// A workspace large enough for every layer: reading with it allocates nothing.
    /// Errors: `out_of_memory`.
    [[nodiscard]] result<kv_workspace> make_workspace() const { return make_workspace(serial_executor()); }

    /// Makes room for `tokens` tokens in all, in every layer; appends (with no more workers than these) allocate
    /// nothing until then.
    /// Errors: `out_of_memory`. Complexity: O(pages held and new).
    [[nodiscard]] status reserve(std::size_t tokens, const executor& workers = serial_executor()) {
        kv_workspace larger;
        if (status grown = grow(larger, workers); !grown) {
            return grown;
        }
        auto prepared = detail::nothrow_array<detail::page_table::growth>::allocate(layers());
        if (!prepared) {
            return prepared.error();
        }
        detail::nothrow_array<detail::page_table::growth> growths = std::move(prepared).value();
        for (std::size_t i = 0; i < layers(); ++i) {
            auto growth = layers_[i].pages.prepare(pages_for(tokens));
            if (!growth) {
                return growth.error();
            }
            growths[i] = std::move(growth).value();
        }
        for (std::size_t i = 0; i < layers(); ++i) {
            layers_[i].pages.adopt(std::move(growths[i]));
        }
        adopt(std::move(larger), workers);
        return {};
    }

    /// Drops a layer's tokens from number `tokens` on; their pages are kept for later ones.
    /// Errors: `invalid_argument` when the layer does not hold as many. Complexity: O(1).
    [[nodiscard]] status truncate(std::size_t layer, std::size_t tokens) {
        if (status wrong = check_layer(layer); !wrong) {
            return wrong;
        }
        if (status wrong = check_truncate(layer, tokens); !wrong) {
            return wrong;
        }
        layers_[layer].tokens = tokens;
        return {};
    }
    /// The same for all layers, which may hold more tokens in some than in others (as in the middle of a model's pass).
    /// Errors: `invalid_argument` when one layer does not hold as many; none is truncated then.
    [[nodiscard]] status truncate(std::size_t tokens) {
        for (std::size_t i = 0; i < layers(); ++i) {
            if (status wrong = check_truncate(i, tokens); !wrong) {
                return wrong;
            }
        }
        for (layer_record& record : layers_) {
            record.tokens = tokens;
        }
        return {};
    }
    /// Drops all tokens; pages are kept for later ones.
    void clear() noexcept {
        for (layer_record& record : layers_) {
            record.tokens = 0;
        }
    }
    /// Gives back the pages that hold no token.
    void release_free_pages() noexcept {
        for (layer_record& record : layers_) {
            record.pages.shrink(pages_for(record.tokens));
        }
    }

    /// Memory held, by what it is for. Complexity: O(layers).
    [[nodiscard]] kv_cache_bytes bytes() const noexcept {
        kv_cache_bytes bytes;
        bytes.page_tables = layers_.bytes();
        bytes.workspace = workspace_.bytes();
        bytes.codecs = codec_bytes_;
        for (const layer_record& record : layers_) {
            const std::size_t used = pages_for(record.tokens);
            const std::size_t codes = record.keys.layout().code_bytes() + record.values.layout().code_bytes();
            const std::size_t scales = record.keys.layout().scale_bytes() + record.values.layout().scale_bytes();
            bytes.codes += used * codes;
            bytes.scales += used * scales;
            bytes.padding += used * (record.pages.page_bytes() - codes - scales);
            bytes.page_tables += record.pages.table_bytes();
            bytes.free_pages += (record.pages.size() - used) * record.pages.page_bytes();
        }
        return bytes;
    }

    /// Where a layer's keys lie in its pages, for code that reads them as they are stored.
    /// Precondition: `layer < layers()`.
    [[nodiscard]] const side_layout& keys_layout(std::size_t layer) const noexcept {
        return layers_[layer].keys.layout();
    }
    /// The same for its values. Precondition: `layer < layers()`.
    [[nodiscard]] const side_layout& values_layout(std::size_t layer) const noexcept {
        return layers_[layer].values.layout();
    }
    /// The page that holds tokens `[i * page_tokens(), (i + 1) * page_tokens())` of a layer, valid until the next
    /// write. What it says of tokens that the layer does not hold is unspecified.
    /// Precondition: `layer < layers()`, `i * page_tokens() < tokens(layer)`.
    [[nodiscard]] std::span<const std::byte> page(std::size_t layer, std::size_t i) const noexcept {
        return {layers_[layer].pages.page(i), layers_[layer].pages.page_bytes()};
    }

private:
    static constexpr std::size_t all_tokens = std::numeric_limits<std::size_t>::max();

    struct layer_record {
        detail::cache_side keys;
        detail::cache_side values;
        detail::page_table pages;
        std::size_t tokens = 0;

        layer_record() = default;
        layer_record(const kv_layer_config& config, std::size_t layer, std::size_t page_tokens) noexcept
            : keys(config.keys, "keys", layer, page_tokens, 0),
              values(config.values, "values", layer, page_tokens, keys.layout().end()),
              pages((values.layout().end() + buffer_alignment - 1) / buffer_alignment * buffer_alignment) {}
    };

    kv_cache() = default;

    [[nodiscard]] result<kv_workspace> make_workspace(const executor& workers) const {
        kv_workspace workspace;
        for (const layer_record& record : layers_) {
            for (const detail::cache_side* side : {&record.keys, &record.values}) {
                if (status grown = side->reserve(workspace, all_tokens, workers); !grown) {
                    return grown.error();
                }
            }
        }
        return workspace;
    }
    /// Makes `larger` a workspace for these workers if the cache's own is too small for them.
    [[nodiscard]] status grow(kv_workspace& larger, const executor& workers) const {
        if (workers.concurrency() <= workers_) {
            return {};
        }
        auto made = make_workspace(workers);
        if (!made) {
            return made.error();
        }
        larger = std::move(made).value();
        return {};
    }
    /// Takes what `grow` has made, if anything.
    void adopt(kv_workspace larger, const executor& workers) noexcept {
        if (larger.bytes() != 0) {
            workspace_ = std::move(larger);
            workers_ = workers.concurrency();
        }
    }

    [[nodiscard]] status check_layer(std::size_t layer) const {
        if (layer >= layers()) {
            return error{error_code::invalid_argument,
                         "layer is " + std::to_string(layer) + ", the cache has " + std::to_string(layers())};
        }
        return {};
    }
    [[nodiscard]] status check_truncate(std::size_t layer, std::size_t tokens) const {
        if (tokens > layers_[layer].tokens) {
            return error{error_code::invalid_argument, "layer " + std::to_string(layer) + ": cannot truncate to " +
                                                           std::to_string(tokens) + " tokens, it holds " +
                                                           std::to_string(layers_[layer].tokens)};
        }
        return {};
    }

    [[nodiscard]] std::size_t pages_for(std::size_t tokens) const noexcept {
        return tokens / page_tokens_ + (tokens % page_tokens_ != 0 ? 1 : 0);
    }

    [[nodiscard]] status reconstruct(std::size_t layer, detail::cache_side layer_record::*which, std::size_t first,
                                     const mutable_tensor_view& out, std::size_t depths,
                                     kv_workspace& workspace) const {
        if (status wrong = check_layer(layer); !wrong) {
            return wrong;
        }
        const layer_record& record = layers_[layer];
        const detail::cache_side& side = record.*which;
        const std::size_t held = side.config().codec->depths();
        if (status wrong = side.check(out.shape()); !wrong) {
            return wrong;
        }
        if (first > record.tokens || out.tokens() > record.tokens - first) {
            return side.wrong("first_token is " + std::to_string(first) + " and the output has " +
                              std::to_string(out.tokens()) + " tokens, the layer holds " +
                              std::to_string(record.tokens));
        }
        if (depths != all_depths && depths > held) {
            return side.wrong("depths is " + std::to_string(depths) + ", the codec has " + std::to_string(held));
        }
        return side.decode(
            first, [&record](std::size_t i) { return record.pages.page(i); }, out, std::min(depths, held), workspace);
    }

    /// Bytes of the codecs, each counted once.
    [[nodiscard]] std::size_t count_codec_bytes() const noexcept {
        const auto codec_at = [this](std::size_t i) {
            const layer_record& record = layers_[i / 2];
            return (i % 2 == 0 ? record.keys : record.values).config().codec.get();
        };
        std::size_t bytes = 0;
        for (std::size_t i = 0; i < 2 * layers(); ++i) {
            std::size_t first = 0;
            while (codec_at(first) != codec_at(i)) {
                ++first;
            }
            bytes += first == i ? codec_at(i)->bytes() : 0;
        }
        return bytes;
    }

    std::size_t page_tokens_ = 1;
    detail::nothrow_array<layer_record> layers_;
    kv_workspace workspace_;   // of appends
    std::size_t workers_ = 1;  // for which it is large enough
    std::size_t codec_bytes_ = 0;
};

RVQKV_NAMESPACE_END
