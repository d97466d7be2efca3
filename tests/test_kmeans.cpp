// SPDX-License-Identifier: MIT
#include "rvqkv/core/thread_pool.hpp"
#include "rvqkv/learn/kmeans.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cstddef>
#include <set>
#include <span>
#include <string>
#include <vector>

namespace {

using rvqkv::kmeans_start;

double mean_squared_error(const std::vector<float>& x, const std::vector<float>& centroids, std::size_t dim) {
    double total = 0.0;
    for (std::size_t i = 0; i < x.size(); i += dim) {
        double best = 1e300;
        for (std::size_t c = 0; c < centroids.size(); c += dim) {
            double squared = 0.0;
            for (std::size_t j = 0; j < dim; ++j) {
                const double difference = static_cast<double>(x[i + j]) - static_cast<double>(centroids[c + j]);
                squared += difference * difference;
            }
            best = std::min(best, squared);
        }
        total += best;
    }
    return total / static_cast<double>(x.size());
}

struct outcome {
    std::vector<float> centroids;
    rvqkv::kmeans_report report;
};

outcome run(const std::vector<float>& x, std::size_t dim, std::size_t codewords, const rvqkv::kmeans_config& config,
            std::uint64_t seed = 3, std::size_t threads = 1) {
    const rvqkv::thread_pool pool(threads);
    rvqkv::random_source random(seed);
    outcome out;
    out.centroids.resize(codewords * dim);
    out.report = rvqkv::kmeans({x.data(), x.size() / dim, dim}, codewords, out.centroids, config, random, pool).value();
    return out;
}

}  // namespace

TEST_CASE("kmeans: finds well separated clusters exactly", "[learn][unit]") {
    const kmeans_start start = GENERATE(kmeans_start::sampled, kmeans_start::plus_plus);
    CAPTURE(rvqkv::name_of(start));
    std::vector<float> x;
    for (int copy = 0; copy < 30; ++copy) {
        for (const float centre : {-100.0F, 0.0F, 100.0F, 200.0F}) {
            x.push_back(centre + static_cast<float>(copy % 3) - 1.0F);
            x.push_back(-centre);
        }
    }
    // Sampled points may start two codewords in one cluster, which Lloyd's algorithm cannot mend: the best of seeds.
    double best = 1e300;
    std::vector<float> centroids;
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
        const outcome found = run(x, 2, 4, {20, start}, seed);
        if (found.report.mean_squared_error < best) {
            best = found.report.mean_squared_error;
            centroids = found.centroids;
        }
    }
    std::vector<float> firsts = {centroids[0], centroids[2], centroids[4], centroids[6]};
    std::sort(firsts.begin(), firsts.end());
    CHECK(firsts == std::vector<float>{-100.0F, 0.0F, 100.0F, 200.0F});
    CHECK(best == Approx(2.0 / 3.0 / 2.0));
}

TEST_CASE("kmeans: sampled points are distinct vectors", "[learn][unit]") {
    std::vector<float> x(40);
    for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = static_cast<float>(i);
    }
    for (const std::size_t codewords : {1U, 20U, 40U}) {
        const outcome found = run(x, 1, codewords, {0, kmeans_start::sampled});
        CHECK(std::set<float>(found.centroids.begin(), found.centroids.end()).size() == codewords);
    }
}

TEST_CASE("kmeans: every iteration lowers the error, and the report tells it", "[learn][property]") {
    CAPTURE(test::seed());
    test::random_source random(11);
    const std::vector<float> x = test::gaussian_numbers(random, 3000 * 6);
    double before = 1e300;
    for (const std::size_t iterations : {1U, 2U, 4U, 8U, 16U}) {
        const outcome found = run(x, 6, 40, {iterations, kmeans_start::sampled});
        const double after = mean_squared_error(x, found.centroids, 6);
        CHECK(after <= found.report.mean_squared_error + 1e-9);  // the report is of the assignment before the update
        CHECK(after < before);
        before = after;
    }
}

TEST_CASE("kmeans: reports the error of its last assignment", "[learn][differential]") {
    CAPTURE(test::seed());
    test::random_source random(14);
    std::vector<float> x = test::gaussian_numbers(random, 2000 * 7);
    for (float& value : x) {
        value += 30.0F;  // most of the sums of squares that the error is a difference of
    }
    // The same seed makes the same steps: one iteration less ends with the centroids of the last assignment.
    for (const std::size_t iterations : {1U, 2U, 5U}) {
        const outcome before = run(x, 7, 30, {iterations - 1, kmeans_start::sampled});
        const outcome found = run(x, 7, 30, {iterations, kmeans_start::sampled});
        CHECK(found.report.mean_squared_error == Approx(mean_squared_error(x, before.centroids, 7)).epsilon(1e-6));
    }
}

TEST_CASE("kmeans: k-means++ starts better than sampled points on clustered data", "[learn][property]") {
    CAPTURE(test::seed());
    test::random_source random(12);
    std::vector<float> x;
    for (std::size_t i = 0; i < 4000; ++i) {  // clusters of very different sizes, which uniform samples miss
        const std::size_t cluster =
            std::min<std::size_t>(static_cast<std::size_t>(std::abs(random.gaussian()) * 8), 31);
        for (std::size_t j = 0; j < 4; ++j) {
            x.push_back(static_cast<float>((cluster * (j + 3)) % 32) * 10.0F + 0.1F * random.gaussian());
        }
    }
    double sampled = 0.0;
    double plus_plus = 0.0;
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
        sampled += run(x, 4, 32, {1, kmeans_start::sampled}, seed).report.mean_squared_error;
        plus_plus += run(x, 4, 32, {1, kmeans_start::plus_plus}, seed).report.mean_squared_error;
    }
    CHECK(plus_plus < 0.8 * sampled);
}

TEST_CASE("kmeans: the same centroids for a seed at any number of threads, others for another", "[learn][threads]") {
    CAPTURE(test::seed());
    test::random_source random(13);
    const std::vector<float> x = test::gaussian_numbers(random, 6000 * 4);
    const kmeans_start start = GENERATE(kmeans_start::sampled, kmeans_start::plus_plus);
    const outcome once = run(x, 4, 64, {5, start}, 9, 1);
    CHECK(run(x, 4, 64, {5, start}, 9, 1).centroids == once.centroids);
    CHECK(run(x, 4, 64, {5, start}, 9, 3).centroids == once.centroids);
    CHECK(run(x, 4, 64, {5, start}, 10, 1).centroids != once.centroids);
}

TEST_CASE("kmeans: codewords without vectors are placed anew", "[learn][unit]") {
    // 200 copies of one point and 56 others: sampled starts hit the copies many times, and of equal codewords only the
    // first gets vectors.
    std::vector<float> x(200, 1.0F);
    for (int i = 0; i < 56; ++i) {
        x.push_back(10.0F + static_cast<float>(i));
    }
    const outcome found = run(x, 1, 57, {40, kmeans_start::sampled});
    CHECK(found.report.reseeded > 0);
    CHECK(found.report.mean_squared_error < 1e-3);  // nearly every distinct point got its codeword
    CHECK(std::set<float>(found.centroids.begin(), found.centroids.end()).size() >= 56);
}

TEST_CASE("kmeans: fewer distinct vectors than codewords leaves no error and no NaN", "[learn][unit]") {
    const std::vector<float> x(64, 0.5F);
    const outcome found = run(x, 2, 8, {5, GENERATE(kmeans_start::sampled, kmeans_start::plus_plus)});
    CHECK(found.report.mean_squared_error == 0.0);
    CHECK(std::all_of(found.centroids.begin(), found.centroids.end(), [](float v) { return v == 0.5F; }));
}

TEST_CASE("kmeans: refuses what it cannot do, and says so", "[learn][unit]") {
    const std::vector<float> x(10 * 4, 1.0F);
    const rvqkv::serial_executor serial;
    rvqkv::random_source random(1);
    std::vector<float> centroids(16 * 4, 7.0F);
    const auto few = rvqkv::kmeans({x.data(), 10, 4}, 16, centroids, {}, random, serial);
    REQUIRE(!few.ok());
    CHECK(few.error().code == rvqkv::error_code::invalid_argument);
    CHECK(few.error().message.find("10 training vectors for 16 codewords") != std::string::npos);
    CHECK(centroids == std::vector<float>(16 * 4, 7.0F));
    const auto size = rvqkv::kmeans({x.data(), 10, 4}, 8, centroids, {}, random, serial);
    REQUIRE(!size.ok());
    CHECK(size.error().message.find("64") != std::string::npos);
    CHECK(!rvqkv::kmeans({x.data(), 10, 4}, 0, {}, {}, random, serial).ok());
}

TEST_CASE("kmeans: progress counts up and can stop it", "[learn][unit]") {
    const std::vector<float> x(100, 1.0F);
    const rvqkv::serial_executor serial;
    rvqkv::random_source random(1);
    std::vector<float> centroids(4);
    std::vector<std::size_t> seen;
    static_cast<void>(rvqkv::kmeans({x.data(), 100, 1}, 4, centroids, {10, kmeans_start::sampled}, random, serial,
                                    [&](const rvqkv::training_progress& at) {
                                        CHECK(at.total == 10);
                                        seen.push_back(at.done);
                                        return at.done < 3;
                                    })
                          .value());
    CHECK(seen == std::vector<std::size_t>{1, 2, 3});
}
