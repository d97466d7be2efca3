// SPDX-License-Identifier: MIT
/// @file
/// What attention on codes is measured against: attention over float16 keys and values, written for this machine and
/// bound by its memory. Plain pointers only, so that nothing else is compiled with this file's flags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bench {

/// The shape that the dense kernel is written for: four query heads share each KV head of 128 channels.
inline constexpr std::size_t dense_group = 4;
inline constexpr std::size_t dense_head_dim = 128;
/// Tokens whose keys lie together, channel by channel.
inline constexpr std::size_t dense_block = 64;
/// Tokens that are read ahead: so many must follow the last, whatever they hold.
inline constexpr std::size_t dense_ahead = dense_block;

/// Whether this machine has what the kernel is written in (AVX-512).
bool has_dense_attention() noexcept;

/// One KV head. `keys` are float16 `[tokens / 64, 128, 64]`: 64 tokens side by side, so that scores need no sum over
/// the lanes of a register, which costs a tenth of the speed; `values` `[tokens, 128]`; `queries` `[4, 128]`, scaled;
/// `out`
/// `[4, 128]`. Precondition: `tokens` is a multiple of 64.
void dense_attention(const std::uint16_t* keys, const std::uint16_t* values, std::size_t tokens, const float* queries,
                     float* out);

}  // namespace bench
