// SPDX-License-Identifier: MIT
// expect: no matching (function|constructor)
/// @file
/// A writable view of memory that is not.
#include "rvqkv/core/tensor_view.hpp"

#ifdef MENDED
rvqkv::mutable_tensor_view look(float* data) {
#else
rvqkv::mutable_tensor_view look(const float* data) {
#endif
    return rvqkv::mutable_tensor_view(data, {1, 1, 8});
}
