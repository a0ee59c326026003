// The AVX-512 (F, BW, VL, DQ) vector type: sixteen lanes. x86 only; included by cpu/isa/avx512*.cpp alone.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace xtg {

struct VecAvx512 {
  static constexpr int width = 16;
  static constexpr int tile_rows = 6;  // 24 accumulators + 4 columns + 1 row of 32 registers
  static constexpr int tile_vectors = 4;
  static constexpr int score_rows = 48;  // multiple of tile_rows and width
  using reg = __m512;

  static reg zero() { return _mm512_setzero_ps(); }
  static reg set1(float x) { return _mm512_set1_ps(x); }
  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static reg load(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static reg load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(float* p, reg x) { _mm512_storeu_ps(p, x); }
  static void store(bf16* p, reg x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i high = _mm512_srli_epi32(u, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }
  static void store(f16* p, reg x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static reg max(reg a, reg b) { return _mm512_max_ps(a, b); }
  static reg keep_first(reg x, int n, float fill) {
    return _mm512_mask_mov_ps(set1(fill), __mmask16((1u << n) - 1u), x);
  }
  static reg where_greater(reg a, reg b, reg x, reg y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), x);
  }
  static float sum(reg x) { return _mm512_reduce_add_ps(x); }
  static float maximum(reg x) { return _mm512_reduce_max_ps(x); }
  static constexpr bool scaling_underflows = true;
  static reg fraction(reg x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static reg scale_by_floor(reg y, reg x) { return _mm512_scalef_ps(y, x); }
  // The same, but 0 where the factor is below the normal numbers.
  static reg scale_or_flush(reg y, reg x) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(-126.0f), _CMP_NLT_UQ), y, x);
  }
  using words = __m512i;
  static words set_words(uint32_t x) { return _mm512_set1_epi32(int(x)); }
  static words words_from(uint32_t first) {
    return _mm512_add_epi32(set_words(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  static void mul_words(words x, uint32_t factor, words* high, words* low) {
    const words even = _mm512_mul_epu32(x, set_words(factor));
    const words odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), set_words(factor));
    *high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
    *low = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
  }
  static words xor_words(words a, words b, words c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  static words upper_half(words x) { return _mm512_slli_epi32(x, 16); }
  static reg keep_from(words x, words least, reg y) {
    return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(x, least), y);
  }
  static void transpose(reg* x) {
    reg a[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
      a[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      x[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
      x[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
      x[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      x[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      a[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
      a[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
      a[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
      a[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
      x[i + 8] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
      x[i + 4] = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0x88);
      x[i + 12] = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0xdd);
    }
  }
};

}  // namespace xtg
