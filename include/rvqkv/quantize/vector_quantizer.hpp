// SPDX-License-Identifier: MIT
/// @file
/// The paper's quantizer for a layer's keys or values: scale every head's vector, deal its channels to groups, quantize
/// every group of every head with the same residual quantizer.
#pragma once

#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "rvqkv/quantize/grouping.hpp"
#include "rvqkv/quantize/residual_quantizer.hpp"
#include "rvqkv/quantize/row_transform.hpp"
#include "rvqkv/quantize/rows.hpp"
#include "rvqkv/quantize/scale.hpp"
#include "rvqkv/simd/kernels.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <mutex>
#include <string>
#include <utility>

RVQKV_NAMESPACE_BEGIN

/// Numbers that are encoded or decoded together: 256 KiB in float32, small beside a codebook in the L2 cache.
inline constexpr std::size_t block_values = 65536;

/// What encoding found in its input besides numbers. Reports add up over calls.
struct encode_report {
    std::size_t nonfinite_values = 0;  ///< NaNs and infinities, each encoded as 0.
    std::size_t nonfinite_rows = 0;    ///< Head vectors that held at least one.
    std::size_t first_token = 0;       ///< Where the first of them was (if any), counted from the call's first token.
    std::size_t first_head = 0;        ///< Its head.

    /// Adds what a later call found in tokens `offset` and on.
    void add(const encode_report& found, std::size_t offset = 0) noexcept {
        if (nonfinite_rows == 0 && found.nonfinite_rows != 0) {
            first_token = offset + found.first_token;
            first_head = found.first_head;
        }
        nonfinite_values += found.nonfinite_values;
        nonfinite_rows += found.nonfinite_rows;
    }
    /// Adds what was found in other tokens of the same call, earlier or later ones.
    void merge(encode_report found) noexcept {
        const bool earlier =
            found.first_token != first_token ? found.first_token < first_token : found.first_head < first_head;
        if (found.nonfinite_rows != 0 && earlier) {
            std::swap(found, *this);
        }
        add(found);
    }
};

/// Scratch memory of encode and decode, reused from call to call. Threads: one for each caller; a call that is split
/// over threads shares its own out among them.
struct quantizer_workspace {
    aligned_buffer<float> floats;
    [[nodiscard]] std::size_t bytes() const noexcept { return floats.bytes(); }
    /// Makes room for what a `vector_quantizer` needs for `rows` head vectors at a time, they and one more, in each of
    /// `tasks` that run at once.
    /// Errors: `out_of_memory`, and it is as it was.
    [[nodiscard]] status reserve(std::size_t rows, std::size_t head_dim, std::size_t tasks = 1) {
        return floats.reserve(tasks * (1 + rows) * head_dim);
    }
};

/// Codes and scales of some head vectors ("rows", token-major: `token * heads + head`).
/// Shapes: codes `[rows * groups, depths]` with `strides`; scales `[rows]`, null when the policy stores none.
template <class Code, class Scale>
struct basic_encoded_view {
    Code* codes = nullptr;
    code_strides strides;
    Scale* scales = nullptr;
};
using encoded_view = basic_encoded_view<const code_t, const float>;
using mutable_encoded_view = basic_encoded_view<code_t, float>;

/// Scale x grouping x residual quantizer.
/// Threads: immutable; safe to share, with one workspace for each thread.
template <ScalePolicy Scale, GroupingPolicy Grouping, class Book = residual_codebook<>>
class vector_quantizer {
public:
    using transform_type = row_transform<Scale, Grouping>;
    using codebook_type = Book;

    /// `stored` is the type in which scales are kept (vectors are divided by the rounded number).
    /// Errors: `invalid_argument` for a head_dim that the codebook's dim does not divide, or a grouping that is no
    ///         permutation of the channels.
    [[nodiscard]] static result<vector_quantizer> create(std::size_t head_dim, Book book, Scale scale = {},
                                                         Grouping grouping = {}, dtype stored = dtype::float16) {
        auto transform = transform_type::create(head_dim, book.dim(), std::move(scale), std::move(grouping), stored);
        if (!transform) {
            return transform.error();
        }
        return vector_quantizer(std::move(transform).value(), std::move(book));
    }

    [[nodiscard]] const Book& codebook() const noexcept { return quantizer_.codebook(); }
    [[nodiscard]] const residual_quantizer<Book>& residual() const noexcept { return quantizer_; }
    [[nodiscard]] const transform_type& transform() const noexcept { return transform_; }
    [[nodiscard]] std::size_t head_dim() const noexcept { return transform_.head_dim(); }
    [[nodiscard]] std::size_t groups() const noexcept { return transform_.groups(); }
    /// Whether each vector has a scale, and the type in which it is stored.
    [[nodiscard]] bool stores_scale() const noexcept { return transform_.scale().is_stored(); }
    [[nodiscard]] dtype scale_type() const noexcept { return transform_.stored_scale_type(); }
    /// Bits stored for one head's vector: the codes and the scale.
    [[nodiscard]] std::size_t bits_per_row() const noexcept {
        return groups() * codebook().depths() * codebook().code_bits() +
               (stores_scale() ? 8 * size_of(scale_type()) : 0);
    }

    /// Encodes every head of every token.
    /// Shapes:     `x` `[token, head, head_dim]`, any type and strides; `out` sized for its rows.
    /// Errors:     `invalid_argument` when `x.channels() != head_dim()` or there is no place for the scales;
    ///             `out_of_memory` when the workspace cannot grow (it never does after one call as large, with as many
    ///             workers); `out` is untouched then. NaNs and infinities are encoded as 0 and counted in `report`;
    ///             other vectors are not affected.
    /// Threads:    none of its own; with `workers`, many rows (a prompt) are split over them, and few are not.
    /// Complexity: `rows * groups * depths * codewords * dim` fused multiply-adds. Memory: 256 KiB for each worker.
    /// Numerics:   the same codes at every SIMD level, with any workers and however calls are split.
    [[nodiscard]] status encode(const tensor_view& x, mutable_encoded_view out, quantizer_workspace& workspace,
                                encode_report* report = nullptr, const kernel_table& kernels = best_kernels()) const {
        return encode(x, out, workspace, report, serial_executor(), kernels);
    }
    [[nodiscard]] status encode(const tensor_view& x, mutable_encoded_view out, quantizer_workspace& workspace,
                                encode_report* report, const executor& workers,
                                const kernel_table& kernels = best_kernels()) const {
        if (status wrong = check(x.channels(), "input"); !wrong) {
            return wrong;
        }
        const std::size_t rows = x.rows();
        if (out.scales == nullptr && stores_scale() && rows != 0) {
            return missing_scales();
        }
        const std::size_t tasks =
            std::max<std::size_t>(1, std::min(workers.concurrency(), rows * groups() / least_task_vectors));
        const std::size_t chunk = std::min(chunk_rows(), (rows + tasks - 1) / tasks);
        if (status grown = workspace.reserve(chunk, head_dim(), tasks); !grown) {
            return grown;
        }
        encode_report found;
        std::mutex found_mutex;
        std::atomic<std::size_t> next{0};
        parallel_for(workers, tasks, [&](std::size_t task) {
            float* const scratch = workspace.floats.data() + task * (1 + chunk) * head_dim();
            encode_report mine;
            for (std::size_t first = next.fetch_add(chunk); first < rows; first = next.fetch_add(chunk)) {
                encode_rows(x, first, std::min(chunk, rows - first), out, scratch, mine, kernels);
            }
            if (mine.nonfinite_rows != 0) {
                const std::lock_guard lock(found_mutex);
                found.merge(mine);
            }
        });
        if (report != nullptr) {
            report->add(found);
        }
        return {};
    }

    /// Reconstructs every head of every token from the first `depths` depths.
    /// Shapes:     `in` holds `out.rows()` rows; `out` `[token, head, head_dim]`, any type and strides.
    /// Errors:     `invalid_argument` when `out.channels() != head_dim()`, `depths` exceeds the codebook's, or a scale
    ///             is missing; `out_of_memory` when the workspace cannot grow. Nothing is written then.
    /// Preconditions: every code is below `codewords`.
    /// Numerics:   float32 sum of codewords, times the scale, rounded once to the type of `out`.
    [[nodiscard]] status decode(encoded_view in, const mutable_tensor_view& out, std::size_t depths,
                                quantizer_workspace& workspace, const kernel_table& kernels = best_kernels()) const {
        if (depths > codebook().depths()) {
            return error{error_code::invalid_argument, "depths to decode is " + std::to_string(depths) +
                                                           ", the codebook has " + std::to_string(codebook().depths())};
        }
        if (status wrong = check(out.channels(), "output"); !wrong) {
            return wrong;
        }
        if (in.scales == nullptr && stores_scale() && out.rows() != 0) {
            return missing_scales();
        }
        if (status grown = workspace.reserve(std::min(out.rows(), chunk_rows()), head_dim()); !grown) {
            return grown;
        }
        float* const channels = workspace.floats.data();
        float* const grouped = channels + head_dim();
        const std::size_t rows = out.rows();
        for (std::size_t first = 0; first < rows; first += chunk_rows()) {
            const std::size_t count = std::min(chunk_rows(), rows - first);
            quantizer_.decode(in.codes + first * groups() * in.strides.vector, in.strides,
                              {grouped, count * groups(), codebook().dim()}, depths, kernels);
            for (std::size_t i = 0; i < count; ++i) {
                const float scale = stores_scale() ? in.scales[first + i] : 1.0F;
                transform_.restore(grouped + i * head_dim(), scale, channels);
                store_row(channels, out, (first + i) / out.heads(), (first + i) % out.heads(), kernels);
            }
        }
        return {};
    }

private:
    vector_quantizer(transform_type transform, Book book) noexcept
        : transform_(std::move(transform)), quantizer_(std::move(book)) {}

    /// Vectors below which another task costs more than it saves: its thread reads the whole codebook, too.
    static constexpr std::size_t least_task_vectors = 64;

    /// Rows that are encoded together.
    [[nodiscard]] std::size_t chunk_rows() const noexcept {
        return std::max<std::size_t>(1, block_values / head_dim());
    }

    /// `scratch` holds `count` rows, and one more.
    void encode_rows(const tensor_view& x, std::size_t first, std::size_t count, mutable_encoded_view out,
                     float* scratch, encode_report& found, const kernel_table& kernels) const {
        float* const channels = scratch;
        float* const grouped = channels + head_dim();
        for (std::size_t i = 0; i < count; ++i) {
            const std::size_t token = (first + i) / x.heads();
            const std::size_t head = (first + i) % x.heads();
            load_row(x, token, head, channels, kernels);
            std::size_t nonfinite = 0;
            const float scale = transform_.apply(channels, grouped + i * head_dim(), nonfinite, kernels);
            if (out.scales != nullptr) {
                out.scales[first + i] = scale;
            }
            if (nonfinite != 0) {
                found.add({nonfinite, 1, token, head});
            }
        }
        quantizer_.encode_codes({grouped, count * groups(), codebook().dim()},
                                out.codes + first * groups() * out.strides.vector, out.strides, kernels);
    }

    [[nodiscard]] status check(std::size_t channels, const char* what) const {
        if (channels != head_dim()) {
            return error{error_code::invalid_argument, std::string(what) + " has " + std::to_string(channels) +
                                                           " channels per head, this quantizer was made for head_dim " +
                                                           std::to_string(head_dim())};
        }
        return {};
    }
    [[nodiscard]] status missing_scales() const {
        return error{error_code::invalid_argument, "scales are missing: the " + std::string(transform_.scale().name()) +
                                                       " policy stores one per vector"};
    }

    transform_type transform_;
    residual_quantizer<Book> quantizer_;
};

/// The paper's quantizer for keys: standard deviation, strided groups.
using key_quantizer = vector_quantizer<std_dev_scale, strided_grouping>;
/// The paper's quantizer for values: standard deviation, contiguous groups.
using value_quantizer = vector_quantizer<std_dev_scale, contiguous_grouping>;

RVQKV_NAMESPACE_END
