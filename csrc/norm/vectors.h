// Vectors of C features between their element type and padded float vectors.
#pragma once

#include "csrc/cpu/element.h"
#include "csrc/norm/norm.h"

namespace mmk {
namespace MMK_ISA {
namespace {

MMK_INLINE char* row_address(const TokenRows& rows, int64_t b, int64_t l, Dtype dtype) {
  return static_cast<char*>(rows.data) + (b * rows.batch + l * rows.row) * element_size(dtype);
}

// f(k, n) for every vector of C features; n <= VW.
template <class Function>
MMK_INLINE void for_each_vector(int64_t features, Function f) {
  int64_t k = 0;
  for (; k + VW <= features; k += VW) f(k, int64_t{VW});
  if (k < features) f(k, features - k);
}

inline void clear_vector(float* x, int64_t padded) { std::memset(x, 0, static_cast<size_t>(padded) * sizeof(float)); }

// The vector as floats, zeros behind it.
inline void load_vector(Dtype dtype, const void* from, int64_t features, float* to) {
  with_element_type(dtype, from, [&](const auto* p) {
    for_each_vector(features, [&](int64_t k, int64_t n) { store(to + k, load_as_float(p + k, n)); });
  });
}

inline void store_vector(Dtype dtype, void* to, int64_t features, const float* from) {
  with_element_type(dtype, to, [&](auto* p) {
    for_each_vector(features, [&](int64_t k, int64_t n) { store_from_float(p + k, load(from + k), n); });
  });
}

// to += from, both padded.
inline void add_vector(float* to, const float* from, int64_t features) {
  for_each_vector(features, [&](int64_t k, int64_t) { store(to + k, load(to + k) + load(from + k)); });
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
