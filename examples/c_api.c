/* SPDX-License-Identifier: MIT */
/// @file
/// The cache from C: codecs, a cache of a few layers, a prompt, steps that attend on the codes, another answer to the
/// same prompt, a draft that is taken back, and the conversation in a file. Codecs come from a codec file, if one is
/// given, and from random weights if not; keys, values and queries are random numbers in any case.
#include <rvqkv/rvqkv.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { layers = 2, heads = 2, query_heads = 8, prompt = 300, steps = 40, draft = 4, most_channels = 256 };

static rvqkv_error error;

/// Ends the program where a call fails. An engine would hand the message on.
static void check(rvqkv_status status) {
    if (status != RVQKV_OK) {
        fprintf(stderr, "c_api: %s: %s\n", rvqkv_status_name(status), error.message);
        exit(EXIT_FAILURE);
    }
}

/// Numbers from -1 to 1.
static void fill(float* numbers, size_t count) {
    static uint32_t state = 1;
    for (size_t i = 0; i < count; ++i) {
        state = state * 1664525U + 1013904223U;
        numbers[i] = (float)(state >> 8U) / 8388608.0F - 1.0F;
    }
}

static rvqkv_codec* random_codec(rvqkv_grouping grouping) {
    rvqkv_codec_spec spec;
    rvqkv_codec_spec_init(&spec, sizeof spec);
    spec.head_dim = 64;
    spec.depths = 3;
    spec.codewords = 128;
    spec.group_dim = 8;
    spec.grouping = grouping;
    static float weights[3 * 128 * 8];
    const size_t count = sizeof weights / sizeof weights[0];
    fill(weights, count);
    rvqkv_codec* codec = NULL;
    check(rvqkv_codec_create(&spec, weights, RVQKV_FLOAT32, count, &codec, &error));
    return codec;
}

/// The first layer's codec in a file.
static const rvqkv_codec* codec_of(const rvqkv_codecs* file, rvqkv_side side) {
    const rvqkv_codec* codec = rvqkv_codecs_get(file, rvqkv_codecs_layer(file, 0), side);
    if (codec == NULL) {
        fprintf(stderr, "c_api: the file has no codec for keys or for values of its first layer\n");
        exit(EXIT_FAILURE);
    }
    return codec;
}

static size_t head_dim_of(const rvqkv_codec* codec) {
    rvqkv_codec_spec spec;
    rvqkv_codec_spec_init(&spec, sizeof spec);
    check(rvqkv_codec_describe(codec, &spec, &error));
    if (spec.head_dim > most_channels) {
        fprintf(stderr, "c_api: head_dim is %zu, this program has room for %d\n", spec.head_dim, most_channels);
        exit(EXIT_FAILURE);
    }
    return spec.head_dim;
}

static rvqkv_cache* make_cache(const rvqkv_codec* keys, const rvqkv_codec* values) {
    rvqkv_layer_config each[layers];
    for (size_t layer = 0; layer < layers; ++layer) {
        rvqkv_layer_config_init(&each[layer], sizeof each[layer]);
        each[layer].key_codec = keys;
        each[layer].value_codec = values;
        each[layer].key_heads = heads;
        each[layer].value_heads = heads;
        each[layer].query_heads = query_heads;
        each[layer].coding = RVQKV_AFTER_ROPE;
    }
    rvqkv_cache_config config;
    rvqkv_cache_config_init(&config, sizeof config);
    config.layers = each;
    config.layer_count = layers;
    rvqkv_cache* cache = NULL;
    check(rvqkv_cache_create(&config, &cache, &error));
    return cache;
}

/// A model: takes tokens into all layers, and lets the last `draft` of them attend to themselves and all before.
/// Leaves the last layer's attention in `out`.
static void run(rvqkv_sequence* chat, size_t tokens, size_t key_dim, size_t value_dim, rvqkv_workspace* workspace,
                float* out) {
    static float keys[prompt * heads * most_channels];
    static float values[prompt * heads * most_channels];
    static float queries[draft * query_heads * most_channels];
    const size_t asked = tokens < draft ? tokens : draft;
    for (size_t layer = 0; layer < layers; ++layer) {
        fill(keys, tokens * heads * key_dim);
        fill(values, tokens * heads * value_dim);
        fill(queries, asked * query_heads * key_dim);
        const rvqkv_tensor new_keys = rvqkv_tensor_of(keys, RVQKV_FLOAT32, tokens, heads, key_dim);
        const rvqkv_tensor new_values = rvqkv_tensor_of(values, RVQKV_FLOAT32, tokens, heads, value_dim);
        check(rvqkv_sequence_append(chat, layer, &new_keys, &new_values, workspace, NULL, &error));
        const rvqkv_tensor from = rvqkv_tensor_of(queries, RVQKV_FLOAT32, asked, query_heads, key_dim);
        const rvqkv_tensor to = rvqkv_tensor_of(out, RVQKV_FLOAT32, asked, query_heads, value_dim);
        check(rvqkv_sequence_attend(chat, layer, &from, &to, workspace, NULL, &error));
    }
}

int main(int argc, char** argv) {
    rvqkv_codecs* file = NULL;
    rvqkv_codec* made[2] = {NULL, NULL};
    const rvqkv_codec* codecs[2];
    if (argc > 1) {
        check(rvqkv_codecs_load(argv[1], &file, &error));
        codecs[RVQKV_KEYS] = codec_of(file, RVQKV_KEYS);
        codecs[RVQKV_VALUES] = codec_of(file, RVQKV_VALUES);
    } else {
        codecs[RVQKV_KEYS] = made[RVQKV_KEYS] = random_codec(RVQKV_STRIDED);
        codecs[RVQKV_VALUES] = made[RVQKV_VALUES] = random_codec(RVQKV_CONTIGUOUS);
    }
    const size_t key_dim = head_dim_of(codecs[RVQKV_KEYS]);
    const size_t value_dim = head_dim_of(codecs[RVQKV_VALUES]);
    rvqkv_cache* cache = make_cache(codecs[RVQKV_KEYS], codecs[RVQKV_VALUES]);
    rvqkv_codec_free(made[RVQKV_KEYS]);  // the cache keeps what it needs
    rvqkv_codec_free(made[RVQKV_VALUES]);
    rvqkv_codecs_free(file);

    rvqkv_workspace_config scratch;
    rvqkv_workspace_config_init(&scratch, sizeof scratch);
    scratch.query_tokens = draft;
    scratch.threads = 2;
    rvqkv_workspace* workspace = NULL;
    rvqkv_sequence* chat = NULL;
    check(rvqkv_workspace_create(cache, &scratch, &workspace, &error));
    check(rvqkv_sequence_create(cache, &chat, &error));
    check(rvqkv_sequence_reserve(chat, prompt + steps + draft, &error));  // appends allocate nothing from here on

    static float out[draft * query_heads * most_channels];
    run(chat, prompt, key_dim, value_dim, workspace, out);
    printf("rvqkv %s\nprompt: %zu tokens\n", rvqkv_version(), rvqkv_sequence_tokens(chat, 0));

    rvqkv_sequence* other = NULL;
    check(rvqkv_sequence_fork(chat, &other, &error));
    run(other, 1, key_dim, value_dim, workspace, out);
    printf("fork: %zu tokens, and %zu of the first\n", rvqkv_sequence_tokens(other, 0), rvqkv_sequence_tokens(chat, 0));
    rvqkv_sequence_free(other);

    for (size_t step = 0; step < steps; ++step) {
        run(chat, 1, key_dim, value_dim, workspace, out);
    }
    run(chat, draft, key_dim, value_dim, workspace, out);
    check(rvqkv_sequence_truncate(chat, prompt + steps + 1, &error));
    printf("rollback: of a draft of %d tokens 1 is kept, which makes %zu\n", draft, rvqkv_sequence_tokens(chat, 0));

    const char* path = "c_api.sequence";
    check(rvqkv_sequence_save(chat, path, false, &error));
    rvqkv_sequence* restored = NULL;
    check(rvqkv_sequence_load(cache, path, NULL, &restored, &error));
    static float again[sizeof out / sizeof out[0]];
    static float queries[query_heads * most_channels];
    fill(queries, query_heads * key_dim);
    const rvqkv_tensor from = rvqkv_tensor_of(queries, RVQKV_FLOAT32, 1, query_heads, key_dim);
    const rvqkv_tensor to = rvqkv_tensor_of(out, RVQKV_FLOAT32, 1, query_heads, value_dim);
    const rvqkv_tensor to_again = rvqkv_tensor_of(again, RVQKV_FLOAT32, 1, query_heads, value_dim);
    check(rvqkv_sequence_attend(chat, 0, &from, &to, workspace, NULL, &error));
    check(rvqkv_sequence_attend(restored, 0, &from, &to_again, workspace, NULL, &error));
    const bool is_same = memcmp(out, again, query_heads * value_dim * sizeof out[0]) == 0;
    printf("restored from %s: %zu tokens, attention %s\n", path, rvqkv_sequence_tokens(restored, 0),
           is_same ? "the same" : "differs");
    remove(path);

    const rvqkv_sequence_bytes held = rvqkv_sequence_memory(chat);
    printf("memory: %zu bytes of codes and scales, %zu of exact tokens, %zu as float16\n", held.codes + held.scales,
           held.exact, layers * rvqkv_sequence_tokens(chat, 0) * heads * (key_dim + value_dim) * 2);

    if (rvqkv_sequence_truncate(chat, 1000000, &error) != RVQKV_OK) {
        printf("what an error says: %s: %s\n", rvqkv_status_name(error.status), error.message);
    }
    rvqkv_sequence_free(restored);
    rvqkv_sequence_free(chat);
    rvqkv_workspace_free(workspace);
    rvqkv_cache_free(cache);
    return is_same ? EXIT_SUCCESS : EXIT_FAILURE;
}
