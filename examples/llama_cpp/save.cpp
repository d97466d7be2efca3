// SPDX-License-Identifier: MIT
/// @file
/// `rvqkv_llama save`: a conversation leaves llama.cpp as its sequence state, rests compressed in a file, comes back,
/// and goes on.
#include "codecs.hpp"
#include "commands.hpp"
#include "engine.hpp"
#include "metrics.hpp"
#include "sequence_state.hpp"

#include <rvqkv/core/thread_pool.hpp>
#include <rvqkv/files/sequence_file.hpp>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace llama_example {
namespace {

using json = nlohmann::ordered_json;

struct save_options {
    model_options model;
    std::string text;
    std::string codecs;
    std::string output;
    std::string report;
    std::size_t tokens = 1024;
    std::size_t following = 64;
    std::size_t generated = 32;
};

class saving {
public:
    explicit saving(const save_options& given)
        : given_(given),
          workers_(threads_of(given.model)),
          fingerprint_(fingerprint_of(given.model.path)),
          model_(file_to_load(given.model)),
          attention_(find_attention(model_, static_cast<int>(threads_of(given.model)))) {}

    json run() {
        const rvqkv::codec_set set = load_codecs_for(given_.codecs, fingerprint_, attention_);
        std::vector<llama_token> prompt = model_.prefix();
        const std::vector<llama_token> tokens = model_.tokenize(read_text(given_.text));
        const std::size_t taken = given_.tokens - prompt.size();
        if (tokens.size() < taken + given_.following + 1) {
            throw std::runtime_error(given_.text + ": has " + std::to_string(tokens.size()) + " tokens, " +
                                     std::to_string(taken + given_.following + 1) +
                                     " are needed: give more text, or fewer --tokens");
        }
        const auto from = tokens.begin();
        const auto middle = from + static_cast<std::ptrdiff_t>(taken);
        prompt.insert(prompt.end(), from, middle);
        const std::vector<llama_token> following(middle, middle + static_cast<std::ptrdiff_t>(given_.following + 1));

        // The engine's context as it is.
        decoder before = make_decoder();
        before.read(prompt);
        const std::vector<std::uint8_t> bytes = get_state(before.get());

        // Its state, compressed into a file; and all of it gone but for the file.
        sequence_state state = sequence_state::take_apart(bytes, attention_);
        if (state.put_together(attention_) != bytes) {
            throw std::runtime_error(
                "the sequence state does not come out as it went in: another version of llama.cpp");
        }
        const rvqkv::kv_cache cache = make_cache(attention_, set.layers);
        rvqkv::kv_workspace workspace = cache.make_workspace(workers_).value();
        const stopwatch compressing;
        {
            rvqkv::kv_sequence sequence = cache.new_sequence().value();
            append(sequence, state, attention_, workspace, workers_);
            rvqkv::save_sequence(sequence, given_.output).value();
        }
        const double compress_seconds = compressing.seconds();
        for (sequence_state::part& part : state.parts) {
            for (sequence_state::layer_rows& rows : part.layers) {
                std::fill(rows.keys.begin(), rows.keys.end(), rvqkv::float16());
                std::fill(rows.values.begin(), rows.values.end(), rvqkv::float16());
            }
        }

        // Back into a context of its own.
        decoder after = make_decoder();
        const stopwatch restoring;
        {
            const rvqkv::kv_sequence sequence = rvqkv::load_sequence(cache, given_.output).value();
            reconstruct(sequence, state, attention_, workspace);
            set_state(after.get(), state.put_together(attention_));
        }
        const double restore_seconds = restoring.seconds();

        // Both read on, and both write on.
        reference_window reference(given_.following, model_.vocabulary());
        divergence found;
        const std::vector<llama_token> read_on(following.begin(), following.end() - 1);
        const std::span<const llama_token> targets = std::span(following).subspan(1);
        before.read_on(read_on, prompt.size(), [&](const float* logits, std::size_t first, std::size_t count) {
            reference.take(logits, first, count, targets, workers_);
        });
        after.read_on(read_on, prompt.size(), [&](const float* logits, std::size_t first, std::size_t count) {
            found.take(reference, logits, first, count, targets, workers_);
        });
        const divergence_summary summary = summarize(found, 0, given_.following);
        const std::string exact_text = write_on(before, prompt.size() + given_.following);
        const std::string restored_text = write_on(after, prompt.size() + given_.following);
        const std::size_t file_bytes = std::filesystem::file_size(given_.output);
        return {{"method", "rvqkv-" + std::to_string(set.layers.begin()->second.key->shape().codewords) + "x" +
                               std::to_string(set.layers.begin()->second.key->depths()) + " file"},
                {"tokens", prompt.size()},
                {"state_bytes", bytes.size()},
                {"file_bytes", file_bytes},
                {"times_smaller", static_cast<double>(bytes.size()) / static_cast<double>(file_bytes)},
                {"compress_seconds", compress_seconds},
                {"restore_seconds", restore_seconds},
                {"tokens_after", given_.following},
                {"kl", summary.kl},
                {"kl_p99", summary.kl_p99},
                {"top1_agreement", summary.top1_agreement},
                {"exact_continuation", exact_text},
                {"restored_continuation", restored_text}};
    }

private:
    [[nodiscard]] decoder make_decoder() const {
        return {model_,
                {GGML_TYPE_F16, true, true, true},
                given_.tokens + given_.following + given_.generated,
                static_cast<int>(threads_of(given_.model)),
                nullptr};
    }

    /// The likeliest token, again and again.
    [[nodiscard]] std::string write_on(decoder& context, std::size_t position) const {
        std::string text;
        for (std::size_t i = 0; i < given_.generated; ++i) {
            const float* const logits = llama_get_logits_ith(context.get(), -1);
            const auto next = static_cast<llama_token>(std::max_element(logits, logits + model_.vocabulary()) - logits);
            text += model_.piece(next);
            context.read_on({next}, position + i);
        }
        return text;
    }

    save_options given_;
    rvqkv::thread_pool workers_;
    std::string fingerprint_;
    loaded_model model_;
    model_attention attention_;
};

/// A text on one line.
std::string quoted(const json& text) {
    return text.dump(-1, ' ', false, json::error_handler_t::replace);
}

void save(const save_options& given) {
    cli::check_output(given.output, {given.model.path, given.text, given.codecs});
    const json report = saving(given).run();
    if (!given.report.empty()) {
        std::ofstream file(given.report);
        file << report.dump(2, ' ', false, json::error_handler_t::replace) << '\n';
        if (!file.flush()) {
            throw std::runtime_error(given.report + ": cannot be written");
        }
    }
    std::printf("%s: %s tokens, %s of llama.cpp's sequence state in a file of %s: %s times smaller\n",
                given.output.c_str(), report["tokens"].dump().c_str(), cli::bytes_text(report["state_bytes"]).c_str(),
                cli::bytes_text(report["file_bytes"]).c_str(), cli::fixed(report["times_smaller"], 2).c_str());
    std::printf("compressed in %s s, restored in %s s; the %s tokens that follow: KL %s, top-1 agreement %s\n",
                cli::fixed(report["compress_seconds"], 2).c_str(), cli::fixed(report["restore_seconds"], 2).c_str(),
                report["tokens_after"].dump().c_str(), cli::brief(report["kl"]).c_str(),
                cli::fixed(report["top1_agreement"], 3).c_str());
    std::printf("before: %s\nafter:  %s\n", quoted(report["exact_continuation"]).c_str(),
                quoted(report["restored_continuation"]).c_str());
}

}  // namespace

void add_save(CLI::App& app) {
    CLI::App* const command = app.add_subcommand("save", "Compress a conversation into a file, restore it, go on");
    const auto given = std::make_shared<save_options>();
    add_model_options(*command, given->model);
    command->add_option("--text", given->text, "File of text that the conversation begins with")->required();
    command->add_option("-c,--codecs", given->codecs, "Codec file that `calibrate` made")->required();
    command->add_option("-o,--output,--out", given->output, "File of the compressed sequence")->required();
    command->add_option("--tokens", given->tokens, "Tokens of the conversation")
        ->check(CLI::Range(16, 1 << 20))
        ->capture_default_str();
    command->add_option("--following", given->following, "Tokens of the text to compare predictions on afterwards")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    command->add_option("--generated", given->generated, "Tokens to write on with")->capture_default_str();
    command->add_option("--json", given->report, "File for the figures as JSON");
    command->callback([given] { save(*given); });
}

}  // namespace llama_example
