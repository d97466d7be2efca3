// SPDX-License-Identifier: MIT
/// @file
/// The library against golden files: those of the paper's own implementation in `RVQKV_GOLDEN_DIR` (tests/golden unless
/// set), and made ones with shapes that the others lack.
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/learn/ema_trainer.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/quantize/row_transform.hpp"
#include "support/catch.hpp"
#include "support/golden.hpp"
#include "support/random.hpp"
#include "support/temp_dir.hpp"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace {

/// The library: a codec for codes, scales and outputs, the EMA trainer for losses and states.
class library final : public golden::implementation {
public:
    explicit library(const golden::file& file)
        : file_(file), spec_(spec_of(file)), transform_(transform_of(spec_)), trainer_(resume(file.start())) {}

    golden::results run(const golden::step& next) override {
        const rvqkv::tensor_shape shape{file_.tokens, file_.heads, file_.head_dim};
        const std::size_t rows = file_.tokens * file_.heads;
        const auto codec = rvqkv::make_codec(spec_, std::span<const float>(trainer_.state().weights)).value();
        golden::results out;
        out.scales.resize(rows);
        out.outputs.resize(next.input.size());
        std::vector<rvqkv::code_t> codes(rows * codec->groups() * codec->depths());
        rvqkv::quantizer_workspace workspace;
        const rvqkv::code_strides strides{codec->depths(), 1};
        codec->encode({next.input.data(), shape}, {codes.data(), strides, out.scales.data()}, workspace).value();
        codec
            ->decode({codes.data(), strides, out.scales.data()}, {out.outputs.data(), shape}, codec->depths(),
                     workspace)
            .value();
        out.codes.assign(codes.begin(), codes.end());
        learn(next, codes, out);
        return out;
    }

    void set_state(const golden::state& from) override { trainer_ = resume(from); }

private:
    using transform_type = rvqkv::row_transform<rvqkv::any_scale, rvqkv::any_grouping>;

    static rvqkv::codec_spec spec_of(const golden::file& file) {
        rvqkv::codec_spec spec;
        spec.head_dim = file.head_dim;
        spec.shape = {file.depths, file.codewords, file.dim};
        spec.scale_type = rvqkv::dtype::float32;
        spec.grouping = file.strided ? rvqkv::grouping_kind::strided : rvqkv::grouping_kind::contiguous;
        spec.metric = file.cosine ? rvqkv::distance::cosine : rvqkv::distance::euclidean;
        return spec;
    }
    static transform_type transform_of(const rvqkv::codec_spec& spec) {
        return transform_type::create(spec.head_dim, spec.shape.dim, rvqkv::any_scale(spec.scale),
                                      rvqkv::any_grouping(spec.grouping), spec.scale_type)
            .value();
    }
    [[nodiscard]] rvqkv::ema_trainer resume(const golden::state& from) const {
        rvqkv::ema_config config;
        config.decay = file_.decay;
        config.epsilon = file_.epsilon;
        rvqkv::ema_state state;
        state.weights = from.weights;
        state.cluster_sizes = from.sizes;
        state.embedding_sums = from.sums;
        return rvqkv::ema_trainer::resume(spec_.shape, std::move(state), config, spec_.metric).value();
    }

    void learn(const golden::step& next, const std::vector<rvqkv::code_t>& codes, golden::results& out) {
        const std::size_t per_token = file_.heads * file_.groups();
        const std::size_t count = file_.tokens * per_token;
        std::vector<float> vectors(next.input.size());
        for (std::size_t row = 0; row < file_.tokens * file_.heads; ++row) {
            const float* const input = next.input.data() + row * file_.head_dim;
            std::vector<float> channels(input, input + file_.head_dim);
            std::size_t nonfinite = 0;
            (void)transform_.apply(channels.data(), vectors.data() + row * file_.head_dim, nonfinite);
        }
        std::vector<std::uint8_t> mask;
        for (const std::uint8_t counted : next.mask) {
            mask.insert(mask.end(), per_token, counted);
        }
        std::vector<float> losses(count);
        std::vector<rvqkv::code_t> chosen(codes.size());
        trainer_.accumulate({vectors.data(), count, file_.dim}, mask, losses, rvqkv::serial_executor(), chosen);
        trainer_.step().value();
        if (chosen != codes) {
            throw std::runtime_error("the trainer and the codec choose different codes");
        }
        for (std::size_t token = 0; token < file_.tokens; ++token) {
            double sum = 0;
            for (std::size_t i = token * per_token; i < (token + 1) * per_token; ++i) {
                sum += static_cast<double>(losses[i]);
            }
            out.losses.push_back(static_cast<float>(sum / static_cast<double>(per_token)));
        }
        const rvqkv::ema_state& state = trainer_.state();
        out.after = {state.weights, state.cluster_sizes, state.embedding_sums};
    }

    const golden::file& file_;
    rvqkv::codec_spec spec_;
    transform_type transform_;
    rvqkv::ema_trainer trainer_;
};

/// Extents of a made file.
struct made {
    std::size_t tokens;
    std::size_t heads;
    std::size_t head_dim;
    std::size_t dim;
    std::size_t depths;
    std::size_t codewords;
    bool strided;
    bool cosine;
    bool masked;
};

/// Inputs of every kind (tokens without variance, zeros, very large and very small ones), two steps, and what the
/// oracle makes of them. Codewords 1 and 2 of each depth are the same, so that ties occur; the last is out of bounds.
golden::file make_file(const made& how, test::random_source& random) {
    golden::file file;
    file.tokens = how.tokens;
    file.heads = how.heads;
    file.head_dim = how.head_dim;
    file.dim = how.dim;
    file.depths = how.depths;
    file.codewords = how.codewords;
    file.strided = how.strided;
    file.cosine = how.cosine;
    file.decay = 0.97;
    file.epsilon = 0.01;  // large enough to see
    for (std::size_t depth = 0; depth < how.depths; ++depth) {
        std::vector<float> book = test::gaussian_numbers(random, how.codewords * how.dim);
        for (float& weight : book) {
            weight *= std::pow(0.6F, static_cast<float>(depth));
        }
        if (how.codewords > 2) {
            std::copy_n(book.begin() + static_cast<std::ptrdiff_t>(how.dim), how.dim,
                        book.begin() + static_cast<std::ptrdiff_t>(2 * how.dim));
            book.back() = 150.0F;
        }
        file.before.insert(file.before.end(), book.begin(), book.end());
    }
    golden::oracle oracle(file);
    for (int t = 0; t < 2; ++t) {
        golden::step step;
        for (std::size_t token = 0; token < how.tokens; ++token) {
            const test::family kind = token % 4 == 3 ? test::all_families[token / 4 % 5] : test::family::gaussian;
            const auto channels = test::make_numbers(random, kind, how.heads * how.head_dim);
            step.input.insert(step.input.end(), channels.begin(), channels.end());
            if (how.masked) {
                step.mask.push_back(token % 3 == 1 ? 0 : 1);
            }
        }
        step.expected = oracle.run(step);
        file.steps.push_back(std::move(step));
    }
    return file;
}

std::string joined(const std::vector<std::string>& lines) {
    std::string text;
    for (const std::string& line : lines) {
        text += line + '\n';
    }
    return text;
}

std::vector<std::filesystem::path> golden_files() {
    const char* const wanted = std::getenv("RVQKV_GOLDEN_DIR");
    std::vector<std::filesystem::path> files;
    for (const auto& entry : std::filesystem::directory_iterator(wanted != nullptr ? wanted : RVQKV_TEST_GOLDEN_DIR)) {
        if (entry.path().extension() == ".safetensors") {
            files.push_back(entry.path());
        }
    }
    std::sort(files.begin(), files.end());
    return files;
}

template <class Implementation>
void check_golden_files() {
    const std::vector<std::filesystem::path> files = golden_files();
    REQUIRE_FALSE(files.empty());
    for (const std::filesystem::path& path : files) {
        CAPTURE(path.filename().string());
        const golden::file file = golden::load(path);
        REQUIRE_FALSE(file.steps.empty());
        Implementation subject(file);
        const golden::comparison comparison(file, subject);
        INFO(joined(comparison.differences()));
        CHECK(comparison.differences().empty());
        if (comparison.ties() != 0) {
            WARN(path.filename().string() << ": " << comparison.ties() << " ties within rounding");
        }
    }
}

}  // namespace

TEST_CASE("golden: the library follows the paper's implementation", "[golden][differential]") {
    check_golden_files<library>();
}

TEST_CASE("golden: the scalar oracle follows the paper's implementation", "[golden][differential]") {
    check_golden_files<golden::oracle>();
}

TEST_CASE("golden: the library follows the oracle, whatever the shape", "[golden][differential]") {
    const made all[] = {
        {24, 2, 256, 8, 3, 37, true, false, true},  {24, 2, 256, 8, 3, 37, true, true, true},
        {20, 1, 256, 8, 2, 37, false, true, false}, {12, 3, 20, 20, 1, 1, false, false, false},
        {20, 2, 6, 3, 5, 2, true, false, true},     {20, 1, 4, 1, 2, 17, true, false, false},
        {8, 2, 66, 33, 2, 300, false, true, true},
    };
    std::uint64_t salt = 0;
    for (const made& how : all) {
        CAPTURE(test::seed(), salt, how.head_dim, how.dim, how.codewords, how.cosine);
        test::random_source random(salt++);
        const test::temp_dir folder;
        golden::save(folder.file("made.safetensors"), make_file(how, random));
        const golden::file file = golden::load(folder.file("made.safetensors"));
        REQUIRE(file.steps.size() == 2);
        library subject(file);
        const golden::comparison comparison(file, subject);
        INFO(joined(comparison.differences()));
        CHECK(comparison.differences().empty());
        CHECK(comparison.ties() <= 1 + file.steps[0].expected.codes.size() / 100);
    }
}

TEST_CASE("golden: a file that is off in any number is found out", "[golden][property]") {
    test::random_source random(100);
    const golden::file good = make_file({12, 2, 32, 8, 2, 16, true, false, true}, random);
    const auto differences = [](const golden::file& file) {
        library subject(file);
        return golden::comparison(file, subject).differences();
    };
    REQUIRE(differences(good).empty());
    golden::file bad = good;
    golden::results& expected = bad.steps[0].expected;
    const auto nudge = [](std::vector<float>& numbers) {
        numbers[1] += 1e-3F * std::fabs(numbers[1]) + 1e-3F;  // token 0 is gaussian, codeword 0 has no double
    };
    std::string name;
    SECTION("codes") {
        expected.codes[5] ^= 8;
        name = "codes";
    }
    SECTION("scales") {
        nudge(expected.scales);
        name = "scale";
    }
    SECTION("outputs") {
        nudge(expected.outputs);
        name = "output";
    }
    SECTION("losses") {
        expected.losses[0] *= 1.001F;
        name = "commitment_loss";
    }
    SECTION("running sizes") {
        nudge(expected.after.sizes);
        name = "cluster_size";
    }
    SECTION("running sums") {
        nudge(expected.after.sums);
        name = "embed_avg";
    }
    SECTION("codewords") {
        nudge(expected.after.weights);
        name = "codebook";
    }
    const std::vector<std::string> found = differences(bad);
    REQUIRE_FALSE(found.empty());
    CHECK(found[0].find("step0." + name) == 0);
}

TEST_CASE("golden: codewords as near as each other may be swapped", "[golden][property]") {
    test::random_source random(101);
    golden::file file = make_file({40, 2, 32, 8, 2, 8, false, false, false}, random);
    // Codewords 1 and 2 are equal at first, so a file may name either; it then counts the vectors for the other one.
    golden::results& expected = file.steps[0].expected;
    std::size_t swapped = 0;
    for (std::int32_t& code : expected.codes) {
        if (code == 1) {
            code = 2;
            ++swapped;
        }
    }
    REQUIRE(swapped > 0);
    for (std::size_t depth = 0; depth < file.depths; ++depth) {
        golden::state& after = expected.after;
        const auto one = static_cast<std::ptrdiff_t>(depth * file.codewords + 1);
        const auto dim = static_cast<std::ptrdiff_t>(file.dim);
        std::swap(after.sizes[depth * file.codewords + 1], after.sizes[depth * file.codewords + 2]);
        for (std::vector<float>* const rows : {&after.sums, &after.weights}) {
            std::swap_ranges(rows->begin() + one * dim, rows->begin() + (one + 1) * dim,
                             rows->begin() + (one + 1) * dim);
        }
    }
    file.steps.resize(1);
    library subject(file);
    const golden::comparison comparison(file, subject);
    INFO(joined(comparison.differences()));
    CHECK(comparison.differences().empty());
    CHECK(comparison.ties() > 0);
    CHECK(comparison.ties() <= swapped);
}
