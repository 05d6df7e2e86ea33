// Norms of tokens: the result of token_norm, and norms for the weights of the general form.

#include <cmath>

#include "norms.cuh"

namespace stgp::cuda {
namespace {

template <class T>
struct Norms {
  Nodes<T> nodes;
  const int32_t* final;  // the node of each output frame; nullptr: the frame of x
  Frames<float> norms;   // (videos, T, H, W)
  int32_t first;         // first frame of this launch
  int32_t channels;      // number of channels that the norm runs over
  Norm norm;
  bool mean;        // whether the norm has the mean over channels; else it has the sum
  bool exact;       // whether division and root are rounded correctly
  float inv_count;  // 1 / channels with the mean, 1 with the sum
  double p;
};

// norm[t, r, c] = (mean_k |x[t, r, c, k]|^p)^(1/p), or the sum in place of the mean. A block computes one norm.
template <class T, Access A, bool POWER>
__global__ void __launch_bounds__(MAX_THREADS) token_norm_kernel(const __grid_constant__ Norms<T> p) {
  const int32_t W = p.nodes.W, H = p.nodes.H, C = p.channels;
  const int32_t block = blockIdx.x, col = block % W, row = block / W % H, frame = p.first + block / W / H;
  int64_t stride;
  const T* token = p.nodes.token(p.final == nullptr ? frame : p.final[frame], row, col, &stride);

  float total[1] = {};
  if constexpr (POWER) {
    // Powers are float64: if |t|^p is far from 1, rounding errors of log2 would be visible in float32. Threads have the
    // same channels as with vecs.
    for_each_vec<T>(C, [&](int32_t channel) {
#pragma unroll 1
      for (int32_t k = channel; k < min(channel + PER_VEC<T>, C); ++k) {
        const double magnitude = fabsf(static_cast<float>(token[k * stride]));
        total[0] += static_cast<float>(exp2(p.p * log2(magnitude)));
      }
    });
  } else {
    Total<T> found;
    for_each_vec<T>(
        C, [&](int32_t channel) { found.add(p.norm, load_vec<A, CacheHint::keep>(token, channel, C, stride)); });
    total[0] = found.of_thread(p.norm);
  }
  join_block(Join{p.norm}, total, 0);
  if (threadIdx.x != 0) return;

  float norm = total[0];
  if (POWER || (p.exact && p.norm != Norm::max)) {
    if (p.mean) norm = __fdiv_rn(norm, static_cast<float>(C));
    if constexpr (POWER) {
      norm = static_cast<float>(exp2(log2(static_cast<double>(norm)) / p.p));
    } else if (p.norm == Norm::l2) {
      norm = __fsqrt_rn(norm);
    }
  } else {
    norm = finish_norm(p.norm, norm, p.inv_count);
  }
  *p.norms.token(p.norms.frame(frame), row, col) = norm;
}

template <class T>
cudaError_t find(int32_t frames, int32_t H, int32_t W, const Call& call, const int32_t* final, float* norms,
                 const Strides& norm_strides, bool exact, cudaStream_t stream) {
  Norms<T> p{};
  p.nodes = {frames_of_x<T>(call), static_cast<const T*>(call.scratch), H, W, static_cast<int32_t>(call.C)};
  p.final = final;
  p.norms = {norms, norm_strides, Divisor(call.T)};
  p.channels = static_cast<int32_t>(channels_of_norm(call));
  p.norm = norm_kind(call.norm_type);
  p.mean = call.normalize_norm;
  p.exact = exact;
  p.inv_count = inv_count_of_norm(call);
  p.p = call.norm_type;

  // Tokens of summaries are C channels apart in scratch: an access of 16 bytes needs whole vecs of C channels too.
  const bool is_vector = p.channels % PER_VEC<T> == 0 &&
                         is_vectorized(call.x, call.x_strides, frames / call.T, call.T, H, W, call.C, sizeof(T));
  const auto kernel = p.norm == Norm::power ? token_norm_kernel<T, Access::scalar, true>
                      : is_vector           ? token_norm_kernel<T, Access::vector, false>
                                            : token_norm_kernel<T, Access::scalar, false>;
  const int64_t blocks = static_cast<int64_t>(H) * W;
  return launch_in_ranges(frames, blocks, [&](int32_t first, int32_t range) {
    p.first = first;
    return launch(kernel, range * blocks, block_threads(p.channels, sizeof(T)), stream, p);
  });
}

}  // namespace

cudaError_t find_norms(int32_t frames, int32_t H, int32_t W, const Call& call, const int32_t* final, float* norms,
                       const Strides& norm_strides, bool exact, cudaStream_t stream) {
  return with_type(call.dtype, [&](auto value) {
    return find<decltype(value)>(frames, H, W, call, final, norms, norm_strides, exact, stream);
  });
}

}  // namespace stgp::cuda
