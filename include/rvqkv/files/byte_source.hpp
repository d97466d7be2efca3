// SPDX-License-Identifier: MIT
/// @file
/// Where file readers get their bytes: an open file, read piece by piece at any offset, or memory that somebody else
/// owns. Readers ask for the pieces they need, so a large file never has to fit in memory.
#pragma once

#include "rvqkv/core/error.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

RVQKV_NAMESPACE_BEGIN

static_assert(sizeof(std::size_t) == 8 && sizeof(off_t) == 8, "files are addressed with 64 bits");

namespace detail {

/// A POSIX file descriptor that closes itself.
class file_descriptor {
public:
    file_descriptor() = default;
    explicit file_descriptor(int descriptor) noexcept : descriptor_(descriptor) {}
    file_descriptor(file_descriptor&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
    file_descriptor& operator=(file_descriptor&& other) noexcept {
        std::swap(descriptor_, other.descriptor_);
        return *this;
    }
    ~file_descriptor() { close(); }

    [[nodiscard]] int get() const noexcept { return descriptor_; }
    [[nodiscard]] bool is_open() const noexcept { return descriptor_ >= 0; }
    /// False where the system reports a failure (a network disk may do so as late as here).
    bool close() noexcept {
        const int descriptor = std::exchange(descriptor_, -1);
        return descriptor < 0 || ::close(descriptor) == 0;
    }

private:
    int descriptor_ = -1;
};

/// "NAME: cannot ACTION: No such file or directory", from `errno`.
[[nodiscard]] inline error system_error_of(const std::string& name, const char* action, int code = errno) {
    return {error_code::io, name + ": cannot " + action + ": " + std::generic_category().message(code)};
}

/// Foreign text made fit for an error message: in quotes, control characters as `\xNN`, long text cut.
[[nodiscard]] inline std::string in_quotes(std::string_view text) {
    constexpr std::size_t longest = 100;
    std::size_t length = std::min(text.size(), longest);
    while (length < text.size() && length > 0 && (static_cast<unsigned char>(text[length]) & 0xc0U) == 0x80U) {
        --length;  // not in the middle of a UTF-8 character
    }
    std::string out = "'";
    for (const char c : text.substr(0, length)) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte < 0x20 || byte == 0x7f) {
            constexpr std::string_view digits = "0123456789abcdef";
            out += "\\x";
            out += digits[byte >> 4U];
            out += digits[byte & 15U];
        } else {
            out += c;
        }
    }
    return out + (length < text.size() ? "'..." : "'");
}

}  // namespace detail

/// Bytes at known offsets, of a file or of memory, with the name to use in error messages.
/// Threads: any number of readers.
class byte_source {
public:
    /// A regular file, opened for reading; nothing is read yet.
    /// Errors: `io` when it cannot be opened or is not a regular file.
    [[nodiscard]] static result<byte_source> open(const std::filesystem::path& path) {
        byte_source source;
        source.name_ = path.string();
        source.file_ = detail::file_descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
        if (!source.file_.is_open()) {
            return detail::system_error_of(source.name_, "open the file");
        }
        struct stat facts {};
        if (::fstat(source.file_.get(), &facts) != 0) {
            return detail::system_error_of(source.name_, "examine the file");
        }
        if (!S_ISREG(facts.st_mode)) {
            return error{error_code::io, source.name_ + ": not a regular file"};
        }
        source.size_ = static_cast<std::size_t>(facts.st_size);
        return source;
    }

    /// Memory that stays the caller's and must outlive the source.
    [[nodiscard]] static byte_source view(std::span<const std::byte> bytes, std::string name = "memory") {
        byte_source source;
        source.name_ = std::move(name);
        source.memory_ = bytes.data();
        source.size_ = bytes.size();
        return source;
    }

    /// The path, or the name given to the memory.
    [[nodiscard]] const std::string& name() const noexcept { return name_; }
    [[nodiscard]] std::size_t size() const noexcept { return size_; }

    /// Fills `out` with the bytes from `offset` on.
    /// Errors: `damaged_file` when they do not all exist (also when the file has shrunk meanwhile), `io`. The contents
    /// of `out` are then of no use.
    [[nodiscard]] status read(std::size_t offset, std::span<std::byte> out) const {
        if (offset > size_ || out.size() > size_ - offset) {
            return ends_early(offset + out.size());
        }
        if (!file_.is_open()) {
            if (!out.empty()) {
                std::memcpy(out.data(), memory_ + offset, out.size());
            }
            return {};
        }
        while (!out.empty()) {
            const std::size_t piece = std::min(out.size(), std::size_t{1} << 30U);
            const ssize_t got = ::pread(file_.get(), out.data(), piece, static_cast<off_t>(offset));
            if (got < 0) {
                if (errno == EINTR) {
                    continue;
                }
                return detail::system_error_of(name_, "read the file");
            }
            if (got == 0) {
                return ends_early(offset + out.size());
            }
            offset += static_cast<std::size_t>(got);
            out = out.subspan(static_cast<std::size_t>(got));
        }
        return {};
    }

    /// A `damaged_file` error about this source.
    [[nodiscard]] error damaged(const std::string& what) const {
        return {error_code::damaged_file, name_ + ": " + what};
    }

private:
    [[nodiscard]] error ends_early(std::size_t wanted) const {
        return damaged("the file ends at byte " + std::to_string(size_) + ", before byte " + std::to_string(wanted));
    }

    detail::file_descriptor file_;
    const std::byte* memory_ = nullptr;
    std::size_t size_ = 0;
    std::string name_;
};

RVQKV_NAMESPACE_END
