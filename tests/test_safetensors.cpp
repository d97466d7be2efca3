// SPDX-License-Identifier: MIT
/// @file
/// Reading and writing safetensors: round trips, hostile headers, files that are replaced whole or not at all.
#include "rvqkv/files/safetensors.hpp"
#include "support/allocation_counter.hpp"
#include "support/catch.hpp"
#include "support/temp_dir.hpp"

#include <sys/resource.h>
#include <algorithm>
#include <array>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

namespace {

using rvqkv::bfloat16;
using rvqkv::error_code;
using rvqkv::float16;
using rvqkv::safetensors_file;
using rvqkv::safetensors_writer;
using rvqkv::storage_type;
using rvqkv::tensor_info;

constexpr storage_type all_types[] = {storage_type::boolean,     storage_type::uint8,       storage_type::int8,
                                      storage_type::float8_e4m3, storage_type::float8_e5m2, storage_type::uint16,
                                      storage_type::int16,       storage_type::float8_e8m0, storage_type::float16,
                                      storage_type::uint32,      storage_type::int32,       storage_type::bfloat16,
                                      storage_type::float32,     storage_type::uint64,      storage_type::int64,
                                      storage_type::float64,     storage_type::complex64};

std::span<const std::byte> bytes_of(std::string_view text) {
    return std::as_bytes(std::span<const char>(text));
}

std::string length_prefix(std::uint64_t length) {
    std::string prefix(sizeof(length), '\0');
    std::memcpy(prefix.data(), &length, sizeof(length));
    return prefix;
}

/// A file with this header, as it stands.
std::string with_header(std::string_view header, std::size_t data_bytes = 0) {
    return length_prefix(header.size()) + std::string(header) + std::string(data_bytes, '\1');
}

tensor_info info(std::string name, storage_type type, std::vector<std::size_t> shape) {
    tensor_info made;
    made.name = std::move(name);
    made.type = type;
    made.shape = std::move(shape);
    return made;
}

/// What the reader says of a file, or "" when it takes it.
std::string message_of(std::string_view file) {
    const auto opened = safetensors_file::parse(bytes_of(file));
    return opened.ok() ? "" : opened.error().message;
}

/// Opens bytes that may be anything, and reads all there is. True when that worked.
bool read_everything(std::string_view file) {
    const auto opened = safetensors_file::parse(bytes_of(file));
    if (!opened) {
        return false;
    }
    for (const tensor_info& tensor : opened.value().tensors()) {
        std::vector<std::byte> data(tensor.bytes);
        if (!opened.value().read(tensor, data)) {
            return false;
        }
        static_cast<void>(opened.value().load(tensor.name));
    }
    return true;
}

std::vector<std::string> files_in(const test::temp_dir& folder) {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
        names.push_back(entry.path().filename().string());
    }
    return names;
}

/// While it lives, files cannot grow beyond a size: as on a full disk.
class full_disk {
public:
    explicit full_disk(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
        ::getrlimit(RLIMIT_FSIZE, &before_);
        const rlimit smaller = {bytes, before_.rlim_max};
        ::setrlimit(RLIMIT_FSIZE, &smaller);
    }
    full_disk(const full_disk&) = delete;
    full_disk& operator=(const full_disk&) = delete;
    ~full_disk() {
        ::setrlimit(RLIMIT_FSIZE, &before_);
        std::signal(SIGXFSZ, handler_);
    }

private:
    rlimit before_{};
    void (*handler_)(int);
};

constexpr std::string_view one_tensor = R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}})";

}  // namespace

TEST_CASE("safetensors: every element type comes back, byte for byte", "[files][unit]") {
    const test::temp_dir folder;
    const std::string path = folder.file("all.safetensors");
    std::vector<tensor_info> infos;
    std::string data;
    for (const storage_type type : all_types) {
        infos.push_back(info(std::string(name_of(type)), type, {3, 1, 2}));
        for (std::size_t i = 0; i < 6 * size_of(type); ++i) {
            data += static_cast<char>(data.size() * 37 + 11);
        }
    }
    infos.push_back(info("scalar", storage_type::float64, {}));
    data += "8 bytes!";
    infos.push_back(info("empty", storage_type::float32, {0, 7}));
    const rvqkv::metadata_map metadata = {{"model", "smol"},
                                          {"", "empty key"},
                                          {"escapes", "\"\\\n\x01\x1f\x7f/"},
                                          {"unicode \xe2\x82\xac", "\xf0\x9f\x98\x80"}};
    auto writer = safetensors_writer::create(path, infos, metadata).value();
    // In pieces that do not fit the tensors.
    for (std::size_t at = 0; at < data.size(); at += 7) {
        writer.write(bytes_of(std::string_view(data).substr(at, 7))).value();
    }
    writer.commit().value();
    CHECK(files_in(folder) == std::vector<std::string>{"all.safetensors"});

    const auto file = safetensors_file::open(path).value();
    CHECK(file.metadata() == metadata);
    REQUIRE(file.tensors().size() == infos.size());
    std::size_t offset = 0;
    for (const tensor_info& expected : infos) {
        CAPTURE(expected.name);
        const tensor_info& found = *file.tensor(expected.name).value();
        CHECK(found.type == expected.type);
        CHECK(found.shape == expected.shape);
        CHECK(found.offset == offset);
        std::string read(found.bytes, '\0');
        file.read(found, std::as_writable_bytes(std::span(read))).value();
        CHECK(read == data.substr(offset, found.bytes));
        offset += found.bytes;
    }
    CHECK(offset == data.size());

    const std::string raw = test::read_file(path);
    std::uint64_t length = 0;
    std::memcpy(&length, raw.data(), sizeof(length));
    CHECK((sizeof(length) + length) % 64 == 0);
    CHECK(raw.size() == sizeof(length) + length + data.size());
}

TEST_CASE("safetensors: read_as gives the type that is stored, and no other", "[files][unit]") {
    const test::temp_dir folder;
    const std::string path = folder.file("a");
    const std::int64_t numbers[] = {-1, std::numeric_limits<std::int64_t>::min(), 7};
    auto writer = safetensors_writer::create(path, {info("n", storage_type::int64, {3})}).value();
    writer.write(std::as_bytes(std::span(numbers))).value();
    writer.commit().value();
    const auto file = safetensors_file::open(path).value();
    const auto read = file.read_as<std::int64_t>("n").value();
    CHECK(std::memcmp(read.data(), numbers, sizeof(numbers)) == 0);
    CHECK(read.size() == 3);
    const auto refused = file.read_as<std::uint64_t>("n");
    REQUIRE_FALSE(refused.ok());
    CHECK(refused.error().code == error_code::invalid_argument);
    CHECK(refused.error().message == path + ": tensor 'n': is stored as I64, another type than the one asked for");
    std::array<float, 1> out{};
    CHECK(file.read_floats("n", out).error().message == path + ": tensor 'n': is stored as I64; want F32, F16 or BF16");
    CHECK_FALSE(file.load("n").ok());
}

TEST_CASE("safetensors: strided views are written contiguous and loaded as [token, head, channel]", "[files][unit]") {
    const test::temp_dir folder;
    const std::string path = folder.file("kv.safetensors");
    // [head, token, channel] in memory, channels backwards.
    constexpr std::size_t tokens = 31;
    constexpr std::size_t heads = 3;
    constexpr std::size_t channels = 100;  // rows that do not divide the writer's buffer
    std::vector<float> wide(tokens * heads * channels);
    std::vector<float16> half(wide.size());
    for (std::size_t i = 0; i < wide.size(); ++i) {
        wide[i] = static_cast<float>(i % 2000) - 1000.0F;  // exact in float16
        half[i] = rvqkv::to_float16(wide[i]);
    }
    const rvqkv::tensor_shape shape = {tokens, heads, channels};
    const rvqkv::tensor_strides strides = {channels, tokens * channels, -1};
    const rvqkv::named_tensor named[] = {
        {"strided", {static_cast<const float*>(wide.data()) + channels - 1, shape, strides}},
        {"half", {half.data(), shape}},
        {"empty", {half.data(), {0, heads, channels}}},
    };
    rvqkv::save_safetensors(path, named, {{"layout", "token, head, channel"}}).value();

    const auto file = safetensors_file::open(path).value();
    CHECK(*file.find_metadata("layout") == "token, head, channel");
    CHECK(file.find_metadata("model") == nullptr);
    const auto strided = file.load("strided").value();
    CHECK(strided.shape() == shape);
    CHECK(strided.type() == rvqkv::dtype::float32);
    bool equal = true;
    for (std::size_t t = 0; t < tokens; ++t) {
        for (std::size_t h = 0; h < heads; ++h) {
            const auto* row = static_cast<const float*>(strided.view().row(t, h));
            for (std::size_t c = 0; c < channels; ++c) {
                equal = equal && row[c] == wide[(h * tokens + t) * channels + channels - 1 - c];
            }
        }
    }
    CHECK(equal);

    SECTION("some tokens, in their own type or widened") {
        const auto part = file.load("half", {5, 2}).value();
        CHECK(part.shape() == rvqkv::tensor_shape{2, heads, channels});
        CHECK(part.type() == rvqkv::dtype::float16);
        CHECK(std::memcmp(part.bytes().data(), half.data() + 5 * heads * channels, part.bytes().size()) == 0);
        CHECK(file.load("half", {tokens, rvqkv::token_range::to_the_end}).value().shape().tokens == 0);
        std::vector<float> widened(wide.size() - 7);
        file.read_floats("half", widened, 7).value();
        CHECK(std::equal(widened.begin(), widened.end(), wide.begin() + 7));
        CHECK(file.load("empty").value().bytes().empty());
    }
    SECTION("ranges outside are named") {
        CHECK(file.load("half", {30, 2}).error().message ==
              path + ": tensor 'half': has 31 tokens; wanted 2 from token 30 on");
        CHECK_FALSE(file.load("half", {32, rvqkv::token_range::to_the_end}).ok());
        CHECK_FALSE(file.load("half", {std::numeric_limits<std::size_t>::max() - 1, 3}).ok());
        std::vector<float> out(1);
        CHECK(file.read_floats("half", out, wide.size()).error().message ==
              path + ": tensor 'half': has 9300 elements; wanted 1 from element 9300 on");
        const tensor_info& found = *file.tensor("half").value();
        CHECK_FALSE(file.read(found, std::as_writable_bytes(std::span(out)), found.bytes - 3).ok());
    }
}

TEST_CASE("safetensors: two-dimensional tensors are cut into heads", "[files][unit]") {
    const std::string raw = with_header(R"({"flat":{"dtype":"BF16","shape":[2,6],"data_offsets":[0,24]},)"
                                        R"("line":{"dtype":"F32","shape":[1],"data_offsets":[24,28]},)"
                                        R"("deep":{"dtype":"F32","shape":[1,1,1],"data_offsets":[28,32]}})",
                                        32);
    const auto file = safetensors_file::parse(bytes_of(raw)).value();
    CHECK(file.load("flat").value().shape() == rvqkv::tensor_shape{2, 1, 6});
    CHECK(file.load("flat", {}, 3).value().shape() == rvqkv::tensor_shape{2, 3, 2});
    CHECK(file.load("flat", {}, 4).error().message ==
          "memory: tensor 'flat': rows of 6 channels cannot be cut into 4 heads");
    CHECK(file.load("line").error().message ==
          "memory: tensor 'line': has shape [1]; want [token, head, channel], or [token, channel] with the number of "
          "heads given");
    CHECK(file.load("deep", {}, 1).ok());
    CHECK(file.load("deep", {}, 2).error().message == "memory: tensor 'deep': has 1 heads, not 2");
}

TEST_CASE("safetensors: a missing tensor is named together with those there are", "[files][unit]") {
    std::string header = "{";
    for (int i = 10; i < 33; ++i) {
        header +=
            (i == 10 ? "" : ",") + ("\"t" + std::to_string(i)) + R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
    }
    const std::string raw = with_header(header + "}");
    const auto file = safetensors_file::parse(bytes_of(raw)).value();
    CHECK(file.contains("t10"));
    CHECK_FALSE(file.contains("t1"));
    const auto missing = file.tensor("layers.0.key");
    REQUIRE_FALSE(missing.ok());
    CHECK(missing.error().code == error_code::invalid_argument);
    CHECK(missing.error().message.find("memory: no tensor 'layers.0.key'; it holds 't10', 't11', ") == 0);
    CHECK(missing.error().message.find("'t29' and 3 more") != std::string::npos);
    const std::string none = with_header("{}");
    CHECK(safetensors_file::parse(bytes_of(none)).value().tensor("x").error().message ==
          "memory: no tensor 'x'; it holds none");
}

TEST_CASE("safetensors: hostile headers are refused, naming field and value", "[files][unit]") {
    struct hostile {
        std::string_view header;
        std::size_t data_bytes;
        std::string_view message;
    };
    const hostile cases[] = {
        {"", 0, "header: empty"},
        {" {}", 0, "header: begins with ' ', not with '{'"},
        {"[]", 0, "header: begins with '[', not with '{'"},
        {"{", 0, "header: not valid JSON at byte 1, its end"},
        {"{}{}", 0, "header: not valid JSON at byte 2, near '{}{}'"},
        {"{\"a\":", 0, "header: not valid JSON at byte 5, its end"},
        {"{\"\xff\":{}}", 0, "header: not valid JSON at byte 2, near '{\"\xff\":{}}'"},
        {"{\"\\ud800\":{}}", 0, "header: not valid JSON at byte 8, near '{\"\\ud800\":{}}'"},
        {R"({"a":1e999})", 0, "header: not valid JSON at byte 9, near '{\"a\":1e999}'"},
        {R"({"a":1})", 0, "header: tensor 'a': an object is wanted, not 1"},
        {R"({"a":"b"})", 0, "header: tensor 'a': an object is wanted, not the text 'b'"},
        {R"({"a":null})", 0, "header: tensor 'a': an object is wanted, not null"},
        {R"({"a":[]})", 0, "header: tensor 'a': an object is wanted, not an array"},
        {R"({"a\n":true})", 0, "header: tensor 'a\\x0a': an object is wanted, not true"},
        {R"({"__metadata__":{},"__metadata__":{}})", 0, "header: __metadata__ appears twice"},
        {R"({"__metadata__":{"k":"1","k":"1"}})", 0, "header: metadata 'k' appears twice"},
        {R"({"__metadata__":{"k":1}})", 0, "header: metadata 'k': text is wanted, not 1"},
        {R"({"__metadata__":{"k":{}}})", 0, "header: metadata 'k': text is wanted, not an object"},
        {R"({"__metadata__":[]})", 0, "header: tensor '__metadata__': an object is wanted, not an array"},
        {R"({"a":{}})", 0, "header: tensor 'a': field 'dtype' is missing"},
        {R"({"a":{"dtype":"F32"}})", 0, "header: tensor 'a': field 'shape' is missing"},
        {R"({"a":{"dtype":"F32","shape":[]}})", 0, "header: tensor 'a': field 'data_offsets' is missing"},
        {R"({"a":{"dtype":"F33"}})", 0, "header: tensor 'a': dtype 'F33' is not known"},
        {R"({"a":{"dtype":"f32"}})", 0, "header: tensor 'a': dtype 'f32' is not known"},
        {R"({"a":{"dtype":32}})", 0, "header: tensor 'a': dtype: text is wanted, not 32"},
        {R"({"a":{"dtype":"F32","dtype":"F32"}})", 0, "header: tensor 'a': field 'dtype' appears twice"},
        {R"({"a":{"stride":[]}})", 0, "header: tensor 'a': field 'stride' is not known"},
        {R"({"a":{"shape":1}})", 0, "header: tensor 'a': shape: an array is wanted, not 1"},
        {R"({"a":{"shape":"[1]"}})", 0, "header: tensor 'a': shape: an array is wanted, not the text '[1]'"},
        {R"({"a":{"shape":[-1]}})", 0, "header: tensor 'a': shape: numbers of 0 or more are wanted, not -1"},
        {R"({"a":{"shape":[1.0]}})", 0, "header: tensor 'a': shape: numbers of 0 or more are wanted, not 1.0"},
        {R"({"a":{"shape":[1e2]}})", 0, "header: tensor 'a': shape: numbers of 0 or more are wanted, not 1e2"},
        {R"({"a":{"shape":[18446744073709551616]}})", 0,
         "header: tensor 'a': shape: numbers of 0 or more are wanted, not 18446744073709551616"},
        {R"({"a":{"shape":["1"]}})", 0, "header: tensor 'a': shape: numbers of 0 or more are wanted, not the text '1'"},
        {R"({"a":{"shape":[[1]]}})", 0, "header: tensor 'a': shape: numbers of 0 or more are wanted, not an array"},
        {R"({"a":{"shape":[{}]}})", 0, "header: tensor 'a': shape: numbers of 0 or more are wanted, not an object"},
        {R"({"a":{"data_offsets":[0]}})", 0, "header: tensor 'a': data_offsets holds 1 numbers, not 2"},
        {R"({"a":{"data_offsets":[0,0,0]}})", 0, "header: tensor 'a': data_offsets holds more than 2 numbers"},
        {R"({"a":{"data_offsets":[0,-4]}})", 0,
         "header: tensor 'a': data_offsets: numbers of 0 or more are wanted, not -4"},
        {R"({"a":{"data_offsets":{}}})", 0, "header: tensor 'a': data_offsets: an array is wanted, not an object"},
        {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4,
         "header: tensor 'a': data_offsets [4, 0] end before they begin"},
        {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4,
         "header: tensor 'a': data_offsets [0, 4] span 4 bytes, but shape [2] of F32 takes 8"},
        {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}})", 8,
         "header: tensor 'a': data_offsets [0, 8] span 8 bytes, but shape [1] of F32 takes 4"},
        {R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0,
         "header: tensor 'a': shape [4294967296, 4294967296] overflows"},
        {R"({"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}})", 0,
         "header: tensor 'a': shape [4611686018427387904] overflows"},
        {R"({"a":{"dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}})", 0,
         "header: tensor 'a': shape [0, 4294967296, 4294967296] overflows"},
        {R"({"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}})", 4,
         "the tensors take 18446744073709551615 bytes of data, but the file has 4"},
        {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 3,
         "the tensors take 4 bytes of data, but the file has 3"},
        {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 5,
         "the tensors take 4 bytes of data, but the file has 5"},
        {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[1,5]}})", 5,
         "header: tensor 'a': begins at byte 1 of the data, leaving a hole before byte 1"},
        {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}})",
         7, "header: tensor 'b': begins at byte 3 of the data, inside another tensor before byte 4"},
        {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
         4, "header: tensor 'b': begins at byte 0 of the data, inside another tensor before byte 4"},
        {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
         8, "header: tensor 'a' appears twice"},
    };
    for (const hostile& each : cases) {
        CAPTURE(each.header);
        CHECK(message_of(with_header(each.header, each.data_bytes)) == "memory: " + std::string(each.message));
    }
    CHECK(message_of(with_header(std::string_view("{}\0 ", 4))) == "memory: header: not valid JSON at byte 2, a zero");
    std::string wide = R"({"a":{"shape":[1)";
    for (int i = 1; i < 65; ++i) {
        wide += ",1";
    }
    CHECK(message_of(with_header(wide + "]}}")) == "memory: header: tensor 'a': shape has more than 64 dimensions");
    // Spaces after the header are the format's padding.
    CHECK(message_of(with_header(std::string(one_tensor) + "   ", 24)).empty());
}

TEST_CASE("safetensors: nesting of any depth is refused at its first illegal level", "[files][unit]") {
    for (const std::string_view lead : {"{\"a\":", "{\"a\":{\"shape\":[", "{\"__metadata__\":{\"k\":"}) {
        for (const std::string_view level : {"[", "{\"b\":"}) {
            std::string header(lead);
            for (int i = 0; i < 1000000; ++i) {
                header += level;
            }
            const std::string message = message_of(with_header(header));
            CAPTURE(message);
            CHECK((message.find("wanted, not an ") != std::string::npos ||
                   message == "memory: header: tensor 'a': field 'b' is not known"));
        }
    }
}

TEST_CASE("safetensors: the header's length is checked against limit, file and byte order", "[files][unit]") {
    const std::string good = with_header(one_tensor, 24);
    CHECK(message_of(good).empty());
    CHECK(message_of(good.substr(0, 5)) ==
          "memory: a safetensors file begins with 8 bytes of header length, this one has 5 bytes in all");
    CHECK(message_of(length_prefix(10) + "123456789") == "memory: header length 10 exceeds the file of 17 bytes");
    CHECK(message_of(length_prefix(100'000'001) + good.substr(8)) ==
          "memory: header length 100000001 exceeds the format's limit of 100000000");
    const std::uint64_t largest = std::numeric_limits<std::uint64_t>::max();
    CHECK(message_of(length_prefix(largest) + good.substr(8)) ==
          "memory: header length 18446744073709551615 exceeds the format's limit of 100000000");
    CHECK(message_of(length_prefix(__builtin_bswap64(one_tensor.size())) + good.substr(8)) ==
          "memory: header length 4107282860161892352 is 57 in big-endian order; safetensors files are little-endian");
}

TEST_CASE("safetensors: no truncation is taken, and no flipped bit does harm", "[files][fuzz]") {
    const std::string good =
        with_header(R"({"__metadata__":{"k":"v\u00e9"},"a":{"dtype":"F16","shape":[2,1,3],"data_offsets":[0,12]},)"
                    R"("b":{"dtype":"F32","shape":[1,2],"data_offsets":[12,20]}})",
                    20);
    REQUIRE(read_everything(good));
    for (std::size_t length = 0; length < good.size(); ++length) {
        CAPTURE(length);
        // A copy of exactly this size, so that a sanitizer sees a byte read beyond it.
        const std::vector<char> cut(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(length));
        CHECK_FALSE(read_everything({cut.data(), cut.size()}));
    }
    CHECK_FALSE(read_everything(good + '\0'));
    for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
        std::string flipped = good;
        flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
        static_cast<void>(read_everything(flipped));
    }
}

TEST_CASE("safetensors: a checksum finds every flipped bit", "[files][unit]") {
    const test::temp_dir folder;
    const std::string path = folder.file("sealed");
    auto writer = safetensors_writer::create(path, {info("a", storage_type::uint8, {70000})}, {{"b", "c"}},
                                             rvqkv::with_checksum::yes)
                      .value();
    writer.write(bytes_of(std::string(70000, 'x'))).value();
    writer.commit().value();
    CHECK(safetensors_file::open(path).value().verify_checksum().ok());

    const std::string good = test::read_file(path);
    CHECK(good.find(R"({"__metadata__":{"checksum":")") == 8);
    std::string zeroed = good;
    zeroed.replace(37, 16, 16, '0');
    rvqkv::checksum sum;
    sum.update(bytes_of(zeroed));
    CHECK(good.substr(37, 16) == sum.hex());

    const auto verify = [](std::string_view raw) {
        const auto file = safetensors_file::parse(bytes_of(raw));
        return file.ok() ? file.value().verify_checksum() : rvqkv::status(file.error());
    };
    CHECK(verify(good).ok());
    for (std::size_t byte : {std::size_t{0}, std::size_t{9}, std::size_t{37}, std::size_t{52}, std::size_t{60},
                             std::size_t{65535}, std::size_t{65536}, good.size() - 1}) {
        for (unsigned bit = 0; bit < 8; ++bit) {
            CAPTURE(byte, bit);
            std::string flipped = good;
            flipped[byte] = static_cast<char>(flipped[byte] ^ (1 << bit));
            const auto verdict = verify(flipped);
            REQUIRE_FALSE(verdict.ok());
            CHECK(verdict.error().code == error_code::damaged_file);
        }
    }
    CHECK(verify(with_header(one_tensor, 24)).error().message == "memory: no checksum stands first in the header");
    CHECK(verify(with_header("{}")).error().message == "memory: no checksum stands first in the header");
}

TEST_CASE("checksum: XXH3-64 of the whole, however it is cut", "[files][unit]") {
    // From the reference implementation: XXH3_64bits of nothing, and of bytes 0, 1, 2, ... 255.
    CHECK(rvqkv::checksum().hex() == "2d06800538d394c2");
    std::string bytes;
    for (int i = 0; i < 4096; ++i) {
        bytes += static_cast<char>(i);
    }
    rvqkv::checksum whole;
    whole.update(bytes_of(bytes));
    rvqkv::checksum pieces;
    for (std::size_t at = 0; at < bytes.size(); at += 100) {
        pieces.update(bytes_of(std::string_view(bytes).substr(at, 100)));
        pieces.update({});
    }
    CHECK(whole.hex() == pieces.hex());
}

TEST_CASE("safetensors_writer: refuses what no reader would take", "[files][unit]") {
    const test::temp_dir folder;
    const std::string path = folder.file("refused");
    const auto refusal = [&path](std::vector<tensor_info> tensors, const rvqkv::metadata_map& metadata = {},
                                 rvqkv::with_checksum sealed = rvqkv::with_checksum::no) {
        const auto writer = safetensors_writer::create(path, std::move(tensors), metadata, sealed);
        if (writer.ok()) {
            return std::string();
        }
        CHECK(writer.error().code == error_code::invalid_argument);
        return writer.error().message;
    };
    const auto u8 = storage_type::uint8;
    CHECK(refusal({info("a", u8, {1}), info("a", u8, {2})}) == path + ": header: tensor 'a' appears twice");
    CHECK(refusal({info("\xff", u8, {1})}).find(path + ": header: not valid JSON at byte 2") == 0);
    CHECK(refusal({}, {{"k", "\xc3"}}).find(path + ": header: not valid JSON at byte") == 0);
    CHECK(refusal({info("__metadata__", u8, {1})}) == path + ": no tensor may be named '__metadata__'");
    const std::size_t half = std::size_t{1} << 63U;
    CHECK(refusal({info("a", u8, {half, 2})}) == path + ": tensor 'a': shape [9223372036854775808, 2] overflows");
    CHECK(refusal({info("a", u8, {half}), info("b", u8, {half})}) ==
          path + ": tensor 'b': shape [9223372036854775808] overflows");
    CHECK(refusal({info("a", u8, std::vector<std::size_t>(65, 1))}) ==
          path + ": header: tensor 'a': shape has more than 64 dimensions");
    CHECK(refusal({}, {{"checksum", "0"}}, rvqkv::with_checksum::yes) ==
          path + ": metadata 'checksum' is set by the writer itself");
    CHECK(files_in(folder).empty());
}

TEST_CASE("safetensors_writer: an old file survives whatever fails", "[files][unit]") {
    const test::temp_dir folder;
    const std::string path = folder.file("kept");
    test::write_file(path, "the old file");
    const std::vector<tensor_info> infos = {info("a", storage_type::float32, {25000})};
    const std::string data(100000, 'd');
    rvqkv::status outcome;

    SECTION("a writer that is given up") {
        auto writer = safetensors_writer::create(path, infos).value();
        outcome = writer.write(bytes_of(data));
        CHECK(outcome.ok());
        CHECK(test::read_file(path) == "the old file");
        CHECK(files_in(folder).size() == 2);
    }
    SECTION("bytes missing") {
        auto writer = safetensors_writer::create(path, infos).value();
        writer.write(bytes_of(data).first(99999)).value();
        outcome = writer.commit();
        CHECK(outcome.error().message == "tensor 'a': only 99999 of 100000 bytes were written");
        CHECK_FALSE(writer.write(bytes_of("d")).ok());
    }
    SECTION("bytes too many") {
        auto writer = safetensors_writer::create(path, infos).value();
        writer.write(bytes_of(data)).value();
        outcome = writer.write(bytes_of("dd"));
        CHECK(outcome.error().message == "2 bytes more than the tensors take");
        CHECK_FALSE(writer.commit().ok());
    }
    SECTION("another element type") {
        auto writer = safetensors_writer::create(path, infos).value();
        const std::vector<bfloat16> other(25000);
        outcome = writer.write(rvqkv::tensor_view(other.data(), {25000, 1, 1}));
        CHECK(outcome.error().message == "tensor 'a': given as bfloat16, but declared as F32");
        CHECK_FALSE(writer.commit().ok());
    }
    SECTION("a full disk") {
        auto writer = safetensors_writer::create(path, infos).value();
        {
            const full_disk limit(50000);
            outcome = writer.write(bytes_of(data));
        }
        CHECK(outcome.error().code == error_code::io);
        CHECK(outcome.error().message.find(path + ": cannot write the file: ") == 0);
        CHECK_FALSE(writer.commit().ok());
    }
    SECTION("a full disk at the header") {
        const full_disk limit(0);
        const auto writer = safetensors_writer::create(path, infos);
        CHECK(writer.error().code == error_code::io);
    }
    SECTION("a target that became a folder") {
        auto writer = safetensors_writer::create(folder.file("other"), infos).value();
        writer.write(bytes_of(data)).value();
        std::filesystem::create_directory(folder.file("other"));
        outcome = writer.commit();
        CHECK(outcome.error().code == error_code::io);
        CHECK(outcome.error().message.find(folder.file("other") + ": cannot put the new file in place: ") == 0);
        std::filesystem::remove(folder.file("other"));
    }
    CHECK(test::read_file(path) == "the old file");
    // `files_in` runs after the writers are gone.
    CHECK(files_in(folder) == std::vector<std::string>{"kept"});
}

TEST_CASE("safetensors_writer: replaces a file in one step", "[files][unit]") {
    const test::temp_dir folder;
    const std::string path = folder.file("replaced");
    test::write_file(path, with_header(one_tensor, 24));
    std::filesystem::permissions(path, std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
    const auto before = safetensors_file::open(path).value();

    const auto write_nothing = [](const std::string& target) {
        return safetensors_writer::create(target, {}).value().commit();
    };
    SECTION("keeping permissions; who has the old one open goes on reading it") {
        write_nothing(path).value();
        CHECK(safetensors_file::open(path).value().tensors().empty());
        CHECK(static_cast<unsigned>(std::filesystem::status(path).permissions()) == 0600U);
        CHECK(before.read_as<float>("a").value().size() == 6);
    }
    SECTION("through a link, which stays one") {
        const std::string link = folder.file("link");
        std::filesystem::create_symlink(path, link);
        write_nothing(link).value();
        CHECK(std::filesystem::is_symlink(link));
        CHECK(safetensors_file::open(path).value().tensors().empty());
    }
    SECTION("two writers at once do not meet") {
        auto one = safetensors_writer::create(path, {info("one", storage_type::uint8, {1})}).value();
        auto two = safetensors_writer::create(path, {info("two", storage_type::uint8, {1})}).value();
        one.write(bytes_of("1")).value();
        two.write(bytes_of("2")).value();
        one.commit().value();
        two.commit().value();
        CHECK(safetensors_file::open(path).value().contains("two"));
    }
    SECTION("but nothing that is not a file") {
        const auto refused = safetensors_writer::create("/dev/null", {});
        REQUIRE_FALSE(refused.ok());
        CHECK(refused.error().message == "/dev/null: not a regular file, so not replaced by one");
        CHECK_FALSE(safetensors_writer::create(folder.path(), {}).ok());
    }
    SECTION("nor in a folder that is not there") {
        const auto refused = safetensors_writer::create(folder.file("no/file"), {});
        REQUIRE_FALSE(refused.ok());
        CHECK(refused.error().code == error_code::io);
    }
}

TEST_CASE("safetensors: files that cannot be opened say why", "[files][unit]") {
    const test::temp_dir folder;
    const auto missing = safetensors_file::open(folder.file("missing"));
    REQUIRE_FALSE(missing.ok());
    CHECK(missing.error().code == error_code::io);
    CHECK(missing.error().message == folder.file("missing") + ": cannot open the file: No such file or directory");
    CHECK(safetensors_file::open(folder.path()).error().message == folder.path().string() + ": not a regular file");
    CHECK(safetensors_file::open("/dev/zero").error().message == "/dev/zero: not a regular file");
}

TEST_CASE("safetensors: a file that shrinks while it is read is an error", "[files][unit]") {
    const test::temp_dir folder;
    const std::string path = folder.file("shrinks");
    test::write_file(path, with_header(one_tensor, 24));
    const auto file = safetensors_file::open(path).value();
    std::filesystem::resize_file(path, 70);
    const auto read = file.read_as<float>("a");
    REQUIRE_FALSE(read.ok());
    CHECK(read.error().code == error_code::damaged_file);
}

TEST_CASE("safetensors: reading holds the tensor asked for and little else", "[files][unit]") {
    const test::temp_dir folder;
    const std::string path = folder.file("large");
    constexpr std::size_t tokens = 4096;
    std::vector<float16> numbers(tokens * 128);
    for (std::size_t i = 0; i < numbers.size(); ++i) {
        numbers[i].bits = static_cast<std::uint16_t>(i % 31744);
    }
    const rvqkv::tensor_view view(numbers.data(), {tokens, 2, 64});
    const rvqkv::named_tensor named[] = {{"key", view}, {"value", view}, {"query", view}};
    rvqkv::save_safetensors(path, named).value();

    const std::ptrdiff_t size = tokens * 128 * 2;
    const std::ptrdiff_t slack = 16384;
    std::vector<float> widened(numbers.size());
    const test::allocation_counter counter;
    const auto file = safetensors_file::open(path).value();
    CHECK(counter.peak_bytes() < slack);
    {
        const auto tensor = file.load("value").value();
        CHECK(tensor.bytes().size() == numbers.size() * 2);
    }
    CHECK(counter.peak_bytes() < size + slack);
    const test::allocation_counter again;
    file.read_floats("query", widened).value();
    CHECK(again.peak_bytes() < slack);
    CHECK(widened[31743] == 65504.0F);
}
