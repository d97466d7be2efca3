// SPDX-License-Identifier: MIT
/// @file
/// Golden files: inputs of some training steps with every result of another implementation of the method, in
/// safetensors. Read, made and compared with here; any shape will do.
///
/// Metadata: `group_dim`, `grouping` (strided or contiguous), `cosine` (0 or 1), `decay`, `eps`. Tensors:
/// `codebook.before` [K, C, d] and for each step t: `step{t}.input` [b, s, heads, D], `.mask` [b, s] (may be missing),
/// `.scale` [b, s, heads], `.codes` [b, s, heads, D / d, K], `.output`, `.commitment_loss` [b, s], and the state after
/// the step, `.cluster_size` [K, C], `.embed_avg` and `.codebook` [K, C, d].
#pragma once

#include "rvqkv/files/safetensors.hpp"
#include "support/reference.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace golden {

/// What training carries from step to step; running sizes start at one and running sums at the codebook.
struct state {
    std::vector<float> weights;  ///< [depth, codeword, dim]
    std::vector<float> sizes;    ///< [depth, codeword]
    std::vector<float> sums;     ///< [depth, codeword, dim]
};

/// What an implementation makes of one input.
struct results {
    std::vector<float> scales;        ///< [token, head]
    std::vector<std::int32_t> codes;  ///< [token, head, group, depth]
    std::vector<float> outputs;       ///< [token, head, channel]
    std::vector<float> losses;        ///< [token]
    state after;
};

struct step {
    std::vector<float> input;        ///< [token, head, channel]
    std::vector<std::uint8_t> mask;  ///< [token], or empty: all count
    results expected;
    [[nodiscard]] bool counts(std::size_t token) const { return mask.empty() || mask[token] != 0; }
};

struct file {
    std::size_t tokens = 0;
    std::size_t heads = 0;
    std::size_t head_dim = 0;
    std::size_t dim = 0;
    std::size_t depths = 0;
    std::size_t codewords = 0;
    bool strided = false;
    bool cosine = false;
    double decay = 0.99;
    double epsilon = 1e-5;
    std::vector<float> before;  ///< [depth, codeword, dim]
    std::vector<step> steps;

    [[nodiscard]] std::size_t groups() const { return head_dim / dim; }
    [[nodiscard]] state start() const { return {before, std::vector<float>(depths * codewords, 1.0F), before}; }
};

// ---- Files ----

template <class T>
std::vector<T> read_tensor(const rvqkv::safetensors_file& in, const std::string& name, std::size_t count) {
    const auto buffer = in.read_as<T>(name).value();
    if (buffer.size() != count) {
        throw std::runtime_error(name + " has " + std::to_string(buffer.size()) + " elements, not " +
                                 std::to_string(count));
    }
    return {buffer.span().begin(), buffer.span().end()};
}

[[nodiscard]] inline file load(const std::filesystem::path& path) {
    const rvqkv::safetensors_file in = rvqkv::safetensors_file::open(path).value();
    const auto metadata = [&](const char* key) {
        const std::string* const value = in.find_metadata(key);
        if (value == nullptr) {
            throw std::runtime_error(std::string("metadata has no ") + key);
        }
        return *value;
    };
    const auto& book = in.tensor("codebook.before").value()->shape;
    const auto& input = in.tensor("step0.input").value()->shape;
    if (book.size() != 3 || input.size() != 4) {
        throw std::runtime_error("codebook.before must have 3 dimensions and step0.input 4");
    }
    file out;
    out.depths = book[0];
    out.codewords = book[1];
    out.dim = book[2];
    out.tokens = input[0] * input[1];
    out.heads = input[2];
    out.head_dim = input[3];
    out.strided = metadata("grouping") == "strided";
    if (!out.strided && metadata("grouping") != "contiguous") {
        throw std::runtime_error("grouping is " + metadata("grouping"));
    }
    if (std::stoull(metadata("group_dim")) != out.dim) {
        throw std::runtime_error("group_dim differs from that of codebook.before");
    }
    out.cosine = metadata("cosine") == "1";
    out.decay = std::stod(metadata("decay"));
    out.epsilon = std::stod(metadata("eps"));
    const std::size_t sizes = out.depths * out.codewords;
    const std::size_t rows = out.tokens * out.heads;
    out.before = read_tensor<float>(in, "codebook.before", sizes * out.dim);
    for (std::size_t t = 0; in.contains("step" + std::to_string(t) + ".input"); ++t) {
        const std::string name = "step" + std::to_string(t) + ".";
        step each;
        each.input = read_tensor<float>(in, name + "input", rows * out.head_dim);
        if (in.contains(name + "mask")) {
            each.mask = read_tensor<std::uint8_t>(in, name + "mask", out.tokens);
        }
        results& expected = each.expected;
        expected.scales = read_tensor<float>(in, name + "scale", rows);
        expected.codes = read_tensor<std::int32_t>(in, name + "codes", rows * out.groups() * out.depths);
        expected.outputs = read_tensor<float>(in, name + "output", rows * out.head_dim);
        expected.losses = read_tensor<float>(in, name + "commitment_loss", out.tokens);
        expected.after.sizes = read_tensor<float>(in, name + "cluster_size", sizes);
        expected.after.sums = read_tensor<float>(in, name + "embed_avg", sizes * out.dim);
        expected.after.weights = read_tensor<float>(in, name + "codebook", sizes * out.dim);
        out.steps.push_back(std::move(each));
    }
    return out;
}

inline void save(const std::filesystem::path& path, const file& from) {
    std::vector<rvqkv::tensor_info> infos;
    std::vector<std::span<const std::byte>> data;
    const auto add = [&](std::string name, rvqkv::storage_type type, std::vector<std::size_t> shape,
                         std::span<const std::byte> bytes) {
        rvqkv::tensor_info info;
        info.name = std::move(name);
        info.type = type;
        info.shape = std::move(shape);
        infos.push_back(std::move(info));
        data.push_back(bytes);
    };
    const auto add_floats = [&](const std::string& name, std::vector<std::size_t> shape,
                                const std::vector<float>& numbers) {
        add(name, rvqkv::storage_type::float32, std::move(shape), std::as_bytes(std::span(numbers)));
    };
    const std::vector<std::size_t> book = {from.depths, from.codewords, from.dim};
    add_floats("codebook.before", book, from.before);
    for (std::size_t t = 0; t < from.steps.size(); ++t) {
        const std::string name = "step" + std::to_string(t) + ".";
        const step& each = from.steps[t];
        const results& expected = each.expected;
        add_floats(name + "input", {1, from.tokens, from.heads, from.head_dim}, each.input);
        if (!each.mask.empty()) {
            add(name + "mask", rvqkv::storage_type::uint8, {1, from.tokens}, std::as_bytes(std::span(each.mask)));
        }
        add_floats(name + "scale", {1, from.tokens, from.heads}, expected.scales);
        add(name + "codes", rvqkv::storage_type::int32, {1, from.tokens, from.heads, from.groups(), from.depths},
            std::as_bytes(std::span(expected.codes)));
        add_floats(name + "output", {1, from.tokens, from.heads, from.head_dim}, expected.outputs);
        add_floats(name + "commitment_loss", {1, from.tokens}, expected.losses);
        add_floats(name + "cluster_size", {from.depths, from.codewords}, expected.after.sizes);
        add_floats(name + "embed_avg", book, expected.after.sums);
        add_floats(name + "codebook", book, expected.after.weights);
    }
    const rvqkv::metadata_map metadata = {{"group_dim", std::to_string(from.dim)},
                                          {"grouping", from.strided ? "strided" : "contiguous"},
                                          {"cosine", from.cosine ? "1" : "0"},
                                          {"decay", std::to_string(from.decay)},
                                          {"eps", std::to_string(from.epsilon)}};
    auto out = rvqkv::safetensors_writer::create(path, infos, metadata).value();
    for (const std::span<const std::byte> bytes : data) {
        out.write(bytes).value();
    }
    out.commit().value();
}

// ---- Implementations ----

/// Something that runs steps one after another, each from the state that the one before has left.
class implementation {
public:
    implementation() = default;
    implementation(const implementation&) = delete;
    implementation& operator=(const implementation&) = delete;
    virtual ~implementation() = default;
    virtual results run(const step& next) = 0;
    virtual void set_state(const state& from) = 0;
};

/// The scalar oracle.
class oracle final : public implementation {
public:
    explicit oracle(const file& shape)
        : shape_(shape),
          ema_({shape.depths, shape.codewords, shape.dim, shape.before, shape.cosine}, static_cast<float>(shape.decay),
               static_cast<float>(shape.epsilon)) {}

    results run(const step& next) override {
        results out;
        std::vector<reference::encoded> counted;
        for (std::size_t token = 0; token < shape_.tokens; ++token) {
            std::vector<reference::encoded_row> heads;
            for (std::size_t head = 0; head < shape_.heads; ++head) {
                const float* const row = next.input.data() + (token * shape_.heads + head) * shape_.head_dim;
                heads.push_back(reference::encode_row(row, shape_.head_dim, ema_.book, shape_.strided));
                const reference::encoded_row& coded = heads.back();
                out.scales.push_back(coded.scale);
                out.codes.insert(out.codes.end(), coded.codes.begin(), coded.codes.end());
                const auto output = reference::decode_row(coded, shape_.head_dim, ema_.book, shape_.strided);
                out.outputs.insert(out.outputs.end(), output.begin(), output.end());
                if (next.counts(token)) {
                    counted.insert(counted.end(), coded.groups.begin(), coded.groups.end());
                }
            }
            out.losses.push_back(static_cast<float>(reference::commitment_loss(heads, ema_.book)));
        }
        ema_.accumulate(counted);
        ema_.step();
        out.after = {ema_.book.weights, ema_.sizes, ema_.sums};
        return out;
    }

    void set_state(const state& from) override {
        ema_.book.weights = from.weights;
        ema_.sizes = from.sizes;
        ema_.sums = from.sums;
    }

private:
    const file& shape_;
    reference::ema ema_;
};

// ---- Comparison ----

/// Everything in which an implementation differs from a file, as sentences; only differences within float32 rounding
/// are none. Two codewords that are equally near within rounding may be swapped ("ties"): what hangs on the choice is
/// then left out, and the next step starts from the file's state.
class comparison {
public:
    comparison(const file& expected, implementation& subject) : file_(expected) {
        state before = expected.start();
        weights_ = before.weights;
        for (std::size_t t = 0; t < expected.steps.size(); ++t) {
            name_ = "step" + std::to_string(t) + ".";
            const step& each = expected.steps[t];
            const std::size_t ties_before = ties_;
            const results actual = subject.run(each);
            compare(each, before, actual);
            before = each.expected.after;
            weights_ = actual.after.weights;
            if (ties_ != ties_before) {
                subject.set_state(before);
                weights_ = before.weights;
            }
        }
    }

    /// The first few; empty when the implementation agrees.
    [[nodiscard]] const std::vector<std::string>& differences() const { return differences_; }
    [[nodiscard]] std::size_t ties() const { return ties_; }

private:
    void compare(const step& each, const state& before, const results& actual) {
        const results& expected = each.expected;
        const std::size_t vectors = file_.tokens * file_.heads * file_.groups();
        std::vector<bool> tied(vectors, false);
        std::vector<bool> tied_token(file_.tokens, false);
        std::vector<bool> tied_codeword(file_.depths * file_.codewords, false);
        const double drift = largest_distance(before.weights, weights_);
        for (std::size_t v = 0; v < vectors; ++v) {
            const std::size_t token = v / file_.groups() / file_.heads;
            for (std::size_t depth = 0; depth < file_.depths; ++depth) {
                const std::size_t i = v * file_.depths + depth;
                if (!tied[v] && actual.codes[i] != expected.codes[i]) {
                    if (!is_tie(each, before, v, depth, actual.codes[i], drift)) {
                        report("codes", i, std::to_string(actual.codes[i]), std::to_string(expected.codes[i]));
                    }
                    ++ties_;
                    tied[v] = true;
                    tied_token[token] = true;
                }
                if (tied[v] && each.counts(token)) {
                    for (const std::int32_t code : {actual.codes[i], expected.codes[i]}) {
                        tied_codeword[depth * file_.codewords + static_cast<std::size_t>(code)] = true;
                    }
                }
            }
        }
        const auto compare_floats = [&](const char* what, const std::vector<float>& got,
                                        const std::vector<float>& wanted, auto&& is_left_out, auto&& unit) {
            if (got.size() != wanted.size()) {
                report(what, 0, std::to_string(got.size()) + " numbers", std::to_string(wanted.size()));
                return;
            }
            for (std::size_t i = 0; i < got.size(); ++i) {
                const double want = static_cast<double>(wanted[i]);
                const double tolerance = 1e-5 * unit(i) + 1e-4 * std::fabs(want);
                if (!is_left_out(i) && !(std::fabs(static_cast<double>(got[i]) - want) <= tolerance)) {
                    report(what, i, std::to_string(got[i]), std::to_string(wanted[i]));
                }
            }
        };
        const auto never = [](std::size_t) { return false; };
        const auto one = [](std::size_t) { return 1.0; };
        compare_floats("scale", actual.scales, expected.scales, never, one);
        // The tolerance of outputs holds in the domain that is quantized, so it grows with the scale.
        compare_floats(
            "output", actual.outputs, expected.outputs, [&](std::size_t i) { return tied[vector_of(i)]; },
            [&](std::size_t i) { return std::max(1.0, static_cast<double>(expected.scales[i / file_.head_dim])); });
        compare_floats(
            "commitment_loss", actual.losses, expected.losses, [&](std::size_t i) { return tied_token[i]; }, one);
        const auto of_tied_codeword = [&](std::size_t i) { return tied_codeword[i / file_.dim]; };
        compare_floats(
            "cluster_size", actual.after.sizes, expected.after.sizes, [&](std::size_t i) { return tied_codeword[i]; },
            one);
        compare_floats("embed_avg", actual.after.sums, expected.after.sums, of_tied_codeword, one);
        compare_floats("codebook", actual.after.weights, expected.after.weights, of_tied_codeword, one);
    }

    /// The vector that holds an element of [token, head, channel].
    [[nodiscard]] std::size_t vector_of(std::size_t element) const {
        const std::size_t channel = element % file_.head_dim;
        const std::size_t group = file_.strided ? channel % file_.groups() : channel / file_.dim;
        return element / file_.head_dim * file_.groups() + group;
    }

    [[nodiscard]] const float* codeword(const state& from, std::size_t depth, std::int32_t code) const {
        return from.weights.data() + (depth * file_.codewords + static_cast<std::size_t>(code)) * file_.dim;
    }

    /// Whether the file's codeword and another are as near as float32 can tell, seen in double.
    [[nodiscard]] bool is_tie(const step& each, const state& before, std::size_t vector, std::size_t depth,
                              std::int32_t code, double drift) const {
        if (code < 0 || static_cast<std::size_t>(code) >= file_.codewords) {
            return false;
        }
        const std::size_t row = vector / file_.groups();
        const std::size_t group = vector % file_.groups();
        const std::int32_t* const chosen = each.expected.codes.data() + vector * file_.depths;
        std::vector<double> residual(file_.dim);
        for (std::size_t i = 0; i < file_.dim; ++i) {
            const std::size_t channel = reference::channel_of(group, i, file_.groups(), file_.dim, file_.strided);
            residual[i] = static_cast<double>(each.input[row * file_.head_dim + channel]) /
                          static_cast<double>(each.expected.scales[row]);
            for (std::size_t k = 0; k < depth; ++k) {
                residual[i] -= static_cast<double>(codeword(before, k, chosen[k])[i]);
            }
        }
        double x = 0;
        for (const double value : residual) {
            x += value * value;
        }
        x = std::sqrt(x);
        const std::int32_t pair[2] = {code, chosen[depth]};
        double scores[2] = {0, 0};   // as in reference::score
        double lengths[2] = {0, 0};  // of the codewords as the search sees them
        for (int side = 0; side < 2; ++side) {
            const float* const c = codeword(before, depth, pair[side]);
            double product = 0;
            double squares = 0;
            for (std::size_t i = 0; i < file_.dim; ++i) {
                product += residual[i] * static_cast<double>(c[i]);
                squares += static_cast<double>(c[i]) * static_cast<double>(c[i]);
            }
            const double length = std::max(std::sqrt(squares), 1e-12);
            scores[side] = file_.cosine ? product / length : product - 0.5 * squares;
            lengths[side] = file_.cosine ? 1.0 : length;
        }
        // Rounding: each of dim products, their sums and the residual's own. Drift: of the codewords passed on the way,
        // which a cosine search magnifies where they are short.
        const double size = x + std::max(lengths[0], lengths[1]);
        const double rounding = static_cast<double>(file_.dim + 8 * (depth + 1)) * 0x1p-24 * size * size;
        const double moved = 2.0 * static_cast<double>(depth + 1) * drift * size;
        return std::fabs(scores[0] - scores[1]) <= rounding + moved;
    }

    /// Largest distance between codewords of two codebooks, in the domain of the search.
    [[nodiscard]] double largest_distance(const std::vector<float>& a, const std::vector<float>& b) const {
        double largest = 0;
        for (std::size_t first = 0; first < a.size(); first += file_.dim) {
            double squares = 0;
            double length = 0;
            for (std::size_t i = first; i < first + file_.dim; ++i) {
                const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
                squares += difference * difference;
                length += static_cast<double>(a[i]) * static_cast<double>(a[i]);
            }
            const double shrink = file_.cosine ? std::min(1.0, std::max(std::sqrt(length), 1e-12)) : 1.0;
            largest = std::max(largest, std::sqrt(squares) / shrink);
        }
        return largest;
    }

    void report(const char* what, std::size_t element, const std::string& got, const std::string& wanted) {
        constexpr std::size_t enough = 10;
        if (differences_.size() < enough) {
            differences_.push_back(name_ + what + ", element " + std::to_string(element) + ": " + got +
                                   ", the file has " + wanted);
        }
    }

    const file& file_;
    std::string name_;
    std::vector<float> weights_;  // the subject's, at the start of the step
    std::vector<std::string> differences_;
    std::size_t ties_ = 0;
};

}  // namespace golden
