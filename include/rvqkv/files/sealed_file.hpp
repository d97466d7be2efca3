// SPDX-License-Identifier: MIT
/// @file
/// What rvqkv's own files have in common: safetensors whose metadata names a format and its version, describes layers
/// and sides ("layers.12.key") in flat JSON, and seals the file with a checksum.
#pragma once

#include "rvqkv/core/error.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/flat_json.hpp"
#include "rvqkv/files/safetensors.hpp"
#include "rvqkv/files/safetensors_header.hpp"
#include "rvqkv/quantize/codec.hpp"

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN
namespace detail {

inline constexpr std::string_view format_key = "format";
inline constexpr std::string_view version_key = "version";
inline constexpr std::string_view layer_prefix = "layers.";
inline constexpr std::size_t max_layer = 65535;
inline constexpr dtype all_dtypes[] = {dtype::float32, dtype::float16, dtype::bfloat16};
inline constexpr distance all_distances[] = {distance::euclidean, distance::cosine};

/// Metadata that a file's format has a use for; the rest is the user's.
[[nodiscard]] inline bool is_reserved(std::string_view key) {
    return key == format_key || key == version_key || key == checksum_key ||
           key.substr(0, layer_prefix.size()) == layer_prefix;
}

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

/// A layer's number must be one that the reader takes.
[[nodiscard]] inline status check_layer(const std::filesystem::path& path, std::size_t layer) {
    if (layer > max_layer) {
        return error{error_code::invalid_argument, path.string() + ": layer is " + std::to_string(layer) +
                                                       ", must be at most " + std::to_string(max_layer)};
    }
    return {};
}

/// All of a spec but the permutation, which is a tensor.
[[nodiscard]] inline std::string codec_spec_json(const codec_spec& spec) {
    return flat_json_writer()
        .add("head_dim", spec.head_dim)
        .add("group_dim", spec.shape.dim)
        .add("depths", spec.shape.depths)
        .add("codewords", spec.shape.codewords)
        .add("scale", name_of(spec.scale))
        .add("scale_type", name_of(spec.scale_type))
        .add("grouping", name_of(spec.grouping))
        .add("distance", name_of(spec.metric))
        .add("weight_type", name_of(spec.weight_type))
        .text();
}

/// Reads one layer's one side: `name` is "layers.L.key" or "layers.L.value".
class side_reader {
public:
    side_reader(const safetensors_file& file, std::string name) : file_(file), name_(std::move(name)) {}

    [[nodiscard]] const safetensors_file& file() const noexcept { return file_; }
    [[nodiscard]] std::string tensor_name(std::string_view last) const { return name_ + '.' + std::string(last); }
    /// How many tensors `expect` has found.
    [[nodiscard]] std::size_t tensors() const noexcept { return tensors_; }

    /// Errors: `damaged_file`, about this side.
    [[nodiscard]] error damaged(const std::string& what) const {
        return {error_code::damaged_file, file_.name() + ": " + name_ + ": " + what};
    }
    /// An argument that came out of the file is the file's fault.
    [[nodiscard]] error blame_file(const error& cause) const {
        return cause.code == error_code::invalid_argument ? damaged(cause.message) : cause;
    }

    /// Errors: `damaged_file` unless there is such a tensor, exactly.
    [[nodiscard]] status expect(std::string_view last, storage_type type, const std::vector<std::size_t>& shape) {
        const std::string tensor = tensor_name(last);
        const auto info = file_.tensor(tensor);
        if (!info) {
            return damaged("tensor " + in_quotes(tensor) + " is missing");
        }
        if (info.value()->shape != shape || info.value()->type != type) {
            return damaged("tensor " + in_quotes(tensor) + " is " + std::string(name_of(info.value()->type)) + ' ' +
                           shape_text(info.value()->shape) + ", but by the metadata it must be " +
                           std::string(name_of(type)) + ' ' + shape_text(shape));
        }
        ++tensors_;
        return {};
    }

    /// Errors: `damaged_file` naming the field.
    [[nodiscard]] result<codec_spec> read_spec(std::string_view json) {
        auto object = flat_json::parse(json);
        if (!object) {
            return damaged(object.error().message);
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
            spec.shape.validate(),
        };
        if (status wrong = first_failure(steps); !wrong) {
            return damaged(wrong.error().message);
        }
        if (spec.grouping == grouping_kind::permuted) {
            if (auto found = expect("permutation", storage_type::uint16, {spec.head_dim}); !found) {
                return found.error();
            }
            const auto order = file_.read_as<std::uint16_t>(tensor_name("permutation"));
            if (!order) {
                return order.error();
            }
            spec.permutation.assign(order.value().span().begin(), order.value().span().end());
        }
        if (status wrong = spec.validate(); !wrong) {
            return damaged(wrong.error().message);
        }
        return spec;
    }

private:
    const safetensors_file& file_;
    std::string name_;
    std::size_t tensors_ = 0;
};

/// Starts a file of a format; `metadata` holds what the format needs and what is the user's.
[[nodiscard]] inline result<safetensors_writer> create_sealed(const std::filesystem::path& path,
                                                              std::string_view format, std::string_view version,
                                                              metadata_map metadata, std::vector<tensor_info> tensors) {
    metadata[std::string(format_key)] = format;
    metadata[std::string(version_key)] = version;
    return safetensors_writer::create(path, std::move(tensors), metadata, with_checksum::yes);
}

/// A tensor to write and its bytes, which stay the caller's.
struct tensor_bytes {
    tensor_info info;
    std::span<const std::byte> bytes;
};

/// Writes a file of a format, all or nothing.
[[nodiscard]] inline status save_sealed(const std::filesystem::path& path, std::string_view format,
                                        std::string_view version, metadata_map metadata,
                                        std::vector<tensor_bytes> tensors) {
    // Wide elements first, so that each tensor is aligned for readers that map the file.
    std::stable_sort(tensors.begin(), tensors.end(), [](const tensor_bytes& a, const tensor_bytes& b) {
        return size_of(a.info.type) > size_of(b.info.type);
    });
    std::vector<tensor_info> infos;
    infos.reserve(tensors.size());
    for (const tensor_bytes& tensor : tensors) {
        infos.push_back(tensor.info);
    }
    auto writer = create_sealed(path, format, version, std::move(metadata), std::move(infos));
    if (!writer) {
        return writer.error();
    }
    for (const tensor_bytes& tensor : tensors) {
        if (auto done = writer.value().write(tensor.bytes); !done) {
            return done;
        }
    }
    return writer.value().commit();
}

/// Errors: `invalid_argument` for a key of the user's metadata that is reserved.
[[nodiscard]] inline status check_user_metadata(const std::filesystem::path& path, const metadata_map& metadata) {
    for (const auto& entry : metadata) {
        if (is_reserved(entry.first)) {
            return error{error_code::invalid_argument,
                         path.string() + ": metadata key " + in_quotes(entry.first) + " is reserved"};
        }
    }
    return {};
}

/// Checks that a file is of the format and version wanted, and unchanged since it was written.
/// Errors: `damaged_file`, `unsupported` for another version, `io`.
[[nodiscard]] inline status check_sealed(const safetensors_file& file, std::string_view format,
                                         std::string_view version) {
    const std::string* const found_format = file.find_metadata(format_key);
    if (found_format == nullptr || *found_format != format) {
        return error{error_code::damaged_file, file.name() + ": metadata 'format' is " +
                                                   (found_format == nullptr ? "missing" : in_quotes(*found_format)) +
                                                   ", must be " + in_quotes(format)};
    }
    const std::string* const found_version = file.find_metadata(version_key);
    if (found_version == nullptr || *found_version != version) {
        return error{found_version == nullptr ? error_code::damaged_file : error_code::unsupported,
                     file.name() + ": " + std::string(format) + " version " +
                         (found_version == nullptr ? "is missing" : in_quotes(*found_version)) +
                         ", this library reads " + in_quotes(version)};
    }
    return file.verify_checksum();
}

}  // namespace detail
RVQKV_NAMESPACE_END
