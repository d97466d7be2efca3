// SPDX-License-Identifier: MIT
/// @file
/// Whole-depth encoding, of one token (64 vectors: keys and values of 8 heads in 4 groups) and of a prompt, and
/// decoding.
#include "eigen_rival.hpp"
#include "rvqkv/quantize/residual_quantizer.hpp"
#include "support/data.hpp"

#include <benchmark/benchmark.h>
#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

namespace {

constexpr rvqkv::codebook_shape paper{8, 2048, 32};
constexpr rvqkv::codebook_shape small{10, 256, 32};

std::string label(const rvqkv::codebook_shape& shape, std::size_t rows) {
    return "depths:" + std::to_string(shape.depths) + "/codewords:" + std::to_string(shape.codewords) +
           "/dim:" + std::to_string(shape.dim) + "/rows:" + std::to_string(rows);
}

void set_vectors(benchmark::State& state, std::size_t rows) {
    state.counters["vectors"] = benchmark::Counter(static_cast<double>(rows) * static_cast<double>(state.iterations()),
                                                   benchmark::Counter::kIsRate);
}

void encode(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t rows) {
    const rvqkv::residual_quantizer<> quantizer(bench::codebook(shape));
    const auto x = bench::gaussian(rows * shape.dim, 2);
    rvqkv::aligned_buffer<float> left(x.size());
    std::vector<rvqkv::code_t> codes(rows * shape.depths);
    for (auto _ : state) {
        std::copy_n(x.data(), x.size(), left.data());
        quantizer.encode({left.data(), rows, shape.dim}, codes.data(), {1, rows});
        benchmark::DoNotOptimize(codes.data());
        benchmark::ClobberMemory();
    }
    set_vectors(state, rows);
}

void encode_eigen(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t rows) {
    const auto book = bench::codebook(shape);
    std::vector<float> offsets;
    for (std::size_t depth = 0; depth < shape.depths; ++depth) {
        const float* const first = book.packed(depth).offsets;
        offsets.insert(offsets.end(), first, first + shape.codewords);
    }
    const auto x = bench::gaussian(rows * shape.dim, 2);
    rvqkv::aligned_buffer<float> left(x.size());
    rvqkv::aligned_buffer<float> scores(rows * shape.codewords);
    std::vector<rvqkv::code_t> codes(rows * shape.depths);
    for (auto _ : state) {
        std::copy_n(x.data(), x.size(), left.data());
        bench::eigen_encode(left.data(), rows, book.weights().data(), offsets.data(), shape.depths, shape.codewords,
                            shape.dim, scores.data(), codes.data());
        benchmark::DoNotOptimize(codes.data());
        benchmark::ClobberMemory();
    }
    set_vectors(state, rows);
}

template <class Weight>
void decode(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t rows, std::size_t depths) {
    const auto book = bench::codebook(shape);
    const rvqkv::residual_quantizer quantizer(rvqkv::residual_codebook<Weight>::create(shape, book.weights()).value());
    const auto x = bench::gaussian(rows * shape.dim, 2);
    rvqkv::aligned_buffer<float> left = x;
    std::vector<rvqkv::code_t> codes(rows * shape.depths);
    quantizer.encode({left.data(), rows, shape.dim}, codes.data(), {shape.depths, 1});
    for (auto _ : state) {
        quantizer.decode(codes.data(), {shape.depths, 1}, {left.data(), rows, shape.dim}, depths);
        benchmark::DoNotOptimize(left.data());
        benchmark::ClobberMemory();
    }
    set_vectors(state, rows);
    state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(left.bytes()));
}

const bool registered = [] {
    for (const rvqkv::codebook_shape& shape : {paper, small}) {
        for (const std::size_t rows : {std::size_t{64}, std::size_t{512}}) {
            const std::string name = rows == 64 ? "encode_token" : "encode_batch";
            benchmark::RegisterBenchmark((name + "/" + label(shape, rows)).c_str(), encode, shape, rows);
            benchmark::RegisterBenchmark((name + "/rival:eigen/" + label(shape, rows)).c_str(), encode_eigen, shape,
                                         rows);
        }
        benchmark::RegisterBenchmark(("decode/weights:float32/" + label(shape, 1024)).c_str(), decode<float>, shape,
                                     std::size_t{1024}, shape.depths);
        benchmark::RegisterBenchmark(("decode/weights:bfloat16/" + label(shape, 1024)).c_str(), decode<rvqkv::bfloat16>,
                                     shape, std::size_t{1024}, shape.depths);
        benchmark::RegisterBenchmark(("decode/weights:float32/half_depth/" + label(shape, 1024)).c_str(), decode<float>,
                                     shape, std::size_t{1024}, shape.depths / 2);
    }
    return true;
}();

}  // namespace
