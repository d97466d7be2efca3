// SPDX-License-Identifier: MIT
/// @file
/// A user's first program: compresses a tensor and reads it back. Every consumer builds this file.
#include <rvqkv/rvqkv.hpp>

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
    rvqkv::codec_spec spec;  // the paper's keys, small
    spec.head_dim = 64;
    spec.shape = {4, 64, 16};
    std::vector<float> weights(spec.shape.size());
    for (std::size_t i = 0; i < weights.size(); ++i) {
        weights[i] = std::sin(static_cast<float>(i * i));
    }
    const auto codec = rvqkv::make_codec<float>(spec, weights).value();

    const rvqkv::tensor_shape shape{8, 2, 64};  // [token, head, channel]
    std::vector<float> keys(8 * 2 * 64, 1.0F);
    std::vector<rvqkv::code_t> codes(8 * 2 * codec->groups() * codec->depths());
    std::vector<float> scales(8 * 2);
    const rvqkv::code_strides strides{codec->depths(), 1};
    rvqkv::quantizer_workspace workspace;
    codec->encode({keys.data(), shape}, {codes.data(), strides, scales.data()}, workspace).value();
    codec->decode({codes.data(), strides, scales.data()}, {keys.data(), shape}, codec->depths(), workspace).value();
    std::printf("%.3f bits per value\n", spec.bits_per_value());
    return std::isfinite(keys.back()) ? 0 : 1;
}
