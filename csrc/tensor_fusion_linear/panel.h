// A few vectors of rows with the rows in the lanes, and how rows are cut into such panels.
#pragma once

#include "csrc/tensor_fusion_linear/outer_product.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// Blocks of rows, each of panels; smaller blocks where there are fewer rows than workers could use.
struct PanelPlan {
  int64_t panels, vectors, lanes, block;  // panels of a block, vectors and lanes of a panel, rows of a block

  explicit PanelPlan(const TensorFusionParams& p, int64_t workers) {
    constexpr int64_t kMostLanes = 128;
    const int64_t block_vectors = max(1, min(kMostLanes / VW, ceil_div(ceil_div(p.batch, VW), workers)));
    panels = ceil_div(block_vectors, kFeatureVectors);
    vectors = ceil_div(block_vectors, panels);
    lanes = vectors * VW;
    block = panels * lanes;
  }
};

// [entries][lanes] of every modality's factor [1; x]; for modality i, [lanes] the prefix: the product of the factors
// before it; and, where gradients are formed, the same of those, and the output's gradient [units of N][lanes].
class Panel {
 public:
  Panel(const TensorFusionParams& p, Carver& memory, int64_t lanes, bool with_gradients)
      : p_(&p), lanes_(lanes), with_gradients_(with_gradients) {
    int64_t entries = 0;
    offsets_ = reinterpret_cast<int64_t*>(memory.take(2 * p.count));
    for (int64_t i = 0; i < p.count; ++i) {
      if (offsets_ != nullptr) offsets_[i] = entries * lanes;
      entries += p.modalities[i].width + 1;
    }
    size_ = (with_gradients ? 2 * (entries + p.count) + p.outputs : entries + p.count) * lanes;
    factors_ = memory.take(size_);
    if (factors_ == nullptr) return;
    prefixes_ = factors_ + entries * lanes;
    if (!with_gradients) return;
    gradients_ = prefixes_ + p.count * lanes;
    prefix_gradients_ = gradients_ + entries * lanes;
    grad_out_ = prefix_gradients_ + p.count * lanes;
  }

  float* factor(int64_t modality, int64_t entry) const { return factors_ + offsets_[modality] + entry * lanes_; }
  float* gradient(int64_t modality, int64_t entry) const { return gradients_ + offsets_[modality] + entry * lanes_; }
  float* prefix(int64_t modality) const { return prefixes_ + modality * lanes_; }
  float* prefix_gradient(int64_t modality) const { return prefix_gradients_ + modality * lanes_; }
  const float* grad_out() const { return grad_out_; }

  void fill(int64_t first, int64_t rows) const {
    std::memset(factors_, 0, static_cast<size_t>(size_) * sizeof(float));
    const auto rows_of = [&](const void* data, int64_t stride) {
      return static_cast<const char*>(data) + first * stride * element_size(p_->dtype);
    };
    for (int64_t i = 0; i < p_->count; ++i) {
      const FusedModality& m = p_->modalities[i];
      for (int64_t b = 0; b < lanes_; ++b) factor(i, 0)[b] = 1.f;
      pack_lanes(false, p_->dtype, rows_of(m.data, m.stride), m.stride, rows, m.width, factor(i, 1), lanes_);
    }
    for (int64_t b = 0; b < lanes_; ++b) prefix(0)[b] = 1.f;
    if (!with_gradients_) return;
    with_pairs(p_->dtype, [&](auto pairs) {
      pack_lanes(pairs, p_->dtype, rows_of(p_->grad_out, p_->grad_out_stride), p_->grad_out_stride, rows, p_->outputs,
                 grad_out_, lanes_);
    });
  }

  // `rows` is scratch, [lanes][spread_stride(width)] floats.
  void write_gradients(int64_t first, int64_t count, float* rows) const {
    for (int64_t i = 0; i < p_->count; ++i) {
      const FusedModality& m = p_->modalities[i];
      if (m.grad == nullptr) continue;
      const int64_t stride = spread_stride(m.width);
      pack_lanes(false, Dtype::f32, gradient(i, 1), lanes_, m.width, lanes_, rows, stride);
      write_rows(rows, stride, count, m.width, p_->dtype,
                 static_cast<char*>(m.grad) + first * m.width * element_size(p_->dtype), m.width);
    }
  }

 private:
  const TensorFusionParams* p_;
  int64_t lanes_, size_;
  bool with_gradients_;
  int64_t* offsets_;
  float *factors_, *prefixes_ = nullptr, *gradients_ = nullptr, *prefix_gradients_ = nullptr, *grad_out_ = nullptr;
};

// Prefixes of the modalities from `first` on, where `at` is.
inline void form_prefixes(const Panel& t, const Position& at, int64_t first, int64_t lanes) {
  for (int64_t i = max(first, 1); i <= at.last(); ++i) {
    const float *before = t.prefix(i - 1), *factor = t.factor(i - 1, at[i - 1]);
    for (int64_t b = 0; b < lanes; b += VW) store(t.prefix(i) + b, load(before + b) * load(factor + b));
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
