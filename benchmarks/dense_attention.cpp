// SPDX-License-Identifier: MIT
#include "dense_attention.hpp"

#ifdef __AVX512F__

#include <immintrin.h>
#include <cmath>

namespace bench {
namespace {

constexpr std::size_t group = dense_group;
constexpr std::size_t channels = dense_head_dim;
constexpr std::size_t block = dense_block;
constexpr std::size_t lanes = 16;
constexpr std::size_t block_bytes = block * channels * sizeof(std::uint16_t);

__m512 load_half(const std::uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

/// Each of a block's 256 steps brings one line of the block that comes next: values during keys, keys during values.
void prefetch(const std::uint16_t* block_ahead, std::size_t step) {
    _mm_prefetch(reinterpret_cast<const char*>(block_ahead) + step * 64, _MM_HINT_T0);
}

/// exp of numbers up to 0, to some 2e-7 of the value.
__m512 exp_of_negative(__m512 x) {
    const __m512 power = _mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504F)), _mm512_set1_ps(-126.0F));
    const __m512 whole = _mm512_roundscale_ps(power, 0);
    const __m512 part = _mm512_sub_ps(power, whole);
    __m512 sum = _mm512_set1_ps(1.5403530e-4F);  // (ln 2)^k / k!
    constexpr float factors[] = {1.3333558e-3F, 9.6181291e-3F, 5.5504109e-2F, 2.4022651e-1F, 6.9314718e-1F, 1.0F};
    for (const float factor : factors) {
        sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(factor));
    }
    return _mm512_scalef_ps(sum, whole);
}

/// The softmax so far: weights are relative to `highest`.
struct running_softmax {
    __m512 totals[group];
    float highest[group];
};

/// Weights `[4, 64]` of a block's tokens. Returns whether a new maximum came up; `shrink` is what older sums are to be
/// multiplied by then.
bool dense_weights(const std::uint16_t* keys, const std::uint16_t* ahead, const float* queries, running_softmax& state,
                   float* weights, float* shrink) {
    __m512 scores[group][4];
    for (auto& of_query : scores) {
        for (__m512& score : of_query) {
            score = _mm512_setzero_ps();
        }
    }
    for (std::size_t c = 0; c < channels; ++c) {
        prefetch(ahead, 2 * c);
        prefetch(ahead, 2 * c + 1);
        __m512 key[4];
#pragma GCC unroll 4
        for (std::size_t i = 0; i < 4; ++i) {
            key[i] = load_half(keys + c * block + i * lanes);
        }
#pragma GCC unroll 4
        for (std::size_t h = 0; h < group; ++h) {
            const __m512 query = _mm512_set1_ps(queries[h * channels + c]);
#pragma GCC unroll 4
            for (std::size_t i = 0; i < 4; ++i) {
                scores[h][i] = _mm512_fmadd_ps(query, key[i], scores[h][i]);
            }
        }
    }
    bool is_new = false;
    for (std::size_t h = 0; h < group; ++h) {
        const __m512 top =
            _mm512_max_ps(_mm512_max_ps(scores[h][0], scores[h][1]), _mm512_max_ps(scores[h][2], scores[h][3]));
        const float highest = _mm512_reduce_max_ps(top);
        shrink[h] = 1.0F;
        if (highest > state.highest[h]) {
            shrink[h] = std::exp(state.highest[h] - highest);
            state.highest[h] = highest;
            state.totals[h] = _mm512_mul_ps(state.totals[h], _mm512_set1_ps(shrink[h]));
            is_new = true;
        }
        for (std::size_t i = 0; i < 4; ++i) {
            const __m512 weight = exp_of_negative(_mm512_sub_ps(scores[h][i], _mm512_set1_ps(state.highest[h])));
            state.totals[h] = _mm512_add_ps(state.totals[h], weight);
            _mm512_storeu_ps(weights + h * block + i * lanes, weight);
        }
    }
    return is_new;
}

/// Half of the channels at a time: 16 sums stay in registers over a block.
void dense_values(const std::uint16_t* values, const std::uint16_t* ahead, const float* weights, float* out) {
    for (std::size_t half = 0; half < 2; ++half) {
        float* const to = out + half * channels / 2;
        __m512 sums[group][4];
        for (std::size_t h = 0; h < group; ++h) {
            for (std::size_t i = 0; i < 4; ++i) {
                sums[h][i] = _mm512_loadu_ps(to + h * channels + i * lanes);
            }
        }
        for (std::size_t t = 0; t < block; ++t) {
            prefetch(ahead, 2 * (half * block + t));
            prefetch(ahead, 2 * (half * block + t) + 1);
            const std::uint16_t* const row = values + t * channels + half * channels / 2;
            __m512 value[4];
#pragma GCC unroll 4
            for (std::size_t i = 0; i < 4; ++i) {
                value[i] = load_half(row + i * lanes);
            }
#pragma GCC unroll 4
            for (std::size_t h = 0; h < group; ++h) {
                const __m512 weight = _mm512_set1_ps(weights[h * block + t]);
#pragma GCC unroll 4
                for (std::size_t i = 0; i < 4; ++i) {
                    sums[h][i] = _mm512_fmadd_ps(weight, value[i], sums[h][i]);
                }
            }
        }
        for (std::size_t h = 0; h < group; ++h) {
            for (std::size_t i = 0; i < 4; ++i) {
                _mm512_storeu_ps(to + h * channels + i * lanes, sums[h][i]);
            }
        }
    }
}

void scale(float* out, const float* factors) {
    for (std::size_t h = 0; h < group; ++h) {
        for (std::size_t c = 0; c < channels; ++c) {
            out[h * channels + c] *= factors[h];
        }
    }
}

}  // namespace

bool has_dense_attention() noexcept {
    return true;
}

void dense_attention(const std::uint16_t* keys, const std::uint16_t* values, std::size_t tokens, const float* queries,
                     float* out) {
    static_assert(block_bytes == 256 * 64);
    running_softmax state;
    for (std::size_t h = 0; h < group; ++h) {
        state.totals[h] = _mm512_setzero_ps();
        state.highest[h] = -INFINITY;
    }
    for (std::size_t i = 0; i < group * channels; ++i) {
        out[i] = 0.0F;
    }
    float factors[group];
    alignas(64) float weights[group * block];
    for (std::size_t t = 0; t < tokens; t += block) {
        const std::uint16_t* const block_keys = keys + t * channels;
        const std::uint16_t* const block_values = values + t * channels;
        if (dense_weights(block_keys, block_values, queries, state, weights, factors)) {
            scale(out, factors);
        }
        dense_values(block_values, block_keys + block * channels, weights, out);
    }
    for (std::size_t h = 0; h < group; ++h) {
        factors[h] = 1.0F / _mm512_reduce_add_ps(state.totals[h]);
    }
    scale(out, factors);
}

}  // namespace bench

#else

namespace bench {

bool has_dense_attention() noexcept {
    return false;
}

void dense_attention(const std::uint16_t*, const std::uint16_t*, std::size_t, const float*, float*) {}

}  // namespace bench

#endif
