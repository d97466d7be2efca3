// SPDX-License-Identifier: MIT
/// @file
/// How far a model's predictions are from the unquantized model's.
#pragma once

#include <rvqkv/core/parallel_for.hpp>

#include <llama.h>

#include <cstddef>
#include <span>
#include <vector>

namespace llama_example {

/// Log-probabilities of one window, `[position, vocabulary]`, of the unquantized model.
class reference_window {
public:
    reference_window(std::size_t positions, std::size_t vocabulary)
        : vocabulary_(vocabulary), log_probabilities_(positions * vocabulary), losses_(positions) {}
    [[nodiscard]] std::size_t vocabulary() const noexcept { return vocabulary_; }
    [[nodiscard]] const float* row(std::size_t position) const noexcept {
        return log_probabilities_.data() + position * vocabulary_;
    }
    [[nodiscard]] const std::vector<double>& losses() const noexcept { return losses_; }
    /// Takes logits of positions `first` and on. `targets[i]` is the token that follows position `i` of the window;
    /// positions that nothing follows are left out.
    void take(const float* logits, std::size_t first, std::size_t count, std::span<const llama_token> targets,
              const rvqkv::executor& workers);

private:
    std::size_t vocabulary_;
    std::vector<float> log_probabilities_;
    std::vector<double> losses_;
};

/// What one method predicted, position by position.
struct divergence {
    std::vector<double> kl;    ///< Nats.
    std::vector<double> loss;  ///< Of the token that follows.
    std::vector<double> base_loss;
    std::vector<std::size_t> position;  ///< In its window.
    std::vector<char> agrees;           ///< Whether both models' likeliest tokens are one.
    /// Takes logits as `reference_window::take`.
    void take(const reference_window& reference, const float* logits, std::size_t first, std::size_t count,
              std::span<const llama_token> targets, const rvqkv::executor& workers);
};

/// Means over some positions.
struct divergence_summary {
    std::size_t positions = 0;
    double kl = 0.0;
    double kl_p99 = 0.0;
    double perplexity = 0.0;
    double perplexity_ratio = 0.0;
    double top1_agreement = 0.0;
};
/// Over positions `[first, last)` of all windows.
[[nodiscard]] divergence_summary summarize(const divergence& all, std::size_t first, std::size_t last);

}  // namespace llama_example
