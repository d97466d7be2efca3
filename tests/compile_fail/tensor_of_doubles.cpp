// SPDX-License-Identifier: MIT
// expect: TensorElement
/// @file
/// A view of an element type that the library does not know.
#include "rvqkv/core/tensor_view.hpp"

#ifdef MENDED
using element = float;
#else
using element = double;
#endif

rvqkv::tensor_view look(element* data) {
    return rvqkv::tensor_view(data, {1, 1, 8});
}
