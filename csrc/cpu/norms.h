// Norms of tokens, and the weights of windows that follow from them.
//
// Functions are in an unnamed namespace, for the reason that vector.h gives.

#pragma once

#include <math.h>

#include "../grid_pool.h"
#include "vector.h"

namespace stgp::cpu {

namespace {

// Prefetches a block of a token that is read soon. Norms wait for memory, while sums read tokens from the cache: loops
// of both kinds prefetch a part of the next window, so that memory is always busy. Any address may be prefetched.
template <typename T>
inline void prefetch(const T* block) {
  constexpr int LINE = 64;  // bytes of a cache line
  for (int byte = 0; byte < BLOCK * int{sizeof(T)}; byte += LINE) {
    __builtin_prefetch(reinterpret_cast<const char*>(block) + byte);
  }
}

// Sum over the first C channels of f(|t_c|). The token has `stored` channels. Two independent blocks of sums hide the
// latency of additions. The order of the additions is fixed. `next` is the token to prefetch.
template <typename T, typename F>
inline float reduce(const T* token, const T* next, int64_t C, int64_t stored, F f) {
  Block even{}, odd{};
  int64_t c = 0;
  for (; c + 2 * BLOCK <= C; c += 2 * BLOCK) {
    prefetch(next + c), prefetch(next + c + BLOCK);
    const Block v = load(token + c), w = load(token + c + BLOCK);
    even.a += f(v.a), even.b += f(v.b), odd.a += f(w.a), odd.b += f(w.b);
  }
  if (c + BLOCK <= C) {
    const Block v = load(token + c);
    even.a += f(v.a), even.b += f(v.b);
    c += BLOCK;
  }
  if (c < C) {
    const Block v = load_first(token + c, C - c, stored - c);
    odd.a += f(v.a), odd.b += f(v.b);
  }
  return sum_lanes((even.a + odd.a) + (even.b + odd.b));
}

// max_c |t_c| of the first C channels, or NaN if one of them is NaN. The token has `stored` channels. Magnitudes are
// compared as integers, in which NaN is above infinity: a maximum of floats could lose it.
template <typename T>
inline float largest_magnitude(const T* token, int64_t C, int64_t stored) {
  Ints largest{};
  for (int64_t c = 0; c < C; c += BLOCK) {
    const Block v = C - c < BLOCK ? load_first(token + c, C - c, stored - c) : load(token + c);
    const Ints a = bit_cast<Ints>(absolute(v.a)), b = bit_cast<Ints>(absolute(v.b));
    largest = a > largest ? a : largest;
    largest = b > largest ? b : largest;
  }
  int32_t all = 0;
  for (int i = 0; i < LANES; ++i) all = largest[i] > all ? largest[i] : all;
  return bit_cast<float>(all);
}

// The number of channels that the norm runs over.
inline int64_t channels_of_norm(const Call& call) { return call.norm_channels > 0 ? call.norm_channels : call.C; }

// (mean_c |t_c|^p)^(1/p), or the sum in place of the mean. `next` is the token to prefetch.
template <typename T>
float token_norm(const T* token, const T* next, const Call& call) {
  const int64_t C = channels_of_norm(call);
  const double p = call.norm_type;
  if (p == HUGE_VAL) return largest_magnitude(token, C, call.C);
  float total;
  if (p == 2) {
    total = reduce(token, next, C, call.C, [](Floats v) { return v * v; });
  } else if (p == 1) {
    total = reduce(token, next, C, call.C, [](Floats v) { return absolute(v); });
  } else {
    total =
        reduce(token, next, C, call.C, [p](Floats v) __attribute__((always_inline)) { return power(absolute(v), p); });
  }
  if (call.normalize_norm) total /= static_cast<float>(C);
  if (p == 1) return total;
  return p == 2 ? sqrtf(total) : static_cast<float>(pow(total, 1 / p));
}

inline float exponential(float v) { return expf(v); }
inline double exponential(double v) { return exp(v); }

// The largest logit of a window, and the sum of exp(logit - largest).
template <typename Real>
struct SoftmaxSums {
  Real largest, total;
};

// Replaces n logits by exp(logit - largest), and calls visit(k) after each. The sums also include `zeros` logits of 0,
// which padding has.
template <typename Real, typename F>
inline SoftmaxSums<Real> exponentiate(Real* logits, int64_t n, int64_t zeros, const F& visit) {
  Real largest = zeros > 0 ? Real{0} : static_cast<Real>(-HUGE_VAL);
  for (int64_t k = 0; k < n; ++k) largest = logits[k] > largest ? logits[k] : largest;
  Real total = zeros > 0 ? static_cast<Real>(zeros) * exponential(Real{0} - largest) : Real{0};
  for (int64_t k = 0; k < n; ++k) {
    total += logits[k] = exponential(logits[k] - largest);
    visit(k);
  }
  return {largest, total};
}

template <typename Real>
inline SoftmaxSums<Real> exponentiate(Real* logits, int64_t n, int64_t zeros) {
  return exponentiate(logits, n, zeros, [](int64_t) {});
}

// Replaces n logits by their softmax, which also includes `zeros` logits of 0.
void softmax(float* logits, int64_t n, int64_t zeros) {
  const float total = exponentiate(logits, n, zeros).total;
  for (int64_t k = 0; k < n; ++k) logits[k] /= total;
}

}  // namespace

}  // namespace stgp::cpu
