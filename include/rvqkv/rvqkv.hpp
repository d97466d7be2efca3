// SPDX-License-Identifier: MIT
/// @file
/// Everything that inference needs: views, quantizers, codecs, the KV cache and attention over it. No dependency beyond
/// the standard library; training is in `rvqkv/learn.hpp`, files are in `rvqkv/files.hpp`.
#pragma once

#include "rvqkv/attend/attention_options.hpp"
#include "rvqkv/attend/layer_attention.hpp"
#include "rvqkv/attend/layer_config.hpp"
#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/attend/rope.hpp"
#include "rvqkv/attend/softmax.hpp"
#include "rvqkv/cache/kv_cache.hpp"
#include "rvqkv/cache/kv_sequence.hpp"
#include "rvqkv/cache/page_source.hpp"
#include "rvqkv/core/aligned_buffer.hpp"
#include "rvqkv/core/bit_packing.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/half.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/simd_level.hpp"
#include "rvqkv/core/tensor_view.hpp"
#include "rvqkv/quantize/byte_grid.hpp"
#include "rvqkv/quantize/codebook.hpp"
#include "rvqkv/quantize/codec.hpp"
#include "rvqkv/quantize/grouping.hpp"
#include "rvqkv/quantize/nearest_codeword.hpp"
#include "rvqkv/quantize/residual_quantizer.hpp"
#include "rvqkv/quantize/scale.hpp"
#include "rvqkv/quantize/vector_quantizer.hpp"
#include "rvqkv/simd/convert.hpp"
#include "rvqkv/version.hpp"
