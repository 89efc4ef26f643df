// simd.h on AVX-512 (F, BW, CD, DQ, VL) and, where compiled with it, AVX-512 BF16.
#pragma once

#include <immintrin.h>

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int VW = 16;
constexpr int kRegisters = 32;
constexpr bool kFma = true;
#ifdef __AVX512BF16__
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
#endif

typedef __m512 vf;
typedef int32_t vi __attribute__((vector_size(64)));
typedef __m256i vh;

MMK_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
MMK_INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
MMK_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
MMK_INLINE vf load_partial(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
MMK_INLINE void store_partial(float* p, vf x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
MMK_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
MMK_INLINE vf zero() { return _mm512_setzero_ps(); }
MMK_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
MMK_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where either is NaN
MMK_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }  // the same
MMK_INLINE vf select(vi mask, vf a, vf b) { return _mm512_mask_mov_ps(b, _mm512_movepi32_mask((__m512i)mask), a); }
// a / b to about two roundings, b being a normal number: a third of the time of the exact one.
MMK_INLINE vf divide_fast(vf a, vf b) {
  const vf r = _mm512_rcp14_ps(b);
  return a * fma(r, _mm512_fnmadd_ps(b, r, set1(1.f)), r);
}
MMK_INLINE vf sqrt(vf x) { return _mm512_sqrt_ps(x); }
MMK_INLINE vf round_down(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

// x - floor(x), anything for an infinite x: one instruction, whose rate is Intel's.
MMK_INLINE vf fraction(vf x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

// p · 2^floor(x); 0 at floor(x) = -127, as on the other sets, where p < 2.
MMK_INLINE vf scale_by_power_of_two(vf p, vf x) {
  const __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(kept, p, x);
}

MMK_INLINE float sum(vf x) { return _mm512_reduce_add_ps(x); }
MMK_INLINE float max_lane(vf x) { return _mm512_reduce_max_ps(x); }

MMK_INLINE vf shuffle_pairs(vf a, vf b, bool high) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
}

MMK_INLINE void transpose(vf (&r)[VW]) {
  vf t[VW], u[VW];
  MMK_UNROLL for (int i = 0; i < VW; i += 4) {  // 4×4 blocks within each 128-bit lane
    const vf a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    const vf c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = shuffle_pairs(a, c, false);
    t[i + 1] = shuffle_pairs(a, c, true);
    t[i + 2] = shuffle_pairs(b, d, false);
    t[i + 3] = shuffle_pairs(b, d, true);
  }
  MMK_UNROLL for (int i = 0; i < 4; ++i) {  // then the 4×4 arrangement of 128-bit lanes
    u[i] = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
    u[i + 4] = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    u[i + 8] = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
    u[i + 12] = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
  }
  MMK_UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(u[i], u[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(u[i], u[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(u[i + 4], u[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(u[i + 4], u[i + 12], 0xdd);
  }
}

// r[i] = column i of a VW×VW tile. 128-bit loads put the rows into place, which halves the shuffles.
MMK_INLINE void load_transposed(const void* from, int64_t stride_bytes, vf (&r)[VW]) {
  const auto quad = [&](int row, int column) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(static_cast<const char*>(from) + row * stride_bytes) + column);
  };
  MMK_UNROLL for (int c = 0; c < VW; c += 4) {
    vf q[4];  // q[i]: in 128-bit lane k, columns c … c+3 of row 4k+i
    MMK_UNROLL for (int i = 0; i < 4; ++i) {
      q[i] = _mm512_castps128_ps512(quad(i, c));
      q[i] = _mm512_mask_broadcast_f32x4(q[i], 0x00f0, quad(4 + i, c));
      q[i] = _mm512_mask_broadcast_f32x4(q[i], 0x0f00, quad(8 + i, c));
      q[i] = _mm512_mask_broadcast_f32x4(q[i], 0xf000, quad(12 + i, c));
    }
    const vf a = _mm512_unpacklo_ps(q[0], q[1]), b = _mm512_unpackhi_ps(q[0], q[1]);
    const vf x = _mm512_unpacklo_ps(q[2], q[3]), y = _mm512_unpackhi_ps(q[2], q[3]);
    r[c] = shuffle_pairs(a, x, false);
    r[c + 1] = shuffle_pairs(a, x, true);
    r[c + 2] = shuffle_pairs(b, y, false);
    r[c + 3] = shuffle_pairs(b, y, true);
  }
}

// Lane i of the result is the sum of the lanes of r[i].
MMK_INLINE vf sum_rows(vf (&r)[VW]) {
  vf quad[4];  // quad[k]: in each 128-bit lane, the partial sums of rows 4k … 4k+3
  MMK_UNROLL for (int k = 0; k < 4; ++k) {
    const vf a = _mm512_unpacklo_ps(r[4 * k], r[4 * k + 1]) + _mm512_unpackhi_ps(r[4 * k], r[4 * k + 1]);
    const vf b = _mm512_unpacklo_ps(r[4 * k + 2], r[4 * k + 3]) + _mm512_unpackhi_ps(r[4 * k + 2], r[4 * k + 3]);
    quad[k] = shuffle_pairs(a, b, false) + shuffle_pairs(a, b, true);
  }
  const vf low = _mm512_shuffle_f32x4(quad[0], quad[1], 0x88) + _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd);
  const vf high = _mm512_shuffle_f32x4(quad[2], quad[3], 0x88) + _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
}

MMK_INLINE __m256i load_halves(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

MMK_INLINE vf load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(p)), 16));
}
MMK_INLINE vh to_bf16(vf x) {  // round to nearest even; a NaN stays a quiet NaN
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(rounded);
#endif
}
// a's halves, then b's, as the bits of one vector.
MMK_INLINE vf join_halves(vh a, vh b) {
  return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}
MMK_INLINE vf to_bf16(vf a, vf b) {
#ifdef __AVX512BF16__
  return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(b, a));
#else
  return join_halves(to_bf16(a), to_bf16(b));
#endif
}
MMK_INLINE vf load_f16(const uint16_t* p) { return _mm512_cvtph_ps(load_halves(p)); }
MMK_INLINE vh to_f16(vf x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
MMK_INLINE vf to_f16(vf a, vf b) { return join_halves(to_f16(a), to_f16(b)); }
MMK_INLINE void store(uint16_t* p, vh x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

// ---- stores past the caches: p is aligned to what is stored; a fence orders them before what other threads read ----
constexpr bool kStreams = true;
MMK_INLINE void stream(float* p, vf x) { _mm512_stream_ps(p, x); }
MMK_INLINE void stream_fence() { _mm_sfence(); }

MMK_INLINE vi load_bool(const uint8_t* p) {
  const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (vi)x != 0;
}

#ifdef __AVX512BF16__
// ---- bfloat16 pairs: a 32-bit lane holds two bfloat16, the even one in the low half ----

// acc + a.low · b.low + a.high · b.high
MMK_INLINE vf pair_dot(vf acc, vf a, vf b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

MMK_INLINE vf pair(vf low, vf high) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // low in the first 16 halves
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both));
}

// Interleaves two rows of 2·VW bfloat16 into 2·VW pairs: of columns 0 … VW-1, and of the others.
MMK_INLINE void pair_rows(vf even, vf odd, vf& first, vf& second) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  alignas(64) static constexpr uint16_t kSecond[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i x = _mm512_castps_si512(even), y = _mm512_castps_si512(odd);
  first = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, _mm512_load_si512(kFirst), y));
  second = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, _mm512_load_si512(kSecond), y));
}
#endif

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
