//
//   w_i = exp(lse_i - lse),   lse = log Σ_i exp lse_i,   out = Σ_i w_i out_i
//   d out_i = w_i g,   d lse_i = w_i (g · out_i - Σ_j w_j g · out_j + d lse)
//
// Tiling     a task owns runs of VW rows: their weights are made with a row to a lane, then each row of each part is
//            read once, its features in vectors.
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

// Up to VW rows from `first` on, and numbers of theirs, [parts][VW].
struct Run {
  int64_t first, count;
  float *weights, *dots;
};

// The weights of the parts, all 0 where none attends to anything; returns lse.
vf weigh_parts(const MergeAttentionParams& p, const Run& run) {
  const auto lses = [&](int64_t i) { return load_as_float(p.part[i].lse + run.first, run.count); };
  vf top = set1(-kInfinity), total = zero();
  for (int64_t i = 0; i < p.parts; ++i) top = max(top, lses(i));
  const vf shift = select(top == set1(-kInfinity), zero(), top);
  for (int64_t i = 0; i < p.parts; ++i) {
    const vf weight = exp2<5>((lses(i) - shift) * set1(kLog2e));
    store(run.weights + i * VW, weight);
    total = total + weight;
  }
  const vf inverse = select(total == zero(), zero(), set1(1.f) / total);
  for (int64_t i = 0; i < p.parts; ++i) store(run.weights + i * VW, load(run.weights + i * VW) * inverse);
  alignas(64) float logs[VW];
  store(logs, total);
  for (float& x : logs) x = std::log(x);  // of 0: -inf
  return shift + load(logs);
}

// Whether a row of a part counts.
bool counts(const MergePart& part, int64_t row) { return part.lse[row] != -kInfinity; }

template <class T>
void merge_rows(const MergeAttentionParams& p, const Run& run) {
  store_from_float(p.lse + run.first, weigh_parts(p, run), run.count);
  for (int64_t x = 0; x < run.count; ++x) {
    const int64_t row = run.first + x;
    for (int64_t c = 0; c < p.features; c += VW) {
      const int64_t at = row * p.features + c, n = p.features - c;
      vf total = zero();
      for (int64_t i = 0; i < p.parts; ++i) {
        if (!counts(p.part[i], row)) continue;
        const vf out = load_as_float(static_cast<const T*>(p.part[i].out) + at, n);
        total = fma(set1(run.weights[i * VW + x]), out, total);
      }
      store_from_float(static_cast<T*>(p.out) + at, total, n);
    }
  }
}

template <class T>
void pull_rows(const MergeAttentionParams& p, const Run& run) {
  weigh_parts(p, run);
  for (int64_t i = 0; i < p.parts; ++i) {
    const MergePart& part = p.part[i];
    for (int64_t x = 0; x < run.count; ++x) {
      const int64_t row = run.first + x, at = row * p.features;
      const bool counted = counts(part, row);
      const T* const grad = static_cast<const T*>(p.grad_out) + at;
      const T* const out = static_cast<const T*>(part.out) + at;
      T* const grad_out = part.grad_out == nullptr ? nullptr : static_cast<T*>(part.grad_out) + at;
      const vf weight = set1(run.weights[i * VW + x]);
      vf dot = zero();
      for (int64_t c = 0; c < p.features; c += VW) {
        const int64_t n = p.features - c;
        const vf g = load_as_float(grad + c, n);
        if (counted) dot = fma(g, load_as_float(out + c, n), dot);
        if (grad_out != nullptr) store_from_float(grad_out + c, counted ? weight * g : zero(), n);
      }
      run.dots[i * VW + x] = sum(dot);
    }
  }
  vf mean = zero();
  for (int64_t i = 0; i < p.parts; ++i) mean = fma(load(run.weights + i * VW), load(run.dots + i * VW), mean);
  const vf grad_lse = load_as_float(p.grad_lse + run.first, run.count);
  for (int64_t i = 0; i < p.parts; ++i) {
    if (p.part[i].grad_lse == nullptr) continue;
    const vf absent = load_as_float(p.part[i].lse + run.first, run.count);
    const vf pulled = load(run.weights + i * VW) * (load(run.dots + i * VW) - mean + grad_lse);
    store_from_float(p.part[i].grad_lse + run.first, select(absent == set1(-kInfinity), zero(), pulled), run.count);
  }
}

// f(pointer of the element type, run) for all rows.
template <class Function>
void for_each_run(const MergeAttentionParams& p, Function f) {
  const int64_t per_part = p.parts * VW;
  const Scratch scratch(p.workers.count * 2 * per_part);
  for_each_claim(p.workers, ceil_div(p.rows, VW), kRowsPerTask / VW, [&](int worker, int64_t first, int64_t last) {
    float* const numbers = scratch.data() + worker * 2 * per_part;
    std::memset(numbers, 0, sizeof(float) * static_cast<size_t>(2 * per_part));
    with_element_type(p.dtype, p.part[0].out, [&](const auto* type) {
      for (int64_t x = first; x < last; ++x) {
        f(type, Run{x * VW, min(VW, p.rows - x * VW), numbers, numbers + per_part});
      }
    });
  });
}

}  // namespace

void merge_attention_forward(const MergeAttentionParams& p) {
  for_each_run(p, [&](const auto* type, const Run& run) {
    merge_rows<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(p, run);
  });
}

void merge_attention_backward(const MergeAttentionParams& p) {
  for_each_run(p, [&](const auto* type, const Run& run) {
    pull_rows<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(p, run);
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
