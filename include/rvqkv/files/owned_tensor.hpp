// SPDX-License-Identifier: MIT
/// @file
/// Tensors that came out of a file, and what the readers of all file formats share to bring them in: shapes as
/// `[token, head, channel]`, ranges of tokens, numbers widened to float32 on the way.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/simd/convert.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// Tokens `[first, first + count)` of a tensor; as made, all of them.
struct token_range {
    static constexpr std::size_t to_the_end = std::numeric_limits<std::size_t>::max();
    std::size_t first = 0;
    std::size_t count = to_the_end;
};

/// A contiguous `[token, head, channel]` tensor with its memory, in any element type.
/// Threads: any number of readers.
class owned_tensor {
public:
    owned_tensor() = default;

    /// Zeros. Errors: `out_of_memory`, also when the size overflows.
    [[nodiscard]] static result<owned_tensor> allocate(dtype type, tensor_shape shape) {
        std::size_t bytes = size_of(type);
        for (const std::size_t extent : {shape.tokens, shape.heads, shape.channels}) {
            if (__builtin_mul_overflow(bytes, extent, &bytes)) {
                return error{error_code::out_of_memory, "out of memory"};
            }
        }
        auto data = aligned_buffer<std::byte>::allocate(bytes);
        if (!data) {
            return data.error();
        }
        owned_tensor tensor;
        tensor.data_ = std::move(data).value();
        tensor.shape_ = shape;
        tensor.type_ = type;
        return tensor;
    }

    [[nodiscard]] dtype type() const noexcept { return type_; }
    [[nodiscard]] const tensor_shape& shape() const noexcept { return shape_; }
    [[nodiscard]] std::span<std::byte> bytes() noexcept { return data_.span(); }
    [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return data_.span(); }
    /// Valid while the tensor lives.
    [[nodiscard]] tensor_view view() const noexcept { return {data_.data(), type_, shape_, strides()}; }
    /// Valid while the tensor lives.
    [[nodiscard]] mutable_tensor_view mutable_view() noexcept { return {data_.data(), type_, shape_, strides()}; }

private:
    [[nodiscard]] tensor_strides strides() const noexcept {
        return {static_cast<std::ptrdiff_t>(shape_.heads * shape_.channels),
                static_cast<std::ptrdiff_t>(shape_.channels), 1};
    }

    aligned_buffer<std::byte> data_;
    tensor_shape shape_;
    dtype type_ = dtype::float32;
};

namespace detail {

/// "[4096, 3, 64]"
[[nodiscard]] inline std::string shape_text(std::span<const std::size_t> shape, const char* comma = ", ") {
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) {
        text += (i == 0 ? "" : comma) + std::to_string(shape[i]);
    }
    return text + "]";
}

/// Elements of a shape. False when they, or the extents without their zeros, cannot be counted in 64 bits; so strides
/// made from a shape that passed do not overflow either.
[[nodiscard]] inline bool count_elements(std::span<const std::size_t> shape, std::size_t& count) noexcept {
    count = 1;
    bool empty = false;
    for (const std::size_t extent : shape) {
        empty = empty || extent == 0;
        if (__builtin_mul_overflow(count, std::max<std::size_t>(extent, 1), &count)) {
            return false;
        }
    }
    count = empty ? 0 : count;
    return true;
}

/// What a file's array means as `[token, head, channel]`: itself when it has three dimensions; with two dimensions each
/// row is cut into `heads` (0: one). `what` names the array in errors.
[[nodiscard]] inline result<tensor_shape> tokens_heads_channels(std::span<const std::size_t> shape, std::size_t heads,
                                                                const std::string& what) {
    if (shape.size() == 3) {
        if (heads != 0 && heads != shape[1]) {
            return error{error_code::invalid_argument,
                         what + ": has " + std::to_string(shape[1]) + " heads, not " + std::to_string(heads)};
        }
        return tensor_shape{shape[0], shape[1], shape[2]};
    }
    if (shape.size() == 2) {
        heads = heads == 0 ? 1 : heads;
        if (shape[1] % heads != 0) {
            return error{error_code::invalid_argument, what + ": rows of " + std::to_string(shape[1]) +
                                                           " channels cannot be cut into " + std::to_string(heads) +
                                                           " heads"};
        }
        return tensor_shape{shape[0], heads, shape[1] / heads};
    }
    return error{error_code::invalid_argument,
                 what + ": has shape " + shape_text(shape) +
                     "; want [token, head, channel], or [token, channel] with the number of heads given"};
}

/// Reads some tokens of a contiguous tensor that starts at `offset`.
[[nodiscard]] inline result<owned_tensor> read_tokens(const byte_source& source, std::size_t offset, dtype type,
                                                      tensor_shape shape, token_range range, const std::string& what) {
    if (range.count == token_range::to_the_end && range.first <= shape.tokens) {
        range.count = shape.tokens - range.first;
    }
    if (range.first > shape.tokens || range.count > shape.tokens - range.first) {
        return error{error_code::invalid_argument, what + ": has " + std::to_string(shape.tokens) + " tokens; wanted " +
                                                       std::to_string(range.count) + " from token " +
                                                       std::to_string(range.first) + " on"};
    }
    auto tensor = owned_tensor::allocate(type, {range.count, shape.heads, shape.channels});
    if (!tensor) {
        return tensor.error();
    }
    const std::size_t skipped = range.first * shape.heads * shape.channels * size_of(type);
    if (auto done = source.read(offset + skipped, tensor.value().bytes()); !done) {
        return done.error();
    }
    return tensor;
}

/// Reads `out.size()` numbers of type `T` that start at `offset` and widens them; no second copy is held.
template <TensorElement T>
[[nodiscard]] status read_floats_from(const byte_source& source, std::size_t offset, std::span<float> out) {
    if constexpr (std::is_same_v<T, float>) {
        return source.read(offset, std::as_writable_bytes(out));
    } else {
        std::array<T, 8192> piece;  // NOLINT: filled before it is read
        while (!out.empty()) {
            const std::size_t count = std::min(out.size(), piece.size());
            const std::span<T> part = std::span<T>(piece).first(count);
            if (auto done = source.read(offset, std::as_writable_bytes(part)); !done) {
                return done;
            }
            convert(part.data(), out.data(), count);
            offset += part.size_bytes();
            out = out.subspan(count);
        }
        return {};
    }
}

/// The same for an element type known at run time.
[[nodiscard]] inline status read_floats(const byte_source& source, std::size_t offset, dtype type,
                                        std::span<float> out) {
    switch (type) {
        case dtype::float16: return read_floats_from<float16>(source, offset, out);
        case dtype::bfloat16: return read_floats_from<bfloat16>(source, offset, out);
        case dtype::float32: break;
    }
    return read_floats_from<float>(source, offset, out);
}

/// Hands a tensor's bytes, contiguous, to `sink.write(std::span<const std::byte>)`, whatever its strides are.
template <class Sink>
[[nodiscard]] status write_elements(Sink& sink, const tensor_view& tensor) {
    const std::size_t element = size_of(tensor.type());
    const auto heads = static_cast<std::ptrdiff_t>(tensor.heads());
    const auto channels = static_cast<std::ptrdiff_t>(tensor.channels());
    if (tensor.strides() == tensor_strides{heads * channels, channels, 1}) {
        const auto* bytes = static_cast<const std::byte*>(tensor.data());
        return sink.write(std::span<const std::byte>(bytes, tensor.rows() * tensor.channels() * element));
    }
    std::array<std::byte, 16384> piece;  // NOLINT: filled before it is read
    std::size_t held = 0;
    for (std::size_t token = 0; token < tensor.tokens(); ++token) {
        for (std::size_t head = 0; head < tensor.heads(); ++head) {
            const auto* from = static_cast<const std::byte*>(tensor.row(token, head));
            for (std::size_t channel = 0; channel < tensor.channels(); ++channel) {
                if (held == piece.size()) {
                    if (auto done = sink.write(std::span<const std::byte>(piece)); !done) {
                        return done;
                    }
                    held = 0;
                }
                const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(channel) * tensor.strides().channel;
                std::memcpy(piece.data() + held, from + at * static_cast<std::ptrdiff_t>(element), element);
                held += element;
            }
        }
    }
    return sink.write(std::span<const std::byte>(piece).first(held));
}

}  // namespace detail

RVQKV_NAMESPACE_END
