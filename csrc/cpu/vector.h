// Vectors of floats, STGP_VECTOR_BYTES wide, and conversions between them and tokens. The arithmetic is that of the
// compiler's vector types, which exist on every architecture. Intrinsics are used for operations that these types lack:
// conversions of float16, roundings to bfloat16 by masks of AVX-512, and stores past the cache.
//
// kernels.cpp is compiled once for each set of vector instructions. All functions in it and in its headers are in an
// unnamed namespace, and they use no header of the C++ library: if two of the objects had a function of one name, the
// linker could give code for AVX-512 to a CPU without it.

#pragma once

#include <stdint.h>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "little-endian only: pairs of bfloat16 are taken apart by shifting"
#endif

namespace {

constexpr int LANES = STGP_VECTOR_BYTES / 4;
constexpr int BLOCK = 2 * LANES;  // channels of a Block

typedef float Floats __attribute__((vector_size(STGP_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(STGP_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(STGP_VECTOR_BYTES)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// BLOCK consecutive channels of a token. The type of the token decides which channel is in which lane. load and store
// use the same order, and arithmetic on single channels does not depend on it.
struct Block {
  Floats a, b;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

template <typename V>
inline V load_bytes(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// Compilers leave out the subtraction of 0, which changes no value. They must keep an addition, which turns -0 into 0.
inline Floats splat(float value) { return value - Floats{}; }

inline Floats absolute(Floats v) { return bit_cast<Floats>(bit_cast<Ints>(v) & 0x7fffffff); }

inline float sum_lanes(Floats v) {
  float lanes[LANES];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int width = LANES / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// ---- shuffles ----

template <int... LANE>
struct Lanes {};

template <int N, int... LANE>
struct Counted : Counted<N - 1, N - 1, LANE...> {};

template <int... LANE>
struct Counted<0, LANE...> {
  using Type = Lanes<LANE...>;
};

using AllLanes = Counted<LANES>::Type;  // Lanes<0, 1, ..., LANES - 1>

// Returns the lanes SOURCE of a and b. Those of b are numbered from LANES on.
template <int... SOURCE>
inline Floats shuffle(Floats a, Floats b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, SOURCE...);
#else
  return __builtin_shuffle(a, b, Ints{SOURCE...});
#endif
}

// Returns v with lane i and lane i ^ BIT exchanged.
template <int BIT, int... LANE>
inline Floats exchanged(Floats v, Lanes<LANE...>) {
  return shuffle<(LANE ^ BIT)...>(v, v);
}

// a and b consist of runs of 2 * WIDTH lanes, each of which holds parts of one sum. In the result these have WIDTH
// lanes, and the runs of a and b alternate.
template <int WIDTH, int... LANE>
inline Floats fold(Floats a, Floats b, Lanes<LANE...>) {
  return shuffle<(LANE / WIDTH % 2 * LANES + LANE / WIDTH / 2 * 2 * WIDTH + LANE % WIDTH)...>(a, b) +
         shuffle<(LANE / WIDTH % 2 * LANES + LANE / WIDTH / 2 * 2 * WIDTH + WIDTH + LANE % WIDTH)...>(a, b);
}

// Lane i of the result is the sum of the lanes of vectors[i], in the order of sum_lanes. LANES vectors are overwritten.
template <int WIDTH = LANES / 2>
inline Floats sums_of_lanes(Floats* vectors) {
  for (int i = 0; i < WIDTH; ++i) vectors[i] = fold<WIDTH>(vectors[i], vectors[i + WIDTH], AllLanes{});
  if constexpr (WIDTH > 1) return sums_of_lanes<WIDTH / 2>(vectors);
  return vectors[0];
}

// ---- exponentials and powers ----

// e^v for v <= 0, with an error below 1 ulp. NaN stays NaN.
inline Floats exponential(Floats v) {
  constexpr float ROUNDER = 0x1.8p23f;                  // a float near it has no fraction
  const Floats low = v < -150.0f ? splat(-150.0f) : v;  // both round to 0
  const Floats rounded = low * 1.44269504f + ROUNDER, n = rounded - ROUNDER;
  const Floats rest = (low - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;  // log(2) is the difference of the constants
  // The coefficient after 1 / 5040 is 1 / 720 and a little more, which stands for the terms that are left out.
  constexpr float SERIES[] = {0.0013916f, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2};
  Floats sum = splat(1.0f / 5040);
  for (const float coefficient : SERIES) sum = sum * rest + coefficient;
  sum = (sum * rest * rest + rest) + 1;  // 1 comes last, since each sum before it is small
  // 2^n can be too small for a normal float, the powers of both halves of n are not
  const Ints exponent = bit_cast<Ints>(rounded) - bit_cast<int32_t>(ROUNDER), half = exponent >> 1;
  return sum * bit_cast<Floats>((half + 127) << 23) * bit_cast<Floats>((exponent - half + 127) << 23);
}

typedef float HalfFloats __attribute__((vector_size(STGP_VECTOR_BYTES / 2)));
typedef double Doubles __attribute__((vector_size(STGP_VECTOR_BYTES)));
typedef uint64_t LongWords __attribute__((vector_size(STGP_VECTOR_BYTES)));

// log2(v) for normal v > 0, with an error near 1e-12: v = 2^e m with m near 1, and log(m) = 2 artanh(s), where
// s = (m - 1) / (m + 1).
inline Doubles log2_of(Doubles v) {
  // Adding the bits of 1 minus those of sqrt(1/2) maps a fraction in [1, 2) to m in [sqrt(1/2), sqrt(2)).
  const LongWords shifted = bit_cast<LongWords>(v) + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);
  const Doubles m = bit_cast<Doubles>((shifted & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu);
  // The bits of an integer n < 2^52 are the fraction of the double 2^52 + n.
  const Doubles e = bit_cast<Doubles>((shifted >> 52) | 0x4330000000000000u) - (0x1p52 + 1023);
  const Doubles s = (m - 1) / (m + 1), z = s * s;
  Doubles sum = Doubles{} + 1.0 / 15;
  for (int k = 13; k > 0; k -= 2) sum = sum * z + 1.0 / k;
  return e + s * sum * 2.8853900817779268;  // 2 / log(2)
}

// 2^v for v in [-1022, 1023], with an error near 1e-12: v is an integer, whose power is set as an exponent, plus a rest
// in [-1/2, 1/2], whose power is a series.
inline Doubles exp2_of(Doubles v) {
  const Doubles rounded = v + 0x1.8p52;
  const Doubles rest = (v - (rounded - 0x1.8p52)) * 0.69314718055994531;  // log(2)
  Doubles sum = Doubles{} + 1;
  for (int k = 11; k > 0; --k) sum = sum * rest * (1.0 / k) + 1;
  return sum * bit_cast<Doubles>((bit_cast<LongWords>(rounded) + 1023) << 52);
}

// v^p for half of the lanes: see power. Both functions are always inlined, so that loops keep constants in registers.
__attribute__((always_inline)) inline HalfFloats half_power(HalfFloats v, double p) {
  const Doubles exponent = p * log2_of(__builtin_convertvector(v, Doubles));
  const Doubles low = exponent > -1022.0 ? exponent : Doubles{} - 1022;
  return __builtin_convertvector(exp2_of(low < 1023.0 ? low : Doubles{} + 1023), HalfFloats);
}

// v^p for v >= 0 and p > 0, rounded from float64. Zero, infinity and NaN are their own powers.
__attribute__((always_inline)) inline Floats power(Floats v, double p) {
  HalfFloats halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  halves[0] = half_power(halves[0], p), halves[1] = half_power(halves[1], p);
  const Floats powers = load_bytes<Floats>(halves);
  const Ints usual = (v > 0.0f) & (v < __builtin_inff());
  return usual ? powers : v;
}

// ---- stores ----

// Stores v past the cache if `stream` is set and the address is aligned.
template <typename V>
inline void store_bytes(void* to, V v, bool stream) {
#if defined(__SSE2__)
  if (stream && reinterpret_cast<uintptr_t>(to) % sizeof(V) == 0) {
#if STGP_VECTOR_BYTES == 64
    _mm512_stream_si512(static_cast<__m512i*>(to), bit_cast<__m512i>(v));
#elif STGP_VECTOR_BYTES == 32
    _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(v));
#else
    _mm_stream_si128(static_cast<__m128i*>(to), bit_cast<__m128i>(v));
#endif
    return;
  }
#else
  (void)stream;
#endif
  __builtin_memcpy(to, &v, sizeof v);
}

// Call this after the last store past the cache: it makes them visible to other threads before any later store.
inline void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- float32 ----

inline Block load(const float* token) { return {load_bytes<Floats>(token), load_bytes<Floats>(token + LANES)}; }

inline void store(float* token, Block v, bool stream) {
  store_bytes(token, v.a, stream);
  store_bytes(token + LANES, v.b, stream);
}

// ---- bfloat16 ----

// One vector holds the even channels, the other one the odd channels: bits move within 32-bit words only.
inline Block load(const BFloat16* token) {
  const Words pairs = load_bytes<Words>(token);
  return {bit_cast<Floats>(pairs << 16), bit_cast<Floats>(pairs & 0xffff0000u)};
}

// The upper half of each word is the nearest bfloat16, ties to even. NaN stays NaN without a test: its lower half is 0,
// as in each NaN that comes from a bfloat16 or from arithmetic, so that the addition does not reach the upper half.
inline Words round_to_bfloat16(Floats v) {
  const Words bits = bit_cast<Words>(v), rounded = bits + 0x7fff;
#if STGP_VECTOR_BYTES == 64
  const __m512i odd = _mm512_set1_epi32(0x10000), one = _mm512_set1_epi32(1);
  const __mmask16 is_odd = _mm512_test_epi32_mask(bit_cast<__m512i>(bits), odd);
  return bit_cast<Words>(_mm512_mask_add_epi32(bit_cast<__m512i>(rounded), is_odd, bit_cast<__m512i>(rounded), one));
#else
  return rounded + ((bits >> 16) & 1);
#endif
}

inline void store(BFloat16* token, Block v, bool stream) {
  store_bytes(token, (round_to_bfloat16(v.a) >> 16) | (round_to_bfloat16(v.b) & 0xffff0000u), stream);
}

// ---- float16 ----

#if STGP_VECTOR_BYTES == 64

inline Block load(const Float16* token) {
  return {_mm512_cvtph_ps(load_bytes<__m256i>(token)), _mm512_cvtph_ps(load_bytes<__m256i>(token + LANES))};
}

inline void store(Float16* token, Block v, bool stream) {
  const __m256i a = _mm512_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT),
                b = _mm512_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT);
  store_bytes(token, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1), stream);
}

#elif STGP_VECTOR_BYTES == 32

inline Block load(const Float16* token) {
  return {_mm256_cvtph_ps(load_bytes<__m128i>(token)), _mm256_cvtph_ps(load_bytes<__m128i>(token + LANES))};
}

inline void store(Float16* token, Block v, bool stream) {
  const __m128i a = _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT),
                b = _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT);
  store_bytes(token, _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1), stream);
}

#elif defined(__aarch64__)

inline Block load(const Float16* token) {
  const float16x8_t halves = load_bytes<float16x8_t>(token);
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}

inline void store(Float16* token, Block v, bool stream) {
  store_bytes(token, vcvt_high_f16_f32(vcvt_f16_f32(v.a), v.b), stream);
}

#else

// Exponent and fraction are shifted to their places in a float. A multiplication by a power of 2 then corrects the bias
// of the exponent; it is exact for subnormal numbers too.
inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  if (magnitude >= 0x0f800000) return bit_cast<float>(sign | magnitude | 0x7f800000);  // infinity, NaN
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f));
}

// The nearest float16, ties to even. NaN stays NaN.
inline Float16 to_float16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  uint32_t rounded;
  if (magnitude > 0x7f800000) {
    rounded = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    rounded = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 1/2 leaves units of 2^-24 in the fraction
    rounded = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    rounded = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  }
  return {static_cast<uint16_t>(rounded | (bits >> 16 & 0x8000))};
}

inline Block load(const Float16* token) {
  Block v;
  for (int i = 0; i < LANES; ++i) {
    v.a[i] = to_float(token[i]);
    v.b[i] = to_float(token[i + LANES]);
  }
  return v;
}

inline void store(Float16* token, Block v, bool stream) {
  Float16 rounded[BLOCK];
  for (int i = 0; i < LANES; ++i) {
    rounded[i] = to_float16(v.a[i]);
    rounded[i + LANES] = to_float16(v.b[i]);
  }
  store_bytes(token, load_bytes<Words>(rounded), stream);
}

#endif

// ---- fewer channels than a block ----

// The last channels of a token. The other lanes are 0.
template <typename T>
inline Block load_some(const T* token, int64_t channels) {
  T padded[BLOCK] = {};
  __builtin_memcpy(padded, token, channels * sizeof(T));
  return load(padded);
}

// An array of BLOCK channels that are not 0 and, after them, BLOCK channels that are 0.
template <typename T>
struct Steps {
  T channels[2 * BLOCK] = {};

  constexpr Steps() {
    for (int i = 0; i < BLOCK; ++i) channels[i] = T{0x3c00};
  }
};

// A block with the values of v in the first `channels` channels of tokens of type T, and 0 in the others.
template <typename T>
inline Block keep_some(Block v, int64_t channels) {
  static constexpr Steps<T> STEPS;
  const Block kept = load(STEPS.channels + BLOCK - channels);
  const Floats zero{};
  return {kept.a != zero ? v.a : zero, kept.b != zero ? v.b : zero};
}

// The first `channels` channels of a block, of which the token has `stored`. The other lanes are 0. A copy, as
// load_some makes one, takes longer than a mask.
template <typename T>
inline Block load_first(const T* token, int64_t channels, int64_t stored) {
  return stored < BLOCK ? load_some(token, channels) : keep_some<T>(load(token), channels);
}

template <typename T>
inline void store_some(T* token, Block v, int64_t channels) {
  T padded[BLOCK];
  store(padded, v, false);
  __builtin_memcpy(token, padded, channels * sizeof(T));
}

}  // namespace
