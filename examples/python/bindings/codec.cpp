// SPDX-License-Identifier: MIT
/// @file
/// Codecs: tensors to codes and back, packed tensors, and the gradient through a codec.
#include "common.hpp"

#include <rvqkv/files/compressed_tensor.hpp>
#include <rvqkv/learn/clusters.hpp>
#include <rvqkv/learn/straight_through.hpp>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>

namespace py {
namespace {

using codec_handle = std::shared_ptr<const rvqkv::codec>;

rvqkv::codec_spec make_spec(std::size_t head_dim, std::size_t group_dim, std::size_t depths, std::size_t codewords,
                            const std::string& grouping, const std::string& scale, const std::string& scale_type,
                            const std::string& metric, const std::string& weight_type,
                            const std::vector<std::uint16_t>& permutation) {
    rvqkv::codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = {depths, codewords, group_dim};
    spec.grouping = choice(rvqkv::all_grouping_kinds, grouping, "grouping");
    spec.scale = choice(rvqkv::all_scale_kinds, scale, "scale");
    spec.scale_type = choice(all_dtypes, scale_type, "scale_type");
    spec.metric = choice(all_distances, metric, "distance");
    spec.weight_type = choice(all_dtypes, weight_type, "weight_type");
    spec.permutation.assign(permutation.begin(), permutation.end());
    if (rvqkv::status wrong = spec.validate(); !wrong) {
        rvqkv::fail(wrong.error());
    }
    return spec;
}

codec_handle make(const rvqkv::codec_spec& spec, const float_array& weights) {
    const rvqkv::codebook_shape& shape = spec.shape;
    if (weights.ndim() != 3 || weights.shape(0) != shape.depths || weights.shape(1) != shape.codewords ||
        weights.shape(2) != shape.dim) {
        fail("weights must have the shape [depths, codewords, group_dim] = [" + std::to_string(shape.depths) + ", " +
             std::to_string(shape.codewords) + ", " + std::to_string(shape.dim) + "]");
    }
    return without_lock([&] { return rvqkv::make_codec(spec, span_of(weights)).value(); });
}

nb::ndarray<nb::numpy, float> weights(const rvqkv::codec& codec) {
    const rvqkv::codebook_shape& shape = codec.shape();
    std::vector<float> numbers(shape.size());
    const std::byte* const stored = codec.weights().data();
    switch (codec.weight_type()) {
        case rvqkv::dtype::float32: std::memcpy(numbers.data(), stored, numbers.size() * sizeof(float)); break;
        case rvqkv::dtype::float16:
            rvqkv::convert(reinterpret_cast<const rvqkv::float16*>(stored), numbers.data(), numbers.size());
            break;
        case rvqkv::dtype::bfloat16:
            rvqkv::convert(reinterpret_cast<const rvqkv::bfloat16*>(stored), numbers.data(), numbers.size());
            break;
    }
    return to_numpy(std::move(numbers), {shape.depths, shape.codewords, shape.dim});
}

auto encode(const rvqkv::codec& codec, const array_in& x) {
    const rvqkv::tensor_view input = view(x, "x");
    std::vector<rvqkv::code_t> codes(input.rows() * codec.groups() * codec.depths());
    std::vector<float> scales(input.rows(), 1.0F);
    without_lock([&] {
        rvqkv::quantizer_workspace workspace;
        const auto threads = workers();
        codec.encode(input, {codes.data(), {codec.depths(), 1}, scales.data()}, workspace, nullptr, *threads).value();
    });
    return std::pair(to_numpy(std::move(codes), {input.tokens(), input.heads(), codec.groups(), codec.depths()}),
                     to_numpy(std::move(scales), {input.tokens(), input.heads()}));
}

nb::object decode(const rvqkv::codec& codec, const code_array& codes, const float_array& scales, nb::object out,
                  std::optional<std::size_t> depths) {
    if (scales.ndim() != 2) {
        fail("scales have " + std::to_string(scales.ndim()) + " dimensions, must have 2: [token, head]");
    }
    const result_tensor made(std::move(out), scales.shape(0), scales.shape(1), codec.head_dim());
    const rvqkv::mutable_tensor_view output = made.view();
    if (codes.size() != output.rows() * codec.groups() * codec.depths() || scales.size() != output.rows()) {
        fail("out has " + std::to_string(output.rows()) + " head vectors, which is not what codes and scales hold");
    }
    without_lock([&] {
        for (const rvqkv::code_t code : span_of(codes)) {
            if (code >= codec.shape().codewords) {
                fail("a code is " + std::to_string(code) + ", must be below codewords " +
                     std::to_string(codec.shape().codewords));
            }
        }
        rvqkv::quantizer_workspace workspace;
        codec
            .decode({codes.data(), {codec.depths(), 1}, scales.data()}, output, depths.value_or(codec.depths()),
                    workspace)
            .value();
    });
    return made.object();
}

rvqkv::compressed_tensor compress(const codec_handle& codec, const array_in& x) {
    const rvqkv::tensor_view input = view(x, "x");
    return without_lock([&] {
        const auto threads = workers();
        auto made = rvqkv::compressed_tensor::create(codec, input.tokens(), input.heads()).value();
        made.encode(0, input, *threads).value();
        return made;
    });
}

nb::object reconstruct(const rvqkv::compressed_tensor& tensor, nb::object out, std::size_t first_token,
                       std::optional<std::size_t> depths) {
    const rvqkv::tensor_shape shape = tensor.shape();
    if (first_token > shape.tokens) {
        fail("first_token is " + std::to_string(first_token) + ", the tensor has " + std::to_string(shape.tokens));
    }
    const result_tensor made(std::move(out), shape.tokens - first_token, shape.heads, shape.channels);
    const rvqkv::mutable_tensor_view output = made.view();
    without_lock([&] {
        const auto threads = workers();
        tensor.decode(first_token, output, depths.value_or(tensor.codec()->depths()), *threads).value();
    });
    return made.object();
}

template <class Weight>
using spec_quantizer = rvqkv::vector_quantizer<rvqkv::any_scale, rvqkv::any_grouping, rvqkv::residual_codebook<Weight>>;

/// Calls `use` with the quantizer that the codec holds.
template <class Use>
void with_quantizer(const rvqkv::codec& codec, const Use& use) {
    const auto try_weight = [&]<class Weight>(Weight /*tag*/) {
        const auto* const held = dynamic_cast<const rvqkv::codec_of<spec_quantizer<Weight>>*>(&codec);
        if (held != nullptr) {
            use(held->quantizer());
        }
        return held != nullptr;
    };
    if (!try_weight(float()) && !try_weight(rvqkv::float16()) && !try_weight(rvqkv::bfloat16())) {
        fail("the codec was not made from a codec_spec");
    }
}

/// The tensor that the codes of x stand for, and each token's commitment loss: what training needs, in one pass.
auto quantize(const rvqkv::codec& codec, const array_in& x, nb::object out) {
    const rvqkv::tensor_view input = view(x, "x");
    const result_tensor made(std::move(out), input.tokens(), input.heads(), input.channels());
    const rvqkv::mutable_tensor_view output = made.view();
    if (output.shape() != input.shape() || input.channels() != codec.head_dim()) {
        fail("x and out must have the same shape [token, head, " + std::to_string(codec.head_dim()) + "]");
    }
    std::vector<float> losses(input.tokens());
    without_lock([&] {
        const auto threads = workers();
        with_quantizer(codec, [&](const auto& quantizer) {
            const std::size_t heads = input.heads();
            const std::size_t dim = quantizer.head_dim();
            const std::size_t groups = quantizer.groups();
            rvqkv::parallel_ranges(*threads, input.tokens(), 64, [&](std::size_t first, std::size_t last) {
                const std::size_t rows = (last - first) * heads;
                std::vector<float> channels(dim);
                std::vector<float> scaled(rows * dim);
                std::vector<float> scales(rows);
                for (std::size_t row = 0; row < rows; ++row) {
                    std::size_t nonfinite = 0;
                    rvqkv::load_row(input, first + row / heads, row % heads, channels.data());
                    scales[row] = quantizer.transform().apply(channels.data(), scaled.data() + row * dim, nonfinite);
                }
                std::vector<float> rest = scaled;
                std::vector<rvqkv::code_t> codes(rows * groups);
                const double share = 1.0 / static_cast<double>(heads * dim);
                for (std::size_t depth = 0; depth < quantizer.codebook().depths(); ++depth) {
                    quantizer.residual().encode_depth(depth, {rest.data(), rows * groups, dim / groups}, codes);
                    for (std::size_t token = first; token < last; ++token) {
                        const float* const left = rest.data() + (token - first) * heads * dim;
                        losses[token] += static_cast<float>(share * rvqkv::detail::squared_length(left, heads * dim));
                    }
                }
                for (std::size_t i = 0; i < scaled.size(); ++i) {
                    scaled[i] -= rest[i];
                }
                for (std::size_t row = 0; row < rows; ++row) {
                    quantizer.transform().restore(scaled.data() + row * dim, scales[row], channels.data());
                    rvqkv::store_row(channels.data(), output, first + row / heads, row % heads);
                }
            });
        });
    });
    return std::pair(made.object(), to_numpy(std::move(losses), {input.tokens()}));
}

void straight_through(const rvqkv::codec& codec, const array_in& x, const array_in& gradient_out,
                      const array_out& gradient_in, const std::optional<float_array>& gradient_loss,
                      const std::optional<mask_array>& mask) {
    const rvqkv::tensor_view input = view(x, "x");
    const rvqkv::tensor_view from = view(gradient_out, "gradient_out");
    const rvqkv::mutable_tensor_view to = view(gradient_in, "gradient_in");
    if (from.shape() != input.shape() || to.shape() != input.shape()) {
        fail("gradients must have the shape of the input");
    }
    const std::span<const float> by_loss = !gradient_loss ? std::span<const float>() : span_of(*gradient_loss);
    const std::span<const std::uint8_t> counted = mask_of(mask);
    if ((!by_loss.empty() && by_loss.size() != input.tokens()) ||
        (!counted.empty() && counted.size() != input.tokens())) {
        fail("gradient_loss and mask must hold one value for each token");
    }
    without_lock([&] {
        const auto threads = workers();
        with_quantizer(codec, [&](const auto& quantizer) {
            // Tokens are independent of each other.
            rvqkv::parallel_ranges(*threads, input.tokens(), 16, [&](std::size_t first, std::size_t last) {
                const std::size_t count = last - first;
                const auto part = [&](const auto& span) { return span.empty() ? span : span.subspan(first, count); };
                rvqkv::straight_through_gradient(quantizer, input.slice_tokens(first, count),
                                                 from.slice_tokens(first, count), part(by_loss), part(counted),
                                                 to.slice_tokens(first, count))
                    .value();
            });
        });
    });
}

nb::dict spec_dict(const rvqkv::codec_spec& spec) {
    nb::dict fields;
    fields["head_dim"] = spec.head_dim;
    fields["group_dim"] = spec.shape.dim;
    fields["depths"] = spec.shape.depths;
    fields["codewords"] = spec.shape.codewords;
    fields["grouping"] = std::string(rvqkv::name_of(spec.grouping));
    fields["scale"] = std::string(rvqkv::name_of(spec.scale));
    fields["scale_type"] = std::string(rvqkv::name_of(spec.scale_type));
    fields["distance"] = std::string(rvqkv::name_of(spec.metric));
    fields["weight_type"] = std::string(rvqkv::name_of(spec.weight_type));
    fields["permutation"] = std::vector<std::uint16_t>(spec.permutation.begin(), spec.permutation.end());
    return fields;
}

}  // namespace

void bind_codec(nb::module_& module) {
    nb::class_<rvqkv::codec_spec>(module, "CodecSpec", "What defines a codec besides its weights.")
        .def(
            "__init__",
            [](rvqkv::codec_spec* self, std::size_t head_dim, std::size_t group_dim, std::size_t depths,
               std::size_t codewords, const std::string& grouping, const std::string& scale,
               const std::string& scale_type, const std::string& metric, const std::string& weight_type,
               const std::vector<std::uint16_t>& permutation) {
                new (self) rvqkv::codec_spec(make_spec(head_dim, group_dim, depths, codewords, grouping, scale,
                                                       scale_type, metric, weight_type, permutation));
            },
            nb::arg("head_dim"), nb::arg("group_dim") = 32, nb::arg("depths") = 8, nb::arg("codewords") = 2048,
            nb::kw_only(), nb::arg("grouping") = "strided", nb::arg("scale") = "std_dev",
            nb::arg("scale_type") = "float16", nb::arg("distance") = "euclidean", nb::arg("weight_type") = "float32",
            nb::arg("permutation") = std::vector<std::uint16_t>())
        .def_prop_ro("head_dim", [](const rvqkv::codec_spec& spec) { return spec.head_dim; })
        .def_prop_ro("bits_per_value", &rvqkv::codec_spec::bits_per_value, "Bits stored for each channel.")
        .def("fields", &spec_dict, "All fields by name.")
        .def(
            "__eq__",
            [](const rvqkv::codec_spec& a, nb::handle b) {
                return nb::isinstance<rvqkv::codec_spec>(b) && a == nb::cast<const rvqkv::codec_spec&>(b);
            },
            nb::sig("def __eq__(self, other: object, /) -> bool"))
        .def("__repr__", [](const rvqkv::codec_spec& spec) {
            return "CodecSpec(" + nb::cast<std::string>(nb::str(spec_dict(spec))) + ")";
        });

    nb::class_<rvqkv::codec>(module, "Codec", "Turns head vectors into codes and back. Immutable; safe to share.")
        .def_prop_ro("head_dim", &rvqkv::codec::head_dim)
        .def_prop_ro("groups", &rvqkv::codec::groups)
        .def_prop_ro("depths", &rvqkv::codec::depths)
        .def_prop_ro("codewords", [](const rvqkv::codec& codec) { return codec.shape().codewords; })
        .def_prop_ro("group_dim", [](const rvqkv::codec& codec) { return codec.shape().dim; })
        .def_prop_ro("bits_per_value",
                     [](const rvqkv::codec& codec) {
                         return static_cast<double>(codec.bits_per_row()) / static_cast<double>(codec.head_dim());
                     })
        .def_prop_ro("spec", [](const rvqkv::codec& codec) { return *codec.spec(); })
        .def_prop_ro("nbytes", &rvqkv::codec::bytes, "Bytes held: codebooks and what the search needs.")
        .def_prop_ro(
            "fingerprint", [](const rvqkv::codec& codec) { return rvqkv::codec_fingerprint(codec).value(); },
            "Tells this codec from any other: 16 hexadecimal digits.")
        .def("weights", &weights, "A copy of the codebooks, [depths, codewords, group_dim] as float32.")
        .def("encode", &encode, nb::arg("x"),
             "Codes [token, head, group, depth] and scales [token, head] of x [token, head, channel].")
        .def("decode", &decode, nb::arg("codes"), nb::arg("scales"), nb::arg("out").none() = nb::none(),
             nb::arg("depths") = nb::none(),
             "The tensor [token, head, channel] that codes and scales stand for, in `out` of any floating type or in a "
             "new array; from the first depths only, if a number is given.")
        .def("quantize", &quantize, nb::arg("x"), nb::arg("out").none() = nb::none(),
             "What the codes of x stand for, in `out` or in a new array, and each token's commitment loss.")
        .def("straight_through_gradient", &straight_through, nb::arg("x"), nb::arg("gradient_out"),
             nb::arg("gradient_in").noconvert(), nb::arg("gradient_loss").none() = nb::none(),
             nb::arg("mask").none() = nb::none(),
             "What flows back through reconstruction and commitment loss to x, written to gradient_in.");
    // By a handle: what is packed keeps its codec alive.
    module.def("make_codec", &make, nb::arg("spec"), nb::arg("weights"),
               "The codec of a spec and weights [depths, codewords, group_dim].");
    module.def(
        "first_depths",
        [](const codec_handle& whole, std::size_t depths) {
            return without_lock([&] { return rvqkv::first_depths(whole, depths).value(); });
        },
        nb::arg("codec"), nb::arg("depths"),
        "The same codec with its first depths only: codes of the first depths do not depend on the others.");
    module.def("compress", &compress, nb::arg("codec"), nb::arg("x"), "x [token, head, channel] as packed codes.");

    nb::class_<rvqkv::compressed_tensor>(module, "CompressedTensor", "Packed codes and scales of a tensor.")
        .def_prop_ro("shape",
                     [](const rvqkv::compressed_tensor& tensor) {
                         return nb::make_tuple(tensor.shape().tokens, tensor.shape().heads, tensor.shape().channels);
                     })
        .def_prop_ro("nbytes",
                     [](const rvqkv::compressed_tensor& tensor) { return tensor.code_bytes() + tensor.scale_bytes(); })
        .def("reconstruct", &reconstruct, nb::arg("out").none() = nb::none(), nb::arg("first_token") = 0,
             nb::arg("depths") = nb::none(), "Tokens from first_token on, in `out` or in a new array.");
}

}  // namespace py
