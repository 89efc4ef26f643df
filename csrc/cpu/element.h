// Element types in memory and their conversion from and to float vectors. The type is a run-time value: a kernel
// converts where it packs or writes a tile, and computes on float (or bfloat16 pairs) in between.
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/simd.h"

namespace mmk {
namespace MMK_ISA {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

MMK_INLINE vf load_as_float(const float* p) { return load(p); }
MMK_INLINE vf load_as_float(const Bf16* p) { return load_bf16(&p->bits); }
MMK_INLINE vf load_as_float(const F16* p) { return load_f16(&p->bits); }
MMK_INLINE void store_from_float(float* p, vf x) { store(p, x); }
MMK_INLINE void store_from_float(Bf16* p, vf x) { store_bf16(&p->bits, x); }
MMK_INLINE void store_from_float(F16* p, vf x) { store_f16(&p->bits, x); }

// 2 · VW elements; kStream: past the caches, p being a multiple of the bytes of a vf.
template <bool kStream>
MMK_INLINE void write_bits(void* p, vf bits) {
  if constexpr (kStream) {
    stream(static_cast<float*>(p), bits);
  } else {
    store(static_cast<float*>(p), bits);
  }
}
template <bool kStream>
MMK_INLINE void write_pair(float* p, vf a, vf b) {
  write_bits<kStream>(p, a);
  write_bits<kStream>(p + VW, b);
}
template <bool kStream>
MMK_INLINE void write_pair(Bf16* p, vf a, vf b) {
  write_bits<kStream>(p, to_bf16(a, b));
}
template <bool kStream>
MMK_INLINE void write_pair(F16* p, vf a, vf b) {
  write_bits<kStream>(p, to_f16(a, b));
}

// The bits of 2 · VW halves, or of the first n of them and zeros.
MMK_INLINE vf load_pairs(const uint16_t* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
MMK_INLINE vf load_pairs(const uint16_t* p, int64_t n) {
  if (n >= 2 * VW) return load_pairs(p);
  vf x = zero();
  std::memcpy(&x, p, static_cast<size_t>(n) * sizeof *p);
  return x;
}

// A lane's two bfloat16 as floats: the one in the low half, the one in the high half.
MMK_INLINE vf low_bf16(vf pairs) { return (vf)((vi)pairs << 16); }
MMK_INLINE vf high_bf16(vf pairs) { return (vf)((vi)pairs & -0x10000); }

// n <= VW elements, zero behind them; nothing beyond is read or written.
template <class T>
MMK_INLINE vf load_as_float(const T* p, int64_t n) {
  if (n >= VW) return load_as_float(p);
  alignas(64) T lanes[VW] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load_as_float(lanes);
}
template <class T>
MMK_INLINE void store_from_float(T* p, vf x, int64_t n) {
  if (n >= VW) return store_from_float(p, x);
  alignas(64) T lanes[VW];
  store_from_float(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

MMK_INLINE vf load_as_float(const float* p, int64_t n) { return n >= VW ? load(p) : load_partial(p, n); }
MMK_INLINE void store_from_float(float* p, vf x, int64_t n) { n >= VW ? store(p, x) : store_partial(p, x, n); }

// r[i] = column i of VW rows, the rows `stride` elements apart.
template <class T>
MMK_INLINE void load_transposed(const T* from, int64_t stride, vf (&r)[VW]) {
  if constexpr (sizeof(T) == sizeof(float)) {
    load_transposed(static_cast<const void*>(from), stride * static_cast<int64_t>(sizeof(float)), r);
  } else {
    MMK_UNROLL for (int i = 0; i < VW; ++i) r[i] = load_as_float(from + i * stride);
    transpose(r);
  }
}

// Calls f(T*) with the pointer in its element type.
template <class Function>
MMK_INLINE void with_element_type(Dtype dtype, const void* p, Function f) {
  switch (dtype) {
    case Dtype::f32:
      return f(static_cast<const float*>(p));
    case Dtype::bf16:
      return f(static_cast<const Bf16*>(p));
    case Dtype::f16:
      return f(static_cast<const F16*>(p));
    case Dtype::boolean:
      return;
  }
}
template <class Function>
MMK_INLINE void with_element_type(Dtype dtype, void* p, Function f) {
  with_element_type(dtype, static_cast<const void*>(p),
                    [&](auto* q) { f(const_cast<std::remove_const_t<std::remove_pointer_t<decltype(q)>>*>(q)); });
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
