// The arithmetic of the CPU kernels, compiled once for each set of vector instructions (see vector.h). The loops over
// channels come first: a weighted sum of tokens, and both results of a window at once. The functions below them choose
// the tokens.

#include "kernels.h"

#include "../tables.h"
#include "gradients.h"
#include "norms.h"
#include "tokens.h"
#include "vector.h"

namespace stgp::cpu {

namespace {

// ---- loops over channels ----

// sums = sum_k weights[k] * taps[k] * scale, for BLOCKS blocks from channel c on.
template <int BLOCKS, typename T>
inline void sum_blocks(const T* const* taps, const float* weights, int64_t n, float scale, int64_t c, Block* sums) {
  for (int i = 0; i < BLOCKS; ++i) sums[i] = Block{};
  for (int64_t k = 0; k < n; ++k) {
    for (int i = 0; i < BLOCKS; ++i) {
      const Block v = load(taps[k] + c + i * BLOCK);
      sums[i].a += weights[k] * v.a;
      sums[i].b += weights[k] * v.b;
    }
  }
  for (int i = 0; i < BLOCKS; ++i) sums[i].a *= scale, sums[i].b *= scale;
}

// to = sum_k weights[k] * taps[k] * scale
template <typename T>
void weighted_sum(const T* const* taps, const float* weights, int64_t n, float scale, int64_t C, T* to, bool stream) {
  constexpr int BLOCKS = 4;
  Block sums[BLOCKS];
  int64_t c = 0;
  for (; c + BLOCKS * BLOCK <= C; c += BLOCKS * BLOCK) {
    sum_blocks<BLOCKS>(taps, weights, n, scale, c, sums);
    for (int i = 0; i < BLOCKS; ++i) store(to + c + i * BLOCK, sums[i], stream);
  }
  for (; c + BLOCK <= C; c += BLOCK) {
    sum_blocks<1>(taps, weights, n, scale, c, sums);
    store(to + c, sums[0], stream);
  }
  if (c < C) {
    Block sum{};
    for (int64_t k = 0; k < n; ++k) {
      const Block v = load_some(taps[k] + c, C - c);
      sum.a += weights[k] * v.a;
      sum.b += weights[k] * v.b;
    }
    sum.a *= scale, sum.b *= scale;
    store_some(to + c, sum, C - c);
  }
}

// A window of four tokens, which is also a cell of a thumbnail: upper left, upper right, lower left, lower right.
template <typename T>
struct Window {
  const T* taps[4];
  const T* next[4];    // taps of the window to the right, to prefetch
  int64_t prefetched;  // channels of the upper two of them that norms have prefetched; all if nothing is pooled

  // pooled = sum_k weights[k] * taps[k]
  float weights[4];
  T* pooled;
  bool stream;  // whether `pooled` is stored past the cache

  // cell = inv_count * (sum of the taps + the two tokens above them + the column to the left of all these)
  T* cell;
  float inv_count;
  const T* above[2];  // nullptr if the cell has two rows
  Block* carried;     // in: the sum of the column to the left; out: that of the right one. nullptr if W is even
};

// POOL computes `pooled`, SHRINK computes `cell`. Both read each token once.
template <bool POOL, bool SHRINK, typename T>
void take_window(const Window<T>& s, int64_t C) {
  const auto blocks = [&](int64_t c, const auto& load_at, const auto& store_at) {
    Block v[4];
    for (int k = 0; k < 4; ++k) v[k] = load_at(s.taps[k] + c);
    if (POOL) {
      Block sum = {s.weights[0] * v[0].a, s.weights[0] * v[0].b};
      for (int k = 1; k < 4; ++k) {
        sum.a += s.weights[k] * v[k].a;
        sum.b += s.weights[k] * v[k].b;
      }
      store_at(s.pooled + c, sum, s.stream);
    }
    if (SHRINK) {
      Block left = {v[0].a + v[2].a, v[0].b + v[2].b}, right = {v[1].a + v[3].a, v[1].b + v[3].b};
      if (s.above[0] != nullptr) {
        const Block l = load_at(s.above[0] + c), r = load_at(s.above[1] + c);
        left.a += l.a, left.b += l.b, right.a += r.a, right.b += r.b;
      }
      if (s.carried != nullptr) {
        Block& column = s.carried[c / BLOCK];
        left.a += column.a, left.b += column.b;
        column = right;
      }
      store_at(s.cell + c, Block{(left.a + right.a) * s.inv_count, (left.b + right.b) * s.inv_count}, false);
    }
  };
  int64_t c = 0;
  for (; c + BLOCK <= C; c += BLOCK) {
    prefetch(s.next[2] + c), prefetch(s.next[3] + c);
    if (c >= s.prefetched) prefetch(s.next[0] + c), prefetch(s.next[1] + c);
    blocks(c, [](const T* token) { return load(token); }, [](T* token, Block v, bool past) { store(token, v, past); });
  }
  if (c < C) {
    blocks(
        c, [=](const T* token) { return load_some(token, C - c); },
        [=](T* token, Block v, bool) { store_some(token, v, C - c); });
  }
}

// ---- fused form ----

// An entry: a node that is pooled into a frame of out and shrunk into a thumbnail.
template <typename T>
struct FusedEntry {
  const Call& call;
  const Workspace& workspace;
  Image<T> image;
  int64_t H, W, w;  // rows and columns of the node, columns of the thumbnail
  int64_t target;
  T* thumbnail;
  Block* carried;  // nullptr if cells have two columns
  bool stream;

  FusedEntry(const Piece& piece, const int32_t* entry)
      : call(piece.call),
        workspace(piece.workspace),
        image(Image<T>::of(piece.tables, call, entry)),
        H(piece.tables[H_HEIGHT]),
        W(piece.tables[H_WIDTH]),
        w((W + 1) / 2),
        target(entry[E_TARGET]),
        thumbnail(thumbnail_at<T>(piece.tables, call, entry[E_SLOT])),
        carried(W % 2 == 1 ? static_cast<Block*>(workspace.carried) : nullptr),
        stream(piece.stream) {}

  bool has_row_above(int64_t i) const { return H % 2 == 1 && i > 0; }
  bool has_column_left(int64_t j) const { return carried != nullptr && j > 0; }

  const T* token(int64_t r, int64_t c, int64_t place) const {
    return gather(image.at(r, c), image.channel, call.C, workspace, FIRST_TAP + place);
  }

  T* cell(int64_t i, int64_t j) const { return thumbnail + (i * w + j) * call.C; }
};

// Window (i, j) of an entry, whose four tokens are in the frame: pools it and shrinks it.
template <typename T>
void whole_window(const FusedEntry<T>& e, int64_t i, int64_t j, bool pool, bool shrink) {
  const int64_t C = e.call.C;
  const bool prefetches = e.image.channel == 1 && 2 * j + 4 <= e.W, above = e.has_row_above(i);
  Window<T> window;
  for (int k = 0; k < 4; ++k) {
    const int64_t r = 2 * i + k / 2, c = 2 * j + k % 2;
    window.taps[k] = e.token(r, c, k);
    window.next[k] = prefetches ? e.image.at(r, c + 2) : window.taps[k];
  }
  if (pool) {
    for (int k = 0; k < 4; ++k) {
      const T* next = k < 2 ? window.next[k] : window.taps[k];
      window.weights[k] = e.call.temperature * token_norm(window.taps[k], next, e.call);
    }
    softmax(window.weights, 4, 0);
  }
  window.prefetched = pool ? channels_of_norm(e.call) : C;
  const OutToken<T> out(e.call, pool ? e.target : 0, pool ? i : 0, pool ? j : 0, e.workspace);
  window.pooled = out.buffer;
  window.stream = e.stream;
  window.inv_count = 1.0f / static_cast<float>((2 + above) * (2 + e.has_column_left(j)));
  for (int k = 0; k < 2; ++k) {
    window.above[k] = above && shrink ? e.token(2 * i - 1, 2 * j + k, 4 + k) : nullptr;
  }
  window.carried = e.carried;
  if (shrink) {
    window.cell = e.cell(i, j);
    pool ? take_window<true, true>(window, C) : take_window<false, true>(window, C);
  } else {
    take_window<true, false>(window, C);
  }
  if (pool) out.finish(C);
}

// Window (i, j) of an entry at the edge of the frame, where it has one or two tokens.
template <typename T>
void cut_window(const FusedEntry<T>& e, int64_t i, int64_t j, bool pool, bool shrink) {
  static constexpr float ONES[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
  const int64_t C = e.call.C;
  const int64_t bottom = window_end(i, e.H), right = window_end(j, e.W);
  const T* taps[9];
  int64_t n = 0;
  for (int64_t r = 2 * i; r < bottom; ++r) {
    for (int64_t c = 2 * j; c < right; ++c, ++n) taps[n] = e.token(r, c, n);
  }
  if (pool) {
    float weights[4];
    for (int64_t k = 0; k < n; ++k) weights[k] = e.call.temperature * token_norm(taps[k], taps[k], e.call);
    softmax(weights, n, 0);
    const OutToken<T> out(e.call, e.target, i, j, e.workspace);
    weighted_sum(taps, weights, n, 1.0f, C, out.buffer, e.stream);
    out.finish(C);
  }
  if (shrink) {
    // A cell also has the row above the window and the column to its left.
    const int64_t left = e.has_column_left(j) ? 2 * j - 1 : 2 * j;
    for (int64_t r = e.has_row_above(i) ? 2 * i - 1 : 2 * i; r < bottom; ++r) {
      for (int64_t c = left; c < (r < 2 * i ? right : 2 * j); ++c, ++n) taps[n] = e.token(r, c, n);
    }
    weighted_sum(taps, ONES, n, 1.0f / static_cast<float>(n), C, e.cell(i, j), false);
  }
}

// Rows of windows of an entry, and the same rows of its thumbnail.
template <typename T>
void fused_rows(const Piece& piece, const int32_t* entry) {
  const int32_t* tables = piece.tables;
  const int64_t OH = tables[H_OUT_ROWS], OW = tables[H_OUT_COLS], C = piece.call.C;
  const FusedEntry<T> e(piece, entry);
  const bool pools = e.target >= 0 && piece.call.grad == nullptr;  // gradients need the thumbnails alone
  for (int64_t i = piece.first; i < piece.last; ++i) {
    const int64_t live = e.thumbnail != nullptr ? tables[entry[E_LIVE] + i] : 0, pooled = pools && i < OH ? OW : 0;
    if (e.carried != nullptr && live > 0) __builtin_memset(e.carried, 0, (C + BLOCK - 1) / BLOCK * sizeof(Block));
    for (int64_t j = 0; j < (live > pooled ? live : pooled); ++j) {
      if (2 * i + 2 <= e.H && 2 * j + 2 <= e.W) {
        whole_window(e, i, j, j < pooled, j < live);
      } else {
        cut_window(e, i, j, j < pooled, j < live);
      }
    }
  }
  if (piece.stream) finish_stores();
}

// ---- general form ----

// Rows of summary s of a level.
template <typename T>
void summary_rows(const Piece& piece, const int32_t* level, int64_t s) {
  const int32_t* tables = piece.tables;
  const Workspace& workspace = piece.workspace;
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH], C = piece.call.C;
  const int64_t rows = level[L_ROWS], cols = level[L_COLS];
  const int32_t* sources = tables + level[L_SOURCES] + s * rows * cols;
  const Runs row_runs(tables, level[L_ROW_RUNS], H), col_runs(tables, level[L_COL_RUNS], W);
  const T** taps = reinterpret_cast<const T**>(workspace.taps);
  T* const summary = static_cast<T*>(piece.call.scratch) + (level[L_FIRST] + s) * H * W * C;
  for (int64_t i = piece.first; i < piece.last; ++i) {
    for (int64_t j = 0; j < W; ++j) {
      int64_t n = 0;
      for (int64_t r = row_runs.start[i]; r < row_runs.stop(i); ++r) {
        for (int64_t c = col_runs.start[j]; c < col_runs.stop(j); ++c, ++n) {
          const Frame<T> frame = frame_of_node<T>(tables, piece.call, sources[r / H * cols + c / W]);
          taps[n] = gather(frame.at(r % H, c % W), frame.channel, C, workspace, FIRST_TAP + n);
          workspace.weights[n] = 1;
        }
      }
      const float inv_count = 1.0f / static_cast<float>(n);
      weighted_sum(taps, workspace.weights, n, inv_count, C, summary + (i * W + j) * C, false);
    }
  }
}

// Rows of windows of an output frame.
template <typename T>
void pooled_rows(const Piece& piece, int64_t frame) {
  const int32_t* tables = piece.tables;
  const Call& call = piece.call;
  const Workspace& workspace = piece.workspace;
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH], OH = tables[H_OUT_ROWS], OW = tables[H_OUT_COLS], C = call.C;
  const Runs row_runs(tables, tables[H_WINDOW_ROWS], OH), col_runs(tables, tables[H_WINDOW_COLS], OW);
  const Frame<T> image = frame_of_node<T>(tables, call, tables[tables[H_OUTPUTS] + frame]);
  const T** taps = reinterpret_cast<const T**>(workspace.taps);
  int64_t known = 0;  // norms of rows before this one have been computed, or are negative
  for (int64_t i = piece.first; i < piece.last; ++i) {
    const int64_t top = clamp(row_runs.start[i], H), bottom = clamp(row_runs.stop(i), H);
    known = known > top ? known : top;
    for (; known < bottom; ++known) {
      for (int64_t c = 0; c < W; ++c) workspace.norms[known * W + c] = -1;
    }
    for (int64_t j = 0; j < OW; ++j) {
      const int64_t left = clamp(col_runs.start[j], W), right = clamp(col_runs.stop(j), W);
      int64_t n = 0;
      for (int64_t r = top; r < bottom; ++r) {
        for (int64_t c = left; c < right; ++c, ++n) {
          taps[n] = gather(image.at(r, c), image.channel, C, workspace, FIRST_TAP + n);
          float& norm = workspace.norms[r * W + c];
          if (norm < 0) norm = token_norm(taps[n], taps[n], call);
          workspace.weights[n] = call.temperature * norm;
        }
      }
      softmax(workspace.weights, n, int64_t{row_runs.count[i]} * col_runs.count[j] - n);
      const OutToken<T> out(call, frame, i, j, workspace);
      weighted_sum(taps, workspace.weights, n, 1.0f, C, out.buffer, piece.stream);
      out.finish(C);
    }
  }
  if (piece.stream) finish_stores();
}

// Rows of an output frame of temporal_grid.
template <typename T>
void output_rows(const Piece& piece, int64_t frame) {
  const int32_t* tables = piece.tables;
  const int64_t W = tables[H_WIDTH], C = piece.call.C;
  const Frame<T> image = frame_of_node<T>(tables, piece.call, tables[tables[H_OUTPUTS] + frame]);
  constexpr int64_t CHANNELS = STGP_VECTOR_BYTES / sizeof(T);  // channels of a vector
  for (int64_t i = piece.first; i < piece.last; ++i) {
    for (int64_t j = 0; j < W; ++j) {
      const T* token = gather(image.at(i, j), image.channel, C, piece.workspace, FIRST_TAP);
      const OutToken<T> out(piece.call, frame, i, j, piece.workspace);
      int64_t c = 0;
      for (; c + CHANNELS <= C; c += CHANNELS) store_bytes(out.buffer + c, load_bytes<Words>(token + c), piece.stream);
      __builtin_memcpy(out.buffer + c, token + c, (C - c) * sizeof(T));
      out.finish(C);
    }
  }
  if (piece.stream) finish_stores();
}

// ---- norms ----

// Norms of rows of tokens of a frame.
template <typename T>
void norm_rows(const Piece& piece, int64_t W, int64_t frame) {
  const Call& call = piece.call;
  const Frame<T> image = frame_of_x<T>(call, frame);
  const Strides& s = call.out_strides;
  float* const norms = static_cast<float*>(call.out) + frame_offset(call, s, frame);
  for (int64_t i = piece.first; i < piece.last; ++i) {
    for (int64_t j = 0; j < W; ++j) {
      const T* token = gather(image.at(i, j), image.channel, call.C, piece.workspace, FIRST_TAP);
      norms[i * s.row + j * s.col] = token_norm(token, token, call);
    }
  }
}

template <typename T>
constexpr Kernels KERNELS = {
    STGP_CAPABILITY,        fused_rows<T>,  summary_rows<T>,  pooled_rows<T>, output_rows<T>,
    fused_gradient_rows<T>, window_rows<T>, gradient_rows<T>, norm_rows<T>,
};

}  // namespace

const Kernels* STGP_KERNELS(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
      return &KERNELS<BFloat16>;
    case DType::float16:
      return &KERNELS<Float16>;
    default:
      return &KERNELS<float>;
  }
}

}  // namespace stgp::cpu
