// SPDX-License-Identifier: MIT
// expect: openmp_executor.* is unavailable: compile with -fopenmp
/// @file
/// The executor on OpenMP in a file compiled without OpenMP.
#include "rvqkv/core/openmp_executor.hpp"

#ifdef MENDED
using workers = rvqkv::serial_executor;
#else
using workers = rvqkv::openmp_executor;
#endif

std::size_t count() {
    return workers().concurrency();
}
