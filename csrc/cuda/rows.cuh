// Rows of nodes that are shrunk, or that are summaries: a block walks neighbouring cells of a row, from left to right.

#pragma once

#include "fused.cuh"

namespace stgp::cuda {

// A walk over cells and windows first, ..., stop - 1 of row i of an entry.
//
// thumbnail[t, i, j] = mean of x[t, r, c] over cell (i, j)
// out[t, i, j] = sum of a[r, c] * x[t, r, c] over window (i, j), where a = softmax(temperature * norm) over the window
//
// HALO: H or W is odd, so that cells have a halo.
template <class T, Access A, bool PLAIN, bool HALO, class Rows>
struct Walk {
  using Tokens = Window<T, A, PLAIN, Rows>;
  // The tokens of row 2i - 1 are loaded before the weights are known if there are registers for them.
  static constexpr bool KEEPS = Tokens::KEEPS, AHEAD = KEEPS && sizeof(T) == 2;
  static constexpr int HELD = AHEAD ? VECS<T> : 1;

  const Fused<T>& p;
  const bool below;  // whether row 2i + 1 is inside the frame
  Tokens window;
  const bool odd_W, over;            // whether cells reach into column 2j - 1, and into row 2i - 1
  Vec above[2][HALO ? HELD : 1];     // tokens of row 2i - 1
  int32_t stop = 0, live = 0;        // the cell that the walk stops before; number of live cells of the row
  int32_t whole = 0;                 // cells before this one have two columns inside the frame
  T *to = nullptr, *cell = nullptr;  // where the pooled token and the cell are stored

  __device__ __forceinline__ Walk(const Fused<T>& p, const Rows& rows, int32_t i)
      : p(p),
        below(!HALO || 2 * i + 1 < p.H),
        window(p, rows, below),
        odd_W(HALO && p.W % 2 == 1),
        over(HALO && p.H % 2 == 1 && i > 0),
        above{} {}

  // Sums of the last column of a cell, of two channels of this thread. A walk carries them to the next cell if W is
  // odd. They are in shared memory, because registers have no room for them.
  __device__ __forceinline__ float2& carried(int k, int pair) const {
    auto* of_warp = reinterpret_cast<float2*>(dynamic_shared_memory) + threadIdx.x / WARP * (WARP_CHANNELS / 2);
    return of_warp[(k * (PER_VEC<T> / 2) + pair) * WARP + threadIdx.x % WARP];
  }

  // Whether the second column of cell j is inside the frame.
  __device__ __forceinline__ bool inside(int32_t j) const { return !HALO || 2 * j + 1 < p.W; }

  // Adds vec k of a token of column 2j - 1 to sums.
  __device__ __forceinline__ void add_beside(int row, int k, float (&sums)[PER_VEC<T>]) const {
    const Vec vec =
        load_vec<A, CacheHint::keep>(window.rows.at(row, -1), k * VEC_STEP<T>, window.left, window.rows.channel());
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      float values[PER_WORD<T>];
      unpack<T>(vec.word[w], values);
#pragma unroll
      for (int e = 0; e < PER_WORD<T>; ++e) sums[w * PER_WORD<T> + e] += values[e];
    }
  }

  // Sums column 2j - 1 for the first cell of a walk, as a walk from the left would have; without one, the sums are 0.
  __device__ __forceinline__ void start(bool beside) const {
#pragma unroll
    for (int k = 0; k < VECS<T>; ++k) {
      float sums[PER_VEC<T>] = {};
      if (beside) {
        if (over) add_beside(-1, k, sums);
        add_beside(0, k, sums);
        if (below) add_beside(1, k, sums);
      }
#pragma unroll
      for (int n = 0; n < PER_VEC<T>; n += 2) carried(k, n / 2) = float2{sums[n], sums[n + 1]};
    }
  }

  // Loads vec k of the tokens of row 2i - 1 above cell j. Tokens outside the frame are 0. ahead: whether the window's
  // rows are those of the next cell already.
  __device__ __forceinline__ void load_above(int32_t j, int k, bool ahead) {
    const T *left = window.rows.at(-1, ahead ? -2 : 0), *right = window.rows.at(-1, ahead ? -1 : 1);
    Vec &of_left = above[0][k % HELD], &of_right = above[1][k % HELD];
    of_left = of_right = Vec{};  // so that no register is kept from the cell before
    window.load(of_left, left, k, over ? window.left : 0);
    window.load(of_right, right, k, over && inside(j) ? window.left : 0);
  }

  // Computes vec k of a cell, and of the pooled window if POOLS.
  template <bool POOLS>
  __device__ __forceinline__ void finish(int k, const float (&weights)[4], float inv_count, Vec& pooled, Vec& cell) {
    constexpr int PAIR_WORDS = 2 / PER_WORD<T>;
#pragma unroll
    for (int pair = 0; pair < PER_VEC<T> / 2; ++pair) {
      float2 before{}, last;
      if constexpr (HALO) before = carried(k, pair);
#pragma unroll
      for (int n = 0; n < PAIR_WORDS; ++n) {
        const int w = pair * PAIR_WORDS + n;
        float values[4][PER_WORD<T>], halo[2][PER_WORD<T>], mean[PER_WORD<T>];
        window.unpack_word(k, w, values);
        if constexpr (POOLS) pooled.word[w] = pool_word<T>(values, weights);
        if constexpr (HALO) {
          unpack<T>(above[0][k % HELD].word[w], halo[0]);
          unpack<T>(above[1][k % HELD].word[w], halo[1]);
        }
#pragma unroll
        for (int e = 0; e < PER_WORD<T>; ++e) {
          const bool second = n * PER_WORD<T> + e == 1;
          const float left = (HALO ? halo[0][e] + values[0][e] : values[0][e]) + values[2][e];
          const float right = (HALO ? halo[1][e] + values[1][e] : values[1][e]) + values[3][e];
          (second ? last.y : last.x) = right;
          // A mean of zeros is +0 whatever their signs, as in summaries.cu.
          mean[e] = fmaf((HALO ? (second ? before.y : before.x) + left : left) + right, inv_count, 0.0f);
        }
        cell.word[w] = pack<T>(mean);
      }
      if (HALO && odd_W) carried(k, pair) = last;
    }
  }

  // Computes cell j, and window j if POOLS, and moves on to the next.
  template <bool POOLS>
  __device__ __forceinline__ void step(int32_t j) {
    const bool shrinks = j < live;
    float totals[4], weights[4];
    if constexpr (POOLS) window.sum_norms(p, inside(j), totals);
    if constexpr (HALO && AHEAD) {
#pragma unroll
      for (int k = 0; k < VECS<T>; ++k) load_above(j, k, false);
    }
    if constexpr (POOLS) window.weigh_tokens(p, j, totals, weights);
    if constexpr (KEEPS) window.rows.advance();
    const float inv_count = HALO ? p.inverses[below + over][inside(j) + (odd_W && j > 0)] : 0.25f;
#pragma unroll Tokens::HELD
    for (int k = 0; k < VECS<T>; ++k) {
      if constexpr (!KEEPS) window.load(k, inside(j));
      if constexpr (HALO && !AHEAD) load_above(j, k, KEEPS);
      Vec pooled, mean;
      finish<POOLS>(k, weights, inv_count, pooled, mean);
      if constexpr (POOLS) store_vec<A, CacheHint::stream>(to, k * VEC_STEP<T>, window.left, out_channel(), pooled);
      if (shrinks) store_vec<A, CacheHint::keep>(cell, k * VEC_STEP<T>, window.left, 1, mean);
      if constexpr (KEEPS) window.load_next(k, j + 1, whole, stop);
    }
    if constexpr (!PLAIN) finish_unheld<POOLS>(j, weights, inv_count);
    if constexpr (!KEEPS) window.rows.advance();
    to += p.out.strides.col;
    if (shrinks) cell += p.C;
  }

  // Computes the channels of cell j, and of window j if POOLS, that the block does not hold.
  template <bool POOLS>
  __device__ __forceinline__ void finish_unheld(int32_t j, const float (&weights)[4], float inv_count) {
    constexpr int back = KEEPS ? -2 : 0;  // the window's rows are those of the next cell already if KEEPS
    const int32_t held = blockDim.x * THREAD_CHANNELS;
#pragma unroll 1
    for (int32_t first = held; first < p.C; first += held) {
#pragma unroll 1
      for (int k = 0; k < VECS<T>; ++k) {
        const int32_t channel = first + k * VEC_STEP<T>;
        Unheld<T> sums;
#pragma unroll
        for (int r = -1; r < 2; ++r) {
#pragma unroll
          for (int c = -1; c < 2; ++c) {
            const T* token = window.rows.at(r, c + back);
            const bool in_cell = (r == -1 ? over : r == 0 || below) && (c == -1 ? odd_W && j > 0 : c == 0 || inside(j));
            if (!in_cell) continue;
            const bool in_window = POOLS && r >= 0 && c >= 0;
            sums.add(load_vec<A, CacheHint::keep>(token, channel, window.left, window.rows.channel()), c, in_window,
                     in_window ? weights[r * 2 + c] : 0.0f);
          }
        }
        if constexpr (POOLS) {
          store_vec<A, CacheHint::stream>(to, channel, window.left, out_channel(), sums.pack_pooled());
        }
        if (j < live) store_vec<A, CacheHint::keep>(cell, channel, window.left, 1, sums.pack_mean(inv_count));
      }
    }
  }

  __device__ __forceinline__ int64_t out_channel() const { return channel_stride<A>(p.out); }
};

// Walks up to `length` cells of row i of an entry, from cell `first` on. make_rows() returns the rows of the first
// window.
template <class T, Access A, bool PLAIN, bool HALO, class MakeRows>
__device__ __forceinline__ void walk_row(const Fused<T>& p, const int32_t* entry, int32_t i, int32_t first,
                                         MakeRows make_rows) {
  const int32_t target = p.pools ? entry[E_TARGET] : -1, live = p.tables[entry[E_LIVE] + i];
  const int32_t pooled = target >= 0 && i < p.OH ? p.OW : 0;  // number of windows
  const int32_t stop = min(max(live, pooled), first + p.of_walks.length);
  wait_for_launch_before();  // its thumbnails are read from here on, and slots that it reads may be overwritten
  if (first >= stop) return;

  using Rows = std::decay_t<decltype(make_rows())>;
  Walk<T, A, PLAIN, HALO, Rows> walk(p, make_rows(), i);
  if constexpr (HALO) walk.start(walk.odd_W && first > 0 && first < live);
  walk.whole = min(stop, p.W / 2);
  walk.stop = stop;
  walk.live = live;
  if constexpr (walk.KEEPS) {
#pragma unroll
    for (int k = 0; k < VECS<T>; ++k) walk.window.load(k, walk.inside(first));
  }
  walk.to = p.out.base;
  if (pooled > 0) walk.to = p.out.token(p.out.frame(target), i, first) + first_channel<T>() * walk.out_channel();
  walk.cell = p.scratch;  // scratch is nullptr if there are no thumbnails
  if (live > 0) {
    walk.cell += ((static_cast<int64_t>(entry[E_SLOT]) * p.h + i) * p.w + first) * p.C + first_channel<T>();
  }
  for (int32_t j = first; j < stop; ++j) {
    if (j < pooled) {
      walk.template step<true>(j);
    } else {
      walk.template step<false>(j);
    }
  }
}

}  // namespace stgp::cuda
