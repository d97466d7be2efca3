// SPDX-License-Identifier: MIT
/// @file
/// What the test script of the program cannot see by itself:
///   check json                                     stdin is JSON
///   check round_trip TENSORS CODECS FIRST BACK     BACK holds, bit for bit, what the codecs make of the tokens of
///                                                  TENSORS from FIRST on, in float32
#include <rvqkv/files.hpp>
#include <rvqkv/rvqkv.hpp>

#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace {

bool is_same(const rvqkv::codec& codec, const rvqkv::owned_tensor& exact, const rvqkv::owned_tensor& back) {
    const rvqkv::tensor_view x = exact.view();
    std::vector<rvqkv::code_t> codes(x.rows() * codec.groups() * codec.depths());
    std::vector<float> scales(x.rows());
    std::vector<float> out(x.rows() * x.channels());
    const rvqkv::code_strides strides{codec.depths(), 1};
    rvqkv::quantizer_workspace workspace;
    codec.encode(x, {codes.data(), strides, scales.data()}, workspace).value();
    codec.decode({codes.data(), strides, scales.data()}, {out.data(), x.shape()}, codec.depths(), workspace).value();
    return back.type() == rvqkv::dtype::float32 && back.shape() == x.shape() &&
           std::memcmp(back.bytes().data(), out.data(), back.bytes().size()) == 0;
}

int check_round_trip(char** arguments) {
    const auto tensors = rvqkv::safetensors_file::open(arguments[0]).value();
    const auto codecs = rvqkv::load_codecs(arguments[1]).value();
    const std::size_t first = std::stoul(arguments[2]);
    const auto back = rvqkv::safetensors_file::open(arguments[3]).value();
    std::size_t compared = 0;
    for (const auto& layer : codecs.layers) {
        for (const bool is_key : {true, false}) {
            const std::string name = "layers." + std::to_string(layer.first) + (is_key ? ".key" : ".value");
            if (!is_same(*(is_key ? layer.second.key : layer.second.value),
                         tensors.load(name, {first, rvqkv::token_range::to_the_end}).value(),
                         back.load(name).value())) {
                std::fprintf(stderr, "%s differs\n", name.c_str());
                return 1;
            }
            ++compared;
        }
    }
    return compared == back.tensors().size() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) try {
    const std::string_view command = argc > 1 ? argv[1] : "";
    if (command == "json" && argc == 2) {
        return nlohmann::json::accept(std::cin) ? 0 : 1;
    }
    if (command == "round_trip" && argc == 6) {
        return check_round_trip(argv + 2);
    }
    std::fputs("usage: check json | check round_trip TENSORS CODECS FIRST BACK\n", stderr);
    return 2;
} catch (const std::exception& failure) {
    std::fprintf(stderr, "check: %s\n", failure.what());
    return 1;
}
