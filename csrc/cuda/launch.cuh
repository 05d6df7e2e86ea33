// Launches of kernels: the number of threads of a block, the access that a layout allows, and the launch itself.

#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "tokens.cuh"

namespace stgp::cuda {

constexpr int32_t MAX_THREADS = 512;                             // limit of the threads of a block
constexpr int32_t MAX_CHANNELS = MAX_THREADS * THREAD_CHANNELS;  // limit of the channels in the registers of a block

constexpr int64_t MAX_BLOCKS = (int64_t{1} << 31) - 1;  // limit of CUDA for the blocks of a launch

// The number of threads of a block that holds a token, THREAD_CHANNELS channels each. For 32-bit values it is a power
// of two of warps: a thread of the fused kernels takes up to 128 registers, so that a multiprocessor has room for 16
// warps, which only such blocks fill. A thread takes fewer registers for 16-bit values, and a warp without channels
// would only cost instructions.
inline int32_t block_threads(int64_t C, int64_t bytes) {
  const int64_t threads = (std::min<int64_t>(C, MAX_CHANNELS) + THREAD_CHANNELS - 1) / THREAD_CHANNELS;
  int32_t warps = static_cast<int32_t>((threads + WARP - 1) / WARP);
  while (bytes == 4 && (warps & (warps - 1)) != 0) ++warps;
  return std::max(warps, 1) * WARP;
}

// Returns whether tokens at these strides can be moved 16 bytes at a time. The stride of a dimension of size 1 is not
// used.
inline bool is_vectorized(const void* base, const Strides& strides, int64_t videos, int64_t T, int64_t rows,
                          int64_t cols, int64_t C, int64_t bytes) {
  const int64_t values = VEC_BYTES / bytes;
  const auto fits = [&](int64_t size, int64_t stride) { return size <= 1 || stride % values == 0; };
  return reinterpret_cast<uintptr_t>(base) % VEC_BYTES == 0 && C % values == 0 && strides.channel == 1 &&
         fits(videos, strides.video) && fits(T, strides.frame) && fits(rows, strides.row) && fits(cols, strides.col);
}

// Returns whether tokens of x and of out can both be moved 16 bytes at a time. A frame of out has rows x cols tokens.
inline bool is_vectorized(const int32_t* tables, const Call& call, int64_t rows, int64_t cols) {
  const int64_t videos = tables[H_FRAMES] / call.T, bytes = element_size(call.dtype);
  return is_vectorized(call.x, call.x_strides, videos, call.T, tables[H_HEIGHT], tables[H_WIDTH], call.C, bytes) &&
         is_vectorized(call.out, call.out_strides, videos, call.T, rows, cols, call.C, bytes);
}

template <class T>
Frames<const T> frames_of_x(const Call& call) {
  return {static_cast<const T*>(call.x), call.x_strides, Divisor(call.T)};
}

template <class T>
Frames<T> frames_of_out(const Call& call) {
  return {static_cast<T*>(call.out), call.out_strides, Divisor(call.T)};
}

// From compute capability 9.0 on, a launch of a call may start before the launch before it has ended. It must wait for
// that one before it reads or overwrites memory which that one writes or reads, and before it ends: the next launch
// relies on all launches before it, and waits for one alone. These functions do nothing in a kernel that was not
// launched early.

// Waits until the launch before is complete and its stores are visible.
__device__ __forceinline__ void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next launch start as soon as all blocks of this one have called this function or ended.
__device__ __forceinline__ void allow_next_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Returns whether wait_for_launch_before waits in this kernel, on the current device. That depends on the architecture
// which the kernel was compiled for: a newer device can run code for an older one.
template <class Parameters>
bool waits(void (*kernel)(Parameters)) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// Launches kernel(parameters) on `blocks` blocks with `shared_bytes` bytes of dynamic shared memory. If `early`, it may
// start before the launch before has ended. If the launch fails, CUDA's last error is cleared, so that a later check
// does not report it again.
template <class Parameters>
cudaError_t launch(void (*kernel)(Parameters), int64_t blocks, int32_t threads, cudaStream_t stream,
                   const Parameters& parameters, int64_t shared_bytes = 0, bool early = false) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early && waits(kernel) ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Calls launch_range(first, range) for consecutive ranges of 0, ..., count - 1. One launch takes `blocks` blocks for
// each element of its range, and a range has as many elements as a launch has room for.
template <class LaunchRange>
cudaError_t launch_in_ranges(int64_t count, int64_t blocks, LaunchRange launch_range) {
  if (blocks > MAX_BLOCKS) return cudaErrorInvalidConfiguration;
  if (blocks == 0) return cudaSuccess;
  const int64_t most = MAX_BLOCKS / blocks;
  for (int64_t first = 0; first < count; first += most) {
    const cudaError_t error =
        launch_range(static_cast<int32_t>(first), static_cast<int32_t>(std::min(count - first, most)));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Returns function(value) with a value of the type of `dtype`.
template <class Function>
cudaError_t with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::bfloat16:
      return function(__nv_bfloat16{});
    case DType::float16:
      return function(__half{});
    case DType::float32:
      return function(float{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace stgp::cuda
