// SPDX-License-Identifier: MIT
/// @file
/// Whole-depth encoding, of one token (64 vectors: keys and values of 8 heads in 4 groups) and of a prompt, and
/// decoding.
#include "product_rivals.hpp"
#include "rvqkv/quantize/residual_quantizer.hpp"
#include "support/counters.hpp"
#include "support/data.hpp"

#include <benchmark/benchmark.h>
#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

namespace {

std::vector<rvqkv::residual_quantizer<>> quantizers(const rvqkv::codebook_shape& shape) {
    std::vector<rvqkv::residual_quantizer<>> made;
    for (const rvqkv::residual_codebook<>& book : bench::codebooks(shape)) {
        made.emplace_back(book);
    }
    return made;
}

void encode(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t rows,
            const rvqkv::kernel_table& kernels) {
    const auto layers = quantizers(shape);
    const float* const x = bench::held_out_vectors(shape.dim).data();
    rvqkv::aligned_buffer<float> left(rows * shape.dim);
    std::vector<rvqkv::code_t> codes(rows * shape.depths);
    std::size_t layer = 0;
    for (auto _ : state) {
        std::copy_n(x, left.size(), left.data());
        layers[layer].encode({left.data(), rows, shape.dim}, codes.data(), {1, rows}, {}, kernels);
        layer = (layer + 1) % layers.size();
        benchmark::DoNotOptimize(codes.data());
        benchmark::ClobberMemory();
    }
    bench::set_vectors(state, rows);
}

void encode_beam(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t rows, std::size_t width,
                 const rvqkv::kernel_table& kernels) {
    const auto layers = quantizers(shape);
    const float* const x = bench::held_out_vectors(shape.dim).data();
    rvqkv::aligned_buffer<float> left(rows * shape.dim);
    std::vector<rvqkv::code_t> codes(rows * shape.depths);
    rvqkv::beam_workspace workspace;
    std::size_t layer = 0;
    for (auto _ : state) {
        std::copy_n(x, left.size(), left.data());
        layers[layer]
            .encode_beam({left.data(), rows, shape.dim}, codes.data(), {1, rows}, width, workspace, {}, kernels)
            .value();
        layer = (layer + 1) % layers.size();
        benchmark::DoNotOptimize(codes.data());
        benchmark::ClobberMemory();
    }
    bench::set_vectors(state, rows);
}

void encode_product(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t rows,
                    bench::product product) {
    const auto layers = quantizers(shape);
    std::vector<std::vector<float>> offsets;
    for (const auto& quantizer : layers) {
        std::vector<float>& numbers = offsets.emplace_back();
        for (std::size_t depth = 0; depth < shape.depths; ++depth) {
            const float* const first = quantizer.codebook().packed(depth).offsets;
            numbers.insert(numbers.end(), first, first + shape.codewords);
        }
    }
    const float* const x = bench::held_out_vectors(shape.dim).data();
    rvqkv::aligned_buffer<float> left(rows * shape.dim);
    rvqkv::aligned_buffer<float> scores(bench::scratch_of(shape.codewords));
    std::vector<rvqkv::code_t> codes(rows * shape.depths);
    std::size_t layer = 0;
    for (auto _ : state) {
        std::copy_n(x, left.size(), left.data());
        bench::product_encode(product, left.data(), rows, layers[layer].codebook().weights().data(),
                              offsets[layer].data(), shape.depths, shape.codewords, shape.dim, scores.data(),
                              codes.data());
        layer = (layer + 1) % layers.size();
        benchmark::DoNotOptimize(codes.data());
        benchmark::ClobberMemory();
    }
    bench::set_vectors(state, rows);
    std::vector<rvqkv::code_t> ours(codes.size());
    std::copy_n(x, left.size(), left.data());
    layers[0].encode({left.data(), rows, shape.dim}, ours.data(), {1, rows});
    if (!bench::agree(ours, codes)) {
        state.SkipWithError("finds other codewords than we do");
    }
}

/// The first `depths` of `shape.depths` depths; codes as `[depths, rows]`, the way that pages of the cache hold them.
template <class Weight>
void decode(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t rows, std::size_t depths,
            const rvqkv::kernel_table& kernels) {
    const auto& weights = bench::weights(shape);
    const rvqkv::residual_quantizer quantizer(rvqkv::residual_codebook<Weight>::create(shape, weights.span()).value());
    rvqkv::aligned_buffer<float> x(rows * shape.dim);
    std::copy_n(bench::held_out_vectors(shape.dim).data(), x.size(), x.data());
    std::vector<rvqkv::code_t> codes(rows * shape.depths);
    quantizer.encode({x.data(), rows, shape.dim}, codes.data(), {1, rows});
    for (auto _ : state) {
        quantizer.decode(codes.data(), {1, rows}, {x.data(), rows, shape.dim}, depths, kernels);
        benchmark::DoNotOptimize(x.data());
        benchmark::ClobberMemory();
    }
    bench::set_bytes(state, x.bytes());
}

void add_encode(const rvqkv::codebook_shape& shape, std::size_t rows, const rvqkv::kernel_table& kernels) {
    const std::string name = rows == 64 ? "encode_token" : "encode_batch";
    benchmark::RegisterBenchmark(
        (name + "/" + bench::level_label(kernels.level) + "/" + bench::label(shape, rows)).c_str(), encode, shape, rows,
        kernels);
}

template <class Weight>
void add_decode(const std::string& weights, const rvqkv::codebook_shape& shape, std::size_t depths,
                const rvqkv::kernel_table& kernels) {
    constexpr std::size_t rows = 1024;
    benchmark::RegisterBenchmark(
        ("decode/" + bench::level_label(kernels.level) + "/weights:" + weights + "/" + bench::label(shape, rows) +
         (depths == shape.depths ? std::string() : "/used_depths:" + std::to_string(depths)))
            .c_str(),
        decode<Weight>, shape, rows, depths, kernels);
}

const bool registered = [] {
    for (const rvqkv::simd_level level : rvqkv::all_simd_levels) {
        const auto found = rvqkv::kernels_for(level);
        if (!found || level == rvqkv::simd_level::generic) {
            continue;
        }
        const rvqkv::kernel_table& kernels = *found.value();
        for (const std::size_t rows : {std::size_t{64}, std::size_t{512}}) {
            add_encode(bench::paper, rows, kernels);
            add_encode(bench::light, rows, kernels);
            for (const std::size_t width : {std::size_t{2}, std::size_t{5}}) {
                benchmark::RegisterBenchmark(("encode_beam/" + bench::level_label(level) + "/" +
                                              bench::label(bench::paper, rows) + "/beam:" + std::to_string(width))
                                                 .c_str(),
                                             encode_beam, bench::paper, rows, width, kernels);
            }
        }
        for (const rvqkv::codebook_shape& shape : bench::small_shapes) {
            add_encode(shape, 512, kernels);
        }
        add_decode<float>("float32", bench::paper, bench::paper.depths, kernels);
        for (const rvqkv::codebook_shape& shape : bench::small_shapes) {
            add_decode<float>("float32", shape, shape.depths, kernels);
        }
    }
    const rvqkv::kernel_table& best = rvqkv::best_kernels();
    for (const std::size_t depths : {bench::paper.depths, std::size_t{4}, std::size_t{2}}) {
        add_decode<rvqkv::bfloat16>("bfloat16", bench::paper, depths, best);
    }
    add_decode<float>("float32", bench::light, bench::light.depths, best);
    for (const bench::product& product : bench::products()) {
        for (const rvqkv::codebook_shape& shape : {bench::paper, bench::light}) {
            for (const std::size_t rows : {std::size_t{64}, std::size_t{512}}) {
                benchmark::RegisterBenchmark(((rows == 64 ? "encode_token/rival:" : "encode_batch/rival:") +
                                              std::string(product.name) + "/" + bench::label(shape, rows))
                                                 .c_str(),
                                             encode_product, shape, rows, product);
            }
        }
    }
    return true;
}();

}  // namespace
