// SPDX-License-Identifier: MIT
/// @file
/// Rows of the evaluation's table: what their names say, and which there are.
#pragma once

#include "engine.hpp"
#include "quantizing_tap.hpp"

#include <rvqkv/files/codec_file.hpp>

#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace llama_example {

/// What runs the model.
enum class engine_kind {
    llama_cpp,  ///< llama.cpp, keys and values replaced on their way.
    plain,      ///< The plain forward pass, on the library's own cache.
};

/// How a method holds keys and values.
struct method {
    std::string name;
    rvqkv::model_codecs codecs;  ///< Of methods of ours.
    exact_tokens exact;
    std::optional<cache_format> cache;  ///< Of llama.cpp's own.
    double bits_of_codes = 0.0;

    /// Bits stored for each channel of a sequence of so many tokens.
    [[nodiscard]] double bits(std::size_t tokens) const;
};

/// Codec sets by their codewords.
using codec_sets = std::map<std::size_t, rvqkv::codec_set>;

/// All methods that the codecs allow, the paper's depths of them.
[[nodiscard]] std::vector<std::string> usual_methods(const codec_sets& sets, engine_kind engine);

/// Throws `cli::usage_error` for a name that means nothing, codecs that were not given, and what the engine has not.
[[nodiscard]] method parse_method(const std::string& name, const codec_sets& sets, engine_kind engine,
                                  const model_attention& attention);

}  // namespace llama_example
