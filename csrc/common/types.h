// Element types of the kernels: float, bf16 and f16 as plain bits, and their portable conversions.
// Everything here has internal linkage: translation units built for different ISAs must not share code through the linker.
#pragma once

#include <cstdint>
#include <cstring>

namespace xtg {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DType { f32, bf16, f16 };

static inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof(u));
  return u;
}

static inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof(x));
  return x;
}

static inline float to_float(float x) { return x; }

static inline float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }

static inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x0400u) return bits_float(sign | ((rest << 13) + (112u << 23)));
  // Subnormal halves are multiples of 2^-24, all of them normal floats.
  const float magnitude = float(rest) * 5.9604644775390625e-8f;
  return bits_float(sign | float_bits(magnitude));
}

static inline void from_float(float x, float* out) { *out = x; }

static inline void from_float(float x, bf16* out) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) {
    out->bits = uint16_t((u >> 16) | 0x0040u);  // a NaN stays a NaN
    return;
  }
  out->bits = uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);  // round to nearest, ties to even
}

static inline void from_float(float x, f16* out) {
  const uint32_t u = float_bits(x);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65520 or more
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    const uint32_t shifted = magnitude - (112u << 23);
    half = (shifted + 0x0fffu + ((shifted >> 13) & 1u)) >> 13;
  } else {
    // Adding 0.5 puts the last kept bit of a subnormal half at the last bit of the float: the hardware rounds for us.
    half = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  }
  out->bits = uint16_t(sign | half);
}

template <class T>
static constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}

template <class T>
static constexpr T max_of(T a, T b) {
  return a > b ? a : b;
}

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace xtg
