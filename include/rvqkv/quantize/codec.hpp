// SPDX-License-Identifier: MIT
/// @file
/// The quantizer behind a door: `codec` hides policies and weight type, so that an engine can load a file at run time
/// and a cache can hold different codecs for each layer and side. One virtual call serves a whole batch of vectors.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "rvqkv/quantize/grouping.hpp"
#include "rvqkv/quantize/scale.hpp"
#include "rvqkv/quantize/vector_quantizer.hpp"

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// All that defines a codec besides the weights; defaults are the paper's for keys.
struct codec_spec {
    std::size_t head_dim = 128;
    codebook_shape shape;                             ///< `shape.dim` is the group's: it divides `head_dim`.
    scale_kind scale = scale_kind::std_dev;           ///< What a head's vector is divided by.
    dtype scale_type = dtype::float16;                ///< How that number is stored.
    grouping_kind grouping = grouping_kind::strided;  ///< Strided for keys, contiguous for values.
    channel_list permutation;                         ///< `[head_dim]`, for `grouping_kind::permuted` only.
    distance metric = distance::euclidean;            ///< Of the nearest-codeword search.
    dtype weight_type = dtype::float32;               ///< How codebook weights are stored.
    friend bool operator==(const codec_spec&, const codec_spec&) = default;

    [[nodiscard]] std::size_t groups() const noexcept { return shape.dim == 0 ? 0 : head_dim / shape.dim; }
    /// Bits stored for one head's vector: `groups * depths * ceil(log2 codewords)`, and the scale.
    [[nodiscard]] std::size_t bits_per_row() const noexcept {
        return groups() * shape.depths * code_bits(shape.codewords) +
               (scale == scale_kind::none ? 0 : 8 * size_of(scale_type));
    }
    /// The same for each channel: 2.875 for the paper's main setting.
    [[nodiscard]] double bits_per_value() const noexcept {
        return static_cast<double>(bits_per_row()) / static_cast<double>(head_dim);
    }
    /// Errors: `invalid_argument` naming the field and its value.
    [[nodiscard]] status validate() const {
        if (status wrong = shape.validate(); !wrong) {
            return wrong;
        }
        if (grouping == grouping_kind::permuted && permutation.size() != head_dim) {
            return error{error_code::invalid_argument, "permutation has " + std::to_string(permutation.size()) +
                                                           " entries, must have head_dim " + std::to_string(head_dim)};
        }
        if (grouping != grouping_kind::permuted && !permutation.empty()) {
            return error{error_code::invalid_argument,
                         "permutation is given, but grouping is " + std::string(name_of(grouping)) + ", not permuted"};
        }
        if (auto order = channel_order(any_grouping(grouping, permutation), head_dim, shape.dim); !order) {
            return order.error();
        }
        return {};
    }
};

/// Turns head vectors into codes and back. Immutable: one codec serves any number of caches and threads, through
/// `std::shared_ptr<const codec>`; training makes a new one.
class codec {
public:
    virtual ~codec() = default;
    codec(const codec&) = delete;
    codec& operator=(const codec&) = delete;

    [[nodiscard]] std::size_t head_dim() const noexcept { return head_dim_; }
    [[nodiscard]] const codebook_shape& shape() const noexcept { return shape_; }
    [[nodiscard]] std::size_t groups() const noexcept { return head_dim_ / shape_.dim; }
    [[nodiscard]] std::size_t depths() const noexcept { return shape_.depths; }
    [[nodiscard]] unsigned bits_per_code() const noexcept { return code_bits(shape_.codewords); }
    /// Whether each head's vector has a scale, and the type in which it is stored.
    [[nodiscard]] bool stores_scale() const noexcept { return stores_scale_; }
    [[nodiscard]] dtype scale_type() const noexcept { return scale_type_; }
    /// The channel that stands at each place among the groups, `[groups, group_dim]`.
    [[nodiscard]] std::span<const std::uint16_t> channel_order() const noexcept { return channel_order_; }
    /// The type in which `weights()` are stored.
    [[nodiscard]] dtype weight_type() const noexcept { return weight_type_; }
    /// Bits stored for one head's vector.
    [[nodiscard]] std::size_t bits_per_row() const noexcept {
        return groups() * depths() * bits_per_code() + (stores_scale_ ? 8 * size_of(scale_type_) : 0);
    }

    /// @copydoc vector_quantizer::encode
    [[nodiscard]] virtual status encode(const tensor_view& x, mutable_encoded_view out, quantizer_workspace& workspace,
                                        encode_report* report = nullptr,
                                        const executor& workers = serial_executor()) const = 0;
    /// @copydoc vector_quantizer::decode
    [[nodiscard]] virtual status decode(encoded_view in, const mutable_tensor_view& out, std::size_t depths,
                                        quantizer_workspace& workspace) const = 0;
    /// Bytes held: codebook and search layout.
    [[nodiscard]] virtual std::size_t bytes() const noexcept = 0;
    /// What a file needs to make the same codec again; null for one built from policies of the user's own.
    [[nodiscard]] virtual const codec_spec* spec() const noexcept { return nullptr; }
    /// All weights, `[depths, codewords, dim]` row-major, as they are stored: of `weight_type()`.
    [[nodiscard]] virtual std::span<const std::byte> weights() const noexcept = 0;

protected:
    template <class Quantizer>
    explicit codec(const Quantizer& quantizer)
        : head_dim_(quantizer.head_dim()),
          shape_(quantizer.codebook().shape()),
          stores_scale_(quantizer.stores_scale()),
          scale_type_(quantizer.scale_type()),
          weight_type_(dtype_of<typename Quantizer::codebook_type::weight_type>),
          channel_order_(quantizer.transform().order()) {}

private:
    std::size_t head_dim_;
    codebook_shape shape_;
    bool stores_scale_;
    dtype scale_type_;
    dtype weight_type_;
    channel_list channel_order_;
};

/// A `codec` that holds a `vector_quantizer`: the same code, behind the door.
template <class Quantizer>
class codec_of : public codec {
public:
    explicit codec_of(Quantizer quantizer) : codec(quantizer), quantizer_(std::move(quantizer)) {}
    [[nodiscard]] const Quantizer& quantizer() const noexcept { return quantizer_; }

    [[nodiscard]] status encode(const tensor_view& x, mutable_encoded_view out, quantizer_workspace& workspace,
                                encode_report* report, const executor& workers) const override {
        return quantizer_.encode(x, out, workspace, report, workers);
    }
    [[nodiscard]] status decode(encoded_view in, const mutable_tensor_view& out, std::size_t depths,
                                quantizer_workspace& workspace) const override {
        return quantizer_.decode(in, out, depths, workspace);
    }
    [[nodiscard]] std::size_t bytes() const noexcept override { return quantizer_.codebook().bytes(); }
    [[nodiscard]] std::span<const std::byte> weights() const noexcept override {
        return std::as_bytes(quantizer_.codebook().weights());
    }

private:
    Quantizer quantizer_;
};

namespace detail {

template <class Weight>
class spec_codec final : public codec_of<vector_quantizer<any_scale, any_grouping, residual_codebook<Weight>>> {
    using quantizer_type = vector_quantizer<any_scale, any_grouping, residual_codebook<Weight>>;

public:
    spec_codec(quantizer_type quantizer, codec_spec spec)
        : codec_of<quantizer_type>(std::move(quantizer)), spec_(std::move(spec)) {}
    [[nodiscard]] const codec_spec* spec() const noexcept override { return &spec_; }

private:
    codec_spec spec_;
};

template <class Weight, class Source>
result<std::shared_ptr<const codec>> make_spec_codec(const codec_spec& spec, std::span<const Source> weights) {
    using quantizer_type = vector_quantizer<any_scale, any_grouping, residual_codebook<Weight>>;
    auto book = residual_codebook<Weight>::create(spec.shape, weights, spec.metric);
    if (!book) {
        return book.error();
    }
    auto quantizer = quantizer_type::create(spec.head_dim, std::move(book).value(), any_scale(spec.scale),
                                            any_grouping(spec.grouping, spec.permutation), spec.scale_type);
    if (!quantizer) {
        return quantizer.error();
    }
    return std::shared_ptr<const codec>(std::make_shared<const spec_codec<Weight>>(std::move(quantizer).value(), spec));
}

}  // namespace detail

/// A codec from its description and the weights `[depths, codewords, dim]` (any element type; rounded to
/// `spec.weight_type`).
/// Errors: `invalid_argument` from `codec_spec::validate` or `residual_codebook::create`; `out_of_memory`.
template <TensorElement Source>
[[nodiscard]] result<std::shared_ptr<const codec>> make_codec(const codec_spec& spec, std::span<const Source> weights) {
    if (status wrong = spec.validate(); !wrong) {
        return wrong.error();
    }
    switch (spec.weight_type) {
        case dtype::float16: return detail::make_spec_codec<float16>(spec, weights);
        case dtype::bfloat16: return detail::make_spec_codec<bfloat16>(spec, weights);
        case dtype::float32: break;
    }
    return detail::make_spec_codec<float>(spec, weights);
}

/// A codec from a quantizer composed by hand, with policies of the user's own if need be.
template <class Quantizer>
[[nodiscard]] std::shared_ptr<const codec> make_codec(Quantizer quantizer) {
    return std::make_shared<const codec_of<Quantizer>>(std::move(quantizer));
}

/// The same codec with its first depths only: greedy codes of a residual quantizer do not depend on later depths. Gives
/// `whole` itself for all of them.
/// Errors: `invalid_argument` for 0 depths or more than there are; `unsupported` for a codec without `spec()`;
///         `out_of_memory`.
[[nodiscard]] inline result<std::shared_ptr<const codec>> first_depths(const std::shared_ptr<const codec>& whole,
                                                                       std::size_t depths) {
    if (depths == 0 || depths > whole->depths()) {
        return error{error_code::invalid_argument, "depths to keep is " + std::to_string(depths) +
                                                       ", must be between 1 and the codec's " +
                                                       std::to_string(whole->depths())};
    }
    if (depths == whole->depths()) {
        return whole;
    }
    if (whole->spec() == nullptr) {
        return error{error_code::unsupported, "a codec of policies of its own cannot be cut: it has no spec"};
    }
    codec_spec spec = *whole->spec();
    spec.shape.depths = depths;
    const auto cut = [&](auto weight) {
        using weight_type = decltype(weight);
        const auto* const weights = reinterpret_cast<const weight_type*>(whole->weights().data());
        return make_codec(spec, std::span<const weight_type>(weights, spec.shape.size()));
    };
    switch (spec.weight_type) {
        case dtype::float16: return cut(float16());
        case dtype::bfloat16: return cut(bfloat16());
        case dtype::float32: break;
    }
    return cut(float());
}

/// The codecs of one layer; null where a layer has none.
struct layer_codecs {
    std::shared_ptr<const codec> key;
    std::shared_ptr<const codec> value;
};

/// A model's codecs by layer number; layers need not be consecutive.
using model_codecs = std::map<std::size_t, layer_codecs>;

RVQKV_NAMESPACE_END
