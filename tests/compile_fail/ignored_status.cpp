// SPDX-License-Identifier: MIT
// expect: nodiscard
/// @file
/// A failure that nobody looks at.
#include "rvqkv/core/error.hpp"

rvqkv::status work();

void run() {
#ifdef MENDED
    work().value();
#else
    work();
#endif
}
