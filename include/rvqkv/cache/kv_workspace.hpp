// SPDX-License-Identifier: MIT
/// @file
/// Scratch memory of one writer or reader of a cache.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/nothrow_array.hpp"
#include "rvqkv/quantize/vector_quantizer.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// What the work on one block of tokens needs.
struct kv_scratch {
    quantizer_workspace quantizer;
    aligned_buffer<code_t> codes;         ///< `[depth, token, head, group]`
    aligned_buffer<float> scales;         ///< `[token, head]`
    aligned_buffer<float> rows;           ///< `[token, head, head_dim]`
    aligned_buffer<float> means;          ///< `[key_positions::mean_tokens, head, head_dim]`
    aligned_buffer<std::uint16_t> exact;  ///< `[head, token, head_dim]`
    [[nodiscard]] std::size_t bytes() const noexcept {
        return quantizer.bytes() + codes.bytes() + scales.bytes() + rows.bytes() + means.bytes() + exact.bytes();
    }
};

}  // namespace detail

/// Scratch memory for calls to a cache's sequences, any of them: a block of tokens for each worker, however many tokens
/// a call asks for. One from `kv_cache::make_workspace` is large enough for all; any other grows when it must.
/// Threads: one for each caller.
class kv_workspace {
public:
    [[nodiscard]] std::size_t bytes() const noexcept {
        std::size_t bytes = tasks_.bytes();
        for (const detail::kv_scratch& each : tasks_) {
            bytes += each.bytes();
        }
        return bytes;
    }
    /// Tasks that may work at once.
    [[nodiscard]] std::size_t tasks() const noexcept { return tasks_.size(); }
    /// Precondition: `i < tasks()`.
    [[nodiscard]] detail::kv_scratch& task(std::size_t i) noexcept { return tasks_[i]; }
    /// Makes it `count` tasks at least. Errors: `out_of_memory`, and it is as it was.
    [[nodiscard]] status reserve(std::size_t count) {
        if (count <= tasks_.size()) {
            return {};
        }
        auto more = detail::nothrow_array<detail::kv_scratch>::allocate(count);
        if (!more) {
            return more.error();
        }
        std::move(tasks_.begin(), tasks_.end(), more.value().begin());
        tasks_ = std::move(more).value();
        return {};
    }

private:
    detail::nothrow_array<detail::kv_scratch> tasks_;
};

RVQKV_NAMESPACE_END
