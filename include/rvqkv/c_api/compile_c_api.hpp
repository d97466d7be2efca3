// SPDX-License-Identifier: MIT
/// @file
/// The functions of `rvqkv/rvqkv.h`. Exactly one file of a program that uses them must include this header.
#pragma once

#include "rvqkv/attend/softmax.hpp"
#include "rvqkv/c_api/c_handles.hpp"
#include "rvqkv/cache/append_job.hpp"
#include "rvqkv/cache/cache_bytes.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/files/codec_file.hpp"
#include "rvqkv/files/sequence_file.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/rvqkv.h"
#include "rvqkv/version.hpp"

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail::c_api {

// Functions of C are the same in every namespace; in this one they see what they need.
// NOLINTBEGIN(misc-definitions-in-headers): one file includes it
extern "C" {

const char* rvqkv_version() {
    return RVQKV_VERSION_STRING;
}

const char* rvqkv_status_name(rvqkv_status status) {
    switch (status) {
        case RVQKV_OK: return "ok";
        case RVQKV_INVALID_ARGUMENT: return "invalid_argument";
        case RVQKV_UNSUPPORTED: return "unsupported";
        case RVQKV_OUT_OF_MEMORY: return "out_of_memory";
        case RVQKV_IO: return "io";
        case RVQKV_DAMAGED_FILE: return "damaged_file";
        default: return "unknown";
    }
}

rvqkv_tensor rvqkv_tensor_of(const void* data, rvqkv_dtype type, size_t tokens, size_t heads, size_t channels) {
    const tensor_strides strides = tensor_view(static_cast<const float*>(data), {tokens, heads, channels}).strides();
    return {const_cast<void*>(data), type, tokens, heads, channels, strides.token, strides.head, strides.channel};
}

// ---- Codecs ----

void rvqkv_codec_spec_init(rvqkv_codec_spec* spec, size_t struct_size) {
    set_defaults(spec, struct_size, describe(codec_spec()));
}

rvqkv_status rvqkv_codec_create(const rvqkv_codec_spec* spec, const void* weights, rvqkv_dtype weights_type,
                                size_t weight_count, rvqkv_codec** codec, rvqkv_error* error) {
    return make(error, "codec", codec, {{"spec", spec}, {"weights", weights}}, [&]() -> result<rvqkv_codec> {
        const auto wanted = spec_of(*spec);
        if (!wanted) {
            return wanted.error();
        }
        dtype type = dtype::float32;
        if (status bad = set_type(type, "weights_type", weights_type); !bad) {
            return bad.error();
        }
        const auto made_of = [&](const auto* numbers) -> result<rvqkv_codec> {
            auto made = make_codec(wanted.value(), std::span(numbers, weight_count));
            if (!made) {
                return made.error();
            }
            return rvqkv_codec{std::move(made).value()};
        };
        switch (type) {
            case dtype::float16: return made_of(static_cast<const float16*>(weights));
            case dtype::bfloat16: return made_of(static_cast<const bfloat16*>(weights));
            case dtype::float32: break;
        }
        return made_of(static_cast<const float*>(weights));
    });
}
void rvqkv_codec_free(rvqkv_codec* codec) {
    delete codec;
}

rvqkv_status rvqkv_codec_describe(const rvqkv_codec* codec, rvqkv_codec_spec* spec, rvqkv_error* error) {
    return call(error, {{"codec", codec}, {"spec", spec}}, [&]() -> status {
        if (status bad = check_size("spec", *spec); !bad) {
            return bad;
        }
        *spec = describe(*codec->codec->spec());
        return {};
    });
}

rvqkv_status rvqkv_codecs_load(const char* path, rvqkv_codecs** codecs, rvqkv_error* error) {
    return make(error, "codecs", codecs, {{"path", path}},
                [&] { return codecs_of(rvqkv::load_codecs(std::filesystem::path(path))); });
}
rvqkv_status rvqkv_codecs_load_memory(const void* bytes, size_t size, rvqkv_codecs** codecs, rvqkv_error* error) {
    return make(error, "codecs", codecs, {{"bytes", bytes}},
                [&] { return codecs_of(rvqkv::load_codecs(std::span(static_cast<const std::byte*>(bytes), size))); });
}
void rvqkv_codecs_free(rvqkv_codecs* codecs) {
    delete codecs;
}

size_t rvqkv_codecs_count(const rvqkv_codecs* codecs) {
    return codecs != nullptr ? codecs->layers.size() : 0;
}
size_t rvqkv_codecs_layer(const rvqkv_codecs* codecs, size_t index) {
    return index < rvqkv_codecs_count(codecs) ? codecs->layers[index].number : RVQKV_NO_LAYER;
}
const rvqkv_codec* rvqkv_codecs_get(const rvqkv_codecs* codecs, size_t layer, rvqkv_side side) {
    for (size_t i = 0; i < rvqkv_codecs_count(codecs); ++i) {
        const rvqkv_codecs::layer& each = codecs->layers[i];
        const rvqkv_codec& found = side == RVQKV_KEYS ? each.key : each.value;
        if (each.number == layer && (side == RVQKV_KEYS || side == RVQKV_VALUES) && found.codec != nullptr) {
            return &found;
        }
    }
    return nullptr;
}
const char* rvqkv_codecs_metadata(const rvqkv_codecs* codecs, const char* key) {
    if (codecs == nullptr || key == nullptr) {
        return nullptr;
    }
    const auto found = codecs->metadata.find(std::string_view(key));
    return found != codecs->metadata.end() ? found->second.c_str() : nullptr;
}

// ---- Caches ----

void rvqkv_layer_config_init(rvqkv_layer_config* layer, size_t struct_size) {
    const kv_layer_config from;
    rvqkv_layer_config to{};
    to.coding = static_cast<rvqkv_key_coding>(from.coding);
    to.turned_input = from.turned_input;
    to.rope.base = from.rope.base;
    to.rope.position_scale = from.rope.position_scale;
    to.rope.attention_factor = from.rope.attention_factor;
    to.block_tokens = from.block_tokens;
    to.shares_layer = from.shares_layer;
    set_defaults(layer, struct_size, to);
}
void rvqkv_cache_config_init(rvqkv_cache_config* config, size_t struct_size) {
    const kv_cache_config from;
    rvqkv_cache_config to{};
    to.page_tokens = from.page_tokens;
    to.sink_tokens = from.sink_tokens;
    to.recent_tokens = from.recent_tokens;
    to.exact_type = static_cast<rvqkv_dtype>(from.exact_type);
    to.page_budget = from.page_budget;
    set_defaults(config, struct_size, to);
}

rvqkv_status rvqkv_cache_create(const rvqkv_cache_config* config, rvqkv_cache** cache, rvqkv_error* error) {
    return make(error, "cache", cache, {{"config", config}}, [&]() -> result<rvqkv_cache> {
        auto wanted = config_of(*config);
        if (!wanted) {
            return wanted.error();
        }
        const rvqkv_page_source& given = config->source;
        if ((given.allocate == nullptr) != (given.release == nullptr)) {
            return wrong("source has one function only, must have allocate and release, or none");
        }
        std::shared_ptr<page_source> source;
        if (given.allocate != nullptr) {
            source = std::make_shared<page_functions>(given);
            wanted.value().source = source.get();
        }
        auto made = kv_cache::create(std::move(wanted).value());
        if (!made) {
            return made.error();
        }
        return rvqkv_cache{std::move(source), std::move(made).value()};
    });
}
void rvqkv_cache_free(rvqkv_cache* cache) {
    delete cache;
}

size_t rvqkv_cache_layers(const rvqkv_cache* cache) {
    return cache != nullptr ? cache->cache.layers() : 0;
}
rvqkv_status rvqkv_cache_reserve(rvqkv_cache* cache, size_t tokens, rvqkv_error* error) {
    return call(error, {{"cache", cache}}, [&] { return cache->cache.reserve(tokens); });
}
void rvqkv_cache_release_free_pages(rvqkv_cache* cache) {
    if (cache != nullptr) {
        cache->cache.release_free_pages();
    }
}
rvqkv_cache_bytes rvqkv_cache_memory(const rvqkv_cache* cache) {
    const kv_cache_bytes bytes = cache != nullptr ? cache->cache.bytes() : kv_cache_bytes();
    return {bytes.pages, bytes.free_pages, bytes.layers, bytes.total(), bytes.codecs};
}

// ---- Workspaces ----

void rvqkv_workspace_config_init(rvqkv_workspace_config* config, size_t struct_size) {
    rvqkv_workspace_config to{};
    to.query_tokens = 1;
    to.threads = 1;
    set_defaults(config, struct_size, to);
}

rvqkv_status rvqkv_workspace_create(const rvqkv_cache* cache, const rvqkv_workspace_config* config,
                                    rvqkv_workspace** workspace, rvqkv_error* error) {
    return make(error, "workspace", workspace, {{"cache", cache}}, [&]() -> result<rvqkv_workspace> {
        rvqkv_workspace_config given;
        rvqkv_workspace_config_init(&given, sizeof given);
        if (config != nullptr) {
            if (status bad = check_size("config", *config); !bad) {
                return bad.error();
            }
            given = *config;
        }
        auto workers = workers_of(given);
        if (!workers) {
            return workers.error();
        }
        auto rows = cache->cache.make_workspace(*workers.value());
        if (!rows) {
            return rows.error();
        }
        auto attention = cache->cache.make_attention_workspace(given.query_tokens, *workers.value());
        if (!attention) {
            return attention.error();
        }
        return rvqkv_workspace{std::move(workers).value(), std::move(rows).value(), std::move(attention).value()};
    });
}
void rvqkv_workspace_free(rvqkv_workspace* workspace) {
    delete workspace;
}

// ---- Sequences ----

rvqkv_status rvqkv_sequence_create(const rvqkv_cache* cache, rvqkv_sequence** sequence, rvqkv_error* error) {
    return make(error, "sequence", sequence, {{"cache", cache}},
                [&] { return sequence_of(cache->source, cache->cache.new_sequence()); });
}
rvqkv_status rvqkv_sequence_fork(const rvqkv_sequence* sequence, rvqkv_sequence** fork, rvqkv_error* error) {
    return make(error, "fork", fork, {{"sequence", sequence}},
                [&] { return sequence_of(sequence->source, sequence->sequence.fork()); });
}
void rvqkv_sequence_free(rvqkv_sequence* sequence) {
    delete sequence;
}

size_t rvqkv_sequence_tokens(const rvqkv_sequence* sequence, size_t layer) {
    return has_layer(sequence, layer) ? sequence->sequence.tokens(layer) : 0;
}
size_t rvqkv_sequence_first_token(const rvqkv_sequence* sequence, size_t layer) {
    return has_layer(sequence, layer) ? sequence->sequence.first_token(layer) : 0;
}
int64_t rvqkv_sequence_next_position(const rvqkv_sequence* sequence, size_t layer) {
    return has_layer(sequence, layer) ? sequence->sequence.next_position(layer) : 0;
}

rvqkv_status rvqkv_sequence_append(rvqkv_sequence* sequence, size_t layer, const rvqkv_tensor* keys,
                                   const rvqkv_tensor* values, rvqkv_workspace* workspace, rvqkv_append_report* report,
                                   rvqkv_error* error) {
    const arguments needed = {{"sequence", sequence}, {"keys", keys}, {"values", values}, {"workspace", workspace}};
    return call(error, needed, [&]() -> status {
        const auto key_view = view_of("keys", *keys);
        const auto value_view = view_of("values", *values);
        if (!key_view || !value_view) {
            return key_view ? value_view.error() : key_view.error();
        }
        kv_encode_report found;
        if (report != nullptr) {
            found = {from_c(report->keys), from_c(report->values)};
        }
        status done = sequence->sequence.append(layer, key_view.value(), value_view.value(), workspace->rows, &found,
                                                *workspace->workers);
        if (done && report != nullptr) {
            *report = {to_c(found.keys), to_c(found.values)};
        }
        return done;
    });
}

rvqkv_status rvqkv_sequence_reconstruct(const rvqkv_sequence* sequence, size_t layer, rvqkv_side side,
                                        size_t first_token, const rvqkv_tensor* out, size_t depths,
                                        rvqkv_workspace* workspace, rvqkv_error* error) {
    return call(error, {{"sequence", sequence}, {"out", out}, {"workspace", workspace}}, [&]() -> status {
        if (side != RVQKV_KEYS && side != RVQKV_VALUES) {
            return wrong("side is " + std::to_string(side) + ", must be RVQKV_KEYS or RVQKV_VALUES");
        }
        const auto view = view_of("out", *out);
        if (!view) {
            return view.error();
        }
        const kv_sequence& of = sequence->sequence;
        return side == RVQKV_KEYS ? of.reconstruct_keys(layer, first_token, view.value(), workspace->rows, depths)
                                  : of.reconstruct_values(layer, first_token, view.value(), workspace->rows, depths);
    });
}

// ---- Attention ----

void rvqkv_attention_options_init(rvqkv_attention_options* options, size_t struct_size) {
    const attention_options from;
    rvqkv_attention_options to{};
    to.scale = from.scale;
    to.causal = from.causal;
    to.soft_cap = from.soft_cap;
    to.reading = static_cast<rvqkv_code_reading>(from.reading);
    set_defaults(options, struct_size, to);
}

rvqkv_status rvqkv_sequence_attend(const rvqkv_sequence* sequence, size_t layer, const rvqkv_tensor* queries,
                                   const rvqkv_tensor* out, rvqkv_workspace* workspace,
                                   const rvqkv_attention_options* options, rvqkv_error* error) {
    const arguments needed = {{"sequence", sequence}, {"queries", queries}, {"out", out}, {"workspace", workspace}};
    return call(error, needed, [&] {
        return attend(*queries, *out, options, [&](const auto& from, const auto& to, const auto& with) {
            return sequence->sequence.attend(layer, from, to, workspace->attention, with, *workspace->workers);
        });
    });
}
rvqkv_status rvqkv_sequence_attend_partial(const rvqkv_sequence* sequence, size_t layer, const rvqkv_tensor* queries,
                                           const rvqkv_tensor* out, float* log_sum_exp, size_t count,
                                           rvqkv_workspace* workspace, const rvqkv_attention_options* options,
                                           rvqkv_error* error) {
    const arguments needed = {{"sequence", sequence},
                              {"queries", queries},
                              {"out", out},
                              {"log_sum_exp", log_sum_exp},
                              {"workspace", workspace}};
    return call(error, needed, [&] {
        return attend(*queries, *out, options, [&](const auto& from, const auto& to, const auto& with) {
            return sequence->sequence.attend_partial(layer, from, to, {log_sum_exp, count}, workspace->attention, with,
                                                     *workspace->workers);
        });
    });
}
rvqkv_status rvqkv_merge_partial(const rvqkv_tensor* out, float* log_sum_exp, const rvqkv_tensor* other,
                                 const float* other_log_sum_exp, size_t count, rvqkv_error* error) {
    const arguments needed = {
        {"out", out}, {"log_sum_exp", log_sum_exp}, {"other", other}, {"other_log_sum_exp", other_log_sum_exp}};
    return call(error, needed, [&]() -> status {
        const auto to = view_of("out", *out);
        const auto from = view_of("other", *other);
        if (!to || !from) {
            return to ? from.error() : to.error();
        }
        return merge_partial(to.value(), {log_sum_exp, count}, from.value(), {other_log_sum_exp, count});
    });
}

// ---- What becomes of tokens ----

rvqkv_status rvqkv_sequence_truncate(rvqkv_sequence* sequence, size_t tokens, rvqkv_error* error) {
    return call(error, {{"sequence", sequence}}, [&] { return sequence->sequence.truncate(tokens); });
}
rvqkv_status rvqkv_sequence_truncate_layer(rvqkv_sequence* sequence, size_t layer, size_t tokens, rvqkv_error* error) {
    return call(error, {{"sequence", sequence}}, [&] { return sequence->sequence.truncate(layer, tokens); });
}
void rvqkv_sequence_clear(rvqkv_sequence* sequence) {
    if (sequence != nullptr) {
        sequence->sequence.clear();
    }
}
rvqkv_status rvqkv_sequence_evict(rvqkv_sequence* sequence, size_t first, size_t last, bool shift, rvqkv_error* error) {
    return call(error, {{"sequence", sequence}}, [&] { return sequence->sequence.evict(first, last, shift); });
}
rvqkv_status rvqkv_sequence_demote(rvqkv_sequence* sequence, size_t tokens_before, size_t key_depths,
                                   size_t value_depths, rvqkv_error* error) {
    return call(error, {{"sequence", sequence}},
                [&] { return sequence->sequence.demote(tokens_before, key_depths, value_depths); });
}
rvqkv_status rvqkv_sequence_demote_to(rvqkv_sequence* sequence, size_t most_bytes, size_t key_depths,
                                      size_t value_depths, size_t* tokens_before, rvqkv_error* error) {
    return call(error, {{"sequence", sequence}}, [&]() -> status {
        const auto before = sequence->sequence.demote_to(most_bytes, key_depths, value_depths);
        if (!before) {
            return before.error();
        }
        if (tokens_before != nullptr) {
            *tokens_before = before.value();
        }
        return {};
    });
}
rvqkv_status rvqkv_sequence_reserve(rvqkv_sequence* sequence, size_t tokens, rvqkv_error* error) {
    return call(error, {{"sequence", sequence}}, [&] { return sequence->sequence.reserve(tokens); });
}
void rvqkv_sequence_release_spare_pages(rvqkv_sequence* sequence) {
    if (sequence != nullptr) {
        sequence->sequence.release_spare_pages();
    }
}
rvqkv_sequence_bytes rvqkv_sequence_memory(const rvqkv_sequence* sequence) {
    const kv_sequence_bytes bytes = sequence != nullptr ? sequence->sequence.bytes() : kv_sequence_bytes();
    return {bytes.codes, bytes.scales, bytes.exact, bytes.overhead, bytes.page_tables, bytes.spare, bytes.total()};
}

// ---- Files ----

rvqkv_status rvqkv_sequence_save(const rvqkv_sequence* sequence, const char* path, bool incremental,
                                 rvqkv_error* error) {
    return call(error, {{"sequence", sequence}, {"path", path}},
                [&] { return save_sequence(sequence->sequence, path, {.incremental = incremental}); });
}
rvqkv_status rvqkv_sequence_load(const rvqkv_cache* cache, const char* path, rvqkv_recovery* recovery,
                                 rvqkv_sequence** sequence, rvqkv_error* error) {
    return make(error, "sequence", sequence, {{"cache", cache}, {"path", path}}, [&] {
        return load(*cache, recovery, [&](const load_sequence_options& options) {
            return load_sequence(cache->cache, std::filesystem::path(path), options);
        });
    });
}
rvqkv_status rvqkv_sequence_load_memory(const rvqkv_cache* cache, const void* bytes, size_t size,
                                        rvqkv_recovery* recovery, rvqkv_sequence** sequence, rvqkv_error* error) {
    return make(error, "sequence", sequence, {{"cache", cache}, {"bytes", bytes}}, [&] {
        return load(*cache, recovery, [&](const load_sequence_options& options) {
            return load_sequence(cache->cache, std::span(static_cast<const std::byte*>(bytes), size), options);
        });
    });
}

}  // extern "C"
// NOLINTEND(misc-definitions-in-headers)

}  // namespace detail::c_api
RVQKV_NAMESPACE_END
