// The arithmetic of the CPU kernels, compiled once for every set of vector instructions (see vector.h). It is in the
// loops over channels at the top: a token's norm, a sum of tokens, and both results of a window at once. The rest says
// which tokens they take.

#include "kernels.h"

#include <math.h>

#include "../tables.h"
#include "vector.h"

namespace stgp::cpu {

namespace {

// ---- loops over channels ----

// Asks for a block of a token that is worked on soon. Norms come from memory, sums from the cache: where both ask for
// part of what comes next, memory has something to do all the time. There may be no block: asking is harmless.
template <typename T>
inline void prefetch(const T* block) {
  constexpr int LINE = 64;
  for (int byte = 0; byte < BLOCK * int{sizeof(T)}; byte += LINE) {
    __builtin_prefetch(reinterpret_cast<const char*>(block) + byte);
  }
}

// Sum over the channels of f(|t_c|). Two blocks at a time hide the latency of additions; their order is fixed. `next`
// is a token that follows.
template <typename T, typename F>
inline float reduce(const T* token, const T* next, int64_t C, F f) {
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
    const Block v = load_some(token + c, C - c);
    odd.a += f(v.a), odd.b += f(v.b);
  }
  return sum_lanes((even.a + odd.a) + (even.b + odd.b));
}

// Without their sign, floats are in the order of their bits, and NaN is above infinity: no maximum loses it.
template <typename T>
inline float largest_magnitude(const T* token, int64_t C) {
  Ints largest{};
  for (int64_t c = 0; c < C; c += BLOCK) {
    const Block v = C - c < BLOCK ? load_some(token + c, C - c) : load(token + c);
    const Ints a = bit_cast<Ints>(absolute(v.a)), b = bit_cast<Ints>(absolute(v.b));
    largest = a > largest ? a : largest;
    largest = b > largest ? b : largest;
  }
  int32_t all = 0;
  for (int i = 0; i < LANES; ++i) all = largest[i] > all ? largest[i] : all;
  return bit_cast<float>(all);
}

// `BLOCKS` blocks of sum_k weights[k] * taps[k] * scale.
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

// A step along a row of windows and cells, at a whole window: left, right, lower left, lower right. Its tokens are read
// once for both results.
template <typename T>
struct Step {
  const T* window[4];
  // POOL: pooled = sum_k weights[k] * window[k]
  float weights[4];
  T* pooled;
  bool stream;
  // SHRINK: cell = inv_count * the sum of the window, of the two tokens `above` it (or nullptr), and of the column to
  // left, which is `carried` from the step before as a sum (or nullptr). The right column is carried to the next.
  T* cell;
  float inv_count;
  const T* above[2];
  Block* carried;
  // The next window.
  const T* next[4];
};

template <bool POOL, bool SHRINK, typename T>
void take_step(const Step<T>& s, int64_t C) {
  const auto blocks = [&](int64_t c, const auto& load_at, const auto& store_at) {
    Block v[4];
    for (int k = 0; k < 4; ++k) v[k] = load_at(s.window[k] + c);
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
    blocks(c, [](const T* token) { return load(token); }, [](T* token, Block v, bool past) { store(token, v, past); });
  }
  if (c < C) {
    blocks(
        c, [=](const T* token) { return load_some(token, C - c); },
        [=](T* token, Block v, bool) { store_some(token, v, C - c); });
  }
}

// ---- tokens ----

// A frame of x, or what stands for one: tokens (row, col) of it.
template <typename T>
struct Frame {
  const T* data;
  int64_t row, col, channel;

  const T* at(int64_t r, int64_t c) const { return data + r * row + c * col; }
};

template <typename T>
Frame<T> frame_of_x(const Call& call, int64_t frame) {
  const Strides& s = call.x_strides;
  const T* data = static_cast<const T*>(call.x) + frame / call.T * s.video + frame % call.T * s.frame;
  return {data, s.row, s.col, s.channel};
}

// A node of the general form: summaries are stored in full.
template <typename T>
Frame<T> node(const int32_t* tables, const Call& call, int64_t number) {
  if (number >= 0) return frame_of_x<T>(call, number);
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH];
  return {static_cast<const T*>(call.scratch) + (-1 - number) * H * W * call.C, W * call.C, call.C, 1};
}

// The token itself where its channels are neighbours, else a copy in place `place` of the workspace.
template <typename T>
inline const T* gather(const T* token, int64_t channel_stride, int64_t C, const Workspace& w, int64_t place) {
  if (channel_stride == 1) return token;
  T* copy = reinterpret_cast<T*>(w.gathered) + place * C;
  for (int64_t c = 0; c < C; ++c) copy[c] = token[c * channel_stride];
  return copy;
}

// Where a token of out is written: in place, or first beside it where its channels are not neighbours.
template <typename T>
struct OutToken {
  T* token;
  T* buffer;
  int64_t channel_stride;

  OutToken(const Call& call, int64_t frame, int64_t row, int64_t col, const Workspace& w) {
    const Strides& s = call.out_strides;
    token = static_cast<T*>(call.out) + frame / call.T * s.video + frame % call.T * s.frame + row * s.row + col * s.col;
    channel_stride = s.channel;
    buffer = s.channel == 1 ? token : reinterpret_cast<T*>(w.gathered);
  }

  void finish(int64_t C) const {
    if (buffer == token) return;
    for (int64_t c = 0; c < C; ++c) token[c * channel_stride] = buffer[c];
  }
};

// The first token of the workspace belongs to OutToken.
constexpr int64_t FIRST_TAP = 1;

// ---- weights ----

// From the sum over the channels of |t_c|^p.
float finish_norm(float total, const Call& call) {
  const double p = call.norm_type;
  if (call.normalize_norm) total /= static_cast<float>(call.C);
  if (p == 1) return total;
  return p == 2 ? sqrtf(total) : static_cast<float>(pow(total, 1 / p));
}

// (mean_c |t_c|^p)^(1/p), or the sum in place of the mean.
template <typename T>
float token_norm(const T* token, const T* next, const Call& call) {
  const int64_t C = call.C;
  const double p = call.norm_type;
  if (p == HUGE_VAL) return largest_magnitude(token, C);
  float total;
  if (p == 2) {
    total = reduce(token, next, C, [](Floats v) { return v * v; });
  } else if (p == 1) {
    total = reduce(token, next, C, [](Floats v) { return absolute(v); });
  } else {
    total = reduce(token, next, C, [p](Floats v) { return power(absolute(v), p); });
  }
  return finish_norm(total, call);
}

// Norms become weights: softmax(temperature * norm) over n tokens and `zeros` more that have norm 0.
void softmax(float* weights, int64_t n, int64_t zeros, float temperature) {
  float largest = zeros > 0 ? 0.0f : -HUGE_VALF;
  for (int64_t k = 0; k < n; ++k) {
    weights[k] *= temperature;
    largest = weights[k] > largest ? weights[k] : largest;
  }
  float total = zeros > 0 ? static_cast<float>(zeros) * expf(0.0f - largest) : 0.0f;
  for (int64_t k = 0; k < n; ++k) total += weights[k] = expf(weights[k] - largest);
  for (int64_t k = 0; k < n; ++k) weights[k] /= total;
}

// ---- fused form ----

// The mosaic of four thumbnails, or a frame, which is a single tile then.
template <typename T>
struct Mosaic {
  const T* tiles[4];
  int64_t h, w;  // of a tile
  int64_t row, col;

  const T* at(int64_t r, int64_t c) const {
    const int64_t below = r >= h, beside = c >= w;
    return tiles[2 * below + beside] + (r - below * h) * row + (c - beside * w) * col;
  }
};

template <typename T>
void fused_rows(const int32_t* tables, const Call& call, const int32_t* entry, bool mosaic, int64_t first, int64_t last,
                bool stream, const Workspace& workspace) {
  static constexpr float ONES[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH], h = (H + 1) / 2, w = (W + 1) / 2, C = call.C;
  const int64_t OH = tables[H_OUT_ROWS], OW = tables[H_OUT_COLS];
  T* const thumbnails = static_cast<T*>(call.thumbnails != nullptr ? call.thumbnails : call.scratch);
  const auto slot = [=](int64_t number) { return number < 0 ? nullptr : thumbnails + number * h * w * C; };
  T* const thumbnail = slot(entry[E_SLOT]);
  Mosaic<T> image;
  int64_t channel = 1;
  if (mosaic) {
    for (int k = 0; k < 4; ++k) image.tiles[k] = slot(entry[E_SOURCES + k]);
    image.h = h, image.w = w, image.row = w * C, image.col = C;
  } else {
    const Frame<T> frame = frame_of_x<T>(call, entry[E_NODE]);
    image = {{frame.data}, H, W, frame.row, frame.col};
    channel = frame.channel;
  }

  const auto token = [&](int64_t r, int64_t c, int64_t place) {
    return gather(image.at(r, c), channel, C, workspace, FIRST_TAP + place);
  };
  Block* const carried = W % 2 == 1 ? static_cast<Block*>(workspace.carried) : nullptr;

  for (int64_t i = first; i < last; ++i) {
    const int64_t live = entry[E_SLOT] >= 0 ? tables[entry[E_LIVE] + i] : 0;
    const int64_t pooled = entry[E_TARGET] >= 0 && i < OH && call.grad == nullptr ? OW : 0;  // else shrunk alone
    const bool halo = H % 2 == 1 && i > 0;                                                   // a row above
    const int64_t bottom = 2 * i + 2 < H ? 2 * i + 2 : H;
    if (carried != nullptr && live > 0) __builtin_memset(carried, 0, (C + BLOCK - 1) / BLOCK * sizeof(Block));
    for (int64_t j = 0; j < (live > pooled ? live : pooled); ++j) {
      const int64_t right = 2 * j + 2 < W ? 2 * j + 2 : W;
      const T* taps[9];
      int64_t n = 0;
      for (int64_t r = 2 * i; r < bottom; ++r) {
        for (int64_t c = 2 * j; c < right; ++c, ++n) taps[n] = token(r, c, n);
      }
      const bool pool = j < pooled, shrink = j < live, whole = n == 4,
                 another = whole && channel == 1 && 2 * j + 4 <= W;
      Step<T> step;
      for (int k = 0; k < n; ++k) {
        step.window[k] = taps[k];
        step.next[k] = another ? image.at(2 * i + k / 2, 2 * j + 2 + k % 2) : taps[k];
      }
      if (pool) {
        for (int k = 0; k < n; ++k) step.weights[k] = token_norm(taps[k], k < 2 ? step.next[k] : taps[k], call);
        softmax(step.weights, n, 0, call.temperature);
      }
      const OutToken<T> target(call, pool ? entry[E_TARGET] : 0, pool ? i : 0, pool ? j : 0, workspace);
      if (whole) {
        step.pooled = target.buffer;
        step.stream = stream;
        step.inv_count = 1.0f / static_cast<float>((2 + halo) * (2 + (carried != nullptr && j > 0)));
        for (int k = 0; k < 2; ++k) {
          step.above[k] = halo && shrink ? token(2 * i - 1, 2 * j + k, 4 + k) : nullptr;
        }
        step.carried = carried;
        if (shrink) {
          step.cell = thumbnail + (i * w + j) * C;
          pool ? take_step<true, true>(step, C) : take_step<false, true>(step, C);
        } else {
          take_step<true, false>(step, C);
        }
        if (pool) target.finish(C);
        continue;
      }
      if (pool) {
        weighted_sum(taps, step.weights, n, 1.0f, C, target.buffer, stream);
        target.finish(C);
      }
      if (shrink) {  // a cell that the frame's edge cuts
        const int64_t left = carried != nullptr && j > 0 ? 2 * j - 1 : 2 * j;
        for (int64_t r = halo ? 2 * i - 1 : 2 * i; r < bottom; ++r) {
          for (int64_t c = left; c < (r < 2 * i ? right : 2 * j); ++c, ++n) taps[n] = token(r, c, n);
        }
        weighted_sum(taps, ONES, n, 1.0f / static_cast<float>(n), C, thumbnail + (i * w + j) * C, false);
      }
    }
  }
  if (stream) finish_stores();
}

// ---- general form ----

template <typename T>
void summary_rows(const int32_t* tables, const Call& call, const int32_t* level, int64_t s, int64_t first, int64_t last,
                  const Workspace& workspace) {
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH], C = call.C;
  const int64_t rows = level[L_ROWS], cols = level[L_COLS];
  const int32_t *sources = tables + level[L_SOURCES] + s * rows * cols, *row_runs = tables + level[L_ROW_RUNS],
                *col_runs = tables + level[L_COL_RUNS];
  const T** taps = reinterpret_cast<const T**>(workspace.taps);
  T* const summary = static_cast<T*>(call.scratch) + (level[L_FIRST] + s) * H * W * C;
  for (int64_t i = first; i < last; ++i) {
    for (int64_t j = 0; j < W; ++j) {
      int64_t n = 0;
      for (int64_t r = row_runs[i]; r < row_runs[i] + row_runs[H + i]; ++r) {
        for (int64_t c = col_runs[j]; c < col_runs[j] + col_runs[W + j]; ++c, ++n) {
          const Frame<T> frame = node<T>(tables, call, sources[r / H * cols + c / W]);
          taps[n] = gather(frame.at(r % H, c % W), frame.channel, C, workspace, FIRST_TAP + n);
          workspace.weights[n] = 1;
        }
      }
      const float inv_count = 1.0f / static_cast<float>(n);
      weighted_sum(taps, workspace.weights, n, inv_count, C, summary + (i * W + j) * C, false);
    }
  }
}

template <typename T>
void pooled_rows(const int32_t* tables, const Call& call, int64_t frame, int64_t first, int64_t last, bool stream,
                 const Workspace& workspace) {
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH], OH = tables[H_OUT_ROWS], OW = tables[H_OUT_COLS], C = call.C;
  const int32_t *row_runs = tables + tables[H_WINDOW_ROWS], *col_runs = tables + tables[H_WINDOW_COLS];
  const Frame<T> image = node<T>(tables, call, tables[tables[H_OUTPUTS] + frame]);
  const T** taps = reinterpret_cast<const T**>(workspace.taps);
  int64_t known = 0;  // rows from here on have places for norms that are below 0
  for (int64_t i = first; i < last; ++i) {
    const int64_t top = row_runs[i] > 0 ? row_runs[i] : 0;
    const int64_t end = row_runs[i] + row_runs[OH + i], bottom = end < H ? end : H;
    known = known > top ? known : top;
    for (; known < bottom; ++known) {
      for (int64_t c = 0; c < W; ++c) workspace.norms[known * W + c] = -1;
    }
    for (int64_t j = 0; j < OW; ++j) {
      const int64_t left = col_runs[j] > 0 ? col_runs[j] : 0;
      const int64_t stop = col_runs[j] + col_runs[OW + j], right = stop < W ? stop : W;
      int64_t n = 0;
      for (int64_t r = top; r < bottom; ++r) {
        for (int64_t c = left; c < right; ++c, ++n) {
          taps[n] = gather(image.at(r, c), image.channel, C, workspace, FIRST_TAP + n);
          float& norm = workspace.norms[r * W + c];
          if (norm < 0) norm = token_norm(taps[n], taps[n], call);
          workspace.weights[n] = norm;
        }
      }
      softmax(workspace.weights, n, int64_t{row_runs[OH + i]} * col_runs[OW + j] - n, call.temperature);
      const OutToken<T> target(call, frame, i, j, workspace);
      weighted_sum(taps, workspace.weights, n, 1.0f, C, target.buffer, stream);
      target.finish(C);
    }
  }
  if (stream) finish_stores();
}

template <typename T>
void final_rows(const int32_t* tables, const Call& call, int64_t frame, int64_t first, int64_t last, bool stream,
                const Workspace& workspace) {
  const int64_t W = tables[H_WIDTH], C = call.C;
  const Frame<T> image = node<T>(tables, call, tables[tables[H_OUTPUTS] + frame]);
  constexpr int64_t PIECE = STGP_VECTOR_BYTES / sizeof(T);
  for (int64_t i = first; i < last; ++i) {
    for (int64_t j = 0; j < W; ++j) {
      const T* token = gather(image.at(i, j), image.channel, C, workspace, FIRST_TAP);
      const OutToken<T> target(call, frame, i, j, workspace);
      int64_t c = 0;
      for (; c + PIECE <= C; c += PIECE) store_bytes(target.buffer + c, load_bytes<Words>(token + c), stream);
      __builtin_memcpy(target.buffer + c, token + c, (C - c) * sizeof(T));
      target.finish(C);
    }
  }
  if (stream) finish_stores();
}

// ---- gradients ----

// Of a pooled token with gradient g, token k of the window gets
//
//   weight * g + gamma * d norm / d token,   gamma = temperature * weight * (g . token - sum of weights * (g . tokens))

struct Sums {
  double norm;  // of the token
  double dot;   // grad . token
};

// Large logits magnify what norms lose, and differences of dots what these lose: lanes are joined in float64, and
// before they have added many channels.
inline double sum_lanes_wide(Block v) {
  double sum = 0;
  for (int i = 0; i < LANES; ++i) sum += v.a[i];
  for (int i = 0; i < LANES; ++i) sum += v.b[i];
  return sum;
}

// The sums over channels of f(|t_c|), which is not a norm yet, and of g_c * t_c.
template <typename T, typename F>
inline Sums reduce_both(const T* token, const T* grad, const T* next, int64_t C, F f) {
  constexpr int64_t STRETCH = 16 * BLOCK;
  Sums sums{};
  for (int64_t first = 0; first < C; first += STRETCH) {
    const int64_t stop = first + STRETCH < C ? first + STRETCH : C;
    Block norm{}, dot{};
    int64_t c = first;
    for (; c + BLOCK <= stop; c += BLOCK) {
      prefetch(next + c);
      const Block v = load(token + c), g = load(grad + c);
      norm.a += f(v.a), norm.b += f(v.b);
      dot.a += g.a * v.a, dot.b += g.b * v.b;
    }
    if (c < stop) {
      const Block v = load_some(token + c, stop - c), g = load_some(grad + c, stop - c);
      norm.a += f(v.a), norm.b += f(v.b);
      dot.a += g.a * v.a, dot.b += g.b * v.b;
    }
    sums.norm += sum_lanes_wide(norm), sums.dot += sum_lanes_wide(dot);
  }
  return sums;
}

template <typename T>
Sums norm_and_dot(const T* token, const T* grad, const T* next, const Call& call) {
  const int64_t C = call.C;
  const double p = call.norm_type;
  Sums sums;
  if (p == HUGE_VAL) {
    sums = reduce_both(token, grad, next, C, [](Floats v) { return v; });
    return {largest_magnitude(token, C), sums.dot};
  }
  if (p == 2) {
    sums = reduce_both(token, grad, next, C, [](Floats v) { return v * v; });
  } else if (p == 1) {
    sums = reduce_both(token, grad, next, C, [](Floats v) { return absolute(v); });
  } else {
    sums = reduce_both(token, grad, next, C, [p](Floats v) { return power(absolute(v), p); });
  }
  const double mean = call.normalize_norm ? sums.norm / static_cast<double>(C) : sums.norm;
  return {p == 1 ? mean : p == 2 ? sqrt(mean) : pow(mean, 1 / p), sums.dot};
}

// A product that is rounded by itself: fused with a subtraction, the largest logit less itself would not be 0.
__attribute__((noinline)) double logit(double temperature, double norm) { return temperature * norm; }

inline Floats sign(Floats v) {
  const Floats zero{};
  return v > zero ? zero + 1 : (v < zero ? zero - 1 : zero);
}

template <typename T>
float count_largest(const T* token, float largest, int64_t C) {
  Floats count{};
  for (int64_t c = 0; c < C; c += BLOCK) {
    const Block v = C - c < BLOCK ? load_some(token + c, C - c) : load(token + c);
    const Floats zero{}, one = zero + 1;
    count += (absolute(v.a) == largest ? one : zero) + (absolute(v.b) == largest ? one : zero);
  }
  return sum_lanes(count);
}

// gamma * d norm / d token, as `factor` times a function of the token's channels. Nothing at a token of norm 0.
struct Slope {
  enum Kind { NONE, L1, L2, MAX, POWER } kind = NONE;
  float factor = 0;
  float norm = 1;
  double exponent = 1;

  template <typename T>
  static Slope of(float gamma, const T* token, float norm, const Call& call) {
    if (norm == 0) return {};
    const double p = call.norm_type;
    const float mean = call.normalize_norm ? gamma / static_cast<float>(call.C) : gamma;
    if (p == 2) return {L2, mean / norm, norm, 1};
    if (p == 1) return {L1, mean, norm, 1};
    if (p == HUGE_VAL) return {MAX, gamma / count_largest(token, norm, call.C), norm, 1};
    return {POWER, mean, norm, p - 1};
  }
};

// to = weight * grad + slope + the sums in `more`, of which some may be nullptr. `to` is a token or whole blocks;
// without `grad`, it is the sums alone.
template <Slope::Kind KIND, bool GRAD, typename To, typename T>
void write_gradient(To* to, const T* grad, float weight, const T* token, const Slope& slope, const Block* const* more,
                    int64_t C, bool stream) {
  const auto function = [&](Floats v) {
    if constexpr (KIND == Slope::L2) return v;
    if constexpr (KIND == Slope::L1) return sign(v);
    if constexpr (KIND == Slope::MAX) return absolute(v) == slope.norm ? sign(v) : Floats{};
    if constexpr (KIND == Slope::POWER) return sign(v) * power(absolute(v) / slope.norm, slope.exponent);
    return Floats{};
  };
  for (int64_t c = 0; c < C; c += BLOCK) {
    const bool whole = c + BLOCK <= C;
    Block sum{};
    if constexpr (GRAD) {
      const Block g = whole ? load(grad + c) : load_some(grad + c, C - c);
      sum.a = weight * g.a, sum.b = weight * g.b;
    }
    if constexpr (KIND != Slope::NONE) {
      const Block v = whole ? load(token + c) : load_some(token + c, C - c);
      sum.a += slope.factor * function(v.a), sum.b += slope.factor * function(v.b);
    }
    for (int m = 0; m < 2; ++m) {
      if (more[m] != nullptr) sum.a += more[m][c / BLOCK].a, sum.b += more[m][c / BLOCK].b;
    }
    if constexpr (__is_same(To, Block)) {
      to[c / BLOCK] = sum;
    } else if (whole) {
      store(to + c, sum, stream);
    } else {
      store_some(to + c, sum, C - c);
    }
  }
}

template <typename To, typename T>
void write_gradient(To* to, const T* grad, float weight, const T* token, const Slope& slope, const Block* const* more,
                    int64_t C, bool stream) {
  if (grad == nullptr) return write_gradient<Slope::NONE, false>(to, grad, weight, token, slope, more, C, stream);
  switch (slope.kind) {
    case Slope::NONE:
      return write_gradient<Slope::NONE, true>(to, grad, weight, token, slope, more, C, stream);
    case Slope::L1:
      return write_gradient<Slope::L1, true>(to, grad, weight, token, slope, more, C, stream);
    case Slope::L2:
      return write_gradient<Slope::L2, true>(to, grad, weight, token, slope, more, C, stream);
    case Slope::MAX:
      return write_gradient<Slope::MAX, true>(to, grad, weight, token, slope, more, C, stream);
    case Slope::POWER:
      return write_gradient<Slope::POWER, true>(to, grad, weight, token, slope, more, C, stream);
  }
}

// Where a frame's gradient of x is written, and what comes into it.
template <typename T>
T* gradient_of_x(const Call& call, int64_t frame, int64_t row, int64_t col) {
  const Strides& s = call.out_strides;
  return static_cast<T*>(call.out) + frame / call.T * s.video + frame % call.T * s.frame + row * s.row + col * s.col;
}

template <typename T>
Frame<T> frame_of_grad(const Call& call, int64_t frame) {
  const Strides& s = call.grad_strides;
  const T* data = static_cast<const T*>(call.grad) + frame / call.T * s.video + frame % call.T * s.frame;
  return {data, s.row, s.col, s.channel};
}

struct Consumers {
  const int32_t *first, *last;

  Consumers(const int32_t* tables, int64_t node) {
    const int64_t number = node >= 0 ? node : tables[H_FRAMES] + (-1 - node);
    const int32_t* starts = tables + tables[tables[H_GRADIENT] + G_CONSUMERS];
    first = tables + starts[number], last = tables + starts[number + 1];
  }
};

// Gradients of summaries, token by token in whole blocks.
struct SummaryGradients {
  Block* data;
  int64_t H, W, blocks;

  SummaryGradients(const int32_t* tables, const Call& call, const Gradients& gradients)
      : data(static_cast<Block*>(gradients.summaries)),
        H(tables[H_HEIGHT]),
        W(tables[H_WIDTH]),
        blocks((call.C + WIDEST_BLOCK - 1) / WIDEST_BLOCK * (WIDEST_BLOCK / BLOCK)) {}

  Block* at(int64_t s, int64_t r, int64_t c) const { return data + ((s * H + r) * W + c) * blocks; }
};

inline void add_scaled(Block* sum, const Block* values, float scale, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) sum[b].a += scale * values[b].a, sum[b].b += scale * values[b].b;
}

// What comes to tokens through the cells of a column of thumbnails: to those of the upper row of windows, `upper`, and
// of the lower one, `lower`, which a second row of cells covers too where H is odd.
struct Column {
  Block *upper, *lower;
};

void fill_column(const Column& column, const SummaryGradients& g, const Consumers& consumers, int64_t i, int64_t j) {
  const int64_t h = (g.H + 1) / 2, w = (g.W + 1) / 2;
  const auto tokens = [](int64_t cell, int64_t size) {  // rows or columns of a cell
    return (size % 2 == 1 && cell > 0) + (2 * cell + 2 <= size ? 2 : 1);
  };
  __builtin_memset(column.upper, 0, g.blocks * sizeof(Block));
  for (int64_t row = i; row < i + 1 + g.H % 2 && row < h; ++row) {
    const float inv_count = 1.0f / static_cast<float>(tokens(row, g.H) * tokens(j, g.W));
    Block* const sum = row == i ? column.upper : column.lower;
    for (const int32_t* consumer = consumers.first; consumer < consumers.last; consumer += CONSUMER_WORDS) {
      const int64_t r = consumer[C_TILE] / 2 * h + row, c = consumer[C_TILE] % 2 * w + j;
      if (r < g.H && c < g.W) add_scaled(sum, g.at(consumer[C_SUMMARY], r, c), inv_count, g.blocks);
    }
    if (row == i) __builtin_memcpy(column.lower, column.upper, g.blocks * sizeof(Block));
  }
}

template <typename T>
void fused_gradient_rows(const int32_t* tables, const Call& call, const int32_t* entry, bool mosaic, int64_t first,
                         int64_t last, bool stream, const Gradients& gradients, const Workspace& workspace) {
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH], h = (H + 1) / 2, w = (W + 1) / 2, C = call.C;
  const int64_t OH = tables[H_OUT_ROWS], OW = tables[H_OUT_COLS], target = entry[E_TARGET];
  const SummaryGradients summaries(tables, call, gradients);
  const Consumers consumers(tables, entry[E_NODE]);
  const bool is_read = consumers.first < consumers.last;
  const T* const thumbnails = static_cast<const T*>(call.scratch);
  Mosaic<T> image;
  int64_t channel = 1;
  if (mosaic) {
    for (int k = 0; k < 4; ++k) {
      const int64_t slot = entry[E_SOURCES + k];
      image.tiles[k] = slot < 0 ? nullptr : thumbnails + slot * h * w * C;
    }
    image.h = h, image.w = w, image.row = w * C, image.col = C;
  } else {
    const Frame<T> frame = frame_of_x<T>(call, entry[E_NODE]);
    image = {{frame.data}, H, W, frame.row, frame.col};
    channel = frame.channel;
  }
  Block* const columns = static_cast<Block*>(workspace.carried);
  Column here{columns, columns + summaries.blocks};
  Column beside{columns + 2 * summaries.blocks, columns + 3 * summaries.blocks};

  for (int64_t i = first; i < last; ++i) {
    const int64_t bottom = 2 * i + 2 < H ? 2 * i + 2 : H;
    if (is_read) fill_column(here, summaries, consumers, i, 0);
    for (int64_t j = 0; j < w; ++j) {
      const int64_t right = 2 * j + 2 < W ? 2 * j + 2 : W;
      const bool overlaps = W % 2 == 1 && j + 1 < w;  // with the cell to the right
      if (is_read && j + 1 < w) fill_column(beside, summaries, consumers, i, j + 1);
      const bool pooled = target >= 0 && i < OH && j < OW;
      const T *taps[4] = {}, *grad = nullptr;
      double norms[4], dots[4], weights[4], largest = -HUGE_VAL, total = 0, mean = 0;
      int64_t n = 0;
      if (pooled) {
        const Frame<T> of_result = frame_of_grad<T>(call, target);
        grad = gather(of_result.at(i, j), of_result.channel, C, workspace, FIRST_TAP + 4);
        for (int64_t r = 2 * i; r < bottom; ++r) {
          for (int64_t c = 2 * j; c < right; ++c, ++n) {
            taps[n] = gather(image.at(r, c), channel, C, workspace, FIRST_TAP + n);
            const bool another = channel == 1 && 2 * j + 4 <= W && j + 1 < OW;
            const Sums sums = norm_and_dot(taps[n], grad, another ? image.at(r, c + 2) : taps[n], call);
            norms[n] = sums.norm, dots[n] = sums.dot;
            weights[n] = call.temperature * norms[n];
            largest = weights[n] > largest ? weights[n] : largest;
          }
        }
        for (int64_t k = 0; k < n; ++k) total += weights[k] = exp(weights[k] - largest);
        for (int64_t k = 0; k < n; ++k) weights[k] /= total, mean += weights[k] * dots[k];
      }
      n = 0;
      for (int64_t r = 2 * i; r < bottom; ++r) {
        for (int64_t c = 2 * j; c < right; ++c, ++n) {
          const bool lower = r > 2 * i;
          const Block* const more[2] = {
              is_read ? (lower ? here.lower : here.upper) : nullptr,
              is_read && overlaps && c > 2 * j ? (lower ? beside.lower : beside.upper) : nullptr,
          };
          Slope slope;
          float weight = 0;
          if (pooled) {
            weight = static_cast<float>(weights[n]);
            const double gamma = call.temperature * weights[n] * (dots[n] - mean);
            slope = Slope::of(static_cast<float>(gamma), taps[n], static_cast<float>(norms[n]), call);
          }
          if (mosaic) {
            write_gradient(summaries.at(-1 - entry[E_NODE], r, c), grad, weight, taps[n], slope, more, C, false);
          } else {
            T* const to = gradient_of_x<T>(call, entry[E_NODE], r, c);
            write_gradient(to, grad, weight, taps[n], slope, more, C, stream);
          }
        }
      }
      const Column done = here;
      here = beside, beside = done;
    }
  }
  if (stream) finish_stores();
}

template <typename T>
void window_rows(const int32_t* tables, const Call& call, int64_t frame, int64_t first, int64_t last,
                 const Gradients& gradients, const Workspace& workspace) {
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH], OH = tables[H_OUT_ROWS], OW = tables[H_OUT_COLS], C = call.C;
  const int32_t *row_runs = tables + tables[H_WINDOW_ROWS], *col_runs = tables + tables[H_WINDOW_COLS];
  const Frame<T> image = node<T>(tables, call, tables[tables[H_OUTPUTS] + frame]),
                 of_result = frame_of_grad<T>(call, frame);
  const auto within = [](int64_t position, int64_t size) {
    return position < 0 ? 0 : position < size ? position : size;
  };
  for (int64_t i = first; i < last; ++i) {
    const int64_t top = within(row_runs[i], H), bottom = within(row_runs[i] + row_runs[OH + i], H);
    for (int64_t j = 0; j < OW; ++j) {
      const int64_t left = within(col_runs[j], W), right = within(col_runs[j] + col_runs[OW + j], W);
      const T* grad = gather(of_result.at(i, j), of_result.channel, C, workspace, 0);
      int64_t n = 0;
      double *const logits = workspace.logits, *const dots = workspace.dots;
      for (int64_t r = top; r < bottom; ++r) {
        for (int64_t c = left; c < right; ++c, ++n) {
          const T* token = gather(image.at(r, c), image.channel, C, workspace, FIRST_TAP);
          const Sums sums = norm_and_dot(token, grad, token, call);
          logits[n] = logit(call.temperature, sums.norm);
          dots[n] = sums.dot;
        }
      }
      const int64_t zeros = int64_t{row_runs[OH + i]} * col_runs[OW + j] - n;
      double largest = zeros > 0 ? 0.0 : -HUGE_VAL;
      for (int64_t k = 0; k < n; ++k) largest = logits[k] > largest ? logits[k] : largest;
      double total = zeros > 0 ? static_cast<double>(zeros) * exp(0.0 - largest) : 0.0, mean = 0;
      for (int64_t k = 0; k < n; ++k) {
        const double power = exp(logits[k] - largest);
        total += power, mean += power * dots[k];
      }
      double* const window = gradients.windows + ((frame * OH + i) * OW + j) * 3;
      window[0] = largest, window[1] = total, window[2] = mean / total;
    }
  }
}

template <typename T>
void gradient_rows(const int32_t* tables, const Call& call, bool windows, int64_t number, int64_t first, int64_t last,
                   bool stream, const Gradients& gradients, const Workspace& workspace) {
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH], OH = tables[H_OUT_ROWS], OW = tables[H_OUT_COLS], C = call.C;
  const int32_t *section = tables + tables[H_GRADIENT], *final = tables + tables[H_OUTPUTS];
  const int32_t *row_inverse = tables + section[G_WINDOW_ROWS], *col_inverse = tables + section[G_WINDOW_COLS];
  const SummaryGradients summaries(tables, call, gradients);
  const Consumers consumers(tables, number);
  int64_t target = number;  // the frame that ends with this node, or -1
  if (number < 0) {
    for (target = tables[H_FRAMES] - 1; target >= 0 && final[target] != number;) --target;
  } else if (final[number] != number) {
    target = -1;
  }
  // `windows` of temporal_grid would be of one token each, with weight 1
  const Frame<T> of_result = frame_of_grad<T>(call, target < 0 ? 0 : target);
  Block* const sum = static_cast<Block*>(workspace.carried);

  for (int64_t r = first; r < last; ++r) {
    for (int64_t c = 0; c < W; ++c) {
      __builtin_memset(sum, 0, summaries.blocks * sizeof(Block));
      for (const int32_t* consumer = consumers.first; consumer < consumers.last; consumer += CONSUMER_WORDS) {
        const int32_t *level = tables + tables[H_LEVELS] + consumer[C_LEVEL] * LEVEL_WORDS,
                      *inverse = section + G_LEVELS + 2 * consumer[C_LEVEL];
        const int64_t rows = level[L_ROWS], cols = level[L_COLS];
        const int64_t row = consumer[C_TILE] / cols * H + r, col = consumer[C_TILE] % cols * W + c;
        const int32_t *by_row = tables + inverse[0], *by_col = tables + inverse[1];
        const int32_t *heights = tables + level[L_ROW_RUNS] + H, *widths = tables + level[L_COL_RUNS] + W;
        for (int64_t i = by_row[row]; i < by_row[row] + by_row[rows * H + row]; ++i) {
          for (int64_t j = by_col[col]; j < by_col[col] + by_col[cols * W + col]; ++j) {
            const float inv_count = 1.0f / (static_cast<float>(heights[i]) * static_cast<float>(widths[j]));
            add_scaled(sum, summaries.at(consumer[C_SUMMARY], i, j), inv_count, summaries.blocks);
          }
        }
      }

      const T *token = nullptr, *grad = nullptr;
      float weight = 0;
      double gamma = 0, norm = 0;
      if (target >= 0 && !windows) {
        grad = gather(of_result.at(r, c), of_result.channel, C, workspace, 0);
        weight = 1;
      } else if (target >= 0) {
        const int64_t rows = row_inverse[H + r], cols = col_inverse[W + c];
        if (rows > 0 && cols > 0) {
          const Frame<T> image = node<T>(tables, call, number);
          token = gather(image.at(r, c), image.channel, C, workspace, FIRST_TAP);
        }
        for (int64_t w = 0; w < rows * cols; ++w) {
          const int64_t i = row_inverse[r] + w / cols, j = col_inverse[c] + w % cols;
          if (w > 0) {  // the one before
            const Block* const more[2] = {sum, nullptr};
            write_gradient(sum, grad, weight, token, Slope{}, more, C, false);
          }
          grad = gather(of_result.at(i, j), of_result.channel, C, workspace, 0);
          const Sums sums = norm_and_dot(token, grad, token, call);
          norm = sums.norm;
          const double* window = gradients.windows + ((target * OH + i) * OW + j) * 3;
          const double share = exp(logit(call.temperature, norm) - window[0]) / window[1];
          weight = static_cast<float>(share);
          gamma += call.temperature * share * (sums.dot - window[2]);
        }
      }
      const Slope slope =
          token == nullptr ? Slope{} : Slope::of(static_cast<float>(gamma), token, static_cast<float>(norm), call);
      const Block* const more[2] = {sum, nullptr};
      if (number < 0) {
        write_gradient(summaries.at(-1 - number, r, c), grad, weight, token, slope, more, C, false);
      } else {
        write_gradient(gradient_of_x<T>(call, number, r, c), grad, weight, token, slope, more, C, stream);
      }
    }
  }
  if (stream) finish_stores();
}

template <typename T>
void norm_rows(const Call& call, int64_t W, int64_t frame, int64_t first, int64_t last, const Workspace& workspace) {
  const Frame<T> image = frame_of_x<T>(call, frame);
  const Strides& s = call.out_strides;
  float* const norms = static_cast<float*>(call.out) + frame / call.T * s.video + frame % call.T * s.frame;
  for (int64_t i = first; i < last; ++i) {
    for (int64_t j = 0; j < W; ++j) {
      const T* token = gather(image.at(i, j), image.channel, call.C, workspace, FIRST_TAP);
      norms[i * s.row + j * s.col] = token_norm(token, token, call);
    }
  }
}

template <typename T>
constexpr Kernels KERNELS = {
    STGP_CAPABILITY,        fused_rows<T>,  summary_rows<T>,  pooled_rows<T>, final_rows<T>,
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
