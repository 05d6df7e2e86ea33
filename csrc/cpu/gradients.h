// Gradients in x. For a pooled token with gradient g, token t_k of its window gets
//
//   weights[k] * g + gamma * d norm / d t_k
//
//   gamma = temperature * weights[k] * (g . t_k - mean),   mean = sum_k weights[k] * (g . t_k)
//
// kernels.cpp includes this file. Functions are in an unnamed namespace, for the reason that vector.h gives.

#pragma once

#include <math.h>

#include "../tables.h"
#include "kernels.h"
#include "norms.h"
#include "tokens.h"
#include "vector.h"

namespace stgp::cpu {

namespace {

// ---- loops over channels ----

struct Sums {
  double norm;  // of a token
  double dot;   // grad . token
};

// Sum of the lanes in float64. A high temperature magnifies rounding errors of norms, and differences between dots are
// small beside them, so float32 only adds up short stretches of channels.
inline double sum_lanes_wide(Block v) {
  double sum = 0;
  for (int i = 0; i < LANES; ++i) sum += v.a[i];
  for (int i = 0; i < LANES; ++i) sum += v.b[i];
  return sum;
}

// The sums over the channels of f(|t_c|), as `norm`, and of g_c * t_c.
template <typename T, typename F>
inline Sums reduce_both(const T* token, const T* grad, const T* next, int64_t C, F f) {
  constexpr int64_t STRETCH = 16 * BLOCK;  // number of channels that are added up in float32
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

// The norm of a token, as token_norm has it, and grad . token. `next` is the token to prefetch.
template <typename T>
Sums norm_and_dot(const T* token, const T* grad, const T* next, const Call& call) {
  const int64_t C = channels_of_norm(call);
  const double p = call.norm_type;
  Sums sums;
  double others = 0;  // grad . token of the channels that the norm does not run over
  if (C < call.C) others = reduce_both(token + C, grad + C, next + C, call.C - C, [](Floats v) { return v; }).dot;
  if (p == HUGE_VAL) {
    sums = reduce_both(token, grad, next, C, [](Floats v) { return v; });
    return {largest_magnitude(token, C, call.C), sums.dot + others};
  }
  if (p == 2) {
    sums = reduce_both(token, grad, next, C, [](Floats v) { return v * v; });
  } else if (p == 1) {
    sums = reduce_both(token, grad, next, C, [](Floats v) { return absolute(v); });
  } else {
    sums = reduce_both(token, grad, next, C, [p](Floats v) { return power(absolute(v), p); });
  }
  const double mean = call.normalize_norm ? sums.norm / static_cast<double>(C) : sums.norm;
  return {p == 1 ? mean : p == 2 ? sqrt(mean) : pow(mean, 1 / p), sums.dot + others};
}

// The product is rounded before it is used. If it were fused with a subtraction, logit - largest could differ from 0
// for the largest logit.
__attribute__((noinline)) double logit(double temperature, double norm) { return temperature * norm; }

inline Floats sign(Floats v) {
  const Floats zero{};
  return v > zero ? zero + 1 : (v < zero ? zero - 1 : zero);
}

// The number of channels of magnitude `largest`.
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

// gamma * d norm / d token: in the first `channels` channels, `factor` times a function of a channel's value, which is
// 0 for the value 0; in the others 0. Kind NONE is 0 everywhere; a token of norm 0 has it.
struct Slope {
  enum Kind { NONE, L1, L2, MAX, POWER } kind = NONE;
  float factor = 0;
  float norm = 1;
  double exponent = 1;
  int64_t channels = 0;  // number of channels that the norm runs over

  template <typename T>
  static Slope of(float gamma, const T* token, float norm, const Call& call) {
    if (norm == 0) return {};
    const double p = call.norm_type;
    const int64_t C = channels_of_norm(call);
    const float mean = call.normalize_norm ? gamma / static_cast<float>(C) : gamma;
    if (p == 2) return {L2, mean / norm, norm, 1, C};
    if (p == 1) return {L1, mean, norm, 1, C};
    if (p == HUGE_VAL) return {MAX, gamma / count_largest(token, norm, C), norm, 1, C};
    return {POWER, mean, norm, p - 1, C};
  }
};

// The gradient of a token: weight * grad + slope + the sums in `more`.
template <typename T>
struct TokenGradient {
  const T* grad = nullptr;  // nullptr: the gradient is the sums alone
  float weight = 0;
  const T* token = nullptr;  // nullptr if the slope is of kind NONE
  Slope slope{};
  const Block* more[2] = {};  // sums in whole blocks, or nullptr
};

// Writes a gradient to a token of type T, or to whole blocks.
template <Slope::Kind KIND, bool GRAD, typename To, typename T>
void write_gradient(To* to, const TokenGradient<T>& gradient, int64_t C, bool stream) {
  const T *grad = gradient.grad, *token = gradient.token;
  const Slope& slope = gradient.slope;
  const float weight = gradient.weight;
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
    if (KIND != Slope::NONE && c < slope.channels) {
      const int64_t rest = slope.channels - c;
      const Block v = rest >= BLOCK ? load(token + c) : load_some(token + c, rest);
      if (rest >= BLOCK || slope.channels == C) {
        sum.a += slope.factor * function(v.a), sum.b += slope.factor * function(v.b);
      } else {  // the factor may be NaN
        const Block share = keep_some<T>({slope.factor * function(v.a), slope.factor * function(v.b)}, rest);
        sum.a += share.a, sum.b += share.b;
      }
    }
    for (int m = 0; m < 2; ++m) {
      if (gradient.more[m] != nullptr) sum.a += gradient.more[m][c / BLOCK].a, sum.b += gradient.more[m][c / BLOCK].b;
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
void write_gradient(To* to, const TokenGradient<T>& gradient, int64_t C, bool stream) {
  if (gradient.grad == nullptr) return write_gradient<Slope::NONE, false>(to, gradient, C, stream);
  switch (gradient.slope.kind) {
    case Slope::NONE:
      return write_gradient<Slope::NONE, true>(to, gradient, C, stream);
    case Slope::L1:
      return write_gradient<Slope::L1, true>(to, gradient, C, stream);
    case Slope::L2:
      return write_gradient<Slope::L2, true>(to, gradient, C, stream);
    case Slope::MAX:
      return write_gradient<Slope::MAX, true>(to, gradient, C, stream);
    case Slope::POWER:
      return write_gradient<Slope::POWER, true>(to, gradient, C, stream);
  }
}

// sum += scale * values
inline void add_scaled(Block* sum, const Block* values, float scale, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) sum[b].a += scale * values[b].a, sum[b].b += scale * values[b].b;
}

// ---- gradients of tokens ----

// The gradient of the result, of one output frame.
template <typename T>
Frame<T> frame_of_grad(const Call& call, int64_t frame) {
  const Strides& s = call.grad_strides;
  return {static_cast<const T*>(call.grad) + frame_offset(call, s, frame), s.row, s.col, s.channel};
}

// The gradients of summaries, token by token in whole blocks.
struct SummaryGradients {
  Block* data;
  int64_t H, W, blocks;

  SummaryGradients(const Piece& piece, const Gradients& gradients)
      : data(static_cast<Block*>(gradients.summaries)),
        H(piece.tables[H_HEIGHT]),
        W(piece.tables[H_WIDTH]),
        blocks((piece.call.C + WIDEST_BLOCK - 1) / WIDEST_BLOCK * (WIDEST_BLOCK / BLOCK)) {}

  Block* at(int64_t s, int64_t r, int64_t c) const { return data + ((s * H + r) * W + c) * blocks; }
};

// The gradient of a node: a frame of out for a frame of x, floats for a summary.
template <typename T>
struct NodeGradient {
  const Piece& piece;
  const SummaryGradients& summaries;
  int64_t summary;
  T* frame;  // nullptr for a summary

  NodeGradient(const Piece& piece, const SummaryGradients& summaries, int64_t node)
      : piece(piece),
        summaries(summaries),
        summary(-1 - node),
        frame(node < 0 ? nullptr
                       : static_cast<T*>(piece.call.out) + frame_offset(piece.call, piece.call.out_strides, node)) {}

  void store(int64_t r, int64_t c, const TokenGradient<T>& gradient) const {
    const Call& call = piece.call;
    if (frame == nullptr) {
      write_gradient(summaries.at(summary, r, c), gradient, call.C, false);
    } else {
      write_gradient(frame + r * call.out_strides.row + c * call.out_strides.col, gradient, call.C, piece.stream);
    }
  }
};

// The consumers of a node: the tiles of summaries that read it.
struct Consumers {
  const int32_t *first, *last;

  Consumers(const int32_t* tables, int64_t node) {
    const int64_t number = node >= 0 ? node : tables[H_FRAMES] + (-1 - node);
    const int32_t* starts = tables + tables[tables[H_GRADIENT] + G_CONSUMERS];
    first = tables + starts[number], last = tables + starts[number + 1];
  }
};

// ---- fused form ----

// Gradients that tokens get from a column of cells of their node's thumbnail. rows[0] is for tokens of the upper row of
// the windows, rows[1] for those of the lower row, which is also in the next row of cells if H is odd. Both are nullptr
// if the node has no consumers.
struct Column {
  Block* rows[2];
};

// Computes the gradients that come through column j of the cells, for the tokens of row i of the windows.
void fill_column(const Column& column, const SummaryGradients& g, const Consumers& consumers, int64_t i, int64_t j) {
  const int64_t h = (g.H + 1) / 2, w = (g.W + 1) / 2;
  const auto size_of = [](int64_t cell, int64_t size) {  // rows or columns of a cell
    return (size % 2 == 1 && cell > 0) + (2 * cell + 2 <= size ? 2 : 1);
  };
  __builtin_memset(column.rows[0], 0, g.blocks * sizeof(Block));
  for (int64_t row = i; row < i + 1 + g.H % 2 && row < h; ++row) {
    const float inv_count = 1.0f / static_cast<float>(size_of(row, g.H) * size_of(j, g.W));
    Block* const sum = column.rows[row - i];
    for (const int32_t* consumer = consumers.first; consumer < consumers.last; consumer += CONSUMER_WORDS) {
      const int64_t r = consumer[C_TILE] / 2 * h + row, c = consumer[C_TILE] % 2 * w + j;
      if (r < g.H && c < g.W) add_scaled(sum, g.at(consumer[C_SUMMARY], r, c), inv_count, g.blocks);
    }
    if (row == i) __builtin_memcpy(column.rows[1], column.rows[0], g.blocks * sizeof(Block));
  }
}

// A window of up to four tokens that is pooled into a token with gradient `grad`.
template <typename T>
struct PooledWindow {
  const T *taps[4] = {}, *grad = nullptr;  // grad is nullptr if the window is not pooled
  double norms[4] = {}, dots[4] = {}, weights[4] = {};
  double mean = 0;  // sum_k weights[k] * dots[k]

  // Sets what the pooling adds to the gradient of token k.
  void set_gradient(TokenGradient<T>& gradient, int64_t k, const Call& call) const {
    const double gamma = call.temperature * weights[k] * (dots[k] - mean);
    gradient.grad = grad;
    gradient.weight = static_cast<float>(weights[k]);
    gradient.token = taps[k];
    gradient.slope = Slope::of(static_cast<float>(gamma), taps[k], static_cast<float>(norms[k]), call);
  }
};

// Window (i, j) of a node; `grad` is the gradient of the frame that the node is pooled into.
template <typename T>
PooledWindow<T> pooled_window(const Piece& piece, const Image<T>& image, const Frame<T>& grad, int64_t i, int64_t j) {
  const Call& call = piece.call;
  const int64_t H = piece.tables[H_HEIGHT], W = piece.tables[H_WIDTH], C = call.C;
  const int64_t bottom = window_end(i, H), right = window_end(j, W);
  const bool prefetches = image.channel == 1 && 2 * j + 4 <= W && j + 1 < piece.tables[H_OUT_COLS];
  PooledWindow<T> window;
  window.grad = gather(grad.at(i, j), grad.channel, C, piece.workspace, FIRST_TAP + 4);  // the taps have four places
  int64_t n = 0;
  for (int64_t r = 2 * i; r < bottom; ++r) {
    for (int64_t c = 2 * j; c < right; ++c, ++n) {
      const T* tap = gather(image.at(r, c), image.channel, C, piece.workspace, FIRST_TAP + n);
      const Sums sums = norm_and_dot(tap, window.grad, prefetches ? image.at(r, c + 2) : tap, call);
      window.taps[n] = tap;
      window.norms[n] = sums.norm, window.dots[n] = sums.dot;
      window.weights[n] = call.temperature * sums.norm;
    }
  }
  const double total = exponentiate(window.weights, n, 0).total;
  for (int64_t k = 0; k < n; ++k) {
    window.weights[k] /= total;
    window.mean += window.weights[k] * window.dots[k];
  }
  return window;
}

// Gradients of the tokens under rows of windows. Windows cover the whole node, but only those of its target are pooled.
template <typename T>
void fused_gradient_rows(const Piece& piece, const int32_t* entry, const Gradients& gradients) {
  const int32_t* tables = piece.tables;
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH], w = (W + 1) / 2;
  const int64_t OH = tables[H_OUT_ROWS], OW = tables[H_OUT_COLS], node = entry[E_NODE], target = entry[E_TARGET];
  const SummaryGradients summaries(piece, gradients);
  const Consumers consumers(tables, node);
  const Image<T> image = Image<T>::of(tables, piece.call, entry);
  const Frame<T> grad = frame_of_grad<T>(piece.call, target < 0 ? 0 : target);
  const NodeGradient<T> out(piece, summaries, node);
  const bool is_read = consumers.first < consumers.last;
  Column here{}, beside{};
  if (is_read) {
    Block* const columns = static_cast<Block*>(piece.workspace.carried);
    here = {{columns, columns + summaries.blocks}};
    beside = {{columns + 2 * summaries.blocks, columns + 3 * summaries.blocks}};
  }
  for (int64_t i = piece.first; i < piece.last; ++i) {
    const int64_t bottom = window_end(i, H);
    if (is_read) fill_column(here, summaries, consumers, i, 0);
    for (int64_t j = 0; j < w; ++j) {
      const int64_t right = window_end(j, W);
      const bool overlaps = W % 2 == 1 && j + 1 < w;  // the cell to the right holds the second column too
      if (is_read && j + 1 < w) fill_column(beside, summaries, consumers, i, j + 1);
      const bool pooled = target >= 0 && i < OH && j < OW;
      const PooledWindow<T> window = pooled ? pooled_window(piece, image, grad, i, j) : PooledWindow<T>{};
      int64_t n = 0;
      for (int64_t r = 2 * i; r < bottom; ++r) {
        for (int64_t c = 2 * j; c < right; ++c, ++n) {
          TokenGradient<T> gradient;
          if (pooled) window.set_gradient(gradient, n, piece.call);
          gradient.more[0] = here.rows[r - 2 * i];
          gradient.more[1] = overlaps && c > 2 * j ? beside.rows[r - 2 * i] : nullptr;
          out.store(r, c, gradient);
        }
      }
      const Column done = here;
      here = beside, beside = done;
    }
  }
  if (piece.stream) finish_stores();
}

// ---- general form ----

// Statistics of rows of windows: see Gradients::windows.
template <typename T>
void window_rows(const Piece& piece, int64_t frame, const Gradients& gradients) {
  const int32_t* tables = piece.tables;
  const Call& call = piece.call;
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH], OH = tables[H_OUT_ROWS], OW = tables[H_OUT_COLS], C = call.C;
  const Runs row_runs(tables, tables[H_WINDOW_ROWS], OH), col_runs(tables, tables[H_WINDOW_COLS], OW);
  const Frame<T> image = frame_of_node<T>(tables, call, tables[tables[H_OUTPUTS] + frame]),
                 of_result = frame_of_grad<T>(call, frame);
  double *const logits = piece.workspace.logits, *const dots = piece.workspace.dots;
  for (int64_t i = piece.first; i < piece.last; ++i) {
    const int64_t top = clamp(row_runs.start[i], H), bottom = clamp(row_runs.stop(i), H);
    for (int64_t j = 0; j < OW; ++j) {
      const int64_t left = clamp(col_runs.start[j], W), right = clamp(col_runs.stop(j), W);
      const T* grad = gather(of_result.at(i, j), of_result.channel, C, piece.workspace, 0);
      int64_t n = 0;
      for (int64_t r = top; r < bottom; ++r) {
        for (int64_t c = left; c < right; ++c, ++n) {
          const T* token = gather(image.at(r, c), image.channel, C, piece.workspace, FIRST_TAP);
          const Sums sums = norm_and_dot(token, grad, token, call);
          logits[n] = logit(call.temperature, sums.norm);
          dots[n] = sums.dot;
        }
      }
      const int64_t zeros = int64_t{row_runs.count[i]} * col_runs.count[j] - n;
      double mean = 0;
      const auto [largest, total] =
          exponentiate(logits, n, zeros, [=, &mean](int64_t k) { mean += logits[k] * dots[k]; });
      double* const window = gradients.windows + ((frame * OH + i) * OW + j) * 3;
      window[0] = largest, window[1] = total, window[2] = mean / total;
    }
  }
}

// The output frame that ends with a node, or -1.
inline int64_t output_of(const int32_t* tables, int64_t node) {
  const int32_t* ends = tables + tables[tables[H_GRADIENT] + G_ENDS];
  return ends[node >= 0 ? node : tables[H_FRAMES] + ~node];
}

// Adds to `sum` what token (r, c) of a node gets from the gradients of the summaries that read it.
inline void add_consumers(Block* sum, const int32_t* tables, const SummaryGradients& summaries,
                          const Consumers& consumers, int64_t r, int64_t c) {
  const int64_t H = summaries.H, W = summaries.W;
  for (const int32_t* consumer = consumers.first; consumer < consumers.last; consumer += CONSUMER_WORDS) {
    const int32_t *level = tables + tables[H_LEVELS] + consumer[C_LEVEL] * LEVEL_WORDS,
                  *inverse = tables + tables[H_GRADIENT] + G_LEVELS + 2 * consumer[C_LEVEL];
    const int64_t rows = level[L_ROWS], cols = level[L_COLS];
    const int64_t row = consumer[C_TILE] / cols * H + r, col = consumer[C_TILE] % cols * W + c;
    const Runs by_row(tables, inverse[0], rows * H), by_col(tables, inverse[1], cols * W);
    const Runs row_runs(tables, level[L_ROW_RUNS], H), col_runs(tables, level[L_COL_RUNS], W);
    for (int64_t i = by_row.start[row]; i < by_row.stop(row); ++i) {
      for (int64_t j = by_col.start[col]; j < by_col.stop(col); ++j) {
        const float inv_count = 1.0f / (static_cast<float>(row_runs.count[i]) * static_cast<float>(col_runs.count[j]));
        add_scaled(sum, summaries.at(consumer[C_SUMMARY], i, j), inv_count, summaries.blocks);
      }
    }
  }
}

// The gradient of token (r, c) of a node that output frame `target` ends with. `sum` is what the token gets from
// summaries. The windows that read the token are taken one by one; all but the last are added to `sum`.
template <typename T>
TokenGradient<T> gradient_of_windows(const Piece& piece, const Gradients& gradients, int64_t node, int64_t target,
                                     int64_t r, int64_t c, Block* sum) {
  const int32_t *tables = piece.tables, *section = tables + tables[H_GRADIENT];
  const Call& call = piece.call;
  const int64_t OH = tables[H_OUT_ROWS], OW = tables[H_OUT_COLS];
  const Runs by_row(tables, section[G_WINDOW_ROWS], tables[H_HEIGHT]),
      by_col(tables, section[G_WINDOW_COLS], tables[H_WIDTH]);
  const int64_t rows = by_row.count[r], cols = by_col.count[c];
  TokenGradient<T> gradient;
  gradient.more[0] = sum;
  if (rows == 0 || cols == 0) return gradient;

  const Frame<T> image = frame_of_node<T>(tables, call, node), of_result = frame_of_grad<T>(call, target);
  const T* token = gather(image.at(r, c), image.channel, call.C, piece.workspace, FIRST_TAP);
  double gamma = 0, norm = 0;
  for (int64_t w = 0; w < rows * cols; ++w) {
    const int64_t i = by_row.start[r] + w / cols, j = by_col.start[c] + w % cols;
    if (w > 0) write_gradient(sum, gradient, call.C, false);
    gradient.grad = gather(of_result.at(i, j), of_result.channel, call.C, piece.workspace, 0);
    const Sums sums = norm_and_dot(token, gradient.grad, token, call);
    norm = sums.norm;
    const double* window = gradients.windows + ((target * OH + i) * OW + j) * 3;
    const double weight = exp(logit(call.temperature, norm) - window[0]) / window[1];
    gradient.weight = static_cast<float>(weight);
    gamma += call.temperature * weight * (sums.dot - window[2]);
  }
  gradient.token = token;
  gradient.slope = Slope::of(static_cast<float>(gamma), token, static_cast<float>(norm), call);
  return gradient;
}

// The gradient of token (r, c) of a node that temporal_grid copies to output frame `target`.
template <typename T>
TokenGradient<T> gradient_of_copy(const Piece& piece, int64_t target, int64_t r, int64_t c) {
  const Frame<T> of_result = frame_of_grad<T>(piece.call, target);
  TokenGradient<T> gradient;
  gradient.grad = gather(of_result.at(r, c), of_result.channel, piece.call.C, piece.workspace, 0);
  gradient.weight = 1;
  return gradient;
}

// Gradients of rows of tokens of a node.
template <typename T>
void gradient_rows(const Piece& piece, int64_t node, const Gradients& gradients) {
  const int64_t W = piece.tables[H_WIDTH], target = output_of(piece.tables, node);
  const SummaryGradients summaries(piece, gradients);
  const Consumers consumers(piece.tables, node);
  const NodeGradient<T> out(piece, summaries, node);
  Block* const sum = static_cast<Block*>(piece.workspace.carried);
  for (int64_t r = piece.first; r < piece.last; ++r) {
    for (int64_t c = 0; c < W; ++c) {
      __builtin_memset(sum, 0, summaries.blocks * sizeof(Block));
      add_consumers(sum, piece.tables, summaries, consumers, r, c);
      TokenGradient<T> gradient = target < 0 ? TokenGradient<T>{}
                                  : gradients.windows == nullptr
                                      ? gradient_of_copy<T>(piece, target, r, c)
                                      : gradient_of_windows<T>(piece, gradients, node, target, r, c, sum);
      gradient.more[0] = sum;
      out.store(r, c, gradient);
    }
  }
  if (piece.stream) finish_stores();
}

}  // namespace

}  // namespace stgp::cpu
