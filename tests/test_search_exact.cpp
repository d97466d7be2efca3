// SPDX-License-Identifier: MIT
/// @file
/// Millions of searches, most of them on inputs made to trip a search that skips, rounds or reorders: every SIMD level
/// must find the code and the score, bit for bit, of one scalar loop over all codewords.
#include "rvqkv/quantize/nearest_codeword.hpp"

#include "rvqkv/quantize/codebook.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/levels.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace {

using rvqkv::code_t;
using rvqkv::matrix_view;
using rvqkv::packed_codebook;

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float quiet_nan = std::numeric_limits<float>::quiet_NaN();
constexpr float denormal = std::numeric_limits<float>::denorm_min();

template <class T, std::size_t Count>
const T& any_of(test::random_source& random, const T (&choices)[Count]) {
    return choices[random.integer(0, Count - 1)];
}

// ---- The definition ----

/// Scores of the 16 codewords of a block side by side, so that a compiler may use registers for them; the order of the
/// additions of one score is that of the channels all the same.
RVQKV_ALWAYS_INLINE void define_nearest(const float* x, std::size_t rows, std::size_t stride,
                                        const packed_codebook& book, code_t* codes, float* scores) {
    constexpr std::size_t width = rvqkv::search_block;
    for (std::size_t i = 0; i < rows; ++i, x += stride) {
        float best = -infinity;
        std::size_t best_code = 0;
        for (std::size_t block = 0; block < book.blocks(); ++block) {
            const float* weights = book.interleaved + block * book.dim * width;
            float sums[width];
            std::memcpy(sums, book.offsets + block * width, sizeof(sums));
            for (std::size_t j = 0; j < book.dim; ++j, weights += width) {
                for (std::size_t lane = 0; lane < width; ++lane) {
                    sums[lane] = __builtin_fmaf(x[j], weights[lane], sums[lane]);
                }
            }
            for (std::size_t lane = 0; lane < width && block * width + lane < book.codewords; ++lane) {
                if (sums[lane] > best) {
                    best = sums[lane];
                    best_code = block * width + lane;
                }
            }
        }
        codes[i] = static_cast<code_t>(best_code);
        scores[i] = best;
    }
}

void nearest_anywhere(const float* x, std::size_t rows, std::size_t stride, const packed_codebook& book, code_t* codes,
                      float* scores) {
    define_nearest(x, rows, stride, book, codes, scores);
}
#if RVQKV_X86
/// The same loop where the processor has the instruction and std::fma need not be called for each product.
__attribute__((target("avx2,fma"))) void nearest_with_fma(const float* x, std::size_t rows, std::size_t stride,
                                                          const packed_codebook& book, code_t* codes, float* scores) {
    define_nearest(x, rows, stride, book, codes, scores);
}
#endif

using search = void (*)(const float*, std::size_t, std::size_t, const packed_codebook&, code_t*, float*);
search definition() {
#if RVQKV_X86
    if (rvqkv::is_available(rvqkv::simd_level::avx2)) {
        return nearest_with_fma;
    }
#endif
    return nearest_anywhere;
}

// ---- Codebooks ----

/// Numbers as trained codebooks and keys have them: the first channels much larger than the last.
void fill_spectrum(test::random_source& random, std::span<float> values) {
    const float decline = 3.0F / static_cast<float>(values.size());
    for (std::size_t j = 0; j < values.size(); ++j) {
        values[j] = random.gaussian() * std::exp(-decline * static_cast<float>(j));
    }
}

/// The number some representable numbers away.
float neighbour(test::random_source& random, float value, int most = 2) {
    const std::size_t steps = random.integer(0, static_cast<std::size_t>(most));
    const float towards = random.integer(0, 1) == 0 ? infinity : -infinity;
    for (std::size_t i = 0; i < steps && std::isfinite(std::nextafter(value, towards)); ++i) {
        value = std::nextafter(value, towards);
    }
    return value;
}

void scale_all(std::vector<float>& weights, float scale) {
    for (float& weight : weights) {
        weight *= scale;
    }
}

enum class book_kind {
    gaussian,      ///< N(0, 1)
    spectrum,      ///< As trained ones: channels of different size.
    whole,         ///< Whole numbers: many scores are equal exactly.
    duplicates,    ///< Every codeword several times, at random places.
    all_equal,     ///< One codeword, everywhere.
    zero,          ///< All zero.
    last_bits,     ///< A few codewords, copies of which differ in the last bits.
    mirrored,      ///< With each codeword its negative: ties at zero.
    far_away,      ///< Small differences on top of one large common vector: offsets dominate.
    one_huge,      ///< One codeword of 1e18, of which a scale for all must not lose the others.
    one_channel,   ///< One channel a million times larger.
    all_sizes,     ///< Codewords from 1e-6 to 1e6.
    tiny,          ///< 1e-30: offsets underflow.
    denormals,     ///< Denormal numbers.
    huge,          ///< 1e18: offsets near the largest float.
    overflowing,   ///< 1e30: offsets are -infinity.
    partly_minus,  ///< Some offsets are -infinity, others are not.
};
constexpr book_kind all_book_kinds[] = {
    book_kind::gaussian,    book_kind::spectrum,    book_kind::whole,    book_kind::duplicates, book_kind::all_equal,
    book_kind::zero,        book_kind::last_bits,   book_kind::mirrored, book_kind::far_away,   book_kind::one_huge,
    book_kind::one_channel, book_kind::all_sizes,   book_kind::tiny,     book_kind::denormals,  book_kind::huge,
    book_kind::overflowing, book_kind::partly_minus};

std::vector<float> make_weights(test::random_source& random, book_kind kind, std::size_t codewords, std::size_t dim) {
    std::vector<float> weights(codewords * dim);
    const auto codeword = [&](std::size_t code) { return std::span(weights).subspan(code * dim, dim); };
    const auto copy = [&](std::size_t from, std::size_t to) {
        std::copy_n(codeword(from).data(), dim, codeword(to).data());
    };
    const auto fill = [&] {
        for (float& weight : weights) {
            weight = random.gaussian();
        }
    };
    switch (kind) {
        case book_kind::gaussian: fill(); break;
        case book_kind::spectrum:
            for (std::size_t code = 0; code < codewords; ++code) {
                fill_spectrum(random, codeword(code));
            }
            break;
        case book_kind::whole: weights = test::whole_numbers(random, weights.size(), 2); break;
        case book_kind::duplicates:
            fill();
            for (std::size_t i = 0; i < codewords; ++i) {
                copy(random.integer(0, codewords - 1), random.integer(0, codewords - 1));
            }
            break;
        case book_kind::all_equal:
            fill();
            for (std::size_t code = 1; code < codewords; ++code) {
                copy(0, code);
            }
            break;
        case book_kind::zero: break;
        case book_kind::last_bits: {
            fill();
            const std::size_t originals = std::min<std::size_t>(codewords, 1 + codewords / 50);
            for (std::size_t code = originals; code < codewords; ++code) {
                copy(random.integer(0, originals - 1), code);
                for (float& weight : codeword(code)) {
                    weight = neighbour(random, weight);
                }
            }
            break;
        }
        case book_kind::mirrored:
            fill();
            for (std::size_t code = 1; code < codewords; code += 2) {
                for (std::size_t j = 0; j < dim; ++j) {
                    codeword(code)[j] = -codeword(code - 1)[j];
                }
            }
            break;
        case book_kind::far_away: {
            fill();
            const std::vector<float> common = test::gaussian_numbers(random, dim);
            for (std::size_t i = 0; i < weights.size(); ++i) {
                weights[i] = 1000.0F * common[i % dim] + 0.01F * weights[i];
            }
            break;
        }
        case book_kind::one_huge:
            fill();
            for (float& weight : codeword(random.integer(0, codewords - 1))) {
                weight *= 1e18F;
            }
            break;
        case book_kind::one_channel: {
            fill();
            const std::size_t channel = random.integer(0, dim - 1);
            for (std::size_t code = 0; code < codewords; ++code) {
                codeword(code)[channel] *= 1e6F;
            }
            break;
        }
        case book_kind::all_sizes:
            fill();
            for (std::size_t code = 0; code < codewords; ++code) {
                const float size = std::pow(10.0F, random.uniform(-6.0F, 6.0F));
                for (float& weight : codeword(code)) {
                    weight *= size;
                }
            }
            break;
        case book_kind::tiny:
            fill();
            scale_all(weights, 1e-30F);
            break;
        case book_kind::denormals:
            fill();
            scale_all(weights, 100.0F * denormal);
            break;
        case book_kind::huge:
            fill();
            scale_all(weights, 1e18F);
            break;
        case book_kind::overflowing:
            fill();
            scale_all(weights, 1e30F);
            break;
        case book_kind::partly_minus:
            fill();
            for (std::size_t code = 0; code < codewords; code += 1 + random.integer(0, 3)) {
                codeword(code)[random.integer(0, dim - 1)] = 3e38F;
            }
            break;
    }
    return weights;
}

// ---- Vectors ----

enum class row_kind {
    gaussian,
    spectrum,
    near,         ///< A codeword and a residual.
    codeword,     ///< Exactly a codeword.
    off_by_bits,  ///< A codeword but for the last bits.
    midpoint,     ///< Between two codewords: a tie, up to rounding.
    multiple,     ///< A codeword times some number.
    whole,
    zero,         ///< Of both signs.
    one_channel,  ///< All zero but one.
    tiny,         ///< 1e-30
    denormals,
    large,        ///< 1e6
    huge,         ///< 1e18
    overflowing,  ///< Up to the largest float.
    nan,          ///< With a NaN somewhere.
    infinite,     ///< With an infinity, or two that cancel.
};
constexpr row_kind all_row_kinds[] = {
    row_kind::gaussian, row_kind::spectrum,  row_kind::near,  row_kind::codeword, row_kind::off_by_bits,
    row_kind::midpoint, row_kind::multiple,  row_kind::whole, row_kind::zero,     row_kind::one_channel,
    row_kind::tiny,     row_kind::denormals, row_kind::large, row_kind::huge,     row_kind::overflowing,
    row_kind::infinite, row_kind::nan};
/// What a search meets in earnest.
constexpr row_kind usual_row_kinds[] = {row_kind::gaussian, row_kind::spectrum,    row_kind::near,
                                        row_kind::codeword, row_kind::off_by_bits, row_kind::midpoint};

void make_row(test::random_source& random, row_kind kind, const std::vector<float>& weights, std::span<float> row) {
    const std::size_t codewords = weights.size() / row.size();
    const std::size_t code = random.integer(0, codewords - 1);
    const float* const codeword = weights.data() + code * row.size();
    // As often the next codeword as any: neighbours share a block of the search layout.
    const std::size_t other_code =
        random.integer(0, 1) == 0 ? (code + 1) % codewords : random.integer(0, codewords - 1);
    const float* const other = weights.data() + other_code * row.size();
    const float factor = any_of(random, {-1.0F, 0.5F, 1.001F, 2.0F, 1000.0F});
    const float noise = any_of(random, {0.01F, 0.1F, 0.7F});
    for (std::size_t j = 0; j < row.size(); ++j) {
        switch (kind) {
            case row_kind::codeword: row[j] = codeword[j]; break;
            case row_kind::off_by_bits: row[j] = neighbour(random, codeword[j], 1); break;
            case row_kind::midpoint: row[j] = 0.5F * codeword[j] + 0.5F * other[j]; break;
            case row_kind::multiple: row[j] = factor * codeword[j]; break;
            case row_kind::near: row[j] = codeword[j] + noise * random.gaussian(); break;
            case row_kind::whole: row[j] = static_cast<float>(random.integer(0, 4)) - 2.0F; break;
            case row_kind::zero: row[j] = random.integer(0, 1) == 0 ? 0.0F : -0.0F; break;
            case row_kind::one_channel: row[j] = 0.0F; break;
            case row_kind::tiny: row[j] = 1e-30F * random.gaussian(); break;
            case row_kind::denormals: row[j] = 100.0F * denormal * random.gaussian(); break;
            case row_kind::large: row[j] = 1e6F * random.gaussian(); break;
            case row_kind::huge: row[j] = 1e18F * random.gaussian(); break;
            case row_kind::overflowing: row[j] = random.uniform(-1.0F, 1.0F) * 3.4e38F; break;
            default: row[j] = random.gaussian(); break;
        }
    }
    const std::size_t channel = random.integer(0, row.size() - 1);
    switch (kind) {
        case row_kind::spectrum: fill_spectrum(random, row); break;
        case row_kind::one_channel: row[channel] = any_of(random, {1.0F, -1.0F, 1e-20F, 1e6F, 1e30F}); break;
        case row_kind::nan: row[channel] = quiet_nan; break;
        case row_kind::infinite:
            row[channel] = infinity;
            row[random.integer(0, row.size() - 1)] = any_of(random, {infinity, -infinity});
            break;
        default: break;
    }
}

/// Rows that a search handles together may share a scale, so the mixture counts as much as the row.
enum class mixture {
    one_kind,     ///< All rows of one kind.
    usual,        ///< Each of some usual kind.
    any,          ///< Each of any kind.
    one_outlier,  ///< Usual ones, and one of any kind.
    copies,       ///< One row over and over.
};
constexpr mixture all_mixtures[] = {mixture::one_kind, mixture::usual, mixture::any, mixture::one_outlier,
                                    mixture::copies};

/// Rows in exactly the memory that they need: the last ends with its last column, what lies between them is NaN.
struct batch {
    std::vector<float> values;
    std::size_t offset;
    matrix_view<const float> view;

    batch(test::random_source& random, const std::vector<float>& weights, std::size_t rows, std::size_t dim)
        : offset(random.integer(0, 3)) {
        const std::size_t stride = dim + any_of(random, {0U, 0U, 1U, 3U, 13U});
        values.assign(offset + (rows - 1) * stride + dim, quiet_nan);
        view = {values.data() + offset, rows, dim, stride};
        const mixture how = any_of(random, all_mixtures);
        const row_kind one = any_of(random, all_row_kinds);
        const std::size_t outlier = random.integer(0, rows - 1);
        for (std::size_t i = 0; i < rows; ++i) {
            const std::span<float> row(values.data() + offset + i * stride, dim);
            if (how == mixture::copies && i != 0) {
                std::copy_n(view.row(0), dim, row.data());
                continue;
            }
            const bool as_the_others = how == mixture::usual || (how == mixture::one_outlier && i != outlier);
            const row_kind kind = how == mixture::one_kind ? one
                                  : as_the_others          ? any_of(random, usual_row_kinds)
                                                           : any_of(random, all_row_kinds);
            make_row(random, kind, weights, row);
        }
    }
};

// ---- The comparison ----

struct found {
    std::vector<code_t> codes;
    std::vector<float> scores;
    explicit found(std::size_t rows) : codes(rows, 0xdead), scores(rows, -99.0F) {}
};

std::string describe(const found& result, std::size_t i) {
    std::string text(64, '\0');
    text.resize(static_cast<std::size_t>(
        std::snprintf(text.data(), text.size(), "%u (%.9g)", unsigned{result.codes[i]}, double{result.scores[i]})));
    return text;
}

/// Searches a batch at every level, asking for the scores or not: a search may take another way without.
void check_batch(const batch& input, const packed_codebook& book, bool with_scores) {
    static const search define = definition();
    const matrix_view<const float>& x = input.view;
    found expected(x.rows);
    define(x.data, x.rows, x.stride, book, expected.codes.data(), expected.scores.data());
    for (const rvqkv::simd_level level : test::levels()) {
        // The generic level is slow, and no code of its own: some rows of each batch do.
        const bool slow = level == rvqkv::simd_level::generic;
        const std::size_t rows = slow ? std::min(x.rows, 1 + 20000 / (book.codewords * x.cols)) : x.rows;
        found got(rows);
        rvqkv::nearest_codeword(x.slice_rows(0, rows), book, got.codes,
                                with_scores ? std::span(got.scores) : std::span<float>(),
                                *rvqkv::kernels_for(level).value());
        for (std::size_t i = 0; i < rows; ++i) {
            const bool same_score = test::bits_of(got.scores[i]) == test::bits_of(expected.scores[i]);
            if (got.codes[i] != expected.codes[i] || (with_scores && !same_score)) {
                CAPTURE(rvqkv::name_of(level), rows, x.cols, x.stride, book.codewords, i, input.offset, with_scores);
                FAIL("found " << describe(got, i) << ", expected " << describe(expected, i));
            }
        }
    }
}

constexpr std::size_t all_codewords[] = {1, 15, 16, 17, 64, 255, 256, 257, 512, 1000, 1024, 2047, 2048, 2049, 4096};
constexpr std::size_t large_codewords[] = {512, 1000, 1024, 2047, 2048, 2049, 4096};
constexpr std::size_t large_dims[] = {16, 17, 20, 24, 31, 32, 32, 33, 48, 64, 80};

/// Mostly up to 33 channels, for the tails of every length.
std::size_t any_dim(test::random_source& random) {
    return random.integer(0, 3) != 0 ? random.integer(1, 33) : any_of(random, {64U, 96U, 128U, 257U});
}
std::size_t any_batch(test::random_source& random) {
    return random.integer(0, 3) != 0 ? random.integer(1, 33) : any_of(random, {60U, 64U, 100U});
}

}  // namespace

TEST_CASE("search: every level finds what the definition finds, on 10 million random and adversarial vectors",
          "[simd][exact][slow]") {
    CAPTURE(test::seed());
    // Two factors, so that 5 percent of the size are a hundredth of the vectors. Most machines with NEON that run this
    // are emulated, and ten times slower.
    const std::size_t wanted = test::rounds(5) * test::rounds(RVQKV_NEON != 0 ? 200000 : 2000000);
    std::size_t done = 0;
    for (std::size_t number = 0; done < wanted; ++number) {
        test::random_source random(1000 + number);
        // Half of the books are such that a search of several passes pays.
        const bool large = number % 2 == 0;
        const std::size_t codewords = large ? any_of(random, large_codewords) : any_of(random, all_codewords);
        const std::size_t dim = large ? any_of(random, large_dims) : any_dim(random);
        const book_kind kind = any_of(random, all_book_kinds);
        const rvqkv::distance metric = random.integer(0, 3) == 0 ? rvqkv::distance::cosine : rvqkv::distance::euclidean;
        CAPTURE(number, codewords, dim, static_cast<int>(kind), rvqkv::name_of(metric));
        const std::vector<float> weights = make_weights(random, kind, codewords, dim);
        const auto book =
            rvqkv::residual_codebook<>::create({1, codewords, dim}, std::span<const float>(weights), metric).value();
        for (int round = 0; round < 16; ++round) {
            CAPTURE(round);
            const batch input(random, weights, any_batch(random), dim);
            check_batch(input, book.packed(0), round % 2 == 0);
            done += input.view.rows;
        }
    }
    CHECK(done >= wanted);
}
