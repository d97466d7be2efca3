// SPDX-License-Identifier: MIT
/// @file
/// Sequences against a plain reference that holds every token by itself: random operations, with memory and without,
/// must leave both with the same tokens in the same tiers, bit for bit, and no page may be lost.
#include "rvqkv/cache/kv_cache.hpp"
#include "rvqkv/files/sequence_file.hpp"
#include "rvqkv/simd/convert.hpp"
#include "support/allocation_counter.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/page_sources.hpp"
#include "support/random.hpp"
#include "support/temp_dir.hpp"
#include "support/weights.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace {

using rvqkv::dtype;
using rvqkv::key_coding;
using rvqkv::kv_sequence;
using shared_codec = std::shared_ptr<const rvqkv::codec>;

/// Keys and values that tokens of some number have: a few rows, over and over.
class token_rows {
public:
    static constexpr std::size_t kinds = 256;

    token_rows(test::random_source& random, std::size_t width)
        : width_(width), rows_(test::gaussian_numbers(random, 2 * kinds * width)) {
        rows_[3 * width] = std::numeric_limits<float>::quiet_NaN();
        rows_[5 * width + 1] = -std::numeric_limits<float>::infinity();
        rows_[7 * width] = 1e9F;  // no float16
        std::copy_n(rows_.begin(), kinds * width, rows_.begin() + static_cast<std::ptrdiff_t>(kinds * width));
    }
    /// Rows of up to `kinds` tokens that follow each other.
    [[nodiscard]] const float* at(std::size_t token) const { return rows_.data() + token % kinds * width_; }
    [[nodiscard]] std::size_t width() const { return width_; }

private:
    std::size_t width_;
    std::vector<float> rows_;
};

/// One token of one layer, as the reference knows it.
struct token {
    std::size_t number = 0;  // what its rows are
    std::int64_t position = 0;
    std::int64_t given_position = 0;  // when it was appended
    std::int64_t coded_position = 0;
    std::size_t page = 0;
    std::size_t slot = 0;
    bool is_sink = false;
    bool is_coded = false;
    std::size_t key_depths = 0;
    std::size_t value_depths = 0;
};

/// A layer's configuration, and what its tokens must read as.
class model_layer {
public:
    model_layer(const rvqkv::kv_cache_config& cache, std::size_t number, test::random_source& random)
        : cache_(cache),
          config_(cache.layers[number]),
          keys_(random, config_.keys.heads * config_.keys.codec->head_dim()),
          values_(random, config_.values.heads * config_.values.codec->head_dim()) {
        if (config_.coding != key_coding::as_given) {
            rope_ = rvqkv::rope::create(config_.rope, config_.keys.codec->head_dim()).value();
        }
    }

    [[nodiscard]] const rvqkv::kv_layer_config& config() const { return config_; }
    [[nodiscard]] const token_rows& rows(bool is_keys) const { return is_keys ? keys_ : values_; }

    void append(std::vector<token>& tokens, std::size_t number) const {
        token next;
        next.number = number;
        next.is_sink = tokens.size() < cache_.sink_tokens;
        next.position = tokens.empty() ? 0 : tokens.back().position + 1;
        next.given_position = next.position;
        const bool continues = !tokens.empty() && !tokens.back().is_coded && tokens.back().is_sink == next.is_sink &&
                               tokens.back().slot + 1 < (next.is_sink ? cache_.sink_tokens : cache_.page_tokens);
        // Blocks begin where the last one is full, and behind the sinks.
        std::int64_t in_block = 0;
        if (!tokens.empty() && (next.is_sink || !tokens.back().is_sink)) {
            in_block = tokens.back().coded_position + 1;
        }
        const bool ends_block =
            config_.coding == key_coding::block_relative && in_block == static_cast<std::int64_t>(config_.block_tokens);
        if (continues && !ends_block) {
            next.page = tokens.back().page;
            next.slot = tokens.back().slot + 1;
            next.coded_position = turns() ? tokens.back().coded_position + 1 : 0;
        } else {
            next.page = ++pages_;
            next.coded_position = config_.coding == key_coding::after_rope                      ? next.position
                                  : config_.coding == key_coding::block_relative && !ends_block ? in_block
                                                                                                : 0;
        }
        tokens.push_back(next);
        encode_old(tokens);
    }
    static void demote(std::vector<token>& tokens, std::size_t before, std::size_t key_depths,
                       std::size_t value_depths) {
        for (std::size_t first = 0, end = 0; first < tokens.size(); first = end) {
            while (end < tokens.size() && tokens[end].page == tokens[first].page) {
                ++end;
            }
            for (std::size_t i = first; i < end && end <= before && tokens[i].is_coded; ++i) {
                tokens[i].key_depths = std::min(tokens[i].key_depths, key_depths);
                tokens[i].value_depths = std::min(tokens[i].value_depths, value_depths);
            }
        }
    }
    static void evict(std::vector<token>& tokens, std::size_t first, std::size_t last, bool shift) {
        const auto at = [&](std::size_t i) { return tokens.begin() + static_cast<std::ptrdiff_t>(i); };
        tokens.erase(at(first), at(last));
        for (std::size_t i = first; shift && i < tokens.size(); ++i) {
            tokens[i].position -= static_cast<std::int64_t>(last - first);
        }
    }

    /// What a side of a token reads as, from its first depths.
    [[nodiscard]] std::vector<float> read(const token& of, bool is_keys, std::size_t depths) const {
        const rvqkv::kv_side_config& side = is_keys ? config_.keys : config_.values;
        const token_rows& given = rows(is_keys);
        std::vector<float> row(given.at(of.number), given.at(of.number) + given.width());
        for (float& x : row) {
            x = std::isfinite(x) ? x : 0.0F;
        }
        if (is_keys) {
            turn(row, of, true);
        }
        for (float& x : row) {
            x = round(x);
        }
        if (of.is_coded) {
            const std::vector<float> mean = is_keys ? turned_mean(of) : std::vector<float>();
            for (std::size_t i = 0; i < mean.size(); ++i) {
                row[i] -= mean[i];
            }
            const std::size_t held = is_keys ? of.key_depths : of.value_depths;
            row = round_trip(*side.codec, side.heads, row, std::min(depths, held));
            for (std::size_t i = 0; i < mean.size(); ++i) {
                row[i] += mean[i];
            }
        }
        if (is_keys) {
            turn(row, of, false);
        }
        return row;
    }
    /// A head's key or query as rotary embedding leaves it, from the state in which it is given.
    [[nodiscard]] std::vector<float> turned(std::vector<float> head, std::int64_t position) const {
        if (config_.coding != key_coding::as_given && !config_.turned_input) {
            rope_.turn({head.data(), 1, head.size(), head.size()}, position, 1);
        }
        return head;
    }

private:
    [[nodiscard]] bool turns() const {
        return config_.coding == key_coding::after_rope || config_.coding == key_coding::block_relative;
    }
    [[nodiscard]] float round(float x) const {
        if (cache_.exact_type == dtype::bfloat16) {
            return rvqkv::to_float(rvqkv::to_bfloat16(x));
        }
        return rvqkv::to_float(rvqkv::to_float16(std::clamp(x, -65504.0F, 65504.0F)));
    }
    /// From what is given to what is stored, or back.
    void turn(std::vector<float>& row, const token& of, bool stores) const {
        const std::size_t dim = config_.keys.codec->head_dim();
        const rvqkv::matrix_view<float> heads{row.data(), config_.keys.heads, dim, dim};
        if (config_.coding == key_coding::before_rope && config_.turned_input) {
            stores ? rope_.turn_back(heads, of.given_position, heads.rows) : rope_.turn(heads, of.position, heads.rows);
        }
        if (!turns()) {
            return;
        }
        if (!config_.turned_input) {
            stores ? rope_.turn(heads, of.coded_position, heads.rows)
                   : rope_.turn_back(heads, of.coded_position, heads.rows);
            return;
        }
        const std::int64_t distance = stores ? of.coded_position - of.given_position : of.position - of.coded_position;
        if (distance != 0) {
            rope_.shift(heads, distance);
        }
    }

    [[nodiscard]] std::vector<float> turned_mean(const token& of) const {
        std::vector<float> mean = config_.key_mean;
        const std::size_t dim = config_.keys.codec->head_dim();
        if (!mean.empty() && turns()) {
            rope_.turn({mean.data(), config_.keys.heads, dim, dim}, of.coded_position, config_.keys.heads);
        }
        return mean;
    }
    [[nodiscard]] static std::vector<float> round_trip(const rvqkv::codec& codec, std::size_t heads,
                                                       const std::vector<float>& row, std::size_t depths) {
        std::vector<rvqkv::code_t> codes(heads * codec.groups() * codec.depths());
        std::vector<float> scales(heads);
        std::vector<float> out(row.size());
        rvqkv::quantizer_workspace workspace;
        const rvqkv::tensor_shape shape{1, heads, codec.head_dim()};
        const rvqkv::code_strides strides{codec.depths(), 1};
        codec.encode({row.data(), shape}, {codes.data(), strides, scales.data()}, workspace).value();
        codec.decode({codes.data(), strides, scales.data()}, {out.data(), shape}, depths, workspace).value();
        return out;
    }
    /// Pages become codes as a whole.
    void encode_old(std::vector<token>& tokens) const {
        std::size_t first = tokens.size();
        for (std::size_t end = first; end > 0 && !tokens[end - 1].is_coded; end = first) {
            const token& last = tokens[end - 1];
            while (first > 0 && tokens[first - 1].page == last.page) {
                --first;
            }
            const bool is_closed = end != tokens.size() || last.slot + 1 == cache_.page_tokens ||
                                   (config_.coding == key_coding::block_relative &&
                                    last.coded_position + 1 == static_cast<std::int64_t>(config_.block_tokens));
            if (last.is_sink || !is_closed || tokens.size() - end < cache_.recent_tokens) {
                continue;
            }
            for (std::size_t i = first; i < end; ++i) {
                tokens[i].is_coded = true;
                tokens[i].key_depths = config_.keys.codec->depths();
                tokens[i].value_depths = config_.values.codec->depths();
            }
        }
    }

    const rvqkv::kv_cache_config& cache_;
    const rvqkv::kv_layer_config& config_;
    token_rows keys_;
    token_rows values_;
    rvqkv::rope rope_;
    mutable std::size_t pages_ = 0;
};

shared_codec small_codec(test::random_source& random, std::size_t head_dim, rvqkv::codebook_shape shape,
                         rvqkv::scale_kind scale) {
    rvqkv::codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = shape;
    spec.scale = scale;
    return rvqkv::make_codec<float>(spec, test::make_weights(random, shape)).value();
}

/// Layers of every kind, with sizes that make pages fill and windows close soon.
rvqkv::kv_cache_config make_config(test::random_source& random, rvqkv::page_source& source) {
    constexpr std::size_t sinks[] = {0, 1, 4, 4};
    constexpr std::size_t recents[] = {0, 1, 64, 100};
    constexpr key_coding codings[] = {key_coding::as_given, key_coding::before_rope, key_coding::after_rope,
                                      key_coding::block_relative};
    const auto pick = [&](const auto& choices) { return choices[random.integer(0, std::size(choices) - 1)]; };
    const shared_codec keys = small_codec(random, 8, {2, 5, 4}, rvqkv::scale_kind::std_dev);
    const shared_codec values = small_codec(random, 6, {3, 4, 2}, rvqkv::scale_kind::none);
    rvqkv::kv_cache_config config;
    config.page_tokens = random.integer(0, 3) == 0 ? 128 : 64;
    config.sink_tokens = pick(sinks);
    config.recent_tokens = pick(recents);
    config.exact_type = random.integer(0, 1) == 0 ? dtype::float16 : dtype::bfloat16;
    config.source = &source;
    config.layers.resize(5);
    for (const std::size_t layer : {0U, 1U, 4U}) {
        rvqkv::kv_layer_config& each = config.layers[layer];
        each.keys = {keys, 2};
        each.values = {values, 2};
        each.query_heads = random.integer(0, 1) == 0 ? 0 : 6;
        each.coding = layer == 0 ? key_coding::as_given : pick(codings);
        each.turned_input = random.integer(0, 1) == 0;
        each.rope.base = 100.0;
        each.rope.attention_factor = random.integer(0, 1) == 0 ? 1.0 : 1.25;
        each.block_tokens = config.page_tokens * random.integer(1, 2);
        if (random.integer(0, 1) == 0) {
            each.key_mean = test::gaussian_numbers(random, 2 * 8);
        }
    }
    config.layers[3].shares_layer = 1;
    config.layers[3].query_heads = 4;
    config.layers[4].sliding_window = random.integer(1, 150);
    return config;
}

/// A sequence, and what it must hold.
struct pair_of_both {
    kv_sequence real;
    std::vector<std::vector<token>> model;  // by layer
};

/// A file, and what it must hold; nothing before the first save.
struct saved_sequence {
    std::filesystem::path path;
    std::vector<std::vector<token>> model;
};

class world {
public:
    /// With `fails`, memory runs out now and then.
    world(test::random_source& random, bool fails)
        : random_(random),
          fails_(fails),
          config_(make_config(random, source_)),
          cache_(rvqkv::kv_cache::create(config_).value()),
          workspace_(cache_->make_workspace().value()),
          attention_(cache_->make_attention_workspace(most_queries).value()) {
        for (const std::size_t layer : owners) {
            layers_[layer].emplace(config_, layer, random);
        }
        sequences_.push_back({cache_->new_sequence().value(), std::vector<std::vector<token>>(config_.layers.size())});
    }

    void run(std::size_t operations) {
        for (std::size_t i = 0; i < operations; ++i) {
            pair_of_both& both = sequences_[random_.integer(0, sequences_.size() - 1)];
            step(both);
            check_some(sequences_[random_.integer(0, sequences_.size() - 1)]);
            if (i % 8 == 7) {
                check_attention(sequences_[random_.integer(0, sequences_.size() - 1)]);
            }
            if (i % 512 == 511) {
                check_all(sequences_[random_.integer(0, sequences_.size() - 1)]);
            }
        }
        for (const pair_of_both& both : sequences_) {
            check_all(both);
        }
        sequences_.clear();
        REQUIRE(cache_->bytes().pages == 0);
        cache_->release_free_pages();
        REQUIRE(source_.live_bytes == 0);
        REQUIRE((failures_ > 0) == fails_);
    }

private:
    static constexpr std::array<std::size_t, 3> owners = {0, 1, 4};
    static constexpr std::size_t windowed = 4;
    static constexpr std::size_t most_tokens = 500;
    static constexpr std::size_t most_queries = 3;

    [[nodiscard]] std::size_t least_tokens(const pair_of_both& both) const {
        std::size_t least = most_tokens;
        for (const std::size_t layer : owners) {
            least = std::min(least, both.model[layer].size());
        }
        return least;
    }

    /// Does something that may run out of memory, and says whether it was done; if not, nothing must have changed.
    template <class Operation>
    [[nodiscard]] bool attempt(const Operation& operation) {
        if (!fails_) {
            const rvqkv::status done = operation();
            INFO((done.ok() ? "ok" : done.error().message));
            REQUIRE(done.ok());
            return true;
        }
        const std::size_t pages = cache_->bytes().pages;
        const std::size_t nth = random_.integer(0, 8);
        const std::size_t kind = random_.integer(0, 2);
        bool failed = false;
        bool done = false;
        source_.failed = false;
        source_.until_failure = kind == 0 ? nth : test::counting_source::never;
        if (kind == 1) {
            const test::failing_allocations failing(nth);
            done = operation().ok();
            failed = failing.triggered();
        } else {
            done = operation().ok();
            failed = source_.failed;
        }
        source_.until_failure = test::counting_source::never;
        REQUIRE((done || failed));
        if (!done) {
            ++failures_;
            REQUIRE(cache_->bytes().pages == pages);
        }
        return done;
    }

    void step(pair_of_both& both) {
        const std::size_t choice = random_.integer(0, 99);
        if (choice < 8) {
            truncate(both);
        } else if (choice < 15) {
            evict(both);
        } else if (choice < 21) {
            fork(both);
        } else if (choice < 25) {
            demote(both);
        } else if (choice < 28) {
            demote_to(both);
        } else if (choice < 31) {
            const std::size_t tokens = random_.integer(0, most_tokens);
            (void)attempt([&] { return both.real.reserve(tokens); });
        } else if (choice < 33) {
            both.real.release_spare_pages();
        } else if (choice == 33) {
            both.real.clear();
            for (std::vector<token>& tokens : both.model) {
                tokens.clear();
            }
        } else if (choice == 34) {
            kv_sequence moved = std::move(both.real);
            both.real = std::move(moved);
        } else if (choice == 35) {
            cache_->release_free_pages();
        } else if (choice == 36 && random_.integer(0, 3) == 0) {  // rare: a file takes as long as a hundred others
            save(both);
        } else if (choice == 37 && random_.integer(0, 3) == 0) {
            restore(both);
        } else {
            append(both);
        }
    }

    void append(pair_of_both& both) {
        constexpr std::size_t mosts[] = {1, 1, 1, 8, 70, token_rows::kinds};
        const std::size_t count = random_.integer(1, mosts[random_.integer(0, std::size(mosts) - 1)]);
        const std::size_t number = random_.integer(0, token_rows::kinds - 1);
        const bool all = random_.integer(0, 9) != 0;
        for (const std::size_t layer : owners) {
            if (both.model[layer].size() + count > most_tokens || (!all && random_.integer(0, 1) == 0)) {
                continue;
            }
            const model_layer& model = *layers_[layer];
            const auto view = [&](bool is_keys) {
                const rvqkv::kv_side_config& side = is_keys ? model.config().keys : model.config().values;
                return rvqkv::tensor_view(model.rows(is_keys).at(number), {count, side.heads, side.codec->head_dim()});
            };
            const rvqkv::tensor_view keys = view(true);
            const rvqkv::tensor_view values = view(false);
            rvqkv::kv_encode_report report;
            if (attempt([&] { return both.real.append(layer, keys, values, workspace_, &report); })) {
                for (std::size_t i = 0; i < count; ++i) {
                    model.append(both.model[layer], number + i);
                }
                REQUIRE(report.keys.nonfinite_rows == nonfinite(model.rows(true), number, count));
                REQUIRE(report.values.nonfinite_rows == nonfinite(model.rows(false), number, count));
            } else {
                REQUIRE(report.keys.nonfinite_rows + report.values.nonfinite_rows == 0);
            }
        }
    }
    [[nodiscard]] static std::size_t nonfinite(const token_rows& rows, std::size_t number, std::size_t count) {
        std::size_t found = 0;
        for (std::size_t i = 0; i < count; ++i) {
            const float* const row = rows.at(number + i);
            found += std::all_of(row, row + rows.width(), [](float x) { return std::isfinite(x); }) ? 0 : 1;
        }
        return found;
    }

    /// Whether the windowed layer's next token would see tokens that are gone.
    [[nodiscard]] bool cuts_window(const pair_of_both& both, std::size_t kept) const {
        const std::vector<token>& tokens = both.model[windowed];
        const std::size_t dropped = both.real.first_token(windowed);
        return dropped != 0 && kept != 0 && kept != tokens.size() &&
               (kept <= dropped || tokens[dropped].position > first_seen(tokens[kept - 1].position + 1));
    }
    [[nodiscard]] bool evicts_window(const pair_of_both& both, std::size_t first, std::size_t last, bool shift) const {
        const std::vector<token>& tokens = both.model[windowed];
        const std::size_t dropped = both.real.first_token(windowed);
        if (last == tokens.size()) {
            return cuts_window(both, first);
        }
        if (!shift || first == last || first == 0 || dropped == 0 || last <= dropped) {
            return false;
        }
        const auto gap = static_cast<std::int64_t>(last - first);
        const std::int64_t seen = first_seen(tokens.back().position + 1 - gap);
        return tokens[last].position - gap > seen && (first <= dropped || tokens[dropped].position > seen);
    }
    [[nodiscard]] std::int64_t first_seen(std::int64_t position) const {
        return position - static_cast<std::int64_t>(config_.layers[windowed].sliding_window) + 1;
    }

    void truncate(pair_of_both& both) {
        if (random_.integer(0, 3) == 0) {
            const std::size_t layer = owners[random_.integer(0, owners.size() - 1)];
            std::vector<token>& tokens = both.model[layer];
            const std::size_t kept = tokens.size() - random_.integer(0, std::min<std::size_t>(tokens.size(), 40));
            const bool is_bad = layer == windowed && cuts_window(both, kept);
            REQUIRE(both.real.truncate(layer, kept).ok() == !is_bad);
            tokens.resize(is_bad ? tokens.size() : kept);
            return;
        }
        const std::size_t least = least_tokens(both);
        const std::size_t kept = random_.integer(0, 4) == 0
                                     ? random_.integer(0, least)
                                     : least - random_.integer(0, std::min<std::size_t>(least, 8));
        const bool is_bad = cuts_window(both, kept);
        REQUIRE(both.real.truncate(kept).ok() == !is_bad);
        for (std::vector<token>& tokens : both.model) {
            tokens.resize(is_bad ? tokens.size() : std::min(tokens.size(), kept));
        }
    }

    void evict(pair_of_both& both) {
        const std::size_t least = least_tokens(both);
        const std::size_t first = random_.integer(0, least);
        const std::size_t last = random_.integer(first, std::min(least, first + random_.integer(0, 150)));
        const bool shift = random_.integer(0, 3) != 0;
        if (evicts_window(both, first, last, shift)) {
            REQUIRE_FALSE(both.real.evict(first, last, shift).ok());
            return;
        }
        if (attempt([&] { return both.real.evict(first, last, shift); })) {
            for (const std::size_t layer : owners) {
                model_layer::evict(both.model[layer], first, last, shift);
            }
        }
    }

    void fork(pair_of_both& both) {
        if (sequences_.size() >= 5) {
            const std::size_t gone = random_.integer(0, sequences_.size() - 1);
            std::swap(sequences_[gone], sequences_.back());
            sequences_.pop_back();
            return;
        }
        std::optional<kv_sequence> made;
        if (attempt([&]() -> rvqkv::status {
                auto forked = both.real.fork();
                if (!forked) {
                    return forked.error();
                }
                made = std::move(forked).value();
                return {};
            })) {
            std::vector<std::vector<token>> copy = both.model;
            sequences_.push_back({std::move(*made), std::move(copy)});
        }
    }

    /// What handles files may also say by exception that there is no memory: its strings do.
    template <class Operation>
    [[nodiscard]] static rvqkv::status with_strings(const Operation& operation) {
        try {
            return operation();
        } catch (const std::bad_alloc&) {
            return rvqkv::error{rvqkv::error_code::out_of_memory, {}};
        }
    }
    /// A save that fails leaves what was saved there before.
    void save(const pair_of_both& both) {
        saved_sequence& to = saved_[random_.integer(0, saved_.size() - 1)];
        const rvqkv::save_sequence_options options{random_.integer(0, 2) != 0};
        if (attempt([&] { return with_strings([&] { return rvqkv::save_sequence(both.real, to.path, options); }); })) {
            to.model = both.model;
        }
    }
    /// What was saved last, of whichever sequence, takes the place of a sequence.
    void restore(pair_of_both& both) {
        const saved_sequence& from = saved_[random_.integer(0, saved_.size() - 1)];
        if (from.model.empty()) {
            return;
        }
        std::optional<kv_sequence> made;
        const auto load = [&]() -> rvqkv::status {
            auto loaded = rvqkv::load_sequence(*cache_, from.path);
            if (!loaded) {
                return loaded.error();
            }
            made = std::move(loaded).value();
            return {};
        };
        if (attempt([&] { return with_strings(load); })) {
            both = {std::move(*made), from.model};
        }
    }

    void demote(pair_of_both& both) {
        const std::size_t before = random_.integer(0, most_tokens);
        const std::size_t key_depths = random_.integer(1, 3);
        const std::size_t value_depths = random_.integer(1, 3);
        if (attempt([&] { return both.real.demote(before, key_depths, value_depths); })) {
            for (const std::size_t layer : owners) {
                model_layer::demote(both.model[layer], before, key_depths, value_depths);
            }
        }
    }
    void demote_to(pair_of_both& both) {
        if (fails_) {
            return;
        }
        const std::size_t total = both.real.bytes().total();
        const std::size_t most = total - random_.integer(0, total / 8);
        const auto before = both.real.demote_to(most, 1, 1);
        if (before.ok()) {
            REQUIRE(both.real.bytes().total() <= most);
            for (const std::size_t layer : owners) {
                model_layer::demote(both.model[layer], before.value(), 1, 1);
            }
        } else {
            REQUIRE(both.real.bytes().total() == total);
        }
    }

    // ---- Comparing ----

    void check_counts(const pair_of_both& both) const {
        for (std::size_t layer = 0; layer < config_.layers.size(); ++layer) {
            const std::vector<token>& tokens = both.model[layer == 3 ? 1 : layer];
            REQUIRE(both.real.tokens(layer) == tokens.size());
            REQUIRE(both.real.next_position(layer) == (tokens.empty() ? 0 : tokens.back().position + 1));
        }
    }
    void check_some(const pair_of_both& both) {
        check_counts(both);
        const std::size_t layer = owners[random_.integer(0, owners.size() - 1)];
        const std::size_t tokens = both.model[layer].size();
        const std::size_t first = std::max(both.real.first_token(layer), random_.integer(0, tokens));
        check_range(both, layer, first, std::min<std::size_t>(tokens - first, random_.integer(1, 4)),
                    random_.integer(0, 1) == 0, random_.integer(0, 2));
    }
    void check_all(const pair_of_both& both) {
        check_counts(both);
        for (const std::size_t layer : owners) {
            const std::size_t first = both.real.first_token(layer);
            for (const bool is_keys : {true, false}) {
                check_range(both, layer, first, both.model[layer].size() - first, is_keys, kv_sequence::all_depths);
            }
        }
    }
    void check_range(const pair_of_both& both, std::size_t layer, std::size_t first, std::size_t count, bool is_keys,
                     std::size_t depths) {
        const model_layer& model = *layers_[layer];
        const rvqkv::kv_side_config& side = is_keys ? model.config().keys : model.config().values;
        const std::size_t width = side.heads * side.codec->head_dim();
        std::vector<float> out(count * width);
        const rvqkv::mutable_tensor_view view(out.data(), {count, side.heads, side.codec->head_dim()});
        REQUIRE((is_keys ? both.real.reconstruct_keys(layer == 1 ? random_.integer(0, 1) * 2 + 1 : layer, first, view,
                                                      workspace_, depths)
                         : both.real.reconstruct_values(layer, first, view, workspace_, depths))
                    .ok());
        for (std::size_t i = 0; i < count; ++i) {
            const std::vector<float> expected = model.read(both.model[layer][first + i], is_keys, depths);
            const std::span<const float> got(out.data() + i * width, width);
            if (test::bits_of(got) != test::bits_of(expected)) {
                CAPTURE(layer, first + i, is_keys, depths, both.model[layer][first + i].is_coded,
                        static_cast<int>(model.config().coding), model.config().turned_input);
                REQUIRE(std::vector<float>(got.begin(), got.end()) == expected);
            }
        }
    }

    /// Attention of the last tokens of a layer, against the same in double over what the reference holds.
    void check_attention(const pair_of_both& both) {
        constexpr std::array<std::size_t, 4> readers = {0, 1, 3, 4};
        const std::size_t layer = readers[random_.integer(0, readers.size() - 1)];
        const model_layer& model = *layers_[layer == 3 ? 1 : layer];
        const std::vector<token>& tokens = both.model[layer == 3 ? 1 : layer];
        const std::size_t queries = random_.integer(0, std::min<std::size_t>(tokens.size(), most_queries));
        const rvqkv::kv_layer_config& config = config_.layers[layer];
        const std::size_t heads = model.config().keys.heads;
        const std::size_t query_heads = config.query_heads == 0 ? heads : config.query_heads;
        const std::size_t key_dim = model.config().keys.codec->head_dim();
        const std::size_t value_dim = model.config().values.codec->head_dim();
        const std::vector<float> given = test::gaussian_numbers(random_, queries * query_heads * key_dim);
        std::vector<float> out(queries * query_heads * value_dim, -1.0F);
        rvqkv::attention_options options;
        const bool is_rounded = random_.integer(0, 1) == 0;
        options.reading = is_rounded ? rvqkv::code_reading::quickest : rvqkv::code_reading::reconstructed;
        REQUIRE(both.real.attend(layer, {given.data(), {queries, query_heads, key_dim}},
                                 {out.data(), {queries, query_heads, value_dim}}, attention_, options));
        std::vector<std::vector<float>> keys;
        std::vector<std::vector<float>> values;
        const std::size_t first = both.real.first_token(layer);
        for (std::size_t j = first; queries != 0 && j < tokens.size(); ++j) {
            keys.push_back(model.read(tokens[j], true, kv_sequence::all_depths));
            values.push_back(model.read(tokens[j], false, kv_sequence::all_depths));
        }
        for (std::size_t i = 0; i < queries * query_heads; ++i) {
            const std::int64_t position = tokens.back().position + 1 - static_cast<std::int64_t>(queries) +
                                          static_cast<std::int64_t>(i / query_heads);
            const std::size_t head = i % query_heads / (query_heads / heads);
            const std::vector<float> query =
                model.turned({given.data() + i * key_dim, given.data() + (i + 1) * key_dim}, position);
            std::vector<double> scores(keys.size(), -std::numeric_limits<double>::infinity());
            double top = scores.empty() ? 0.0 : scores[0];
            double largest = 0.0;
            for (std::size_t j = 0; j < keys.size(); ++j) {
                const std::int64_t distance = position - tokens[first + j].position;
                if (distance < 0 ||
                    (config.sliding_window != 0 && distance >= static_cast<std::int64_t>(config.sliding_window))) {
                    continue;
                }
                const std::vector<float> key =
                    model.turned({keys[j].data() + head * key_dim, keys[j].data() + (head + 1) * key_dim},
                                 tokens[first + j].position);
                double score = 0.0;
                double size = 0.0;  // what rounding grows with
                for (std::size_t c = 0; c < key_dim; ++c) {
                    score += static_cast<double>(query[c]) * static_cast<double>(key[c]);
                    size += std::fabs(static_cast<double>(query[c]) * static_cast<double>(key[c]));
                }
                scores[j] = score / std::sqrt(static_cast<double>(key_dim));
                top = std::max(top, scores[j]);
                largest = std::max(largest, size);
            }
            if (largest > (is_rounded ? 20.0 : 300.0)) {
                continue;  // tables, or float32, cannot tell such scores apart
            }
            if (std::isinf(top)) {  // a query in a gap as wide as its window sees no token
                for (std::size_t c = 0; c < value_dim; ++c) {
                    REQUIRE(out[i * value_dim + c] == 0.0F);
                }
                continue;
            }
            double total = 0.0;
            std::vector<double> expected(value_dim, 0.0);
            std::vector<double> sizes(value_dim, 0.0);
            for (std::size_t j = 0; j < keys.size(); ++j) {
                const double weight = std::exp(scores[j] - top);
                total += weight;
                for (std::size_t c = 0; c < value_dim; ++c) {
                    const double value = static_cast<double>(values[j][head * value_dim + c]);
                    expected[c] += weight * value;
                    sizes[c] += weight * std::fabs(value);
                }
            }
            const double size = *std::max_element(sizes.begin(), sizes.end());
            for (std::size_t c = 0; c < value_dim; ++c) {
                const double got = static_cast<double>(out[i * value_dim + c]);
                CAPTURE(layer, i, c, queries, tokens.size(), static_cast<int>(model.config().coding), total);
                REQUIRE(std::fabs(got - expected[c] / total) <=
                        (is_rounded ? 0.1 * size : 1e-3 * sizes[c]) / total + 1e-6);
            }
        }
    }

    test::random_source& random_;
    bool fails_;
    std::size_t failures_ = 0;
    test::counting_source source_;
    rvqkv::kv_cache_config config_;
    std::optional<rvqkv::kv_cache> cache_;
    rvqkv::kv_workspace workspace_;
    rvqkv::attention_workspace attention_;
    std::array<std::optional<model_layer>, 5> layers_;
    std::vector<pair_of_both> sequences_;
    test::temp_dir folder_;
    std::array<saved_sequence, 2> saved_{{{folder_.path() / "one", {}}, {folder_.path() / "other", {}}}};
};

void run_worlds(std::size_t operations, bool fails) {
    constexpr std::size_t each = 2000;
    for (std::size_t done = 0, i = 0; done < operations; done += each, ++i) {
        test::random_source random((fails ? 1000 : 0) + i);
        CAPTURE(test::seed(), i);
        world(random, fails).run(std::min(each, operations - done));
    }
}

}  // namespace

TEST_CASE("kv_sequence: a million random operations leave what a plain reference holds", "[cache][model][slow]") {
    run_worlds(test::rounds(1000000, 2000), false);
}

TEST_CASE("kv_sequence: random operations that run out of memory change nothing and lose no page",
          "[cache][fault][slow]") {
    run_worlds(test::rounds(200000, 2000), true);
}

TEST_CASE("kv_sequence: some random operations, with memory and without", "[cache][property]") {
    run_worlds(4000, false);
    run_worlds(2000, true);
}
