// Gradients in the general form: statistics of all windows, then the gradients of tokens, level by level from the last,
// and of the frames of x. gradients.cuh has the formulas.

#include <cmath>

#include "gradients.cuh"

namespace stgp::cuda {
namespace {

constexpr int GENERAL_REGISTERS = 128;  // limit of the registers of a thread, for blocks of MAX_THREADS threads

template <class T>
struct Gradients {
  Nodes<T> nodes;
  Frames<const T> grad;
  Frames<T> out;
  float* summaries;  // gradients of summaries: (summaries, H, W, C)
  const int32_t* tables;
  const int32_t* final;
  const int32_t* ends;      // the output frame that holds each frame of x, then each summary, or -1
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

// The gradient of token (row, col) of a node.
//
// The products d have the same bits as in window_statistics_kernel, so that d_k - sum_k a_k d_k is 0 if one token has
// all the weight.
template <class T, Access A, bool POOLED>
struct TokenGradient {
  const Gradients<T>& p;
  const int32_t H, W, C, row, col, number;
  // The windows that read the token are rows top, ..., top + height - 1 and columns left, ..., left + width - 1. For
  // temporal_grid that is the token itself.
  int32_t frame, top, height, left, width;
  bool owns;  // whether there are such windows
  const T *grad, *token = nullptr;
  int64_t stride = 1;  // of the channels of the token
  float norm = 0.0f;

  __device__ __forceinline__ TokenGradient(const Gradients<T>& p, int32_t number, int32_t row, int32_t col)
      : p(p), H(p.nodes.H), W(p.nodes.W), C(p.nodes.C), row(row), col(col), number(number) {
    frame = p.ends[p.of_summary ? p.frames + number : number];
    top = row, height = frame >= 0 ? 1 : 0, left = col, width = 1;
    if constexpr (POOLED) {
      const int32_t* rows = p.tables + p.gradient[G_WINDOW_ROWS];
      const int32_t* cols = p.tables + p.gradient[G_WINDOW_COLS];
      top = rows[row];
      height = frame >= 0 ? rows[H + row] : 0;
      left = cols[col];
      width = cols[W + col];
    }
    owns = height > 0 && width > 0;
    grad = owns ? p.grad.frame(frame) : p.grad.base;
    if (POOLED && owns) {
      norm = p.norms[(static_cast<int64_t>(frame) * H + row) * W + col];
      token = p.nodes.token(p.of_summary ? ~number : number, row, col, &stride);
    }
  }

  __device__ __forceinline__ const float* statistics(int32_t i, int32_t j) const {
    return p.statistics + ((static_cast<int64_t>(frame) * p.OH + i) * p.OW + j) * 3;
  }

  __device__ __forceinline__ float weight_of(int32_t i, int32_t j) const {
    const float* of_window = statistics(i, j);
    return divide_by_total(power_of_e(logit(p.temperature, norm) - of_window[0]), of_window[1]);
  }

  __device__ __forceinline__ Vec load_token(int32_t channel) const {
    return load_vec<A, CacheHint::keep>(token, channel, C, stride);
  }

  __device__ __forceinline__ Vec load_grad(int32_t i, int32_t j, int32_t channel) const {
    return load_vec<A, CacheHint::keep>(p.grad.token(grad, i, j), channel, C, p.grad.strides.channel);
  }

  // The factor of dn / dt that slope_of_token gives.
  __device__ __forceinline__ float find_slope() const {
    float factor = 0.0f;
    int32_t buffer = 0;
    const int64_t size = static_cast<int64_t>(height) * width;
    for (int64_t n = 0; n < size; n += 4, buffer ^= 1) {
      const auto row_of = [&](int q) { return top + static_cast<int32_t>((n + q) / width); };
      const auto col_of = [&](int q) { return left + static_cast<int32_t>((n + q) % width); };
      float dots[4] = {};
      for_each_vec<T>(C, [&](int32_t channel) {
        const Vec vec = load_token(channel);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          if (n + q < size) dots[q] = add_dot<T>(dots[q], load_grad(row_of(q), col_of(q), channel), vec);
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
        largest[0] = add_largest<T>(largest[0], load_token(channel), norm, p.norm_channels - channel);
      });
      join_block(Sum{}, largest, buffer);
    }
    return slope_of_token(p.norm, p.temperature * factor, norm, p.inv_count, largest[0]);
  }

  // Adds the sum of a g over the windows.
  __device__ __forceinline__ void add_grads(int32_t channel, float (&sum)[PER_VEC<T>]) const {
    for (int32_t i = top; i < top + height; ++i) {
      for (int32_t j = left; j < left + width; ++j) {
        const float weight = POOLED ? weight_of(i, j) : 1.0f;
        float values[PER_VEC<T>];
        unpack_all<T>(load_grad(i, j, channel), values);
#pragma unroll
        for (int e = 0; e < PER_VEC<T>; ++e) sum[e] = fmaf(weight, values[e], sum[e]);
      }
    }
  }

  // Adds the parts of the gradients of the summaries that a consumer reads the token for.
  __device__ __forceinline__ void add_consumer(const int32_t* consumer, int32_t channel,
                                               float (&sum)[PER_VEC<T>]) const {
    const int32_t* level = p.levels + consumer[C_LEVEL] * LEVEL_WORDS;
    const int32_t rows = level[L_ROWS], cols = level[L_COLS], tile = consumer[C_TILE];
    const int32_t* row_inverse = p.tables + p.gradient[G_LEVELS + 2 * consumer[C_LEVEL]] + (tile / cols * H + row);
    const int32_t* col_inverse = p.tables + p.gradient[G_LEVELS + 2 * consumer[C_LEVEL] + 1] + (tile % cols * W + col);
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

  // Stores the gradient in float32 for a summary, rounded for a frame of x.
  __device__ __forceinline__ void store(int32_t channel, const float (&sum)[PER_VEC<T>]) const {
    if (p.of_summary) {
      float* summary = p.summaries + ((static_cast<int64_t>(number) * H + row) * W + col) * C;
#pragma unroll
      for (int quad = 0; quad < PER_VEC<T>; quad += QUAD) {
        Vec vec;
#pragma unroll
        for (int e = 0; e < QUAD; ++e) vec.word[e] = __float_as_uint(sum[quad + e]);
        store_vec<A, CacheHint::keep>(summary, channel + quad, C, 1, vec);
      }
    } else {
      T* out = p.out.token(p.out.frame(number), row, col);
      store_vec<A, CacheHint::stream>(out, channel, C, p.out.strides.channel, pack_vec<T>(sum));
    }
  }
};

// Stores the gradient of a token of a node. A block computes one token.
template <class T, Access A, bool POOLED, bool POWER>
__global__ void __maxnreg__(GENERAL_REGISTERS) token_gradient_kernel(const __grid_constant__ Gradients<T> p) {
  const int32_t H = p.nodes.H, W = p.nodes.W;
  const int32_t block = blockIdx.x, col = block % W, row = block / W % H, number = p.first + block / W / H;
  const TokenGradient<T, A, POOLED> gradient(p, number, row, col);
  float slope_of_all = 0.0f;
  if (POOLED && gradient.owns) slope_of_all = gradient.find_slope();

  const int32_t* consumers = p.tables + p.gradient[G_CONSUMERS] + (p.of_summary ? p.frames + number : number);
  for_each_vec<T>(p.nodes.C, [&](int32_t channel) {
    float sum[PER_VEC<T>] = {};
    if (gradient.owns) gradient.add_grads(channel, sum);
    if (POOLED && gradient.owns) {
      float values[PER_VEC<T>];
      unpack_all<T>(gradient.load_token(channel), values);
#pragma unroll
      for (int e = 0; e < PER_VEC<T>; ++e) {
        if (channel + e < p.norm_channels) sum[e] += slope<POWER>(p.norm, slope_of_all, values[e], gradient.norm, p.p);
      }
    }
    for (int32_t at = consumers[0]; at < consumers[1]; at += CONSUMER_WORDS) {
      gradient.add_consumer(p.tables + at, channel, sum);
    }
    gradient.store(channel, sum);
  });
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
  p.ends = device_tables + tables[tables[H_GRADIENT] + G_ENDS];
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

}  // namespace

cudaError_t grid_pool_backward(const int32_t* tables, const int32_t* device_tables, const Call& call,
                               const GradientScratch& scratch, bool pooled, cudaStream_t stream) {
  return with_type(call.dtype, [&](auto value) {
    return run_general<decltype(value)>(tables, device_tables, call, scratch, pooled, stream);
  });
}

}  // namespace stgp::cuda
