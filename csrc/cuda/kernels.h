// What the files of this folder offer each other. grid_pool.cu chooses among them.

#pragma once

#include <cuda_runtime.h>

#include "../grid_pool.h"
#include "../sizes.h"
#include "../tables.h"

namespace stgp::cuda {

// How a token's magnitude is taken. `power` is any p but 1, 2 and infinity.
enum class Norm : int32_t { l1, l2, max, power };

Norm norm_kind(double norm_type);

// Whether the fused kernel runs a call; it depends on nothing that differs between a video alone and packed with others
// but on the tables.
bool takes_fused(const int32_t* tables, const Call& call);

// The fused form: out from x, thumbnails in scratch. Without `pools` the thumbnails alone.
cudaError_t pool_fused(const int32_t* tables, const int32_t* device_tables, const Call& call, bool pools,
                       cudaStream_t stream);

// The general form: every summary into scratch as (summaries, H, W, C).
cudaError_t make_summaries(const int32_t* tables, const int32_t* device_tables, const Call& call, cudaStream_t stream);

// out = what every frame ends with.
cudaError_t copy_final(const int32_t* tables, const int32_t* device_tables, const Call& call, cudaStream_t stream);

// norms = the norm of every token of what frames end with, as (frames, H, W); then out from those and the tokens.
cudaError_t pool_windows(const int32_t* tables, const int32_t* device_tables, const Call& call, float* norms,
                         cudaStream_t stream);

// Norms of frames 0, ..., frames - 1, or of the nodes that `final` on the device names. exact: division and root
// round correctly; norms that only become weights do without.
cudaError_t find_norms(int32_t frames, int32_t H, int32_t W, const Call& call, const int32_t* final, float* norms,
                       const Strides& norm_strides, bool exact, cudaStream_t stream);

// What gradients need of scratch beside what the forward left at its start. None of it is initialized.
struct GradientScratch {
  float* summaries;   // gradients of summaries: (summaries, H, W, C)
  float* norms;       // of what frames end with: (frames, H, W); those from here on of the general form alone
  float* statistics;  // of windows: (frames, OH, OW, 3)
  int32_t* ends;      // (summaries)
};

// Gradients in x, the fused form: thumbnails are in scratch.
cudaError_t grid_pool_backward_fused(const int32_t* tables, const int32_t* device_tables, const Call& call,
                                     const GradientScratch& scratch, cudaStream_t stream);

// The same in the general form: summaries and norms are in scratch. Without `pooled` it is that of temporal_grid, which
// needs neither.
cudaError_t grid_pool_backward(const int32_t* tables, const int32_t* device_tables, const Call& call,
                               const GradientScratch& scratch, bool pooled, cudaStream_t stream);

}  // namespace stgp::cuda
