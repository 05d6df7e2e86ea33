// Norms of tokens that are spread over a block. Sums have the same order in all kernels.

#pragma once

#include "launch.cuh"

namespace stgp::cuda {

// Adds |v|^p to a thread's sum for the values v of a vec; for p = infinity, updates the thread's largest |v|.
// Magnitudes are compared as integers, in which NaN is above infinity: a maximum of floats could lose it.
template <class T>
__device__ __forceinline__ float add_vec(Norm norm, float total, const Vec& vec) {
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    float values[PER_WORD<T>];
    unpack<T>(vec.word[w], values);
#pragma unroll
    for (float value : values) {
      if (norm == Norm::l2) {
        total = fmaf(value, value, total);
      } else if (norm == Norm::l1) {
        total += fabsf(value);
      } else {
        total = __int_as_float(max(__float_as_int(total), __float_as_int(fabsf(value))));
      }
    }
  }
  return total;
}

// The result of add_vec for a thread's share of the first `channels` channels of a token, which `threads` threads of the
// block share. A sum over the block then has the order of a block of `threads` threads.
template <class T, Access A>
__device__ __forceinline__ float add_channels(Norm norm, const T* token, int32_t channels, int64_t stride,
                                              int32_t threads) {
  const int32_t thread = threadIdx.x;
  float total = 0.0f;
  if (thread >= threads) return total;
#pragma unroll 1  // a kernel that holds a window has no registers for more
  for (int32_t channel = thread * PER_VEC<T>; channel < channels; channel += threads * PER_VEC<T>) {
    total = add_vec<T>(norm, total, load_vec<A, CacheHint::keep>(token, channel, channels, stride));
  }
  return total;
}

// Joins the results of add_vec for two sets of channels.
struct Join {
  Norm norm;

  __device__ __forceinline__ float operator()(float left, float right) const {
    return norm == Norm::max ? __int_as_float(max(__float_as_int(left), __float_as_int(right))) : left + right;
  }
};

extern __shared__ float4 dynamic_shared_memory[];  // its size is an argument of the launch

// Values of the warps of a block, in two buffers for consecutive calls of join_block.
using Exchange = float4[2][MAX_THREADS / WARP];

static __device__ __forceinline__ Exchange& exchange() {
  static __shared__ Exchange of_warps;
  return of_warps;
}

// Joins N values (1 or 4) of each thread over all threads of a block, and gives the results to every thread. It takes
// one barrier, or none if the block is a single warp. Consecutive calls must alternate between buffers 0 and 1: a
// thread that has passed the barrier of one call has finished reading the buffer of the call before.
template <int N, class Join>
__device__ __forceinline__ void join_block(Join join, float (&values)[N], int32_t buffer) {
  static_assert(N == 1 || N == 4);
  Exchange& of_warps = exchange();
  const int32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  constexpr unsigned ALL = 0xffffffffu;

  float value = values[0];
  if constexpr (N == 4) {
    // Lanes 8q, ..., 8q + 7 continue with value q alone. This takes 6 exchanges instead of 20.
    const bool upper = lane & 16, second = lane & 8;
    float kept[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float other = __shfl_xor_sync(ALL, upper ? values[n] : values[2 + n], 16);
      kept[n] = join(upper ? values[2 + n] : values[n], other);
    }
    const float other = __shfl_xor_sync(ALL, second ? kept[0] : kept[1], 8);
    value = join(second ? kept[1] : kept[0], other);
  } else {
    value = join(value, __shfl_xor_sync(ALL, value, 16));
    value = join(value, __shfl_xor_sync(ALL, value, 8));
  }
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) value = join(value, __shfl_xor_sync(ALL, value, offset));

  if (warps == 1) {
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = __shfl_sync(ALL, value, 8 * n);
    return;
  }
  if (lane % 8 == 0 && lane / 8 < N) reinterpret_cast<float*>(&of_warps[buffer][warp])[lane / 8] = value;
  __syncthreads();
  for (int32_t w = 0; w < warps; ++w) {
    const float4 four = of_warps[buffer][w];
    const float found[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = w == 0 ? found[n] : join(values[n], found[n]);
  }
}

// (total * inv_count)^(1/p) for p = 1 and 2, total for infinity. `total` is a result of join_block; inv_count is 1 / C,
// or 1 for norms that are not normalized.
__device__ __forceinline__ float finish_norm(Norm norm, float total, float inv_count) {
  if (norm == Norm::max) return total;
  const float mean = __fmul_rn(total, inv_count);
  return norm == Norm::l2 ? sqrtf(mean) : mean;
}

// temperature * norm. The product is rounded before it is used: if it were fused with a subtraction, logit - largest
// could differ from 0 for the largest logit.
__device__ __forceinline__ float logit(float temperature, float norm) { return __fmul_rn(temperature, norm); }

}  // namespace stgp::cuda
