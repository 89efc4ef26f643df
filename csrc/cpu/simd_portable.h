// simd.h on the compiler's vector extension: SSE4.2 and NEON (VW 4), and the emulated set, which has the widths and the
// bfloat16 pair product of AVX-512 BF16 so that machines without it can run that configuration of every kernel.
#pragma once

namespace mmk {
namespace MMK_ISA {
namespace {

#ifdef MMK_EMULATED
constexpr int VW = 16;
constexpr int kRegisters = 32;
constexpr bool kFma = true;
constexpr bool kBf16Dot = true;
#else
constexpr int VW = 4;
constexpr bool kBf16Dot = false;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
constexpr bool kFma = true;
#else
constexpr int kRegisters = 16;
constexpr bool kFma = false;
#endif
#endif

typedef float vf __attribute__((vector_size(4 * VW)));
typedef int32_t vi __attribute__((vector_size(4 * VW)));
typedef uint16_t vh __attribute__((vector_size(2 * VW)));
typedef uint8_t vb __attribute__((vector_size(VW)));

MMK_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
MMK_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
MMK_INLINE vf load_partial(const float* p, int64_t n) {
  vf x{};
  std::memcpy(&x, p, static_cast<size_t>(n) * sizeof(float));
  return x;
}
MMK_INLINE void store_partial(float* p, vf x, int64_t n) { std::memcpy(p, &x, static_cast<size_t>(n) * sizeof(float)); }
MMK_INLINE vf set1(float x) { return x - vf{}; }
MMK_INLINE vf zero() { return vf{}; }
MMK_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
MMK_INLINE vf max(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
MMK_INLINE vf min(vf a, vf b) { return a < b ? a : b; }  // the same
MMK_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }

MMK_INLINE vf divide_fast(vf a, vf b) { return a / b; }  // to about two roundings where that is faster
MMK_INLINE vf sqrt(vf x) {
  for (int i = 0; i < VW; ++i) x[i] = std::sqrt(x[i]);
  return x;
}
MMK_INLINE vf round_down(vf x) {
  const vf truncated = __builtin_convertvector(__builtin_convertvector(x, vi), vf);
  return truncated > x ? truncated - 1.f : truncated;
}

// p · 2^floor(x) for x >= -127; 0 at floor(x) = -127.
MMK_INLINE vf scale_by_power_of_two(vf p, vf x) {
  const vi exponent = __builtin_convertvector(round_down(x), vi);
  return p * (vf)((exponent + 127) << 23);
}

MMK_INLINE float sum(vf x) {
  float total = 0.f;
  for (int i = 0; i < VW; ++i) total += x[i];
  return total;
}
MMK_INLINE float max_lane(vf x) {
  float best = x[0];
  for (int i = 1; i < VW; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

MMK_INLINE void transpose(vf (&r)[VW]) {
  alignas(64) float tile[VW * VW];
  for (int i = 0; i < VW; ++i) store(tile + i * VW, r[i]);
  for (int j = 0; j < VW; ++j) {
    vf column{};
    for (int i = 0; i < VW; ++i) column[i] = tile[i * VW + j];
    r[j] = column;
  }
}

// r[i] = column i of a VW×VW tile.
MMK_INLINE void load_transposed(const void* from, int64_t stride_bytes, vf (&r)[VW]) {
  for (int i = 0; i < VW; ++i)
    r[i] = load(reinterpret_cast<const float*>(static_cast<const char*>(from) + i * stride_bytes));
  transpose(r);
}

// Lane i of the result is the sum of the lanes of r[i].
MMK_INLINE vf sum_rows(vf (&r)[VW]) {
  transpose(r);
  vf total = r[0];
  for (int i = 1; i < VW; ++i) total += r[i];
  return total;
}

MMK_INLINE vf load_bf16(const uint16_t* p) {
  vh x;
  std::memcpy(&x, p, sizeof x);
  return (vf)(__builtin_convertvector(x, vi) << 16);
}

MMK_INLINE uint16_t bf16_from_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
MMK_INLINE vh to_bf16(vf x) {
  vh halves{};
  for (int i = 0; i < VW; ++i) halves[i] = bf16_from_float(x[i]);
  return halves;
}

#if defined(__aarch64__)
MMK_INLINE float float_from_f16(uint16_t h) {
  __fp16 x;
  std::memcpy(&x, &h, sizeof x);
  return static_cast<float>(x);
}
MMK_INLINE uint16_t f16_from_float(float f) {
  const __fp16 x = static_cast<__fp16>(f);
  uint16_t h;
  std::memcpy(&h, &x, sizeof h);
  return h;
}
#else
MMK_INLINE float float_from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {  // infinity and NaN
    bits = sign | 0x7f800000 | ((magnitude & 0x3ff) << 13);
  } else if (magnitude >= 0x400) {
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {  // subnormal: magnitude · 2^-24
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  }
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
MMK_INLINE uint16_t f16_from_float(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds beyond 65504
  if (magnitude < 0x38800000) {                                              // subnormal: adding 0.5 rounds at 2^-24
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &value, sizeof rounded);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}
#endif

MMK_INLINE vf load_f16(const uint16_t* p) {
  vf x{};
  for (int i = 0; i < VW; ++i) x[i] = float_from_f16(p[i]);
  return x;
}
MMK_INLINE vh to_f16(vf x) {
  vh halves{};
  for (int i = 0; i < VW; ++i) halves[i] = f16_from_float(x[i]);
  return halves;
}
// a's halves, then b's, as the bits of one vector.
MMK_INLINE vf join_halves(vh a, vh b) {
  vf bits;
  std::memcpy(&bits, &a, sizeof a);
  std::memcpy(reinterpret_cast<char*>(&bits) + sizeof a, &b, sizeof b);
  return bits;
}
MMK_INLINE vf to_bf16(vf a, vf b) { return join_halves(to_bf16(a), to_bf16(b)); }
MMK_INLINE vf to_f16(vf a, vf b) { return join_halves(to_f16(a), to_f16(b)); }
MMK_INLINE void store(uint16_t* p, vh x) { std::memcpy(p, &x, sizeof x); }

// ---- stores past the caches, where there are any ----
constexpr bool kStreams = false;
MMK_INLINE void stream(float* p, vf x) { store(p, x); }
MMK_INLINE void stream_fence() {}

// 0 where the byte is 0, else not 0.
MMK_INLINE vi load_bool(const uint8_t* p) {
  vb x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vi) != 0;
}

// ---- bfloat16 pairs: a 32-bit lane holds two bfloat16, the even one in the low half ----

// acc + a.low · b.low + a.high · b.high
MMK_INLINE vf pair_dot(vf acc, vf a, vf b) {
  const vi x = (vi)a, y = (vi)b, high = vi{} - 65536;  // 0xffff0000 in every lane
  acc = acc + (vf)(x << 16) * (vf)(y << 16);
  return acc + (vf)(x & high) * (vf)(y & high);
}

MMK_INLINE vf pair(vf low, vf high) {
  vi lanes{};
  for (int i = 0; i < VW; ++i) {
    lanes[i] = static_cast<int32_t>(bf16_from_float(low[i]) | static_cast<uint32_t>(bf16_from_float(high[i])) << 16);
  }
  return (vf)lanes;
}

// Interleaves two rows of 2·VW bfloat16 into 2·VW pairs.
MMK_INLINE void pair_rows(vf even, vf odd, vf& first, vf& second) {
  uint16_t x[2 * VW], y[2 * VW];
  uint32_t pairs[2 * VW];
  std::memcpy(x, &even, sizeof x);
  std::memcpy(y, &odd, sizeof y);
  for (int i = 0; i < 2 * VW; ++i) pairs[i] = x[i] | static_cast<uint32_t>(y[i]) << 16;
  std::memcpy(&first, pairs, sizeof first);
  std::memcpy(&second, pairs + VW, sizeof second);
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
