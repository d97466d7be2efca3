// SPDX-License-Identifier: MIT
/// @file
/// Compressed keys or values of a whole text in memory: what a compressed file holds of one layer's one side.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/files/checksum.hpp"
#include "rvqkv/files/plane_layout.hpp"
#include "rvqkv/files/sealed_file.hpp"
#include "rvqkv/quantize/codec.hpp"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// What tells a codec from any other: the XXH3-64, as 16 hexadecimal digits, of its description and its weights. Codes
/// mean something to the codec that made them and to no other.
/// Errors: `invalid_argument` for a codec made from a quantizer of the user's own, which a file cannot describe.
[[nodiscard]] inline result<std::string> codec_fingerprint(const codec& of) {
    const codec_spec* const spec = of.spec();
    if (spec == nullptr) {
        return error{error_code::invalid_argument,
                     "the codec was made from policies that a file cannot name; make it from a codec_spec"};
    }
    checksum sum;
    const std::string description = detail::codec_spec_json(*spec);
    sum.update(std::as_bytes(std::span(description)));
    sum.update(std::as_bytes(std::span(spec->permutation)));
    sum.update(of.weights());
    return sum.hex();
}

/// The keys or the values of one layer, compressed.
/// Threads: any number of readers, or one writer.
class compressed_tensor {
public:
    /// Room for `tokens` tokens of `heads` heads, all codes 0 until they are encoded.
    /// Errors: `invalid_argument` for no codec, no heads or sizes that overflow; `out_of_memory`.
    [[nodiscard]] static result<compressed_tensor> create(std::shared_ptr<const codec> with, std::size_t tokens,
                                                          std::size_t heads) {
        if (with == nullptr) {
            return error{error_code::invalid_argument, "codec is null"};
        }
        // No layout takes more bits than 16 for each code, 64 for each scale and some for padding; no block has more
        // values than 64 tokens.
        std::size_t bits = 0;
        std::size_t values = 0;
        if (heads == 0 || __builtin_mul_overflow(heads, 64 * with->head_dim(), &values) ||
            __builtin_mul_overflow(tokens, heads, &bits) ||
            __builtin_mul_overflow(bits, 16 * with->groups() * with->depths() + 64, &bits) ||
            __builtin_add_overflow(bits, std::size_t{1} << 20U, &bits)) {
            return error{error_code::invalid_argument, std::to_string(tokens) + " tokens of " + std::to_string(heads) +
                                                           " heads are not a size that a tensor can have"};
        }
        compressed_tensor tensor;
        tensor.layout_ = plane_layout(*with, heads, tokens, 0);
        tensor.codec_ = std::move(with);
        tensor.tokens_ = tokens;
        tensor.heads_ = heads;
        auto page = aligned_buffer<std::byte>::allocate(tensor.layout_.end());
        if (!page) {
            return page.error();
        }
        tensor.page_ = std::move(page).value();
        return tensor;
    }

    [[nodiscard]] const std::shared_ptr<const rvqkv::codec>& codec() const noexcept { return codec_; }
    [[nodiscard]] tensor_shape shape() const noexcept { return {tokens_, heads_, codec_->head_dim()}; }
    /// Bytes of the codes of all depths, and of the scales: what a file holds besides its header.
    [[nodiscard]] std::size_t code_bytes() const noexcept { return layout_.code_bytes(); }
    [[nodiscard]] std::size_t scale_bytes() const noexcept { return layout_.scale_bytes(); }
    /// One depth's packed codes. Precondition: `depth < codec()->depths()`.
    [[nodiscard]] std::span<const std::byte> codes(std::size_t depth) const noexcept {
        RVQKV_ASSERT(depth < codec_->depths());
        return page_.span().subspan(layout_.plane_offset(depth), layout_.plane_bytes());
    }
    [[nodiscard]] std::span<std::byte> codes(std::size_t depth) noexcept {
        RVQKV_ASSERT(depth < codec_->depths());
        return page_.span().subspan(layout_.plane_offset(depth), layout_.plane_bytes());
    }
    /// The scales as they are stored, `[tokens, heads]` of `codec()->scale_type()`; empty if the codec has none.
    [[nodiscard]] std::span<const std::byte> scales() const noexcept {
        return page_.span().subspan(layout_.scales_offset(), layout_.scale_bytes());
    }
    [[nodiscard]] std::span<std::byte> scales() noexcept {
        return page_.span().subspan(layout_.scales_offset(), layout_.scale_bytes());
    }

    /// Compresses tokens, which become number `first_token` and on.
    /// Shapes:     `x` `[token, head, head_dim]`, any type and strides.
    /// Errors:     `invalid_argument` for another shape or tokens that do not fit; `out_of_memory`, and some of them
    ///             may have been written then. NaNs and infinities count as 0 and are added to `report`.
    /// Complexity: as `codec::encode`, split over `workers`.
    /// Numerics:   the same bytes however calls are split and at any number of threads.
    [[nodiscard]] status encode(std::size_t first_token, const tensor_view& x, const executor& workers,
                                encode_report* report = nullptr) {
        if (status wrong = check(first_token, x.shape()); !wrong) {
            return wrong;
        }
        std::vector<encode_report> reports(blocks(first_token, x.tokens()));
        status done = for_each_block(
            first_token, x.tokens(), workers,
            [&](std::size_t i, std::size_t first, std::size_t count, block_memory& memory) {
                const tensor_view block = x.slice_tokens(first - first_token, count);
                const mutable_encoded_view encoded{memory.codes.data(), strides(count), scales_of(memory)};
                if (status wrong = codec_->encode(block, encoded, memory.workspace, &reports[i]); !wrong) {
                    return wrong;
                }
                layout_.store(page_.data(), first, count, {encoded.codes, encoded.strides, encoded.scales});
                reports[i].first_token += first - first_token;
                return status{};
            });
        for (const encode_report& found : reports) {
            if (report != nullptr) {
                report->add(found);
            }
        }
        return done;
    }

    /// Reconstructs tokens `[first_token, first_token + out.tokens())` from the first `depths` depths.
    /// Shapes:     `out` `[token, head, head_dim]`, any type and strides.
    /// Errors:     `invalid_argument` for another shape, or tokens or depths that are not there; `out_of_memory`.
    /// Complexity: as `codec::decode`, split over `workers`.
    [[nodiscard]] status decode(std::size_t first_token, const mutable_tensor_view& out, std::size_t depths,
                                const executor& workers) const {
        if (status wrong = check(first_token, out.shape()); !wrong) {
            return wrong;
        }
        if (depths > codec_->depths()) {
            return error{error_code::invalid_argument, "depths to decode is " + std::to_string(depths) +
                                                           ", the codec has " + std::to_string(codec_->depths())};
        }
        return for_each_block(
            first_token, out.tokens(), workers,
            [&](std::size_t, std::size_t first, std::size_t count, block_memory& memory) {
                const mutable_encoded_view encoded{memory.codes.data(), strides(count), scales_of(memory)};
                layout_.load(page_.data(), first, count, depths, encoded);
                return codec_->decode({encoded.codes, encoded.strides, encoded.scales},
                                      out.slice_tokens(first - first_token, count), depths, memory.workspace);
            });
    }

private:
    struct block_memory {
        quantizer_workspace workspace;
        aligned_buffer<code_t> codes;  // [depth, token, head, group]
        aligned_buffer<float> scales;  // [token, head]
    };

    compressed_tensor() = default;

    [[nodiscard]] std::size_t codes_of(std::size_t tokens) const noexcept { return tokens * heads_ * codec_->groups(); }
    [[nodiscard]] code_strides strides(std::size_t tokens) const noexcept { return {1, codes_of(tokens)}; }
    [[nodiscard]] float* scales_of(block_memory& memory) const noexcept {
        return codec_->stores_scale() ? memory.scales.data() : nullptr;
    }

    [[nodiscard]] status check(std::size_t first_token, const tensor_shape& x) const {
        if (x.heads != heads_ || x.channels != codec_->head_dim()) {
            return error{error_code::invalid_argument, "tensor has " + std::to_string(x.heads) + " heads of " +
                                                           std::to_string(x.channels) + " channels, must have " +
                                                           std::to_string(heads_) + " of " +
                                                           std::to_string(codec_->head_dim())};
        }
        if (first_token > tokens_ || x.tokens > tokens_ - first_token) {
            return error{error_code::invalid_argument, "tokens " + std::to_string(first_token) + " to " +
                                                           std::to_string(first_token + x.tokens) +
                                                           " are asked for, there are " + std::to_string(tokens_)};
        }
        return {};
    }

    // Tokens are handled in blocks that begin at multiples of 64, counted from the tensor's first: there all codes
    // begin with a whole byte, whatever their width, so that no two threads write to one.
    [[nodiscard]] std::size_t block_tokens() const noexcept {
        return 64 * std::max<std::size_t>(1, block_values / (64 * heads_ * codec_->head_dim()));
    }
    [[nodiscard]] std::size_t blocks(std::size_t first_token, std::size_t tokens) const noexcept {
        return tokens == 0 ? 0 : (first_token + tokens - 1) / block_tokens() - first_token / block_tokens() + 1;
    }

    /// Calls `body(i, first token, tokens, memory)` for every block.
    template <class Body>
    [[nodiscard]] status for_each_block(std::size_t first_token, std::size_t tokens, const executor& workers,
                                        const Body& body) const {
        std::vector<status> outcomes(blocks(first_token, tokens));
        parallel_for(workers, outcomes.size(), [&](std::size_t i) {
            const std::size_t start = (first_token / block_tokens() + i) * block_tokens();
            const std::size_t first = std::max(first_token, start);
            const std::size_t count = std::min(first_token + tokens, start + block_tokens()) - first;
            block_memory memory;
            outcomes[i] = memory.codes.reserve(codes_of(count) * codec_->depths());
            if (outcomes[i].ok()) {
                outcomes[i] = memory.scales.reserve(count * heads_);
            }
            if (outcomes[i].ok()) {
                outcomes[i] = body(i, first, count, memory);
            }
        });
        const auto wrong = std::find_if(outcomes.begin(), outcomes.end(), [](const status& each) { return !each; });
        return wrong == outcomes.end() ? status{} : *wrong;
    }

    std::shared_ptr<const rvqkv::codec> codec_;
    plane_layout layout_;
    std::size_t tokens_ = 0;
    std::size_t heads_ = 0;
    aligned_buffer<std::byte> page_;  // of `layout_`, with all tokens
};

RVQKV_NAMESPACE_END
