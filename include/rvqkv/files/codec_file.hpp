// SPDX-License-Identifier: MIT
/// @file
/// The codecs of a whole model in one file, readable from any language: a safetensors file with
///  - tensors `layers.L.key.codebook` and `layers.L.value.codebook`, `[depths, codewords, group_dim]`, F32, F16 or
///  BF16;
///  - tensors `layers.L.key.permutation` (U16, `[head_dim]`) where the grouping is a permutation;
///  - metadata `format` = "rvqkv.codec", `version` = "1", `checksum` (see `rvqkv/files/safetensors.hpp`);
///  - metadata `layers.L.key`, `layers.L.value`: the rest of the codec as JSON, such as `{"head_dim":128,
///    "group_dim":32,"depths":8,"codewords":2048,"scale":"std_dev","scale_type":"float16","grouping":"strided",
///    "distance":"euclidean","weight_type":"float32"}`;
///  - any other metadata: free text of the user's.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/owned_tensor.hpp"
#include "rvqkv/files/safetensors.hpp"
#include "rvqkv/files/safetensors_header.hpp"
#include "rvqkv/files/sealed_file.hpp"
#include "rvqkv/quantize/codec.hpp"

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// What a codec file holds.
struct codec_set {
    model_codecs layers;  ///< By number of the layer; numbers may be left out.
    /// Free text of the user's, such as the model's name. Not for use: `format`, `version`, `checksum`, and keys that
    /// begin with `layers.`.
    metadata_map metadata;
};

inline constexpr std::string_view codec_file_format = "rvqkv.codec";
inline constexpr std::string_view codec_file_version = "1";

namespace detail {

inline constexpr std::string_view layer_prefix = "layers.";
inline constexpr std::size_t max_layer = 65535;
inline constexpr dtype all_dtypes[] = {dtype::float32, dtype::float16, dtype::bfloat16};
inline constexpr distance all_distances[] = {distance::euclidean, distance::cosine};

/// "layers.12.key"
[[nodiscard]] inline std::string side_name(std::size_t layer, bool is_key) {
    return std::string(layer_prefix) + std::to_string(layer) + (is_key ? ".key" : ".value");
}

/// The inverse; false when `name` is not spelled exactly so.
[[nodiscard]] inline bool parse_side_name(std::string_view name, std::size_t& layer, bool& is_key) {
    const std::string_view number = name.substr(std::min(layer_prefix.size(), name.size()));
    layer = 0;
    static_cast<void>(std::from_chars(number.data(), number.data() + number.size(), layer));
    is_key = name == side_name(layer, true);
    return layer <= max_layer && (is_key || name == side_name(layer, false));
}

[[nodiscard]] inline bool is_reserved(std::string_view key) {
    return key == format_key || key == version_key || key == checksum_key ||
           key.substr(0, layer_prefix.size()) == layer_prefix;
}

[[nodiscard]] inline std::string codec_spec_json(const codec_spec& spec) {
    const auto number = [](const char* name, std::size_t value) {
        return json_string(name) + ':' + std::to_string(value) + ',';
    };
    const auto text = [](const char* name, std::string_view value) {
        return json_string(name) + ':' + json_string(value) + ',';
    };
    std::string json = "{" + number("head_dim", spec.head_dim) + number("group_dim", spec.shape.dim) +
                       number("depths", spec.shape.depths) + number("codewords", spec.shape.codewords) +
                       text("scale", name_of(spec.scale)) + text("scale_type", name_of(spec.scale_type)) +
                       text("grouping", name_of(spec.grouping)) + text("distance", name_of(spec.metric)) +
                       text("weight_type", name_of(spec.weight_type));
    json.back() = '}';
    return json;
}

/// All but the permutation. Errors: `damaged_file` naming the field.
[[nodiscard]] inline result<codec_spec> parse_codec_spec(std::string_view json) {
    auto object = flat_json::parse(json);
    if (!object) {
        return object.error();
    }
    codec_spec spec;
    flat_json& fields = object.value();
    const status steps[] = {
        fields.take("head_dim", spec.head_dim),
        fields.take("group_dim", spec.shape.dim),
        fields.take("depths", spec.shape.depths),
        fields.take("codewords", spec.shape.codewords),
        fields.take("scale", all_scale_kinds, spec.scale),
        fields.take("scale_type", all_dtypes, spec.scale_type),
        fields.take("grouping", all_grouping_kinds, spec.grouping),
        fields.take("distance", all_distances, spec.metric),
        fields.take("weight_type", all_dtypes, spec.weight_type),
        fields.finish(),
    };
    for (const status& step : steps) {
        if (!step) {
            return step.error();
        }
    }
    return spec;
}

template <TensorElement Weight>
[[nodiscard]] result<std::shared_ptr<const codec>> load_codec_as(const safetensors_file& file,
                                                                 const std::string& tensor, const codec_spec& spec) {
    auto weights = file.read_as<Weight>(tensor);
    if (!weights) {
        return weights.error();
    }
    const aligned_buffer<Weight>& read = weights.value();
    return make_codec(spec, read.span());
}

/// One codec; `name` is "layers.L.key" or "layers.L.value", `json` what the metadata says under it.
[[nodiscard]] inline result<std::shared_ptr<const codec>> load_codec(const safetensors_file& file,
                                                                     const std::string& name, std::string_view json) {
    const auto damaged = [&](const std::string& what) {
        return error{error_code::damaged_file, file.name() + ": " + name + ": " + what};
    };
    auto parsed = parse_codec_spec(json);
    if (!parsed) {
        return damaged(parsed.error().message);
    }
    codec_spec& spec = parsed.value();
    const auto expect = [&](const std::string& tensor, storage_type type,
                            const std::vector<std::size_t>& shape) -> status {
        const auto info = file.tensor(tensor);
        if (!info) {
            return damaged("tensor " + in_quotes(tensor) + " is missing");
        }
        if (info.value()->shape != shape || info.value()->type != type) {
            return damaged("tensor " + in_quotes(tensor) + " is " + std::string(name_of(info.value()->type)) + ' ' +
                           shape_text(info.value()->shape) + ", but by the metadata it must be " +
                           std::string(name_of(type)) + ' ' + shape_text(shape));
        }
        return {};
    };
    const std::string codebook = name + ".codebook";
    if (auto found = expect(codebook, storage_type_of(spec.weight_type),
                            {spec.shape.depths, spec.shape.codewords, spec.shape.dim});
        !found) {
        return found.error();
    }
    if (spec.grouping == grouping_kind::permuted) {
        const std::string permutation = name + ".permutation";
        if (auto found = expect(permutation, storage_type::uint16, {spec.head_dim}); !found) {
            return found.error();
        }
        const auto order = file.read_as<std::uint16_t>(permutation);
        if (!order) {
            return order.error();
        }
        spec.permutation.assign(order.value().span().begin(), order.value().span().end());
    }
    auto made = spec.weight_type == dtype::float16    ? load_codec_as<float16>(file, codebook, spec)
                : spec.weight_type == dtype::bfloat16 ? load_codec_as<bfloat16>(file, codebook, spec)
                                                      : load_codec_as<float>(file, codebook, spec);
    if (!made && made.error().code == error_code::invalid_argument) {
        return damaged(made.error().message);  // the argument came out of the file
    }
    return made;
}

[[nodiscard]] inline result<codec_set> load_codecs(const safetensors_file& file) {
    if (auto sealed = check_sealed(file, codec_file_format, codec_file_version); !sealed) {
        return sealed.error();
    }
    codec_set set;
    std::size_t tensors = 0;
    for (const auto& entry : file.metadata()) {
        if (!is_reserved(entry.first)) {
            set.metadata.insert(entry);
            continue;
        }
        if (entry.first.substr(0, layer_prefix.size()) != layer_prefix) {
            continue;
        }
        std::size_t layer = 0;
        bool is_key = false;
        if (!parse_side_name(entry.first, layer, is_key)) {
            return error{error_code::damaged_file,
                         file.name() + ": metadata " + in_quotes(entry.first) + " names no layer and side"};
        }
        auto loaded = load_codec(file, entry.first, entry.second);
        if (!loaded) {
            return loaded.error();
        }
        layer_codecs& codecs = set.layers[layer];
        tensors += loaded.value()->spec()->permutation.empty() ? 1 : 2;
        (is_key ? codecs.key : codecs.value) = std::move(loaded).value();
    }
    if (set.layers.empty() || tensors != file.tensors().size()) {
        return error{error_code::damaged_file, file.name() + ": holds " + std::to_string(file.tensors().size()) +
                                                   " tensors, but the codecs that its metadata names have " +
                                                   std::to_string(tensors)};
    }
    return set;
}

}  // namespace detail

/// Writes the codecs of a model to one file, all or nothing.
/// Errors: `invalid_argument` for a set without codecs, a codec made from a quantizer of the user's own (a file cannot
///         say what it does), a reserved metadata key or text that is not UTF-8; `io`. An old file is then as it was.
[[nodiscard]] inline status save_codecs(const std::filesystem::path& path, const codec_set& set) {
    const auto wrong = [&path](const std::string& what) {
        return error{error_code::invalid_argument, path.string() + ": " + what};
    };
    metadata_map metadata = set.metadata;
    for (const auto& entry : metadata) {
        if (detail::is_reserved(entry.first)) {
            return wrong("metadata key " + detail::in_quotes(entry.first) + " is reserved");
        }
    }
    std::vector<detail::tensor_bytes> tensors;
    for (const auto& layer : set.layers) {
        for (const bool is_key : {true, false}) {
            const codec* const saved = (is_key ? layer.second.key : layer.second.value).get();
            if (saved == nullptr) {
                continue;
            }
            const std::string name = detail::side_name(layer.first, is_key);
            const codec_spec* const spec = saved->spec();
            if (spec == nullptr) {
                return wrong(name +
                             ": the codec was made from policies that a file cannot name; "
                             "make it from a codec_spec");
            }
            if (layer.first > detail::max_layer) {
                return wrong(name + ": layers are numbered up to " + std::to_string(detail::max_layer));
            }
            metadata[name] = detail::codec_spec_json(*spec);
            detail::tensor_bytes codebook;
            codebook.info.name = name + ".codebook";
            codebook.info.type = storage_type_of(spec->weight_type);
            codebook.info.shape = {spec->shape.depths, spec->shape.codewords, spec->shape.dim};
            codebook.bytes = saved->weights();
            tensors.push_back(std::move(codebook));
            if (!spec->permutation.empty()) {
                detail::tensor_bytes permutation;
                permutation.info.name = name + ".permutation";
                permutation.info.type = storage_type::uint16;
                permutation.info.shape = {spec->permutation.size()};
                permutation.bytes = std::as_bytes(std::span(spec->permutation));
                tensors.push_back(std::move(permutation));
            }
        }
    }
    if (tensors.empty()) {
        return wrong("no codecs to save");
    }
    return detail::save_sealed(path, codec_file_format, codec_file_version, std::move(metadata), std::move(tensors));
}

/// Reads the codecs of a model. Everything is checked before anything is returned: format, version, checksum, every
/// field, every weight.
/// Errors: `io`, `damaged_file`, `out_of_memory`; `unsupported` for a version that this library does not read.
[[nodiscard]] inline result<codec_set> load_codecs(const std::filesystem::path& path) {
    auto file = safetensors_file::open(path);
    if (!file) {
        return file.error();
    }
    return detail::load_codecs(file.value());
}

/// The same from a file's bytes in memory, which are not needed afterwards.
[[nodiscard]] inline result<codec_set> load_codecs(std::span<const std::byte> bytes) {
    auto file = safetensors_file::parse(bytes);
    if (!file) {
        return file.error();
    }
    return detail::load_codecs(file.value());
}

RVQKV_NAMESPACE_END
