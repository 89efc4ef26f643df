// Rows of 16-bit features held in the registers of a team of threads: thread t of T has the vectors t, t + T, ... of
// eight features, so that a row is read once, 16 bytes at a time. A team is a warp, or all warps of a block.
#pragma once

#include "csrc/cuda/device.h"

namespace mmk::cuda {

constexpr int kVector = 8;                                // features in 16 bytes
constexpr int kTeamShared = 2 * 32 * int(sizeof(float));  // bytes that a block needs for its sums

enum class Norm : int { kNone = 0, kLayer = 1, kRms = 2 };

/// Eight features as floats.
template <typename T>
__device__ __forceinline__ void unpack(const Bytes16& bytes, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = low_half<T>(bytes.words[i]);
    x[2 * i + 1] = high_half<T>(bytes.words[i]);
  }
}

template <typename T>
__device__ __forceinline__ void load_vector(const T* at, float (&x)[kVector]) {
  unpack<T>(*reinterpret_cast<const Bytes16*>(at), x);
}

template <typename T>
__device__ __forceinline__ void store_vector(T* at, const float (&x)[kVector]) {
  Bytes16 bytes;
#pragma unroll
  for (int i = 0; i < 4; ++i) bytes.words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  *reinterpret_cast<Bytes16*>(at) = bytes;
}

__device__ __forceinline__ void store_vector(float* at, const float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    Bytes16 bytes;
    memcpy(bytes.words, x + i, 16);
    *reinterpret_cast<Bytes16*>(at + i) = bytes;
  }
}

/// The threads that share a row: blockDim.x of them, where this is more than a warp the whole block.
struct Team {
  float* partial;  // kTeamShared bytes of shared memory, for a team of several warps
  int turn = 0;

  __device__ explicit Team(unsigned char* shared) : partial(reinterpret_cast<float*>(shared)) {}

  /// The first feature of vector v of this thread.
  __device__ int feature(int v) const { return (v * int(blockDim.x) + int(threadIdx.x)) * kVector; }

  /// The sum over the team; every thread gets the same. The halves of `partial` take turns, so that one barrier does.
  __device__ float sum(float x) {
    x = sum_lanes(x);
    const int warps = int(blockDim.x) / kWarp;
    if (warps > 1) {
      float* mine = partial + 32 * turn;
      turn ^= 1;
      if (lane() == 0) mine[warp()] = x;
      __syncthreads();
      x = 0.0f;
      for (int w = 0; w < warps; ++w) x += mine[w];
    }
    return x;
  }
};

template <int kVectors>
using RowValues = float[kVectors][kVector];

/// x to x̂ of a row of which the vectors beyond `features` are zero, and stay so. Returns rstd.
///
/// The mean of the centred row is what the first mean was off by, which is much where x is far from zero.
template <int kVectors>
__device__ __forceinline__ float normalize(RowValues<kVectors>& x, Team& team, int features, float eps, Norm norm) {
  if (norm == Norm::kNone) return 1.0f;
  const float count = float(features);
  if (norm == Norm::kLayer) {
#pragma unroll
    for (int again = 0; again < 2; ++again) {
      float sum = 0.0f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum += x[v][i];
      const float mean = team.sum(sum) / count;
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (team.feature(v) < features)
#pragma unroll
          for (int i = 0; i < kVector; ++i) x[v][i] -= mean;
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += x[v][i] * x[v][i];
  const float rstd = 1.0f / sqrtf(team.sum(squares) / count + eps);
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[v][i] *= rstd;
  return rstd;
}

/// dn, the gradient of n = x̂, to that of x.
template <int kVectors>
__device__ __forceinline__ void normalize_gradient(RowValues<kVectors>& dn, const RowValues<kVectors>& n, float rstd,
                                                   Team& team, int features, Norm norm) {
  if (norm == Norm::kNone) return;
  float along = 0.0f, sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      along += dn[v][i] * n[v][i];
      sum += dn[v][i];
    }
  along = team.sum(along) / float(features);
  const float mean = norm == Norm::kLayer ? team.sum(sum) / float(features) : 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int i = 0; i < kVector; ++i) dn[v][i] = (dn[v][i] - mean - n[v][i] * along) * rstd;
}

/// How many threads make a team for rows of so many features, each with up to kVectors vectors.
inline int team_size(int features, int vectors) {
  int threads = kWarp;
  while (threads * vectors * kVector < features) threads *= 2;
  return threads;
}

}  // namespace mmk::cuda
