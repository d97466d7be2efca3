// SPDX-License-Identifier: MIT
/// @file
/// Compressed files: what is saved is loaded, with the codecs that made it and with no others, and nothing else is.
#include "rvqkv/files/compressed_file.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/temp_dir.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace {

using rvqkv::codec_spec;
using rvqkv::compressed_set;
using rvqkv::compressed_tensor;
using rvqkv::dtype;
using rvqkv::error_code;
using rvqkv::storage_type;

std::span<const std::byte> bytes_of(std::string_view text) {
    return std::as_bytes(std::span<const char>(text));
}

std::shared_ptr<const rvqkv::codec> make(const codec_spec& spec, std::uint64_t salt) {
    test::random_source random(salt);
    const std::vector<float> weights = test::gaussian_numbers(random, spec.shape.size());
    return rvqkv::make_codec(spec, std::span<const float>(weights)).value();
}

/// Two layers that are not neighbours; scales of every width, and none; a side missing.
rvqkv::model_codecs make_codecs() {
    codec_spec key;
    key.head_dim = 8;
    key.shape = {2, 5, 4};
    codec_spec value = key;
    value.head_dim = 6;
    value.shape = {1, 3, 3};
    value.scale_type = dtype::float32;
    codec_spec last = key;
    last.scale = rvqkv::scale_kind::none;
    rvqkv::model_codecs codecs;
    codecs[2] = {make(key, 1), make(value, 2)};
    codecs[31].value = make(last, 3);
    return codecs;
}

compressed_tensor compress(const std::shared_ptr<const rvqkv::codec>& codec, std::size_t tokens, std::size_t heads) {
    test::random_source random(tokens);
    const std::vector<float> x = test::gaussian_numbers(random, tokens * heads * codec->head_dim());
    compressed_tensor tensor = compressed_tensor::create(codec, tokens, heads).value();
    tensor.encode(0, {x.data(), {tokens, heads, codec->head_dim()}}, rvqkv::serial_executor()).value();
    return tensor;
}

compressed_set make_set(const rvqkv::model_codecs& codecs) {
    compressed_set set;
    set.layers[2].key = compress(codecs.at(2).key, 7, 2);
    set.layers[2].value = compress(codecs.at(2).value, 9, 3);
    set.layers[31].value = compress(codecs.at(31).value, 4, 1);
    set.metadata = {{"model", "sm\xc3\xb6l"}};
    return set;
}

std::string saved(const compressed_set& set) {
    const test::temp_dir folder;
    rvqkv::save_compressed(folder.file("compressed"), set).value();
    return test::read_file(folder.file("compressed"));
}

bool equal(const compressed_tensor& a, const compressed_tensor& b) {
    bool same = a.shape() == b.shape() &&
                std::equal(a.scales().begin(), a.scales().end(), b.scales().begin(), b.scales().end());
    for (std::size_t depth = 0; depth < a.codec()->depths(); ++depth) {
        same = same &&
               std::equal(a.codes(depth).begin(), a.codes(depth).end(), b.codes(depth).begin(), b.codes(depth).end());
    }
    return same;
}

/// A sealed file that says what it should not. Starts from a good one: the keys of layer 2, 3 tokens of 1 head.
struct forgery {
    rvqkv::model_codecs codecs = make_codecs();
    std::string format = "rvqkv.compressed";
    std::string version = "1";
    rvqkv::metadata_map metadata = {
        {"layers.2.key", R"({"tokens":3,"heads":1,"head_dim":8,"group_dim":4,"depths":2,"codewords":5})"},
        {"layers.2.key.codec", rvqkv::codec_fingerprint(*codecs.at(2).key).value()}};
    std::vector<std::size_t> codes_shape = {2, 3};  // 6 codes of 3 bits at each depth
    std::vector<std::size_t> scales_shape = {3, 1};
    std::vector<std::uint8_t> codes = std::vector<std::uint8_t>(6, 0);
    std::vector<std::uint16_t> scales = std::vector<std::uint16_t>(3, 0x3c00);  // float16 ones
    std::string codes_name = "layers.2.key.codes";

    std::string& json() { return metadata.at("layers.2.key"); }

    /// What the reader says of it, after the file's name; "" when it takes it.
    [[nodiscard]] std::string message(error_code expected = error_code::damaged_file) const {
        const test::temp_dir folder;
        const std::string path = folder.file("forged");
        rvqkv::detail::save_sealed(
            path, format, version, metadata,
            {{{"layers.2.key.scales", storage_type::float16, scales_shape}, std::as_bytes(std::span(scales))},
             {{codes_name, storage_type::uint8, codes_shape}, std::as_bytes(std::span(codes))}})
            .value();
        const auto loaded = rvqkv::load_compressed(path, codecs);
        if (loaded.ok()) {
            return "";
        }
        CHECK(loaded.error().code == expected);
        REQUIRE(loaded.error().message.find(path + ": ") == 0);
        return loaded.error().message.substr(path.size() + 2);
    }
};

}  // namespace

TEST_CASE("compressed_file: what was saved comes back", "[files][unit]") {
    const rvqkv::model_codecs codecs = make_codecs();
    const compressed_set set = make_set(codecs);
    const std::string raw = saved(set);
    const compressed_set loaded = rvqkv::load_compressed(bytes_of(raw), codecs).value();
    CHECK(loaded.metadata == set.metadata);
    REQUIRE(loaded.layers.size() == 2);
    CHECK(equal(*loaded.layers.at(2).key, *set.layers.at(2).key));
    CHECK(equal(*loaded.layers.at(2).value, *set.layers.at(2).value));
    CHECK_FALSE(loaded.layers.at(31).key.has_value());
    CHECK(equal(*loaded.layers.at(31).value, *set.layers.at(31).value));
    CHECK(saved(loaded) == raw);
    compressed_set empty;
    empty.layers[2].key = compress(codecs.at(2).key, 0, 1);
    CHECK(rvqkv::load_compressed(bytes_of(saved(empty)), codecs).value().layers.at(2).key->shape().tokens == 0);
}

TEST_CASE("compressed_file: the format stays as it is documented", "[files][golden]") {
    const rvqkv::model_codecs codecs = make_codecs();
    const test::temp_dir folder;
    const std::string path = folder.file("compressed");
    rvqkv::save_compressed(path, make_set(codecs)).value();
    const auto file = rvqkv::safetensors_file::open(path).value();
    CHECK(*file.find_metadata("format") == "rvqkv.compressed");
    CHECK(*file.find_metadata("version") == "1");
    CHECK(*file.find_metadata("layers.2.value") ==
          R"({"tokens":9,"heads":3,"head_dim":6,"group_dim":3,"depths":1,"codewords":3})");
    CHECK(*file.find_metadata("layers.2.value.codec") == rvqkv::codec_fingerprint(*codecs.at(2).value).value());
    CHECK(file.metadata().size() == 10);
    CHECK(file.tensors().size() == 5);
    const auto shape_of = [&file](const char* name) { return file.tensor(name).value()->shape; };
    CHECK(shape_of("layers.2.key.codes") == std::vector<std::size_t>{2, 11});  // 7 * 2 * 2 codes of 3 bits
    CHECK(shape_of("layers.2.key.scales") == std::vector<std::size_t>{7, 2});
    CHECK(file.tensor("layers.2.value.scales").value()->type == storage_type::float32);
    CHECK_FALSE(file.contains("layers.31.value.scales"));
    for (const rvqkv::tensor_info& tensor : file.tensors()) {
        CHECK(tensor.offset % size_of(tensor.type) == 0);
    }
    // Codes are packed from the lowest bit on, depth by depth.
    forgery known;
    known.codes = {0b11'010'001, 0b0'001'000'0, 0, 0b100, 0, 0};  // depth 0: 1 2 3 0 1 0; depth 1: 4 0 0 0 0 0
    REQUIRE(known.message().empty());
    const auto unpacked = [&known](std::size_t depth) {
        std::vector<rvqkv::code_t> codes(6);
        rvqkv::unpack_codes(std::as_bytes(std::span(known.codes)).data() + 3 * depth, 0, 6, 3, codes.data());
        return codes;
    };
    CHECK(unpacked(0) == std::vector<rvqkv::code_t>{1, 2, 3, 0, 1, 0});
    CHECK(unpacked(1) == std::vector<rvqkv::code_t>{4, 0, 0, 0, 0, 0});
}

TEST_CASE("compressed_file: a wrong codec is refused by name", "[files][unit]") {
    const rvqkv::model_codecs codecs = make_codecs();
    const std::string raw = saved(make_set(codecs));
    const auto refusal = [&raw](const rvqkv::model_codecs& given) {
        const auto loaded = rvqkv::load_compressed(bytes_of(raw), given);
        REQUIRE_FALSE(loaded.ok());
        CHECK(loaded.error().code == error_code::invalid_argument);
        return loaded.error().message;
    };
    const std::string wanted = rvqkv::codec_fingerprint(*codecs.at(2).key).value();
    rvqkv::model_codecs other = codecs;
    other[2].key = make(*codecs.at(2).key->spec(), 99);
    const std::string got = rvqkv::codec_fingerprint(*other[2].key).value();
    CHECK(refusal(other) == "memory: layers.2.key: was compressed with codec '" + wanted +
                                "', but the codec given for it is '" + got + "'");
    other[2].key = nullptr;
    CHECK(refusal(other) ==
          "memory: layers.2.key: needs codec '" + wanted + "', but the codecs given have none for it");
    other = codecs;
    other.erase(31);
    CHECK(refusal(other).find("memory: layers.31.value: needs codec '") == 0);
    CHECK(refusal({}).find("memory: layers.2.key: needs codec '") == 0);
}

TEST_CASE("compressed_file: every truncation and every flipped bit is an error", "[files][fuzz]") {
    const rvqkv::model_codecs codecs = make_codecs();
    const std::string good = saved(make_set(codecs));
    REQUIRE(rvqkv::load_compressed(bytes_of(good), codecs).ok());
    for (std::size_t length = 0; length < good.size(); ++length) {
        // A copy of exactly this size, so that a sanitizer sees a byte read beyond it.
        const std::vector<char> cut(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(length));
        if (rvqkv::load_compressed(std::as_bytes(std::span(cut)), codecs).ok()) {
            FAIL_CHECK("cut to " << length << " bytes");
        }
    }
    std::vector<char> flipped(good.begin(), good.end());
    for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
        char& byte = flipped[bit / 8];
        byte = static_cast<char>(byte ^ (1 << (bit % 8)));
        const auto loaded = rvqkv::load_compressed(std::as_bytes(std::span(flipped)), codecs);
        if (loaded.ok() || loaded.error().message.find("memory: ") != 0) {
            FAIL_CHECK("bit " << bit << " flipped");
        }
        byte = good[bit / 8];
    }
    CHECK_FALSE(rvqkv::load_compressed(bytes_of(good + '\0'), codecs).ok());
}

TEST_CASE("compressed_file: what is sealed but wrong is refused, naming field and value", "[files][unit]") {
    REQUIRE(forgery().message().empty());
    const auto with = [](const std::function<void(forgery&)>& change) {
        forgery forged;
        change(forged);
        return forged.message();
    };
    const auto replaced = [&with](std::string_view from, std::string_view to) {
        return with([&](forgery& f) {
            const std::size_t at = f.json().find(from);
            REQUIRE(at != std::string::npos);
            f.json().replace(at, from.size(), to);
        });
    };
    CHECK(with([](forgery& f) { f.format = "rvqkv.codec"; }) ==
          "metadata 'format' is 'rvqkv.codec', must be 'rvqkv.compressed'");
    forgery newer;
    newer.version = "2";
    CHECK(newer.message(error_code::unsupported) == "rvqkv.compressed version '2', this library reads '1'");

    // Codes and scales that no encoder makes.
    CHECK(with([](forgery& f) { f.codes[0] = 5; }) ==
          "layers.2.key: code 0 of depth 0 is 5, must be below codewords, 5");
    CHECK(with([](forgery& f) { f.codes[5] = 0x2; }).find("layers.2.key: code 5 of depth 1 is 4") == std::string::npos);
    CHECK(with([](forgery& f) { f.codes[5] = 0x3; }) ==
          "layers.2.key: code 5 of depth 1 is 6, must be below codewords, 5");
    for (const int bits : {0x0000, 0x8000, 0xbc00, 0x7c00, 0x7e00}) {  // 0, -0, -1, infinity, NaN
        CHECK(with([&](forgery& f) {
                  f.scales[2] = static_cast<std::uint16_t>(bits);
              }).find("layers.2.key: scale 2 is ") == 0);
    }

    // Shapes.
    CHECK(replaced("\"tokens\":3", "\"tokens\":4") ==
          "layers.2.key: tensor 'layers.2.key.scales' is F16 [3, 1], but by the metadata it must be F16 [4, 1]");
    CHECK(replaced("\"tokens\":3", "\"tokens\":30") ==
          "layers.2.key: tensor 'layers.2.key.codes' is U8 [2, 3], but by the metadata it must be U8 [2, 23]");
    for (const char* lie : {"\"heads\":0", "\"heads\":18446744073709551615", "\"heads\":9223372036854775808"}) {
        CHECK(replaced("\"heads\":1", lie).find("are not those of a tensor that its codec compresses") !=
              std::string::npos);
    }
    CHECK(replaced("\"tokens\":3", "\"tokens\":1152921504606846976")
              .find("are not those of a tensor that its codec compresses") != std::string::npos);
    CHECK(replaced("\"head_dim\":8", "\"head_dim\":4").find("are not those") != std::string::npos);
    CHECK(replaced("\"codewords\":5", "\"codewords\":6").find("are not those") != std::string::npos);
    CHECK(replaced("\"depths\":2", "\"depths\":1").find("are not those") != std::string::npos);
    CHECK(replaced("\"tokens\":3", "\"tokens\":-3") ==
          "layers.2.key: field 'tokens' is -3.0, must be a whole number of 0 or more");
    CHECK(replaced("{", "{\"colour\":1,") == "layers.2.key: field 'colour' is not known");
    CHECK(replaced("\"tokens\":3,", "") == "layers.2.key: field 'tokens' is missing");
    CHECK(with([](forgery& f) {
              f.scales_shape = {1, 3};
          }) == "layers.2.key: tensor 'layers.2.key.scales' is F16 [1, 3], but by the metadata it must be F16 [3, 1]");
    CHECK(with([](forgery& f) { f.codes_name = "other"; }) == "layers.2.key: tensor 'layers.2.key.codes' is missing");

    // Metadata.
    CHECK(with([](forgery& f) { f.metadata.erase("layers.2.key.codec"); }) ==
          "layers.2.key: metadata 'layers.2.key.codec' is missing");
    CHECK(with([](forgery& f) { f.metadata.erase("layers.2.key"); }) ==
          "metadata 'layers.2.key.codec' names no layer and side");
    CHECK(with([](forgery& f) { f.metadata["layers.2.keys"] = "{}"; }) ==
          "metadata 'layers.2.keys' names no layer and side");
    CHECK(with([](forgery& f) {
              f.metadata = {{"free", "text"}};
          }) == "holds 2 tensors, but what its metadata names has 0");
}

TEST_CASE("compressed_file: what cannot be saved is refused, and an old file stays", "[files][unit]") {
    const rvqkv::model_codecs codecs = make_codecs();
    const test::temp_dir folder;
    const std::string path = folder.file("compressed");
    test::write_file(path, "old");
    const auto refusal = [&path](const compressed_set& set) {
        const auto done = rvqkv::save_compressed(path, set);
        CHECK(test::read_file(path) == "old");
        return done.ok() ? std::string() : done.error().message;
    };
    CHECK(refusal({}) == path + ": nothing compressed to save");
    compressed_set set = make_set(codecs);
    for (const char* key : {"format", "version", "checksum", "layers.2.key.codec"}) {
        set.metadata = {{key, "x"}};
        CHECK(refusal(set) == path + ": metadata key '" + key + "' is reserved");
    }
    set = make_set(codecs);
    set.layers[65536].key = set.layers[2].key;
    CHECK(refusal(set) == path + ": layer is 65536, must be at most 65535");
    set = make_set(codecs);
    const std::vector<float> weights(4);
    auto book = rvqkv::residual_codebook<>::create({1, 2, 2}, std::span<const float>(weights)).value();
    using quantizer = rvqkv::vector_quantizer<rvqkv::rms_scale, rvqkv::strided_grouping>;
    set.layers[1].key = compress(rvqkv::make_codec(quantizer::create(4, std::move(book)).value()), 1, 1);
    CHECK(refusal(set).find(path + ": layers.1.key: the codec was made from policies that a file cannot name") == 0);
}

TEST_CASE("compressed_file: files that cannot be opened say why", "[files][unit]") {
    const test::temp_dir folder;
    CHECK(rvqkv::load_compressed(folder.file("none"), {}).error().code == error_code::io);
    test::write_file(folder.file("text"), "no such thing as a file of tensors");
    CHECK(rvqkv::load_compressed(folder.file("text"), {}).error().code == error_code::damaged_file);
}
