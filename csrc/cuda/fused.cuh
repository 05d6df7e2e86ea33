// The fused form: its parameters, the places of its blocks, and the window that a block holds in registers. rows.cuh
// and windows.cuh have what blocks do, fused.cu the kernels and their launches.

#pragma once

#include "norms.cuh"

namespace stgp::cuda {

// How blocks share the rows of entries: a block takes `length` neighbouring cells or windows of a row.
struct Spans {
  int32_t length;
  Divisor spans;  // blocks of a row
  Divisor rows;   // rows of an entry

  struct Place {
    int32_t entry, row, first;
  };

  __device__ __forceinline__ Place place(int32_t block) const {
    const int32_t row = spans.quotient(block), entry = rows.quotient(row);
    return {entry, row - entry * rows.value, (block - row * spans.value) * length};
  }
};

// The channel stride of frames. Vector access is for neighbouring channels alone.
template <Access A, class T>
__device__ __forceinline__ int64_t channel_stride(const Frames<T>& frames) {
  return A == Access::vector ? 1 : frames.strides.channel;
}

// Distances in bytes from the first token of a window, (2i, 2j), to tokens of rows 2i - 1, 2i and 2i + 1. They are
// arguments of the kernels, so that an address is one addition.
struct Distances {
  int64_t of[3][6];  // rows 2i - 1, 2i and 2i + 1; columns 2j - 3, ..., 2j + 2

  Distances() = default;

  Distances(const Strides& strides, int64_t bytes) {
    for (int r = 0; r < 3; ++r) {
      for (int c = 0; c < 6; ++c) of[r][c] = ((r - 1) * strides.row + (c - 3) * strides.col) * bytes;
    }
  }
};

// The sizes of a call in the fused form, and its norm.
struct FusedCall {
  int32_t H, W, h, w, OH, OW, C;
  Norm norm;
  float inv_count, temperature;
  int32_t norm_channels;  // number of channels that the norm runs over
};

inline FusedCall fused_call(const int32_t* tables, const Call& call) {
  const int32_t H = tables[H_HEIGHT], W = tables[H_WIDTH];
  return {H,
          W,
          (H + 1) / 2,
          (W + 1) / 2,
          tables[H_OUT_ROWS],
          tables[H_OUT_COLS],
          static_cast<int32_t>(call.C),
          norm_kind(call.norm_type),
          inv_count_of_norm(call),
          call.temperature,
          static_cast<int32_t>(channels_of_norm(call))};
}

template <class T>
struct Fused : FusedCall {
  Frames<const T> x;
  Frames<T> out;
  Distances distances;     // in x
  T* scratch;              // thumbnails: (slots, h, w, C)
  const int32_t* tables;   // base of the offsets in entries
  const int32_t* walked;   // entries whose rows this launch walks
  const int32_t* windows;  // entries of frames without a thumbnail, whose windows this launch pools
  int32_t walk_blocks, window_blocks;
  Spans of_walks, of_windows;
  bool pools;            // whether windows are pooled; else only thumbnails are stored
  float inverses[3][3];  // 1 / (r c) for cells of r = 1, 2, 3 rows and c = 1, 2, 3 columns
};

// Rows 2i - 1, 2i and 2i + 1 of a frame, from the thread's first channel on. The parameters P of a kernel have x and
// its distances.
template <class T, Access A, class P = Fused<T>>
struct FrameRows {
  static constexpr bool MOSAIC = false;
  const P& p;
  const T* token;  // token (2i, 2j)

  __device__ __forceinline__ FrameRows(const P& p, int32_t frame, int32_t i, int32_t j)
      : p(p), token(p.x.token(p.x.frame(frame), 2 * i, 2 * j) + first_channel<T>() * channel_stride<A>(p.x)) {}

  // Token (2i + r, 2j + c).
  __device__ __forceinline__ const T* at(int r, int c) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(token) + p.distances.of[r + 1][c + 3]);
  }
  __device__ __forceinline__ int64_t channel() const { return channel_stride<A>(p.x); }
  __device__ __forceinline__ void advance() { token = at(0, 2); }
};

// The same rows of the mosaic of four thumbnails. All lanes of a warp must call `at` together.
template <class T>
struct MosaicRows {
  static constexpr bool MOSAIC = true;
  const char* scratch;
  // Where a row starts in a tile, as a number of tokens: lanes 0, 1 and 2 have it for rows 2i - 1, 2i and 2i + 1 in a
  // left tile, lanes 3, 4 and 5 for the right one. Every lane having all of them would take more registers than there
  // are.
  uint32_t start;
  int32_t col, w;
  uint32_t token_bytes;

  __device__ __forceinline__ MosaicRows(const T* scratch, const int32_t* entry, int32_t h, int32_t w, int32_t C,
                                        int32_t i, int32_t j)
      : scratch(reinterpret_cast<const char*>(scratch + first_channel<T>())),
        col(2 * j),
        w(w),
        token_bytes(static_cast<uint32_t>(C) * sizeof(T)) {
    const int32_t lane = threadIdx.x % WARP % 6, right = lane / 3, row = 2 * i - 1 + lane % 3, below = row >= h;
    const int32_t tile_row = entry[E_SOURCES + 2 * below + right] * h + row - below * h;
    start = static_cast<uint32_t>(tile_row - right) * static_cast<uint32_t>(w);
  }

  __device__ __forceinline__ const T* at(int r, int c) const {
    const uint32_t row = __shfl_sync(ALL_LANES, start, (col + c < w ? 1 : 4) + r);
    const uint64_t distance = static_cast<uint64_t>(row + static_cast<uint32_t>(col + c)) * token_bytes;
    return reinterpret_cast<const T*>(scratch + distance);
  }
  __device__ __forceinline__ int64_t channel() const { return 1; }
  __device__ __forceinline__ void advance() { col += 2; }
};

// The four tokens of a window, row-major. A thread keeps its channels packed in registers. With scalar access they
// would take too many registers, and so would 32-bit mosaics, which are in the L2 cache: these are loaded at each use.
// PLAIN: the norm is that of p = 2 over all channels.
template <class T, Access A, bool PLAIN, class Rows>
struct Window {
  static constexpr bool KEEPS = A == Access::vector && (sizeof(T) == 2 || !Rows::MOSAIC);
  static constexpr CacheHint HINT = Rows::MOSAIC ? CacheHint::keep : CacheHint::stream;
  static constexpr int HELD = KEEPS ? VECS<T> : 1;

  Rows rows;
  int32_t taken;          // the token that this lane weighs is inside the frame in windows before this one
  int32_t left, in_norm;  // numbers of channels from the thread's first on: of a token, and of its norm
  bool below;             // whether row 2i + 1 is inside the frame
  Vec vecs[4][HELD];

  __device__ __forceinline__ Window(const Fused<T>& p, const Rows& rows, bool below)
      : rows(rows),
        left(p.C - first_channel<T>()),
        in_norm(p.norm_channels - first_channel<T>()),
        below(below),
        vecs{} {
    const int32_t q = threadIdx.x % WARP / SHARERS;
    taken = q >= 2 && !below ? 0 : q % 2 == 1 ? p.W / 2 : p.W;
  }

  // Loads vec k of a token, of which `limit` channels are wanted from the thread's first on. A vec that is kept stays
  // as it is if it is beyond them: it is 0 throughout.
  __device__ __forceinline__ void load(Vec& vec, const T* token, int k, int32_t limit) const {
    if constexpr (KEEPS) {
      load_if<HINT>(vec, k * VEC_STEP<T> < limit, token + k * VEC_STEP<T>);
    } else {
      vec = load_vec<A, HINT>(token, k * VEC_STEP<T>, limit, rows.channel());
    }
  }

  // Loads vec k of the tokens of a window. beside: whether its second column is inside the frame.
  __device__ __forceinline__ void load(int k, bool beside) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (q % 2 == 0 || beside) {
        load(vecs[q][k % HELD], rows.at(q / 2, q % 2), k, q < 2 || below ? left : 0);
      } else {
        vecs[q][k % HELD] = Vec{};
      }
    }
  }

  // Loads vec k of the tokens of window j, the next one of a block that stops before `stop`. Windows before `whole` have
  // two columns inside the frame.
  __device__ __forceinline__ void load_next(int k, int32_t j, int32_t whole, int32_t stop) {
    if (j < whole) {
      load(k, true);
    } else if (j < stop) {
      load(k, false);
    }
  }

  // Sums this thread's part of the norms of the window's tokens.
  __device__ __forceinline__ void sum_norms(const Fused<T>& p, bool beside, float (&totals)[4]) {
    const Norm norm = PLAIN ? Norm::l2 : p.norm;
    const auto part = [&](int q, int k) {
      const Vec& vec = vecs[q][k % HELD];
      return PLAIN ? vec : first_of_vec<T>(vec, in_norm - k * VEC_STEP<T>);
    };
    Total<T> found[4];
#pragma unroll HELD
    for (int k = 0; k < VECS<T>; ++k) {
      if constexpr (!KEEPS) load(k, beside);
#pragma unroll
      for (int q = 0; q < 4; ++q) found[q].add(norm, part(q, k));
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) totals[q] = found[q].of_thread(norm);
  }

  // Finds the weights of the tokens of window j from the results of sum_norms.
  __device__ __forceinline__ void weigh_tokens(const Fused<T>& p, int32_t j, const float (&totals)[4],
                                               float (&weights)[4]) {
    const Norm norm = PLAIN ? Norm::l2 : p.norm;
    const float own = finish_norm(norm, join_lanes(Join{norm}, totals, j & 1), p.inv_count);
    spread(weigh(own, j < taken, p.temperature), weights);
    if constexpr (KEEPS) {
#pragma unroll
      for (int token = 0; token < 4; ++token) {
#pragma unroll
        for (int k = 0; k < HELD; ++k) keep_packed(vecs[token][k]);
      }
    }
  }

  // Unpacks word w of vec k of all tokens.
  __device__ __forceinline__ void unpack_word(int k, int w, float (&values)[4][PER_WORD<T>]) const {
#pragma unroll
    for (int q = 0; q < 4; ++q) unpack<T>(vecs[q][k % HELD].word[w], values[q]);
  }
};

// Sums over a window and over its cell for a vec of channels that a block does not hold. There are such channels where
// a token has more than MAX_CHANNELS, and the norm runs over the first of them alone.
template <class T>
struct Unheld {
  float pooled[PER_VEC<T>] = {};
  float columns[3][PER_VEC<T>] = {};  // sums of the columns of the cell: 2j - 1, 2j and 2j + 1

  // Adds a token of column 2j + c. If it is one of the window's (`pools`), it has this weight.
  __device__ __forceinline__ void add(const Vec& vec, int c, bool pools, float weight) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      float values[PER_WORD<T>];
      unpack<T>(vec.word[w], values);
#pragma unroll
      for (int e = 0; e < PER_WORD<T>; ++e) {
        const int n = w * PER_WORD<T> + e;
        if (pools) pooled[n] = fmaf(weight, values[e], pooled[n]);
        columns[c + 1][n] += values[e];
      }
    }
  }

  __device__ __forceinline__ Vec pack_pooled() const { return pack_vec<T>(pooled); }

  __device__ __forceinline__ Vec pack_mean(float inv_count) const {
    float mean[PER_VEC<T>];
#pragma unroll
    for (int n = 0; n < PER_VEC<T>; ++n) mean[n] = ((columns[0][n] + columns[1][n]) + columns[2][n]) * inv_count;
    return pack_vec<T>(mean);
  }
};

// The weighted sum of the tokens of a window, for the channels of a word.
template <class T>
__device__ __forceinline__ uint32_t pool_word(const float (&values)[4][PER_WORD<T>], const float (&weights)[4]) {
  float sum[PER_WORD<T>] = {};
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int e = 0; e < PER_WORD<T>; ++e) sum[e] = fmaf(weights[q], values[q][e], sum[e]);
  }
  return pack<T>(sum);
}

}  // namespace stgp::cuda
