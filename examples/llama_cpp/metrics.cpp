// SPDX-License-Identifier: MIT
#include "metrics.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace llama_example {
namespace {

/// e^x for x <= 0, to some 1e-7 relative: a plain loop of it is vectorized, unlike one of `std::exp`.
inline float exp_below(float x) noexcept {
    const float t = std::max(x, -80.0F) * 1.44269504088896F;
    const float whole = static_cast<float>(static_cast<int>(t - 0.5F));
    const float r = (t - whole) * 0.693147180559945F;
    const float p =
        1.0F +
        r * (1.0F + r * (0.5F + r * (0.166666667F + r * (0.0416666667F + r * (0.00833333333F + r * 0.00138888889F)))));
    return p * std::bit_cast<float>((static_cast<std::int32_t>(whole) + 127) << 23U);
}

/// Sums of a row go through this many partial sums of floats before they become doubles.
constexpr std::size_t block = 512;

double log_sum_exp(const float* logits, std::size_t count, float most) {
    double sum = 0.0;
    for (std::size_t at = 0; at < count; at += block) {
        const std::size_t size = std::min(block, count - at);
        float part[16] = {};
        std::size_t i = 0;
        for (; i + 16 <= size; i += 16) {
            for (std::size_t lane = 0; lane < 16; ++lane) {
                part[lane] += exp_below(logits[at + i + lane] - most);
            }
        }
        for (; i < size; ++i) {
            part[0] += exp_below(logits[at + i] - most);
        }
        for (const float each : part) {
            sum += static_cast<double>(each);
        }
    }
    return static_cast<double>(most) + std::log(sum);
}

std::size_t likeliest(const float* row, std::size_t count) {
    return static_cast<std::size_t>(std::max_element(row, row + count) - row);
}

}  // namespace

void reference_window::take(const float* logits, std::size_t first, std::size_t count,
                            std::span<const llama_token> targets, const rvqkv::executor& workers) {
    rvqkv::parallel_for(workers, count, [&](std::size_t i) {
        const std::size_t position = first + i;
        if (position >= targets.size()) {
            return;
        }
        const float* const from = logits + i * vocabulary_;
        const auto sum = log_sum_exp(from, vocabulary_, *std::max_element(from, from + vocabulary_));
        float* const to = log_probabilities_.data() + position * vocabulary_;
        const auto shift = static_cast<float>(sum);
        for (std::size_t j = 0; j < vocabulary_; ++j) {
            to[j] = from[j] - shift;
        }
        losses_[position] = sum - static_cast<double>(from[targets[position]]);
    });
}

void divergence::take(const reference_window& reference, const float* logits, std::size_t first, std::size_t count,
                      std::span<const llama_token> targets, const rvqkv::executor& workers) {
    const std::size_t kept = std::min(count, targets.size() - std::min(first, targets.size()));
    const std::size_t begin = kl.size();
    for (auto* list : {&kl, &loss, &base_loss}) {
        list->resize(begin + kept);
    }
    position.resize(begin + kept);
    agrees.resize(begin + kept);
    const std::size_t vocabulary = reference.vocabulary();
    rvqkv::parallel_for(workers, kept, [&](std::size_t i) {
        const float* const base = reference.row(first + i);
        const float* const mine = logits + i * vocabulary;
        const std::size_t best = likeliest(mine, vocabulary);
        const double sum = log_sum_exp(mine, vocabulary, mine[best]);
        const auto shift = static_cast<float>(sum);
        double divergence_sum = 0.0;
        for (std::size_t at = 0; at < vocabulary; at += block) {
            const std::size_t size = std::min(block, vocabulary - at);
            float part[16] = {};
            std::size_t j = 0;
            // sum p (ln p - ln q) + (q - p), every term >= 0: rounding cannot make small divergences negative
            const auto term = [&](std::size_t k) {
                const float log_p = base[at + k];
                const float log_q = mine[at + k] - shift;
                const float p = exp_below(std::min(log_p, 0.0F));
                return p * (log_p - log_q) + (exp_below(std::min(log_q, 0.0F)) - p);
            };
            for (; j + 16 <= size; j += 16) {
                for (std::size_t lane = 0; lane < 16; ++lane) {
                    part[lane] += term(j + lane);
                }
            }
            for (; j < size; ++j) {
                part[0] += term(j);
            }
            for (const float each : part) {
                divergence_sum += static_cast<double>(each);
            }
        }
        kl[begin + i] = std::max(0.0, divergence_sum);  // which rounding may miss by 1e-8
        loss[begin + i] = sum - static_cast<double>(mine[targets[first + i]]);
        base_loss[begin + i] = reference.losses()[first + i];
        position[begin + i] = first + i;
        agrees[begin + i] = static_cast<char>(best == likeliest(base, vocabulary));
    });
}

divergence_summary summarize(const divergence& all, std::size_t first, std::size_t last) {
    divergence_summary found;
    std::vector<double> kl;
    double loss = 0.0;
    double base_loss = 0.0;
    double agreeing = 0.0;
    for (std::size_t i = 0; i < all.kl.size(); ++i) {
        if (all.position[i] < first || all.position[i] >= last) {
            continue;
        }
        kl.push_back(all.kl[i]);
        found.kl += all.kl[i];
        loss += all.loss[i];
        base_loss += all.base_loss[i];
        agreeing += all.agrees[i] != 0 ? 1.0 : 0.0;
    }
    found.positions = kl.size();
    if (kl.empty()) {
        return found;
    }
    const auto count = static_cast<double>(kl.size());
    found.kl /= count;
    found.perplexity = std::exp(loss / count);
    found.perplexity_ratio = std::exp((loss - base_loss) / count);
    found.top1_agreement = agreeing / count;
    const auto at = static_cast<std::ptrdiff_t>(std::ceil(0.99 * count)) - 1;
    std::nth_element(kl.begin(), kl.begin() + at, kl.end());
    found.kl_p99 = kl[static_cast<std::size_t>(at)];
    return found;
}

}  // namespace llama_example
