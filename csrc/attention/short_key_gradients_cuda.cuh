// dK and dV of attention to few keys, for CUDA.
//
//     P = exp(S − max − log sum),   dP = dO Vᵀ,   dS = P ∘ (dP − Δ),   dK = scale · dSᵀ Q,   dV = Pᵀ dO
//
// Tiling     a warp owns 16 keys, whose sums stay in its registers, or one of the two sums where D is 256, while tiles
// of 32
//            queries and their dO pass through shared memory; the keys of a block see one share of the queries. The
//            sums of the shares, and of the query heads of a key head, are added up in their order by a second kernel.
// Precision  products in the inputs' dtype with float32 sums; P and dS rounded to the inputs' dtype for theirs.
// Limits     those of the forward.
#pragma once

#include "csrc/attention/short_keys.cuh"

namespace mmk::cuda {

constexpr int kTileRows = kBackwardWide * kStep;  // queries that pass through shared memory together
constexpr int kTileStatistics = 3 * kTileRows;    // their maximum, logarithm of the sum and Δ

/// More than a block has where twelve warps' registers hold the sums, as three in each quarter of a multiprocessor.
template <int D>
constexpr int kGradientThreads = D <= 64 ? 384 : 256;

enum class Sums : int { kBoth = 0, kKeys = 1, kValues = 2 };  // which of dK and dV

/// Sums over shares of the queries: [shares, B, Hq, keys, D] and [shares, B, Hq, keys], float32, or null.
struct ShortKeySums {
  float *dkey, *dvalue, *dadded;
  int first_share;
};

template <int D>
constexpr int short_key_gradients_shared(int keys) {
  return keys * D * 2 * 2 + keys * 4 + 2 * (2 * kTileRows * D * 2 + kTileStatistics * 4);
}

/// The keys of a block, of as many as its warps can have: blocks of about one size.
template <int D>
constexpr int short_key_block(int keys) {
  constexpr int kMost = D > 128 ? 64 : 128;
  const int blocks = (keys + kMost - 1) / kMost;
  return (keys / kStep + blocks - 1) / blocks * kStep;
}

/// 16 rows of a product's result as float32.
template <int D>
__device__ __forceinline__ void store_sums(float* out, const float (&acc)[D / 8][4], int dim) {
#pragma unroll
  for (int d = 0; d < D / 8; ++d)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane() / 4 + 8 * r, column = d * 8 + lane() % 4 * 2;
      if (column >= dim) continue;
      out[int64_t(row) * dim + column] = acc[d][2 * r];
      out[int64_t(row) * dim + column + 1] = acc[d][2 * r + 1];
    }
}

template <typename T, int D, Sums kSums>
__global__ void __launch_bounds__(kGradientThreads<D>, 1)
    short_key_gradients(ShortKeys p, ShortKeyGradient d, ShortKeySums sums) {
  constexpr bool kOfKeys = kSums != Sums::kValues, kOfValues = kSums != Sums::kKeys;
  MMK_SHARED_MEMORY(shared);
  const int keys = int(blockDim.x) / kWarp * kStep;
  const int blocks = (p.keys + keys - 1) / keys;
  const int h = int(blockIdx.y) / blocks, b = int(blockIdx.z);
  const int begin = int(blockIdx.y) % blocks * keys;
  T* const k = reinterpret_cast<T*>(shared);
  T* const v = k + keys * D;
  T* const stages = v + keys * D;  // queries and dO, twice
  float* const statistics = reinterpret_cast<float*>(stages + 4 * kTileRows * D);
  float* const added = statistics + 2 * kTileStatistics;
  const T *const queries = row_of<T>(p.query, b, h, 0), *const grads = row_of<T>(d.grad_out, b, h, 0);
  const int64_t head = (int64_t(b) * p.heads + h) * p.queries;
  const int first = int(blockIdx.x) * p.tiles * kTileRows, end = min(first + p.tiles * kTileRows, p.queries);
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const auto fetch = [&](int stage, int query) {
    T* const into = stages + stage * 2 * kTileRows * D;
    // What attends to nothing is not read: a weight of zero would not keep its NaN out of the sums.
    const auto attends = [&](int row) { return d.row_max[head + query + row] != -INFINITY; };
    const int rows = kTileRows, length = p.queries;
    copy_rows<T, D>(into, queries, p.query.strides[2], query, rows, length, p.dim, thread, threads, attends);
    copy_rows<T, D>(into + kTileRows * D, grads, d.grad_out.strides[2], query, rows, length, p.dim, thread, threads,
                    attends);
    for (int i = thread; i < kTileRows; i += threads) {
      const bool inside = query + i < p.queries;
      const Statistics of = inside ? Statistics::of(d, head + query + i) : Statistics{0.0f, INFINITY};
      float* const at = statistics + stage * kTileStatistics + i;
      at[0] = of.most;
      at[kTileRows] = of.log_sum;
      at[2 * kTileRows] = inside ? d.deltas[head + query + i] : 0.0f;
    }
  };

  load_keys<T, D>(p, b, h, begin, keys, k, v, added);
  fetch(0, first);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  if (p.mask_kind != MaskKind::kNone) {
    mark_not_finite<T, D>(keys, k, v, added);
    __syncthreads();
  }
  const Fragments<T, D, (D <= 32)> of_key(k, warp() * kStep), of_value(v, warp() * kStep);
  const int row = warp() * kStep + lane() / 4;  // this lane's two are row and row + 8
  const float to_row[2] = {added[row], added[row + 8]};

  float dk[kOfKeys ? D / 8 : 1][4] = {}, dv[kOfValues ? D / 8 : 1][4] = {}, dadded[2] = {};
  int stage = 0;
  for (int query = first; query < end; query += kTileRows) {
    const T* const tile = stages + stage * 2 * kTileRows * D;
    const float* const of_query = statistics + stage * kTileStatistics;
    stage ^= 1;
    wait_for_copies<0>();
    __syncthreads();
    if (query + kTileRows < end) fetch(stage, query + kTileRows);
    commit_copies();
    float s[2 * kBackwardWide][4] = {}, ds[2 * kBackwardWide][4] = {};  // [keys, queries]
    multiply_rows<T, D, kBackwardWide>(s, of_key, tile, 0, kTileRows);
    if constexpr (kOfKeys) multiply_rows<T, D, kBackwardWide>(ds, of_value, tile + kTileRows * D, 0, kTileRows);
#pragma unroll
    for (int n = 0; n < 2 * kBackwardWide; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + lane() % 4 * 2 + (i & 1), r = i >> 1;
        float score = to_row[r] == -INFINITY ? -INFINITY : fmaf(s[n][i], p.scale, to_row[r]);
        if (p.mask_kind != MaskKind::kNone && to_row[r] != -INFINITY)
          score =
              query + column < p.queries ? masked<T>(p, score, b, h, query + column, begin + row + 8 * r) : -INFINITY;
        const float weight = exp2_fast((score - of_query[column] - of_query[kTileRows + column]) * kLog2E);
        s[n][i] = score == -INFINITY ? 0.0f : weight;
        ds[n][i] = score == -INFINITY ? 0.0f : weight * (ds[n][i] - of_query[2 * kTileRows + column]);
        dadded[r] += ds[n][i];
      }
    if constexpr (kOfValues) multiply_columns<T, D, kBackwardWide>(dv, s, tile + kTileRows * D, 0, kTileRows);
    if constexpr (kOfKeys) multiply_columns<T, D, kBackwardWide>(dk, ds, tile, 0, kTileRows);
  }

  if (begin + warp() * kStep >= p.keys) return;
  const int64_t share = sums.first_share + int(blockIdx.x);
  const int64_t place = ((share * p.batch + b) * p.heads + h) * p.keys + begin + warp() * kStep;
  if constexpr (kOfValues)
    if (sums.dvalue) store_sums<D>(sums.dvalue + place * p.dim, dv, p.dim);
  if constexpr (kOfKeys) {
    if (sums.dkey) store_sums<D>(sums.dkey + place * p.dim, dk, p.dim);
    if (sums.dadded)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float sum = sum_lanes<4>(dadded[r]);
        if (lane() % 4 == 0) sums.dadded[place + lane() / 4 + 8 * r] = sum;
      }
  }
}

// --- the sums of shares ---

/// A segment's dK or dV, of the sums [shares, B, Hq, keys, D] times a factor.
struct ShortKeyTotal {
  const float* sums;
  Rows out;  // [B, Hkv, length, D]
  int shares, batch, heads, group, keys, first, length, dim;
  float factor;
};

template <typename T>
__global__ void __launch_bounds__(256) short_key_total(ShortKeyTotal t) {
  const int64_t vectors = int64_t(t.length) * (t.dim / 8);
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int kv_head = int(blockIdx.y), b = int(blockIdx.z);
  if (i >= vectors) return;
  const int token = int(i / (t.dim / 8)), feature = int(i % (t.dim / 8)) * 8;
  float total[8] = {};
  for (int share = 0; share < t.shares; ++share)
    for (int g = 0; g < t.group; ++g) {
      const int64_t head = (int64_t(share) * t.batch + b) * t.heads + kv_head * t.group + g;
      const float* const at = t.sums + (head * t.keys + t.first + token) * t.dim + feature;
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const Bytes16 bytes = *reinterpret_cast<const Bytes16*>(at + j);
        float x[4];
        memcpy(x, bytes.words, 16);
#pragma unroll
        for (int e = 0; e < 4; ++e) total[j + e] += x[e];
      }
    }
  Bytes16 bytes;
#pragma unroll
  for (int j = 0; j < 4; ++j) bytes.words[j] = pack<T>(total[2 * j] * t.factor, total[2 * j + 1] * t.factor);
  T* const out = const_cast<T*>(row_of<T>(t.out, b, kv_head, token));
  *reinterpret_cast<Bytes16*>(out + feature) = bytes;
}

template <typename T, int D>
void launch_short_key_gradients(const ShortKeys& p, const ShortKeyGradient& d, const ShortKeySums& sums,
                                Stream stream) {
  const int rows = p.tiles * kTileRows, keys = short_key_block<D>(p.keys);
  const unsigned blocks = unsigned((p.keys + keys - 1) / keys);
  const dim3 grid(unsigned((p.queries + rows - 1) / rows), unsigned(p.heads) * blocks, unsigned(p.batch));
  const unsigned threads = unsigned(keys / kStep * kWarp);
  const Launch at{"short-key attention backward, dK and dV", grid, threads, short_key_gradients_shared<D>(keys),
                  stream};
  if constexpr (D <= 128) {
    launch(at, short_key_gradients<T, D, Sums::kBoth>, p, d, sums);
  } else {
    if (sums.dkey || sums.dadded) launch(at, short_key_gradients<T, D, Sums::kKeys>, p, d, sums);
    if (sums.dvalue) launch(at, short_key_gradients<T, D, Sums::kValues>, p, d, sums);
  }
}

void launch_short_key_gradients_bf16(const ShortKeys&, const ShortKeyGradient&, const ShortKeySums&, Stream);
void launch_short_key_gradients_fp16(const ShortKeys&, const ShortKeyGradient&, const ShortKeySums&, Stream);

template <typename T>
void launch_short_key_total(const ShortKeyTotal& t, Stream stream) {
  const int64_t vectors = int64_t(t.length) * (t.dim / 8);
  const dim3 grid(unsigned((vectors + 255) / 256), unsigned(t.heads / t.group), unsigned(t.batch));
  launch({"short-key attention backward, totals", grid, 256, 0, stream}, short_key_total<T>, t);
}

}  // namespace mmk::cuda
