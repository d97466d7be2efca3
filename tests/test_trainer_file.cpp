// SPDX-License-Identifier: MIT
/// @file
/// Trainer files: training that was saved and loaded goes on as if it had never stopped.
#include "rvqkv/files/trainer_file.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/temp_dir.hpp"

#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

namespace {

using rvqkv::error_code;
using rvqkv::model_trainer;
using rvqkv::storage_type;

std::span<const std::byte> bytes_of(std::string_view text) {
    return std::as_bytes(std::span<const char>(text));
}

constexpr rvqkv::tensor_shape key_shape = {60, 2, 8};
constexpr rvqkv::tensor_shape value_shape = {60, 1, 6};

rvqkv::layer_trainer_config make_config(std::uint64_t seed) {
    rvqkv::layer_trainer_config config;
    config.key.spec.head_dim = 8;
    config.key.spec.shape = {3, 5, 4};
    config.key.sample = 70;  // fewer than are observed
    config.key.seed = ~seed;
    config.key.ema.decay = 0.1 + 0.2;  // a number that a rounded decimal would lose
    config.value.spec.head_dim = 6;
    config.value.spec.shape = {2, 4, 3};
    config.value.spec.grouping = rvqkv::grouping_kind::permuted;
    config.value.spec.permutation = {5, 3, 1, 4, 2, 0};
    config.value.spec.scale = rvqkv::scale_kind::l2_norm;
    config.value.spec.weight_type = rvqkv::dtype::bfloat16;
    config.value.spec.metric = rvqkv::distance::cosine;
    config.value.kmeans.start = rvqkv::kmeans_start::plus_plus;
    config.value.kmeans.iterations = 3;
    config.value.ema.revive_below = 1e-3;
    config.value.seed = seed;
    return config;
}

/// Training in steps that can be counted, so that it can be cut anywhere: two rounds of observing, k-means depth by
/// depth, two rounds of two micro-batches and an update.
class plan {
public:
    plan() {
        test::random_source random(5);
        for (int round = 0; round < 4; ++round) {
            keys_.push_back(test::gaussian_numbers(random, 60 * 2 * 8));
            values_.push_back(test::gaussian_numbers(random, 60 * 6));
        }
    }

    static constexpr std::size_t observing = 2;
    static constexpr std::size_t all = observing + 2 * (3 + 2) + 6;  // k-means: two layers, depths 3 and 2

    void run(model_trainer& trainer, std::size_t step) const {
        const rvqkv::serial_executor serial;
        const auto keys = [this](std::size_t i) { return rvqkv::tensor_view(keys_[i].data(), key_shape); };
        const auto values = [this](std::size_t i) { return rvqkv::tensor_view(values_[i].data(), value_shape); };
        if (step < observing) {
            for (const std::size_t layer : {2U, 30U}) {
                trainer.observe(layer, keys(step), values(step)).value();
            }
        } else if (step < all - 6) {
            trainer.initialize(serial, [](const rvqkv::training_progress&) { return false; }).value();
        } else if (step % 3 == (all - 1) % 3) {
            trainer.step().value();
        } else {
            for (const std::size_t layer : {2U, 30U}) {
                static_cast<void>(trainer.accumulate(layer, keys(step % 4), values(step % 4), {}, serial).value());
            }
        }
    }

private:
    std::vector<std::vector<float>> keys_;
    std::vector<std::vector<float>> values_;
};

model_trainer make_trainer() {
    return model_trainer::create({{2, make_config(7)}, {30, make_config(8)}}).value();
}

void check_equal(const model_trainer& a, const model_trainer& b) {
    REQUIRE(a.layers().size() == b.layers().size());
    for (const auto& layer : a.layers()) {
        const auto& other = b.layers().at(layer.first);
        CHECK(layer.second.key.config() == other.key.config());
        CHECK(layer.second.value.config() == other.value.config());
        CHECK((layer.second.key.state() == other.key.state()));
        CHECK((layer.second.value.state() == other.value.state()));
    }
}

std::string saved(const model_trainer& trainer, const rvqkv::metadata_map& metadata = {}) {
    const test::temp_dir folder;
    rvqkv::save_training(folder.file("training"), trainer, metadata).value();
    return test::read_file(folder.file("training"));
}

/// A sealed file that says what it should not. Starts from a good one: one layer, keys in EMA training, values still
/// sampled.
struct forgery {
    rvqkv::metadata_map metadata;
    std::vector<rvqkv::tensor_info> tensors;
    std::vector<float> key_weights = {1, 2, 3, 4};
    std::vector<float> key_sizes = {1, 1};
    std::vector<float> key_sums = {1, 2, 3, 4};
    std::vector<float> value_sample = {5, 6};

    forgery() {
        const char* const spec =
            R"({"head_dim":2,"group_dim":2,"depths":1,"codewords":2,"scale":"rms","scale_type":"float16",)"
            R"("grouping":"strided","distance":"euclidean","weight_type":"float32"})";
        const char* const trainer =
            R"({"kmeans_iterations":10,"kmeans_start":"sampled","decay":0.99,"epsilon":1e-05,"clamp":100.0,)"
            R"("revive_below":0.0,"sample":9,"seed":1,"random":2,"observed":1,"steps":3,"depths_done":1,"sampled":0})";
        metadata = {{"layers.0.key", spec},
                    {"layers.0.value", spec},
                    {"layers.0.key.trainer", trainer},
                    {"layers.0.value.trainer", trainer}};
        change("value", "\"depths_done\":1,\"sampled\":0", "\"depths_done\":0,\"sampled\":1");
        tensors = {{"layers.0.key.weights", storage_type::float32, {1, 2, 2}},
                   {"layers.0.key.cluster_sizes", storage_type::float32, {1, 2}},
                   {"layers.0.key.embedding_sums", storage_type::float32, {1, 2, 2}},
                   {"layers.0.value.sample", storage_type::float32, {1, 2}}};
    }

    void change(const std::string& side, std::string_view from, std::string_view to) {
        std::string& json = metadata["layers.0." + side + ".trainer"];
        const std::size_t at = json.find(from);
        REQUIRE(at != std::string::npos);
        json.replace(at, from.size(), to);
    }

    /// What the reader says of it, after the file's name; "" when it takes it.
    [[nodiscard]] std::string message(std::string_view version = "1") const {
        const test::temp_dir folder;
        const std::string path = folder.file("forged");
        const std::vector<float>* const values[] = {&key_weights, &key_sizes, &key_sums, &value_sample};
        std::vector<rvqkv::detail::tensor_bytes> pieces;
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            pieces.push_back({tensors[i], std::as_bytes(std::span(*values[i]))});
        }
        rvqkv::detail::save_sealed(path, "rvqkv.trainer", version, metadata, std::move(pieces)).value();
        const auto loaded = rvqkv::load_training(path);
        if (loaded.ok()) {
            return "";
        }
        CHECK(loaded.error().code == (version == "1" ? error_code::damaged_file : error_code::unsupported));
        REQUIRE(loaded.error().message.find(path + ": ") == 0);
        return loaded.error().message.substr(path.size() + 2);
    }
};

std::string forged(const std::function<void(forgery&)>& change) {
    forgery made;
    change(made);
    return made.message();
}

}  // namespace

TEST_CASE("trainer_file: training cut at any moment goes on as if it had not been", "[files][learn][unit]") {
    const plan steps;
    auto straight = make_trainer();
    for (std::size_t step = 0; step < plan::all; ++step) {
        steps.run(straight, step);
    }
    REQUIRE(straight.layers().at(30).value.steps() == 2);
    auto cut = make_trainer();
    for (std::size_t step = 0; step < plan::all; ++step) {
        CAPTURE(step);
        const std::string raw = saved(cut);
        auto loaded = rvqkv::load_training(bytes_of(raw)).value().trainer;
        check_equal(loaded, cut);
        CHECK(saved(loaded) == raw);
        cut = std::move(loaded);  // each step runs on what was loaded before it
        steps.run(cut, step);
    }
    check_equal(cut, straight);
}

TEST_CASE("trainer_file: metadata of the user's comes back; reserved keys are refused", "[files][unit]") {
    const rvqkv::metadata_map metadata = {{"model", "any"}, {"batches", "17"}};
    const std::string raw = saved(make_trainer(), metadata);
    CHECK(rvqkv::load_training(bytes_of(raw)).value().metadata == metadata);

    const test::temp_dir folder;
    const std::string path = folder.file("training");
    test::write_file(path, "old");
    const auto reserved = rvqkv::save_training(path, make_trainer(), {{"layers.x", ""}});
    CHECK(reserved.error().message == path + ": metadata key 'layers.x' is reserved");
    const auto none = rvqkv::save_training(path, model_trainer::create({}).value());
    CHECK(none.error().message == path + ": no trainers to save");
    const auto far = rvqkv::save_training(path, model_trainer::create({{65536, make_config(1)}}).value());
    CHECK(far.error().message == path + ": layer is 65536, must be at most 65535");
    CHECK(test::read_file(path) == "old");
}

TEST_CASE("trainer_file: every truncation and every flipped bit is an error", "[files][fuzz]") {
    const forgery whole;
    const test::temp_dir folder;
    REQUIRE(whole.message().empty());
    rvqkv::layer_trainer_config config;
    config.key.spec.head_dim = 2;
    config.key.spec.shape = {1, 2, 2};
    config.value = config.key;
    auto trainer = model_trainer::create({{0, config}}).value();
    const std::vector<float> x = {1, 2, 3, 5};
    trainer.observe(0, {x.data(), {2, 1, 2}}, {x.data(), {2, 1, 2}}).value();
    const std::string good = saved(trainer);
    REQUIRE(rvqkv::load_training(bytes_of(good)).ok());
    for (std::size_t length = 0; length < good.size(); ++length) {
        const std::vector<char> cut(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(length));
        if (rvqkv::load_training(std::as_bytes(std::span(cut))).ok()) {
            FAIL_CHECK("cut to " << length << " bytes");
        }
    }
    std::vector<char> flipped(good.begin(), good.end());
    for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
        char& byte = flipped[bit / 8];
        byte = static_cast<char>(byte ^ (1 << (bit % 8)));
        if (rvqkv::load_training(std::as_bytes(std::span(flipped))).ok()) {
            FAIL_CHECK("bit " << bit << " flipped");
        }
        byte = good[bit / 8];
    }
}

TEST_CASE("trainer_file: what is sealed but wrong is refused, naming field and value", "[files][unit]") {
    REQUIRE(forgery().message().empty());
    CHECK(forgery().message("3") == "rvqkv.trainer version '3', this library reads '1'");
    const auto replaced = [](std::string_view from, std::string_view to) {
        return forged([&](forgery& f) { f.change("key", from, to); });
    };
    CHECK(forged([](forgery& f) { f.metadata.erase("layers.0.key.trainer"); }) ==
          "metadata 'layers.0.key' stands alone: a side has 'layers.L.key' and 'layers.L.key.trainer'");
    CHECK(forged([](forgery& f) { f.metadata.erase("layers.0.key"); }) ==
          "metadata 'layers.0.key.trainer' stands alone: a side has 'layers.L.key' and 'layers.L.key.trainer'");
    CHECK(forged([](forgery& f) { f.metadata["layers.0.query.trainer"] = "{}"; }) ==
          "metadata 'layers.0.query.trainer' names no layer and side");
    CHECK(forged([](forgery& f) {
              f.metadata.erase("layers.0.value");
              f.metadata.erase("layers.0.value.trainer");
          }) == "holds 4 tensors, but the trainers that its metadata names have 3");
    CHECK(forged([](forgery& f) {
              f.metadata.erase("layers.0.value");
              f.metadata.erase("layers.0.value.trainer");
              f.tensors.pop_back();
          }) == "layers.0.value is missing");

    CHECK(replaced("0.99", "1.5") == "layers.0.key: decay is 1.500000, must be between 0 and 1");
    CHECK(replaced("0.99", "\"x\"") == "layers.0.key: field 'decay' is 'x', must be a number");
    CHECK(replaced("1e-05", "0") == "layers.0.key: epsilon is 0.000000, must be finite and above 0");
    CHECK(replaced("100.0", "1e999").find("layers.0.key: not valid JSON") == 0);
    CHECK(replaced("\"sampled\"", "\"somehow\"") ==
          "layers.0.key: field 'kmeans_start' is 'somehow', must be one of 'sampled', 'plus_plus'");
    CHECK(replaced("\"steps\":3", "\"steps\":-3") ==
          "layers.0.key: field 'steps' is -3.0, must be a whole number of 0 or more");
    CHECK(replaced("\"steps\":3,", "") == "layers.0.key: field 'steps' is missing");
    CHECK(replaced("\"steps\":3,", "\"steps\":3,\"stride\":3,") == "layers.0.key: field 'stride' is not known");
    CHECK(replaced("\"depths_done\":1", "\"depths_done\":2") ==
          "layers.0.key: field 'depths_done' is 2, must be at most depths, 1");
    CHECK(replaced("\"sampled\":0", "\"sampled\":1") ==
          "layers.0.key: field 'sampled' is 1, but with 'observed' 1, 'sample' 9 and 'depths_done' 1 it must be 0");
    CHECK(forged([](forgery& f) { f.change("value", "\"observed\":1", "\"observed\":9"); }) ==
          "layers.0.value: field 'sampled' is 1, but with 'observed' 9, 'sample' 9 and 'depths_done' 0 it must be 9");
    CHECK(forged([](forgery& f) {
              f.change("value", "\"sample\":9", "\"sample\":1");
          }).find("layers.0.value: sample is 1") == 0);

    CHECK(forged([](forgery& f) { f.tensors[1].shape = {2}; }) ==
          "layers.0.key: tensor 'layers.0.key.cluster_sizes' is F32 [2], but by the metadata it must be F32 [1, 2]");
    CHECK(forged([](forgery& f) { f.tensors[2].name = "layers.0.key.sums"; }) ==
          "layers.0.key: tensor 'layers.0.key.embedding_sums' is missing");
    const float nan = std::numeric_limits<float>::quiet_NaN();
    CHECK(forged([&](forgery& f) { f.key_sums[3] = nan; }) ==
          "layers.0.key: tensor 'layers.0.key.embedding_sums': element 3 is not finite");
    CHECK(forged([&](forgery& f) { f.value_sample[1] = nan; }) ==
          "layers.0.value: tensor 'layers.0.value.sample': element 1 is not finite");
    CHECK(forged([](forgery& f) { f.key_sizes[1] = -1.0F; }).find("layers.0.key: cluster_sizes 1 is -1.0") == 0);
}
