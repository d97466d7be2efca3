// SPDX-License-Identifier: MIT
/// @file
/// How long work tells what it is doing, and how the caller stops it.
#pragma once

#include "rvqkv/core/config.hpp"

#include <cstddef>
#include <functional>

RVQKV_NAMESPACE_BEGIN

/// Where training stands.
struct training_progress {
    std::size_t done = 0;             ///< Units of work done (k-means iterations over all depths).
    std::size_t total = 0;            ///< Units of work in all.
    std::size_t depth = 0;            ///< Residual depth at work.
    double mean_squared_error = 0.0;  ///< Per value in the scaled domain, after the last assignment.
};

/// Called on the training thread, never concurrently. Returning false asks to stop at the next point from which
/// training can be resumed. An empty function is never called.
using progress_callback = std::function<bool(const training_progress&)>;

RVQKV_NAMESPACE_END
