// What the CUDA kernels of attention to few keys share: keys of several segments side by side in shared memory, and the
// scores of a tile.
//
// Tiles are rows of D 16-bit elements, D the head dim padded to 32, 64, 96, 128 or 256. The 16-byte chunks of a row are
// permuted by the row, so that the eight rows which a matrix load takes from one column of chunks lie in eight banks.
#pragma once

#include "csrc/cuda/launch.h"

namespace mmk::cuda {

constexpr int kMaxSegments = 8;
constexpr int kMaxKeys = 512;
constexpr int kStep = 16;  // keys, queries and features come in multiples of an mma's 16
constexpr float kLog2E = 1.4426950408889634f;

enum class MaskKind : int { kNone = 0, kBool = 1, kElement = 2, kFloat = 3 };  // kElement: the dtype of the queries

struct Segment {
  const void *key, *value;                   // [B, Hkv, length, D] each
  int64_t key_strides[3], value_strides[3];  // batch, head, token
  const int64_t* lengths;                    // [B], or null
  int length;
  int first;  // of its keys among those of all segments
};

/// The tokens of queries, or of what has their shape.
struct Rows {
  const void* at;
  int64_t strides[3];  // batch, head, token
};

struct ShortKeys {
  Rows query;  // [B, Hq, Lq, D]
  Segment segments[kMaxSegments];
  int segment_count;
  int keys;   // of all segments, padded to a multiple of kStep
  int total;  // before
  int batch, heads, group, queries, dim;
  float scale;
  const float* bias;  // [Hq, segments] or null, added to a segment's scores
  const void* mask;   // [B, Hq, Lq, keys] by strides, or null
  int64_t mask_strides[4];
  MaskKind mask_kind;
  int tiles;  // of queries, that a block takes one after another
};

constexpr int kBackwardWide = 2;  // keys or queries at a time, of the backward, in sixteens

struct ShortKeyGradient {
  Rows grad_out, out;              // [B, Hq, Lq, D]
  const float *row_max, *log_sum;  // [B, Hq, Lq]
  const float* grad_log_sum;       // [B, Hq, Lq] or null
  float* deltas;                   // [B, Hq, Lq]
  bool exact;                      // Δ as Σ P ∘ dP, which takes another pass over the keys, not from the rounded O
};

struct Statistics {
  float most, log_sum;

  /// Of a query; one with nothing to attend to gets weights of zero.
  __device__ static Statistics of(const ShortKeyGradient& d, int64_t at) {
    const float most = d.row_max[at];
    if (most == -INFINITY) return {0.0f, INFINITY};
    return {most, d.log_sum[at]};
  }
};

template <typename T>
__device__ __forceinline__ const T* row_of(const Rows& s, int b, int h, int64_t token) {
  return static_cast<const T*>(s.at) + b * s.strides[0] + h * s.strides[1] + token * s.strides[2];
}

/// Where chunk `chunk` of a row begins in a tile.
template <int D>
__device__ __forceinline__ int place(int row, int chunk) {
  constexpr bool kWide = D % 64 == 0;  // a row fills whole lines of 128 bytes
  return row * D + (chunk ^ (kWide ? row & 7 : (row >> 1) & 3)) * 8;
}

struct Every {
  __device__ bool operator()(int) const { return true; }
};

/// Copy rows [first, first + rows) of a sequence of `length` tokens into a tile, zeros beyond its end and where not
/// `wanted(row)`, by `threads` threads of which this is `thread`.
template <typename T, int D, typename Wanted = Every>
__device__ __forceinline__ void copy_rows(T* tile, const T* base, int64_t stride, int first, int rows, int length,
                                          int dim, int thread, int threads, Wanted wanted = {}) {
  constexpr int kChunks = D / 8;
  for (int i = thread; i < rows * kChunks; i += threads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool inside = first + row < length && chunk * 8 < dim && wanted(row);
    copy_async(tile + place<D>(row, chunk), base + (inside ? (first + row) * stride + chunk * 8 : 0), inside);
  }
}

/// The part [begin, begin + rows) of all segments' keys and values as tiles, and what is added to the scores of each
/// key: its segment's bias, −∞ where there is no key. The caller waits for the copies.
template <typename T, int D>
__device__ __forceinline__ void load_keys(const ShortKeys& p, int b, int h, int begin, int rows, T* k, T* v,
                                          float* added) {
  const int threads = int(blockDim.x), thread = int(threadIdx.x);
  for (int i = thread; i < rows; i += threads) added[i] = -INFINITY;
  __syncthreads();
  for (int j = 0; j < p.segment_count; ++j) {
    const Segment& s = p.segments[j];
    const int from = max(s.first, begin), to = min(s.first + s.length, begin + rows);
    if (from >= to) continue;
    const float bias = p.bias ? p.bias[h * p.segment_count + j] : 0.0f;
    int length = s.length;
    if (s.lengths) length = int(min(max(s.lengths[b], int64_t(0)), int64_t(length)));
    if (bias == -INFINITY) length = 0;  // a segment that nobody attends to is not read
    const int kv_head = h / p.group;
    const T* const key = static_cast<const T*>(s.key) + b * s.key_strides[0] + kv_head * s.key_strides[1];
    const T* const value = static_cast<const T*>(s.value) + b * s.value_strides[0] + kv_head * s.value_strides[1];
    const int tile_row = from - begin, token = from - s.first;
    // A segment may begin in the middle of a tile's group of eight rows: the place follows the tile's rows.
    for (int i = thread; i < (to - from) * (D / 8); i += threads) {
      const int row = i / (D / 8), chunk = i % (D / 8);
      const bool inside = token + row < length && chunk * 8 < p.dim;
      const int at = place<D>(tile_row + row, chunk);
      copy_async(k + at, key + (inside ? (token + row) * s.key_strides[2] + chunk * 8 : 0), inside);
      copy_async(v + at, value + (inside ? (token + row) * s.value_strides[2] + chunk * 8 : 0), inside);
    }
    for (int i = thread; i < to - from; i += threads)
      if (token + i < length) added[tile_row + i] = bias;
  }
  const int end = min(max(p.total - begin, 0), rows);  // of no segment are the rows behind the last key
  const Bytes16 zeros{};
  for (int i = end * (D / 8) + thread; i < rows * (D / 8); i += threads) {
    *reinterpret_cast<Bytes16*>(k + i * 8) = zeros;
    *reinterpret_cast<Bytes16*>(v + i * 8) = zeros;
  }
}

/// Under a mask, a key or value that is not finite reaches the queries that may attend to it and no others: zero it,
/// and mark its scores as NaN. After the copies have arrived, and before a barrier.
template <typename T, int D>
__device__ __forceinline__ void mark_not_finite(int rows, T* k, T* v, float* added) {
  constexpr uint32_t kExponent = std::is_same_v<T, Bf16> ? 0x7f80u : 0x7c00u;
  for (int row = warp(); row < rows; row += int(blockDim.x) / kWarp) {
    bool finite = true;
    for (int i = lane(); i < D; i += kWarp)
      finite =
          finite && (k[row * D + i].bits & kExponent) != kExponent && (v[row * D + i].bits & kExponent) != kExponent;
    if (ballot(!finite) == 0) continue;
    for (int i = lane(); i < D; i += kWarp) k[row * D + i] = v[row * D + i] = T{0};
    if (lane() == 0 && added[row] != -INFINITY) added[row] = NAN;
  }
}

/// A-fragments of 16 rows of a tile: kept in registers, or loaded whenever they are asked for.
template <typename T, int D, bool kKeep>
struct Fragments {
  uint32_t kept[kKeep ? D / kStep : 1][4];
  const T* tile;
  int row;

  __device__ __forceinline__ Fragments(const T* tile, int first) : tile(tile), row(first + (lane() & 15)) {
    if constexpr (kKeep)
#pragma unroll
      for (int k = 0; k < D / kStep; ++k) load(k, kept[k]);
  }

  __device__ __forceinline__ void load(int k, uint32_t (&a)[4]) const {
    load_matrices(a, tile + place<D>(row, 2 * k + (lane() >> 4)));
  }

  __device__ __forceinline__ void get(int k, uint32_t (&a)[4]) const {
    if constexpr (kKeep) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = kept[k][i];
    } else {
      load(k, a);
    }
  }
};

/// s += a · bᵀ: 16 rows by the kWide · 16 rows of a tile from `first` on; those from `end` on, in sixteens, are left
/// out.
template <typename T, int D, int kWide, bool kKeep>
__device__ __forceinline__ void multiply_rows(float (&s)[2 * kWide][4], const Fragments<T, D, kKeep>& a, const T* tile,
                                              int first, int end) {
#pragma unroll(kKeep ? D / kStep : 4)  // addresses of all steps would take registers
  for (int k = 0; k < D / kStep; ++k) {
    uint32_t x[4];
    a.get(k, x);
#pragma unroll
    for (int n = 0; n < kWide; ++n) {
      if (first + n * kStep >= end) continue;
      uint32_t y[4];
      const int row = first + n * kStep + (lane() & 7) + ((lane() >> 4) << 3);
      load_matrices(y, tile + place<D>(row, 2 * k + ((lane() >> 3) & 1)));
      multiply<T>(s[2 * n], x, y[0], y[1]);
      multiply<T>(s[2 * n + 1], x, y[2], y[3]);
    }
  }
}

/// acc += w · b: 16 rows of weights, in the layout of a product's result, by as many rows of a tile and its features.
template <typename T, int D, int kWide>
__device__ __forceinline__ void multiply_columns(float (&acc)[D / 8][4], const float (&w)[2 * kWide][4], const T* tile,
                                                 int first, int end) {
#pragma unroll
  for (int n = 0; n < kWide; ++n) {
    if (first + n * kStep >= end) continue;
    const uint32_t x[4] = {pack<T>(w[2 * n][0], w[2 * n][1]), pack<T>(w[2 * n][2], w[2 * n][3]),
                           pack<T>(w[2 * n + 1][0], w[2 * n + 1][1]), pack<T>(w[2 * n + 1][2], w[2 * n + 1][3])};
#pragma unroll
    for (int d = 0; d < D / 8; d += 2) {
      uint32_t y[4];
      load_matrices_transposed(y, tile + place<D>(first + n * kStep + (lane() & 15), d + (lane() >> 4)));
      multiply<T>(acc[d], x, y[0], y[1]);
      multiply<T>(acc[d + 1], x, y[2], y[3]);
    }
  }
}

/// A score under the mask; −∞ where the pair may not attend.
template <typename T>
__device__ __forceinline__ float masked(const ShortKeys& p, float s, int b, int h, int query, int key) {
  const int64_t at =
      b * p.mask_strides[0] + h * p.mask_strides[1] + query * p.mask_strides[2] + key * p.mask_strides[3];
  if (p.mask_kind == MaskKind::kBool) return static_cast<const uint8_t*>(p.mask)[at] ? s : -INFINITY;
  const float added = p.mask_kind == MaskKind::kFloat ? static_cast<const float*>(p.mask)[at]
                                                      : to_float(static_cast<const T*>(p.mask)[at]);
  return added == -INFINITY ? -INFINITY : s + added;
}

/// 16 rows of results in a product's layout as 16-bit elements into a tile, from where they leave 16 bytes at a time.
template <typename T, int D>
__device__ __forceinline__ void store_rows(T* tile, const float (&acc)[D / 8][4], float upper, float lower, T* out,
                                           int64_t stride, int rows, int dim) {
  const int row = lane() / 4, column = lane() % 4 * 2;
  __syncwarp();
#pragma unroll
  for (int d = 0; d < D / 8; ++d) {
    *reinterpret_cast<uint32_t*>(tile + place<D>(row, d) + column) = pack<T>(acc[d][0] * upper, acc[d][1] * upper);
    *reinterpret_cast<uint32_t*>(tile + place<D>(row + 8, d) + column) = pack<T>(acc[d][2] * lower, acc[d][3] * lower);
  }
  __syncwarp();
  for (int i = lane(); i < kStep * (D / 8); i += kWarp) {
    const int r = i / (D / 8), chunk = i % (D / 8);
    if (r < rows && chunk * 8 < dim)
      *reinterpret_cast<Bytes16*>(out + r * stride + chunk * 8) =
          *reinterpret_cast<Bytes16*>(tile + place<D>(r, chunk));
  }
  __syncwarp();
}

/// Call `function<T, D>` of a template for the head dim that holds `dim`.
#define MMK_FOR_HEAD_DIM(function, T, dim, ...)   \
  ((dim) <= 32    ? function<T, 32>(__VA_ARGS__)  \
   : (dim) <= 64  ? function<T, 64>(__VA_ARGS__)  \
   : (dim) <= 96  ? function<T, 96>(__VA_ARGS__)  \
   : (dim) <= 128 ? function<T, 128>(__VA_ARGS__) \
                  : function<T, 256>(__VA_ARGS__))

}  // namespace mmk::cuda
