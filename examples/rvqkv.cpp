// SPDX-License-Identifier: MIT
/// @file
/// The program `rvqkv`: trains codecs, compresses tensors with them, reads them back, measures.
#include "cli/commands.hpp"
#include "cli/support.hpp"

#include <rvqkv/version.hpp>

#include <CLI/CLI.hpp>

#include <cstdio>
#include <exception>
#include <new>

namespace cli {

void add_tensor_options(CLI::App& command, tensor_options& options) {
    command
        .add_option("TENSORS", options.paths,
                    "A safetensors file with layers.N.key, layers.N.value (and .query), or KEYS.npy VALUES.npy "
                    "[QUERIES.npy]")
        ->required()
        ->expected(1, 3);
    command.add_option("--layers", options.layers, "Layers to take, such as 0,9; default: all (.npy: its number, 0)")
        ->delimiter(',');
    command.add_option("--heads", options.heads, "KV heads, for tensors stored as [token, channel]")
        ->check(CLI::PositiveNumber);
}

}  // namespace cli

namespace {

void complain(const char* text) {
    std::fprintf(stderr, "rvqkv: error: %s\n", text);
}

void describe(CLI::App& app) {
    app.set_version_flag("--version", "rvqkv " RVQKV_VERSION_STRING);
    app.require_subcommand(1);
    app.get_formatter()->column_width(34);
    cli::add_train(app);
    cli::add_compress(app);
    cli::add_reconstruct(app);
    cli::add_evaluate(app);
    cli::add_inspect(app);
    app.set_help_all_flag("--help-all", "Help of every command");  // after the commands, which would inherit it
    app.footer(
        "Tensors are [token, head, channel] in float32, float16 or bfloat16, keys and queries before rotary "
        "embedding.\n"
        "Results go to stdout, progress (on a terminal) and messages to stderr.\n"
        "Exit codes: 0 done, 1 failed, 2 the command line makes no sense, 130 interrupted (training state is saved).\n"
        "RVQKV_SIMD=generic|neon|avx2|avxvnni|avx512|avx512vnni|avx512vbmi caps the instruction set; results do not "
        "depend on "
        "it.\n\n"
        "Example:\n"
        "  rvqkv train kv.safetensors -o model.codecs --depths 8 --codewords 2048\n"
        "  rvqkv evaluate kv.safetensors -c model.codecs@8,6,4\n"
        "  rvqkv compress kv.safetensors -c model.codecs -o kv.rvq\n"
        "  rvqkv reconstruct kv.rvq -c model.codecs -o back.safetensors");
}

int run(int argc, char** argv) {
    CLI::App app("Residual vector quantization of LLM key/value caches (arXiv 2410.15704).", "rvqkv");
    describe(app);
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
    try {
        return run(argc, argv);
    } catch (const cli::usage_error& error) {
        complain(error.what());
        return cli::misused;
    } catch (const cli::interruption& error) {
        std::fprintf(stderr, "rvqkv: %s\n", error.what());
        return cli::interrupted;
    } catch (const std::bad_alloc&) {
        complain("out of memory");
    } catch (const std::exception& error) {
        complain(error.what());
    }
    return cli::failed;
}
