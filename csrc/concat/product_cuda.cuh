// The product of two 16-bit matrices on a tile of the result, C = A B, with sums in float32 on tensor cores, and the
// walk of the first over several sources: C = [x₁; …; x_M] Wᵀ.
//
// Tiling     a block owns kTile x kTile of C, a warp kTile/2 x 32 of them. K is walked 32 at a time through a ring of
//            four stages in shared memory, filled by copies in the background; one barrier per step. An operand lies in
//            memory along K (rows of it are K long) or across K (K is its number of rows), and so in the stage, its
//            chunks of 16 bytes permuted so that no ldmatrix has a bank conflict. At the end the tile goes through
//            shared memory as float32, for whole vectors of rows to be finished and stored.
// Limits     every row of an operand begins at a multiple of 16 bytes and its length is a multiple of 8 elements.
#pragma once

#include "csrc/cuda/launch.h"
#include "csrc/cuda/rows.cuh"

namespace mmk::cuda {

constexpr int kDepth = 32;         // of K in a stage
constexpr int kProductStages = 4;  // copies run three steps ahead

struct alignas(8) Floats2 {
  float x, y;
};

/// Of a kernel with a block's threads for a tile, 2 kTile: two blocks of 256 or four of 128 leave 128 registers to
/// each.
#define MMK_TILE_BOUNDS __launch_bounds__(2 * kTile, 256 / kTile)

/// One operand's part of a stage, kTile of its rows or columns by kDepth of K.
template <int kTile, bool kAcross>
struct OperandTile {
  static constexpr int kChunks = (kAcross ? kTile : kDepth) / kVector;  // of a row
  static constexpr int kRowStep = 2 * kTile / kChunks;  // a thread copies two chunks, so many rows apart

  /// The element at which a chunk begins. Along K two rows share 128 bytes, and their four chunks change places from
  /// pair to pair; across K a row has 128 bytes or more, and eight chunks change places from row to row.
  static __device__ int at(int row, int chunk) {
    return kAcross ? row * kTile + (chunk ^ (row & 7)) * kVector : row * kDepth + (chunk ^ (row >> 1 & 3)) * kVector;
  }

  /// The chunk that this thread copies, its row for half = 0, 1, and where its two go.
  static __device__ int chunk() { return int(threadIdx.x) % kChunks; }
  static __device__ int row(int half) { return int(threadIdx.x) / kChunks + half * kRowStep; }
  static __device__ int place() { return at(row(0), chunk()); }
  static constexpr int kHalf = kRowStep * kChunks * kVector;  // the second, from the first: eight divides the rows

  /// From where this lane gives a row to ldmatrix for 16 of K and 16 of the tile from `first` on: in the order of an
  /// operand A's matrices, or of two fragments of B.
  template <bool kIsB>
  static __device__ int fragment(int first) {
    const int inner = lane() % 8, low = lane() / 8 % 2 * 8, high = lane() / 16 * 8;
    const int side = inner + (kIsB ? high : low), depth = kIsB ? low : high;
    if (!kAcross) return at(first + side, depth / kVector);
    return at(inner + depth, (first + side - inner) / kVector);
  }

  /// The same, 16 i further along the tile and k along K: what changes no chunk's place but flips a bit of it is an
  /// xor.
  static __device__ int further(int from, int i, int k) {
    return kAcross ? (from ^ 16 * i) + k * kTile : (from ^ k) + 16 * i * kDepth;
  }
};

/// Rows of A by columns of B: each is the operand's side of the tile. Threads: 2 kTile.
template <typename T, int kTile, bool kAcrossA, bool kAcrossB>
struct Product {
  using TileA = OperandTile<kTile, kAcrossA>;
  using TileB = OperandTile<kTile, kAcrossB>;
  static constexpr int kThreads = 2 * kTile;
  static constexpr int kOperand = kTile * kDepth;  // elements
  static constexpr int kShared = kProductStages * 2 * kOperand * int(sizeof(T));
  static constexpr int kFragments = kTile / 32;     // of 16 rows, in a warp
  static constexpr int kVectors = kTile / kVector;  // in a row of the tile
  static_assert(kShared >= kTile * kTile * int(sizeof(float)), "the tile of C takes the place of the stages");

  float sums[kFragments][4][4] = {};  // [16 rows][8 columns] of the fragment layout of mma.m16n8k16

  /// Add so many steps of K. `load(a, b)` starts the copies of the next step to its place in the stage; `prepare(a, b)`
  /// may then change what this thread itself has copied. The stages may be overwritten after a barrier.
  template <typename Load, typename Prepare>
  __device__ void add(T* stages, int steps, Load load, Prepare prepare) {
    const int from_a = TileA::template fragment<false>(first_row());
    const int from_b = TileB::template fragment<true>(first_column());
    const auto load_step = [&](int step) {
      T* const a = stages + step % kProductStages * 2 * kOperand;
      if (step < steps) load(a, a + kOperand);
      commit_copies();
    };
#pragma unroll
    for (int step = 0; step < kProductStages - 1; ++step) load_step(step);
    for (int step = 0; step < steps; ++step) {
      T* const a = stages + step % kProductStages * 2 * kOperand;
      wait_for_copies<kProductStages - 2>();
      prepare(a, a + kOperand);
      __syncthreads();  // this step's copies are all there, and the stage of the step before is free
      load_step(step + kProductStages - 1);
      multiply_step(a, a + kOperand, from_a, from_b);
    }
  }

  template <typename Load>
  __device__ void add(T* stages, int steps, Load load) {
    add(stages, steps, load, [](T*, T*) {});
  }

  /// Hand out the tile by vectors: `finish(row, x)`, with x from column_in_tile() on. Begins with a barrier.
  template <typename Finish>
  __device__ void finish(unsigned char* shared, Finish finish) {
    float* const tile = reinterpret_cast<float*>(shared);
    // Eight features change places from row to row, so that the eight rows of a fragment meet in no bank.
    const auto at = [](int row, int column) { return row * kTile + (column ^ (row & 3) * kVector); };
    __syncthreads();
    const int row = first_row() + lane() / 4, column = first_column() + lane() % 4 * 2;
#pragma unroll
    for (int m = 0; m < kFragments; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const pair = tile + at(row + 16 * m + 8 * half, column + 8 * n);
          *reinterpret_cast<Floats2*>(pair) = {sums[m][n][2 * half], sums[m][n][2 * half + 1]};
        }
    __syncthreads();
#pragma unroll 1
    for (int r = int(threadIdx.x) / kVectors; r < kTile; r += kThreads / kVectors) {
      float x[kVector];
      const Bytes16* const from = reinterpret_cast<const Bytes16*>(tile + at(r, column_in_tile()));
      const Bytes16 low = from[0], high = from[1];
      memcpy(x, low.words, 16);
      memcpy(x + 4, high.words, 16);
      finish(r, x);
    }
  }

  /// The first column of the vectors that `finish` hands to this thread, the same for all its rows.
  static __device__ int column_in_tile() { return int(threadIdx.x) % kVectors * kVector; }

 private:
  static __device__ int first_row() { return warp() % 2 * (kTile / 2); }
  static __device__ int first_column() { return warp() / 2 * 32; }

  __device__ void multiply_step(const T* a, const T* b, int from_a, int from_b) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t rows[kFragments][4], columns[2][4];
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        const T* const from = a + TileA::further(from_a, m, k);
        kAcrossA ? load_matrices_transposed(rows[m], from) : load_matrices(rows[m], from);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const T* const from = b + TileB::further(from_b, n, k);
        kAcrossB ? load_matrices_transposed(columns[n], from) : load_matrices(columns[n], from);
      }
#pragma unroll
      for (int m = 0; m < kFragments; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
          multiply<T>(sums[m][n], rows[m], columns[n / 2][n % 2 * 2], columns[n / 2][n % 2 * 2 + 1]);
    }
  }
};

/// Where a block's tile begins. Eight tiles of rows take turns over the columns, so that what they share is read from
/// the second cache.
template <int kTile>
struct TilePlace {
  int row, column;

  __device__ TilePlace(int rows, int columns) {
    constexpr int kGroup = 8;
    const int row_tiles = (rows + kTile - 1) / kTile, column_tiles = (columns + kTile - 1) / kTile;
    const int block = int(blockIdx.x), group = block / (kGroup * column_tiles),
              within = block % (kGroup * column_tiles);
    const int together = min(row_tiles - group * kGroup, kGroup);
    row = (group * kGroup + within % together) * kTile;
    column = within / together * kTile;
  }
};

template <int kTile>
Launch tiles_launch(const char* name, int rows, int columns, int shares, int shared_bytes, Stream stream) {
  const int64_t tiles = int64_t((rows + kTile - 1) / kTile) * ((columns + kTile - 1) / kTile);
  return {name, dim3(unsigned(tiles), unsigned(shares)), dim3(2 * kTile), shared_bytes, stream};
}

// --- several sources -------------------------------------------------------------------------------------------------

constexpr int kMostSources = 16;

struct Sources {
  const void* x[kMostSources];  // [rows, K_i]
  int64_t stride[kMostSources];
  int width[kMostSources];  // K_i
  int count, rows;
};

/// Which rows have which source; null: all have all.
struct Presence {
  const uint8_t* flags;
  int64_t row_stride, source_stride;

  __device__ bool operator()(int row, int source) const {
    return !flags || flags[row * row_stride + source * source_stride];
  }
};

/// A walk over the sources that are active, kDepth of one at a time.
struct SourceWalk {
  const Sources& sources;
  unsigned active;                               // a bit for each source that is not empty and that some row has
  int source = 0, width = 0, k = 0, column = 0;  // where it is; column is the source's first one in W

  __device__ SourceWalk(const Sources& sources, unsigned some_row_has) : sources(sources), active(0) {
    for (int i = 0; i < sources.count; ++i)
      if (sources.width[i] > 0) active |= some_row_has & 1u << i;
    find_active();
  }

  __device__ int steps() const {
    int steps = 0;
    for (int i = 0; i < sources.count; ++i)
      if (active >> i & 1) steps += (sources.width[i] + kDepth - 1) / kDepth;
    return steps;
  }

  /// Returns whether another source, or their end, has come.
  __device__ bool advance() {
    k += kDepth;
    if (k < width) return false;
    k = 0;
    column += width;
    ++source;
    find_active();
    return true;
  }

 private:
  __device__ void find_active() {
    for (; source < sources.count; ++source) {
      width = sources.width[source];
      if (active >> source & 1) return;
      column += width;
    }
  }
};

/// Of this thread's two rows of the tile at a place, which have which source: a bit for each.
template <int kTile>
__device__ __forceinline__ void find_present(const Sources& sources, const Presence& presence,
                                             const TilePlace<kTile>& place, unsigned (&present)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    present[half] = 0;
    const int row = place.row + OperandTile<kTile, false>::row(half);
    if (row < sources.rows)
      for (int i = 0; i < sources.count; ++i) present[half] |= unsigned(presence(row, i)) << i;
  }
}

/// The union over all threads of the block. `words`: a word of shared memory for each warp.
template <int kWarps>
__device__ __forceinline__ unsigned any_of_block(unsigned bits, unsigned* words) {
#pragma unroll
  for (int i = kWarp / 2; i > 0; i /= 2) bits |= shuffle_xor(bits, i);
  if (lane() == 0) words[warp()] = bits;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) bits |= words[w];
  __syncthreads();  // before their place is used otherwise
  return bits;
}

/// The copies of [x₁; …; x_M] and W, [features, ΣK_i], to the stages, step by step; both lie along K. What a row does
/// not have is zero and is not read.
template <typename T, int kTile>
struct SourceCopies {
  using Tile = OperandTile<kTile, false>;

  SourceWalk walk;
  const int first, to;  // this thread's first row of all, and its place in a stage
  const unsigned present[2];
  const bool inside[2];  // of its rows of W
  const int64_t weight_step;
  int64_t x_step = 0;  // from its first row to its second
  const T *x = nullptr, *weight;

  __device__ SourceCopies(const Sources& sources, unsigned some_row_has, const TilePlace<kTile>& place,
                          const unsigned (&present)[2], const void* weight, int64_t weight_stride, int features)
      : walk(sources, some_row_has),
        first(place.row + Tile::row(0)),
        to(Tile::place()),
        present{present[0], present[1]},
        inside{place.column + Tile::row(0) < features, place.column + Tile::row(1) < features},
        weight_step(Tile::kRowStep * weight_stride),
        weight(static_cast<const T*>(weight) + (place.column + Tile::row(0)) * weight_stride + walk.column +
               Tile::chunk() * kVector) {
    begin_source();
  }

  __device__ void begin_source() {
    if (walk.source >= walk.sources.count) return;
    const int64_t stride = walk.sources.stride[walk.source];
    x = static_cast<const T*>(walk.sources.x[walk.source]) + first * stride + Tile::chunk() * kVector;
    x_step = Tile::kRowStep * stride;
  }

  __device__ void load(T* a, T* b) {
    const bool there = walk.k + Tile::chunk() * kVector < walk.width;
    copy_async(a + to, x, there && present[0] >> walk.source & 1);
    copy_async(a + to + Tile::kHalf, x + x_step, there && present[1] >> walk.source & 1);
    copy_async(b + to, weight, there && inside[0]);
    copy_async(b + to + Tile::kHalf, weight + weight_step, there && inside[1]);
    const int before = walk.column + walk.k;
    if (walk.advance()) {
      weight += walk.column - before;
      begin_source();
    } else {
      weight += kDepth;
      x += kDepth;
    }
  }
};

}  // namespace mmk::cuda
