// The CUDA functions of csrc/grid_pool.h: START HERE. This file chooses the kernels of a call and divides its scratch.
//
//   grid_pool      fused.cu if takes_fused() is true; else summaries.cu, token_norm.cu and pool.cu
//   temporal_grid  summaries.cu
//   token_norm     token_norm.cu
//   ..._backward   fused_backward.cu or backward.cu, after the kernels that compute thumbnails or summaries again

#include <cmath>
#include <limits>

#include "launch.cuh"

namespace stgp::cuda {
namespace {

// The limit of the channels in the fused form, whose kernels count the bytes of a token in uint32.
constexpr int64_t MOST_FUSED = int64_t{1} << 28;

// Returns whether gradients take the fused form, of which a block holds all channels.
bool takes_fused_gradient(const int32_t* tables, const Call& call) {
  return takes_fused(tables, call) && call.C <= MAX_CHANNELS;
}

// The arrays of scratch of a gradient. `bytes` is set to the size of all scratch.
GradientScratch gradient_scratch(const int32_t* tables, const Call& call, bool pooled, int64_t* bytes) {
  const int64_t summaries = tables[H_SUMMARIES], frames = tables[H_FRAMES];
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH], OH = tables[H_OUT_ROWS], OW = tables[H_OUT_COLS];
  const bool fused = pooled && takes_fused_gradient(tables, call);
  *bytes = fused ? thumbnail_bytes(tables, call) : pooled ? summary_bytes(tables, call) : 0;
  const auto take = [&](std::initializer_list<int64_t> words) {
    const int64_t start = *bytes;
    *bytes = sum({start, aligned(product({product(words), 4}))});
    return call.scratch == nullptr ? nullptr : static_cast<char*>(call.scratch) + start;
  };
  GradientScratch scratch{};
  scratch.summaries = reinterpret_cast<float*>(take({summaries, H, W, call.C}));
  if (fused || !pooled) return scratch;
  scratch.norms = reinterpret_cast<float*>(take({frames, H, W}));
  scratch.statistics = reinterpret_cast<float*>(take({frames, OH, OW, 3}));
  return scratch;
}

// Returns whether a channel index does not fit into int32. The indices of a block's last vecs exceed C.
bool too_many_channels(const Call& call) { return call.C > std::numeric_limits<int32_t>::max() - 2 * MAX_CHANNELS; }

}  // namespace

Norm norm_kind(double norm_type) {
  if (norm_type == 1.0) return Norm::l1;
  if (norm_type == 2.0) return Norm::l2;
  return std::isinf(norm_type) ? Norm::max : Norm::power;
}

bool takes_fused(const int32_t* tables, const Call& call) {
  const int64_t h = (int64_t{tables[H_HEIGHT]} + 1) / 2, w = (int64_t{tables[H_WIDTH]} + 1) / 2;
  return has_fused_form(tables) && channels_of_norm(call) <= MAX_CHANNELS && norm_kind(call.norm_type) != Norm::power &&
         call.C <= MOST_FUSED &&
         product({tables[H_SLOTS], h, w}) <= std::numeric_limits<int32_t>::max();  // the kernels count tokens in int32
}

int64_t scratch_bytes(Op op, const int32_t* tables, const Call& call) {
  if (op == Op::token_norm || call.thumbnails != nullptr) return 0;
  if (is_backward(op)) {
    int64_t bytes = 0;
    gradient_scratch(tables, call, op == Op::grid_pool_backward, &bytes);
    return bytes;
  }
  if (op == Op::temporal_grid) return summary_bytes(tables, call);
  if (takes_fused(tables, call)) return thumbnail_bytes(tables, call);
  return sum(
      {summary_bytes(tables, call), product({tables[H_FRAMES], tables[H_HEIGHT], tables[H_WIDTH], sizeof(float)})});
}

int grid_pool(const int32_t* tables, const int32_t* device_tables, const Call& call, void* stream) {
  if (tables[H_FRAMES] == 0 || call.C == 0) return cudaSuccess;
  if (too_many_channels(call)) return cudaErrorInvalidValue;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (takes_fused(tables, call)) return pool_fused(tables, device_tables, call, true, queue);
  if (call.thumbnails != nullptr) return cudaErrorInvalidValue;
  const cudaError_t error = make_summaries(tables, device_tables, call, queue);
  if (error != cudaSuccess) return error;
  auto* norms = reinterpret_cast<float*>(static_cast<char*>(call.scratch) + summary_bytes(tables, call));
  return pool_windows(tables, device_tables, call, norms, queue);
}

int temporal_grid(const int32_t* tables, const int32_t* device_tables, const Call& call, void* stream) {
  if (tables[H_FRAMES] == 0 || call.C == 0) return cudaSuccess;
  if (too_many_channels(call)) return cudaErrorInvalidValue;
  const auto queue = static_cast<cudaStream_t>(stream);
  const cudaError_t error = make_summaries(tables, device_tables, call, queue);
  return error != cudaSuccess ? error : copy_final(tables, device_tables, call, queue);
}

int grid_pool_backward(const int32_t* tables, const int32_t* device_tables, const Call& call, void* stream) {
  if (tables[H_FRAMES] == 0 || call.C == 0) return cudaSuccess;
  if (too_many_channels(call) || tables[H_GRADIENT] == 0) return cudaErrorInvalidValue;
  const auto queue = static_cast<cudaStream_t>(stream);
  int64_t bytes = 0;
  const GradientScratch scratch = gradient_scratch(tables, call, true, &bytes);
  if (takes_fused_gradient(tables, call)) {
    const cudaError_t error = pool_fused(tables, device_tables, call, false, queue);
    return error != cudaSuccess ? error : grid_pool_backward_fused(tables, device_tables, call, scratch, queue);
  }
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH];
  const Strides strides{call.T * H * W, H * W, W, 1, 1};
  cudaError_t error = make_summaries(tables, device_tables, call, queue);
  if (error == cudaSuccess) {
    error = find_norms(tables[H_FRAMES], tables[H_HEIGHT], tables[H_WIDTH], call, device_tables + tables[H_OUTPUTS],
                       scratch.norms, strides, false, queue);
  }
  return error != cudaSuccess ? error : grid_pool_backward(tables, device_tables, call, scratch, true, queue);
}

int temporal_grid_backward(const int32_t* tables, const int32_t* device_tables, const Call& call, void* stream) {
  if (tables[H_FRAMES] == 0 || call.C == 0) return cudaSuccess;
  if (too_many_channels(call) || tables[H_GRADIENT] == 0) return cudaErrorInvalidValue;
  int64_t bytes = 0;
  const GradientScratch scratch = gradient_scratch(tables, call, false, &bytes);
  return grid_pool_backward(tables, device_tables, call, scratch, false, static_cast<cudaStream_t>(stream));
}

int token_norm(int64_t frames, int64_t H, int64_t W, const Call& call, void* stream) {
  if (frames == 0 || H == 0 || W == 0) return cudaSuccess;
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  if (too_many_channels(call) || frames > most || H > most || W > most) return cudaErrorInvalidValue;
  return find_norms(static_cast<int32_t>(frames), static_cast<int32_t>(H), static_cast<int32_t>(W), call, nullptr,
                    static_cast<float*>(call.out), call.out_strides, true, static_cast<cudaStream_t>(stream));
}

}  // namespace stgp::cuda
