// SPDX-License-Identifier: MIT
/// @file
/// A file's bytes as memory, without a copy: the system brings in what is touched.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/files/byte_source.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// A regular file mapped for reading, as long as it was when it was opened. It may be replaced or removed meanwhile,
/// but not cut short: the system ends a program that touches bytes which are gone.
/// Threads: any number of readers.
class mapped_file {
public:
    mapped_file() = default;
    mapped_file(mapped_file&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    mapped_file& operator=(mapped_file&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~mapped_file() {
        if (data_ != nullptr) {
            static_cast<void>(::munmap(data_, size_));
        }
    }

    /// Errors: `io` when it cannot be opened or mapped, or is not a regular file.
    [[nodiscard]] static result<mapped_file> open(const std::filesystem::path& path) {
        const detail::file_descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
        if (!file.is_open()) {
            return detail::system_error_of(path.string(), "open the file");
        }
        return map(file, path.string());
    }
    /// A file that is open for reading, and may be closed afterwards. Errors: as `open`.
    [[nodiscard]] static result<mapped_file> map(const detail::file_descriptor& file, const std::string& name) {
        struct stat facts {};
        if (::fstat(file.get(), &facts) != 0) {
            return detail::system_error_of(name, "examine the file");
        }
        if (!S_ISREG(facts.st_mode)) {
            return error{error_code::io, name + ": not a regular file"};
        }
        mapped_file mapped;
        if (facts.st_size == 0) {
            return mapped;
        }
        const auto size = static_cast<std::size_t>(facts.st_size);
        void* const data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
        if (data == MAP_FAILED) {  // NOLINT: the system's macro casts
            return detail::system_error_of(name, "map the file into memory");
        }
        mapped.data_ = data;
        mapped.size_ = size;
        return mapped;
    }

    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    [[nodiscard]] std::span<const std::byte> bytes() const noexcept {
        return {static_cast<const std::byte*>(data_), size_};
    }

private:
    void* data_ = nullptr;
    std::size_t size_ = 0;
};

RVQKV_NAMESPACE_END
