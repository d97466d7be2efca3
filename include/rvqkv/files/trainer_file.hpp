// SPDX-License-Identifier: MIT
/// @file
/// Training of a whole model, saved at any moment: what is loaded goes on exactly as if there had been no break. A
/// safetensors file with, for each layer L and side (`layers.L.key`, `layers.L.value`),
///  - metadata `layers.L.key`: the codec to be made, as in a codec file; `layers.L.key.trainer`: configuration and
///    counters, as JSON;
///  - F32 tensors `layers.L.key.sample` `[n, group_dim]` while k-means has not finished, `layers.L.key.weights`
///    `[depths, codewords, group_dim]` of the depths that it has finished, and `.cluster_sizes` `[depths, codewords]`
///    and `.embedding_sums` (like the weights) of EMA training;
///  - U16 tensor `layers.L.key.permutation` where the grouping is one;
/// and metadata `format` = "rvqkv.trainer", `version` = "1", `checksum`, and free text of the user's.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/files/flat_json.hpp"
#include "rvqkv/files/safetensors.hpp"
#include "rvqkv/files/safetensors_header.hpp"
#include "rvqkv/files/sealed_file.hpp"
#include "rvqkv/learn/codebook_trainer.hpp"
#include "rvqkv/learn/model_trainer.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

RVQKV_NAMESPACE_BEGIN

/// What a trainer file holds.
struct saved_training {
    model_trainer trainer;
    metadata_map metadata;  ///< Free text of the user's, with keys as in `codec_set::metadata`.
};

inline constexpr std::string_view trainer_file_format = "rvqkv.trainer";
inline constexpr std::string_view trainer_file_version = "1";

namespace detail {

inline constexpr std::string_view trainer_suffix = ".trainer";
inline constexpr kmeans_start all_kmeans_starts[] = {kmeans_start::sampled, kmeans_start::plus_plus};

[[nodiscard]] inline std::size_t sampled_vectors(const trainer_config& config, const trainer_state& state) {
    return state.sample.size() / config.spec.shape.dim;
}

[[nodiscard]] inline std::string trainer_json(const trainer_config& config, const trainer_state& state) {
    return flat_json_writer()
        .add("kmeans_iterations", config.kmeans.iterations)
        .add("kmeans_start", name_of(config.kmeans.start))
        .add("decay", config.ema.decay)
        .add("epsilon", config.ema.epsilon)
        .add("clamp", config.ema.clamp)
        .add("revive_below", config.ema.revive_below)
        .add("sample", config.sample)
        .add("seed", std::size_t{config.seed})
        .add("random", std::size_t{state.random})
        .add("observed", std::size_t{state.observed})
        .add("steps", std::size_t{state.steps})
        .add("depths_done", std::size_t{state.depths_done})
        .add("sampled", sampled_vectors(config, state))
        .text();
}

/// The inverse; `sampled` are the vectors that the sample holds. Errors: `damaged_file` naming the field.
[[nodiscard]] inline status parse_trainer(std::string_view json, trainer_config& config, trainer_state& state,
                                          std::size_t& sampled) {
    auto object = flat_json::parse(json);
    if (!object) {
        return object.error();
    }
    flat_json& fields = object.value();
    const status steps[] = {
        fields.take("kmeans_iterations", config.kmeans.iterations),
        fields.take("kmeans_start", all_kmeans_starts, config.kmeans.start),
        fields.take("decay", config.ema.decay),
        fields.take("epsilon", config.ema.epsilon),
        fields.take("clamp", config.ema.clamp),
        fields.take("revive_below", config.ema.revive_below),
        fields.take("sample", config.sample),
        fields.take("seed", config.seed),
        fields.take("random", state.random),
        fields.take("observed", state.observed),
        fields.take("steps", state.steps),
        fields.take("depths_done", state.depths_done),
        fields.take("sampled", sampled),
        fields.finish(),
    };
    return first_failure(steps);
}

/// Visits the tensors of a trainer's state (to read or to write it) in the order of the file: name, shape, values.
template <class State, class Visitor>
[[nodiscard]] status for_each_state_tensor(const codebook_shape& shape, State& state, std::size_t sampled,
                                           const Visitor& visit) {
    using extents = std::vector<std::size_t>;
    const std::size_t depths = state.depths_done;
    status done;
    if (sampled != 0) {
        done = visit("sample", extents{sampled, shape.dim}, state.sample);
    }
    if (done && depths != 0) {
        done = visit("weights", extents{depths, shape.codewords, shape.dim}, state.ema.weights);
    }
    if (done && depths == shape.depths) {
        done = visit("cluster_sizes", extents{depths, shape.codewords}, state.ema.cluster_sizes);
    }
    if (done && depths == shape.depths) {
        done = visit("embedding_sums", extents{depths, shape.codewords, shape.dim}, state.ema.embedding_sums);
    }
    return done;
}

/// One trainer; `json` and `trainer_json` are what the metadata says of the side.
[[nodiscard]] inline result<codebook_trainer> load_trainer(side_reader& side, std::string_view json,
                                                           std::string_view trainer_json) {
    auto spec = side.read_spec(json);
    if (!spec) {
        return spec.error();
    }
    trainer_config config;
    config.spec = std::move(spec).value();
    trainer_state state;
    std::size_t sampled = 0;
    if (auto done = parse_trainer(trainer_json, config, state, sampled); !done) {
        return side.damaged(done.error().message);
    }
    const codebook_shape& shape = config.spec.shape;
    if (state.depths_done > shape.depths) {
        return side.damaged("field 'depths_done' is " + std::to_string(state.depths_done) +
                            ", must be at most depths, " + std::to_string(shape.depths));
    }
    // Reservoir sampling replaces vectors at any place below `sample` once so many were observed: they must be there.
    const std::size_t wanted =
        state.depths_done == shape.depths ? 0 : std::min<std::size_t>(state.observed, config.sample);
    if (sampled != wanted) {
        return side.damaged("field 'sampled' is " + std::to_string(sampled) + ", but with 'observed' " +
                            std::to_string(state.observed) + ", 'sample' " + std::to_string(config.sample) +
                            " and 'depths_done' " + std::to_string(state.depths_done) + " it must be " +
                            std::to_string(wanted));
    }
    const auto read = [&side](const char* tensor, const std::vector<std::size_t>& extents,
                              std::vector<float>& values) -> status {
        if (auto found = side.expect(tensor, storage_type::float32, extents); !found) {
            return found;
        }
        const std::string name = side.tensor_name(tensor);
        values.resize(side.file().tensor(name).value()->bytes / sizeof(float));
        if (auto done = side.file().read_floats(name, values); !done) {
            return done;
        }
        const auto wrong =
            std::find_if(values.begin(), values.end(), [](float value) { return !std::isfinite(value); });
        return wrong == values.end() ? status{}
                                     : side.damaged("tensor " + in_quotes(name) + ": element " +
                                                    std::to_string(wrong - values.begin()) + " is not finite");
    };
    if (auto done = for_each_state_tensor(shape, state, sampled, read); !done) {
        return done.error();
    }
    auto trainer = codebook_trainer::resume(config, std::move(state));
    if (!trainer) {
        return side.blame_file(trainer.error());
    }
    return trainer;
}

[[nodiscard]] inline result<saved_training> load_training(const safetensors_file& file) {
    if (auto sealed = check_sealed(file, trainer_file_format, trainer_file_version); !sealed) {
        return sealed.error();
    }
    const auto damaged = [&file](const std::string& what) {
        return error{error_code::damaged_file, file.name() + ": " + what};
    };
    struct sides {
        std::optional<codebook_trainer> key;
        std::optional<codebook_trainer> value;
    };
    std::map<std::size_t, sides> found;
    metadata_map metadata;
    std::size_t tensors = 0;
    for (const auto& entry : file.metadata()) {
        if (!is_reserved(entry.first)) {
            metadata.insert(entry);
            continue;
        }
        if (entry.first.substr(0, layer_prefix.size()) != layer_prefix) {
            continue;
        }
        // Each side has two entries; both lead here, the codec's loads it.
        const bool is_trainer =
            entry.first.size() > trainer_suffix.size() &&
            std::string_view(entry.first).substr(entry.first.size() - trainer_suffix.size()) == trainer_suffix;
        const std::string name = entry.first.substr(0, entry.first.size() - (is_trainer ? trainer_suffix.size() : 0));
        std::size_t layer = 0;
        bool is_key = false;
        if (!parse_side_name(name, layer, is_key)) {
            return damaged("metadata " + in_quotes(entry.first) + " names no layer and side");
        }
        const std::string* const twin = file.find_metadata(is_trainer ? name : name + std::string(trainer_suffix));
        if (twin == nullptr) {
            return damaged("metadata " + in_quotes(entry.first) + " stands alone: a side has 'layers.L.key' and " +
                           "'layers.L.key.trainer'");
        }
        if (is_trainer) {
            continue;
        }
        side_reader side(file, name);
        auto loaded = load_trainer(side, entry.second, *twin);
        if (!loaded) {
            return loaded.error();
        }
        tensors += side.tensors();
        (is_key ? found[layer].key : found[layer].value) = std::move(loaded).value();
    }
    if (found.empty() || tensors != file.tensors().size()) {
        return damaged("holds " + std::to_string(file.tensors().size()) +
                       " tensors, but the trainers that its metadata names have " + std::to_string(tensors));
    }
    std::map<std::size_t, model_trainer::layer_trainers> layers;
    for (auto& each : found) {
        if (!each.second.key || !each.second.value) {
            return damaged(side_name(each.first, !each.second.key).append(" is missing"));
        }
        layers.emplace(each.first,
                       model_trainer::layer_trainers{std::move(*each.second.key), std::move(*each.second.value)});
    }
    return saved_training{model_trainer(std::move(layers)), std::move(metadata)};
}

}  // namespace detail

/// Writes the whole state of training to a file, all or nothing.
/// Errors: `invalid_argument` for a trainer without layers, a reserved metadata key or text that is not UTF-8; `io`. An
///         old file is then as it was.
/// Memory: a copy of the largest of the trainers' states.
[[nodiscard]] inline status save_training(const std::filesystem::path& path, const model_trainer& trainer,
                                          const metadata_map& metadata = {}) {
    if (auto allowed = detail::check_user_metadata(path, metadata); !allowed) {
        return allowed;
    }
    struct side {
        std::string name;
        const codebook_trainer* trainer;
    };
    std::vector<side> sides;
    for (const auto& layer : trainer.layers()) {
        if (auto valid = detail::check_layer(path, layer.first); !valid) {
            return valid;
        }
        sides.push_back({detail::side_name(layer.first, true), &layer.second.key});
        sides.push_back({detail::side_name(layer.first, false), &layer.second.value});
    }
    if (sides.empty()) {
        return error{error_code::invalid_argument, path.string() + ": no trainers to save"};
    }
    metadata_map all = metadata;
    std::vector<tensor_info> infos;
    for (const side& each : sides) {
        const trainer_config& config = each.trainer->config();
        const trainer_state state = each.trainer->state();
        all[each.name] = detail::codec_spec_json(config.spec);
        all[each.name + std::string(detail::trainer_suffix)] = detail::trainer_json(config, state);
        const auto declare = [&](const char* tensor, std::vector<std::size_t> shape, const std::vector<float>&) {
            infos.push_back({each.name + '.' + tensor, storage_type::float32, std::move(shape)});
            return status{};
        };
        if (auto done = detail::for_each_state_tensor(config.spec.shape, state, detail::sampled_vectors(config, state),
                                                      declare);
            !done) {
            return done;
        }
    }
    for (const side& each : sides) {  // narrow elements last, so that every tensor is aligned
        if (const auto& order = each.trainer->config().spec.permutation; !order.empty()) {
            infos.push_back({each.name + ".permutation", storage_type::uint16, {order.size()}});
        }
    }
    auto writer =
        detail::create_sealed(path, trainer_file_format, trainer_file_version, std::move(all), std::move(infos));
    if (!writer) {
        return writer.error();
    }
    for (const side& each : sides) {
        const auto write = [&](const char*, const std::vector<std::size_t>&, const std::vector<float>& values) {
            return writer.value().write(std::as_bytes(std::span(values)));
        };
        const trainer_config& config = each.trainer->config();
        const trainer_state state = each.trainer->state();
        if (auto done =
                detail::for_each_state_tensor(config.spec.shape, state, detail::sampled_vectors(config, state), write);
            !done) {
            return done;
        }
    }
    for (const side& each : sides) {
        const auto& order = each.trainer->config().spec.permutation;
        if (auto done = writer.value().write(std::as_bytes(std::span(order))); !done) {
            return done;
        }
    }
    return writer.value().commit();
}

/// Reads the state of training. Everything is checked before anything is returned: format, version, checksum, every
/// field, every number.
/// Errors: `io`, `damaged_file`, `out_of_memory`; `unsupported` for a version that this library does not read.
[[nodiscard]] inline result<saved_training> load_training(const std::filesystem::path& path) {
    auto file = safetensors_file::open(path);
    if (!file) {
        return file.error();
    }
    return detail::load_training(file.value());
}

/// The same from a file's bytes in memory, which are not needed afterwards.
[[nodiscard]] inline result<saved_training> load_training(std::span<const std::byte> bytes) {
    auto file = safetensors_file::parse(bytes);
    if (!file) {
        return file.error();
    }
    return detail::load_training(file.value());
}

RVQKV_NAMESPACE_END
