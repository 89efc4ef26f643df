// Activations and their derivatives on vectors, chosen once per call: with_activation calls a function with a type that
// has f(z), f's derivative in terms of z, and where that is enough, in terms of y = f(z).
#pragma once

#include "csrc/cpu/activation_kind.h"
#include "csrc/cpu/simd.h"

namespace mmk {
namespace MMK_ISA {
namespace {

MMK_INLINE vf exp_of(vf x) { return exp2<5>(x * set1(kLog2e)); }

// 1 / (1 + e^-z), from e^-|z|, which does not overflow.
MMK_INLINE vf sigmoid(vf z) {
  const vf e = exp_of(min(z, -z)), inverse = set1(1.f) / (set1(1.f) + e);
  return select(z < zero(), e * inverse, inverse);
}

// erf z to 3 float roundings: a rational minimax approximation on [-4, 4], beyond which erf rounds to ±1.
MMK_INLINE vf erf(vf z) {
  const vf x = max(set1(-4.f), min(set1(4.f), z)), s = x * x;  // a NaN comes through both
  vf p = fma(s, set1(-2.72614225801306e-10f), set1(2.77068142495902e-08f));
  p = fma(p, s, set1(-2.10102402082508e-06f));
  p = fma(p, s, set1(-5.69250639462346e-05f));
  p = fma(p, s, set1(-7.34990630326855e-04f));
  p = fma(p, s, set1(-2.95459980854025e-03f));
  p = fma(p, s, set1(-1.60960333262415e-02f));
  vf q = fma(s, set1(-1.45660718464996e-05f), set1(-2.13374055278905e-04f));
  q = fma(q, s, set1(-1.68282697438203e-03f));
  q = fma(q, s, set1(-7.37332916720468e-03f));
  q = fma(q, s, set1(-1.42647390514189e-02f));
  return divide_fast(x * p, q);
}

struct Identity {
  static constexpr bool kFromOutput = true;
  static MMK_INLINE vf value(vf z) { return z; }
  static MMK_INLINE vf derivative(vf) { return set1(1.f); }
};

struct Relu {
  static constexpr bool kFromOutput = true;
  static MMK_INLINE vf value(vf z) { return max(zero(), z); }
  static MMK_INLINE vf derivative(vf y) { return select(y > zero(), set1(1.f), zero()); }
};

struct Tanh {
  static constexpr bool kFromOutput = true;
  static MMK_INLINE vf value(vf z) { return tanh(z); }
  static MMK_INLINE vf derivative(vf y) { return set1(1.f) - y * y; }
};

struct Sigmoid {
  static constexpr bool kFromOutput = true;
  static MMK_INLINE vf value(vf z) { return sigmoid(z); }
  static MMK_INLINE vf derivative(vf y) { return y * (set1(1.f) - y); }
};

struct Gelu {  // z · Φ(z)
  static constexpr bool kFromOutput = false;
  static MMK_INLINE vf value(vf z) {
    const vf half = z * set1(0.5f);
    return fma(half, erf(z * set1(0.70710678118654752f)), half);
  }
  static MMK_INLINE vf derivative(vf z) {
    const vf cdf = fma(set1(0.5f), erf(z * set1(0.70710678118654752f)), set1(0.5f));
    return fma(z * set1(0.39894228040143268f), exp_of(z * z * set1(-0.5f)), cdf);
  }
};

struct GeluTanh {  // z/2 · (1 + tanh √(2/π)(z + 0.044715 z³))
  static constexpr bool kFromOutput = false;
  static constexpr float kScale = 0.79788456080286536f, kCubic = 0.044715f;
  static MMK_INLINE vf inner(vf z) { return z * fma(z * z, set1(kScale * kCubic), set1(kScale)); }
  static MMK_INLINE vf value(vf z) {
    const vf half = z * set1(0.5f);
    return fma(half, tanh(inner(z)), half);
  }
  static MMK_INLINE vf derivative(vf z) {
    const vf t = tanh(inner(z)), slope = fma(z * z, set1(3.f * kScale * kCubic), set1(kScale));
    return fma(z * set1(0.5f) * (set1(1.f) - t * t), slope, fma(set1(0.5f), t, set1(0.5f)));
  }
};

struct Silu {  // z · σ(z)
  static constexpr bool kFromOutput = false;
  static MMK_INLINE vf value(vf z) { return z * sigmoid(z); }
  static MMK_INLINE vf derivative(vf z) {
    const vf s = sigmoid(z);
    return s * fma(z, set1(1.f) - s, set1(1.f));
  }
};

struct QuickGelu {  // z · σ(1.702 z)
  static constexpr bool kFromOutput = false;
  static constexpr float kSlope = 1.702f;
  static MMK_INLINE vf value(vf z) { return z * sigmoid(z * set1(kSlope)); }
  static MMK_INLINE vf derivative(vf z) {
    const vf u = z * set1(kSlope), s = sigmoid(u);
    return s * fma(u, set1(1.f) - s, set1(1.f));
  }
};

template <class Function>
MMK_INLINE void with_activation(Activation kind, Function f) {
  switch (kind) {
    case Activation::none:
      return f(Identity{});
    case Activation::relu:
      return f(Relu{});
    case Activation::gelu:
      return f(Gelu{});
    case Activation::gelu_tanh:
      return f(GeluTanh{});
    case Activation::silu:
      return f(Silu{});
    case Activation::tanh:
      return f(Tanh{});
    case Activation::sigmoid:
      return f(Sigmoid{});
    case Activation::quick_gelu:
      return f(QuickGelu{});
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
