// Windows of frames of x that have no thumbnail.

#pragma once

#include "fused.cuh"

namespace stgp::cuda {

// Pools the channels of a window that the block does not hold. BACK: the column of the window in its rows.
template <int BACK, class T, Access A, bool PLAIN, class Rows>
__device__ __forceinline__ void pool_unheld(const Fused<T>& p, const Window<T, A, PLAIN, Rows>& window, bool beside,
                                            const float (&weights)[4], T* to) {
  const int32_t held = blockDim.x * THREAD_CHANNELS;
#pragma unroll 1
  for (int32_t first = held; first < p.C; first += held) {
#pragma unroll 1
    for (int k = 0; k < VECS<T>; ++k) {
      const int32_t channel = first + k * VEC_STEP<T>;
      Unheld<T> sums;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if ((q >= 2 && !window.below) || (q % 2 == 1 && !beside)) continue;
        const T* token = window.rows.at(q / 2, q % 2 + BACK);
        sums.add(load_vec<A, CacheHint::stream>(token, channel, window.left, window.rows.channel()), 0, true,
                 weights[q]);
      }
      store_vec<A, CacheHint::stream>(to, channel, window.left, channel_stride<A>(p.out), sums.pack_pooled());
    }
  }
}

// out[t, i, j] = sum of a[r, c] * x[t, r, c] over window (i, j), where a = softmax(temperature * norm) over the window
//
// A block pools neighbouring windows of a row. A vec of the next window is loaded as soon as its registers are free.
template <class T, Access A, bool PLAIN>
__device__ __forceinline__ void pool_windows(const Fused<T>& p, int32_t block) {
  using Tokens = Window<T, A, PLAIN, FrameRows<T, A>>;
  const auto [number, i, first] = p.of_windows.place(block);
  const int32_t* entry = p.windows + number * ENTRY_WORDS;
  const int32_t target = entry[E_TARGET], stop = min(first + p.of_windows.length, p.OW);
  if (target < 0) return;

  Tokens window(p, FrameRows<T, A>(p, entry[E_NODE], i, first), 2 * i + 1 < p.H);
  const int64_t channel = channel_stride<A>(p.out);
  T* to = p.out.token(p.out.frame(target), i, first) + first_channel<T>() * channel;
  const auto inside = [&](int32_t j) { return 2 * j + 1 < p.W; };  // whether the second column is inside the frame
  const int32_t whole = min(stop, p.W / 2);  // windows before this one have two columns inside the frame
  if constexpr (Tokens::KEEPS) {
#pragma unroll
    for (int k = 0; k < VECS<T>; ++k) window.load(k, inside(first));
  }
  for (int32_t j = first; j < stop; ++j) {
    float totals[4], weights[4];
    window.sum_norms(p, inside(j), totals);
    window.weigh_tokens(p, j, totals, weights);
    if constexpr (Tokens::KEEPS) window.rows.advance();
#pragma unroll Tokens::HELD
    for (int k = 0; k < VECS<T>; ++k) {
      if constexpr (!Tokens::KEEPS) window.load(k, inside(j));
      Vec result;
#pragma unroll
      for (int w = 0; w < WORDS; ++w) {
        float values[4][PER_WORD<T>];
        window.unpack_word(k, w, values);
        result.word[w] = pool_word<T>(values, weights);
      }
      store_vec<A, CacheHint::stream>(to, k * VEC_STEP<T>, window.left, channel, result);
      if constexpr (Tokens::KEEPS) window.load_next(k, j + 1, whole, stop);
    }
    if constexpr (!PLAIN) pool_unheld<Tokens::KEEPS ? -2 : 0>(p, window, inside(j), weights, to);
    if constexpr (!Tokens::KEEPS) window.rows.advance();
    to += p.out.strides.col;
  }
}

}  // namespace stgp::cuda
