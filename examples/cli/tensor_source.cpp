// SPDX-License-Identifier: MIT
#include "tensor_source.hpp"

#include "support.hpp"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace cli {
namespace {

std::string tensor_name(std::size_t layer, part which) {
    return "layers." + std::to_string(layer) + "." + name_of(which);
}

/// Every N of which the file has a tensor `layers.N.key`.
std::vector<std::size_t> layers_of(const rvqkv::safetensors_file& file) {
    std::vector<std::size_t> layers;
    constexpr std::string_view prefix = "layers.";
    for (const rvqkv::tensor_info& tensor : file.tensors()) {
        const std::string_view name = tensor.name;
        std::size_t layer = 0;
        if (name.starts_with(prefix) &&
            std::from_chars(name.data() + prefix.size(), name.data() + name.size(), layer).ec == std::errc() &&
            name == tensor_name(layer, part::key)) {
            layers.push_back(layer);
        }
    }
    std::sort(layers.begin(), layers.end());
    return layers;
}

}  // namespace

tensor_source::tensor_source(const tensor_options& options) : heads_(options.heads) {
    const auto is_array = [](const std::string& path) { return std::filesystem::path(path).extension() == ".npy"; };
    const std::vector<std::string>& paths = options.paths;
    for (const std::string& path : paths) {
        name_ += (name_.empty() ? "" : " ") + std::filesystem::path(path).filename().string();
    }
    if (std::any_of(paths.begin(), paths.end(), is_array)) {
        if (paths.size() < 2 || paths.size() > 3 || !std::all_of(paths.begin(), paths.end(), is_array)) {
            throw usage_error("want KEYS.npy VALUES.npy, and QUERIES.npy if there are any");
        }
        for (const std::string& path : paths) {
            arrays_.push_back(rvqkv::npy_file::open(path).value());
        }
        layers_ = options.layers.empty() ? std::vector<std::size_t>{0} : options.layers;
        if (layers_.size() != 1) {
            throw usage_error(".npy files hold one layer, so --layers can name but one");
        }
    } else {
        if (paths.size() != 1) {
            throw usage_error("want one safetensors file, or KEYS.npy VALUES.npy [QUERIES.npy]");
        }
        file_ = rvqkv::safetensors_file::open(paths.front()).value();
        metadata_ = file_->metadata();
        const std::vector<std::size_t> there = layers_of(*file_);
        if (there.empty()) {
            throw std::runtime_error(paths.front() + ": holds no tensor named like 'layers.0.key'; `rvqkv inspect " +
                                     paths.front() + "` lists what it holds");
        }
        layers_ = options.layers.empty() ? there : options.layers;
        std::sort(layers_.begin(), layers_.end());
        layers_.erase(std::unique(layers_.begin(), layers_.end()), layers_.end());
        for (const std::size_t layer : layers_) {
            static_cast<void>(file_->tensor(tensor_name(layer, part::key)).value());
            static_cast<void>(file_->tensor(tensor_name(layer, part::value)).value());
        }
    }
    tokens_ = shape(layers_.front(), part::key).tokens;
    for (const std::size_t layer : layers_) {
        for (const part which : {part::key, part::value}) {
            if (const std::size_t tokens = shape(layer, which).tokens; tokens != tokens_) {
                throw std::runtime_error(name_ + ": layer " + std::to_string(layer) + " " + name_of(which) + " has " +
                                         std::to_string(tokens) + " tokens, layer " + std::to_string(layers_.front()) +
                                         " key has " + std::to_string(tokens_));
            }
        }
    }
    first_query_ = static_cast<std::size_t>(note("first_query", 0.0));
}

bool tensor_source::has_queries() const noexcept {
    if (!file_) {
        return arrays_.size() == 3;
    }
    return std::all_of(layers_.begin(), layers_.end(),
                       [this](std::size_t layer) { return file_->contains(tensor_name(layer, part::query)); });
}

rvqkv::tensor_shape tensor_source::shape(std::size_t layer, part which) const {
    // No tokens are read; what comes back tells heads and channels, or says what is wrong.
    const rvqkv::token_range none{0, 0};
    if (!file_) {
        const rvqkv::npy_file& array = arrays_.at(static_cast<std::size_t>(which));
        rvqkv::tensor_shape shape = array.load(none, heads_of(which)).value().shape();
        shape.tokens = array.shape()[0];
        return shape;
    }
    const std::string name = tensor_name(layer, which);
    rvqkv::tensor_shape shape = file_->load(name, none, heads_of(which)).value().shape();
    shape.tokens = file_->tensor(name).value()->shape[0];
    return shape;
}

rvqkv::owned_tensor tensor_source::load(std::size_t layer, part which, std::size_t first, std::size_t count) const {
    const rvqkv::token_range range{which == part::query ? first - first_query_ : first, count};
    return file_ ? file_->load(tensor_name(layer, which), range, heads_of(which)).value()
                 : arrays_.at(static_cast<std::size_t>(which)).load(range, heads_of(which)).value();
}

double tensor_source::note(const char* key, double otherwise) const {
    const auto entry = metadata_.find(key);
    if (entry == metadata_.end()) {
        return otherwise;
    }
    std::size_t used = 0;
    double number = -1.0;
    try {
        number = std::stod(entry->second, &used);
    } catch (const std::logic_error&) {
        used = 0;
    }
    if (used != entry->second.size() || !(number >= 0.0)) {
        throw std::runtime_error(name_ + ": metadata '" + key + "' is '" + entry->second +
                                 "', want a number of 0 or more");
    }
    return number;
}

}  // namespace cli
