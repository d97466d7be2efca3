// SPDX-License-Identifier: MIT
/// @file
/// What caches and sequences say of the memory that they hold.
#pragma once

#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/cache/page_pool.hpp"
#include "rvqkv/core/config.hpp"

#include <cstddef>

RVQKV_NAMESPACE_BEGIN

/// Memory that a sequence refers to, in bytes. A page counts whole as soon as it holds one token, and in each of the
/// sequences that share it.
struct kv_sequence_bytes {
    std::size_t codes = 0;        ///< Of pages of codes.
    std::size_t scales = 0;       ///< Of pages of codes.
    std::size_t exact = 0;        ///< Pages of exact tokens: sinks, and recent ones.
    std::size_t overhead = 0;     ///< What the pool keeps with each page, and padding at its end.
    std::size_t page_tables = 0;  ///< Lists of runs, and the sequence's record of each layer.
    std::size_t spare = 0;        ///< Pages kept for later tokens, with their overhead: see `kv_sequence::reserve`.
    /// Sum of the above.
    [[nodiscard]] std::size_t total() const noexcept { return codes + scales + exact + overhead + page_tables + spare; }

    /// Counts a page.
    void add(const page_format& format) noexcept {
        overhead += page_pool::header_bytes;
        if (format.is_exact) {
            exact += format.bytes;
            return;
        }
        const coded_layout& keys = format.coded_keys;
        const coded_layout& values = format.coded_values;
        codes += keys.code_bytes() + values.code_bytes();
        scales += keys.scale_bytes() + values.scale_bytes();
        overhead += format.bytes - values.end();
    }
};

/// Memory that a cache holds, in bytes; lists of runs, which belong to its sequences, are not in it.
struct kv_cache_bytes {
    std::size_t pages = 0;       ///< That a sequence refers to or keeps, with what the pool keeps with each.
    std::size_t free_pages = 0;  ///< That any sequence may take.
    std::size_t layers = 0;      ///< Formats, and the cache's record of each layer.
    /// Sum of the above: all memory that the cache has asked of its source, and of `operator new`. The codecs, which
    /// others may share, are not in it.
    [[nodiscard]] std::size_t total() const noexcept { return pages + free_pages + layers; }
    std::size_t codecs = 0;  ///< Not in the total: the codecs, each counted once (`codec::bytes`).
};

RVQKV_NAMESPACE_END
