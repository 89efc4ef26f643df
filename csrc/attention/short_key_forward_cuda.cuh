// The forward of attention to few keys, for CUDA.
//
//     S = scale · Q Kᵀ + bias(segment) + mask,   P = softmax(S),   O = P V
//
// Tiling     a block owns tiles of queries of one (batch element, head) and keeps all keys and values, of every
// segment, in
//            shared memory; each of its warps takes 16 queries at a time, which arrive in the background while the 16
//            before them are worked on, and needs no other warp. Scores, maximum, sum and output stay in registers; the
//            output leaves 16 bytes at a time through the place where the queries were.
// Precision  products in the inputs' dtype with float32 sums; P rounded to the inputs' dtype for the product with V.
// Limits     bf16 and fp16; up to 512 keys that fit into shared memory; D a multiple of 8 up to 256, Dv = D.
#pragma once

#include "csrc/attention/short_keys.cuh"

namespace mmk::cuda {

constexpr int kForwardWarps = 4;
template <int D>
constexpr int kForwardWide = D <= 128 ? 4 : 2;  // keys at a time, in sixteens
template <int D>
constexpr int kForwardBlocks = D <= 32 ? 4 : 1;  // on a multiprocessor at least, by registers

struct ShortKeyOutput {
  Rows out;        // [B, Hq, Lq, D]
  float* row_max;  // [B, Hq, Lq], or null
  float* log_sum;
};

template <int D>
constexpr int short_key_forward_shared(int keys) {
  return keys * D * 2 * 2 + keys * 4 + kForwardWarps * 2 * kStep * D * 2;
}

/// Scores of 16 queries and the keys of a tile: scaled, biased, masked; −∞ behind the last key.
template <typename T, int kWide>
__device__ __forceinline__ void finish_scores(float (&s)[2 * kWide][4], const ShortKeys& p, const float* added, int b,
                                              int h, int query, int first) {
#pragma unroll
  for (int n = 0; n < 2 * kWide; ++n) {
    const int key = first + n * 8 + lane() % 4 * 2;
    const bool inside = first + n * 8 < p.keys;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float to_key = inside ? added[key + (i & 1)] : -INFINITY;
      s[n][i] = to_key == -INFINITY ? -INFINITY : fmaf(s[n][i], p.scale, to_key);
      if (p.mask_kind != MaskKind::kNone && to_key != -INFINITY) {
        const int row = query + (i >> 1) * 8;
        s[n][i] = row < p.queries ? masked<T>(p, s[n][i], b, h, row, key + (i & 1)) : -INFINITY;
      }
    }
  }
}

/// One step of the online softmax of two rows of a warp's tile: s to weights, acc and sums to the new maximum.
template <int kWide, int kColumns>
__device__ __forceinline__ void online_softmax(float (&s)[2 * kWide][4], float (&most)[2], float (&sum)[2],
                                               float (&acc)[kColumns][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float higher = most[r];
#pragma unroll
    for (int n = 0; n < 2 * kWide; ++n) higher = fmaxf(higher, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    higher = max_lanes<4>(higher);
    const float shift = higher == -INFINITY ? 0.0f : higher;
    const float rescale = exp2_fast((most[r] - shift) * kLog2E);
    most[r] = higher;
    sum[r] *= rescale;
#pragma unroll
    for (int n = 0; n < 2 * kWide; ++n)
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        s[n][i] = exp2_fast((s[n][i] - shift) * kLog2E);
        sum[r] += s[n][i];
      }
#pragma unroll
    for (int d = 0; d < kColumns; ++d) {
      acc[d][2 * r] *= rescale;
      acc[d][2 * r + 1] *= rescale;
    }
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kForwardWarps* kWarp, kForwardBlocks<D>)
    short_key_forward(ShortKeys p, ShortKeyOutput o) {
  constexpr int kWide = kForwardWide<D>;
  MMK_SHARED_MEMORY(shared);
  T* const k = reinterpret_cast<T*>(shared);
  T* const v = k + p.keys * D;
  T* const stages = v + p.keys * D + warp() * 2 * kStep * D;
  float* const added = reinterpret_cast<float*>(v + p.keys * D + kForwardWarps * 2 * kStep * D);
  const int h = int(blockIdx.y), b = int(blockIdx.z);
  const T* const queries = row_of<T>(p.query, b, h, 0);
  T* const out = const_cast<T*>(row_of<T>(o.out, b, h, 0));
  const int first = int(blockIdx.x) * p.tiles * kForwardWarps * kStep + warp() * kStep;
  const int end = min(first + p.tiles * kForwardWarps * kStep, p.queries);

  load_keys<T, D>(p, b, h, 0, p.keys, k, v, added);
  copy_rows<T, D>(stages, queries, p.query.strides[2], first, kStep, p.queries, p.dim, lane(), kWarp);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  if (p.mask_kind != MaskKind::kNone) {
    mark_not_finite<T, D>(p.keys, k, v, added);
    __syncthreads();
  }

  int stage = 0;
  for (int query = first; query < end; query += kForwardWarps * kStep) {
    T* const tile = stages + stage * kStep * D;
    stage ^= 1;
    wait_for_copies<0>();
    __syncwarp();
    const int next = query + kForwardWarps * kStep;
    if (next < end) {
      T* const into = stages + stage * kStep * D;
      copy_rows<T, D>(into, queries, p.query.strides[2], next, kStep, p.queries, p.dim, lane(), kWarp);
    }
    commit_copies();
    const Fragments<T, D, (D <= 128)> q(tile, 0);
    float acc[D / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    const int row = lane() / 4;
    for (int key = 0; key < p.keys; key += kWide * kStep) {
      float s[2 * kWide][4] = {};
      multiply_rows<T, D, kWide>(s, q, k, key, p.keys);
      finish_scores<T, kWide>(s, p, added, b, h, query + row, key);
      online_softmax<kWide>(s, most, sum, acc);
      multiply_columns<T, D, kWide>(acc, s, v, key, p.keys);
    }
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = sum_lanes<4>(sum[r]);
      inverse[r] = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
      const int at = query + row + 8 * r;
      if (o.row_max && lane() % 4 == 0 && at < p.queries) {
        const int64_t place = (int64_t(b) * p.heads + h) * p.queries + at;
        o.row_max[place] = most[r];
        o.log_sum[place] = sum[r] == 0.0f ? -INFINITY : logf(sum[r]);
      }
    }
    T* const rows = out + int64_t(query) * o.out.strides[2];
    store_rows<T, D>(tile, acc, inverse[0], inverse[1], rows, o.out.strides[2], p.queries - query, p.dim);
  }
}

template <typename T, int D>
void launch_short_key_forward(const ShortKeys& p, const ShortKeyOutput& o, Stream stream) {
  const int rows = p.tiles * kForwardWarps * kStep;
  const dim3 grid(unsigned((p.queries + rows - 1) / rows), unsigned(p.heads), unsigned(p.batch));
  const Launch at{"short-key attention forward", grid, kForwardWarps * kWarp, short_key_forward_shared<D>(p.keys),
                  stream};
  launch(at, short_key_forward<T, D>, p, o);
}

void launch_short_key_forward_bf16(const ShortKeys&, const ShortKeyOutput&, Stream);
void launch_short_key_forward_fp16(const ShortKeys&, const ShortKeyOutput&, Stream);

}  // namespace mmk::cuda
