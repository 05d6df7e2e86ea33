// The CPU functions of csrc/grid_pool.h. This file cuts a call into pieces of work and runs them on threads. The
// arithmetic is in kernels.cpp.

#include "../grid_pool.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <iterator>
#include <thread>
#include <vector>

#include "../sizes.h"
#include "../tables.h"
#include "kernels.h"

namespace stgp::cpu {

namespace {

// Returns the kernels for a dtype, compiled for one set of vector instructions.
using Provider = const Kernels* (*)(DType);

bool runs_here(Provider provider) {
#ifdef STGP_X86_64
  if (provider == avx512_kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (provider == avx2_kernels) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return provider == portable_kernels;
}

// The providers of this library, from the widest vectors to the narrowest.
constexpr Provider PROVIDERS[] = {
#ifdef STGP_X86_64
    avx512_kernels,
    avx2_kernels,
#endif
    portable_kernels,
};

std::atomic<Provider> chosen{nullptr};  // nullptr until the first call

Provider provider() {
  Provider found = chosen.load(std::memory_order_relaxed);
  if (found == nullptr) {
    found = *std::find_if(std::begin(PROVIDERS), std::end(PROVIDERS), runs_here);
    chosen.store(found, std::memory_order_relaxed);
  }
  return found;
}

// The least number of bytes that a thread reads or writes. Waking a thread for less takes longer than the work.
constexpr int64_t BYTES_PER_THREAD = 256 << 10;

// The least number of bytes of the pieces into which the part of a thread is cut, since the first tokens of a piece are
// not prefetched.
constexpr int64_t BYTES_PER_PIECE = 128 << 10;

// The least size, in bytes, of a result that is stored past the cache. In the cache, a large result would displace data
// that is read again, and each cache line of it would be read before it is written.
constexpr int64_t STREAM_BYTES = 1 << 20;

bool is_fused(Op op, const int32_t* t) { return is_pooling(op) && has_fused_form(t); }

// C, rounded up to whole blocks of channels.
int64_t whole_blocks(int64_t C) { return product({sum({C, WIDEST_BLOCK - 1}) / WIDEST_BLOCK, WIDEST_BLOCK}); }

// Bytes of Gradients::summaries.
int64_t gradient_bytes(const int32_t* t, const Call& call) {
  return aligned(product({t[H_SUMMARIES], t[H_HEIGHT], t[H_WIDTH], whole_blocks(call.C), sizeof(float)}));
}

// Bytes of Gradients::windows.
int64_t window_bytes(Op op, const int32_t* t) {
  if (op != Op::grid_pool_backward || is_fused(op, t)) return 0;
  return aligned(product({t[H_FRAMES], t[H_OUT_ROWS], t[H_OUT_COLS], 3, sizeof(double)}));
}

// Sizes of the arrays of a Workspace.
struct WorkspaceSizes {
  int64_t gathered = 0;  // bytes
  int64_t carried = 0;   // bytes
  int64_t taps = 0;      // elements of `taps` and of `weights`
  int64_t norms = 0;     // elements of `norms`
  int64_t window = 0;    // elements of `logits` and of `dots`

  int64_t bytes() const {
    const int64_t windows = product({2, aligned(product({window, sizeof(double)}))});
    return sum({aligned(gathered), aligned(carried), aligned(product({taps, sizeof(void*)})),
                aligned(product({taps, sizeof(float)})), aligned(product({norms, sizeof(float)})), windows});
  }

  // A workspace whose arrays are in `memory`, of size bytes().
  Workspace at(char* memory) const {
    const auto take = [&](int64_t bytes) {
      char* const taken = memory;
      memory += aligned(bytes);
      return static_cast<void*>(taken);
    };
    Workspace w;
    w.gathered = static_cast<char*>(take(gathered));
    w.carried = take(carried);
    w.taps = static_cast<const void**>(take(taps * sizeof(void*)));
    w.weights = static_cast<float*>(take(taps * sizeof(float)));
    w.norms = static_cast<float*>(take(norms * sizeof(float)));
    w.logits = static_cast<double*>(take(window * sizeof(double)));
    w.dots = static_cast<double*>(take(window * sizeof(double)));
    return w;
  }
};

WorkspaceSizes workspace_sizes(Op op, const int32_t* t, const Call& call) {
  WorkspaceSizes sizes;
  int64_t tokens = 1;  // of x that a kernel may gather at the same time
  if (op == Op::token_norm) {
    tokens = MOST_LANES;
  } else if (is_fused(op, t)) {
    tokens = 12;  // those of two windows, and four around one of them
    if (t[H_SLOTS] > 0 && t[H_WIDTH] % 2 == 1) sizes.carried = product({sum({call.C, WIDEST_BLOCK}), sizeof(float)});
  } else {
    for (int l = 0; l < t[H_NUM_LEVELS]; ++l) {
      const int32_t* level = t + t[H_LEVELS] + l * LEVEL_WORDS;
      const int32_t *heights = t + level[L_ROW_RUNS] + t[H_HEIGHT], *widths = t + level[L_COL_RUNS] + t[H_WIDTH];
      tokens = std::max(tokens, int64_t{*std::max_element(heights, heights + t[H_HEIGHT])} *
                                    *std::max_element(widths, widths + t[H_WIDTH]));
    }
    if (is_pooling(op)) {
      const int64_t frame = int64_t{t[H_HEIGHT]} * t[H_WIDTH];
      const int64_t window = std::min<int64_t>(t[H_LARGEST_WINDOW], frame);  // padding has no tokens
      tokens = std::max(tokens, window);
      if (op == Op::grid_pool) {
        sizes.norms = frame;
      } else {
        sizes.window = window;
      }
    }
    sizes.taps = tokens;
  }
  // at most four sums: those of two columns of cells, for two rows of tokens each
  if (is_backward(op)) sizes.carried = product({4, whole_blocks(call.C), sizeof(float)});
  if (call.x_strides.channel != 1 || (is_backward(op) && call.grad_strides.channel != 1)) {
    sizes.gathered = product({1 + tokens, call.C, element_size(call.dtype)});
  } else if (call.out_strides.channel != 1) {
    sizes.gathered = product({call.C, element_size(call.dtype)});
  }
  return sizes;
}

// Bytes of scratch before the workspaces: thumbnails or summaries, then what gradients need.
int64_t stored_bytes(Op op, const int32_t* t, const Call& call) {
  if (op == Op::token_norm || call.thumbnails != nullptr) return 0;
  const int64_t nodes = op == Op::temporal_grid_backward ? 0
                        : is_fused(op, t)                ? thumbnail_bytes(t, call)
                                                         : summary_bytes(t, call);
  return is_backward(op) ? sum({nodes, gradient_bytes(t, call), window_bytes(op, t)}) : nodes;
}

Gradients gradients_in(Op op, const int32_t* t, const Call& call) {
  char* const end = static_cast<char*>(call.scratch) + stored_bytes(op, t, call);
  char* const windows = end - window_bytes(op, t);
  return {windows - gradient_bytes(t, call), window_bytes(op, t) > 0 ? reinterpret_cast<double*>(windows) : nullptr};
}

// Bytes of a row of a frame. A view may have rows that do not fit into memory.
int64_t bytes_of_row(const int32_t* t, const Call& call) {
  return product({t[H_WIDTH], call.C, element_size(call.dtype)});
}

// A part of a call whose pieces of work may run at the same time.
struct Phase {
  int64_t count;      // number of frames, summaries or entries
  int64_t height;     // rows of each
  int64_t row_bytes;  // bytes that a row reads and writes
  int64_t after;      // number of phases, from the first, that must be complete before this one begins

  int64_t band = 0;                     // rows of a piece of work
  int64_t pieces = 0;                   // number of pieces
  std::atomic<int64_t> unfinished = 0;  // number of pieces that are not complete

  Phase(int64_t count, int64_t height, int64_t row_bytes, int64_t after)
      : count(count), height(height), row_bytes(row_bytes), after(after) {}

  int64_t bytes() const { return product({count, height, row_bytes}); }
  int64_t bands() const { return (height + band - 1) / band; }
};

using Phases = std::deque<Phase>;  // not a vector, because a Phase cannot be moved

// Runs work(phase, n, first, last, workspace) for rows [first, last) of each n in [0, count) of each phase. Every
// thread starts with a part of its own: neighbouring pieces, whose tokens are in its cache if it had them in the call
// before. A thread that has no pieces left takes those of others, because both pieces and threads differ in speed.
// Deadlock-free: a piece waits only for pieces of earlier phases, which threads have all taken by then, and those of
// the earliest phase wait for nothing.
template <typename F>
class Runner {
 public:
  Runner(Phases& phases, const WorkspaceSizes& sizes, void* memory, const F& work)
      : phases(phases), sizes(sizes), memory(static_cast<char*>(memory)), work(work) {}

  void run(const Threads& threads) {
    int64_t bytes = 0, most = 0;
    for (const Phase& phase : phases) {
      bytes = sum({bytes, phase.bytes()});
      most = std::max(most, phase.count * phase.height);
    }
    const int64_t fed = sum({bytes, BYTES_PER_THREAD - 1}) / BYTES_PER_THREAD;
    parts = std::max<int64_t>(std::min<int64_t>({threads.run == nullptr ? 1 : threads.count, fed, most}), 1);
    for (Phase& phase : phases) {
      // Four pieces a thread balance the load. Smaller ones would read more rows twice, where their cells overlap.
      const int64_t rows = phase.count * phase.height, each = phase.bytes() / BYTES_PER_PIECE / parts;
      const int64_t pieces = parts * std::clamp<int64_t>(each, 1, 4);
      phase.band = parts == 1 ? phase.height : std::clamp<int64_t>((rows + pieces - 1) / pieces, 1, phase.height);
      phase.pieces = phase.unfinished = phase.count * phase.bands();
    }
    taken = std::vector<std::atomic<int64_t>>(phases.size() * parts);
    if (parts == 1) {
      task(0, this);
    } else {
      threads.run(static_cast<int>(parts), task, this, threads.pool);
    }
  }

 private:
  static void task(int thread, void* runner) { static_cast<Runner*>(runner)->take_pieces(thread); }

  void take_pieces(int thread) {
    const Workspace workspace = sizes.at(memory + thread * sizes.bytes());
    for (int64_t s = 0; s < static_cast<int64_t>(phases.size()); ++s) {
      for (int64_t k = 0; k < parts; ++k) take_part(s, (thread + k) % parts, workspace);
    }
  }

  // Takes what is left of a part of phase s.
  void take_part(int64_t s, int64_t part, const Workspace& workspace) {
    Phase& phase = phases[s];
    const int64_t begin = phase.pieces * part / parts, end = phase.pieces * (part + 1) / parts, bands = phase.bands();
    for (;;) {
      const int64_t piece = begin + taken[s * parts + part].fetch_add(1, std::memory_order_relaxed);
      if (piece >= end) return;
      wait_for(phase.after);
      const int64_t first = piece % bands * phase.band;
      work(s, piece / bands, first, std::min(first + phase.band, phase.height), workspace);
      phase.unfinished.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait_for(int64_t count) {
    for (int64_t s = finished.load(std::memory_order_acquire); s < count; ++s) {
      for (int spins = 0; phases[s].unfinished.load(std::memory_order_acquire) > 0; ++spins) {
        if (spins > SPINS) std::this_thread::yield();
      }
      finished.store(s + 1, std::memory_order_release);
    }
  }

  // Number of checks by a waiting thread before it yields. They take some microseconds; a piece takes some tens.
  static constexpr int SPINS = 2000;

  Phases& phases;
  const WorkspaceSizes sizes;
  char* const memory;
  const F& work;
  int64_t parts = 1;                        // of each phase, one for each thread
  std::vector<std::atomic<int64_t>> taken;  // number of pieces that were taken of each part, phase after phase
  std::atomic<int64_t> finished = 0;        // number of phases, from the first, that are complete
};

// Runs work(phase, n, piece) for all pieces of all phases. The workspaces of the threads follow what the call stores.
template <typename F>
void run_phases(Op op, const int32_t* tables, const Call& call, const Threads& threads, bool stream, Phases& phases,
                const F& work) {
  const auto run = [&](int64_t s, int64_t n, int64_t first, int64_t last, const Workspace& workspace) {
    work(s, n, Piece{tables, call, first, last, stream, workspace});
  };
  char* const memory = static_cast<char*>(call.scratch) + stored_bytes(op, tables, call);
  Runner<decltype(run)>(phases, workspace_sizes(op, tables, call), memory, run).run(threads);
}

// Appends the phases of the general form that make summaries, one for each level.
void add_summaries(const int32_t* t, int64_t row_bytes, Phases& phases) {
  for (int l = 0; l < t[H_NUM_LEVELS]; ++l) {
    const int32_t* level = t + t[H_LEVELS] + l * LEVEL_WORDS;
    phases.emplace_back(level[L_COUNT], t[H_HEIGHT], product({row_bytes, level[L_ROWS], level[L_COLS]}), l);
  }
}

// Appends the phases of the general form that make gradients: one for each level, from the last to the first, and one
// for the frames of x.
void add_gradients(const int32_t* t, int64_t row_bytes, Phases& phases) {
  for (int l = t[H_NUM_LEVELS] - 1; l >= 0; --l) {
    phases.emplace_back(t[t[H_LEVELS] + l * LEVEL_WORDS + L_COUNT], t[H_HEIGHT], product({4, row_bytes}),
                        phases.size());
  }
  phases.emplace_back(t[H_FRAMES], t[H_HEIGHT], product({4, row_bytes}), phases.size());
}

// The node that has number n in phase s of add_gradients.
int64_t node_of(const int32_t* t, int64_t s, int64_t n) {
  const int64_t level = t[H_NUM_LEVELS] - 1 - s;
  return level < 0 ? n : -1 - (t[t[H_LEVELS] + level * LEVEL_WORDS + L_FIRST] + n);
}

}  // namespace

const char* capability() { return provider()(DType::float32)->name; }

bool use_capability(const char* name) {
  for (const Provider provider : PROVIDERS) {
    if (std::strcmp(provider(DType::float32)->name, name) == 0 && runs_here(provider)) {
      chosen.store(provider);
      return true;
    }
  }
  return false;
}

int64_t scratch_bytes(Op op, const int32_t* tables, const Call& call, const Threads& threads) {
  const int64_t workspaces = product({std::max(threads.count, 1), workspace_sizes(op, tables, call).bytes()});
  return sum({stored_bytes(op, tables, call), workspaces});
}

void grid_pool(const int32_t* t, const Call& call, const Threads& threads) {
  const Kernels& kernels = *provider()(call.dtype);
  const int64_t H = t[H_HEIGHT], OH = t[H_OUT_ROWS], OW = t[H_OUT_COLS], frames = t[H_FRAMES], levels = t[H_NUM_LEVELS];
  const int64_t row_bytes = bytes_of_row(t, call);
  const bool stream = product({frames, OH, OW, call.C, element_size(call.dtype)}) >= STREAM_BYTES;
  Phases phases;
  if (has_fused_form(t)) {
    const int32_t* stages = t + t[H_STAGES];
    for (int s = 0; s < t[H_NUM_STAGES]; ++s) {
      const int32_t* stage = stages + s * STAGE_WORDS;
      phases.emplace_back(stage[S_COUNT], (H + 1) / 2, product({2, row_bytes}), stage[S_AFTER]);
    }
    run_phases(Op::grid_pool, t, call, threads, stream, phases, [&](int64_t s, int64_t e, const Piece& piece) {
      kernels.fused_rows(piece, t + stages[s * STAGE_WORDS + S_ENTRIES] + e * ENTRY_WORDS);
    });
    return;
  }
  add_summaries(t, row_bytes, phases);
  phases.emplace_back(frames, OH, product({H, row_bytes}) / OH, levels);
  run_phases(Op::grid_pool, t, call, threads, stream, phases, [&](int64_t s, int64_t n, const Piece& piece) {
    if (s < levels) {
      kernels.summary_rows(piece, t + t[H_LEVELS] + s * LEVEL_WORDS, n);
    } else {
      kernels.pooled_rows(piece, n);
    }
  });
}

void temporal_grid(const int32_t* t, const Call& call, const Threads& threads) {
  const Kernels& kernels = *provider()(call.dtype);
  const int64_t row_bytes = bytes_of_row(t, call), levels = t[H_NUM_LEVELS];
  const bool stream = product({t[H_FRAMES], t[H_HEIGHT], row_bytes}) >= STREAM_BYTES;
  Phases phases;
  add_summaries(t, row_bytes, phases);
  phases.emplace_back(t[H_FRAMES], t[H_HEIGHT], row_bytes, levels);
  run_phases(Op::temporal_grid, t, call, threads, stream, phases, [&](int64_t s, int64_t n, const Piece& piece) {
    if (s < levels) {
      kernels.summary_rows(piece, t + t[H_LEVELS] + s * LEVEL_WORDS, n);
    } else {
      kernels.output_rows(piece, n);
    }
  });
}

namespace {

// The fused form: all thumbnails are stored first, stage by stage. Gradients follow, from the last stage to the first.
void fused_backward(const int32_t* t, const Call& call, const Threads& threads, bool stream) {
  const Kernels& kernels = *provider()(call.dtype);
  const Gradients gradients = gradients_in(Op::grid_pool_backward, t, call);
  const int64_t h = (t[H_HEIGHT] + 1) / 2, row_bytes = bytes_of_row(t, call);
  const int64_t num_stages = t[H_NUM_STAGES], shrinking = t[H_SUMMARIES] > 0 ? num_stages : 0;
  const int32_t* stages = t + t[H_STAGES];
  Phases phases;
  for (int64_t s = 0; s < shrinking; ++s) {
    const int32_t* stage = stages + s * STAGE_WORDS;
    phases.emplace_back(stage[S_SHRUNK], h, product({2, row_bytes}), stage[S_AFTER]);
  }
  for (int64_t s = num_stages - 1; s >= 0; --s) {
    phases.emplace_back(stages[s * STAGE_WORDS + S_COUNT], h, product({4, row_bytes}), phases.size());
  }
  run_phases(Op::grid_pool_backward, t, call, threads, stream, phases, [&](int64_t s, int64_t e, const Piece& piece) {
    const bool shrinks = s < shrinking;
    const int32_t* stage = stages + (shrinks ? s : num_stages - 1 - (s - shrinking)) * STAGE_WORDS;
    const int32_t* entry = t + stage[S_ENTRIES] + e * ENTRY_WORDS;
    if (shrinks) {
      kernels.fused_rows(piece, entry);
    } else {
      kernels.fused_gradient_rows(piece, entry, gradients);
    }
  });
}

}  // namespace

void grid_pool_backward(const int32_t* t, const Call& call, const Threads& threads) {
  const Kernels& kernels = *provider()(call.dtype);
  const int64_t H = t[H_HEIGHT], OH = t[H_OUT_ROWS], frames = t[H_FRAMES], levels = t[H_NUM_LEVELS];
  const int64_t row_bytes = bytes_of_row(t, call);
  const bool stream = product({frames, H, row_bytes}) >= STREAM_BYTES;
  if (has_fused_form(t)) return fused_backward(t, call, threads, stream);
  const Gradients gradients = gradients_in(Op::grid_pool_backward, t, call);
  Phases phases;
  add_summaries(t, row_bytes, phases);
  phases.emplace_back(frames, OH, product({H, row_bytes}) / OH, levels);
  add_gradients(t, row_bytes, phases);
  run_phases(Op::grid_pool_backward, t, call, threads, stream, phases, [&](int64_t s, int64_t n, const Piece& piece) {
    if (s < levels) {
      kernels.summary_rows(piece, t + t[H_LEVELS] + s * LEVEL_WORDS, n);
    } else if (s == levels) {
      kernels.window_rows(piece, n, gradients);
    } else {
      kernels.gradient_rows(piece, node_of(t, s - levels - 1, n), gradients);
    }
  });
}

void temporal_grid_backward(const int32_t* t, const Call& call, const Threads& threads) {
  const Kernels& kernels = *provider()(call.dtype);
  const int64_t row_bytes = bytes_of_row(t, call);
  const bool stream = product({t[H_FRAMES], t[H_HEIGHT], row_bytes}) >= STREAM_BYTES;
  const Gradients gradients = gradients_in(Op::temporal_grid_backward, t, call);
  Phases phases;
  add_gradients(t, row_bytes, phases);
  run_phases(
      Op::temporal_grid_backward, t, call, threads, stream, phases,
      [&](int64_t s, int64_t n, const Piece& piece) { kernels.gradient_rows(piece, node_of(t, s, n), gradients); });
}

void token_norm(int64_t frames, int64_t H, int64_t W, const Call& call, const Threads& threads) {
  if (H == 0) return;
  const Kernels& kernels = *provider()(call.dtype);
  Phases phases;
  phases.emplace_back(frames, H, product({W, call.C, element_size(call.dtype)}), 0);
  run_phases(Op::token_norm, nullptr, call, threads, false, phases,
             [&](int64_t, int64_t frame, const Piece& piece) { kernels.norm_rows(piece, W, frame); });
}

}  // namespace stgp::cpu
