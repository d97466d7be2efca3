// SPDX-License-Identifier: MIT
/// @file
/// Training: k-means, residual quantization of plain vectors, EMA state step by step, and the trainer of a whole model.
#include "common.hpp"

#include <rvqkv/files/trainer_file.hpp>
#include <rvqkv/learn.hpp>

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <tuple>

namespace py {
namespace {

rvqkv::matrix_view<const float> rows_of(const float_array& array, const char* name) {
    if (array.ndim() != 2) {
        fail(std::string(name) + " has " + std::to_string(array.ndim()) +
             " dimensions, must have 2: [vector, channel]");
    }
    return {array.data(), array.shape(0), array.shape(1)};
}

auto kmeans(const float_array& x, std::size_t codewords, std::size_t iterations, std::uint64_t seed, bool plus_plus) {
    const rvqkv::matrix_view<const float> rows = rows_of(x, "x");
    std::vector<float> centroids(codewords * rows.cols);
    rvqkv::kmeans_config config;
    config.iterations = iterations;
    config.start = plus_plus ? rvqkv::kmeans_start::plus_plus : rvqkv::kmeans_start::sampled;
    const double error = without_lock([&] {
        rvqkv::random_source random(seed);
        const auto threads = workers();
        return rvqkv::kmeans(rows, codewords, centroids, config, random, *threads).value().mean_squared_error;
    });
    return std::pair(to_numpy(std::move(centroids), {codewords, rows.cols}), error);
}

/// Residual quantization of plain vectors, without scales and groups.
class plain_quantizer {
public:
    plain_quantizer(const float_array& weights, const std::string& metric) {
        if (weights.ndim() != 3) {
            fail("weights must have 3 dimensions: [depths, codewords, dim]");
        }
        const rvqkv::codebook_shape shape{weights.shape(0), weights.shape(1), weights.shape(2)};
        const rvqkv::distance by = choice(all_distances, metric, "distance");
        quantizer_.emplace(
            without_lock([&] { return rvqkv::residual_codebook<>::create(shape, span_of(weights), by).value(); }));
    }
    auto encode(const float_array& x) const {
        const rvqkv::matrix_view<const float> rows = checked(x);
        std::vector<float> rest(rows.data, rows.data + rows.rows * rows.cols);
        const std::size_t depths = quantizer_->codebook().depths();
        std::vector<rvqkv::code_t> codes(rows.rows * depths);
        without_lock([&] {
            const auto threads = workers();
            rvqkv::parallel_ranges(*threads, rows.rows, 480, [&](std::size_t first, std::size_t last) {
                quantizer_->encode({rest.data() + first * rows.cols, last - first, rows.cols},
                                   codes.data() + first * depths, {depths, 1});
            });
        });
        return std::pair(to_numpy(std::move(codes), {rows.rows, depths}),
                         to_numpy(std::move(rest), {rows.rows, rows.cols}));
    }
    auto decode(const code_array& codes, std::optional<std::size_t> wanted) const {
        const rvqkv::codebook_shape shape = quantizer_->codebook().shape();
        const std::size_t depths = wanted.value_or(shape.depths);
        if (codes.ndim() != 2 || codes.shape(1) != shape.depths || depths > shape.depths) {
            fail("codes must have the shape [vector, " + std::to_string(shape.depths) +
                 "], and depths be at most that");
        }
        for (const rvqkv::code_t code : span_of(codes)) {
            if (code >= shape.codewords) {
                fail("a code is " + std::to_string(code) + ", must be below codewords " +
                     std::to_string(shape.codewords));
            }
        }
        std::vector<float> out(codes.shape(0) * shape.dim);
        without_lock([&] {
            quantizer_->decode(codes.data(), {shape.depths, 1}, {out.data(), codes.shape(0), shape.dim}, depths);
        });
        return to_numpy(std::move(out), {codes.shape(0), shape.dim});
    }

private:
    rvqkv::matrix_view<const float> checked(const float_array& x) const {
        const rvqkv::matrix_view<const float> rows = rows_of(x, "x");
        if (rows.cols != quantizer_->codebook().dim()) {
            fail("x has " + std::to_string(rows.cols) + " channels, the codebook has " +
                 std::to_string(quantizer_->codebook().dim()));
        }
        return rows;
    }
    std::optional<rvqkv::residual_quantizer<>> quantizer_;
};

rvqkv::ema_config make_ema(double decay, double epsilon, double clamp, double revive_below) {
    rvqkv::ema_config config;
    config.decay = decay;
    config.epsilon = epsilon;
    config.clamp = clamp;
    config.revive_below = revive_below;
    return config;
}

/// EMA training of one codec's codebook on tensors, from any state on: what the paper's quantizer does as it trains.
class ema_codec_trainer {
public:
    ema_codec_trainer(const rvqkv::codec_spec& spec, const float_array& weights, double decay, double epsilon,
                      double clamp, double revive_below, const std::optional<float_array>& sizes,
                      const std::optional<float_array>& sums) {
        rvqkv::trainer_config config;
        config.spec = spec;
        config.ema = make_ema(decay, epsilon, clamp, revive_below);
        config.sample = std::max(config.sample, spec.shape.codewords);
        rvqkv::trainer_state state;
        state.depths_done = spec.shape.depths;
        const auto copy = [](std::vector<float>& to, const float_array& from) {
            const std::span<const float> numbers = span_of(from);
            to.assign(numbers.begin(), numbers.end());
        };
        copy(state.ema.weights, weights);
        state.ema.embedding_sums = state.ema.weights;
        state.ema.cluster_sizes.assign(spec.shape.depths * spec.shape.codewords, 1.0F);
        if (sizes.has_value()) {
            copy(state.ema.cluster_sizes, *sizes);
        }
        if (sums.has_value()) {
            copy(state.ema.embedding_sums, *sums);
        }
        trainer_.emplace(rvqkv::codebook_trainer::resume(config, std::move(state)).value());
    }
    auto accumulate(const array_in& x, const std::optional<mask_array>& mask) {
        const rvqkv::tensor_view input = view(x, "x");
        const std::span<const std::uint8_t> counted = mask_of(mask);
        const rvqkv::batch_report report = without_lock([&] {
            const auto threads = workers();
            return trainer_->accumulate(input, counted, *threads).value();
        });
        return std::pair(report.commitment_loss, report.nonfinite_values);
    }
    void step() {
        without_lock([&] {
            const auto threads = workers();
            trainer_->step(*threads).value();
        });
    }
    nb::dict state() const {
        rvqkv::ema_state ema = trainer_->state().ema;
        const rvqkv::codebook_shape& shape = trainer_->config().spec.shape;
        nb::dict state;
        state["weights"] = to_numpy(std::move(ema.weights), {shape.depths, shape.codewords, shape.dim});
        state["cluster_sizes"] = to_numpy(std::move(ema.cluster_sizes), {shape.depths, shape.codewords});
        state["embedding_sums"] = to_numpy(std::move(ema.embedding_sums), {shape.depths, shape.codewords, shape.dim});
        return state;
    }
    std::shared_ptr<const rvqkv::codec> make() const {
        return without_lock([&] { return trainer_->make().value(); });
    }

private:
    std::optional<rvqkv::codebook_trainer> trainer_;
};

using layer_specs = std::map<std::size_t, std::pair<rvqkv::codec_spec, rvqkv::codec_spec>>;
using text_map = std::map<std::string, std::string>;
/// Done, total, mean squared error; false asks to stop.
using progress_function = std::function<bool(std::size_t, std::size_t, double)>;

/// The trainers of a model's layers.
class calibration {
public:
    calibration(const layer_specs& layers, std::size_t sample, std::size_t iterations, double decay,
                std::uint64_t seed) {
        std::map<std::size_t, rvqkv::layer_trainer_config> configs;
        for (const auto& [layer, specs] : layers) {
            rvqkv::layer_trainer_config& config = configs[layer];
            config.key.spec = specs.first;
            config.value.spec = specs.second;
            for (rvqkv::trainer_config* side : {&config.key, &config.value}) {
                side->sample = sample;
                side->kmeans.iterations = iterations;
                side->ema.decay = decay;
                side->seed = seed + 2 * layer + (side == &config.key ? 0 : 1);
            }
        }
        trainer_.emplace(rvqkv::model_trainer::create(configs).value());
    }
    explicit calibration(const std::filesystem::path& path) {
        auto saved = without_lock([&] { return rvqkv::load_training(path).value(); });
        trainer_.emplace(std::move(saved.trainer));
        metadata_.insert(saved.metadata.begin(), saved.metadata.end());
    }
    void observe(std::size_t layer, const array_in& keys, const array_in& values) {
        const rvqkv::tensor_view k = view(keys, "keys");
        const rvqkv::tensor_view v = view(values, "values");
        without_lock([&] { trainer_->observe(layer, k, v).value(); });
    }
    /// Whether k-means is through.
    bool initialize(const progress_function& progress) {
        const auto report = [&](const rvqkv::training_progress& now) {
            const nb::gil_scoped_acquire lock;
            return progress(now.done, now.total, now.mean_squared_error);
        };
        without_lock([&] {
            const auto threads = workers();
            trainer_->initialize(*threads, progress ? rvqkv::progress_callback(report) : nullptr).value();
        });
        return initialized();
    }
    bool initialized() const {
        for (const auto& [layer, sides] : trainer_->layers()) {
            if (!sides.key.initialized() || !sides.value.initialized()) {
                return false;
            }
        }
        return true;
    }
    std::size_t observed() const {
        return trainer_->layers().empty() ? 0 : trainer_->layers().begin()->second.value.observed();
    }
    std::size_t steps() const {
        return trainer_->layers().empty() ? 0 : trainer_->layers().begin()->second.value.steps();
    }
    auto accumulate(std::size_t layer, const array_in& keys, const array_in& values) {
        const rvqkv::tensor_view k = view(keys, "keys");
        const rvqkv::tensor_view v = view(values, "values");
        const auto report = without_lock([&] {
            const auto threads = workers();
            return trainer_->accumulate(layer, k, v, {}, *threads).value();
        });
        return std::pair(report.key.commitment_loss, report.value.commitment_loss);
    }
    void step() {
        without_lock([&] {
            const auto threads = workers();
            trainer_->step(*threads).value();
        });
    }
    std::map<std::size_t, std::pair<std::shared_ptr<const rvqkv::codec>, std::shared_ptr<const rvqkv::codec>>> make()
        const {
        const rvqkv::model_codecs made = without_lock([&] { return trainer_->make().value(); });
        decltype(make()) codecs;
        for (const auto& [layer, sides] : made) {
            codecs[layer] = {sides.key, sides.value};
        }
        return codecs;
    }
    void save(const std::filesystem::path& path, const text_map& metadata) const {
        const rvqkv::metadata_map text(metadata.begin(), metadata.end());
        without_lock([&] { rvqkv::save_training(path, *trainer_, text).value(); });
    }
    const text_map& metadata() const { return metadata_; }

private:
    std::optional<rvqkv::model_trainer> trainer_;
    text_map metadata_;
};

}  // namespace

void bind_learn(nb::module_& module) {
    module.def("kmeans", &kmeans, nb::arg("x"), nb::arg("codewords"), nb::kw_only(), nb::arg("iterations") = 10,
               nb::arg("seed") = 0, nb::arg("plus_plus") = false,
               "Centroids [codewords, channel] of x [vector, channel], and the mean squared error per value.");

    nb::class_<plain_quantizer>(module, "ResidualQuantizer", "Residual quantization of plain vectors.")
        .def(nb::init<const float_array&, const std::string&>(), nb::arg("weights"), nb::arg("distance") = "euclidean")
        .def("encode", &plain_quantizer::encode, nb::arg("x"),
             "Codes [vector, depth] of x [vector, channel], and what the last depth leaves of x.")
        .def("decode", &plain_quantizer::decode, nb::arg("codes"), nb::arg("depths") = nb::none(),
             "The sum of the first depths' codewords, [vector, channel].");

    nb::class_<ema_codec_trainer>(module, "EmaTrainer",
                                  "EMA training of one codec's codebooks: accumulate micro-batches, then step.")
        .def(nb::init<const rvqkv::codec_spec&, const float_array&, double, double, double, double,
                      const std::optional<float_array>&, const std::optional<float_array>&>(),
             nb::arg("spec"), nb::arg("weights"), nb::kw_only(), nb::arg("decay") = 0.99, nb::arg("epsilon") = 1e-5,
             nb::arg("clamp") = 100.0, nb::arg("revive_below") = 0.0, nb::arg("cluster_sizes").none() = nb::none(),
             nb::arg("embedding_sums").none() = nb::none())
        .def(
            "accumulate", &ema_codec_trainer::accumulate, nb::arg("x"), nb::arg("mask").none() = nb::none(),
            "One micro-batch, x [token, head, channel], mask [token] of uint8: the mean commitment loss of the counted "
            "tokens, and how many values were not finite (taken as 0).")
        .def("step", &ema_codec_trainer::step, "The weight update that closes a round of micro-batches.")
        .def("state", &ema_codec_trainer::state, "Copies of weights, cluster_sizes and embedding_sums.")
        .def("make", &ema_codec_trainer::make, "The codec that training has arrived at.");

    nb::class_<calibration>(module, "ModelTrainer",
                            "Trains the codecs of a model: observe tensors, initialize, any number of rounds of "
                            "accumulate and step, make.")
        .def(nb::init<const layer_specs&, std::size_t, std::size_t, double, std::uint64_t>(), nb::arg("layers"),
             nb::kw_only(), nb::arg("sample") = 100000, nb::arg("iterations") = 10, nb::arg("decay") = 0.99,
             nb::arg("seed") = 0)
        .def_static(
            "resume", [](const std::filesystem::path& path) { return calibration(path); }, nb::arg("path"),
            "Goes on from a saved file, as if there had been no break.")
        .def("observe", &calibration::observe, nb::arg("layer"), nb::arg("keys"), nb::arg("values"))
        .def("initialize", &calibration::initialize, nb::arg("progress").none() = nb::none(),
             "K-means; progress(done, total, mean squared error) may return False to stop. Whether it is through.")
        .def_prop_ro("initialized", &calibration::initialized)
        .def_prop_ro("observed", &calibration::observed, "Vectors observed of the first layer's values.")
        .def_prop_ro("steps", &calibration::steps)
        .def("accumulate", &calibration::accumulate, nb::arg("layer"), nb::arg("keys"), nb::arg("values"),
             "One EMA micro-batch: the mean commitment losses of keys and values.")
        .def("step", &calibration::step)
        .def("make", &calibration::make, "Codecs of keys and values by layer.")
        .def("save", &calibration::save, nb::arg("path"), nb::arg("metadata") = text_map())
        .def_prop_ro("metadata", &calibration::metadata, "What was saved with the file that it was resumed from.");
}

}  // namespace py
