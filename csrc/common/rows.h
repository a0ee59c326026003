// Rows of strided operands, and loops over the vectors of a row.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace xtg {

template <class T>
static inline const T* rows_of(const Operand& x, int64_t row, int64_t head) {
  return static_cast<const T*>(x.data) + row * x.row_stride + head * x.head_stride;
}

// Calls f(j, valid) for each vector of a row of n columns; valid < width only in the last.
template <class V, class Columns, class F>
static inline void for_each_vector(Columns n, F f) {
  int64_t j = 0;
  for (; j + V::width <= n; j += V::width) f(j, V::width);
  if (j < n) f(j, int(n - j));
}

// Calls f with n, as a constant where it is the whole of a block: almost every block, which the compiler unrolls.
template <int64_t whole, class F>
static inline void with_columns(int64_t n, F f) {
  if (n == whole)
    f(std::integral_constant<int64_t, whole>{});
  else
    f(n);
}

}  // namespace xtg
