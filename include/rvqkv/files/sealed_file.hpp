// SPDX-License-Identifier: MIT
/// @file
/// What rvqkv's own files have in common: safetensors whose metadata names a format and its version, seals the file
/// with a checksum, and describes things in small flat JSON objects.
#pragma once

#include "rvqkv/core/error.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/safetensors.hpp"
#include "rvqkv/files/safetensors_header.hpp"

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// A JSON object of numbers (0 or more) and names: `{"head_dim":128,"scale":"std_dev"}`. Each `take` removes a field,
/// so that what is left at the end is what nobody knows.
class flat_json {
public:
    using value_type = std::variant<std::size_t, std::string>;

    /// Errors: `damaged_file` for anything but a flat object, or a field that appears twice.
    [[nodiscard]] static result<flat_json> parse(std::string_view text) {
        flat_json object;
        reader events(object.fields_);
        if (text.find('\0') != std::string_view::npos ||
            !nlohmann::json::sax_parse(text.data(), text.data() + text.size(), &events)) {
            return error{error_code::damaged_file,
                         events.failure.empty() ? in_quotes(text) + " is not valid JSON" : events.failure};
        }
        return object;
    }

    /// A number of at most `most`.
    [[nodiscard]] status take(std::string_view field, std::size_t& number,
                              std::size_t most = std::numeric_limits<std::size_t>::max()) {
        const auto at = fields_.find(field);
        if (at == fields_.end()) {
            return missing(field);
        }
        const auto* found = std::get_if<std::size_t>(&at->second);
        if (found == nullptr || *found > most) {
            return wrong(field, at->second, "a number from 0 to " + std::to_string(most));
        }
        number = *found;
        fields_.erase(at);
        return {};
    }

    /// One of the values that `name_of` names.
    template <class Kind, std::size_t Count>
    [[nodiscard]] status take(std::string_view field, const Kind (&kinds)[Count], Kind& kind) {
        const auto at = fields_.find(field);
        if (at == fields_.end()) {
            return missing(field);
        }
        std::string names;
        for (const Kind each : kinds) {
            if (const auto* name = std::get_if<std::string>(&at->second); name != nullptr && *name == name_of(each)) {
                kind = each;
                fields_.erase(at);
                return {};
            }
            names += (names.empty() ? "one of '" : "', '") + std::string(name_of(each));
        }
        return wrong(field, at->second, names + "'");
    }

    /// Errors: `damaged_file` naming a field that was not taken.
    [[nodiscard]] status finish() const {
        return fields_.empty()
                   ? status{}
                   : error{error_code::damaged_file, "field " + in_quotes(fields_.begin()->first) + " is not known"};
    }

private:
    using field_map = std::map<std::string, value_type, std::less<>>;

    /// Takes the parser's events; false ends the parse.
    struct reader {
        using json = nlohmann::json;
        explicit reader(field_map& into) : fields(into) {}

        bool null() { return unexpected("null"); }
        bool boolean(bool value) { return unexpected(value ? "true" : "false"); }
        bool number_integer(json::number_integer_t value) { return unexpected(std::to_string(value)); }
        bool number_unsigned(json::number_unsigned_t value) { return put(static_cast<std::size_t>(value)); }
        bool number_float(json::number_float_t /*value*/, const std::string& text) { return unexpected(text); }
        bool string(std::string& value) { return put(std::move(value)); }
        bool binary(json::binary_t& /*value*/) { return unexpected("bytes"); }
        bool start_object(std::size_t /*elements*/) {
            return std::exchange(inside, true) ? unexpected("an object") : true;
        }
        bool key(std::string& value) {
            name = std::move(value);
            return true;
        }
        bool end_object() { return true; }
        bool start_array(std::size_t /*elements*/) { return unexpected("an array"); }
        bool end_array() { return true; }
        bool parse_error(std::size_t position, const std::string& /*token*/, const json::exception& /*cause*/) {
            failure = "not valid JSON at character " + std::to_string(position);
            return false;
        }

        bool put(value_type value) {
            if (!inside) {
                return unexpected("a single value");
            }
            if (!fields.emplace(name, std::move(value)).second) {
                failure = "field " + in_quotes(name) + " appears twice";
                return false;
            }
            return true;
        }
        bool unexpected(const std::string& what) {
            failure = inside ? "field " + in_quotes(name) + ": a number of 0 or more or a text is wanted, not " + what
                             : "an object is wanted, not " + what;
            return false;
        }

        field_map& fields;
        std::string name;
        std::string failure;
        bool inside = false;
    };

    [[nodiscard]] static error missing(std::string_view field) {
        return {error_code::damaged_file, "field " + in_quotes(field) + " is missing"};
    }
    [[nodiscard]] static error wrong(std::string_view field, const value_type& value, const std::string& wanted) {
        const auto* number = std::get_if<std::size_t>(&value);
        return {error_code::damaged_file,
                "field " + in_quotes(field) + " is " +
                    (number != nullptr ? std::to_string(*number) : in_quotes(*std::get_if<std::string>(&value))) +
                    ", must be " + wanted};
    }

    field_map fields_;
};

inline constexpr std::string_view format_key = "format";
inline constexpr std::string_view version_key = "version";

/// A tensor to write and its bytes, which stay the caller's.
struct tensor_bytes {
    tensor_info info;
    std::span<const std::byte> bytes;
};

/// Writes a file of a format, sealed, all or nothing.
[[nodiscard]] inline status save_sealed(const std::filesystem::path& path, std::string_view format,
                                        std::string_view version, metadata_map metadata,
                                        std::vector<tensor_bytes> tensors) {
    metadata[std::string(format_key)] = format;
    metadata[std::string(version_key)] = version;
    // Wide elements first: so each tensor stays aligned for readers that map the file.
    std::stable_sort(tensors.begin(), tensors.end(), [](const tensor_bytes& a, const tensor_bytes& b) {
        return size_of(a.info.type) > size_of(b.info.type);
    });
    std::vector<tensor_info> infos;
    for (const tensor_bytes& tensor : tensors) {
        infos.push_back(tensor.info);
    }
    auto writer = safetensors_writer::create(path, std::move(infos), metadata, with_checksum::yes);
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
