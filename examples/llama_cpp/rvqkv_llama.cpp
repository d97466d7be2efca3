// SPDX-License-Identifier: MIT
/// @file
/// The program `rvqkv_llama`: rvqkv in llama.cpp, which stays as it is. Learns codecs of a GGUF model, measures what
/// they do to its predictions, keeps conversations compressed.
#include "commands.hpp"
#include "engine.hpp"

#include <rvqkv/version.hpp>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <new>
#include <thread>

#include <sched.h>
#include <unistd.h>

namespace llama_example {

void add_model_options(CLI::App& command, model_options& options) {
    command.add_option("MODEL", options.path, "GGUF file of a Llama, Qwen or Gemma model")->required();
    command.add_option("--model-cache", options.cache_folder, "Folder of models expanded to float32")
        ->capture_default_str();
    command.add_flag("--as-it-is", options.as_it_is,
                     "Run the model in the file's own number format, whose rounding is part of every divergence then");
    command.add_option("--threads", options.threads, "0: all")->capture_default_str();
}

std::size_t threads_of(const model_options& options) {
    if (options.threads != 0) {
        return options.threads;
    }
#ifdef __linux__
    // Processors that this process may run on: llama.cpp's threads wait for each other in loops, so one too many is
    // dear.
    cpu_set_t mine;
    if (::sched_getaffinity(0, sizeof mine, &mine) == 0) {
        return static_cast<std::size_t>(std::max(1, CPU_COUNT(&mine)));
    }
#endif
    return std::max(1U, std::thread::hardware_concurrency());
}

std::string file_to_load(const model_options& options) {
    return options.as_it_is
               ? options.path
               : expanded_to_float32(options.path, options.cache_folder, static_cast<int>(threads_of(options)));
}

timed_progress::timed_progress() : is_terminal_(::isatty(STDERR_FILENO) == 1) {}

void timed_progress::start_over() {
    start_ = clock::now();
    start_fraction_ = -1.0;
}

void timed_progress::show(const std::string& what, double fraction) {
    const clock::time_point now = clock::now();
    if (start_fraction_ < 0.0) {
        start_ = now;
        start_fraction_ = fraction;
    }
    std::string text = what;
    const double spent = std::chrono::duration<double>(now - start_).count();
    if (spent > 2.0 && fraction > start_fraction_) {
        const double left = spent * (1.0 - fraction) / (fraction - start_fraction_);
        text += left < 90.0 ? ", " + cli::fixed(left, 0) + " s left" : ", " + cli::fixed(left / 60.0, 0) + " min left";
    }
    bar_.show(text, fraction);
    if (!is_terminal_ && now - last_line_ > std::chrono::seconds(15)) {
        last_line_ = now;
        std::fprintf(stderr, "%3.0f%%  %s\n", 100.0 * fraction, text.c_str());
    }
}

}  // namespace llama_example

namespace {

void complain(const char* text) {
    std::fprintf(stderr, "rvqkv_llama: error: %s\n", text);
}

int run(int argc, char** argv) {
    CLI::App app("Residual vector quantization of a GGUF model's key/value cache, in llama.cpp.", "rvqkv_llama");
    app.set_version_flag("--version", "rvqkv_llama " RVQKV_VERSION_STRING);
    app.require_subcommand(1);
    app.get_formatter()->column_width(34);
    llama_example::add_calibrate(app);
    llama_example::add_evaluate(app);
    llama_example::add_save(app);
    llama_example::add_memory(app);
    app.footer(
        "Exit codes: 0 done, 1 failed, 2 the command line makes no sense, 130 interrupted (calibration is saved).\n\n"
        "Example:\n"
        "  rvqkv_llama calibrate model.gguf --text calibration.txt -o model.codecs\n"
        "  rvqkv_llama evaluate model.gguf --text other.txt -c model.codecs\n"
        "  rvqkv_llama save model.gguf --text other.txt -c model.codecs -o chat.rvq");
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
        return app.exit(error) == 0 ? cli::done : cli::misused;  // prints help, version or what is wrong
    }
    if (std::fflush(stdout) != 0) {
        complain("cannot write the results to stdout");
        return cli::failed;
    }
    return cli::done;
}

}  // namespace

int main(int argc, char** argv) {
    llama_example::start_engine();
    try {
        return run(argc, argv);
    } catch (const cli::usage_error& error) {
        complain(error.what());
        return cli::misused;
    } catch (const cli::interruption& error) {
        std::fprintf(stderr, "rvqkv_llama: %s\n", error.what());
        return cli::interrupted;
    } catch (const std::bad_alloc&) {
        complain("out of memory");
    } catch (const std::exception& error) {
        complain(error.what());
    }
    return cli::failed;
}
