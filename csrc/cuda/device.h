// What CUDA kernels say to the hardware, in their own words: 16-bit formats, shuffles, matrix products, copies in the
// background. The only place with PTX; where MMK_SIMT is defined the same words run on the CPU (tests/simt).
#pragma once

#include <stdint.h>

#ifdef MMK_SIMT
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "tests/simt/warp.h"
using std::max;
using std::min;
#define MMK_SHARED_MEMORY(name) unsigned char* const name = simt::world().shared
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MMK_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace mmk::cuda {

constexpr int kWarp = 32;

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
struct alignas(16) Bytes16 {
  uint32_t words[4];
};

__device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }

#ifdef MMK_SIMT

inline float to_float(Bf16 x) { return simt::bf16_to_float(x.bits); }
inline float to_float(Fp16 x) { return simt::fp16_to_float(x.bits); }
template <typename T>
T from_float(float x);
template <>
inline Bf16 from_float<Bf16>(float x) {
  return {simt::float_to_bf16(x)};
}
template <>
inline Fp16 from_float<Fp16>(float x) {
  return {simt::float_to_fp16(x)};
}

template <typename T>
T shuffle_xor(T value, int mask) {
  return simt::shuffle(value, simt::lane() ^ unsigned(mask));
}
template <typename T>
T shuffle_from(T value, int lane) {
  return simt::shuffle(value, unsigned(lane));
}
/// The value of `distance` lanes before; its own in the first lanes.
template <typename T>
T shuffle_up(T value, int distance) {
  const unsigned self = simt::lane(), back = unsigned(distance);
  return simt::shuffle(value, self < back ? self : self - back);
}
inline unsigned ballot(bool yes) {
  simt::Vote vote{yes, 0};
  simt::meet(simt::count_votes, &vote);
  return vote.all;
}
inline int count_bits(unsigned x) { return __builtin_popcount(x); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float rsqrt_fast(float x) { return 1.0f / std::sqrt(x); }
inline float divide_fast(float x, float y) { return x / y; }

template <typename T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::Product p{d, a, b0, b1};
  constexpr bool kBf16 = std::is_same_v<T, Bf16>;
  simt::meet(kBf16 ? simt::multiply_tiles<simt::bf16_to_float> : simt::multiply_tiles<simt::fp16_to_float>, &p);
}
inline void load_matrices(uint32_t (&r)[4], const void* shared) { simt::load_matrix<false>(r, shared); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* shared) { simt::load_matrix<true>(r, shared); }

inline void copy_async(void* shared, const void* global, bool inside) {
  simt::start_copy(shared, inside ? global : nullptr);
}
inline void commit_copies() { simt::commit_copies(); }
template <int kBut>
void wait_for_copies() {
  simt::wait_for_copies(kBut);
}

#else

__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_float(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <typename T>
__device__ T from_float(float x);
template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Fp16 from_float<Fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

constexpr unsigned kAllLanes = 0xffffffffu;
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <typename T>
__device__ __forceinline__ T shuffle_from(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <typename T>
__device__ __forceinline__ T shuffle_up(T value, int distance) {
  return __shfl_up_sync(kAllLanes, value, distance);
}
__device__ __forceinline__ unsigned ballot(bool yes) { return __ballot_sync(kAllLanes, yes); }
__device__ __forceinline__ int count_bits(unsigned x) { return __popc(x); }
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt_fast(float x) { return rsqrtf(x); }
/// Within two units in the last place where |y| is below 2^126.
__device__ __forceinline__ float divide_fast(float x, float y) { return __fdividef(x, y); }

/// d[16 x 8] += a[16 x 16] b[16 x 8], spread over a warp: PTX ISA, "Matrix Fragments for mma.m16n8k16".
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define MMK_MULTIPLY(T, format)                                                                                  \
  template <>                                                                                                    \
  __device__ __forceinline__ void multiply<T>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." format "." format                                      \
                 ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"                                     \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                \
  }
MMK_MULTIPLY(Bf16, "bf16")
MMK_MULTIPLY(Fp16, "f16")
#undef MMK_MULTIPLY

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

/// Four 8 x 8 matrices of 16-bit elements; lane 8 i + j gives the address of row j of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

/// 16 bytes to shared memory in the background; zeros where not inside, and then nothing is read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
/// Until all committed groups but the last kBut have arrived, this thread's own; others' need a barrier as well.
template <int kBut>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kBut) : "memory");
}

#endif

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}
template <typename T>
__device__ __forceinline__ float low_half(uint32_t pair) {
  return to_float(T{uint16_t(pair)});
}
template <typename T>
__device__ __forceinline__ float high_half(uint32_t pair) {
  return to_float(T{uint16_t(pair >> 16)});
}

/// The sum, or the maximum, over the lanes whose numbers differ in the bits below kLanes.
template <int kLanes = kWarp, typename T>
__device__ __forceinline__ T sum_lanes(T x) {
#pragma unroll
  for (int i = kLanes / 2; i > 0; i /= 2) x += shuffle_xor(x, i);
  return x;
}
template <int kLanes = kWarp>
__device__ __forceinline__ float max_lanes(float x) {
#pragma unroll
  for (int i = kLanes / 2; i > 0; i /= 2) x = fmaxf(x, shuffle_xor(x, i));
  return x;
}

}  // namespace mmk::cuda
