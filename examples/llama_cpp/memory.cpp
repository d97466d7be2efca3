// SPDX-License-Identifier: MIT
/// @file
/// `rvqkv_llama memory`: what the process really holds of a long sequence, in llama.cpp's cache and in rvqkv's. The
/// keys and values of one window of text are put in again and again: what they are is of no matter here.
#include "codecs.hpp"
#include "commands.hpp"
#include "engine.hpp"
#include "sequence_state.hpp"

#include <rvqkv/core/thread_pool.hpp>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>

#include <unistd.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace llama_example {
namespace {

using json = nlohmann::ordered_json;

struct memory_options {
    model_options model;
    std::string text;
    std::vector<std::string> codecs;
    std::vector<std::size_t> tokens = {8192, 32768};
    std::string report;
};

/// Bytes of the process that are in memory.
std::size_t resident_bytes() {
#ifdef __GLIBC__
    malloc_trim(0);  // what is free does not count
#endif
    std::ifstream file("/proc/self/statm");
    std::size_t whole = 0;
    std::size_t resident = 0;
    if (!(file >> whole >> resident)) {
        throw std::runtime_error("/proc/self/statm cannot be read: memory is measured on Linux only");
    }
    return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

/// The state of `tokens` tokens, of which those of `window` are repeated.
sequence_state repeated(const sequence_state& window, std::size_t tokens, const model_attention& attention) {
    sequence_state all;
    all.mark = window.mark;
    for (const sequence_state::part& part : window.parts) {
        const std::size_t there = part.positions.size();
        const std::size_t sliding = attention[part.layers.front().layer].sliding_window;
        const std::size_t kept = sliding == 0 ? tokens : std::min(tokens, sliding);
        sequence_state::part& to = all.parts.emplace_back();
        to.positions.resize(kept);
        std::iota(to.positions.begin(), to.positions.end(), static_cast<llama_pos>(tokens - kept));
        for (const sequence_state::layer_rows& rows : part.layers) {
            sequence_state::layer_rows& copy = to.layers.emplace_back();
            copy.layer = rows.layer;
            const auto repeat = [&](const std::vector<rvqkv::float16>& from, std::vector<rvqkv::float16>& out) {
                const std::size_t width = from.size() / there;
                out.resize(kept * width);
                for (std::size_t i = 0; i < out.size(); ++i) {
                    out[i] = from[i % from.size()];
                }
            };
            repeat(rows.keys, copy.keys);
            repeat(rows.values, copy.values);
        }
    }
    return all;
}

class measurement {
public:
    explicit measurement(const memory_options& given)
        : given_(given),
          workers_(threads_of(given.model)),
          fingerprint_(fingerprint_of(given.model.path)),
          model_(given.model.path),
          attention_(find_attention(model_, threads())) {}

    json run() {
        sequence_state window;
        {
            std::vector<llama_token> tokens = model_.prefix();
            const std::vector<llama_token> text = model_.tokenize(read_text(given_.text));
            tokens.insert(tokens.end(), text.begin(),
                          text.begin() + static_cast<std::ptrdiff_t>(std::min<std::size_t>(text.size(), 1023)));
            decoder context(model_, {GGML_TYPE_F16, true, true, false}, tokens.size(), threads(), nullptr);
            context.read(tokens);
            window = sequence_state::take_apart(get_state(context.get()), attention_);
        }
        json rows = json::array();
        for (const std::size_t tokens : given_.tokens) {
            rows.push_back(engine(window, tokens));
            for (const std::string& path : given_.codecs) {
                rows.push_back(ours(window, tokens, path));
            }
        }
        return rows;
    }

private:
    [[nodiscard]] int threads() const { return static_cast<int>(threads_of(given_.model)); }

    [[nodiscard]] json engine(const sequence_state& window, std::size_t tokens) const {
        const std::vector<std::uint8_t> bytes = repeated(window, tokens, attention_).put_together(attention_);
        const std::size_t before = resident_bytes();
        decoder context(model_, {GGML_TYPE_F16, true, true, false}, tokens, threads(), nullptr);
        set_state(context.get(), bytes);
        const std::size_t after = resident_bytes();
        // The context computes, too: what it needs for that, one of few tokens shows.
        constexpr std::size_t few = 256;
        const decoder small(model_, {GGML_TYPE_F16, true, true, false}, few, threads(), nullptr);
        std::size_t few_tokens = 0;
        for (const attention_layer& layer : attention_) {
            few_tokens += few * sizeof(rvqkv::float16) *
                          (layer.keys.heads * layer.keys.channels + layer.values.heads * layer.values.channels);
        }
        const std::size_t computing = resident_bytes() - after;
        const std::size_t needed = computing - std::min(computing, few_tokens);
        return {{"method", "llama.cpp-f16"},
                {"tokens", tokens},
                {"resident_bytes", after - before - std::min(needed, after - before)},
                {"codebook_bytes", 0}};
    }

    [[nodiscard]] json ours(const sequence_state& window, std::size_t tokens, const std::string& path) const {
        const std::size_t before = resident_bytes();
        const rvqkv::codec_set set = load_codecs_for(path, fingerprint_, attention_);
        const rvqkv::kv_cache cache = make_cache(attention_, set.layers);
        rvqkv::kv_sequence sequence = cache.new_sequence().value();
        const std::size_t codebooks = resident_bytes() - before;  // and what is made of them, for search and attention
        {
            rvqkv::kv_workspace workspace = cache.make_workspace(workers_).value();
            for (std::size_t done = 0; done < tokens; done += 1024) {
                const std::size_t count = std::min<std::size_t>(1024, tokens - done);
                sequence_state piece = repeated(window, count, attention_);
                for (sequence_state::part& part : piece.parts) {
                    for (llama_pos& position : part.positions) {
                        position += static_cast<llama_pos>(done);
                    }
                }
                append(sequence, piece, attention_, workspace, workers_);
            }
        }
        const rvqkv::codebook_shape shape = set.layers.begin()->second.key->shape();
        return {{"method", "rvqkv-" + std::to_string(shape.codewords) + "x" + std::to_string(shape.depths)},
                {"tokens", tokens},
                {"resident_bytes", resident_bytes() - before - codebooks},
                {"codebook_bytes", codebooks}};
    }

    memory_options given_;
    rvqkv::thread_pool workers_;
    std::string fingerprint_;
    loaded_model model_;
    model_attention attention_;
};

void measure_memory(const memory_options& given) {
    const json rows = measurement(given).run();
    if (!given.report.empty()) {
        std::ofstream file(given.report);
        file << rows.dump(2) << '\n';
        if (!file.flush()) {
            throw std::runtime_error(given.report + ": cannot be written");
        }
    }
    std::vector<std::vector<std::string>> table = {
        {"cache", "tokens", "resident", "x less", "codebooks, once", "x less with them"}};
    double engine = 0.0;
    for (const json& row : rows) {
        const double bytes = row["resident_bytes"];
        const double codebooks = row["codebook_bytes"];
        if (codebooks == 0.0) {
            engine = bytes;
        }
        table.push_back({row["method"], row["tokens"].dump(), cli::bytes_text(row["resident_bytes"]),
                         cli::fixed(engine / bytes, 2), cli::bytes_text(row["codebook_bytes"]),
                         cli::fixed(engine / (bytes + codebooks), 2)});
    }
    cli::print_table(table);
}

}  // namespace

void add_memory(CLI::App& app) {
    CLI::App* const command = app.add_subcommand("memory", "Measure the memory that a long sequence really takes");
    const auto given = std::make_shared<memory_options>();
    add_model_options(*command, given->model);
    command->add_option("--text", given->text, "File of text whose keys and values are put in, again and again")
        ->required();
    command->add_option("-c,--codecs", given->codecs, "Codec files that `calibrate` made");
    command->add_option("--tokens", given->tokens, "Lengths")->delimiter(',')->capture_default_str();
    command->add_option("--json", given->report, "File for the figures as JSON");
    command->callback([given] { measure_memory(*given); });
}

}  // namespace llama_example
