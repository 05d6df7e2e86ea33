// Fibers behind cuda_runtime.h, and the functions that tests/support/cuda_emulation.py calls.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "../../../csrc/grid_pool.h"
#include "cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// All variables in shared memory.
extern char __start_shared_memory[], __stop_shared_memory[];

dim3 threadIdx, blockIdx, blockDim;

namespace stgp::cuda {

extern __shared__ float4 dynamic_shared_memory[];
float4 dynamic_shared_memory[(48 << 10) / sizeof(float4)];

}  // namespace stgp::cuda

namespace emulation {
namespace {

constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 64 << 10;

enum class State { runs, at_barrier, at_exchange, done };

struct Fiber {
  unsigned thread;
  State state;
  uint32_t value;
  unsigned source;
  uint32_t matrices[2][3];  // of two consecutive calls of multiply_add: a lane may be one call ahead of another
  unsigned multiplied = 0;  // number of these calls
  bool started = false;
  jmp_buf here;
  ucontext_t first;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
};

std::vector<std::unique_ptr<Fiber>> fibers;  // of the largest block so far
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* body;

#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack;
size_t scheduler_size;
void leave_to(const void* stack, size_t size, void** fake) { __sanitizer_start_switch_fiber(fake, stack, size); }
void arrive(void* fake, const void** from, size_t* size) { __sanitizer_finish_switch_fiber(fake, from, size); }
#else
void leave_to(const void*, size_t, void**) {}
void arrive(void*, const void**, size_t*) {}
const void* scheduler_stack;
size_t scheduler_size;
#endif

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda emulation: %s (block %u of %u threads)\n", what, blockIdx.x, blockDim.x);
  std::abort();
}

// Back to the scheduler until it resumes this fiber.
void pause(State state) {
  Fiber* self = current;
  self->state = state;
  void* fake = nullptr;
  if (_setjmp(self->here) == 0) {
    leave_to(scheduler_stack, scheduler_size, &fake);
    _longjmp(scheduler, 1);
  }
  arrive(fake, &scheduler_stack, &scheduler_size);
}

// A fiber lives as long as the process: it runs a thread of one block after the other.
void live() {
  arrive(nullptr, &scheduler_stack, &scheduler_size);
  for (;;) {
    (*body)();
    pause(State::done);
  }
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx.x = fiber.thread;
  fiber.state = State::runs;
  void* fake = nullptr;
  if (_setjmp(scheduler) == 0) {
    leave_to(fiber.stack.get(), STACK_BYTES, &fake);
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.first);
  }
  arrive(fake, nullptr, nullptr);
}

unsigned count(unsigned first, unsigned last, State state) {
  unsigned found = 0;
  for (unsigned t = first; t < last; ++t) found += fibers[t]->state == state;
  return found;
}

// Runs a warp until all of its lanes are done or at a barrier.
void run_warp(unsigned first, unsigned last) {
  for (;;) {
    for (unsigned t = first; t < last; ++t) {
      if (fibers[t]->state == State::runs) resume(*fibers[t]);
    }
    const unsigned exchanging = count(first, last, State::at_exchange);
    if (exchanging == 0) return;
    if (exchanging != last - first) fail("not all lanes of a warp reached the same exchange");
    uint32_t values[WARP];
    for (unsigned t = first; t < last; ++t) {
      if (fibers[t]->source >= last - first) fail("an exchange with a lane that does not exist");
      values[t - first] = fibers[first + fibers[t]->source]->value;
    }
    for (unsigned t = first; t < last; ++t) {
      fibers[t]->value = values[t - first];
      fibers[t]->state = State::runs;
    }
  }
}

void run_block(unsigned threads) {
  const unsigned warps = (threads + WARP - 1) / WARP;
  for (bool backward = false;; backward = !backward) {
    for (unsigned n = 0; n < warps; ++n) {
      const unsigned first = (backward ? warps - 1 - n : n) * WARP;
      run_warp(first, std::min(first + WARP, threads));
    }
    const unsigned waiting = count(0, threads, State::at_barrier);
    if (waiting == 0) return;
    if (waiting != threads) fail("some threads wait at a barrier that others never reach");
    for (unsigned t = 0; t < threads; ++t) fibers[t]->state = State::runs;
  }
}

}  // namespace

void barrier() { pause(State::at_barrier); }

uint32_t exchange(uint32_t value, unsigned source) {
  current->value = value;
  current->source = source;
  pause(State::at_exchange);
  return current->value;
}

void multiply_add(float (&sum)[4], uint32_t upper, uint32_t lower, uint32_t b) {
  Fiber& self = *current;
  const unsigned call = self.multiplied++ % 2, lane = self.thread % WARP, first = self.thread - lane;
  const uint32_t words[3] = {upper, lower, b};
  std::copy(words, words + 3, self.matrices[call]);
  exchange(0, lane);
  const auto value = [&](unsigned lane, int matrix, unsigned half) {
    return __uint_as_float(fibers[first + lane]->matrices[call][matrix] >> 16 * half << 16);
  };
  for (unsigned n = 0; n < 4; ++n) {
    const unsigned row = lane / 4 * 4,
                   col = (lane % 4 * 2 + n % 2) * 4;  // the first lanes that have this row and column
    double total = sum[n];
    for (unsigned k = 0; k < 8; ++k) {
      total += static_cast<double>(value(row + k / 2, n / 2, k % 2)) * value(col + k / 2, 2, k % 2);
    }
    sum[n] = static_cast<float>(total);
    if (std::abs(static_cast<double>(sum[n])) > std::abs(total)) sum[n] = std::nextafter(sum[n], 0.0f);
  }
}

void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  static const std::vector<char> untouched(sizeof stgp::cuda::dynamic_shared_memory, '\xff');
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  while (fibers.size() < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers.back();
    getcontext(&fiber.first);
    fiber.first.uc_stack = {fiber.stack.get(), 0, STACK_BYTES};
    makecontext(&fiber.first, live, 0);
  }
  body = &kernel;
  blockDim.x = threads;
  for (unsigned block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    std::memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
    for (unsigned t = 0; t < threads; ++t) {
      fibers[t]->thread = t;
      fibers[t]->multiplied = 0;
      fibers[t]->state = State::runs;
    }
    run_block(threads);
    const char* dynamic = reinterpret_cast<const char*>(stgp::cuda::dynamic_shared_memory);
    if (std::memcmp(dynamic + shared_bytes, untouched.data(), untouched.size() - shared_bytes) != 0) {
      fail("a block wrote to dynamic shared memory that its launch does not have");
    }
  }
}

}  // namespace emulation

using namespace stgp;

extern "C" {

int64_t stgp_call_bytes() { return sizeof(Call); }

int64_t stgp_scratch_bytes(int32_t op, const int32_t* tables, const Call* call) {
  return cuda::scratch_bytes(static_cast<Op>(op), tables, *call);
}

int stgp_grid_pool(const int32_t* tables, const Call* call) { return cuda::grid_pool(tables, tables, *call, nullptr); }

int stgp_temporal_grid(const int32_t* tables, const Call* call) {
  return cuda::temporal_grid(tables, tables, *call, nullptr);
}

int stgp_grid_pool_backward(const int32_t* tables, const Call* call) {
  return cuda::grid_pool_backward(tables, tables, *call, nullptr);
}

int stgp_temporal_grid_backward(const int32_t* tables, const Call* call) {
  return cuda::temporal_grid_backward(tables, tables, *call, nullptr);
}

int stgp_token_norm(int64_t frames, int64_t H, int64_t W, const Call* call) {
  return cuda::token_norm(frames, H, W, *call, nullptr);
}

}  // extern "C"
