// The private ops of stgridpool_kernels/backends/compiled.py on tensors, through torch's stable ABI: the library is
// built once and loads under every later torch. Tensors are checked here. The kernels only get pointers.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "binding.h"
#include "grid_pool.h"
#include "sizes.h"
#include "tables.h"

#ifdef STGP_CUDA
#include <cuda_runtime_api.h>
#endif

namespace stgp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::Float:
      return DType::float32;
    default:
      STD_TORCH_CHECK(false, "x must have dtype bfloat16, float16 or float32");
  }
}

// Strides of a tensor (T, H, W, C) or (B, T, H, W, C); without `channels`, of (T, H, W) or (B, T, H, W).
Strides strides_of(const Tensor& t, bool channels) {
  const auto strides = t.strides();
  const int64_t rank = t.dim(), inner = channels ? 1 : 0, frame = rank - 3 - inner;
  return {frame > 0 ? strides[0] : 0, strides[frame], strides[frame + 1], strides[frame + 2],
          channels ? strides[rank - 1] : 1};
}

// A call with x and out, whose frames agree. Without `channels`, out has one value for each token.
Call call_of(const Tensor& x, const Tensor& out, bool channels) {
  const int64_t rank = x.dim();
  STD_TORCH_CHECK(rank == 4 || rank == 5, "x must have 4 or 5 dimensions");
  STD_TORCH_CHECK(out.dim() == (channels ? rank : rank - 1), "out must have as many dimensions as the result");
  STD_TORCH_CHECK(out.scalar_type() == (channels ? x.scalar_type() : ScalarType::Float), "out has a wrong dtype");
  STD_TORCH_CHECK(out.get_device_index() == x.get_device_index(), "out must be on the device of x");
  for (int64_t axis = 0; axis < rank - 3; ++axis) {
    STD_TORCH_CHECK(out.sizes()[axis] == x.sizes()[axis], "out must have the frames of x");
  }
  Call call;
  call.dtype = dtype_of(x);
  call.T = x.sizes()[rank - 4];
  call.C = x.sizes()[rank - 1];
  call.x = x.const_data_ptr();
  call.x_strides = strides_of(x, true);
  call.out = out.mutable_data_ptr();
  call.out_strides = strides_of(out, channels);
  return call;
}

// The number of frames of x, of all videos together.
int64_t frames_of(const Tensor& x) { return x.dim() == 5 ? product({x.sizes()[0], x.sizes()[1]}) : x.sizes()[0]; }

const int32_t* words_of(const Tensor& tables) { return static_cast<const int32_t*>(tables.const_data_ptr()); }

void check_form(const Tensor& tables) {
  STD_TORCH_CHECK(
      tables.scalar_type() == ScalarType::Int && tables.dim() == 1 && tables.is_contiguous() && tables.is_cpu(),
      "tables must be contiguous int32 on the CPU");
}

// Checks every word of tables, which the other ops trust.
void check_tables_once(const Tensor& tables) {
  check_form(tables);
  const char* wrong = check_tables(words_of(tables), tables.numel());
  STD_TORCH_CHECK(wrong == nullptr, wrong);
}

// Returns the words of `tables`. Checks that their header is one of tables for x and out; if `pooled`, out has pooled
// frames, else frames like those of x.
const int32_t* checked_words(const Tensor& tables, const Tensor& x, const Tensor& out, bool pooled) {
  check_form(tables);
  const int32_t* t = words_of(tables);
  STD_TORCH_CHECK(
      tables.numel() >= HEADER_WORDS && t[H_MAGIC] == MAGIC && t[H_VERSION] == VERSION && t[H_WORDS] == tables.numel(),
      "these are no tables of a plan");
  const int64_t rank = x.dim();
  const int64_t frames = frames_of(x);
  STD_TORCH_CHECK(t[H_FRAMES] == frames && t[H_HEIGHT] == x.sizes()[rank - 3] && t[H_WIDTH] == x.sizes()[rank - 2],
                  "the tables are of another x");
  STD_TORCH_CHECK(out.sizes()[rank - 3] == t[pooled ? H_OUT_ROWS : H_HEIGHT] &&
                      out.sizes()[rank - 2] == t[pooled ? H_OUT_COLS : H_WIDTH] &&
                      out.sizes()[rank - 1] == x.sizes()[rank - 1],
                  "the tables are of another out");
  return t;
}

void set_weighting(Call& call, double temperature, double norm_type, bool normalize_norm, int64_t norm_channels) {
  STD_TORCH_CHECK(norm_channels >= 1 && norm_channels <= call.C, "norm_channels must be from 1 to C = ", call.C,
                  ", got ", norm_channels);
  call.temperature = static_cast<float>(temperature);
  call.norm_type = norm_type;
  call.normalize_norm = normalize_norm;
  call.norm_channels = norm_channels;
}

// Raises an error, which names the sizes of a frame, unless there is memory for `bytes` of scratch.
void check_scratch(bool is_there, int64_t bytes, int64_t H, int64_t W, int64_t C) {
  STD_TORCH_CHECK(is_there, "no memory for ", bytes,
                  bytes == MOST_BYTES ? " bytes of scratch or more" : " bytes of scratch", ", which frames of ", H,
                  " x ", W, " tokens of ", C, " channels take");
}

// ---- on the CPU ----

// Scratch memory of a call. It is kept for the next call, because fresh memory costs a page fault every 4 KiB, which
// takes longer than the work on it. If two calls run at the same time, the second one allocates its own memory.
class Scratch {
 public:
  Scratch(Call& call, int64_t bytes, int64_t H, int64_t W) {
    if (bytes == 0) return;
    {
      const std::lock_guard<std::mutex> guard(mutex);
      memory = std::move(kept);
      size = std::exchange(kept_size, 0);
    }
    if (size < bytes) {
      memory.reset(static_cast<char*>(std::aligned_alloc(SCRATCH_ALIGNMENT, aligned(bytes))));
      check_scratch(memory != nullptr, bytes, H, W, call.C);
      size = bytes;
    }
    call.scratch = memory.get();
  }

  ~Scratch() {
    if (size > KEPT) return;
    const std::lock_guard<std::mutex> guard(mutex);
    if (size > kept_size) {
      std::swap(kept, memory);
      kept_size = size;
    }
  }

  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Frees the memory that is kept. Returns its size in bytes.
  static int64_t release() {
    const std::lock_guard<std::mutex> guard(mutex);
    kept.reset();
    return std::exchange(kept_size, 0);
  }

 private:
  static constexpr int64_t KEPT = 64 << 20;  // bytes: larger memory is freed after its call

  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<char, Free>;

  static inline std::mutex mutex;
  static inline Memory kept;
  static inline int64_t kept_size = 0;

  Memory memory;
  int64_t size = 0;
};

cpu::Threads torch_threads() {
  const auto run = [](int count, void (*task)(int, void*), void* work, void*) {
    torch::stable::parallel_for(0, count, 1, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) task(static_cast<int>(i), work);
    });
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run, nullptr};
}

void run_on_cpu(Op op, Call& call, const int32_t* t) {
  const cpu::Threads threads = torch_threads();
  const Scratch scratch(call, cpu::scratch_bytes(op, t, call, threads), t[H_HEIGHT], t[H_WIDTH]);
  switch (op) {
    case Op::grid_pool:
      return cpu::grid_pool(t, call, threads);
    case Op::temporal_grid:
      return cpu::temporal_grid(t, call, threads);
    case Op::grid_pool_backward:
      return cpu::grid_pool_backward(t, call, threads);
    case Op::temporal_grid_backward:
      return cpu::temporal_grid_backward(t, call, threads);
    case Op::token_norm:
      break;
  }
  STD_TORCH_CHECK(false, "token_norm has no tables");
}

// ---- on a GPU ----

#ifdef STGP_CUDA

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

void check_launch(int error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

const int32_t* checked_device_words(const std::optional<Tensor>& device_tables, const Tensor& tables, const Tensor& x) {
  STD_TORCH_CHECK(device_tables.has_value() && device_tables->get_device_index() == x.get_device_index() &&
                      device_tables->scalar_type() == ScalarType::Int && device_tables->is_contiguous() &&
                      device_tables->numel() == tables.numel(),
                  "device_tables must be a copy of tables on the device of x");
  return words_of(*device_tables);
}

void run_on_cuda(Op op, Call& call, const Tensor& x, const Tensor& tables, const std::optional<Tensor>& device_tables) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int32_t *t = words_of(tables), *on_device = checked_device_words(device_tables, tables, x);
  const int64_t bytes = cuda::scratch_bytes(op, t, call);
  check_scratch(bytes < MOST_BYTES, bytes, t[H_HEIGHT], t[H_WIDTH], call.C);
  // The tensor may go before the kernels are done: torch's allocator reuses its memory in the order of the stream.
  const Tensor scratch = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  call.scratch = scratch.mutable_data_ptr();
  void* const stream = current_stream(x);
  switch (op) {
    case Op::grid_pool:
      return check_launch(cuda::grid_pool(t, on_device, call, stream));
    case Op::temporal_grid:
      return check_launch(cuda::temporal_grid(t, on_device, call, stream));
    case Op::grid_pool_backward:
      return check_launch(cuda::grid_pool_backward(t, on_device, call, stream));
    case Op::temporal_grid_backward:
      return check_launch(cuda::temporal_grid_backward(t, on_device, call, stream));
    case Op::token_norm:
      break;
  }
  STD_TORCH_CHECK(false, "token_norm has no tables");
}

#endif

// ---- the ops ----

// Runs a checked call on the device of x.
void run(Op op, Call& call, [[maybe_unused]] const Tensor& x, const Tensor& tables,
         [[maybe_unused]] const std::optional<Tensor>& device_tables) {
#ifdef STGP_CUDA
  if (x.is_cuda()) return run_on_cuda(op, call, x, tables, device_tables);
#endif
  run_on_cpu(op, call, words_of(tables));
}

void grid_pool_by_tables(const Tensor& x, const Tensor& tables, const std::optional<Tensor>& device_tables,
                         double temperature, double norm_type, bool normalize_norm, int64_t norm_channels,
                         const Tensor& out, int64_t cells) {
  Call call = call_of(x, out, true);
  set_weighting(call, temperature, norm_type, normalize_norm, norm_channels);
  STD_TORCH_CHECK(cells >= 0 && cells < (1 << 24), "cells must be from 0 to 2^24 - 1, got ", cells);
  call.cells = static_cast<int32_t>(cells);
  checked_words(tables, x, out, true);
  run(Op::grid_pool, call, x, tables, device_tables);
}

// `thumbnails` keeps the thumbnails of streams between their chunks: (slots, h, w, C).
void pool_chunk_by_tables(const Tensor& x, const Tensor& tables, const std::optional<Tensor>& device_tables,
                          double temperature, double norm_type, bool normalize_norm, int64_t norm_channels,
                          const Tensor& thumbnails, const Tensor& out) {
  Call call = call_of(x, out, true);
  set_weighting(call, temperature, norm_type, normalize_norm, norm_channels);
  const int32_t* t = checked_words(tables, x, out, true);
  STD_TORCH_CHECK(thumbnails.dim() == 4 && thumbnails.is_contiguous() && thumbnails.scalar_type() == x.scalar_type() &&
                      thumbnails.get_device_index() == x.get_device_index() && thumbnails.sizes()[0] >= t[H_SLOTS] &&
                      thumbnails.sizes()[1] == (t[H_HEIGHT] + 1) / 2 && thumbnails.sizes()[2] == (t[H_WIDTH] + 1) / 2 &&
                      thumbnails.sizes()[3] == call.C,
                  "the tables are of other thumbnails");
  STD_TORCH_CHECK(has_fused_form(t), "the tables have no fused form");
  call.thumbnails = thumbnails.mutable_data_ptr();
  run(Op::grid_pool, call, x, tables, device_tables);
}

void temporal_grid_by_tables(const Tensor& x, const Tensor& tables, const std::optional<Tensor>& device_tables,
                             const Tensor& out) {
  Call call = call_of(x, out, true);
  checked_words(tables, x, out, false);
  run(Op::temporal_grid, call, x, tables, device_tables);
}

// A call for a gradient. `grad` is the gradient of the result, out that of x. Pass `grad` as x if x is not read.
Call call_of_gradient(const Tensor& grad, const Tensor& x, const Tensor& out) {
  Call call = call_of(x, out, true);
  STD_TORCH_CHECK(grad.dim() == x.dim() && grad.scalar_type() == x.scalar_type() &&
                      grad.get_device_index() == x.get_device_index() && out.is_contiguous(),
                  "grad must be like x, out contiguous");
  call.grad = grad.const_data_ptr();
  call.grad_strides = strides_of(grad, true);
  return call;
}

// Checks that the tables have a gradient section and are for tensors like these; if `pooled`, grad has pooled frames.
void check_gradient_tables(const Tensor& tables, const Tensor& grad, const Tensor& x, const Tensor& out, bool pooled) {
  const int32_t* t = checked_words(tables, x, out, false);
  checked_words(tables, x, grad, pooled);
  STD_TORCH_CHECK(t[H_GRADIENT] > 0, "the tables have nothing for gradients");
  for (int64_t axis = 0; axis < x.dim() - 3; ++axis) {
    STD_TORCH_CHECK(grad.sizes()[axis] == x.sizes()[axis], "grad must have the frames of x");
  }
}

void grid_pool_backward_by_tables(const Tensor& grad, const Tensor& x, const Tensor& tables,
                                  const std::optional<Tensor>& device_tables, double temperature, double norm_type,
                                  bool normalize_norm, int64_t norm_channels, const Tensor& out) {
  Call call = call_of_gradient(grad, x, out);
  set_weighting(call, temperature, norm_type, normalize_norm, norm_channels);
  check_gradient_tables(tables, grad, x, out, true);
  run(Op::grid_pool_backward, call, x, tables, device_tables);
}

void temporal_grid_backward_by_tables(const Tensor& grad, const Tensor& tables,
                                      const std::optional<Tensor>& device_tables, const Tensor& out) {
  Call call = call_of_gradient(grad, grad, out);
  check_gradient_tables(tables, grad, grad, out, false);
  run(Op::temporal_grid_backward, call, grad, tables, device_tables);
}

void token_norm_compiled(const Tensor& x, double norm_type, bool normalize_norm, int64_t norm_channels,
                         const Tensor& out) {
  Call call = call_of(x, out, false);
  set_weighting(call, 1, norm_type, normalize_norm, norm_channels);
  const int64_t rank = x.dim(), H = x.sizes()[rank - 3], W = x.sizes()[rank - 2];
  STD_TORCH_CHECK(out.sizes()[rank - 3] == H && out.sizes()[rank - 2] == W, "out must have one norm per token");
#ifdef STGP_CUDA
  if (x.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    return check_launch(cuda::token_norm(frames_of(x), H, W, call, current_stream(x)));
  }
#endif
  const cpu::Threads threads = torch_threads();
  const Scratch scratch(call, cpu::scratch_bytes(Op::token_norm, nullptr, call, threads), H, W);
  cpu::token_norm(frames_of(x), H, W, call, threads);
}

// One function implements an op on every device.
template <class Library>
void implement_ops(Library& library) {
  library.impl("_grid_pool_by_tables", TORCH_BOX(&grid_pool_by_tables));
  library.impl("_pool_chunk_by_tables", TORCH_BOX(&pool_chunk_by_tables));
  library.impl("_temporal_grid_by_tables", TORCH_BOX(&temporal_grid_by_tables));
  library.impl("_grid_pool_backward_by_tables", TORCH_BOX(&grid_pool_backward_by_tables));
  library.impl("_temporal_grid_backward_by_tables", TORCH_BOX(&temporal_grid_backward_by_tables));
  library.impl("_token_norm_compiled", TORCH_BOX(&token_norm_compiled));
}

}  // namespace

DenseCall::DenseCall(Op op, uintptr_t tables, DType dtype, int64_t C, double temperature, double norm_type,
                     bool normalize_norm, int64_t norm_channels)
    : op(op), tables(reinterpret_cast<const int32_t*>(tables)) {
  const int32_t* const t = this->tables;
  const auto strides = [=](int64_t H, int64_t W) { return Strides{0, H * W * C, W * C, C, 1}; };
  call.dtype = dtype;
  call.T = t[H_FRAMES];  // those of all videos, since frames of contiguous videos are as far apart as those of one
  call.C = C;
  call.x_strides = strides(t[H_HEIGHT], t[H_WIDTH]);
  call.out_strides = op == Op::grid_pool ? strides(t[H_OUT_ROWS], t[H_OUT_COLS]) : call.x_strides;
  set_weighting(call, temperature, norm_type, normalize_norm, norm_channels);
}

void DenseCall::run(uintptr_t x, uintptr_t out) const {
  Call complete = call;
  complete.x = reinterpret_cast<const void*>(x);
  complete.out = reinterpret_cast<void*>(out);
  run_on_cpu(op, complete, tables);
}

int64_t release_scratch() { return Scratch::release(); }

// The system clears a page when it is first written, and small pages cost a fault every 4 KB. Each huge page is written
// by one thread here: if two threads of a kernel met in it, both would clear one. A system without huge pages ignores
// the advice, and then the loop writes to a few small pages.
void take_huge_pages([[maybe_unused]] uintptr_t address, [[maybe_unused]] uintptr_t bytes) {
#ifdef __linux__
  constexpr uintptr_t HUGE_PAGE = 2 << 20;  // bytes
  const uintptr_t page = sysconf(_SC_PAGESIZE), last = (address + bytes) / page * page;
  const uintptr_t first = (address + page - 1) / page * page;
  if (first >= last || madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) != 0) return;
  const int64_t pages = (last - first) / HUGE_PAGE;
  torch::stable::parallel_for(0, pages, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) *reinterpret_cast<volatile char*>(first + i * HUGE_PAGE) = 0;
  });
#endif
}

}  // namespace stgp

STABLE_TORCH_LIBRARY_IMPL(stgp, CPU, library) {
  stgp::implement_ops(library);
  library.impl("_check_tables", TORCH_BOX(&stgp::check_tables_once));
}

#ifdef STGP_CUDA
STABLE_TORCH_LIBRARY_IMPL(stgp, CUDA, library) { stgp::implement_ops(library); }
#endif
