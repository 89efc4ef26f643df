// concat_tokens for CUDA.
//
//     out[b, start_i + l] = x̂ · w + bias,   x̂ the norm of z = x_i[b, l] + type[i] + position_i[l]     (no norm: x̂ = z)
//
// Tiling     a team of threads, one to eight warps, owns a run of positions of one source and a share of the batch,
//            positions outside, so that type + position is read once for a position's rows; it holds a row in
//            registers, so that x is read once, 16 bytes at a time. The backward adds up dz over its share of the batch
//            for every position, and the gradients of type, w and bias over all its rows; the caller adds up what the
//            teams have, in their order. Without a norm a wider row is cut into tiles of 4096 features, the grid's z.
// Precision  float32 from the rows read; a copy of the bits where nothing is done to them.
// Limits     16-bit dtypes, out float32 as well; C a multiple of 8, with a norm up to 4096; 32 sources; all begins
//            at a multiple of 16 bytes.
#pragma once

#include "csrc/cuda/launch.h"
#include "csrc/cuda/rows.cuh"

namespace mmk::cuda {

constexpr int kConcatTokensSources = 32;
constexpr int kConcatTokensTile = 4096;  // features in a team's registers
constexpr int kConcatTokensTeams = 4;    // in a block, where a team is one warp

enum class ConcatTokensDtype : int { kBf16 = 0, kFp16 = 1, kFloat = 2 };

struct ConcatTokensSource {
  const void *x, *position;                  // [B, L, C], [L, C] or null
  void *dx, *dposition;                      // [B, L, C] and [shares, L, C], contiguous, or null
  int64_t x_batch, x_token, position_token;  // strides
  int length, start, first_team;             // L, and the first of its positions and teams among all
};

struct ConcatTokens {
  ConcatTokensSource sources[kConcatTokensSources];
  const void *type, *weight, *bias;   // [M, C], [C] twice, or null
  int64_t type_source;                // stride
  int count, batch, total, features;  // M, B, ΣL, C
  int run, share, teams;              // positions and batch elements of a team, teams of a share
  float eps;
  Norm norm;
};

struct ConcatTokensGradients {
  const void* g;  // [B, ΣL, C]
  int64_t g_batch, g_token;
  ConcatTokensDtype of_g, of_position;
  float *dtypes, *dweight, *dbias;  // [shares, teams, C] or null
};

/// What this thread's team owns. `here` is false of a team beyond the last.
struct ConcatTokensPlace {
  int64_t share, team;  // the team's number in its share
  int source = 0;
  int begin, end;  // positions, of the source
  int batch_begin, batch_end;
  int column, features;  // the tile's first feature, and how many it has
  bool here;

  __device__ explicit ConcatTokensPlace(const ConcatTokens& p) {
    const int64_t number = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    share = number / p.teams;
    team = number % p.teams;
    here = share * p.share < p.batch;
    batch_begin = here ? int(share) * p.share : p.batch;
    batch_end = min(batch_begin + p.share, p.batch);
    while (source + 1 < p.count && team >= p.sources[source + 1].first_team) ++source;
    begin = int(team - p.sources[source].first_team) * p.run;
    end = min(begin + p.run, p.sources[source].length);
    column = int(blockIdx.z) * kConcatTokensTile;
    features = min(p.features - column, kConcatTokensTile);
  }
};

template <typename T>
constexpr ConcatTokensDtype kConcatTokensDtypeOf = ConcatTokensDtype::kBf16;
template <>
inline constexpr ConcatTokensDtype kConcatTokensDtypeOf<Fp16> = ConcatTokensDtype::kFp16;

__device__ __forceinline__ void load_as(ConcatTokensDtype dtype, const void* base, int64_t at, float (&x)[kVector]) {
  if (dtype == ConcatTokensDtype::kBf16) {
    load_vector(static_cast<const Bf16*>(base) + at, x);
  } else if (dtype == ConcatTokensDtype::kFp16) {
    load_vector(static_cast<const Fp16*>(base) + at, x);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; i += 4)
      memcpy(x + i, reinterpret_cast<const Bytes16*>(static_cast<const float*>(base) + at + i)->words, 16);
  }
}

__device__ __forceinline__ void store_as(ConcatTokensDtype dtype, void* base, int64_t at, const float (&x)[kVector]) {
  if (dtype == ConcatTokensDtype::kBf16)
    store_vector(static_cast<Bf16*>(base) + at, x);
  else if (dtype == ConcatTokensDtype::kFp16)
    store_vector(static_cast<Fp16*>(base) + at, x);
  else
    store_vector(static_cast<float*>(base) + at, x);
}

/// type + position at a feature, of those that there are; one of them is.
template <typename T>
__device__ __forceinline__ void load_embedding(const T* type, const T* position, int c, float (&x)[kVector]) {
  if (!type || !position) return load_vector((type ? type : position) + c, x);
  float other[kVector];
  load_vector(type + c, x);
  load_vector(position + c, other);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] += other[i];
}

// Four blocks a multiprocessor: without a number ptxas aims for more, and spills to get there.
template <typename T, bool kNormed, int kVectors>
__global__ void __launch_bounds__(128, 4) concat_tokens_forward(ConcatTokens p, void* out, ConcatTokensDtype of_out) {
  MMK_SHARED_MEMORY(shared);
  Team team(shared);
  const ConcatTokensPlace place(p);
  if (!place.here) return;  // a team by itself: others of its block have no barrier
  const ConcatTokensSource& source = p.sources[place.source];
  const T* const type = p.type ? static_cast<const T*>(p.type) + place.source * p.type_source + place.column : nullptr;
  const T* const weight = static_cast<const T*>(p.weight);
  const T* const bias = static_cast<const T*>(p.bias);
  const bool added = p.type || source.position, copied = !added && of_out == kConcatTokensDtypeOf<T>;
  for (int l = place.begin; l < place.end; ++l) {
    const T* const position =
        source.position ? static_cast<const T*>(source.position) + l * source.position_token + place.column : nullptr;
    float embedding[kVectors][kVector] = {};
    if (added) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (team.feature(v) < place.features) load_embedding(type, position, team.feature(v), embedding[v]);
    }
    for (int b = place.batch_begin; b < place.batch_end; ++b) {
      const T* const x_row = static_cast<const T*>(source.x) + b * source.x_batch + l * source.x_token + place.column;
      const int64_t there = (int64_t(b) * p.total + source.start + l) * p.features + place.column;
      Bytes16 bytes[kVectors] = {};
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (team.feature(v) < place.features) bytes[v] = *reinterpret_cast<const Bytes16*>(x_row + team.feature(v));
      if (!kNormed && copied) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
          if (team.feature(v) < place.features)
            *reinterpret_cast<Bytes16*>(static_cast<T*>(out) + there + team.feature(v)) = bytes[v];
        continue;
      }
      float x[kVectors][kVector];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        unpack<T>(bytes[v], x[v]);
        if (added)
#pragma unroll
          for (int i = 0; i < kVector; ++i) x[v][i] += embedding[v][i];
      }
      if (kNormed) normalize<kVectors>(x, team, place.features, p.eps, p.norm);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int c = team.feature(v);
        if (c >= place.features) continue;
        float other[kVector];
        if (kNormed && weight) {
          load_vector(weight + c, other);
#pragma unroll
          for (int i = 0; i < kVector; ++i) x[v][i] *= other[i];
        }
        if (kNormed && bias) {
          load_vector(bias + c, other);
#pragma unroll
          for (int i = 0; i < kVector; ++i) x[v][i] += other[i];
        }
        store_as(of_out, out, there + c, x[v]);
      }
    }
  }
}

template <typename T, bool kNormed, int kVectors>
__global__ void __launch_bounds__(256) concat_tokens_backward(ConcatTokens p, ConcatTokensGradients d) {
  MMK_SHARED_MEMORY(shared);
  Team team(shared);
  const ConcatTokensPlace place(p);
  if (!place.here) return;
  const ConcatTokensSource& source = p.sources[place.source];
  const T* const type = p.type ? static_cast<const T*>(p.type) + place.source * p.type_source + place.column : nullptr;
  const T* const weight = static_cast<const T*>(p.weight);
  const bool added = p.type || source.position;
  float dtypes[kVectors][kVector] = {}, dweight[kVectors][kVector] = {}, dbias[kVectors][kVector] = {};
  for (int l = place.begin; l < place.end; ++l) {
    const T* const position =
        source.position ? static_cast<const T*>(source.position) + l * source.position_token + place.column : nullptr;
    float dposition[kVectors][kVector] = {};
    for (int b = place.batch_begin; b < place.batch_end; ++b) {
      const T* const x_row = static_cast<const T*>(source.x) + b * source.x_batch + l * source.x_token + place.column;
      const int64_t g_row = b * d.g_batch + (source.start + l) * d.g_token + place.column;
      float dz[kVectors][kVector] = {};
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (team.feature(v) < place.features) load_as(d.of_g, d.g, g_row + team.feature(v), dz[v]);
      if constexpr (kNormed) {
        float x[kVectors][kVector] = {};
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int c = team.feature(v);
          if (c >= place.features) continue;
          load_vector(x_row + c, x[v]);
          if (!added) continue;
          float embedding[kVector];
          load_embedding(type, position, c, embedding);
#pragma unroll
          for (int i = 0; i < kVector; ++i) x[v][i] += embedding[i];
        }
        const float rstd = normalize<kVectors>(x, team, place.features, p.eps, p.norm);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int c = team.feature(v);
          if (c >= place.features) continue;
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            dweight[v][i] += dz[v][i] * x[v][i];
            dbias[v][i] += dz[v][i];
          }
          if (!weight) continue;
          float w[kVector];
          load_vector(weight + c, w);
#pragma unroll
          for (int i = 0; i < kVector; ++i) dz[v][i] *= w[i];
        }
        normalize_gradient<kVectors>(dz, x, rstd, team, place.features, p.norm);
      }
      const int64_t dx_row = (int64_t(b) * source.length + l) * p.features + place.column;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (team.feature(v) >= place.features) continue;
        if (source.dx) store_vector(static_cast<T*>(source.dx) + dx_row + team.feature(v), dz[v]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) dposition[v][i] += dz[v][i];
      }
    }
    const int64_t there = (place.share * source.length + l) * p.features + place.column;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (team.feature(v) >= place.features) continue;
      if (source.dposition) store_as(d.of_position, source.dposition, there + team.feature(v), dposition[v]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) dtypes[v][i] += dposition[v][i];
    }
  }
  const int64_t there = (place.share * p.teams + place.team) * p.features + place.column;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int c = team.feature(v);
    if (c >= place.features) continue;
    if (d.dtypes) store_vector(d.dtypes + there + c, dtypes[v]);
    if (kNormed && d.dweight) store_vector(d.dweight + there + c, dweight[v]);
    if (kNormed && d.dbias) store_vector(d.dbias + there + c, dbias[v]);
  }
}

/// Blocks of teams; the backward's accumulators leave room for fewer vectors in a thread.
inline Launch concat_tokens_launch(const char* name, const ConcatTokens& p, int vectors, Stream stream) {
  const int threads = team_size(min(p.features, kConcatTokensTile), vectors);
  const int in_block = threads == kWarp ? kConcatTokensTeams : 1;
  const int64_t teams = int64_t(p.teams) * ((p.batch + p.share - 1) / p.share);
  const int tiles = (p.features + kConcatTokensTile - 1) / kConcatTokensTile;
  return {name, dim3(unsigned((teams + in_block - 1) / in_block), 1, tiles), dim3(threads, in_block), kTeamShared,
          stream};
}

/// How many vectors a thread has.
inline int concat_tokens_vectors(const ConcatTokens& p, const Launch& at) {
  const int once = int(at.block.x) * kVector;
  return (min(p.features, kConcatTokensTile) + once - 1) / once;
}

template <typename T, bool kNormed>
void launch_concat_tokens_forward_of(const ConcatTokens& p, void* out, ConcatTokensDtype of_out, Stream stream) {
  constexpr int kMost = 4;
  const Launch at = concat_tokens_launch("concat_tokens forward", p, kMost, stream);
  const int vectors = concat_tokens_vectors(p, at);
  const auto kernel = vectors == 1   ? concat_tokens_forward<T, kNormed, 1>
                      : vectors == 2 ? concat_tokens_forward<T, kNormed, 2>
                      : vectors == 3 ? concat_tokens_forward<T, kNormed, 3>
                                     : concat_tokens_forward<T, kNormed, kMost>;
  launch(at, kernel, p, out, of_out);
}

template <typename T>
void launch_concat_tokens_forward(const ConcatTokens& p, void* out, ConcatTokensDtype of_out, Stream stream) {
  if (p.norm == Norm::kNone)
    launch_concat_tokens_forward_of<T, false>(p, out, of_out, stream);
  else
    launch_concat_tokens_forward_of<T, true>(p, out, of_out, stream);
}

template <typename T, bool kNormed>
void launch_concat_tokens_backward_of(const ConcatTokens& p, const ConcatTokensGradients& d, Stream stream) {
  constexpr int kMost = 2;
  const Launch at = concat_tokens_launch("concat_tokens backward", p, kMost, stream);
  const bool one = concat_tokens_vectors(p, at) == 1;
  launch(at, one ? concat_tokens_backward<T, kNormed, 1> : concat_tokens_backward<T, kNormed, kMost>, p, d);
}

template <typename T>
void launch_concat_tokens_backward(const ConcatTokens& p, const ConcatTokensGradients& d, Stream stream) {
  if (p.norm == Norm::kNone)
    launch_concat_tokens_backward_of<T, false>(p, d, stream);
  else
    launch_concat_tokens_backward_of<T, true>(p, d, stream);
}

}  // namespace mmk::cuda
