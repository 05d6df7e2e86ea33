// The arithmetic of the CPU kernels, compiled once for each set of vector instructions (see vector.h): a weighted sum
// of tokens, then the fused form, the general form and the norms.

#include "kernels.h"

#include "../tables.h"
#include "gradients.h"
#include "norms.h"
#include "tokens.h"
#include "vector.h"

namespace stgp::cpu {

namespace {

// The largest number of windows of a group, and the largest size in bytes of the tokens of several windows. The tokens
// of two groups fit into a first-level cache of 32 KB: those that are read twice, and those that are prefetched
// meanwhile.
constexpr int64_t MOST_WINDOWS = 16, GROUP_BYTES = 14 << 10;

// The largest size in bytes of a window's four tokens for which one token of each next window is prefetched while norms
// are computed. With larger windows the prefetched tokens would displace those that are about to be read again.
constexpr int64_t EARLY_BYTES = 32 << 10;

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

// ---- fused form ----

// An entry: a node that is pooled into a frame of out and shrunk into a thumbnail.
template <typename T>
struct FusedEntry {
  const Call& call;
  const Workspace& workspace;
  Image<T> image;
  int64_t H, W, w;  // rows and columns of the node, columns of the thumbnail
  T* pooled;        // the frame of out that the node is pooled into, or nullptr
  T* thumbnail;     // nullptr if no thumbnail is stored
  Block* carried;   // nullptr if cells have two columns
  bool stream;
  bool early;  // whether the first token of each next window is prefetched while norms are computed

  FusedEntry(const Piece& piece, const int32_t* entry)
      : call(piece.call),
        workspace(piece.workspace),
        image(Image<T>::of(piece.tables, call, entry)),
        H(piece.tables[H_HEIGHT]),
        W(piece.tables[H_WIDTH]),
        w((W + 1) / 2),
        pooled(pools(piece, entry) ? frame_of_out<T>(call, entry[E_TARGET]) : nullptr),
        thumbnail(thumbnail_at<T>(piece.tables, call, entry[E_SLOT])),
        carried(W % 2 == 1 ? static_cast<Block*>(workspace.carried) : nullptr),
        stream(piece.stream),
        early(4 * call.C * int64_t{sizeof(T)} <= EARLY_BYTES && reads_all_channels(call)) {}

  // Gradients need the thumbnails alone.
  static bool pools(const Piece& piece, const int32_t* entry) {
    return entry[E_TARGET] >= 0 && piece.call.grad == nullptr;
  }

  bool has_row_above(int64_t i) const { return H % 2 == 1 && i > 0; }
  bool has_column_left(int64_t j) const { return carried != nullptr && j > 0; }

  // Returns the token at an address beside a window, gathered if need be. The places before are those of two windows.
  const T* beside(const T* token, int64_t place) const {
    return gather(token, image.channel, call.C, workspace, FIRST_TAP + 8 + place);
  }

  T* cell(int64_t i, int64_t j) const { return thumbnail + (i * w + j) * call.C; }

  // The number of windows in a group. There is room to gather the tokens of one window.
  int64_t windows_of_group() const {
    const int64_t fitting = GROUP_BYTES / (4 * call.C * int64_t{sizeof(T)});
    return image.channel != 1 || fitting < 1 ? 1 : least(fitting, MOST_WINDOWS);
  }
};

// Neighbouring windows (i, j), ..., (i, j + n - 1) of an entry. A window has four tokens: upper left, upper right,
// lower left, lower right. Where the edge of the frame cuts it, it has the token beside that one, or above it, once
// more.
template <typename T>
struct Group {
  int64_t i = 0, j = 0, n = 0;
  int64_t live = 0, pooled = 0;    // number of windows, from the first, that are shrunk, and that are pooled
  int64_t place = 0;               // of gathered tokens
  typename Image<T>::Row above{};  // the row of tokens above the windows, of which cells may have a part
  const T* taps[4 * MOST_WINDOWS];
  float weights[4 * MOST_WINDOWS];

  // The number of windows, from the first, whose four tokens are in the frame.
  int64_t whole(const FusedEntry<T>& e) const {
    if (2 * i + 2 > e.H) return 0;
    return 2 * (j + n) > e.W ? n - 1 : n;
  }
};

// Walk goes through the windows of some rows of an entry, group by group.
template <typename T>
struct Walk {
  const FusedEntry<T>& e;
  const int32_t* live;   // number of cells in each row that are stored, nullptr for none
  int64_t OH, OW, last;  // rows and columns of windows that are pooled; the row before which the walk ends
  int64_t most;          // windows of a group
  int64_t i, j = 0;      // the next group

  // Sets the next group and its tokens. After the last one its n is 0.
  void next(Group<T>& group) {
    int64_t shrunk, pooled, windows;
    for (;; ++i, j = 0) {
      group.n = 0;
      if (i >= last) return;
      shrunk = live != nullptr ? live[i] : 0, pooled = i < OH ? OW : 0;
      windows = shrunk > pooled ? shrunk : pooled;
      if (j < windows) break;
    }
    const auto within = [&](int64_t count) { return count < j ? 0 : least(count - j, most); };
    group.i = i, group.j = j, group.n = within(windows), group.live = within(shrunk), group.pooled = within(pooled);
    group.above = e.image.at_row(i > 0 ? 2 * i - 1 : 0);
    for (int64_t r = 0; r < 2; ++r) {
      const typename Image<T>::Row row = e.image.at_row(2 * i + r < e.H ? 2 * i + r : e.H - 1);
      // In most windows the tokens are neighbours in memory: both are in one tile, and neither is beyond the edge.
      const int64_t end = e.image.channel != 1 ? 0 : 2 * j < row.w ? least(row.w, e.W) : e.W;
      int64_t k = 2 * r;
      for (const T* token = row.at(2 * j); k < 4 * least(group.n, end / 2 - j); k += 4, token += 2 * row.col) {
        group.taps[k] = token, group.taps[k + 1] = token + row.col;
      }
      for (; k < 4 * group.n; k += 4) {
        const int64_t c = 2 * (j + k / 4), right = c + 1 < e.W ? c + 1 : c;
        group.taps[k] = gather(row.at(c), e.image.channel, e.call.C, e.workspace, group.place + k);
        group.taps[k + 1] = gather(row.at(right), e.image.channel, e.call.C, e.workspace, group.place + k + 1);
      }
    }
    j += group.n;
  }
};

// Computes the weights of the pooled windows of a group. Tokens of group `next` are prefetched meanwhile.
template <typename T>
void weigh(const FusedEntry<T>& e, Group<T>& group, const Group<T>& next) {
  const int64_t n = 4 * group.pooled;
  Floats sums[4 * MOST_WINDOWS];
  norm_sums(group.taps, n, e.call, sums, Later<T>{next.taps, e.early ? 4 * next.n : 0});
  norms_of_sums(sums, n, e.call, group.weights);
  const float temperature = e.call.temperature;
  for (int64_t k = 0; k < whole_vectors(n); ++k) group.weights[k] *= temperature;
  if (2 * group.i + 2 > e.H || 2 * (group.j + group.n) > e.W) {
    for (int64_t k = 0; k < n; ++k) {
      const bool is_there = 2 * group.i + k / 2 % 2 < e.H && 2 * (group.j + k / 4) + k % 2 < e.W;
      if (!is_there) group.weights[k] = -HUGE_VALF;
    }
  }
  softmax_of_fours(group.weights, group.pooled);
}

// A window that has all its four tokens. A cell of a thumbnail is made of them too.
template <typename T>
struct Window {
  const T* taps[4];
  const T* next[4];  // the taps of a window that is read later, to prefetch
  bool has_first;    // whether the first of these was prefetched while norms were computed

  // pooled = sum_k weights[k] * taps[k]
  Floats weights[4];
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
inline void take_window(const Window<T>& w, int64_t C) {
  const auto blocks = [&](int64_t c, const auto& load_at, const auto& store_at) {
    Block v[4];
    for (int k = 0; k < 4; ++k) v[k] = load_at(w.taps[k] + c);
    if (POOL) {
      Block sum = {w.weights[0] * v[0].a, w.weights[0] * v[0].b};
      for (int k = 1; k < 4; ++k) {
        sum.a += w.weights[k] * v[k].a;
        sum.b += w.weights[k] * v[k].b;
      }
      store_at(w.pooled + c, sum, w.stream);
    }
    if (SHRINK) {
      Block left = {v[0].a + v[2].a, v[0].b + v[2].b}, right = {v[1].a + v[3].a, v[1].b + v[3].b};
      if (w.above[0] != nullptr) {
        const Block l = load_at(w.above[0] + c), r = load_at(w.above[1] + c);
        left.a += l.a, left.b += l.b, right.a += r.a, right.b += r.b;
      }
      if (w.carried != nullptr) {
        Block& column = w.carried[c / BLOCK];
        left.a += column.a, left.b += column.b;
        column = right;
      }
      store_at(w.cell + c, Block{(left.a + right.a) * w.inv_count, (left.b + right.b) * w.inv_count}, false);
    }
  };
  int64_t c = 0;
  for (; c + BLOCK <= C; c += BLOCK) {
    if (!w.has_first) prefetch(w.next[0] + c);
    for (int k = 1; k < 4; ++k) prefetch(w.next[k] + c);
    blocks(c, [](const T* token) { return load(token); }, [](T* token, Block v, bool past) { store(token, v, past); });
  }
  if (c < C) {
    blocks(
        c, [=](const T* token) { return load_some(token, C - c); },
        [=](T* token, Block v, bool) { store_some(token, v, C - c); });
  }
}

// Windows [first, last) of a group, whose four tokens are in the frame. POOL pools them, SHRINK shrinks them. The
// tokens of group `next` are prefetched meanwhile. The function is not inlined, so that its loop need not share
// registers with its caller.
template <bool POOL, bool SHRINK, typename T>
__attribute__((noinline)) void take_windows(const FusedEntry<T>& e, const Group<T>& group, int64_t first, int64_t last,
                                            const Group<T>& next) {
  const int64_t C = e.call.C, i = group.i;
  const bool above = e.has_row_above(i);
  for (int64_t g = first; g < last; ++g) {
    const int64_t j = group.j + g;
    Window<T> window;
    for (int k = 0; k < 4; ++k) window.taps[k] = group.taps[4 * g + k];
    const T* const* const later = g < next.n ? next.taps + 4 * g : group.taps + 4 * g;
    for (int k = 0; k < 4; ++k) window.next[k] = later[k];
    window.has_first = POOL && e.early;
    if (SHRINK) {
      window.inv_count = 1.0f / static_cast<float>((2 + above) * (2 + e.has_column_left(j)));
      for (int k = 0; k < 2; ++k) window.above[k] = above ? e.beside(group.above.at(2 * j + k), k) : nullptr;
      window.carried = e.carried;
      window.cell = e.cell(i, j);
    }
    if (!POOL) {
      take_window<POOL, SHRINK>(window, C);
      continue;
    }
    for (int k = 0; k < 4; ++k) window.weights[k] = splat(group.weights[4 * g + k]);
    const OutToken<T> out(e.call, e.pooled, i, j, e.workspace);
    window.pooled = out.buffer;
    window.stream = e.stream;
    take_window<POOL, SHRINK>(window, C);
    out.finish(C);
  }
}

// Window g of a group at the edge of the frame, where it has one or two tokens.
template <typename T>
void cut_window(const FusedEntry<T>& e, const Group<T>& group, int64_t g) {
  static constexpr float ONES[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
  const int64_t C = e.call.C, i = group.i, j = group.j + g;
  const int64_t bottom = window_end(i, e.H), right = window_end(j, e.W);
  const T* taps[9];
  float weights[4];
  int64_t n = 0;
  for (int64_t k = 0; k < 4; ++k) {
    if (2 * i + k / 2 >= e.H || 2 * j + k % 2 >= e.W) continue;
    taps[n] = group.taps[4 * g + k], weights[n++] = group.weights[4 * g + k];
  }
  if (g < group.pooled) {
    const OutToken<T> out(e.call, e.pooled, i, j, e.workspace);
    weighted_sum(taps, weights, n, 1.0f, C, out.buffer, e.stream);
    out.finish(C);
  }
  if (g < group.live) {
    // A cell also has the row above the window and the column to its left.
    const int64_t left = e.has_column_left(j) ? 2 * j - 1 : 2 * j;
    int64_t place = 0;
    for (int64_t r = e.has_row_above(i) ? 2 * i - 1 : 2 * i; r < bottom; ++r) {
      for (int64_t c = left; c < (r < 2 * i ? right : 2 * j); ++c) taps[n++] = e.beside(e.image.at(r, c), place++);
    }
    weighted_sum(taps, ONES, n, 1.0f / static_cast<float>(n), C, e.cell(i, j), false);
  }
}

// Rows of windows of an entry, and the same rows of its thumbnail.
template <typename T>
void fused_rows(const Piece& piece, const int32_t* entry) {
  const int32_t* tables = piece.tables;
  const int64_t C = piece.call.C;
  const FusedEntry<T> e(piece, entry);
  Walk<T> walk{e,
               e.thumbnail != nullptr ? tables + entry[E_LIVE] : nullptr,
               e.pooled != nullptr ? tables[H_OUT_ROWS] : 0,
               tables[H_OUT_COLS],
               piece.last,
               e.windows_of_group(),
               piece.first};
  Group<T> groups[2];
  Group<T>*group = &groups[0], *next = &groups[1];
  group->place = FIRST_TAP, next->place = FIRST_TAP + 4;
  walk.next(*group);
  while (group->n > 0) {
    walk.next(*next);
    if (group->pooled > 0) weigh(e, *group, *next);
    if (group->j == 0 && e.carried != nullptr && group->live > 0) {
      __builtin_memset(e.carried, 0, (C + BLOCK - 1) / BLOCK * sizeof(Block));
    }
    const int64_t whole = group->whole(e), pooled = least(whole, group->pooled), live = least(whole, group->live);
    take_windows<true, true>(e, *group, 0, least(pooled, live), *next);
    take_windows<true, false>(e, *group, least(pooled, live), pooled, *next);
    take_windows<false, true>(e, *group, least(pooled, live), live, *next);
    for (int64_t g = whole; g < group->n; ++g) cut_window(e, *group, g);
    Group<T>* const done = group;
    group = next, next = done;
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

// NewNorms collects tokens and computes their norms LANES at a time.
template <typename T>
struct NewNorms {
  const Call& call;
  int64_t n = 0;
  const T* tokens[LANES];
  float* places[LANES];

  explicit NewNorms(const Call& call) : call(call) {}

  void add(const T* token, float& norm) {
    tokens[n] = token, places[n++] = &norm;
    if (n == LANES) compute();
  }

  void compute() {
    float norms[LANES];
    if (n > 0) token_norms(tokens, n, call, norms);
    for (int64_t k = 0; k < n; ++k) *places[k] = norms[k];
    n = 0;
  }
};

// Rows of windows of an output frame.
template <typename T>
void pooled_rows(const Piece& piece, int64_t frame) {
  const int32_t* tables = piece.tables;
  const Call& call = piece.call;
  const Workspace& workspace = piece.workspace;
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH], OH = tables[H_OUT_ROWS], OW = tables[H_OUT_COLS], C = call.C;
  const Runs row_runs(tables, tables[H_WINDOW_ROWS], OH), col_runs(tables, tables[H_WINDOW_COLS], OW);
  const Frame<T> image = frame_of_node<T>(tables, call, tables[tables[H_OUTPUTS] + frame]);
  T* const out_frame = frame_of_out<T>(call, frame);
  const T** taps = reinterpret_cast<const T**>(workspace.taps);
  const auto norm_at = [&](int64_t r, int64_t c) -> float& { return workspace.norms[r * W + c]; };
  int64_t known = 0;  // norms of rows before this one have been computed, or are negative
  for (int64_t i = piece.first; i < piece.last; ++i) {
    const int64_t top = clamp(row_runs.start[i], H), bottom = clamp(row_runs.stop(i), H);
    known = known > top ? known : top;
    for (; known < bottom; ++known) {
      for (int64_t c = 0; c < W; ++c) norm_at(known, c) = -1;
    }
    for (int64_t j = 0; j < OW; ++j) {
      const int64_t left = clamp(col_runs.start[j], W), right = clamp(col_runs.stop(j), W);
      NewNorms<T> unknown(call);
      int64_t n = 0;
      for (int64_t r = top; r < bottom; ++r) {
        for (int64_t c = left; c < right; ++c, ++n) {
          taps[n] = gather(image.at(r, c), image.channel, C, workspace, FIRST_TAP + n);
          if (norm_at(r, c) < 0) unknown.add(taps[n], norm_at(r, c));
        }
      }
      unknown.compute();
      n = 0;
      for (int64_t r = top; r < bottom; ++r) {
        for (int64_t c = left; c < right; ++c, ++n) workspace.weights[n] = call.temperature * norm_at(r, c);
      }
      softmax(workspace.weights, n, int64_t{row_runs.count[i]} * col_runs.count[j] - n);
      const OutToken<T> out(call, out_frame, i, j, workspace);
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
  T* const out_frame = frame_of_out<T>(piece.call, frame);
  constexpr int64_t CHANNELS = STGP_VECTOR_BYTES / sizeof(T);  // channels of a vector
  for (int64_t i = piece.first; i < piece.last; ++i) {
    for (int64_t j = 0; j < W; ++j) {
      const T* token = gather(image.at(i, j), image.channel, C, piece.workspace, FIRST_TAP);
      const OutToken<T> out(piece.call, out_frame, i, j, piece.workspace);
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
  NewNorms<T> unknown(call);
  for (int64_t i = piece.first; i < piece.last; ++i) {
    for (int64_t j = 0; j < W; ++j) {
      const T* token = gather(image.at(i, j), image.channel, call.C, piece.workspace, FIRST_TAP + unknown.n);
      unknown.add(token, norms[i * s.row + j * s.col]);
    }
  }
  unknown.compute();
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
