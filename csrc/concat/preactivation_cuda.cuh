// What surrounds the preactivation z of a linear layer: on a tile of the product bias, activation, gate and residual;
// and their backward, dz with the sums over rows for bias and gate.
//
//     z = product + bias,   y = residual + tanh(gate) · act(z)
//     dz = dy · tanh(gate) · act'(z),   dbias = Σ dz,   dgate = (1 − tanh²(gate)) Σ dy · act(z)
//
// Tiling     dz: csrc/cuda/column_sums.cuh.
// Precision  float32; z, y and dz are rounded to the inputs' dtype.
#pragma once

#include "csrc/cuda/activation.cuh"
#include "csrc/cuda/column_sums.cuh"
#include "csrc/cuda/launch.h"

namespace mmk::cuda {

struct LinearEpilogue {
  const void *bias, *gate, *residual;  // [N] or null, [N] or [] or null, [rows, N] or null
  void *preactivation, *y;             // [rows, N] or null, [rows, N], contiguous
  int64_t residual_stride;
  int rows, features;  // N
  Activation activation;
  bool gate_per_feature;
};

/// tanh(gate) of eight features.
template <typename T>
__device__ __forceinline__ void load_gate(const void* gate, bool per_feature, int feature, float (&t)[kVector]) {
  if (per_feature) {
    load_vector(static_cast<const T*>(gate) + feature, t);
    change_each(t, [](float x) { return tanh_of(x); });
  } else {
    const float same = tanh_of(to_float(*static_cast<const T*>(gate)));
    change_each(t, [=](float) { return same; });
  }
}

/// Finishes vectors of one thread's eight features.
template <typename T>
struct LinearFinish {
  const LinearEpilogue& e;
  int feature;
  float bias[kVector] = {}, gate[kVector];

  __device__ LinearFinish(const LinearEpilogue& e, int feature) : e(e), feature(feature) {
    if (feature >= e.features) return;
    if (e.bias) load_vector(static_cast<const T*>(e.bias) + feature, bias);
    if (e.gate) load_gate<T>(e.gate, e.gate_per_feature, feature, gate);
  }

  __device__ void operator()(int row, float (&x)[kVector]) const {
    if (row >= e.rows || feature >= e.features) return;
    const int64_t at = int64_t(row) * e.features + feature;
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] += bias[i];
    if (e.preactivation) store_vector(static_cast<T*>(e.preactivation) + at, x);
    activate(x, e.activation);
    if (e.gate)
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[i] *= gate[i];
    if (e.residual) {
      float residual[kVector];
      load_vector(static_cast<const T*>(e.residual) + row * e.residual_stride + feature, residual);
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[i] += residual[i];
    }
    store_vector(static_cast<T*>(e.y) + at, x);
  }
};

struct PreactivationGradient {
  const void *dy, *kept, *gate;  // [rows, N]; z or act(z), [rows, N] contiguous, or null; [N] or [] or null
  void* dz;                      // [rows, N] contiguous, or null
  float *dbias, *dgate;          // [runs, N] or null
  int64_t dy_stride;
  int rows, features, run;  // N; rows of a block
  Activation activation;
  bool gate_per_feature, from_output;
};

template <typename T>
__global__ void __launch_bounds__(kSumThreads) preactivation_gradient(PreactivationGradient p) {
  MMK_SHARED_MEMORY(shared);
  const int first = int(blockIdx.y) * kSumFeatures, feature = first + sum_feature();
  const int begin = int(blockIdx.x) * p.run, end = min(begin + p.run, p.rows);
  float of_bias[kVector] = {}, of_gate[kVector] = {};
  if (feature < p.features) {
    float gate[kVector];
    if (p.gate) load_gate<T>(p.gate, p.gate_per_feature, feature, gate);
    for (int row = begin + sum_row(); row < end; row += kSumRows) {
      const int64_t at = int64_t(row) * p.features + feature;
      float g[kVector], z[kVector] = {};
      load_vector(static_cast<const T*>(p.dy) + row * p.dy_stride + feature, g);
      if (p.kept) load_vector(static_cast<const T*>(p.kept) + at, z);
      if (p.dgate) {
        float y[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] = z[i];
        activate(y, p.activation);
#pragma unroll
        for (int i = 0; i < kVector; ++i) of_gate[i] += g[i] * y[i];
      }
      if (p.gate)
#pragma unroll
        for (int i = 0; i < kVector; ++i) g[i] *= gate[i];
      differentiate(z, p.activation, p.from_output);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        g[i] *= z[i];
        of_bias[i] += g[i];
      }
      if (p.dz) store_vector(static_cast<T*>(p.dz) + at, g);
    }
    if (p.dgate)
#pragma unroll
      for (int i = 0; i < kVector; ++i) of_gate[i] *= 1.0f - gate[i] * gate[i];
  }
  const int64_t sums = int64_t(blockIdx.x) * p.features + first;
  store_sums(shared, of_bias, of_gate, p.dbias ? p.dbias + sums : nullptr, p.dgate ? p.dgate + sums : nullptr,
             p.features - first);
}

template <typename T>
void launch_preactivation_gradient(const PreactivationGradient& p, Stream stream) {
  const dim3 grid(unsigned((p.rows + p.run - 1) / p.run), unsigned((p.features + kSumFeatures - 1) / kSumFeatures));
  launch({"preactivation gradient", grid, dim3(kSumThreads), kSumShared, stream}, preactivation_gradient<T>, p);
}

}  // namespace mmk::cuda
