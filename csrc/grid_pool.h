// ST-GridPool for engines written in C++: it pools the visual tokens of videos, on a CPU or on an NVIDIA GPU.
//
//   grid_pool      out = norm_pool(temporal_grid(x)): (B, T, H, W, C) -> (B, T, OH, OW, C)
//   temporal_grid  out = x, with the target frame of each group replaced by the group's mosaic: the shape of x
//   token_norm     out = (mean_c |x_c|^p)^(1/p): (B, T, H, W) in float32
//
// The norm runs over all channels of a token or over the first of them (Call::norm_channels).
//
// The functions grid_pool_backward and temporal_grid_backward compute gradients in x. Their tables need a gradient
// section (H_GRADIENT is not 0), which `save_tables(plan, path, gradient=True)` writes. grid_pool_backward computes the
// summaries again. Gradients of summaries are float32; only the gradient of x is rounded. temporal_grid_backward does
// not read x.
//
// The interface needs no tensor library. The plan's tables say which frames form a group and which tokens a window
// reads. They are an array of int32 that `save_tables` of the Python package writes to a file; tables.h describes it.
// With the tables of a plan with frame_strides=[], grid_pool is norm_pool.
//
//   std::vector<int32_t> tables = ...;                          // the content of the file
//   if (const char* wrong = stgp::check_tables(tables.data(), tables.size())) ...
//   stgp::Call call{...};                                       // pointers, sizes and strides of x and out
//   call.scratch = std::aligned_alloc(64, stgp::cpu::scratch_bytes(stgp::Op::grid_pool, tables.data(), call, threads));
//   stgp::cpu::grid_pool(tables.data(), call, threads);
//   std::free(call.scratch);

#pragma once

#include <cstdint>

namespace stgp {

enum class DType : int32_t { bfloat16 = 0, float16 = 1, float32 = 2 };

enum class Op : int32_t {
  grid_pool = 0,
  temporal_grid = 1,
  token_norm = 2,
  grid_pool_backward = 3,
  temporal_grid_backward = 4
};

// Distances between neighbours, in elements. Every stride gives correct results; a channel stride of 1 is fast.
struct Strides {
  int64_t video, frame, row, col, channel;
};

// The arguments that all functions take. The tables number the frames of all videos: frame f is frame f % T of video
// f / T. A batch has B videos of T frames each. Videos that are packed along T count as one video here.
struct Call {
  DType dtype = DType::bfloat16;  // of x, out, thumbnails and summaries; token_norm writes float32
  int64_t T = 0;                  // number of frames of a video
  int64_t C = 0;                  // number of channels
  const void* x = nullptr;
  Strides x_strides{};
  void* out = nullptr;  // must not overlap x
  Strides out_strides{};
  void* scratch = nullptr;  // scratch_bytes(...) bytes, aligned to 64, with any values; nullptr if 0
  // The weights of a window are softmax(temperature * norm) over its tokens.
  float temperature = 1.0f;
  double norm_type = 2.0;      // p > 0; p = infinity: the largest magnitude
  bool normalize_norm = true;  // whether the norm has the mean over channels; else it has the sum
  int64_t norm_channels = 0;   // number of channels that the norm runs over, the first ones; 0 stands for all C
  // For tables of a chunk of streams: the slots of thumbnails, (slots, h, w, C). They hold thumbnails of earlier
  // chunks, and grid_pool adds those of this chunk. On CUDA it fails if the fused kernels do not take the number of
  // channels or the norm.
  void* thumbnails = nullptr;
  // For gradients: the gradient of the result, in the shape of the result. out is the gradient of x, (B, T, H, W, C),
  // with a channel stride of 1.
  const void* grad = nullptr;
  Strides grad_strides{};
  // For CUDA: the limit of the neighbouring cells or windows in a row that a block computes one after another. 0 leaves
  // the choice to the kernel. The number changes the time of a call, and no bit of its result.
  int32_t cells = 0;
};

// Returns what is wrong with an array of `words` integers as tables, or nullptr. The functions below do not check the
// tables that they are given.
const char* check_tables(const int32_t* tables, int64_t words);

namespace cpu {

// The threads that run a call. No bit of a result depends on their number.
struct Threads {
  int count = 1;  // the largest number of tasks
  // run(count, task, work, pool) calls task(i, work) for each i in [0, count), on any number of threads, and returns
  // when all tasks have returned. nullptr: the calling thread does all work.
  void (*run)(int count, void (*task)(int index, void* work), void* work, void* pool) = nullptr;
  void* pool = nullptr;  // passed to `run`
};

// Bytes of scratch that a call needs, a multiple of 64. For a call that needs 2^63 - 64 bytes or more it is that
// number, which no memory has: a call must not run without its scratch.
int64_t scratch_bytes(Op op, const int32_t* tables, const Call& call, const Threads& threads);

void grid_pool(const int32_t* tables, const Call& call, const Threads& threads);
void temporal_grid(const int32_t* tables, const Call& call, const Threads& threads);
void token_norm(int64_t frames, int64_t H, int64_t W, const Call& call, const Threads& threads);
void grid_pool_backward(const int32_t* tables, const Call& call, const Threads& threads);
void temporal_grid_backward(const int32_t* tables, const Call& call, const Threads& threads);

// The set of vector instructions in use: "avx512", "avx2" or "portable". The default is the widest that this CPU runs.
const char* capability();

// Uses another set of vector instructions from now on, for tests. Returns false if this library does not have it or if
// this CPU does not run it.
bool use_capability(const char* name);

}  // namespace cpu

namespace cuda {

// Bytes of scratch that a call needs, at most 2^63 - 64 as on the CPU.
int64_t scratch_bytes(Op op, const int32_t* tables, const Call& call);

// The functions queue work on `stream`, a cudaStream_t of the current device, and do not wait for it. A CUDA graph can
// capture them. `device_tables` is a copy of `tables` on the device. They return a cudaError_t; 0 is success.
int grid_pool(const int32_t* tables, const int32_t* device_tables, const Call& call, void* stream);
int temporal_grid(const int32_t* tables, const int32_t* device_tables, const Call& call, void* stream);
int token_norm(int64_t frames, int64_t H, int64_t W, const Call& call, void* stream);
int grid_pool_backward(const int32_t* tables, const int32_t* device_tables, const Call& call, void* stream);
int temporal_grid_backward(const int32_t* tables, const int32_t* device_tables, const Call& call, void* stream);

}  // namespace cuda

}  // namespace stgp
