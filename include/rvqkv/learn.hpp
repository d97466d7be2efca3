// SPDX-License-Identifier: MIT
/// @file
/// Everything that training needs, on top of `rvqkv/rvqkv.hpp`.
#pragma once

#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/thread_pool.hpp"
#include "rvqkv/learn/codebook_trainer.hpp"
#include "rvqkv/learn/ema_trainer.hpp"
#include "rvqkv/learn/kmeans.hpp"
#include "rvqkv/learn/model_trainer.hpp"
#include "rvqkv/learn/progress.hpp"
#include "rvqkv/learn/random.hpp"
#include "rvqkv/learn/straight_through.hpp"
#include "rvqkv/rvqkv.hpp"
