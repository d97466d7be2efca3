// SPDX-License-Identifier: MIT
/// @file
/// The library behind `c_api.c`.
#include <rvqkv/c_api/compile_c_api.hpp>
