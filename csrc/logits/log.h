// The natural logarithm of vectors.
#pragma once

#include "csrc/cpu/simd.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// log x to two roundings, of normal x > 0: Cephes' logf, a polynomial in [√½, √2) beside the exponent.
MMK_INLINE vf log_of(vf x) {
  const vi bits = (vi)x, exponent = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3: √½
  const vf e = (vf) __builtin_convertvector(exponent, vf), f = (vf)(bits - (exponent << 23)) - set1(1.f);
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

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
