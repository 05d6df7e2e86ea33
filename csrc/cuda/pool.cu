// Pooling in the general form: windows have any size and position, and read frames of x or summaries.

#include "norms.cuh"

namespace stgp::cuda {
namespace {

constexpr int32_t WEIGHTS = 256;  // limit of the weights of a window that are in shared memory at the same time

using Weights = float[WEIGHTS];

__device__ __forceinline__ Weights& shared_weights() {
  static __shared__ Weights weights;
  return weights;
}

template <class T>
struct Windows {
  Nodes<T> nodes;
  Frames<T> out;
  const int32_t* final;
  const int32_t* rows;  // window rows: OH starts, then OH counts
  const int32_t* cols;  // window cols: OW starts, then OW counts
  const float* norms;   // (frames, H, W)
  int32_t OH, OW;
  int32_t chunks;  // number of blocks that share the channels of a window
  int32_t first;   // first frame of this launch
  float temperature;
};

// out[t, i, j] = sum of a[r, c] * x[t, r, c] over window (i, j), where a = softmax(temperature * norm) over the window
//
// A block computes one window; if a token has more than MAX_CHANNELS channels, it computes one chunk of them. The
// softmax includes positions in the padding, which have norm 0 and no token.
template <class T, Access A>
__global__ void __launch_bounds__(MAX_THREADS) norm_pool_kernel(const __grid_constant__ Windows<T> p) {
  Weights& weights = shared_weights();
  const int32_t H = p.nodes.H, W = p.nodes.W, C = p.nodes.C;
  int32_t block = blockIdx.x;
  const int32_t chunk = block % p.chunks;
  block /= p.chunks;
  const int32_t j = block % p.OW, i = block / p.OW % p.OH, frame = p.first + block / p.OW / p.OH;
  const int32_t top = p.rows[i], left = p.cols[j], width = p.cols[p.OW + j];
  const int64_t size = static_cast<int64_t>(p.rows[p.OH + i]) * width;
  const int32_t node = p.final[frame];
  const float* norms = p.norms + static_cast<int64_t>(frame) * H * W;

  const auto in_frame = [&](int32_t row, int32_t col) { return row >= 0 && row < H && col >= 0 && col < W; };
  const auto logit_of = [&](int64_t n) {
    const int32_t row = top + static_cast<int32_t>(n / width), col = left + static_cast<int32_t>(n % width);
    return logit(p.temperature, in_frame(row, col) ? norms[static_cast<int64_t>(row) * W + col] : 0.0f);
  };

  // The maximum may lose a NaN. The sum does not.
  float highest[1] = {-INFINITY}, total[1] = {};
  for (int64_t n = threadIdx.x; n < size; n += blockDim.x) highest[0] = fmaxf(highest[0], logit_of(n));
  join_block(Highest{}, highest, 0);
  for (int64_t n = threadIdx.x; n < size; n += blockDim.x) total[0] += power_of_e(logit_of(n) - highest[0]);
  join_block(Sum{}, total, 1);

  const int32_t start = chunk * blockDim.x * THREAD_CHANNELS + first_channel<T>();
  float sum[VECS<T>][PER_VEC<T>] = {};
  for (int64_t from = 0; from < size; from += WEIGHTS) {
    const int32_t count = static_cast<int32_t>(min(size - from, static_cast<int64_t>(WEIGHTS)));
    __syncthreads();
    for (int32_t n = threadIdx.x; n < count; n += blockDim.x) {
      weights[n] = divide_by_total(power_of_e(logit_of(from + n) - highest[0]), total[0]);
    }
    __syncthreads();
#pragma unroll 2  // more copies would take more registers than there are
    for (int32_t n = 0; n < count; ++n) {
      const int32_t row = top + static_cast<int32_t>((from + n) / width);
      const int32_t col = left + static_cast<int32_t>((from + n) % width);
      if (!in_frame(row, col)) continue;  // padding
      int64_t stride;
      const T* token = p.nodes.token(node, row, col, &stride);
#pragma unroll
      for (int k = 0; k < VECS<T>; ++k) {
        const int32_t channel = start + k * VEC_STEP<T>;
        const Vec vec = load_vec<A, CacheHint::keep>(token, channel, C, stride);
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
          float values[PER_WORD<T>];
          unpack<T>(vec.word[w], values);
#pragma unroll
          for (int e = 0; e < PER_WORD<T>; ++e) {
            float& of_channel = sum[k][w * PER_WORD<T> + e];
            of_channel = fmaf(weights[n], values[e], of_channel);
          }
        }
      }
    }
  }

  T* to = p.out.token(p.out.frame(frame), i, j);
#pragma unroll
  for (int k = 0; k < VECS<T>; ++k) {
    store_vec<A, CacheHint::stream>(to, start + k * VEC_STEP<T>, C, p.out.strides.channel, pack_vec<T>(sum[k]));
  }
}

template <class T>
cudaError_t pool(const int32_t* tables, const int32_t* device_tables, const Call& call, const float* norms,
                 cudaStream_t stream) {
  Windows<T> p{};
  p.nodes = {frames_of_x<T>(call), static_cast<const T*>(call.scratch), tables[H_HEIGHT], tables[H_WIDTH],
             static_cast<int32_t>(call.C)};
  p.out = frames_of_out<T>(call);
  p.final = device_tables + tables[H_OUTPUTS];
  p.rows = device_tables + tables[H_WINDOW_ROWS];
  p.cols = device_tables + tables[H_WINDOW_COLS];
  p.norms = norms;
  p.OH = tables[H_OUT_ROWS];
  p.OW = tables[H_OUT_COLS];
  p.temperature = call.temperature;

  const int32_t threads = block_threads(call.C, sizeof(T));
  p.chunks = static_cast<int32_t>((call.C + threads * THREAD_CHANNELS - 1) / (threads * THREAD_CHANNELS));
  const auto kernel = is_vectorized(tables, call, p.OH, p.OW) ? norm_pool_kernel<T, Access::vector>
                                                              : norm_pool_kernel<T, Access::scalar>;
  const int64_t blocks = product({p.OH, p.OW, p.chunks});
  return launch_in_ranges(tables[H_FRAMES], blocks, [&](int32_t first, int32_t range) {
    p.first = first;
    return launch(kernel, range * blocks, threads, stream, p);
  });
}

}  // namespace

cudaError_t pool_windows(const int32_t* tables, const int32_t* device_tables, const Call& call, float* norms,
                         cudaStream_t stream) {
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH];
  const Strides strides{call.T * H * W, H * W, W, 1, 1};
  const cudaError_t error = find_norms(tables[H_FRAMES], tables[H_HEIGHT], tables[H_WIDTH], call,
                                       device_tables + tables[H_OUTPUTS], norms, strides, false, stream);
  if (error != cudaSuccess) return error;
  return with_type(call.dtype,
                   [&](auto value) { return pool<decltype(value)>(tables, device_tables, call, norms, stream); });
}

}  // namespace stgp::cuda
