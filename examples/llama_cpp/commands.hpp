// SPDX-License-Identifier: MIT
/// @file
/// The program's commands, and what they share: the model's options, progress with the time left.
#pragma once

#include "../cli/support.hpp"

#include <CLI/CLI.hpp>

#include <chrono>
#include <cstddef>
#include <string>

namespace llama_example {

void add_calibrate(CLI::App& app);
void add_evaluate(CLI::App& app);
void add_save(CLI::App& app);
void add_memory(CLI::App& app);

/// Options that all commands have.
struct model_options {
    std::string path;
    std::string cache_folder = "models";
    bool as_it_is = false;
    std::size_t threads = 0;
};
void add_model_options(CLI::App& command, model_options& options);
/// The file to load: the model expanded to float32, unless it is to be taken as it is.
[[nodiscard]] std::string file_to_load(const model_options& options);
/// All threads that the machine has, if none were asked for.
[[nodiscard]] std::size_t threads_of(const model_options& options);

/// Progress with the time left: a bar on a terminal, otherwise a line now and then.
class timed_progress {
public:
    timed_progress();
    /// `fraction` of all work is done; rates before `start_over` do not count.
    void show(const std::string& what, double fraction);
    void start_over();
    void clear() { bar_.clear(); }

private:
    using clock = std::chrono::steady_clock;
    cli::progress_bar bar_;
    bool is_terminal_;
    clock::time_point start_ = clock::now();
    clock::time_point last_line_ = start_;
    double start_fraction_ = -1.0;
};

/// Seconds of some work.
class stopwatch {
public:
    [[nodiscard]] double seconds() const {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    }

private:
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace llama_example
