// SPDX-License-Identifier: MIT
/// @file
/// `rvqkv inspect`: what a file holds, and whether it is whole.
#include "commands.hpp"
#include "support.hpp"

#include <rvqkv/files/codec_file.hpp>
#include <rvqkv/files/compressed_file.hpp>
#include <rvqkv/files/npy.hpp>
#include <rvqkv/files/trainer_file.hpp>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

namespace cli {
namespace {

using json = nlohmann::ordered_json;

struct inspect_options {
    std::string path;
    std::string codecs;
    bool as_json = false;
};

std::string extents_text(const json& shape) {
    std::string text;
    for (const json& extent : shape) {
        text += (text.empty() ? "" : " x ") + extent.dump();
    }
    return text.empty() ? "single number" : text;
}

json tensors_of(const rvqkv::safetensors_file& file) {
    json tensors = json::array();
    for (const rvqkv::tensor_info& tensor : file.tensors()) {
        tensors.push_back(
            {{"name", tensor.name}, {"type", name_of(tensor.type)}, {"shape", tensor.shape}, {"bytes", tensor.bytes}});
    }
    return tensors;
}

/// One codec: a line of the table.
json codec_facts(std::size_t layer, const char* side, const rvqkv::codec& codec) {
    const rvqkv::codec_spec& spec = *codec.spec();
    return {{"layer", layer},
            {"side", side},
            {"head_dim", spec.head_dim},
            {"group_dim", spec.shape.dim},
            {"depths", spec.shape.depths},
            {"codewords", spec.shape.codewords},
            {"scale", name_of(spec.scale)},
            {"scale_type", name_of(spec.scale_type)},
            {"grouping", name_of(spec.grouping)},
            {"distance", name_of(spec.metric)},
            {"weight_type", name_of(spec.weight_type)},
            {"bits_per_value", spec.bits_per_value()},
            {"codebook_bytes", codec.weights().size()},
            {"fingerprint", rvqkv::codec_fingerprint(codec).value()}};
}

void inspect_codecs(const std::string& path, json& report) {
    const rvqkv::codec_set set = rvqkv::load_codecs(path).value();
    for (const auto& layer : set.layers) {
        if (layer.second.key) {
            report["codecs"].push_back(codec_facts(layer.first, "key", *layer.second.key));
        }
        if (layer.second.value) {
            report["codecs"].push_back(codec_facts(layer.first, "value", *layer.second.value));
        }
    }
    report["checksum"] = "ok";
}

void inspect_compressed(const std::string& path, const rvqkv::safetensors_file& file, const std::string& codecs,
                        json& report) {
    if (!codecs.empty()) {
        const rvqkv::compressed_set set =
            rvqkv::load_compressed(path, rvqkv::load_codecs(codecs).value().layers).value();
        report["codes"] = "ok, made with the codecs of " + codecs;
    } else {
        rvqkv::detail::check_sealed(file, rvqkv::compressed_file_format, rvqkv::compressed_file_version).value();
        report["codes"] = "not checked; --codecs FILE does";
    }
    report["checksum"] = "ok";
    report["tensors"] = tensors_of(file);
}

void inspect_training(const std::string& path, json& report) {
    const rvqkv::saved_training saved = rvqkv::load_training(path).value();
    for (const auto& layer : saved.trainer.layers()) {
        for (const bool is_key : {true, false}) {
            const rvqkv::codebook_trainer& side = is_key ? layer.second.key : layer.second.value;
            const rvqkv::codebook_shape& shape = side.config().spec.shape;
            report["training"].push_back({{"layer", layer.first},
                                          {"side", is_key ? "key" : "value"},
                                          {"depths", shape.depths},
                                          {"codewords", shape.codewords},
                                          {"group_dim", shape.dim},
                                          {"vectors_seen", side.observed()},
                                          {"k-means", side.initialized() ? "done" : "not done"},
                                          {"ema_steps", side.steps()}});
        }
    }
    report["checksum"] = "ok";
}

json inspect(const inspect_options& given) {
    json report = {{"file", given.path}};
    if (std::filesystem::path(given.path).extension() == ".npy") {
        const rvqkv::npy_file array = rvqkv::npy_file::open(given.path).value();
        report["format"] = "npy";
        report["bytes"] = std::filesystem::file_size(given.path);
        report["tensors"] = {{{"name", "array"}, {"type", name_of(array.type())}, {"shape", array.shape()}}};
        return report;
    }
    const rvqkv::safetensors_file file = rvqkv::safetensors_file::open(given.path).value();
    const std::string* const format = file.find_metadata("format");
    report["format"] = format == nullptr ? "safetensors" : *format;
    report["bytes"] = std::filesystem::file_size(given.path);
    for (const auto& entry : file.metadata()) {
        report["metadata"][entry.first] = entry.second;
    }
    if (format != nullptr && *format == rvqkv::codec_file_format) {
        inspect_codecs(given.path, report);
    } else if (format != nullptr && *format == rvqkv::compressed_file_format) {
        inspect_compressed(given.path, file, given.codecs, report);
    } else if (format != nullptr && *format == rvqkv::trainer_file_format) {
        inspect_training(given.path, report);
    } else {
        report["tensors"] = tensors_of(file);
    }
    return report;
}

void print_contents(const json& report) {
    std::printf("%s: %s, %s\n", report["file"].get<std::string>().c_str(), report["format"].get<std::string>().c_str(),
                bytes_text(report["bytes"]).c_str());
    for (const char* const check : {"checksum", "codes"}) {
        if (report.contains(check)) {
            std::printf("%s: %s\n", check, report[check].get<std::string>().c_str());
        }
    }
    if (report.contains("metadata")) {
        for (const auto& entry : report["metadata"].items()) {
            std::printf("  %s: %s\n", entry.key().c_str(), entry.value().get<std::string>().c_str());
        }
    }
    for (const char* const list : {"codecs", "training", "tensors"}) {
        if (!report.contains(list) || report[list].empty()) {
            continue;
        }
        std::vector<std::vector<std::string>> table(1);
        for (const auto& column : report[list].front().items()) {
            table.front().push_back(column.key());
        }
        for (const json& each : report[list]) {
            table.emplace_back();
            for (const auto& cell : each.items()) {
                const json& value = cell.value();
                table.back().push_back(value.is_array()          ? extents_text(value)
                                       : value.is_string()       ? value.get<std::string>()
                                       : value.is_number_float() ? fixed(value.get<double>(), 3)
                                                                 : value.dump());
            }
        }
        std::puts("");
        print_table(table);
    }
}

}  // namespace

void add_inspect(CLI::App& app) {
    CLI::App* const command = app.add_subcommand("inspect", "Say what a file holds and whether it is whole");
    const auto given = std::make_shared<inspect_options>();
    command->add_option("FILE", given->path, "Codecs, compressed or training state of rvqkv; any safetensors or .npy")
        ->required();
    command->add_option("-c,--codecs", given->codecs, "Codec file, to check the codes of a compressed file as well");
    command->add_flag("--json", given->as_json, "Print JSON");
    command->footer(
        "Files of rvqkv's own are read whole: checksum, shapes, every weight.\n\n"
        "Example:\n"
        "  rvqkv inspect model.codecs");
    command->callback([given] {
        const json report = inspect(*given);
        if (given->as_json) {
            std::puts(report.dump(2).c_str());
        } else {
            print_contents(report);
        }
    });
}

}  // namespace cli
