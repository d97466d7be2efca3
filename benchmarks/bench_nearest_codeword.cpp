// SPDX-License-Identifier: MIT
/// @file
/// The search in one codebook. `search_f32`: every float32 kernel, beside matrix products. `search_exact`: the kernels
/// that find the same codes with less than float32 arithmetic, in the units of the float32 work they save.
#include "product_rivals.hpp"
#include "rvqkv/quantize/nearest_codeword.hpp"
#include "rvqkv/quantize/residual_quantizer.hpp"
#include "support/counters.hpp"
#include "support/data.hpp"

#include <benchmark/benchmark.h>
#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

namespace {

double flops(const rvqkv::codebook_shape& shape, std::size_t rows) {
    return 2.0 * static_cast<double>(shape.codewords * shape.dim * rows);
}

/// Vectors as the codebook of `depth` meets them: what the depths before it left.
rvqkv::aligned_buffer<float> inputs(const rvqkv::codebook_shape& shape, std::size_t rows, std::size_t depth) {
    rvqkv::aligned_buffer<float> x(rows * shape.dim);
    std::copy_n(bench::held_out_vectors(shape.dim).data(), x.size(), x.data());
    const rvqkv::residual_quantizer quantizer(bench::codebooks(shape)[0]);
    std::vector<rvqkv::code_t> codes(rows);
    for (std::size_t before = 0; before < depth; ++before) {
        quantizer.encode_depth(before, {x.data(), rows, shape.dim}, codes);
    }
    return x;
}

void search(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t rows, std::size_t depth,
            bool by_integers, const rvqkv::kernel_table& kernels) {
    rvqkv::packed_codebook book = bench::codebooks(shape)[0].packed(depth);
    book.integers = by_integers ? book.integers : nullptr;
    const auto x = inputs(shape, rows, depth);
    std::vector<rvqkv::code_t> codes(rows);
    for (auto _ : state) {
        rvqkv::nearest_codeword({x.data(), rows, shape.dim}, book, codes, {}, kernels);
        benchmark::DoNotOptimize(codes.data());
        benchmark::ClobberMemory();
    }
    bench::set_flops(state, flops(shape, rows));
}

void search_product(benchmark::State& state, const rvqkv::codebook_shape& shape, std::size_t rows,
                    bench::product product) {
    const auto& book = bench::codebooks(shape)[0];
    const auto x = inputs(shape, rows, 0);
    rvqkv::aligned_buffer<float> scores(bench::scratch_of(shape.codewords));
    std::vector<rvqkv::code_t> codes(rows);
    for (auto _ : state) {
        bench::product_nearest(product, x.data(), rows, book.weights(0).data(), book.packed(0).offsets, shape.codewords,
                               shape.dim, scores.data(), codes.data());
        benchmark::DoNotOptimize(codes.data());
        benchmark::ClobberMemory();
    }
    bench::set_flops(state, flops(shape, rows));
    std::vector<rvqkv::code_t> ours(rows);
    rvqkv::nearest_codeword({x.data(), rows, shape.dim}, book.packed(0), ours);
    if (!bench::agree(ours, codes)) {
        state.SkipWithError("finds other codewords than we do");
    }
}

void add(const std::string& name, const rvqkv::codebook_shape& shape, std::size_t rows, std::size_t depth,
         const rvqkv::kernel_table& kernels) {
    benchmark::RegisterBenchmark(
        (name + "/" + bench::level_label(kernels.level) + "/" + bench::label(shape, rows, false) +
         (depth == 0 ? std::string() : "/depth:" + std::to_string(depth)))
            .c_str(),
        search, shape, rows, depth, name == "search_exact", kernels);
}

const bool registered = [] {
    std::vector<std::pair<rvqkv::codebook_shape, std::size_t>> cases = {
        {bench::paper, 32}, {bench::paper, 1024}, {bench::light, 1024}};
    for (const rvqkv::codebook_shape& shape : bench::small_shapes) {
        cases.emplace_back(shape, 1024);
    }
    bool has_exact = false;
    for (const rvqkv::simd_level level : rvqkv::all_simd_levels) {
        const auto found = rvqkv::kernels_for(level);
        if (!found) {
            continue;
        }
        const rvqkv::kernel_table& kernels = *found.value();
        const bool is_float32 = level == rvqkv::simd_level::generic || level == rvqkv::simd_level::neon ||
                                level == rvqkv::simd_level::avx2 || level == rvqkv::simd_level::avx512;
        if (!is_float32) {
            has_exact = true;
            for (const std::size_t rows : {std::size_t{32}, std::size_t{1024}}) {
                for (const std::size_t depth : {std::size_t{0}, std::size_t{4}}) {
                    add("search_exact", bench::paper, rows, depth, kernels);
                }
            }
            continue;
        }
        for (const auto& [shape, rows] : cases) {
            if (level == rvqkv::simd_level::generic && shape.codewords * rows > 100000) {
                continue;  // seconds, and nobody runs it for speed
            }
            add("search_f32", shape, rows, 0, kernels);
        }
    }
    if (!has_exact) {  // a machine without such instructions: what the library takes instead
        add("search_exact", bench::paper, 32, 0, rvqkv::best_kernels());
        add("search_exact", bench::paper, 1024, 0, rvqkv::best_kernels());
    }
    for (const bench::product& product : bench::products()) {
        for (const auto& [shape, rows] : cases) {
            benchmark::RegisterBenchmark(
                ("search_f32/rival:" + std::string(product.name) + "/" + bench::label(shape, rows, false)).c_str(),
                search_product, shape, rows, product);
        }
    }
    return true;
}();

}  // namespace
