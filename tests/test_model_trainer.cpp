// SPDX-License-Identifier: MIT
#include "rvqkv/learn/model_trainer.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <cstddef>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr rvqkv::tensor_shape key_shape{200, 2, 8};
constexpr rvqkv::tensor_shape value_shape{200, 3, 12};

rvqkv::layer_trainer_config layer_config(std::uint64_t seed) {
    rvqkv::layer_trainer_config config;
    config.key.spec.head_dim = 8;
    config.key.spec.shape = {2, 16, 4};
    config.key.kmeans.iterations = 3;
    config.key.seed = seed;
    config.value = config.key;
    config.value.spec.head_dim = 12;
    config.value.spec.shape = {3, 8, 6};
    config.value.spec.grouping = rvqkv::grouping_kind::contiguous;
    return config;
}

}  // namespace

TEST_CASE("model_trainer: trains each layer and side as its own trainer would", "[learn][differential]") {
    CAPTURE(test::seed());
    test::random_source random(41);
    const rvqkv::serial_executor serial;
    auto model = rvqkv::model_trainer::create({{2, layer_config(1)}, {7, layer_config(2)}}).value();
    std::map<std::size_t, std::vector<float>> keys;
    std::map<std::size_t, std::vector<float>> values;
    for (const std::size_t layer : {2U, 7U}) {
        keys[layer] = test::gaussian_numbers(random, 200 * 2 * 8);
        values[layer] = test::gaussian_numbers(random, 200 * 3 * 12);
        model.observe(layer, {keys[layer].data(), key_shape}, {values[layer].data(), value_shape}).value();
    }
    std::vector<std::size_t> done;
    model
        .initialize(serial,
                    [&](const rvqkv::training_progress& at) {
                        CHECK(at.total == 2 * (2 + 3) * 3);
                        done.push_back(at.done);
                        return true;
                    })
        .value();
    REQUIRE(done.size() == 30);
    for (std::size_t i = 0; i < done.size(); ++i) {
        CHECK(done[i] == i + 1);
    }
    for (const std::size_t layer : {2U, 7U}) {
        static_cast<void>(
            model.accumulate(layer, {keys[layer].data(), key_shape}, {values[layer].data(), value_shape}, {}, serial)
                .value());
    }
    model.step().value();
    const rvqkv::model_codecs codecs = model.make().value();
    REQUIRE(codecs.size() == 2);

    auto alone = rvqkv::codebook_trainer::create(layer_config(2).value).value();
    alone.observe({values[7].data(), value_shape}).value();
    alone.initialize(serial).value();
    static_cast<void>(alone.accumulate({values[7].data(), value_shape}, {}, serial).value());
    alone.step().value();
    CHECK(alone.state() == model.layers().at(7).value.state());
    CHECK(codecs.at(7).value->shape() == rvqkv::codebook_shape{3, 8, 6});
    CHECK(codecs.at(2).key->head_dim() == 8);
}

TEST_CASE("model_trainer: initialization stops when asked and goes on when called again", "[learn][unit]") {
    test::random_source random(42);
    const rvqkv::serial_executor serial;
    const auto make = [&] {
        return rvqkv::model_trainer::create({{0, layer_config(1)}, {1, layer_config(2)}}).value();
    };
    const std::vector<float> keys = test::gaussian_numbers(random, 200 * 2 * 8);
    const std::vector<float> values = test::gaussian_numbers(random, 200 * 3 * 12);
    auto straight = make();
    auto broken = make();
    for (auto* model : {&straight, &broken}) {
        for (const std::size_t layer : {0U, 1U}) {
            model->observe(layer, {keys.data(), key_shape}, {values.data(), value_shape}).value();
        }
    }
    straight.initialize(serial).value();
    std::size_t calls = 0;
    while (!broken.layers().at(1).value.initialized()) {
        broken.initialize(serial, [](const rvqkv::training_progress&) { return false; }).value();
        REQUIRE(++calls < 20);
    }
    CHECK(calls == 2 * (2 + 3));
    for (const std::size_t layer : {0U, 1U}) {
        CHECK(broken.layers().at(layer).key.state() == straight.layers().at(layer).key.state());
        CHECK(broken.layers().at(layer).value.state() == straight.layers().at(layer).value.state());
    }
}

TEST_CASE("model_trainer: errors name layer and side", "[learn][unit]") {
    const rvqkv::serial_executor serial;
    rvqkv::layer_trainer_config wrong = layer_config(1);
    wrong.value.spec.shape.dim = 5;
    CHECK(rvqkv::model_trainer::create({{3, wrong}}).error().message.find("layer 3, value: group_dim is 5") !=
          std::string::npos);
    auto model = rvqkv::model_trainer::create({{3, layer_config(1)}}).value();
    const std::vector<float> x(200 * 3 * 12);
    CHECK(model.observe(4, {x.data(), key_shape}, {x.data(), value_shape}).error().message.find("layer 4") !=
          std::string::npos);
    CHECK(model.observe(3, {x.data(), value_shape}, {x.data(), value_shape}).error().message.find("layer 3, key") !=
          std::string::npos);
    CHECK(model.initialize(serial).error().message.find("layer 3, key") != std::string::npos);
    CHECK(model.make().error().message.find("layer 3, key") != std::string::npos);
    CHECK(model.step().error().message.find("layer 3, key") != std::string::npos);
    CHECK(!model.accumulate(9, {x.data(), key_shape}, {x.data(), value_shape}, {}, serial).ok());
}
