// SPDX-License-Identifier: MIT
#include "methods.hpp"

#include "../cli/support.hpp"
#include "codecs.hpp"

#include <algorithm>
#include <regex>

namespace llama_example {
namespace {

/// Tokens that the library's cache keeps exactly at the start.
constexpr std::size_t sink_tokens = 4;

/// The same unquantized model in llama.cpp: as a row of the plain engine, it tells how well they agree.
constexpr const char* same_model = "llama.cpp-f32";

std::size_t depths_of(const rvqkv::codec_set& set) {
    return set.layers.begin()->second.key->depths();
}

double mean_bits(const rvqkv::model_codecs& codecs, const model_attention& attention) {
    std::size_t bits = 0;
    std::size_t channels = 0;
    for (const auto& [layer, both] : codecs) {
        bits += both.key->bits_per_row() * attention[layer].keys.heads +
                both.value->bits_per_row() * attention[layer].values.heads;
        channels += attention[layer].keys.heads * attention[layer].keys.channels +
                    attention[layer].values.heads * attention[layer].values.channels;
    }
    return static_cast<double>(bits) / static_cast<double>(channels);
}

/// Depths that the paper and its followers tell of, for a number of codewords.
std::vector<std::size_t> usual_depths(std::size_t codewords, std::size_t most) {
    std::vector<std::size_t> all{most};
    if (codewords == 2048 && most == 8) {
        all = {8, 6, 4};
    } else if (codewords == 256 && most == 10) {
        all = {10, 7, 3};
    }
    return all;
}

}  // namespace

double method::bits(std::size_t tokens) const {
    // A page waits for its last token: half of one is exact on average.
    const double most = static_cast<double>(exact.sinks + exact.recent) + static_cast<double>(exact.page - 1) / 2.0;
    const double exact_share = std::min(1.0, most / static_cast<double>(tokens));
    return bits_of_codes + exact_share * (16.0 - bits_of_codes);
}

std::vector<std::string> usual_methods(const codec_sets& sets, engine_kind engine) {
    std::vector<std::string> names;
    const bool is_plain = engine == engine_kind::plain;
    if (is_plain) {
        names.emplace_back(same_model);
    }
    for (const bool is_paper : {true, false}) {
        for (auto set = sets.rbegin(); set != sets.rend(); ++set) {
            for (const std::size_t depths : usual_depths(set->first, depths_of(set->second))) {
                const std::string shape = std::to_string(set->first) + "x" + std::to_string(depths);
                names.push_back(is_paper ? "paper-" + shape
                                         : "rvqkv-" + shape + (is_plain ? "-recent64-paged" : "-recent64"));
            }
        }
    }
    if (!is_plain) {
        for (const char* name : {"f16", "q8_0", "q5_1", "q4_0", "q4_0-unrotated"}) {
            names.push_back(std::string("llama.cpp-") + name);
        }
    }
    return names;
}

method parse_method(const std::string& name, const codec_sets& sets, engine_kind engine,
                    const model_attention& attention) {
    static const std::regex ours("(paper|rvqkv)-([0-9]{1,6})x([0-9]{1,6})(-recent([0-9]{1,6})(-paged)?)?");
    static const std::regex theirs("llama\\.cpp-([a-z0-9_]+?)(-unrotated)?");
    std::smatch match;
    method made;
    made.name = name;
    if (std::regex_match(name, match, ours) && (match[1] == "paper" ? !match[4].matched : true)) {
        const std::size_t codewords = std::stoul(match[2]);
        const std::size_t depths = std::stoul(match[3]);
        const auto set = sets.find(codewords);
        if (set == sets.end()) {
            throw cli::usage_error("method " + name + ": no --codecs of " + std::to_string(codewords) +
                                   " codewords were given");
        }
        if (const std::size_t most = depths_of(set->second); depths == 0 || depths > most) {
            throw cli::usage_error("method " + name + ": the codecs have " + std::to_string(most) + " depths");
        }
        if (match[1] == "rvqkv") {
            made.exact.sinks = sink_tokens;
            made.exact.recent = match[5].matched ? std::stoul(match[5]) : 0;
            made.exact.page = match[6].matched ? cache_page_tokens : 1;
            if (engine == engine_kind::plain && !match[6].matched) {
                throw cli::usage_error("method " + name +
                                       ": the plain engine's tokens are in the cache, which codes whole pages; want "
                                       "such as rvqkv-2048x8-recent64-paged");
            }
        }
        made.codecs = first_depths(set->second.layers, depths);
        made.bits_of_codes = mean_bits(made.codecs, attention);
        return made;
    }
    if (std::regex_match(name, match, theirs)) {
        for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1,
                                     GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL}) {
            if (match[1] == ggml_type_name(type)) {
                if (engine == engine_kind::plain && name != same_model) {
                    throw cli::usage_error("method " + name + ": the plain engine has none of llama.cpp's caches but " +
                                           same_model + "; evaluate it without --engine plain");
                }
                made.cache = cache_format{type, type != GGML_TYPE_F32, !match[2].matched};
                made.bits_of_codes =
                    8.0 * static_cast<double>(ggml_type_size(type)) / static_cast<double>(ggml_blck_size(type));
                return made;
            }
        }
    }
    throw cli::usage_error("method '" + name +
                           "' is not known; want paper-2048x8 (codewords x depths), rvqkv-2048x8-recent64 or "
                           "-recent64-paged, or llama.cpp-f16, -q8_0, -q5_1, -q5_0, -q4_1, -q4_0, each also with "
                           "-unrotated");
}

}  // namespace llama_example
