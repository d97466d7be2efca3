// SPDX-License-Identifier: MIT
#include "dense_attention.hpp"

#ifdef __AVX512F__

#include <immintrin.h>
#include <algorithm>
#include <cmath>

namespace bench {
namespace {

constexpr std::size_t group = dense_group;
constexpr std::size_t channels = dense_head_dim;
constexpr std::size_t block = dense_block;
constexpr std::size_t lanes = 16;
/// Keys and values take turns in pieces: shorter ones cost a tenth of the speed, scores of longer ones leave the cache.
constexpr std::size_t piece = 4096;

__m512 load_half(const std::uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

/// A block, 256 lines of the cache, is on its way while the one before is computed with. (A shorter distance is
/// slower.)
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

/// Scores `[4, 64]` of a block's tokens; `top` takes the highest of each lane.
void dense_scores(const std::uint16_t* keys, const std::uint16_t* ahead, const float* queries, float* out,
                  __m512 (&top)[group]) {
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
    for (std::size_t h = 0; h < group; ++h) {
        for (std::size_t i = 0; i < 4; ++i) {
            top[h] = _mm512_max_ps(top[h], scores[h][i]);
            _mm512_storeu_ps(out + h * block + i * lanes, scores[h][i]);
        }
    }
}

/// The softmax over the pieces so far: weights are relative to `highest`.
struct running_softmax {
    __m512 totals[group];
    float highest[group];

    /// Takes a piece's highest scores in; what was summed before is scaled to them.
    void raise(const __m512 (&top)[group], float* out) {
        for (std::size_t h = 0; h < group; ++h) {
            if (const float found = _mm512_reduce_max_ps(top[h]); found > highest[h]) {
                const __m512 shrink = _mm512_set1_ps(std::exp(highest[h] - found));
                highest[h] = found;
                totals[h] = _mm512_mul_ps(totals[h], shrink);
                scale(out + h * channels, shrink);
            }
        }
    }
    /// A block's scores become weights.
    void weigh(float* scores) {
        for (std::size_t h = 0; h < group; ++h) {
            for (std::size_t i = 0; i < block; i += lanes, scores += lanes) {
                const __m512 weight =
                    exp_of_negative(_mm512_sub_ps(_mm512_loadu_ps(scores), _mm512_set1_ps(highest[h])));
                totals[h] = _mm512_add_ps(totals[h], weight);
                _mm512_storeu_ps(scores, weight);
            }
        }
    }

    static void scale(float* out, __m512 factor) {
        for (std::size_t c = 0; c < channels; c += lanes) {
            _mm512_storeu_ps(out + c, _mm512_mul_ps(_mm512_loadu_ps(out + c), factor));
        }
    }
};

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

}  // namespace

bool has_dense_attention() noexcept {
    return true;
}

void dense_attention(const std::uint16_t* keys, const std::uint16_t* values, std::size_t tokens, const float* queries,
                     float* out) {
    running_softmax softmax;
    for (std::size_t h = 0; h < group; ++h) {
        softmax.totals[h] = _mm512_setzero_ps();
        softmax.highest[h] = -INFINITY;
    }
    for (std::size_t i = 0; i < group * channels; ++i) {
        out[i] = 0.0F;
    }
    float scores[group * piece];
    for (std::size_t first = 0; first < tokens; first += piece) {
        const std::size_t count = std::min(piece, tokens - first);
        const std::uint16_t* const piece_keys = keys + first * channels;
        const std::uint16_t* const piece_values = values + first * channels;
        __m512 top[group];
        for (__m512& highest : top) {
            highest = _mm512_set1_ps(-INFINITY);
        }
        for (std::size_t t = 0; t < count; t += block) {
            const std::uint16_t* const next = piece_keys + (t + block) * channels;
            dense_scores(piece_keys + t * channels, t + block < count ? next : piece_values, queries,
                         scores + t * group, top);
        }
        softmax.raise(top, out);
        for (std::size_t t = 0; t < count; t += block) {
            const std::uint16_t* const next = piece_values + (t + block) * channels;
            softmax.weigh(scores + t * group);
            dense_values(piece_values + t * channels, t + block < count ? next : piece_keys + count * channels,
                         scores + t * group, out);
        }
    }
    for (std::size_t h = 0; h < group; ++h) {
        running_softmax::scale(out + h * channels, _mm512_set1_ps(1.0F / _mm512_reduce_add_ps(softmax.totals[h])));
    }
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
