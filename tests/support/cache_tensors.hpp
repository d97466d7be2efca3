// SPDX-License-Identifier: MIT
/// @file
/// What caches are fed with: tensors of any type and order of axes, codecs of any policy.
#pragma once

#include "rvqkv/core/half.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "support/random.hpp"
#include "support/weights.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

namespace test {

using shared_codec = std::shared_ptr<const rvqkv::codec>;

inline constexpr rvqkv::dtype all_types[] = {rvqkv::dtype::float32, rvqkv::dtype::float16, rvqkv::dtype::bfloat16};

template <class T, std::size_t Count>
const T& pick(random_source& random, const T (&choices)[Count]) {
    return choices[random.integer(0, Count - 1)];
}

/// A tensor with memory of its own, in any type and any order of axes, with gaps between elements.
class tensor {
public:
    tensor(rvqkv::dtype type, rvqkv::tensor_shape shape) : tensor(type, shape, nullptr) {}
    tensor(rvqkv::dtype type, rvqkv::tensor_shape shape, random_source& random) : tensor(type, shape, &random) {}

    [[nodiscard]] std::size_t tokens() const { return shape_.tokens; }
    [[nodiscard]] rvqkv::mutable_tensor_view view() {
        return {memory_.data() + static_cast<std::ptrdiff_t>(rvqkv::size_of(type_)) * origin_, type_, shape_, strides_};
    }
    [[nodiscard]] rvqkv::tensor_view view() const {
        return {memory_.data() + static_cast<std::ptrdiff_t>(rvqkv::size_of(type_)) * origin_, type_, shape_, strides_};
    }
    [[nodiscard]] rvqkv::tensor_view slice(std::size_t first, std::size_t count) const {
        return view().slice_tokens(first, count);
    }

    void set(std::size_t token, std::size_t head, std::size_t channel, float value) {
        std::byte* const at = element(token, head, channel);
        switch (type_) {
            case rvqkv::dtype::float32: std::memcpy(at, &value, 4); break;
            case rvqkv::dtype::float16: store(at, rvqkv::to_float16(value)); break;
            case rvqkv::dtype::bfloat16: store(at, rvqkv::to_bfloat16(value)); break;
        }
    }
    /// The bits of an element.
    [[nodiscard]] std::uint32_t bits(std::size_t token, std::size_t head, std::size_t channel) const {
        std::uint32_t value = 0;
        std::memcpy(&value, const_cast<tensor*>(this)->element(token, head, channel), rvqkv::size_of(type_));
        return value;
    }
    /// The element as a number.
    [[nodiscard]] float number(std::size_t token, std::size_t head, std::size_t channel) const {
        const std::uint32_t value = bits(token, head, channel);
        switch (type_) {
            case rvqkv::dtype::float16: return rvqkv::to_float(rvqkv::float16{static_cast<std::uint16_t>(value)});
            case rvqkv::dtype::bfloat16: return rvqkv::to_float(rvqkv::bfloat16{static_cast<std::uint16_t>(value)});
            case rvqkv::dtype::float32: break;
        }
        return std::bit_cast<float>(value);
    }
    /// The same numbers, contiguous and rounded to a type.
    [[nodiscard]] tensor as(rvqkv::dtype type) const {
        tensor out(type, shape_);
        for (std::size_t token = 0; token < shape_.tokens; ++token) {
            for (std::size_t head = 0; head < shape_.heads; ++head) {
                for (std::size_t channel = 0; channel < shape_.channels; ++channel) {
                    out.set(token, head, channel, number(token, head, channel));
                }
            }
        }
        return out;
    }
    void fill(random_source& random) {
        for (std::size_t token = 0; token < shape_.tokens; ++token) {
            for (std::size_t head = 0; head < shape_.heads; ++head) {
                for (std::size_t channel = 0; channel < shape_.channels; ++channel) {
                    set(token, head, channel, random.gaussian());
                }
            }
        }
    }
    /// Whether this is tokens `[first, first + tokens())` of another tensor, bit for bit.
    [[nodiscard]] bool is_part_of(const tensor& whole, std::size_t first) const {
        for (std::size_t token = 0; token < shape_.tokens; ++token) {
            if (!same_token(token, whole, first + token)) {
                return false;
            }
        }
        return true;
    }
    [[nodiscard]] bool same_token(std::size_t token, const tensor& other, std::size_t other_token) const {
        for (std::size_t head = 0; head < shape_.heads; ++head) {
            if (!same_row(token, head, other, other_token)) {
                return false;
            }
        }
        return true;
    }
    [[nodiscard]] bool same_row(std::size_t token, std::size_t head, const tensor& other,
                                std::size_t other_token) const {
        for (std::size_t channel = 0; channel < shape_.channels; ++channel) {
            if (bits(token, head, channel) != other.bits(other_token, head, channel)) {
                return false;
            }
        }
        return true;
    }

private:
    static constexpr std::byte gap{0xa5};

    tensor(rvqkv::dtype type, rvqkv::tensor_shape shape, random_source* random) : type_(type), shape_(shape) {
        // From the innermost axis to the outermost; random ones may run backwards and leave gaps.
        std::array<std::size_t, 3> order = {2, 1, 0};
        if (random != nullptr) {
            std::shuffle(order.begin(), order.end(), random->engine());
        }
        const std::array<std::size_t, 3> extents = {shape.tokens, shape.heads, shape.channels};
        const std::array<std::ptrdiff_t*, 3> strides = {&strides_.token, &strides_.head, &strides_.channel};
        std::size_t size = 1;
        for (const std::size_t axis : order) {
            size *= random != nullptr ? random->integer(1, 2) : 1;
            const bool backwards = random != nullptr && random->integer(0, 3) == 0;
            *strides[axis] = backwards ? -static_cast<std::ptrdiff_t>(size) : static_cast<std::ptrdiff_t>(size);
            if (backwards && extents[axis] > 0) {
                origin_ += static_cast<std::ptrdiff_t>(size * (extents[axis] - 1));
            }
            size *= extents[axis];
        }
        memory_.assign((size + 1) * rvqkv::size_of(type), gap);
    }
    template <class T>
    static void store(std::byte* at, T value) {
        std::memcpy(at, &value, sizeof(T));
    }
    [[nodiscard]] std::byte* element(std::size_t token, std::size_t head, std::size_t channel) {
        return static_cast<std::byte*>(view().row(token, head)) + static_cast<std::ptrdiff_t>(rvqkv::size_of(type_)) *
                                                                      static_cast<std::ptrdiff_t>(channel) *
                                                                      strides_.channel;
    }

    rvqkv::dtype type_;
    rvqkv::tensor_shape shape_;
    rvqkv::tensor_strides strides_;
    std::ptrdiff_t origin_ = 0;
    std::vector<std::byte> memory_;
};

[[nodiscard]] inline shared_codec make_codec(random_source& random, const rvqkv::codec_spec& spec) {
    const std::vector<float> weights = make_weights(random, spec.shape);
    return rvqkv::make_codec<float>(spec, weights).value();
}

/// The paper's policies at a size of one's own.
[[nodiscard]] inline shared_codec plain_codec(random_source& random, std::size_t head_dim,
                                              rvqkv::codebook_shape shape) {
    rvqkv::codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = shape;
    return make_codec(random, spec);
}

/// A small codec of random policies and types.
[[nodiscard]] inline shared_codec random_codec(random_source& random, std::size_t codewords) {
    constexpr rvqkv::distance metrics[] = {rvqkv::distance::euclidean, rvqkv::distance::cosine};
    rvqkv::codec_spec spec;
    const std::size_t groups = random.integer(1, 4);
    spec.shape = {random.integer(1, codewords > 4096 ? 2 : 4), codewords, random.integer(1, 6)};
    spec.head_dim = groups * spec.shape.dim;
    spec.scale = pick(random, rvqkv::all_scale_kinds);
    spec.scale_type = pick(random, all_types);
    spec.grouping = pick(random, rvqkv::all_grouping_kinds);
    if (spec.grouping == rvqkv::grouping_kind::permuted) {
        spec.permutation.resize(spec.head_dim);
        std::iota(spec.permutation.begin(), spec.permutation.end(), std::uint16_t{0});
        std::shuffle(spec.permutation.begin(), spec.permutation.end(), random.engine());
    }
    spec.metric = pick(random, metrics);
    spec.weight_type = pick(random, all_types);
    return make_codec(random, spec);
}

/// What a codec makes of all tokens of a tensor, at so many depths.
[[nodiscard]] inline tensor round_trip(const rvqkv::codec& codec, const tensor& input, rvqkv::dtype type,
                                       std::size_t depths) {
    const rvqkv::tensor_view x = input.view();
    std::vector<rvqkv::code_t> codes(x.rows() * codec.groups() * codec.depths());
    std::vector<float> scales(x.rows());
    const rvqkv::code_strides strides{codec.depths(), 1};
    rvqkv::quantizer_workspace workspace;
    tensor out(type, x.shape());
    codec.encode(x, {codes.data(), strides, scales.data()}, workspace).value();
    codec.decode({codes.data(), strides, scales.data()}, out.view(), depths, workspace).value();
    return out;
}

[[nodiscard]] inline std::string message_of(const rvqkv::status& result) {
    return result.ok() ? "ok" : std::string(rvqkv::name_of(result.error().code)) + ": " + result.error().message;
}
template <class T>
[[nodiscard]] std::string message_of(const rvqkv::result<T>& result) {
    return result.ok() ? "ok" : std::string(rvqkv::name_of(result.error().code)) + ": " + result.error().message;
}

}  // namespace test
