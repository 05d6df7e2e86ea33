// What the Python module has besides ops. It is defined in binding.cpp, and takes addresses in place of tensors.

#pragma once

#include <cstdint>

#include "grid_pool.h"

namespace stgp {

// A call of grid_pool or temporal_grid on contiguous tensors on the CPU. Everything but their addresses is set
// beforehand, which saves the microseconds in which an op unpacks tensors and seven other arguments.
class DenseCall {
 public:
  // tables: the address of checked tables of the call, which must outlive this object.
  DenseCall(Op op, uintptr_t tables, DType dtype, int64_t C, double temperature, double norm_type, bool normalize_norm,
            int64_t norm_channels);

  // Runs the call. x and out: addresses of tensors of the dtype and of the sizes in the tables.
  void run(uintptr_t x, uintptr_t out) const;

 private:
  Op op;
  const int32_t* tables;
  Call call;
};

// Frees the scratch that is kept between calls. Returns its size in bytes.
int64_t release_scratch();

// Has the system back memory, whose contents do not matter yet, by huge pages.
void take_huge_pages(uintptr_t address, uintptr_t bytes);

}  // namespace stgp
