//
//   plain       −(1 − ε) log p_y − ε mean_c log p_c          grad_c = p_c − (1 − ε) [c = y] − ε / C
//   gce         (1 − p_y^q) / q                              grad_c = p_y^q (p_c − [c = y])
//   symmetric   −log p_y + 4 (1 − p_y)                       grad_c = (1 + 4 p_y) (p_c − [c = y])
//
// Tiling     a task owns runs of rows. A row of logits is read once for its statistics, two floats, which are all that
//            the backward keeps; once more where labels are smoothed; and once for the gradient.
// Threads    rows are independent.
// Precision  float32; probabilities from the distance to the row's maximum, however large the logits are.
// Limits     any number of classes. One whose logit is −inf has probability 0 and gradient 0.
#include "csrc/cpu/schedule.h"
#include "csrc/logits/softmax.h"
#include "csrc/multimodal_cross_entropy/cross_entropy.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kElementsPerTask = 32768;
constexpr float kReverse = 4.f;  // minus what stands for log 0 in the reverse cross-entropy

// What a row's loss and gradient are made of.
struct RowLoss {
  float loss, scale;  // of p_c − target_c
};

MMK_INLINE float logit(const float* z) { return *z; }
template <class T>
MMK_INLINE float logit(const T* z) {
  alignas(64) T halves[VW] = {};
  halves[0] = *z;
  alignas(64) float lanes[VW];
  store(lanes, load_as_float(halves));
  return lanes[0];
}

// Few classes in one vector, −inf behind them; `readable` elements may be read.
template <class T>
MMK_INLINE vf load_few_logits(const T* z, int64_t classes, int64_t readable) {
  if (readable < VW) return load_logits(z, classes);
  alignas(64) float flags[2 * VW];
  for (int i = 0; i < VW; ++i) flags[i] = 1.f, flags[VW + i] = 0.f;
  return select(load(flags + VW - classes) > zero(), load_as_float(z), set1(-kInfinity));
}
template <class T>
MMK_INLINE SoftmaxRow softmax_of_few(const T* z, int64_t classes, int64_t readable) {
  const vf x = load_few_logits(z, classes, readable);
  const float top = max_lane(max(x, set1(kLowest)));
  return {top, sum(exp_scaled(x - set1(top), set1(kLog2e)))};
}

// Σ_c (z_c − top)
template <class T>
float sum_of_distances(const T* z, int64_t classes, float top) {
  vf total[4] = {zero(), zero(), zero(), zero()};
  for_logits<4>(classes, [&](int64_t c, auto vectors) __attribute__((always_inline)) {
    MMK_UNROLL for (int j = 0; j < decltype(vectors)::value; ++j) {
      const int64_t at = c + j * VW, n = classes - at;
      total[j] = total[j] + filled_from(n, load_as_float(z + at, n) - set1(top), 0.f);
    }
  });
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

template <class T>
RowLoss loss_of(const CrossEntropyParams& p, const T* z, int64_t classes, int64_t label, const SoftmaxRow& row) {
  const float log_total = row.total == 0.f ? 0.f : std::log(row.total);
  const float of_label = (logit(z + label) - row.top) - log_total;
  switch (p.kind) {
    case CrossEntropyKind::gce:
      return {-std::expm1(p.q * of_label) / p.q, std::exp(p.q * of_label)};
    case CrossEntropyKind::symmetric:
      return {-of_label - kReverse * std::expm1(of_label), 1.f + kReverse * std::exp(of_label)};
    case CrossEntropyKind::plain:
      break;
  }
  if (p.label_smoothing == 0.f) return {-of_label, 1.f};
  const float mean = sum_of_distances(z, classes, row.top) / static_cast<float>(classes) - log_total;
  return {-(1.f - p.label_smoothing) * of_label - p.label_smoothing * mean, 1.f};
}

// grad_c = scale (p_c − (1 − ε) [c = label] − ε / C); z may be grad.
template <class T, bool kSmooth, bool kStream>
void pull_row(const T* z, T* grad, int64_t classes, int64_t label, const SoftmaxRow& row, float scale,
              float smoothing) {
  const float shift = scale * smoothing / static_cast<float>(classes);
  const vf top = set1(row.top), factor = set1(kLog2e), share = set1(scale * row.inverse());
  const auto pulled = [&](vf x) __attribute__((always_inline)) {
    const vf g = exp_scaled(x - top, factor) * share;
    if constexpr (kSmooth) return select(x == set1(-kInfinity), zero(), g - set1(shift));
    return g;
  };
  const float of_label = logit(z + label);
  int64_t c = 0;
  for (; c + 4 * VW <= classes; c += 4 * VW) {
    vf x[4];
    MMK_UNROLL for (int j = 0; j < 4; ++j) x[j] = pulled(load_as_float(z + c + j * VW));
    write_pair<kStream>(grad + c, x[0], x[1]);
    write_pair<kStream>(grad + c + 2 * VW, x[2], x[3]);
  }
  for (; c < classes; c += VW) store_from_float(grad + c, pulled(load_as_float(z + c, classes - c)), classes - c);
  const float taken = of_label == -kInfinity ? 0.f : scale * (1.f - smoothing);
  store_from_float(grad + label, pulled(set1(of_label)) - set1(taken), 1);
}

template <class T>
void pull_row(const CrossEntropyParams& p, const T* z, T* grad, int64_t classes, int64_t label, const SoftmaxRow& row,
              float scale) {
  const float smoothing = p.label_smoothing;
  const bool stream = p.stream && reinterpret_cast<uintptr_t>(grad) % sizeof(vf) == 0;
  if (smoothing != 0.f) {
    stream ? pull_row<T, true, true>(z, grad, classes, label, row, scale, smoothing)
           : pull_row<T, true, false>(z, grad, classes, label, row, scale, smoothing);
  } else {
    stream ? pull_row<T, false, true>(z, grad, classes, label, row, scale, smoothing)
           : pull_row<T, false, false>(z, grad, classes, label, row, scale, smoothing);
  }
}

// f(pointer of the element type, modality, row) for all rows of all modalities.
template <class Function>
void for_each_row(const CrossEntropyParams& p, Function f) {
  int64_t classes = 1;
  for (int64_t i = 0; i < p.modalities; ++i) classes = max(classes, p.items[i].classes);
  const int64_t grain = max(1, kElementsPerTask / classes);
  for_each_claim(p.workers, p.modalities * p.rows, grain, [&](int, int64_t first, int64_t last) {
    with_element_type(p.dtype, p.items[0].logits, [&](const auto* type) {
      for (int64_t x = first; x < last; ++x) f(type, p.items[x / p.rows], x % p.rows);
    });
    if (p.stream) stream_fence();
  });
}

template <class T>
void loss_of_row(const CrossEntropyParams& p, const CrossEntropyRows& item, int64_t r) {
  T* const grad = item.grad == nullptr ? nullptr : static_cast<T*>(item.grad) + r * item.grad_stride;
  SoftmaxRow row{0.f, 1.f};
  item.losses[r] = 0.f;
  if (p.is_valid(item, r)) {
    const T* const z = static_cast<const T*>(item.logits) + r * item.stride;
    const int64_t readable = (p.rows - 1 - r) * item.stride + item.classes;  // up to the end of the last row
    row = item.classes <= VW ? softmax_of_few(z, item.classes, readable) : softmax_row(z, item.classes, 1.f);
    const RowLoss made = loss_of(p, z, item.classes, item.labels[r], row);
    item.losses[r] = made.loss;
    if (grad != nullptr) pull_row(p, z, grad, item.classes, item.labels[r], row, item.scale * made.scale);
  } else if (grad != nullptr) {
    std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(item.classes) * sizeof(T));
  }
  if (item.statistics != nullptr) {
    item.statistics[2 * r] = row.top;
    item.statistics[2 * r + 1] = row.total;
  }
}

template <class T>
void gradient_of_row(const CrossEntropyParams& p, const CrossEntropyRows& item, int64_t r) {
  if (item.grad == nullptr) return;
  T* const grad = static_cast<T*>(item.grad) + r * item.grad_stride;
  if (!p.is_valid(item, r)) {
    std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(item.classes) * sizeof(T));
    return;
  }
  const T* const z = static_cast<const T*>(item.logits) + r * item.stride;
  const int64_t label = item.labels[r];
  const SoftmaxRow row{item.statistics[2 * r], item.statistics[2 * r + 1]};
  float scale = item.scale;
  if (p.kind != CrossEntropyKind::plain) scale *= loss_of(p, z, item.classes, label, row).scale;
  pull_row(p, z, grad, item.classes, label, row, scale);
}

}  // namespace

void cross_entropy_forward(const CrossEntropyParams& p) {
  for_each_row(p, [&](const auto* type, const CrossEntropyRows& item, int64_t row) {
    loss_of_row<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(p, item, row);
  });
}

void cross_entropy_backward(const CrossEntropyParams& p) {
  for_each_row(p, [&](const auto* type, const CrossEntropyRows& item, int64_t row) {
    gradient_of_row<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(p, item, row);
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
