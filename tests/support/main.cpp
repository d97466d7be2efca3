// SPDX-License-Identifier: MIT
/// @file
/// Runs the tests at the level that `RVQKV_SIMD` names, and after a failure says how to repeat the run.
/// Exit code 77, which CTest counts as skipped: this machine lacks that level.
#if __has_include(<catch2/catch_session.hpp>)
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif

#include "rvqkv/core/simd_level.hpp"
#include "support/random.hpp"

#include <cstdio>

int main(int argc, char** argv) {
    const auto level = rvqkv::choose_simd_level();
    if (!level) {
        std::fprintf(stderr, "%s\n", level.error().message.c_str());
        return 77;
    }
    const int failures = Catch::Session().run(argc, argv);
    if (failures != 0) {
        const std::string name(rvqkv::name_of(level.value()));
        std::fprintf(stderr, "repeat with: RVQKV_SIMD=%s RVQKV_TEST_SEED=%llu\n", name.c_str(),
                     static_cast<unsigned long long>(test::seed()));
    }
    return failures;
}
