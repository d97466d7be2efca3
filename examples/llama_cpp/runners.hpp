// SPDX-License-Identifier: MIT
/// @file
/// What gives predictions to measure: a model with its keys and values as they are, or as a method holds them.
#pragma once

#include "methods.hpp"

#include <rvqkv/core/parallel_for.hpp>

#include <cstddef>
#include <memory>
#include <vector>

namespace llama_example {

/// A model in one of the engines.
class runner {
public:
    runner() = default;
    runner(const runner&) = delete;
    runner& operator=(const runner&) = delete;
    virtual ~runner() = default;
    /// Reads a window from an empty cache, with a method or, for null, as it is. Gives the seconds that the method took
    /// in this: of encoding, decoding and, where it has its own, attention. Throws what the model and codecs throw.
    virtual double read(const method* by, const std::vector<llama_token>& window,
                        const decoder::logits_callback& on_logits) = 0;
};

/// For windows of so many tokens. The model, its attention and the workers outlive it.
[[nodiscard]] std::unique_ptr<runner> make_runner(engine_kind engine, const loaded_model& model,
                                                  const model_attention& attention, std::size_t tokens,
                                                  const rvqkv::executor& workers);

}  // namespace llama_example
