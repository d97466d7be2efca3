// SPDX-License-Identifier: MIT
// expect: GroupingPolicy
/// @file
/// A grouping policy that does not say where channels go.
#include "rvqkv/quantize/vector_quantizer.hpp"

struct no_channel {
    static constexpr std::string_view name() noexcept { return "mine"; }
#ifdef MENDED
    std::size_t channel(std::size_t group, std::size_t i, std::size_t, std::size_t group_dim) const noexcept {
        return group * group_dim + i;
    }
#endif
};

using quantizer = rvqkv::vector_quantizer<rvqkv::std_dev_scale, no_channel>;
std::size_t size() {
    return sizeof(quantizer);
}
