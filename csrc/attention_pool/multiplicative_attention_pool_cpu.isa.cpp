//   e_i = scale · q' · x_i,  a = softmax over present i of e,  pooled = Σ a_i x_i
//
//   s_i = dpooled · x_i + da_i,  de_i = a_i (s_i - Σ_j a_j s_j)
//   dx_i = a_i dpooled + scale · de_i q',  dq' = scale · Σ de_i x_i
//
// Tiling     a row after the other: its modalities are read from memory once, and again from cache.
// Threads    no sum is shared by two rows.
// Precision  float32.
// Limits     any sizes.
#include "csrc/attention_pool/multiplicative_attention_pool.h"
#include "csrc/attention_pool/rows.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <class T>
void forward_rows(const MultiplicativePoolParams& p, int64_t begin, int64_t end) {
  const Pool& pool = p.pool;
  const Scratch scratch(2 * round_up(pool.modalities, 16));
  Carver memory(scratch.data());
  PresentModalities<T> present(pool, memory.take(pool.modalities));
  float* const e = memory.take(pool.modalities);
  for (int64_t row = begin; row < end; ++row) {
    present.select(row);
    const T* query = row_of<T>(p.query, row);
    for (int64_t k = 0; k < present.count(); ++k) {
      e[k] = p.scale * sum(dot_lanes(query, present.x(k), pool.width));
    }
    finish_pooled_row(pool, row, present, e);
  }
}

template <class T>
void backward_rows(const MultiplicativePoolParams& p, int64_t begin, int64_t end) {
  const Pool& pool = p.pool;
  const int64_t width = pool.width;
  const Scratch scratch(3 * round_up(pool.modalities, 16));
  Carver memory(scratch.data());
  PresentModalities<T> present(pool, memory.take(pool.modalities));
  float *const a = memory.take(pool.modalities), *const de = memory.take(pool.modalities);
  for (int64_t row = begin; row < end; ++row) {
    present.select(row);
    energy_gradients(pool, row, present, a, de);
    const T *query = row_of<T>(p.query, row), *grad = row_of<T>(pool.grad_pooled, row);
    for (int64_t k = 0; k < present.count(); ++k) de[k] *= p.scale;
    for (int64_t i = 0, k = 0; i < pool.modalities; ++i) {
      const bool there = k < present.count() && present.index(k) == i;
      const vf weight = set1(there ? a[k] : 0.f), slope = set1(there ? de[k] : 0.f);
      k += there;
      if (pool.items[i].grad == nullptr) continue;
      T* const out = static_cast<T*>(pool.items[i].grad) + row * pool.items[i].grad_stride;
      if (!there) {
        set_to_zero(out, width);
        continue;
      }
      for (int64_t c = 0; c < width; c += VW) {
        const vf dx = slope * load_as_float(query + c, width - c);
        store_from_float(out + c, fma(weight, load_as_float(grad + c, width - c), dx), width - c);
      }
    }
    if (p.grad_query != nullptr) add_weighted(present, de, width, static_cast<T*>(p.grad_query) + row * width);
  }
}

}  // namespace

void multiplicative_pool_forward(const MultiplicativePoolParams& p) {
  with_element_type(p.pool.dtype, p.pool.pooled, [&](auto* out) {
    for_each_claim(p.pool.workers, p.pool.rows, kPoolRows,
                   [&](int, int64_t begin, int64_t end) { forward_rows<std::decay_t<decltype(*out)>>(p, begin, end); });
  });
}

void multiplicative_pool_backward(const MultiplicativePoolParams& p) {
  with_element_type(p.pool.dtype, p.pool.weights, [&](auto* weights) {
    for_each_claim(p.pool.workers, p.pool.rows, kPoolRows, [&](int, int64_t begin, int64_t end) {
      backward_rows<std::decay_t<decltype(*weights)>>(p, begin, end);
    });
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
