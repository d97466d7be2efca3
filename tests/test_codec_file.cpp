// SPDX-License-Identifier: MIT
/// @file
/// Codec files: what is saved is loaded, and nothing else is.
#include "rvqkv/files/codec_file.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/temp_dir.hpp"

#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

namespace {

using rvqkv::codec_set;
using rvqkv::codec_spec;
using rvqkv::dtype;
using rvqkv::error_code;
using rvqkv::storage_type;

std::span<const std::byte> bytes_of(std::string_view text) {
    return std::as_bytes(std::span<const char>(text));
}

codec_spec make_spec(std::size_t head_dim, rvqkv::codebook_shape shape) {
    codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = shape;
    return spec;
}

std::shared_ptr<const rvqkv::codec> make(const codec_spec& spec, std::uint64_t salt) {
    test::random_source random(salt);
    const std::vector<float> weights = test::gaussian_numbers(random, spec.shape.size());
    return rvqkv::make_codec(spec, std::span<const float>(weights)).value();
}

/// Every option of a codec somewhere, two layers that are not neighbours, a side missing.
codec_set small_set() {
    codec_spec key = make_spec(8, {2, 5, 4});
    codec_spec value = make_spec(6, {1, 3, 3});
    value.grouping = rvqkv::grouping_kind::contiguous;
    value.scale = rvqkv::scale_kind::max_abs;
    value.scale_type = dtype::bfloat16;
    value.weight_type = dtype::bfloat16;
    codec_spec last = make_spec(4, {1, 2, 2});
    last.grouping = rvqkv::grouping_kind::permuted;
    last.permutation = {2, 0, 3, 1};
    last.scale = rvqkv::scale_kind::none;
    last.scale_type = dtype::float32;
    last.metric = rvqkv::distance::cosine;
    last.weight_type = dtype::float16;
    codec_set set;
    set.layers[0] = {make(key, 1), make(value, 2)};
    set.layers[31].value = make(last, 3);
    set.metadata = {{"model", "sm\xc3\xb6l"}};
    return set;
}

bool equal(const rvqkv::codec& a, const rvqkv::codec& b) {
    return *a.spec() == *b.spec() && a.weights().size() == b.weights().size() &&
           std::memcmp(a.weights().data(), b.weights().data(), a.weights().size()) == 0;
}

std::string saved(const codec_set& set) {
    const test::temp_dir folder;
    rvqkv::save_codecs(folder.file("codecs"), set).value();
    return test::read_file(folder.file("codecs"));
}

/// A sealed file that says what it should not. Starts from a good one: one key codec, head_dim 4, weights 2 x 3 x 2.
struct forgery {
    std::string format = "rvqkv.codec";
    std::string version = "1";
    std::string json = R"({"head_dim":4,"group_dim":2,"depths":2,"codewords":3,"scale":"rms","scale_type":"float16",)"
                       R"("grouping":"permuted","distance":"euclidean","weight_type":"float32"})";
    std::string name = "layers.0.key";
    std::vector<std::size_t> shape = {2, 3, 2};
    storage_type type = storage_type::float32;
    std::vector<float> weights = std::vector<float>(12, 0.5F);
    std::vector<std::uint16_t> permutation = {3, 2, 1, 0};
    std::string permutation_name = "layers.0.key.permutation";

    /// What the reader says of it, after the file's name; "" when it takes it.
    [[nodiscard]] std::string message(error_code expected = error_code::damaged_file) const {
        const test::temp_dir folder;
        const std::string path = folder.file("forged");
        std::size_t size = size_of(type);
        for (const std::size_t extent : shape) {
            size *= extent;
        }
        rvqkv::detail::save_sealed(
            path, format, version, {{name, json}},
            {{{"layers.0.key.codebook", type, shape}, std::as_bytes(std::span(weights)).first(size)},
             {{permutation_name, storage_type::uint16, {permutation.size()}}, std::as_bytes(std::span(permutation))}})
            .value();
        const auto loaded = rvqkv::load_codecs(path);
        if (loaded.ok()) {
            return "";
        }
        CHECK(loaded.error().code == expected);
        REQUIRE(loaded.error().message.find(path + ": ") == 0);
        return loaded.error().message.substr(path.size() + 2);
    }
};

}  // namespace

TEST_CASE("codec_file: a model's codecs come back, every option of them", "[files][unit]") {
    const codec_set set = small_set();
    const std::string raw = saved(set);
    const codec_set loaded = rvqkv::load_codecs(bytes_of(raw)).value();
    CHECK(loaded.metadata == set.metadata);
    REQUIRE(loaded.layers.size() == 2);
    CHECK(equal(*loaded.layers.at(0).key, *set.layers.at(0).key));
    CHECK(equal(*loaded.layers.at(0).value, *set.layers.at(0).value));
    CHECK(loaded.layers.at(31).key == nullptr);
    CHECK(equal(*loaded.layers.at(31).value, *set.layers.at(31).value));
    CHECK(saved(loaded) == raw);
}

TEST_CASE("codec_file: every scale, type, grouping and distance has its name in the file", "[files][unit]") {
    codec_set set;
    std::size_t layer = 0;
    for (const rvqkv::scale_kind scale : rvqkv::all_scale_kinds) {
        for (const dtype type : {dtype::float32, dtype::float16, dtype::bfloat16}) {
            for (const rvqkv::distance metric : {rvqkv::distance::euclidean, rvqkv::distance::cosine}) {
                for (const bool strided : {false, true}) {
                    codec_spec spec = make_spec(6, {1, 2, 3});
                    spec.scale = scale;
                    spec.scale_type = type;
                    spec.weight_type = type;
                    spec.metric = metric;
                    spec.grouping = strided ? rvqkv::grouping_kind::strided : rvqkv::grouping_kind::contiguous;
                    set.layers[layer].key = make(spec, layer);
                    ++layer;
                }
            }
        }
    }
    const std::string raw = saved(set);
    const codec_set loaded = rvqkv::load_codecs(bytes_of(raw)).value();
    REQUIRE(loaded.layers.size() == layer);
    for (const auto& entry : set.layers) {
        CAPTURE(entry.first);
        CHECK(equal(*loaded.layers.at(entry.first).key, *entry.second.key));
    }
}

TEST_CASE("codec_file: the format stays as it is documented", "[files][golden]") {
    const test::temp_dir folder;
    const std::string path = folder.file("codecs");
    rvqkv::save_codecs(path, small_set()).value();
    const auto file = rvqkv::safetensors_file::open(path).value();
    CHECK(*file.find_metadata("format") == "rvqkv.codec");
    CHECK(*file.find_metadata("version") == "1");
    CHECK(*file.find_metadata("layers.0.key") ==
          R"({"head_dim":8,"group_dim":4,"depths":2,"codewords":5,"scale":"std_dev","scale_type":"float16",)"
          R"("grouping":"strided","distance":"euclidean","weight_type":"float32"})");
    CHECK(*file.find_metadata("layers.31.value") ==
          R"({"head_dim":4,"group_dim":2,"depths":1,"codewords":2,"scale":"none","scale_type":"float32",)"
          R"("grouping":"permuted","distance":"cosine","weight_type":"float16"})");
    CHECK(file.metadata().size() == 7);
    CHECK(file.tensors().size() == 4);
    const auto& value = *file.tensor("layers.0.value.codebook").value();
    CHECK(value.type == storage_type::bfloat16);
    CHECK(value.shape == std::vector<std::size_t>{1, 3, 3});
    const auto order = file.read_as<std::uint16_t>("layers.31.value.permutation").value();
    CHECK(std::vector<std::uint16_t>(order.span().begin(), order.span().end()) ==
          std::vector<std::uint16_t>{2, 0, 3, 1});
    for (const rvqkv::tensor_info& tensor : file.tensors()) {
        CHECK(tensor.offset % size_of(tensor.type) == 0);
    }
    // A file of version 1 in full: whatever changes, it must go on loading.
    codec_spec spec = make_spec(2, {1, 2, 1});
    const std::vector<float> weights = {1.0F, -1.0F};
    codec_set tiny;
    tiny.layers[0].key = rvqkv::make_codec(spec, std::span<const float>(weights)).value();
    const std::string raw = saved(tiny);
    CHECK(raw.substr(8, raw.find("  ") - 8) ==
          R"({"__metadata__":{"checksum":"38bcdde607be82b1","format":"rvqkv.codec","layers.0.key":)"
          R"("{\"head_dim\":2,\"group_dim\":1,\"depths\":1,\"codewords\":2,\"scale\":\"std_dev\",)"
          R"(\"scale_type\":\"float16\",\"grouping\":\"strided\",\"distance\":\"euclidean\",)"
          R"(\"weight_type\":\"float32\"}","version":"1"},)"
          R"("layers.0.key.codebook":{"dtype":"F32","shape":[1,2,1],"data_offsets":[0,8]}})");
}

TEST_CASE("codec_file: every truncation and every flipped bit is an error", "[files][fuzz]") {
    codec_set set;
    codec_spec spec = make_spec(4, {1, 2, 2});
    spec.grouping = rvqkv::grouping_kind::permuted;
    spec.permutation = {3, 1, 2, 0};
    set.layers[0].key = make(spec, 7);
    const std::string good = saved(set);
    REQUIRE(rvqkv::load_codecs(bytes_of(good)).ok());
    for (std::size_t length = 0; length < good.size(); ++length) {
        // A copy of exactly this size, so that a sanitizer sees a byte read beyond it.
        const std::vector<char> cut(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(length));
        if (rvqkv::load_codecs(std::as_bytes(std::span(cut))).ok()) {
            FAIL_CHECK("cut to " << length << " bytes");
        }
    }
    std::vector<char> flipped(good.begin(), good.end());
    for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
        char& byte = flipped[bit / 8];
        byte = static_cast<char>(byte ^ (1 << (bit % 8)));
        const auto loaded = rvqkv::load_codecs(std::as_bytes(std::span(flipped)));
        if (loaded.ok() || loaded.error().message.find("memory: ") != 0) {
            FAIL_CHECK("bit " << bit << " flipped");
        }
        byte = good[bit / 8];
    }
    CHECK_FALSE(rvqkv::load_codecs(bytes_of(good + '\0')).ok());
}

TEST_CASE("codec_file: what is sealed but wrong is refused, naming field and value", "[files][unit]") {
    REQUIRE(forgery().message().empty());
    const auto with = [](const std::function<void(forgery&)>& change) {
        forgery forged;
        change(forged);
        return forged.message();
    };
    const auto replaced = [&with](std::string_view from, std::string_view to) {
        return with([&](forgery& f) {
            const std::size_t at = f.json.find(from);
            REQUIRE(at != std::string::npos);
            f.json.replace(at, from.size(), to);
        });
    };

    CHECK(with([](forgery& f) { f.format = "rvqkv.trainer"; }) ==
          "metadata 'format' is 'rvqkv.trainer', must be 'rvqkv.codec'");
    forgery newer;
    newer.version = "2";
    CHECK(newer.message(error_code::unsupported) == "rvqkv.codec version '2', this library reads '1'");

    for (const char* name : {"layers.00.key", "layers.0.query", "layers..key", "layers.0", "layers.", "layers.-1.key",
                             "layers.65536.key", "layers.18446744073709551616.key", "layers.0.key.", "layers.0x.key"}) {
        CHECK(with([&](forgery& f) { f.name = name; }) ==
              "metadata '" + std::string(name) + "' names no layer and side");
    }
    CHECK(with([](forgery& f) { f.name = "layers.1.key"; }) ==
          "layers.1.key: tensor 'layers.1.key.permutation' is missing");
    CHECK(with([](forgery& f) { f.name = "free text"; }) ==
          "holds 2 tensors, but the codecs that its metadata names have 0");

    CHECK(with([](forgery& f) { f.json = ""; }) == "layers.0.key: not valid JSON at character 1");
    CHECK(with([](forgery& f) { f.json = "[1]"; }) == "layers.0.key: an object is wanted, not an array");
    CHECK(with([](forgery& f) { f.json = "7"; }) == "layers.0.key: an object is wanted, not a single value");
    CHECK(with([](forgery& f) { f.json = "{}"; }) == "layers.0.key: field 'head_dim' is missing");
    CHECK(with([](forgery& f) { f.json += '\0'; }).find("is not valid JSON") != std::string::npos);
    CHECK(with([](forgery& f) { f.json += "{}"; }).find("layers.0.key: not valid JSON") == 0);
    CHECK(with([](forgery& f) { f.json = "{\"a\":" + std::string(1000000, '['); }) ==
          "layers.0.key: field 'a': a number or a text is wanted, not an array");
    CHECK(replaced("4", "-4") == "layers.0.key: field 'head_dim' is -4.0, must be a whole number of 0 or more");
    CHECK(replaced("4", "4.0") == "layers.0.key: field 'head_dim' is 4.0, must be a whole number of 0 or more");
    CHECK(replaced("4", "null") == "layers.0.key: field 'head_dim': a number or a text is wanted, not null");
    CHECK(replaced("4", "\"4\"") == "layers.0.key: field 'head_dim' is '4', must be a whole number of 0 or more");
    CHECK(replaced("\"rms\"", "\"l7\"") ==
          "layers.0.key: field 'scale' is 'l7', must be one of 'std_dev', 'rms', 'l2_norm', 'max_abs', 'none'");
    CHECK(replaced("\"rms\"", "1") ==
          "layers.0.key: field 'scale' is 1, must be one of 'std_dev', 'rms', 'l2_norm', 'max_abs', 'none'");
    CHECK(replaced("\"float16\"", "\"float8\"") ==
          "layers.0.key: field 'scale_type' is 'float8', must be one of 'float32', 'float16', 'bfloat16'");
    CHECK(replaced("\"grouping\"", "\"group\"") == "layers.0.key: field 'grouping' is missing");
    CHECK(replaced("{", "{\"colour\":1,") == "layers.0.key: field 'colour' is not known");
    CHECK(replaced("{", "{\"depths\":2,") == "layers.0.key: field 'depths' appears twice");

    const std::string must_be = ", but by the metadata it must be ";
    CHECK(replaced("\"depths\":2", "\"depths\":3") ==
          "layers.0.key: tensor 'layers.0.key.codebook' is F32 [2, 3, 2]" + must_be + "F32 [3, 3, 2]");
    CHECK(with([](forgery& f) {
              f.shape = {2, 6};
          }) == "layers.0.key: tensor 'layers.0.key.codebook' is F32 [2, 6]" + must_be + "F32 [2, 3, 2]");
    CHECK(with([](forgery& f) { f.type = storage_type::float16; }) ==
          "layers.0.key: tensor 'layers.0.key.codebook' is F16 [2, 3, 2]" + must_be + "F32 [2, 3, 2]");
    CHECK(with([](forgery& f) { f.permutation.pop_back(); }) ==
          "layers.0.key: tensor 'layers.0.key.permutation' is U16 [3]" + must_be + "U16 [4]");
    CHECK(with([](forgery& f) { f.permutation_name = "other"; }) ==
          "layers.0.key: tensor 'layers.0.key.permutation' is missing");
    CHECK(replaced("\"permuted\"", "\"strided\"") == "holds 2 tensors, but the codecs that its metadata names have 1");
    CHECK(with([](forgery& f) { f.permutation[1] = 3; }).find("layers.0.key: permuted grouping puts channel 3") == 0);
    CHECK(replaced("\"group_dim\":2", "\"group_dim\":0") == "layers.0.key: group_dim is 0, must be from 1 to 4096");
    CHECK(replaced("\"head_dim\":4", "\"head_dim\":18446744073709551615") ==
          "layers.0.key: tensor 'layers.0.key.permutation' is U16 [4]" + must_be + "U16 [18446744073709551615]");
    CHECK(with([](forgery& f) {
              f.json.replace(f.json.find("\"head_dim\":4"), 12, "\"head_dim\":5");
              f.permutation.push_back(4);
          }) == "layers.0.key: group_dim is 2, must divide head_dim 5");
    CHECK(with([](forgery& f) {
              f.json.replace(f.json.find("\"codewords\":3"), 13, "\"codewords\":0");
              f.shape = {2, 0, 2};
          }) == "layers.0.key: codewords is 0, must be from 1 to 65536");
    for (const float wrong : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
        CHECK(with([&](forgery& f) { f.weights[7] = wrong; })
                  .find("layers.0.key: codebook weight 1 of codeword 0 at "
                        "depth 1 is not finite") == 0);
    }
}

TEST_CASE("codec_file: what cannot be saved is refused, and an old file stays", "[files][unit]") {
    const test::temp_dir folder;
    const std::string path = folder.file("codecs");
    test::write_file(path, "old");
    const auto refusal = [&path](const codec_set& set) {
        const auto done = rvqkv::save_codecs(path, set);
        CHECK(test::read_file(path) == "old");
        return done.ok() ? std::string() : done.error().message;
    };
    CHECK(refusal({}) == path + ": no codecs to save");
    codec_set set = small_set();
    for (const char* key : {"format", "version", "checksum", "layers.0", "layers.9.key"}) {
        set.metadata = {{key, "x"}};
        CHECK(refusal(set) == path + ": metadata key '" + key + "' is reserved");
    }
    set.metadata = {{"k", "\xff"}};
    CHECK(refusal(set).find(path + ": header: not valid JSON") == 0);
    set = small_set();
    set.layers[65536].key = set.layers[0].key;
    CHECK(refusal(set) == path + ": layer is 65536, must be at most 65535");
    set = small_set();
    const std::vector<float> weights(4);
    auto book = rvqkv::residual_codebook<>::create({1, 2, 2}, std::span<const float>(weights)).value();
    using quantizer = rvqkv::vector_quantizer<rvqkv::rms_scale, rvqkv::strided_grouping>;
    set.layers[1].key = rvqkv::make_codec(quantizer::create(4, std::move(book)).value());
    CHECK(refusal(set).find(path + ": layers.1.key: the codec was made from policies that a file cannot name") == 0);
}

TEST_CASE("codec_file: a loaded codec gives the same codes and numbers", "[files][unit]") {
    const codec_set set = small_set();
    const std::string raw = saved(set);
    const codec_set loaded = rvqkv::load_codecs(bytes_of(raw)).value();
    test::random_source random(11);
    const std::vector<float> x = test::gaussian_numbers(random, 5 * 2 * 4);
    const rvqkv::tensor_view view(x.data(), {5, 2, 4});
    const auto run = [&view](const rvqkv::codec& codec) {
        std::vector<rvqkv::code_t> codes(10 * codec.groups() * codec.depths());
        std::vector<float> out(40);
        rvqkv::quantizer_workspace workspace;
        rvqkv::mutable_encoded_view encoded;
        encoded.codes = codes.data();
        encoded.strides = {codec.depths(), 1};
        codec.encode(view, encoded, workspace).value();
        rvqkv::encoded_view stored;
        stored.codes = codes.data();
        stored.strides = encoded.strides;
        codec.decode(stored, rvqkv::mutable_tensor_view(out.data(), {5, 2, 4}), codec.depths(), workspace).value();
        return std::pair(codes, out);
    };
    CHECK(run(*loaded.layers.at(31).value) == run(*set.layers.at(31).value));
}

TEST_CASE("codec_file: files that cannot be opened say why", "[files][unit]") {
    const test::temp_dir folder;
    CHECK(rvqkv::load_codecs(folder.file("none")).error().code == error_code::io);
    test::write_file(folder.file("text"), "no such thing as a file of tensors");
    CHECK(rvqkv::load_codecs(folder.file("text")).error().code == error_code::damaged_file);
}
