// SPDX-License-Identifier: MIT
/// @file
/// The plain model's attention through the library's own cache, from end to end: keys and values are appended to a
/// sequence, queries attend on its codes, and the cache turns what rotary embedding turns.
#pragma once

#include "plain_model.hpp"
#include "quantizing_tap.hpp"

#include <rvqkv/cache/kv_cache.hpp>

namespace llama_example {

/// Attends on what a cache holds of a window. Where tokens are exact for their age, tokens come one by one, as when an
/// engine generates; where none is, all at once, so that a query sees codes of its own token, too.
class cached_attention : public plain_attention {
public:
    cached_attention(const plain_shape& shape, const rvqkv::model_codecs& codecs, const exact_tokens& exact,
                     const rvqkv::executor& workers);
    /// Throws `std::runtime_error` for keys and values that are not finite.
    void attend(std::size_t layer, const plain_rows& rows) override;
    /// Spent in the cache, in all.
    [[nodiscard]] double seconds() const noexcept { return seconds_; }

private:
    const plain_shape* shape_;
    const rvqkv::executor* workers_;
    bool one_by_one_;
    rvqkv::kv_cache cache_;
    rvqkv::kv_sequence sequence_;
    rvqkv::kv_workspace workspace_;
    rvqkv::attention_workspace attention_;
    double seconds_ = 0.0;
};

}  // namespace llama_example
