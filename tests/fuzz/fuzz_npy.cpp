// SPDX-License-Identifier: MIT
/// @file
/// Fuzzes the .npy reader: whatever it takes has the size that it says.
#include "fuzz_target.hpp"
#include "rvqkv/files/npy.hpp"

namespace {

std::string with_header(std::string_view header, std::size_t data_bytes, char version) {
    std::string file = "\x93NUMPY";
    file += {version, '\0', static_cast<char>(header.size()), '\0'};
    file += version == 1 ? std::string() : std::string(2, '\0');
    return file + std::string(header) + std::string(data_bytes, '\x3c');
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const auto opened = rvqkv::npy_file::parse(fuzz::bytes_of(data, size));
    if (!opened) {
        fuzz::require(!opened.error().message.empty(), "an error says what is wrong");
        return 0;
    }
    std::size_t elements = 1;
    for (const std::size_t extent : opened.value().shape()) {
        elements *= extent;
    }
    for (const std::size_t heads : {0U, 1U, 2U, 3U}) {
        if (const auto loaded = opened.value().load({}, heads); loaded.ok()) {
            const rvqkv::tensor_view view = loaded.value().view();
            fuzz::require(view.rows() * view.channels() == elements, "a loaded tensor has all elements");
        }
    }
    static_cast<void>(opened.value().load({1, 1}));
    return 0;
}

std::vector<std::string> fuzz_seeds() {
    return {
        with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 4), }       \n", 96, 1),
        with_header("{'descr': '<f2', 'fortran_order': False, 'shape': (4, 6), }\n", 48, 2),
        with_header("{\"shape\":(0,1,2),\"fortran_order\":False,\"descr\":\"|V2\"}", 0, 3),
        with_header("{'descr': [('x', '>f4')], 'fortran_order': True, 'shape': (7,), }\n", 28, 1),
    };
}
