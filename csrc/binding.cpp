// The private ops of stgridpool_kernels/backends/compiled.py on tensors, through torch's stable ABI: the library is
// built once and loads under every later torch. Tensors are checked here; below, kernels know pointers only.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

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

// Strides of (T, H, W, ...) or (B, T, H, W, ...), the last of which is that of the channels unless there are none.
Strides strides_of(const Tensor& t, bool channels) {
  const auto strides = t.strides();
  const int64_t rank = t.dim(), inner = channels ? 1 : 0, frame = rank - 3 - inner;
  return {frame > 0 ? strides[0] : 0, strides[frame], strides[frame + 1], strides[frame + 2],
          channels ? strides[rank - 1] : 1};
}

// x, out and how to weigh, with sizes that agree.
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

// The tables, which must be of tensors like these.
const int32_t* tables_of(const Tensor& tables, const Tensor& x, const Tensor& out, bool pooled) {
  STD_TORCH_CHECK(
      tables.scalar_type() == ScalarType::Int && tables.dim() == 1 && tables.is_contiguous() && tables.is_cpu(),
      "tables must be contiguous int32 on the CPU");
  const auto* t = static_cast<const int32_t*>(tables.const_data_ptr());
  const char* wrong = check_tables(t, tables.numel());
  STD_TORCH_CHECK(wrong == nullptr, wrong);
  const int64_t rank = x.dim();
  int64_t frames = 1;
  for (int64_t axis = 0; axis < rank - 3; ++axis) frames *= x.sizes()[axis];
  STD_TORCH_CHECK(t[H_FRAMES] == frames && t[H_HEIGHT] == x.sizes()[rank - 3] && t[H_WIDTH] == x.sizes()[rank - 2],
                  "the tables are of another x");
  STD_TORCH_CHECK(out.sizes()[rank - 3] == t[pooled ? H_OUT_ROWS : H_HEIGHT] &&
                      out.sizes()[rank - 2] == t[pooled ? H_OUT_COLS : H_WIDTH] &&
                      out.sizes()[rank - 1] == x.sizes()[rank - 1],
                  "the tables are of another out");
  return t;
}

void set_weighting(Call& call, double temperature, double norm_type, bool normalize_norm) {
  call.temperature = static_cast<float>(temperature);
  call.norm_type = norm_type;
  call.normalize_norm = normalize_norm;
}

// ---- CPU ----

// Memory for one call at a time. It is kept for the next one, up to KEPT bytes: fresh memory costs a page fault every 4
// KiB, which takes longer than what is done with it. A call beside another one gets memory of its own.
class Scratch {
 public:
  Scratch(Call& call, int64_t bytes) {
    if (bytes == 0) return;
    {
      const std::lock_guard<std::mutex> guard(mutex);
      memory = std::move(kept);
      size = std::exchange(kept_size, 0);
    }
    if (size < bytes) {
      memory.reset(static_cast<char*>(std::aligned_alloc(SCRATCH_ALIGNMENT, aligned(bytes))));
      size = bytes;
      STD_TORCH_CHECK(memory != nullptr, "no memory for ", bytes, " bytes of scratch");
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

  // Frees what is kept; how many bytes that was.
  static int64_t release() {
    const std::lock_guard<std::mutex> guard(mutex);
    kept.reset();
    return std::exchange(kept_size, 0);
  }

 private:
  static constexpr int64_t KEPT = 64 << 20;

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

void grid_pool_on_cpu(const Tensor& x, const Tensor& tables, const std::optional<Tensor>&, double temperature,
                      double norm_type, bool normalize_norm, const Tensor& out, int64_t /* cells: of CUDA blocks */) {
  Call call = call_of(x, out, true);
  set_weighting(call, temperature, norm_type, normalize_norm);
  const int32_t* t = tables_of(tables, x, out, true);
  const cpu::Threads threads = torch_threads();
  const Scratch scratch(call, cpu::scratch_bytes(Op::grid_pool, t, call, threads));
  cpu::grid_pool(t, call, threads);
}

// Where a chunk of streams keeps its thumbnails: (slots, h, w, C), at least as many slots as the tables name.
void attach_thumbnails(Call& call, const Tensor& thumbnails, const int32_t* t, const Tensor& x) {
  STD_TORCH_CHECK(thumbnails.dim() == 4 && thumbnails.is_contiguous() && thumbnails.scalar_type() == x.scalar_type() &&
                      thumbnails.get_device_index() == x.get_device_index() && thumbnails.sizes()[0] >= t[H_SLOTS] &&
                      thumbnails.sizes()[1] == (t[H_HEIGHT] + 1) / 2 && thumbnails.sizes()[2] == (t[H_WIDTH] + 1) / 2 &&
                      thumbnails.sizes()[3] == call.C,
                  "the tables are of other thumbnails");
  STD_TORCH_CHECK(t[H_NUM_STAGES] > 0, "the tables have no fused form");
  call.thumbnails = thumbnails.mutable_data_ptr();
}

void pool_chunk_on_cpu(const Tensor& x, const Tensor& tables, const std::optional<Tensor>&, double temperature,
                       double norm_type, bool normalize_norm, const Tensor& thumbnails, const Tensor& out) {
  Call call = call_of(x, out, true);
  set_weighting(call, temperature, norm_type, normalize_norm);
  const int32_t* t = tables_of(tables, x, out, true);
  attach_thumbnails(call, thumbnails, t, x);
  const cpu::Threads threads = torch_threads();
  const Scratch scratch(call, cpu::scratch_bytes(Op::grid_pool, t, call, threads));
  cpu::grid_pool(t, call, threads);
}

void temporal_grid_on_cpu(const Tensor& x, const Tensor& tables, const std::optional<Tensor>&, const Tensor& out) {
  Call call = call_of(x, out, true);
  const int32_t* t = tables_of(tables, x, out, false);
  const cpu::Threads threads = torch_threads();
  const Scratch scratch(call, cpu::scratch_bytes(Op::temporal_grid, t, call, threads));
  cpu::temporal_grid(t, call, threads);
}

// Of a gradient: x is the gradient of the result where the kernels need no more of x, and out that of x.
Call call_of_gradient(const Tensor& grad, const Tensor& x, const Tensor& out) {
  Call call = call_of(x, out, true);
  STD_TORCH_CHECK(grad.dim() == x.dim() && grad.scalar_type() == x.scalar_type() &&
                      grad.get_device_index() == x.get_device_index() && out.is_contiguous(),
                  "grad must be like x, out contiguous");
  call.grad = grad.const_data_ptr();
  call.grad_strides = strides_of(grad, true);
  return call;
}

// The tables, with what a gradient follows, which must be of tensors like these; grad's frames are pooled or as x's.
const int32_t* gradient_tables_of(const Tensor& tables, const Tensor& grad, const Tensor& x, const Tensor& out,
                                  bool pooled) {
  const int32_t* t = tables_of(tables, x, out, false);
  tables_of(tables, x, grad, pooled);
  STD_TORCH_CHECK(t[H_GRADIENT] > 0, "the tables have nothing for gradients");
  for (int64_t axis = 0; axis < x.dim() - 3; ++axis) {
    STD_TORCH_CHECK(grad.sizes()[axis] == x.sizes()[axis], "grad must have the frames of x");
  }
  return t;
}

void grid_pool_backward_on_cpu(const Tensor& grad, const Tensor& x, const Tensor& tables, const std::optional<Tensor>&,
                               double temperature, double norm_type, bool normalize_norm, const Tensor& out) {
  Call call = call_of_gradient(grad, x, out);
  set_weighting(call, temperature, norm_type, normalize_norm);
  const int32_t* t = gradient_tables_of(tables, grad, x, out, true);
  const cpu::Threads threads = torch_threads();
  const Scratch scratch(call, cpu::scratch_bytes(Op::grid_pool_backward, t, call, threads));
  cpu::grid_pool_backward(t, call, threads);
}

void temporal_grid_backward_on_cpu(const Tensor& grad, const Tensor& tables, const std::optional<Tensor>&,
                                   const Tensor& out) {
  Call call = call_of_gradient(grad, grad, out);
  const int32_t* t = gradient_tables_of(tables, grad, grad, out, false);
  const cpu::Threads threads = torch_threads();
  const Scratch scratch(call, cpu::scratch_bytes(Op::temporal_grid_backward, t, call, threads));
  cpu::temporal_grid_backward(t, call, threads);
}

int64_t frames_of(const Tensor& x) { return x.dim() == 5 ? x.sizes()[0] * x.sizes()[1] : x.sizes()[0]; }

void token_norm_on_cpu(const Tensor& x, double norm_type, bool normalize_norm, const Tensor& out) {
  Call call = call_of(x, out, false);
  set_weighting(call, 1, norm_type, normalize_norm);
  const int64_t rank = x.dim(), H = x.sizes()[rank - 3], W = x.sizes()[rank - 2];
  STD_TORCH_CHECK(out.sizes()[rank - 3] == H && out.sizes()[rank - 2] == W, "out must have one norm per token");
  const cpu::Threads threads = torch_threads();
  const Scratch scratch(call, cpu::scratch_bytes(Op::token_norm, nullptr, call, threads));
  cpu::token_norm(frames_of(x), H, W, call, threads);
}

// ---- CUDA ----

#ifdef STGP_CUDA

// torch's allocator knows which stream uses it.
Tensor scratch_for(Call& call, const Tensor& x, int64_t bytes) {
  Tensor scratch = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  call.scratch = scratch.mutable_data_ptr();
  return scratch;
}

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

void check_launch(int error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

const int32_t* on_device(const std::optional<Tensor>& device_tables, const Tensor& tables, const Tensor& x) {
  STD_TORCH_CHECK(device_tables.has_value() && device_tables->get_device_index() == x.get_device_index() &&
                      device_tables->scalar_type() == ScalarType::Int && device_tables->is_contiguous() &&
                      device_tables->numel() == tables.numel(),
                  "device_tables must be a copy of tables on the device of x");
  return static_cast<const int32_t*>(device_tables->const_data_ptr());
}

void grid_pool_on_cuda(const Tensor& x, const Tensor& tables, const std::optional<Tensor>& device_tables,
                       double temperature, double norm_type, bool normalize_norm, const Tensor& out, int64_t cells) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call call = call_of(x, out, true);
  set_weighting(call, temperature, norm_type, normalize_norm);
  STD_TORCH_CHECK(cells >= 0 && cells < (1 << 24), "cells must be from 0 to 2^24 - 1, got ", cells);
  call.cells = static_cast<int32_t>(cells);
  const int32_t* t = tables_of(tables, x, out, true);
  const Tensor scratch = scratch_for(call, x, cuda::scratch_bytes(Op::grid_pool, t, call));
  check_launch(cuda::grid_pool(t, on_device(device_tables, tables, x), call, current_stream(x)));
}

void pool_chunk_on_cuda(const Tensor& x, const Tensor& tables, const std::optional<Tensor>& device_tables,
                        double temperature, double norm_type, bool normalize_norm, const Tensor& thumbnails,
                        const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call call = call_of(x, out, true);
  set_weighting(call, temperature, norm_type, normalize_norm);
  const int32_t* t = tables_of(tables, x, out, true);
  attach_thumbnails(call, thumbnails, t, x);
  check_launch(cuda::grid_pool(t, on_device(device_tables, tables, x), call, current_stream(x)));
}

void temporal_grid_on_cuda(const Tensor& x, const Tensor& tables, const std::optional<Tensor>& device_tables,
                           const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call call = call_of(x, out, true);
  const int32_t* t = tables_of(tables, x, out, false);
  const Tensor scratch = scratch_for(call, x, cuda::scratch_bytes(Op::temporal_grid, t, call));
  check_launch(cuda::temporal_grid(t, on_device(device_tables, tables, x), call, current_stream(x)));
}

void grid_pool_backward_on_cuda(const Tensor& grad, const Tensor& x, const Tensor& tables,
                                const std::optional<Tensor>& device_tables, double temperature, double norm_type,
                                bool normalize_norm, const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call call = call_of_gradient(grad, x, out);
  set_weighting(call, temperature, norm_type, normalize_norm);
  const int32_t* t = gradient_tables_of(tables, grad, x, out, true);
  const Tensor scratch = scratch_for(call, x, cuda::scratch_bytes(Op::grid_pool_backward, t, call));
  check_launch(cuda::grid_pool_backward(t, on_device(device_tables, tables, x), call, current_stream(x)));
}

void temporal_grid_backward_on_cuda(const Tensor& grad, const Tensor& tables,
                                    const std::optional<Tensor>& device_tables, const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  Call call = call_of_gradient(grad, grad, out);
  const int32_t* t = gradient_tables_of(tables, grad, grad, out, false);
  const Tensor scratch = scratch_for(call, grad, cuda::scratch_bytes(Op::temporal_grid_backward, t, call));
  check_launch(cuda::temporal_grid_backward(t, on_device(device_tables, tables, grad), call, current_stream(grad)));
}

void token_norm_on_cuda(const Tensor& x, double norm_type, bool normalize_norm, const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call call = call_of(x, out, false);
  set_weighting(call, 1, norm_type, normalize_norm);
  const int64_t rank = x.dim(), H = x.sizes()[rank - 3], W = x.sizes()[rank - 2];
  STD_TORCH_CHECK(out.sizes()[rank - 3] == H && out.sizes()[rank - 2] == W, "out must have one norm per token");
  check_launch(cuda::token_norm(frames_of(x), H, W, call, current_stream(x)));
}

#endif

}  // namespace

int64_t release_scratch() { return Scratch::release(); }

}  // namespace stgp

STABLE_TORCH_LIBRARY_IMPL(stgp, CPU, library) {
  library.impl("_grid_pool_by_tables", TORCH_BOX(&stgp::grid_pool_on_cpu));
  library.impl("_pool_chunk_by_tables", TORCH_BOX(&stgp::pool_chunk_on_cpu));
  library.impl("_temporal_grid_by_tables", TORCH_BOX(&stgp::temporal_grid_on_cpu));
  library.impl("_grid_pool_backward_by_tables", TORCH_BOX(&stgp::grid_pool_backward_on_cpu));
  library.impl("_temporal_grid_backward_by_tables", TORCH_BOX(&stgp::temporal_grid_backward_on_cpu));
  library.impl("_token_norm_compiled", TORCH_BOX(&stgp::token_norm_on_cpu));
}

#ifdef STGP_CUDA
STABLE_TORCH_LIBRARY_IMPL(stgp, CUDA, library) {
  library.impl("_grid_pool_by_tables", TORCH_BOX(&stgp::grid_pool_on_cuda));
  library.impl("_pool_chunk_by_tables", TORCH_BOX(&stgp::pool_chunk_on_cuda));
  library.impl("_temporal_grid_by_tables", TORCH_BOX(&stgp::temporal_grid_on_cuda));
  library.impl("_grid_pool_backward_by_tables", TORCH_BOX(&stgp::grid_pool_backward_on_cuda));
  library.impl("_temporal_grid_backward_by_tables", TORCH_BOX(&stgp::temporal_grid_backward_on_cuda));
  library.impl("_token_norm_compiled", TORCH_BOX(&stgp::token_norm_on_cuda));
}
#endif
