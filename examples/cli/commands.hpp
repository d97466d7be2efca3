// SPDX-License-Identifier: MIT
/// @file
/// The program's commands. Each function adds one to the parser; it runs when the command line has been read, and
/// throws when it fails.
#pragma once

#include "tensor_source.hpp"

#include <CLI/CLI.hpp>

#include <string>

namespace cli {

void add_train(CLI::App& app);
void add_compress(CLI::App& app);
void add_reconstruct(CLI::App& app);
void add_evaluate(CLI::App& app);
void add_inspect(CLI::App& app);

/// The options by which several commands find their tensors. `TENSORS` is positional.
void add_tensor_options(CLI::App& command, tensor_options& options);

}  // namespace cli
