// Products of bf16 pairs with float accumulation (AVX512_BF16). x86 only; included by cpu/isa/avx512bf16.cpp and amx.cpp.
// An element is a pair of neighbouring k: left operands are plain bf16 rows, right operands interleave two rows.
#pragma once

#include "product.h"
#include "vec_avx512.h"

namespace xtg {

// A type of its own, so that no template instance is shared with the translation unit built without AVX512_BF16.
struct VecAvx512Bf16 : VecAvx512 {
  using VecAvx512::store;
  static void store(bf16* p, reg x) {
    const __m256bh packed = _mm512_cvtneps_pbh(x);
    std::memcpy(p, &packed, sizeof(packed));
  }
};

template <class V>
struct DotBf16 {
  using elem = uint32_t;
  using part = bf16;
  static constexpr int group = 2;
  static constexpr int step_multiple = 1;
  static constexpr bool tiles = false;
  struct Session {};
  static typename V::reg step(typename V::reg acc, const elem* a, __m512i b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(int(*a)), (__m512bh)b);
  }
  static __m512i load(const elem* b) { return _mm512_loadu_si512(b); }
  static void store(elem* row, int64_t j, typename V::reg x) { V::store(reinterpret_cast<bf16*>(row) + j, x); }
  static void store_pair(elem* row, int64_t j, typename V::reg x, typename V::reg y) {
    const __m512bh packed = _mm512_cvtne2ps_pbh(y, x);
    std::memcpy(reinterpret_cast<bf16*>(row) + j, &packed, sizeof(packed));
  }
  static typename V::reg square(typename V::reg acc, const elem* b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)load(b), (__m512bh)load(b));
  }
  // k is even.
  static void store_rows(elem* b, int64_t ld, int64_t k, int64_t j, typename V::reg x, typename V::reg y) {
    alignas(64) static constexpr uint16_t interleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh packed = _mm512_cvtne2ps_pbh(y, x);
    _mm512_storeu_si512(b + k / 2 * ld + j,
                        _mm512_permutexvar_epi16(_mm512_load_si512(interleave), (__m512i)packed));
  }
};

template <>
struct DotFor<VecAvx512Bf16, bf16> {
  using type = DotBf16<VecAvx512Bf16>;
};

template <class V>
static inline void pack_left(DotBf16<V>, const bf16* src, int64_t stride, int64_t rows, int64_t dim, uint32_t* dst,
                             int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    bf16* out = reinterpret_cast<bf16*>(dst + r * ld);
    std::memcpy(out, src + r * stride, size_t(dim) * sizeof(bf16));
    std::memset(out + dim, 0, size_t(2 * ld - dim) * sizeof(bf16));
  }
}

template <class V>
static inline void pack_right_transposed(DotBf16<V>, const bf16* src, int64_t stride, int64_t rows, int64_t dim,
                                         int64_t all_steps, uint32_t* dst, int64_t columns) {
  const int64_t square_steps = dim / 32 * 16;
  for (int64_t r = 0; r < columns; r += 16)
    for (int64_t p = 0; p < square_steps; p += 16) {
      typename V::reg x[16];
      for (int i = 0; i < 16; ++i) x[i] = r + i < rows ? _mm512_loadu_ps(src + (r + i) * stride + 2 * p) : V::zero();
      V::transpose(x);
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(dst + (p + i) * columns + r, x[i]);
    }
  for (int64_t p = square_steps; p < all_steps; ++p)
    for (int64_t r = 0; r < columns; ++r) {
      const bf16* row = src + r * stride + 2 * p;
      const uint32_t low = r < rows && 2 * p < dim ? row[0].bits : 0u;
      const uint32_t high = r < rows && 2 * p + 1 < dim ? row[1].bits : 0u;
      dst[p * columns + r] = low | high << 16;
    }
}

template <class V>
static inline void pack_right(DotBf16<V>, const bf16* src, int64_t stride, int64_t rows, int64_t all_rows, int64_t dim,
                              uint32_t* dst, int64_t padded) {
  for (int64_t r = 0; r < all_rows; r += 2) {
    uint32_t* out = dst + (r / 2) * padded;
    const bf16* low = src + r * stride;
    const bf16* high = low + stride;
    const bool has_low = r < rows, has_high = r + 1 < rows;
    int64_t c = 0;
    for (; c + 16 <= dim && has_high; c += 16) {
      const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + c)));
      const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + c)));
      _mm512_storeu_si512(out + c, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
    for (; c < dim; ++c)
      out[c] = (has_low ? uint32_t(low[c].bits) : 0u) | (has_high ? uint32_t(high[c].bits) << 16 : 0u);
    for (; c < padded; ++c) out[c] = 0;
  }
}

}  // namespace xtg
