// Division by a number that is known before a launch, as a product: an integer division is some 20 instructions.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace stgp::cuda {

// A divisor from 1 to 2^31 - 1 of numbers from 0 to 2^31 - 1.
struct Divisor {
  int32_t value;
  uint32_t multiplier;
  uint32_t shift;

  Divisor() = default;

  // With 2^(shift - 1) < value <= 2^shift, the multiplier is 2^(31 + shift) / value, rounded up by less than 1. For n
  // below 2^31 it makes the quotient n / value too large by less than 1 / value, so that its integer part is right.
  explicit Divisor(int64_t value) : value(static_cast<int32_t>(value)), shift(0) {
    while ((int64_t{1} << shift) < value) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + value - 1) / value);
  }

  // Returns number / value, rounded down.
  __device__ __forceinline__ int32_t quotient(int32_t number) const {
    return static_cast<int32_t>(__umulhi(static_cast<uint32_t>(number) << 1, multiplier) >> shift);
  }
};

}  // namespace stgp::cuda
