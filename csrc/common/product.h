// Small matrix products on packed operands: the register-tiled core that every op shares.
//
//   c (m, n) float  (+)=  a (m, k) row-major  x  b (k, n) row-major,   n a multiple of the vector width
//
// A Dot says what one step of k is: DotFloat multiplies floats; DotBf16 (x86 only) multiplies pairs of bf16 with float
// accumulation, so its operands hold two neighbouring k in one 32-bit element.
// Every element of c is one chain of steps in the order of k, added to what c held where products accumulate, whatever the
// tile it falls in: the result does not depend on m or n, nor on how the rows were split among threads. Chains of a block
// that are added up lose far less than one chain over all blocks would.
#pragma once

#include "types.h"

namespace xtg {

template <class V>
struct DotFloat {
  using elem = float;
  using part = float;                     // what an element holds `group` of
  static constexpr int group = 1;         // neighbouring k held by one element
  static constexpr int step_multiple = 1;  // k is padded with zeros to a multiple of this many elements
  static constexpr bool tiles = false;     // whether Dot brings a product of its own
  struct Session {};                       // what the processor needs while products run
  static typename V::reg step(typename V::reg acc, const elem* a, typename V::reg b) {
    return V::fma(V::set1(*a), b, acc);
  }
  static typename V::reg load(const elem* b) { return V::load(b); }
  // acc + the squares that the elements at b hold.
  static typename V::reg square(typename V::reg acc, const elem* b) { return V::fma(V::load(b), V::load(b), acc); }
  // Floats as elements j.. of a left-operand row.
  static void store(elem* row, int64_t j, typename V::reg x) { V::store(row + j, x); }
  static void store_pair(elem* row, int64_t j, typename V::reg x, typename V::reg y) {
    V::store(row + j, x);
    V::store(row + j + V::width, y);
  }
  // Floats as elements j.. of the rows k and k + 1 of a right operand.
  static void store_rows(elem* b, int64_t ld, int64_t k, int64_t j, typename V::reg x, typename V::reg y) {
    V::store(b + k * ld + j, x);
    V::store(b + (k + 1) * ld + j, y);
  }
};

// The product that a vector type uses for operands of type T.
template <class V, class T>
struct DotFor {
  using type = DotFloat<V>;
};

template <class V, class Dot, bool transposed, int Rows, int Vectors>
static inline void product_tile(int64_t k, const typename Dot::elem* a, int64_t lda, const typename Dot::elem* b,
                                int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  typename V::reg acc[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) acc[i][j] = V::zero();
  for (int64_t p = 0; p < k; ++p) {
    decltype(Dot::load(b)) column[Vectors];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) column[j] = Dot::load(b + p * ldb + j * V::width);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) acc[i][j] = Dot::step(acc[i][j], transposed ? a + p * lda + i : a + i * lda + p, column[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) {
      float* out = c + i * ldc + j * V::width;
      V::store(out, accumulate ? V::add(V::load(out), acc[i][j]) : acc[i][j]);
    }
}

template <class V, class Dot, bool transposed, int Rows, int Vectors>
static inline void product_columns(int64_t n, int64_t k, const typename Dot::elem* a, int64_t lda,
                                   const typename Dot::elem* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  int64_t j = 0;
  for (; j + Vectors * V::width <= n; j += Vectors * V::width)
    product_tile<V, Dot, transposed, Rows, Vectors>(k, a, lda, b + j, ldb, c + j, ldc, accumulate);
  if constexpr (Vectors > 1) {
    if (j < n)
      product_columns<V, Dot, transposed, Rows, Vectors / 2>(n - j, k, a, lda, b + j, ldb, c + j, ldc, accumulate);
  }
}

template <class V, class Dot, bool transposed, int Rows>
static inline void product_rows(int64_t m, int64_t n, int64_t k, const typename Dot::elem* a, int64_t lda,
                                const typename Dot::elem* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  int64_t i = 0;
  for (; i + Rows <= m; i += Rows)
    product_columns<V, Dot, transposed, Rows, V::tile_vectors>(n, k, transposed ? a + i : a + i * lda, lda, b, ldb,
                                                               c + i * ldc, ldc, accumulate);
  if constexpr (Rows > 1) {
    if (i < m)
      product_rows<V, Dot, transposed, Rows - 1>(m - i, n, k, transposed ? a + i : a + i * lda, lda, b, ldb,
                                                 c + i * ldc, ldc, accumulate);
  }
}

// transposed: a is stored as (k, m), for floats only.
template <class V, class Dot, bool transposed = false>
static inline void product(int64_t m, int64_t n, int64_t k, const typename Dot::elem* a, int64_t lda,
                           const typename Dot::elem* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if constexpr (Dot::tiles)
    Dot::product(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
  else
    product_rows<V, Dot, transposed, V::tile_rows>(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

// One row of n elements to floats, zero up to padded.
template <class V, class T>
static inline void load_row(const T* src, int64_t n, float* dst, int64_t padded) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::store(dst + i, V::load(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
  for (; i < padded; ++i) dst[i] = 0.0f;
}

// One row of n floats, times factor, to elements.
template <class V, class T>
static inline void store_row(const float* src, int64_t n, float factor, T* dst) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::store(dst + i, V::mul(V::load(src + i), V::set1(factor)));
  for (; i < n; ++i) from_float(src[i] * factor, dst + i);
}

// Rows as the left operand a: (rows, k), k = ceil(dim / group) elements.
template <class V, class T>
static inline void pack_left(DotFloat<V>, const T* src, int64_t stride, int64_t rows, int64_t dim, float* dst,
                             int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) load_row<V>(src + r * stride, dim, dst + r * ld, ld);
}

// Rows as the transposed right operand b: (all_steps, columns), column r holding row r; all else is zero. columns is a
// multiple of the vector width.
template <class V, class T>
static inline void pack_right_transposed(DotFloat<V>, const T* src, int64_t stride, int64_t rows, int64_t dim,
                                         int64_t all_steps, float* dst, int64_t columns) {
  constexpr int w = V::width;
  const int64_t square_dim = dim / w * w;
  for (int64_t r = 0; r < columns; r += w)
    for (int64_t d = 0; d < square_dim; d += w) {
      typename V::reg x[w];
      for (int i = 0; i < w; ++i) x[i] = r + i < rows ? V::load(src + (r + i) * stride + d) : V::zero();
      V::transpose(x);
      for (int i = 0; i < w; ++i) V::store(dst + (d + i) * columns + r, x[i]);
    }
  for (int64_t d = square_dim; d < all_steps; ++d)
    for (int64_t r = 0; r < columns; ++r)
      dst[d * columns + r] = r < rows && d < dim ? to_float(src[r * stride + d]) : 0.0f;
}

// Rows as the right operand b: (rows / group, padded), rows up to all_rows zero.
template <class V, class T>
static inline void pack_right(DotFloat<V>, const T* src, int64_t stride, int64_t rows, int64_t all_rows, int64_t dim,
                              float* dst, int64_t padded) {
  for (int64_t r = 0; r < rows; ++r) load_row<V>(src + r * stride, dim, dst + r * padded, padded);
  for (int64_t i = rows * padded; i < all_rows * padded; ++i) dst[i] = 0.0f;
}

// x times a number that is no float: a factor that all elements have in common would show in sums of rounded products.
template <class V>
struct Factor {
  typename V::reg high, low;
  explicit Factor(double x) : high(V::set1(float(x))), low(V::set1(float(x - double(float(x))))) {}
  typename V::reg operator()(typename V::reg x) const { return V::fma(x, high, V::mul(x, low)); }
};

// Rows of floats, times factor, as the left operand a: (rows, ld), zero from dim on.
template <class V, class Dot>
static inline void pack_left_scaled(const float* src, int64_t stride, int64_t rows, int64_t dim, double factor,
                                    typename Dot::elem* dst, int64_t ld) {
  using part = typename Dot::part;
  const Factor<V> times(factor);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = src + r * stride;
    part* out = reinterpret_cast<part*>(dst + r * ld);
    int64_t i = 0;
    for (; i + V::width <= dim; i += V::width) V::store(out + i, times(V::load(row + i)));
    for (; i < ld * Dot::group; ++i) from_float(i < dim ? float(row[i] * factor) : 0.0f, out + i);
  }
}

// The same of the transposed rows: (dim, ld), zero from rows on.
template <class V, class Dot>
static inline void pack_left_transposed(const float* src, int64_t stride, int64_t rows, int64_t dim, double factor,
                                        typename Dot::elem* dst, int64_t ld) {
  using part = typename Dot::part;
  constexpr int w = V::width;
  const Factor<V> times(factor);
  part* out = reinterpret_cast<part*>(dst);
  const int64_t out_ld = ld * Dot::group, square_rows = rows / w * w, square_dim = dim / w * w;
  for (int64_t r = 0; r < square_rows; r += w)
    for (int64_t d = 0; d < square_dim; d += w) {
      typename V::reg x[w];
      for (int i = 0; i < w; ++i) x[i] = times(V::load(src + (r + i) * stride + d));
      V::transpose(x);
      for (int i = 0; i < w; ++i) V::store(out + (d + i) * out_ld + r, x[i]);
    }
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t r = d < square_dim ? square_rows : 0; r < out_ld; ++r)
      from_float(r < rows ? float(src[r * stride + d] * factor) : 0.0f, out + d * out_ld + r);
}

}  // namespace xtg
