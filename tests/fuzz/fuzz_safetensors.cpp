// SPDX-License-Identifier: MIT
/// @file
/// Fuzzes the safetensors reader: whatever it takes, every tensor in it can be read in every way.
#include "fuzz_target.hpp"
#include "rvqkv/files/safetensors.hpp"

#include <cstring>

namespace {

std::string with_header(std::string_view header, std::size_t data_bytes) {
    const std::uint64_t length = header.size();
    std::string file(sizeof(length), '\0');
    std::memcpy(file.data(), &length, sizeof(length));
    return file + std::string(header) + std::string(data_bytes, '\x3c');
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const auto opened = rvqkv::safetensors_file::parse(fuzz::bytes_of(data, size));
    if (!opened) {
        fuzz::require(!opened.error().message.empty(), "an error says what is wrong");
        return 0;
    }
    const rvqkv::safetensors_file& file = opened.value();
    std::size_t total = 0;
    for (const rvqkv::tensor_info& tensor : file.tensors()) {
        std::vector<std::byte> bytes(tensor.bytes);
        fuzz::require(file.read(tensor, bytes).ok(), "every tensor can be read");
        total += bytes.size();
        fuzz::require(file.tensor(tensor.name).value() == &tensor, "every tensor is found by its name");
        if (const auto loaded = file.load(tensor.name); loaded.ok()) {
            const rvqkv::tensor_view view = loaded.value().view();
            fuzz::require(view.rows() * view.channels() * rvqkv::size_of(view.type()) == tensor.bytes,
                          "a loaded tensor has all elements");
            std::vector<float> floats(view.rows() * view.channels());
            fuzz::require(file.read_floats(tensor.name, floats).ok(), "what can be loaded can be widened");
        }
    }
    fuzz::require(total < size, "tensors do not overlap");
    static_cast<void>(file.verify_checksum());
    return 0;
}

std::vector<std::string> fuzz_seeds() {
    return {
        with_header("{}", 0),
        with_header(R"({"a":{"dtype":"F32","shape":[2,1,3],"data_offsets":[0,24]}}      )", 24),
        with_header(R"({"__metadata__":{"format":"pt","k\n":"\u20ac"},"x":{"dtype":"F16","shape":[0],"data_offsets":)"
                    R"([4,4]},"y":{"shape":[],"data_offsets":[0,4],"dtype":"I32"},"z":{"dtype":"BF16","shape":[2,3],)"
                    R"("data_offsets":[4,16]}})",
                    16),
        with_header(R"({"__metadata__":{"checksum":"0123456789abcdef"},"b":{"dtype":"BOOL","shape":[1,1,1,1,2],)"
                    R"("data_offsets":[0,2]},"c":{"dtype":"F64","shape":[1],"data_offsets":[2,10]}})",
                    10),
    };
}
