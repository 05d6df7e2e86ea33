// As much of CUDA's half precision as csrc/cuda uses.

#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
  explicit operator float() const { return static_cast<float>(value); }
};
struct __half2 {
  __half x, y;
};

inline __half2 __habs2(__half2 both) {
  uint32_t bits;
  memcpy(&bits, &both, 4);
  bits &= 0x7fff7fffu;
  memcpy(&both, &bits, 4);
  return both;
}
inline float2 __half22float2(__half2 both) { return {static_cast<float>(both.x), static_cast<float>(both.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {{static_cast<_Float16>(x)}, {static_cast<_Float16>(y)}}; }
