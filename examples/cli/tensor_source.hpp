// SPDX-License-Identifier: MIT
/// @file
/// Where the commands get keys, values and queries from: one safetensors file with `layers.N.key`, `layers.N.value`
/// and perhaps `layers.N.query`, or `.npy` files of one layer. Nothing is read before it is asked for.
#pragma once

#include <rvqkv/files.hpp>

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

namespace cli {

enum class part { key, value, query };
[[nodiscard]] constexpr const char* name_of(part which) noexcept {
    return which == part::key ? "key" : which == part::value ? "value" : "query";
}

/// What `tensor_source` is made from; `add_tensor_options` has it filled by the command line.
struct tensor_options {
    std::vector<std::string> paths;   ///< One safetensors file, or two or three `.npy` files.
    std::vector<std::size_t> layers;  ///< Layers wanted; empty: all.
    std::size_t heads = 0;            ///< KV heads, for tensors stored as [token, channel].
};

class tensor_source {
public:
    /// Throws `rvqkv::exception` for files that cannot be read, `std::runtime_error` for files without keys or values,
    /// or whose layers differ in their number of tokens.
    explicit tensor_source(const tensor_options& options);

    [[nodiscard]] const std::vector<std::size_t>& layers() const noexcept { return layers_; }
    /// Of keys and values, in every layer.
    [[nodiscard]] std::size_t tokens() const noexcept { return tokens_; }
    [[nodiscard]] bool has_queries() const noexcept;
    /// The first token that has a query: files may leave out those of tokens that are only trained on.
    [[nodiscard]] std::size_t first_query() const noexcept { return first_query_; }
    [[nodiscard]] rvqkv::tensor_shape shape(std::size_t layer, part which) const;
    /// Tokens [first, first + count), numbered as the keys are, also for queries.
    [[nodiscard]] rvqkv::owned_tensor load(std::size_t layer, part which, std::size_t first, std::size_t count) const;
    /// The file's own notes; a number, or `otherwise` where there is none.
    [[nodiscard]] const rvqkv::metadata_map& metadata() const noexcept { return metadata_; }
    [[nodiscard]] double note(const char* key, double otherwise) const;
    /// File names without folders, for messages and notes.
    [[nodiscard]] const std::string& name() const noexcept { return name_; }

private:
    [[nodiscard]] std::size_t heads_of(part which) const noexcept { return which == part::query ? 0 : heads_; }

    std::optional<rvqkv::safetensors_file> file_;
    std::vector<rvqkv::npy_file> arrays_;  // in the order of `part`
    rvqkv::metadata_map metadata_;
    std::vector<std::size_t> layers_;
    std::size_t heads_ = 0;
    std::size_t tokens_ = 0;
    std::size_t first_query_ = 0;
    std::string name_;
};

}  // namespace cli
