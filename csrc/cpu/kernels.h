// The functions of csrc/cpu/kernels.cpp, which is compiled once for each set of vector instructions.

#pragma once

#include <cstdint>

#include "../grid_pool.h"

namespace stgp::cpu {

// Memory of one thread.
struct Workspace {
  char* gathered;     // copies of tokens whose channels are not contiguous
  void* carried;      // sums of tokens in float, in whole blocks of channels
  const void** taps;  // pointers to the tokens of a window, or of a run of rows and columns
  float* weights;     // one for each of the taps
  float* norms;       // one for each token of a frame; negative: not computed yet
  double* logits;     // one for each token of a window, for gradients
  double* dots;       // the product of each token of a window and the gradient of the pooled token
};

// A piece of work: rows [first, last) of the output of a kernel.
struct Piece {
  const int32_t* tables;
  const Call& call;
  int64_t first, last;
  bool stream;  // whether results are stored past the cache
  const Workspace& workspace;
};

// Scratch that gradients need beside thumbnails or summaries.
struct Gradients {
  // Gradients of the summaries in float: (summaries, H, W, C rounded up to WIDEST_BLOCK). Channels have the order in
  // which blocks hold them.
  void* summaries;
  // Statistics of the windows, (frames, OH, OW, 3): the largest logit, the sum of exp(logit - largest), and the mean of
  // grad . token by the weights. nullptr in the fused form and for temporal_grid, which need none.
  double* windows;
};

// Floats of the widest vectors, the largest number of tokens whose norms are computed at once.
constexpr int64_t MOST_LANES = 16;

// Channels of a block of the widest vectors. Sums of tokens are stored in whole blocks.
constexpr int64_t WIDEST_BLOCK = 2 * MOST_LANES;

struct Kernels {
  const char* name;  // of the set of vector instructions

  // Fused form. Pools rows of windows of an entry into out, and stores the same rows of its thumbnail.
  void (*fused_rows)(const Piece&, const int32_t* entry);

  // General form: rows of summary s of a level, rows of windows of an output frame, and rows of an output frame of
  // temporal_grid.
  void (*summary_rows)(const Piece&, const int32_t* level, int64_t s);
  void (*pooled_rows)(const Piece&, int64_t frame);
  void (*output_rows)(const Piece&, int64_t frame);

  // Gradients. Fused form: gradients of the tokens under rows of windows of an entry. General form: statistics of rows
  // of windows of an output frame, then gradients of rows of tokens of a node.
  void (*fused_gradient_rows)(const Piece&, const int32_t* entry, const Gradients&);
  void (*window_rows)(const Piece&, int64_t frame, const Gradients&);
  void (*gradient_rows)(const Piece&, int64_t node, const Gradients&);

  // Norms of the tokens of a frame of W columns. The piece has no tables.
  void (*norm_rows)(const Piece&, int64_t W, int64_t frame);
};

// Each function returns the kernels for one dtype.
const Kernels* portable_kernels(DType);
#ifdef STGP_X86_64
const Kernels* avx2_kernels(DType);
const Kernels* avx512_kernels(DType);
#endif

}  // namespace stgp::cpu
