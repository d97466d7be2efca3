// SPDX-License-Identifier: MIT
/// @file
/// Tensors in safetensors files, the format of Hugging Face: 8 bytes of header length (little-endian), a JSON header,
/// the data. Readers bring in one tensor at a time, or some of its tokens; writers stream and replace files whole.
///
/// Files may carry a checksum: the metadata `checksum`, first in the header (so at byte 37 of the file), is the XXH3-64
/// of the whole file with its own 16 digits as zeros. In Python:
/// `raw[37:53] = b"0" * 16; xxhash.xxh3_64_hexdigest(raw)`.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/files/atomic_file.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/checksum.hpp"
#include "rvqkv/files/owned_tensor.hpp"
#include "rvqkv/files/safetensors_header.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

namespace detail {

inline constexpr std::string_view checksum_key = "checksum";
inline constexpr std::string_view checksum_lead = R"({"__metadata__":{"checksum":")";
inline constexpr std::size_t checksum_offset = sizeof(std::uint64_t) + checksum_lead.size();

template <class T>
inline constexpr bool is_stored_as(storage_type type) noexcept {
    switch (type) {
        case storage_type::float32: return std::is_same_v<T, float>;
        case storage_type::float64: return std::is_same_v<T, double>;
        case storage_type::float16: return std::is_same_v<T, float16>;
        case storage_type::bfloat16: return std::is_same_v<T, bfloat16>;
        case storage_type::boolean:
        case storage_type::uint8: return std::is_same_v<T, std::uint8_t>;
        case storage_type::int8: return std::is_same_v<T, std::int8_t>;
        case storage_type::uint16: return std::is_same_v<T, std::uint16_t>;
        case storage_type::int16: return std::is_same_v<T, std::int16_t>;
        case storage_type::uint32: return std::is_same_v<T, std::uint32_t>;
        case storage_type::int32: return std::is_same_v<T, std::int32_t>;
        case storage_type::uint64: return std::is_same_v<T, std::uint64_t>;
        case storage_type::int64: return std::is_same_v<T, std::int64_t>;
        default: return false;
    }
}

}  // namespace detail

/// A safetensors file open for reading: its header checked and in memory, its data where it was.
/// Threads: any number of readers.
class safetensors_file {
public:
    /// Opens a file and reads its header; the data stays on the disk until it is asked for.
    /// Errors: `io`; `damaged_file` when anything in the header is wrong or the file's size does not fit it;
    ///         `unsupported` for an unknown dtype.
    [[nodiscard]] static result<safetensors_file> open(const std::filesystem::path& path) {
        auto source = byte_source::open(path);
        if (!source) {
            return source.error();
        }
        return read_header(std::move(source).value());
    }

    /// The same for bytes in memory, which stay the caller's and must outlive this object.
    [[nodiscard]] static result<safetensors_file> parse(std::span<const std::byte> bytes) {
        return read_header(byte_source::view(bytes));
    }

    /// The path, or "memory".
    [[nodiscard]] const std::string& name() const noexcept { return source_.name(); }
    /// Sorted by name.
    [[nodiscard]] std::span<const tensor_info> tensors() const noexcept { return header_.tensors; }
    [[nodiscard]] const metadata_map& metadata() const noexcept { return header_.metadata; }
    /// One entry of the metadata, or nullptr.
    [[nodiscard]] const std::string* find_metadata(std::string_view key) const noexcept {
        const auto entry = header_.metadata.find(key);
        return entry == header_.metadata.end() ? nullptr : &entry->second;
    }

    [[nodiscard]] bool contains(std::string_view name) const noexcept { return find(name) != nullptr; }
    /// The tensor with this name; never null.
    /// Errors: `invalid_argument`, naming it and the tensors there are.
    [[nodiscard]] result<const tensor_info*> tensor(std::string_view name) const {
        if (const tensor_info* const found = find(name)) {
            return found;
        }
        constexpr std::size_t longest_list = 20;
        std::string there = header_.tensors.empty() ? "it holds none" : "it holds ";
        for (std::size_t i = 0; i < std::min(header_.tensors.size(), longest_list); ++i) {
            there += (i == 0 ? "" : ", ") + detail::in_quotes(header_.tensors[i].name);
        }
        if (header_.tensors.size() > longest_list) {
            there += " and " + std::to_string(header_.tensors.size() - longest_list) + " more";
        }
        return wrong("no tensor " + detail::in_quotes(name) + "; " + there);
    }

    /// Fills `out` with a tensor's bytes from byte `first` on.
    /// Errors: `invalid_argument` when they do not lie inside it; `io`, `damaged_file` when they cannot be read.
    [[nodiscard]] status read(const tensor_info& tensor, std::span<std::byte> out, std::size_t first = 0) const {
        if (first > tensor.bytes || out.size() > tensor.bytes - first) {
            return wrong("tensor " + detail::in_quotes(tensor.name) + ": has " + std::to_string(tensor.bytes) +
                         " bytes; wanted " + std::to_string(out.size()) + " from byte " + std::to_string(first) +
                         " on");
        }
        return source_.read(data_begin_ + tensor.offset + first, out);
    }

    /// All elements of a tensor that is stored as `T` (`std::uint8_t` reads BOOL too), in the file's order.
    /// Errors: `invalid_argument` (not there, another type), `out_of_memory`, `io`.
    template <class T>
    [[nodiscard]] result<aligned_buffer<T>> read_as(std::string_view name) const {
        const auto info = tensor(name);
        if (!info) {
            return info.error();
        }
        const tensor_info& found = *info.value();
        if (!detail::is_stored_as<T>(found.type)) {
            return wrong("tensor " + detail::in_quotes(name) + ": is stored as " + std::string(name_of(found.type)) +
                         ", another type than the one asked for");
        }
        auto elements = aligned_buffer<T>::allocate(found.bytes / sizeof(T));
        if (!elements) {
            return elements.error();
        }
        if (auto done = read(found, std::as_writable_bytes(elements.value().span())); !done) {
            return done.error();
        }
        return elements;
    }

    /// Fills `out` with the elements of an F32, F16 or BF16 tensor from element `first` on, as float32 (exact).
    /// Errors: `invalid_argument` (not there, another type, not inside), `io`.
    [[nodiscard]] status read_floats(std::string_view name, std::span<float> out, std::size_t first = 0) const {
        const auto info = tensor(name);
        if (!info) {
            return info.error();
        }
        const auto type = float_type(*info.value());
        if (!type) {
            return type.error();
        }
        const std::size_t element = size_of(type.value());
        const std::size_t count = info.value()->bytes / element;
        if (first > count || out.size() > count - first) {
            return wrong("tensor " + detail::in_quotes(name) + ": has " + std::to_string(count) + " elements; wanted " +
                         std::to_string(out.size()) + " from element " + std::to_string(first) + " on");
        }
        return detail::read_floats(source_, data_begin_ + info.value()->offset + first * element, type.value(), out);
    }

    /// An F32, F16 or BF16 tensor as `[token, head, channel]`, in its own element type; of a two-dimensional one each
    /// row is cut into `heads` (0: one).
    /// Errors: `invalid_argument` (not there, another type or shape, tokens not inside), `out_of_memory`, `io`.
    [[nodiscard]] result<owned_tensor> load(std::string_view name, token_range tokens = {},
                                            std::size_t heads = 0) const {
        const auto info = tensor(name);
        if (!info) {
            return info.error();
        }
        const auto type = float_type(*info.value());
        if (!type) {
            return type.error();
        }
        const std::string what = source_.name() + ": tensor " + detail::in_quotes(name);
        const auto shape = detail::tokens_heads_channels(info.value()->shape, heads, what);
        if (!shape) {
            return shape.error();
        }
        return detail::read_tokens(source_, data_begin_ + info.value()->offset, type.value(), shape.value(), tokens,
                                   what);
    }

    /// Reads the whole file once and compares its checksum.
    /// Errors: `damaged_file` when it differs or there is none, `io`.
    [[nodiscard]] status verify_checksum() const {
        constexpr std::size_t end = detail::checksum_offset + checksum::digits;
        std::vector<std::byte> piece(std::size_t{1} << 16U);
        std::string stored;
        checksum sum;
        for (std::size_t at = 0; at < source_.size();) {
            const auto bytes = std::span<std::byte>(piece).first(std::min(piece.size(), source_.size() - at));
            if (auto done = source_.read(at, bytes); !done) {
                return done;
            }
            if (at == 0) {
                const auto* text = reinterpret_cast<const char*>(bytes.data());
                if (bytes.size() < end || std::string_view(text + sizeof(std::uint64_t),
                                                           detail::checksum_lead.size()) != detail::checksum_lead) {
                    return source_.damaged("no checksum stands first in the header");
                }
                stored.assign(text + detail::checksum_offset, checksum::digits);
                std::fill_n(bytes.data() + detail::checksum_offset, checksum::digits, std::byte{'0'});
            }
            sum.update(bytes);
            at += bytes.size();
        }
        if (stored != sum.hex()) {
            return source_.damaged("checksum is " + sum.hex() + ", but the file says " + detail::in_quotes(stored) +
                                   "; its bytes have changed since it was written");
        }
        return {};
    }

private:
    safetensors_file(byte_source source, std::size_t data_begin, safetensors_header header)
        : source_(std::move(source)), data_begin_(data_begin), header_(std::move(header)) {}

    [[nodiscard]] static result<safetensors_file> read_header(byte_source source) {
        std::uint64_t length = 0;
        if (source.size() < sizeof(length)) {
            return source.damaged("a safetensors file begins with 8 bytes of header length, this one has " +
                                  std::to_string(source.size()) + " bytes in all");
        }
        if (auto done = source.read(0, std::as_writable_bytes(std::span(&length, 1))); !done) {
            return done.error();
        }
        const auto possible = [&source](std::uint64_t bytes) {
            return bytes <= max_safetensors_header_bytes && bytes <= source.size() - sizeof(length);
        };
        if (!possible(length)) {
            if (const std::uint64_t swapped = __builtin_bswap64(length); possible(swapped)) {
                return source.damaged("header length " + std::to_string(length) + " is " + std::to_string(swapped) +
                                      " in big-endian order; safetensors files are little-endian");
            }
            return source.damaged("header length " + std::to_string(length) + " exceeds " +
                                  (length > max_safetensors_header_bytes
                                       ? "the format's limit of " + std::to_string(max_safetensors_header_bytes)
                                       : "the file of " + std::to_string(source.size()) + " bytes"));
        }
        auto text = aligned_buffer<char>::allocate(length);
        if (!text) {
            return text.error();
        }
        if (auto done = source.read(sizeof(length), std::as_writable_bytes(text.value().span())); !done) {
            return done.error();
        }
        const std::size_t data_begin = sizeof(length) + length;
        auto header = parse_safetensors_header({text.value().data(), length}, source.size() - data_begin);
        if (!header) {
            return error{header.error().code, source.name() + ": " + header.error().message};
        }
        return safetensors_file(std::move(source), data_begin, std::move(header).value());
    }

    [[nodiscard]] const tensor_info* find(std::string_view name) const noexcept {
        const auto at =
            std::lower_bound(header_.tensors.begin(), header_.tensors.end(), name,
                             [](const tensor_info& tensor, std::string_view wanted) { return tensor.name < wanted; });
        return at != header_.tensors.end() && at->name == name ? &*at : nullptr;
    }

    [[nodiscard]] result<dtype> float_type(const tensor_info& tensor) const {
        for (const dtype type : {dtype::float32, dtype::float16, dtype::bfloat16}) {
            if (storage_type_of(type) == tensor.type) {
                return type;
            }
        }
        return wrong("tensor " + detail::in_quotes(tensor.name) + ": is stored as " +
                     std::string(name_of(tensor.type)) + "; want F32, F16 or BF16");
    }

    [[nodiscard]] error wrong(const std::string& what) const {
        return {error_code::invalid_argument, source_.name() + ": " + what};
    }

    byte_source source_;
    std::size_t data_begin_ = 0;
    safetensors_header header_;
};

/// Whether a file carries a checksum of itself.
enum class with_checksum : bool { no, yes };

/// A safetensors file being written: the header first, then the tensors' bytes in the order given, in pieces of any
/// size. The file appears at `commit`, whole; until then, and after any failure, an old one stays as it was.
/// Threads: one at a time.
class safetensors_writer {
public:
    /// Writes the header. `offset` and `bytes` of the tensors need not be set. The data begins at a multiple of 64.
    /// Errors: `invalid_argument` for what no reader would accept (names twice or not UTF-8, shapes that overflow),
    ///         `io`.
    [[nodiscard]] static result<safetensors_writer> create(const std::filesystem::path& path,
                                                           std::vector<tensor_info> tensors,
                                                           const metadata_map& metadata = {},
                                                           with_checksum sealed = with_checksum::no) {
        safetensors_writer writer;
        writer.tensors_ = std::move(tensors);
        auto header = writer.make_header(metadata, sealed == with_checksum::yes);
        if (!header) {
            return error{error_code::invalid_argument, path.string() + ": " + header.error().message};
        }
        auto file = atomic_file::create(path);
        if (!file) {
            return file.error();
        }
        writer.file_ = std::move(file).value();
        writer.sealed_ = sealed == with_checksum::yes;
        const std::uint64_t length = header.value().size();
        if (auto done = writer.put(std::as_bytes(std::span(&length, 1))); !done) {
            return done.error();
        }
        if (auto done = writer.put(std::as_bytes(std::span(header.value()))); !done) {
            return done.error();
        }
        return writer;
    }

    /// The next bytes of the data.
    /// Errors: `invalid_argument` when there are more than the tensors take; `io`. Nothing can be committed then.
    [[nodiscard]] status write(std::span<const std::byte> bytes) {
        std::size_t left = bytes.size();
        while (left != 0 && current_ < tensors_.size()) {
            const std::size_t taken = std::min(left, tensors_[current_].bytes - written_);
            left -= taken;
            written_ += taken;
            skip_full();
        }
        if (left != 0) {
            file_.discard();
            return error{error_code::invalid_argument, std::to_string(left) + " bytes more than the tensors take"};
        }
        return put(bytes);
    }

    /// The next tensor, or its next tokens, of any strides.
    /// Errors: as above, and `invalid_argument` when the element type is not that of the tensor being written.
    [[nodiscard]] status write(const tensor_view& tensor) {
        if (current_ < tensors_.size() && tensors_[current_].type != storage_type_of(tensor.type())) {
            file_.discard();
            return error{error_code::invalid_argument, "tensor " + detail::in_quotes(tensors_[current_].name) +
                                                           ": given as " + std::string(name_of(tensor.type())) +
                                                           ", but declared as " +
                                                           std::string(name_of(tensors_[current_].type))};
        }
        return detail::write_elements(*this, tensor);
    }

    /// Finishes the file and puts it in place.
    /// Errors: `invalid_argument` when bytes are missing, `io`; the old file is then as it was.
    [[nodiscard]] status commit() {
        if (current_ < tensors_.size()) {
            file_.discard();
            return error{error_code::invalid_argument,
                         "tensor " + detail::in_quotes(tensors_[current_].name) + ": only " + std::to_string(written_) +
                             " of " + std::to_string(tensors_[current_].bytes) + " bytes were written"};
        }
        if (sealed_) {
            const std::string digits = sum_.hex();
            if (auto done = file_.overwrite(detail::checksum_offset, std::as_bytes(std::span(digits))); !done) {
                return done;
            }
        }
        return file_.commit();
    }

private:
    [[nodiscard]] status put(std::span<const std::byte> bytes) {
        if (sealed_) {
            sum_.update(bytes);
        }
        return file_.write(bytes);
    }

    void skip_full() noexcept {
        while (current_ < tensors_.size() && written_ == tensors_[current_].bytes) {
            ++current_;
            written_ = 0;
        }
    }

    [[nodiscard]] result<std::string> make_header(const metadata_map& metadata, bool sealed) {
        std::string text = "{";
        if (sealed || !metadata.empty()) {
            text = R"({"__metadata__":{)";
            const char* comma = "";
            if (sealed) {
                if (metadata.find(detail::checksum_key) != metadata.end()) {
                    return error{error_code::invalid_argument, "metadata 'checksum' is set by the writer itself"};
                }
                text = std::string(detail::checksum_lead) + std::string(checksum::digits, '0') + '"';
                comma = ",";
            }
            for (const auto& entry : metadata) {
                text += comma + detail::json_string(entry.first) + ':' + detail::json_string(entry.second);
                comma = ",";
            }
            text += '}';
        }
        std::size_t end = 0;
        for (tensor_info& tensor : tensors_) {
            std::size_t bytes = 0;
            if (tensor.name == detail::metadata_key) {
                return error{error_code::invalid_argument, "no tensor may be named '__metadata__'"};
            }
            if (!detail::count_elements(tensor.shape, bytes) ||
                __builtin_mul_overflow(bytes, size_of(tensor.type), &bytes) ||
                __builtin_add_overflow(end, bytes, &bytes)) {
                return error{error_code::invalid_argument, "tensor " + detail::in_quotes(tensor.name) + ": shape " +
                                                               detail::shape_text(tensor.shape) + " overflows"};
            }
            tensor.offset = std::exchange(end, bytes);
            tensor.bytes = end - tensor.offset;
            text += (text.size() > 1 ? "," : "") + detail::json_string(tensor.name) + R"(:{"dtype":")" +
                    std::string(name_of(tensor.type)) + R"(","shape":)" + detail::shape_text(tensor.shape, ",") +
                    R"(,"data_offsets":[)" + std::to_string(tensor.offset) + ',' + std::to_string(end) + "]}";
        }
        text += '}';
        const std::size_t used = sizeof(std::uint64_t) + text.size();
        text.append((used + buffer_alignment - 1) / buffer_alignment * buffer_alignment - used, ' ');
        if (text.size() > max_safetensors_header_bytes) {
            return error{error_code::invalid_argument, "the header would take " + std::to_string(text.size()) +
                                                           " bytes, more than the format allows"};
        }
        // Read back by the reader's own code, so that nothing is written which it would refuse.
        if (const auto check = parse_safetensors_header(text, end); !check) {
            return check.error();
        }
        skip_full();
        return text;
    }

    atomic_file file_;
    std::vector<tensor_info> tensors_;
    std::size_t current_ = 0;  ///< The tensor being written, which is never one that is full.
    std::size_t written_ = 0;  ///< Bytes of it so far.
    bool sealed_ = false;
    checksum sum_;
};

/// A tensor to write, under its name.
struct named_tensor {
    std::string name;
    tensor_view tensor;
};

/// Writes `[token, head, channel]` tensors to a file, all or nothing.
/// Errors: as `safetensors_writer`.
[[nodiscard]] inline status save_safetensors(const std::filesystem::path& path, std::span<const named_tensor> tensors,
                                             const metadata_map& metadata = {}) {
    std::vector<tensor_info> infos;
    for (const named_tensor& each : tensors) {
        tensor_info info;
        info.name = each.name;
        info.type = storage_type_of(each.tensor.type());
        info.shape = {each.tensor.tokens(), each.tensor.heads(), each.tensor.channels()};
        infos.push_back(std::move(info));
    }
    auto writer = safetensors_writer::create(path, std::move(infos), metadata);
    if (!writer) {
        return writer.error();
    }
    for (const named_tensor& each : tensors) {
        if (auto done = writer.value().write(each.tensor); !done) {
            return done;
        }
    }
    return writer.value().commit();
}

RVQKV_NAMESPACE_END
