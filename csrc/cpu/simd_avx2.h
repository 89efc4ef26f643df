// simd.h on AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int VW = 8;
constexpr int kRegisters = 16;
constexpr bool kFma = true;
constexpr bool kBf16Dot = false;

typedef __m256 vf;
typedef int32_t vi __attribute__((vector_size(32)));
typedef __m128i vh;

MMK_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
MMK_INLINE void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
MMK_INLINE __m256i first_lanes(int64_t n) {
  static constexpr int32_t kMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMasks + 8 - n));
}
MMK_INLINE vf load_partial(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
MMK_INLINE void store_partial(float* p, vf x, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
MMK_INLINE vf set1(float x) { return _mm256_set1_ps(x); }
MMK_INLINE vf zero() { return _mm256_setzero_ps(); }
MMK_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
MMK_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }  // b where either is NaN
MMK_INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }  // the same
MMK_INLINE vf select(vi mask, vf a, vf b) { return _mm256_blendv_ps(b, a, (vf)mask); }
MMK_INLINE vf divide_fast(vf a, vf b) { return a / b; }  // to about two roundings where that is faster
MMK_INLINE vf sqrt(vf x) { return _mm256_sqrt_ps(x); }
MMK_INLINE vf round_down(vf x) { return _mm256_floor_ps(x); }

// p · 2^floor(x) for x >= -127; 0 at floor(x) = -127.
MMK_INLINE vf scale_by_power_of_two(vf p, vf x) {
  const __m256i exponent = _mm256_cvtps_epi32(_mm256_floor_ps(x));
  return p * (vf)_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23);
}

MMK_INLINE float sum(vf x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
MMK_INLINE float max_lane(vf x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// r from t, whose 128-bit halves are in place: t[i] has columns 0 … 3 of rows i and i+4, t[i+4] their columns 4 … 7.
MMK_INLINE void transpose_halves(const vf (&t)[VW], vf (&r)[VW]) {
  MMK_UNROLL for (int h = 0; h < 8; h += 4) {
    const vf a = _mm256_unpacklo_ps(t[h], t[h + 1]), b = _mm256_unpackhi_ps(t[h], t[h + 1]);
    const vf c = _mm256_unpacklo_ps(t[h + 2], t[h + 3]), d = _mm256_unpackhi_ps(t[h + 2], t[h + 3]);
    r[h] = _mm256_shuffle_ps(a, c, 0x44);
    r[h + 1] = _mm256_shuffle_ps(a, c, 0xee);
    r[h + 2] = _mm256_shuffle_ps(b, d, 0x44);
    r[h + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
}

MMK_INLINE void transpose(vf (&r)[VW]) {
  vf t[VW];
  MMK_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  transpose_halves(t, r);
}

// r[i] = column i of a VW×VW tile.
MMK_INLINE void load_transposed(const void* from, int64_t stride_bytes, vf (&r)[VW]) {
  const auto quad = [&](int row, int column) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(static_cast<const char*>(from) + row * stride_bytes) + column);
  };
  vf t[VW];
  MMK_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(quad(i, 0)), quad(i + 4, 0), 1);
    t[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(quad(i, 4)), quad(i + 4, 4), 1);
  }
  transpose_halves(t, r);
}

// Lane i of the result is the sum of the lanes of r[i].
MMK_INLINE vf sum_rows(vf (&r)[VW]) {
  const vf low = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  const vf high = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
  return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
}

MMK_INLINE vf load_bf16(const uint16_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16);
}
// The bfloat16 in the low halves of lanes: round to nearest even; a NaN stays a quiet NaN.
MMK_INLINE __m256i rounded_to_bf16(vf x) {
  const __m256i bits = (__m256i)x;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = (__m256i)_mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
MMK_INLINE vh to_bf16(vf x) {
  const __m256i lanes = rounded_to_bf16(x);
  return _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
}
// a's halves, then b's, as the bits of one vector.
MMK_INLINE vf to_bf16(vf a, vf b) {
  const __m256i quads = _mm256_packus_epi32(rounded_to_bf16(a), rounded_to_bf16(b));  // a0 b0 a1 b1, of 4 halves each
  return (vf)_mm256_permute4x64_epi64(quads, 0xd8);
}
MMK_INLINE vf load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MMK_INLINE vh to_f16(vf x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
MMK_INLINE vf to_f16(vf a, vf b) { return (vf)_mm256_set_m128i(to_f16(b), to_f16(a)); }
MMK_INLINE void store(uint16_t* p, vh x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x); }

// ---- stores past the caches: p is aligned to what is stored; a fence orders them before what other threads read ----
constexpr bool kStreams = true;
MMK_INLINE void stream(float* p, vf x) { _mm256_stream_ps(p, x); }
MMK_INLINE void stream_fence() { _mm_sfence(); }

MMK_INLINE vi load_bool(const uint8_t* p) {
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return (vi)x != 0;
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
