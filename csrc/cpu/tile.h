// The register tile of every matrix product on the CPU:  C[MR][NR·VW] = Σ_k A[i, k] · B[k, :]
//
// A is the broadcast operand, read one element per (row, k) in whatever layout it has; B is read in vectors, unit
// stride. MR·NR accumulators plus NR vectors of B and one broadcast fill the register file. Accumulation is in float32,
// strictly in the order of k for every tile shape, so that a product does not depend on how it was cut into tiles.
//
// Operands are counted in units of 32 bits: a float, or a pair of bfloat16 along k (kPairs, where kBf16Dot).
#pragma once

#include "csrc/cpu/simd.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <int64_t kValue>
using Constant = std::integral_constant<int64_t, kValue>;

// Rows of a tile of queries that is NR vectors wide, and of a tile of features: what the registers hold beside NR
// vectors of B and one broadcast (and, without an fma instruction, one product).
constexpr int kScoreVectors = kFma ? 3 : 2;
constexpr int score_rows(int vectors) {
  if (kRegisters == 32) return 8;
  return vectors == 3 ? 4 : vectors == 2 ? (kFma ? 6 : 4) : 8;
}
constexpr int kFeatureVectors = kRegisters == 32 ? 4 : 2;
constexpr int kFeatureRows = kFma ? 6 : 4;

template <bool kPairs>
MMK_INLINE vf multiply_add(vf acc, vf a, vf b) {
  if constexpr (kPairs) {
    return pair_dot(acc, a, b);
  } else {
    return fma(a, b, acc);
  }
}

// acc[i][j] += Σ_k a[i·row_stride + k·k_stride] · b[k·ldb + j·VW …]
template <bool kPairs, int MR, int NR, class RowStride, class KStride, class Ldb>
MMK_INLINE void accumulate(vf (&acc)[MR][NR], const float* a, RowStride row_stride, KStride k_stride, const float* b,
                           Ldb ldb, int64_t k_count) {
  // Four steps a turn: the loop's exit is then predicted, worth a fifth of the time at a depth of 64.
  _Pragma("GCC unroll 4") for (int64_t k = 0; k < k_count; ++k) {
    vf bk[NR];
    MMK_UNROLL for (int j = 0; j < NR; ++j) bk[j] = load(b + j * VW);
    MMK_UNROLL for (int i = 0; i < MR; ++i) {
      const vf aik = set1(a[i * row_stride + k * k_stride]);
      MMK_UNROLL for (int j = 0; j < NR; ++j) acc[i][j] = multiply_add<kPairs>(acc[i][j], aik, bk[j]);
    }
    b += ldb;
  }
}

template <int MR, int NR>
MMK_INLINE void clear(vf (&acc)[MR][NR]) {
  MMK_UNROLL for (int i = 0; i < MR; ++i) { MMK_UNROLL for (int j = 0; j < NR; ++j) acc[i][j] = zero(); }
}

// Calls f(Constant<n>) for the run-time n in 1 … kMax.
template <int kMax, class Function>
MMK_INLINE void with_constant(int64_t n, Function f) {
  if constexpr (kMax == 1) {
    f(Constant<1>{});
  } else {
    if (n >= kMax) return f(Constant<kMax>{});
    with_constant<kMax - 1>(n, f);
  }
}

// Calls f(std::true_type) or f(std::false_type).
template <class Function>
MMK_INLINE void with_bool(bool b, Function f) {
  b ? f(std::true_type{}) : f(std::false_type{});
}

// Cuts 0 … n into runs of kStep and a shorter last one: f(Constant<length>, start).
template <int kStep, class Function>
MMK_INLINE void for_runs(int64_t n, Function f) {
  int64_t start = 0;
  for (; start + kStep <= n; start += kStep) f(Constant<kStep>{}, start);
  if constexpr (kStep > 1) {
    if (start < n) with_constant<kStep - 1>(n - start, [&](auto length) { f(length, start); });
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
