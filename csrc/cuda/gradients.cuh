// Gradients of grid_pool, norm_pool and temporal_grid in x: formulas and functions that both forms have in common.
// backward.cu has the general form, fused_backward.cu the fused form.
//
// The gradient of a node has two parts: the gradient from the windows that read it (for temporal_grid: the gradient of
// the output frame that it is copied to), and a part of the gradients of the summaries that read it. Every token
// gathers both. The summaries come first, level by level from the last, in float32; then the frames of x. Sums have one
// order.
//
// A window has tokens t_k with norms n_k, weights a = softmax(temperature * n), and the gradient g of its pooled token.
// With d_k = g . t_k,
//
//   gradient of t_k += a_k g + temperature a_k (d_k - sum_k a_k d_k) dn_k / dt_k
//
//   dn / dt_c = t_c / (M n)                            p = 2
//               sign(t_c) / M                          p = 1
//               sign(t_c) / L if |t_c| = n, else 0     p = infinity
//               sign(t_c) (|t_c| / n)^(p - 1) / M      any other p
//
// where M is the number of channels that the norm runs over for a norm with the mean and 1 for one with the sum, and L
// is the number of these channels with |t_c| = n. The derivative is 0 in other channels, and if t_c or n is 0.

#pragma once

#include <cmath>

#include "norms.cuh"

namespace stgp::cuda {

constexpr int QUAD = PER_VEC<float>;  // channels of a summary's gradient that are moved at the same time

// sign(value) * magnitude, where sign(0) is 0.
__device__ __forceinline__ float with_sign_of(float value, float magnitude) {
  return value == 0.0f ? 0.0f : copysignf(1.0f, value) * magnitude;
}

// factor * dn / dt_c without the part that depends on c. `largest` is the number of channels of magnitude n.
__device__ __forceinline__ float slope_of_token(Norm norm, float factor, float n, float inv_count, float largest) {
  if (n == 0.0f) return 0.0f;
  if (norm == Norm::l2) return __fdiv_rn(factor * inv_count, n);
  return norm == Norm::max ? __fdiv_rn(factor, largest) : factor * inv_count;
}

// factor * dn / dt_c for a channel of this value. `of_token` is the result of slope_of_token.
template <bool POWER>
__device__ __forceinline__ float slope(Norm norm, float of_token, float value, float n, float p) {
  if constexpr (POWER) {
    if (value == 0.0f || n == 0.0f) return 0.0f;
    return with_sign_of(value, of_token * powf(__fdiv_rn(fabsf(value), n), p - 1.0f));
  } else {
    if (norm == Norm::l2) return of_token * value;
    return norm == Norm::max && fabsf(value) != n ? 0.0f : with_sign_of(value, of_token);
  }
}

// Unpacks all channels of a vec.
template <class T>
__device__ __forceinline__ void unpack_all(const Vec& vec, float (&values)[PER_VEC<T>]) {
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    float some[PER_WORD<T>];
    unpack<T>(vec.word[w], some);
#pragma unroll
    for (int e = 0; e < PER_WORD<T>; ++e) values[w * PER_WORD<T> + e] = some[e];
  }
}

// Adds the products of the channels of two vecs to `total`.
template <class T>
__device__ __forceinline__ float add_dot(float total, const Vec& left, const Vec& right) {
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    float a[PER_WORD<T>], b[PER_WORD<T>];
    unpack<T>(left.word[w], a);
    unpack<T>(right.word[w], b);
#pragma unroll
    for (int e = 0; e < PER_WORD<T>; ++e) total = fmaf(a[e], b[e], total);
  }
  return total;
}

// Adds the number of channels of magnitude n among the first `channels` of a vec to `count`.
template <class T>
__device__ __forceinline__ float add_largest(float count, const Vec& vec, float n, int32_t channels) {
  float values[PER_VEC<T>];
  unpack_all<T>(vec, values);
#pragma unroll
  for (int e = 0; e < PER_VEC<T>; ++e) count += e < channels && fabsf(values[e]) == n ? 1.0f : 0.0f;
  return count;
}

// Returns whether tokens of x, grad and out can all be moved 128 bits at a time.
inline bool all_vectorized(const int32_t* tables, const Call& call, bool pooled) {
  return is_vectorized(tables, call, tables[H_HEIGHT], tables[H_WIDTH]) &&
         is_vectorized(call.grad, call.grad_strides, tables[H_FRAMES] / call.T, call.T,
                       tables[pooled ? H_OUT_ROWS : H_HEIGHT], tables[pooled ? H_OUT_COLS : H_WIDTH], call.C,
                       element_size(call.dtype));
}

}  // namespace stgp::cuda
