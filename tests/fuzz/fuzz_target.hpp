// SPDX-License-Identifier: MIT
/// @file
/// What every fuzz target defines. Linked with libFuzzer a target searches for inputs; linked with replay.cpp, under
/// any compiler, it runs over given files, or over its own seeds and simple damage to them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

/// Runs one input; returns 0, or does not return.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

/// Good inputs to start from.
std::vector<std::string> fuzz_seeds();

namespace fuzz {

/// Ends the program when something that must hold does not.
inline void require(bool holds, const char* what) {
    if (!holds) {
        std::fprintf(stderr, "fuzz: broken: %s\n", what);
        std::abort();
    }
}

inline std::span<const std::byte> bytes_of(const std::uint8_t* data, std::size_t size) {
    return std::as_bytes(std::span(data, size));
}

}  // namespace fuzz
