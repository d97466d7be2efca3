// SPDX-License-Identifier: MIT
#include "support/data.hpp"

#include "rvqkv/core/simd_level.hpp"
#include "rvqkv/files/npy.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

namespace bench {
namespace {

std::string& data_folder() {
    static std::string folder;
    return folder;
}

rvqkv::aligned_buffer<float> load(const std::string& path) {
    const auto file = rvqkv::npy_file::open(path);
    const auto tensor = file ? file.value().load() : rvqkv::result<rvqkv::owned_tensor>(file.error());
    if (!tensor || tensor.value().type() != rvqkv::dtype::float32) {
        std::fprintf(stderr, "rvqkv_benchmarks: %s; --data DIR names the folder that benchmarks/prepare.py filled\n",
                     tensor ? (path + " is not float32").c_str() : tensor.error().message.c_str());
        std::exit(1);
    }
    const auto bytes = tensor.value().bytes();
    rvqkv::aligned_buffer<float> numbers(bytes.size() / sizeof(float));
    std::memcpy(numbers.data(), bytes.data(), bytes.size());
    return numbers;
}

/// Each file is read once.
const rvqkv::aligned_buffer<float>& load_once(const std::string& name) {
    static std::map<std::string, rvqkv::aligned_buffer<float>> loaded;
    auto found = loaded.find(name);
    if (found == loaded.end()) {
        found = loaded.emplace(name, load(data_folder() + "/" + name + ".npy")).first;
    }
    return found->second;
}

std::string sizes(const rvqkv::codebook_shape& shape) {
    return std::to_string(shape.depths) + "x" + std::to_string(shape.codewords) + "x" + std::to_string(shape.dim);
}

}  // namespace

void set_data_folder(std::string folder) {
    data_folder() = std::move(folder);
}

const rvqkv::aligned_buffer<float>& held_out_vectors(std::size_t dim) {
    return load_once("held_out_" + std::to_string(dim));
}

const rvqkv::aligned_buffer<float>& training_vectors(std::size_t dim) {
    return load_once("training_" + std::to_string(dim));
}

const rvqkv::aligned_buffer<float>& weights(const rvqkv::codebook_shape& shape) {
    return load_once("codebook_" + sizes(shape));
}

const std::vector<rvqkv::residual_codebook<>>& codebooks(const rvqkv::codebook_shape& shape) {
    static std::map<std::string, std::vector<rvqkv::residual_codebook<>>> made;
    std::vector<rvqkv::residual_codebook<>>& books = made[sizes(shape)];
    while (books.size() < copies) {
        books.push_back(rvqkv::residual_codebook<>::create(shape, weights(shape).span()).value());
    }
    return books;
}

std::string label(const rvqkv::codebook_shape& shape, std::size_t rows, bool with_depths) {
    return (with_depths ? "depths:" + std::to_string(shape.depths) + "/" : std::string()) +
           "codewords:" + std::to_string(shape.codewords) + "/dim:" + std::to_string(shape.dim) +
           "/rows:" + std::to_string(rows);
}

std::string level_label(rvqkv::simd_level level) {
    return "level:" + std::string(rvqkv::name_of(level));
}

}  // namespace bench
