// SPDX-License-Identifier: MIT
/// @file
/// Pages built by hand, and attention over them as plainly as it can be said, in double: every token's key and value
/// reconstructed, turned, multiplied, one softmax.
#pragma once

#include "rvqkv/attend/attention_options.hpp"
#include "rvqkv/attend/layer_config.hpp"
#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "support/random.hpp"
#include "support/weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace test {

/// Turns a row by a number of positions, with the attention factor if asked.
inline void turn_row(const rvqkv::rope_config& config, std::vector<double>& row, std::int64_t position, bool factor) {
    const std::size_t dims = config.dims == 0 ? row.size() : config.dims;
    for (std::size_t i = 0; i < dims / 2; ++i) {
        const double frequency = config.frequencies.empty()
                                     ? std::pow(config.base, -2.0 * static_cast<double>(i) / static_cast<double>(dims))
                                     : config.frequencies[i];
        const double angle = static_cast<double>(position) * frequency * config.position_scale;
        const bool split = config.pairs == rvqkv::rope_pairs::half_split;
        double& a = row[split ? i : 2 * i];
        double& b = row[split ? i + dims / 2 : 2 * i + 1];
        const double size = factor ? config.attention_factor : 1.0;
        const double turned = size * (a * std::cos(angle) - b * std::sin(angle));
        b = size * (a * std::sin(angle) + b * std::cos(angle));
        a = turned;
    }
}

/// Random weights behind a random-looking codec.
[[nodiscard]] inline std::shared_ptr<const rvqkv::codec> random_codec(random_source& random,
                                                                      const rvqkv::codec_spec& spec) {
    const std::vector<float> weights = make_weights(random, spec.shape);
    return rvqkv::make_codec<float>(spec, weights).value();
}

/// A layer's pages and runs with what they stand for.
class layer_pages {
public:
    /// One token: its position, its key as attention should see it (turned), and its value, `[head][channel]`.
    struct token {
        std::int64_t position = 0;
        std::vector<std::vector<double>> keys;
        std::vector<std::vector<double>> values;
    };

    layer_pages(rvqkv::kv_layer_config config, std::uint64_t salt) : config_(std::move(config)), random_(salt) {}

    [[nodiscard]] const rvqkv::kv_layer_config& config() const { return config_; }
    [[nodiscard]] std::span<const rvqkv::page_run> runs() const { return runs_; }
    [[nodiscard]] const std::vector<token>& tokens() const { return tokens_; }
    [[nodiscard]] random_source& random() { return random_; }

    /// A page of codes (of so many depths of either side), of which tokens [first, first + count) are in the sequence.
    /// The others hold codes and scales as well, of no meaning.
    void add_coded(std::size_t page_tokens, std::size_t first, std::size_t count, std::int64_t position,
                   std::int64_t coded_position, std::size_t key_depths, std::size_t value_depths) {
        auto format = std::make_unique<rvqkv::page_format>();
        format->tokens = page_tokens;
        format->coded_keys = {*config_.keys.codec, config_.keys.heads, page_tokens, key_depths, 0};
        const std::size_t begin = (format->coded_keys.end() + 63) / 64 * 64;
        format->coded_values = {*config_.values.codec, config_.values.heads, page_tokens, value_depths, begin};
        format->bytes = format->coded_values.end();
        rvqkv::aligned_buffer<std::byte> page(format->bytes);
        const auto keys = fill(page.data(), format->coded_keys, config_.keys, page_tokens);
        const auto values = fill(page.data(), format->coded_values, config_.values, page_tokens);
        add(std::move(format), std::move(page), keys, values, first, count, position, coded_position);
    }

    /// A page of exact tokens; those outside of [first, first + count) are NaN.
    void add_exact(std::size_t page_tokens, std::size_t first, std::size_t count, rvqkv::dtype type,
                   std::int64_t position, std::int64_t coded_position) {
        auto format = std::make_unique<rvqkv::page_format>();
        format->is_exact = true;
        format->tokens = page_tokens;
        format->exact_keys = {config_.keys.heads, config_.keys.codec->head_dim(), page_tokens, type, 0};
        format->exact_values = {config_.values.heads, config_.values.codec->head_dim(), page_tokens, type,
                                (format->exact_keys.end() + 63) / 64 * 64};
        format->bytes = format->exact_values.end();
        rvqkv::aligned_buffer<std::byte> page(format->bytes);
        std::memset(page.data(), 0xff, page.bytes());
        const auto keys = fill(page.data(), format->exact_keys, page_tokens, first, count);
        const auto values = fill(page.data(), format->exact_values, page_tokens, first, count);
        add(std::move(format), std::move(page), keys, values, first, count, position, coded_position);
    }

    /// A weight as it is stored.
    static double weight(const rvqkv::codec& codec, std::size_t i) {
        const std::byte* const from = codec.weights().data() + i * size_of(codec.weight_type());
        if (codec.weight_type() == rvqkv::dtype::float32) {
            float number = 0;
            std::memcpy(&number, from, sizeof(number));
            return static_cast<double>(number);
        }
        std::uint16_t bits = 0;
        std::memcpy(&bits, from, sizeof(bits));
        return static_cast<double>(codec.weight_type() == rvqkv::dtype::float16
                                       ? rvqkv::to_float(rvqkv::float16{bits})
                                       : rvqkv::to_float(rvqkv::bfloat16{bits}));
    }

private:
    using rows = std::vector<std::vector<std::vector<double>>>;  // [token][head][channel], as stored

    rows fill(std::byte* page, const rvqkv::coded_layout& layout, const rvqkv::kv_side_config& side,
              std::size_t page_tokens) {
        const rvqkv::codec& codec = *side.codec;
        const rvqkv::codebook_shape shape = codec.shape();
        const std::size_t head_dim = codec.head_dim();
        rows out(page_tokens, std::vector<std::vector<double>>(side.heads, std::vector<double>(head_dim)));
        for (std::size_t head = 0; head < side.heads; ++head) {
            for (std::size_t group = 0; group < codec.groups(); ++group) {
                for (std::size_t depth = 0; depth < layout.depths(); ++depth) {
                    std::vector<rvqkv::code_t> codes(page_tokens);
                    for (std::size_t t = 0; t < page_tokens; ++t) {
                        codes[t] = static_cast<rvqkv::code_t>(random_.integer(0, shape.codewords - 1));
                        for (std::size_t i = 0; i < shape.dim; ++i) {
                            out[t][head][codec.channel_order()[group * shape.dim + i]] +=
                                weight(codec, (depth * shape.codewords + codes[t]) * shape.dim + i);
                        }
                    }
                    rvqkv::pack_codes(codes.data(), page_tokens, layout.bits(), page + layout.row(depth, head, group));
                }
            }
            for (std::size_t t = 0; t < page_tokens && layout.has_scales(); ++t) {
                const float scale = rvqkv::stored_scale(random_.uniform(0.5F, 1.5F), layout.scale_type());
                put(page + layout.scales(head) + t * size_of(layout.scale_type()), layout.scale_type(), scale);
                for (double& number : out[t][head]) {
                    number *= static_cast<double>(scale);
                }
            }
        }
        return out;
    }

    rows fill(std::byte* page, const rvqkv::exact_layout& layout, std::size_t page_tokens, std::size_t first,
              std::size_t count) {
        rows out(page_tokens, std::vector<std::vector<double>>(layout.heads(), std::vector<double>(layout.head_dim())));
        for (std::size_t head = 0; head < layout.heads(); ++head) {
            for (std::size_t t = first; t < first + count; ++t) {
                for (std::size_t i = 0; i < layout.head_dim(); ++i) {
                    out[t][head][i] = put(page + layout.row(head, t) + 2 * i, layout.type(), random_.gaussian());
                }
            }
        }
        return out;
    }

    static double put(std::byte* to, rvqkv::dtype type, float number) {
        if (type == rvqkv::dtype::float32) {
            std::memcpy(to, &number, sizeof(number));
            return static_cast<double>(number);
        }
        if (type == rvqkv::dtype::float16) {
            const rvqkv::float16 half = rvqkv::to_float16(number);
            std::memcpy(to, &half, sizeof(half));
            return static_cast<double>(rvqkv::to_float(half));
        }
        const rvqkv::bfloat16 half = rvqkv::to_bfloat16(number);
        std::memcpy(to, &half, sizeof(half));
        return static_cast<double>(rvqkv::to_float(half));
    }

    /// From the state in which a key is stored to what the query meets.
    [[nodiscard]] std::vector<double> as_met(std::vector<double> key, std::size_t head, bool is_exact,
                                             std::int64_t position, std::int64_t coded_position) const {
        std::vector<double> mean(key.size());
        if (!is_exact && !config_.key_mean.empty()) {
            for (std::size_t i = 0; i < key.size(); ++i) {
                mean[i] = static_cast<double>(config_.key_mean[head * key.size() + i]);
            }
        }
        const bool turns = config_.coding != rvqkv::key_coding::as_given;
        if (config_.coding == rvqkv::key_coding::before_rope) {
            turn_row(config_.rope, key, position, true);
        } else if (turns) {
            turn_row(config_.rope, key, position - coded_position, false);
        }
        if (turns) {
            turn_row(config_.rope, mean, position, true);
        }
        for (std::size_t i = 0; i < key.size(); ++i) {
            key[i] += mean[i];
        }
        return key;
    }

    void add(std::unique_ptr<rvqkv::page_format> format, rvqkv::aligned_buffer<std::byte> page, const rows& keys,
             const rows& values, std::size_t first, std::size_t count, std::int64_t position,
             std::int64_t coded_position) {
        runs_.push_back({page.data(), format.get(), first, count, position, coded_position});
        for (std::size_t i = 0; i < count; ++i) {
            token made;
            const std::int64_t further = static_cast<std::int64_t>(i);
            made.position = position + further;
            for (std::size_t head = 0; head < keys[first + i].size(); ++head) {
                made.keys.push_back(as_met(keys[first + i][head], head, format->is_exact, position + further,
                                           coded_position + further));
            }
            made.values = values[first + i];
            tokens_.push_back(std::move(made));
        }
        pages_.push_back(std::move(page));
        formats_.push_back(std::move(format));
    }

    rvqkv::kv_layer_config config_;
    random_source random_;
    std::vector<std::unique_ptr<rvqkv::page_format>> formats_;
    std::vector<rvqkv::aligned_buffer<std::byte>> pages_;
    std::vector<rvqkv::page_run> runs_;
    std::vector<token> tokens_;
};

/// What attention should give, and how far off float32 may be.
struct attention_answer {
    std::vector<double> out;             ///< [query token][query head][channel]
    std::vector<double> log_sum_exp;     ///< [query token][query head]
    double tolerance = 0.0;              ///< Of `out`, where codes are reconstructed.
    double score_tolerance = 0.0;        ///< Of `log_sum_exp`, likewise.
    double table_tolerance = 0.0;        ///< Of `out`, where tables may be read.
    double table_score_tolerance = 0.0;  ///< Of `log_sum_exp`, likewise.
};

/// By how much a channel may be off that is reconstructed from a large codebook rounded to whole numbers, at a scale of
/// 1.5, and the sum of each depth's largest weight. Where codewords are rounded to 8 bits as well, this is as much as
/// they may lose in the mean (1/256 of root mean squares), four times over.
struct codec_rounding {
    double channel = 0.0;
    double reach = 0.0;
};
[[nodiscard]] inline codec_rounding rounding_of(const rvqkv::codec& codec) {
    codec_rounding rounding;
    if (codec.shape().codewords <= 256) {
        return rounding;
    }
    const std::size_t depth_size = codec.shape().codewords * codec.shape().dim;
    for (std::size_t depth = 0; depth < codec.depths(); ++depth) {
        double most = 0.0;
        for (std::size_t i = 0; i < depth_size; ++i) {
            most = std::max(most, std::fabs(layer_pages::weight(codec, depth * depth_size + i)));
        }
        rounding.reach += most;
    }
    rounding.channel = 1.5 * 0.5 * static_cast<double>(codec.depths()) * rounding.reach / 22000.0;
    if (codec.shape().dim % 32 == 0) {
        double squares = 0.0;
        for (std::size_t i = 0; i < codec.depths() * depth_size; ++i) {
            squares += std::pow(layer_pages::weight(codec, i), 2.0);
        }
        rounding.channel += 1.5 * 4.0 / 256.0 * std::sqrt(squares / static_cast<double>(depth_size));
    }
    return rounding;
}

/// By how much small tables may be off in a score of the query (scaled; as it meets the stored keys) at a token's scale
/// of 1.5: entries are rounded to 1/1848 of the widest table, each on its own, so that six standard deviations do.
[[nodiscard]] inline double small_table_error(const rvqkv::codec& codec, std::span<const double> query) {
    const rvqkv::codebook_shape shape = codec.shape();
    if (shape.codewords > 256) {
        return 0.0;
    }
    double widest = 0.0;
    for (std::size_t group = 0; group < codec.groups(); ++group) {
        for (std::size_t depth = 0; depth < shape.depths; ++depth) {
            double low = std::numeric_limits<double>::infinity();
            double high = -low;
            for (std::size_t code = 0; code < shape.codewords; ++code) {
                double product = 0.0;
                for (std::size_t i = 0; i < shape.dim; ++i) {
                    product += query[codec.channel_order()[group * shape.dim + i]] *
                               layer_pages::weight(codec, (depth * shape.codewords + code) * shape.dim + i);
                }
                low = std::min(low, product);
                high = std::max(high, product);
            }
            widest = std::max(widest, high - low);
        }
    }
    return 6.0 * 1.5 * widest / 1848.0 * std::sqrt(static_cast<double>(codec.groups() * shape.depths) / 12.0);
}

/// `queries` `[query token][query head][channel]`.
[[nodiscard]] inline attention_answer oracle_attention(const layer_pages& pages, const std::vector<float>& queries,
                                                       std::size_t query_tokens, std::int64_t first_position,
                                                       const rvqkv::attention_options& options) {
    const rvqkv::kv_layer_config& config = pages.config();
    const std::size_t key_dim = config.keys.codec->head_dim();
    const std::size_t value_dim = config.values.codec->head_dim();
    const std::size_t query_heads = config.query_heads == 0 ? config.keys.heads : config.query_heads;
    const std::size_t group = query_heads / config.keys.heads;
    const double scale =
        options.scale != 0.0F ? static_cast<double>(options.scale) : 1.0 / std::sqrt(static_cast<double>(key_dim));
    attention_answer answer;
    double largest_product = 0.0;
    double largest_query = 0.0;  // sum of magnitudes
    double largest_value = 0.0;
    double table_error = 0.0;
    for (std::size_t t = 0; t < query_tokens; ++t) {
        const std::int64_t position = first_position + static_cast<std::int64_t>(t);
        for (std::size_t head = 0; head < query_heads; ++head) {
            const float* const given = queries.data() + (t * query_heads + head) * key_dim;
            std::vector<double> query(given, given + key_dim);
            if (config.coding != rvqkv::key_coding::as_given && !config.turned_input) {
                turn_row(config.rope, query, position, true);
            }
            double magnitude = 0.0;
            for (const double number : query) {
                magnitude += std::fabs(number) * scale;
            }
            largest_query = std::max(largest_query, magnitude);
            for (const rvqkv::page_run& run : pages.runs()) {
                std::vector<double> met = query;
                turn_row(config.rope, met,
                         config.coding == rvqkv::key_coding::as_given ? 0 : run.coded_position - run.position, false);
                for (double& number : met) {
                    number *= scale;
                }
                table_error = std::max(table_error, small_table_error(*config.keys.codec, met));
            }
            std::vector<double> scores;
            std::vector<const layer_pages::token*> seen;
            for (const layer_pages::token& token : pages.tokens()) {
                const bool later = options.causal && token.position > position;
                const bool outside = config.sliding_window != 0 &&
                                     token.position <= position - static_cast<std::int64_t>(config.sliding_window);
                if (later || outside) {
                    continue;
                }
                double score = 0.0;
                double product = 0.0;
                for (std::size_t i = 0; i < key_dim; ++i) {
                    score += query[i] * token.keys[head / group][i];
                    product += std::fabs(query[i] * token.keys[head / group][i]);
                }
                score *= scale;
                if (options.soft_cap > 0.0F) {
                    score = static_cast<double>(options.soft_cap) *
                            std::tanh(score / static_cast<double>(options.soft_cap));
                }
                if (!options.alibi_slopes.empty()) {
                    score += static_cast<double>(options.alibi_slopes[head]) *
                             static_cast<double>(token.position - position);
                }
                largest_product = std::max(largest_product, product * scale);
                scores.push_back(score);
                seen.push_back(&token);
            }
            const bool has_sink = !options.sink_logits.empty();
            double top =
                has_sink ? static_cast<double>(options.sink_logits[head]) : -std::numeric_limits<double>::infinity();
            for (const double score : scores) {
                top = std::max(top, score);
            }
            double sum = has_sink ? std::exp(static_cast<double>(options.sink_logits[head]) - top) : 0.0;
            std::vector<double> out(value_dim);
            for (std::size_t i = 0; i < scores.size(); ++i) {
                const double weight = std::exp(scores[i] - top);
                sum += weight;
                for (std::size_t j = 0; j < value_dim; ++j) {
                    const double value = seen[i]->values[head / group][j];
                    largest_value = std::max(largest_value, std::fabs(value));
                    out[j] += weight * value;
                }
            }
            for (double& number : out) {
                answer.out.push_back(sum == 0.0 ? 0.0 : number / sum);
            }
            answer.log_sum_exp.push_back(top + std::log(sum));
        }
    }
    // A score is a sum of products, of which each carries the rounding of a reconstruction, a turn and a sum: some 32
    // roundings of the sum of magnitudes. The result moves by twice a score's error at most.
    answer.score_tolerance = 32.0 * 0x1p-24 * (1.0 + largest_product) +
                             (options.soft_cap > 0.0F ? static_cast<double>(options.soft_cap) * 0x1p-22 : 0.0);
    answer.tolerance = 2.0 * answer.score_tolerance * std::max(1.0, largest_value);
    // Small tables: a weight is rounded to 1/255 of the largest of 64, a value to about 1 % of its deviation. Large
    // codebooks: channel by channel, or as tables of up to two times a query's magnitude for each depth, added up with
    // a step of 1/65000 of all ranges.
    const codec_rounding keys = rounding_of(*config.keys.codec);
    const double places = static_cast<double>(config.keys.codec->depths() * config.keys.codec->groups());
    answer.table_score_tolerance =
        answer.score_tolerance + table_error +
        largest_query * std::max(std::sqrt(2.0) * keys.channel, 1.5 * places * 0.5 * 2.0 * keys.reach / 65000.0);
    answer.table_tolerance =
        (config.values.codec->shape().codewords <= 256 ? 0.04 * largest_value
                                                       : rounding_of(*config.values.codec).channel) +
        2.0 * answer.table_score_tolerance * std::max(1.0, largest_value);
    return answer;
}

}  // namespace test
