// exp2 of a vector register.
#pragma once

#include "types.h"

namespace xtg {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr double kLn2Double = 0.6931471805599453, kLog2EDouble = 1.4426950408889634;

// 2^x = 2^floor(x) (1 + f q(f)), f the fraction of x, q a polynomial (minimax in relative error on [0, 1]).
// Relative error: accurate 1e-7, else 3e-6, which is far below the rounding of bf16 and f16. NaN gives NaN. x below 128.
// Where x < -126, also at minus infinity, the result is 0 (a denormal could cost 100 cycles a product), or, for half types
// on AVX-512, what the scaling instruction makes of it: their products flush denormals.
template <class V, bool accurate>
static inline typename V::reg exp2(typename V::reg x) {
  // 2^-127 is 0 where a power is made from its exponent's bits. The order of the operands matters: maximum returns the
  // second one where either is NaN.
  if constexpr (!V::scaling_underflows) x = V::max(V::set1(-127.0f), x);
  const auto f = V::fraction(x);
  typename V::reg q;
  if constexpr (accurate) {
    q = V::set1(2.16129199e-4f);
    q = V::fma(q, f, V::set1(1.24678451e-3f));
    q = V::fma(q, f, V::set1(9.67545169e-3f));
    q = V::fma(q, f, V::set1(5.54852806e-2f));
    q = V::fma(q, f, V::set1(2.40229306e-1f));
    q = V::fma(q, f, V::set1(6.93147044e-1f));
  } else {
    q = V::set1(1.34266886e-2f);
    q = V::fma(q, f, V::set1(5.22424672e-2f));
    q = V::fma(q, f, V::set1(2.41280208e-1f));
    q = V::fma(q, f, V::set1(6.93044844e-1f));
  }
  const auto y = V::fma(q, f, V::set1(1.0f));
  if constexpr (accurate && V::scaling_underflows) return V::scale_or_flush(y, x);
  return V::scale_by_floor(y, x);
}

}  // namespace xtg
