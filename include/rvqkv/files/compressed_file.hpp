// SPDX-License-Identifier: MIT
/// @file
/// Compressed keys and values in a file, readable from any language: a safetensors file with
///  - tensors `layers.L.key.codes` and `layers.L.value.codes`, U8 `[depths, bytes]`: a row holds one depth's codes of
///    `[token, head, group]`, each `ceil(log2 codewords)` bits, least significant bit first, without gaps;
///  - tensors `layers.L.key.scales`, `layers.L.value.scales`, F32, F16 or BF16 `[tokens, heads]`; none where the codec
///    has no scale;
///  - metadata `format` = "rvqkv.compressed", `version` = "1", `checksum` (see `rvqkv/files/safetensors.hpp`);
///  - metadata `layers.L.key`, `layers.L.value`: shapes as JSON, such as `{"tokens":820,"heads":3,"head_dim":64,
///    "group_dim":32,"depths":8,"codewords":2048}`;
///  - metadata `layers.L.key.codec`, `layers.L.value.codec`: the fingerprint of the codec that reads them back;
///  - any other metadata: free text of the user's.
#pragma once

#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/compressed_tensor.hpp"
#include "rvqkv/files/flat_json.hpp"
#include "rvqkv/files/owned_tensor.hpp"
#include "rvqkv/files/safetensors.hpp"
#include "rvqkv/files/safetensors_header.hpp"
#include "rvqkv/files/sealed_file.hpp"
#include "rvqkv/quantize/codec.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// The two sides of one layer; empty where there is none.
struct compressed_layer {
    std::optional<compressed_tensor> key;
    std::optional<compressed_tensor> value;
};

/// What a compressed file holds.
struct compressed_set {
    std::map<std::size_t, compressed_layer> layers;  ///< By number of the layer; numbers may be left out.
    metadata_map metadata;  ///< Free text of the user's, with keys as in `codec_set::metadata`.
};

inline constexpr std::string_view compressed_file_format = "rvqkv.compressed";
inline constexpr std::string_view compressed_file_version = "1";

namespace detail {

inline constexpr std::string_view codec_suffix = ".codec";

[[nodiscard]] inline std::string compressed_shape_json(const tensor_shape& tensor, const codebook_shape& book) {
    return flat_json_writer()
        .add("tokens", tensor.tokens)
        .add("heads", tensor.heads)
        .add("head_dim", tensor.channels)
        .add("group_dim", book.dim)
        .add("depths", book.depths)
        .add("codewords", book.codewords)
        .text();
}

/// The inverse. Errors: `damaged_file` naming the field.
[[nodiscard]] inline status parse_compressed_shape(std::string_view json, tensor_shape& tensor, codebook_shape& book) {
    auto object = flat_json::parse(json);
    if (!object) {
        return object.error();
    }
    flat_json& fields = object.value();
    const status steps[] = {
        fields.take("tokens", tensor.tokens),
        fields.take("heads", tensor.heads),
        fields.take("head_dim", tensor.channels),
        fields.take("group_dim", book.dim),
        fields.take("depths", book.depths),
        fields.take("codewords", book.codewords),
        fields.finish(),
    };
    return first_failure(steps);
}

/// Codes and scales that no encoder makes. Errors: `damaged_file` saying which.
[[nodiscard]] inline status check_compressed(const compressed_tensor& tensor) {
    const codec& codec = *tensor.codec();
    const auto wrong = [](const std::string& what) { return error{error_code::damaged_file, what}; };
    const std::size_t codewords = codec.shape().codewords;
    const std::size_t vectors = tensor.shape().tokens * tensor.shape().heads * codec.groups();
    std::vector<code_t> codes(std::min<std::size_t>(vectors, 4096));
    for (std::size_t depth = 0; depth < codec.depths(); ++depth) {
        for (std::size_t first = 0; first < vectors; first += codes.size()) {
            const std::size_t count = std::min(codes.size(), vectors - first);
            unpack_codes(tensor.codes(depth).data(), first, count, codec.bits_per_code(), codes.data());
            for (std::size_t i = 0; i < count; ++i) {
                if (codes[i] >= codewords) {
                    return wrong("code " + std::to_string(first + i) + " of depth " + std::to_string(depth) + " is " +
                                 std::to_string(codes[i]) + ", must be below codewords, " + std::to_string(codewords));
                }
            }
        }
    }
    std::vector<float> scales(codec.stores_scale() ? tensor.shape().tokens * tensor.shape().heads : 0);
    if (status done = read_floats(byte_source::view(tensor.scales()), 0, codec.scale_type(), scales); !done) {
        return done;
    }
    for (std::size_t i = 0; i < scales.size(); ++i) {
        if (!(scales[i] > 0.0F) || !std::isfinite(scales[i])) {
            return wrong("scale " + std::to_string(i) + " is " + std::to_string(scales[i]) +
                         ", must be finite and above 0");
        }
    }
    return {};
}

/// One side; `json` is what the metadata says of it.
[[nodiscard]] inline result<compressed_tensor> load_compressed_tensor(side_reader& side, const std::string& name,
                                                                      std::string_view json,
                                                                      const std::shared_ptr<const codec>& with) {
    const safetensors_file& file = side.file();
    const auto mismatch = [&](const std::string& what) {
        return error{error_code::invalid_argument, file.name() + ": " + name + ": " + what};
    };
    tensor_shape shape;
    codebook_shape book;
    if (status parsed = parse_compressed_shape(json, shape, book); !parsed) {
        return side.damaged(parsed.error().message);
    }
    const std::string* const made_by = file.find_metadata(name + std::string(codec_suffix));
    if (made_by == nullptr) {
        return side.damaged("metadata " + in_quotes(name + std::string(codec_suffix)) + " is missing");
    }
    if (with == nullptr) {
        return mismatch("needs codec " + in_quotes(*made_by) + ", but the codecs given have none for it");
    }
    const auto given = codec_fingerprint(*with);
    if (!given || given.value() != *made_by) {
        return mismatch("was compressed with codec " + in_quotes(*made_by) + ", but the codec given for it is " +
                        (given ? in_quotes(given.value()) : "one of policies that a file cannot name"));
    }
    // Shapes are compared before memory is asked for, so it is never more than the file has bytes.
    std::size_t codes = 0;
    if (shape.channels != with->head_dim() || book != with->shape() || shape.heads == 0 ||
        __builtin_mul_overflow(shape.tokens, shape.heads, &codes) ||
        __builtin_mul_overflow(codes, 16 * with->groups(), &codes)) {
        return side.damaged("shapes " + in_quotes(json) + " are not those of a tensor that its codec compresses");
    }
    codes /= 16;
    if (status found =
            side.expect("codes", storage_type::uint8, {book.depths, packed_bytes(codes, with->bits_per_code())});
        !found) {
        return found.error();
    }
    if (with->stores_scale()) {
        if (status found = side.expect("scales", storage_type_of(with->scale_type()), {shape.tokens, shape.heads});
            !found) {
            return found.error();
        }
    }
    auto made = compressed_tensor::create(with, shape.tokens, shape.heads);
    if (!made) {
        return side.blame_file(made.error());
    }
    compressed_tensor& tensor = made.value();
    for (std::size_t depth = 0; depth < book.depths; ++depth) {
        const std::span<std::byte> plane = tensor.codes(depth);
        if (status done = file.read(*file.tensor(side.tensor_name("codes")).value(), plane, depth * plane.size());
            !done) {
            return done.error();
        }
    }
    if (with->stores_scale()) {
        if (status done = file.read(*file.tensor(side.tensor_name("scales")).value(), tensor.scales()); !done) {
            return done.error();
        }
    }
    if (status good = check_compressed(tensor); !good) {
        return side.damaged(good.error().message);
    }
    return made;
}

[[nodiscard]] inline result<compressed_set> load_compressed(const safetensors_file& file, const model_codecs& codecs) {
    if (status sealed = check_sealed(file, compressed_file_format, compressed_file_version); !sealed) {
        return sealed.error();
    }
    const auto damaged = [&file](const std::string& what) {
        return error{error_code::damaged_file, file.name() + ": " + what};
    };
    compressed_set set;
    std::size_t tensors = 0;
    for (const auto& entry : file.metadata()) {
        if (!is_reserved(entry.first)) {
            set.metadata.insert(entry);
            continue;
        }
        if (entry.first.substr(0, layer_prefix.size()) != layer_prefix) {
            continue;
        }
        // Each side has two entries; the shapes' one loads it.
        const bool is_codec = std::string_view(entry.first).ends_with(codec_suffix);
        const std::string name = entry.first.substr(0, entry.first.size() - (is_codec ? codec_suffix.size() : 0));
        std::size_t layer = 0;
        bool is_key = false;
        if (!parse_side_name(name, layer, is_key) || file.find_metadata(name) == nullptr) {
            return damaged("metadata " + in_quotes(entry.first) + " names no layer and side");
        }
        if (is_codec) {
            continue;
        }
        const auto known = codecs.find(layer);
        const layer_codecs with = known == codecs.end() ? layer_codecs() : known->second;
        side_reader side(file, name);
        auto loaded = load_compressed_tensor(side, name, entry.second, is_key ? with.key : with.value);
        if (!loaded) {
            return loaded.error();
        }
        tensors += side.tensors();
        compressed_layer& into = set.layers[layer];
        (is_key ? into.key : into.value) = std::move(loaded).value();
    }
    if (set.layers.empty() || tensors != file.tensors().size()) {
        return damaged("holds " + std::to_string(file.tensors().size()) + " tensors, but what its metadata names has " +
                       std::to_string(tensors));
    }
    return set;
}

}  // namespace detail

/// Writes compressed keys and values to one file, all or nothing.
/// Errors: `invalid_argument` for an empty set, a codec that a file cannot describe, a reserved metadata key or text
///         that is not UTF-8; `io`. An old file is then as it was.
[[nodiscard]] inline status save_compressed(const std::filesystem::path& path, const compressed_set& set) {
    if (status allowed = detail::check_user_metadata(path, set.metadata); !allowed) {
        return allowed;
    }
    struct part {
        std::string name;
        const compressed_tensor* tensor;
    };
    std::vector<part> parts;
    metadata_map metadata = set.metadata;
    std::vector<tensor_info> infos;
    for (const auto& layer : set.layers) {
        if (status valid = detail::check_layer(path, layer.first); !valid) {
            return valid;
        }
        for (const bool is_key : {true, false}) {
            const std::optional<compressed_tensor>& saved = is_key ? layer.second.key : layer.second.value;
            if (!saved) {
                continue;
            }
            const std::string name = detail::side_name(layer.first, is_key);
            auto fingerprint = codec_fingerprint(*saved->codec());
            if (!fingerprint) {
                return error{fingerprint.error().code,
                             path.string() + ": " + name + ": " + fingerprint.error().message};
            }
            metadata[name] = detail::compressed_shape_json(saved->shape(), saved->codec()->shape());
            metadata[name + std::string(detail::codec_suffix)] = std::move(fingerprint).value();
            parts.push_back({name, &*saved});
        }
    }
    if (parts.empty()) {
        return error{error_code::invalid_argument, path.string() + ": nothing compressed to save"};
    }
    // All scales before all codes: so each tensor is aligned to its elements, 4-byte scales before 2-byte ones.
    std::stable_sort(parts.begin(), parts.end(), [](const part& a, const part& b) {
        return size_of(a.tensor->codec()->scale_type()) > size_of(b.tensor->codec()->scale_type());
    });
    for (const part& each : parts) {
        if (each.tensor->codec()->stores_scale()) {
            infos.push_back({each.name + ".scales",
                             storage_type_of(each.tensor->codec()->scale_type()),
                             {each.tensor->shape().tokens, each.tensor->shape().heads}});
        }
    }
    for (const part& each : parts) {
        const std::size_t depths = each.tensor->codec()->depths();
        infos.push_back({each.name + ".codes", storage_type::uint8, {depths, each.tensor->code_bytes() / depths}});
    }
    auto writer = detail::create_sealed(path, compressed_file_format, compressed_file_version, std::move(metadata),
                                        std::move(infos));
    if (!writer) {
        return writer.error();
    }
    for (const part& each : parts) {
        if (status done = writer.value().write(each.tensor->scales()); !done) {
            return done;
        }
    }
    for (const part& each : parts) {
        for (std::size_t depth = 0; depth < each.tensor->codec()->depths(); ++depth) {
            if (status done = writer.value().write(each.tensor->codes(depth)); !done) {
                return done;
            }
        }
    }
    return writer.value().commit();
}

/// Reads compressed keys and values, given the codecs that they were made with. Everything is checked before anything
/// is returned: format, version, checksum, every field, the codecs' fingerprints, every code and every scale.
/// Errors: `invalid_argument` when a codec is missing or another one, naming layer and side; `io`, `damaged_file`,
///         `out_of_memory`; `unsupported` for a version that this library does not read.
[[nodiscard]] inline result<compressed_set> load_compressed(const std::filesystem::path& path,
                                                            const model_codecs& codecs) {
    auto file = safetensors_file::open(path);
    if (!file) {
        return file.error();
    }
    return detail::load_compressed(file.value(), codecs);
}

/// The same from a file's bytes in memory, which are not needed afterwards.
[[nodiscard]] inline result<compressed_set> load_compressed(std::span<const std::byte> bytes,
                                                            const model_codecs& codecs) {
    auto file = safetensors_file::parse(bytes);
    if (!file) {
        return file.error();
    }
    return detail::load_compressed(file.value(), codecs);
}

RVQKV_NAMESPACE_END
