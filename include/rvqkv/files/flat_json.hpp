// SPDX-License-Identifier: MIT
/// @file
/// Small flat JSON objects, `{"head_dim":128,"scale":"std_dev","decay":0.99}`, as rvqkv's files describe things with:
/// made field by field, and read strictly.
#pragma once

#include "rvqkv/core/error.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/safetensors_header.hpp"

#include <concepts>
#include <cstddef>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// The shortest decimal number that reads back as the same double. Precondition: finite.
[[nodiscard]] inline std::string number_text(double value) {
    return nlohmann::json(value).dump();
}

/// Makes an object.
class flat_json_writer {
public:
    flat_json_writer& add(std::string_view field, std::size_t number) { return put(field, std::to_string(number)); }
    flat_json_writer& add(std::string_view field, double number) { return put(field, number_text(number)); }
    flat_json_writer& add(std::string_view field, std::string_view text) { return put(field, json_string(text)); }
    [[nodiscard]] std::string text() const { return '{' + fields_ + '}'; }

private:
    flat_json_writer& put(std::string_view field, const std::string& value) {
        fields_ += (fields_.empty() ? "" : ",") + json_string(field) + ':' + value;
        return *this;
    }
    std::string fields_;
};

/// Reads an object. Each `take` removes a field, so that what is left at the end is what nobody knows.
class flat_json {
    using value_type = std::variant<std::size_t, double, std::string>;
    using field_map = std::map<std::string, value_type, std::less<>>;

public:
    /// Errors: `damaged_file` for anything but a flat object of numbers and texts, or a field that appears twice.
    [[nodiscard]] static result<flat_json> parse(std::string_view text) {
        flat_json object;
        reader events(object.fields_);
        // The parser would take a zero byte for the end of the text.
        if (text.find('\0') != std::string_view::npos) {
            return error{error_code::damaged_file, in_quotes(text) + " is not valid JSON"};
        }
        if (!nlohmann::json::sax_parse(text.data(), text.data() + text.size(), &events)) {
            return error{error_code::damaged_file, events.failure};
        }
        return object;
    }

    /// A whole number of 0 or more.
    template <std::unsigned_integral Number>
    [[nodiscard]] status take(std::string_view field, Number& number) {
        static_assert(sizeof(Number) == sizeof(std::size_t));
        return take_if(field, "a whole number of 0 or more", [&](const value_type& value) {
            const auto* found = std::get_if<std::size_t>(&value);
            number = found == nullptr ? number : *found;
            return found != nullptr;
        });
    }

    /// Any finite number.
    [[nodiscard]] status take(std::string_view field, double& number) {
        return take_if(field, "a number", [&](const value_type& value) {
            if (const auto* whole = std::get_if<std::size_t>(&value)) {
                number = static_cast<double>(*whole);
                return true;
            }
            const auto* found = std::get_if<double>(&value);
            number = found == nullptr ? number : *found;
            return found != nullptr;
        });
    }

    /// One of the values that `name_of` names.
    template <class Kind, std::size_t Count>
    [[nodiscard]] status take(std::string_view field, const Kind (&kinds)[Count], Kind& kind) {
        std::string names;
        for (const Kind each : kinds) {
            names += (names.empty() ? "one of '" : "', '") + std::string(name_of(each));
        }
        return take_if(field, names + "'", [&](const value_type& value) {
            const auto* name = std::get_if<std::string>(&value);
            for (const Kind each : kinds) {
                if (name != nullptr && *name == name_of(each)) {
                    kind = each;
                    return true;
                }
            }
            return false;
        });
    }

    /// Errors: `damaged_file` naming a field that was not taken.
    [[nodiscard]] status finish() const {
        return fields_.empty()
                   ? status{}
                   : error{error_code::damaged_file, "field " + in_quotes(fields_.begin()->first) + " is not known"};
    }

private:
    /// Takes the parser's events; false ends the parse, so nothing nested is ever entered.
    struct reader {
        using json = nlohmann::json;
        explicit reader(field_map& into) : fields(into) {}

        bool null() { return unexpected("null"); }
        bool boolean(bool value) { return unexpected(value ? "true" : "false"); }
        bool number_integer(json::number_integer_t value) { return put(static_cast<double>(value)); }
        bool number_unsigned(json::number_unsigned_t value) { return put(static_cast<std::size_t>(value)); }
        bool number_float(json::number_float_t value, const std::string& /*text*/) { return put(value); }
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
            failure = inside ? "field " + in_quotes(name) + ": a number or a text is wanted, not " + what
                             : "an object is wanted, not " + what;
            return false;
        }

        field_map& fields;
        std::string name;
        std::string failure;
        bool inside = false;
    };

    template <class Accept>
    [[nodiscard]] status take_if(std::string_view field, const std::string& wanted, const Accept& accept) {
        const auto at = fields_.find(field);
        if (at == fields_.end()) {
            return error{error_code::damaged_file, "field " + in_quotes(field) + " is missing"};
        }
        if (!accept(at->second)) {
            const auto* number = std::get_if<double>(&at->second);
            const auto* text = std::get_if<std::string>(&at->second);
            return error{error_code::damaged_file,
                         "field " + in_quotes(field) + " is " +
                             (number != nullptr ? number_text(*number)
                              : text != nullptr ? in_quotes(*text)
                                                : std::to_string(*std::get_if<std::size_t>(&at->second))) +
                             ", must be " + wanted};
        }
        fields_.erase(at);
        return {};
    }

    field_map fields_;
};

/// The first failure of several steps.
template <std::size_t Count>
[[nodiscard]] status first_failure(const status (&steps)[Count]) {
    for (const status& step : steps) {
        if (!step) {
            return step;
        }
    }
    return {};
}

}  // namespace detail
RVQKV_NAMESPACE_END
