// Gradients in the fused form: windows are 2 x 2 at stride 2, and grids are 2 x 2 and shrunk by area. There is one
// launch for the summaries of each level, from the last, then one for the frames of x. gradients.cuh has the formulas.

#include "fused.cuh"
#include "gradients.cuh"

namespace stgp::cuda {
namespace {

// Limit of the registers of a thread: a multiprocessor has room for 16 warps, in blocks of a power of two of warps.
constexpr int FUSED_REGISTERS = 128;

// 1 / n for a cell of n = 1, 2 or 3 rows or columns. The constants save a division.
__device__ __forceinline__ float inverse(int32_t n) { return n == 3 ? 1.0f / 3.0f : n == 2 ? 0.5f : 1.0f; }

template <class T>
struct FusedGradients : FusedCall {
  Frames<const T> x;
  Distances distances;  // in x
  Frames<const T> grad;
  Frames<T> out;
  const T* scratch;          // thumbnails: (slots, h, w, C)
  float* summaries;          // gradients of summaries: (summaries, H, W, C)
  const int32_t* tables;     // base of the offsets of consumers
  const int32_t* entries;    // entries of this launch
  const int32_t* consumers;  // frames + summaries + 1 offsets
  int32_t frames;
};

// The gradients of the tokens of window (i, j) of an entry, which is also cell (i, j) of its thumbnail. Tokens and the
// gradient of the window are kept packed in registers, or loaded at each use where they would take too many.
template <class T, Access A, bool PLAIN, bool MOSAIC, bool HALO>
struct WindowGradient {
  using Parameters = FusedGradients<T>;
  using Rows = std::conditional_t<MOSAIC, MosaicRows<T>, FrameRows<T, A, Parameters>>;
  static constexpr bool KEEPS = A == Access::vector && PLAIN;
  static constexpr bool KEEPS_GRAD = KEEPS && sizeof(T) == 2;
  static constexpr int HELD = KEEPS ? VECS<T> : 1, GRADS = KEEPS_GRAD ? VECS<T> : 1, CELLS = HALO ? 4 : 1;
  static constexpr CacheHint HINT = MOSAIC || !KEEPS ? CacheHint::keep : CacheHint::stream;

  const Parameters& p;
  const Rows rows;
  const int32_t node, i, j;
  const T* of_window = nullptr;  // the gradient of the window, if the entry is pooled
  Vec tile[4][HELD] = {}, grad[GRADS] = {};
  float weights[4] = {}, slopes[4] = {}, norms[4] = {};

  __device__ __forceinline__ WindowGradient(const Parameters& p, const Rows& rows, int32_t node, int32_t i, int32_t j)
      : p(p), rows(rows), node(node), i(i), j(j) {}

  __device__ __forceinline__ Norm norm() const { return PLAIN ? Norm::l2 : p.norm; }
  __device__ __forceinline__ int32_t channel(int k) const { return first_channel<T>() + k * VEC_STEP<T>; }
  __device__ __forceinline__ bool taken(int q) const { return 2 * i + q / 2 < p.H && 2 * j + q % 2 < p.W; }
  // The number of channels of vec k, and of those that follow, that the norm runs over.
  __device__ __forceinline__ int32_t in_norm(int k) const { return PLAIN ? PER_VEC<T> : p.norm_channels - channel(k); }

  __device__ __forceinline__ void load(int k) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      tile[q][k % HELD] = Vec{};
      if (taken(q)) {
        tile[q][k % HELD] =
            load_vec<A, HINT>(rows.at(q / 2, q % 2), k * VEC_STEP<T>, p.C - first_channel<T>(), rows.channel());
      }
    }
  }

  __device__ __forceinline__ void load_grad(int k) {
    grad[k % GRADS] = load_vec<A, CacheHint::keep>(of_window, channel(k), p.C, p.grad.strides.channel);
  }

  // The number of channels of each token whose magnitude is its norm.
  __device__ __forceinline__ void count_largest(float (&largest)[4]) {
#pragma unroll HELD
    for (int k = 0; k < VECS<T>; ++k) {
      if constexpr (!KEEPS) load(k);
#pragma unroll
      for (int q = 0; q < 4; ++q) largest[q] = add_largest<T>(largest[q], tile[q][k % HELD], norms[q], in_norm(k));
    }
    join_block(Sum{}, largest, 0);
  }

  // Finds the norms and weights of the tokens, and the factors of dn / dt.
  __device__ __forceinline__ void find_slopes() {
    float dots[4] = {}, largest[4] = {};
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
        found[q].add(norm(), PLAIN ? vec : first_of_vec<T>(vec, in_norm(k)));
        dots[q] = add_dot<T>(dots[q], vec, grad[k % GRADS]);
      }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) norms[q] = found[q].of_thread(norm());
    const float own = finish_norm(norm(), join_lanes(Join{norm()}, norms, 0), p.inv_count);
    spread(own, norms);
    spread(weigh(own, taken(threadIdx.x % WARP / SHARERS), p.temperature), weights);
    join_block(Sum{}, dots, 1);
    if (norm() == Norm::max) count_largest(largest);
    float mean = 0.0f;
#pragma unroll
    for (int q = 0; q < 4; ++q) mean = taken(q) ? fmaf(weights[q], dots[q], mean) : mean;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float factor = p.temperature * weights[q] * (dots[q] - mean);
      slopes[q] = slope_of_token(norm(), factor, norms[q], p.inv_count, largest[q]);
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
  // this window.
  __device__ __forceinline__ void find_inverses(float (&inv_counts)[CELLS]) const {
    const bool odd_H = p.H % 2 == 1, odd_W = p.W % 2 == 1;
#pragma unroll
    for (int n = 0; n < CELLS; ++n) {
      const int32_t a = i + n / 2, b = j + n % 2;
      const int32_t height = min(2 * a + 2, p.H) - (odd_H ? max(2 * a - 1, 0) : 2 * a);
      const int32_t width = min(2 * b + 2, p.W) - (odd_W ? max(2 * b - 1, 0) : 2 * b);
      const bool reaches = (n / 2 == 0 || (odd_H && a < p.h)) && (n % 2 == 0 || (odd_W && b < p.w));
      inv_counts[n] = reaches ? inverse(height) * inverse(width) : 0.0f;
    }
  }

  // Sums the gradients of the cells over the summaries that show them, for the channels of a quad. `consumers` are two
  // offsets, of the first and behind the last.
  __device__ __forceinline__ void gather(const int32_t (&consumers)[2], const float (&inv_counts)[CELLS],
                                         int32_t channel, float (&cells)[CELLS][QUAD]) const {
#pragma unroll 1
    for (int32_t at = consumers[0]; at < consumers[1]; at += CONSUMER_WORDS) {
      const int32_t tile_number = p.tables[at + C_TILE];
      const int32_t row = tile_number / 2 * p.h + i, col = tile_number % 2 * p.w + j;
      const float* summary = p.summaries + static_cast<int64_t>(p.tables[at + C_SUMMARY]) * p.H * p.W * p.C;
#pragma unroll
      for (int n = 0; n < CELLS; ++n) {
        if (inv_counts[n] == 0.0f || row + n / 2 >= p.H || col + n % 2 >= p.W) continue;
        const float* from = summary + (static_cast<int64_t>(row + n / 2) * p.W + col + n % 2) * p.C;
        const Vec vec = load_vec<A, CacheHint::keep>(from, channel, p.C, 1);
#pragma unroll
        for (int e = 0; e < QUAD; ++e) cells[n][e] = fmaf(inv_counts[n], __uint_as_float(vec.word[e]), cells[n][e]);
      }
    }
  }

  // Computes the gradients of the tokens for the channels of a quad. Those of summaries are stored; those of frames
  // take the place of the tokens, which are not used again.
  __device__ __forceinline__ void finish(int k, int quad, const float (&cells)[CELLS][QUAD]) {
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
          const float of_norm =
              quad + n < in_norm(k) ? slope<false>(norm(), slopes[q], values[e], norms[q], 0.0f) : 0.0f;
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
        if constexpr (!MOSAIC) word = pack<T>(values);
      }
      if (MOSAIC && taken(q)) {
        const int64_t row = static_cast<int64_t>(~node) * p.H + 2 * i + q / 2;
        float* to = p.summaries + (row * p.W + 2 * j + q % 2) * p.C;
        store_vec<A, CacheHint::keep>(to, channel(k) + quad, p.C, 1, wide);
      }
    }
  }

  // Stores vec k of the gradients of the tokens of a frame.
  __device__ __forceinline__ void store(int k) const {
    T* out = p.out.frame(node);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (!taken(q)) continue;
      T* to = p.out.token(out, 2 * i + q / 2, 2 * j + q % 2);
      store_vec<A, CacheHint::stream>(to, channel(k), p.C, p.out.strides.channel, tile[q][k % HELD]);
    }
  }
};

// Stores the gradients of the tokens of a window of an entry. A block computes one window. PLAIN: the norm is that of p
// = 2 over all channels. MOSAIC: the entries are summaries, whose gradients are float32. HALO: H or W is odd, so that
// the second row and column of the window are also in the halo of other cells.
template <class T, Access A, bool PLAIN, bool MOSAIC, bool HALO>
__global__ void __maxnreg__(FUSED_REGISTERS) grid_pool_backward_kernel(const __grid_constant__ FusedGradients<T> p) {
  using Gradient = WindowGradient<T, A, PLAIN, MOSAIC, HALO>;
  const int32_t block = blockIdx.x, j = block % p.w, i = block / p.w % p.h;
  const int32_t* entry = p.entries + block / p.w / p.h * ENTRY_WORDS;
  const int32_t node = entry[E_NODE], target = entry[E_TARGET];
  const auto rows = [&] {
    if constexpr (MOSAIC) {
      return MosaicRows<T>(p.scratch, entry, p.h, p.w, p.C, i, j);
    } else {
      return FrameRows<T, A, FusedGradients<T>>(p, node, i, j);
    }
  }();
  Gradient gradient(p, rows, node, i, j);
  const bool pools = target >= 0 && i < p.OH && j < p.OW;
  if (pools) {
    gradient.of_window = p.grad.token(p.grad.frame(target), i, j);
    gradient.find_slopes();
  }
  float inv_counts[Gradient::CELLS];
  gradient.find_inverses(inv_counts);
  const int32_t* offsets = p.consumers + (MOSAIC ? p.frames + ~node : node);
  const int32_t consumers[2] = {offsets[0], offsets[1]};

#pragma unroll Gradient::HELD
  for (int k = 0; k < VECS<T>; ++k) {
    if (pools) {
      if constexpr (!Gradient::KEEPS) gradient.load(k);
      if constexpr (!Gradient::KEEPS_GRAD) gradient.load_grad(k);
    }
#pragma unroll
    for (int quad = 0; quad < PER_VEC<T>; quad += QUAD) {
      float cells[Gradient::CELLS][QUAD] = {};
      gradient.gather(consumers, inv_counts, gradient.channel(k) + quad, cells);
      gradient.finish(k, quad, cells);
    }
    if constexpr (!MOSAIC) gradient.store(k);
  }
}

// Kernels for any norm and for scalar access are compiled with a halo alone, which is right for all sizes.
template <class T, bool MOSAIC>
auto choose_fused_kernel(bool is_vector, bool plain, bool halo) -> void (*)(FusedGradients<T>) {
  if (!is_vector) return grid_pool_backward_kernel<T, Access::scalar, false, MOSAIC, true>;
  if (!plain) return grid_pool_backward_kernel<T, Access::vector, false, MOSAIC, true>;
  return halo ? grid_pool_backward_kernel<T, Access::vector, true, MOSAIC, true>
              : grid_pool_backward_kernel<T, Access::vector, true, MOSAIC, false>;
}

template <class T>
cudaError_t run_fused(const int32_t* tables, const int32_t* device_tables, const Call& call,
                      const GradientScratch& scratch, cudaStream_t stream) {
  FusedGradients<T> p{};
  static_cast<FusedCall&>(p) = fused_call(tables, call);
  p.x = frames_of_x<T>(call);
  p.distances = Distances(call.x_strides, sizeof(T));
  p.grad = {static_cast<const T*>(call.grad), call.grad_strides, Divisor(call.T)};
  p.out = frames_of_out<T>(call);
  p.scratch = static_cast<const T*>(call.scratch);
  p.summaries = scratch.summaries;
  p.tables = device_tables;
  p.consumers = device_tables + tables[tables[H_GRADIENT] + G_CONSUMERS];
  p.frames = tables[H_FRAMES];

  const bool halo = p.H % 2 == 1 || p.W % 2 == 1, plain = p.norm == Norm::l2 && p.norm_channels == p.C;
  const bool is_vector = all_vectorized(tables, call, true) && p.norm_channels % PER_VEC<T> == 0;
  const int32_t threads = block_threads(p.C, sizeof(float));
  const int64_t windows = static_cast<int64_t>(p.h) * p.w;
  for (int32_t stage = tables[H_NUM_STAGES] - 1; stage >= 0; --stage) {
    const int32_t* s = tables + tables[H_STAGES] + stage * STAGE_WORDS;
    const auto kernel = s[S_MOSAIC] != 0 ? choose_fused_kernel<T, true>(is_vector, plain, halo)
                                         : choose_fused_kernel<T, false>(is_vector, plain, halo);
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

}  // namespace stgp::cuda
