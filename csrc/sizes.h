// Sizes of scratch that the CPU and the CUDA functions have in common. csrc/cpu/kernels.cpp must not include this file,
// for the reason that csrc/cpu/vector.h gives.

#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>

#include "grid_pool.h"
#include "tables.h"

namespace stgp {

constexpr int64_t SCRATCH_ALIGNMENT = 64;  // bytes: a cache line, and the widest vector

// The largest multiple of SCRATCH_ALIGNMENT. Sizes stay there where they would exceed it: a view of a few bytes can
// have any number of tokens, and memory for a size that has wrapped around would be too small.
constexpr int64_t MOST_BYTES = std::numeric_limits<int64_t>::max() / SCRATCH_ALIGNMENT * SCRATCH_ALIGNMENT;

// The product of sizes, none of them negative, or MOST_BYTES if it is larger.
inline int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t total = 1;
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(total, size, &total) || total > MOST_BYTES) total = MOST_BYTES;
  }
  return total;
}

// The sum of sizes, none of them negative, or MOST_BYTES if it is larger.
inline int64_t sum(std::initializer_list<int64_t> sizes) {
  int64_t total = 0;
  for (const int64_t size : sizes) {
    if (__builtin_add_overflow(total, size, &total) || total > MOST_BYTES) total = MOST_BYTES;
  }
  return total;
}

// `bytes`, rounded up to a multiple of SCRATCH_ALIGNMENT.
inline int64_t aligned(int64_t bytes) {
  return (bytes + SCRATCH_ALIGNMENT - 1) / SCRATCH_ALIGNMENT * SCRATCH_ALIGNMENT;
}

// Bytes of one channel of a token.
inline int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

inline bool is_pooling(Op op) { return op == Op::grid_pool || op == Op::grid_pool_backward; }

inline bool is_backward(Op op) { return op == Op::grid_pool_backward || op == Op::temporal_grid_backward; }

inline bool has_fused_form(const int32_t* tables) { return tables[H_NUM_STAGES] > 0; }

// The fused form stores one thumbnail in each slot, as (slots, h, w, C).
inline int64_t thumbnail_bytes(const int32_t* tables, const Call& call) {
  const int64_t h = (int64_t{tables[H_HEIGHT]} + 1) / 2, w = (int64_t{tables[H_WIDTH]} + 1) / 2;
  return aligned(product({tables[H_SLOTS], h, w, call.C, element_size(call.dtype)}));
}

// The general form stores each summary in full, as (summaries, H, W, C).
inline int64_t summary_bytes(const int32_t* tables, const Call& call) {
  return aligned(product({tables[H_SUMMARIES], tables[H_HEIGHT], tables[H_WIDTH], call.C, element_size(call.dtype)}));
}

}  // namespace stgp
