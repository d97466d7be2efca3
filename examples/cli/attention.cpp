// SPDX-License-Identifier: MIT
#include "attention.hpp"

#include <algorithm>
#include <cmath>

namespace cli {
namespace {

float_tensor rotated(float_tensor x, const attention_config& config) {
    if (config.rope_theta == 0.0) {
        return x;
    }
    const std::size_t half = x.channels / 2;
    for (std::size_t i = 0; i < half; ++i) {
        const double frequency =
            std::pow(config.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(x.channels));
        for (std::size_t token = 0; token < x.tokens; ++token) {
            const double angle = static_cast<double>((config.first_token + token) % config.window) * frequency;
            const auto cosine = static_cast<float>(std::cos(angle));
            const auto sine = static_cast<float>(std::sin(angle));
            for (std::size_t head = 0; head < x.heads; ++head) {
                float* const row = x.row(token, head);
                const float first = row[i];
                const float second = row[i + half];
                row[i] = first * cosine - second * sine;
                row[i + half] = second * cosine + first * sine;
            }
        }
    }
    return x;
}

}  // namespace

float_tensor attend(const float_tensor& queries, const float_tensor& keys, const float_tensor& values,
                    const attention_config& config, const rvqkv::executor& workers) {
    const float_tensor q = rotated(queries, config);
    const float_tensor k = rotated(keys, config);
    float_tensor out{q.tokens, q.heads, values.channels, std::vector<float>(q.tokens * q.heads * values.channels)};
    const std::size_t queries_per_head = q.heads / k.heads;
    const float scale = 1.0F / std::sqrt(static_cast<float>(k.channels));
    rvqkv::parallel_for(workers, k.heads, [&](std::size_t source) {
        // Channel by channel, so that the inner loops run over tokens and need no sum in any order.
        std::vector<float> turned(k.channels * k.tokens);
        for (std::size_t token = 0; token < k.tokens; ++token) {
            for (std::size_t i = 0; i < k.channels; ++i) {
                turned[i * k.tokens + token] = k.row(token, source)[i];
            }
        }
        std::vector<float> weights(k.tokens);
        for (std::size_t head = source * queries_per_head; head < (source + 1) * queries_per_head; ++head) {
            for (std::size_t token = 0; token < q.tokens; ++token) {
                const std::size_t position = (config.first_token + token) % config.window;
                const std::size_t first = token - std::min(token, position);
                const std::size_t count = token - first + 1;
                std::fill_n(weights.begin(), count, 0.0F);
                for (std::size_t i = 0; i < k.channels; ++i) {
                    const float* const channel = turned.data() + i * k.tokens + first;
                    const float query = q.row(token, head)[i] * scale;
                    for (std::size_t j = 0; j < count; ++j) {
                        weights[j] += query * channel[j];
                    }
                }
                const float top =
                    *std::max_element(weights.begin(), weights.begin() + static_cast<std::ptrdiff_t>(count));
                float total = 0.0F;
                for (std::size_t j = 0; j < count; ++j) {
                    weights[j] = std::exp(weights[j] - top);
                    total += weights[j];
                }
                float* const result = out.row(token, head);
                for (std::size_t j = 0; j < count; ++j) {
                    const float weight = weights[j] / total;
                    const float* const value = values.row(first + j, source);
                    for (std::size_t i = 0; i < values.channels; ++i) {
                        result[i] += weight * value[i];
                    }
                }
            }
        }
    });
    return out;
}

double relative_squared_error(const float_tensor& a, const float_tensor& b) {
    double wrong = 0.0;
    double energy = 0.0;
    for (std::size_t i = 0; i < a.values.size(); ++i) {
        const double exact = static_cast<double>(a.values[i]);
        const double difference = exact - static_cast<double>(b.values[i]);
        wrong += difference * difference;
        energy += exact * exact;
    }
    return energy > 0.0 ? wrong / energy : wrong;
}

}  // namespace cli
