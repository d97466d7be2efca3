// SPDX-License-Identifier: MIT
/// @file
/// One layer of Llama-3-8B's shape for the attention benchmarks: 8 KV heads of 128 channels, 32 query heads. What we
/// and the rivals read lies in huge pages, is made once and for the longest context, and shorter ones read its first
/// tokens: some 1.5 GB if all benchmarks run.
#pragma once

#include "dense_attention.hpp"
#include "rvqkv/attend/layer_config.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "support/data.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace bench {

inline constexpr std::size_t kv_heads = 8;
inline constexpr std::size_t query_heads = kv_heads * dense_group;
inline constexpr std::size_t head_dim = dense_head_dim;
inline constexpr std::size_t contexts[] = {4096, 32768, 131072};
inline constexpr std::size_t longest_context = contexts[2];

/// Zeroed memory in huge pages where the system has them: what an engine's arena is.
class arena {
public:
    explicit arena(std::size_t bytes);
    arena(const arena&) = delete;
    arena& operator=(const arena&) = delete;
    ~arena();
    [[nodiscard]] std::byte* data() const noexcept { return data_; }
    [[nodiscard]] std::span<std::byte> span() const noexcept { return {data_, bytes_}; }

private:
    std::size_t bytes_;
    std::byte* data_;
};

/// What a layer's keys and values are coded by, both sides alike, but that small codebooks of values are rounded to a
/// byte grid. Every codebook has a power of two of codewords: any bits are codes.
struct preset {
    const char* name;
    rvqkv::codebook_shape shape;
    rvqkv::key_coding coding;
    bool has_mean;
};
inline constexpr preset fast{"fast", {3, 128, 8}, rvqkv::key_coding::after_rope, false};
inline constexpr preset smallest{"smallest", {3, 16, 4}, rvqkv::key_coding::after_rope, false};
inline constexpr preset paper_keys{"paper", {8, 2048, 32}, rvqkv::key_coding::before_rope, false};
inline constexpr preset presets[] = {fast,
                                     {"fast_mean", {3, 128, 8}, rvqkv::key_coding::after_rope, true},
                                     smallest,
                                     paper_keys,
                                     {"paper_tables", {8, 2048, 32}, rvqkv::key_coding::after_rope, false}};

/// Our layer of a preset.
rvqkv::kv_layer_config layer_config(const preset& given);

/// `[query head, channel]`, normally distributed.
const std::vector<float>& attention_queries();

/// Keys and values in float16 for the dense kernel: random, of magnitudes from 1/8 to 2.
const std::uint16_t* dense_keys(std::size_t head);    ///< `[tokens / 64, 128, 64]`
const std::uint16_t* dense_values(std::size_t head);  ///< `[tokens, 128]`

/// A KV head's attention by the dense kernel over the first `tokens` tokens of any keys and values in its layout.
void dense_head(const std::uint16_t* keys, const std::uint16_t* values, std::size_t tokens, std::size_t head,
                float* out);

/// "/tokens:4096/threads:1"
std::string context_label(std::size_t tokens, std::size_t threads = 1);

}  // namespace bench
