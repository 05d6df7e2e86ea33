// The kernel that tests count instructions of. It has a loop over steps, a condition for each of two stores, and slow
// paths of a root and of a division, which are called.
extern "C" __global__ void small_kernel(const float* x, float* out, float* cells, const int* pools, const int* shrinks,
                                        int steps) {
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int token = step * blockDim.x + threadIdx.x;
    const float value = x[token];
    if (pools[step]) __stcs(out + token, sqrtf(value));
    if (shrinks[step]) cells[token] = 1.0f / value;
  }
}
