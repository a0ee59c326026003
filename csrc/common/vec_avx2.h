// The AVX2 + FMA vector type: eight lanes. x86 only; included by cpu/isa/avx2.cpp alone.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace xtg {

struct VecAvx2 {
  static constexpr int width = 8;
  static constexpr int tile_rows = 6;  // 12 accumulators + 2 columns + 1 row of 16 registers
  static constexpr int tile_vectors = 2;
  static constexpr int score_rows = 24;  // multiple of tile_rows and width
  using reg = __m256;

  static reg zero() { return _mm256_setzero_ps(); }
  static reg set1(float x) { return _mm256_set1_ps(x); }
  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static reg load(const bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static reg load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(float* p, reg x) { _mm256_storeu_ps(p, x); }
  static void store(bf16* p, reg x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, quiet, is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store(f16* p, reg x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static reg max(reg a, reg b) { return _mm256_max_ps(a, b); }
  static reg keep_first(reg x, int n, float fill) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 keep = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
    return _mm256_blendv_ps(set1(fill), x, keep);
  }
  static reg where_greater(reg a, reg b, reg x, reg y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
  }
  static float sum(reg x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float maximum(reg x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  static constexpr bool scaling_underflows = false;
  static reg fraction(reg x) { return _mm256_sub_ps(x, _mm256_floor_ps(x)); }
  static reg scale_by_floor(reg y, reg x) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(x)), _mm256_set1_epi32(127));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  using words = __m256i;
  static words set_words(uint32_t x) { return _mm256_set1_epi32(int(x)); }
  static words words_from(uint32_t first) {
    return _mm256_add_epi32(set_words(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static void mul_words(words x, uint32_t factor, words* high, words* low) {
    const words even = _mm256_mul_epu32(x, set_words(factor));
    const words odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), set_words(factor));
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  }
  static words xor_words(words a, words b, words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  static words upper_half(words x) { return _mm256_slli_epi32(x, 16); }
  static reg keep_from(words x, words least, reg y) {
    return _mm256_and_ps(y, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(x, least), x)));
  }
  static void transpose(reg* x) {
    reg a[8];
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
      a[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      x[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
      x[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
      x[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      x[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      const reg low = x[i], high = x[i + 4];
      x[i] = _mm256_permute2f128_ps(low, high, 0x20);
      x[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
  }
};

}  // namespace xtg
