// SPDX-License-Identifier: MIT
/// @file
/// Reading and writing .npy files.
#include "rvqkv/files/npy.hpp"
#include "support/catch.hpp"
#include "support/temp_dir.hpp"

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace {

using rvqkv::bfloat16;
using rvqkv::error_code;
using rvqkv::float16;
using rvqkv::npy_file;

std::span<const std::byte> bytes_of(std::string_view text) {
    return std::as_bytes(std::span<const char>(text));
}

/// A file of a version with this header, as it stands.
std::string with_header(std::string_view header, std::size_t data_bytes, int version = 1) {
    std::string file = "\x93NUMPY";
    file += {static_cast<char>(version), '\0', static_cast<char>(header.size() & 0xffU),
             static_cast<char>(header.size() >> 8U)};
    file += version == 1 ? std::string() : std::string(2, '\0');
    return file + std::string(header) + std::string(data_bytes, '\1');
}

std::string message_of(std::string_view file) {
    const auto opened = npy_file::parse(bytes_of(file));
    return opened.ok() ? "" : opened.error().message;
}

constexpr std::string_view plain = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 4), }\n";

}  // namespace

TEST_CASE("npy: float32, float16 and bfloat16 come back, whatever the strides were", "[files][unit]") {
    const test::temp_dir folder;
    const std::string path = folder.file("x.npy");
    const std::vector<float> numbers = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
    const rvqkv::tensor_shape shape = {2, 3, 2};
    // [channel, head, token] in memory
    rvqkv::save_npy(path, {numbers.data(), shape, {1, 2, 6}}).value();
    const auto file = npy_file::open(path).value();
    CHECK(file.type() == rvqkv::dtype::float32);
    CHECK(std::vector<std::size_t>(file.shape().begin(), file.shape().end()) == std::vector<std::size_t>{2, 3, 2});
    const auto tensor = file.load().value();
    CHECK(tensor.shape() == shape);
    const auto* read = reinterpret_cast<const float*>(tensor.bytes().data());
    CHECK(std::vector<float>(read, read + 12) == std::vector<float>{1, 7, 3, 9, 5, 11, 2, 8, 4, 10, 6, 12});
    CHECK((test::read_file(path).size() - 48) % 64 == 0);
    CHECK(test::read_file(path).substr(6, 2) == std::string("\1\0", 2));

    const auto round_trip = [&](const auto& halves, rvqkv::dtype type) {
        rvqkv::save_npy(path, {halves.data(), {2, 3, 2}}).value();
        const auto loaded = npy_file::open(path).value().load({1, 1}).value();
        CHECK(loaded.type() == type);
        CHECK(loaded.shape() == rvqkv::tensor_shape{1, 3, 2});
        CHECK(std::memcmp(loaded.bytes().data(), halves.data() + 6, 12) == 0);
    };
    std::vector<float16> halves(12);
    std::vector<bfloat16> brains(12);
    for (std::size_t i = 0; i < 12; ++i) {
        halves[i] = rvqkv::to_float16(numbers[i]);
        brains[i] = rvqkv::to_bfloat16(numbers[i]);
    }
    round_trip(halves, rvqkv::dtype::float16);
    round_trip(brains, rvqkv::dtype::bfloat16);

    rvqkv::save_npy(path, {numbers.data(), {0, 3, 2}}).value();
    CHECK(npy_file::open(path).value().load().value().shape() == rvqkv::tensor_shape{0, 3, 2});
}

TEST_CASE("npy: headers as NumPy writes them, and as it may", "[files][unit]") {
    CHECK(message_of(with_header(plain, 96)).empty());
    CHECK(message_of(with_header(plain, 96, 2)).empty());
    CHECK(message_of(with_header(plain, 96, 3)).empty());
    CHECK(message_of(with_header("{\"shape\":(2,3,4),\"fortran_order\":False,\"descr\":\"|V2\"}", 48)).empty());
    CHECK(message_of(with_header("{'descr': '<f2', 'fortran_order': False, 'shape': (5,), }", 10)).empty());
    CHECK(message_of(with_header("{'descr': '<V2', 'fortran_order': False, 'shape': (), }  \n", 2)).empty());
    const std::string flat = with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 6), }", 48);
    const auto file = npy_file::parse(bytes_of(flat)).value();
    CHECK(file.load().value().shape() == rvqkv::tensor_shape{2, 1, 6});
    CHECK(file.load({}, 2).value().shape() == rvqkv::tensor_shape{2, 2, 3});
    CHECK(file.load({}, 5).error().message == "memory: rows of 6 channels cannot be cut into 5 heads");
    CHECK(file.load({1, 2}).error().message == "memory: has 2 tokens; wanted 2 from token 1 on");
    const std::string line = with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", 8);
    CHECK(npy_file::parse(bytes_of(line)).value().load().error().code == error_code::invalid_argument);
}

TEST_CASE("npy: hostile files are refused, naming field and value", "[files][unit]") {
    struct hostile {
        std::string_view header;
        std::size_t data_bytes;
        std::string_view message;
    };
    const hostile cases[] = {
        {"", 0, "header: a dictionary, '{' is wanted at byte 0, its end"},
        {"[]", 0, "header: a dictionary, '{' is wanted at byte 0, not '[]'"},
        {"{", 0, "header: a key in quotes and ':' is wanted at byte 1, its end"},
        {"{}", 0, "header: key 'descr' is missing"},
        {"{'descr': '<f4'}", 0, "header: key 'fortran_order' is missing"},
        {"{'descr': '<f4', 'fortran_order': False}", 0, "header: key 'shape' is missing"},
        {"{'order': 1}", 0, "header: key 'order' is not known"},
        {"{'descr': '<f4', 'descr': '<f4'}", 0, "header: key 'descr' appears twice"},
        {"{'descr' '<f4'}", 0, "header: a key in quotes and ':' is wanted at byte 9, not ''<f4'}'"},
        {"{'descr': '<f4' 'shape': ()}", 0, "header: ',' or '}' is wanted at byte 16, not ''shape': ()}'"},
        {"{'descr': <f4}", 0, "header: an element type in quotes is wanted at byte 10, not '<f4}'"},
        {"{'descr': '<f4", 0, "header: an element type in quotes is wanted at byte 10, not ''<f4'"},
        {"{'descr': '>f4'}", 0,
         "header: descr: '>f4' is big-endian; save the array in little-endian order, e.g. array.astype('<f4')"},
        {"{'descr': '<f8'}", 0, "header: descr: '<f8'; want '<f4', '<f2' or '|V2' (bfloat16)"},
        {"{'descr': '|O'}", 0, "header: descr: '|O'; want '<f4', '<f2' or '|V2' (bfloat16)"},
        {"{'descr': [('x', '<f4')]}", 0, "header: descr: structured elements; want '<f4', '<f2' or '|V2' (bfloat16)"},
        {"{'fortran_order': True}", 0,
         "header: fortran_order: True; save the array in C order, e.g. numpy.ascontiguousarray(array)"},
        {"{'fortran_order': 0}", 0, "header: True or False is wanted at byte 18, not '0}'"},
        {"{'shape': [2]}", 0, "header: a shape, '(' is wanted at byte 10, not '[2]}'"},
        {"{'shape': (-2,)}", 0, "header: a number of 0 or more in the shape is wanted at byte 11, not '-2,)}'"},
        {"{'shape': (2.0,)}", 0, "header: ',' or ')' in the shape is wanted at byte 12, not '.0,)}'"},
        {"{'shape': (2 3)}", 0, "header: ',' or ')' in the shape is wanted at byte 13, not '3)}'"},
        {"{'shape': (18446744073709551616,)}", 0, "header: shape: '18446744073709551616,)}' overflows"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}", 0,
         "header: shape [4294967296, 4294967296] overflows"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4294967296, 4294967296)}", 0,
         "header: shape [0, 4294967296, 4294967296] overflows"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904,)}", 0,
         "header: shape [4611686018427387904] overflows"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)} x", 8,
         "header: nothing more is wanted at byte 56, not 'x'"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", 7,
         "shape [2] of float32 takes 8 bytes, but the file has 7 after its header"},
        {"{'descr': '<f2', 'fortran_order': False, 'shape': (2,)}", 8,
         "shape [2] of float16 takes 4 bytes, but the file has 8 after its header"},
    };
    for (const hostile& each : cases) {
        CAPTURE(each.header);
        CHECK(message_of(with_header(each.header, each.data_bytes)) == "memory: " + std::string(each.message));
    }
    std::string dimensions = "{'shape': (";
    for (int i = 0; i < 65; ++i) {
        dimensions += "1,";
    }
    CHECK(message_of(with_header(dimensions, 0)) == "memory: header: shape has more than 64 dimensions");
    CHECK(message_of("\x93NUMPY") == "memory: too short for a .npy file: 6 bytes");
    CHECK(message_of("not a file of numpy") == "memory: not a .npy file: does not begin with '\\x93NUMPY'");
    CHECK(message_of(with_header(plain, 96, 4)) == "memory: .npy version 4.0; want 1.0, 2.0 or 3.0");
    std::string minor = with_header(plain, 96);
    minor[7] = '\1';
    CHECK(message_of(minor) == "memory: .npy version 1.1; want 1.0, 2.0 or 3.0");
    std::string swapped = with_header(plain, 96, 2);
    std::swap(swapped[8], swapped[11]);
    CHECK(message_of(swapped).find("exceeds the limit of 65536") != std::string::npos);
    std::string longer = with_header(plain, 0);
    longer[8] = '\x7f';
    CHECK(message_of(longer) == "memory: header length 127 exceeds the file of 73 bytes");
    CHECK(message_of(std::string_view("\x93NUMPY\2\0\0\0", 10)) ==
          "memory: header length 0 exceeds the file of 10 bytes");
}

TEST_CASE("npy: no truncation is taken, and no flipped bit does harm", "[files][fuzz]") {
    for (const int version : {1, 2}) {
        const std::string good = with_header(plain, 96, version);
        REQUIRE(message_of(good).empty());
        for (std::size_t length = 0; length < good.size(); ++length) {
            CAPTURE(length);
            const std::vector<char> cut(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(length));
            CHECK_FALSE(npy_file::parse(std::as_bytes(std::span(cut))).ok());
        }
        CHECK_FALSE(npy_file::parse(bytes_of(good + 'x')).ok());
        for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
            std::string flipped = good;
            flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
            if (const auto file = npy_file::parse(bytes_of(flipped)); file.ok()) {
                static_cast<void>(file.value().load());
            }
        }
    }
}

TEST_CASE("npy: an old file survives a failure", "[files][unit]") {
    const test::temp_dir folder;
    std::filesystem::create_directory(folder.file("folder.npy"));
    const std::vector<float> numbers(4);
    CHECK_FALSE(rvqkv::save_npy(folder.file("folder.npy"), {numbers.data(), {1, 1, 4}}).ok());
    CHECK_FALSE(rvqkv::save_npy(folder.file("none/x.npy"), {numbers.data(), {1, 1, 4}}).ok());
    CHECK_FALSE(npy_file::open(folder.file("none/x.npy")).ok());
}
