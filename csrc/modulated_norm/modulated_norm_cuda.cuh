// modulated_norm for CUDA.
//
//     y = n · (1 + scale) + shift,   n = x̂ · w + b,   x̂ = (x − mean) · rstd     (rms: mean = 0; no norm: n = x)
//
// Tiling     a team of threads, one to eight warps, owns a run of tokens of one batch element and holds a token in
//            registers, so that x is read once, 16 bytes at a time. The backward adds up over its run the gradients of
//            what the tokens share; the runs are added up by the caller, in their order.
// Precision  float32 from the centred row.
// Limits     16-bit dtypes; C a multiple of 8 up to 4096; everything begins at a multiple of 16 bytes.
#pragma once

#include "csrc/cuda/launch.h"
#include "csrc/cuda/rows.cuh"

namespace mmk::cuda {

struct ModulatedNorm {
  const void *x, *shift, *scale, *weight, *bias;  // [B, L, C], [B, 1 or L, C] twice, [C] or null twice
  int batch, length, features;
  int run;                                                                       // tokens of a team
  int64_t x_batch, x_token, shift_batch, shift_token, scale_batch, scale_token;  // strides
  float eps;
  Norm norm;
  bool per_token;  // whether every token has its own condition
};

struct ModulatedNormGradients {
  const void* g;  // [B, L, C]
  int64_t g_batch, g_token;
  void* dx;                // [B, L, C] or null, contiguous as all gradients
  void *dshift, *dscale;   // per token [B, L, C], else [B, runs, C] float32, or null
  float *dweight, *dbias;  // [B, runs, C] or null
};

constexpr int kModulatedNormTeams = 4;  // in a block, where a team is one warp

/// The batch element and first token of this thread's team; token >= length where it has none.
struct ModulatedNormPlace {
  int64_t batch;
  int begin, end;

  __device__ explicit ModulatedNormPlace(const ModulatedNorm& p) {
    const int runs = (p.length + p.run - 1) / p.run;
    const int64_t team = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    batch = team / runs;
    begin = int(team % runs) * p.run;
    end = batch < p.batch ? min(begin + p.run, p.length) : begin;
  }
};

template <typename T, int kVectors>
__global__ void __launch_bounds__(256) modulated_norm_forward(ModulatedNorm p, T* y) {
  MMK_SHARED_MEMORY(shared);
  Team team(shared);
  const ModulatedNormPlace place(p);
  const T* const weight = static_cast<const T*>(p.weight);
  const T* const bias = static_cast<const T*>(p.bias);
  for (int token = place.begin; token < place.end; ++token) {
    const T* const x_row = static_cast<const T*>(p.x) + place.batch * p.x_batch + token * p.x_token;
    const T* const shift = static_cast<const T*>(p.shift) + place.batch * p.shift_batch + token * p.shift_token;
    const T* const scale = static_cast<const T*>(p.scale) + place.batch * p.scale_batch + token * p.scale_token;
    float x[kVectors][kVector] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (team.feature(v) < p.features) load_vector(x_row + team.feature(v), x[v]);
    normalize<kVectors>(x, team, p.features, p.eps, p.norm);
    T* const y_row = y + (place.batch * p.length + token) * p.features;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int c = team.feature(v);
      if (c >= p.features) continue;
      float other[kVector], s[kVector];
      if (weight) {
        load_vector(weight + c, other);
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[v][i] *= other[i];
      }
      if (bias) {
        load_vector(bias + c, other);
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[v][i] += other[i];
      }
      load_vector(shift + c, other);
      load_vector(scale + c, s);
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[v][i] = x[v][i] * (1.0f + s[i]) + other[i];
      store_vector(y_row + c, x[v]);
    }
  }
}

template <typename T, int kVectors>
__global__ void __launch_bounds__(256) modulated_norm_backward(ModulatedNorm p, ModulatedNormGradients d) {
  MMK_SHARED_MEMORY(shared);
  Team team(shared);
  const ModulatedNormPlace place(p);
  if (place.batch >= p.batch) return;  // a team by itself: others of its block have no barrier
  const T* const weight = static_cast<const T*>(p.weight);
  const T* const bias = static_cast<const T*>(p.bias);
  float dshift[kVectors][kVector] = {}, dscale[kVectors][kVector] = {};
  float dweight[kVectors][kVector] = {}, dbias[kVectors][kVector] = {};
  for (int token = place.begin; token < place.end; ++token) {
    const T* const x_row = static_cast<const T*>(p.x) + place.batch * p.x_batch + token * p.x_token;
    const T* const g_row = static_cast<const T*>(d.g) + place.batch * d.g_batch + token * d.g_token;
    const T* const scale = static_cast<const T*>(p.scale) + place.batch * p.scale_batch + token * p.scale_token;
    const int64_t here = (place.batch * p.length + token) * p.features;
    float x[kVectors][kVector] = {}, dn[kVectors][kVector] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (team.feature(v) < p.features) {
        load_vector(x_row + team.feature(v), x[v]);
        load_vector(g_row + team.feature(v), dn[v]);
      }
    const float rstd = normalize<kVectors>(x, team, p.features, p.eps, p.norm);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int c = team.feature(v);
      if (c >= p.features) continue;
      float w[kVector], b[kVector] = {}, s[kVector], of_scale[kVector];
      if (weight) load_vector(weight + c, w);
      if (bias) load_vector(bias + c, b);
      load_vector(scale + c, s);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float g = dn[v][i], n = (weight ? x[v][i] * w[i] : x[v][i]) + b[i];
        of_scale[i] = g * n;
        dshift[v][i] += g;
        dscale[v][i] += of_scale[i];
        const float of_n = g * (1.0f + s[i]);
        dweight[v][i] += of_n * x[v][i];
        dbias[v][i] += of_n;
        s[i] = g;
        dn[v][i] = weight ? of_n * w[i] : of_n;
      }
      if (p.per_token && d.dshift) store_vector(static_cast<T*>(d.dshift) + here + c, s);
      if (p.per_token && d.dscale) store_vector(static_cast<T*>(d.dscale) + here + c, of_scale);
    }
    if (d.dx) {
      normalize_gradient<kVectors>(dn, x, rstd, team, p.features, p.norm);
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (team.feature(v) < p.features) store_vector(static_cast<T*>(d.dx) + here + team.feature(v), dn[v]);
    }
  }
  const int runs = (p.length + p.run - 1) / p.run;
  const int64_t there = (place.batch * runs + place.begin / p.run) * p.features;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int c = team.feature(v);
    if (c >= p.features) continue;
    if (!p.per_token && d.dshift) store_vector(static_cast<float*>(d.dshift) + there + c, dshift[v]);
    if (!p.per_token && d.dscale) store_vector(static_cast<float*>(d.dscale) + there + c, dscale[v]);
    if (d.dweight) store_vector(d.dweight + there + c, dweight[v]);
    if (d.dbias) store_vector(d.dbias + there + c, dbias[v]);
  }
}

/// Blocks of teams, each with its run; the backward's accumulators leave room for fewer vectors in a thread.
inline Launch modulated_norm_launch(const char* name, const ModulatedNorm& p, int vectors, Stream stream) {
  const int threads = team_size(p.features, vectors), teams = threads == kWarp ? kModulatedNormTeams : 1;
  const int64_t runs = int64_t(p.batch) * ((p.length + p.run - 1) / p.run);
  return {name, dim3(unsigned((runs + teams - 1) / teams)), dim3(threads, teams), kTeamShared, stream};
}

template <typename T>
void launch_modulated_norm_forward(const ModulatedNorm& p, void* y, Stream stream) {
  constexpr int kMost = 4;
  const Launch at = modulated_norm_launch("modulated_norm forward", p, kMost, stream);
  const int vectors = (p.features + int(at.block.x) * kVector - 1) / (int(at.block.x) * kVector);
  const auto kernel = vectors == 1   ? modulated_norm_forward<T, 1>
                      : vectors == 2 ? modulated_norm_forward<T, 2>
                      : vectors == 3 ? modulated_norm_forward<T, 3>
                                     : modulated_norm_forward<T, kMost>;
  launch(at, kernel, p, static_cast<T*>(y));
}

template <typename T>
void launch_modulated_norm_backward(const ModulatedNorm& p, const ModulatedNormGradients& d, Stream stream) {
  constexpr int kMost = 2;
  const Launch at = modulated_norm_launch("modulated_norm backward", p, kMost, stream);
  const bool one = int(at.block.x) * kVector >= p.features;
  launch(at, one ? modulated_norm_backward<T, 1> : modulated_norm_backward<T, kMost>, p, d);
}

}  // namespace mmk::cuda
