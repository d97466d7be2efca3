// SPDX-License-Identifier: MIT
/// @file
/// Packed codes against a packer that moves one bit at a time.
#include "rvqkv/core/bit_packing.hpp"

#include "support/catch.hpp"
#include "support/random.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

using rvqkv::code_t;

/// The definition: bit `b` of code `i` is bit `i * bits + b` of the string, least significant first.
void pack_bit_by_bit(const std::vector<code_t>& codes, unsigned bits, std::vector<std::byte>& packed,
                     std::size_t first) {
    for (std::size_t i = 0; i < codes.size(); ++i) {
        for (unsigned b = 0; b < bits; ++b) {
            const std::size_t place = (first + i) * bits + b;
            const std::byte mask = std::byte{1} << static_cast<int>(place % 8);
            packed[place / 8] = (codes[i] >> b & 1) != 0 ? packed[place / 8] | mask : packed[place / 8] & ~mask;
        }
    }
}

std::vector<code_t> random_codes(test::random_source& random, std::size_t count, unsigned bits) {
    std::vector<code_t> codes(count);
    for (code_t& code : codes) {
        code = static_cast<code_t>(random.integer(0, (std::size_t{1} << bits) - 1));
    }
    return codes;
}

std::vector<std::byte> random_bytes(test::random_source& random, std::size_t count) {
    std::vector<std::byte> bytes(count);
    for (std::byte& byte : bytes) {
        byte = static_cast<std::byte>(random.integer(0, 255));
    }
    return bytes;
}

static_assert(rvqkv::code_bits(1) == 1 && rvqkv::code_bits(2) == 1 && rvqkv::code_bits(3) == 2);
static_assert(rvqkv::code_bits(37) == 6 && rvqkv::code_bits(64) == 6 && rvqkv::code_bits(65) == 7);
static_assert(rvqkv::code_bits(256) == 8 && rvqkv::code_bits(257) == 9);
static_assert(rvqkv::code_bits(2048) == 11 && rvqkv::code_bits(2049) == 12);
static_assert(rvqkv::code_bits(rvqkv::max_codewords) == 16);

}  // namespace

TEST_CASE("code_bits: is the least number that tells all codewords apart", "[core][property]") {
    std::size_t wrong = 0;
    for (std::size_t codewords = 1; codewords <= rvqkv::max_codewords; ++codewords) {
        const unsigned bits = rvqkv::code_bits(codewords);
        const bool enough = (std::size_t{1} << bits) >= codewords;
        const bool least = bits == 1 || (std::size_t{1} << (bits - 1)) < codewords;
        wrong += enough && least ? 0 : 1;
    }
    CHECK(wrong == 0);
}

TEST_CASE("packed_bytes: rounds up to whole bytes", "[core][unit]") {
    CHECK(rvqkv::packed_bytes(0, 11) == 0);
    CHECK(rvqkv::packed_bytes(1, 1) == 1);
    CHECK(rvqkv::packed_bytes(8, 1) == 1);
    CHECK(rvqkv::packed_bytes(9, 1) == 2);
    CHECK(rvqkv::packed_bytes(32, 11) == 44);
    CHECK(rvqkv::packed_bytes(33, 11) == 46);
    CHECK(rvqkv::packed_bytes(7, 16) == 14);
}

TEST_CASE("pack_codes: sets the bits of its codes and no others, at every width and place", "[core][differential]") {
    CAPTURE(test::seed());
    test::random_source random(1);
    for (unsigned bits = 1; bits <= 16; ++bits) {
        for (std::size_t first = 0; first <= 17; ++first) {
            for (std::size_t count = 0; count <= 40; ++count) {
                CAPTURE(bits, first, count);
                // No byte more than promised, so that a sanitizer sees every access beyond.
                const std::vector<std::byte> before = random_bytes(random, rvqkv::packed_bytes(first + count, bits));
                const std::vector<code_t> codes = random_codes(random, count, bits);
                std::vector<std::byte> expected = before;
                pack_bit_by_bit(codes, bits, expected, first);
                std::vector<std::byte> packed = before;
                rvqkv::pack_codes(codes.data(), count, bits, packed.data(), first);
                REQUIRE(packed == expected);
                // The bytes that follow stay as well.
                packed = before;
                packed.push_back(std::byte{0x5a});
                rvqkv::pack_codes(codes.data(), count, bits, packed.data(), first);
                REQUIRE(packed.back() == std::byte{0x5a});
            }
        }
    }
}

TEST_CASE("unpack_codes: reads what bit by bit was written, at every width and place", "[core][differential]") {
    CAPTURE(test::seed());
    test::random_source random(2);
    for (unsigned bits = 1; bits <= 16; ++bits) {
        for (std::size_t first = 0; first <= 17; ++first) {
            for (std::size_t count = 0; count <= 40; ++count) {
                CAPTURE(bits, first, count);
                std::vector<std::byte> packed = random_bytes(random, rvqkv::packed_bytes(first + count, bits));
                const std::vector<code_t> codes = random_codes(random, count, bits);
                pack_bit_by_bit(codes, bits, packed, first);
                std::vector<code_t> read(count);
                rvqkv::unpack_codes(packed.data(), first, count, bits, read.data());
                REQUIRE(read == codes);
            }
        }
    }
}

TEST_CASE("pack_codes: extremes of every width come back", "[core][property]") {
    for (unsigned bits = 1; bits <= 16; ++bits) {
        const auto top = static_cast<code_t>((1U << bits) - 1);
        const std::vector<code_t> codes = {top, 0, top, top, 0, 0, 1, top};
        std::vector<std::byte> packed(rvqkv::packed_bytes(codes.size(), bits), std::byte{0xff});
        std::vector<code_t> read(codes.size());
        rvqkv::pack_codes(codes.data(), codes.size(), bits, packed.data());
        rvqkv::unpack_codes(packed.data(), 0, codes.size(), bits, read.data());
        CHECK(read == codes);
    }
}

TEST_CASE("pack_codes: a string written in pieces is the string written at once", "[core][property]") {
    CAPTURE(test::seed());
    test::random_source random(3);
    for (unsigned bits = 1; bits <= 16; ++bits) {
        CAPTURE(bits);
        const std::vector<code_t> codes = random_codes(random, 200, bits);
        std::vector<std::byte> whole(rvqkv::packed_bytes(codes.size(), bits));
        rvqkv::pack_codes(codes.data(), codes.size(), bits, whole.data());
        std::vector<std::byte> pieces = random_bytes(random, whole.size());
        std::vector<code_t> read(codes.size());
        for (std::size_t first = 0; first < codes.size();) {
            const std::size_t count = std::min<std::size_t>(random.integer(1, 9), codes.size() - first);
            rvqkv::pack_codes(codes.data() + first, count, bits, pieces.data(), first);
            rvqkv::unpack_codes(whole.data(), first, count, bits, read.data() + first);
            first += count;
        }
        CHECK(pieces.size() == whole.size());
        CHECK(read == codes);
        // Bits beyond the last code are nobody's: compare the codes.
        rvqkv::unpack_codes(pieces.data(), 0, codes.size(), bits, read.data());
        CHECK(read == codes);
    }
}

TEST_CASE("pack_codes: 8-bit codes are bytes, 16-bit codes little-endian words", "[core][unit]") {
    const std::vector<code_t> bytes = {0x01, 0xff, 0x80};
    std::vector<std::byte> packed(3);
    rvqkv::pack_codes(bytes.data(), 3, 8, packed.data());
    CHECK(packed == std::vector<std::byte>{std::byte{0x01}, std::byte{0xff}, std::byte{0x80}});
    const std::vector<code_t> words = {0x1234, 0xabcd};
    packed.resize(4);
    rvqkv::pack_codes(words.data(), 2, 16, packed.data());
    CHECK(packed == std::vector<std::byte>{std::byte{0x34}, std::byte{0x12}, std::byte{0xcd}, std::byte{0xab}});
}
