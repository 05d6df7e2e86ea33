// As much of CUDA as csrc/cuda uses, for a C++ compiler: the threads of a block are fibers that take turns on the CPU.
//
// It stands in for <cuda_runtime.h>. A fiber runs until it waits for others: at a barrier, or at an exchange between
// the lanes of a warp. Barriers and exchanges that not all threads reach end the process with a message, and shared
// memory holds NaN at the start of every block. Blocks run one after the other, their warps in turns forward and
// backward.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __shared__ __attribute__((section("shared_memory")))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// A device of few multiprocessors, so that the blocks of small calls compute several cells each.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}

extern dim3 threadIdx, blockIdx, blockDim;  // of the fiber that runs

// Blocks run one after the other, and so do launches: no kernel waits for the launch before.
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaFuncAttributes {
  int ptxVersion = 80;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

namespace emulation {

void barrier();
uint32_t exchange(uint32_t value, unsigned lane_of_source);
// Stands for mma.m16n8k8 of bfloat16 with float32 sums. A product is exact; eight of them and the former sum are added
// and rounded once, towards 0 as tensor cores do.
void multiply_add(float (&sum)[4], uint32_t upper, uint32_t lower, uint32_t b);
void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body);

}  // namespace emulation

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulation {

// Returns whether launches are listed at the moment, and adds this one to the list if they are.
bool is_listed(const void* kernel, const cudaLaunchConfig_t& config);

}  // namespace emulation

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Parameters&... parameters) {
  if (config->gridDim.x == 0 || config->gridDim.x > 0x7fffffffu || config->blockDim.x == 0 ||
      config->blockDim.x > 1024 || config->dynamicSmemBytes > 48 << 10 || config->numAttrs > 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (emulation::is_listed(reinterpret_cast<const void*>(kernel), *config)) return cudaSuccess;
  emulation::run_grid(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, [&] { kernel(parameters...); });
  return cudaSuccess;
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int n = 0; n < 4; ++n) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * n & 7) & 0xff) << 8 * n;
  return result;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }

inline void __syncthreads() { emulation::barrier(); }

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline int32_t __float_as_int(float value) { return static_cast<int32_t>(__float_as_uint(value)); }
inline float __int_as_float(int32_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }

inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  return __uint_as_float(emulation::exchange(__float_as_uint(value), threadIdx.x % 32 ^ lanes));
}
inline float __shfl_sync(unsigned, float value, int lane) {
  return __uint_as_float(emulation::exchange(__float_as_uint(value), lane));
}
inline uint32_t __shfl_sync(unsigned, uint32_t value, int lane) { return emulation::exchange(value, lane); }

// x86 and ARM round these correctly, as the functions that they stand for do; expf and log2 are the C library's.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }

template <class A>
A min(A a, A b) {
  return b < a ? b : a;
}
template <class A>
A max(A a, A b) {
  return a < b ? b : a;
}

inline uint4 __ldcs(const uint4* from) { return *from; }
inline void __stcs(uint4* to, uint4 value) { *to = value; }
