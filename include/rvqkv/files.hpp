// SPDX-License-Identifier: MIT
/// @file
/// File formats: codec files, compressed tensors, saved sequences, safetensors, `.npy`. Needs the header-only libraries
/// nlohmann-json and xxhash. Saved training is in `rvqkv/files/trainer_file.hpp`, which brings the trainers with it.
#pragma once

#include "rvqkv/files/codec_file.hpp"
#include "rvqkv/files/compressed_file.hpp"
#include "rvqkv/files/npy.hpp"
#include "rvqkv/files/safetensors.hpp"
#include "rvqkv/files/sequence_file.hpp"
