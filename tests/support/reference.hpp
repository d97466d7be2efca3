// SPDX-License-Identifier: MIT
/// @file
/// The method once more, as plainly as it can be said: one scalar, one loop at a time, no SIMD, no layout, no reuse of
/// the library's code. What the tests compare with, and a description of the method that runs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace reference {

/// Codewords of every depth.
struct codebook {
    std::size_t depths = 0;
    std::size_t codewords = 0;
    std::size_t dim = 0;
    std::vector<float> weights;  ///< [depth][codeword][dim]
    bool cosine = false;         ///< Search by angle: codewords are normalized for the search alone.

    [[nodiscard]] const float* codeword(std::size_t depth, std::size_t code) const {
        return weights.data() + (depth * codewords + code) * dim;
    }
};

/// Standard deviation over a head's channels, divided by count - 1; that of equal numbers counts as 1.
[[nodiscard]] inline float standard_deviation(const float* row, std::size_t channels) {
    double sum = 0;
    for (std::size_t i = 0; i < channels; ++i) {
        sum += static_cast<double>(row[i]);
    }
    const double mean = sum / static_cast<double>(channels);
    double squares = 0;
    for (std::size_t i = 0; i < channels; ++i) {
        const double offset = static_cast<double>(row[i]) - mean;
        squares += offset * offset;
    }
    const auto deviation = static_cast<float>(std::sqrt(squares / static_cast<double>(channels - 1)));
    return deviation == 0.0F ? 1.0F : deviation;
}

/// Channel number `i` of a group: strided groups (keys) take every `groups`-th channel, contiguous ones (values) a run.
[[nodiscard]] constexpr std::size_t channel_of(std::size_t group, std::size_t i, std::size_t groups,
                                               std::size_t group_dim, bool strided) {
    return strided ? i * groups + group : group * group_dim + i;
}

/// What the search maximizes over codewords `c` for an `x`. Euclidean: `<x, c> - |c|^2 / 2`, which is largest where
/// `|x - c|` is smallest. Cosine: `<x, c / |c|>`. Float32, one fused multiply-add for each channel, in order.
[[nodiscard]] inline float score(const float* x, const float* codeword, std::size_t dim, bool cosine) {
    double squares = 0;
    for (std::size_t i = 0; i < dim; ++i) {
        squares += static_cast<double>(codeword[i]) * static_cast<double>(codeword[i]);
    }
    const double length = cosine ? std::max(std::sqrt(squares), 1e-12) : 1.0;
    float sum = cosine ? 0.0F : static_cast<float>(-0.5 * squares);
    for (std::size_t i = 0; i < dim; ++i) {
        sum = std::fma(x[i], static_cast<float>(static_cast<double>(codeword[i]) / length), sum);
    }
    return sum;
}

/// The best codeword of one depth; the first among equals, and 0 when no score compares.
[[nodiscard]] inline std::uint16_t nearest_codeword(const float* x, const codebook& book, std::size_t depth) {
    std::size_t best = 0;
    float best_score = -std::numeric_limits<float>::infinity();
    for (std::size_t code = 0; code < book.codewords; ++code) {
        const float candidate = score(x, book.codeword(depth, code), book.dim, book.cosine);
        if (candidate > best_score) {
            best = code;
            best_score = candidate;
        }
    }
    return static_cast<std::uint16_t>(best);
}

/// Greedy residual quantization of one vector: each depth codes what the depths before it have left.
struct encoded {
    std::vector<std::uint16_t> codes;  ///< [depth]
    std::vector<float> inputs;         ///< [depth][dim]: what each depth was given
    std::vector<float> residual;       ///< [dim]: what is left after the last
};
[[nodiscard]] inline encoded encode(const float* x, const codebook& book) {
    encoded out;
    out.residual.assign(x, x + book.dim);
    for (std::size_t depth = 0; depth < book.depths; ++depth) {
        out.inputs.insert(out.inputs.end(), out.residual.begin(), out.residual.end());
        out.codes.push_back(nearest_codeword(out.residual.data(), book, depth));
        const float* const codeword = book.codeword(depth, out.codes.back());
        for (std::size_t i = 0; i < book.dim; ++i) {
            out.residual[i] -= codeword[i];
        }
    }
    return out;
}

/// Sum of the chosen codewords of the first `depths` depths, first depth first.
[[nodiscard]] inline std::vector<float> decode(const std::uint16_t* codes, const codebook& book, std::size_t depths) {
    std::vector<float> sum(book.dim, 0.0F);
    for (std::size_t depth = 0; depth < depths; ++depth) {
        const float* const codeword = book.codeword(depth, codes[depth]);
        for (std::size_t i = 0; i < book.dim; ++i) {
            sum[i] += codeword[i];
        }
    }
    return sum;
}

/// One head's key or value, coded.
struct encoded_row {
    float scale = 1.0F;
    std::vector<std::uint16_t> codes;  ///< [group][depth]
    std::vector<encoded> groups;       ///< [group]
};
[[nodiscard]] inline encoded_row encode_row(const float* row, std::size_t channels, const codebook& book,
                                            bool strided) {
    const std::size_t groups = channels / book.dim;
    encoded_row out;
    out.scale = standard_deviation(row, channels);
    std::vector<float> x(book.dim);
    for (std::size_t group = 0; group < groups; ++group) {
        for (std::size_t i = 0; i < book.dim; ++i) {
            x[i] = row[channel_of(group, i, groups, book.dim, strided)] / out.scale;
        }
        out.groups.push_back(encode(x.data(), book));
        const std::vector<std::uint16_t>& codes = out.groups.back().codes;
        out.codes.insert(out.codes.end(), codes.begin(), codes.end());
    }
    return out;
}

/// The row again, from its codes and scale.
[[nodiscard]] inline std::vector<float> decode_row(const encoded_row& coded, std::size_t channels, const codebook& book,
                                                   bool strided) {
    const std::size_t groups = channels / book.dim;
    std::vector<float> row(channels);
    for (std::size_t group = 0; group < groups; ++group) {
        const std::vector<float> x = decode(coded.codes.data() + group * book.depths, book, book.depths);
        for (std::size_t i = 0; i < book.dim; ++i) {
            row[channel_of(group, i, groups, book.dim, strided)] = x[i] * coded.scale;
        }
    }
    return row;
}

/// Commitment loss of one token: over depths, the mean over heads and channels of the squared residual.
[[nodiscard]] inline double commitment_loss(const std::vector<encoded_row>& heads, const codebook& book) {
    double sum = 0;
    std::size_t count = 0;
    for (const encoded_row& head : heads) {
        for (const encoded& group : head.groups) {
            for (std::size_t depth = 0; depth < book.depths; ++depth) {
                const float* const codeword = book.codeword(depth, group.codes[depth]);
                for (std::size_t i = 0; i < book.dim; ++i) {
                    const auto left = static_cast<double>(group.inputs[depth * book.dim + i] - codeword[i]);
                    sum += left * left;
                }
            }
            count += book.dim;
        }
    }
    return sum / static_cast<double>(count);
}

/// The paper's exponential moving average: running size and sum of every codeword's cluster.
struct ema {
    float decay = 0.99F;
    float epsilon = 1e-5F;
    codebook book;
    std::vector<float> sizes;  ///< [depth][codeword]
    std::vector<float> sums;   ///< [depth][codeword][dim]

    /// Starts with sizes of one and sums equal to the codewords.
    ema(codebook start, float decay_, float epsilon_)
        : decay(decay_),
          epsilon(epsilon_),
          book(std::move(start)),
          sizes(book.depths * book.codewords, 1.0F),
          sums(book.weights) {}

    /// A micro-batch of vectors: `size += (1 - decay) / decay * n`, `sum += (1 - decay) / decay * (sum of inputs)`.
    void accumulate(const std::vector<encoded>& vectors) {
        std::vector<double> counts(sizes.size(), 0.0);
        std::vector<double> totals(sums.size(), 0.0);
        for (const encoded& vector : vectors) {
            for (std::size_t depth = 0; depth < book.depths; ++depth) {
                const std::size_t cluster = depth * book.codewords + vector.codes[depth];
                counts[cluster] += 1.0;
                for (std::size_t i = 0; i < book.dim; ++i) {
                    totals[cluster * book.dim + i] += static_cast<double>(vector.inputs[depth * book.dim + i]);
                }
            }
        }
        const double weight = (1.0 - static_cast<double>(decay)) / static_cast<double>(decay);
        for (std::size_t i = 0; i < sizes.size(); ++i) {
            sizes[i] = static_cast<float>(static_cast<double>(sizes[i]) + weight * counts[i]);
        }
        for (std::size_t i = 0; i < sums.size(); ++i) {
            sums[i] = static_cast<float>(static_cast<double>(sums[i]) + weight * totals[i]);
        }
    }

    /// The optimiser's step: decay, smooth the sizes, divide, clamp.
    void step() {
        for (float& size : sizes) {
            size *= decay;
        }
        for (float& sum : sums) {
            sum *= decay;
        }
        for (std::size_t depth = 0; depth < book.depths; ++depth) {
            const float* const size = sizes.data() + depth * book.codewords;
            double total = 0;
            for (std::size_t code = 0; code < book.codewords; ++code) {
                total += static_cast<double>(size[code]);
            }
            const double spread = total + static_cast<double>(book.codewords) * static_cast<double>(epsilon);
            for (std::size_t code = 0; code < book.codewords; ++code) {
                const double smoothed =
                    (static_cast<double>(size[code]) + static_cast<double>(epsilon)) / spread * total;
                const std::size_t first = (depth * book.codewords + code) * book.dim;
                for (std::size_t i = first; i < first + book.dim; ++i) {
                    const double mean = static_cast<double>(sums[i]) / smoothed;
                    book.weights[i] = static_cast<float>(std::clamp(mean, -100.0, 100.0));
                }
            }
        }
    }
};

}  // namespace reference
