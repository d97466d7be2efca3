// SPDX-License-Identifier: MIT
/// @file
/// Fuzzes the trainer file reader: a file that is taken must make trainers that train.
#include "fuzz_target.hpp"
#include "rvqkv/files/trainer_file.hpp"
#include "sealed.hpp"
#include "support/temp_dir.hpp"

namespace {

void try_trainer(rvqkv::codebook_trainer trainer) {
    const rvqkv::serial_executor serial;
    const std::size_t head_dim = trainer.config().spec.head_dim;
    std::vector<float> x(5 * head_dim);
    for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = static_cast<float>(i * 7 % 11) - 5.0F;
    }
    const rvqkv::tensor_view view(x.data(), {5, 1, head_dim});
    if (trainer.config().sample < 1000) {  // more are legal, and take memory
        static_cast<void>(trainer.observe(view));
    }
    if (trainer.config().kmeans.iterations < 20) {  // more are legal, and slow
        static_cast<void>(trainer.initialize(serial));
    }
    static_cast<void>(trainer.accumulate(view, {}, serial));
    static_cast<void>(trainer.step());
    static_cast<void>(trainer.make());
}

void try_file(std::span<const std::byte> bytes) {
    const auto loaded = rvqkv::load_training(bytes);
    if (!loaded) {
        fuzz::require(!loaded.error().message.empty(), "an error says what is wrong");
        return;
    }
    fuzz::require(!loaded.value().trainer.layers().empty(), "a loaded trainer has layers");
    for (const auto& layer : loaded.value().trainer.layers()) {
        try_trainer(layer.second.key);
        try_trainer(layer.second.value);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::with_and_without_seal(data, size, try_file);
    return 0;
}

std::vector<std::string> fuzz_seeds() {
    const test::temp_dir folder;
    const rvqkv::serial_executor serial;
    rvqkv::layer_trainer_config config;
    config.key.spec.head_dim = 4;
    config.key.spec.shape = {2, 3, 2};
    config.key.sample = 6;
    config.key.kmeans.iterations = 2;
    config.value = config.key;
    config.value.spec.grouping = rvqkv::grouping_kind::permuted;
    config.value.spec.permutation = {3, 1, 0, 2};
    config.value.kmeans.start = rvqkv::kmeans_start::plus_plus;
    std::vector<float> x(40);
    for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = static_cast<float>(i * i % 13) - 6.0F;
    }
    const rvqkv::tensor_view view(x.data(), {10, 1, 4});
    auto trainer = rvqkv::model_trainer::create({{1, config}}).value();
    std::vector<std::string> seeds;
    const auto save = [&] {
        rvqkv::save_training(folder.file("seed"), trainer, {{"model", "any"}}).value();
        seeds.push_back(test::read_file(folder.file("seed")));
    };
    save();
    trainer.observe(1, view, view).value();
    save();
    trainer.initialize(serial, [](const rvqkv::training_progress&) { return false; }).value();
    save();
    while (!trainer.layers().at(1).value.initialized()) {
        trainer.initialize(serial).value();
    }
    static_cast<void>(trainer.accumulate(1, view, view, {}, serial).value());
    trainer.step().value();
    save();
    return seeds;
}
