// dQ of attention to few keys, for CUDA.
//
//     P = exp(S − max − log sum),   dP = dO Vᵀ,   Δ = rowsum(dO ∘ O) − dLSE,   dS = P ∘ (dP − Δ),   dQ = scale · dS K
//
// Tiling     as the forward: all keys and values in shared memory, a warp takes 16 queries at a time, whose Q and dO
// arrive
//            in the background. It also leaves Δ and, where it is wanted, dS.
// Precision  products in the inputs' dtype with float32 sums; dS rounded to the inputs' dtype for its product.
// Limits     those of the forward.
#pragma once

#include "csrc/attention/short_key_forward_cuda.cuh"

namespace mmk::cuda {

template <int D>
constexpr int kQueryGradientBlocks = D <= 64 ? 3 : 1;  // on a multiprocessor at least, by registers

template <int D>
constexpr int short_key_query_gradient_shared(int keys) {
  return keys * D * 2 * 2 + keys * 4 + kForwardWarps * 2 * 2 * kStep * D * 2;
}

/// rowsum(dO ∘ O) of the two rows of this lane's fragments.
template <typename T, int D, bool kKeep>
__device__ __forceinline__ void row_products(const Fragments<T, D, kKeep>& g, const T* out, int64_t stride, int rows,
                                             int dim, float (&sums)[2]) {
#pragma unroll
  for (int k = 0; k < D / kStep; ++k) {
    uint32_t x[4];
    g.get(k, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane() / 4 + (i & 1) * 8, column = k * kStep + (i >> 1) * 8 + lane() % 4 * 2;
      if (row >= rows || column >= dim) continue;
      const uint32_t y = *reinterpret_cast<const uint32_t*>(out + row * stride + column);
      sums[i & 1] += low_half<T>(x[i]) * low_half<T>(y) + high_half<T>(x[i]) * high_half<T>(y);
    }
  }
}

/// This lane's parts of Δ of two rows to the whole, and to memory.
__device__ __forceinline__ void finish_deltas(const ShortKeyGradient& d, int64_t first, int rows, float (&delta)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane() / 4 + 8 * r;
    delta[r] = sum_lanes<4>(delta[r]);
    if (row >= rows) continue;
    if (d.grad_log_sum) delta[r] -= d.grad_log_sum[first + row];
    if (lane() % 4 == 0) d.deltas[first + row] = delta[r];
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kForwardWarps* kWarp, kQueryGradientBlocks<D>)
    short_key_query_gradient(ShortKeys p, ShortKeyGradient d, Rows dquery, float* dscores) {
  constexpr bool kKeep = D <= 128;
  constexpr int kWide = D <= 128 ? kBackwardWide : 1;  // keys at a time, in sixteens
  MMK_SHARED_MEMORY(shared);
  T* const k = reinterpret_cast<T*>(shared);
  T* const v = k + p.keys * D;
  T* const stages = v + p.keys * D + warp() * 4 * kStep * D;
  float* const added = reinterpret_cast<float*>(v + p.keys * D + kForwardWarps * 4 * kStep * D);
  const int h = int(blockIdx.y), b = int(blockIdx.z);
  const T *const queries = row_of<T>(p.query, b, h, 0), *const grads = row_of<T>(d.grad_out, b, h, 0);
  const int first = int(blockIdx.x) * p.tiles * kForwardWarps * kStep + warp() * kStep;
  const int end = min(first + p.tiles * kForwardWarps * kStep, p.queries);
  const auto fetch = [&](T* into, int query) {
    copy_rows<T, D>(into, queries, p.query.strides[2], query, kStep, p.queries, p.dim, lane(), kWarp);
    copy_rows<T, D>(into + kStep * D, grads, d.grad_out.strides[2], query, kStep, p.queries, p.dim, lane(), kWarp);
  };

  load_keys<T, D>(p, b, h, 0, p.keys, k, v, added);
  fetch(stages, first);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  if (p.mask_kind != MaskKind::kNone) {
    mark_not_finite<T, D>(p.keys, k, v, added);
    __syncthreads();
  }

  int stage = 0;
  for (int query = first; query < end; query += kForwardWarps * kStep) {
    T* const tile = stages + stage * 2 * kStep * D;
    stage ^= 1;
    wait_for_copies<0>();
    __syncwarp();
    const int next = query + kForwardWarps * kStep;
    if (next < end) fetch(stages + stage * 2 * kStep * D, next);
    commit_copies();
    const Fragments<T, D, kKeep> q(tile, 0), g(tile + kStep * D, 0);
    const int64_t head = (int64_t(b) * p.heads + h) * p.queries;
    Statistics of_row[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = query + lane() / 4 + 8 * r;
      of_row[r] = row < p.queries ? Statistics::of(d, head + row) : Statistics{0.0f, INFINITY};
    }
    float acc[D / 8][4] = {}, delta[2] = {};
    if (!d.exact) row_products(g, row_of<T>(d.out, b, h, query), d.out.strides[2], p.queries - query, p.dim, delta);
    for (int pass = d.exact ? 0 : 1; pass < 2; ++pass) {  // the first only for Δ
      if (pass == 1) finish_deltas(d, head + query, p.queries - query, delta);
      for (int key = 0; key < p.keys; key += kWide * kStep) {
        float s[2 * kWide][4] = {}, ds[2 * kWide][4] = {};
        multiply_rows<T, D, kWide>(s, q, k, key, p.keys);
        multiply_rows<T, D, kWide>(ds, g, v, key, p.keys);
        finish_scores<T, kWide>(s, p, added, b, h, query + lane() / 4, key);
#pragma unroll
        for (int n = 0; n < 2 * kWide; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = i >> 1;
            const float exponential = exp2_fast((s[n][i] - of_row[r].most - of_row[r].log_sum) * kLog2E);
            const float weight = s[n][i] == -INFINITY ? 0.0f : exponential;
            if (pass == 0) {
              delta[r] += weight * ds[n][i];
              continue;
            }
            ds[n][i] = s[n][i] == -INFINITY ? 0.0f : weight * (ds[n][i] - delta[r]);
            const int row = query + lane() / 4 + r * 8, column = key + n * 8 + lane() % 4 * 2 + (i & 1);
            if (dscores && row < p.queries && column < p.total) dscores[(head + row) * p.total + column] = ds[n][i];
          }
        if (pass == 1) multiply_columns<T, D, kWide>(acc, ds, k, key, p.keys);
      }
    }
    T* const rows = const_cast<T*>(row_of<T>(dquery, b, h, query));
    if (dquery.at) store_rows<T, D>(tile, acc, p.scale, p.scale, rows, dquery.strides[2], p.queries - query, p.dim);
  }
}

template <typename T, int D>
void launch_short_key_query_gradient(const ShortKeys& p, const ShortKeyGradient& d, const Rows& dquery, float* dscores,
                                     Stream stream) {
  const int rows = p.tiles * kForwardWarps * kStep;
  const dim3 grid(unsigned((p.queries + rows - 1) / rows), unsigned(p.heads), unsigned(p.batch));
  const int shared = short_key_query_gradient_shared<D>(p.keys);
  const Launch at{"short-key attention backward, dQ", grid, kForwardWarps * kWarp, shared, stream};
  launch(at, short_key_query_gradient<T, D>, p, d, dquery, dscores);
}

void launch_short_key_query_gradient_bf16(const ShortKeys&, const ShortKeyGradient&, const Rows& dquery, float* dscores,
                                          Stream);
void launch_short_key_query_gradient_fp16(const ShortKeys&, const ShortKeyGradient&, const Rows& dquery, float* dscores,
                                          Stream);

}  // namespace mmk::cuda
