// SPDX-License-Identifier: MIT
/// @file
/// Entry of the benchmark program: `--data DIR`, Google Benchmark's options, and what the library chose, in the
/// report's context.
#include "rvqkv/simd/kernels.hpp"
#include "rvqkv/version.hpp"
#include "support/data.hpp"

#include <benchmark/benchmark.h>
#include <string>
#include <vector>

int main(int argc, char** argv) {
    std::vector<char*> rest;
    for (int i = 0; i < argc; ++i) {
        if (std::string(argv[i]) == "--data" && i + 1 < argc) {
            bench::set_data_folder(argv[++i]);
        } else {
            rest.push_back(argv[i]);
        }
    }
    int count = static_cast<int>(rest.size());
    rest.push_back(nullptr);
    benchmark::AddCustomContext("rvqkv_version", RVQKV_VERSION_STRING);
    benchmark::AddCustomContext("rvqkv_simd", std::string(rvqkv::name_of(rvqkv::best_kernels().level)));
#if defined(__clang__)
    benchmark::AddCustomContext("compiler", "clang " __clang_version__);
#else
    benchmark::AddCustomContext("compiler", "gcc " __VERSION__);
#endif
    benchmark::Initialize(&count, rest.data());
    if (benchmark::ReportUnrecognizedArguments(count, rest.data())) {
        return 2;
    }
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return 0;
}
