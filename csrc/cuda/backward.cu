// Gradients of grid_pool, norm_pool and temporal_grid in x.
//
// The gradient of a node has two parts: the gradient from the windows that read it (for temporal_grid: the gradient of
// the output frame that it is copied to), and a part of the gradients of the summaries that read it. Every token
// gathers both. The summaries come first, level by level from the last, in float32; then the frames of x. Sums have one
// order.
//
// A window has tokens t_k with norms n_k, weights a = softmax(temperature * n), and the gradient g of its pooled token.
// With d_k = g . t_k,
//
//   gradient of t_k += a_k g + temperature a_k (d_k - sum_k a_k d_k) dn_k / dt_k
//
//   dn / dt_c = t_c / (M n)                            p = 2
//               sign(t_c) / M                          p = 1
//               sign(t_c) / L if |t_c| = n, else 0     p = infinity
//               sign(t_c) (|t_c| / n)^(p - 1) / M      any other p
//
// where M is the number of channels that the norm runs over for a norm with the mean and 1 for one with the sum, and L is
// the number of these channels with |t_c| = n. The derivative is 0 in other channels, and if t_c or n is 0.

#include <cmath>

#include "fused.cuh"

namespace stgp::cuda {
namespace {

constexpr int QUAD = PER_VEC<float>;  // channels of a summary's gradient that are moved at the same time

// sign(value) * magnitude, where sign(0) is 0.
__device__ __forceinline__ float with_sign_of(float value, float magnitude) {
  return value == 0.0f ? 0.0f : copysignf(1.0f, value) * magnitude;
}

// factor * dn / dt_c without the part that depends on c. `largest` is the number of channels of magnitude n.
__device__ __forceinline__ float slope_of_token(Norm norm, float factor, float n, float inv_count, float largest) {
  if (n == 0.0f) return 0.0f;
  if (norm == Norm::l2) return __fdiv_rn(factor * inv_count, n);
  return norm == Norm::max ? __fdiv_rn(factor, largest) : factor * inv_count;
}

// factor * dn / dt_c for a channel of this value. `of_token` is the result of slope_of_token.
template <bool POWER>
__device__ __forceinline__ float slope(Norm norm, float of_token, float value, float n, float p) {
  if constexpr (POWER) {
    if (value == 0.0f || n == 0.0f) return 0.0f;
    return with_sign_of(value, of_token * powf(__fdiv_rn(fabsf(value), n), p - 1.0f));
  } else {
    if (norm == Norm::l2) return of_token * value;
    return norm == Norm::max && fabsf(value) != n ? 0.0f : with_sign_of(value, of_token);
  }
}

// Unpacks all channels of a vec.
template <class T>
__device__ __forceinline__ void unpack_all(const Vec& vec, float (&values)[PER_VEC<T>]) {
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    float some[PER_WORD<T>];
    unpack<T>(vec.word[w], some);
#pragma unroll
    for (int e = 0; e < PER_WORD<T>; ++e) values[w * PER_WORD<T> + e] = some[e];
  }
}

// Adds the products of the channels of two vecs to `total`.
template <class T>
__device__ __forceinline__ float add_dot(float total, const Vec& left, const Vec& right) {
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    float a[PER_WORD<T>], b[PER_WORD<T>];
    unpack<T>(left.word[w], a);
    unpack<T>(right.word[w], b);
#pragma unroll
    for (int e = 0; e < PER_WORD<T>; ++e) total = fmaf(a[e], b[e], total);
  }
  return total;
}

// Adds the number of channels of magnitude n among the first `channels` of a vec to `count`.
template <class T>
__device__ __forceinline__ float add_largest(float count, const Vec& vec, float n, int32_t channels) {
  float values[PER_VEC<T>];
  unpack_all<T>(vec, values);
#pragma unroll
  for (int e = 0; e < PER_VEC<T>; ++e) count += e < channels && fabsf(values[e]) == n ? 1.0f : 0.0f;
  return count;
}

// ---- general form ----

constexpr int GENERAL_REGISTERS = 128;  // limit of the registers of a thread, for blocks of MAX_THREADS threads

// ends[s] = the output frame whose node is summary s, or -1
struct Ends {
  const int32_t* final;
  int32_t* ends;
  int32_t frames, summaries;
};

__global__ void __launch_bounds__(MAX_THREADS) ends_kernel(const __grid_constant__ Ends p) {
  for (int32_t s = threadIdx.x; s < p.summaries; s += blockDim.x) p.ends[s] = -1;
  __syncthreads();
  for (int32_t f = threadIdx.x; f < p.frames; f += blockDim.x) {
    if (p.final[f] < 0) p.ends[~p.final[f]] = f;
  }
}

template <class T>
struct Gradients {
  Nodes<T> nodes;
  Frames<const T> grad;
  Frames<T> out;
  float* summaries;  // gradients of summaries: (summaries, H, W, C)
  const int32_t* tables;
  const int32_t* final;
  const int32_t* ends;
  const int32_t* rows;      // window rows: OH starts, then OH counts
  const int32_t* cols;      // window cols: OW starts, then OW counts
  const int32_t* gradient;  // the gradient section of the tables
  const int32_t* levels;
  const float* norms;  // (frames, H, W)
  float* statistics;   // (frames, OH, OW, 3)
  int32_t OH, OW, frames;
  int32_t first;    // first frame of x or summary of this launch
  bool of_summary;  // whether this launch computes gradients of summaries; else of frames of x
  Norm norm;
  float inv_count, temperature, p;
  int32_t norm_channels;  // channels that the norm runs over
};

// statistics[t, i, j] = the largest logit l of window (i, j), the sum of exp(logit - l), and sum_k a_k d_k. A block
// computes one window.
template <class T, Access A>
__global__ void __maxnreg__(GENERAL_REGISTERS) window_statistics_kernel(const __grid_constant__ Gradients<T> p) {
  const int32_t H = p.nodes.H, W = p.nodes.W, C = p.nodes.C;
  const int32_t block = blockIdx.x, j = block % p.OW, i = block / p.OW % p.OH, frame = p.first + block / p.OW / p.OH;
  const int32_t top = p.rows[i], left = p.cols[j], height = p.rows[p.OH + i], width = p.cols[p.OW + j];
  const int64_t size = static_cast<int64_t>(height) * width;
  const int32_t node = p.final[frame];
  const float* norms = p.norms + static_cast<int64_t>(frame) * H * W;

  const auto logit_of = [&](int32_t row, int32_t col) {
    const bool inside = row >= 0 && row < H && col >= 0 && col < W;
    return logit(p.temperature, inside ? norms[static_cast<int64_t>(row) * W + col] : 0.0f);
  };
  const auto logit_at = [&](int64_t n) {
    return logit_of(top + static_cast<int32_t>(n / width), left + static_cast<int32_t>(n % width));
  };
  float highest[1] = {-INFINITY};
  for (int64_t n = threadIdx.x; n < size; n += blockDim.x) highest[0] = fmaxf(highest[0], logit_at(n));
  join_block(Highest{}, highest, 0);

  const T* grad = p.grad.token(p.grad.frame(frame), i, j);
  // The sums are float64: the mean of equal products must be equal to them, because temperature magnifies differences.
  double total = 0.0, mean = 0.0;
  int32_t buffer = 1;
  for (int64_t n = 0; n < size; n += 4, buffer ^= 1) {
    const T* tokens[4] = {};
    float found[4] = {}, powers[4] = {};
    int64_t stride = 1;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int32_t row = top + static_cast<int32_t>((n + q) / width),
                    col = left + static_cast<int32_t>((n + q) % width);
      if (n + q >= size) continue;
      powers[q] = power_of_e(logit_of(row, col) - highest[0]);
      total += powers[q];
      if (row < 0 || row >= H || col < 0 || col >= W) continue;
      tokens[q] = p.nodes.token(node, row, col, &stride);
    }
    for_each_vec<T>(C, [&](int32_t channel) {
      const Vec of_grad = load_vec<A, CacheHint::keep>(grad, channel, C, p.grad.strides.channel);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (tokens[q] == nullptr) continue;
        found[q] = add_dot<T>(found[q], of_grad, load_vec<A, CacheHint::keep>(tokens[q], channel, C, stride));
      }
    });
    join_block(Sum{}, found, buffer);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (tokens[q] != nullptr) mean += static_cast<double>(powers[q]) * found[q];
    }
  }
  if (threadIdx.x != 0) return;
  float* statistics = p.statistics + ((static_cast<int64_t>(frame) * p.OH + i) * p.OW + j) * 3;
  statistics[0] = highest[0];
  statistics[1] = static_cast<float>(total);
  statistics[2] = static_cast<float>(mean / total);
}

// Stores the gradient of a token of a node. A block computes one token.
//
// The products d have the same bits as in window_statistics_kernel, so that d_k - sum_k a_k d_k is 0 if one token has
// all the weight.
template <class T, Access A, bool POOLED, bool POWER>
__global__ void __maxnreg__(GENERAL_REGISTERS) token_gradient_kernel(const __grid_constant__ Gradients<T> p) {
  const int32_t H = p.nodes.H, W = p.nodes.W, C = p.nodes.C;
  const int32_t block = blockIdx.x, col = block % W, row = block / W % H, number = p.first + block / W / H;
  const int32_t node = p.of_summary ? ~number : number;
  const int32_t frame = p.of_summary ? p.ends[number] : p.final[number] == number ? number : -1;

  // The windows that read the token are rows top, ..., top + height - 1 and columns left, ..., left + width - 1. For
  // temporal_grid that is the token itself.
  int32_t top = row, height = frame >= 0 ? 1 : 0, left = col, width = 1;
  if constexpr (POOLED) {
    const int32_t* rows = p.tables + p.gradient[G_WINDOW_ROWS];
    const int32_t* cols = p.tables + p.gradient[G_WINDOW_COLS];
    top = rows[row];
    height = frame >= 0 ? rows[H + row] : 0;
    left = cols[col];
    width = cols[W + col];
  }
  const bool owns = height > 0 && width > 0;
  const T* grad = owns ? p.grad.frame(frame) : p.grad.base;
  const float norm = POOLED && owns ? p.norms[(static_cast<int64_t>(frame) * H + row) * W + col] : 0.0f;

  const auto statistics = [&](int32_t i, int32_t j) {
    return p.statistics + ((static_cast<int64_t>(frame) * p.OH + i) * p.OW + j) * 3;
  };
  const auto weight_of = [&](int32_t i, int32_t j) {
    const float* of_window = statistics(i, j);
    return divide_by_total(power_of_e(logit(p.temperature, norm) - of_window[0]), of_window[1]);
  };
  // Adds the sum of a g over these windows.
  const auto add_grads = [&](int32_t channel, float (&sum)[PER_VEC<T>]) {
    for (int32_t i = top; i < top + height; ++i) {
      for (int32_t j = left; j < left + width; ++j) {
        const float weight = POOLED ? weight_of(i, j) : 1.0f;
        float values[PER_VEC<T>];
        unpack_all<T>(load_vec<A, CacheHint::keep>(p.grad.token(grad, i, j), channel, C, p.grad.strides.channel),
                      values);
#pragma unroll
        for (int e = 0; e < PER_VEC<T>; ++e) sum[e] = fmaf(weight, values[e], sum[e]);
      }
    }
  };

  int64_t stride = 1;
  const T* token = nullptr;
  float of_token = 0.0f;
  if constexpr (POOLED) {
    if (owns) {
      token = p.nodes.token(node, row, col, &stride);
      float factor = 0.0f;
      int32_t buffer = 0;
      const int64_t size = static_cast<int64_t>(height) * width;
      for (int64_t n = 0; n < size; n += 4, buffer ^= 1) {
        const auto row_of = [&](int q) { return top + static_cast<int32_t>((n + q) / width); };
        const auto col_of = [&](int q) { return left + static_cast<int32_t>((n + q) % width); };
        float dots[4] = {};
        for_each_vec<T>(C, [&](int32_t channel) {
          const Vec vec = load_vec<A, CacheHint::keep>(token, channel, C, stride);
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            if (n + q >= size) continue;
            const T* of_window = p.grad.token(grad, row_of(q), col_of(q));
            dots[q] =
                add_dot<T>(dots[q], load_vec<A, CacheHint::keep>(of_window, channel, C, p.grad.strides.channel), vec);
          }
        });
        join_block(Sum{}, dots, buffer);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          if (n + q >= size) continue;
          const float* of_window = statistics(row_of(q), col_of(q));
          factor = fmaf(weight_of(row_of(q), col_of(q)), dots[q] - of_window[2], factor);
        }
      }
      float largest[1] = {};
      if (p.norm == Norm::max) {
        for_each_vec<T>(C, [&](int32_t channel) {
          const Vec vec = load_vec<A, CacheHint::keep>(token, channel, C, stride);
          largest[0] = add_largest<T>(largest[0], vec, norm, p.norm_channels - channel);
        });
        join_block(Sum{}, largest, buffer);
      }
      of_token = slope_of_token(p.norm, p.temperature * factor, norm, p.inv_count, largest[0]);
    }
  }

  const int32_t* consumers = p.tables + p.gradient[G_CONSUMERS] + (p.of_summary ? p.frames + number : number);
  T* out = p.of_summary ? p.out.base : p.out.token(p.out.frame(number), row, col);
  float* summary = p.summaries + ((static_cast<int64_t>(number) * H + row) * W + col) * C;
  for_each_vec<T>(C, [&](int32_t channel) {
    float sum[PER_VEC<T>] = {};
    if (owns) {
      add_grads(channel, sum);
      if constexpr (POOLED) {
        float values[PER_VEC<T>];
        unpack_all<T>(load_vec<A, CacheHint::keep>(token, channel, C, stride), values);
#pragma unroll
        for (int e = 0; e < PER_VEC<T>; ++e) {
          if (channel + e < p.norm_channels) sum[e] += slope<POWER>(p.norm, of_token, values[e], norm, p.p);
        }
      }
    }
    for (int32_t at = consumers[0]; at < consumers[1]; at += CONSUMER_WORDS) {
      const int32_t* consumer = p.tables + at;
      const int32_t* level = p.levels + consumer[C_LEVEL] * LEVEL_WORDS;
      const int32_t rows = level[L_ROWS], cols = level[L_COLS], tile = consumer[C_TILE];
      const int32_t* row_inverse = p.tables + p.gradient[G_LEVELS + 2 * consumer[C_LEVEL]] + (tile / cols * H + row);
      const int32_t* col_inverse =
          p.tables + p.gradient[G_LEVELS + 2 * consumer[C_LEVEL] + 1] + (tile % cols * W + col);
      const int32_t* heights = p.tables + level[L_ROW_RUNS] + H;
      const int32_t* widths = p.tables + level[L_COL_RUNS] + W;
      const int32_t bottom = row_inverse[0] + row_inverse[rows * H], right = col_inverse[0] + col_inverse[cols * W];
      for (int32_t i = row_inverse[0]; i < bottom; ++i) {
        for (int32_t j = col_inverse[0]; j < right; ++j) {
          const float inv_count =
              __fdiv_rn(1.0f, static_cast<float>(heights[i])) * __fdiv_rn(1.0f, static_cast<float>(widths[j]));
          const float* from = p.summaries + ((static_cast<int64_t>(consumer[C_SUMMARY]) * H + i) * W + j) * C;
#pragma unroll
          for (int quad = 0; quad < PER_VEC<T>; quad += QUAD) {
            float values[QUAD];
            unpack_all<float>(load_vec<A, CacheHint::keep>(from, channel + quad, C, 1), values);
#pragma unroll
            for (int e = 0; e < QUAD; ++e) sum[quad + e] = fmaf(inv_count, values[e], sum[quad + e]);
          }
        }
      }
    }
    if (p.of_summary) {
#pragma unroll
      for (int quad = 0; quad < PER_VEC<T>; quad += QUAD) {
        Vec vec;
#pragma unroll
        for (int e = 0; e < QUAD; ++e) vec.word[e] = __float_as_uint(sum[quad + e]);
        store_vec<A, CacheHint::keep>(summary, channel + quad, C, 1, vec);
      }
    } else {
      Vec vec;
#pragma unroll
      for (int w = 0; w < WORDS; ++w) {
        float values[PER_WORD<T>];
#pragma unroll
        for (int e = 0; e < PER_WORD<T>; ++e) values[e] = sum[w * PER_WORD<T> + e];
        vec.word[w] = pack<T>(values);
      }
      store_vec<A, CacheHint::stream>(out, channel, C, p.out.strides.channel, vec);
    }
  });
}

// Returns whether tokens of x, grad and out can all be moved 128 bits at a time.
inline bool all_vectorized(const int32_t* tables, const Call& call, bool pooled) {
  return is_vectorized(tables, call, tables[H_HEIGHT], tables[H_WIDTH]) &&
         is_vectorized(call.grad, call.grad_strides, tables[H_FRAMES] / call.T, call.T,
                       tables[pooled ? H_OUT_ROWS : H_HEIGHT], tables[pooled ? H_OUT_COLS : H_WIDTH], call.C,
                       element_size(call.dtype));
}

template <class T, Access A>
auto choose_token_kernel(bool pooled, Norm norm) -> void (*)(Gradients<T>) {
  if (!pooled) return token_gradient_kernel<T, A, false, false>;
  return norm == Norm::power ? token_gradient_kernel<T, A, true, true> : token_gradient_kernel<T, A, true, false>;
}

template <class T>
cudaError_t run_general(const int32_t* tables, const int32_t* device_tables, const Call& call,
                        const GradientScratch& scratch, bool pooled, cudaStream_t stream) {
  Gradients<T> p{};
  p.nodes = {frames_of_x<T>(call), static_cast<const T*>(call.scratch), tables[H_HEIGHT], tables[H_WIDTH],
             static_cast<int32_t>(call.C)};
  p.grad = {static_cast<const T*>(call.grad), call.grad_strides, Divisor(call.T)};
  p.out = frames_of_out<T>(call);
  p.summaries = scratch.summaries;
  p.tables = device_tables;
  p.final = device_tables + tables[H_OUTPUTS];
  p.ends = scratch.ends;
  p.rows = device_tables + tables[H_WINDOW_ROWS];
  p.cols = device_tables + tables[H_WINDOW_COLS];
  p.gradient = device_tables + tables[H_GRADIENT];
  p.levels = device_tables + tables[H_LEVELS];
  p.norms = scratch.norms;
  p.statistics = scratch.statistics;
  p.OH = tables[H_OUT_ROWS];
  p.OW = tables[H_OUT_COLS];
  p.frames = tables[H_FRAMES];
  p.norm = norm_kind(call.norm_type);
  p.inv_count = inv_count_of_norm(call);
  p.temperature = call.temperature;
  p.p = static_cast<float>(call.norm_type);
  p.norm_channels = static_cast<int32_t>(channels_of_norm(call));

  const int32_t threads = block_threads(call.C, sizeof(T));
  const bool is_vector = all_vectorized(tables, call, pooled);
  cudaError_t error = cudaSuccess;
  if (tables[H_SUMMARIES] > 0) {
    const Ends ends{p.final, scratch.ends, p.frames, tables[H_SUMMARIES]};
    error = launch(ends_kernel, 1, MAX_THREADS, stream, ends);
    if (error != cudaSuccess) return error;
  }
  if (pooled) {
    const auto kernel =
        is_vector ? window_statistics_kernel<T, Access::vector> : window_statistics_kernel<T, Access::scalar>;
    const int64_t windows = static_cast<int64_t>(p.OH) * p.OW;
    error = launch_in_ranges(p.frames, windows, [&](int32_t first, int32_t range) {
      p.first = first;
      return launch(kernel, range * windows, threads, stream, p);
    });
    if (error != cudaSuccess) return error;
  }
  const auto kernel = is_vector ? choose_token_kernel<T, Access::vector>(pooled, p.norm)
                                : choose_token_kernel<T, Access::scalar>(pooled, p.norm);
  const int64_t tokens = static_cast<int64_t>(tables[H_HEIGHT]) * tables[H_WIDTH];
  const auto run = [&](int32_t start, int32_t count) {
    return launch_in_ranges(count, tokens, [&](int32_t first, int32_t range) {
      p.first = start + first;
      return launch(kernel, range * tokens, threads, stream, p);
    });
  };
  p.of_summary = true;
  for (int32_t number = tables[H_NUM_LEVELS] - 1; number >= 0; --number) {
    const int32_t* level = tables + tables[H_LEVELS] + number * LEVEL_WORDS;
    error = run(level[L_FIRST], level[L_COUNT]);
    if (error != cudaSuccess) return error;
  }
  p.of_summary = false;
  return run(0, p.frames);
}

// ---- fused form ----

// Limit of the registers of a thread: a multiprocessor has room for 16 warps, in blocks of a power of two of warps.
constexpr int FUSED_REGISTERS = 128;

// 1 / n for a cell of n = 1, 2 or 3 rows or columns. The constants save a division.
__device__ __forceinline__ float inverse(int32_t n) { return n == 3 ? 1.0f / 3.0f : n == 2 ? 0.5f : 1.0f; }

template <class T>
struct FusedGradients {
  Frames<const T> x;
  Distances distances;  // in x
  Frames<const T> grad;
  Frames<T> out;
  const T* scratch;          // thumbnails: (slots, h, w, C)
  float* summaries;          // gradients of summaries: (summaries, H, W, C)
  const int32_t* tables;     // base of the offsets of consumers
  const int32_t* entries;    // entries of this launch
  const int32_t* consumers;  // frames + summaries + 1 offsets
  int32_t H, W, h, w, OH, OW, C, frames;
  Norm norm;
  float inv_count, temperature;
  int32_t norm_channels;  // as in the forward
};

// Stores the gradients of the tokens of window (i, j) of an entry, which is also cell (i, j) of its thumbnail.
//
// A block computes one window, with its tokens packed in registers. MOSAIC: the entries are summaries, whose gradients
// are float32. HALO: H or W is odd, so that the second row and column of the window are also in the halo of other
// cells. PART: the norm runs over some of the channels, which are loaded once more for it.
template <class T, Access A, bool L2_NORM, bool MOSAIC, bool HALO, bool PART>
__global__ void __maxnreg__(FUSED_REGISTERS) grid_pool_backward_kernel(const __grid_constant__ FusedGradients<T> p) {
  // The tokens are kept in registers, or else loaded at each use, because they would take too many registers.
  constexpr bool KEEPS = A == Access::vector && !PART && (sizeof(T) == 2 || L2_NORM);
  constexpr bool KEEPS_GRAD = KEEPS && sizeof(T) == 2;
  constexpr int HELD = KEEPS ? VECS<T> : 1, GRADS = KEEPS_GRAD ? VECS<T> : 1, CELLS = HALO ? 4 : 1;
  constexpr CacheHint HINT = MOSAIC || !KEEPS ? CacheHint::keep : CacheHint::stream;
  const Norm norm = L2_NORM ? Norm::l2 : p.norm;

  const int32_t block = blockIdx.x, j = block % p.w, i = block / p.w % p.h;
  const int32_t* entry = p.entries + block / p.w / p.h * ENTRY_WORDS;
  const int32_t node = entry[E_NODE], target = entry[E_TARGET];
  const bool pools = target >= 0 && i < p.OH && j < p.OW;

  const auto channel = [&](int k) { return first_channel<T>() + k * VEC_STEP<T>; };
  const auto taken = [&](int q) { return 2 * i + q / 2 < p.H && 2 * j + q % 2 < p.W; };

  Vec tile[4][HELD] = {}, grad[GRADS] = {};
  float weights[4] = {}, slopes[4] = {}, norms[4] = {};
  const auto rows = [&] {
    if constexpr (MOSAIC) {
      return MosaicRows<T>(p.scratch, entry, p.h, p.w, p.C, i, j);
    } else {
      return FrameRows<T, A, FusedGradients<T>>(p, node, i, j);
    }
  }();
  const T* of_window = pools ? p.grad.token(p.grad.frame(target), i, j) : p.grad.base;
  const auto load = [&](int k) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      tile[q][k % HELD] = Vec{};
      if (taken(q)) {
        tile[q][k % HELD] =
            load_vec<A, HINT>(rows.at(q / 2, q % 2), k * VEC_STEP<T>, p.C - first_channel<T>(), rows.channel());
      }
    }
  };
  const auto load_grad = [&](int k) {
    grad[k % GRADS] = load_vec<A, CacheHint::keep>(of_window, channel(k), p.C, p.grad.strides.channel);
  };
  if (pools) {
    float dots[4] = {};
    Total<T> found[4];
#pragma unroll
    for (int k = 0; k < HELD && KEEPS; ++k) load(k);
#pragma unroll HELD
    for (int k = 0; k < VECS<T>; ++k) {
      if constexpr (!KEEPS) load(k);
      load_grad(k);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const Vec& vec = tile[q][k % HELD];
        found[q].add(norm, PART ? first_of_vec<T>(vec, p.norm_channels - channel(k)) : vec);
        dots[q] = add_dot<T>(dots[q], tile[q][k % HELD], grad[k % GRADS]);
      }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) norms[q] = found[q].of_thread(norm);
    const float own = finish_norm(norm, join_lanes(Join{norm}, norms, 0), p.inv_count);
    spread(own, norms);
    spread(weigh(own, taken(threadIdx.x % WARP / SHARERS), p.temperature), weights);
    join_block(Sum{}, dots, 1);
    float largest[4] = {};
    if (norm == Norm::max) {
#pragma unroll HELD
      for (int k = 0; k < VECS<T>; ++k) {
        if constexpr (!KEEPS) load(k);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int32_t in_norm = PART ? p.norm_channels - channel(k) : PER_VEC<T>;
          largest[q] = add_largest<T>(largest[q], tile[q][k % HELD], norms[q], in_norm);
        }
      }
      join_block(Sum{}, largest, 0);
    }
    float mean = 0.0f;
#pragma unroll
    for (int q = 0; q < 4; ++q) mean = taken(q) ? fmaf(weights[q], dots[q], mean) : mean;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float factor = p.temperature * weights[q] * (dots[q] - mean);
      slopes[q] = slope_of_token(norm, factor, norms[q], p.inv_count, largest[q]);
    }
    if constexpr (KEEPS) {
#pragma unroll
      for (int k = 0; k < HELD; ++k) {
        if constexpr (KEEPS_GRAD) keep_packed(grad[k]);
#pragma unroll
        for (int q = 0; q < 4; ++q) keep_packed(tile[q][k]);
      }
    }
  }

  // 1 / n for cells (i, j), (i, j + 1), (i + 1, j), (i + 1, j + 1) of n tokens each; 0 for a cell without tokens of
  // this window
  float inv_counts[CELLS];
  const bool odd_H = p.H % 2 == 1, odd_W = p.W % 2 == 1;
#pragma unroll
  for (int n = 0; n < CELLS; ++n) {
    const int32_t a = i + n / 2, b = j + n % 2;
    const int32_t height = min(2 * a + 2, p.H) - (odd_H ? max(2 * a - 1, 0) : 2 * a);
    const int32_t width = min(2 * b + 2, p.W) - (odd_W ? max(2 * b - 1, 0) : 2 * b);
    const bool reaches = (n / 2 == 0 || (odd_H && a < p.h)) && (n % 2 == 0 || (odd_W && b < p.w));
    inv_counts[n] = reaches ? inverse(height) * inverse(width) : 0.0f;
  }
  const int32_t* consumers = p.consumers + (MOSAIC ? p.frames + ~node : node);
  const int32_t first_consumer = consumers[0], last_consumer = consumers[1];

#pragma unroll HELD
  for (int k = 0; k < VECS<T>; ++k) {
    if (pools) {
      if constexpr (!KEEPS) load(k);
      if constexpr (!KEEPS_GRAD) load_grad(k);
    }
#pragma unroll
    for (int quad = 0; quad < PER_VEC<T>; quad += QUAD) {
      float cells[CELLS][QUAD] = {};
#pragma unroll 1
      for (int32_t at = first_consumer; at < last_consumer; at += CONSUMER_WORDS) {
        const int32_t tile_number = p.tables[at + C_TILE];
        const int32_t row = tile_number / 2 * p.h + i, col = tile_number % 2 * p.w + j;
        const float* summary = p.summaries + static_cast<int64_t>(p.tables[at + C_SUMMARY]) * p.H * p.W * p.C;
#pragma unroll
        for (int n = 0; n < CELLS; ++n) {
          if (inv_counts[n] == 0.0f || row + n / 2 >= p.H || col + n % 2 >= p.W) continue;
          const float* from = summary + (static_cast<int64_t>(row + n / 2) * p.W + col + n % 2) * p.C;
          const Vec vec = load_vec<A, CacheHint::keep>(from, channel(k) + quad, p.C, 1);
#pragma unroll
          for (int e = 0; e < QUAD; ++e) cells[n][e] = fmaf(inv_counts[n], __uint_as_float(vec.word[e]), cells[n][e]);
        }
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        Vec wide;
#pragma unroll
        for (int v = 0; v < QUAD / PER_WORD<T>; ++v) {
          uint32_t& word = tile[q][k % HELD].word[quad / PER_WORD<T> + v];
          float values[PER_WORD<T>], of_grad[PER_WORD<T>];
          unpack<T>(word, values);
          unpack<T>(grad[k % GRADS].word[quad / PER_WORD<T> + v], of_grad);
#pragma unroll
          for (int e = 0; e < PER_WORD<T>; ++e) {
            const int n = v * PER_WORD<T> + e;
            const bool in_norm = !PART || channel(k) + n + quad < p.norm_channels;
            const float of_norm = in_norm ? slope<false>(norm, slopes[q], values[e], norms[q], 0.0f) : 0.0f;
            float sum = fmaf(weights[q], of_grad[e], of_norm);
            sum += cells[0][n];
            if constexpr (HALO) {
              if (q % 2 == 1) sum += cells[1][n];
              if (q / 2 == 1) sum += cells[2][n];
              if (q == 3) sum += cells[3][n];
            }
            values[e] = sum;
            wide.word[n] = __float_as_uint(sum);
          }
          if constexpr (!MOSAIC) word = pack<T>(values);  // the token is not used again
        }
        if constexpr (MOSAIC) {
          if (taken(q)) {
            const int64_t row = static_cast<int64_t>(~node) * p.H + 2 * i + q / 2;
            float* to = p.summaries + (row * p.W + 2 * j + q % 2) * p.C;
            store_vec<A, CacheHint::keep>(to, channel(k) + quad, p.C, 1, wide);
          }
        }
      }
    }
    if constexpr (!MOSAIC) {
      T* out = p.out.frame(node);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (!taken(q)) continue;
        T* to = p.out.token(out, 2 * i + q / 2, 2 * j + q % 2);
        store_vec<A, CacheHint::stream>(to, channel(k), p.C, p.out.strides.channel, tile[q][k % HELD]);
      }
    }
  }
}

template <class T, Access A, bool MOSAIC>
auto choose_fused_kernel(bool halo, const FusedGradients<T>& p) -> void (*)(FusedGradients<T>) {
  if (p.norm_channels < p.C) return grid_pool_backward_kernel<T, A, false, MOSAIC, true, true>;
  if constexpr (A == Access::vector) {
    if (p.norm == Norm::l2) {
      return halo ? grid_pool_backward_kernel<T, A, true, MOSAIC, true, false>
                  : grid_pool_backward_kernel<T, A, true, MOSAIC, false, false>;
    }
  }
  return grid_pool_backward_kernel<T, A, false, MOSAIC, true, false>;
}

template <class T>
cudaError_t run_fused(const int32_t* tables, const int32_t* device_tables, const Call& call,
                      const GradientScratch& scratch, cudaStream_t stream) {
  FusedGradients<T> p{};
  p.x = frames_of_x<T>(call);
  p.distances = Distances(call.x_strides, sizeof(T));
  p.grad = {static_cast<const T*>(call.grad), call.grad_strides, Divisor(call.T)};
  p.out = frames_of_out<T>(call);
  p.scratch = static_cast<const T*>(call.scratch);
  p.summaries = scratch.summaries;
  p.tables = device_tables;
  p.consumers = device_tables + tables[tables[H_GRADIENT] + G_CONSUMERS];
  p.H = tables[H_HEIGHT];
  p.W = tables[H_WIDTH];
  p.h = (p.H + 1) / 2;
  p.w = (p.W + 1) / 2;
  p.OH = tables[H_OUT_ROWS];
  p.OW = tables[H_OUT_COLS];
  p.C = static_cast<int32_t>(call.C);
  p.frames = tables[H_FRAMES];
  p.norm = norm_kind(call.norm_type);
  p.inv_count = inv_count_of_norm(call);
  p.temperature = call.temperature;
  p.norm_channels = static_cast<int32_t>(channels_of_norm(call));

  const bool halo = p.H % 2 == 1 || p.W % 2 == 1;
  const bool is_vector = all_vectorized(tables, call, true) && p.norm_channels % PER_VEC<T> == 0;
  const int32_t threads = block_threads(p.C, sizeof(float));
  const int64_t windows = static_cast<int64_t>(p.h) * p.w;
  for (int32_t stage = tables[H_NUM_STAGES] - 1; stage >= 0; --stage) {
    const int32_t* s = tables + tables[H_STAGES] + stage * STAGE_WORDS;
    const auto kernel = s[S_MOSAIC] != 0 ? (is_vector ? choose_fused_kernel<T, Access::vector, true>(halo, p)
                                                      : choose_fused_kernel<T, Access::scalar, true>(halo, p))
                                         : (is_vector ? choose_fused_kernel<T, Access::vector, false>(halo, p)
                                                      : choose_fused_kernel<T, Access::scalar, false>(halo, p));
    const cudaError_t error = launch_in_ranges(s[S_COUNT], windows, [&](int32_t first, int32_t range) {
      p.entries = device_tables + s[S_ENTRIES] + first * ENTRY_WORDS;
      return launch(kernel, range * windows, threads, stream, p);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t grid_pool_backward_fused(const int32_t* tables, const int32_t* device_tables, const Call& call,
                                     const GradientScratch& scratch, cudaStream_t stream) {
  return with_type(
      call.dtype, [&](auto value) { return run_fused<decltype(value)>(tables, device_tables, call, scratch, stream); });
}

cudaError_t grid_pool_backward(const int32_t* tables, const int32_t* device_tables, const Call& call,
                               const GradientScratch& scratch, bool pooled, cudaStream_t stream) {
  return with_type(call.dtype, [&](auto value) {
    return run_general<decltype(value)>(tables, device_tables, call, scratch, pooled, stream);
  });
}

}  // namespace stgp::cuda
