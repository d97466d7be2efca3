// SPDX-License-Identifier: MIT
/// @file
/// Small tables as attention reads a codec's codes through them.
#pragma once

#include "rvqkv/attend/readers.hpp"
#include "rvqkv/attend/small_key_tables.hpp"
#include "rvqkv/attend/small_value_tables.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/simd_level.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <cstddef>
#include <memory>
#include <new>
#include <span>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {

/// Whether tables beat reconstruction: where bytes are looked up in registers.
[[nodiscard]] inline bool small_tables_pay(const codec& source, const kernel_table& kernels) noexcept {
    return kernels.level == simd_level::avx512vbmi && small_key_tables::supports(source.shape());
}

/// A codec's weights in their own type.
template <class Tables>
[[nodiscard]] result<Tables> tables_of(const codec& source) {
    const auto make = [&]<class Weight>(Weight) {
        const auto* const weights = reinterpret_cast<const Weight*>(source.weights().data());
        return Tables::create(source.shape(), std::span(weights, source.shape().size()), source.head_dim());
    };
    switch (source.weight_type()) {
        case dtype::float16: return make(float16{});
        case dtype::bfloat16: return make(bfloat16{});
        case dtype::float32: break;
    }
    return make(float{});
}

}  // namespace detail

/// Scores by `small_key_tables`.
class small_key_reader final : public key_reader {
public:
    /// Errors: `out_of_memory`. Precondition: `small_key_tables::supports`.
    [[nodiscard]] static result<std::unique_ptr<const key_reader>> create(const codec& source,
                                                                          const kernel_table& kernels) {
        auto tables = detail::tables_of<small_key_tables>(source);
        if (!tables) {
            return tables.error();
        }
        std::unique_ptr<const key_reader> made(new (std::nothrow)
                                                   small_key_reader(std::move(tables).value(), source, kernels));
        if (made == nullptr) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        return made;
    }

    [[nodiscard]] std::size_t bytes() const noexcept override { return sizeof(*this) + tables_.bytes(); }
    [[nodiscard]] std::size_t scratch_bytes(std::size_t rows) const noexcept override {
        return tables_.scratch_bytes(rows);
    }
    [[nodiscard]] bool pays(std::size_t rows, std::size_t tokens) const noexcept override {
        // Tables cost a query what some hundred tokens cost it.
        return rows <= 32 && tokens >= 256;
    }
    void prepare(row_block<const float> queries, std::byte* scratch) const noexcept override {
        RVQKV_ASSERT(queries.stride == head_dim_);
        tables_.prepare(queries.data, queries.count, scratch, *kernels_);
    }
    void scores(const coded_tiles& tiles, std::size_t rows, float* out, std::size_t out_stride,
                std::byte* scratch) const noexcept override {
        tables_.scores(tiles.tiles, *tiles.layout, tiles.head, tiles.depths, rows, out, out_stride, scratch, *kernels_);
    }

private:
    small_key_reader(small_key_tables tables, const codec& source, const kernel_table& kernels) noexcept
        : tables_(std::move(tables)), head_dim_(source.head_dim()), kernels_(&kernels) {}

    small_key_tables tables_;
    std::size_t head_dim_;
    const kernel_table* kernels_;
};

/// Sums by `small_value_tables`.
class small_value_reader final : public value_reader {
public:
    /// Errors: `out_of_memory`. Precondition: `small_value_tables::supports`.
    [[nodiscard]] static result<std::unique_ptr<const value_reader>> create(const codec& source,
                                                                            const kernel_table& kernels) {
        auto tables = detail::tables_of<small_value_tables>(source);
        if (!tables) {
            return tables.error();
        }
        std::unique_ptr<const value_reader> made(new (std::nothrow)
                                                     small_value_reader(std::move(tables).value(), source, kernels));
        if (made == nullptr) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        return made;
    }

    [[nodiscard]] std::size_t bytes() const noexcept override { return sizeof(*this) + tables_.bytes(); }
    [[nodiscard]] std::size_t scratch_bytes(std::size_t rows) const noexcept override {
        return tables_.scratch_bytes(rows);
    }
    [[nodiscard]] bool pays(std::size_t rows, std::size_t tokens) const noexcept override {
        return rows <= 32 && tokens >= 64;
    }
    void begin(std::size_t rows, std::byte* scratch) const noexcept override { tables_.begin(rows, scratch); }
    void add(const coded_tiles& tiles, std::size_t rows, const float* weights, std::size_t weights_stride,
             std::byte* scratch) const noexcept override {
        tables_.add(tiles.tiles, *tiles.layout, tiles.head, tiles.depths, weights, weights_stride, rows, scratch,
                    *kernels_);
    }
    void rescale(const float* factors, std::size_t rows, std::byte* scratch) const noexcept override {
        tables_.rescale(factors, rows, scratch, *kernels_);
    }
    void finish(std::size_t rows, row_block<float> out, std::byte* scratch) const noexcept override {
        RVQKV_ASSERT(out.stride == head_dim_);
        tables_.finish(out.data, rows, scratch, *kernels_);
    }

private:
    small_value_reader(small_value_tables tables, const codec& source, const kernel_table& kernels) noexcept
        : tables_(std::move(tables)), head_dim_(source.head_dim()), kernels_(&kernels) {}

    small_value_tables tables_;
    std::size_t head_dim_;
    const kernel_table* kernels_;
};

RVQKV_NAMESPACE_END
