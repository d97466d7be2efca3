// SPDX-License-Identifier: MIT
/// @file
/// Fuzzes the codec file reader: a file that is taken must make codecs that work.
#include "fuzz_target.hpp"
#include "rvqkv/files/codec_file.hpp"
#include "sealed.hpp"
#include "support/temp_dir.hpp"

namespace {

void try_file(std::span<const std::byte> bytes) {
    const auto loaded = rvqkv::load_codecs(bytes);
    if (!loaded) {
        fuzz::require(!loaded.error().message.empty(), "an error says what is wrong");
        return;
    }
    for (const auto& layer : loaded.value().layers) {
        for (const auto& codec : {layer.second.key, layer.second.value}) {
            if (codec == nullptr) {
                continue;
            }
            fuzz::require(codec->spec() != nullptr && codec->spec()->validate().ok(), "a loaded codec is valid");
            fuzz::require(codec->weights().size() == codec->shape().size() * rvqkv::size_of(codec->spec()->weight_type),
                          "a loaded codec has all weights");
            const std::vector<float> x(codec->head_dim(), 1.0F);
            std::vector<float> out(codec->head_dim());
            std::vector<rvqkv::code_t> codes(codec->groups() * codec->depths());
            float scale = 0.0F;
            rvqkv::quantizer_workspace workspace;
            rvqkv::mutable_encoded_view encoded;
            encoded.codes = codes.data();
            encoded.strides = {codec->depths(), 1};
            encoded.scales = &scale;
            const rvqkv::tensor_shape shape = {1, 1, codec->head_dim()};
            fuzz::require(codec->encode(rvqkv::tensor_view(x.data(), shape), encoded, workspace).ok(),
                          "a loaded codec encodes");
            rvqkv::encoded_view stored;
            stored.codes = codes.data();
            stored.strides = encoded.strides;
            stored.scales = &scale;
            fuzz::require(
                codec->decode(stored, rvqkv::mutable_tensor_view(out.data(), shape), codec->depths(), workspace).ok(),
                "a loaded codec decodes");
        }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::with_and_without_seal(data, size, try_file);
    return 0;
}

std::vector<std::string> fuzz_seeds() {
    const test::temp_dir folder;
    std::vector<std::string> seeds;
    const auto add = [&](rvqkv::codec_spec spec) {
        std::vector<float> weights(spec.shape.size());
        for (std::size_t i = 0; i < weights.size(); ++i) {
            weights[i] = static_cast<float>(i % 7) - 3.0F;
        }
        rvqkv::codec_set set;
        set.layers[0].key = rvqkv::make_codec(spec, std::span<const float>(weights)).value();
        if (!seeds.empty()) {
            spec.grouping = rvqkv::grouping_kind::contiguous;
            spec.permutation.clear();
            set.layers[2].value = rvqkv::make_codec(spec, std::span<const float>(weights)).value();
            set.metadata = {{"model", "any"}};
        }
        rvqkv::save_codecs(folder.file("seed"), set).value();
        seeds.push_back(test::read_file(folder.file("seed")));
    };
    rvqkv::codec_spec spec;
    spec.head_dim = 4;
    spec.shape = {2, 3, 2};
    add(spec);
    spec.weight_type = rvqkv::dtype::bfloat16;
    spec.grouping = rvqkv::grouping_kind::permuted;
    spec.permutation = {3, 1, 0, 2};
    spec.scale = rvqkv::scale_kind::none;
    spec.metric = rvqkv::distance::cosine;
    add(spec);
    return seeds;
}
