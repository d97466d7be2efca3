// SPDX-License-Identifier: MIT
/// @file
/// Attention on codes of small codebooks: keys by tables, and values by tables.
#pragma once

#include "rvqkv/attend/small_key_tables.hpp"
#include "rvqkv/attend/small_value_tables.hpp"
