// merge_embeddings for CUDA.
//
//     out[b, l] = modal[t] where mask[b, l] is the t-th True in row-major order, else text[b, l]
//
// Tiling     a block owns a tile of tokens. It counts the Trues before them, one byte of the mask at a time where there
//            are few tokens, else from what a launch before has counted in every chunk of 1024 tokens; votes number
//            those inside, and shared memory holds for every token where its row is. Then it copies the tile as one run
//            of 16-byte vectors. The backward copies the same way back, so that nothing is added, and some more blocks
//            write zeros to rows that no token took.
// Precision  a copy, bit for bit.
// Limits     16-bit dtypes; C a multiple of 8; everything begins at a multiple of 16 bytes; 64 modals; 2^24 tokens and
//            rows, since every block reads the counts before it. The host waits for nothing; a token for which there is
//            no row keeps its text.
#pragma once

#include "csrc/cuda/launch.h"
#include "csrc/cuda/rows.cuh"

namespace mmk::cuda {

constexpr int kMergeModals = 64;
constexpr int kMergeThreads = 256;
constexpr int kMergeChunk = 1024;        // tokens of a count, a multiple of every tile
constexpr int kMergeAtOnce = 4;          // vectors that a thread has under way
constexpr int kMergeUnusedBlocks = 128;  // for rows that no token took

/// The rows of a modal, or where their gradients go; null if these are not wanted.
struct MergeModal {
  uint16_t* rows;  // [T, C]
  int64_t stride;
  int end;  // rows of this modal and those before it
};

struct MergeEmbeddings {
  MergeModal modals[kMergeModals];
  const uint8_t* mask;                 // [B·L]
  int* counts;                         // Trues of each chunk, or null where blocks count the mask itself
  const uint16_t* in;                  // [B, L, C]: text, or the gradient of out
  int64_t in_batch, in_token;          // strides
  uint16_t* out;                       // [B, L, C], contiguous: out, or the gradient of text or null
  int count, tokens, length, vectors;  // modals, B·L, L, C / 8
  int tile;                            // tokens of a block
  bool even;                           // whether all tokens of `in` are in_token apart
};

/// What a block has in shared memory, in this order.
struct MergeShared {
  int* partial;     // a sum of each warp
  uint32_t* votes;  // the mask of the tile, one bit a token
  uint16_t** rows;  // of every token: where it is copied from, or its gradient to

  static constexpr int kPartialBytes = kMergeThreads / kWarp * int(sizeof(int));
  static constexpr int kVoteBytes = kMergeChunk / kWarp * int(sizeof(uint32_t));

  __device__ explicit MergeShared(unsigned char* shared)
      : partial(reinterpret_cast<int*>(shared)),
        votes(reinterpret_cast<uint32_t*>(shared + kPartialBytes)),
        rows(reinterpret_cast<uint16_t**>(shared + kPartialBytes + kVoteBytes)) {}

  static int bytes(int tile) { return kPartialBytes + kVoteBytes + tile * int(sizeof(uint16_t*)); }

  /// The sum over the block. What was written to shared memory before is there after it.
  __device__ int sum(int x) const {
    x = sum_lanes(x);
    if (lane() == 0) partial[warp()] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < kMergeThreads / kWarp; ++w) x += partial[w];
    return x;
  }

  __device__ bool replaced(int token) const { return votes[token / kWarp] >> (token % kWarp) & 1; }

  /// How many Trues the tile has before a token.
  __device__ int before(int token) const {
    int count = count_bits(votes[token / kWarp] & ((1u << (token % kWarp)) - 1));
    for (int w = 0; w < token / kWarp; ++w) count += count_bits(votes[w]);
    return count;
  }
};

/// This thread's part of the Trues before a token of the mask.
__device__ __forceinline__ int merge_count_part(const MergeEmbeddings& p, int token) {
  const int chunks = p.counts ? token / kMergeChunk : 0;
  int count = 0;
  for (int i = int(threadIdx.x); i < chunks; i += kMergeThreads) count += p.counts[i];
  for (int i = chunks * kMergeChunk + int(threadIdx.x); i < token; i += kMergeThreads) count += p.mask[i] != 0;
  return count;
}

/// Row t of all modals, or null where there is none.
__device__ __forceinline__ uint16_t* merge_modal_row(const MergeEmbeddings& p, int t) {
  int first = 0;
  for (int i = 0; i < p.count; ++i) {
    const int end = p.modals[i].end;
    if (t < end) {
      uint16_t* const rows = p.modals[i].rows;
      return rows ? rows + (t - first) * p.modals[i].stride : nullptr;
    }
    first = end;
  }
  return nullptr;
}

__device__ __forceinline__ const uint16_t* merge_in_row(const MergeEmbeddings& p, int token) {
  if (p.even) return p.in + token * p.in_token;  // without a division
  return p.in + token / p.length * p.in_batch + token % p.length * p.in_token;
}

/// The mask of the tile as votes; returns how many Trues come before the tile.
__device__ __forceinline__ int merge_vote(const MergeEmbeddings& p, const MergeShared& s, int begin, int size) {
  for (int group = warp(); group * kWarp < size; group += kMergeThreads / kWarp) {
    const int token = group * kWarp + lane();
    const unsigned votes = ballot(token < size && p.mask[begin + token] != 0);
    if (lane() == 0) s.votes[group] = votes;
  }
  return s.sum(merge_count_part(p, begin));
}

/// Where a thread is among the vectors of a tile: it goes kMergeThreads further at each step.
struct MergeCursor {
  int token, vector, tokens, vectors, in_row;

  __device__ explicit MergeCursor(int row)
      : token(int(threadIdx.x) / row),
        vector(int(threadIdx.x) % row),
        tokens(kMergeThreads / row),
        vectors(kMergeThreads % row),
        in_row(row) {}

  __device__ void step() {
    token += tokens;
    vector += vectors;
    if (vector >= in_row) {
      vector -= in_row;
      ++token;
    }
  }
};

/// The Trues of each chunk of tokens.
static __global__ void __launch_bounds__(kMergeThreads) merge_embeddings_count(MergeEmbeddings p) {
  MMK_SHARED_MEMORY(shared);
  const MergeShared s(shared);
  const int begin = int(blockIdx.x) * kMergeChunk, end = min(begin + kMergeChunk, p.tokens);
  int count = 0;
  for (int i = begin + int(threadIdx.x); i < end; i += kMergeThreads) count += p.mask[i] != 0;
  count = s.sum(count);
  if (threadIdx.x == 0) p.counts[blockIdx.x] = count;
}

static __global__ void __launch_bounds__(kMergeThreads) merge_embeddings_forward(MergeEmbeddings p) {
  MMK_SHARED_MEMORY(shared);
  const MergeShared s(shared);
  const int begin = int(blockIdx.x) * p.tile, size = min(p.tile, p.tokens - begin);
  const int before = merge_vote(p, s, begin, size);
  for (int token = int(threadIdx.x); token < size; token += kMergeThreads) {
    const uint16_t* row = s.replaced(token) ? merge_modal_row(p, before + s.before(token)) : nullptr;
    if (!row) row = merge_in_row(p, begin + token);
    s.rows[token] = const_cast<uint16_t*>(row);
  }
  __syncthreads();
  Bytes16* const out = reinterpret_cast<Bytes16*>(p.out) + int64_t(begin) * p.vectors;
  MergeCursor cursor(p.vectors);
  for (int i = int(threadIdx.x); i < size * p.vectors; i += kMergeThreads * kMergeAtOnce) {
    Bytes16 bytes[kMergeAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kMergeAtOnce; ++j) {
      if (cursor.token < size) bytes[j] = reinterpret_cast<const Bytes16*>(s.rows[cursor.token])[cursor.vector];
      cursor.step();
    }
#pragma unroll
    for (int j = 0; j < kMergeAtOnce; ++j)
      if (i + j * kMergeThreads < size * p.vectors) out[i + j * kMergeThreads] = bytes[j];
  }
}

/// Zeros for the rows of all modals that no token took; of one of `blocks` blocks.
__device__ __forceinline__ void merge_clear_unused(const MergeEmbeddings& p, const MergeShared& s, int block,
                                                   int blocks) {
  const int used = s.sum(merge_count_part(p, p.tokens)), rows = p.modals[p.count - 1].end;
  for (int row = used + block; row < rows; row += blocks) {
    Bytes16* const to = reinterpret_cast<Bytes16*>(merge_modal_row(p, row));
    if (!to) continue;
    for (int i = int(threadIdx.x); i < p.vectors; i += kMergeThreads) to[i] = Bytes16{};
  }
}

static __global__ void __launch_bounds__(kMergeThreads) merge_embeddings_backward(MergeEmbeddings p) {
  MMK_SHARED_MEMORY(shared);
  const MergeShared s(shared);
  const int tiles = (p.tokens + p.tile - 1) / p.tile, block = int(blockIdx.x);
  if (block >= tiles) return merge_clear_unused(p, s, block - tiles, int(gridDim.x) - tiles);
  const int begin = block * p.tile, size = min(p.tile, p.tokens - begin);
  const int before = merge_vote(p, s, begin, size);
  for (int token = int(threadIdx.x); token < size; token += kMergeThreads)
    s.rows[token] = s.replaced(token) ? merge_modal_row(p, before + s.before(token)) : nullptr;
  __syncthreads();
  Bytes16* const of_text = p.out ? reinterpret_cast<Bytes16*>(p.out) + int64_t(begin) * p.vectors : nullptr;
  MergeCursor cursor(p.vectors);
  for (int i = int(threadIdx.x); i < size * p.vectors; i += kMergeThreads * kMergeAtOnce) {
    Bytes16 bytes[kMergeAtOnce] = {};
    Bytes16* to[kMergeAtOnce] = {};  // where the gradient goes
#pragma unroll
    for (int j = 0; j < kMergeAtOnce; ++j) {
      if (cursor.token < size) {
        const bool replaced = s.replaced(cursor.token);
        Bytes16* const row = reinterpret_cast<Bytes16*>(s.rows[cursor.token]);
        if (replaced && row) to[j] = row + cursor.vector;
        if (!replaced && of_text) to[j] = of_text + i + j * kMergeThreads;
        if (to[j]) bytes[j] = reinterpret_cast<const Bytes16*>(merge_in_row(p, begin + cursor.token))[cursor.vector];
        if (replaced && of_text) of_text[i + j * kMergeThreads] = Bytes16{};
      }
      cursor.step();
    }
#pragma unroll
    for (int j = 0; j < kMergeAtOnce; ++j)
      if (to[j]) *to[j] = bytes[j];
  }
}

/// Tokens of a block: up to 64 KB to copy, and blocks for every multiprocessor of a large GPU where there are enough.
inline int merge_tile(int tokens, int vectors) {
  constexpr int kMostVectors = 4096, kLeastVectors = 2 * kMergeThreads, kBlocks = 1024;
  int tile = kMergeChunk;
  const auto too_few_blocks = [&] { return tokens / tile < kBlocks && tile / 2 * int64_t(vectors) >= kLeastVectors; };
  while (tile > 1 && (tile * int64_t(vectors) > kMostVectors || too_few_blocks())) tile /= 2;
  return tile;
}

inline void launch_merge_embeddings_count(const MergeEmbeddings& p, Stream stream) {
  if (!p.counts) return;
  const int chunks = (p.tokens + kMergeChunk - 1) / kMergeChunk;
  launch({"merge_embeddings count", dim3(chunks), dim3(kMergeThreads), MergeShared::bytes(0), stream},
         merge_embeddings_count, p);
}

inline void launch_merge_embeddings_forward(MergeEmbeddings p, Stream stream) {
  launch_merge_embeddings_count(p, stream);
  p.tile = merge_tile(p.tokens, p.vectors);
  const int tiles = (p.tokens + p.tile - 1) / p.tile;
  launch({"merge_embeddings forward", dim3(tiles), dim3(kMergeThreads), MergeShared::bytes(p.tile), stream},
         merge_embeddings_forward, p);
}

inline void launch_merge_embeddings_backward(MergeEmbeddings p, Stream stream) {
  launch_merge_embeddings_count(p, stream);
  p.tile = merge_tile(p.tokens, p.vectors);
  const int tiles = (p.tokens + p.tile - 1) / p.tile;
  int unused = 0;
  for (int i = 0; i < p.count; ++i)
    if (p.modals[i].rows) unused = min(p.modals[p.count - 1].end, kMergeUnusedBlocks);
  launch({"merge_embeddings backward", dim3(tiles + unused), dim3(kMergeThreads), MergeShared::bytes(p.tile), stream},
         merge_embeddings_backward, p);
}

}  // namespace mmk::cuda
