// SPDX-License-Identifier: MIT
/// @file
/// Adding to a file in place, so that whatever is interrupted leaves the old contents or the new ones.
///
/// The file begins with a record of fixed size that says where its contents end; what lies behind that end is of no
/// account. New contents go there first, then a copy of the new record, the file's last bytes; when they are on the
/// disk, the new record takes the old one's place, and when that is on the disk, too, the copy is cut off. So:
///  - while bytes are added, the old record stands;
///  - a record that was caught half written has its copy at the file's end;
///  - a record that is wrong without such a copy was damaged, not interrupted.
#pragma once

#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/files/byte_source.hpp"
#include "rvqkv/files/mapped_file.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// Threads: one at a time. Another writer of the same file, in this process or another, is refused.
class growing_file {
public:
    growing_file() = default;
    growing_file(growing_file&&) noexcept = default;
    growing_file& operator=(growing_file&&) noexcept = default;
    ~growing_file() = default;

    /// An existing file. Errors: `io`, also while another writer has it open.
    [[nodiscard]] static result<growing_file> open(const std::filesystem::path& path) {
        growing_file made;
        made.name_ = path.string();
        made.file_ = file_descriptor(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
        if (!made.file_.is_open()) {
            return system_error_of(made.name_, "open the file for writing");
        }
        // Where locks are not to be had, callers must see to it themselves.
        if (::flock(made.file_.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
            return error{error_code::io, made.name_ + ": somebody else is adding to the file"};
        }
        return made;
    }

    /// What it holds now. Errors: `io`.
    [[nodiscard]] result<mapped_file> map() const { return mapped_file::map(file_, name_); }

    /// Gives the file the record that it should have, and drops what lies behind the contents' end.
    /// Errors: `io`.
    [[nodiscard]] status begin(std::span<const std::byte> record, bool repairs, std::size_t end) {
        if (repairs) {
            if (status done = put(0, record, "mend the file"); !done) {
                return done;
            }
            if (status done = sync(); !done) {
                return done;
            }
        }
        begin_ = end;
        end_ = end;
        return cut(end);
    }
    /// Adds bytes. Errors: `io`; the file is as it was.
    [[nodiscard]] status write(std::span<const std::byte> bytes) {
        if (status done = put(end_, bytes, "write the file"); !done) {
            static_cast<void>(cut(begin_));
            return done;
        }
        end_ += bytes.size();
        return {};
    }
    /// Makes what was added count. Errors: `io`; the file has its old contents or the new ones.
    [[nodiscard]] status commit(std::span<const std::byte> record) {
        if (status done = put(end_, record, "write the file"); !done) {
            static_cast<void>(cut(begin_));
            return done;
        }
        for (const bool in_place : {false, true}) {
            if (status done = in_place ? put(0, record, "write the file") : status{}; !done) {
                return done;
            }
            if (status done = sync(); !done) {
                return done;
            }
        }
        return cut(end_);
    }

private:
    [[nodiscard]] status put(std::size_t offset, std::span<const std::byte> bytes, const char* action) {
        while (!bytes.empty()) {
            const std::size_t piece = std::min(bytes.size(), std::size_t{1} << 30U);
            const ssize_t written = ::pwrite(file_.get(), bytes.data(), piece, static_cast<off_t>(offset));
            if (written < 0 && errno == EINTR) {
                continue;
            }
            if (written <= 0) {
                return system_error_of(name_, action);
            }
            offset += static_cast<std::size_t>(written);
            bytes = bytes.subspan(static_cast<std::size_t>(written));
        }
        return {};
    }
    [[nodiscard]] status sync() {
        return ::fsync(file_.get()) == 0 ? status{} : system_error_of(name_, "bring the file to the disk");
    }
    [[nodiscard]] status cut(std::size_t size) {
        return ::ftruncate(file_.get(), static_cast<off_t>(size)) == 0 ? status{}
                                                                       : system_error_of(name_, "cut the file");
    }

    file_descriptor file_;
    std::string name_;
    std::size_t begin_ = 0;
    std::size_t end_ = 0;
};

}  // namespace detail
RVQKV_NAMESPACE_END
