// SPDX-License-Identifier: MIT
/// @file
/// The RVQ codebook: `depths x codewords x dim` weights, and the same weights in the layout that the search reads.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/quantize/integer_copies.hpp"
#include "rvqkv/simd/kernel_table.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// How the nearest codeword is measured.
enum class distance {
    euclidean,  ///< Smallest squared Euclidean distance: the paper's.
    cosine,     ///< Largest inner product with the normalized codeword; the codeword used is not normalized.
};
[[nodiscard]] constexpr std::string_view name_of(distance metric) noexcept {
    return metric == distance::euclidean ? "euclidean" : "cosine";
}

/// Extents of a residual codebook. In the paper's letters: `depths` K, `codewords` C, `dim` d.
struct codebook_shape {
    std::size_t depths = 8;        ///< Residual depth; the paper's main setting is 8.
    std::size_t codewords = 2048;  ///< Codewords of each depth; the paper's main setting is 2048.
    std::size_t dim = 32;          ///< Channels of a group; the paper's main setting is 32.
    friend bool operator==(const codebook_shape&, const codebook_shape&) = default;
    /// Weights in all.
    [[nodiscard]] constexpr std::size_t size() const noexcept { return depths * codewords * dim; }

    /// Errors: `invalid_argument` naming the extent that is zero or too large.
    [[nodiscard]] status validate() const {
        const auto check = [](const char* name, std::size_t value, std::size_t most) -> status {
            if (value == 0 || value > most) {
                return error{error_code::invalid_argument, std::string(name) + " is " + std::to_string(value) +
                                                               ", must be from 1 to " + std::to_string(most)};
            }
            return {};
        };
        if (status wrong = check("depths", depths, 256); !wrong) {
            return wrong;
        }
        if (status wrong = check("codewords", codewords, max_codewords); !wrong) {
            return wrong;
        }
        return check("group_dim", dim, 4096);
    }
};

/// An extent that is known at run time only.
inline constexpr std::size_t dynamic_extent = std::numeric_limits<std::size_t>::max();

/// An immutable codebook. `Weight` is the type that weights are stored in (the search itself runs in float32 on the
/// stored, rounded values); extents may be fixed at compile time, and then a file of another shape is refused.
/// Threads: safe to share once made.
template <TensorElement Weight = float, std::size_t Depths = dynamic_extent, std::size_t Codewords = dynamic_extent,
          std::size_t Dim = dynamic_extent>
class residual_codebook {
public:
    using weight_type = Weight;

    /// Copies `weights`, `[depths, codewords, dim]` row-major, rounding them to `Weight`, and builds the search layout.
    /// Errors:     `invalid_argument` for a shape out of range, unlike the fixed extents or unlike the number of
    ///             weights, and for a weight that is not finite (once rounded); `out_of_memory`.
    /// Complexity: O(weights). Memory: `bytes()`.
    template <TensorElement Source>
    [[nodiscard]] static result<residual_codebook> create(const codebook_shape& shape, std::span<const Source> weights,
                                                          distance metric = distance::euclidean) {
        if (status wrong = check(shape, weights.size()); !wrong) {
            return wrong.error();
        }
        residual_codebook book;
        book.shape_ = shape;
        book.distance_ = metric;
        const std::size_t blocks = book.blocks();
        auto stored = aligned_buffer<Weight>::allocate(shape.size());
        auto interleaved = aligned_buffer<float>::allocate(shape.depths * blocks * search_block * shape.dim);
        auto offsets = aligned_buffer<float>::allocate(shape.depths * blocks * search_block);
        if (!stored || !interleaved || !offsets) {
            return error{error_code::out_of_memory, "out of memory"};
        }
        book.weights_ = std::move(stored).value();
        book.interleaved_ = std::move(interleaved).value();
        book.offsets_ = std::move(offsets).value();
        if (integer_copies::wanted(shape.codewords, shape.dim)) {
            auto integers = integer_copies::create(shape.depths, shape.codewords, shape.dim);
            if (!integers) {
                return integers.error();
            }
            book.integers_ = std::move(integers).value();
        }
        if (status wrong = book.assign(weights); !wrong) {
            return wrong.error();
        }
        return book;
    }

    /// Takes other weights of the same shape, in the memory that it has.
    /// Errors:     `invalid_argument` for another number of weights, or one that is not finite (once rounded); it is
    ///             as it was then.
    /// Threads:    none of its own; depths are split over `workers`.
    /// Complexity: O(weights), no allocation.
    template <TensorElement Source>
    [[nodiscard]] status assign(std::span<const Source> weights, const executor& workers = serial_executor()) {
        if (status wrong = check(shape_, weights.size()); !wrong) {
            return wrong;
        }
        for (std::size_t i = 0; i < weights.size(); ++i) {
            if (!std::isfinite(to_float(float_to<Weight>(to_float(weights[i]))))) {
                return error{error_code::invalid_argument,
                             "codebook weight " + std::to_string(i % shape_.dim) + " of codeword " +
                                 std::to_string(i / shape_.dim % shape_.codewords) + " at depth " +
                                 std::to_string(i / shape_.dim / shape_.codewords) + " is not finite in " +
                                 std::string(name_of(dtype_of<Weight>))};
            }
        }
        for (std::size_t i = 0; i < weights.size(); ++i) {
            weights_[i] = float_to<Weight>(to_float(weights[i]));
        }
        parallel_for(workers, shape_.depths, [this](std::size_t depth) {
            build_search_layout(depth);
            if (integers_.bytes() != 0) {
                integers_.build(depth, packed(depth));
            }
        });
        return {};
    }

    [[nodiscard]] codebook_shape shape() const noexcept { return shape_; }
    [[nodiscard]] std::size_t depths() const noexcept { return fixed(Depths, shape_.depths); }
    [[nodiscard]] std::size_t codewords() const noexcept { return fixed(Codewords, shape_.codewords); }
    [[nodiscard]] std::size_t dim() const noexcept { return fixed(Dim, shape_.dim); }
    [[nodiscard]] distance metric() const noexcept { return distance_; }
    /// Bits of one code.
    [[nodiscard]] unsigned code_bits() const noexcept { return rvqkv::code_bits(codewords()); }

    /// All weights, `[depths, codewords, dim]`.
    [[nodiscard]] std::span<const Weight> weights() const noexcept { return weights_.span(); }
    /// One depth's weights, `[codewords, dim]`. Precondition: `depth < depths()`.
    [[nodiscard]] std::span<const Weight> weights(std::size_t depth) const noexcept {
        RVQKV_ASSERT(depth < depths());
        return weights_.span().subspan(depth * codewords() * dim(), codewords() * dim());
    }
    /// One codeword's `dim` weights. Preconditions: `depth < depths()`, `code < codewords()`.
    [[nodiscard]] std::span<const Weight> codeword(std::size_t depth, code_t code) const noexcept {
        RVQKV_ASSERT(code < codewords());
        return weights(depth).subspan(code * dim(), dim());
    }
    /// One depth in the search layout. Precondition: `depth < depths()`.
    [[nodiscard]] packed_codebook packed(std::size_t depth) const noexcept {
        RVQKV_ASSERT(depth < depths());
        const std::size_t lanes = blocks() * search_block;
        return {interleaved_.data() + depth * lanes * dim(),
                offsets_.data() + depth * lanes,
                codewords(),
                dim(),
                integers_.view(depth),
                distance_ == distance::euclidean ? weights(depth).data() : nullptr,
                dtype_of<Weight>};
    }
    /// Bytes held: weights, search layout, and on machines that search by them integer copies.
    [[nodiscard]] std::size_t bytes() const noexcept {
        return weights_.bytes() + interleaved_.bytes() + offsets_.bytes() + integers_.bytes();
    }
    /// Bytes of the weights alone: what a file holds, and what a reader that never encodes needs.
    [[nodiscard]] std::size_t weight_bytes() const noexcept { return weights_.bytes(); }

private:
    residual_codebook() = default;

    static constexpr std::size_t fixed(std::size_t extent, std::size_t run_time) noexcept {
        return extent == dynamic_extent ? run_time : extent;
    }
    [[nodiscard]] std::size_t blocks() const noexcept { return (codewords() + search_block - 1) / search_block; }

    static status check(const codebook_shape& shape, std::size_t weights) {
        if (status wrong = shape.validate(); !wrong) {
            return wrong;
        }
        const std::array<std::pair<std::size_t, std::size_t>, 3> extents = {
            {{Depths, shape.depths}, {Codewords, shape.codewords}, {Dim, shape.dim}}};
        constexpr std::array<const char*, 3> names = {"depths", "codewords", "group_dim"};
        for (std::size_t i = 0; i < extents.size(); ++i) {
            if (fixed(extents[i].first, extents[i].second) != extents[i].second) {
                return error{error_code::invalid_argument,
                             std::string(names[i]) + " is " + std::to_string(extents[i].second) +
                                 ", this codebook type is fixed to " + std::to_string(extents[i].first)};
            }
        }
        if (weights != shape.size()) {
            return error{error_code::invalid_argument, "codebook has " + std::to_string(weights) +
                                                           " weights, depths x codewords x group_dim asks " +
                                                           std::to_string(shape.size())};
        }
        return {};
    }

    /// Score of a codeword c for a vector x, to be maximized: `<x, c> - |c|^2 / 2` (Euclidean; the vector's own norm
    /// changes no comparison), or `<x, c / |c|>` (cosine).
    void build_search_layout(std::size_t depth) {
        const std::size_t lanes = blocks() * search_block;
        float* interleaved = interleaved_.data() + depth * lanes * dim();
        float* offsets = offsets_.data() + depth * lanes;
        const Weight* source = weights(depth).data();
        for (std::size_t first = 0; first < codewords(); first += search_block) {
            const std::size_t count = std::min(search_block, codewords() - first);
            std::array<double, search_block> squares{};
            for (std::size_t j = 0; j < dim(); ++j) {
                for (std::size_t lane = 0; lane < count; ++lane) {
                    const float weight = to_float(source[lane * dim() + j]);
                    interleaved[j * search_block + lane] = weight;
                    squares[lane] += static_cast<double>(weight) * static_cast<double>(weight);
                }
            }
            for (std::size_t lane = 0; lane < search_block; ++lane) {
                offsets[lane] = lane >= count ? -std::numeric_limits<float>::infinity()  // padding never wins
                                : distance_ == distance::euclidean ? static_cast<float>(-0.5 * squares[lane])
                                                                   : 0.0F;
            }
            if (distance_ == distance::cosine) {
                for (std::size_t lane = 0; lane < count; ++lane) {
                    const double norm = std::max(std::sqrt(squares[lane]), 1e-12);  // the reference code's guard
                    for (std::size_t j = 0; j < dim(); ++j) {
                        float& weight = interleaved[j * search_block + lane];
                        weight = static_cast<float>(static_cast<double>(weight) / norm);
                    }
                }
            }
            source += search_block * dim();
            interleaved += search_block * dim();
            offsets += search_block;
        }
    }

    codebook_shape shape_;
    distance distance_ = distance::euclidean;
    aligned_buffer<Weight> weights_;
    aligned_buffer<float> interleaved_;
    aligned_buffer<float> offsets_;
    integer_copies integers_;
};

RVQKV_NAMESPACE_END
