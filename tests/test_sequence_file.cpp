// SPDX-License-Identifier: MIT
/// @file
/// Saved sequences: what is saved goes on as if it had never left memory; nothing else is taken for it; and whatever
/// interrupts a save leaves the old file or the new one.
#include "rvqkv/files/safetensors.hpp"
#include "rvqkv/files/sequence_file.hpp"
#include "support/allocation_counter.hpp"
#include "support/catch.hpp"
#include "support/page_sources.hpp"
#include "support/random.hpp"
#include "support/temp_dir.hpp"
#include "support/weights.hpp"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

using rvqkv::error_code;
using rvqkv::key_coding;
using rvqkv::kv_cache;
using rvqkv::kv_cache_config;
using rvqkv::kv_sequence;
using rvqkv::load_sequence;
using rvqkv::save_sequence;
using rvqkv::detail::saved_page;
using rvqkv::detail::saved_run;
using rvqkv::detail::sequence_record;
using rvqkv::detail::sequence_table;
using shared_codec = std::shared_ptr<const rvqkv::codec>;

constexpr rvqkv::save_sequence_options incrementally{true};

std::span<const std::byte> bytes_of(std::string_view text) {
    return std::as_bytes(std::span<const char>(text));
}

shared_codec make_codec(std::size_t head_dim, rvqkv::codebook_shape shape, rvqkv::scale_kind scale,
                        std::uint64_t salt = 1) {
    test::random_source random(salt);
    rvqkv::codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = shape;
    spec.scale = scale;
    return rvqkv::make_codec<float>(spec, test::make_weights(random, shape)).value();
}

/// Layers of every kind: own cache, none, shared, sliding window.
kv_cache_config make_config(key_coding coding = key_coding::after_rope, bool turned_input = true) {
    const shared_codec keys = make_codec(8, {2, 5, 4}, rvqkv::scale_kind::std_dev);
    const shared_codec values = make_codec(6, {3, 4, 2}, rvqkv::scale_kind::none);
    kv_cache_config config;
    config.layers.resize(5);
    for (const std::size_t layer : {0U, 1U, 4U}) {
        config.layers[layer].keys = {keys, 2};
        config.layers[layer].values = {values, 2};
    }
    config.layers[1].coding = coding;
    config.layers[1].turned_input = turned_input;
    config.layers[1].block_tokens = 128;
    config.layers[1].key_mean = std::vector<float>(16, 0.25F);
    config.layers[3].shares_layer = 1;
    config.layers[4].sliding_window = 70;
    return config;
}

/// One small layer, for tests that go through every byte.
kv_cache_config make_small_config() {
    kv_cache_config config;
    config.sink_tokens = 1;
    config.recent_tokens = 3;
    config.layers = {{{make_codec(4, {1, 3, 4}, rvqkv::scale_kind::std_dev), 1},
                      {make_codec(2, {1, 3, 2}, rvqkv::scale_kind::none, 2), 1}}};
    config.layers[0].coding = key_coding::before_rope;
    return config;
}

kv_cache make_cache(const kv_cache_config& config) {
    return kv_cache::create(config).value();
}

void append(kv_sequence& sequence, std::size_t tokens, std::uint64_t salt) {
    rvqkv::kv_workspace workspace;
    test::random_source random(salt);
    for (std::size_t layer = 0; layer < sequence.layers(); ++layer) {
        const rvqkv::kv_layer_config& config = sequence.layer_config(layer);
        if (config.is_empty()) {
            continue;
        }
        const auto x = [&](const rvqkv::kv_side_config& side) {
            return test::gaussian_numbers(random, tokens * side.heads * side.codec->head_dim());
        };
        const std::vector<float> keys = x(config.keys);
        const std::vector<float> values = x(config.values);
        sequence
            .append(layer, {keys.data(), {tokens, config.keys.heads, config.keys.codec->head_dim()}},
                    {values.data(), {tokens, config.values.heads, config.values.codec->head_dim()}}, workspace)
            .value();
    }
}

/// Tokens of a layer as they read, from index `first` to `end`.
std::vector<float> read(const kv_sequence& sequence, std::size_t layer, bool is_keys, std::size_t first,
                        std::size_t end) {
    rvqkv::kv_workspace workspace;
    const rvqkv::kv_layer_config* config = &sequence.layer_config(layer);
    if (config->shares_layer != rvqkv::kv_layer_config::no_layer) {
        config = &sequence.layer_config(config->shares_layer);
    }
    const rvqkv::kv_side_config& side = is_keys ? config->keys : config->values;
    const std::size_t width = side.heads * (side.codec == nullptr ? 0 : side.codec->head_dim());
    std::vector<float> out((end - first) * width);
    if (width != 0) {
        const rvqkv::mutable_tensor_view view(out.data(), {end - first, side.heads, side.codec->head_dim()});
        (is_keys ? sequence.reconstruct_keys(layer, first, view, workspace)
                 : sequence.reconstruct_values(layer, first, view, workspace))
            .value();
    }
    return out;
}

bool equal_runs(const rvqkv::page_run& a, const rvqkv::page_run& b) {
    return a.first == b.first && a.tokens == b.tokens && a.position == b.position &&
           a.coded_position == b.coded_position && a.format->is_exact == b.format->is_exact &&
           a.format->tokens == b.format->tokens && a.format->bytes == b.format->bytes;
}

bool equal(const kv_sequence& a, const kv_sequence& b) {
    bool same = a.layers() == b.layers();
    for (std::size_t i = 0; same && i < a.layers(); ++i) {
        same = a.tokens(i) == b.tokens(i) && a.first_token(i) == b.first_token(i) &&
               a.next_position(i) == b.next_position(i) &&
               std::equal(a.runs(i).begin(), a.runs(i).end(), b.runs(i).begin(), b.runs(i).end(), equal_runs) &&
               read(a, i, true, a.first_token(i), a.tokens(i)) == read(b, i, true, a.first_token(i), a.tokens(i)) &&
               read(a, i, false, a.first_token(i), a.tokens(i)) == read(b, i, false, a.first_token(i), a.tokens(i));
    }
    return same;
}

/// Whether each page is referred to by the sequence's runs and by nobody else.
bool owns_its_pages(const kv_sequence& sequence) {
    bool owns = true;
    for (const std::size_t layer : {0U, 1U, 4U}) {
        const std::span<const rvqkv::page_run> runs = sequence.runs(layer);
        for (const rvqkv::page_run& run : runs) {
            const auto count = std::count_if(runs.begin(), runs.end(),
                                             [&](const rvqkv::page_run& other) { return other.page == run.page; });
            owns = owns && rvqkv::page_pool::references(run.page) == static_cast<std::size_t>(count);
        }
    }
    return owns;
}

/// Whether `part` is the first tokens of `whole`.
bool is_prefix(const kv_sequence& part, const kv_sequence& whole) {
    bool is = true;
    for (std::size_t i = 0; i < part.layers(); ++i) {
        const std::size_t first = std::max(part.first_token(i), whole.first_token(i));
        is = is && part.tokens(i) <= whole.tokens(i);
        for (const bool is_keys : {true, false}) {
            is = is && (part.tokens(i) <= first || read(part, i, is_keys, first, part.tokens(i)) ==
                                                       read(whole, i, is_keys, first, part.tokens(i)));
        }
    }
    return is;
}

std::string saved(const kv_sequence& sequence) {
    const test::temp_dir folder;
    save_sequence(sequence, folder.file("sequence")).value();
    return test::read_file(folder.file("sequence"));
}

/// What a file held by `before` becomes.
std::string added(const std::string& before, const kv_sequence& sequence) {
    const test::temp_dir folder;
    test::write_file(folder.file("sequence"), before);
    save_sequence(sequence, folder.file("sequence"), incrementally).value();
    return test::read_file(folder.file("sequence"));
}

bool is_refused(const rvqkv::result<kv_sequence>& loaded, error_code code, std::string_view part = {}) {
    INFO((loaded.ok() ? "taken" : loaded.error().message));
    CHECK(!loaded.ok());
    return !loaded.ok() && loaded.error().code == code && loaded.error().message.find(part) != std::string::npos;
}

sequence_record record_of(const std::string& file) {
    sequence_record record;
    std::memcpy(&record, file.data(), sizeof(record));
    return record;
}

/// A file whose table says something else, and whose checksums are right.
std::string forged(std::string file, const std::function<void(std::string& bytes, sequence_table& table)>& change) {
    sequence_record record = record_of(file);
    sequence_table table = sequence_table::read(rvqkv::byte_source::view(bytes_of(file)), record).value();
    change(file, table);
    for (saved_page& each : table.pages()) {
        if (each.offset < file.size() && each.bytes <= file.size() - each.offset) {
            each.checksum = rvqkv::detail::checksum128::of(bytes_of(file).subspan(each.offset, each.bytes));
        }
    }
    std::memcpy(file.data() + record.table_offset, table.bytes().data(), table.bytes().size());
    record.table_checksum = rvqkv::detail::checksum64(table.bytes());
    record.checksum = record.right_checksum();
    std::memcpy(file.data(), &record, sizeof(record));
    std::memcpy(file.data() + record.table_offset - sizeof(record), &record, sizeof(record));
    return file;
}

}  // namespace

TEST_CASE("saved sequence: goes on as if it had never left memory, whatever became of it before", "[saved][property]") {
    for (const key_coding coding :
         {key_coding::as_given, key_coding::before_rope, key_coding::after_rope, key_coding::block_relative}) {
        for (const bool turned_input : {true, false}) {
            const kv_cache cache = make_cache(make_config(coding, turned_input));
            kv_sequence sequence = cache.new_sequence().value();
            const auto check = [&](std::uint64_t salt) {
                CAPTURE(static_cast<int>(coding), turned_input, salt, test::seed());
                const std::string file = saved(sequence);
                kv_sequence restored = load_sequence(cache, bytes_of(file)).value();
                REQUIRE(equal(restored, sequence));
                REQUIRE(owns_its_pages(restored));
                REQUIRE((saved(restored) == file));  // every byte that counts
                kv_sequence fork = sequence.fork().value();
                append(fork, 150, salt);
                append(restored, 150, salt);
                REQUIRE(equal(restored, fork));
            };
            check(1);
            append(sequence, 3, 2);
            check(2);
            append(sequence, 400, 3);
            check(3);
            sequence.evict(20, 30).value();  // out of one page
            sequence.evict(100, 140).value();
            sequence.evict(150, 300, false).value();
            check(4);
            sequence.demote(180, 1, 2).value();
            check(5);
            sequence.truncate(sequence.tokens(0) - 20).value();
            check(6);
            append(sequence, 130, 7);
            check(7);
            sequence.clear();
            check(8);
        }
    }
}

TEST_CASE("saved sequence: another cache of the same configuration takes it, and the saved one stays as it was",
          "[saved][unit]") {
    const kv_cache cache = make_cache(make_config());
    kv_sequence sequence = cache.new_sequence().value();
    append(sequence, 300, 1);
    const test::temp_dir folder;
    save_sequence(sequence, folder.file("sequence")).value();
    REQUIRE(equal(load_sequence(make_cache(make_config()), folder.file("sequence")).value(), sequence));
    const auto info = rvqkv::inspect_sequence_file(folder.file("sequence")).value();
    REQUIRE(info.generation == 1);
    REQUIRE(info.bytes == std::filesystem::file_size(folder.file("sequence")));
    REQUIRE(info.bytes == info.bytes_in_use);
    REQUIRE(info.layers.size() == 5);
    REQUIRE(info.layers[0].tokens == 300);
    REQUIRE(info.layers[2].pages == 0);
    REQUIRE(info.layers[4].first_token == sequence.first_token(4));
    REQUIRE(info.description.find("layer 1 keys: heads=2 head_dim=8 group_dim=4 depths=2 codewords=5 codec=") !=
            std::string::npos);
}

TEST_CASE("saved sequence: a file is added to by what is new, after appends, rollbacks and in forks", "[saved][unit]") {
    kv_cache_config config = make_config();
    for (rvqkv::kv_layer_config& layer : config.layers) {
        if (!layer.is_empty()) {
            layer.keys.heads = 16;
            layer.values.heads = 16;
            layer.key_mean.clear();
        }
    }
    const kv_cache cache = make_cache(config);
    kv_sequence sequence = cache.new_sequence().value();
    const test::temp_dir folder;
    const std::string path = folder.file("sequence");
    const auto check = [&](const kv_sequence& of, std::size_t generation) {
        const std::string before = std::filesystem::exists(path) ? test::read_file(path) : std::string();
        save_sequence(of, path, incrementally).value();
        REQUIRE(equal(load_sequence(cache, path).value(), of));
        REQUIRE(rvqkv::inspect_sequence_file(path).value().generation == generation);
        const std::string after = test::read_file(path);
        if (generation > 1) {  // what was there stays, but for the record
            REQUIRE(after.size() > before.size());
            REQUIRE(after.compare(64, before.size() - 64, before, 64) == 0);
        }
        return after.size() - (generation > 1 ? before.size() : 0);
    };
    append(sequence, 4000, 1);
    const std::size_t whole = check(sequence, 1);
    append(sequence, 100, 2);
    REQUIRE(check(sequence, 2) < whole / 2);
    sequence.truncate(4050).value();
    append(sequence, 3, 3);
    REQUIRE(check(sequence, 3) < whole / 3);
    kv_sequence fork = sequence.fork().value();
    append(fork, 70, 4);
    REQUIRE(check(fork, 4) < whole / 3);
    // A sequence that was loaded knows its pages by their contents.
    kv_sequence restored = load_sequence(cache, path).value();
    append(restored, 1, 5);
    REQUIRE(check(restored, 5) < whole / 3);
}

TEST_CASE("saved sequence: a file that is added to again and again does not grow without need", "[saved][unit]") {
    const kv_cache cache = make_cache(make_config());
    kv_sequence sequence = cache.new_sequence().value();
    const test::temp_dir folder;
    const std::string path = folder.file("sequence");
    bool was_rewritten = false;
    std::size_t generation = 0;
    for (std::uint64_t round = 0; round < 40; ++round) {
        append(sequence, 10, round);
        save_sequence(sequence, path, incrementally).value();
        const auto info = rvqkv::inspect_sequence_file(path).value();
        REQUIRE(info.bytes <= 2 * info.bytes_in_use);
        was_rewritten = was_rewritten || info.generation <= generation;
        generation = info.generation;
    }
    REQUIRE(was_rewritten);
    REQUIRE(equal(load_sequence(cache, path).value(), sequence));
    // Pages of the same contents are stored for each of them, so that a file is never less than what it becomes.
    kv_cache_config config = make_small_config();
    config.layers[0].coding = key_coding::as_given;
    const kv_cache small = make_cache(config);
    kv_sequence same = small.new_sequence().value();
    append(same, 64, 1);
    append(same, 64, 1);
    save_sequence(same, folder.file("same")).value();
    for (int i = 0; i < 50; ++i) {
        append(same, 64, 1);
    }
    save_sequence(same, folder.file("same"), incrementally).value();
    REQUIRE(equal(load_sequence(small, folder.file("same")).value(), same));
}

TEST_CASE("saved sequence: a file of another model is refused by name of the difference", "[saved][unit]") {
    kv_sequence sequence = make_cache(make_config()).new_sequence().value();
    append(sequence, 100, 1);
    const std::string file = saved(sequence);
    const auto refused = [&](const char* part, const std::function<void(kv_cache_config&)>& change) {
        kv_cache_config config = make_config();
        change(config);
        return is_refused(load_sequence(make_cache(config), bytes_of(file)), error_code::invalid_argument, part);
    };
    REQUIRE(refused("cache: the file has 'page_tokens=64', the cache has 'page_tokens=128'",
                    [](kv_cache_config& config) { config.page_tokens = 128; }));
    REQUIRE(refused("'sink_tokens=4', the cache has 'sink_tokens=5'",
                    [](kv_cache_config& config) { config.sink_tokens = 5; }));
    REQUIRE(refused("'recent_tokens=64'", [](kv_cache_config& config) { config.recent_tokens = 65; }));
    REQUIRE(refused("layer 0: the file has 'exact_type=float16'",
                    [](kv_cache_config& config) { config.exact_type = rvqkv::dtype::bfloat16; }));
    REQUIRE(refused("'layers=5', the cache has 'layers=6'",
                    [](kv_cache_config& config) { config.layers.push_back(config.layers[0]); }));
    REQUIRE(refused("layer 0 keys: the file has 'codec=", [](kv_cache_config& config) {
        config.layers[0].keys.codec = make_codec(8, {2, 5, 4}, rvqkv::scale_kind::std_dev, 9);
    }));
    REQUIRE(refused("layer 1: the file has 'coding=after_rope', the cache has 'coding=before_rope'",
                    [](kv_cache_config& config) { config.layers[1].coding = key_coding::before_rope; }));
    REQUIRE(refused("layer 1: the file has 'rope_base=10000', the cache has 'rope_base=500000'",
                    [](kv_cache_config& config) { config.layers[1].rope.base = 500000.0; }));
    REQUIRE(refused("layer 1: the file has 'key_mean=",
                    [](kv_cache_config& config) { config.layers[1].key_mean[3] = 1.0F; }));
    REQUIRE(refused("layer 2: the file has 'cache_of=none', the cache has 'cache_of=layer-0'",
                    [](kv_cache_config& config) { config.layers[2].shares_layer = 0; }));
    REQUIRE(refused("layer 4: the file has 'sliding_window=70', the cache has 'sliding_window=71'",
                    [](kv_cache_config& config) { config.layers[4].sliding_window = 71; }));
    REQUIRE(refused("layer 4: the file has 'coding=as_given', the cache has 'cache_of=none'",
                    [](kv_cache_config& config) { config.layers[4] = {}; }));
    REQUIRE(refused("layer 4 values: the file has 'heads=2'",
                    [](kv_cache_config& config) { config.layers[4].values.heads = 3; }));
}

TEST_CASE("saved sequence: what cannot be saved, loaded or added to is said so", "[saved][unit]") {
    const kv_cache cache = make_cache(make_small_config());
    kv_sequence sequence = cache.new_sequence().value();
    append(sequence, 5, 1);
    const test::temp_dir folder;
    const std::string path = folder.file("sequence");
    REQUIRE(is_refused(load_sequence(cache, path), error_code::io));
    REQUIRE(is_refused(load_sequence(cache, folder.path()), error_code::io));
    test::write_file(path, "");
    REQUIRE(is_refused(load_sequence(cache, path), error_code::damaged_file));
    test::write_file(path, std::string(1000, 'x'));
    REQUIRE(is_refused(load_sequence(cache, path), error_code::damaged_file, "begins with 'xxxxxxxx'"));
    REQUIRE(save_sequence(sequence, path, incrementally).error().code == error_code::damaged_file);
    REQUIRE((test::read_file(path) == std::string(1000, 'x')));
    save_sequence(sequence, path).value();
    std::string later = test::read_file(path);
    for (const int other : {1, 3}) {
        later[8] = static_cast<char>(other);
        REQUIRE(is_refused(load_sequence(cache, bytes_of(later)), error_code::unsupported,
                           "version " + std::to_string(other)));
    }

    kv_cache_config config = make_small_config();
    config.layers[0].keys.heads = 2;
    kv_sequence other = make_cache(config).new_sequence().value();
    const std::string before = test::read_file(path);
    REQUIRE(save_sequence(other, path, incrementally).error().code == error_code::invalid_argument);
    REQUIRE((test::read_file(path) == before));

    const kv_sequence taken = std::move(sequence);
    REQUIRE(save_sequence(sequence, path).error().code == error_code::invalid_argument);  // NOLINT: moved from
    kv_cache gone = make_cache(make_small_config());
    const kv_cache kept = std::move(gone);
    REQUIRE(is_refused(load_sequence(gone, path), error_code::invalid_argument));  // NOLINT: moved from

    test::random_source random;
    const std::vector<float> weights = test::gaussian_numbers(random, 12);
    auto book = rvqkv::residual_codebook<float>::create({1, 3, 4}, std::span<const float>(weights)).value();
    config = make_small_config();
    config.layers[0].keys.codec = rvqkv::make_codec(
        rvqkv::vector_quantizer<rvqkv::std_dev_scale, rvqkv::strided_grouping, rvqkv::residual_codebook<float>>::create(
            4, std::move(book))
            .value());
    kv_sequence unnamed = make_cache(config).new_sequence().value();
    const rvqkv::status outcome = save_sequence(unnamed, path);
    REQUIRE(outcome.error().code == error_code::invalid_argument);
    REQUIRE(outcome.error().message.find("layer 0 keys") != std::string::npos);

    // Two at once do not mix their bytes.
    const auto writer = rvqkv::detail::growing_file::open(path).value();
    REQUIRE(save_sequence(taken, path, incrementally).error().code == error_code::io);
}

TEST_CASE("saved sequence: no flipped byte and no cut passes, and what is recovered is right", "[saved][fault]") {
    const kv_cache cache = make_cache(make_small_config());
    kv_sequence sequence = cache.new_sequence().value();
    append(sequence, 150, 1);
    const std::string good = saved(sequence);
    std::size_t most = 0;
    const auto check = [&](const std::string& bad) {
        const auto loaded = load_sequence(cache, bytes_of(bad));
        REQUIRE(!loaded.ok());
        REQUIRE((loaded.error().code == error_code::damaged_file || loaded.error().code == error_code::unsupported));
        rvqkv::sequence_recovery recovery;
        const auto rest = load_sequence(cache, bytes_of(bad), {true, &recovery});
        if (rest.ok()) {
            REQUIRE(is_prefix(rest.value(), sequence));
            REQUIRE(recovery.was_damaged);
            REQUIRE_FALSE(recovery.damage.empty());
            REQUIRE(recovery.tokens == rest.value().tokens(0));
            most = std::max(most, recovery.tokens);
        }
        return rest.ok();
    };
    for (std::size_t at = 0; at < good.size(); ++at) {
        for (const int bits : {1, 0x80, 0xff}) {
            std::string bad = good;
            bad[at] = static_cast<char>(bad[at] ^ bits);
            CAPTURE(at, bits);
            const bool was_recovered = check(bad);
            const sequence_record record = record_of(good);
            const bool is_in_table =
                at >= record.table_offset - sizeof(record) && at < record.table_offset + record.table_bytes;
            REQUIRE(was_recovered == !(is_in_table && at >= record.table_offset - sizeof(record)));
        }
    }
    REQUIRE(most == 150);  // a record that was damaged has a copy
    most = 0;
    for (std::size_t size = 0; size < good.size(); ++size) {
        CAPTURE(size);
        check(good.substr(0, size));
    }
    REQUIRE(most > 100);
    REQUIRE(most < 150);
    REQUIRE(equal(load_sequence(cache, bytes_of(good + "garbage")).value(), sequence));
    // A copy of the record counts where a save that was interrupted leaves it, not anywhere.
    const std::string record = good.substr(0, sizeof(sequence_record));
    std::string torn = good;
    torn[sizeof(sequence_record) - 1] ^= 1;
    REQUIRE(equal(load_sequence(cache, bytes_of(torn + record)).value(), sequence));
    REQUIRE(is_refused(load_sequence(cache, bytes_of(torn + "8 bytes " + record)), error_code::damaged_file));
    rvqkv::sequence_recovery recovery;
    REQUIRE(equal(load_sequence(cache, bytes_of(good), {true, &recovery}).value(), sequence));
    REQUIRE_FALSE(recovery.was_damaged);
    REQUIRE(recovery.tokens == 150);
}

TEST_CASE("saved sequence: a damaged page costs the tokens behind it, in all layers", "[saved][unit]") {
    const kv_cache cache = make_cache(make_config());
    kv_sequence sequence = cache.new_sequence().value();
    append(sequence, 400, 1);
    append(sequence, 200, 2);
    const std::string good = saved(sequence);
    sequence_table table = sequence_table::read(rvqkv::byte_source::view(bytes_of(good)), record_of(good)).value();
    std::size_t end = 0;
    std::size_t recovered = 0;
    for (std::size_t i = 0; i < table.layers()[0].pages; ++i) {
        std::string bad = good;
        bad[table.pages()[i].offset + 5] ^= 1;
        rvqkv::sequence_recovery recovery;
        kv_sequence rest = load_sequence(cache, bytes_of(bad), {true, &recovery}).value();
        CAPTURE(i, end, recovery.damage);
        REQUIRE(recovery.damage.find("layer 0 page " + std::to_string(i)) != std::string::npos);
        // As if rolled back to there; no token where the last layer's window has let go of what the next would need.
        kv_sequence expected = sequence.fork().value();
        if (!expected.truncate(end).ok()) {
            expected.clear();
        }
        REQUIRE(equal(rest, expected));
        recovered += rest.tokens(0) != 0 ? 1 : 0;
        append(rest, 200, 5);
        append(expected, 200, 5);
        REQUIRE(equal(rest, expected));
        end += table.runs()[i].tokens;
    }
    REQUIRE(end == 600);
    REQUIRE(recovered > 1);
    REQUIRE(recovered < table.layers()[0].pages - 1);
}

TEST_CASE("saved sequence: tables that lie are refused", "[saved][unit]") {
    kv_cache_config config = make_config(key_coding::block_relative);
    const kv_cache cache = make_cache(config);
    kv_sequence sequence = cache.new_sequence().value();
    append(sequence, 240, 1);
    append(sequence, 60, 2);
    REQUIRE(sequence.first_token(4) > 0);
    const std::string good = saved(sequence);
    REQUIRE(load_sequence(cache, bytes_of(forged(good, [](std::string&, sequence_table&) {}))).ok());
    std::size_t number = 0;
    const auto lie = [&](const std::function<void(sequence_table & table)>& change) {
        CAPTURE(++number);
        const std::string file = forged(good, [&](std::string&, sequence_table& table) { change(table); });
        REQUIRE(is_refused(load_sequence(cache, bytes_of(file)), error_code::damaged_file));
        static_cast<void>(load_sequence(cache, bytes_of(file), {true, nullptr}));
    };
    constexpr std::uint64_t huge = ~std::uint64_t{0};
    lie([&](sequence_table& table) { table.layers()[0].tokens = huge; });
    lie([&](sequence_table& table) { table.layers()[0].tokens -= 1; });
    lie([&](sequence_table& table) { table.layers()[0].dropped = 64; });
    lie([&](sequence_table& table) { table.layers()[0].dropped = huge; });
    lie([&](sequence_table& table) { table.layers()[0].pages = huge; });
    lie([&](sequence_table& table) { table.layers()[0].pages += 1; });
    lie([&](sequence_table& table) { table.layers()[2] = {5, 5, 0}; });
    lie([&](sequence_table& table) { table.pages()[1].offset = huge - 7; });
    lie([&](sequence_table& table) { table.pages()[1].bytes = huge; });
    lie([&](sequence_table& table) { table.pages()[1].bytes -= 8; });
    lie([&](sequence_table& table) { table.pages()[1].runs = 0; });
    lie([&](sequence_table& table) { table.pages()[1].runs = ~0U; });
    lie([&](sequence_table& table) { table.pages()[1].format = rvqkv::detail::saved_format::exact; });
    lie([&](sequence_table& table) { table.pages()[1].format = rvqkv::detail::saved_format{7}; });
    lie([&](sequence_table& table) { table.pages()[1].key_depths = 0; });
    lie([&](sequence_table& table) { table.pages()[1].value_depths = 4; });
    lie([&](sequence_table& table) { table.pages()[0].first = 1; });
    lie([&](sequence_table& table) { table.pages()[0].tokens = ~0U; });
    lie([&](sequence_table& table) { table.runs()[1].tokens = 0; });
    lie([&](sequence_table& table) { table.runs()[1].tokens = ~0U; });
    lie([&](sequence_table& table) { table.runs()[1].first = ~0U; });
    lie([&](sequence_table& table) { table.runs()[1].first = 1; });
    lie([&](sequence_table& table) { table.runs()[1].position = -1; });
    lie([&](sequence_table& table) { table.runs()[1].position = std::int64_t{1} << 62U; });
    lie([&](sequence_table& table) { table.runs()[1].coded_position = 1; });
    lie([&](sequence_table& table) {
        for (saved_run& run : table.runs().last(table.layers()[4].pages)) {
            run.position -= static_cast<std::int64_t>(table.layers()[4].dropped);
        }
    });
    const auto in_block = [](sequence_table& table) -> saved_run& {
        return table.runs()[table.layers()[0].pages + 1];  // the second layer's first page of codes
    };
    lie([&](sequence_table& table) { in_block(table).coded_position = 128; });
    lie([&](sequence_table& table) { in_block(table).coded_position = -1; });
    const auto spoiled = [&](std::size_t page, std::size_t byte, int value) {
        return forged(good, [&](std::string& bytes, sequence_table& table) {
            bytes[table.pages()[page].offset + byte] = static_cast<char>(value);
        });
    };
    const std::size_t scales = 64 * 2;  // of the first head
    REQUIRE(is_refused(load_sequence(cache, bytes_of(spoiled(1, scales + 3, 0xff))), error_code::damaged_file,
                       "layer 0 page 1: a code is not below"));
    REQUIRE(is_refused(load_sequence(cache, bytes_of(spoiled(1, 1, 0xff))), error_code::damaged_file,
                       "layer 0 page 1: a scale"));
    REQUIRE(is_refused(load_sequence(cache, bytes_of(spoiled(0, 1, 0x7c))), error_code::damaged_file,
                       "layer 0 page 0: an exact number"));
}

TEST_CASE("saved sequence: adding that stops at any byte leaves the old sequence or the new one", "[saved][fault]") {
    const kv_cache cache = make_cache(make_small_config());
    kv_sequence sequence = cache.new_sequence().value();
    append(sequence, 500, 1);
    const std::string before = saved(sequence);
    const kv_sequence old = sequence.fork().value();
    append(sequence, 10, 2);
    const std::string after = added(before, sequence);
    REQUIRE(record_of(after).generation == 2);
    // First the end of the file with a copy of the record, then the record, then the copy goes.
    const std::string record = after.substr(0, sizeof(sequence_record));
    const std::string tail = after.substr(before.size()) + record;
    const auto holds = [&](const std::string& file, const kv_sequence& expected) {
        const auto loaded = load_sequence(cache, bytes_of(file));
        return loaded.ok() && equal(loaded.value(), expected);
    };
    for (std::size_t size = 0; size <= tail.size(); ++size) {
        CAPTURE(size);
        REQUIRE(holds(before + tail.substr(0, size), old));
    }
    for (std::size_t size = 1; size <= record.size(); ++size) {
        CAPTURE(size);
        std::string file = before + tail;
        file.replace(0, size, record, 0, size);
        REQUIRE((holds(file, sequence) || holds(file, old)));
        REQUIRE(holds(added(file, old), old));
    }
    REQUIRE(holds(after, sequence));
    for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{100}, tail.size()}) {
        CAPTURE(size);
        REQUIRE((added(before + tail.substr(0, size), sequence) == after));
    }
}

TEST_CASE("saved sequence: a disk that is full at any byte leaves the old file", "[saved][fault]") {
    const kv_cache cache = make_cache(make_small_config());
    kv_sequence sequence = cache.new_sequence().value();
    append(sequence, 500, 1);
    const test::temp_dir folder;
    const std::string path = folder.file("sequence");
    save_sequence(sequence, path).value();
    const std::string before = test::read_file(path);
    append(sequence, 10, 2);
    const std::size_t size = added(before, sequence).size() + sizeof(sequence_record);  // its copy goes in the end
    rlimit old_limit{};
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &old_limit) == 0);
    const auto old_action = ::signal(SIGXFSZ, SIG_IGN);
    const auto save_within = [&](std::size_t most, bool incremental) {
        rlimit limit = old_limit;
        limit.rlim_cur = most;
        REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
        const rvqkv::status done = save_sequence(sequence, path, {incremental});
        REQUIRE(::setrlimit(RLIMIT_FSIZE, &old_limit) == 0);
        REQUIRE((done.ok() || done.error().code == error_code::io));
        return done.ok();
    };
    for (std::size_t most = 0; most < size; ++most) {
        CAPTURE(most);
        const bool incremental = most >= before.size();
        const bool done = (incremental || most % 50 == 0) && save_within(most, incremental);
        REQUIRE_FALSE(done);
        REQUIRE((test::read_file(path) == before));
    }
    REQUIRE(std::distance(std::filesystem::directory_iterator(folder.path()), std::filesystem::directory_iterator()) ==
            1);
    REQUIRE(save_within(size, true));
    REQUIRE(equal(load_sequence(cache, path).value(), sequence));
    static_cast<void>(::signal(SIGXFSZ, old_action));
}

TEST_CASE("saved sequence: no flipped byte of a file that was added to gives another sequence", "[saved][fault]") {
    const kv_cache cache = make_cache(make_small_config());
    kv_sequence sequence = cache.new_sequence().value();
    append(sequence, 500, 1);
    const std::string before = saved(sequence);
    append(sequence, 10, 2);
    const std::string good = added(before, sequence);
    const sequence_record record = record_of(good);
    REQUIRE(record.generation == 2);
    for (std::size_t at = 0; at < good.size(); ++at) {
        std::string bad = good;
        bad[at] = static_cast<char>(bad[at] ^ 0x10);
        const auto loaded = load_sequence(cache, bytes_of(bad));
        CAPTURE(at);
        // Only bytes that the newest table does not name may change.
        if (loaded.ok()) {
            REQUIRE(at >= sizeof(record));
            REQUIRE(at < before.size());
            REQUIRE(equal(loaded.value(), sequence));
        }
        const auto rest = load_sequence(cache, bytes_of(bad), {true, nullptr});
        REQUIRE(rest.ok());
        REQUIRE(is_prefix(rest.value(), sequence));
    }
    for (std::size_t size = 0; size < good.size(); size += 7) {
        CAPTURE(size);
        REQUIRE(is_refused(load_sequence(cache, bytes_of(good.substr(0, size))), error_code::damaged_file));
        const auto rest = load_sequence(cache, bytes_of(good.substr(0, size)), {true, nullptr});
        REQUIRE((!rest.ok() || is_prefix(rest.value(), sequence)));
    }
}

TEST_CASE("saved sequence: memory that runs out loses nothing, neither in memory nor in the file", "[saved][fault]") {
    test::counting_source source;
    kv_cache_config config = make_config();
    config.source = &source;
    std::optional<kv_cache> cache = make_cache(config);
    std::optional<kv_sequence> sequence = cache->new_sequence().value();
    append(*sequence, 300, 1);
    sequence->demote(100, 1, 1).value();
    const std::string old = saved(*sequence);
    append(*sequence, 30, 2);
    const kv_sequence copy = sequence->fork().value();
    const test::temp_dir folder;
    const std::string path = folder.file("sequence");
    // Larger pieces of memory are asked for without exceptions; text and paths are not.
    const auto attempt = [](const auto& operation) {
        try {
            return operation().ok();
        } catch (const std::bad_alloc&) {
            return false;
        }
    };
    for (const bool incremental : {false, true}) {
        for (std::size_t nth = 0;; ++nth) {
            test::write_file(path, old);
            bool done = false;
            bool failed = false;
            {
                const test::failing_allocations failing(nth);
                done = attempt([&] { return save_sequence(*sequence, path, {incremental}); });
                failed = failing.triggered();
            }
            REQUIRE(equal(*sequence, copy));
            if (done) {
                REQUIRE(equal(load_sequence(*cache, path).value(), copy));
            } else {
                REQUIRE(failed);
                REQUIRE((test::read_file(path) == old));
            }
            if (!failed) {
                break;
            }
        }
    }
    save_sequence(*sequence, path).value();
    const std::size_t pages = cache->bytes().pages;
    for (const bool recover : {false, true}) {
        for (std::size_t nth = 0;; ++nth) {
            const test::failing_allocations failing(nth);
            const bool done = attempt([&] { return load_sequence(*cache, path, {recover, nullptr}); });
            REQUIRE((done || failing.triggered()));
            if (!failing.triggered()) {
                break;
            }
        }
        REQUIRE(cache->bytes().pages == pages);
    }
    cache->release_free_pages();
    for (std::size_t nth = 0;; ++nth) {
        source.failed = false;
        source.until_failure = nth;
        const auto loaded = load_sequence(*cache, path, {true, nullptr});
        const bool failed = source.failed;
        source.until_failure = test::counting_source::never;
        if (!failed) {
            REQUIRE(equal(loaded.value(), copy));
            break;
        }
        REQUIRE(is_refused(loaded, error_code::out_of_memory));
        cache->release_free_pages();
    }
    REQUIRE(cache->bytes().pages == pages);
}

namespace {

/// A cache for the sample of a real model: two layers of 3 heads, keys before rotary embedding.
kv_cache make_real_cache(rvqkv::codebook_shape shape) {
    kv_cache_config config;
    const shared_codec keys = make_codec(64, shape, rvqkv::scale_kind::std_dev);
    const shared_codec values = make_codec(64, shape, rvqkv::scale_kind::std_dev, 2);
    config.layers.assign(2, {{keys, 3}, {values, 3}});
    config.layers[0].coding = key_coding::after_rope;
    config.layers[0].turned_input = false;
    return make_cache(config);
}

/// Appends tokens [first, first + count) of the sample's 4096.
void append_real(kv_sequence& sequence, std::size_t first, std::size_t count) {
    const auto sample = rvqkv::safetensors_file::open(RVQKV_TEST_SAMPLE).value();
    rvqkv::kv_workspace workspace;
    const rvqkv::tensor_shape shape{count, 3, 64};
    for (const std::size_t layer : {std::size_t{0}, std::size_t{1}}) {
        const std::string name = layer == 0 ? "layers.9." : "layers.19.";
        std::vector<float> keys(shape.tokens * 3 * 64);
        std::vector<float> values(keys.size());
        sample.read_floats(name + "key", keys, first * 3 * 64).value();
        sample.read_floats(name + "value", values, first * 3 * 64).value();
        sequence.append(layer, {keys.data(), shape}, {values.data(), shape}, workspace).value();
    }
}

/// Saves two states of a sequence in turn until it is killed.
[[noreturn]] void save_for_ever(const kv_sequence& old, const kv_sequence& young, const std::string& path,
                                bool incremental) {
    for (;;) {
        for (const kv_sequence* each : {&young, &old}) {
            if (!save_sequence(*each, path, {incremental}).ok()) {
                ::_exit(1);
            }
        }
    }
}

}  // namespace

TEST_CASE("saved sequence: a process killed while it saves leaves the old sequence or the new one", "[saved][slow]") {
    const kv_cache cache = make_real_cache({3, 16, 8});
    kv_sequence old = cache.new_sequence().value();
    append_real(old, 0, 4096 - 200);
    kv_sequence young = old.fork().value();
    append_real(young, 4096 - 200, 200);
    REQUIRE(young.tokens(1) == 4096);
    test::random_source random;
    for (const bool incremental : {false, true}) {
        const test::temp_dir folder;
        const std::string path = folder.file("sequence");
        save_sequence(old, path).value();
        std::size_t olds = 0;
        std::size_t youngs = 0;
        const std::size_t kills = test::rounds(200, 10);
        for (std::size_t kill = 0; kill < kills; ++kill) {
            const pid_t child = ::fork();
            REQUIRE(child >= 0);
            if (child == 0) {
                save_for_ever(old, young, path, incremental);
            }
            ::usleep(static_cast<useconds_t>(random.integer(0, 30000)));
            REQUIRE(::kill(child, SIGKILL) == 0);
            int state = 0;
            REQUIRE(::waitpid(child, &state, 0) == child);
            REQUIRE(WIFSIGNALED(state));
            CAPTURE(incremental, kill, test::seed());
            const auto loaded = load_sequence(cache, path);
            INFO((loaded.ok() ? "" : loaded.error().message));
            REQUIRE(loaded.ok());
            const bool is_old = loaded.value().tokens(0) == old.tokens(0);
            REQUIRE(equal(loaded.value(), is_old ? old : young));
            ++(is_old ? olds : youngs);
            // What a killed process was writing stays behind under a name of its own.
            for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
                if (entry.path() != path) {
                    std::filesystem::remove(entry.path());
                }
            }
        }
        if (kills >= 100) {
            REQUIRE(olds > kills / 20);
            REQUIRE(youngs > kills / 20);
        }
    }
}

TEST_CASE("saved sequence: no flipped byte of 4,096 real tokens passes", "[saved][slow]") {
    const kv_cache cache = make_real_cache({1, 16, 8});
    kv_sequence sequence = cache.new_sequence().value();
    append_real(sequence, 0, 4096);
    std::string file = saved(sequence);
    REQUIRE(equal(load_sequence(cache, bytes_of(file)).value(), sequence));
    test::random_source random;
    CAPTURE(test::seed(), file.size());
    const std::size_t step = file.size() / std::min(test::rounds(file.size()), file.size());
    for (std::size_t at = 0; at < file.size(); at += step) {
        const char good = file[at];
        file[at] = static_cast<char>(good ^ static_cast<char>(random.integer(1, 255)));
        const auto loaded = load_sequence(cache, bytes_of(file));
        if (loaded.ok() || loaded.error().code == error_code::out_of_memory) {
            CAPTURE(at);
            FAIL("a flipped byte passed");
        }
        file[at] = good;
    }
    REQUIRE(equal(load_sequence(cache, bytes_of(file)).value(), sequence));
}
