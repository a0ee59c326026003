// exp2 of a vector register.
#pragma once

#include "types.h"

namespace xtg {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^x: 2^n times a polynomial in x - n on [-0.5, 0.5] (minimax in relative error), n the nearest integer.
// Relative error: accurate 1e-7, else 3e-6, which is far below the rounding of bf16 and f16.
// Below -126 the result is 2^-126: a zero for every sum it enters, and never a denormal, which would cost 100 cycles.
// NaN gives NaN. x must be below 128.
template <class V, bool accurate>
static inline typename V::reg exp2(typename V::reg x) {
  // The order of the operands matters: maximum returns the second one where either is NaN.
  x = V::max(V::set1(-126.0f), x);
  // Adding 1.5 * 2^23 and taking it away rounds to the nearest integer.
  const auto magic = V::set1(12582912.0f);
  const auto n = V::sub(V::add(x, magic), magic);
  const auto f = V::sub(x, n);
  typename V::reg p;
  if constexpr (accurate) {
    p = V::set1(1.53533621e-4f);
    p = V::fma(p, f, V::set1(1.33988746e-3f));
    p = V::fma(p, f, V::set1(9.61843736e-3f));
    p = V::fma(p, f, V::set1(5.55033247e-2f));
    p = V::fma(p, f, V::set1(2.40226479e-1f));
    p = V::fma(p, f, V::set1(6.93147203e-1f));
  } else {
    p = V::set1(9.58285322e-3f);
    p = V::fma(p, f, V::set1(5.59064262e-2f));
    p = V::fma(p, f, V::set1(2.40240986e-1f));
    p = V::fma(p, f, V::set1(6.93124193e-1f));
  }
  return V::scale_by_power(V::fma(p, f, V::set1(1.0f)), n);
}

}  // namespace xtg
