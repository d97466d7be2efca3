// SPDX-License-Identifier: MIT
/// @file
/// `rvqkv compress` and `rvqkv reconstruct`: tensors to codes and back.
#include "commands.hpp"
#include "support.hpp"

#include <rvqkv/core/thread_pool.hpp>
#include <rvqkv/files/codec_file.hpp>
#include <rvqkv/files/compressed_file.hpp>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

namespace cli {
namespace {

using json = nlohmann::ordered_json;

struct compress_options {
    tensor_options tensors;
    std::string codecs;
    std::string output;
    std::string tokens;
    std::size_t threads = 0;
    bool as_json = false;
};

/// Notes of the tensors' file that stay true of the compressed one.
rvqkv::metadata_map notes_of(const rvqkv::metadata_map& metadata) {
    rvqkv::metadata_map notes;
    for (const auto& entry : metadata) {
        if (!rvqkv::detail::is_reserved(entry.first) && entry.first != "tokens" && entry.first != "first_query") {
            notes.insert(entry);
        }
    }
    return notes;
}

const rvqkv::layer_codecs& codecs_of(const std::string& path, const rvqkv::codec_set& set, std::size_t layer) {
    const auto found = set.layers.find(layer);
    if (found == set.layers.end() || found->second.key == nullptr || found->second.value == nullptr) {
        throw std::runtime_error(path + ": has no codecs for the keys and values of layer " + std::to_string(layer) +
                                 "; --layers chooses others");
    }
    return found->second;
}

void compress(const compress_options& given) {
    std::vector<std::string> inputs = given.tensors.paths;
    inputs.push_back(given.codecs);
    check_output(given.output, inputs);
    const tensor_source source(given.tensors);
    const rvqkv::codec_set codecs = rvqkv::load_codecs(given.codecs).value();
    const token_span tokens = parse_tokens(given.tokens, source.tokens(), {0, source.tokens()});
    const rvqkv::thread_pool workers(given.threads);
    progress_bar progress;
    rvqkv::compressed_set set;
    set.metadata = notes_of(source.metadata());
    set.metadata["compressed_from"] = source.name();
    set.metadata["compressed_tokens"] = tokens.text();
    std::size_t bytes = 0;
    std::size_t values = 0;
    for (std::size_t i = 0; i < source.layers().size(); ++i) {
        const std::size_t layer = source.layers()[i];
        const rvqkv::layer_codecs& with = codecs_of(given.codecs, codecs, layer);
        for (const part which : {part::key, part::value}) {
            const std::string what = "layer " + std::to_string(layer) + " " + name_of(which);
            const rvqkv::tensor_shape shape = source.shape(layer, which);
            rvqkv::compressed_tensor tensor =
                rvqkv::compressed_tensor::create(which == part::key ? with.key : with.value, tokens.size(), shape.heads)
                    .value();
            rvqkv::encode_report report;
            for_each_piece(tokens, shape.heads * shape.channels, [&](std::size_t first, std::size_t count) {
                progress.show(what, (static_cast<double>(i) + (which == part::key ? 0.0 : 0.5)) /
                                        static_cast<double>(source.layers().size()));
                const rvqkv::owned_tensor piece = source.load(layer, which, first, count);
                if (const rvqkv::status wrong = tensor.encode(first - tokens.first, piece.view(), workers, &report);
                    !wrong) {
                    throw std::runtime_error(source.name() + ": " + what + ": " + wrong.error().message);
                }
            });
            progress.clear();
            warn_about(report, what, tokens.first);
            bytes += tensor.code_bytes() + tensor.scale_bytes();
            values += tokens.size() * shape.heads * shape.channels;
            rvqkv::compressed_layer& into = set.layers[layer];
            (which == part::key ? into.key : into.value) = std::move(tensor);
        }
    }
    rvqkv::save_compressed(given.output, set).value();
    const double bits = 8.0 * static_cast<double>(bytes) / static_cast<double>(values);
    const std::size_t file_bytes = std::filesystem::file_size(given.output);
    if (given.as_json) {
        const json report = {{"output", given.output},
                             {"tokens", tokens.text()},
                             {"layers", source.layers()},
                             {"values", values},
                             {"bytes", bytes},
                             {"file_bytes", file_bytes},
                             {"bits_per_value", bits},
                             {"ratio_to_float16", 16.0 / bits}};
        std::puts(report.dump(2).c_str());
    } else {
        std::printf("%s: %zu tokens of %zu layers in %s, %.3f bits per value, %.2f times smaller than float16\n",
                    given.output.c_str(), tokens.size(), source.layers().size(), bytes_text(file_bytes).c_str(), bits,
                    16.0 / bits);
    }
}

struct reconstruct_options {
    std::string compressed;
    std::string codecs;
    std::vector<std::string> outputs;
    std::string type = "float16";
    std::size_t depths = 0;
    std::size_t threads = 0;
    bool as_json = false;
};

/// One side of a layer to be written.
struct side {
    std::string name;
    const rvqkv::compressed_tensor* tensor;
};

std::vector<side> sides_of(const rvqkv::compressed_set& set) {
    std::vector<side> sides;
    for (const auto& layer : set.layers) {
        const std::string name = "layers." + std::to_string(layer.first);
        if (layer.second.key) {
            sides.push_back({name + ".key", &*layer.second.key});
        }
        if (layer.second.value) {
            sides.push_back({name + ".value", &*layer.second.value});
        }
    }
    return sides;
}

/// Decodes piece by piece and hands each to `write`.
template <class Write>
void decode(const side& each, const reconstruct_options& given, const rvqkv::executor& workers, const Write& write) {
    const rvqkv::tensor_shape shape = each.tensor->shape();
    const std::size_t most = each.tensor->codec()->depths();
    if (given.depths > most) {
        throw std::runtime_error(each.name + ": has " + std::to_string(most) + " depths, --depths asks for " +
                                 std::to_string(given.depths));
    }
    const std::size_t depths = given.depths == 0 ? most : given.depths;
    for_each_piece({0, shape.tokens}, shape.heads * shape.channels, [&](std::size_t first, std::size_t count) {
        rvqkv::owned_tensor piece =
            rvqkv::owned_tensor::allocate(named(all_types, given.type), {count, shape.heads, shape.channels}).value();
        each.tensor->decode(first, piece.mutable_view(), depths, workers).value();
        write(piece.view());
    });
}

void reconstruct(const reconstruct_options& given) {
    for (const std::string& output : given.outputs) {
        check_output(output, {given.compressed, given.codecs});
    }
    const rvqkv::codec_set codecs = rvqkv::load_codecs(given.codecs).value();
    const rvqkv::compressed_set set = rvqkv::load_compressed(given.compressed, codecs.layers).value();
    const rvqkv::thread_pool workers(given.threads);
    const std::vector<side> sides = sides_of(set);
    progress_bar progress;
    json report = {{"outputs", given.outputs}, {"type", given.type}, {"tensors", json::array()}};
    const auto note = [&](const side& each) {
        const rvqkv::tensor_shape shape = each.tensor->shape();
        report["tensors"].push_back({{"name", each.name}, {"shape", {shape.tokens, shape.heads, shape.channels}}});
    };
    if (given.outputs.size() == 2) {
        if (sides.size() != 2) {
            throw std::runtime_error(given.compressed + ": holds " + std::to_string(sides.size()) +
                                     " tensors; two .npy files take the keys and values of one layer, give one "
                                     "safetensors file");
        }
        for (std::size_t i = 0; i < 2; ++i) {
            const rvqkv::tensor_shape shape = sides[i].tensor->shape();
            rvqkv::owned_tensor whole = rvqkv::owned_tensor::allocate(named(all_types, given.type), shape).value();
            const std::size_t most = sides[i].tensor->codec()->depths();
            sides[i].tensor->decode(0, whole.mutable_view(), given.depths == 0 ? most : given.depths, workers).value();
            rvqkv::save_npy(given.outputs[i], whole.view()).value();
            note(sides[i]);
        }
    } else {
        std::vector<rvqkv::tensor_info> infos;
        for (const side& each : sides) {
            const rvqkv::tensor_shape shape = each.tensor->shape();
            infos.push_back({each.name,
                             rvqkv::storage_type_of(named(all_types, given.type)),
                             {shape.tokens, shape.heads, shape.channels}});
            note(each);
        }
        rvqkv::metadata_map metadata = set.metadata;
        metadata["reconstructed_from"] = std::filesystem::path(given.compressed).filename().string();
        rvqkv::safetensors_writer writer =
            rvqkv::safetensors_writer::create(given.outputs.front(), std::move(infos), metadata).value();
        for (std::size_t i = 0; i < sides.size(); ++i) {
            progress.show(sides[i].name, static_cast<double>(i) / static_cast<double>(sides.size()));
            decode(sides[i], given, workers, [&](const rvqkv::tensor_view& piece) { writer.write(piece).value(); });
        }
        writer.commit().value();
        progress.clear();
    }
    if (given.as_json) {
        std::puts(report.dump(2).c_str());
    } else {
        std::string files = given.outputs.front();
        files += given.outputs.size() == 2 ? " and " + given.outputs.back() : "";
        std::printf("%s: %zu tensors in %s\n", files.c_str(), sides.size(), given.type.c_str());
    }
}

}  // namespace

void add_compress(CLI::App& app) {
    CLI::App* const command = app.add_subcommand("compress", "Compress tensors with codecs");
    const auto given = std::make_shared<compress_options>();
    add_tensor_options(*command, given->tensors);
    command->add_option("-c,--codecs", given->codecs, "Codec file that `rvqkv train` made")->required();
    command->add_option("-o,--output", given->output, "Compressed file to write")->required();
    command->add_option("--tokens", given->tokens, "Tokens to compress, FIRST:LAST; default: all");
    command->add_option("--threads", given->threads, "0: all")->capture_default_str();
    command->add_flag("--json", given->as_json, "Print JSON");
    command->footer(
        "The compressed file is a safetensors file with a checksum; it names the codec that it needs by "
        "fingerprint.\n\n"
        "Example:\n"
        "  rvqkv compress kv.safetensors -c model.codecs -o kv.rvq");
    command->callback([given] { compress(*given); });
}

void add_reconstruct(CLI::App& app) {
    CLI::App* const command = app.add_subcommand("reconstruct", "Turn a compressed file back into tensors");
    const auto given = std::make_shared<reconstruct_options>();
    command->add_option("COMPRESSED", given->compressed, "File that `rvqkv compress` made")->required();
    command->add_option("-c,--codecs", given->codecs, "Codec file that it was made with")->required();
    command
        ->add_option("-o,--output", given->outputs,
                     "Safetensors file to write; or KEYS.npy VALUES.npy, for a file of one layer")
        ->required()
        ->expected(1, 2);
    command->add_option("--type", given->type, "Element type to write")
        ->check(CLI::IsMember(names(all_types)))
        ->capture_default_str();
    command->add_option("--depths", given->depths, "Read only so many depths: coarser; default: all")
        ->check(CLI::PositiveNumber);
    command->add_option("--threads", given->threads, "0: all")->capture_default_str();
    command->add_flag("--json", given->as_json, "Print JSON");
    command->footer(
        "Example:\n"
        "  rvqkv reconstruct kv.rvq -c model.codecs -o back.safetensors");
    command->callback([given] {
        const auto is_array = [](const std::string& path) { return std::filesystem::path(path).extension() == ".npy"; };
        const auto arrays = std::count_if(given->outputs.begin(), given->outputs.end(), is_array);
        if (given->outputs.size() == 2 ? arrays != 2 : arrays != 0) {
            throw usage_error("--output wants one safetensors file, or KEYS.npy VALUES.npy");
        }
        reconstruct(*given);
    });
}

}  // namespace cli
