// Tokens in memory and in registers. All kernels spread the channels of a token over a block in the same way, so that
// sums over channels have one order, whatever the number of warps: warp n has channels n * WARP_CHANNELS and following,
// and vec k of lane l starts (k * WARP + l) * PER_VEC<T> channels after the first of them.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../grid_pool.h"
#include "divisor.cuh"

namespace stgp::cuda {

constexpr int WARP = 32;                               // threads of a warp
constexpr int VEC_BYTES = 16;                          // bytes of a Vec
constexpr int WORDS = VEC_BYTES / 4;                   // 32-bit words of a Vec
constexpr int THREAD_CHANNELS = 16;                    // channels of a token that a thread holds
constexpr int WARP_CHANNELS = WARP * THREAD_CHANNELS;  // channels of a token that a warp holds

// Consecutive channels of a token, 128 bits. They stay packed until they are used: unpacked 16-bit values would take
// twice the registers.
struct alignas(VEC_BYTES) Vec {
  uint32_t word[WORDS];
};

template <class T>
constexpr int PER_WORD = 4 / static_cast<int>(sizeof(T));  // channels of a word
template <class T>
constexpr int PER_VEC = VEC_BYTES / static_cast<int>(sizeof(T));  // channels of a Vec
template <class T>
constexpr int VECS = THREAD_CHANNELS / PER_VEC<T>;  // vecs of a thread
template <class T>
constexpr int VEC_STEP = WARP * PER_VEC<T>;  // channels from one vec of a thread to the next

// The first channel of this thread.
template <class T>
__device__ __forceinline__ int32_t first_channel() {
  return static_cast<int32_t>(threadIdx.x / WARP * WARP_CHANNELS + threadIdx.x % WARP * PER_VEC<T>);
}

// Calls visit(channel) with the first channel of each vec of this thread in a token of C channels, for blocks that may
// hold fewer channels at a time. All lanes of a warp visit together; some of their vecs may be beyond the token.
template <class T, class Visit>
__device__ __forceinline__ void for_each_vec(int32_t C, Visit visit) {
  const int32_t lane = threadIdx.x % WARP * PER_VEC<T>;
  for (int32_t base = threadIdx.x / WARP * WARP_CHANNELS; base < C; base += blockDim.x * THREAD_CHANNELS) {
    for (int32_t k = 0; k < VECS<T>; ++k) visit(base + k * VEC_STEP<T> + lane);
  }
}

template <class To, class From>
__device__ __forceinline__ To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

__device__ __forceinline__ void unpack(uint32_t word, float (&values)[2], __nv_bfloat16) {
  values[0] = __uint_as_float(__byte_perm(word, 0, 0x1044));
  values[1] = __uint_as_float(__byte_perm(word, 0, 0x3244));
}

__device__ __forceinline__ void unpack(uint32_t word, float (&values)[2], __half) {
  const float2 both = __half22float2(same_bits<__half2>(word));
  values[0] = both.x;
  values[1] = both.y;
}

__device__ __forceinline__ void unpack(uint32_t word, float (&values)[1], float) { values[0] = __uint_as_float(word); }

template <class T>
__device__ __forceinline__ void unpack(uint32_t word, float (&values)[PER_WORD<T>]) {
  unpack(word, values, T{});
}

// Unpacks magnitudes. A kernel that unpacks a word for its norm and once more for a sum must do it by other
// instructions: the compiler would keep equal results in registers, of which there are not enough.
__device__ __forceinline__ void unpack_magnitudes(uint32_t word, float (&values)[2], __nv_bfloat16) {
  values[0] = fabsf(__uint_as_float(word << 16));
  values[1] = fabsf(__uint_as_float(word & 0xffff0000u));
}

__device__ __forceinline__ void unpack_magnitudes(uint32_t word, float (&values)[2], __half) {
  unpack(same_bits<uint32_t>(__habs2(same_bits<__half2>(word))), values, __half{});
}

__device__ __forceinline__ void unpack_magnitudes(uint32_t word, float (&values)[1], float) {
  values[0] = fabsf(__uint_as_float(word));
}

template <class T>
__device__ __forceinline__ void unpack_magnitudes(uint32_t word, float (&values)[PER_WORD<T>]) {
  unpack_magnitudes(word, values, T{});
}

__device__ __forceinline__ uint32_t pack(const float (&values)[2], __nv_bfloat16) {
  return same_bits<uint32_t>(__floats2bfloat162_rn(values[0], values[1]));
}

__device__ __forceinline__ uint32_t pack(const float (&values)[2], __half) {
  return same_bits<uint32_t>(__floats2half2_rn(values[0], values[1]));
}

__device__ __forceinline__ uint32_t pack(const float (&values)[1], float) { return __float_as_uint(values[0]); }

template <class T>
__device__ __forceinline__ uint32_t pack(const float (&values)[PER_WORD<T>]) {
  return pack(values, T{});
}

// Rounds and packs all channels of a vec.
template <class T>
__device__ __forceinline__ Vec pack_vec(const float (&values)[PER_VEC<T>]) {
  Vec vec;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    float some[PER_WORD<T>];
#pragma unroll
    for (int e = 0; e < PER_WORD<T>; ++e) some[e] = values[w * PER_WORD<T> + e];
    vec.word[w] = pack<T>(some);
  }
  return vec;
}

// The access to channels in memory. vector: every token is aligned to 16 bytes, and 128 bits are moved at a time.
// scalar: strides and alignment are arbitrary, and one channel is moved at a time.
enum class Access { vector, scalar };

// stream: the memory is accessed once, and should not displace other data in the cache. keep: it is accessed again
// soon.
enum class CacheHint { stream, keep };

// Loads the channels of a token from `channel` on. Channels from C on are 0.
template <Access A, CacheHint U, class T>
__device__ __forceinline__ Vec load_vec(const T* token, int32_t channel, int32_t C, int64_t stride) {
  Vec vec{};
  if constexpr (A == Access::vector) {
    if (channel < C) {
      const auto* from = reinterpret_cast<const uint4*>(token + channel);
      vec = same_bits<Vec>(U == CacheHint::stream ? __ldcs(from) : *from);
    }
  } else {
#pragma unroll
    for (int e = 0; e < PER_VEC<T>; ++e) {
      if (channel + e < C) {
        const T value = token[(channel + e) * stride];
        if constexpr (sizeof(T) == 4) {
          vec.word[e] = same_bits<uint32_t>(value);
        } else {
          vec.word[e / 2] |= static_cast<uint32_t>(same_bits<uint16_t>(value)) << (e % 2 * 16);
        }
      }
    }
  }
  return vec;
}

// Loads 128 bits at `from` into `vec` if `wanted`; else leaves it as it is. The load is predicated: a branch around it
// would be instructions that every lane takes.
template <CacheHint U>
__device__ __forceinline__ void load_if(Vec& vec, bool wanted, const void* from) {
#ifdef __CUDACC__
#define STGP_LOAD(HINT)                                                                                    \
  asm volatile("{.reg .pred p; setp.ne.s32 p, %4, 0; @p ld.global" HINT ".v4.u32 {%0, %1, %2, %3}, [%5];}" \
               : "+r"(vec.word[0]), "+r"(vec.word[1]), "+r"(vec.word[2]), "+r"(vec.word[3])                \
               : "r"(static_cast<int32_t>(wanted)), "l"(from))
  if constexpr (U == CacheHint::stream) {
    STGP_LOAD(".cs");
  } else {
    STGP_LOAD("");
  }
#undef STGP_LOAD
#else
  if (wanted) memcpy(&vec, from, sizeof(Vec));
#endif
}

// Stores the channels of a token from `channel` on, except channels from C on.
template <Access A, CacheHint U, class T>
__device__ __forceinline__ void store_vec(T* token, int32_t channel, int32_t C, int64_t stride, const Vec& vec) {
  if constexpr (A == Access::vector) {
    if (channel < C) {
      auto* to = reinterpret_cast<uint4*>(token + channel);
      if constexpr (U == CacheHint::stream) {
        __stcs(to, same_bits<uint4>(vec));
      } else {
        *to = same_bits<uint4>(vec);
      }
    }
  } else {
#pragma unroll
    for (int e = 0; e < PER_VEC<T>; ++e) {
      if (channel + e < C) {
        if constexpr (sizeof(T) == 4) {
          token[(channel + e) * stride] = same_bits<T>(vec.word[e]);
        } else {
          token[(channel + e) * stride] = same_bits<T>(static_cast<uint16_t>(vec.word[e / 2] >> (e % 2 * 16)));
        }
      }
    }
  }
}

// Optimisation barrier: the compiler unpacks the vec again at its next use, instead of keeping the unpacked values in
// registers.
__device__ __forceinline__ void keep_packed(Vec& vec) {
#pragma unroll
  for (uint32_t& word : vec.word) asm volatile("" : "+r"(word));
}

// An array (videos, T, rows, columns, C) with any strides. The element type is const for x.
template <class T>
struct Frames {
  T* base;
  Strides strides;
  Divisor frames;  // number of frames of a video

  __device__ __forceinline__ T* frame(int32_t number) const {
    const int32_t video = frames.quotient(number);
    return base + video * strides.video + (number - video * frames.value) * strides.frame;
  }

  __device__ __forceinline__ T* token(T* frame, int32_t row, int32_t col) const {
    return frame + row * strides.row + col * strides.col;
  }
};

// The nodes of the general form: frames of x, and summaries in scratch, (summaries, H, W, C).
template <class T>
struct Nodes {
  Frames<const T> x;
  const T* summaries;
  int32_t H, W, C;

  __device__ __forceinline__ const T* token(int32_t node, int32_t row, int32_t col, int64_t* channel_stride) const {
    if (node >= 0) {
      *channel_stride = x.strides.channel;
      return x.token(x.frame(node), row, col);
    }
    *channel_stride = 1;
    return summaries + ((static_cast<int64_t>(~node) * H + row) * W + col) * C;
  }
};

}  // namespace stgp::cuda
