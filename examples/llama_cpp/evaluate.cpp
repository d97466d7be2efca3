// SPDX-License-Identifier: MIT
/// @file
/// `rvqkv_llama evaluate`: what becomes of a model's predictions when its keys and values are compressed, by codecs and
/// by llama.cpp's own cache types, on the same tokens.
#include "codecs.hpp"
#include "commands.hpp"
#include "engine.hpp"
#include "metrics.hpp"
#include "quantizing_tap.hpp"

#include <rvqkv/core/thread_pool.hpp>

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>
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
    std::size_t window = 1024;
    std::size_t windows = 4;
};

/// Tokens that the library's cache keeps exactly at the start.
constexpr std::size_t sink_tokens = 4;
/// A length at which bits are told besides the window's: exact tokens weigh little there.
constexpr std::size_t long_context = 32768;

/// A row of the table.
struct method {
    std::string name;
    rvqkv::model_codecs codecs;  ///< Of methods of ours.
    exact_tokens exact;
    std::optional<cache_format> cache;  ///< Of llama.cpp's own.
    double bits_of_codes = 0.0;
    divergence found;
    double model_seconds = 0.0;
    double own_seconds = 0.0;

    /// Bits stored for each channel of a sequence of so many tokens.
    [[nodiscard]] double bits(std::size_t tokens) const {
        const double exact_share =
            static_cast<double>(std::min(tokens, exact.sinks + exact.recent)) / static_cast<double>(tokens);
        return bits_of_codes + exact_share * (16.0 - bits_of_codes);
    }
};

double mean_bits(const rvqkv::model_codecs& codecs, const model_attention& attention) {
    std::size_t bits = 0;
    std::size_t channels = 0;
    for (const auto& [layer, both] : codecs) {
        bits += both.key->bits_per_row() * attention[layer].keys.heads +
                both.value->bits_per_row() * attention[layer].values.heads;
        channels += attention[layer].keys.heads * attention[layer].keys.channels +
                    attention[layer].values.heads * attention[layer].values.channels;
    }
    return static_cast<double>(bits) / static_cast<double>(channels);
}

/// Depths that the paper and its followers tell of, for a number of codewords.
std::vector<std::size_t> usual_depths(std::size_t codewords, std::size_t most) {
    std::vector<std::size_t> all{most};
    if (codewords == 2048 && most == 8) {
        all = {8, 6, 4};
    } else if (codewords == 256 && most == 10) {
        all = {10, 7, 3};
    }
    return all;
}

class evaluation {
public:
    explicit evaluation(const evaluate_options& given)
        : given_(given),
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
        for (const std::string& name : given.methods.empty() ? usual_methods() : given.methods) {
            methods_.push_back(parse(name));
        }
    }

    json run() {
        const std::vector<std::vector<llama_token>> windows = choose_windows();
        quantizing_tap tap(attention_, windows.front().size(), workers_);
        decoder exact(model_, {}, windows.front().size(), threads(), &tap);
        reference_window reference(windows.front().size() - 1, model_.vocabulary());
        const std::size_t all = windows.size() * (methods_.size() + 1);
        std::size_t done = 0;
        for (const std::vector<llama_token>& window : windows) {
            const std::span<const llama_token> targets = std::span(window).subspan(1);
            const auto show = [&](const std::string& what) {
                progress_.show("window " + std::to_string(done / (methods_.size() + 1) + 1) + ", " + what,
                               static_cast<double>(done) / static_cast<double>(all));
                ++done;
            };
            show("float32");
            tap.use(nullptr, {});
            {
                const stopwatch watch;
                double comparing = 0.0;
                exact.read(window, [&](const float* logits, std::size_t first, std::size_t count) {
                    const stopwatch inner;
                    reference.take(logits, first, count, targets, workers_);
                    comparing += inner.seconds();
                });
                base_seconds_ += watch.seconds() - comparing;
            }
            for (method& each : methods_) {
                show(each.name);
                measure(each, window, reference, exact, tap);
            }
        }
        progress_.clear();
        return report(windows);
    }

private:
    [[nodiscard]] int threads() const { return static_cast<int>(threads_of(given_.model)); }

    [[nodiscard]] std::vector<std::string> usual_methods() const {
        std::vector<std::string> names;
        for (auto set = sets_.rbegin(); set != sets_.rend(); ++set) {
            for (const std::size_t depths :
                 usual_depths(set->first, set->second.layers.begin()->second.key->depths())) {
                names.push_back("paper-" + std::to_string(set->first) + "x" + std::to_string(depths));
            }
        }
        for (auto set = sets_.rbegin(); set != sets_.rend(); ++set) {
            for (const std::size_t depths :
                 usual_depths(set->first, set->second.layers.begin()->second.key->depths())) {
                names.push_back("rvqkv-" + std::to_string(set->first) + "x" + std::to_string(depths) + "-recent64");
            }
        }
        for (const char* name : {"f16", "q8_0", "q5_1", "q4_0", "q4_0-unrotated"}) {
            names.push_back(std::string("llama.cpp-") + name);
        }
        return names;
    }

    [[nodiscard]] method parse(const std::string& name) const {
        static const std::regex ours("(paper|rvqkv)-([0-9]+)x([0-9]+)(-recent([0-9]+))?");
        static const std::regex theirs("llama\\.cpp-([a-z0-9_]+?)(-unrotated)?");
        std::smatch match;
        method made;
        made.name = name;
        if (std::regex_match(name, match, ours) && (match[1] == "paper" ? !match[4].matched : true)) {
            const std::size_t codewords = std::stoul(match[2]);
            const std::size_t depths = std::stoul(match[3]);
            const auto set = sets_.find(codewords);
            if (set == sets_.end()) {
                throw cli::usage_error("method " + name + ": no --codecs of " + std::to_string(codewords) +
                                       " codewords were given");
            }
            const std::size_t most = set->second.layers.begin()->second.key->depths();
            if (depths == 0 || depths > most) {
                throw cli::usage_error("method " + name + ": the codecs have " + std::to_string(most) + " depths");
            }
            made.codecs = first_depths(set->second.layers, depths);
            if (match[1] == "rvqkv") {
                made.exact = {sink_tokens, match[5].matched ? std::stoul(match[5]) : 0};
            }
            made.bits_of_codes = mean_bits(made.codecs, attention_);
            return made;
        }
        if (std::regex_match(name, match, theirs)) {
            for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1,
                                         GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL}) {
                if (match[1] == ggml_type_name(type)) {
                    made.cache = cache_format{type, type != GGML_TYPE_F32, !match[2].matched};
                    made.bits_of_codes =
                        8.0 * static_cast<double>(ggml_type_size(type)) / static_cast<double>(ggml_blck_size(type));
                    return made;
                }
            }
        }
        throw cli::usage_error("method '" + name +
                               "' is not known; want paper-2048x8 (codewords x depths), rvqkv-2048x8-recent64, or "
                               "llama.cpp-f16, -q8_0, -q5_1, -q5_0, -q4_1, -q4_0, each also with -unrotated");
    }

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

    void measure(method& each, const std::vector<llama_token>& window, const reference_window& reference,
                 decoder& exact, quantizing_tap& tap) {
        std::optional<decoder> own;
        if (each.cache) {
            own.emplace(model_, *each.cache, window.size(), threads(), nullptr);
        } else {
            tap.use(&each.codecs, each.exact);
        }
        const double tapped = tap.seconds();
        const stopwatch watch;
        double comparing = 0.0;
        (own ? *own : exact).read(window, [&](const float* logits, std::size_t first, std::size_t count) {
            const stopwatch inner;
            each.found.take(reference, logits, first, count, std::span(window).subspan(1), workers_);
            comparing += inner.seconds();
        });
        const double ours = tap.seconds() - tapped;
        each.own_seconds += ours;
        each.model_seconds += watch.seconds() - comparing - ours;
    }

    [[nodiscard]] json report(const std::vector<std::vector<llama_token>>& windows) const {
        json out;
        out["model"] = given_.model.path;
        out["fingerprint"] = fingerprint_;
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
        for (const method& each : methods_) {
            const divergence_summary all = summarize(each.found, 0, length);
            json row = {{"method", each.name},
                        {"bits", each.bits(length)},
                        {"kl", all.kl},
                        {"kl_p99", all.kl_p99},
                        {"ppl", all.perplexity},
                        {"ppl_ratio", all.perplexity_ratio},
                        {"top1_agreement", all.top1_agreement},
                        {"seconds", each.model_seconds + each.own_seconds},
                        {"seconds_model", each.model_seconds},
                        {"seconds_method", each.own_seconds},
                        {"bits_at_32768_tokens", each.bits(long_context)}};
            std::size_t first = 0;
            for (const std::size_t end : ends) {
                const divergence_summary part = summarize(each.found, first, end);
                row["positions"].push_back({{"first", first},
                                            {"last", end - 1},
                                            {"kl", part.kl},
                                            {"kl_p99", part.kl_p99},
                                            {"ppl", part.perplexity},
                                            {"ppl_ratio", part.perplexity_ratio},
                                            {"top1_agreement", part.top1_agreement}});
                first = end;
            }
            out["rows"].push_back(std::move(row));
        }
        return out;
    }

    evaluate_options given_;
    rvqkv::thread_pool workers_;
    std::string fingerprint_;
    loaded_model model_;
    model_attention attention_;
    std::map<std::size_t, rvqkv::codec_set> sets_;  ///< By codewords.
    std::vector<method> methods_;
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
                     "llama.cpp-q8_0, ...; default: all that the codecs allow")
        ->delimiter(',');
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
