// simd.h on NEON; with FEAT_BF16 also the bfloat16 pair product.
#pragma once

#include <arm_neon.h>

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int VW = 4;
constexpr int kRegisters = 32;
constexpr bool kFma = true;
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
#endif

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint16_t vh __attribute__((vector_size(8)));

MMK_INLINE vf load(const float* p) { return (vf)vld1q_f32(p); }
MMK_INLINE void store(float* p, vf x) { vst1q_f32(p, (float32x4_t)x); }
MMK_INLINE vf load_partial(const float* p, int64_t n) {
  vf x{};
  std::memcpy(&x, p, static_cast<size_t>(n) * sizeof(float));
  return x;
}
MMK_INLINE void store_partial(float* p, vf x, int64_t n) { std::memcpy(p, &x, static_cast<size_t>(n) * sizeof(float)); }
MMK_INLINE vf set1(float x) { return (vf)vdupq_n_f32(x); }
MMK_INLINE vf zero() { return vf{}; }
MMK_INLINE vf fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
MMK_INLINE vf select(vi mask, vf a, vf b) { return (vf)vbslq_f32((uint32x4_t)mask, (float32x4_t)a, (float32x4_t)b); }
MMK_INLINE vf max(vf a, vf b) { return select(a > b, a, b); }  // b where either is NaN
MMK_INLINE vf min(vf a, vf b) { return select(a < b, a, b); }  // the same
MMK_INLINE vf divide_fast(vf a, vf b) { return a / b; }        // to about two roundings where that is faster
MMK_INLINE vf sqrt(vf x) { return (vf)vsqrtq_f32((float32x4_t)x); }
MMK_INLINE vf round_down(vf x) { return (vf)vrndmq_f32((float32x4_t)x); }

// p · 2^floor(x) for x >= -127; 0 at floor(x) = -127.
MMK_INLINE vf scale_by_power_of_two(vf p, vf x) {
  const vi exponent = (vi)vcvtmq_s32_f32((float32x4_t)x);
  return p * (vf)((exponent + 127) << 23);
}

MMK_INLINE float sum(vf x) { return vaddvq_f32((float32x4_t)x); }
MMK_INLINE float max_lane(vf x) { return vmaxvq_f32((float32x4_t)x); }

MMK_INLINE void transpose(vf (&r)[VW]) {
  const float32x4x2_t a = vtrnq_f32((float32x4_t)r[0], (float32x4_t)r[1]);
  const float32x4x2_t b = vtrnq_f32((float32x4_t)r[2], (float32x4_t)r[3]);
  const auto low = [](float32x4_t x, float32x4_t y) {
    return (vf)vtrn1q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y));
  };
  const auto high = [](float32x4_t x, float32x4_t y) {
    return (vf)vtrn2q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y));
  };
  r[0] = low(a.val[0], b.val[0]);
  r[1] = low(a.val[1], b.val[1]);
  r[2] = high(a.val[0], b.val[0]);
  r[3] = high(a.val[1], b.val[1]);
}

// r[i] = column i of a VW×VW tile.
MMK_INLINE void load_transposed(const void* from, int64_t stride_bytes, vf (&r)[VW]) {
  for (int i = 0; i < VW; ++i) {
    r[i] = load(reinterpret_cast<const float*>(static_cast<const char*>(from) + i * stride_bytes));
  }
  transpose(r);
}

// Lane i of the result is the sum of the lanes of r[i].
MMK_INLINE vf sum_rows(vf (&r)[VW]) {
  const float32x4_t a = vpaddq_f32((float32x4_t)r[0], (float32x4_t)r[1]);
  const float32x4_t b = vpaddq_f32((float32x4_t)r[2], (float32x4_t)r[3]);
  return (vf)vpaddq_f32(a, b);
}

MMK_INLINE vf load_bf16(const uint16_t* p) { return (vf)vshll_n_u16(vld1_u16(p), 16); }
// Round to nearest even; a NaN stays a quiet NaN.
MMK_INLINE vh to_bf16(vf x) {
  const uint32x4_t bits = (uint32x4_t)x;
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t number = vceqq_f32((float32x4_t)x, (float32x4_t)x);
  return (vh)vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7fc00000)), 16);
}
MMK_INLINE vf load_f16(const uint16_t* p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
MMK_INLINE vh to_f16(vf x) { return (vh)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)); }
// a's halves, then b's, as the bits of one vector.
MMK_INLINE vf to_bf16(vf a, vf b) { return (vf)vcombine_u16((uint16x4_t)to_bf16(a), (uint16x4_t)to_bf16(b)); }
MMK_INLINE vf to_f16(vf a, vf b) { return (vf)vcombine_u16((uint16x4_t)to_f16(a), (uint16x4_t)to_f16(b)); }
MMK_INLINE void store(uint16_t* p, vh x) { vst1_u16(p, (uint16x4_t)x); }

// ---- stores past the caches: there are none by intrinsics ----
constexpr bool kStreams = false;
MMK_INLINE void stream(float* p, vf x) { store(p, x); }
MMK_INLINE void stream_fence() {}

// 0 where the byte is 0, else not 0.
MMK_INLINE vi load_bool(const uint8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, sizeof four);
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
  return (vi)vmovl_u16(vget_low_u16(vmovl_u8(bytes))) != 0;
}

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
// ---- bfloat16 pairs: a 32-bit lane holds two bfloat16, the even one in the low half ----

// acc + a.low · b.low + a.high · b.high
MMK_INLINE vf pair_dot(vf acc, vf a, vf b) {
  return (vf)vbfdotq_f32((float32x4_t)acc, (bfloat16x8_t)a, (bfloat16x8_t)b);
}

MMK_INLINE vf pair(vf low, vf high) {
  const uint32x4_t first = vmovl_u16((uint16x4_t)to_bf16(low)), second = vmovl_u16((uint16x4_t)to_bf16(high));
  return (vf)vorrq_u32(first, vshlq_n_u32(second, 16));
}

// Interleaves two rows of 2·VW bfloat16 into 2·VW pairs.
MMK_INLINE void pair_rows(vf even, vf odd, vf& first, vf& second) {
  first = (vf)vzip1q_u16((uint16x8_t)even, (uint16x8_t)odd);
  second = (vf)vzip2q_u16((uint16x8_t)even, (uint16x8_t)odd);
}
#endif

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
