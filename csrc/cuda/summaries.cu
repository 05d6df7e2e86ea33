// temporal_grid, for any grids and both kinds of resize: the summaries of every level in full, then the output frames.

#include "launch.cuh"

namespace stgp::cuda {
namespace {

constexpr int32_t THREADS = 128;  // limit of the threads of a block

// The number of threads of a block that moves a token.
inline int32_t threads_for(int64_t C, int64_t bytes) {
  const int64_t is_vector = (C * bytes + VEC_BYTES - 1) / VEC_BYTES;
  return static_cast<int32_t>(std::min<int64_t>((is_vector + WARP - 1) / WARP * WARP, THREADS));
}

template <class T>
struct Summaries {
  Nodes<T> nodes;
  T* summaries;
  const int32_t* sources;   // for each summary of the level, rows x cols nodes
  const int32_t* row_runs;  // H starts, then H counts
  const int32_t* col_runs;  // W starts, then W counts
  int32_t first;            // first summary of this launch
  int32_t first_of_level;   // first summary of the level
  int32_t rows, cols;       // rows and columns of the grid
};

// summaries[s, r, c] = mean of the mosaic of s over a run of rows and a run of columns. A block computes one token.
//
// Each column is summed from top to bottom, then the sums are added from left to right. fused.cu adds in the same
// order, so that both give the same bits.
template <class T, Access A>
__global__ void __launch_bounds__(THREADS) summary_kernel(const __grid_constant__ Summaries<T> p) {
  const int32_t H = p.nodes.H, W = p.nodes.W, C = p.nodes.C;
  const int32_t block = blockIdx.x, c = block % W, r = block / W % H, s = p.first + block / W / H;
  const int32_t top = p.row_runs[r], height = p.row_runs[H + r], left = p.col_runs[c], width = p.col_runs[W + c];
  const int32_t* sources = p.sources + static_cast<int64_t>(s - p.first_of_level) * p.rows * p.cols;
  const float inv_count = __fdiv_rn(1.0f, static_cast<float>(height)) * __fdiv_rn(1.0f, static_cast<float>(width));
  T* summary = p.summaries + ((static_cast<int64_t>(s) * H + r) * W + c) * C;

  for (int32_t channel = threadIdx.x * PER_VEC<T>; channel < C; channel += blockDim.x * PER_VEC<T>) {
    float total[PER_VEC<T>] = {};
    for (int32_t col = left; col < left + width; ++col) {
      float column[PER_VEC<T>] = {};
      for (int32_t row = top; row < top + height; ++row) {
        int64_t stride;
        const T* token = p.nodes.token(sources[row / H * p.cols + col / W], row % H, col % W, &stride);
        const Vec vec = load_vec<A, CacheHint::keep>(token, channel, C, stride);
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
          float values[PER_WORD<T>];
          unpack<T>(vec.word[w], values);
#pragma unroll
          for (int e = 0; e < PER_WORD<T>; ++e) column[w * PER_WORD<T> + e] += values[e];
        }
      }
#pragma unroll
      for (int e = 0; e < PER_VEC<T>; ++e) total[e] += column[e];
    }
#pragma unroll
    for (int e = 0; e < PER_VEC<T>; ++e) total[e] *= inv_count;
    store_vec<A, CacheHint::keep>(summary, channel, C, 1, pack_vec<T>(total));
  }
}

template <class T>
struct Final {
  Nodes<T> nodes;
  Frames<T> out;
  const int32_t* final;
  int32_t first;  // first frame of this launch
};

// out[t, r, c] = token (r, c) of the node of output frame t. A block copies one token.
template <class T, Access A>
__global__ void __launch_bounds__(THREADS) final_frames_kernel(const __grid_constant__ Final<T> p) {
  const int32_t H = p.nodes.H, W = p.nodes.W, C = p.nodes.C;
  const int32_t block = blockIdx.x, col = block % W, row = block / W % H, frame = p.first + block / W / H;
  int64_t stride;
  const T* from = p.nodes.token(p.final[frame], row, col, &stride);
  T* to = p.out.token(p.out.frame(frame), row, col);
  for (int32_t channel = threadIdx.x * PER_VEC<T>; channel < C; channel += blockDim.x * PER_VEC<T>) {
    store_vec<A, CacheHint::stream>(to, channel, C, p.out.strides.channel,
                                    load_vec<A, CacheHint::stream>(from, channel, C, stride));
  }
}

template <class T>
Nodes<T> nodes_of(const int32_t* tables, const Call& call) {
  return {frames_of_x<T>(call), static_cast<const T*>(call.scratch), tables[H_HEIGHT], tables[H_WIDTH],
          static_cast<int32_t>(call.C)};
}

template <class T>
cudaError_t summarize(const int32_t* tables, const int32_t* device_tables, const Call& call, cudaStream_t stream) {
  Summaries<T> p{};
  p.nodes = nodes_of<T>(tables, call);
  p.summaries = static_cast<T*>(call.scratch);
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH];
  const bool is_vector =
      is_vectorized(call.x, call.x_strides, tables[H_FRAMES] / call.T, call.T, H, W, call.C, sizeof(T));
  const auto kernel = is_vector ? summary_kernel<T, Access::vector> : summary_kernel<T, Access::scalar>;
  for (int32_t number = 0; number < tables[H_NUM_LEVELS]; ++number) {
    const int32_t* level = tables + tables[H_LEVELS] + number * LEVEL_WORDS;
    p.sources = device_tables + level[L_SOURCES];
    p.row_runs = device_tables + level[L_ROW_RUNS];
    p.col_runs = device_tables + level[L_COL_RUNS];
    p.first_of_level = level[L_FIRST];
    p.rows = level[L_ROWS];
    p.cols = level[L_COLS];
    const cudaError_t error = launch_in_ranges(level[L_COUNT], H * W, [&](int32_t first, int32_t range) {
      p.first = level[L_FIRST] + first;
      return launch(kernel, range * H * W, threads_for(call.C, sizeof(T)), stream, p);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T>
cudaError_t copy(const int32_t* tables, const int32_t* device_tables, const Call& call, cudaStream_t stream) {
  Final<T> p{};
  p.nodes = nodes_of<T>(tables, call);
  p.out = frames_of_out<T>(call);
  p.final = device_tables + tables[H_OUTPUTS];
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH];
  const auto kernel = is_vectorized(tables, call, H, W) ? final_frames_kernel<T, Access::vector>
                                                        : final_frames_kernel<T, Access::scalar>;
  return launch_in_ranges(tables[H_FRAMES], H * W, [&](int32_t first, int32_t range) {
    p.first = first;
    return launch(kernel, range * H * W, threads_for(call.C, sizeof(T)), stream, p);
  });
}

}  // namespace

cudaError_t make_summaries(const int32_t* tables, const int32_t* device_tables, const Call& call, cudaStream_t stream) {
  return with_type(call.dtype,
                   [&](auto value) { return summarize<decltype(value)>(tables, device_tables, call, stream); });
}

cudaError_t copy_final(const int32_t* tables, const int32_t* device_tables, const Call& call, cudaStream_t stream) {
  return with_type(call.dtype, [&](auto value) { return copy<decltype(value)>(tables, device_tables, call, stream); });
}

}  // namespace stgp::cuda
