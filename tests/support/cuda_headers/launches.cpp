// The launches of a call, which are listed in place of being run: by the offset of the kernel in this library, from
// which a symbol table gives its name.

#include <dlfcn.h>

#include <cstdint>
#include <vector>

#include "cuda_runtime.h"

namespace {

struct Launch {
  int64_t kernel, blocks, threads, shared_bytes;
};

bool listing = false;
std::vector<Launch> listed;

}  // namespace

namespace emulation {

bool is_listed(const void* kernel, const cudaLaunchConfig_t& config) {
  if (!listing) return false;
  Dl_info found{};
  dladdr(kernel, &found);
  const auto offset = static_cast<const char*>(kernel) - static_cast<const char*>(found.dli_fbase);
  const auto& [x, y, z] = config.gridDim;
  listed.push_back({offset, int64_t{x} * y * z, config.blockDim.x, static_cast<int64_t>(config.dynamicSmemBytes)});
  return true;
}

}  // namespace emulation

extern "C" {

// From here on launches are listed, and do not run.
void stgp_list_launches() {
  listing = true;
  listed.clear();
}

// Writes the listed launches, four numbers each, and returns how many there are. From here on launches run again.
int64_t stgp_listed_launches(int64_t* numbers, int64_t most) {
  listing = false;
  for (int64_t n = 0; n < most && n < static_cast<int64_t>(listed.size()); ++n) {
    const Launch& launch = listed[static_cast<size_t>(n)];
    numbers[4 * n] = launch.kernel;
    numbers[4 * n + 1] = launch.blocks;
    numbers[4 * n + 2] = launch.threads;
    numbers[4 * n + 3] = launch.shared_bytes;
  }
  return static_cast<int64_t>(listed.size());
}

}  // extern "C"
