// SPDX-License-Identifier: MIT
/// @file
/// Results, statuses and the exception they turn into.
#include "rvqkv/core/error.hpp"

#include "support/catch.hpp"

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

namespace {

/// The exception that `action` throws.
template <class Action>
rvqkv::error thrown_by(Action&& action) {
    try {
        action();
    } catch (const rvqkv::exception& thrown) {
        return {thrown.code(), thrown.what()};
    }
    return {rvqkv::error_code::unsupported, "nothing was thrown"};
}

rvqkv::result<std::string> fetch(bool works) {
    if (!works) {
        return rvqkv::error{rvqkv::error_code::io, "cannot open keys.npy"};
    }
    return std::string("keys");
}

rvqkv::status check(bool works) {
    if (!works) {
        return rvqkv::error{rvqkv::error_code::damaged_file, "depths is 0"};
    }
    return {};
}

// A failure must not slip in where a value is expected, nor a `bool` where a result is.
static_assert(!std::is_convertible_v<rvqkv::result<int>, bool>);
static_assert(!std::is_convertible_v<rvqkv::result<int>, int>);
static_assert(!std::is_convertible_v<rvqkv::status, bool>);
static_assert(std::is_base_of_v<std::runtime_error, rvqkv::exception>);

}  // namespace

TEST_CASE("error_code: every kind has its own name", "[core][unit]") {
    CHECK(rvqkv::name_of(rvqkv::error_code::invalid_argument) == "invalid_argument");
    CHECK(rvqkv::name_of(rvqkv::error_code::unsupported) == "unsupported");
    CHECK(rvqkv::name_of(rvqkv::error_code::out_of_memory) == "out_of_memory");
    CHECK(rvqkv::name_of(rvqkv::error_code::io) == "io");
    CHECK(rvqkv::name_of(rvqkv::error_code::damaged_file) == "damaged_file");
    CHECK(rvqkv::name_of(static_cast<rvqkv::error_code>(99)) == "unknown");
}

TEST_CASE("result: hands out its value", "[core][unit]") {
    auto fetched = fetch(true);
    CHECK(fetched.ok());
    CHECK(static_cast<bool>(fetched));
    CHECK(fetched.value() == "keys");
    fetched.value() += "!";
    CHECK(std::as_const(fetched).value() == "keys!");
    const std::string taken = std::move(fetched).value();
    CHECK(taken == "keys!");
}

TEST_CASE("result: holds types that cannot be copied", "[core][unit]") {
    rvqkv::result<std::unique_ptr<int>> held(std::make_unique<int>(7));
    const std::unique_ptr<int> taken = std::move(held).value();
    REQUIRE(taken != nullptr);
    CHECK(*taken == 7);
}

TEST_CASE("result: throws its error from value(), whichever way it is called", "[core][unit]") {
    auto failed = fetch(false);
    CHECK_FALSE(failed.ok());
    CHECK_FALSE(static_cast<bool>(failed));
    CHECK(failed.error().code == rvqkv::error_code::io);
    CHECK(failed.error().message == "cannot open keys.npy");
    const auto check_thrown = [](const rvqkv::error& thrown) {
        CHECK(thrown.code == rvqkv::error_code::io);
        CHECK(thrown.message == "cannot open keys.npy");
    };
    check_thrown(thrown_by([&] { (void)failed.value(); }));
    check_thrown(thrown_by([&] { (void)std::as_const(failed).value(); }));
    check_thrown(thrown_by([&] { (void)std::move(failed).value(); }));
}

TEST_CASE("status: is success unless it is given an error", "[core][unit]") {
    CHECK(check(true).ok());
    CHECK(static_cast<bool>(check(true)));
    CHECK_NOTHROW(check(true).value());
    const rvqkv::status failed = check(false);
    CHECK_FALSE(failed.ok());
    CHECK_FALSE(static_cast<bool>(failed));
    CHECK(failed.error().code == rvqkv::error_code::damaged_file);
    CHECK(failed.error().message == "depths is 0");
    const rvqkv::error thrown = thrown_by([&] { failed.value(); });
    CHECK(thrown.code == rvqkv::error_code::damaged_file);
    CHECK(thrown.message == "depths is 0");
}

TEST_CASE("fail: throws the error", "[core][unit]") {
    const rvqkv::error thrown = thrown_by([] { rvqkv::fail({rvqkv::error_code::out_of_memory, "out of memory"}); });
    CHECK(thrown.code == rvqkv::error_code::out_of_memory);
    CHECK(thrown.message == "out of memory");
}
