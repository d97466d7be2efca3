// SPDX-License-Identifier: MIT
/// @file
/// Compiled for a machine with AVX-512, as one file of a larger engine may be.
#include "work.hpp"

double compress_wide() {
    return compress();
}
