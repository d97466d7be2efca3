// SPDX-License-Identifier: MIT
/// @file
/// Codec files: a model's codecs and free text.
#include "common.hpp"

#include <rvqkv/files/codec_file.hpp>

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <filesystem>
#include <map>

namespace py {
namespace {

using codec_handle = std::shared_ptr<const rvqkv::codec>;
using codec_map = std::map<std::size_t, std::pair<codec_handle, codec_handle>>;
using text_map = std::map<std::string, std::string>;

void save(const std::filesystem::path& path, const codec_map& codecs, const text_map& metadata) {
    rvqkv::codec_set set;
    for (const auto& [layer, sides] : codecs) {
        set.layers[layer] = {sides.first, sides.second};
    }
    set.metadata.insert(metadata.begin(), metadata.end());
    without_lock([&] { rvqkv::save_codecs(path, set).value(); });
}

std::pair<codec_map, text_map> load(const std::filesystem::path& path) {
    const rvqkv::codec_set set = without_lock([&] { return rvqkv::load_codecs(path).value(); });
    std::pair<codec_map, text_map> loaded;
    for (const auto& [layer, sides] : set.layers) {
        if (sides.key == nullptr || sides.value == nullptr) {
            fail(path.string() + ": layer " + std::to_string(layer) + " lacks the codec of its " +
                 (sides.key == nullptr ? "keys" : "values"));
        }
        loaded.first[layer] = {sides.key, sides.value};
    }
    loaded.second.insert(set.metadata.begin(), set.metadata.end());
    return loaded;
}

}  // namespace

void bind_files(nb::module_& module) {
    module.def("save_codecs", &save, nb::arg("path"), nb::arg("codecs"), nb::arg("metadata") = text_map(),
               "Writes codecs of keys and values by layer, and free text, to one file: all or nothing.");
    module.def("load_codecs", &load, nb::arg("path"), "The codecs by layer and the free text of a file.");
}

}  // namespace py
