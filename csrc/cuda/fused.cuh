// Functions that the forward and the backward kernel of the fused form share: tokens of an entry, weights of a window.

#pragma once

#include "norms.cuh"

namespace stgp::cuda {

// 1 / n for a cell of n = 1, 2 or 3 rows or columns. The constants save a division.
__device__ __forceinline__ float inverse(int32_t n) { return n == 3 ? 1.0f / 3.0f : n == 2 ? 0.5f : 1.0f; }

// The tokens of an entry's node: a frame of x, or the mosaic of four thumbnails. The parameters P of a kernel must have
// x, scratch, h, w and C.
template <class T, bool MOSAIC, class P>
struct Image {
  const P& p;
  const T* frame;
  int32_t slots[4];

  __device__ __forceinline__ Image(const P& p, const int32_t* entry) : p(p) {
    if constexpr (MOSAIC) {
#pragma unroll
      for (int n = 0; n < 4; ++n) slots[n] = entry[E_SOURCES + n];
    } else {
      frame = p.x.frame(entry[E_NODE]);
    }
  }

  __device__ __forceinline__ const T* token(int32_t row, int32_t col) const {
    if constexpr (MOSAIC) {
      const bool below = row >= p.h, beside = col >= p.w;
      const int64_t slot = below ? (beside ? slots[3] : slots[2]) : (beside ? slots[1] : slots[0]);
      if (below) row -= p.h;
      if (beside) col -= p.w;
      return p.scratch + ((slot * p.h + row) * p.w + col) * p.C;
    } else {
      return p.x.token(frame, row, col);
    }
  }
};

// The weights of the four tokens of a window: softmax(temperature * norm). Tokens outside the frame are not `taken`;
// their weight is 0.
__device__ __forceinline__ void weigh(const float (&norms)[4], const bool (&taken)[4], float temperature,
                                      float (&weights)[4]) {
  float highest = -INFINITY;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    weights[q] = taken[q] ? logit(temperature, norms[q]) : -INFINITY;
    highest = fmaxf(highest, weights[q]);
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) weights[q] = expf(weights[q] - highest);
  // The order of this sum is that of join_block, by which pool.cu adds the four powers of such a window.
  const float total = (weights[0] + weights[2]) + (weights[1] + weights[3]);
#pragma unroll
  for (int q = 0; q < 4; ++q) weights[q] = __fdividef(weights[q], total);
}

}  // namespace stgp::cuda
