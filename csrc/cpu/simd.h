// The vector type of one instruction set and everything done with it. The only files with intrinsics are the four
// below; a kernel is written once against these names and compiled once per instruction set (MMK_ISA).
//
//   vf                         VW floats in one register; +, -, *, comparison and ?: work as for floats
//   kRegisters, kFma, kBf16Dot how many registers there are, and whether fma and the bf16 pair product are instructions
//   vh                         as many bfloat16 or float16, as bits
//   load_partial, store_partial  the first n <= VW floats, zero behind them; nothing beyond is read or written
//   load, store, stream, set1, fma, max, min, divide_fast, sqrt, round_down, scale_by_power_of_two, sum, transpose,
//   load_transposed, sum_rows, pair operations
//
// Everything is in an anonymous namespace inside mmk::<isa>, so that the linker cannot merge two instruction sets.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define MMK_ISA_ID_emulated 1
#define MMK_ISA_ID_neon 2
#define MMK_ISA_ID_neon_bf16 2
#define MMK_CONCAT_(a, b) a##b
#define MMK_CONCAT(a, b) MMK_CONCAT_(a, b)
#if MMK_CONCAT(MMK_ISA_ID_, MMK_ISA) == 1
#define MMK_EMULATED 1
#elif MMK_CONCAT(MMK_ISA_ID_, MMK_ISA) == 2
#define MMK_NEON 1
#endif

#ifdef MMK_EMULATED  // wide vectors without registers for them: loops keep the compile time sane
#define MMK_INLINE inline
#define MMK_UNROLL
#else
#define MMK_INLINE inline __attribute__((always_inline))
#define MMK_UNROLL _Pragma("GCC unroll 32")
#endif
#define MMK_NOINLINE __attribute__((noinline))

#if defined(__AVX512F__) && !defined(MMK_EMULATED)
#include "csrc/cpu/simd_avx512.h"
#elif defined(__AVX2__) && !defined(MMK_EMULATED)
#include "csrc/cpu/simd_avx2.h"
#elif defined(MMK_NEON)
#include "csrc/cpu/simd_neon.h"
#else
#include "csrc/cpu/simd_portable.h"
#endif

namespace mmk {
namespace MMK_ISA {
namespace {

MMK_INLINE void store_bf16(uint16_t* p, vf x) { store(p, to_bf16(x)); }
MMK_INLINE void store_f16(uint16_t* p, vf x) { store(p, to_f16(x)); }

#if !defined(__AVX512BF16__) && !defined(MMK_EMULATED) && \
    !(defined(MMK_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))  // named, never called: kBf16Dot is false
template <class V>
V pair_dot(V acc, V a, V b);
template <class V>
V pair(V low, V high);
template <class V>
void pair_rows(V even, V odd, V& first, V& second);
#endif

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

MMK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
MMK_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
MMK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MMK_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Lane i of the result is the maximum of the lanes of r[i].
MMK_INLINE vf max_rows(vf (&r)[VW]) {
  transpose(r);
  MMK_UNROLL for (int n = VW / 2; n > 0; n /= 2) { MMK_UNROLL for (int i = 0; i < n; ++i) r[i] = max(r[i], r[i + n]); }
  return r[0];
}

// 2^t for t in [0, 1): a polynomial, minimax in the relative error under p(0) = 1. Its degree sets that error: 5 for
// float32 (8e-8), 3 where the result is rounded to bfloat16 (8.6e-5).
template <int kDegree>
MMK_INLINE vf exp2_of_fraction(vf t) {
  vf p;
  if constexpr (kDegree == 3) {
    p = fma(t, set1(7.706704207e-02f), set1(2.276449911e-01f));
    p = fma(p, t, set1(6.951167864e-01f));
    p = fma(p, t, set1(1.f));
  } else {
    static_assert(kDegree == 5);
    p = fma(t, set1(1.867140335e-03f), set1(9.017007156e-03f));
    p = fma(p, t, set1(5.579992974e-02f));
    p = fma(p, t, set1(2.401644466e-01f));
    p = fma(p, t, set1(6.931513117e-01f));
    p = fma(p, t, set1(1.f));
  }
  return p;
}
// 2^x, exactly 1 for 0, exactly 0 below 2^-126, NaN for NaN.
template <int kDegree>
MMK_INLINE vf exp2(vf x) {
  x = max(set1(-127.f), x);  // the order of the arguments keeps a NaN in x
  return scale_by_power_of_two(exp2_of_fraction<kDegree>(x - round_down(x)), x);
}
// The same of degree 3, in the instructions that suit cores with tiles.
MMK_INLINE vf exp2_beside_tiles(vf x) {
#if defined(__AVX512F__) && !defined(MMK_EMULATED)
  return scale_by_power_of_two(exp2_of_fraction<3>(fraction(x)), x);
#else
  return exp2<3>(x);
#endif
}

// tanh x to a few roundings: a polynomial near 0 (that of Cephes' tanhf), else 1 - 2 / (exp 2|x| + 1) with x's sign.
MMK_INLINE vf tanh(vf x) {
  const vf z = x * x;
  vf near = fma(z, set1(-5.70498872745e-3f), set1(2.06390887954e-2f));
  near = fma(near, z, set1(-5.37397155531e-2f));
  near = fma(near, z, set1(1.33314422036e-1f));
  near = fma(near, z, set1(-3.33332819422e-1f));
  near = fma(near * z, x, x);
  const vf size = max(-x, x), bounded = select(size > set1(10.f), set1(10.f), size);  // tanh 10 rounds to 1; NaN stays
  const vf far = set1(1.f) - set1(2.f) / (exp2<5>(bounded * set1(2.f * kLog2e)) + set1(1.f));
  return select(size < set1(0.625f), near, select(x < zero(), -far, far));
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
