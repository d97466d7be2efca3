// SPDX-License-Identifier: MIT
#include "rvqkv/core/thread_pool.hpp"
#include "rvqkv/learn/codebook_trainer.hpp"
#include "support/allocation_counter.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

namespace {

constexpr rvqkv::tensor_shape shape{300, 2, 16};

rvqkv::trainer_config small_config() {
    rvqkv::trainer_config config;
    config.spec.head_dim = 16;
    config.spec.shape = {4, 32, 4};
    config.kmeans.iterations = 5;
    config.sample = 800;
    config.seed = 5;
    return config;
}

/// Channels that depend on each other and on the head, as real keys do: something to learn.
std::vector<float> correlated(test::random_source& random) {
    std::vector<float> x(shape.tokens * shape.heads * shape.channels);
    for (std::size_t row = 0; row < shape.tokens * shape.heads; ++row) {
        const float a = random.gaussian();
        const float b = random.gaussian();
        for (std::size_t c = 0; c < shape.channels; ++c) {
            x[row * shape.channels + c] = a * static_cast<float>(c % 3) + b * static_cast<float>(c % 5) +
                                          0.3F * random.gaussian() + static_cast<float>(row % 2);
        }
    }
    return x;
}

double relative_error(const rvqkv::codec& codec, const std::vector<float>& x) {
    const std::size_t rows = shape.tokens * shape.heads;
    std::vector<rvqkv::code_t> codes(rows * codec.groups() * codec.depths());
    std::vector<float> scales(rows);
    std::vector<float> y(x.size());
    rvqkv::quantizer_workspace workspace;
    codec.encode({x.data(), shape}, {codes.data(), {codec.depths(), 1}, scales.data()}, workspace).value();
    codec.decode({codes.data(), {codec.depths(), 1}, scales.data()}, {y.data(), shape}, codec.depths(), workspace)
        .value();
    double error = 0.0;
    double energy = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
        error += std::pow(static_cast<double>(x[i] - y[i]), 2);
        energy += std::pow(static_cast<double>(x[i]), 2);
    }
    return error / energy;
}

rvqkv::codebook_trainer initialized(const std::vector<float>& x, const rvqkv::trainer_config& config,
                                    std::size_t threads = 1) {
    const rvqkv::thread_pool pool(threads);
    auto trainer = rvqkv::codebook_trainer::create(config).value();
    trainer.observe({x.data(), shape}).value();
    trainer.initialize(pool).value();
    return trainer;
}

}  // namespace

TEST_CASE("codebook_trainer: k-means codecs are better with each depth, EMA refines them", "[learn][property]") {
    CAPTURE(test::seed());
    test::random_source random(31);
    const std::vector<float> train = correlated(random);
    const std::vector<float> held_out = correlated(random);
    rvqkv::trainer_config config = small_config();
    double before = 1.0;
    for (const std::size_t depths : {1U, 2U, 4U, 6U}) {
        config.spec.shape.depths = depths;
        const double error = relative_error(*initialized(train, config).make().value(), held_out);
        CHECK(error < 0.9 * before);
        before = error;
    }
    rvqkv::codebook_trainer trainer = initialized(train, config);
    double first_loss = 0.0;
    double last_loss = 0.0;
    for (int step = 0; step < 20; ++step) {
        last_loss = trainer.accumulate({train.data(), shape}, {}, rvqkv::serial_executor()).value().commitment_loss;
        first_loss = step == 0 ? last_loss : first_loss;
        trainer.step().value();
    }
    CHECK(last_loss < first_loss);
    CHECK(trainer.steps() == 20);
    CHECK(relative_error(*trainer.make().value(), held_out) < 1.02 * before);
}

TEST_CASE("codebook_trainer: the sample is bounded and drawn from everything observed", "[learn][property]") {
    CAPTURE(test::seed());
    rvqkv::trainer_config config = small_config();
    config.spec.scale = rvqkv::scale_kind::none;
    config.spec.head_dim = 4;
    config.spec.shape = {1, 8, 4};
    config.sample = 500;
    auto trainer = rvqkv::codebook_trainer::create(config).value();
    for (int call = 0; call < 10; ++call) {
        std::vector<float> x(1000 * 4);
        for (std::size_t i = 0; i < x.size(); ++i) {
            const std::size_t vector = i / 4;
            x[i] = static_cast<float>(call * 1000) + static_cast<float>(vector);
        }
        trainer.observe({x.data(), {1000, 1, 4}}).value();
    }
    CHECK(trainer.observed() == 10000);
    const std::vector<float> sample = trainer.state().sample;
    REQUIRE(sample.size() == 500 * 4);
    std::vector<int> from_call(10, 0);
    std::set<float> distinct;
    for (std::size_t i = 0; i < sample.size(); i += 4) {
        ++from_call.at(static_cast<std::size_t>(sample[i] / 1000.0F));
        distinct.insert(sample[i]);
    }
    CHECK(distinct.size() == 500);  // drawn without replacement
    for (const int count : from_call) {
        CHECK(count > 20);  // 50 expected, standard deviation 6.5
        CHECK(count < 80);
    }
}

TEST_CASE("codebook_trainer: initialization gives the memory of the sample back", "[learn][unit]") {
    test::random_source random(36);
    const std::vector<float> x = correlated(random);
    rvqkv::trainer_config config = small_config();
    config.sample = 100000;
    auto trainer = rvqkv::codebook_trainer::create(config).value();
    trainer.observe({x.data(), shape}).value();
    const test::allocation_counter counter;
    trainer.initialize(rvqkv::serial_executor()).value();
    const auto sample_bytes = static_cast<std::ptrdiff_t>(config.sample * config.spec.shape.dim * sizeof(float));
    CHECK(counter.live_bytes() < -sample_bytes / 2);
}

TEST_CASE("codebook_trainer: deterministic by seed at any number of threads", "[learn][threads]") {
    test::random_source random(32);
    const std::vector<float> x = correlated(random);
    rvqkv::trainer_config config = small_config();
    const rvqkv::trainer_state once = initialized(x, config, 1).state();
    auto fresh = rvqkv::codebook_trainer::create(config).value();
    fresh.observe({x.data(), shape}).value();
    CHECK(once.random != fresh.state().random);  // each depth draws numbers of its own
    CHECK(initialized(x, config, 3).state() == once);
    config.seed = 6;
    CHECK(!(initialized(x, config, 1).state() == once));
}

TEST_CASE("codebook_trainer: saved and resumed anywhere, it goes on as without the break", "[learn][property]") {
    test::random_source random(33);
    const std::vector<float> x = correlated(random);
    const rvqkv::trainer_config config = small_config();
    const rvqkv::serial_executor serial;
    const auto train = [&](bool breaks) {
        auto trainer = rvqkv::codebook_trainer::create(config).value();
        const auto pause = [&] {
            if (breaks) {
                trainer = rvqkv::codebook_trainer::resume(config, trainer.state()).value();
            }
        };
        trainer.observe(rvqkv::tensor_view(x.data(), shape).slice_tokens(0, 150)).value();
        pause();
        trainer.observe(rvqkv::tensor_view(x.data(), shape).slice_tokens(150, 150)).value();
        pause();
        std::size_t calls = 0;
        while (!trainer.initialized()) {  // asked to stop after every depth
            trainer.initialize(serial, [&](const rvqkv::training_progress&) { return !breaks; }).value();
            ++calls;
            pause();
        }
        CHECK(calls == (breaks ? config.spec.shape.depths : 1));
        for (int step = 0; step < 3; ++step) {
            static_cast<void>(trainer.accumulate({x.data(), shape}, {}, serial).value());
            pause();
            trainer.step().value();
            pause();
        }
        return trainer.state();
    };
    CHECK(train(true) == train(false));
}

TEST_CASE("codebook_trainer: masked tokens are not learned from, non-finite values are counted", "[learn][unit]") {
    test::random_source random(34);
    const rvqkv::trainer_config config = small_config();
    const rvqkv::serial_executor serial;
    std::vector<float> x = correlated(random);
    rvqkv::codebook_trainer masked = initialized(x, config);
    rvqkv::codebook_trainer without = initialized(x, config);
    std::vector<std::uint8_t> mask(shape.tokens, 1);
    std::fill(mask.begin() + 200, mask.end(), std::uint8_t{0});
    const auto report = masked.accumulate({x.data(), shape}, mask, serial).value();
    const auto part = without.accumulate(rvqkv::tensor_view(x.data(), shape).slice_tokens(0, 200), {}, serial).value();
    CHECK(report.tokens == 200);
    CHECK(report.commitment_loss == part.commitment_loss);
    CHECK(masked.state() == without.state());

    x[40] = std::numeric_limits<float>::quiet_NaN();
    x[4000] = std::numeric_limits<float>::infinity();
    CHECK(masked.accumulate({x.data(), shape}, {}, serial).value().nonfinite_values == 2);
    masked.step().value();
    CHECK(masked.make().ok());

    auto observer = rvqkv::codebook_trainer::create(config).value();
    observer.observe({x.data(), shape}, mask).value();
    CHECK(observer.observed() == 200 * shape.heads * 4);
}

TEST_CASE("codebook_trainer: what is called too early, too late or with the wrong shape is refused", "[learn][unit]") {
    test::random_source random(35);
    const std::vector<float> x = correlated(random);
    const rvqkv::serial_executor serial;
    rvqkv::trainer_config config = small_config();
    auto trainer = rvqkv::codebook_trainer::create(config).value();
    const rvqkv::tensor_view view(x.data(), shape);
    CHECK(!trainer.accumulate(view, {}, serial).ok());
    CHECK(!trainer.step().ok());
    CHECK(!trainer.make().ok());
    CHECK(trainer.observe({x.data(), {10, 2, 8}}).error().message.find("8 channels") != std::string::npos);
    const std::vector<std::uint8_t> mask(3, 1);
    CHECK(trainer.observe(view, mask).error().message.find("3 entries") != std::string::npos);
    CHECK(trainer.initialize(serial).error().message.find("training vectors") != std::string::npos);
    CHECK(trainer.observed() == 0);
    trainer.observe(view).value();
    trainer.initialize(serial).value();
    CHECK(!trainer.initialize(serial).ok());
    CHECK(!trainer.observe(view).ok());
    CHECK(!trainer.accumulate({x.data(), {10, 2, 8}}, {}, serial).ok());

    config.sample = 31;
    CHECK(rvqkv::codebook_trainer::create(config).error().message.find("sample is 31") != std::string::npos);
    config.sample = (std::size_t{1} << 30U) + 1;
    CHECK(rvqkv::codebook_trainer::create(config).error().message.find("at most 1073741824") != std::string::npos);
    config = small_config();
    config.spec.shape.dim = 5;
    CHECK(rvqkv::codebook_trainer::create(config).error().message.find("group_dim is 5") != std::string::npos);

    rvqkv::trainer_state state = trainer.state();
    state.depths_done = 9;
    CHECK(!rvqkv::codebook_trainer::resume(small_config(), state).ok());
    state = trainer.state();
    state.depths_done = 2;
    CHECK(!rvqkv::codebook_trainer::resume(small_config(), state).ok());
    state = {};
    state.sample = {1.0F, 2.0F};
    CHECK(!rvqkv::codebook_trainer::resume(small_config(), state).ok());
    state.sample = {1.0F, 2.0F, 3.0F, 0.0F};
    state.observed = 2;  // one vector is missing
    CHECK(rvqkv::codebook_trainer::resume(small_config(), state).error().message.find("must hold 8") !=
          std::string::npos);
    state.observed = 1;
    CHECK(rvqkv::codebook_trainer::resume(small_config(), state).ok());
    state.sample[2] = std::numeric_limits<float>::quiet_NaN();
    CHECK(!rvqkv::codebook_trainer::resume(small_config(), state).ok());
}
