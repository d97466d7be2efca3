// SPDX-License-Identifier: MIT
/// @file
/// What stands behind the handles of the C interface, and how its arguments become those of the C++ one.
#pragma once

#include "rvqkv/attend/attention_options.hpp"
#include "rvqkv/attend/layer_config.hpp"
#include "rvqkv/attend/rope.hpp"
#include "rvqkv/cache/cache_config.hpp"
#include "rvqkv/cache/kv_cache.hpp"
#include "rvqkv/cache/kv_sequence.hpp"
#include "rvqkv/cache/kv_workspace.hpp"
#include "rvqkv/cache/page_source.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/core/thread_pool.hpp"
#include "rvqkv/files/codec_file.hpp"
#include "rvqkv/files/safetensors_header.hpp"
#include "rvqkv/files/sequence_file.hpp"
#include "rvqkv/files/sequence_loader.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/quantize/grouping.hpp"
#include "rvqkv/quantize/scale.hpp"
#include "rvqkv/quantize/vector_quantizer.hpp"
#include "rvqkv/rvqkv.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

struct rvqkv_codec {
    std::shared_ptr<const rvqkv::codec> codec;
};

struct rvqkv_codecs {
    struct layer {
        std::size_t number;
        rvqkv_codec key;
        rvqkv_codec value;
    };
    std::vector<layer> layers;
    rvqkv::metadata_map metadata;
};

struct rvqkv_cache {
    std::shared_ptr<rvqkv::page_source> source;  // outlives the pages; null for the heap
    rvqkv::kv_cache cache;
};

struct rvqkv_sequence {
    std::shared_ptr<rvqkv::page_source> source;
    rvqkv::kv_sequence sequence;
};

struct rvqkv_workspace {
    std::unique_ptr<const rvqkv::executor> workers;
    rvqkv::kv_workspace rows;
    rvqkv::attention_workspace attention;
};

RVQKV_NAMESPACE_BEGIN
namespace detail::c_api {

// ---- Errors ----

[[nodiscard]] inline error wrong(std::string message) {
    return {error_code::invalid_argument, std::move(message)};
}

/// Copies as much of a text as there is room for.
inline void copy_text(std::string_view text, char* to, std::size_t room) noexcept {
    to[text.copy(to, room - 1)] = '\0';
}

inline rvqkv_status report(rvqkv_error* to, rvqkv_status status, std::string_view message) noexcept {
    if (to != nullptr) {
        to->status = status;
        copy_text(message, to->message, sizeof to->message);
    }
    return status;
}

[[nodiscard]] constexpr rvqkv_status status_of(error_code code) noexcept {
    switch (code) {
        case error_code::invalid_argument: return RVQKV_INVALID_ARGUMENT;
        case error_code::unsupported: return RVQKV_UNSUPPORTED;
        case error_code::out_of_memory: return RVQKV_OUT_OF_MEMORY;
        case error_code::io: return RVQKV_IO;
        case error_code::damaged_file: return RVQKV_DAMAGED_FILE;
    }
    return RVQKV_UNSUPPORTED;
}

/// A pointer that may not be null, with its name.
struct argument {
    const char* name;
    const void* pointer;
};
using arguments = std::initializer_list<argument>;

template <class Body>
rvqkv_status run(rvqkv_error* error, arguments needed, const Body& body) {
    for (const argument& each : needed) {
        if (each.pointer == nullptr) {
            return report(error, RVQKV_INVALID_ARGUMENT, std::string(each.name) + " is null");
        }
    }
    const status done = body();
    return done ? report(error, RVQKV_OK, {}) : report(error, status_of(done.error().code), done.error().message);
}

/// Every function that can fail: checks its pointers, does its work and says how that ended. The one place where
/// exceptions are caught: those of the standard library's containers.
template <class Body>
rvqkv_status call(rvqkv_error* error, arguments needed, const Body& body) noexcept {
#if RVQKV_EXCEPTIONS
    try {
        return run(error, needed, body);
    } catch (const exception& failure) {
        return report(error, status_of(failure.code()), failure.what());
    } catch (const std::bad_alloc&) {
        return report(error, RVQKV_OUT_OF_MEMORY, "out of memory");
    } catch (const std::exception& failure) {
        return report(error, RVQKV_INVALID_ARGUMENT, failure.what());
    }
#else
    return run(error, needed, body);
#endif
}

/// The same for one that makes a handle, from what `body` returns.
template <class Handle, class Body>
rvqkv_status make(rvqkv_error* error, const char* name, Handle** made, arguments needed, const Body& body) noexcept {
    if (made == nullptr) {
        return call(error, {{name, made}}, [] { return status(); });
    }
    *made = nullptr;
    return call(error, needed, [&]() -> status {
        result<Handle> built = body();
        if (!built) {
            return built.error();
        }
        *made = new (std::nothrow) Handle(std::move(built).value());
        return *made != nullptr ? status() : status(rvqkv::error{error_code::out_of_memory, "out of memory"});
    });
}

// ---- Kinds: the same numbers in both languages ----

static_assert(RVQKV_BFLOAT16 == static_cast<int>(dtype::bfloat16) && RVQKV_FLOAT16 == static_cast<int>(dtype::float16));
static_assert(RVQKV_SCALE_RMS == static_cast<int>(scale_kind::rms) &&
              RVQKV_SCALE_L2_NORM == static_cast<int>(scale_kind::l2_norm) &&
              RVQKV_SCALE_MAX_ABS == static_cast<int>(scale_kind::max_abs) &&
              RVQKV_SCALE_NONE == static_cast<int>(scale_kind::none));
static_assert(RVQKV_STRIDED == static_cast<int>(grouping_kind::strided) &&
              RVQKV_PERMUTED == static_cast<int>(grouping_kind::permuted));
static_assert(RVQKV_COSINE == static_cast<int>(distance::cosine));
static_assert(RVQKV_INTERLEAVED == static_cast<int>(rope_pairs::interleaved));
static_assert(RVQKV_BEFORE_ROPE == static_cast<int>(key_coding::before_rope) &&
              RVQKV_AFTER_ROPE == static_cast<int>(key_coding::after_rope) &&
              RVQKV_BLOCK_RELATIVE == static_cast<int>(key_coding::block_relative));
static_assert(RVQKV_RECONSTRUCTED == static_cast<int>(code_reading::reconstructed));
static_assert(RVQKV_ALL_DEPTHS == kv_sequence::all_depths && RVQKV_NO_LAYER == kv_layer_config::no_layer &&
              RVQKV_UNLIMITED == kv_cache_config::unlimited);

/// Sets `to`, if the number is one of `0` to `last`.
template <class Kind>
[[nodiscard]] status set_kind(Kind& to, const char* name, std::int32_t number, Kind last) {
    if (number < 0 || number > static_cast<std::int32_t>(last)) {
        return wrong(std::string(name) + " is " + std::to_string(number) + ", must be from 0 to " +
                     std::to_string(static_cast<int>(last)));
    }
    to = static_cast<Kind>(number);
    return {};
}

[[nodiscard]] inline status set_type(dtype& to, const char* name, rvqkv_dtype number) {
    return set_kind(to, name, number, dtype::bfloat16);
}

// ---- Structs ----

/// The `_init` functions: as much of the defaults as the caller's struct has room for.
template <class Struct>
void set_defaults(Struct* to, std::size_t struct_size, Struct defaults) noexcept {
    if (to != nullptr) {
        defaults.struct_size = struct_size;
        std::memcpy(to, &defaults, std::min(struct_size, sizeof defaults));
    }
}

template <class Struct>
[[nodiscard]] status check_size(const char* name, const Struct& given) {
    if (given.struct_size != sizeof(Struct)) {
        return wrong(std::string(name) + " has struct_size " + std::to_string(given.struct_size) + ", must be " +
                     std::to_string(sizeof(Struct)) + ": set it by the _init function, of the same version of rvqkv.h");
    }
    return {};
}

[[nodiscard]] inline result<mutable_tensor_view> view_of(const char* name, const rvqkv_tensor& tensor) {
    dtype type = dtype::float32;
    if (status bad = set_type(type, "type", tensor.type); !bad) {
        return wrong(std::string(name) + ": " + bad.error().message);
    }
    if (tensor.data == nullptr && tensor.tokens != 0 && tensor.heads != 0 && tensor.channels != 0) {
        return wrong(std::string(name) + ": data is null");
    }
    return mutable_tensor_view(tensor.data, type, {tensor.tokens, tensor.heads, tensor.channels},
                               {tensor.token_stride, tensor.head_stride, tensor.channel_stride});
}

[[nodiscard]] inline result<codec_spec> spec_of(const rvqkv_codec_spec& given) {
    codec_spec spec;
    spec.head_dim = given.head_dim;
    spec.shape = {given.depths, given.codewords, given.group_dim};
    for (const status& bad : {check_size("spec", given), set_kind(spec.scale, "scale", given.scale, scale_kind::none),
                              set_type(spec.scale_type, "scale_type", given.scale_type),
                              set_kind(spec.grouping, "grouping", given.grouping, grouping_kind::permuted),
                              set_kind(spec.metric, "metric", given.metric, distance::cosine),
                              set_type(spec.weight_type, "weight_type", given.weight_type)}) {
        if (!bad) {
            return bad.error();
        }
    }
    if (given.permutation != nullptr) {
        spec.permutation.assign(given.permutation, given.permutation + given.permutation_count);
    }
    return spec;
}

[[nodiscard]] inline rvqkv_codec_spec describe(const codec_spec& spec) noexcept {
    return {sizeof(rvqkv_codec_spec),
            spec.head_dim,
            spec.shape.depths,
            spec.shape.codewords,
            spec.shape.dim,
            static_cast<rvqkv_scale>(spec.scale),
            static_cast<rvqkv_dtype>(spec.scale_type),
            static_cast<rvqkv_grouping>(spec.grouping),
            spec.permutation.empty() ? nullptr : spec.permutation.data(),
            spec.permutation.size(),
            static_cast<rvqkv_distance>(spec.metric),
            static_cast<rvqkv_dtype>(spec.weight_type)};
}

[[nodiscard]] inline result<kv_layer_config> layer_of(const rvqkv_layer_config& given) {
    kv_layer_config layer;
    for (const status& bad :
         {check_size("config", given), set_kind(layer.coding, "coding", given.coding, key_coding::block_relative),
          set_kind(layer.rope.pairs, "rope pairs", given.rope.pairs, rope_pairs::interleaved)}) {
        if (!bad) {
            return bad.error();
        }
    }
    layer.keys = {given.key_codec != nullptr ? given.key_codec->codec : nullptr, given.key_heads};
    layer.values = {given.value_codec != nullptr ? given.value_codec->codec : nullptr, given.value_heads};
    layer.query_heads = given.query_heads;
    layer.sliding_window = given.sliding_window;
    layer.turned_input = given.turned_input;
    layer.rope.dims = given.rope.dims;
    layer.rope.base = given.rope.base;
    layer.rope.position_scale = given.rope.position_scale;
    layer.rope.attention_factor = given.rope.attention_factor;
    if (given.rope.frequencies != nullptr) {
        layer.rope.frequencies.assign(given.rope.frequencies, given.rope.frequencies + given.rope.frequency_count);
    }
    if (given.key_mean != nullptr) {
        layer.key_mean.assign(given.key_mean, given.key_mean + given.key_mean_count);
    }
    layer.block_tokens = given.block_tokens;
    layer.shares_layer = given.shares_layer;
    return layer;
}

/// All but the source.
[[nodiscard]] inline result<kv_cache_config> config_of(const rvqkv_cache_config& given) {
    kv_cache_config config;
    if (status bad = check_size("config", given); !bad) {
        return bad.error();
    }
    if (given.layers == nullptr && given.layer_count != 0) {
        return wrong("layers is null");
    }
    if (status bad = set_type(config.exact_type, "exact_type", given.exact_type); !bad) {
        return bad.error();
    }
    for (std::size_t i = 0; i < given.layer_count; ++i) {
        auto layer = layer_of(given.layers[i]);
        if (!layer) {
            return wrong("layer " + std::to_string(i) + ": " + layer.error().message);
        }
        config.layers.push_back(std::move(layer).value());
    }
    config.page_tokens = given.page_tokens;
    config.sink_tokens = given.sink_tokens;
    config.recent_tokens = given.recent_tokens;
    config.page_budget = given.page_budget;
    return config;
}

[[nodiscard]] inline encode_report from_c(const rvqkv_encode_report& given) noexcept {
    return {given.nonfinite_values, given.nonfinite_rows, given.first_token, given.first_head};
}
[[nodiscard]] inline rvqkv_encode_report to_c(const encode_report& found) noexcept {
    return {found.nonfinite_values, found.nonfinite_rows, found.first_token, found.first_head};
}

/// Null gives the defaults.
[[nodiscard]] inline result<attention_options> options_of(const rvqkv_attention_options* given) {
    attention_options options;
    if (given == nullptr) {
        return options;
    }
    if (status bad = check_size("options", *given); !bad) {
        return bad.error();
    }
    if (status bad = set_kind(options.reading, "reading", given->reading, code_reading::reconstructed); !bad) {
        return bad.error();
    }
    options.scale = given->scale;
    options.causal = given->causal;
    options.soft_cap = given->soft_cap;
    options.alibi_slopes = {given->alibi_slopes, given->alibi_slopes != nullptr ? given->alibi_slope_count : 0};
    options.sink_logits = {given->sink_logits, given->sink_logits != nullptr ? given->sink_logit_count : 0};
    if (given->hook != nullptr) {
        options.hook = {[](void* context, const score_block& block) {
                            const auto& to = *static_cast<const rvqkv_attention_options*>(context);
                            const rvqkv_score_block passed{block.query_token,  block.query_head, block.query_position,
                                                           block.key_position, block.tokens,     block.scores};
                            to.hook(to.hook_context, &passed);
                        },
                        const_cast<rvqkv_attention_options*>(given)};
    }
    return options;
}

// ---- A caller's functions ----

class page_functions final : public page_source {
public:
    explicit page_functions(const rvqkv_page_source& functions) noexcept : functions_(functions) {}
    [[nodiscard]] std::byte* allocate(std::size_t bytes) noexcept override {
        return static_cast<std::byte*>(functions_.allocate(functions_.context, bytes));
    }
    void release(std::byte* memory, std::size_t bytes) noexcept override {
        functions_.release(functions_.context, memory, bytes);
    }

private:
    rvqkv_page_source functions_;
};

class worker_functions final : public executor {
public:
    explicit worker_functions(const rvqkv_workers& functions) noexcept : functions_(functions) {}
    [[nodiscard]] std::size_t concurrency() const noexcept override { return functions_.concurrency; }
    void run(std::size_t tasks, void (*task)(void*, std::size_t), void* context) const override {
        struct {
            void (*task)(void*, std::size_t);
            void* context;
        } const job{task, context};
        // What is thrown must not cross the caller's frames.
        const auto run_one = [](void* of, std::size_t index) noexcept {
            const auto& given = *static_cast<decltype(job)*>(of);
            given.task(given.context, index);
        };
        functions_.run(functions_.pool, tasks, run_one, const_cast<void*>(static_cast<const void*>(&job)));
    }

private:
    rvqkv_workers functions_;
};

// ---- What several functions do ----

[[nodiscard]] inline result<rvqkv_codecs> codecs_of(result<codec_set> loaded) {
    if (!loaded) {
        return loaded.error();
    }
    codec_set& set = loaded.value();
    rvqkv_codecs codecs;
    for (auto& each : set.layers) {
        codecs.layers.push_back({each.first, {std::move(each.second.key)}, {std::move(each.second.value)}});
    }
    codecs.metadata = std::move(set.metadata);
    return codecs;
}

[[nodiscard]] inline result<std::unique_ptr<const executor>> workers_of(const rvqkv_workspace_config& given) {
    const rvqkv_workers& workers = given.workers;
    if (given.threads == 0 || (given.threads > 1 && workers.run != nullptr)) {
        return wrong("threads is " + std::to_string(given.threads) + ", must be " +
                     (workers.run != nullptr ? "1 beside workers" : "at least 1"));
    }
    if (workers.run != nullptr && workers.concurrency == 0) {
        return wrong("workers.concurrency is 0, must be at least 1");
    }
    std::unique_ptr<const executor> made;
    if (workers.run != nullptr) {
        made = std::make_unique<worker_functions>(workers);
    } else if (given.threads > 1) {
        made = std::make_unique<thread_pool>(given.threads);
    } else {
        made = std::make_unique<serial_executor>();
    }
    return made;
}

[[nodiscard]] inline result<rvqkv_sequence> sequence_of(std::shared_ptr<page_source> source, result<kv_sequence> made) {
    if (!made) {
        return made.error();
    }
    return rvqkv_sequence{std::move(source), std::move(made).value()};
}
[[nodiscard]] inline bool has_layer(const rvqkv_sequence* sequence, std::size_t layer) noexcept {
    return sequence != nullptr && layer < sequence->sequence.layers();
}

template <class Attend>
[[nodiscard]] status attend(const rvqkv_tensor& queries, const rvqkv_tensor& out,
                            const rvqkv_attention_options* options, const Attend& body) {
    const auto from = view_of("queries", queries);
    const auto to = view_of("out", out);
    const auto with = options_of(options);
    if (!from || !to || !with) {
        return !from ? from.error() : !to ? to.error() : with.error();
    }
    return body(from.value(), to.value(), with.value());
}

template <class Load>
[[nodiscard]] result<rvqkv_sequence> load(const rvqkv_cache& cache, rvqkv_recovery* recovery, const Load& body) {
    sequence_recovery found;
    auto made = sequence_of(cache.source, body(load_sequence_options{recovery != nullptr, &found}));
    if (made && recovery != nullptr) {
        recovery->was_damaged = found.was_damaged;
        recovery->tokens = found.tokens;
        copy_text(found.damage, recovery->damage, sizeof recovery->damage);
    }
    return made;
}

}  // namespace detail::c_api
RVQKV_NAMESPACE_END
