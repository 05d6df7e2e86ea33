// The functions that launch kernels. grid_pool.cu chooses among them.

#pragma once

#include <cuda_runtime.h>

#include "../grid_pool.h"
#include "../sizes.h"
#include "../tables.h"

namespace stgp::cuda {

// The kind of a norm by its p: 1, 2, infinity, or any other p.
enum class Norm : int32_t { l1, l2, max, power };

Norm norm_kind(double norm_type);

// The number of channels that the norm runs over.
inline int64_t channels_of_norm(const Call& call) { return call.norm_channels > 0 ? call.norm_channels : call.C; }

// The factor of the sum over channels: 1 / their number for the mean, 1 for the sum.
inline float inv_count_of_norm(const Call& call) {
  return call.normalize_norm ? 1.0f / static_cast<float>(channels_of_norm(call)) : 1.0f;
}

// Returns whether the fused kernels compute a call. The answer is the same for a video alone and packed with others.
bool takes_fused(const int32_t* tables, const Call& call);

// The fused form: computes out from x, and stores thumbnails in scratch. Without `pools` it only stores the thumbnails.
cudaError_t pool_fused(const int32_t* tables, const int32_t* device_tables, const Call& call, bool pools,
                       cudaStream_t stream);

// The general form: stores every summary in scratch as (summaries, H, W, C).
cudaError_t make_summaries(const int32_t* tables, const int32_t* device_tables, const Call& call, cudaStream_t stream);

// Copies the node of every output frame to out.
cudaError_t copy_final(const int32_t* tables, const int32_t* device_tables, const Call& call, cudaStream_t stream);

// Stores the norms of the tokens of the output frames in `norms` as (frames, H, W), and pools the tokens into out.
cudaError_t pool_windows(const int32_t* tables, const int32_t* device_tables, const Call& call, float* norms,
                         cudaStream_t stream);

// Stores the norms of the tokens of frames 0, ..., frames - 1 of x. If `final` is not nullptr, final[f], on the device,
// is the node that replaces frame f. exact: division and root are rounded correctly, which weights do not need.
cudaError_t find_norms(int32_t frames, int32_t H, int32_t W, const Call& call, const int32_t* final, float* norms,
                       const Strides& norm_strides, bool exact, cudaStream_t stream);

// Arrays in scratch that gradients need beside thumbnails or summaries. They are not initialized.
struct GradientScratch {
  float* summaries;  // gradients of summaries: (summaries, H, W, C)

  // The general form alone has these.
  float* norms;       // norms of the tokens of the output frames: (frames, H, W)
  float* statistics;  // statistics of the windows: (frames, OH, OW, 3)
};

// Gradients of grid_pool in the fused form. Scratch must hold the thumbnails.
cudaError_t grid_pool_backward_fused(const int32_t* tables, const int32_t* device_tables, const Call& call,
                                     const GradientScratch& scratch, cudaStream_t stream);

// Gradients of grid_pool in the general form. Scratch must hold the summaries and the norms. Without `pooled` it
// computes the gradient of temporal_grid, which needs neither.
cudaError_t grid_pool_backward(const int32_t* tables, const int32_t* device_tables, const Call& call,
                               const GradientScratch& scratch, bool pooled, cudaStream_t stream);

}  // namespace stgp::cuda
