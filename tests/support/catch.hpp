// SPDX-License-Identifier: MIT
/// @file
/// Catch2, whichever of version 2 (Debian 12) and 3 (Debian 13) is installed.
#pragma once

#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/catch_approx.hpp>
#include <catch2/catch_message.hpp>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators_all.hpp>
#include <catch2/matchers/catch_matchers_all.hpp>
using Catch::Approx;  // as version 2 does
#else
#include <catch2/catch.hpp>
#endif
