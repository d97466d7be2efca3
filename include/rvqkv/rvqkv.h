/* SPDX-License-Identifier: MIT */
/// @file
/// The cache for engines in C, Rust, Go and older C++: plain C99, for which one C++20 file is compiled. On its own:
///
///     echo '#include <rvqkv/c_api/compile_c_api.hpp>' > rvqkv_c.cpp
///     c++ -O2 $(pkg-config --cflags rvqkv) -c rvqkv_c.cpp
///     cc -O2 $(pkg-config --cflags-only-I rvqkv) -c engine.c
///     c++ engine.o rvqkv_c.o -o engine
///
/// It needs the headers of nlohmann-json and xxhash, as `rvqkv/files.hpp` does. Functions here are named after those of
/// the C++ classes and do the same; `rvqkv/cache/kv_sequence.hpp` says more of each.
///
/// Errors:   functions that can fail return an `rvqkv_status`, 0 when all is well. If their last argument, `error`, is
///           not null, it takes the status and a message that names the field, its value and what to do. It is the
///           caller's memory, and not a "last error" of the thread, because the caller's language may go on in another
///           thread (Go does). A call that fails has changed nothing, and a handle that it should have made is null.
///           Null where a handle or tensor is needed is an `RVQKV_INVALID_ARGUMENT`; so is a `struct_size` that no
///           `_init` function has set. No exception leaves a function; allocations that fail are reported.
/// Handles:  made by `_create`, `_load`, `_fork`, given back by `_free`, in any order: what is made of something keeps
///           alive what it needs of it. `_free` of null does nothing. No handle may be used after that.
/// Structs:  those with a `struct_size` are set to their defaults by the `_init` function, which is told their size, so
///           that a caller and a library of two versions notice. Others are small and stay as they are.
/// Threads:  functions of a const handle are readers, of any other writers: any number of readers at once, or one
///           writer. A workspace serves one call at a time. Functions of `rvqkv_codec`, `rvqkv_codecs` and
///           `rvqkv_cache` may be called at any time from any thread, sequences are independent of each other, forks
///           too.
/// Pointers: those given in structs are needed during the call only, but for callbacks and their contexts. Callbacks
///           return: they neither throw nor jump away.
#pragma once

#include "rvqkv/version.hpp"

#include <stdbool.h>  // NOLINT: C
#include <stddef.h>   // NOLINT: C
#include <stdint.h>   // NOLINT: C

#ifdef __cplusplus
extern "C" {
#endif

// NOLINTBEGIN(modernize-use-using,modernize-redundant-void-arg): C

// ---- Errors ----

/// How a call ended: one of the `RVQKV_` values below. (Kinds are numbers of one width, so that every language can pass
/// any; those that have no meaning are refused.)
typedef int32_t rvqkv_status;
enum {
    RVQKV_OK = 0,
    RVQKV_INVALID_ARGUMENT = 1,  ///< A configuration, shape, range or handle that makes no sense.
    RVQKV_UNSUPPORTED = 2,       ///< Well formed, but not something this version or machine can do.
    RVQKV_OUT_OF_MEMORY = 3,     ///< An allocation failed; everything is as it was before the call.
    RVQKV_IO = 4,                ///< The operating system refused to open, read, write or rename a file.
    RVQKV_DAMAGED_FILE = 5       ///< Bytes that are not what the format demands: cut, flipped or hostile.
};

/// What went wrong. Written by calls that fail, and set to `RVQKV_OK` and "" by those that do not.
typedef struct rvqkv_error {
    rvqkv_status status;
    char message[508];  ///< Ends with a 0, cut if it must be.
} rvqkv_error;

/// "ok", "invalid_argument", ...; "unknown" for other numbers.
const char* rvqkv_status_name(rvqkv_status status);
/// The version that the C++ file was compiled from; `RVQKV_VERSION_STRING` is that of this header.
const char* rvqkv_version(void);

// ---- Tensors ----

/// Type of an element.
typedef int32_t rvqkv_dtype;
enum { RVQKV_FLOAT32 = 0, RVQKV_FLOAT16 = 1, RVQKV_BFLOAT16 = 2 };

/// A caller's `[token, head, channel]` tensor, to read or to write: `data[token * token_stride + head * head_stride +
/// channel * channel_stride]`, with strides in elements, which may be negative. `data` may be null if it is empty.
typedef struct rvqkv_tensor {
    void* data;
    rvqkv_dtype type;
    size_t tokens;
    size_t heads;
    size_t channels;
    ptrdiff_t token_stride;
    ptrdiff_t head_stride;
    ptrdiff_t channel_stride;
} rvqkv_tensor;

/// A tensor without gaps, channels side by side. One that is read only may point to const memory.
rvqkv_tensor rvqkv_tensor_of(const void* data, rvqkv_dtype type, size_t tokens, size_t heads, size_t channels);

/// The keys of a layer, or its values.
typedef int32_t rvqkv_side;
enum { RVQKV_KEYS = 0, RVQKV_VALUES = 1 };

// ---- Codecs: what turns heads' vectors into codes ----

/// What a head's vector is divided by.
typedef int32_t rvqkv_scale;
enum {
    RVQKV_SCALE_STD_DEV = 0,
    RVQKV_SCALE_RMS = 1,
    RVQKV_SCALE_L2_NORM = 2,
    RVQKV_SCALE_MAX_ABS = 3,
    RVQKV_SCALE_NONE = 4
};
/// Which channels are coded together.
typedef int32_t rvqkv_grouping;
enum { RVQKV_CONTIGUOUS = 0, RVQKV_STRIDED = 1, RVQKV_PERMUTED = 2 };
/// How the nearest codeword is measured.
typedef int32_t rvqkv_distance;
enum { RVQKV_EUCLIDEAN = 0, RVQKV_COSINE = 1 };

/// All that defines a codec besides the weights; defaults are the paper's for keys.
typedef struct rvqkv_codec_spec {
    size_t struct_size;
    size_t head_dim;   ///< 128
    size_t depths;     ///< 8
    size_t codewords;  ///< 2048
    size_t group_dim;  ///< 32; divides `head_dim`.
    rvqkv_scale scale;
    rvqkv_dtype scale_type;       ///< float16: how that number is stored.
    rvqkv_grouping grouping;      ///< Strided, for keys; contiguous is better for values.
    const uint16_t* permutation;  ///< `[head_dim]`, for `RVQKV_PERMUTED` only.
    size_t permutation_count;
    rvqkv_distance metric;
    rvqkv_dtype weight_type;  ///< float32: how codebook weights are stored.
} rvqkv_codec_spec;
void rvqkv_codec_spec_init(rvqkv_codec_spec* spec, size_t struct_size);

/// One codec: immutable, for any number of layers, caches and threads.
typedef struct rvqkv_codec rvqkv_codec;
/// The codecs of a model, from a codec file.
typedef struct rvqkv_codecs rvqkv_codecs;

/// A codec from its description and weights `[depths, codewords, group_dim]` of any type.
/// Errors: `RVQKV_INVALID_ARGUMENT` for a description that makes no sense, another number of weights, one that is not
///         finite; `RVQKV_OUT_OF_MEMORY`.
rvqkv_status rvqkv_codec_create(const rvqkv_codec_spec* spec, const void* weights, rvqkv_dtype weights_type,
                                size_t weight_count, rvqkv_codec** codec, rvqkv_error* error);
void rvqkv_codec_free(rvqkv_codec* codec);
/// What a codec is like; the permutation is the codec's own. Precondition: `spec->struct_size` is set.
/// Errors: `RVQKV_INVALID_ARGUMENT`.
rvqkv_status rvqkv_codec_describe(const rvqkv_codec* codec, rvqkv_codec_spec* spec, rvqkv_error* error);

/// Reads a codec file, everything of which is checked before.
/// Errors: `RVQKV_IO`, `RVQKV_DAMAGED_FILE`, `RVQKV_UNSUPPORTED` for a newer version, `RVQKV_OUT_OF_MEMORY`.
rvqkv_status rvqkv_codecs_load(const char* path, rvqkv_codecs** codecs, rvqkv_error* error);
/// The same from a file's bytes in memory, which are not needed afterwards.
rvqkv_status rvqkv_codecs_load_memory(const void* bytes, size_t size, rvqkv_codecs** codecs, rvqkv_error* error);
void rvqkv_codecs_free(rvqkv_codecs* codecs);
/// Layers that the file has codecs for; 0 for null.
size_t rvqkv_codecs_count(const rvqkv_codecs* codecs);
/// The model's number of the file's layer `index`, ascending; `RVQKV_NO_LAYER` if there are not so many.
size_t rvqkv_codecs_layer(const rvqkv_codecs* codecs, size_t index);
/// The codec of a model's layer and side, which lives as long as `codecs` (what is made of it, longer); null if the
/// file has none.
const rvqkv_codec* rvqkv_codecs_get(const rvqkv_codecs* codecs, size_t layer, rvqkv_side side);
/// The file's free text under a key, such as the model's name; null if it has none.
const char* rvqkv_codecs_metadata(const rvqkv_codecs* codecs, const char* key);

// ---- Caches: what the sequences of a model share ----

/// Which channels rotary embedding turns together, of the `dims` that it turns.
typedef int32_t rvqkv_rope_pairs;
enum {
    RVQKV_HALF_SPLIT = 0,  ///< `(i, i + dims / 2)`: GPT-NeoX, and models as Hugging Face stores them.
    RVQKV_INTERLEAVED = 1  ///< `(2 i, 2 i + 1)`: GPT-J, and Llama in GGUF files.
};
/// How a model turns its keys and queries. Defaults are Llama 2's.
typedef struct rvqkv_rope_config {
    rvqkv_rope_pairs pairs;     ///< Half split.
    size_t dims;                ///< The first so many channels are turned; 0, the default: all.
    double base;                ///< 10000: pair `i` turns by `base^(-2 i / dims)` radians for each position.
    double position_scale;      ///< 1: positions are multiplied by it.
    const double* frequencies;  ///< `[dims / 2]` radians for each position, instead of `base` (YaRN, Llama 3); or null.
    size_t frequency_count;
    double attention_factor;  ///< 1: turned channels are multiplied by it, as YaRN demands.
} rvqkv_rope_config;

/// In which state keys are stored.
typedef int32_t rvqkv_key_coding;
enum {
    RVQKV_AS_GIVEN = 0,       ///< The cache knows no positions: attention multiplies queries and keys as they come.
    RVQKV_BEFORE_ROPE = 1,    ///< Not turned; turned when they are read. The paper's way.
    RVQKV_AFTER_ROPE = 2,     ///< Turned to their position: attention can read codes through tables.
    RVQKV_BLOCK_RELATIVE = 3  ///< Turned by their distance from their block's start.
};

/// For `rvqkv_layer_config::shares_layer`: none.
#define RVQKV_NO_LAYER SIZE_MAX
/// For `rvqkv_sequence_reconstruct`: every depth that a page has.
#define RVQKV_ALL_DEPTHS SIZE_MAX
/// For `rvqkv_cache_config::page_budget`.
#define RVQKV_UNLIMITED SIZE_MAX

/// One layer of a model. Without codecs and heads: a layer without attention, or one that shares another's cache.
typedef struct rvqkv_layer_config {
    size_t struct_size;
    const rvqkv_codec* key_codec;
    const rvqkv_codec* value_codec;
    size_t key_heads;         ///< KV heads, not query heads.
    size_t value_heads;       ///< As many as of keys where there is attention.
    size_t query_heads;       ///< A multiple of the KV heads; 0, the default: equal.
    size_t sliding_window;    ///< Tokens that a query sees, its own included; 0, the default: all.
    rvqkv_key_coding coding;  ///< As given.
    bool turned_input;        ///< True: keys and queries come after rotary embedding. (Not for `RVQKV_AS_GIVEN`.)
    rvqkv_rope_config rope;   ///< Not for `RVQKV_AS_GIVEN`.
    const float* key_mean;    ///< `[head, head_dim]` before rotary embedding, taken out of what is coded; or null.
    size_t key_mean_count;
    size_t block_tokens;  ///< 1024, for `RVQKV_BLOCK_RELATIVE`.
    size_t shares_layer;  ///< The earlier layer whose keys and values this one reads; `RVQKV_NO_LAYER`, the default.
} rvqkv_layer_config;
void rvqkv_layer_config_init(rvqkv_layer_config* layer, size_t struct_size);

/// A caller's memory for pages. Preconditions: it outlives the cache and all its sequences; the functions do not call
/// back into them. Threads: a cache makes one call at a time.
typedef struct rvqkv_page_source {
    void* context;
    /// Memory aligned to 64 bytes, of any content; null when there is none. `bytes` is a multiple of 64.
    void* (*allocate)(void* context, size_t bytes);
    /// Takes back what `allocate` gave for as many bytes.
    void (*release)(void* context, void* memory, size_t bytes);
} rvqkv_page_source;

/// A cache's layers, and how it holds tokens by their age: the first ones and the latest ones exactly, those between as
/// codes.
typedef struct rvqkv_cache_config {
    size_t struct_size;
    const rvqkv_layer_config* layers;
    size_t layer_count;
    size_t page_tokens;        ///< 64: tokens of a page, which are coded together; a multiple of 64.
    size_t sink_tokens;        ///< 4: a sequence's first tokens, which stay exact.
    size_t recent_tokens;      ///< 64: the latest tokens, exact at least as long as so many are no later.
    rvqkv_dtype exact_type;    ///< float16, of exact tokens, and of what is coded; or bfloat16.
    rvqkv_page_source source;  ///< Where pages come from; without functions, the default: the C++ heap.
    size_t page_budget;        ///< Most bytes of pages at a time, all sequences together; `RVQKV_UNLIMITED`.
} rvqkv_cache_config;
void rvqkv_cache_config_init(rvqkv_cache_config* config, size_t struct_size);

typedef struct rvqkv_cache rvqkv_cache;

/// A cache without sequences.
/// Errors: `RVQKV_INVALID_ARGUMENT` naming the layer and field that makes no sense; `RVQKV_OUT_OF_MEMORY`.
rvqkv_status rvqkv_cache_create(const rvqkv_cache_config* config, rvqkv_cache** cache, rvqkv_error* error);
void rvqkv_cache_free(rvqkv_cache* cache);
/// Layers of the model; 0 for null.
size_t rvqkv_cache_layers(const rvqkv_cache* cache);
/// Takes pages for `tokens` tokens from the source ahead of time, for any sequences to share.
/// Errors: `RVQKV_OUT_OF_MEMORY`; the cache may have more free pages than before.
rvqkv_status rvqkv_cache_reserve(rvqkv_cache* cache, size_t tokens, rvqkv_error* error);
/// Gives pages that no sequence refers to or keeps back to their source.
void rvqkv_cache_release_free_pages(rvqkv_cache* cache);

/// Memory that a cache holds.
typedef struct rvqkv_cache_bytes {
    size_t pages;       ///< That a sequence refers to or keeps.
    size_t free_pages;  ///< That any sequence may take.
    size_t layers;      ///< Formats, and the cache's record of each layer.
    size_t total;       ///< Sum of the above.
    size_t codecs;      ///< Not in the total: the codecs, each counted once.
} rvqkv_cache_bytes;
/// Zeros for null.
rvqkv_cache_bytes rvqkv_cache_memory(const rvqkv_cache* cache);

// ---- Workspaces: scratch memory of one caller, and the threads that help it ----

/// A caller's pool of threads. Precondition: it outlives the workspace.
typedef struct rvqkv_workers {
    void* pool;
    size_t concurrency;  ///< How many tasks may run at the same time, at least 1.
    /// Calls `task(context, i)` once for every `i < tasks`, in any order and on any thread, and returns when all are
    /// done. Results never depend on the order.
    void (*run)(void* pool, size_t tasks, void (*task)(void* context, size_t index), void* context);
} rvqkv_workers;

typedef struct rvqkv_workspace_config {
    size_t struct_size;
    size_t query_tokens;    ///< 1: query tokens of one call that attention needs no more memory for.
    size_t threads;         ///< 1, the caller's own: threads that work on a call, started for this workspace.
    rvqkv_workers workers;  ///< The caller's pool instead; without function: none.
} rvqkv_workspace_config;
void rvqkv_workspace_config_init(rvqkv_workspace_config* config, size_t struct_size);

typedef struct rvqkv_workspace rvqkv_workspace;

/// A workspace large enough for any call on any layer of a cache, which allocates nothing then. It serves other caches'
/// sequences, too, and grows when it must. `config` may be null: the defaults.
/// Errors: `RVQKV_INVALID_ARGUMENT` for workers beside threads, or no concurrency; `RVQKV_OUT_OF_MEMORY`.
rvqkv_status rvqkv_workspace_create(const rvqkv_cache* cache, const rvqkv_workspace_config* config,
                                    rvqkv_workspace** workspace, rvqkv_error* error);
void rvqkv_workspace_free(rvqkv_workspace* workspace);

// ---- Sequences: conversations in a cache ----

/// The tokens of one sequence. A token has an index, from 0, and a position, as rotary embedding counts; they are the
/// same until `rvqkv_sequence_evict`.
typedef struct rvqkv_sequence rvqkv_sequence;

/// A sequence without tokens. Errors: `RVQKV_OUT_OF_MEMORY`.
rvqkv_status rvqkv_sequence_create(const rvqkv_cache* cache, rvqkv_sequence** sequence, rvqkv_error* error);
/// Another one with the same tokens, which shares all pages. Errors: `RVQKV_OUT_OF_MEMORY`.
rvqkv_status rvqkv_sequence_fork(const rvqkv_sequence* sequence, rvqkv_sequence** fork, rvqkv_error* error);
void rvqkv_sequence_free(rvqkv_sequence* sequence);

/// Tokens that a layer holds; 0 for null and for a layer that there is not.
size_t rvqkv_sequence_tokens(const rvqkv_sequence* sequence, size_t layer);
/// Index of the first token that a layer's sliding window has not let go of; 0 as above.
size_t rvqkv_sequence_first_token(const rvqkv_sequence* sequence, size_t layer);
/// Position that a layer's next token will have; 0 as above.
int64_t rvqkv_sequence_next_position(const rvqkv_sequence* sequence, size_t layer);

/// What an append found on one side besides numbers.
typedef struct rvqkv_encode_report {
    size_t nonfinite_values;  ///< NaNs and infinities, each stored as 0.
    size_t nonfinite_rows;    ///< Head vectors that held at least one.
    size_t first_token;       ///< Where the first of them was (if any), counted from the call's first token.
    size_t first_head;        ///< Its head.
} rvqkv_encode_report;
typedef struct rvqkv_append_report {
    rvqkv_encode_report keys;
    rvqkv_encode_report values;
} rvqkv_append_report;

/// Takes a layer's next tokens. NaNs and infinities are stored as 0, and added to `report` if there is one.
/// Shapes: `keys` and `values` `[token, head, head_dim]`, of the heads and head_dim of their side, equally many tokens.
/// Errors: `RVQKV_INVALID_ARGUMENT` for a layer or shape that does not fit; `RVQKV_OUT_OF_MEMORY`.
rvqkv_status rvqkv_sequence_append(rvqkv_sequence* sequence, size_t layer, const rvqkv_tensor* keys,
                                   const rvqkv_tensor* values, rvqkv_workspace* workspace, rvqkv_append_report* report,
                                   rvqkv_error* error);
/// Reconstructs keys or values `[first_token, first_token + out->tokens)` of a layer from so many depths, as they would
/// be given at their present positions.
/// Shapes: `out` `[token, head, head_dim]`.
/// Errors: `RVQKV_INVALID_ARGUMENT` for a layer, side, range, shape or number of depths that the cache does not have,
///         and for tokens that have left the sliding window; `RVQKV_OUT_OF_MEMORY`.
rvqkv_status rvqkv_sequence_reconstruct(const rvqkv_sequence* sequence, size_t layer, rvqkv_side side,
                                        size_t first_token, const rvqkv_tensor* out, size_t depths,
                                        rvqkv_workspace* workspace, rvqkv_error* error);

/// The scores of one query for some neighbouring tokens, on their way to the softmax.
typedef struct rvqkv_score_block {
    size_t query_token;  ///< Number in this call.
    size_t query_head;
    int64_t query_position;
    int64_t key_position;  ///< Of the first token; the others follow.
    size_t tokens;
    float* scores;  ///< `[tokens]`, to be edited; -infinity masks one.
} rvqkv_score_block;

/// How codes are read.
typedef int32_t rvqkv_code_reading;
enum {
    RVQKV_QUICKEST = 0,      ///< The quickest way, within 1 % of the output of the other.
    RVQKV_RECONSTRUCTED = 1  ///< As reconstruction gives them.
};

/// A score is made in this order: scale * <query, key>, soft cap, ALiBi, hook, mask.
typedef struct rvqkv_attention_options {
    size_t struct_size;
    float scale;                ///< 0, the default: 1 / sqrt(head_dim).
    bool causal;                ///< True: queries see no token at a later position than their own.
    float soft_cap;             ///< Scores become cap * tanh(score / cap); 0, the default: they stay.
    const float* alibi_slopes;  ///< `[query head]`: a score gains slope * (key's - query's position); or null.
    size_t alibi_slope_count;
    const float* sink_logits;  ///< `[query head]`: one more score, of a token whose value is 0; or null.
    size_t sink_logit_count;
    /// Called for every query and every piece of the sequence, from any of the workers, several at a time; or null.
    void (*hook)(void* context, const rvqkv_score_block* block);
    void* hook_context;
    rvqkv_code_reading reading;  ///< The quickest.
} rvqkv_attention_options;
void rvqkv_attention_options_init(rvqkv_attention_options* options, size_t struct_size);

/// Attention of a layer's newest tokens over all that it holds, codes read as they are. `options` may be null: the
/// defaults.
/// Shapes: `queries` `[token, query head, head_dim]`, of the layer's last tokens, which have been appended; `out`
///         `[token, query head, head_dim of the values]`.
/// Errors: `RVQKV_INVALID_ARGUMENT` for a layer without attention, other shapes, more queries than tokens, options that
///         do not fit; `RVQKV_OUT_OF_MEMORY`. Nothing is written then.
rvqkv_status rvqkv_sequence_attend(const rvqkv_sequence* sequence, size_t layer, const rvqkv_tensor* queries,
                                   const rvqkv_tensor* out, rvqkv_workspace* workspace,
                                   const rvqkv_attention_options* options, rvqkv_error* error);
/// The same for an engine that merges it with attention over other tokens: also gives each query's logarithm of the sum
/// of exp(score). Shapes: `log_sum_exp` `[token, query head]`, `count` numbers.
rvqkv_status rvqkv_sequence_attend_partial(const rvqkv_sequence* sequence, size_t layer, const rvqkv_tensor* queries,
                                           const rvqkv_tensor* out, float* log_sum_exp, size_t count,
                                           rvqkv_workspace* workspace, const rvqkv_attention_options* options,
                                           rvqkv_error* error);
/// Adds attention over other tokens to `out`: both are partial results, and so is what it leaves.
/// Shapes: `out`, `other` `[token, head, channel]`, `log_sum_exp` and `other_log_sum_exp` `[token, head]`, `count`
///         numbers each. Errors: `RVQKV_INVALID_ARGUMENT` when shapes differ.
rvqkv_status rvqkv_merge_partial(const rvqkv_tensor* out, float* log_sum_exp, const rvqkv_tensor* other,
                                 const float* other_log_sum_exp, size_t count, rvqkv_error* error);

/// Drops the tokens of all layers from index `tokens` on.
/// Errors: `RVQKV_INVALID_ARGUMENT` when a layer does not hold as many, and when its sliding window has let go of
///         tokens that the next one must see.
rvqkv_status rvqkv_sequence_truncate(rvqkv_sequence* sequence, size_t tokens, rvqkv_error* error);
/// The same for one layer.
rvqkv_status rvqkv_sequence_truncate_layer(rvqkv_sequence* sequence, size_t layer, size_t tokens, rvqkv_error* error);
/// Drops all tokens.
void rvqkv_sequence_clear(rvqkv_sequence* sequence);
/// Drops tokens `[first, last)` of all layers. With `shift`, all later tokens' positions move down by as many, without
/// loss; else they stay, and a gap is left.
/// Errors: `RVQKV_INVALID_ARGUMENT` for a range that a layer does not hold, and for sliding windows as above;
///         `RVQKV_OUT_OF_MEMORY`.
rvqkv_status rvqkv_sequence_evict(rvqkv_sequence* sequence, size_t first, size_t last, bool shift, rvqkv_error* error);
/// Makes pages of codes whose tokens all have an index below `tokens_before` hold no more than so many depths.
/// Errors: `RVQKV_INVALID_ARGUMENT` for no depths; `RVQKV_OUT_OF_MEMORY`.
rvqkv_status rvqkv_sequence_demote(rvqkv_sequence* sequence, size_t tokens_before, size_t key_depths,
                                   size_t value_depths, rvqkv_error* error);
/// Demotes as few of the oldest pages as bring the sequence's total down to `most_bytes`; `tokens_before`, if not null,
/// is told which tokens they are before.
/// Errors: as above, and `RVQKV_INVALID_ARGUMENT` when even demoting all pages would not do.
rvqkv_status rvqkv_sequence_demote_to(rvqkv_sequence* sequence, size_t most_bytes, size_t key_depths,
                                      size_t value_depths, size_t* tokens_before, rvqkv_error* error);
/// Makes room for `tokens` tokens in all, in every layer, and keeps it: appends allocate nothing until then.
/// Errors: `RVQKV_OUT_OF_MEMORY`.
rvqkv_status rvqkv_sequence_reserve(rvqkv_sequence* sequence, size_t tokens, rvqkv_error* error);
/// Gives pages that were reserved and hold no token back to the cache.
void rvqkv_sequence_release_spare_pages(rvqkv_sequence* sequence);

/// Memory that a sequence refers to; a page counts whole, and in each of the sequences that share it.
typedef struct rvqkv_sequence_bytes {
    size_t codes;        ///< Of pages of codes.
    size_t scales;       ///< Of pages of codes.
    size_t exact;        ///< Pages of exact tokens: sinks, and recent ones.
    size_t overhead;     ///< What the pool keeps with each page, and padding at its end.
    size_t page_tables;  ///< Lists of runs, and the sequence's record of each layer.
    size_t spare;        ///< Pages kept for later tokens, with their overhead.
    size_t total;        ///< Sum of the above.
} rvqkv_sequence_bytes;
/// Zeros for null.
rvqkv_sequence_bytes rvqkv_sequence_memory(const rvqkv_sequence* sequence);

// ---- Sequences in files ----

/// Saves a sequence: interrupted at any moment, the file has its old contents or the new ones. With `incremental`, a
/// file that a sequence of an equal cache was saved to is added to, without writing again what it has already.
/// Errors: `RVQKV_IO`, `RVQKV_OUT_OF_MEMORY`; incrementally, also what loading reports for the file that is there.
rvqkv_status rvqkv_sequence_save(const rvqkv_sequence* sequence, const char* path, bool incremental,
                                 rvqkv_error* error);

/// What was left of a damaged file.
typedef struct rvqkv_recovery {
    bool was_damaged;
    size_t tokens;     ///< Of the sequence, at most in any layer.
    char damage[496];  ///< What is wrong with the file, cut if it must be.
} rvqkv_recovery;

/// A new sequence of a cache with the tokens that one of an equal cache was saved with; the file is checked as a whole
/// before. If `recovery` is not null, the longest prefix of tokens whose pages are good is taken of a damaged file, and
/// it is told so.
/// Errors: `RVQKV_DAMAGED_FILE` saying where; `RVQKV_INVALID_ARGUMENT` for a file of another model, other codebooks or
///         another configuration, naming the difference; `RVQKV_UNSUPPORTED` for a newer version; `RVQKV_IO`;
///         `RVQKV_OUT_OF_MEMORY`.
rvqkv_status rvqkv_sequence_load(const rvqkv_cache* cache, const char* path, rvqkv_recovery* recovery,
                                 rvqkv_sequence** sequence, rvqkv_error* error);
/// The same from a file's bytes in memory, which are not needed afterwards.
rvqkv_status rvqkv_sequence_load_memory(const rvqkv_cache* cache, const void* bytes, size_t size,
                                        rvqkv_recovery* recovery, rvqkv_sequence** sequence, rvqkv_error* error);

// NOLINTEND(modernize-use-using,modernize-redundant-void-arg)

#ifdef __cplusplus
}
#endif
