// The C++ functions as an engine calls them: csrc/grid_pool.h and csrc/tables.h, no torch, no Python.
//
//   grid_pool_test
//       checks what needs no file: hand-made tables, tables that must be refused, capabilities
//   grid_pool_test TABLES X OUT DTYPE B C THREADS TEMPERATURE NORM_TYPE NORMALIZE NORM_CHANNELS
//       runs every op on B videos, by every set of vector instructions that this CPU has, with one thread and with
//       THREADS. Results have to be equal bit by bit and are written to OUT.grid_pool, OUT.temporal_grid and
//       OUT.token_norm, followed by the instructions (".avx2"). TABLES is a file of save_tables, X a file of tokens
//       (B, T, H, W, C), or "-" for some that are made here. If the tables have a gradient section, gradients are
//       computed as well: of grid_pool, where the file X.grad holds that of its result, and of temporal_grid, where x
//       stands in for it.
//   grid_pool_test TABLES X OUT DTYPE B C THREADS TEMPERATURE NORM_TYPE NORMALIZE NORM_CHANNELS OP CAPABILITY TIMES
//       calls one op TIMES times on tokens that are all alike, with one set of vector instructions and one thread, and
//       neither reads X nor writes a file. tools/cpu_instructions.py counts the instructions.
//
// Exit code: 0 if all is well, 1 if not; what is wrong is on stderr.

#include "grid_pool.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tables.h"

namespace {

using stgp::Call;
using stgp::DType;
using stgp::Op;
using Tables = std::vector<int32_t>;

int failures = 0;

void check(bool right, const char* text, int line) {
  if (right) return;
  std::fprintf(stderr, "line %d: not so: %s\n", line, text);
  ++failures;
}

#define CHECK(condition) check(condition, #condition, __LINE__)

[[noreturn]] void give_up(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::exit(1);
}

// ---- what an engine has to bring: memory, threads and tables ----

// Bytes at a multiple of 64. What is in them at first is NaN in every dtype.
class Memory {
 public:
  explicit Memory(int64_t bytes)
      : memory(bytes == 0 ? nullptr : static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {
    if (bytes > 0) std::memset(memory.get(), 0xff, bytes);
  }
  void* data() const { return memory.get(); }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory;
};

stgp::cpu::Threads threads_of(int count) {
  const auto run = [](int count, void (*task)(int, void*), void* work, void*) {
    std::vector<std::thread> others;
    for (int i = 1; i < count; ++i) others.emplace_back(task, i, work);
    task(0, work);
    for (std::thread& other : others) other.join();
  };
  return {count, run, nullptr};
}

// Tasks that run one after another on the calling thread, the last one first.
stgp::cpu::Threads in_turn(int count) {
  const auto run = [](int count, void (*task)(int, void*), void* work, void*) {
    for (int i = count - 1; i >= 0; --i) task(i, work);
  };
  return {count, run, nullptr};
}

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) give_up("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write_file(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())).flush()) give_up("cannot write " + path);
}

Tables read_tables(const std::string& path) {
  const std::vector<char> bytes = read_file(path);
  Tables tables(bytes.size() / sizeof(int32_t));
  if (!tables.empty()) std::memcpy(tables.data(), bytes.data(), tables.size() * sizeof(int32_t));
  if (const char* wrong = stgp::check_tables(tables.data(), static_cast<int64_t>(tables.size()))) {
    give_up(path + ": " + wrong);
  }
  return tables;
}

std::vector<std::string> capabilities() {
  const std::string before = stgp::cpu::capability();
  std::vector<std::string> names;
  for (const char* name : {"avx512", "avx2", "portable"}) {
    if (stgp::cpu::use_capability(name)) names.emplace_back(name);
  }
  stgp::cpu::use_capability(before.c_str());
  return names;
}

// ---- calls ----

struct Problem {
  Tables tables;
  int64_t videos, frames, height, width, channels;  // frames of a video
  DType dtype;
  float temperature;
  double norm_type;
  bool normalize;
  int64_t norm_channels = 0;

  int64_t element_size() const { return dtype == DType::float32 ? 4 : 2; }
};

int64_t count_tokens(const Problem& p, bool pooled) {
  const int64_t rows = pooled ? p.tables[stgp::H_OUT_ROWS] : p.height,
                cols = pooled ? p.tables[stgp::H_OUT_COLS] : p.width;
  return p.videos * p.frames * rows * cols;
}

// Tokens that look like noise, of either sign and a magnitude of 1/2 to 4.
std::vector<char> make_tokens(const Problem& p, int64_t tokens) {
  const int64_t count = tokens * p.channels;
  std::vector<char> bytes(count * p.element_size());
  uint64_t state = 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint32_t random = static_cast<uint32_t>(state >> 32);
    const uint32_t sign = random >> 31, exponent = random >> 20 & 3, fraction = random & 0x7fffff;
    const uint32_t single = sign << 31 | (126 + exponent) << 23 | fraction;
    const uint16_t half = static_cast<uint16_t>(sign << 15 | (14 + exponent) << 10 | fraction >> 13);
    const uint16_t brain = static_cast<uint16_t>(single >> 16);
    if (p.dtype == DType::float32) {
      std::memcpy(bytes.data() + i * 4, &single, 4);
    } else {
      std::memcpy(bytes.data() + i * 2, p.dtype == DType::float16 ? &half : &brain, 2);
    }
  }
  return bytes;
}

stgp::Strides contiguous(int64_t frames, int64_t rows, int64_t cols, int64_t channels) {
  return {frames * rows * cols * channels, rows * cols * channels, cols * channels, channels, 1};
}

bool is_backward(Op op) { return op == Op::grid_pool_backward || op == Op::temporal_grid_backward; }

void call_op(Op op, const Problem& p, const Call& call, const stgp::cpu::Threads& threads) {
  const int32_t* t = p.tables.data();
  switch (op) {
    case Op::grid_pool:
      return stgp::cpu::grid_pool(t, call, threads);
    case Op::temporal_grid:
      return stgp::cpu::temporal_grid(t, call, threads);
    case Op::grid_pool_backward:
      return stgp::cpu::grid_pool_backward(t, call, threads);
    case Op::temporal_grid_backward:
      return stgp::cpu::temporal_grid_backward(t, call, threads);
    default:
      return stgp::cpu::token_norm(p.videos * p.frames, p.height, p.width, call, threads);
  }
}

// `grad` is that of the result, for gradients. Returns the result of the last of `times` calls.
std::vector<char> run(const Problem& p, const std::vector<char>& x, Op op, const stgp::cpu::Threads& threads,
                      const std::vector<char>& grad = {}, int times = 1) {
  const int32_t* t = p.tables.data();
  const bool norms = op == Op::token_norm, pooled = op == Op::grid_pool;
  const int64_t OH = t[stgp::H_OUT_ROWS], OW = t[stgp::H_OUT_COLS];
  const int64_t rows = pooled ? OH : p.height, cols = pooled ? OW : p.width;
  const int64_t channels = norms ? 1 : p.channels;
  std::vector<char> out(p.videos * p.frames * rows * cols * channels * (norms ? 4 : p.element_size()), '\xff');
  Call call;
  call.dtype = p.dtype;
  call.T = p.frames;
  call.C = p.channels;
  call.x = x.data();
  call.x_strides = contiguous(p.frames, p.height, p.width, p.channels);
  call.out = out.data();
  call.out_strides = contiguous(p.frames, rows, cols, channels);
  call.temperature = p.temperature;
  call.norm_type = p.norm_type;
  call.normalize_norm = p.normalize;
  call.norm_channels = p.norm_channels;
  if (is_backward(op)) {
    const bool of_pooled = op == Op::grid_pool_backward;
    call.grad = grad.data();
    call.grad_strides = contiguous(p.frames, of_pooled ? OH : p.height, of_pooled ? OW : p.width, p.channels);
    if (!of_pooled) call.x = nullptr;  // which is not read
  }
  const Memory scratch(stgp::cpu::scratch_bytes(op, norms ? nullptr : t, call, threads));
  call.scratch = scratch.data();
  for (int i = 0; i < times; ++i) call_op(op, p, call, threads);
  return out;
}

// The tokens of a file, or some that are made here.
std::vector<char> tokens_of(const std::string& path, const Problem& p, int64_t tokens) {
  std::vector<char> made = make_tokens(p, tokens);
  if (path == "-") return made;
  std::vector<char> read = read_file(path);
  if (read.size() != made.size()) give_up(path + ": the tables are of another size");
  return read;
}

Problem read_problem(char** arguments) {
  Problem p;
  p.tables = read_tables(arguments[0]);
  const std::string dtype = arguments[3];
  p.dtype = dtype == "bfloat16" ? DType::bfloat16 : dtype == "float16" ? DType::float16 : DType::float32;
  p.videos = std::atoll(arguments[4]);
  p.frames = p.tables[stgp::H_FRAMES] / p.videos;
  p.height = p.tables[stgp::H_HEIGHT];
  p.width = p.tables[stgp::H_WIDTH];
  p.channels = std::atoll(arguments[5]);
  p.temperature = std::strtof(arguments[7], nullptr);
  p.norm_type = std::strtod(arguments[8], nullptr);
  p.normalize = std::atoi(arguments[9]) != 0;
  p.norm_channels = std::atoll(arguments[10]);
  return p;
}

struct NamedOp {
  const char* name;
  Op op;
};

constexpr NamedOp OPS[] = {{"grid_pool", Op::grid_pool},
                           {"temporal_grid", Op::temporal_grid},
                           {"token_norm", Op::token_norm},
                           {"grid_pool_backward", Op::grid_pool_backward},
                           {"temporal_grid_backward", Op::temporal_grid_backward}};

int run_file(char** arguments) {
  const Problem p = read_problem(arguments);
  const std::string x_path = arguments[1], out_path = arguments[2];
  const int count = std::atoi(arguments[6]);
  const std::vector<char> x = tokens_of(x_path, p, count_tokens(p, false));
  const bool backward = p.tables[stgp::H_GRADIENT] > 0;
  const std::string grad_path = x_path == "-" ? "-" : x_path + ".grad";
  const std::vector<char> grad = backward ? tokens_of(grad_path, p, count_tokens(p, true)) : std::vector<char>{};
  for (const std::string& capability : capabilities()) {
    CHECK(stgp::cpu::use_capability(capability.c_str()));
    for (const auto& [name, op] : OPS) {
      if (is_backward(op) && !backward) continue;
      const std::vector<char>& of_result = op == Op::temporal_grid_backward ? x : grad;
      const std::vector<char> alone = run(p, x, op, {}, of_result);
      CHECK(alone == run(p, x, op, threads_of(count), of_result));
      CHECK(alone == run(p, x, op, in_turn(count), of_result));
      CHECK(alone == run(p, x, op, {count, nullptr, nullptr}, of_result));  // no threads in spite of the count
      write_file(out_path + "." + name + "." + capability, alone);
    }
  }
  return failures == 0 ? 0 : 1;
}

int run_one_op(char** arguments) {
  const Problem p = read_problem(arguments);
  const std::string wanted = arguments[11];
  if (!stgp::cpu::use_capability(arguments[12])) give_up(std::string("this CPU does not run ") + arguments[12]);
  for (const auto& [name, op] : OPS) {
    if (name != wanted) continue;
    // These bytes are a number in every dtype. Tokens that differ would take many instructions to make.
    const int64_t token = p.channels * p.element_size();
    const std::vector<char> x(count_tokens(p, false) * token, '\x3c');
    run(p, x, op, {}, x, std::atoi(arguments[13]));
    return 0;
  }
  give_up("there is no op " + wanted);
}

// ---- checks that need no file ----

// One frame of 2 x 2 tokens, pooled into one; written by hand from csrc/tables.h.
Tables one_window() {
  Tables t(stgp::HEADER_WORDS);
  const auto add = [&t](std::initializer_list<int32_t> words) {
    const auto offset = static_cast<int32_t>(t.size());
    t.insert(t.end(), words);
    return offset;
  };
  t[stgp::H_MAGIC] = stgp::MAGIC;
  t[stgp::H_VERSION] = stgp::VERSION;
  t[stgp::H_FRAMES] = 1;
  t[stgp::H_HEIGHT] = t[stgp::H_WIDTH] = 2;
  t[stgp::H_OUT_ROWS] = t[stgp::H_OUT_COLS] = 1;
  t[stgp::H_LARGEST_WINDOW] = 4;
  t[stgp::H_OUTPUTS] = add({0});
  t[stgp::H_LEVELS] = static_cast<int32_t>(t.size());
  t[stgp::H_WINDOW_ROWS] = add({0, 2});
  t[stgp::H_WINDOW_COLS] = add({0, 2});
  t[stgp::H_STAGES] = static_cast<int32_t>(t.size());
  t[stgp::H_WORDS] = static_cast<int32_t>(t.size());
  return t;
}

// The same with a summary: two frames, level 0 replaces frame 1 by frames 0 and 1, one above the other.
Tables one_summary(bool fused) {
  Tables t = one_window();
  const auto here = [&t] { return static_cast<int32_t>(t.size()); };
  const auto add = [&](std::initializer_list<int32_t> words) {
    const int32_t offset = here();
    t.insert(t.end(), words);
    return offset;
  };
  t[stgp::H_FRAMES] = 2;
  t[stgp::H_SUMMARIES] = t[stgp::H_NUM_LEVELS] = 1;
  t[stgp::H_OUTPUTS] = add({0, ~0});
  const int32_t sources = add({0, 1, 1, 1}), row_runs = add({0, 2, 2, 2}), col_runs = add({0, 2, 2, 2});
  t[stgp::H_LEVELS] = add({2, 2, 0, 1, sources, row_runs, col_runs});
  if (fused) {
    const int32_t all = add({1}), none = add({0});
    const int32_t frames = add({0, 0, 0, all, -1, -1, -1, -1, 1, -1, 1, all, -1, -1, -1, -1});
    const int32_t summary = add({~0, 1, -1, none, 0, 1, 1, 1});
    t[stgp::H_STAGES] = add({0, frames, 2, 2, 0, 1, summary, 1, 0, 1});
    t[stgp::H_NUM_STAGES] = t[stgp::H_SLOTS] = 2;
  } else {
    t[stgp::H_STAGES] = here();
  }
  t[stgp::H_WORDS] = here();
  return t;
}

// The same with what gradients follow: frame 0 is tile 0 of the summary, frame 1 the other three.
Tables with_gradients(Tables t) {
  const auto here = [&t] { return static_cast<int32_t>(t.size()); };
  const auto add = [&](std::initializer_list<int32_t> words) {
    const int32_t offset = here();
    t.insert(t.end(), words);
    return offset;
  };
  const int32_t consumers = add({0, 0, 0, 0, 0, 1, 0, 0, 2, 0, 0, 3});
  const int32_t starts = add({consumers, consumers + 3, consumers + 12, consumers + 12});
  const int32_t ends = add({0, -1, 1});  // frame 1 ends as the summary
  const int32_t windows = add({0, 0, 1, 1}), rows = add({0, 0, 1, 1, 1, 1, 1, 1}), cols = add({0, 0, 1, 1, 1, 1, 1, 1});
  t[stgp::H_GRADIENT] = add({starts, ends, windows, windows, rows, cols});
  t[stgp::H_WORDS] = here();
  return t;
}

const char* wrong_with(const Tables& t) { return stgp::check_tables(t.data(), static_cast<int64_t>(t.size())); }

bool near(float a, double b) { return std::abs(a - b) <= 1e-6 * std::abs(b); }

void test_results_by_hand() {
  std::vector<float> x = {1, 1, 0, 0, 2, -2, 3, 3};  // four tokens of two channels, whose RMS is 1, 0, 2, 3
  std::vector<char> bytes(x.size() * 4);
  std::memcpy(bytes.data(), x.data(), bytes.size());
  const Problem p{one_window(), 1, 1, 2, 2, 2, DType::float32, 1, 2, true};
  const double e[] = {std::exp(1.0), std::exp(0.0), std::exp(2.0), std::exp(3.0)};
  const double total = e[0] + e[1] + e[2] + e[3];
  float pooled[2], norms[4];
  std::memcpy(pooled, run(p, bytes, Op::grid_pool, {}).data(), sizeof pooled);
  CHECK(near(pooled[0], (e[0] + 2 * e[2] + 3 * e[3]) / total));
  CHECK(near(pooled[1], (e[0] - 2 * e[2] + 3 * e[3]) / total));
  CHECK(run(p, bytes, Op::temporal_grid, {}) == bytes);
  std::memcpy(norms, run(p, bytes, Op::token_norm, {}).data(), sizeof norms);
  CHECK(norms[0] == 1 && norms[1] == 0 && norms[2] == 2 && norms[3] == 3);
}

// Frame 1 becomes the means of frames 0 and 1 in one row, those of frame 1 twice in the other.
void test_a_summary_by_hand() {
  const std::vector<float> x = {1, 3, 5, 7, 2, 2, 6, 6};  // frames of four tokens of one channel: means 4 and 4
  std::vector<char> bytes(x.size() * 4);
  std::memcpy(bytes.data(), x.data(), bytes.size());
  for (const bool fused : {false, true}) {
    const Problem p{one_summary(fused), 1, 2, 2, 2, 1, DType::float32, 0, 2, true};
    CHECK(wrong_with(p.tables) == nullptr);
    float grid[8], pooled[2];
    std::memcpy(grid, run(p, bytes, Op::temporal_grid, {}).data(), sizeof grid);
    std::memcpy(pooled, run(p, bytes, Op::grid_pool, {}).data(), sizeof pooled);
    CHECK(std::memcmp(grid, x.data(), 16) == 0);
    for (int k = 4; k < 8; ++k) CHECK(grid[k] == 4);
    CHECK(pooled[0] == 4 && pooled[1] == 4);
  }
}

std::vector<char> bytes_of(const std::vector<float>& values) {
  std::vector<char> bytes(values.size() * sizeof(float));
  if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

std::vector<float> floats_of(const std::vector<char>& bytes) {
  std::vector<float> values(bytes.size() / sizeof(float));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

// Of the frames above: a token of the summary passes a quarter of its gradient to each token of its tile.
void test_gradients_by_hand() {
  for (const bool fused : {false, true}) {
    const Problem p{with_gradients(one_summary(fused)), 1, 2, 2, 2, 1, DType::float32, 0, 2, true};
    CHECK(wrong_with(p.tables) == nullptr);
    const std::vector<char> x = bytes_of({1, 3, 5, 7, 2, 2, 6, 6});
    const std::vector<float> grid =
        floats_of(run(p, {}, Op::temporal_grid_backward, {}, bytes_of({10, 20, 30, 40, 4, 8, 12, 16})));
    CHECK((grid == std::vector<float>{11, 21, 31, 41, 9, 9, 9, 9}));
    // windows are means here: their tokens get a quarter
    const std::vector<float> pooled = floats_of(run(p, x, Op::grid_pool_backward, {}, bytes_of({8, 16})));
    CHECK((pooled == std::vector<float>{3, 3, 3, 3, 3, 3, 3, 3}));
  }
}

// Tokens learn a result: steps against the gradient of half the squared distance to it.
void test_training() {
  for (const bool fused : {false, true}) {
    const Problem p{with_gradients(one_summary(fused)), 1, 2, 2, 2, 3, DType::float32, 1.5f, 2, true};
    std::vector<float> x = floats_of(make_tokens(p, count_tokens(p, false)));
    const std::vector<float> wanted = {1, -2, 3, 2, 1, -1};
    double first = 0, last = 0;
    for (int step = 0; step < 300; ++step) {
      std::vector<float> grad = floats_of(run(p, bytes_of(x), Op::grid_pool, {}));
      double loss = 0;
      for (size_t k = 0; k < grad.size(); ++k) grad[k] -= wanted[k], loss += grad[k] * grad[k] / 2;
      (step == 0 ? first : last) = loss;
      const std::vector<float> slope =
          floats_of(run(p, bytes_of(x), Op::grid_pool_backward, threads_of(2), bytes_of(grad)));
      CHECK(slope.size() == x.size());
      for (size_t k = 0; k < x.size(); ++k) x[k] -= 0.3f * slope[k];
    }
    CHECK(first > 1);
    CHECK(last < 1e-6 * first);
  }
}

// Tokens whose channels are not neighbours are copied into scratch, several at a time.
void test_scratch_is_large_enough() {
  constexpr int64_t H = 4, W = 16, C = 3, GUARD = 4096;
  const std::vector<float> x(C * H * W, 2);  // (C, H, W)
  const std::string before = stgp::cpu::capability();
  for (const std::string& name : capabilities()) {
    CHECK(stgp::cpu::use_capability(name.c_str()));
    std::vector<float> norms(H * W);
    Call call;
    call.dtype = DType::float32;
    call.T = 1;
    call.C = C;
    call.x = x.data();
    call.x_strides = {H * W, H * W, W, 1, H * W};
    call.out = norms.data();
    call.out_strides = contiguous(1, H, W, 1);
    const int64_t bytes = stgp::cpu::scratch_bytes(Op::token_norm, nullptr, call, {});
    const Memory scratch(bytes + GUARD);
    call.scratch = scratch.data();
    stgp::cpu::token_norm(1, H, W, call, {});
    for (const float norm : norms) CHECK(norm == 2);
    const char* const guard = static_cast<const char*>(scratch.data()) + bytes;
    for (int64_t i = 0; i < GUARD; ++i) CHECK(guard[i] == '\xff');
  }
  CHECK(stgp::cpu::use_capability(before.c_str()));
}

void test_no_frames_and_no_tokens() {
  Problem p{one_window(), 0, 0, 2, 2, 2, DType::float32, 1, 2, true};
  p.tables[stgp::H_FRAMES] = 0;
  CHECK(wrong_with(p.tables) == nullptr);
  for (const int count : {1, 3}) {
    for (const Op op : {Op::grid_pool, Op::temporal_grid, Op::token_norm}) {
      CHECK(run(p, {}, op, threads_of(count)).empty());
    }
    Problem with_section = p;
    const auto end = static_cast<int32_t>(p.tables.size());
    with_section.tables.insert(with_section.tables.end(), {end + 1, 0, 0, 1, 1, end, end, end + 1, end + 1});
    with_section.tables[stgp::H_GRADIENT] = end + 5;
    with_section.tables[stgp::H_WORDS] = end + 9;
    CHECK(wrong_with(with_section.tables) == nullptr);
    for (const Op op : {Op::grid_pool_backward, Op::temporal_grid_backward}) {
      CHECK(run(with_section, {}, op, threads_of(count)).empty());
    }
    Problem without_rows{p.tables, 1, 2, 0, 3, 2, DType::float32, 1, 2, true};
    CHECK(run(without_rows, {}, Op::token_norm, threads_of(count)).empty());
    Problem without_cols{p.tables, 1, 2, 3, 0, 2, DType::float32, 1, 2, true};
    CHECK(run(without_cols, {}, Op::token_norm, threads_of(count)).empty());
  }
}

void test_tables_that_are_refused(const Tables& good) {
  CHECK(wrong_with(good) == nullptr);
  CHECK(stgp::check_tables(nullptr, 0) != nullptr);
  for (size_t words = 0; words < good.size(); ++words) {
    const Tables cut(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(words));
    CHECK(wrong_with(cut) != nullptr);
  }
  Tables longer = good;
  longer.push_back(0);
  CHECK(wrong_with(longer) != nullptr);
  Tables foreign(good.size(), 0x20202020);
  CHECK(std::string(wrong_with(foreign)) == "these are no tables of a plan");
  Tables newer = good;
  newer[stgp::H_VERSION] += 1;
  CHECK(std::string(wrong_with(newer)) == "the tables have another version");
  // no number in the header but the first offsets may be anything
  for (const int32_t value : {INT32_MIN, -1, INT32_MAX}) {
    for (int word = 0; word < stgp::HEADER_WORDS; ++word) {
      Tables changed = good;
      changed[word] = value;
      CHECK(wrong_with(changed) != nullptr);
    }
  }
}

// Every word of the gradient section above is an offset, a place, a count, or an output frame, for which -1 stands for
// none.
void test_gradients_that_are_refused() {
  for (const bool fused : {false, true}) {
    const Tables without = one_summary(fused), good = with_gradients(without);
    const auto ends = static_cast<size_t>(good[good[stgp::H_GRADIENT] + stgp::G_ENDS]);
    for (size_t word = without.size(); word < good.size(); ++word) {
      const bool is_end = ends <= word && word < ends + 3;
      for (const int32_t value : {INT32_MIN, is_end ? -2 : -1, is_end ? 2 : 1 << 20, INT32_MAX}) {
        Tables changed = good;
        changed[word] = value;
        CHECK(wrong_with(changed) != nullptr);
      }
    }
    for (const int32_t value : {1, int32_t{stgp::HEADER_WORDS} - 1, good[stgp::H_WORDS] - 4, good[stgp::H_WORDS]}) {
      Tables changed = good;
      changed[stgp::H_GRADIENT] = value;
      CHECK(wrong_with(changed) != nullptr);
    }
  }
  // a summary goes to later levels only: otherwise its gradient would wait for itself
  Tables circular = with_gradients(one_summary(true));
  int32_t* const starts = circular.data() + circular[circular[stgp::H_GRADIENT]];
  starts[2] -= stgp::CONSUMER_WORDS;
  CHECK(std::string(wrong_with(circular)) == "a consumer is out of range");
}

// A tile that a mosaic shows has to be there: -1 stands for one that nothing depends on.
void test_missing_tiles_are_refused() {
  const Tables good = one_summary(true);
  const int32_t* stage = good.data() + good[stgp::H_STAGES] + stgp::STAGE_WORDS;
  for (int tile = 0; tile < 4; ++tile) {
    Tables changed = good;
    changed[stage[stgp::S_ENTRIES] + stgp::E_SOURCES + tile] = -1;
    CHECK(wrong_with(changed) != nullptr);
  }
}

// Products of sizes that are in range each must not wrap around to something small.
void test_sizes_whose_product_exceeds_64_bits() {
  Tables t = one_summary(false);
  t.resize(int64_t{1} << 22);
  t[stgp::H_WORDS] = 1 << 22;
  int32_t* level = t.data() + t[stgp::H_LEVELS];
  level[stgp::L_ROWS] = level[stgp::L_COLS] = 1 << 22;
  level[stgp::L_COUNT] = 1 << 20;
  CHECK(wrong_with(t) != nullptr);
}

// Scratch of calls on views, whose sizes may be anything, does not wrap around either.
void test_scratch_that_exceeds_64_bits() {
  const int64_t most = std::numeric_limits<int64_t>::max() / 64 * 64;
  for (const bool fused : {false, true}) {
    Tables t = with_gradients(one_summary(fused));
    for (const Op op :
         {Op::grid_pool, Op::temporal_grid, Op::token_norm, Op::grid_pool_backward, Op::temporal_grid_backward}) {
      Call call{.dtype = DType::float32, .T = 2, .C = 8};
      call.x_strides.channel = op == Op::token_norm ? 0 : 1;
      for (const int threads : {1, 1 << 16}) {
        int64_t bytes = 0, before = 0;
        for (const int64_t C : {int64_t{8}, int64_t{1} << 40, int64_t{1} << 58, int64_t{1} << 60, most, most + 63}) {
          call.C = C;
          bytes = stgp::cpu::scratch_bytes(op, t.data(), call, {threads});
          CHECK(before <= bytes && bytes % 64 == 0);
          before = bytes;
        }
        CHECK(bytes == most || bytes < int64_t{1} << 40);  // where no array has channels
        CHECK(bytes == most || !fused || op == Op::temporal_grid);
      }
    }
    Call call{.dtype = DType::float32, .T = 2, .C = int64_t{1} << 40};
    t[stgp::H_SUMMARIES] = t[stgp::H_SLOTS] = 1 << 23;
    CHECK(stgp::cpu::scratch_bytes(Op::grid_pool_backward, t.data(), call, {}) == most);
    CHECK(stgp::cpu::scratch_bytes(Op::grid_pool, t.data(), call, {}) == most);
  }
}

void test_capabilities() {
  const std::string before = stgp::cpu::capability();
  const std::vector<std::string> names = capabilities();
  CHECK(!names.empty());
  CHECK(names.back() == "portable");
  CHECK(names.front() == before);  // by default the widest
  for (const std::string& name : names) {
    CHECK(stgp::cpu::use_capability(name.c_str()));
    CHECK(stgp::cpu::capability() == name);
  }
  for (const char* unknown : {"", "AVX2", "avx", "neon", "portable "}) CHECK(!stgp::cpu::use_capability(unknown));
  CHECK(std::string(stgp::cpu::capability()) == "portable");
  CHECK(stgp::cpu::use_capability(before.c_str()));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 12) return run_file(argv + 1);
  if (argc == 15) return run_one_op(argv + 1);
  if (argc != 1) give_up("takes no arguments, 11 or 14, see the beginning of grid_pool_test.cpp");
  test_capabilities();
  test_results_by_hand();
  test_a_summary_by_hand();
  test_gradients_by_hand();
  test_training();
  test_scratch_is_large_enough();
  test_no_frames_and_no_tokens();
  test_tables_that_are_refused(one_summary(true));
  test_tables_that_are_refused(with_gradients(one_summary(true)));
  test_gradients_that_are_refused();
  test_missing_tiles_are_refused();
  test_sizes_whose_product_exceeds_64_bits();
  test_scratch_that_exceeds_64_bits();
  if (failures == 0) std::puts("all checks passed");
  return failures == 0 ? 0 : 1;
}
