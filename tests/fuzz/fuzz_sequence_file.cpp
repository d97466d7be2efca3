// SPDX-License-Identifier: MIT
/// @file
/// Fuzzes the reader of saved sequences: one that is taken must do all that a sequence does.
#include "fuzz_target.hpp"
#include "rvqkv/files/sequence_file.hpp"
#include "support/temp_dir.hpp"

#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

namespace {

using rvqkv::detail::sequence_record;
using rvqkv::detail::sequence_table;

std::shared_ptr<const rvqkv::codec> make_codec(std::size_t head_dim, rvqkv::codebook_shape shape) {
    rvqkv::codec_spec spec;
    spec.head_dim = head_dim;
    spec.shape = shape;
    std::vector<float> weights(shape.size());
    for (std::size_t i = 0; i < weights.size(); ++i) {
        weights[i] = static_cast<float>(i * i % 13) - 6.0F;
    }
    return rvqkv::make_codec<float>(spec, weights).value();
}

const rvqkv::kv_cache& cache() {
    static const rvqkv::kv_cache made = [] {
        rvqkv::kv_cache_config config;
        config.sink_tokens = 1;
        config.recent_tokens = 2;
        config.layers.resize(2);
        for (rvqkv::kv_layer_config& layer : config.layers) {
            layer.keys = {make_codec(2, {2, 3, 2}), 1};
            layer.values = {make_codec(2, {1, 5, 2}), 1};
        }
        config.layers[0].coding = rvqkv::key_coding::block_relative;
        config.layers[0].block_tokens = 64;
        config.layers[1].coding = rvqkv::key_coding::before_rope;
        config.layers[1].sliding_window = 10;
        return rvqkv::kv_cache::create(config).value();
    }();
    return made;
}

void append(rvqkv::kv_sequence& sequence, std::size_t tokens) {
    rvqkv::kv_workspace workspace;
    std::vector<float> x(tokens * 2);
    for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = static_cast<float>(i * 7 % 11) - 5.0F;
    }
    const rvqkv::tensor_view view(x.data(), {tokens, 1, 2});
    for (std::size_t layer = 0; layer < 2; ++layer) {
        sequence.append(layer, view, view, workspace).value();
    }
}

void use(rvqkv::kv_sequence sequence) {
    rvqkv::kv_workspace workspace;
    rvqkv::attention_workspace attention;
    append(sequence, 3);
    for (std::size_t layer = 0; layer < 2; ++layer) {
        const std::size_t tokens = sequence.tokens(layer) - sequence.first_token(layer);
        std::vector<float> out(tokens * 2);
        const rvqkv::mutable_tensor_view all(out.data(), {tokens, 1, 2});
        sequence.reconstruct_keys(layer, sequence.first_token(layer), all, workspace).value();
        sequence.reconstruct_values(layer, sequence.first_token(layer), all, workspace).value();
        const std::vector<float> query = {1.0F, -2.0F};
        sequence.attend(layer, {query.data(), {1, 1, 2}}, {out.data(), {1, 1, 2}}, attention).value();
        fuzz::require(std::isfinite(out[0]) && std::isfinite(out[1]), "attention over numbers is a number");
    }
    rvqkv::kv_sequence fork = sequence.fork().value();
    static_cast<void>(fork.evict(fork.tokens(0) / 4, fork.tokens(0) / 2));
    static_cast<void>(fork.demote(fork.tokens(0), 1, 1));
    static_cast<void>(fork.truncate(fork.tokens(0) / 2));
    append(fork, 64);
}

void try_file(std::span<const std::byte> bytes) {
    auto loaded = rvqkv::load_sequence(cache(), bytes);
    if (!loaded) {
        fuzz::require(!loaded.error().message.empty(), "an error says what is wrong");
        loaded = rvqkv::load_sequence(cache(), bytes, {true, nullptr});
    }
    if (loaded) {
        use(std::move(loaded).value());
    }
}

/// The same file under checksums that fit it, of pages too, if it has a table.
void try_sealed(const std::uint8_t* data, std::size_t size) {
    sequence_record record;
    if (size < 2 * sizeof(record)) {
        return;
    }
    std::vector<std::uint8_t> file(data, data + size);
    std::memcpy(&record, data, sizeof(record));
    record.magic = sequence_record::right_magic;
    record.version = rvqkv::sequence_file_version;
    record.reserved = 0;
    if (record.table_offset < 2 * sizeof(record) || record.table_offset > size ||
        record.table_bytes > size - record.table_offset) {
        return;
    }
    std::uint8_t* const table = file.data() + record.table_offset;
    const auto seal = [&] {
        record.table_checksum = rvqkv::detail::checksum64(fuzz::bytes_of(table, record.table_bytes));
        record.checksum = record.right_checksum();
        std::memcpy(file.data(), &record, sizeof(record));
        std::memcpy(table - sizeof(record), &record, sizeof(record));
    };
    seal();
    auto read = sequence_table::read(rvqkv::byte_source::view(fuzz::bytes_of(file.data(), size)), record);
    if (!read) {
        return;
    }
    for (rvqkv::detail::saved_page& page : read.value().pages()) {
        if (page.offset <= size && page.bytes <= size - page.offset) {
            page.checksum = rvqkv::detail::checksum128::of(fuzz::bytes_of(file.data() + page.offset, page.bytes));
        }
    }
    std::memcpy(table, read.value().bytes().data(), record.table_bytes);
    seal();
    try_file(fuzz::bytes_of(file.data(), size));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    try_file(fuzz::bytes_of(data, size));
    try_sealed(data, size);
    return 0;
}

std::vector<std::string> fuzz_seeds() {
    const test::temp_dir folder;
    rvqkv::kv_sequence sequence = cache().new_sequence().value();
    std::vector<std::string> seeds;
    const auto save = [&](bool incremental) {
        rvqkv::save_sequence(sequence, folder.file("seed"), {incremental}).value();
        return test::read_file(folder.file("seed"));
    };
    append(sequence, 70);
    seeds.push_back(save(false));
    append(sequence, 60);
    sequence.evict(10, 20).value();
    sequence.demote(80, 1, 1).value();
    static_cast<void>(save(false));
    append(sequence, 1);
    seeds.push_back(save(true));
    return seeds;
}
