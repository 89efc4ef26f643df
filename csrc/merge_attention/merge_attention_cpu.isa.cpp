//
//   w_i = exp(lse_i - lse),   lse = log Σ_i exp lse_i,   out = Σ_i w_i out_i
//   d out_i = w_i g,   d lse_i = w_i (g · out_i - Σ_j w_j g · out_j + d lse)
//
// Tiling     a task owns a run of rows; a row of each part is read once, its features in vectors.
// Threads    rows are independent.
// Precision  float32; weights from the largest lse, not from the sum, whose rounding would enter them at large logits.
// Limits     any number of parts. One that attends to nothing, lse_i = -inf, is not read.
#include "csrc/cpu/element.h"
#include "csrc/cpu/schedule.h"
#include "csrc/merge_attention/merge_attention.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kRowsPerTask = 64;

// The weights of a row's parts, all 0 where none attends to anything; returns lse.
float weigh_parts(const MergeAttentionParams& p, int64_t row, float* weights) {
  float top = -kInfinity, total = 0.f;
  for (int64_t i = 0; i < p.parts; ++i) {
    if (!(p.part[i].lse[row] <= top)) top = p.part[i].lse[row];  // a NaN stays
  }
  for (int64_t i = 0; i < p.parts; ++i) {
    const float lse = p.part[i].lse[row];
    weights[i] = lse == -kInfinity ? 0.f : std::exp(lse - top);
    total += weights[i];
  }
  if (total == 0.f) return -kInfinity;
  for (int64_t i = 0; i < p.parts; ++i) weights[i] /= total;
  return top + std::log(total);
}

// Whether a row of a part counts.
bool counts(const MergePart& part, int64_t row) { return part.lse[row] != -kInfinity; }

template <class T>
void merge_row(const MergeAttentionParams& p, int64_t row, float* weights) {
  p.lse[row] = weigh_parts(p, row, weights);
  for (int64_t c = 0; c < p.features; c += VW) {
    const int64_t at = row * p.features + c, n = p.features - c;
    vf total = zero();
    for (int64_t i = 0; i < p.parts; ++i) {
      if (!counts(p.part[i], row)) continue;
      total = fma(set1(weights[i]), load_as_float(static_cast<const T*>(p.part[i].out) + at, n), total);
    }
    store_from_float(static_cast<T*>(p.out) + at, total, n);
  }
}

// Gradients of one row; `dots` holds g · out_i.
template <class T>
void pull_row(const MergeAttentionParams& p, int64_t row, float* weights, float* dots) {
  weigh_parts(p, row, weights);
  const T* const grad = static_cast<const T*>(p.grad_out) + row * p.features;
  float mean = 0.f;
  for (int64_t i = 0; i < p.parts; ++i) {
    const MergePart& part = p.part[i];
    const bool counted = counts(part, row);
    const T* const out = static_cast<const T*>(part.out) + row * p.features;
    T* const grad_out = part.grad_out == nullptr ? nullptr : static_cast<T*>(part.grad_out) + row * p.features;
    vf dot = zero();
    for (int64_t c = 0; c < p.features; c += VW) {
      const int64_t n = p.features - c;
      const vf g = load_as_float(grad + c, n);
      if (counted) dot = fma(g, load_as_float(out + c, n), dot);
      if (grad_out != nullptr) store_from_float(grad_out + c, counted ? set1(weights[i]) * g : zero(), n);
    }
    dots[i] = sum(dot);
    mean += weights[i] * dots[i];
  }
  for (int64_t i = 0; i < p.parts; ++i) {
    const MergePart& part = p.part[i];
    if (part.grad_lse == nullptr) continue;
    part.grad_lse[row] = counts(part, row) ? weights[i] * (dots[i] - mean + p.grad_lse[row]) : 0.f;
  }
}

// f(pointer of the element type, row, scratch for two numbers per part) for every row.
template <class Function>
void for_each_row(const MergeAttentionParams& p, Function f) {
  const int64_t per_worker = round_up(2 * p.parts, 16);
  const Scratch scratch(p.workers.count * per_worker);
  for_each_claim(p.workers, p.rows, kRowsPerTask, [&](int worker, int64_t first, int64_t last) {
    float* const numbers = scratch.data() + worker * per_worker;
    with_element_type(p.dtype, p.part[0].out, [&](const auto* type) {
      for (int64_t row = first; row < last; ++row) f(type, row, numbers);
    });
  });
}

}  // namespace

void merge_attention_forward(const MergeAttentionParams& p) {
  for_each_row(p, [&](const auto* type, int64_t row, float* numbers) {
    merge_row<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(p, row, numbers);
  });
}

void merge_attention_backward(const MergeAttentionParams& p) {
  for_each_row(p, [&](const auto* type, int64_t row, float* numbers) {
    pull_row<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(p, row, numbers, numbers + p.parts);
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
