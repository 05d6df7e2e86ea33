// How fast this machine moves memory: bytes in the proportion and order of pooling, and plain reads.
// probe.py compiles and calls it. All sizes are in bytes; those of tokens and buffers, and the address
// that is written to, are multiples of LINE. Stores bypass the cache where the architecture has such (x86-64).

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LINE = 64;        // bytes of a cache line
constexpr int64_t PIECE = 1 << 16;  // bytes that a thread reads at a time

typedef uint64_t Line __attribute__((vector_size(LINE)));

inline Line load(const char* from) {
  Line line;
  std::memcpy(&line, from, LINE);
  return line;
}

inline void stream(char* to, const Line& line) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<const __m512i&>(line));
#elif defined(__AVX__)
  const __m256i* halves = reinterpret_cast<const __m256i*>(&line);
  for (int i = 0; i < 2; ++i) _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i, halves[i]);
#elif defined(__SSE2__)
  const __m128i* quarters = reinterpret_cast<const __m128i*>(&line);
  for (int i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, quarters[i]);
#else
  std::memcpy(to, &line, LINE);
#endif
}

inline void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace

// out (frames, out_height, out_width) = the bitwise or of the 2 x 2 tokens of x (frames, height, width) at each window.
// Where the far edge cuts a window, its tokens are taken again in place of those that are not there.
extern "C" void pool(const char* x, char* out, int64_t frames, int64_t height, int64_t width, int64_t out_height,
                     int64_t out_width, int64_t token, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t row = 0; row < frames * out_height; ++row) {
    const int64_t top = row % out_height * 2, bottom = std::min(top + 1, height - 1);
    const char* const frame = x + row / out_height * height * width * token;
    for (int64_t col = 0; col < out_width; ++col) {
      const int64_t left = col * 2, right = std::min(left + 1, width - 1);
      const char *a = frame + (top * width + left) * token, *b = frame + (top * width + right) * token,
                 *c = frame + (bottom * width + left) * token, *d = frame + (bottom * width + right) * token;
      char* const to = out + (row * out_width + col) * token;
      for (int64_t i = 0; i < token; i += LINE) stream(to + i, load(a + i) | load(b + i) | load(c + i) | load(d + i));
    }
    finish_stores();
  }
}

// The bitwise or of all words of x.
extern "C" uint64_t read(const char* x, int64_t size, int threads) {
  uint64_t found = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : found)
  for (int64_t first = 0; first < size; first += PIECE) {
    Line lines[4] = {};
    int64_t i = first;
    const int64_t last = std::min(first + PIECE, size);
    for (; i + 4 * LINE <= last; i += 4 * LINE) {
      for (int k = 0; k < 4; ++k) lines[k] |= load(x + i + k * LINE);
    }
    for (; i < last; i += LINE) lines[0] |= load(x + i);
    const Line line = (lines[0] | lines[1]) | (lines[2] | lines[3]);
    for (int k = 0; k < 8; ++k) found |= line[k];
  }
  return found;
}
