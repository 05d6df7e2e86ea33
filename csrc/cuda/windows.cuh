// Windows of frames of x that have no thumbnail.

#pragma once

#include "fused.cuh"

namespace stgp::cuda {

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
      if constexpr (Tokens::KEEPS) {
        if (j + 1 < whole) {
          window.load(k, true);
        } else if (j + 1 < stop) {
          window.load(k, false);
        }
      }
    }
    if constexpr (!Tokens::KEEPS) window.rows.advance();
    to += p.out.strides.col;
  }
}

}  // namespace stgp::cuda
