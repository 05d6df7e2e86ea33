// grid_pool in the fused form: windows are 2 x 2 at stride 2, and grids are 2 x 2 and shrunk by area. Each token is
// read once, except tokens of the halo.
//
// Summaries are mosaics of thumbnails. The thumbnail of a node is the node average-pooled to h x w = ceil(H / 2) x
// ceil(W / 2) cells, for every level. Cell (i, j) averages rows 2i, 2i + 1 and columns 2j, 2j + 1, which are also
// window (i, j). Its halo is row 2i - 1 if H is odd, and column 2j - 1 if W is odd.
//
// Each stage of the tables is one launch: first the frames of x, then the summaries of each level.

#include "fused.cuh"

namespace stgp::cuda {
namespace {

// The number of cells or windows in a row that a block walks, if no column is carried and Call::cells is 0. In a walk,
// the next cell is loaded while the block computes the current one; shorter walks balance the load better. This choice
// has not been measured.
constexpr int32_t CELLS = 4;

// Limit of the registers of a thread. A multiprocessor has room for 24 warps with 80 registers, for 16 with 128.
template <class T, Access A, bool PART>
constexpr int REGISTERS = sizeof(T) == 2 && A == Access::vector && !PART ? 80 : 128;

template <class T>
struct Fused {
  Frames<const T> x;
  Frames<T> out;
  T* scratch;                     // thumbnails: (slots, h, w, C)
  const int32_t* tables;          // base of the offsets in entries
  const int32_t* entries;         // entries of this launch
  int32_t walked;                 // number of entries with a thumbnail; they come first
  int32_t cells, spans;           // for entries with a thumbnail: cells of a block, and blocks of a row
  int32_t windows, window_spans;  // for the other entries: windows of a block, and blocks of a row
  int32_t H, W, h, w, OH, OW, C;
  bool pools;  // whether windows are pooled; else only thumbnails are stored
  Norm norm;
  float inv_count, temperature;
  int32_t norm_channels, norm_threads;  // channels that the norm runs over, and threads of a block for them alone
};

// Returns whether a block computes more than one cell or window.
__host__ __device__ constexpr bool walks(Access access, bool mosaic) { return access == Access::vector && !mosaic; }

// Adds the channels of a word to sums.
template <class T>
__device__ __forceinline__ void add_word(float (&sums)[PER_WORD<T>], uint32_t word) {
  float values[PER_WORD<T>];
  unpack<T>(word, values);
#pragma unroll
  for (int e = 0; e < PER_WORD<T>; ++e) sums[e] += values[e];
}

// out[t, i, j] = sum of a[r, c] * x[t, r, c] over window (i, j), where a = softmax(temperature * norm) over the window
// thumbnail[t, i, j] = mean of x[t, r, c] over cell (i, j)
//
// MOSAIC: the entries are summaries. HALO: H or W is odd, so that cells have a halo.
//
// A block walks: it computes neighbouring cells of one row of one entry, from left to right. A vec of the next cell is
// loaded as soon as its registers are free. If W is odd, the sum of a cell's last column is carried to the next cell; a
// walk is then a whole row, unless Call::cells cuts it, so that no column is read twice. For mosaics and for scalar
// access a block computes one cell.
//
// PART: the norm runs over some of the channels. They are loaded once more for it, in the order of a call on them alone.
template <class T, Access A, bool L2_NORM, bool MOSAIC, bool HALO, bool PART>
__global__ void __maxnreg__((REGISTERS<T, A, PART>)) grid_pool_kernel(const __grid_constant__ Fused<T> p) {
  constexpr bool WALKS = walks(A, MOSAIC), CARRIES = HALO && WALKS;
  // The tokens of a window are kept in registers, or else loaded at each use. With scalar access they
  // would take too many registers, and so would 32-bit mosaics, which are in the L2 cache.
  constexpr bool KEEPS = A == Access::vector && (sizeof(T) == 2 || !MOSAIC);
  constexpr int HELD = KEEPS ? VECS<T> : 1;
  constexpr int ABOVE = HALO ? 2 : 0, BESIDE = HALO && !WALKS ? 3 : 0;  // number of tokens of the halo that are loaded
  constexpr CacheHint HINT = MOSAIC ? CacheHint::keep : CacheHint::stream;
  const Norm norm = L2_NORM ? Norm::l2 : p.norm;

  int32_t block = blockIdx.x;
  const bool walked = block < p.walked * p.h * p.spans;
  if (!walked) block -= p.walked * p.h * p.spans;
  const int32_t spans = walked ? p.spans : p.window_spans, rows = walked ? p.h : p.OH;
  const int32_t cells = walked ? p.cells : p.windows;
  const int32_t i = block / spans % rows, first = block % spans * cells;
  const int32_t* entry = p.entries + (block / (spans * rows) + (walked ? 0 : p.walked)) * ENTRY_WORDS;
  const int32_t target = p.pools ? entry[E_TARGET] : -1, live = p.tables[entry[E_LIVE] + i];
  const bool pooled = target >= 0 && i < p.OH;
  const int32_t stop = min(max(live, pooled ? p.OW : 0), first + cells);
  if (first >= stop) return;

  const Image<T, MOSAIC, Fused<T>> image(p, entry);
  const int64_t x_channel = MOSAIC ? 1 : p.x.strides.channel;
  const bool odd_W = p.W % 2 == 1, over = HALO && p.H % 2 == 1 && i > 0;
  const int32_t top = over ? 2 * i - 1 : 2 * i, bottom = min(2 * i + 2, p.H);

  const auto channel = [&](int k) { return static_cast<int32_t>((k * blockDim.x + threadIdx.x) * PER_VEC<T>); };
  const auto taken = [&](int32_t j, int q) { return 2 * i + q / 2 < p.H && 2 * j + q % 2 < p.W; };
  const auto load = [&](int32_t row, int32_t col, bool wanted, int k) {
    return wanted ? load_vec<A, HINT>(image.token(row, col), channel(k), p.C, x_channel) : Vec{};
  };

  Vec tile[4][HELD];        // the tokens of a window, row-major
  const T* walk = nullptr;  // in a walk, the first token of the window; adding a stride is less work than an address
  if constexpr (WALKS) walk = image.token(2 * i, 2 * first);
  const auto load_beside = [&](int row, int col, bool wanted, int k) {
    const T* token = walk + row * p.x.strides.row + col * p.x.strides.col;
    return wanted ? load_vec<A, HINT>(token, channel(k), p.C, 1) : Vec{};
  };
  const auto load_tile = [&](int32_t j, int k) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const bool wanted = j < stop && taken(j, q);
      tile[q][k % HELD] = WALKS ? load_beside(q / 2, q % 2, wanted, k) : load(2 * i + q / 2, 2 * j + q % 2, wanted, k);
    }
  };
  const auto load_tiles = [&](int32_t j) {
#pragma unroll
    for (int k = 0; k < HELD; ++k) load_tile(j, k);
  };
  // Carried sums of four channels of this thread. They are in shared memory, because registers have no room for them.
  const auto carried = [&](int four) -> float4& { return dynamic_shared_memory[four * blockDim.x + threadIdx.x]; };
  if constexpr (CARRIES) {
    // A walk that starts inside a row first sums the column that a walk from the left would have carried.
    const bool beside = odd_W && first > 0 && first < live;
    for (int k = 0; k < VECS<T>; ++k) {
      float sums[PER_VEC<T>] = {};
      for (int32_t row = top; beside && row < bottom; ++row) {
        const Vec vec = load(row, 2 * first - 1, true, k);
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
          float values[PER_WORD<T>];
          unpack<T>(vec.word[w], values);
#pragma unroll
          for (int e = 0; e < PER_WORD<T>; ++e) sums[w * PER_WORD<T> + e] += values[e];
        }
      }
#pragma unroll
      for (int n = 0; n < PER_VEC<T>; n += 4) {
        carried((k * PER_VEC<T> + n) / 4) = float4{sums[n], sums[n + 1], sums[n + 2], sums[n + 3]};
      }
    }
  }
  if constexpr (KEEPS) load_tiles(first);

  T* pooled_token = pooled ? p.out.token(p.out.frame(target), i, first) : p.out.base;
  T* cell = p.scratch;  // scratch is nullptr if there are no thumbnails
  if (MOSAIC || live > 0) cell += ((static_cast<int64_t>(entry[E_SLOT]) * p.h + i) * p.w + first) * p.C;
  for (int32_t j = first; j < stop; ++j) {
    const bool pools = pooled && j < p.OW, shrinks = j < live;
    float weights[4] = {};
    if (pools) {
      float norms[4] = {};
      if constexpr (PART) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          if (!taken(j, q)) continue;
          const T* token = image.token(2 * i + q / 2, 2 * j + q % 2);
          norms[q] = add_channels<T, A>(norm, token, p.norm_channels, x_channel, p.norm_threads);
        }
      } else {
#pragma unroll HELD
        for (int k = 0; k < VECS<T>; ++k) {
          if constexpr (!KEEPS) load_tile(j, k);
#pragma unroll
          for (int q = 0; q < 4; ++q) norms[q] = add_vec<T>(norm, norms[q], tile[q][k % HELD]);
        }
      }
      join_block(Join{norm}, norms, j % 2);
#pragma unroll
      for (int q = 0; q < 4; ++q) norms[q] = finish_norm(norm, norms[q], p.inv_count);
      const bool window[4] = {taken(j, 0), taken(j, 1), taken(j, 2), taken(j, 3)};
      weigh(norms, window, p.temperature, weights);
      if constexpr (KEEPS) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
#pragma unroll
          for (int k = 0; k < HELD; ++k) keep_packed(tile[q][k]);
        }
      }
    }

    const int32_t width = min(2 * j + 2, p.W) - (odd_W ? max(2 * j - 1, 0) : 2 * j);
    const float inv_count = inverse(bottom - top) * inverse(width);
#pragma unroll HELD
    for (int k = 0; k < VECS<T>; ++k) {
      if constexpr (!KEEPS) load_tile(j, k);
      if (pools) {
        Vec result;
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
          float sum[PER_WORD<T>] = {};
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            float values[PER_WORD<T>];
            unpack<T>(tile[q][k % HELD].word[w], values);
#pragma unroll
            for (int e = 0; e < PER_WORD<T>; ++e) sum[e] = fmaf(weights[q], values[e], sum[e]);
          }
          result.word[w] = pack<T>(sum);
        }
        store_vec<A, CacheHint::stream>(pooled_token, channel(k), p.C, p.out.strides.channel, result);
      }
      if (shrinks) {
        [[maybe_unused]] Vec above[2], beside[3];
#pragma unroll
        for (int n = 0; n < ABOVE; ++n) {
          const bool wanted = over && 2 * j + n < p.W;
          above[n] = WALKS ? load_beside(-1, n, wanted, k) : load(2 * i - 1, 2 * j + n, wanted, k);
        }
#pragma unroll
        for (int n = 0; n < BESIDE; ++n) {
          const int32_t row = 2 * i - 1 + n;
          beside[n] = load(row, 2 * j - 1, odd_W && j > 0 && row >= top && row < bottom, k);
        }
        Vec result;
        float lasts[PER_VEC<T>];  // sums over the last column of the cell
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
          float left[PER_WORD<T>] = {}, right[PER_WORD<T>] = {}, before[PER_WORD<T>] = {};
          if constexpr (ABOVE > 0) {
            add_word<T>(left, above[0].word[w]);
            add_word<T>(right, above[1].word[w]);
          }
          add_word<T>(left, tile[0][k % HELD].word[w]);
          add_word<T>(left, tile[2][k % HELD].word[w]);
          add_word<T>(right, tile[1][k % HELD].word[w]);
          add_word<T>(right, tile[3][k % HELD].word[w]);
#pragma unroll
          for (int n = 0; n < BESIDE; ++n) add_word<T>(before, beside[n].word[w]);
          float mean[PER_WORD<T>];
#pragma unroll
          for (int e = 0; e < PER_WORD<T>; ++e) {
            const int n = w * PER_WORD<T> + e;
            if constexpr (CARRIES)
              before[e] = reinterpret_cast<const float*>(&carried((k * PER_VEC<T> + n) / 4))[n % 4];
            lasts[n] = right[e];
            mean[e] = ((before[e] + left[e]) + right[e]) * inv_count;
          }
          result.word[w] = pack<T>(mean);
        }
        if constexpr (CARRIES) {
          if (odd_W) {
#pragma unroll
            for (int n = 0; n < PER_VEC<T>; n += 4) {
              carried((k * PER_VEC<T> + n) / 4) = float4{lasts[n], lasts[n + 1], lasts[n + 2], lasts[n + 3]};
            }
          }
        }
        store_vec<A, CacheHint::keep>(cell, channel(k), p.C, 1, result);
      }
      if constexpr (WALKS) {
        walk += 2 * p.x.strides.col;
        load_tile(j + 1, k);
        walk -= 2 * p.x.strides.col;
      }
    }
    if constexpr (WALKS) {
      walk += 2 * p.x.strides.col;
      pooled_token += p.out.strides.col;
      if (shrinks) cell += p.C;
    }
  }
}

template <class T, Access A, bool MOSAIC>
auto choose_kernel(bool halo, const Fused<T>& p) -> void (*)(Fused<T>) {
  if (p.norm_channels < p.C) return grid_pool_kernel<T, A, false, MOSAIC, true, true>;
  if constexpr (A == Access::vector) {
    if (p.norm == Norm::l2) {
      return halo ? grid_pool_kernel<T, A, true, MOSAIC, true, false>
                  : grid_pool_kernel<T, A, true, MOSAIC, false, false>;
    }
  }
  return grid_pool_kernel<T, A, false, MOSAIC, true, false>;
}

template <class T>
cudaError_t pool(const int32_t* tables, const int32_t* device_tables, const Call& call, bool pools,
                 cudaStream_t stream) {
  Fused<T> p{};
  p.x = frames_of_x<T>(call);
  p.out = frames_of_out<T>(call);
  p.scratch = static_cast<T*>(call.thumbnails != nullptr ? call.thumbnails : call.scratch);
  p.tables = device_tables;
  p.H = tables[H_HEIGHT];
  p.W = tables[H_WIDTH];
  p.h = (p.H + 1) / 2;
  p.w = (p.W + 1) / 2;
  p.OH = tables[H_OUT_ROWS];
  p.OW = tables[H_OUT_COLS];
  p.C = static_cast<int32_t>(call.C);
  p.pools = pools;
  p.norm = norm_kind(call.norm_type);
  p.inv_count = inv_count_of_norm(call);
  p.temperature = call.temperature;
  p.norm_channels = static_cast<int32_t>(channels_of_norm(call));
  p.norm_threads = block_threads(p.norm_channels, sizeof(T));

  // Kernels for every norm are compiled with a halo alone, and carry sums whether there is one or not.
  const bool halo = p.H % 2 == 1 || p.W % 2 == 1 || p.norm != Norm::l2 || p.norm_channels < p.C;
  const bool is_vector = is_vectorized(tables, call, p.OH, p.OW) && p.norm_channels % PER_VEC<T> == 0;
  const int32_t threads = block_threads(p.C, sizeof(T));
  for (int32_t stage = 0; stage < tables[H_NUM_STAGES]; ++stage) {
    const int32_t* s = tables + tables[H_STAGES] + stage * STAGE_WORDS;
    const bool mosaic = s[S_MOSAIC] != 0;
    const bool walks_rows = walks(is_vector ? Access::vector : Access::scalar, mosaic);
    p.windows = !walks_rows ? 1 : call.cells > 0 ? call.cells : CELLS;
    p.cells = walks_rows && call.cells <= 0 && p.W % 2 == 1 ? p.w : p.windows;
    p.spans = (p.w + p.cells - 1) / p.cells;
    p.window_spans = (p.OW + p.windows - 1) / p.windows;
    const int64_t walk = static_cast<int64_t>(p.h) * p.spans, pool = static_cast<int64_t>(p.OH) * p.window_spans;
    const auto kernel = mosaic ? (is_vector ? choose_kernel<T, Access::vector, true>(halo, p)
                                            : choose_kernel<T, Access::scalar, true>(halo, p))
                               : (is_vector ? choose_kernel<T, Access::vector, false>(halo, p)
                                            : choose_kernel<T, Access::scalar, false>(halo, p));
    const int64_t shared = halo && walks_rows ? threads * THREAD_CHANNELS * sizeof(float) : 0;
    const int32_t count = s[S_COUNT], all_walked = s[S_SHRUNK];
    const cudaError_t error = launch_in_ranges(count, std::max(walk, pool), [&](int32_t first, int32_t range) {
      p.entries = device_tables + s[S_ENTRIES] + first * ENTRY_WORDS;
      p.walked = std::clamp(all_walked - first, 0, range);
      const int64_t others = pools ? range - p.walked : 0;
      return launch(kernel, p.walked * walk + others * pool, threads, stream, p, shared);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t pool_fused(const int32_t* tables, const int32_t* device_tables, const Call& call, bool pools,
                       cudaStream_t stream) {
  return with_type(call.dtype,
                   [&](auto value) { return pool<decltype(value)>(tables, device_tables, call, pools, stream); });
}

}  // namespace stgp::cuda
