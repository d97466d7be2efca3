// SPDX-License-Identifier: MIT
#include "dense_attention.hpp"

#ifdef __AVX512F__

#include <immintrin.h>
#include <cmath>

namespace bench {
namespace {

constexpr int group = static_cast<int>(dense_group);
constexpr int registers = static_cast<int>(dense_head_dim) / 16;

__m512 load_half(const std::uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

/// Four tokens against four queries at a time: a row is converted once for all of them.
void dense_scores(const std::uint16_t* keys, std::size_t tokens, const float* queries, float* scores) {
    for (std::size_t t = 0; t < tokens; t += 4) {
        __m512 sums[group][4];
        for (auto& of_query : sums) {
            for (__m512& sum : of_query) {
                sum = _mm512_setzero_ps();
            }
        }
        const auto* const ahead = reinterpret_cast<const char*>(keys + (t + 24) * dense_head_dim);
        for (int line = 0; line < 16; ++line) {
            _mm_prefetch(ahead + 64 * line, _MM_HINT_T0);
        }
        for (int c = 0; c < registers; ++c) {
            __m512 key[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                key[i] = load_half(keys + (t + static_cast<std::size_t>(i)) * dense_head_dim + c * 16);
            }
#pragma GCC unroll 4
            for (int h = 0; h < group; ++h) {
                const __m512 query = _mm512_loadu_ps(queries + h * static_cast<int>(dense_head_dim) + c * 16);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    sums[h][i] = _mm512_fmadd_ps(query, key[i], sums[h][i]);
                }
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < group; ++h) {
            // The sums of the lanes of four registers, side by side.
            const __m512 low =
                _mm512_add_ps(_mm512_unpacklo_ps(sums[h][0], sums[h][1]), _mm512_unpackhi_ps(sums[h][0], sums[h][1]));
            const __m512 high =
                _mm512_add_ps(_mm512_unpacklo_ps(sums[h][2], sums[h][3]), _mm512_unpackhi_ps(sums[h][2], sums[h][3]));
            const __m512 quarters =
                _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(low), _mm512_castps_pd(high))),
                              _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(low), _mm512_castps_pd(high))));
            const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
            _mm_storeu_ps(scores + static_cast<std::size_t>(h) * tokens + t,
                          _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
        }
    }
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

void dense_softmax(float* scores, std::size_t tokens) {
    for (int h = 0; h < group; ++h, scores += tokens) {
        __m512 top = _mm512_set1_ps(-INFINITY);
        for (std::size_t t = 0; t < tokens; t += 16) {
            top = _mm512_max_ps(top, _mm512_loadu_ps(scores + t));
        }
        const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
        __m512 total = _mm512_setzero_ps();
        for (std::size_t t = 0; t < tokens; t += 16) {
            const __m512 weight = exp_of_negative(_mm512_sub_ps(_mm512_loadu_ps(scores + t), highest));
            total = _mm512_add_ps(total, weight);
            _mm512_storeu_ps(scores + t, weight);
        }
        const __m512 share = _mm512_set1_ps(1.0F / _mm512_reduce_add_ps(total));
        for (std::size_t t = 0; t < tokens; t += 16) {
            _mm512_storeu_ps(scores + t, _mm512_mul_ps(share, _mm512_loadu_ps(scores + t)));
        }
    }
}

/// Half of the channels at a time: 16 sums stay in registers over 64 tokens.
void dense_values(const std::uint16_t* values, std::size_t tokens, const float* weights, float* out) {
    for (std::size_t i = 0; i < dense_group * dense_head_dim; ++i) {
        out[i] = 0.0F;
    }
    for (std::size_t block = 0; block < tokens; block += 64) {
        for (int half = 0; half < 2; ++half) {
            float* const to = out + half * 64;
            __m512 sums[group][4];
            for (int h = 0; h < group; ++h) {
                for (int c = 0; c < 4; ++c) {
                    sums[h][c] = _mm512_loadu_ps(to + h * static_cast<int>(dense_head_dim) + c * 16);
                }
            }
            for (std::size_t t = block; t < block + 64; ++t) {
                const std::uint16_t* const row = values + t * dense_head_dim + half * 64;
                _mm_prefetch(reinterpret_cast<const char*>(row + 48 * dense_head_dim), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(row + 48 * dense_head_dim + 32), _MM_HINT_T0);
                __m512 value[4];
#pragma GCC unroll 4
                for (int c = 0; c < 4; ++c) {
                    value[c] = load_half(row + c * 16);
                }
#pragma GCC unroll 4
                for (int h = 0; h < group; ++h) {
                    const __m512 weight = _mm512_set1_ps(weights[static_cast<std::size_t>(h) * tokens + t]);
#pragma GCC unroll 4
                    for (int c = 0; c < 4; ++c) {
                        sums[h][c] = _mm512_fmadd_ps(weight, value[c], sums[h][c]);
                    }
                }
            }
            for (int h = 0; h < group; ++h) {
                for (int c = 0; c < 4; ++c) {
                    _mm512_storeu_ps(to + h * static_cast<int>(dense_head_dim) + c * 16, sums[h][c]);
                }
            }
        }
    }
}

}  // namespace

bool has_dense_attention() noexcept {
    return true;
}

void dense_attention(const std::uint16_t* keys, const std::uint16_t* values, std::size_t tokens, const float* queries,
                     float* scores, float* out) {
    dense_scores(keys, tokens, queries, scores);
    dense_softmax(scores, tokens);
    dense_values(values, tokens, scores, out);
}

}  // namespace bench

#else

namespace bench {

bool has_dense_attention() noexcept {
    return false;
}

void dense_attention(const std::uint16_t*, const std::uint16_t*, std::size_t, const float*, float*, float*) {}

}  // namespace bench

#endif
