// SPDX-License-Identifier: MIT
// expect: ScalePolicy
/// @file
/// A scaling policy that forgets to measure: one readable error, which names the concept.
#include "rvqkv/quantize/vector_quantizer.hpp"

struct no_measure {
    static constexpr std::string_view name() noexcept { return "mine"; }
    static constexpr bool is_stored() noexcept { return true; }
#ifdef MENDED
    float measure(std::span<const float>) const noexcept {
        return 1.0F;
    }
#endif
};

using quantizer = rvqkv::vector_quantizer<no_measure, rvqkv::strided_grouping>;
std::size_t size() {
    return sizeof(quantizer);
}
