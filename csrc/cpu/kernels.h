// What csrc/cpu/kernels.cpp computes, once for every set of vector instructions: single tokens and rows of tokens.

#pragma once

#include <cstdint>

#include "../grid_pool.h"

namespace stgp::cpu {

// Memory of one thread: where tokens are gathered whose channels are not neighbours, the column of sums that a walk
// carries, and what a window needs. `norms` has one place per token of a frame; below 0 it is not known yet.
struct Workspace {
  char* gathered;
  void* carried;
  const void** taps;
  float* weights;
  float* norms;
  double* logits;  // and products, of a window whose gradient is asked for
  double* dots;
};

// What a gradient keeps beside thumbnails or summaries. Channels of `summaries` are in whole blocks, in the order in
// which kernels hold them.
struct Gradients {
  void* summaries;  // (S, H, W, C rounded up to WIDEST_BLOCK) float
  double* windows;  // (frames, OH, OW, 3): largest logit, sum of powers, mean of grad . token
};

// Sums are kept in whole blocks of channels; the widest vectors have blocks of so many.
constexpr int64_t WIDEST_BLOCK = 32;

struct Kernels {
  const char* name;

  // Fused form, rows [first, last) of an entry: windows are pooled into out, cells stored in the entry's thumbnail.
  void (*fused_rows)(const int32_t* tables, const Call&, const int32_t* entry, bool mosaic, int64_t first, int64_t last,
                     bool stream, const Workspace&);
  // General form: rows of summary s of a level; rows of windows of an output frame; rows of a frame as it ends.
  void (*summary_rows)(const int32_t* tables, const Call&, const int32_t* level, int64_t s, int64_t first, int64_t last,
                       const Workspace&);
  void (*pooled_rows)(const int32_t* tables, const Call&, int64_t frame, int64_t first, int64_t last, bool stream,
                      const Workspace&);
  void (*final_rows)(const int32_t* tables, const Call&, int64_t frame, int64_t first, int64_t last, bool stream,
                     const Workspace&);
  // Gradients, whose Call has `grad`. Fused form: rows of cells of an entry. General form: rows of windows of a frame,
  // then rows of tokens of a node; by windows, or else `grad` is that of every token.
  void (*fused_gradient_rows)(const int32_t* tables, const Call&, const int32_t* entry, bool mosaic, int64_t first,
                              int64_t last, bool stream, const Gradients&, const Workspace&);
  void (*window_rows)(const int32_t* tables, const Call&, int64_t frame, int64_t first, int64_t last, const Gradients&,
                      const Workspace&);
  void (*gradient_rows)(const int32_t* tables, const Call&, bool windows, int64_t node, int64_t first, int64_t last,
                        bool stream, const Gradients&, const Workspace&);
  void (*norm_rows)(const Call&, int64_t W, int64_t frame, int64_t first, int64_t last, const Workspace&);
};

// By dtype.
const Kernels* portable_kernels(DType);
#ifdef STGP_X86_64
const Kernels* avx2_kernels(DType);
const Kernels* avx512_kernels(DType);
#endif

}  // namespace stgp::cpu
