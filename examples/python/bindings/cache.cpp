// SPDX-License-Identifier: MIT
/// @file
/// The cache and its sequences: tensors come in, codes stay, attention reads them.
#include "common.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <optional>

namespace py {
namespace {

using codec_handle = std::shared_ptr<const rvqkv::codec>;

rvqkv::key_coding coding_of(const std::string& name) {
    if (name == "as_given") {
        return rvqkv::key_coding::as_given;
    }
    if (name == "before_rope") {
        return rvqkv::key_coding::before_rope;
    }
    if (name == "after_rope") {
        return rvqkv::key_coding::after_rope;
    }
    if (name == "block_relative") {
        return rvqkv::key_coding::block_relative;
    }
    fail("key_coding is '" + name + "', must be one of: as_given, before_rope, after_rope, block_relative");
}

rvqkv::kv_layer_config make_layer(const codec_handle& keys, const codec_handle& values, std::size_t heads,
                                  std::size_t query_heads, std::size_t sliding_window, const std::string& coding,
                                  const std::vector<double>& frequencies, double attention_factor) {
    rvqkv::kv_layer_config layer;
    layer.keys = {keys, heads};
    layer.values = {values, heads};
    layer.query_heads = query_heads;
    layer.sliding_window = sliding_window;
    layer.coding = coding_of(coding);
    if (layer.coding != rvqkv::key_coding::as_given) {
        if (frequencies.empty()) {
            fail("frequencies are missing: key_coding '" + coding + "' turns keys");
        }
        layer.rope.frequencies = frequencies;
        layer.rope.dims = 2 * frequencies.size();
        layer.rope.attention_factor = attention_factor;
    }
    return layer;
}

/// A cache with the scratch memory that its sequences share: one call at a time.
struct shared_cache {
    rvqkv::kv_cache cache;
    rvqkv::kv_workspace workspace;
    rvqkv::attention_workspace attention;
    std::mutex busy;

    explicit shared_cache(rvqkv::kv_cache made) : cache(std::move(made)) {}
    /// Runs a call alone and without the interpreter's lock.
    template <class Call>
    decltype(auto) alone(const Call& call) {
        const nb::gil_scoped_release release;
        const std::lock_guard lock(busy);
        return call();
    }
};
using cache_handle = std::shared_ptr<shared_cache>;

cache_handle make_cache(const std::vector<rvqkv::kv_layer_config>& layers, std::size_t page_tokens,
                        std::size_t sink_tokens, std::size_t recent_tokens, const std::string& exact_type,
                        std::optional<std::size_t> page_budget) {
    rvqkv::kv_cache_config config;
    config.layers = layers;
    config.page_tokens = page_tokens;
    config.sink_tokens = sink_tokens;
    config.recent_tokens = recent_tokens;
    config.exact_type = choice(all_dtypes, exact_type, "exact_type");
    config.page_budget = page_budget.value_or(rvqkv::kv_cache_config::unlimited);
    return without_lock(
        [&] { return std::make_shared<shared_cache>(rvqkv::kv_cache::create(std::move(config)).value()); });
}

class sequence {
public:
    sequence(cache_handle cache, rvqkv::kv_sequence tokens) : cache_(std::move(cache)), tokens_(std::move(tokens)) {}

    std::size_t append(std::size_t layer, const array_in& keys, const array_in& values) {
        const rvqkv::tensor_view k = view(keys, "keys");
        const rvqkv::tensor_view v = view(values, "values");
        return cache_->alone([&] {
            rvqkv::kv_encode_report report;
            const auto threads = workers();
            tokens_.append(layer, k, v, cache_->workspace, &report, *threads).value();
            return report.keys.nonfinite_values + report.values.nonfinite_values;
        });
    }
    void attend(std::size_t layer, const array_in& queries, const array_out& out, float scale, float soft_cap,
                const std::string& reading) {
        const rvqkv::tensor_view q = view(queries, "queries");
        const rvqkv::mutable_tensor_view to = view(out, "out");
        rvqkv::attention_options options;
        options.scale = scale;
        options.soft_cap = soft_cap;
        if (reading == "reconstructed") {
            options.reading = rvqkv::code_reading::reconstructed;
        } else if (reading != "quickest") {
            fail("reading is '" + reading + "', must be one of: quickest, reconstructed");
        }
        cache_->alone([&] {
            const auto threads = workers();
            tokens_.attend(layer, q, to, cache_->attention, options, *threads).value();
        });
    }
    void reconstruct(std::size_t layer, std::size_t first, const std::optional<array_out>& keys,
                     const std::optional<array_out>& values) {
        std::optional<rvqkv::mutable_tensor_view> k;
        std::optional<rvqkv::mutable_tensor_view> v;
        if (keys.has_value()) {
            k = view(*keys, "keys");
        }
        if (values.has_value()) {
            v = view(*values, "values");
        }
        cache_->alone([&] {
            if (k) {
                tokens_.reconstruct_keys(layer, first, *k, cache_->workspace).value();
            }
            if (v) {
                tokens_.reconstruct_values(layer, first, *v, cache_->workspace).value();
            }
        });
    }
    sequence fork() const {
        return {cache_, cache_->alone([&] { return tokens_.fork().value(); })};
    }
    void truncate(std::size_t tokens) {
        cache_->alone([&] { tokens_.truncate(tokens).value(); });
    }
    void truncate_layer(std::size_t layer, std::size_t tokens) {
        cache_->alone([&] { tokens_.truncate(layer, tokens).value(); });
    }
    void clear() {
        cache_->alone([&] { tokens_.clear(); });
    }
    void reserve(std::size_t tokens) {
        cache_->alone([&] { tokens_.reserve(tokens).value(); });
    }
    std::size_t tokens(std::size_t layer) const {
        if (layer >= tokens_.layers()) {
            fail("layer is " + std::to_string(layer) + ", the cache has " + std::to_string(tokens_.layers()));
        }
        return tokens_.tokens(layer);
    }
    nb::dict bytes() const {
        const rvqkv::kv_sequence_bytes held = tokens_.bytes();
        nb::dict bytes;
        bytes["codes"] = held.codes;
        bytes["scales"] = held.scales;
        bytes["exact"] = held.exact;
        bytes["overhead"] = held.overhead;
        bytes["page_tables"] = held.page_tables;
        bytes["spare"] = held.spare;
        return bytes;
    }

private:
    cache_handle cache_;
    rvqkv::kv_sequence tokens_;
};

nb::dict cache_bytes(shared_cache& shared) {
    const rvqkv::kv_cache_bytes held = shared.cache.bytes();
    nb::dict bytes;
    bytes["pages"] = held.pages;
    bytes["free_pages"] = held.free_pages;
    bytes["layers"] = held.layers;
    bytes["codecs"] = held.codecs;
    bytes["scratch"] = shared.workspace.bytes() + shared.attention.bytes();
    return bytes;
}

}  // namespace

void bind_cache(nb::module_& module) {
    nb::class_<rvqkv::kv_layer_config>(module, "LayerConfig", "A layer of a model as its cache sees it.")
        .def(
            "__init__",
            [](rvqkv::kv_layer_config* self, const codec_handle& keys, const codec_handle& values, std::size_t heads,
               std::size_t query_heads, std::size_t sliding_window, const std::string& coding,
               const std::vector<double>& frequencies, double attention_factor) {
                new (self) rvqkv::kv_layer_config(make_layer(keys, values, heads, query_heads, sliding_window, coding,
                                                             frequencies, attention_factor));
            },
            nb::arg("key_codec"), nb::arg("value_codec"), nb::arg("heads"), nb::kw_only(), nb::arg("query_heads") = 0,
            nb::arg("sliding_window") = 0, nb::arg("key_coding") = "as_given",
            nb::arg("frequencies") = std::vector<double>(), nb::arg("attention_factor") = 1.0);

    nb::class_<shared_cache>(module, "KvCache", "What the sequences of a model share: formats and pages.")
        .def(nb::new_(&make_cache), nb::arg("layers"), nb::kw_only(), nb::arg("page_tokens") = 64,
             nb::arg("sink_tokens") = 4, nb::arg("recent_tokens") = 64, nb::arg("exact_type") = "float16",
             nb::arg("page_budget") = nb::none())
        .def_prop_ro("layers", [](const shared_cache& shared) { return shared.cache.layers(); })
        .def("bytes", &cache_bytes, "Bytes held, by what they are for.")
        .def(
            "release_free_pages",
            [](shared_cache& shared) { shared.alone([&] { shared.cache.release_free_pages(); }); },
            "Gives pages that no sequence uses back to the system.");
    // By a handle: a sequence keeps its cache alive.
    module.def(
        "new_sequence",
        [](const cache_handle& shared) {
            return sequence(shared, shared->alone([&] { return shared->cache.new_sequence().value(); }));
        },
        nb::arg("cache"), "A sequence without tokens.");

    nb::class_<sequence>(module, "KvSequence", "The tokens of one sequence in every layer of a model.")
        .def("append", &sequence::append, nb::arg("layer"), nb::arg("keys"), nb::arg("values"),
             "Takes a layer's next tokens, [token, head, channel]; says how many numbers were not finite (taken as 0).")
        .def("attend", &sequence::attend, nb::arg("layer"), nb::arg("queries"), nb::arg("out").noconvert(),
             nb::kw_only(), nb::arg("scale") = 0.0F, nb::arg("soft_cap") = 0.0F, nb::arg("reading") = "quickest",
             "Attention of a layer's newest tokens, queries [token, query head, channel], over all, written to out.")
        .def("reconstruct", &sequence::reconstruct, nb::arg("layer"), nb::arg("first_token"),
             nb::arg("keys").none().noconvert(), nb::arg("values").none().noconvert(),
             "Writes a layer's tokens from first_token on to keys and values [token, head, channel], as many as they "
             "have room for.")
        .def("fork", &sequence::fork, "Another sequence with the same tokens, which shares all pages.")
        .def("truncate", &sequence::truncate, nb::arg("tokens"), "Drops all layers' tokens from that index on.")
        .def("truncate_layer", &sequence::truncate_layer, nb::arg("layer"), nb::arg("tokens"))
        .def("clear", &sequence::clear, "Drops all tokens.")
        .def("reserve", &sequence::reserve, nb::arg("tokens"), "Makes room for so many tokens in all.")
        .def("tokens", &sequence::tokens, nb::arg("layer"), "Tokens that a layer holds.")
        .def("bytes", &sequence::bytes, "Bytes referred to, by what they are for.");
}

}  // namespace py
