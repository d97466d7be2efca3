// SPDX-License-Identifier: MIT
/// @file
/// Tensors in NumPy's `.npy` files: read from versions 1 to 3, written as version 1. Element types: float32 (`<f4`),
/// float16 (`<f2`), and bfloat16, which NumPy itself has not and stores as two opaque bytes (`<V2` or `|V2`, as the
/// Python package ml_dtypes does).
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/files/atomic_file.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/owned_tensor.hpp"

#include <array>
#include <charconv>
#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

namespace detail {

inline constexpr std::string_view npy_magic = "\x93NUMPY";

/// The Python dictionary at the start of a `.npy` file:
/// `{'descr': '<f4', 'fortran_order': False, 'shape': (4096, 3, 64), }`, keys in any order.
class npy_header_reader {
public:
    explicit npy_header_reader(std::string_view text) : rest_(text), text_(text) {}

    [[nodiscard]] status read() {
        if (!take('{')) {
            return unexpected("a dictionary, '{'");
        }
        bool has_descr = false;
        bool has_order = false;
        bool has_shape = false;
        while (!take('}')) {
            std::string_view key;
            if (!take_string(key) || !take(':')) {
                return unexpected("a key in quotes and ':'");
            }
            bool* seen = nullptr;
            status read_value;
            if (key == "descr") {
                seen = &has_descr;
                read_value = read_descr();
            } else if (key == "fortran_order") {
                seen = &has_order;
                read_value = read_order();
            } else if (key == "shape") {
                seen = &has_shape;
                read_value = read_shape();
            } else {
                return wrong("key " + in_quotes(key) + " is not known");
            }
            if (!read_value) {
                return read_value;
            }
            if (std::exchange(*seen, true)) {
                return wrong("key " + in_quotes(key) + " appears twice");
            }
            if (!take(',') && !next_is('}')) {
                return unexpected("',' or '}'");
            }
        }
        skip_space();
        if (!rest_.empty()) {
            return unexpected("nothing more");
        }
        const char* const missing = !has_descr   ? "descr"
                                    : !has_order ? "fortran_order"
                                    : !has_shape ? "shape"
                                                 : nullptr;
        return missing == nullptr ? status{} : wrong(std::string("key '") + missing + "' is missing");
    }

    dtype type = dtype::float32;
    std::vector<std::size_t> shape;

private:
    [[nodiscard]] status read_descr() {
        if (next_is('[')) {
            return unsupported("descr: structured elements; want '<f4', '<f2' or '|V2' (bfloat16)");
        }
        std::string_view descr;
        if (!take_string(descr)) {
            return unexpected("an element type in quotes");
        }
        if (descr == "<f4") {
            type = dtype::float32;
        } else if (descr == "<f2") {
            type = dtype::float16;
        } else if (descr == "<V2" || descr == "|V2") {
            type = dtype::bfloat16;
        } else if (!descr.empty() && descr.front() == '>') {
            return unsupported("descr: " + in_quotes(descr) +
                               " is big-endian; save the array in little-endian order, e.g. array.astype('<f4')");
        } else {
            return unsupported("descr: " + in_quotes(descr) + "; want '<f4', '<f2' or '|V2' (bfloat16)");
        }
        return {};
    }

    [[nodiscard]] status read_order() {
        if (take_word("False")) {
            return {};
        }
        if (take_word("True")) {
            return unsupported("fortran_order: True; save the array in C order, e.g. numpy.ascontiguousarray(array)");
        }
        return unexpected("True or False");
    }

    [[nodiscard]] status read_shape() {
        if (!take('(')) {
            return unexpected("a shape, '('");
        }
        while (!take(')')) {
            skip_space();
            std::size_t extent = 0;
            const auto [end, failure] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), extent);
            if (failure == std::errc::result_out_of_range) {
                return wrong("shape: " + in_quotes(rest_.substr(0, 40)) + " overflows");
            }
            if (failure != std::errc{}) {
                return unexpected("a number of 0 or more in the shape");
            }
            rest_.remove_prefix(static_cast<std::size_t>(end - rest_.data()));
            constexpr std::size_t max_dimensions = 64;
            if (shape.size() == max_dimensions) {
                return wrong("shape has more than " + std::to_string(max_dimensions) + " dimensions");
            }
            shape.push_back(extent);
            if (!take(',') && !next_is(')')) {
                return unexpected("',' or ')' in the shape");
            }
        }
        return {};
    }

    void skip_space() noexcept {
        while (!rest_.empty() && (rest_.front() == ' ' || rest_.front() == '\t' || rest_.front() == '\n')) {
            rest_.remove_prefix(1);
        }
    }
    [[nodiscard]] bool next_is(char wanted) noexcept {
        skip_space();
        return !rest_.empty() && rest_.front() == wanted;
    }
    [[nodiscard]] bool take(char wanted) noexcept {
        const bool found = next_is(wanted);
        rest_.remove_prefix(found ? 1 : 0);
        return found;
    }
    [[nodiscard]] bool take_word(std::string_view wanted) noexcept {
        skip_space();
        const bool found = rest_.substr(0, wanted.size()) == wanted;
        rest_.remove_prefix(found ? wanted.size() : 0);
        return found;
    }
    /// Text without escapes: no key or element type has any.
    [[nodiscard]] bool take_string(std::string_view& text) noexcept {
        if (!next_is('\'') && !next_is('"')) {
            return false;
        }
        const std::size_t end = rest_.find(rest_.front(), 1);
        if (end == std::string_view::npos) {
            return false;
        }
        text = rest_.substr(1, end - 1);
        rest_.remove_prefix(end + 1);
        return true;
    }

    [[nodiscard]] error unexpected(const char* wanted) const {
        return wrong(std::string(wanted) + " is wanted at byte " + std::to_string(text_.size() - rest_.size()) +
                     (rest_.empty() ? ", its end" : ", not " + in_quotes(rest_.substr(0, 40))));
    }
    [[nodiscard]] static error wrong(const std::string& what) { return {error_code::damaged_file, "header: " + what}; }
    [[nodiscard]] static error unsupported(const std::string& what) {
        return {error_code::unsupported, "header: " + what};
    }

    std::string_view rest_;
    std::string_view text_;
};

}  // namespace detail

/// A `.npy` file open for reading: its header checked and in memory, its data where it was.
/// Threads: any number of readers.
class npy_file {
public:
    /// Opens a file and reads its header; the data stays on the disk until it is asked for.
    /// Errors: `io`; `damaged_file` when anything in the header is wrong or the file's size does not fit it;
    ///         `unsupported` for other versions, element types and orders than those named above.
    [[nodiscard]] static result<npy_file> open(const std::filesystem::path& path) {
        auto source = byte_source::open(path);
        if (!source) {
            return source.error();
        }
        return read_header(std::move(source).value());
    }

    /// The same for bytes in memory, which stay the caller's and must outlive this object.
    [[nodiscard]] static result<npy_file> parse(std::span<const std::byte> bytes) {
        return read_header(byte_source::view(bytes));
    }

    /// The path, or "memory".
    [[nodiscard]] const std::string& name() const noexcept { return source_.name(); }
    [[nodiscard]] dtype type() const noexcept { return type_; }
    /// As in the file, any number of dimensions.
    [[nodiscard]] std::span<const std::size_t> shape() const noexcept { return shape_; }

    /// The array as `[token, head, channel]`, in its own element type; of a two-dimensional one each row is cut into
    /// `heads` (0: one).
    /// Errors: `invalid_argument` (another shape, tokens not inside), `out_of_memory`, `io`.
    [[nodiscard]] result<owned_tensor> load(token_range tokens = {}, std::size_t heads = 0) const {
        const auto shape = detail::tokens_heads_channels(shape_, heads, source_.name());
        if (!shape) {
            return shape.error();
        }
        return detail::read_tokens(source_, data_begin_, type_, shape.value(), tokens, source_.name());
    }

private:
    npy_file() = default;

    [[nodiscard]] static result<npy_file> read_header(byte_source source) {
        std::array<unsigned char, 12> start{};
        const std::size_t magic = detail::npy_magic.size();
        if (source.size() < magic + 4) {
            return source.damaged("too short for a .npy file: " + std::to_string(source.size()) + " bytes");
        }
        const std::size_t have = std::min(start.size(), source.size());
        if (auto done = source.read(0, std::as_writable_bytes(std::span(start)).first(have)); !done) {
            return done.error();
        }
        if (std::string_view(reinterpret_cast<const char*>(start.data()), magic) != detail::npy_magic) {
            return source.damaged("not a .npy file: does not begin with '\\x93NUMPY'");
        }
        const unsigned major = start[magic];
        const unsigned minor = start[magic + 1];
        if (major < 1 || major > 3 || minor != 0) {
            return error{error_code::unsupported, source.name() + ": .npy version " + std::to_string(major) + "." +
                                                      std::to_string(minor) + "; want 1.0, 2.0 or 3.0"};
        }
        std::size_t length = start[magic + 2] + (std::size_t{start[magic + 3]} << 8U);
        std::size_t text_begin = magic + 4;
        if (major > 1) {
            length += (std::size_t{start[magic + 4]} << 16U) + (std::size_t{start[magic + 5]} << 24U);
            text_begin = magic + 6;
        }
        constexpr std::size_t longest = 65536;  // an array of numbers needs some hundred bytes
        if (length > longest || source.size() < text_begin || length > source.size() - text_begin) {
            return source.damaged("header length " + std::to_string(length) + " exceeds " +
                                  (length > longest ? "the limit of " + std::to_string(longest)
                                                    : "the file of " + std::to_string(source.size()) + " bytes"));
        }
        std::string text(length, '\0');
        if (auto done = source.read(text_begin, std::as_writable_bytes(std::span(text))); !done) {
            return done.error();
        }
        detail::npy_header_reader header(text);
        if (auto done = header.read(); !done) {
            return error{done.error().code, source.name() + ": " + done.error().message};
        }
        std::size_t bytes = 0;
        if (!detail::count_elements(header.shape, bytes) ||
            __builtin_mul_overflow(bytes, size_of(header.type), &bytes)) {
            return source.damaged("header: shape " + detail::shape_text(header.shape) + " overflows");
        }
        npy_file file;
        file.data_begin_ = text_begin + length;
        if (bytes != source.size() - file.data_begin_) {
            return source.damaged("shape " + detail::shape_text(header.shape) + " of " +
                                  std::string(name_of(header.type)) + " takes " + std::to_string(bytes) +
                                  " bytes, but the file has " + std::to_string(source.size() - file.data_begin_) +
                                  " after its header");
        }
        file.source_ = std::move(source);
        file.type_ = header.type;
        file.shape_ = std::move(header.shape);
        return file;
    }

    byte_source source_;
    std::size_t data_begin_ = 0;
    dtype type_ = dtype::float32;
    std::vector<std::size_t> shape_;
};

/// Writes a tensor of any strides as a `.npy` file of shape `[token, head, channel]`, all or nothing; bfloat16 as
/// `|V2`, which `array.view(ml_dtypes.bfloat16)` makes numbers again.
/// Errors: `invalid_argument` when `path` is not a regular file, `io`; an old file is then as it was.
[[nodiscard]] inline status save_npy(const std::filesystem::path& path, const tensor_view& tensor) {
    const char* const descr = tensor.type() == dtype::float32 ? "<f4" : tensor.type() == dtype::float16 ? "<f2" : "|V2";
    const std::array<std::size_t, 3> shape = {tensor.tokens(), tensor.heads(), tensor.channels()};
    std::string header = std::string("{'descr': '") + descr + "', 'fortran_order': False, 'shape': (" +
                         std::to_string(shape[0]) + ", " + std::to_string(shape[1]) + ", " + std::to_string(shape[2]) +
                         "), }";
    const std::size_t before = detail::npy_magic.size() + 4;
    const std::size_t used = before + header.size() + 1;
    header.append((used + buffer_alignment - 1) / buffer_alignment * buffer_alignment - used, ' ');
    header += '\n';
    std::string start(detail::npy_magic);
    start += {'\x01', '\0', static_cast<char>(header.size() & 0xffU), static_cast<char>(header.size() >> 8U)};
    start += header;
    auto file = atomic_file::create(path);
    if (!file) {
        return file.error();
    }
    if (auto done = file.value().write(std::as_bytes(std::span(start))); !done) {
        return done;
    }
    if (auto done = detail::write_elements(file.value(), tensor); !done) {
        return done;
    }
    return file.value().commit();
}

RVQKV_NAMESPACE_END
