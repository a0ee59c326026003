// The portable vector type: four lanes through the compiler's vector extension (SSE2, NEON or plain scalar code).
#pragma once

#include "types.h"

namespace xtg {

struct VecScalar {
  static constexpr int width = 4;
  static constexpr int tile_rows = 4;  // register tile of the products: tile_rows x tile_vectors accumulators
  static constexpr int tile_vectors = 2;
  static constexpr int score_rows = 16;  // multiple of tile_rows and width
  typedef float reg __attribute__((vector_size(16)));
  typedef int32_t ireg __attribute__((vector_size(16)));

  static reg zero() { return set1(0.0f); }
  static reg set1(float x) { return reg{x, x, x, x}; }
  static reg load(const float* p) {
    reg x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  static reg load(const bf16* p) { return reg{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
  static reg load(const f16* p) { return reg{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
  static void store(float* p, reg x) { std::memcpy(p, &x, sizeof(x)); }
  static void store(bf16* p, reg x) {
    for (int i = 0; i < width; ++i) from_float(x[i], p + i);
  }
  static void store(f16* p, reg x) {
    for (int i = 0; i < width; ++i) from_float(x[i], p + i);
  }
  static reg add(reg a, reg b) { return a + b; }
  static reg sub(reg a, reg b) { return a - b; }
  static reg mul(reg a, reg b) { return a * b; }
  static reg fma(reg a, reg b, reg c) { return a * b + c; }
  // The second operand where either is NaN, as the x86 instruction does.
  static reg max(reg a, reg b) { return a > b ? a : b; }
  // Lanes n and above become fill.
  static reg keep_first(reg x, int n, float fill) {
    for (int i = 0; i < width; ++i) x[i] = i < n ? x[i] : fill;
    return x;
  }
  // x where a > b, else y.
  static reg where_greater(reg a, reg b, reg x, reg y) { return a > b ? x : y; }
  static float sum(reg x) { return (x[0] + x[1]) + (x[2] + x[3]); }
  static float maximum(reg x) { return max_of(max_of(x[0], x[1]), max_of(x[2], x[3])); }
  static reg floor(reg x) {
    // Adding 1.5 * 2^23 and taking it away rounds to the nearest integer.
    const reg magic = set1(12582912.0f);
    const reg nearest = (x + magic) - magic;
    return nearest > x ? nearest - 1.0f : nearest;
  }
  static constexpr bool scaling_underflows = false;  // scale_by_floor takes x in [-127, 128)
  static reg fraction(reg x) { return x - floor(x); }
  // y * 2^floor(x).
  static reg scale_by_floor(reg y, reg x) {
    const ireg exponent = (__builtin_convertvector(floor(x), ireg) + 127) << 23;
    reg power;
    std::memcpy(&power, &exponent, sizeof(power));
    return y * power;
  }
  // Lanes of 32-bit integers without sign.
  typedef uint32_t words __attribute__((vector_size(16)));
  static words set_words(uint32_t x) { return words{x, x, x, x}; }
  // first, first + 1, ...
  static words words_from(uint32_t first) { return set_words(first) + words{0, 1, 2, 3}; }
  // The two halves of the 64-bit product.
  static void mul_words(words x, uint32_t factor, words* high, words* low) {
    for (int i = 0; i < width; ++i) (*high)[i] = uint32_t((uint64_t(x[i]) * factor) >> 32);
    *low = x * factor;
  }
  static words xor_words(words a, words b, words c) { return a ^ b ^ c; }
  // The lower 16 bits as the upper ones.
  static words upper_half(words x) { return x << 16; }
  // y where x is at least least, else 0.
  static reg keep_from(words x, words least, reg y) {
    for (int i = 0; i < width; ++i) y[i] = x[i] >= least[i] ? y[i] : 0.0f;
    return y;
  }
  // The square of width rows, transposed in place.
  static void transpose(reg* x) {
    for (int i = 0; i < width; ++i)
      for (int j = 0; j < i; ++j) {
        const float swapped = x[i][j];
        x[i][j] = x[j][i];
        x[j][i] = swapped;
      }
  }
};

}  // namespace xtg
