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
#include "rvqkv/files/safetensors.hpp"
#include "rvqkv/files/safetensors_header.hpp"
#include "rvqkv/files/sealed_file.hpp"
#include "rvqkv/quantize/codec.hpp"

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
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

template <TensorElement Weight>
[[nodiscard]] result<std::shared_ptr<const codec>> make_codec_of_tensor(const side_reader& side,
                                                                        const codec_spec& spec) {
    auto weights = side.file().read_as<Weight>(side.tensor_name("codebook"));
    if (!weights) {
        return weights.error();
    }
    auto made = make_codec(spec, std::span<const Weight>(weights.value().span()));
    if (!made) {
        return side.blame_file(made.error());
    }
    return made;
}

/// One codec; `json` is what the metadata says of the side.
[[nodiscard]] inline result<std::shared_ptr<const codec>> load_codec(side_reader& side, std::string_view json) {
    const auto spec = side.read_spec(json);
    if (!spec) {
        return spec.error();
    }
    const codebook_shape& shape = spec.value().shape;
    if (auto found = side.expect("codebook", storage_type_of(spec.value().weight_type),
                                 {shape.depths, shape.codewords, shape.dim});
        !found) {
        return found.error();
    }
    switch (spec.value().weight_type) {
        case dtype::float16: return make_codec_of_tensor<float16>(side, spec.value());
        case dtype::bfloat16: return make_codec_of_tensor<bfloat16>(side, spec.value());
        case dtype::float32: break;
    }
    return make_codec_of_tensor<float>(side, spec.value());
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
        side_reader side(file, entry.first);
        auto loaded = load_codec(side, entry.second);
        if (!loaded) {
            return loaded.error();
        }
        tensors += side.tensors();
        layer_codecs& codecs = set.layers[layer];
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
    if (auto allowed = detail::check_user_metadata(path, set.metadata); !allowed) {
        return allowed;
    }
    metadata_map metadata = set.metadata;
    std::vector<detail::tensor_bytes> tensors;
    for (const auto& layer : set.layers) {
        if (auto valid = detail::check_layer(path, layer.first); !valid) {
            return valid;
        }
        for (const bool is_key : {true, false}) {
            const codec* const saved = (is_key ? layer.second.key : layer.second.value).get();
            if (saved == nullptr) {
                continue;
            }
            const std::string name = detail::side_name(layer.first, is_key);
            const codec_spec* const spec = saved->spec();
            if (spec == nullptr) {
                return error{error_code::invalid_argument,
                             path.string() + ": " + name +
                                 ": the codec was made from policies that a file cannot name; make it from a "
                                 "codec_spec"};
            }
            metadata[name] = detail::codec_spec_json(*spec);
            tensors.push_back({{name + ".codebook",
                                storage_type_of(spec->weight_type),
                                {spec->shape.depths, spec->shape.codewords, spec->shape.dim}},
                               saved->weights()});
            if (!spec->permutation.empty()) {
                tensors.push_back({{name + ".permutation", storage_type::uint16, {spec->permutation.size()}},
                                   std::as_bytes(std::span(spec->permutation))});
            }
        }
    }
    if (tensors.empty()) {
        return error{error_code::invalid_argument, path.string() + ": no codecs to save"};
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
