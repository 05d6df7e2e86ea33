// grid_pool in the fused form: windows are 2 x 2 at stride 2, and grids are 2 x 2 and shrunk by area. Each token is
// read once, except tokens of the halo.
//
// Summaries are mosaics of thumbnails. The thumbnail of a node is the node average-pooled to h x w = ceil(H / 2) x
// ceil(W / 2) cells, for every level. Cell (i, j) averages rows 2i, 2i + 1 and columns 2j, 2j + 1, which are also
// window (i, j). Its halo is row 2i - 1 if H is odd, and column 2j - 1 if W is odd.
//
// Each stage of the tables is one launch: first the frames of x, then the summaries of each level. Blocks of a launch
// walk rows of its nodes; others pool windows of frames that have no thumbnail, which may run in any launch: they keep
// memory busy beside the few blocks of a level.

#include "rows.cuh"
#include "windows.cuh"

namespace stgp::cuda {
namespace {

// Limit of the cells or windows that a block computes one after another where that carries nothing. It balances what a
// block does once against the time of the last blocks. This choice has not been measured.
constexpr int32_t CELLS = 7;

// Limit of the registers of a thread.
template <class T, Access A, bool PLAIN>
constexpr int REGISTERS = sizeof(T) == 2 && A == Access::vector && PLAIN ? 80 : 128;

// The number of warps that a multiprocessor has room for, with this many registers a thread: a multiple of 8.
constexpr int32_t resident_warps(int registers) { return 65536 / (WARP * registers) / 4 * 4; }

// Blocks that walk rows of frames come first, since they take longest.
template <class T, Access A, bool PLAIN, bool HALO>
__global__ void __maxnreg__((REGISTERS<T, A, PLAIN>)) frames_kernel(const __grid_constant__ Fused<T> p) {
  allow_next_launch();
  const int32_t block = blockIdx.x;
  if (block < p.walk_blocks) {
    const Spans::Place place = p.of_walks.place(block);
    const int32_t i = place.row, first = place.first;
    const int32_t* entry = p.walked + place.entry * ENTRY_WORDS;
    walk_row<T, A, PLAIN, HALO>(p, entry, i, first, [&] { return FrameRows<T, A>(p, entry[E_NODE], i, first); });
  } else {
    pool_windows<T, A, PLAIN>(p, block - p.walk_blocks);
    wait_for_launch_before();
  }
}

// Blocks that pool windows come first: they can start while the launch before is running.
template <class T, Access A, bool PLAIN, bool HALO>
__global__ void __maxnreg__((REGISTERS<T, A, PLAIN>)) level_kernel(const __grid_constant__ Fused<T> p) {
  allow_next_launch();
  const int32_t block = static_cast<int32_t>(blockIdx.x) - p.window_blocks;
  if (block >= 0) {
    const Spans::Place place = p.of_walks.place(block);
    const int32_t i = place.row, first = place.first;
    const int32_t* entry = p.walked + place.entry * ENTRY_WORDS;
    walk_row<T, A, PLAIN, HALO>(p, entry, i, first,
                                [&] { return MosaicRows<T>(p.scratch, entry, p.h, p.w, p.C, i, first); });
  } else {
    pool_windows<T, A, PLAIN>(p, blockIdx.x);
    wait_for_launch_before();
  }
}

template <class T, Access A, bool PLAIN>
__global__ void __maxnreg__((REGISTERS<T, A, PLAIN>)) windows_kernel(const __grid_constant__ Fused<T> p) {
  allow_next_launch();
  pool_windows<T, A, PLAIN>(p, blockIdx.x);
  wait_for_launch_before();
}

template <class T>
struct Kernels {
  void (*frames)(Fused<T>);
  void (*level)(Fused<T>);
  void (*windows)(Fused<T>);
  int32_t registers;
};

template <class T, Access A, bool PLAIN, bool HALO>
Kernels<T> kernels() {
  return {frames_kernel<T, A, PLAIN, HALO>, level_kernel<T, A, PLAIN, HALO>, windows_kernel<T, A, PLAIN>,
          REGISTERS<T, A, PLAIN>};
}

// Kernels for any norm and for scalar access are compiled with a halo alone, which is right for all sizes.
template <class T>
Kernels<T> choose_kernels(bool is_vector, bool plain, bool halo) {
  if (!is_vector) return kernels<T, Access::scalar, false, true>();
  if (!plain) return kernels<T, Access::vector, false, true>();
  return halo ? kernels<T, Access::vector, true, true>() : kernels<T, Access::vector, true, false>();
}

// The number of blocks of a launch that run at the same time.
cudaError_t resident_blocks(int32_t registers, int32_t threads, int64_t* blocks) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  *blocks = static_cast<int64_t>(multiprocessors) * std::max(resident_warps(registers) * WARP / threads, 1);
  return error;
}

// Limit of the cells of a block while there are fewer blocks than places.
constexpr int32_t LONGEST = 5;

// Shares `entries` x `rows` rows of `cells` cells among blocks: each walks few enough that all of `places` blocks have
// work, at most `most`, and about as many as the others of its row.
Spans share(int64_t entries, int32_t rows, int32_t cells, int64_t places, int32_t most) {
  const int64_t every = (product({entries, rows, cells}) - 1) / places + 1;
  const int64_t longest = std::clamp<int64_t>(every, 1, std::min(cells, most));
  int64_t spans = (cells + longest - 1) / longest;
  while (product({entries, rows, spans}) < places && (cells + spans - 1) / spans > LONGEST) ++spans;
  return {static_cast<int32_t>((cells + spans - 1) / spans), Divisor(spans), Divisor(rows)};
}

// Entries that a launch walks, or whose windows it pools.
struct Range {
  const int32_t* entries;
  int64_t count;
};

// The stages of a call, launched one after the other.
template <class T>
struct Launcher {
  Fused<T> p;
  Kernels<T> kernels;
  int32_t threads;  // of a block
  int32_t cells;    // Call::cells
  int64_t shared, places;
  bool is_first;  // whether no kernel of this call has been launched: the first one waits for all work before the call
  cudaStream_t stream;

  // Sets how blocks share walks and windows. Returns the blocks of an entry.
  int64_t set_walks(int64_t entries, int32_t rows, int32_t columns) {
    const bool carries = p.W % 2 == 1;
    p.of_walks = share(entries, rows, columns, cells > 0 ? 1 : places, cells > 0 ? cells : carries ? columns : CELLS);
    return int64_t{p.of_walks.spans.value} * rows;
  }
  int64_t set_windows(int64_t entries) {
    p.of_windows = share(entries, p.OH, p.OW, cells > 0 ? 1 : places, cells > 0 ? cells : CELLS);
    return int64_t{p.of_windows.spans.value} * p.OH;
  }

  // Walks entries, and pools windows beside them. A launch takes as many of both as it has room for.
  cudaError_t run(bool mosaic, Range walked, int64_t of_walk, Range windows, int64_t of_window) {
    if (std::max(of_walk, of_window) > MAX_BLOCKS) return cudaErrorInvalidConfiguration;
    while (walked.count > 0 || windows.count > 0) {
      const int64_t walks = walked.count > 0 ? std::min(walked.count, MAX_BLOCKS / of_walk) : 0;
      const int64_t room = MAX_BLOCKS - walks * of_walk;
      const int64_t pools = windows.count > 0 ? std::min(windows.count, room / of_window) : 0;
      p.walked = walked.entries;
      p.windows = windows.entries;
      p.walk_blocks = static_cast<int32_t>(walks * of_walk);
      p.window_blocks = static_cast<int32_t>(pools * of_window);
      const auto kernel = walks == 0 ? kernels.windows : mosaic ? kernels.level : kernels.frames;
      const cudaError_t error = launch(kernel, int64_t{p.walk_blocks} + p.window_blocks, threads, stream, p,
                                       walks > 0 ? shared : 0, !is_first);
      if (error != cudaSuccess) return error;
      is_first = false;
      walked = {walked.entries + walks * ENTRY_WORDS, walked.count - walks};
      windows = {windows.entries + pools * ENTRY_WORDS, windows.count - pools};
    }
    return cudaSuccess;
  }

  // Runs the stage of frames number `first` and the levels that follow it, up to stage `last`. Each launch pools a
  // share of the windows of frames without a thumbnail that follows its share of the walks.
  cudaError_t run_stages(const int32_t* tables, const int32_t* device_tables, int32_t first, int32_t last) {
    const auto stage = [&](int32_t number) { return tables + tables[H_STAGES] + number * STAGE_WORDS; };
    const auto walked_of = [](const int32_t* s) { return s[S_MOSAIC] != 0 ? s[S_COUNT] : s[S_SHRUNK]; };
    int64_t all = 0, so_far = 0, pooled = 0;
    for (int32_t number = first; number < last; ++number) all += walked_of(stage(number));
    const int32_t *s = stage(first), alone = s[S_MOSAIC] != 0 || !p.pools ? 0 : s[S_COUNT] - s[S_SHRUNK];
    const int32_t* windows = device_tables + s[S_ENTRIES] + s[S_SHRUNK] * ENTRY_WORDS;
    const int64_t of_window = set_windows(alone);
    for (int32_t number = first; number < last; ++number) {
      s = stage(number);
      const int64_t walked = walked_of(s);
      so_far += walked;
      const int64_t end = all > 0 ? (alone * so_far + all - 1) / all : alone;
      const bool shrinks = s[S_SHRUNK] > 0;
      const int64_t of_walk = set_walks(walked, shrinks ? p.h : p.OH, shrinks ? p.w : p.OW);
      const cudaError_t error = run(s[S_MOSAIC] != 0, {device_tables + s[S_ENTRIES], walked}, of_walk,
                                    {windows + pooled * ENTRY_WORDS, end - pooled}, of_window);
      if (error != cudaSuccess) return error;
      pooled = end;
    }
    return cudaSuccess;
  }
};

template <class T>
Fused<T> parameters(const int32_t* tables, const int32_t* device_tables, const Call& call, bool pools) {
  Fused<T> p{};
  static_cast<FusedCall&>(p) = fused_call(tables, call);
  p.x = frames_of_x<T>(call);
  p.out = frames_of_out<T>(call);
  p.distances = Distances(call.x_strides, sizeof(T));
  p.scratch = static_cast<T*>(call.thumbnails != nullptr ? call.thumbnails : call.scratch);
  p.tables = device_tables;
  p.pools = pools;
  for (int n = 0; n < 9; ++n) p.inverses[n / 3][n % 3] = (1.0f / (n / 3 + 1)) * (1.0f / (n % 3 + 1));
  return p;
}

template <class T>
cudaError_t pool(const int32_t* tables, const int32_t* device_tables, const Call& call, bool pools,
                 cudaStream_t stream) {
  Launcher<T> launcher{};
  Fused<T>& p = launcher.p = parameters<T>(tables, device_tables, call, pools);
  const bool plain = p.norm == Norm::l2 && p.norm_channels == p.C;
  const bool is_vector = is_vectorized(tables, call, p.OH, p.OW) && p.norm_channels % PER_VEC<T> == 0;
  const bool halo = p.H % 2 == 1 || p.W % 2 == 1 || !plain || !is_vector;
  launcher.kernels = choose_kernels<T>(is_vector, plain, halo);
  launcher.threads = block_threads(p.C > MAX_CHANNELS ? p.norm_channels : p.C, sizeof(T));
  launcher.cells = call.cells;
  launcher.shared = halo ? launcher.threads * THREAD_CHANNELS * int64_t{sizeof(float)} : 0;
  launcher.is_first = true;
  launcher.stream = stream;
  cudaError_t error = resident_blocks(launcher.kernels.registers, launcher.threads, &launcher.places);
  const int32_t count = tables[H_NUM_STAGES];
  const auto is_mosaic = [&](int32_t number) {
    return tables[tables[H_STAGES] + number * STAGE_WORDS + S_MOSAIC] != 0;
  };
  for (int32_t first = 0, last; first < count && error == cudaSuccess; first = last) {
    for (last = first + 1; last < count && is_mosaic(last);) ++last;
    error = launcher.run_stages(tables, device_tables, first, last);
  }
  return error;
}

}  // namespace

cudaError_t pool_fused(const int32_t* tables, const int32_t* device_tables, const Call& call, bool pools,
                       cudaStream_t stream) {
  return with_type(call.dtype,
                   [&](auto value) { return pool<decltype(value)>(tables, device_tables, call, pools, stream); });
}

}  // namespace stgp::cuda
