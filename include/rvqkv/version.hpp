// SPDX-License-Identifier: MIT
/// @file
/// Version of the library. The build reads it from here; nothing else states it.
#pragma once

#define RVQKV_VERSION_MAJOR 0
#define RVQKV_VERSION_MINOR 1
#define RVQKV_VERSION_PATCH 0
#define RVQKV_VERSION_STRING "0.1.0"
