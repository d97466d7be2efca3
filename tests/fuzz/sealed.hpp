// SPDX-License-Identifier: MIT
/// @file
/// A checksum turns every mutation away at the door; this lets a fuzz target go on behind it.
#pragma once

#include "rvqkv/files/checksum.hpp"
#include "rvqkv/files/safetensors.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

namespace fuzz {

/// Calls `body` with the input, and with the input under the checksum that fits it.
template <class Body>
void with_and_without_seal(const std::uint8_t* data, std::size_t size, const Body& body) {
    body(std::as_bytes(std::span(data, size)));
    constexpr std::size_t at = rvqkv::detail::checksum_offset;
    if (size < at + rvqkv::checksum::digits) {
        return;
    }
    std::vector<std::uint8_t> sealed(data, data + size);
    std::fill_n(sealed.begin() + at, rvqkv::checksum::digits, std::uint8_t{'0'});
    rvqkv::checksum sum;
    sum.update(std::as_bytes(std::span(sealed)));
    const std::string digits = sum.hex();
    std::memcpy(sealed.data() + at, digits.data(), digits.size());
    body(std::as_bytes(std::span(sealed)));
}

}  // namespace fuzz
