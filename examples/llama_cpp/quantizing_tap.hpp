// SPDX-License-Identifier: MIT
/// @file
/// Keys and values on their way through the model, replaced by what a codec makes of them.
#pragma once

#include "tap.hpp"

#include <rvqkv/attend/rope.hpp>
#include <rvqkv/core/aligned_buffer.hpp>
#include <rvqkv/core/parallel_for.hpp>
#include <rvqkv/quantize/codec.hpp>

#include <algorithm>
#include <cstddef>
#include <vector>

namespace llama_example {

/// Tokens of a page of the library's cache.
inline constexpr std::size_t cache_page_tokens = 64;

/// Which tokens a query sees as codes: all but the first `sinks`, and but the latest `recent`, its own included. The
/// others become codes by whole pages of `page` tokens, when the last one of a page may.
struct exact_tokens {
    std::size_t sinks = 0;
    std::size_t recent = 0;
    std::size_t page = 1;
};

/// Every key and value becomes its reconstruction as soon as it is made. Where recent tokens are to be exact, what each
/// query should see of them is put right in its scores and in its output: the keys' errors, turned to their positions,
/// and the values' are kept for that. So one pass does for all positions.
class quantizing_tap : public kv_tap {
public:
    quantizing_tap(const model_attention& attention, std::size_t tokens, const rvqkv::executor& workers);

    /// What the windows that follow are quantized with; null: nothing is changed.
    void use(const rvqkv::model_codecs* codecs, const exact_tokens& exact);

protected:
    [[nodiscard]] bool is_active() const noexcept override { return codecs_ != nullptr; }
    [[nodiscard]] bool wants_scores() const noexcept override { return keeps_errors(); }
    void on_keys(std::size_t layer, const rvqkv::mutable_tensor_view& keys) override;
    void on_values(std::size_t layer, const rvqkv::mutable_tensor_view& values) override;
    void on_scores(std::size_t layer, ggml_tensor* scores) override;
    void on_outputs(std::size_t layer, ggml_tensor* out) override;

private:
    /// Errors of a layer's keys or values, `[position, head, channel]`: exact minus reconstructed.
    using errors = std::vector<float>;

    void replace(std::size_t layer, const char* side, const rvqkv::codec& codec, const rvqkv::mutable_tensor_view& rows,
                 errors* kept);
    [[nodiscard]] bool keeps_errors() const noexcept { return exact_.recent != 0 || exact_.page != 1; }
    /// The oldest position that a query sees exactly for being recent.
    [[nodiscard]] std::size_t first_recent(std::size_t position) const noexcept {
        const std::size_t never_coded = exact_.sinks + exact_.recent;
        const std::size_t old = position + 1 - std::min(position + 1, never_coded);
        return exact_.sinks + old / exact_.page * exact_.page;
    }

    const rvqkv::executor* workers_;
    std::size_t tokens_;
    std::vector<rvqkv::rope> ropes_;
    const rvqkv::model_codecs* codecs_ = nullptr;
    exact_tokens exact_;
    std::vector<errors> key_errors_;
    std::vector<errors> value_errors_;
    std::vector<rvqkv::code_t> codes_;
    std::vector<float> scales_;
    std::vector<float> exact_rows_;
    rvqkv::quantizer_workspace workspace_;
    std::vector<rvqkv::quantizer_workspace> decoders_;
};

}  // namespace llama_example
