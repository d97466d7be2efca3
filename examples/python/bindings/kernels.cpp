// SPDX-License-Identifier: MIT
#include <rvqkv/simd/compile_kernels.hpp>
