// Norms of tokens that are spread over a block, and the weights that follow. Sums have the same order in all kernels.

#pragma once

#include "launch.cuh"

namespace stgp::cuda {

// Adds the products of matrices A (16 x 8) and B (8 x 8) of bfloat16 to a 16 x 8 matrix of float32, on the tensor
// cores. All lanes of a warp take part: lane l has row l / 4 of A and, in the second word, the row 8 below, columns 2
// (l % 4) and 2 (l % 4) + 1; the same part of column l / 4 of B; and the same columns of these rows of the sum, two by
// two.
__device__ __forceinline__ void multiply_add(float (&sum)[4], uint32_t upper, uint32_t lower, uint32_t b) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(upper), "r"(lower), "r"(b));
#else
  emulation::multiply_add(sum, upper, lower, b);
#endif
}

// Adds |value|^p to a sum; for p = infinity, updates the largest |value|. Magnitudes are compared as integers, in which
// NaN is above infinity: a maximum of floats could lose it.
__device__ __forceinline__ float add_magnitude(Norm norm, float sum, float magnitude) {
  if (norm == Norm::l2) return fmaf(magnitude, magnitude, sum);
  if (norm == Norm::l1) return sum + magnitude;
  return __int_as_float(max(__float_as_int(sum), __float_as_int(magnitude)));
}

// Adds the values of a vec to a thread's sum.
template <class T>
__device__ __forceinline__ float add_magnitudes(Norm norm, float sum, const Vec& vec) {
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    float magnitudes[PER_WORD<T>];
    unpack_magnitudes<T>(vec.word[w], magnitudes);
#pragma unroll
    for (float magnitude : magnitudes) sum = add_magnitude(norm, sum, magnitude);
  }
  return sum;
}

// A thread's part of the sum of |v|^p over the values v of a token; for p = infinity, of the largest |v|.
template <class T>
struct Total {
  float sum = 0.0f;

  __device__ __forceinline__ void add(Norm norm, const Vec& vec) { sum = add_magnitudes<T>(norm, sum, vec); }
  __device__ __forceinline__ float of_thread(Norm) const { return sum; }
};

// In bfloat16 the tensor cores sum squares: a word of every lane, as a matrix, times its transpose has the sums of
// squares of four lanes on its diagonal. Products are exact, and sums are float32. All lanes of a warp must add
// together.
template <>
struct Total<__nv_bfloat16> {
  float even[4] = {}, odd[4] = {};  // of words of even and of odd number; of other norms than p = 2, even[0] is the sum

  __device__ __forceinline__ void add(Norm norm, const Vec& vec) {
    if (norm == Norm::l2) {
#pragma unroll
      for (int w = 0; w < WORDS; w += 2) {
        multiply_add(even, vec.word[w], vec.word[w + 1], vec.word[w]);
        multiply_add(odd, vec.word[w], vec.word[w + 1], vec.word[w + 1]);
      }
    } else {
      even[0] = add_magnitudes<__nv_bfloat16>(norm, even[0], vec);
    }
  }

  // The lane that has an element of the diagonal returns it; the others return 0. Words of even number are the upper
  // rows of the matrix, words of odd number the lower ones.
  __device__ __forceinline__ float of_thread(Norm norm) const {
    if (norm != Norm::l2) return even[0];
    const int32_t row = threadIdx.x % WARP / 4, pair = threadIdx.x % 4;
    const float sum = row % 2 == 0 ? even[0] + odd[2] : even[1] + odd[3];
    return pair == row / 2 ? sum : 0.0f;
  }
};

// Returns a vec whose channels from `channels` on are 0.
template <class T>
__device__ __forceinline__ Vec first_of_vec(const Vec& vec, int32_t channels) {
  Vec first;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    const int32_t of_word = channels - w * PER_WORD<T>;
    const uint32_t mask = of_word >= PER_WORD<T> ? ~0u : of_word > 0 ? 0xffffu : 0u;
    first.word[w] = vec.word[w] & mask;
  }
  return first;
}

// Joins the totals of two sets of channels.
struct Join {
  static constexpr float IDENTITY = 0.0f;
  Norm norm;

  __device__ __forceinline__ float operator()(float left, float right) const {
    return norm == Norm::max ? __int_as_float(max(__float_as_int(left), __float_as_int(right))) : left + right;
  }
};

struct Sum {
  static constexpr float IDENTITY = 0.0f;

  __device__ __forceinline__ float operator()(float left, float right) const { return left + right; }
};

struct Highest {
  static constexpr float IDENTITY = -INFINITY;

  __device__ __forceinline__ float operator()(float left, float right) const { return fmaxf(left, right); }
};

extern __shared__ float4 dynamic_shared_memory[];  // its size is an argument of the launch

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int SHARERS = 8;  // lanes that share the joining of a value over the warps: 4 values fill a warp

// Values of the warps of a block, four for each, in two buffers for consecutive calls of join_lanes.
using Exchange = float[2][MAX_THREADS / WARP * 4];

static __device__ __forceinline__ Exchange& exchange() {
  static __shared__ Exchange of_warps;
  return of_warps;
}

// Joins N values (1 or 4) of each thread over all threads of a block. Of four values, lanes 8q, ..., 8q + 7 get the
// result for value q; of a single value, all lanes get it. It takes one barrier, or none if the block is a single warp.
// Consecutive calls must alternate between buffers 0 and 1: a thread that has passed the barrier of one call has
// finished reading the buffer of the call before.
//
// Warps are joined as a tree: a value of warp n with that of warp n + 8, these as the lanes of a warp are. Warps that a
// block does not have count as the identity, so that the order does not depend on their number.
template <int N, class Join>
__device__ __forceinline__ float join_lanes(Join join, const float (&values)[N], int32_t buffer) {
  static_assert(N == 1 || N == 4);
  const int32_t lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  float value = values[0];
  if constexpr (N == 4) {
    // Lanes 8q, ..., 8q + 7 continue with value q alone. This takes 6 exchanges instead of 20.
    const bool upper = lane & 16, second = lane & 8;
    float kept[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float other = __shfl_xor_sync(ALL_LANES, upper ? values[n] : values[2 + n], 16);
      kept[n] = join(upper ? values[2 + n] : values[n], other);
    }
    const float other = __shfl_xor_sync(ALL_LANES, second ? kept[0] : kept[1], 8);
    value = join(second ? kept[1] : kept[0], other);
  } else {
    value = join(value, __shfl_xor_sync(ALL_LANES, value, 16));
    value = join(value, __shfl_xor_sync(ALL_LANES, value, 8));
  }
  const auto join_sharers = [&] {
#pragma unroll
    for (int offset = SHARERS / 2; offset > 0; offset /= 2) {
      value = join(value, __shfl_xor_sync(ALL_LANES, value, offset));
    }
  };
  join_sharers();
  if (warps == 1) return value;

  float* of_warps = exchange()[buffer];
  const int32_t n = lane % SHARERS, own = n * 4 + lane / SHARERS;
  if (n == 0) of_warps[threadIdx.x / SHARERS] = value;
  __syncthreads();
  value = n < warps ? of_warps[own] : Join::IDENTITY;
  if (n + SHARERS < warps) value = join(value, of_warps[own + 4 * SHARERS]);
  join_sharers();
  return value;
}

// Gives the four values that lanes 8q, ..., 8q + 7 hold to every lane.
__device__ __forceinline__ void spread(float value, float (&values)[4]) {
#pragma unroll
  for (int q = 0; q < 4; ++q) values[q] = __shfl_sync(ALL_LANES, value, SHARERS * q);
}

// Joins N values (1 or 4) of each thread over all threads of a block, and gives the results to every thread. Barriers
// and buffers are those of join_lanes.
template <int N, class Join>
__device__ __forceinline__ void join_block(Join join, float (&values)[N], int32_t buffer) {
  const float value = join_lanes(join, values, buffer);
  if constexpr (N == 4) {
    spread(value, values);
  } else {
    values[0] = value;
  }
}

// The square root, which may be off in the last place. A value below 1e-38 counts as 0.
__device__ __forceinline__ float approximate_sqrt(float value) {
#ifdef __CUDACC__
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
#else
  return sqrtf(value);
#endif
}

// (total * inv_count)^(1/p) for p = 1 and 2, total for infinity. `total` is a result of a join; inv_count is 1 / C, or
// 1 for norms that are not normalized.
__device__ __forceinline__ float finish_norm(Norm norm, float total, float inv_count) {
  if (norm == Norm::max) return total;
  const float mean = __fmul_rn(total, inv_count);
  return norm == Norm::l2 ? approximate_sqrt(mean) : mean;
}

// temperature * norm. The product is rounded before it is used: if it were fused with a subtraction, logit - largest
// could differ from 0 for the largest logit.
__device__ __forceinline__ float logit(float temperature, float norm) { return __fmul_rn(temperature, norm); }

// e^value for a value of at most 0. Where the power is far from 1 it is off in more than its last place, but by less than
// the last place of 1, and the weights of a window add up to 1. A power below 1e-38 counts as 0.
__device__ __forceinline__ float power_of_e(float value) {
  const float exponent = value * 1.4426950408889634f;
#ifdef __CUDACC__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
#else
  return exp2f(exponent);
#endif
}

// power / total for a total of at least 1, which may be off in the last places.
__device__ __forceinline__ float divide_by_total(float power, float total) {
#ifdef __CUDACC__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(total));
  return power * inverse;
#else
  return power / total;
#endif
}

// The weight of a token of a window of four, softmax(temperature * norm), where lanes 8q, ..., 8q + 7 have the norm of
// token q. Tokens outside the frame are not `taken`; their weight is 0.
__device__ __forceinline__ float weigh(float norm, bool taken, float temperature) {
  const float own = taken ? logit(temperature, norm) : -INFINITY;
  float highest = fmaxf(own, __shfl_xor_sync(ALL_LANES, own, 2 * SHARERS));
  highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, SHARERS));
  const float power = power_of_e(own - highest);
  // The order of this sum is that of join_block, by which pool.cu adds the four powers of such a window.
  float total = power + __shfl_xor_sync(ALL_LANES, power, 2 * SHARERS);
  total += __shfl_xor_sync(ALL_LANES, total, SHARERS);
  return divide_by_total(power, total);
}

}  // namespace stgp::cuda
