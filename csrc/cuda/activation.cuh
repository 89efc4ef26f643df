// Activations and their derivatives, in float32, on eight features at a time; which one is known only as a kernel runs,
// so that there is one kernel for all.
#pragma once

#include "csrc/cpu/activation_kind.h"
#include "csrc/cuda/rows.cuh"

namespace mmk::cuda {

/// Nothing overflows, and small arguments keep their relative accuracy.
__device__ __forceinline__ float tanh_of(float x) {
  const float e = expf(-2.0f * fabsf(x)), s = x * x;
  const float large = divide_fast(1.0f - e, 1.0f + e);
  const float small = x + x * s * (-1.0f / 3.0f + s * (2.0f / 15.0f + s * (-17.0f / 315.0f + s * (62.0f / 2835.0f))));
  return s < 0.0625f ? small : x < 0.0f ? -large : large;
}

/// Of either sign without overflow.
__device__ __forceinline__ float sigmoid_of(float x) {
  const float e = expf(-fabsf(x));
  return divide_fast(x < 0.0f ? e : 1.0f, 1.0f + e);
}

constexpr float kSqrtHalf = 0.7071067811865476f;
constexpr float kSqrt8OverPi = 1.5957691216057308f;
constexpr float kInverseSqrt2Pi = 0.3989422804014327f;
constexpr float kCubic = 0.044715f;  // of the tanh approximation of gelu

/// Of x in the gates that are sigmoids of x.
__device__ __forceinline__ float sigmoid_slope(Activation activation) {
  return activation == Activation::quick_gelu ? 1.702f : 1.0f;
}

/// (1 + tanh u) / 2 of that approximation, without its cancellation.
__device__ __forceinline__ float gelu_tanh_gate(float x) { return sigmoid_of((x + x * x * x * kCubic) * kSqrt8OverPi); }

template <typename Function>
__device__ __forceinline__ void change_each(float (&x)[kVector], Function function) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = function(x[i]);
}

/// z to act(z).
__device__ __forceinline__ void activate(float (&z)[kVector], Activation activation) {
  switch (activation) {
    case Activation::none:
      break;
    case Activation::relu:
      change_each(z, [](float x) { return x < 0.0f ? 0.0f : x; });  // NaN stays
      break;
    case Activation::gelu:
      change_each(z, [](float x) { return 0.5f * x * (1.0f + erff(x * kSqrtHalf)); });
      break;
    case Activation::gelu_tanh:
      change_each(z, [](float x) { return x * gelu_tanh_gate(x); });
      break;
    case Activation::silu:
    case Activation::quick_gelu:
      change_each(z, [=](float x) { return x * sigmoid_of(sigmoid_slope(activation) * x); });
      break;
    case Activation::tanh:
      change_each(z, [](float x) { return tanh_of(x); });
      break;
    case Activation::sigmoid:
      change_each(z, [](float x) { return sigmoid_of(x); });
      break;
  }
}

/// z, or act(z) where from_output, to the derivative at z.
__device__ __forceinline__ void differentiate(float (&z)[kVector], Activation activation, bool from_output) {
  switch (activation) {
    case Activation::none:
      change_each(z, [](float) { return 1.0f; });
      break;
    case Activation::relu:  // positive where its output is
      change_each(z, [](float x) { return x <= 0.0f ? 0.0f : 1.0f; });
      break;
    case Activation::gelu:
      change_each(
          z, [](float x) { return 0.5f * (1.0f + erff(x * kSqrtHalf)) + x * kInverseSqrt2Pi * expf(-0.5f * x * x); });
      break;
    case Activation::gelu_tanh:
      change_each(z, [](float x) {
        const float s = gelu_tanh_gate(x);
        return s + x * s * (1.0f - s) * (1.0f + x * x * kCubic * 3.0f) * kSqrt8OverPi;
      });
      break;
    case Activation::silu:
    case Activation::quick_gelu:
      change_each(z, [=](float x) {
        const float slope = sigmoid_slope(activation), s = sigmoid_of(slope * x);
        return s * (1.0f + slope * x * (1.0f - s));
      });
      break;
    case Activation::tanh:
      if (!from_output) change_each(z, [](float x) { return tanh_of(x); });
      change_each(z, [](float y) { return 1.0f - y * y; });
      break;
    case Activation::sigmoid:
      if (!from_output) change_each(z, [](float x) { return sigmoid_of(x); });
      change_each(z, [](float y) { return y * (1.0f - y); });
      break;
  }
}

}  // namespace mmk::cuda
