// SPDX-License-Identifier: MIT
/// @file
/// `rvqkv_llama evaluate`: what becomes of a model's predictions when its keys and values are compressed, by codecs and
/// by llama.cpp's own cache types, on the same tokens; in llama.cpp, or in a plain forward pass.
#include "codecs.hpp"
#include "commands.hpp"
#include "engine.hpp"
#include "methods.hpp"
#include "metrics.hpp"
#include "runners.hpp"

#include <rvqkv/core/thread_pool.hpp>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>

namespace llama_example {
namespace {

using json = nlohmann::ordered_json;

struct evaluate_options {
    model_options model;
    std::string text;
    std::vector<std::string> codecs;
    std::vector<std::string> methods;
    std::string output;
    std::string engine = "llama.cpp";
    std::size_t window = 1024;
    std::size_t windows = 4;
};

/// A length at which bits are told besides the window's: exact tokens weigh little there.
constexpr std::size_t long_context = 32768;

/// A row of the table.
struct row {
    method by;
    divergence found;
    double model_seconds = 0.0;
    double own_seconds = 0.0;
};

class evaluation {
public:
    explicit evaluation(const evaluate_options& given)
        : given_(given),
          engine_(given.engine == "plain" ? engine_kind::plain : engine_kind::llama_cpp),
          workers_(threads_of(given.model)),
          fingerprint_(fingerprint_of(given.model.path)),
          model_(file_to_load(given.model)),
          attention_(find_attention(model_, threads())) {
        for (const std::string& path : given.codecs) {
            rvqkv::codec_set set = load_codecs_for(path, fingerprint_, attention_);
            const rvqkv::codebook_shape shape = set.layers.begin()->second.key->shape();
            if (!sets_.emplace(shape.codewords, std::move(set)).second) {
                throw cli::usage_error("--codecs has two files of " + std::to_string(shape.codewords) +
                                       " codewords, such as " + path + ": rows are named by that, give one of them");
            }
        }
        const std::vector<std::string> names = given.methods.empty() ? usual_methods(sets_, engine_) : given.methods;
        for (const std::string& name : names) {
            rows_.push_back({parse_method(name, sets_, engine_, attention_), {}, 0.0, 0.0});
        }
    }

    json run() {
        const std::vector<std::vector<llama_token>> windows = choose_windows();
        const std::unique_ptr<runner> engine =
            make_runner(engine_, model_, attention_, windows.front().size(), workers_);
        reference_window reference(windows.front().size() - 1, model_.vocabulary());
        const std::size_t all = windows.size() * (rows_.size() + 1);
        std::size_t done = 0;
        for (const std::vector<llama_token>& window : windows) {
            const std::span<const llama_token> targets = std::span(window).subspan(1);
            const auto show = [&](const std::string& what) {
                progress_.show("window " + std::to_string(done / (rows_.size() + 1) + 1) + ", " + what,
                               static_cast<double>(done) / static_cast<double>(all));
                ++done;
            };
            show("unquantized");
            const seconds base = timed([&](double& comparing) {
                return engine->read(nullptr, window, [&](const float* logits, std::size_t first, std::size_t count) {
                    const stopwatch inner;
                    reference.take(logits, first, count, targets, workers_);
                    comparing += inner.seconds();
                });
            });
            base_seconds_ += base.model;
            for (row& each : rows_) {
                show(each.by.name);
                const seconds spent = timed([&](double& comparing) {
                    return engine->read(&each.by, window,
                                        [&](const float* logits, std::size_t first, std::size_t count) {
                                            const stopwatch inner;
                                            each.found.take(reference, logits, first, count, targets, workers_);
                                            comparing += inner.seconds();
                                        });
                });
                each.model_seconds += spent.model;
                each.own_seconds += spent.method;
            }
        }
        progress_.clear();
        return report(windows);
    }

private:
    [[nodiscard]] int threads() const { return static_cast<int>(threads_of(given_.model)); }

    /// Windows of the text, which follow each other.
    [[nodiscard]] std::vector<std::vector<llama_token>> choose_windows() const {
        const std::vector<llama_token> tokens = model_.tokenize(read_text(given_.text));
        const std::vector<llama_token> prefix = model_.prefix();
        const std::size_t fresh = given_.window - prefix.size();
        const std::size_t there = tokens.size() / fresh;
        if (there == 0) {
            throw std::runtime_error(given_.text + ": has " + std::to_string(tokens.size()) +
                                     " tokens, a window needs " + std::to_string(fresh) +
                                     ": give more text, or a smaller --window");
        }
        const std::size_t count = std::min(there, given_.windows);
        if (count < given_.windows) {
            cli::warn(given_.text + ": has " + std::to_string(tokens.size()) + " tokens, enough for " +
                      std::to_string(there) + " windows only");
        }
        std::vector<std::vector<llama_token>> windows(count, prefix);
        for (std::size_t i = 0; i < count; ++i) {
            const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(i * fresh);
            windows[i].insert(windows[i].end(), first, first + static_cast<std::ptrdiff_t>(fresh));
        }
        return windows;
    }

    struct seconds {
        double model = 0.0;
        double method = 0.0;
    };
    /// Of `work(comparing)`, which adds the seconds that are of neither and gives the method's.
    template <class Work>
    [[nodiscard]] static seconds timed(const Work& work) {
        const stopwatch watch;
        double comparing = 0.0;
        const double method = work(comparing);
        return {watch.seconds() - comparing - method, method};
    }

    [[nodiscard]] json report(const std::vector<std::vector<llama_token>>& windows) const {
        json out;
        out["model"] = given_.model.path;
        out["fingerprint"] = fingerprint_;
        out["engine"] = given_.engine;
        out["text"] = given_.text;
        out["window"] = windows.front().size();
        out["windows"] = windows.size();
        out["float32_model"] = !given_.model.as_it_is;
        out["baseline_seconds"] = base_seconds_;
        const std::size_t length = windows.front().size();
        std::vector<std::size_t> ends;
        for (std::size_t end = 64; end < length; end *= 4) {
            ends.push_back(end);
        }
        ends.push_back(length);
        for (const row& each : rows_) {
            const divergence_summary all = summarize(each.found, 0, length);
            json line = {{"method", each.by.name},
                         {"bits", each.by.bits(length)},
                         {"kl", all.kl},
                         {"kl_p99", all.kl_p99},
                         {"ppl", all.perplexity},
                         {"ppl_ratio", all.perplexity_ratio},
                         {"top1_agreement", all.top1_agreement},
                         {"seconds", each.model_seconds + each.own_seconds},
                         {"seconds_model", each.model_seconds},
                         {"seconds_method", each.own_seconds},
                         {"bits_at_32768_tokens", each.by.bits(long_context)}};
            std::size_t first = 0;
            for (const std::size_t end : ends) {
                const divergence_summary part = summarize(each.found, first, end);
                line["positions"].push_back({{"first", first},
                                             {"last", end - 1},
                                             {"kl", part.kl},
                                             {"kl_p99", part.kl_p99},
                                             {"ppl", part.perplexity},
                                             {"ppl_ratio", part.perplexity_ratio},
                                             {"top1_agreement", part.top1_agreement}});
                first = end;
            }
            out["rows"].push_back(std::move(line));
        }
        return out;
    }

    evaluate_options given_;
    engine_kind engine_;
    rvqkv::thread_pool workers_;
    std::string fingerprint_;
    loaded_model model_;
    model_attention attention_;
    codec_sets sets_;
    std::vector<row> rows_;
    double base_seconds_ = 0.0;
    timed_progress progress_;
};

/// Three significant digits; very small numbers as 1.2e-06.
std::string small(double number) {
    if (number >= 1e-3 || number == 0.0) {
        return cli::brief(number);
    }
    char text[32];
    std::snprintf(text, sizeof text, "%.1e", number);
    return text;
}

void print_report(const json& report) {
    std::vector<std::string> header = {"method", "bits",      "bits at 32k", "KL",      "KL p99",
                                       "PPL",    "PPL ratio", "top-1",       "model s", "method s"};
    for (const json& part : report["rows"][0]["positions"]) {
        header.push_back("KL " + part["first"].dump() + "-" + part["last"].dump());
    }
    std::vector<std::vector<std::string>> table = {header};
    for (const json& row : report["rows"]) {
        table.push_back({row["method"], cli::fixed(row["bits"], 2), cli::fixed(row["bits_at_32768_tokens"], 2),
                         small(row["kl"]), small(row["kl_p99"]), cli::fixed(row["ppl"], 2),
                         cli::fixed(row["ppl_ratio"], 4), cli::fixed(row["top1_agreement"], 3),
                         cli::fixed(row["seconds_model"], 1), cli::fixed(row["seconds_method"], 1)});
        for (const json& part : row["positions"]) {
            table.back().push_back(small(part["kl"]));
        }
    }
    cli::print_table(table);
}

void evaluate(const evaluate_options& given) {
    if (!given.output.empty()) {
        std::vector<std::string> inputs = given.codecs;
        inputs.push_back(given.model.path);
        inputs.push_back(given.text);
        cli::check_output(given.output, inputs);
    }
    const json report = evaluation(given).run();
    if (!given.output.empty()) {
        std::ofstream file(given.output);
        file << report.dump(2) << '\n';
        if (!file.flush()) {
            throw std::runtime_error(given.output + ": cannot be written");
        }
    }
    print_report(report);
}

}  // namespace

void add_evaluate(CLI::App& app) {
    CLI::App* const command = app.add_subcommand("evaluate", "Measure what compression does to predictions");
    const auto given = std::make_shared<evaluate_options>();
    add_model_options(*command, given->model);
    command->add_option("--text", given->text, "File of text that the codecs have not seen")->required();
    command->add_option("-c,--codecs", given->codecs, "Codec files that `calibrate` made, of different codewords");
    command
        ->add_option("--methods", given->methods,
                     "Rows: paper-2048x8 (codes alone), rvqkv-2048x8-recent64 (4 first and 64 latest tokens exact), "
                     "-recent64-paged (64 to 127), llama.cpp-q8_0, ...; default: all that the codecs allow")
        ->delimiter(',');
    command
        ->add_option(
            "--engine", given->engine,
            "What runs the model: llama.cpp, or plain: a forward pass of its own (Llama only), whose tokens are "
            "in rvqkv's cache")
        ->check(CLI::IsMember({"llama.cpp", "plain"}))
        ->capture_default_str();
    command->add_option("--window", given->window, "Tokens of a window, which begins with an empty cache")
        ->check(CLI::Range(16, 1 << 20))
        ->capture_default_str();
    command->add_option("--windows", given->windows, "How many windows of the text")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    command->add_option("--json", given->output, "File for the table's rows, and more, as JSON");
    command->callback([given] { evaluate(*given); });
}

}  // namespace llama_example
