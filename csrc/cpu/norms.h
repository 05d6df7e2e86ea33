// Norms of tokens, and the weights of windows that follow from them.
//
// Functions are in an unnamed namespace, for the reason that vector.h gives.

#pragma once

#include <math.h>

#include "../grid_pool.h"
#include "vector.h"

namespace stgp::cpu {

namespace {

// Prefetches a block of a token that is read soon, so that memory is busy while the loop computes with tokens in the
// cache. Any address may be prefetched.
template <typename T>
inline void prefetch(const T* block) {
  constexpr int LINE = 64;  // bytes of a cache line
  for (int byte = 0; byte < BLOCK * int{sizeof(T)}; byte += LINE) {
    __builtin_prefetch(reinterpret_cast<const char*>(block) + byte);
  }
}

// Sums over channels of f(|t_c|) of four tokens, in parts: one in each lane. The tokens are read side by side, so that
// the latency of one addition is hidden by those of the others, and memory delivers several streams at once. The order
// of the additions is fixed.
struct Sums4 {
  Block parts[4] = {};

  template <typename T, typename F>
  void add(const T* const* tokens, int64_t c, F f) {
    for (int k = 0; k < 4; ++k) add_block(parts[k], load(tokens[k] + c), f);
  }

  // Adds channels c, ..., C - 1, fewer than a block. The tokens have `stored` channels.
  template <typename T, typename F>
  void add_rest(const T* const* tokens, int64_t c, int64_t C, int64_t stored, F f) {
    if (c == C) return;
    for (int k = 0; k < 4; ++k) add_block(parts[k], load_first(tokens[k] + c, C - c, stored - c), f);
  }

  template <typename F>
  static void add_block(Block& sum, Block v, F f) {
    sum.a += f(v.a), sum.b += f(v.b);
  }

  void store(Floats* sums) const {
    for (int k = 0; k < 4; ++k) sums[k] = parts[k].a + parts[k].b;
  }
};

struct Square {
  Floats operator()(Floats v) const { return v * v; }
};

// Tokens that will be read later. Every fourth of these n tokens is prefetched while sums of other tokens are computed.
template <typename T>
struct Later {
  const T* const* tokens = nullptr;
  int64_t n = 0;
};

// Sets sums[k] to the sum over the first C channels of f(|t_c|) of each of n tokens, a multiple of four, in parts: one
// in each lane. The tokens have `stored` channels.
template <typename T, typename F>
inline void sum_channels(const T* const* tokens, int64_t n, int64_t C, int64_t stored, Floats* sums, Later<T> later,
                         F f) {
  for (int64_t k = 0; k < n; k += 4) {
    const bool prefetches = k < later.n;
    Sums4 four;
    int64_t c = 0;
    for (; c + BLOCK <= C; c += BLOCK) {
      if (prefetches) prefetch(later.tokens[k] + c);
      four.add(tokens + k, c, f);
    }
    four.add_rest(tokens + k, c, C, stored, f);
    four.store(sums + k);
  }
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

// Returns whether norms are sums over all channels of a token.
inline bool reads_all_channels(const Call& call) {
  return call.norm_type != HUGE_VAL && channels_of_norm(call) == call.C;
}

// Returns `count`, rounded up to whole vectors of floats.
constexpr int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// Sets sums[k] for n tokens, a multiple of four, to the sum over the channels of the norm of |t_c|^p, in parts: one in
// each lane. For p = infinity, the first lane is max_c |t_c|, the others are 0, and nothing is prefetched.
template <typename T>
void norm_sums(const T* const* tokens, int64_t n, const Call& call, Floats* sums, Later<T> later = {}) {
  const int64_t C = channels_of_norm(call);
  const double p = call.norm_type;
  if (p == HUGE_VAL) {
    for (int64_t k = 0; k < n; ++k) {
      sums[k] = Floats{};
      sums[k][0] = largest_magnitude(tokens[k], C, call.C);
    }
  } else if (p == 2) {
    sum_channels(tokens, n, C, call.C, sums, later, Square());
  } else if (p == 1) {
    sum_channels(tokens, n, C, call.C, sums, later, [](Floats v) { return absolute(v); });
  } else {
    sum_channels(tokens, n, C, call.C, sums, later,
                 [p](Floats v) __attribute__((always_inline)) { return power(absolute(v), p); });
  }
}

// norms[k] = (mean_c |t_c|^p)^(1/p) of n tokens, or the sum in place of the mean, from the sums that norm_sums sets.
// Both arrays have room for whole vectors, and the sums are overwritten. The lanes of LANES sums are added up at once,
// since those of a single vector take as long as many channels.
__attribute__((noinline)) void norms_of_sums(Floats* sums, int64_t n, const Call& call, float* norms) {
  const double p = call.norm_type;
  const float count = call.normalize_norm && p != HUGE_VAL ? static_cast<float>(channels_of_norm(call)) : 1;
  for (int64_t k = n; k < whole_vectors(n); ++k) sums[k] = Floats{};
  for (int64_t k = 0; k < n; k += LANES) {
    const Floats totals = sums_of_lanes(sums + k);
    __builtin_memcpy(norms + k, &totals, sizeof totals);
  }
  if (p == 2) {
    for (int64_t k = 0; k < whole_vectors(n); ++k) norms[k] = sqrtf(norms[k] / count);
  } else if (p != HUGE_VAL) {
    for (int64_t k = 0; k < n; ++k) {
      const float mean = norms[k] / count;
      norms[k] = p == 1 ? mean : static_cast<float>(pow(mean, 1 / p));
    }
  }
}

// Computes the norms of n tokens, at most LANES. Both arrays have room for LANES of them.
template <typename T>
void token_norms(const T** tokens, int64_t n, const Call& call, float* norms) {
  Floats sums[LANES];
  int64_t read = n;
  for (; read % 4 != 0; ++read) tokens[read] = tokens[n - 1];
  norm_sums(tokens, read, call, sums);
  norms_of_sums(sums, n, call, norms);
}

// Replaces the logits of windows, four for each of n windows, by their softmax. `logits` has room for whole vectors.
// The function is not inlined: if the product that a logit is were fused with the subtraction, the largest logit minus
// itself could differ from 0.
__attribute__((noinline)) void softmax_of_fours(float* logits, int64_t n) {
  for (int64_t k = 0; k < 4 * n; k += LANES) {
    const Floats v = load_bytes<Floats>(logits + k);
    const Floats beside = exchanged<1>(v, AllLanes{}), two = v > beside ? v : beside;
    const Floats across = exchanged<2>(two, AllLanes{}), largest = two > across ? two : across;
    const Floats power = exponential(v - largest);
    const Floats pairs = power + exchanged<1>(power, AllLanes{});
    const Floats weights = power / (pairs + exchanged<2>(pairs, AllLanes{}));
    __builtin_memcpy(logits + k, &weights, sizeof weights);
  }
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
