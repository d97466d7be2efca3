// SPDX-License-Identifier: MIT
#include "rvqkv/core/thread_pool.hpp"
#include "rvqkv/learn/ema_trainer.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace {

constexpr rvqkv::codebook_shape shape{3, 17, 6};

bool close(const std::vector<float>& a, const std::vector<float>& b) {
    if (a.size() != b.size()) {
        return false;
    }
    for (std::size_t i = 0; i < a.size(); ++i) {
        if (!(std::fabs(a[i] - b[i]) <= 1e-6F + 1e-5F * std::fabs(b[i]))) {
            UNSCOPED_INFO("value " << i << ": " << a[i] << " for " << b[i]);
            return false;
        }
    }
    return true;
}

rvqkv::ema_trainer make(const std::vector<float>& weights, const rvqkv::ema_config& config = {}) {
    return rvqkv::ema_trainer::create(shape, weights, config).value();
}

}  // namespace

TEST_CASE("ema_trainer: follows the plain reference through micro-batches and steps", "[learn][differential]") {
    CAPTURE(test::seed());
    test::random_source random(21);
    const std::vector<float> weights = test::gaussian_numbers(random, shape.size());
    const rvqkv::ema_config config{0.9, 1e-3, 100.0, 0.0};
    rvqkv::ema_trainer trainer = make(weights, config);
    reference::ema expected({shape.depths, shape.codewords, shape.dim, weights, false}, 0.9F, 1e-3F);
    const rvqkv::serial_executor serial;
    for (int step = 0; step < 4; ++step) {
        for (int batch = 0; batch < 3; ++batch) {
            constexpr std::size_t rows = 71;
            std::vector<float> x = test::gaussian_numbers(random, rows * shape.dim);
            std::vector<std::uint8_t> mask(rows);
            std::vector<reference::encoded> counted;
            std::vector<reference::encoded> all;
            for (std::size_t i = 0; i < rows; ++i) {
                mask[i] = static_cast<std::uint8_t>(random.integer(0, 3) != 0);
                all.push_back(reference::encode(x.data() + i * shape.dim, expected.book));
                if (mask[i] != 0) {
                    counted.push_back(all.back());
                }
            }
            expected.accumulate(counted);
            std::vector<float> losses(rows);
            std::vector<rvqkv::code_t> codes(rows * shape.depths);
            trainer.accumulate({x.data(), rows, shape.dim}, mask, losses, serial, codes);
            for (std::size_t i = 0; i < rows; ++i) {
                double loss = 0.0;
                for (std::size_t depth = 0; depth < shape.depths; ++depth) {
                    REQUIRE(codes[i * shape.depths + depth] == all[i].codes[depth]);
                    for (std::size_t j = 0; j < shape.dim; ++j) {
                        const float left =
                            depth + 1 < shape.depths ? all[i].inputs[(depth + 1) * shape.dim + j] : all[i].residual[j];
                        loss += static_cast<double>(left) * static_cast<double>(left) / shape.dim;
                    }
                }
                CHECK(static_cast<double>(losses[i]) == Approx(loss).epsilon(1e-5));
                for (std::size_t j = 0; j < shape.dim; ++j) {
                    REQUIRE(x[i * shape.dim + j] == all[i].residual[j]);
                }
            }
        }
        trainer.step().value();
        expected.step();
        CHECK(close(trainer.state().cluster_sizes, expected.sizes));
        CHECK(close(trainer.state().embedding_sums, expected.sums));
        CHECK(close(trainer.state().weights, expected.book.weights));
        expected.book.weights = trainer.state().weights;  // differences in rounding must not decide a near tie
    }
}

TEST_CASE("ema_trainer: accumulation changes no weight before the step", "[learn][unit]") {
    test::random_source random(22);
    const std::vector<float> weights = test::gaussian_numbers(random, shape.size());
    rvqkv::ema_trainer trainer = make(weights);
    std::vector<float> x = test::gaussian_numbers(random, 50 * shape.dim);
    trainer.accumulate({x.data(), 50, shape.dim}, {}, {}, rvqkv::serial_executor());
    CHECK(trainer.state().weights == weights);
    trainer.step().value();
    CHECK(trainer.state().weights != weights);
}

TEST_CASE("ema_trainer: the same state at any number of threads, and after a break", "[learn][threads]") {
    CAPTURE(test::seed());
    test::random_source random(23);
    const std::vector<float> weights = test::gaussian_numbers(random, shape.size());
    std::vector<std::vector<float>> batches(4);
    for (std::vector<float>& batch : batches) {
        batch = test::gaussian_numbers(random, 5000 * shape.dim);
    }
    const auto train = [&](std::size_t threads, bool with_break) {
        const rvqkv::thread_pool pool(threads);
        rvqkv::ema_trainer trainer = make(weights);
        for (std::size_t i = 0; i < batches.size(); ++i) {
            std::vector<float> x = batches[i];
            trainer.accumulate({x.data(), 5000, shape.dim}, {}, {}, pool);
            if (with_break) {  // also between a micro-batch and its step
                trainer = rvqkv::ema_trainer::resume(shape, trainer.state(), trainer.config()).value();
            }
            if (i % 2 == 1) {
                trainer.step().value();
            }
        }
        return trainer.state();
    };
    const rvqkv::ema_state once = train(1, false);
    CHECK(train(3, false) == once);
    CHECK(train(1, true) == once);
}

TEST_CASE("ema_trainer: a step to weights that are not finite leaves everything as it was", "[learn][unit]") {
    test::random_source random(25);
    const std::vector<float> weights = test::gaussian_numbers(random, shape.size());
    rvqkv::ema_trainer trainer = make(weights);
    std::vector<float> x = test::gaussian_numbers(random, 50 * shape.dim);
    x[7] = std::numeric_limits<float>::quiet_NaN();
    trainer.accumulate({x.data(), 50, shape.dim}, {}, {}, rvqkv::serial_executor());
    const rvqkv::ema_state before = trainer.state();
    const rvqkv::status done = trainer.step();
    REQUIRE_FALSE(done.ok());
    CHECK(done.error().code == rvqkv::error_code::invalid_argument);
    CHECK(trainer.state().weights == before.weights);
    CHECK(trainer.state().cluster_sizes == before.cluster_sizes);
    CHECK(test::bits_of(trainer.state().embedding_sums) == test::bits_of(before.embedding_sums));
    CHECK(std::equal(weights.begin(), weights.end(), trainer.codebook().weights().begin()));
}

TEST_CASE("ema_trainer: masked vectors leave no trace", "[learn][unit]") {
    test::random_source random(24);
    const std::vector<float> weights = test::gaussian_numbers(random, shape.size());
    rvqkv::ema_trainer masked = make(weights);
    rvqkv::ema_trainer without = make(weights);
    std::vector<float> x = test::gaussian_numbers(random, 40 * shape.dim);
    std::vector<float> half(x.begin(), x.begin() + 20 * static_cast<std::ptrdiff_t>(shape.dim));
    std::vector<std::uint8_t> mask(40, 0);
    std::fill(mask.begin(), mask.begin() + 20, std::uint8_t{1});
    masked.accumulate({x.data(), 40, shape.dim}, mask, {}, rvqkv::serial_executor());
    without.accumulate({half.data(), 20, shape.dim}, {}, {}, rvqkv::serial_executor());
    CHECK(masked.state() == without.state());
}

TEST_CASE("ema_trainer: weights are clamped", "[learn][unit]") {
    const std::vector<float> weights(shape.size(), 3.0F);
    rvqkv::ema_trainer trainer = make(weights, {0.99, 1e-5, 2.0, 0.0});
    trainer.step().value();
    for (const float weight : trainer.state().weights) {
        REQUIRE(weight == 2.0F);
    }
}

TEST_CASE("ema_trainer: dead codewords are revived from the largest cluster, only when asked", "[learn][unit]") {
    constexpr rvqkv::codebook_shape small{1, 4, 2};
    // Codeword 3 is far from everything.
    const std::vector<float> weights = {1, 1, -1, -1, 1, -1, 90, 90};
    std::vector<float> data;
    for (int i = 0; i < 400; ++i) {  // most vectors choose codeword 0
        data.insert(data.end(), {1.0F, i % 8 == 0 ? -1.0F : 1.0F});
    }
    for (const double threshold : {0.0, 0.9}) {
        CAPTURE(threshold);
        auto trainer = rvqkv::ema_trainer::create(small, weights, {0.5, 1e-5, 100.0, threshold}).value();
        for (int step = 0; step < 3; ++step) {
            std::vector<float> x = data;
            trainer.accumulate({x.data(), 400, 2}, {}, {}, rvqkv::serial_executor());
            trainer.step().value();
        }
        const bool moved = std::fabs(trainer.state().weights[6]) < 3.0F;
        CHECK(moved == (threshold > 0.0));
        double total = 0.0;
        for (const float size : trainer.state().cluster_sizes) {
            CHECK(size >= static_cast<float>(threshold > 0.0 ? 0.1 : 0.0));
            total += static_cast<double>(size);
        }
        constexpr double all = 4 * 0.125 + 400 * (0.5 + 0.25 + 0.125);
        CHECK(total <= all + 1e-3);  // reviving moves vectors, it never adds any; what the dead had is dropped
        CHECK(total >= all - 1.0);
    }
}

TEST_CASE("ema_trainer: refuses configurations and states that make no sense", "[learn][unit]") {
    const std::vector<float> weights(shape.size(), 1.0F);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const auto refused = [&](const rvqkv::ema_config& config, const char* field) {
        const auto made = rvqkv::ema_trainer::create(shape, weights, config);
        return !made.ok() && made.error().message.find(field) != std::string::npos;
    };
    CHECK(refused({0.0, 1e-5, 100, 0}, "decay"));
    CHECK(refused({1.0, 1e-5, 100, 0}, "decay"));
    CHECK(refused({nan, 1e-5, 100, 0}, "decay"));
    CHECK(refused({0.9, 0.0, 100, 0}, "epsilon"));
    CHECK(refused({0.9, 1e-5, -1, 0}, "clamp"));
    CHECK(refused({0.9, 1e-5, 100, -1}, "revive_below"));

    rvqkv::ema_state state = make(weights).state();
    state.cluster_sizes[3] = -1.0F;
    CHECK(rvqkv::ema_trainer::resume(shape, state).error().message.find("cluster_sizes 3") != std::string::npos);
    state.cluster_sizes.pop_back();
    CHECK(!rvqkv::ema_trainer::resume(shape, state).ok());
    state = make(weights).state();
    state.embedding_sums[0] = std::numeric_limits<float>::infinity();
    CHECK(!rvqkv::ema_trainer::resume(shape, state).ok());
    CHECK(!rvqkv::ema_trainer::create(shape, std::vector<float>(5, 1.0F)).ok());
}
