// Products of bf16 pairs on the tile unit (AMX_BF16). x86 only; included by cpu/isa/amx.cpp alone.
// Operands are laid out as for AVX512_BF16; a tile holds 16 rows of 16 elements. Rows past m up to a multiple of 16 are
// read and written too: the kernels' scratch has room for them.
#pragma once

#include "dot_avx512bf16.h"

namespace xtg {

struct VecAmx : VecAvx512Bf16 {};

// Tiles are configured for this thread while the object lives; what was configured before comes back after.
struct TileSession {
  alignas(64) unsigned char before[64];
  TileSession() {
    // Palette 1: eight tiles of 16 rows of 64 bytes. GCC's intrinsics tell the compiler of the first 8 bytes only,
    // so the configuration is a constant, and memory is fenced where the whole of `before` is read or written.
    alignas(64) static constexpr unsigned char config[64] = {
        1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16};
    _tile_storeconfig(before);
    __asm__ volatile("" : : "r"(before) : "memory");
    _tile_loadconfig(config);
  }
  ~TileSession() {
    if (before[0]) {
      __asm__ volatile("" : : "r"(before) : "memory");
      _tile_loadconfig(before);
    } else {
      _tile_release();
    }
  }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

template <class V>
struct DotAmx : DotBf16<V> {
  using elem = uint32_t;
  static constexpr int step_multiple = 16;
  static constexpr bool tiles = true;
  using Session = TileSession;

  // Rows x Columns tiles of c.
  template <int Rows, int Columns>
  static inline void product_tiles(int64_t k, const elem* a, int64_t lda, const elem* b, int64_t ldb, float* c,
                                   int64_t ldc, bool accumulate) {
    const int64_t a_bytes = lda * 4, b_bytes = ldb * 4, c_bytes = ldc * 4;
    if (accumulate) {
      _tile_loadd(0, c, c_bytes);
      if (Columns > 1) _tile_loadd(1, c + 16, c_bytes);
      if (Rows > 1) _tile_loadd(2, c + 16 * ldc, c_bytes);
      if (Rows > 1 && Columns > 1) _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
    } else {
      _tile_zero(0);
      if (Columns > 1) _tile_zero(1);
      if (Rows > 1) _tile_zero(2);
      if (Rows > 1 && Columns > 1) _tile_zero(3);
    }
    for (int64_t p = 0; p < k; p += 16) {
      _tile_loadd(4, a + p, a_bytes);
      _tile_loadd(6, b + p * ldb, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if (Columns > 1) {
        _tile_loadd(7, b + p * ldb + 16, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (Rows > 1) {
        _tile_loadd(5, a + 16 * lda + p, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if (Columns > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_bytes);
    if (Columns > 1) _tile_stored(1, c + 16, c_bytes);
    if (Rows > 1) _tile_stored(2, c + 16 * ldc, c_bytes);
    if (Rows > 1 && Columns > 1) _tile_stored(3, c + 16 * ldc + 16, c_bytes);
  }

  template <int Rows>
  static inline void product_rows(int64_t n, int64_t k, const elem* a, int64_t lda, const elem* b, int64_t ldb,
                                  float* c, int64_t ldc, bool accumulate) {
    int64_t j = 0;
    for (; j + 32 <= n; j += 32) product_tiles<Rows, 2>(k, a, lda, b + j, ldb, c + j, ldc, accumulate);
    if (j < n) product_tiles<Rows, 1>(k, a, lda, b + j, ldb, c + j, ldc, accumulate);
  }

  static inline void product(int64_t m, int64_t n, int64_t k, const elem* a, int64_t lda, const elem* b, int64_t ldb,
                             float* c, int64_t ldc, bool accumulate) {
    int64_t i = 0;
    for (; i + 16 < m; i += 32) product_rows<2>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
    if (i < m) product_rows<1>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
  }
};

template <>
struct DotFor<VecAmx, bf16> {
  using type = DotAmx<VecAmx>;
};

}  // namespace xtg
