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

inline float2 __half22float2(__half2 both) { return {static_cast<float>(both.x), static_cast<float>(both.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {{static_cast<_Float16>(x)}, {static_cast<_Float16>(y)}}; }
