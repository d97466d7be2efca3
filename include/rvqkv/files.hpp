// SPDX-License-Identifier: MIT
/// @file
/// File formats: safetensors, `.npy`, codec files, training state. Needs the header-only libraries nlohmann-json and
/// xxhash.
#pragma once

#include "rvqkv/files/codec_file.hpp"
#include "rvqkv/files/npy.hpp"
#include "rvqkv/files/safetensors.hpp"
#include "rvqkv/files/trainer_file.hpp"
