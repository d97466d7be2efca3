// SPDX-License-Identifier: MIT
/// @file
/// How the library reports failure: functions that can fail return `result<T>` or `status`; `.value()` turns a failure
/// into an exception (or, in a build without exceptions, into a call of `RVQKV_FATAL`).
#pragma once

#include "rvqkv/core/config.hpp"

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#if !RVQKV_EXCEPTIONS && !defined(RVQKV_FATAL)
#include <cstdio>
#include <cstdlib>
/// Ends the program after naming the failure; used only in builds without exceptions. Define it before the first
/// include to do something else; it must not return.
#define RVQKV_FATAL(text) (std::fprintf(stderr, "rvqkv: %s\n", text), std::abort())
#endif

RVQKV_NAMESPACE_BEGIN

/// What kind of thing went wrong. The message of the error says where, and with which value.
enum class error_code {
    invalid_argument,  ///< A configuration, shape or range that makes no sense.
    unsupported,       ///< Well formed, but not something this version or machine can do.
    out_of_memory,     ///< An allocation failed; the object is as it was before the call.
    io,                ///< The operating system refused to open, read, write or rename a file.
    damaged_file,      ///< Bytes that are not what the format demands: cut, flipped or hostile.
};

/// "invalid_argument", "unsupported", ...
[[nodiscard]] constexpr std::string_view name_of(error_code code) noexcept {
    switch (code) {
        case error_code::invalid_argument: return "invalid_argument";
        case error_code::unsupported: return "unsupported";
        case error_code::out_of_memory: return "out_of_memory";
        case error_code::io: return "io";
        case error_code::damaged_file: return "damaged_file";
    }
    return "unknown";
}

/// A failure: its kind, and one sentence that names the field and the offending value.
struct error {
    error_code code = error_code::invalid_argument;
    std::string message;
};

/// What `.value()` throws.
class exception : public std::runtime_error {
public:
    explicit exception(const error& cause) : std::runtime_error(cause.message), code_(cause.code) {}
    [[nodiscard]] error_code code() const noexcept { return code_; }

private:
    error_code code_;
};

/// Throws `exception`, or calls `RVQKV_FATAL` in a build without exceptions.
[[noreturn]] inline void fail(const error& cause) {
#if RVQKV_EXCEPTIONS
    throw exception(cause);
#else
    RVQKV_FATAL(cause.message.c_str());
#endif
}

/// Either a value or an `error`: a small stand-in for C++23's `std::expected`, which Clang 14 cannot use.
/// Threads: as `T`.
template <class T>
class [[nodiscard]] result {
public:
    result(T value) : state_(std::in_place_index<0>, std::move(value)) {}             // NOLINT: conversion intended
    result(rvqkv::error cause) : state_(std::in_place_index<1>, std::move(cause)) {}  // NOLINT: conversion intended

    [[nodiscard]] bool ok() const noexcept { return state_.index() == 0; }
    explicit operator bool() const noexcept { return ok(); }

    /// The value; on failure throws `exception`.
    [[nodiscard]] T& value() & {
        check();
        return *std::get_if<0>(&state_);
    }
    [[nodiscard]] const T& value() const& {
        check();
        return *std::get_if<0>(&state_);
    }
    [[nodiscard]] T value() && {
        check();
        return std::move(*std::get_if<0>(&state_));
    }

    /// The failure. Precondition: `!ok()`.
    [[nodiscard]] const rvqkv::error& error() const noexcept {
        RVQKV_ASSERT(!ok());
        return *std::get_if<1>(&state_);
    }

private:
    void check() const {
        if (!ok()) {
            fail(*std::get_if<1>(&state_));
        }
    }
    std::variant<T, rvqkv::error> state_;
};

/// Success, or an `error`.
template <>
class [[nodiscard]] result<void> {
public:
    result() = default;
    result(rvqkv::error cause) : failed_(true), error_(std::move(cause)) {}  // NOLINT: conversion intended

    [[nodiscard]] bool ok() const noexcept { return !failed_; }
    explicit operator bool() const noexcept { return ok(); }

    /// Does nothing on success; on failure throws `exception`.
    void value() const {
        if (failed_) {
            fail(error_);
        }
    }
    /// The failure. Precondition: `!ok()`.
    [[nodiscard]] const rvqkv::error& error() const noexcept {
        RVQKV_ASSERT(failed_);
        return error_;
    }

private:
    bool failed_ = false;
    rvqkv::error error_;
};
using status = result<void>;

RVQKV_NAMESPACE_END
