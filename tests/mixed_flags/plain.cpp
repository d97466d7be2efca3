// SPDX-License-Identifier: MIT
/// @file
/// Compiled plainly; calls the wide file only when told to, as an engine does after asking the processor.
#include "work.hpp"

#include <cstdio>

double compress_wide();

int main(int argc, char**) {
    const double error = argc > 1 ? compress_wide() : compress();
    std::printf("squared error %.6g\n", error);
    return error > 0 && std::isfinite(error) ? 0 : 1;
}
