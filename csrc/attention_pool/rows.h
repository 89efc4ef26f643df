// One row of an attention pool at a time: which modalities it has, their softmax, sums of them and their gradients.
#pragma once

#include "csrc/attention_pool/pool.h"
#include "csrc/cpu/activation.h"
#include "csrc/cpu/element.h"
#include "csrc/cpu/schedule.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// Rows of a task: enough to be worth claiming.
constexpr int64_t kPoolRows = 32;

template <class T>
MMK_INLINE const T* row_of(const PoolRows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}

MMK_INLINE float number(const float* p) { return *p; }
template <class T>
MMK_INLINE float number(const T* p) {
  return sum(load_as_float(p, 1));
}

// Memory that may be null where it is empty, which memset may not.
template <class T>
MMK_INLINE void set_to_zero(T* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = T{};
}

// The modalities that a row has, in order.
template <class T>
class PresentModalities {
 public:
  // `memory`: M floats.
  PresentModalities(const Pool& pool, float* memory) : pool_(pool), index_(reinterpret_cast<int32_t*>(memory)) {}

  void select(int64_t row) {
    row_ = row;
    count_ = 0;
    for (int64_t i = 0; i < pool_.modalities; ++i) {
      if (is_present(pool_, row, i)) index_[count_++] = static_cast<int32_t>(i);
    }
  }
  int64_t count() const { return count_; }
  int64_t index(int64_t k) const { return index_[k]; }
  const T* x(int64_t k) const {
    const PoolModality& m = pool_.items[index_[k]];
    return static_cast<const T*>(m.x) + row_ * m.stride;
  }

 private:
  const Pool& pool_;
  int32_t* index_;
  int64_t row_ = 0, count_ = 0;
};

// f(offset, Constant vectors) over `width` features, four vectors at a time while they are whole.
template <class Function>
MMK_INLINE void for_vectors(int64_t width, Function f) {
  int64_t c = 0;
  for (; c + 4 * VW <= width; c += 4 * VW) f(c, std::integral_constant<int, 4>{});
  for (; c < width; c += VW) f(c, std::integral_constant<int, 1>{});
}

// x · y over `width` features.
template <class T, class U>
MMK_INLINE vf dot_lanes(const T* x, const U* y, int64_t width) {
  vf s[4] = {zero(), zero(), zero(), zero()};
  for_vectors(width, [&](int64_t c, auto vectors) {
    MMK_UNROLL for (int j = 0; j < decltype(vectors)::value; ++j) {
      const int64_t at = c + j * VW;
      s[j] = fma(load_as_float(x + at, width - at), load_as_float(y + at, width - at), s[j]);
    }
  });
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// e[0 … count) → its softmax; `e` has room for whole vectors.
inline void softmax_in_place(float* e, int64_t count) {
  vf top = set1(-kInfinity), total = zero();
  if (count % VW != 0) {
    for (int64_t k = count; k < round_up(count, VW); ++k) e[k] = -kInfinity;
  }
  for (int64_t k = 0; k < count; k += VW) top = max(load(e + k), top);
  top = set1(max_lane(top));
  for (int64_t k = 0; k < count; k += VW) {
    const vf p = exp_of(load(e + k) - top);
    store(e + k, p);
    total = total + p;
  }
  const vf sum_of_all = set1(sum(total));
  for (int64_t k = 0; k < count; k += VW) store(e + k, load(e + k) / sum_of_all);
}

// Σ_k weights[k] · x_k of a row's present modalities.
template <class T>
void add_weighted(const PresentModalities<T>& present, const float* weights, int64_t width, T* out) {
  for_vectors(width, [&](int64_t c, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    vf sums[kVectors];
    MMK_UNROLL for (int j = 0; j < kVectors; ++j) sums[j] = zero();
    for (int64_t k = 0; k < present.count(); ++k) {
      const vf a = set1(weights[k]);
      const T* x = present.x(k) + c;
      MMK_UNROLL for (int j = 0; j < kVectors; ++j) {
        sums[j] = fma(a, load_as_float(x + j * VW, width - c - j * VW), sums[j]);
      }
    }
    MMK_UNROLL for (int j = 0; j < kVectors; ++j) store_from_float(out + c + j * VW, sums[j], width - c - j * VW);
  });
}

// Energies e of a row's present modalities → its weights, in memory and in `e`, and its pooled features.
template <class T>
void finish_pooled_row(const Pool& pool, int64_t row, const PresentModalities<T>& present, float* e) {
  T* const weights = static_cast<T*>(pool.weights) + row * pool.modalities;
  T* const pooled = static_cast<T*>(pool.pooled) + row * pool.width;
  softmax_in_place(e, present.count());
  if (present.count() < pool.modalities) set_to_zero(weights, pool.modalities);
  for (int64_t k = 0; k < present.count(); ++k) store_from_float(weights + present.index(k), set1(e[k]), 1);
  add_weighted(present, e, pool.width, pooled);
}

// The weights of a row's present modalities, and the gradients of their energies: de_k = a_k (s_k - Σ a s),
// s_k = dpooled · x_k + da_k.
template <class T>
void energy_gradients(const Pool& pool, int64_t row, const PresentModalities<T>& present, float* a, float* de) {
  const T* weights = static_cast<const T*>(pool.weights) + row * pool.modalities;
  const T* grad = row_of<T>(pool.grad_pooled, row);
  const T* grad_weights = row_of<T>(pool.grad_weights, row);
  float mean = 0.f;
  for (int64_t k = 0; k < present.count(); ++k) {
    a[k] = number(weights + present.index(k));
    de[k] = sum(dot_lanes(grad, present.x(k), pool.width)) + number(grad_weights + present.index(k));
    mean += a[k] * de[k];
  }
  for (int64_t k = 0; k < present.count(); ++k) de[k] = a[k] * (de[k] - mean);
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
