// The functions of grid_pool.h: START HERE. What kernels a call takes, and how much scratch.
//
//   grid_pool      fused.cu where tables, channels and norm allow; else summaries.cu, token_norm.cu and pool.cu
//   temporal_grid  summaries.cu
//   token_norm     token_norm.cu

#include <cmath>
#include <limits>

#include "launch.cuh"

namespace stgp::cuda {
namespace {

int64_t rounded_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t summary_bytes(const int32_t* tables, const Call& call) {
  const int64_t tokens = static_cast<int64_t>(tables[H_SUMMARIES]) * tables[H_HEIGHT] * tables[H_WIDTH];
  return rounded_up(tokens * call.C * value_bytes(call.dtype));
}

// Kernels count channels in int32, a block's pieces beyond the last included.
bool too_many_channels(const Call& call) { return call.C > std::numeric_limits<int32_t>::max() - 2 * MAX_CHANNELS; }

}  // namespace

Norm norm_kind(double norm_type) {
  if (norm_type == 1.0) return Norm::l1;
  if (norm_type == 2.0) return Norm::l2;
  return std::isinf(norm_type) ? Norm::max : Norm::power;
}

int64_t value_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

bool takes_fused(const int32_t* tables, const Call& call) {
  return tables[H_NUM_STEPS] > 0 && call.C <= MAX_CHANNELS && norm_kind(call.norm_type) != Norm::power;
}

int64_t scratch_bytes(Op op, const int32_t* tables, const Call& call) {
  if (op == Op::token_norm || call.miniatures != nullptr) return 0;
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH];
  if (op == Op::temporal_grid) return summary_bytes(tables, call);
  if (takes_fused(tables, call)) {
    return rounded_up(tables[H_SLOTS] * ((H + 1) / 2) * ((W + 1) / 2) * call.C * value_bytes(call.dtype));
  }
  return summary_bytes(tables, call) + tables[H_FRAMES] * H * W * static_cast<int64_t>(sizeof(float));
}

int grid_pool(const int32_t* tables, const int32_t* device_tables, const Call& call, void* stream) {
  if (tables[H_FRAMES] == 0 || call.C == 0) return cudaSuccess;
  if (too_many_channels(call)) return cudaErrorInvalidValue;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (takes_fused(tables, call)) return pool_fused(tables, device_tables, call, queue);
  if (call.miniatures != nullptr) return cudaErrorInvalidValue;
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

int token_norm(int64_t frames, int64_t H, int64_t W, const Call& call, void* stream) {
  if (frames * H * W == 0) return cudaSuccess;
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  if (too_many_channels(call) || frames > most || H > most || W > most) return cudaErrorInvalidValue;
  return find_norms(static_cast<int32_t>(frames), static_cast<int32_t>(H), static_cast<int32_t>(W), call, nullptr,
                    static_cast<float*>(call.out), call.out_strides, true, static_cast<cudaStream_t>(stream));
}

}  // namespace stgp::cuda
