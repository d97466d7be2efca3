// SPDX-License-Identifier: MIT
/// @file
/// `rvqkv train`: codecs from tensors. One layer's one side at a time, its tensors read in pieces, so that memory holds
/// no more than one sample, the codebook in the making and those already made.
#include "commands.hpp"
#include "support.hpp"

#include <rvqkv/core/thread_pool.hpp>
#include <rvqkv/files/codec_file.hpp>
#include <rvqkv/files/trainer_file.hpp>
#include <rvqkv/learn.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace cli {
namespace {

using json = nlohmann::ordered_json;

struct train_options {
    tensor_options tensors;
    std::string output;
    std::string tokens;
    std::string state;
    std::size_t depths = 8;
    std::size_t codewords = 2048;
    std::size_t group_dim = 32;
    std::string key_grouping = "strided";
    std::string value_grouping = "contiguous";
    std::string scale = "std_dev";
    std::string scale_type = "float16";
    std::string weight_type = "float32";
    std::string metric = "euclidean";
    std::string start = "sampled";
    std::size_t kmeans_iterations = 10;
    std::size_t sample = 100000;
    std::size_t ema_steps = 50;
    std::size_t ema_batch = 0;
    double ema_decay = 0.99;
    double ema_epsilon = 1e-5;
    double revive_below = 0.0;
    std::uint64_t seed = 0;
    std::size_t threads = 0;
    bool as_json = false;
};

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// The paper's rounds are of 8 x 8192 tokens; less text is taken whole.
constexpr std::size_t paper_batch = 65536;

rvqkv::trainer_config config_for(const train_options& given, std::size_t head_dim, part which) {
    rvqkv::trainer_config config;
    config.spec.head_dim = head_dim;
    config.spec.shape = {given.depths, given.codewords, given.group_dim};
    config.spec.scale = named(rvqkv::all_scale_kinds, given.scale);
    config.spec.scale_type = named(all_types, given.scale_type);
    config.spec.grouping = named(all_groupings, which == part::key ? given.key_grouping : given.value_grouping);
    config.spec.metric = named(all_distances, given.metric);
    config.spec.weight_type = named(all_types, given.weight_type);
    config.kmeans.iterations = given.kmeans_iterations;
    config.kmeans.start = named(all_starts, given.start);
    config.ema.decay = given.ema_decay;
    config.ema.epsilon = given.ema_epsilon;
    config.ema.revive_below = given.revive_below;
    config.sample = given.sample;
    config.seed = given.seed;
    return config;
}

/// What training one side showed.
struct side_report {
    std::uint64_t vectors = 0;
    std::optional<double> kmeans_error;  ///< Per value, scaled domain, last depth; nothing if k-means was done before.
    std::optional<double> loss;          ///< Of the last EMA step, before its update.
    std::uint64_t ema_steps = 0;
    double seconds = 0.0;
};

class training {
public:
    explicit training(const train_options& given)
        : given_(given),
          source_(given.tensors),
          tokens_(parse_tokens(given.tokens, source_.tokens(), first_part(source_.tokens()))),
          batch_(given.ema_batch != 0 ? given.ema_batch : std::min(paper_batch, tokens_.size())),
          workers_(given.threads) {
        if (tokens_.size() == 0) {
            throw std::runtime_error(source_.name() + ": has " + std::to_string(source_.tokens()) +
                                     " tokens, too few to train on");
        }
        make_trainers();
    }

    void run() {
        for (const std::size_t layer : source_.layers()) {
            for (const part which : {part::key, part::value}) {
                train(layer, which);
            }
        }
        progress_.clear();
        set_.metadata = notes_;
        set_.metadata["kmeans_iterations"] = std::to_string(given_.kmeans_iterations);
        set_.metadata["ema_steps"] = std::to_string(given_.ema_steps);
        set_.metadata["ema_decay"] = json(given_.ema_decay).dump();
        set_.metadata["seed"] = std::to_string(given_.seed);
        if (const auto model = source_.metadata().find("model"); model != source_.metadata().end()) {
            set_.metadata["model"] = model->second;
        }
        rvqkv::save_codecs(given_.output, set_).value();
        finish();
    }

private:
    /// Where training stands, in all of the file: for the progress bar.
    void show(const std::string& what, double fraction_of_side) {
        const double sides = 2.0 * static_cast<double>(source_.layers().size());
        progress_.show(what, (static_cast<double>(reports_.size()) + fraction_of_side) / sides);
    }

    void train(std::size_t layer, part which) {
        const double start = now();
        const std::string what = "layer " + std::to_string(layer) + " " + name_of(which);
        const rvqkv::tensor_shape shape = source_.shape(layer, which);
        rvqkv::codebook_trainer& trainer = trainer_of(layer, which);
        side_report report;
        if (!trainer.initialized() && trainer.observed() == 0) {
            observe(layer, which, shape, trainer, what);
        }
        report.vectors = trainer.observed();
        if (!trainer.initialized()) {
            const double share = given_.ema_steps == 0 ? 1.0 : 0.3;
            in(what, trainer.initialize(workers_, [&](const rvqkv::training_progress& at) {
                report.kmeans_error = at.mean_squared_error;
                show(what + ", k-means, depth " + std::to_string(at.depth + 1),
                     share * static_cast<double>(at.done) / static_cast<double>(at.total));
                return !stopping();
            }));
            stop_if_asked();
        }
        while (trainer.steps() < given_.ema_steps) {
            stop_if_asked();
            const double done = static_cast<double>(trainer.steps()) / static_cast<double>(given_.ema_steps);
            show(what + ", EMA step " + std::to_string(trainer.steps() + 1), 0.3 + 0.7 * done);
            report.loss = ema_step(layer, which, shape.heads * shape.channels, trainer, what);
        }
        report.ema_steps = trainer.steps();
        auto made = trainer.make();
        in(what, made);
        (which == part::key ? set_.layers[layer].key : set_.layers[layer].value) = std::move(made).value();
        if (given_.state.empty()) {
            const rvqkv::trainer_config config = trainer.config();
            trainer = rvqkv::codebook_trainer::create(config).value();  // frees the memory
        } else {
            save_state();
        }
        report.seconds = now() - start;
        print(what, layer, which, report);
    }

    void observe(std::size_t layer, part which, const rvqkv::tensor_shape& shape, rvqkv::codebook_trainer& trainer,
                 const std::string& what) {
        std::size_t nonfinite = 0;
        for_each_piece(tokens_, shape.heads * shape.channels, [&](std::size_t first, std::size_t count) {
            show(what + ", reading", 0.0);
            const rvqkv::owned_tensor piece = source_.load(layer, which, first, count);
            nonfinite += count_nonfinite(piece.view());
            in(what, trainer.observe(piece.view()));
            if (stopping()) {  // half a sample is none
                const rvqkv::trainer_config config = trainer.config();
                trainer = rvqkv::codebook_trainer::create(config).value();
                stop_if_asked();
            }
        });
        if (nonfinite != 0) {
            progress_.clear();
            warn("warning: " + what + ": " + std::to_string(nonfinite) + " values are NaN or infinite and count as 0");
        }
    }

    /// One round of micro-batches: the text is read on from where the last round ended, again and again. Which tokens
    /// make a round follows from its number alone, so a resumed training goes on with the right ones.
    double ema_step(std::size_t layer, part which, std::size_t per_token, rvqkv::codebook_trainer& trainer,
                    const std::string& what) {
        double loss = 0.0;
        std::size_t at = (trainer.steps() * batch_) % tokens_.size();
        for (std::size_t left = batch_; left != 0;) {
            const std::size_t run = std::min(left, tokens_.size() - at);
            for_each_piece({tokens_.first + at, tokens_.first + at + run}, per_token,
                           [&](std::size_t first, std::size_t count) {
                               const rvqkv::owned_tensor piece = source_.load(layer, which, first, count);
                               const auto report = trainer.accumulate(piece.view(), {}, workers_);
                               in(what, report);
                               loss += report.value().commitment_loss * static_cast<double>(count);
                           });
            left -= run;
            at = 0;
        }
        in(what, trainer.step(workers_));
        return loss / static_cast<double>(batch_);
    }

    // ---- State: what --state saves and goes on from ----

    rvqkv::codebook_trainer& trainer_of(std::size_t layer, part which) {
        rvqkv::model_trainer::layer_trainers& both = trainers_.at(layer);
        return which == part::key ? both.key : both.value;
    }

    void make_trainers() {
        std::map<std::size_t, rvqkv::layer_trainer_config> configs;
        for (const std::size_t layer : source_.layers()) {
            configs[layer] = {config_for(given_, source_.shape(layer, part::key).channels, part::key),
                              config_for(given_, source_.shape(layer, part::value).channels, part::value)};
        }
        notes_ = {
            {"trained_on", source_.name()}, {"trained_tokens", tokens_.text()}, {"ema_batch", std::to_string(batch_)}};
        rvqkv::model_trainer fresh = rvqkv::model_trainer::create(configs).value();
        if (given_.state.empty()) {
            trainers_ = std::move(fresh).release();
            return;
        }
        guard_.emplace();
        if (!std::filesystem::exists(given_.state)) {
            trainers_ = std::move(fresh).release();
            return;
        }
        rvqkv::saved_training saved = rvqkv::load_training(given_.state).value();
        check_state(fresh, saved);
        trainers_ = std::move(saved.trainer).release();
        warn("going on with the training in " + given_.state);
    }

    /// A state goes on only with what it began with; the number of EMA steps may grow.
    void check_state(const rvqkv::model_trainer& fresh, const rvqkv::saved_training& saved) const {
        const auto differs = [&](const std::string& what) {
            throw std::runtime_error(given_.state + ": this training was begun with another " + what +
                                     "; give what it was begun with, or another file for --state");
        };
        for (const auto& note : notes_) {
            const auto before = saved.metadata.find(note.first);
            if (before == saved.metadata.end() || before->second != note.second) {
                differs(note.first + ", '" + (before == saved.metadata.end() ? "" : before->second) + "', not '" +
                        note.second + "'");
            }
        }
        if (fresh.layers().size() != saved.trainer.layers().size()) {
            differs("choice of layers");
        }
        for (const auto& layer : fresh.layers()) {
            const auto before = saved.trainer.layers().find(layer.first);
            if (before == saved.trainer.layers().end()) {
                differs("choice of layers");
            }
            const auto check = [&](const rvqkv::codebook_trainer& now_side, const rvqkv::codebook_trainer& old_side) {
                const rvqkv::trainer_config& wanted = now_side.config();
                const rvqkv::trainer_config& found = old_side.config();
                if (wanted.spec.shape != found.spec.shape) {
                    differs("number of depths, codewords or channels of a group");
                }
                if (!(wanted.spec == found.spec)) {
                    differs("head_dim, grouping, scale, distance or element type");
                }
                if (!(wanted == found)) {
                    differs("setting of k-means, EMA, sample or seed");
                }
                if (old_side.steps() > given_.ema_steps) {
                    throw std::runtime_error(given_.state + ": has " + std::to_string(old_side.steps()) +
                                             " EMA steps done, --ema-steps asks for " +
                                             std::to_string(given_.ema_steps));
                }
            };
            check(layer.second.key, before->second.key);
            check(layer.second.value, before->second.value);
        }
    }

    void save_state() {
        rvqkv::model_trainer all(std::move(trainers_));
        const rvqkv::status saved = rvqkv::save_training(given_.state, all, notes_);
        trainers_ = std::move(all).release();
        saved.value();
    }

    [[nodiscard]] bool stopping() const { return guard_ && interrupt_guard::requested(); }
    void stop_if_asked() {
        if (!stopping()) {
            return;
        }
        save_state();
        progress_.clear();
        throw interruption("interrupted; " + given_.state + " holds the training so far, the same command goes on");
    }

    // ---- Reports ----

    template <class Result>
    static void in(const std::string& what, const Result& outcome) {
        if (!outcome.ok()) {
            throw std::runtime_error(what + ": " + outcome.error().message);
        }
    }

    static std::size_t count_nonfinite(const rvqkv::tensor_view& tensor) {
        std::size_t count = 0;
        std::vector<float> row(tensor.channels());
        for (std::size_t token = 0; token < tensor.tokens(); ++token) {
            for (std::size_t head = 0; head < tensor.heads(); ++head) {
                rvqkv::load_row(tensor, token, head, row.data());
                count += static_cast<std::size_t>(
                    std::count_if(row.begin(), row.end(), [](float value) { return !std::isfinite(value); }));
            }
        }
        return count;
    }

    void print(const std::string& what, std::size_t layer, part which, const side_report& report) {
        progress_.clear();
        const auto optional_json = [](const std::optional<double>& number) { return number ? json(*number) : json(); };
        reports_.push_back({{"layer", layer},
                            {"side", name_of(which)},
                            {"vectors", report.vectors},
                            {"kmeans_error", optional_json(report.kmeans_error)},
                            {"ema_steps", report.ema_steps},
                            {"commitment_loss", optional_json(report.loss)},
                            {"seconds", report.seconds}});
        if (given_.as_json) {
            return;
        }
        std::printf("%s: %llu vectors", what.c_str(), static_cast<unsigned long long>(report.vectors));
        if (report.kmeans_error) {
            std::printf(", k-means error %s", brief(*report.kmeans_error).c_str());
        }
        if (report.loss) {
            std::printf(", EMA loss %s after %llu steps", brief(*report.loss).c_str(),
                        static_cast<unsigned long long>(report.ema_steps));
        }
        std::printf(", %s s\n", fixed(report.seconds, 1).c_str());
        std::fflush(stdout);
    }

    void finish() {
        std::size_t codebook_bytes = 0;
        for (const auto& layer : set_.layers) {
            codebook_bytes += layer.second.key->weights().size() + layer.second.value->weights().size();
        }
        const rvqkv::codec_spec& spec = *set_.layers.begin()->second.key->spec();
        const double bits = spec.bits_per_value();
        if (given_.as_json) {
            const json report = {{"output", given_.output},
                                 {"tokens", tokens_.text()},
                                 {"bits_per_value", bits},
                                 {"codebook_bytes", codebook_bytes},
                                 {"sides", reports_}};
            std::puts(report.dump(2).c_str());
        } else {
            std::printf("%s: %zu layers, %.3f bits per value (float16 has 16), codebooks of %s\n",
                        given_.output.c_str(), set_.layers.size(), bits, bytes_text(codebook_bytes).c_str());
        }
    }

    train_options given_;
    tensor_source source_;
    token_span tokens_;
    std::size_t batch_;
    rvqkv::thread_pool workers_;
    std::optional<interrupt_guard> guard_;
    std::map<std::size_t, rvqkv::model_trainer::layer_trainers> trainers_;
    rvqkv::metadata_map notes_;  ///< About the training, for codec files and for states.
    rvqkv::codec_set set_;
    json reports_ = json::array();
    progress_bar progress_;
};

}  // namespace

void add_train(CLI::App& app) {
    CLI::App* const command = app.add_subcommand("train", "Learn codecs from a model's keys and values");
    const auto given = std::make_shared<train_options>();
    add_tensor_options(*command, given->tensors);
    command->add_option("-o,--output", given->output, "Codec file to write")->required();
    command->add_option("--tokens", given->tokens, "Tokens to train on, FIRST:LAST; default: the first 80 %");
    command->add_option("--state", given->state,
                        "Where training is saved, also when Ctrl-C stops it; goes on from there if it exists");
    command->add_option("--threads", given->threads, "0: all; the result does not depend on it")->capture_default_str();
    command->add_option("--seed", given->seed, "Of every random choice")->capture_default_str();
    command->add_flag("--json", given->as_json, "Print JSON");

    CLI::Option_group* const codec = command->add_option_group("Codec", "What is learned; defaults are the paper's");
    codec->add_option("--depths", given->depths, "Residual depth (the paper's K)")
        ->check(CLI::Range(1, 256))
        ->capture_default_str();
    codec->add_option("--codewords", given->codewords, "Codewords of each depth (C)")
        ->check(CLI::Range(1, 65536))
        ->capture_default_str();
    codec->add_option("--group-dim", given->group_dim, "Channels quantized together (d); divides the head's")
        ->check(CLI::Range(1, 4096))
        ->capture_default_str();
    codec->add_option("--key-grouping", given->key_grouping, "Which channels of a key make a group")
        ->check(CLI::IsMember(names(all_groupings)))
        ->capture_default_str();
    codec->add_option("--value-grouping", given->value_grouping, "Which channels of a value make a group")
        ->check(CLI::IsMember(names(all_groupings)))
        ->capture_default_str();
    codec->add_option("--scale", given->scale, "What a head's vector is divided by")
        ->check(CLI::IsMember(names(rvqkv::all_scale_kinds)))
        ->capture_default_str();
    codec->add_option("--scale-type", given->scale_type, "How that number is stored")
        ->check(CLI::IsMember(names(all_types)))
        ->capture_default_str();
    codec->add_option("--weight-type", given->weight_type, "How codewords are stored")
        ->check(CLI::IsMember(names(all_types)))
        ->capture_default_str();
    codec->add_option("--distance", given->metric, "By which the nearest codeword is found")
        ->check(CLI::IsMember(names(all_distances)))
        ->capture_default_str();

    CLI::Option_group* const learning = command->add_option_group("Learning");
    learning->add_option("--kmeans-iterations", given->kmeans_iterations, "For each depth")->capture_default_str();
    learning->add_option("--kmeans-start", given->start, "Start from vectors drawn uniformly, or by k-means++")
        ->check(CLI::IsMember(names(all_starts)))
        ->capture_default_str();
    learning->add_option("--sample", given->sample, "Most vectors that k-means sees")->capture_default_str();
    learning->add_option("--ema-steps", given->ema_steps, "EMA steps after k-means; 0: none, the paper's: 200")
        ->capture_default_str();
    learning
        ->add_option("--ema-batch", given->ema_batch,
                     "Tokens of a step; default: all that are trained on, at most the paper's 65536")
        ->check(CLI::PositiveNumber);
    learning->add_option("--ema-decay", given->ema_decay, "What a step keeps of the running averages (gamma)")
        ->capture_default_str();
    learning->add_option("--ema-epsilon", given->ema_epsilon, "Added to running sizes (epsilon)")
        ->capture_default_str();
    learning
        ->add_option("--revive-below", given->revive_below,
                     "Replace codewords whose running size falls below this; 0, the paper's: never")
        ->capture_default_str();
    command->footer(
        "Examples:\n"
        "  rvqkv train kv.safetensors -o model.codecs\n"
        "  rvqkv train keys.npy values.npy --heads 8 -o layer.codecs --codewords 256 --depths 6\n"
        "  rvqkv train kv.safetensors -o model.codecs --ema-steps 200 --state training.state");
    command->callback([given] {
#ifdef __GLIBC__
        mallopt(M_MMAP_THRESHOLD, 128 * 1024);  // what is freed goes back to the system, so peaks do not add up
#endif
        std::vector<std::string> inputs = given->tensors.paths;
        check_output(given->output, inputs);
        if (!given->state.empty()) {
            inputs.push_back(given->output);
            check_output(given->state, inputs);
        }
        training(*given).run();
    });
}

}  // namespace cli
