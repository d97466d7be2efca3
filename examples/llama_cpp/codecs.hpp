// SPDX-License-Identifier: MIT
/// @file
/// Codecs of a GGUF model: what is trained, and files that know which model they were trained on.
#pragma once

#include "tap.hpp"

#include <rvqkv/files/codec_file.hpp>
#include <rvqkv/quantize/codec.hpp>

#include <cstddef>
#include <string>

namespace llama_example {

/// What is trained for one side of a layer: the paper's recipe. Keys are grouped so that both halves of a rotary pair
/// are together, in whichever order the file holds its channels.
[[nodiscard]] rvqkv::codec_spec paper_spec(const attention_layer& layer, bool is_key,
                                           const rvqkv::codebook_shape& shape);

/// Reads a codec file and checks that it was made for this model.
/// Throws `std::runtime_error` naming both models if it was not.
[[nodiscard]] rvqkv::codec_set load_codecs_for(const std::string& path, const std::string& fingerprint,
                                               const model_attention& attention);

/// All layers' codecs with their first depths only.
[[nodiscard]] rvqkv::model_codecs first_depths(const rvqkv::model_codecs& whole, std::size_t depths);

}  // namespace llama_example
