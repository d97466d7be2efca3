// SPDX-License-Identifier: MIT
/// @file
/// Entry of the benchmark program: Google Benchmark's options, and what the library chose, in the report's context.
#include "rvqkv/simd/kernels.hpp"
#include "rvqkv/version.hpp"

#include <benchmark/benchmark.h>
#include <string>

int main(int argc, char** argv) {
    benchmark::AddCustomContext("rvqkv_version", RVQKV_VERSION_STRING);
    benchmark::AddCustomContext("rvqkv_simd", std::string(rvqkv::name_of(rvqkv::best_kernels().level)));
#if defined(__clang__)
    benchmark::AddCustomContext("compiler", "clang " __clang_version__);
#else
    benchmark::AddCustomContext("compiler", "gcc " __VERSION__);
#endif
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
        return 2;
    }
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return 0;
}
