//   g = Σ x_i over present i,  e = W₂ act(W₁ g + b₁) + b₂,  a = softmax over present i of e,  pooled = Σ a_i ∘ x_i
//
//   s_i = dpooled ∘ x_i + da_i,  de_i = a_i ∘ (s_i - Σ_j a_j ∘ s_j),  dx_i = a_i ∘ dpooled + dg
//
// Tiling     a row after the other, all modalities of one vector of features together: the softmax has no pass of its
//            own over memory. The products between g and e are csrc/concat_linear's.
// Threads    no sum is shared by two rows.
// Precision  float32; g, e and a have the inputs' dtype where they are kept.
// Limits     any sizes.
#include "csrc/attention_pool/rows.h"
#include "csrc/attention_pool/split_attention_pool.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// f<T>(present, row) for every row, with its modalities selected.
template <class Function>
void for_each_row(const Pool& pool, Function f) {
  with_element_type(pool.dtype, pool.weights, [&](auto* weights) {
    using T = std::decay_t<decltype(*weights)>;
    for_each_claim(pool.workers, pool.rows, kPoolRows, [&](int, int64_t begin, int64_t end) {
      const Scratch memory(pool.modalities);
      PresentModalities<T> present(pool, memory.data());
      for (int64_t row = begin; row < end; ++row) {
        present.select(row);
        f(present, row);
      }
    });
  });
}

// Weights or energies of a row, [M][D].
template <class T>
T* row_of_all(void* data, const Pool& pool, int64_t row) {
  return static_cast<T*>(data) + row * pool.modalities * pool.width;
}

template <class T>
void clear_absent(const Pool& pool, int64_t row, const PresentModalities<T>& present, T* all) {
  if (present.count() == pool.modalities) return;
  for (int64_t i = 0; i < pool.modalities; ++i) {
    if (!is_present(pool, row, i)) set_to_zero(all + i * pool.width, pool.width);
  }
}

template <class T>
void sum_row(const SplitPoolParams& p, int64_t row, const PresentModalities<T>& present) {
  T* const out = static_cast<T*>(p.sum) + row * p.pool.width;
  for (int64_t c = 0; c < p.pool.width; c += VW) {
    const int64_t n = p.pool.width - c;
    vf total = zero();
    for (int64_t k = 0; k < present.count(); ++k) total = total + load_as_float(present.x(k) + c, n);
    store_from_float(out + c, total, n);
  }
}

template <class T>
void forward_row(const Pool& pool, int64_t row, const PresentModalities<T>& present) {
  const int64_t width = pool.width;
  T* const a = row_of_all<T>(pool.weights, pool, row);
  T* const pooled = static_cast<T*>(pool.pooled) + row * width;
  for (int64_t c = 0; c < width; c += VW) {
    const int64_t n = width - c;
    const auto energy = [&](int64_t k) { return load_as_float(a + present.index(k) * width + c, n); };
    vf top = set1(-kInfinity), total = zero(), sums = zero();
    for (int64_t k = 0; k < present.count(); ++k) top = max(energy(k), top);
    for (int64_t k = 0; k < present.count(); ++k) {
      const vf share = exp_of(energy(k) - top);
      total = total + share;
      sums = fma(share, load_as_float(present.x(k) + c, n), sums);
    }
    const vf scale = set1(1.f) / total;
    for (int64_t k = 0; k < present.count(); ++k) {
      store_from_float(a + present.index(k) * width + c, exp_of(energy(k) - top) * scale, n);
    }
    store_from_float(pooled + c, present.count() == 0 ? zero() : sums * scale, n);
  }
  clear_absent(pool, row, present, a);
}

template <class T>
void energy_gradient_row(const SplitPoolParams& p, int64_t row, const PresentModalities<T>& present) {
  const Pool& pool = p.pool;
  const int64_t width = pool.width;
  const T *a = row_of_all<T>(pool.weights, pool, row), *grad = row_of<T>(pool.grad_pooled, row);
  const T* grad_weights = row_of<T>(pool.grad_weights, row);
  T* const de = row_of_all<T>(p.grad_energies, pool, row);
  for (int64_t c = 0; c < width; c += VW) {
    const int64_t n = width - c;
    const vf g = load_as_float(grad + c, n);
    const auto at = [&](int64_t k) { return present.index(k) * width + c; };
    const auto slope = [&](int64_t k) {
      return fma(g, load_as_float(present.x(k) + c, n), load_as_float(grad_weights + at(k), n));
    };
    vf mean = zero();
    for (int64_t k = 0; k < present.count(); ++k) mean = fma(load_as_float(a + at(k), n), slope(k), mean);
    for (int64_t k = 0; k < present.count(); ++k) {
      store_from_float(de + at(k), load_as_float(a + at(k), n) * (slope(k) - mean), n);
    }
  }
  clear_absent(pool, row, present, de);
}

template <class T>
void source_gradient_row(const SplitPoolParams& p, int64_t row, const PresentModalities<T>&) {
  const Pool& pool = p.pool;
  const int64_t width = pool.width;
  const T *a = row_of_all<T>(pool.weights, pool, row), *grad = row_of<T>(pool.grad_pooled, row);
  const T* grad_sum = static_cast<const T*>(p.sum) + row * width;
  for (int64_t i = 0; i < pool.modalities; ++i) {
    const PoolModality& m = pool.items[i];
    if (m.grad == nullptr) continue;
    T* const out = static_cast<T*>(m.grad) + row * m.grad_stride;
    if (!is_present(pool, row, i)) {
      set_to_zero(out, width);
      continue;
    }
    for (int64_t c = 0; c < width; c += VW) {
      const int64_t n = width - c;
      const vf share = load_as_float(a + i * width + c, n);
      store_from_float(out + c, fma(share, load_as_float(grad + c, n), load_as_float(grad_sum + c, n)), n);
    }
  }
}

}  // namespace

void split_pool_sum(const SplitPoolParams& p) {
  for_each_row(p.pool, [&](const auto& present, int64_t row) { sum_row(p, row, present); });
}

void split_pool_forward(const SplitPoolParams& p) {
  for_each_row(p.pool, [&](const auto& present, int64_t row) { forward_row(p.pool, row, present); });
}

void split_pool_energy_gradients(const SplitPoolParams& p) {
  for_each_row(p.pool, [&](const auto& present, int64_t row) { energy_gradient_row(p, row, present); });
}

void split_pool_source_gradients(const SplitPoolParams& p) {
  for_each_row(p.pool, [&](const auto& present, int64_t row) { source_gradient_row(p, row, present); });
}

}  // namespace MMK_ISA
}  // namespace mmk
