// exp2 of a vector register.
#pragma once

#include "types.h"

namespace xtg {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^x: 2^round(x) times a degree-6 polynomial on [-0.5, 0.5] (coefficients of the Cephes library's exp2f).
// Relative error below 2e-7 for x in [-126, 127]; 0 below -126, NaN for NaN.
template <class V>
static inline typename V::reg exp2(typename V::reg x) {
  const auto n = V::round(x);
  const auto f = V::sub(x, n);
  auto p = V::set1(1.535336188319500e-4f);
  p = V::fma(p, f, V::set1(1.339887440266574e-3f));
  p = V::fma(p, f, V::set1(9.618437357674640e-3f));
  p = V::fma(p, f, V::set1(5.550332471162809e-2f));
  p = V::fma(p, f, V::set1(2.402264791363012e-1f));
  p = V::fma(p, f, V::set1(6.931472028550421e-1f));
  p = V::fma(p, f, V::set1(1.0f));
  return V::flush_below(x, V::scale_by_power(p, n));
}

}  // namespace xtg
