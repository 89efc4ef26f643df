// Logarithms and exponentials of vectors near 1 and 0, where their differences from those are what counts.
#pragma once

#include "csrc/cpu/simd.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// log (1 + u) to two roundings of the result, of normal 1 + u > 0: Cephes' logf, a polynomial in [√½, √2) beside the
// exponent. In that range u itself enters, whatever 1 + u loses of it.
MMK_INLINE vf log1p(vf u) {
  const vi bits = (vi)(set1(1.f) + u), exponent = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3: √½
  const vf e = (vf) __builtin_convertvector(exponent, vf);
  const vf f = select(exponent == 0, u, (vf)(bits - (exponent << 23)) - set1(1.f));
  vf p = fma(f, set1(7.0376836292e-2f), set1(-1.1514610310e-1f));
  p = fma(p, f, set1(1.1676998740e-1f));
  p = fma(p, f, set1(-1.2420140846e-1f));
  p = fma(p, f, set1(1.4249322787e-1f));
  p = fma(p, f, set1(-1.6668057665e-1f));
  p = fma(p, f, set1(2.0000714765e-1f));
  p = fma(p, f, set1(-2.4999993993e-1f));
  p = fma(p, f, set1(3.3333331174e-1f));
  const vf square = f * f;
  const vf tail = fma(e, set1(-2.12194440e-4f), fma(p * f, square, square * set1(-0.5f)));
  return fma(e, set1(0.693359375f), f + tail);
}

// (e^x − 1 − x) / x² for |x| ≤ ½, by its series.
MMK_INLINE vf exp_remainder(vf x) {
  vf p = fma(x, set1(2.7557319e-6f), set1(2.4801587e-5f));
  p = fma(p, x, set1(1.9841270e-4f));
  p = fma(p, x, set1(1.3888889e-3f));
  p = fma(p, x, set1(8.3333333e-3f));
  p = fma(p, x, set1(4.1666667e-2f));
  p = fma(p, x, set1(1.6666667e-1f));
  return fma(p, x, set1(0.5f));
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
