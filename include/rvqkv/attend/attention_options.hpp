// SPDX-License-Identifier: MIT
/// @file
/// What attention may be asked to do beside softmax(q k) v, and the memory that it works in.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/config.hpp"

#include <cstddef>
#include <cstdint>
#include <span>

RVQKV_NAMESPACE_BEGIN

/// The scores of one query for some neighbouring tokens, on their way to the softmax.
struct score_block {
    std::size_t query_token = 0;  ///< Number in this call.
    std::size_t query_head = 0;
    std::int64_t query_position = 0;
    std::int64_t key_position = 0;  ///< Of the first token; the others follow.
    std::size_t tokens = 0;
    float* scores = nullptr;  ///< `[tokens]`; -infinity masks one.
};

/// Called for every query and every piece of the sequence, from any of the workers, several at a time.
struct score_hook {
    void (*edit)(void* context, const score_block& block) = nullptr;
    void* context = nullptr;
};

/// How codes are read.
enum class code_reading {
    /// The quickest way for the codebooks' shapes, the number of tokens and the processor. Ways through tables round
    /// what
    /// they look up: the output is within 1 % of what `reconstructed` gives, and differs between SIMD levels.
    quickest,
    /// As reconstruction gives them, up to the rounding of float32.
    reconstructed,
};

/// A score is made in this order: `scale * <query, key>`, soft cap, ALiBi, hook, mask.
struct attention_options {
    float scale = 0.0F;     ///< 0: 1 / sqrt(head_dim).
    bool causal = true;     ///< Whether queries see no token at a later position than their own.
    float soft_cap = 0.0F;  ///< Scores become `cap * tanh(score / cap)`; 0: they stay.
    std::span<const float>
        alibi_slopes;  ///< `[query head]`: a score gains slope * (key's - query's position); or empty.
    std::span<const float> sink_logits;  ///< `[query head]`: one more score, of a token whose value is 0; or empty.
    score_hook hook;
    code_reading reading = code_reading::quickest;
};

/// Scratch memory of attention, reused from call to call. Threads: one for each caller; a call that is split over
/// workers shares its own out among them.
struct attention_workspace {
    aligned_buffer<std::byte> memory;
    [[nodiscard]] std::size_t bytes() const noexcept { return memory.bytes(); }
};

RVQKV_NAMESPACE_END
