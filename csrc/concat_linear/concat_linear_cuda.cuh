// concat_linear for CUDA.
//
//     z = [x₁; …; x_M] Wᵀ + b,   y = residual + tanh(gate) · act(z)
//     dx_i = dz W_i,   dW_i = dzᵀ x_i   over the rows that have source i; dx_i is zero in the others
//
// Tiling     128 x 128 of the result in a block of eight warps, or where that makes too few blocks 64 x 64 in four:
//            csrc/concat/product_cuda.cuh. The forward walks over the sources, each against its columns of W, and skips
//            those that no row of a block has. dx: a block of rows none of which has the source writes zeros at once.
//            dW: a block owns a share of the rows and lists those that have the source, so that it walks over no
//            others; the shares are added up by the caller, in their order. The two are here for calls with presence:
//            without it they are plain products, which torch's library is best at.
// Precision  float32 sums; z, y, dz, dx and, of a single share, dW are rounded to the inputs' dtype.
// Limits     16-bit dtypes; up to 16 sources; every K_i and N a multiple of 8; everything begins at a multiple of 16
//            bytes.
#pragma once

#include "csrc/concat/preactivation_cuda.cuh"
#include "csrc/concat/product_cuda.cuh"

namespace mmk::cuda {

struct ConcatLinear {
  Sources sources;
  Presence presence;
  const void* weight;  // [N, ΣK_i]
  int64_t weight_stride;
  LinearEpilogue epilogue;
};

template <typename T, int kTile>
__global__ void MMK_TILE_BOUNDS concat_linear_forward(ConcatLinear p) {
  MMK_SHARED_MEMORY(shared);
  const TilePlace<kTile> place(p.sources.rows, p.epilogue.features);
  unsigned present[2];
  find_present(p.sources, p.presence, place, present);
  unsigned* const words = reinterpret_cast<unsigned*>(shared);
  SourceCopies<T, kTile> copies(p.sources, any_of_block<2 * kTile / kWarp>(present[0] | present[1], words), place,
                                present, p.weight, p.weight_stride, p.epilogue.features);
  Product<T, kTile, false, false> product;
  product.add(reinterpret_cast<T*>(shared), copies.walk.steps(), [&](T* a, T* b) { copies.load(a, b); });
  const LinearFinish<T> finish(p.epilogue, place.column + product.column_in_tile());
  product.finish(shared, [&](int row, float (&x)[kVector]) { finish(place.row + row, x); });
}

struct InputGradient {
  const void *dz, *weight;  // [rows, N], [N, K] of the source
  int64_t dz_stride, weight_stride;
  Presence presence;          // of the source
  void* dx;                   // [rows, K], contiguous
  int rows, features, width;  // N, K
};

template <typename T, int kTile>
__global__ void MMK_TILE_BOUNDS concat_linear_input_gradient(InputGradient p) {
  using ThisProduct = Product<T, kTile, false, true>;
  using TileA = typename ThisProduct::TileA;
  using TileB = typename ThisProduct::TileB;
  MMK_SHARED_MEMORY(shared);
  const TilePlace<kTile> place(p.rows, p.width);
  const auto has = [&](int row) { return row < p.rows && p.presence(row, 0); };
  const bool here[2] = {has(place.row + TileA::row(0)), has(place.row + TileA::row(1))};
  const unsigned any =
      any_of_block<ThisProduct::kThreads / kWarp>(here[0] || here[1], reinterpret_cast<unsigned*>(shared));
  const int a_to = TileA::place(), b_to = TileB::place(), from_column = place.column + TileB::chunk() * kVector;
  const T* dz = static_cast<const T*>(p.dz) + (place.row + TileA::row(0)) * p.dz_stride + TileA::chunk() * kVector;
  const T* weight = static_cast<const T*>(p.weight) + TileB::row(0) * p.weight_stride + from_column;
  int left = p.features;  // of K, from the next step on
  ThisProduct product;
  product.add(reinterpret_cast<T*>(shared), any ? (p.features + kDepth - 1) / kDepth : 0, [&](T* a, T* b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      copy_async(a + a_to + half * TileA::kHalf, dz + half * TileA::kRowStep * p.dz_stride,
                 here[half] && TileA::chunk() * kVector < left);
      copy_async(b + b_to + half * TileB::kHalf, weight + half * TileB::kRowStep * p.weight_stride,
                 TileB::row(half) < left && from_column < p.width);
    }
    dz += kDepth;
    weight += kDepth * p.weight_stride;
    left -= kDepth;
  });
  T* const dx = static_cast<T*>(p.dx);
  const int column = place.column + product.column_in_tile();
  product.finish(shared, [&](int r, float (&x)[kVector]) {
    const int row = place.row + r;
    if (row >= p.rows || column >= p.width) return;
    if (!p.presence(row, 0)) change_each(x, [](float) { return 0.0f; });  // W may hold infinities
    store_vector(dx + int64_t(row) * p.width + column, x);
  });
}

struct WeightGradient {
  const void *dz, *x;  // [rows, N], [rows, K] of the source
  int64_t dz_stride, x_stride;
  Presence presence;  // of the source
  void* dweight;      // [N, K], or [shares, N, K] float32 where there are several
  int64_t dweight_stride;
  int rows, features, width;  // N, K
  int share, shares;          // rows of a block, of which there are `shares` for each tile
};

constexpr int kListedRows = 2048;  // at a time
constexpr int kListGroups = kListedRows / kWarp;
constexpr int kListBytes = kListedRows * int(sizeof(uint16_t)) + kListGroups * int(sizeof(int));

/// Lists those of the rows [begin, end), at most kListedRows, that have the source, less begin. Returns their number.
/// Each of kWarps warps takes a run of groups of 32 rows. A list in use is safe up to the first barrier.
template <int kWarps>
__device__ __forceinline__ int list_rows(const Presence& presence, int begin, int end, uint16_t* list, int* counts) {
  constexpr int kGroups = kListGroups / kWarps;
  const int first = warp() * kGroups;
  unsigned votes[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int row = begin + (first + g) * kWarp + lane();
    votes[g] = ballot(row < end && presence(row, 0));
    if (lane() == 0) counts[first + g] = count_bits(votes[g]);
  }
  __syncthreads();
  int before = 0, total = 0;
  for (int g = 0; g < kListGroups; ++g) {
    before += g < first ? counts[g] : 0;
    total += counts[g];
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int at = before + count_bits(votes[g] & ((1u << lane()) - 1));
    if (votes[g] >> lane() & 1) list[at] = uint16_t((first + g) * kWarp + lane());
    before += count_bits(votes[g]);
  }
  __syncthreads();
  return total;
}

template <typename T, int kTile>
__global__ void MMK_TILE_BOUNDS concat_linear_weight_gradient(WeightGradient p) {
  using ThisProduct = Product<T, kTile, true, true>;
  using Tile = typename ThisProduct::TileA;  // both operands lie alike
  MMK_SHARED_MEMORY(shared);
  uint16_t* const list = reinterpret_cast<uint16_t*>(shared + ThisProduct::kShared);
  int* const counts = reinterpret_cast<int*>(list + kListedRows);
  const TilePlace<kTile> place(p.features, p.width);
  const int feature = place.row + Tile::chunk() * kVector, from_column = place.column + Tile::chunk() * kVector;
  const T* const dz = static_cast<const T*>(p.dz) + feature;
  const T* const x = static_cast<const T*>(p.x) + from_column;
  const int first = int(blockIdx.y) * p.share, last = min(first + p.share, p.rows);
  const int to = Tile::place();
  ThisProduct product;
  for (int begin = first; begin < last; begin += kListedRows) {
    const int end = min(begin + kListedRows, last);
    const int count = list_rows<ThisProduct::kThreads / kWarp>(p.presence, begin, end, list, counts);
    int next = 0;  // of the list, in the next step
    product.add(reinterpret_cast<T*>(shared), (count + kDepth - 1) / kDepth, [&](T* a, T* b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = Tile::row(half);
        const bool here = next + r < count;
        const int64_t row = begin + (here ? int(list[next + r]) : 0);
        copy_async(a + to + half * Tile::kHalf, dz + row * p.dz_stride, here && feature < p.features);
        copy_async(b + to + half * Tile::kHalf, x + row * p.x_stride, here && from_column < p.width);
      }
      next += kDepth;
    });
  }
  const int column = place.column + product.column_in_tile();
  product.finish(shared, [&](int r, float (&sum)[kVector]) {
    const int row = place.row + r;
    if (row >= p.features || column >= p.width) return;
    if (p.shares > 1) {
      const int64_t at = (int64_t(blockIdx.y) * p.features + row) * p.dweight_stride + column;
      store_vector(static_cast<float*>(p.dweight) + at, sum);
    } else {
      store_vector(static_cast<T*>(p.dweight) + row * p.dweight_stride + column, sum);
    }
  });
}

template <typename T, int kTile>
void launch_concat_linear_forward(const ConcatLinear& p, Stream stream) {
  constexpr int kShared = Product<T, kTile, false, false>::kShared;
  launch(tiles_launch<kTile>("concat_linear forward", p.sources.rows, p.epilogue.features, 1, kShared, stream),
         concat_linear_forward<T, kTile>, p);
}

template <typename T, int kTile>
void launch_input_gradient(const InputGradient& p, Stream stream) {
  constexpr int kShared = Product<T, kTile, false, true>::kShared;
  launch(tiles_launch<kTile>("concat_linear dx", p.rows, p.width, 1, kShared, stream),
         concat_linear_input_gradient<T, kTile>, p);
}

template <typename T, int kTile>
void launch_weight_gradient(const WeightGradient& p, Stream stream) {
  constexpr int kShared = Product<T, kTile, true, true>::kShared + kListBytes;
  launch(tiles_launch<kTile>("concat_linear dW", p.features, p.width, p.shares, kShared, stream),
         concat_linear_weight_gradient<T, kTile>, p);
}

}  // namespace mmk::cuda
