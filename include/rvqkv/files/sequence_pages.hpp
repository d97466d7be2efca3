// SPDX-License-Identifier: MIT
/// @file
/// Pages on their way to a file and back, and the text by which a file tells one cache from another.
#pragma once

#include "rvqkv/attend/layer_config.hpp"
#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/readers.hpp"
#include "rvqkv/cache/cache_core.hpp"
#include "rvqkv/cache/cache_layer.hpp"
#include "rvqkv/cache/cache_side.hpp"
#include "rvqkv/cache/exact_rows.hpp"
#include "rvqkv/cache/kv_sequence.hpp"
#include "rvqkv/cache/layer_tokens.hpp"
#include "rvqkv/cache/page_stock.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/nothrow_array.hpp"
#include "rvqkv/files/checksum.hpp"
#include "rvqkv/files/compressed_tensor.hpp"
#include "rvqkv/files/sequence_table.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN
namespace detail {

struct sequence_access {
    [[nodiscard]] static cache_core* core(const kv_sequence& of) noexcept { return of.core_ ? &*of.core_ : nullptr; }
    [[nodiscard]] static nothrow_array<layer_tokens>& layers(kv_sequence& of) noexcept { return of.layers_; }
    [[nodiscard]] static const nothrow_array<layer_tokens>& layers(const kv_sequence& of) noexcept {
        return of.layers_;
    }
    [[nodiscard]] static page_stock& stock(kv_sequence& of) noexcept { return of.stock_; }
};

// ---- Bytes of pages ----

/// Bytes of one exact token, both sides.
[[nodiscard]] inline std::size_t exact_token_bytes(const page_format& format) noexcept {
    return 2 * (format.exact_keys.heads() * format.exact_keys.head_dim() +
                format.exact_values.heads() * format.exact_values.head_dim());
}
/// What a page takes in a file: of exact ones only so many tokens are stored, of codes all.
[[nodiscard]] inline std::size_t saved_page_bytes(const page_format& format, std::size_t tokens) noexcept {
    return format.is_exact ? (tokens * exact_token_bytes(format) + 7) / 8 * 8 : format.coded_values.end();
}

/// Calls `body(offset in the page, offset in the file's page, bytes)` for every stretch of exact tokens
/// `[first, first + tokens)`, which a file has as `[side, head, token, channel]`.
template <class Body>
void for_each_exact_stretch(const page_format& format, std::size_t first, std::size_t tokens, const Body& body) {
    std::size_t saved = 0;
    for (const exact_layout* side : {&format.exact_keys, &format.exact_values}) {
        const std::size_t bytes = tokens * side->head_dim() * 2;
        for (std::size_t head = 0; head < side->heads(); ++head, saved += bytes) {
            body(side->row(head, first), saved, bytes);
        }
    }
}

/// A page as a file has it: its own memory, or `scratch`, which is large enough.
[[nodiscard]] inline std::span<const std::byte> gather_page(const page_format& format, const std::byte* page,
                                                            std::size_t first, std::size_t tokens,
                                                            std::span<std::byte> scratch) noexcept {
    const std::size_t bytes = saved_page_bytes(format, tokens);
    if (!format.is_exact) {
        return {page, bytes};
    }
    std::memset(scratch.data() + bytes - std::min<std::size_t>(bytes, 8), 0, std::min<std::size_t>(bytes, 8));
    for_each_exact_stretch(format, first, tokens, [&](std::size_t from, std::size_t to, std::size_t count) {
        std::memcpy(scratch.data() + to, page + from, count);
    });
    return {scratch.data(), bytes};
}
/// The inverse; tokens that are not stored become zeros.
inline void scatter_page(const page_format& format, std::span<const std::byte> saved, std::size_t first,
                         std::size_t tokens, std::byte* page) noexcept {
    if (!format.is_exact) {
        std::memcpy(page, saved.data(), saved.size());
        std::memset(page + saved.size(), 0, format.bytes - saved.size());
        return;
    }
    std::memset(page, 0, format.bytes);
    for_each_exact_stretch(format, first, tokens, [&](std::size_t to, std::size_t from, std::size_t count) {
        std::memcpy(page + to, saved.data() + from, count);
    });
}

// ---- Contents of pages ----

/// What no cache holds: codes beyond the codebook, scales below 0 or not finite. An empty text if all is well.
[[nodiscard]] inline std::string_view fault_of_codes(const coded_layout& side, std::size_t codewords,
                                                     std::size_t page_tokens, const std::byte* page) noexcept {
    code_t codes[tile_tokens];
    const bool all_codes_exist = codewords == std::size_t{1} << side.bits();
    const std::size_t places = side.depths() * side.groups();
    const std::size_t rows = all_codes_exist ? 0 : side.heads() * places;
    for (std::size_t row = 0; row < rows; ++row) {
        const std::byte* const packed = page + side.row(0, row / places, 0) + row % places * side.row_bytes();
        for (std::size_t first = 0; first < page_tokens; first += tile_tokens) {
            unpack_codes(packed, first, tile_tokens, side.bits(), codes);
            if (*std::max_element(codes, codes + tile_tokens) >= codewords) {
                return "a code is not below the codec's codewords";
            }
        }
    }
    float scales[tile_tokens];
    for (std::size_t first = 0; side.has_scales() && first < side.heads() * page_tokens; first += tile_tokens) {
        load_scales(page_tile{page, first % page_tokens / tile_tokens}, side, first / page_tokens, best_kernels(),
                    scales);
        if (!std::all_of(scales, scales + tile_tokens, [](float x) { return x >= 0.0F && std::isfinite(x); })) {
            return "a scale is not finite or below 0";
        }
    }
    return {};
}
/// The same for a whole page, in which exact numbers are finite, too.
[[nodiscard]] inline std::string_view fault_of_page(const cache_layer& layer, const page_format& format,
                                                    const std::byte* page) noexcept {
    if (format.is_exact) {
        for (const exact_layout* side : {&format.exact_keys, &format.exact_values}) {
            const std::size_t numbers = (side->end() - side->begin()) / 2;
            if (has_nonfinite(cache_side::numbers(page + side->begin()), numbers, side->type(), best_kernels())) {
                return "an exact number is not finite";
            }
        }
        return {};
    }
    const std::string_view keys =
        fault_of_codes(format.coded_keys, layer.keys().codec().shape().codewords, format.tokens, page);
    return !keys.empty()
               ? keys
               : fault_of_codes(format.coded_values, layer.values().codec().shape().codewords, format.tokens, page);
}

// ---- What a cache is like ----

/// Words "name=value" for a text that is compared word by word.
class word_list {
public:
    explicit word_list(std::string& text) noexcept : text_(text) {}
    /// Begins a line.
    word_list& line(const std::string& heading) {
        text_ += (text_.empty() ? "" : "\n") + heading + ':';
        return *this;
    }
    word_list& add(std::string_view name, std::string_view value) {
        text_.append(" ").append(name).append("=").append(value);
        return *this;
    }
    word_list& add(std::string_view name, std::size_t value) { return add(name, std::to_string(value)); }
    word_list& add(std::string_view name, double value) {
        char digits[32];
        const auto end = std::to_chars(digits, digits + sizeof(digits), value, std::chars_format::general).ptr;
        return add(name, std::string_view(digits, static_cast<std::size_t>(end - digits)));
    }
    /// Numbers by their checksum.
    template <class T>
    word_list& add(std::string_view name, const std::vector<T>& numbers) {
        checksum sum;
        sum.update(std::as_bytes(std::span(numbers)));
        return add(name, numbers.empty() ? std::string("none") : sum.hex());
    }

private:
    std::string& text_;
};

[[nodiscard]] inline std::string_view name_of(key_coding coding) noexcept {
    switch (coding) {
        case key_coding::as_given: return "as_given";
        case key_coding::before_rope: return "before_rope";
        case key_coding::after_rope: return "after_rope";
        case key_coding::block_relative: return "block_relative";
    }
    return "unknown";
}

/// All that decides what the bytes of a cache's pages mean, and which tokens become codes when.
/// Errors: `invalid_argument` for a codec that a file cannot describe.
[[nodiscard]] inline result<std::string> describe_cache(cache_core& core) {
    std::string text;
    word_list words(text);
    words.line("cache")
        .add("layers", core.layers())
        .add("page_tokens", core.page_tokens())
        .add("sink_tokens", core.layer(0).sink_tokens())
        .add("recent_tokens", core.layer(0).recent_tokens());
    std::map<const codec*, std::string> fingerprints;
    for (std::size_t i = 0; i < core.layers(); ++i) {
        const cache_layer& layer = core.layer(i);
        const kv_layer_config& config = layer.config();
        const std::string heading = "layer " + std::to_string(i);
        words.line(heading);
        if (!layer.has_tokens()) {
            words.add("cache_of", layer.owner() == i ? "none" : "layer-" + std::to_string(layer.owner()));
            continue;
        }
        words.add("coding", name_of(config.coding))
            .add("exact_type", name_of(layer.exact().format.exact_keys.type()))
            .add("sliding_window", config.sliding_window)
            .add("key_mean", config.key_mean);
        if (config.coding == key_coding::block_relative) {
            words.add("block_tokens", config.block_tokens);
        }
        if (config.coding != key_coding::as_given) {
            words.add("turned_input", config.turned_input ? "yes" : "no")
                .add("rope_pairs", config.rope.pairs == rope_pairs::half_split ? "half_split" : "interleaved")
                .add("rope_dims", config.rope.dims == 0 ? config.keys.codec->head_dim() : config.rope.dims)
                .add("rope_base", config.rope.base)
                .add("rope_position_scale", config.rope.position_scale)
                .add("rope_frequencies", config.rope.frequencies)
                .add("rope_attention_factor", config.rope.attention_factor);
        }
        for (const bool is_keys : {true, false}) {
            const kv_side_config& side = is_keys ? config.keys : config.values;
            std::string& fingerprint = fingerprints[side.codec.get()];
            if (fingerprint.empty()) {
                auto made = codec_fingerprint(*side.codec);
                if (!made) {
                    return layer.side(is_keys).wrong(made.error().message);
                }
                fingerprint = std::move(made).value();
            }
            words.line(heading + (is_keys ? " keys" : " values"))
                .add("heads", side.heads)
                .add("head_dim", side.codec->head_dim())
                .add("group_dim", side.codec->shape().dim)
                .add("depths", side.codec->depths())
                .add("codewords", side.codec->shape().codewords)
                .add("codec", fingerprint);
        }
    }
    return text;
}

/// Errors: `invalid_argument` naming the first difference.
[[nodiscard]] inline status check_description(const std::string& name, std::string_view saved,
                                              std::string_view wanted) {
    if (saved == wanted) {
        return {};
    }
    const auto differ = std::mismatch(saved.begin(), saved.end(), wanted.begin(), wanted.end());
    const auto at = static_cast<std::size_t>(differ.first - saved.begin());
    // The word and the line that it is in begin where both texts are still the same.
    const std::string_view same = wanted.substr(0, at);
    const std::size_t word = same.find_last_of(" \n") + 1;
    const std::size_t line = same.find_last_of('\n') + 1;
    const auto word_of = [word](std::string_view text) {
        return in_quotes(text.substr(word, text.find_first_of(" \n", word) - word));
    };
    const std::string_view heading = wanted.substr(line, wanted.find(':', line) - line);
    return error{error_code::invalid_argument, name + ": was saved from another cache: " + std::string(heading) +
                                                   ": the file has " + word_of(saved) + ", the cache has " +
                                                   word_of(wanted)};
}

}  // namespace detail
RVQKV_NAMESPACE_END
