// SPDX-License-Identifier: MIT
/// @file
/// Which kernels run: names, detection, the environment variable, the table of each level.
#include "rvqkv/core/simd_level.hpp"

#include "rvqkv/simd/kernels.hpp"
#include "support/catch.hpp"
#include "support/levels.hpp"

#include <cstdlib>
#include <optional>
#include <string>

namespace {

/// Sets `RVQKV_SIMD` (null: removes it) and puts back what was there.
class simd_environment {
public:
    explicit simd_environment(const char* value) {
        if (const char* const held = std::getenv("RVQKV_SIMD"); held != nullptr) {
            before_ = held;
        }
        set(value);
    }
    simd_environment(const simd_environment&) = delete;
    simd_environment& operator=(const simd_environment&) = delete;
    ~simd_environment() { set(before_ ? before_->c_str() : nullptr); }

private:
    static void set(const char* value) {
        if (value != nullptr) {
            ::setenv("RVQKV_SIMD", value, 1);
        } else {
            ::unsetenv("RVQKV_SIMD");
        }
    }
    std::optional<std::string> before_;
};

}  // namespace

TEST_CASE("simd_level: every level has its own name", "[simd][unit]") {
    CHECK(rvqkv::name_of(rvqkv::simd_level::generic) == "generic");
    CHECK(rvqkv::name_of(rvqkv::simd_level::neon) == "neon");
    CHECK(rvqkv::name_of(rvqkv::simd_level::avx2) == "avx2");
    CHECK(rvqkv::name_of(rvqkv::simd_level::avxvnni) == "avxvnni");
    CHECK(rvqkv::name_of(rvqkv::simd_level::avx512) == "avx512");
    CHECK(rvqkv::name_of(rvqkv::simd_level::avx512vnni) == "avx512vnni");
    CHECK(rvqkv::name_of(rvqkv::simd_level::avx512vbmi) == "avx512vbmi");
    CHECK(rvqkv::name_of(static_cast<rvqkv::simd_level>(77)) == "unknown");
}

TEST_CASE("is_available: generic is everywhere, the others where their machine is", "[simd][unit]") {
    CHECK(rvqkv::is_available(rvqkv::simd_level::generic));
    CHECK_FALSE(rvqkv::is_available(static_cast<rvqkv::simd_level>(77)));
#if RVQKV_X86
    CHECK_FALSE(rvqkv::is_available(rvqkv::simd_level::neon));
    const bool avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
    if (!avx2) {
        CHECK_FALSE(rvqkv::is_available(rvqkv::simd_level::avx2));
    }
    if (rvqkv::is_available(rvqkv::simd_level::avxvnni)) {
        CHECK(rvqkv::is_available(rvqkv::simd_level::avx2));
    }
    if (rvqkv::is_available(rvqkv::simd_level::avx512)) {
        CHECK(rvqkv::is_available(rvqkv::simd_level::avx2));
        CHECK(__builtin_cpu_supports("avx512f") != 0);
    }
    if (rvqkv::is_available(rvqkv::simd_level::avx512vnni)) {
        CHECK(rvqkv::is_available(rvqkv::simd_level::avx512));
        CHECK(__builtin_cpu_supports("avx512vnni") != 0);
    }
    if (rvqkv::is_available(rvqkv::simd_level::avx512vbmi)) {
        CHECK(rvqkv::is_available(rvqkv::simd_level::avx512vnni));
        CHECK(__builtin_cpu_supports("avx512vbmi") != 0);
    }
#else
    CHECK_FALSE(rvqkv::is_available(rvqkv::simd_level::avx2));
    CHECK_FALSE(rvqkv::is_available(rvqkv::simd_level::avxvnni));
    CHECK_FALSE(rvqkv::is_available(rvqkv::simd_level::avx512));
    CHECK_FALSE(rvqkv::is_available(rvqkv::simd_level::avx512vnni));
    CHECK_FALSE(rvqkv::is_available(rvqkv::simd_level::avx512vbmi));
#endif
#if RVQKV_NEON
    CHECK(rvqkv::is_available(rvqkv::simd_level::neon));
#endif
}

TEST_CASE("choose_simd_level: takes the best there is, unless told", "[simd][unit]") {
    for (const char* const unset : {static_cast<const char*>(nullptr), ""}) {
        const simd_environment environment(unset);
        CHECK(rvqkv::choose_simd_level().value() == test::levels().back());
    }
}

TEST_CASE("choose_simd_level: takes the level that RVQKV_SIMD names, if the machine has it", "[simd][unit]") {
    for (const rvqkv::simd_level level : rvqkv::all_simd_levels) {
        const std::string name(rvqkv::name_of(level));
        CAPTURE(name);
        const simd_environment environment(name.c_str());
        const auto chosen = rvqkv::choose_simd_level();
        if (rvqkv::is_available(level)) {
            REQUIRE(chosen.ok());
            CHECK(chosen.value() == level);
        } else {
            REQUIRE_FALSE(chosen.ok());
            CHECK(chosen.error().code == rvqkv::error_code::unsupported);
            CHECK(chosen.error().message == "RVQKV_SIMD=" + name + ": this machine does not have that instruction set");
        }
    }
}

TEST_CASE("best_available_level: takes no notice of RVQKV_SIMD", "[simd][unit]") {
    const simd_environment environment("generic");
    CHECK(rvqkv::best_available_level() == test::levels().back());
}

TEST_CASE("choose_simd_level: refuses a name that is no level", "[simd][unit]") {
    for (const std::string name : {"avx", "AVX2", "avx2 ", "sse4", "unknown", "0"}) {
        CAPTURE(name);
        const simd_environment environment(name.c_str());
        const auto chosen = rvqkv::choose_simd_level();
        REQUIRE_FALSE(chosen.ok());
        CHECK(chosen.error().code == rvqkv::error_code::invalid_argument);
        CHECK(chosen.error().message ==
              "RVQKV_SIMD=" + name + ": not one of generic, neon, avx2, avxvnni, avx512, avx512vnni, avx512vbmi");
    }
}

TEST_CASE("kernels_for: gives the table of each level that the machine has", "[simd][unit]") {
    for (const rvqkv::simd_level level : rvqkv::all_simd_levels) {
        CAPTURE(rvqkv::name_of(level));
        const auto kernels = rvqkv::kernels_for(level);
        if (rvqkv::is_available(level)) {
            REQUIRE(kernels.ok());
            CHECK(kernels.value()->level == level);
        } else {
            REQUIRE_FALSE(kernels.ok());
            CHECK(kernels.error().code == rvqkv::error_code::unsupported);
            CHECK(kernels.error().message ==
                  "SIMD level " + std::string(rvqkv::name_of(level)) + " is not available on this machine");
        }
    }
}

TEST_CASE("best_kernels: decides once, as choose_simd_level does", "[simd][unit]") {
    const rvqkv::kernel_table& chosen = rvqkv::best_kernels();
    CHECK(chosen.level == rvqkv::choose_simd_level().value());
    const simd_environment environment("generic");
    CHECK(&rvqkv::best_kernels() == &chosen);
}
