// SPDX-License-Identifier: MIT
/// @file
/// `rvqkv evaluate`: what codecs cost and what they lose, on tokens that they were not trained on.
#include "attention.hpp"
#include "baselines.hpp"
#include "commands.hpp"
#include "support.hpp"

#include <rvqkv/core/thread_pool.hpp>
#include <rvqkv/files/codec_file.hpp>
#include <rvqkv/files/compressed_file.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <utility>

namespace cli {
namespace {

using json = nlohmann::ordered_json;

struct evaluate_options {
    tensor_options tensors;
    std::vector<std::string> codecs;
    std::string tokens;
    std::vector<std::string> baselines;
    double rope_theta = -1.0;
    std::size_t window = 0;
    std::size_t amortize = 32768;
    std::size_t threads = 0;
    bool per_layer = false;
    bool as_json = false;
    std::string output;
};

/// One layer's tensors in float32, and what attention makes of them.
struct exact_layer {
    std::size_t number = 0;
    float_tensor key;
    float_tensor value;
    std::optional<float_tensor> query;
    float_tensor attention;
};

/// What one method costs and loses in one layer.
struct outcome {
    std::size_t bytes = 0;           ///< Of codes and scales, keys and values.
    std::size_t codebook_bytes = 0;  ///< Keys and values.
    double key_error = 0.0;
    double value_error = 0.0;
    std::optional<double> attention_error;
    std::optional<double> keys_attention_error;  ///< With exact values.
    std::optional<double> compress_seconds;      ///< For all tokens, keys and values, one thread.
    std::optional<double> reconstruct_seconds;
};

/// One line of the table.
struct row {  // NOLINT(bugprone-exception-escape): of json, whose moves do not throw
    std::string setting;
    json facts;
    std::vector<outcome> layers;
};

float_tensor in_float(const rvqkv::owned_tensor& tensor) {
    const rvqkv::tensor_shape shape = tensor.shape();
    float_tensor out{shape.tokens, shape.heads, shape.channels,
                     std::vector<float>(shape.tokens * shape.heads * shape.channels)};
    for (std::size_t token = 0; token < shape.tokens; ++token) {
        for (std::size_t head = 0; head < shape.heads; ++head) {
            rvqkv::load_row(tensor.view(), token, head, out.row(token, head));
        }
    }
    return out;
}

rvqkv::tensor_shape shape_of(const float_tensor& tensor) {
    return {tensor.tokens, tensor.heads, tensor.channels};
}

double seconds(const std::function<void()>& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// The shorter of two times, or of more if they are short: others use the machine, too.
double best_seconds(const std::function<void()>& work) {
    const double first = seconds(work);
    double best = first;
    double spent = first;
    do {
        const double next = seconds(work);
        spent += next;
        best = std::min(best, next);
    } while (spent < 0.02);
    return best;
}

/// Compresses one side in memory and reads it back.
float_tensor round_trip(const std::shared_ptr<const rvqkv::codec>& codec, const float_tensor& exact, outcome& found,
                        double& compress_seconds, double& reconstruct_seconds) {
    const rvqkv::serial_executor one_thread;
    rvqkv::compressed_tensor compressed = rvqkv::compressed_tensor::create(codec, exact.tokens, exact.heads).value();
    const rvqkv::tensor_view view(exact.values.data(), shape_of(exact));
    compress_seconds += best_seconds([&] { compressed.encode(0, view, one_thread).value(); });
    float_tensor back = exact;
    const rvqkv::mutable_tensor_view out(back.values.data(), shape_of(back));
    reconstruct_seconds += best_seconds([&] { compressed.decode(0, out, codec->depths(), one_thread).value(); });
    found.bytes += compressed.code_bytes() + compressed.scale_bytes();
    found.codebook_bytes += codec->weights().size();
    return back;
}

/// A codec file and the depths to cut its codecs to; none: as it is.
struct codec_choice {
    std::string path;
    std::vector<std::size_t> depths;
};

/// "model.codecs" or "model.codecs@8,6,4". Throws `usage_error`.
codec_choice parse_choice(const std::string& text) {
    codec_choice choice{text, {}};
    const std::size_t at = text.rfind('@');
    if (at == std::string::npos || at + 1 == text.size() ||
        text.find_first_not_of("0123456789,", at + 1) != std::string::npos) {
        return choice;  // an '@' in a name
    }
    choice.path = text.substr(0, at);
    std::istringstream list(text.substr(at + 1));
    for (std::string number; std::getline(list, number, ',');) {
        std::size_t depths = 0;
        std::istringstream(number) >> depths;
        if (depths == 0) {
            throw usage_error("--codecs is '" + text + "', want depths of 1 or more after the '@', such as @8,6,4");
        }
        choice.depths.push_back(depths);
    }
    return choice;
}

class evaluation {
public:
    explicit evaluation(const evaluate_options& given)
        : given_(given), source_(given.tensors), workers_(given.threads), tokens_(choose_tokens()) {
        config_.rope_theta = given.rope_theta >= 0.0 ? given.rope_theta : source_.note("rope_theta", 10000.0);
        config_.window = given.window != 0 ? given.window : static_cast<std::size_t>(source_.note("window", 0.0));
        if (config_.window == 0) {
            config_.window = source_.tokens();
        }
        config_.first_token = tokens_.first;
        for (const std::size_t layer : source_.layers()) {
            load(layer);
        }
    }

    [[nodiscard]] const tensor_source& source() const noexcept { return source_; }
    [[nodiscard]] token_span tokens() const noexcept { return tokens_; }
    [[nodiscard]] const std::vector<exact_layer>& layers() const noexcept { return layers_; }
    [[nodiscard]] const attention_config& attention() const noexcept { return config_; }

    /// Rows of one codec file.
    void add(const codec_choice& choice, std::vector<row>& rows) {
        const std::string& path = choice.path;
        const rvqkv::codec_set set = rvqkv::load_codecs(path).value();
        warn_if_trained_on(path, set.metadata);
        const std::size_t whole = checked(path, set, layers_.front()).key->depths();
        for (const std::size_t each : choice.depths.empty() ? std::vector<std::size_t>{whole} : choice.depths) {
            if (each > whole) {
                throw std::runtime_error(path + ": has " + std::to_string(whole) + " depths, " + std::to_string(each) +
                                         " are asked for");
            }
            row found;
            describe(path, set, each, found);
            for (const exact_layer& exact : layers_) {
                progress_.show(found.setting, fraction(found.layers.size()));
                const rvqkv::layer_codecs& codecs = checked(path, set, exact);
                outcome result;
                double compress_seconds = 0.0;
                double reconstruct_seconds = 0.0;
                const float_tensor key = round_trip(first_depths(codecs.key, each).value(), exact.key, result,
                                                    compress_seconds, reconstruct_seconds);
                const float_tensor value =
                    round_trip(first_depths(codecs.value, std::min(each, codecs.value->depths())).value(), exact.value,
                               result, compress_seconds, reconstruct_seconds);
                result.compress_seconds = compress_seconds;
                result.reconstruct_seconds = reconstruct_seconds;
                compare(exact, key, value, result);
                found.layers.push_back(result);
            }
            rows.push_back(std::move(found));
        }
        progress_.clear();
    }

    /// The row of a baseline.
    void add(const baseline& how, std::vector<row>& rows) {
        row found;
        found.setting = std::string(how.name) + ", round to nearest";
        found.facts["baseline"] = how.name;
        for (const exact_layer& exact : layers_) {
            progress_.show(found.setting, fraction(found.layers.size()));
            outcome result;
            float_tensor back[] = {exact.key, exact.value};
            for (float_tensor& tensor : back) {
                if (tensor.channels % baseline::block != 0) {
                    throw std::runtime_error(std::string(how.name) + " needs heads of a multiple of 32 channels, not " +
                                             std::to_string(tensor.channels));
                }
                round_trip(how, tensor.values);
                result.bytes +=
                    static_cast<std::size_t>(how.bits_per_value() * static_cast<double>(tensor.values.size()) / 8.0);
            }
            compare(exact, back[0], back[1], result);
            found.layers.push_back(result);
        }
        rows.push_back(std::move(found));
        progress_.clear();
    }

private:
    [[nodiscard]] token_span choose_tokens() const {
        const token_span tokens = parse_tokens(given_.tokens, source_.tokens(), last_part(source_.tokens()));
        if (tokens.size() == 0) {
            throw std::runtime_error(source_.name() + ": has no tokens to evaluate");
        }
        return tokens;
    }

    [[nodiscard]] double fraction(std::size_t done) const {
        return static_cast<double>(done) / static_cast<double>(layers_.size());
    }

    void load(std::size_t number) {
        exact_layer exact;
        exact.number = number;
        progress_.show("reading layer " + std::to_string(number), fraction(layers_.size()));
        exact.key = in_float(source_.load(number, part::key, tokens_.first, tokens_.size()));
        exact.value = in_float(source_.load(number, part::value, tokens_.first, tokens_.size()));
        if (source_.has_queries() && tokens_.first >= source_.first_query()) {
            exact.query = in_float(source_.load(number, part::query, tokens_.first, tokens_.size()));
            if (exact.query->heads % exact.key.heads != 0 || exact.value.heads != exact.key.heads ||
                exact.query->channels != exact.key.channels) {
                throw std::runtime_error(source_.name() + ": layer " + std::to_string(number) + ": " +
                                         std::to_string(exact.query->heads) + " query heads do not fit " +
                                         std::to_string(exact.key.heads) + " key heads");
            }
            exact.attention = attend(*exact.query, exact.key, exact.value, config_, workers_);
        }
        layers_.push_back(std::move(exact));
        progress_.clear();
    }

    void compare(const exact_layer& exact, const float_tensor& key, const float_tensor& value, outcome& result) const {
        result.key_error = relative_squared_error(exact.key, key);
        result.value_error = relative_squared_error(exact.value, value);
        if (exact.query) {
            const auto error = [&](const float_tensor& keys, const float_tensor& values) {
                return relative_squared_error(exact.attention, attend(*exact.query, keys, values, config_, workers_));
            };
            result.attention_error = error(key, value);
            result.keys_attention_error = error(key, exact.value);
        }
    }

    static const rvqkv::layer_codecs& checked(const std::string& path, const rvqkv::codec_set& set,
                                              const exact_layer& exact) {
        const auto codecs = set.layers.find(exact.number);
        if (codecs == set.layers.end() || codecs->second.key == nullptr || codecs->second.value == nullptr) {
            throw std::runtime_error(path + ": has no codecs for the keys and values of layer " +
                                     std::to_string(exact.number) + "; --layers chooses others");
        }
        return codecs->second;
    }

    void warn_if_trained_on(const std::string& path, const rvqkv::metadata_map& metadata) const {
        const auto data = metadata.find("trained_on");
        const auto span = metadata.find("trained_tokens");
        if (data == metadata.end() || span == metadata.end() || data->second != source_.name()) {
            return;
        }
        const token_span trained = parse_tokens(span->second, std::numeric_limits<std::size_t>::max(), {});
        if (trained.first < tokens_.last && tokens_.first < trained.last) {
            warn("warning: " + path + " was trained on tokens " + trained.text() + " of " + data->second +
                 ", and tokens " + tokens_.text() + " are evaluated: errors will look smaller than they are");
        }
    }

    /// "depth 8 x 2048, strided keys, EMA"
    static void describe(const std::string& path, const rvqkv::codec_set& set, std::size_t depths, row& found) {
        const rvqkv::codec_spec& key = *set.layers.begin()->second.key->spec();
        const rvqkv::codec_spec& value = *set.layers.begin()->second.value->spec();
        const auto note = [&](const char* name) {
            const auto entry = set.metadata.find(name);
            return entry == set.metadata.end() ? std::string() : entry->second;
        };
        const std::string ema_steps = note("ema_steps");
        found.setting = "depth " + std::to_string(depths) + ", " + std::to_string(key.shape.codewords) +
                        " codewords, " + std::string(name_of(key.grouping)) + " keys";
        const rvqkv::codec_spec usual;
        const auto mention = [&](bool unusual, const std::string& text) {
            found.setting += unusual ? ", " + text : "";
        };
        mention(value.grouping != rvqkv::grouping_kind::contiguous, std::string(name_of(value.grouping)) + " values");
        mention(key.shape.dim != usual.shape.dim, "groups of " + std::to_string(key.shape.dim));
        mention(key.scale != usual.scale, "scale " + std::string(name_of(key.scale)));
        mention(key.scale_type != usual.scale_type, std::string(name_of(key.scale_type)) + " scale");
        mention(key.metric != usual.metric, std::string(name_of(key.metric)));
        mention(ema_steps == "0", "k-means only");
        found.facts["codecs"] = path;
        found.facts["depths"] = depths;
        found.facts["codewords"] = key.shape.codewords;
        found.facts["group_dim"] = key.shape.dim;
        found.facts["key_grouping"] = name_of(key.grouping);
        found.facts["value_grouping"] = name_of(value.grouping);
        found.facts["scale"] = name_of(key.scale);
        found.facts["scale_type"] = name_of(key.scale_type);
        found.facts["weight_type"] = name_of(key.weight_type);
        for (const auto& entry : set.metadata) {
            found.facts["training"][entry.first] = entry.second;
        }
    }

    evaluate_options given_;
    tensor_source source_;
    rvqkv::thread_pool workers_;
    token_span tokens_;
    attention_config config_;
    std::vector<exact_layer> layers_;
    progress_bar progress_;
};

/// A number over layers, or nothing where one has none.
template <class Get>
std::optional<double> mean(const row& of, const Get& get) {
    double sum = 0.0;
    for (const outcome& layer : of.layers) {
        const std::optional<double> number = get(layer);
        if (!number) {
            return std::nullopt;
        }
        sum += *number;
    }
    return sum / static_cast<double>(of.layers.size());
}

json summary(const row& of, const evaluation& run, const evaluate_options& given) {
    std::size_t bytes = 0;
    std::size_t codebook_bytes = 0;
    std::size_t values = 0;
    std::size_t values_per_token = 0;
    for (std::size_t i = 0; i < of.layers.size(); ++i) {
        bytes += of.layers[i].bytes;
        codebook_bytes += of.layers[i].codebook_bytes;
        const exact_layer& exact = run.layers()[i];
        values += exact.key.values.size() + exact.value.values.size();
        values_per_token += exact.key.heads * exact.key.channels + exact.value.heads * exact.value.channels;
    }
    const auto optional_json = [](const std::optional<double>& number) { return number ? json(*number) : json(); };
    const auto per_second = [&](const std::optional<double>& seconds_each) {
        return seconds_each ? json(static_cast<double>(run.tokens().size()) / *seconds_each) : json();
    };
    const double bits = 8.0 * static_cast<double>(bytes) / static_cast<double>(values);
    json out;
    out["setting"] = of.setting;
    out["bits_per_value"] = bits;
    out["ratio_to_float16"] = 16.0 / bits;
    out["key_error"] = *mean(of, [](const outcome& layer) { return std::optional(layer.key_error); });
    out["value_error"] = *mean(of, [](const outcome& layer) { return std::optional(layer.value_error); });
    out["attention_error"] = optional_json(mean(of, [](const outcome& layer) { return layer.attention_error; }));
    out["attention_error_of_keys"] =
        optional_json(mean(of, [](const outcome& layer) { return layer.keys_attention_error; }));
    out["compress_tokens_per_second"] =
        per_second(mean(of, [](const outcome& layer) { return layer.compress_seconds; }));
    out["reconstruct_tokens_per_second"] =
        per_second(mean(of, [](const outcome& layer) { return layer.reconstruct_seconds; }));
    out["codebook_bytes"] = codebook_bytes;
    out["bits_per_value_with_codebooks"] =
        bits + 8.0 * static_cast<double>(codebook_bytes) /
                   (static_cast<double>(values_per_token) * static_cast<double>(given.amortize));
    out.update(of.facts);
    for (std::size_t i = 0; i < of.layers.size(); ++i) {
        const outcome& layer = of.layers[i];
        out["layers"].push_back({{"layer", run.layers()[i].number},
                                 {"bytes", layer.bytes},
                                 {"codebook_bytes", layer.codebook_bytes},
                                 {"key_error", layer.key_error},
                                 {"value_error", layer.value_error},
                                 {"attention_error", optional_json(layer.attention_error)},
                                 {"attention_error_of_keys", optional_json(layer.keys_attention_error)}});
    }
    return out;
}

void print_report(const json& report, const evaluate_options& given) {
    const json& rows = report["rows"];
    std::vector<std::vector<std::string>> table = {{"setting", "bits/value", "x fp16", "key error", "value error",
                                                    "attention error", "compress tok/s", "reconstruct tok/s",
                                                    "bits with codebooks"}};
    const auto cell = [](const json& number, auto text) {
        return number.is_null() ? std::string("-") : text(number.get<double>());
    };
    const auto error = [](double number) { return brief(number); };
    const auto whole = [](double number) { return fixed(number, 0); };
    for (const json& each : rows) {
        table.push_back({each["setting"], fixed(each["bits_per_value"], 3), fixed(each["ratio_to_float16"], 2),
                         brief(each["key_error"]), brief(each["value_error"]), cell(each["attention_error"], error),
                         cell(each["compress_tokens_per_second"], whole),
                         cell(each["reconstruct_tokens_per_second"], whole),
                         fixed(each["bits_per_value_with_codebooks"], 3)});
        for (std::size_t i = 0; given.per_layer && i < each["layers"].size(); ++i) {
            const json& layer = each["layers"][i];
            table.push_back({"  layer " + layer["layer"].dump(), "", "", brief(layer["key_error"]),
                             brief(layer["value_error"]), cell(layer["attention_error"], error)});
        }
    }
    print_table(table);
}

void evaluate(const evaluate_options& given) {
    std::vector<codec_choice> choices;
    std::vector<std::string> inputs = given.tensors.paths;
    for (const std::string& text : given.codecs) {
        choices.push_back(parse_choice(text));
        inputs.push_back(choices.back().path);
    }
    if (!given.output.empty()) {
        check_output(given.output, inputs);
    }
    evaluation run(given);
    std::vector<row> rows;
    for (const codec_choice& choice : choices) {
        run.add(choice, rows);
    }
    for (const std::string& name : given.baselines) {
        for (const baseline& each : all_baselines) {
            if (each.name == name) {
                run.add(each, rows);
            }
        }
    }
    json report;
    report["tensors"] = run.source().name();
    report["tokens"] = run.tokens().text();
    report["rope_theta"] = run.attention().rope_theta;
    report["window"] = run.attention().window;
    report["amortized_over_tokens"] = given.amortize;
    for (const row& each : rows) {
        report["rows"].push_back(summary(each, run, given));
    }
    if (!given.output.empty()) {
        const std::string text = report.dump(2) + "\n";
        rvqkv::atomic_file file = rvqkv::atomic_file::create(given.output).value();
        file.write(std::as_bytes(std::span<const char>(text))).value();
        file.commit().value();
    }
    if (given.as_json) {
        std::puts(report.dump(2).c_str());
    } else {
        print_report(report, given);
    }
}

}  // namespace

void add_evaluate(CLI::App& app) {
    CLI::App* const command = app.add_subcommand(
        "evaluate", "Measure size, error and speed of codecs on tokens that they were not trained on");
    const auto given = std::make_shared<evaluate_options>();
    add_tensor_options(*command, given->tensors);
    std::vector<std::string> baseline_names;
    for (const baseline& each : all_baselines) {
        baseline_names.emplace_back(each.name);
    }
    command->add_option(
        "-c,--codecs", given->codecs,
        "Codec file that `rvqkv train` made: a row of the table. FILE@8,6,4: three rows, for its codecs "
        "cut to their first 8, 6 and 4 depths. May be repeated");
    command->add_option("--tokens", given->tokens, "Tokens to evaluate, FIRST:LAST; default: the last 20 %");
    command->add_option("--baselines", given->baselines, "Rows for block formats that need no training")
        ->delimiter(',')
        ->check(CLI::IsMember(baseline_names));
    command
        ->add_option("--rope-theta", given->rope_theta,
                     "Base of the rotary embedding, 0: none; default: as in the file's metadata, or 10000")
        ->check(CLI::NonNegativeNumber);
    command
        ->add_option("--window", given->window,
                     "Tokens after which positions begin anew; default: as in the file's metadata, or all")
        ->check(CLI::PositiveNumber);
    command
        ->add_option("--amortize", given->amortize,
                     "Cached tokens over which 'bits with codebooks' spreads the codebooks")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    command
        ->add_option("--threads", given->threads,
                     "Threads for attention, 0: all; speeds are always those of one thread")
        ->capture_default_str();
    command->add_flag("--per-layer", given->per_layer, "A line for each layer below each row");
    command->add_flag("--json", given->as_json, "Print JSON instead of a table");
    command->add_option("-o,--output", given->output, "Also write the JSON to this file");
    command->footer(
        "Columns: bits/value counts every byte of codes and scales; errors are error energy / energy, mean of the\n"
        "layers; attention error is that of the attention's output (before its output projection), with the file's\n"
        "queries, rotary embedding and causal softmax over the evaluated tokens of a window; tokens/s are those of\n"
        "one layer's keys and values on one thread.\n\n"
        "Example:\n"
        "  rvqkv evaluate kv.safetensors -c strided.codecs@8,6,4 -c contiguous.codecs --baselines q4_0");
    command->callback([given] {
        if (given->codecs.empty() && given->baselines.empty()) {
            throw usage_error("nothing to evaluate: give --codecs, --baselines or both");
        }
        evaluate(*given);
    });
}

}  // namespace cli
