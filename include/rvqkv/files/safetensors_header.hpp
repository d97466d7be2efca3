// SPDX-License-Identifier: MIT
/// @file
/// The JSON header of a safetensors file, read and made: names, element types, shapes and places of the tensors, and
/// text metadata. Reading is strict, since headers come from anywhere: every field is checked before it is used.
#pragma once

#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/owned_tensor.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// Element types that a safetensors file may hold.
enum class storage_type : std::uint8_t {
    boolean,
    uint8,
    int8,
    float8_e4m3,
    float8_e5m2,
    float8_e8m0,
    uint16,
    int16,
    float16,
    bfloat16,
    uint32,
    int32,
    float32,
    uint64,
    int64,
    float64,
    complex64
};

namespace detail {

struct storage_facts {
    storage_type type;
    std::string_view name;
    std::size_t bytes;
};
inline constexpr storage_facts storage_types[] = {
    {storage_type::boolean, "BOOL", 1},
    {storage_type::uint8, "U8", 1},
    {storage_type::int8, "I8", 1},
    {storage_type::float8_e4m3, "F8_E4M3", 1},
    {storage_type::float8_e5m2, "F8_E5M2", 1},
    {storage_type::float8_e8m0, "F8_E8M0", 1},
    {storage_type::uint16, "U16", 2},
    {storage_type::int16, "I16", 2},
    {storage_type::float16, "F16", 2},
    {storage_type::bfloat16, "BF16", 2},
    {storage_type::uint32, "U32", 4},
    {storage_type::int32, "I32", 4},
    {storage_type::float32, "F32", 4},
    {storage_type::uint64, "U64", 8},
    {storage_type::int64, "I64", 8},
    {storage_type::float64, "F64", 8},
    {storage_type::complex64, "C64", 8},
};

}  // namespace detail

/// As the file spells it: "F32", "BF16", "U8", ...
[[nodiscard]] constexpr std::string_view name_of(storage_type type) noexcept {
    return detail::storage_types[static_cast<std::size_t>(type)].name;
}
[[nodiscard]] constexpr std::size_t size_of(storage_type type) noexcept {
    return detail::storage_types[static_cast<std::size_t>(type)].bytes;
}
[[nodiscard]] constexpr storage_type storage_type_of(dtype type) noexcept {
    return type == dtype::float32   ? storage_type::float32
           : type == dtype::float16 ? storage_type::float16
                                    : storage_type::bfloat16;
}

/// One tensor of a file.
struct tensor_info {
    std::string name;
    storage_type type = storage_type::float32;
    std::vector<std::size_t> shape;
    std::size_t offset = 0;  ///< First byte, counted from the end of the header. A writer sets it itself.
    std::size_t bytes = 0;   ///< Of all elements. A writer sets it itself.
};

/// Free text that travels in a file's header.
using metadata_map = std::map<std::string, std::string, std::less<>>;

/// Everything a header says.
struct safetensors_header {
    std::vector<tensor_info> tensors;  ///< By name; names differ.
    metadata_map metadata;
};

/// What the format allows a header to take.
inline constexpr std::size_t max_safetensors_header_bytes = 100'000'000;

namespace detail {

inline constexpr std::string_view metadata_key = "__metadata__";

/// Takes the parser's events one by one. A header is an object of objects, so every legal position is one of these
/// places; an event that does not belong there ends the parse, however deep the rest of the text goes.
class safetensors_header_reader {
public:
    using json = nlohmann::json;

    explicit safetensors_header_reader(std::string_view text) : text_(text) {}

    [[nodiscard]] safetensors_header take_header() { return std::move(header_); }
    [[nodiscard]] const error& failure() const noexcept { return failure_; }

    // The interface that nlohmann::json::sax_parse calls; false ends the parse.
    bool null() { return unexpected("null"); }
    bool boolean(bool value) { return unexpected(value ? "true" : "false"); }
    bool number_integer(json::number_integer_t value) { return unexpected(std::to_string(value)); }
    bool number_float(json::number_float_t /*value*/, const std::string& text) { return unexpected(text); }
    bool binary(json::binary_t& /*value*/) { return unexpected("bytes"); }

    bool number_unsigned(json::number_unsigned_t value) {
        if (place_ == place::shape) {
            constexpr std::size_t max_dimensions = 64;
            if (tensor_.shape.size() == max_dimensions) {
                return fail_tensor("shape has more than " + std::to_string(max_dimensions) + " dimensions");
            }
            tensor_.shape.push_back(value);
            return true;
        }
        if (place_ == place::offsets) {
            if (offset_count_ == 2) {
                return fail_tensor("data_offsets holds more than 2 numbers");
            }
            offsets_[offset_count_++] = value;
            return true;
        }
        return unexpected(std::to_string(value));
    }

    bool string(std::string& value) {
        if (place_ == place::metadata) {
            if (!header_.metadata.emplace(key_, std::move(value)).second) {
                return fail_header("metadata " + in_quotes(key_) + " appears twice");
            }
            return true;
        }
        if (place_ == place::tensor && field_ == field::dtype) {
            for (const storage_facts& facts : storage_types) {
                if (facts.name == value) {
                    tensor_.type = facts.type;
                    return true;
                }
            }
            fail_tensor("dtype " + in_quotes(value) + " is not known");
            failure_.code = error_code::unsupported;
            return false;
        }
        return unexpected("the text " + in_quotes(value));
    }

    bool start_object(std::size_t /*elements*/) {
        if (place_ == place::outside) {
            place_ = place::root;
            return true;
        }
        if (place_ == place::root && key_ == metadata_key) {
            if (std::exchange(has_metadata_, true)) {
                return fail_header("__metadata__ appears twice");
            }
            place_ = place::metadata;
            return true;
        }
        if (place_ == place::root) {
            tensor_ = tensor_info{};
            tensor_.name = std::move(key_);
            has_dtype_ = has_shape_ = has_offsets_ = false;
            place_ = place::tensor;
            return true;
        }
        return unexpected("an object");
    }

    bool key(std::string& name) {
        if (place_ != place::tensor) {
            key_ = std::move(name);
            return true;
        }
        bool* seen = nullptr;
        if (name == "dtype") {
            field_ = field::dtype;
            seen = &has_dtype_;
        } else if (name == "shape") {
            field_ = field::shape;
            seen = &has_shape_;
        } else if (name == "data_offsets") {
            field_ = field::offsets;
            seen = &has_offsets_;
        } else {
            return fail_tensor("field " + in_quotes(name) + " is not known");
        }
        if (std::exchange(*seen, true)) {
            return fail_tensor("field " + in_quotes(name) + " appears twice");
        }
        return true;
    }

    bool start_array(std::size_t /*elements*/) {
        if (place_ == place::tensor && field_ == field::shape) {
            place_ = place::shape;
            return true;
        }
        if (place_ == place::tensor && field_ == field::offsets) {
            place_ = place::offsets;
            offset_count_ = 0;
            return true;
        }
        return unexpected("an array");
    }

    bool end_array() {
        if (place_ == place::offsets && offset_count_ != 2) {
            return fail_tensor("data_offsets holds " + std::to_string(offset_count_) + " numbers, not 2");
        }
        place_ = place::tensor;
        return true;
    }

    bool end_object() {
        if (place_ == place::tensor && !finish_tensor()) {
            return false;
        }
        place_ = place_ == place::root ? place::outside : place::root;
        return true;
    }

    bool parse_error(std::size_t position, const std::string& /*token*/, const json::exception& /*cause*/) {
        // The position counts from 1 and may point past the end.
        const std::size_t at = std::min(position == 0 ? 0 : position - 1, text_.size());
        const std::size_t from = at - std::min<std::size_t>(at, 16);
        return fail_header("not valid JSON at byte " + std::to_string(at) +
                           (at == text_.size() ? ", its end" : ", near " + in_quotes(text_.substr(from, 32))));
    }

private:
    enum class place { outside, root, metadata, tensor, shape, offsets };
    enum class field { dtype, shape, offsets };

    bool finish_tensor() {
        const char* const missing = !has_dtype_     ? "dtype"
                                    : !has_shape_   ? "shape"
                                    : !has_offsets_ ? "data_offsets"
                                                    : nullptr;
        if (missing != nullptr) {
            return fail_tensor(std::string("field '") + missing + "' is missing");
        }
        const std::string offsets =
            "data_offsets [" + std::to_string(offsets_[0]) + ", " + std::to_string(offsets_[1]) + "]";
        if (offsets_[0] > offsets_[1]) {
            return fail_tensor(offsets + " end before they begin");
        }
        std::size_t count = 0;
        if (!count_elements(tensor_.shape, count) || __builtin_mul_overflow(count, size_of(tensor_.type), &count)) {
            return fail_tensor("shape " + shape_text(tensor_.shape) + " overflows");
        }
        tensor_.offset = offsets_[0];
        tensor_.bytes = offsets_[1] - offsets_[0];
        if (tensor_.bytes != count) {
            return fail_tensor(offsets + " span " + std::to_string(tensor_.bytes) + " bytes, but shape " +
                               shape_text(tensor_.shape) + " of " + std::string(name_of(tensor_.type)) + " takes " +
                               std::to_string(count));
        }
        header_.tensors.push_back(std::move(tensor_));
        return true;
    }

    /// A value of a kind that its place does not allow.
    bool unexpected(const std::string& what) {
        switch (place_) {
            case place::outside: return fail_header("an object is wanted, not " + what);
            case place::root: return fail_header("tensor " + in_quotes(key_) + ": an object is wanted, not " + what);
            case place::metadata: return fail_header("metadata " + in_quotes(key_) + ": text is wanted, not " + what);
            case place::shape: return fail_tensor("shape: numbers of 0 or more are wanted, not " + what);
            case place::offsets: return fail_tensor("data_offsets: numbers of 0 or more are wanted, not " + what);
            case place::tensor: break;
        }
        return fail_tensor(field_ == field::dtype   ? "dtype: text is wanted, not " + what
                           : field_ == field::shape ? "shape: an array is wanted, not " + what
                                                    : "data_offsets: an array is wanted, not " + what);
    }
    bool fail_tensor(const std::string& what) { return fail_header("tensor " + in_quotes(tensor_.name) + ": " + what); }
    bool fail_header(const std::string& what) {
        failure_ = {error_code::damaged_file, "header: " + what};
        return false;
    }

    std::string_view text_;
    safetensors_header header_;
    error failure_;
    place place_ = place::outside;
    field field_ = field::dtype;
    std::string key_;
    tensor_info tensor_;
    std::size_t offsets_[2] = {0, 0};
    std::size_t offset_count_ = 0;
    bool has_metadata_ = false;
    bool has_dtype_ = false;
    bool has_shape_ = false;
    bool has_offsets_ = false;
};

/// The tensors must fill `[0, data_bytes)` without a hole or an overlap.
[[nodiscard]] inline status check_tensor_places(std::span<const tensor_info> tensors, std::size_t data_bytes) {
    std::vector<const tensor_info*> in_order;
    in_order.reserve(tensors.size());
    for (const tensor_info& tensor : tensors) {
        in_order.push_back(&tensor);
    }
    std::sort(in_order.begin(), in_order.end(), [](const tensor_info* a, const tensor_info* b) {
        return a->offset != b->offset ? a->offset < b->offset : a->bytes < b->bytes;
    });
    std::size_t end = 0;
    for (const tensor_info* tensor : in_order) {
        if (tensor->offset != end) {
            return error{error_code::damaged_file,
                         "header: tensor " + in_quotes(tensor->name) + ": begins at byte " +
                             std::to_string(tensor->offset) + " of the data, " +
                             (tensor->offset < end ? "inside another tensor" : "leaving a hole") + " before byte " +
                             std::to_string(std::max(end, tensor->offset))};
        }
        end += tensor->bytes;
    }
    if (end != data_bytes) {
        return error{error_code::damaged_file, "the tensors take " + std::to_string(end) +
                                                   " bytes of data, but the file has " + std::to_string(data_bytes)};
    }
    return {};
}

/// Text as a JSON string. Bytes that are not UTF-8 go through as they are, for the reader to refuse.
[[nodiscard]] inline std::string json_string(std::string_view text) {
    std::string out = "\"";
    for (const char c : text) {
        if (const auto byte = static_cast<unsigned char>(c); byte < 0x20) {
            out += byte < 0x10 ? "\\u000" : "\\u001";
            out += "0123456789abcdef"[byte & 15U];
        } else {
            out += c == '"' || c == '\\' ? std::string{'\\', c} : std::string{c};
        }
    }
    return out + '"';
}

}  // namespace detail

/// Reads a header: `text` is what stands between the length and the data, of which there are `data_bytes`.
/// Errors:     `damaged_file`, `unsupported` (an unknown dtype); the message names tensor, field and value.
/// Complexity: linear in the text, plus sorting the tensors; memory in proportion to the text.
[[nodiscard]] inline result<safetensors_header> parse_safetensors_header(std::string_view text,
                                                                         std::size_t data_bytes) {
    if (text.empty() || text.front() != '{') {
        return error{error_code::damaged_file,
                     text.empty() ? "header: empty"
                                  : "header: begins with " + detail::in_quotes(text.substr(0, 1)) + ", not with '{'"};
    }
    // The parser would take a zero byte for the end of the text.
    if (const std::size_t zero = text.find('\0'); zero != std::string_view::npos) {
        return error{error_code::damaged_file, "header: not valid JSON at byte " + std::to_string(zero) + ", a zero"};
    }
    detail::safetensors_header_reader reader(text);
    if (!nlohmann::json::sax_parse(text.data(), text.data() + text.size(), &reader)) {
        return reader.failure();
    }
    safetensors_header header = reader.take_header();
    const auto by_name = [](const tensor_info& a, const tensor_info& b) { return a.name < b.name; };
    std::sort(header.tensors.begin(), header.tensors.end(), by_name);
    const auto twin = std::adjacent_find(header.tensors.begin(), header.tensors.end(),
                                         [](const tensor_info& a, const tensor_info& b) { return a.name == b.name; });
    if (twin != header.tensors.end()) {
        return error{error_code::damaged_file, "header: tensor " + detail::in_quotes(twin->name) + " appears twice"};
    }
    if (auto placed = detail::check_tensor_places(header.tensors, data_bytes); !placed) {
        return placed.error();
    }
    return header;
}

RVQKV_NAMESPACE_END
