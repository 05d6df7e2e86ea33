// csrc/cpu/vector.h: conversions between float and the 16-bit types of tokens, against the definition of the formats,
// sums of lanes, and exponentials. It is built once for each set of vector instructions, as the kernels are.
//
// Exit code: 0 if all is well, 1 if not; the first differences are on stderr.

#include "cpu/vector.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

namespace {

// ---- the formats, by definition ----

// A sign, an exponent and FRACTION bits of fraction. Normal numbers are at least 2^LOWEST.
template <typename T>
struct Format;

template <>
struct Format<Float16> {
  static constexpr const char* NAME = "float16";
  static constexpr int FRACTION = 10, LOWEST = -14;
};

template <>
struct Format<BFloat16> {
  static constexpr const char* NAME = "bfloat16";
  static constexpr int FRACTION = 7, LOWEST = -126;
};

// The bits of infinity. Magnitudes above them are NaN.
template <typename T>
constexpr int INFINITE = 0x8000 - (1 << Format<T>::FRACTION);

template <typename T>
float value_of(T number) {
  constexpr int FRACTION = Format<T>::FRACTION, ONE = 1 << FRACTION;
  const int magnitude = number.bits & 0x7fff, exponent = std::max(magnitude >> FRACTION, 1);
  const int units = magnitude < ONE ? magnitude : ONE + magnitude % ONE;
  double value = std::ldexp(units, exponent - 1 + Format<T>::LOWEST - FRACTION);
  if (magnitude == INFINITE<T>) value = std::numeric_limits<double>::infinity();
  if (magnitude > INFINITE<T>) value = std::numeric_limits<double>::quiet_NaN();
  return static_cast<float>(number.bits >> 15 ? -value : value);
}

// The number that is nearest to `value`, which is not NaN; ties go to even.
template <typename T>
T nearest(float value) {
  constexpr int FRACTION = Format<T>::FRACTION, LOWEST = Format<T>::LOWEST;
  int magnitude = INFINITE<T>;
  if (!std::isinf(value)) {
    const int place = std::max(std::ilogb(value), LOWEST);  // units are 2^(place - FRACTION)
    const double units = std::nearbyint(std::ldexp(std::abs(double{value}), FRACTION - place));
    // Units of a normal number include the bit above the fraction, which adds 1 to the exponent.
    magnitude = std::min(((place - LOWEST) << FRACTION) + static_cast<int>(units), INFINITE<T>);
  }
  return {static_cast<uint16_t>((std::signbit(value) ? 0x8000 : 0) | magnitude)};
}

// ---- comparisons ----

int failures = 0;

void fail(const char* format, const char* what, uint32_t from, uint32_t found, uint32_t expected) {
  if (++failures <= 20) std::fprintf(stderr, "%s: %s of %x is %x, not %x\n", format, what, from, found, expected);
}

// Returns the lane of a block, those of a before those of b, into which load puts each channel.
template <typename T>
std::vector<int> lanes_of_channels() {
  std::vector<int> lanes;
  for (int channel = 0; channel < BLOCK; ++channel) {
    T token[BLOCK] = {};
    token[channel] = nearest<T>(1);
    float loaded[BLOCK];
    const Block block = load(token);
    __builtin_memcpy(loaded, &block, sizeof loaded);
    lanes.push_back(static_cast<int>(std::find(loaded, loaded + BLOCK, 1.0f) - loaded));
  }
  return lanes;
}

template <typename T>
void test_loads_of_every_number() {
  const std::vector<int> lanes = lanes_of_channels<T>();
  for (int first = 0; first < 1 << 16; first += BLOCK) {
    T token[BLOCK];
    for (int i = 0; i < BLOCK; ++i) token[i].bits = static_cast<uint16_t>(first + i);
    float loaded[BLOCK];
    const Block block = load(token);
    __builtin_memcpy(loaded, &block, sizeof loaded);
    for (int i = 0; i < BLOCK; ++i) {
      const float expected = value_of(token[i]), found = loaded[lanes[i]];
      if (std::isnan(expected) && std::isnan(found)) continue;
      const uint32_t bits = std::bit_cast<uint32_t>(found);
      if (bits != std::bit_cast<uint32_t>(expected)) {
        fail(Format<T>::NAME, "the float", token[i].bits, bits, std::bit_cast<uint32_t>(expected));
      }
    }
  }
}

// Every number, the middle between it and the next one, the floats beside both, and random bits. Either sign.
template <typename T>
std::vector<float> floats_to_round() {
  std::vector<float> floats;
  for (int magnitude = 0; magnitude <= INFINITE<T>; ++magnitude) {
    const float number = value_of(T{static_cast<uint16_t>(magnitude)});
    const float next = value_of(T{static_cast<uint16_t>(magnitude + 1)});
    const float tie = magnitude + 1 < INFINITE<T> ? static_cast<float>((double{number} + next) / 2) : number;
    for (const float near : {number, tie}) {
      for (const float v : {near, std::nextafter(near, 0.0f), std::nextafter(near, HUGE_VALF)}) {
        floats.insert(floats.end(), {v, -v});
      }
    }
  }
  const float last = value_of(T{static_cast<uint16_t>(INFINITE<T> - 1)}), before = std::nextafter(HUGE_VALF, 0.0f);
  const double beyond = 2 * double{last} - value_of(T{static_cast<uint16_t>(INFINITE<T> - 2)});
  const float limit = static_cast<float>((last + beyond) / 2);  // the least magnitude that becomes infinite
  for (const float v : {limit, std::nextafter(limit, 0.0f), std::nextafter(limit, HUGE_VALF), before}) {
    floats.insert(floats.end(), {v, -v});
  }
  uint64_t state = 1;
  for (int i = 0; i < 1 << 20; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint32_t bits = static_cast<uint32_t>(state >> 32);
    const float v = std::bit_cast<float>(bits);
    // NaN of tokens of bfloat16, and of arithmetic with them, is quiet and has a lower half of 0.
    const bool is_lower_half_free = Format<T>::FRACTION > 7 || !std::isnan(v);
    floats.push_back(is_lower_half_free ? v : std::bit_cast<float>((bits | 0x00400000u) & 0xffff0000u));
  }
  floats.resize((floats.size() + BLOCK - 1) / BLOCK * BLOCK);
  return floats;
}

template <typename T>
void test_stores_round_to_nearest_even() {
  const std::vector<int> lanes = lanes_of_channels<T>();
  const std::vector<float> floats = floats_to_round<T>();
  for (size_t first = 0; first < floats.size(); first += BLOCK) {
    float ordered[BLOCK];
    for (int i = 0; i < BLOCK; ++i) ordered[lanes[i]] = floats[first + i];
    Block block;
    __builtin_memcpy(&block, ordered, sizeof ordered);
    T token[BLOCK];
    store(token, block, false);
    for (int i = 0; i < BLOCK; ++i) {
      const float from = floats[first + i];
      const int found = token[i].bits, magnitude = found & 0x7fff;
      if (std::isnan(from) ? magnitude > INFINITE<T> : found == nearest<T>(from).bits) continue;
      const uint32_t expected = std::isnan(from) ? 0x7fff : nearest<T>(from).bits;
      fail(Format<T>::NAME, "the nearest number", std::bit_cast<uint32_t>(from), found, expected);
    }
  }
}

// ---- sums and exponentials ----

void test_sums_of_lanes() {
  Floats vectors[LANES], before[LANES];
  for (int i = 0; i < LANES; ++i) {
    for (int lane = 0; lane < LANES; ++lane) vectors[i][lane] = std::sqrt(static_cast<float>(3 + i * LANES + lane));
    before[i] = vectors[i];
  }
  const Floats sums = sums_of_lanes(vectors);
  for (int i = 0; i < LANES; ++i) {
    const uint32_t found = std::bit_cast<uint32_t>(sums[i]), expected = std::bit_cast<uint32_t>(sum_lanes(before[i]));
    if (found != expected) fail("float", "the sum of the lanes", i, found, expected);
  }
}

// The exponents are every 1009th float from -110 to 0, and some below.
void test_exponentials() {
  std::vector<float> exponents = {-0.0f,     -110, -149, -151, -1e9f, -1e38f, -std::numeric_limits<float>::max(),
                                  -HUGE_VALF};
  for (uint32_t bits = 0; bits < std::bit_cast<uint32_t>(110.0f); bits += 1009) {
    exponents.push_back(-std::bit_cast<float>(bits));
  }
  for (const float v : exponents) {
    const float found = exponential(splat(v))[LANES - 1];
    const double exact = std::exp(double{v});
    // An ulp of a subnormal number is 2^-149.
    const double ulp = std::ldexp(1.0, std::max(exact > 0 ? std::ilogb(exact) : -200, -126) - 23);
    if (!(std::abs(found - exact) <= ulp)) {
      fail("float", "the exponential", std::bit_cast<uint32_t>(v), std::bit_cast<uint32_t>(found),
           std::bit_cast<uint32_t>(static_cast<float>(exact)));
    }
  }
  if (exponential(splat(0))[0] != 1) fail("float", "the exponential", 0, 0, 1);
  if (exponential(splat(-HUGE_VALF))[0] != 0) fail("float", "the exponential", 0xff800000u, 1, 0);
  if (!std::isnan(exponential(splat(NAN))[0])) fail("float", "the exponential", 0x7fc00000u, 0, 0x7fc00000u);
}

}  // namespace

int main() {
  test_sums_of_lanes();
  test_exponentials();
  test_loads_of_every_number<Float16>();
  test_loads_of_every_number<BFloat16>();
  test_stores_round_to_nearest_even<Float16>();
  test_stores_round_to_nearest_even<BFloat16>();
  if (failures == 0) std::puts("all checks passed");
  return failures == 0 ? 0 : 1;
}
