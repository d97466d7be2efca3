// SPDX-License-Identifier: MIT
/// @file
/// Writing a file all or nothing: the bytes go to a new file in the same folder, which takes the old one's place in
/// one step when everything is on the disk. Whatever fails before that leaves the old file as it was.
#pragma once

#include "rvqkv/core/error.hpp"
#include "rvqkv/files/byte_source.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <span>
#include <string>
#include <system_error>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// A file being written that appears at its path, whole, at `commit` and not before; without `commit` it never does.
/// Threads: one at a time.
class atomic_file {
public:
    atomic_file() = default;
    atomic_file(atomic_file&& other) noexcept { *this = std::move(other); }
    atomic_file& operator=(atomic_file&& other) noexcept {
        std::swap(file_, other.file_);
        std::swap(temporary_, other.temporary_);
        std::swap(target_, other.target_);
        return *this;
    }
    ~atomic_file() { discard(); }

    /// Starts a file for `path`; a symbolic link is followed, an existing file's permissions are kept.
    /// Errors: `invalid_argument` when `path` names something that is not a regular file; `io`.
    [[nodiscard]] static result<atomic_file> create(const std::filesystem::path& path) {
        atomic_file file;
        std::error_code failure;
        file.target_ = path;
        if (std::filesystem::is_symlink(path, failure)) {
            file.target_ = std::filesystem::canonical(path, failure);
            if (failure) {
                return detail::system_error_of(path.string(), "follow the link", failure.value());
            }
        }
        const std::filesystem::file_status old = std::filesystem::status(file.target_, failure);
        if (std::filesystem::exists(old) && !std::filesystem::is_regular_file(old)) {
            return error{error_code::invalid_argument, path.string() + ": not a regular file, so not replaced by one"};
        }
        // A name of its own, not one made of the target's, which may be as long as names can be.
        const std::string stem = ".rvqkv-" + std::to_string(::getpid()) + "-";
        constexpr int attempts = 1000;
        for (int attempt = 0; attempt < attempts && !file.file_.is_open(); ++attempt) {
            file.temporary_ = file.target_.parent_path() / (stem + std::to_string(attempt) + ".tmp");
            file.file_ = detail::file_descriptor(
                ::open(file.temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode_t{0666}));
            if (!file.file_.is_open() && errno != EEXIST) {
                break;
            }
        }
        if (!file.file_.is_open()) {
            const int code = errno;
            file.temporary_.clear();
            return detail::system_error_of(path.string(), "create a file in this folder", code);
        }
        if (std::filesystem::exists(old) &&
            ::fchmod(file.file_.get(), static_cast<mode_t>(old.permissions()) & mode_t{07777}) != 0) {
            return detail::system_error_of(path.string(), "keep the file's permissions");
        }
        return file;
    }

    /// Adds bytes at the end.
    /// Errors: `io`; the file is then to be given up.
    [[nodiscard]] status write(std::span<const std::byte> bytes) {
        return write_all(bytes,
                         [this](const std::byte* data, std::size_t size) { return ::write(file_.get(), data, size); });
    }

    /// Puts bytes in place of some written earlier.
    /// Errors: `io`; the file is then to be given up.
    [[nodiscard]] status overwrite(std::size_t offset, std::span<const std::byte> bytes) {
        return write_all(bytes, [this, &offset](const std::byte* data, std::size_t size) {
            const ssize_t put = ::pwrite(file_.get(), data, size, static_cast<off_t>(offset));
            offset += put > 0 ? static_cast<std::size_t>(put) : 0;
            return put;
        });
    }

    /// Brings the bytes to the disk and the file to its place, instead of the old one if there is one.
    /// Errors: `io`; the old file is then as it was, and the new one gone.
    [[nodiscard]] status commit() {
        // First, as this takes memory: once the file is in its place, nothing may fail.
        const std::filesystem::path folder = target_.has_parent_path() ? target_.parent_path() : ".";
        if (::fsync(file_.get()) != 0) {
            return give_up("bring the file to the disk");
        }
        if (!file_.close()) {
            return give_up("close the file");
        }
        if (std::rename(temporary_.c_str(), target_.c_str()) != 0) {
            return give_up("put the new file in place");
        }
        temporary_.clear();
        // The folder's entry too, for power failures. The replacement itself has happened, and some file systems
        // refuse this call, so its outcome is no failure.
        const detail::file_descriptor entry(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        if (entry.is_open()) {
            static_cast<void>(::fsync(entry.get()));
        }
        return {};
    }

    /// Forgets the new file; the old one stays.
    void discard() noexcept {
        file_.close();
        if (!temporary_.empty()) {
            static_cast<void>(::unlink(temporary_.c_str()));
            temporary_.clear();
        }
    }

private:
    template <class Put>
    [[nodiscard]] status write_all(std::span<const std::byte> bytes, const Put& put) {
        if (!file_.is_open()) {
            return error{error_code::invalid_argument, target_.string() + ": written to after commit or a failure"};
        }
        while (!bytes.empty()) {
            const ssize_t written = put(bytes.data(), std::min(bytes.size(), std::size_t{1} << 30U));
            if (written < 0 && errno == EINTR) {
                continue;
            }
            if (written <= 0) {
                return give_up("write the file");
            }
            bytes = bytes.subspan(static_cast<std::size_t>(written));
        }
        return {};
    }

    [[nodiscard]] error give_up(const char* action) {
        const int code = errno;
        discard();
        return detail::system_error_of(target_.string(), action, code);
    }

    detail::file_descriptor file_;
    std::filesystem::path temporary_;  ///< Empty once there is nothing to remove.
    std::filesystem::path target_;
};

RVQKV_NAMESPACE_END
