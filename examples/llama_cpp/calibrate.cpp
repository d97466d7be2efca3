// SPDX-License-Identifier: MIT
/// @file
/// `rvqkv_llama calibrate`: text in, codecs of every layer out. The text streams through the model window by window;
/// what is kept of it is a bounded sample for each codebook.
#include "codecs.hpp"
#include "commands.hpp"
#include "engine.hpp"
#include "tap.hpp"

#include <rvqkv/core/thread_pool.hpp>
#include <rvqkv/files/codec_file.hpp>
#include <rvqkv/files/trainer_file.hpp>
#include <rvqkv/learn.hpp>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>

namespace llama_example {
namespace {

struct calibrate_options {
    model_options model;
    std::string text;
    std::string output;
    std::string state;
    std::size_t tokens = 16384;
    std::size_t window = 1024;
    std::size_t depths = 8;
    std::size_t codewords = 2048;
    std::size_t group_dim = 32;
    std::size_t iterations = 10;
    std::size_t sample = 100000;
    std::uint64_t seed = 0;
};

/// Adds keys and values to the trainers' samples.
class sampling_tap : public kv_tap {
public:
    sampling_tap(const model_attention& attention, rvqkv::model_trainer& trainer)
        : kv_tap(attention), trainers_(std::move(trainer).release()), model_(&trainer) {}
    ~sampling_tap() override = default;
    /// Gives the trainers back.
    void finish() { *model_ = rvqkv::model_trainer(std::move(trainers_)); }

protected:
    void on_keys(std::size_t layer, const rvqkv::mutable_tensor_view& keys) override {
        observe(layer, "keys", trainers_.at(layer).key, keys);
    }
    void on_values(std::size_t layer, const rvqkv::mutable_tensor_view& values) override {
        observe(layer, "values", trainers_.at(layer).value, values);
    }

private:
    void observe(std::size_t layer, const char* side, rvqkv::codebook_trainer& trainer,
                 const rvqkv::tensor_view& rows) const {
        for (std::size_t token = 0; token < rows.tokens(); ++token) {
            for (std::size_t head = 0; head < rows.heads(); ++head) {
                const float* const row = static_cast<const float*>(rows.row(token, head));
                float sum = 0.0F;
                for (std::size_t i = 0; i < rows.channels(); ++i) {
                    sum += row[i] * 0.0F;
                }
                if (sum != 0.0F || std::isnan(sum)) {
                    throw std::runtime_error("layer " + std::to_string(layer) + ": " + side + " of token " +
                                             std::to_string(first_position() + token) + " of a window, head " +
                                             std::to_string(head) +
                                             ", are not finite: the model is damaged, or its numbers overflow");
                }
            }
        }
        trainer.observe(rows).value();
    }

    std::map<std::size_t, rvqkv::model_trainer::layer_trainers> trainers_;
    rvqkv::model_trainer* model_;
};

class calibration {
public:
    explicit calibration(const calibrate_options& given)
        : given_(given),
          fingerprint_(fingerprint_of(given.model.path)),
          workers_(threads_of(given.model)),
          trainer_(std::map<std::size_t, rvqkv::model_trainer::layer_trainers>()) {}

    void run() {
        const stopwatch whole;
        guard_.emplace();
        const std::string text = read_text(given_.text);
        const loaded_model model(file_to_load(given_.model));
        const model_attention attention = find_attention(model, threads());
        name_ = model.name().empty() ? std::filesystem::path(given_.model.path).filename().string() : model.name();
        std::vector<llama_token> tokens = model.tokenize(text);
        if (tokens.size() < given_.window) {
            throw std::runtime_error(given_.text + ": has " + std::to_string(tokens.size()) +
                                     " tokens, a window needs " + std::to_string(given_.window) +
                                     ": give more text, or a smaller --window");
        }
        std::size_t wanted = given_.tokens;
        if (tokens.size() < wanted) {
            wanted = tokens.size() / given_.window * given_.window;
            cli::warn(given_.text + ": has " + std::to_string(tokens.size()) + " tokens, calibrates on " +
                      std::to_string(wanted));
        }
        wanted = std::max(given_.window, wanted / given_.window * given_.window);
        tokens.resize(wanted);
        make_trainers(attention, tokens);
        read(model, attention, tokens);
        const double model_seconds = model_seconds_;
        const stopwatch training;
        progress_.start_over();
        const rvqkv::status trained = trainer_.initialize(workers_, [&](const rvqkv::training_progress& at) {
            progress_.show("k-means, depth " + std::to_string(at.depth + 1),
                           static_cast<double>(at.done) / static_cast<double>(at.total));
            return !cli::interrupt_guard::requested();
        });
        if (!trained) {
            throw std::runtime_error(trained.error().message + ": give more --tokens, or fewer --codewords");
        }
        stop_if_asked(wanted);
        progress_.clear();
        rvqkv::codec_set set{trainer_.make().value(), notes_};
        set.metadata["model"] = name_;
        set.metadata["key_channels"] = attention.front().rope.pairs == rvqkv::rope_pairs::interleaved
                                           ? "rotary pairs are (2 i, 2 i + 1)"
                                           : "rotary pairs are (i, i + head_dim / 2)";
        set.metadata["window"] = std::to_string(given_.window);
        rvqkv::save_codecs(given_.output, set).value();
        std::error_code ignored;
        std::filesystem::remove(given_.state, ignored);
        std::size_t bytes = 0;
        for (const auto& layer : set.layers) {
            bytes += layer.second.key->weights().size() + layer.second.value->weights().size();
        }
        std::printf("%s: %zu layers, %.3f and %.3f bits per channel of keys and values, codebooks of %s\n",
                    given_.output.c_str(), set.layers.size(), set.layers.begin()->second.key->spec()->bits_per_value(),
                    set.layers.begin()->second.value->spec()->bits_per_value(), cli::bytes_text(bytes).c_str());
        std::printf("%zu tokens in %.1f s: the model %.1f s, sampling %.1f s, k-means %.1f s\n", wanted,
                    whole.seconds(), model_seconds, sampling_seconds_, training.seconds());
    }

private:
    [[nodiscard]] int threads() const { return static_cast<int>(threads_of(given_.model)); }

    void make_trainers(const model_attention& attention, const std::vector<llama_token>& tokens) {
        std::map<std::size_t, rvqkv::layer_trainer_config> configs;
        for (std::size_t layer = 0; layer < attention.size(); ++layer) {
            const auto config = [&](bool is_key) {
                rvqkv::trainer_config made;
                made.spec = paper_spec(attention[layer], is_key, {given_.depths, given_.codewords, given_.group_dim});
                made.kmeans.iterations = given_.iterations;
                made.sample = given_.sample;
                made.seed = given_.seed + 2 * layer + (is_key ? 0 : 1);
                return made;
            };
            configs[layer] = {config(true), config(false)};
        }
        rvqkv::model_trainer fresh = rvqkv::model_trainer::create(configs).value();
        notes_ = {{"model_fingerprint", fingerprint_},
                  {"calibration_tokens", std::to_string(tokens.size())},
                  {"calibration_text", hash_of(std::as_bytes(std::span(tokens)))}};
        std::error_code ignored;
        if (!std::filesystem::exists(given_.state, ignored)) {
            trainer_ = std::move(fresh);
            return;
        }
        rvqkv::saved_training saved = rvqkv::load_training(given_.state).value();
        const bool same_notes = std::all_of(notes_.begin(), notes_.end(), [&](const auto& note) {
            const auto found = saved.metadata.find(note.first);
            return found != saved.metadata.end() && found->second == note.second;
        });
        bool same_configs = saved.trainer.layers().size() == configs.size();
        for (const auto& [layer, both] : saved.trainer.layers()) {
            const auto found = configs.find(layer);
            same_configs = same_configs && found != configs.end() && found->second.key == both.key.config() &&
                           found->second.value == both.value.config();
        }
        if (!same_notes || !same_configs) {
            throw std::runtime_error(given_.state +
                                     ": was saved by a calibration of another model, text or setting; go on with its "
                                     "options, or remove it to begin anew");
        }
        tokens_done_ = std::stoull(saved.metadata.at("tokens_done"));
        trainer_ = std::move(saved.trainer);
        cli::warn("goes on from " + given_.state + ", where " + std::to_string(tokens_done_) + " of " +
                  std::to_string(tokens.size()) + " tokens were read");
    }

    void read(const loaded_model& model, const model_attention& attention, const std::vector<llama_token>& tokens) {
        if (tokens_done_ >= tokens.size()) {
            return;
        }
        sampling_tap tap(attention, trainer_);
        const stopwatch reading;
        {
            const std::vector<llama_token> prefix = model.prefix();
            decoder reader(model, {}, given_.window, threads(), &tap);
            while (tokens_done_ < tokens.size() && !cli::interrupt_guard::requested()) {
                progress_.show("reading", static_cast<double>(tokens_done_) / static_cast<double>(tokens.size()));
                const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(tokens_done_);
                std::vector<llama_token> window = prefix;
                window.insert(window.end(), first, first + static_cast<std::ptrdiff_t>(given_.window - prefix.size()));
                reader.read(window);
                tokens_done_ += given_.window;
            }
        }
        tap.finish();
        sampling_seconds_ = tap.seconds();
        model_seconds_ = reading.seconds() - tap.seconds();
        stop_if_asked(tokens.size());
    }

    void stop_if_asked(std::size_t tokens) {
        if (!cli::interrupt_guard::requested()) {
            return;
        }
        progress_.clear();
        rvqkv::metadata_map notes = notes_;
        notes["tokens_done"] = std::to_string(tokens_done_);
        rvqkv::save_training(given_.state, trainer_, notes).value();
        throw cli::interruption("stopped after " + std::to_string(tokens_done_) + " of " + std::to_string(tokens) +
                                " tokens; the same command goes on from " + given_.state);
    }

    calibrate_options given_;
    std::string fingerprint_;
    std::string name_;
    rvqkv::thread_pool workers_;
    rvqkv::model_trainer trainer_;
    rvqkv::metadata_map notes_;
    std::optional<cli::interrupt_guard> guard_;
    std::size_t tokens_done_ = 0;
    double model_seconds_ = 0.0;
    double sampling_seconds_ = 0.0;
    timed_progress progress_;
};

}  // namespace

void add_calibrate(CLI::App& app) {
    CLI::App* const command = app.add_subcommand("calibrate", "Learn a model's codecs from text");
    const auto given = std::make_shared<calibrate_options>();
    add_model_options(*command, given->model);
    command->add_option("--text", given->text, "File of text to learn from")->required();
    command->add_option("-o,--output,--out", given->output, "Codec file to write")->required();
    command->add_option("--tokens", given->tokens, "How many tokens of it")->capture_default_str();
    command->add_option("--window", given->window, "Tokens that the model sees at a time")
        ->check(CLI::Range(16, 1 << 20))
        ->capture_default_str();
    command->add_option("--depths", given->depths, "Residual depth")->check(CLI::Range(1, 256))->capture_default_str();
    command->add_option("--codewords", given->codewords, "Codewords of each depth")
        ->check(CLI::Range(1, 65536))
        ->capture_default_str();
    command->add_option("--group-dim", given->group_dim, "Channels quantized together")
        ->check(CLI::Range(1, 4096))
        ->capture_default_str();
    command->add_option("--iterations", given->iterations, "Of k-means, for each depth")
        ->check(CLI::Range(1, 1000))
        ->capture_default_str();
    command->add_option("--sample", given->sample, "Most vectors of a codebook that k-means sees")
        ->capture_default_str();
    command->add_option("--seed", given->seed, "Of every random choice")->capture_default_str();
    command->add_option("--state", given->state,
                        "Where Ctrl-C saves what was done, to go on from; default: the output's name and .state");
    command->callback([given] {
        if (given->state.empty()) {
            given->state = given->output + ".state";
        }
        cli::check_output(given->output, {given->model.path, given->text});
        calibration(*given).run();
    });
}

}  // namespace llama_example
