// SPDX-License-Identifier: MIT
/// @file
/// Every umbrella header and the Eigen maps in one program.
#include <rvqkv/files.hpp>
#include <rvqkv/interop/eigen.hpp>
#include <rvqkv/learn.hpp>
#include <rvqkv/rvqkv.hpp>

int main() {
    return rvqkv::name_of(rvqkv::dtype::float16).empty() ? 1 : 0;
}
