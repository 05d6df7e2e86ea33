// ST-GridPool for engines written in C++: pooling of a video's visual tokens, on a CPU or on an NVIDIA GPU.
//
//   grid_pool      out = norm_pool(temporal_grid(x)): (B, T, H, W, C) -> (B, T, OH, OW, C)
//   temporal_grid  out = x with every group's target frame replaced by the group's mosaic: the shape of x
//   token_norm     out = (mean_c |x_c|^p)^(1/p): (B, T, H, W) in float32
//
// and the gradients of the first two in x: ..._backward, by tables with a gradient section (H_GRADIENT is not 0), which
// `save_tables(plan, path, gradient=True)` writes. Summaries are made again for them, their gradients are float32, and
// only the gradient of x is rounded. temporal_grid_backward does not read x.
//
// Nothing here knows a tensor library. Which frame goes where and what a window covers is in the plan's tables, an
// array of int32 that `save_tables` of the Python package writes to a file. tables.h has its form; tables of a plan
// with frame_strides=[] make grid_pool the same as norm_pool.
//
//   std::vector<int32_t> tables = ...;                          // the file
//   if (const char* wrong = stgp::check_tables(tables.data(), tables.size())) ...
//   stgp::Call call{...};                                       // where x and out are
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

// Distance between neighbours in elements. A channel stride of 1 is fast, every other is right.
struct Strides {
  int64_t video, frame, row, col, channel;
};

// What every function takes. Frame f of the tables, which count the frames of all videos, is frame f % T of video f /
// T: videos packed along T are one video here, and a batch is B of T frames each.
struct Call {
  DType dtype = DType::bfloat16;  // of x, of out (but for token_norm) and of what is rounded in between
  int64_t T = 0;                  // frames of a video
  int64_t C = 0;                  // channels
  const void* x = nullptr;
  Strides x_strides{};
  void* out = nullptr;  // must not overlap x
  Strides out_strides{};
  void* scratch = nullptr;  // scratch_bytes(...) bytes at a multiple of 64, with any values; nullptr if 0
  // how tokens are weighed: softmax over a window of temperature * norm
  float temperature = 1.0f;
  double norm_type = 2.0;      // p > 0; infinity takes the largest magnitude
  bool normalize_norm = true;  // mean over channels inside the norm, or else the sum
  // For tables of a chunk of streams: their slots, which hold thumbnails of earlier chunks and keep those of this one.
  // Then grid_pool takes the fused form; where it does not take these channels or this norm, it fails.
  void* thumbnails = nullptr;
  // For gradients: `grad` is that of the result, in its shape. out is the gradient of x then: (B, T, H, W, C) as well,
  // with a channel stride of 1.
  const void* grad = nullptr;
  Strides grad_strides{};
  // For CUDA: how many neighbouring cells or windows of a frame's row a block takes one after another; 0 leaves it to
  // the kernel. Time depends on it, and no bit of a result does.
  int32_t cells = 0;
};

// What is wrong with `words` integers as tables, or nullptr. The functions below trust tables that passed.
const char* check_tables(const int32_t* tables, int64_t words);

namespace cpu {

// Who runs the work: `run(count, task, work, pool)` calls task(i, work) for every i in [0, count), on as many threads
// as it likes, and returns when all have returned. Results do not depend on the number of threads, bit by bit.
struct Threads {
  int count = 1;
  void (*run)(int count, void (*task)(int index, void* work), void* work, void* pool) = nullptr;  // nullptr: the caller
  void* pool = nullptr;
};

// Scratch that a call needs: a multiple of 64 bytes.
int64_t scratch_bytes(Op op, const int32_t* tables, const Call& call, const Threads& threads);

void grid_pool(const int32_t* tables, const Call& call, const Threads& threads);
void temporal_grid(const int32_t* tables, const Call& call, const Threads& threads);
void token_norm(int64_t frames, int64_t H, int64_t W, const Call& call, const Threads& threads);
void grid_pool_backward(const int32_t* tables, const Call& call, const Threads& threads);
void temporal_grid_backward(const int32_t* tables, const Call& call, const Threads& threads);

// Vector instructions that kernels are compiled for, from the widest: "avx512", "avx2", "portable".
// `capability` is the one in use, by default the widest that this CPU runs.
// `use_capability` takes another one, for tests; false if it is unknown here or this CPU does not run it.
const char* capability();
bool use_capability(const char* name);

}  // namespace cpu

namespace cuda {

// `device_tables` is a copy of `tables` on the device. Work is queued on `stream` (a cudaStream_t) of the current
// device and never waited for; it can be captured in a CUDA graph. The result is a cudaError_t, 0 for success.
int64_t scratch_bytes(Op op, const int32_t* tables, const Call& call);

int grid_pool(const int32_t* tables, const int32_t* device_tables, const Call& call, void* stream);
int temporal_grid(const int32_t* tables, const int32_t* device_tables, const Call& call, void* stream);
int token_norm(int64_t frames, int64_t H, int64_t W, const Call& call, void* stream);
int grid_pool_backward(const int32_t* tables, const int32_t* device_tables, const Call& call, void* stream);
int temporal_grid_backward(const int32_t* tables, const int32_t* device_tables, const Call& call, void* stream);

}  // namespace cuda

}  // namespace stgp
