// A row of the outer product ⊗_i [1; x_i] in pieces: which factors entry k is made of, and runs of entries as vectors.
#pragma once

#include "csrc/cpu/products.h"
#include "csrc/tensor_fusion_linear/tensor_fusion_linear.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// Rows of all modalities as floats side by side, each with its leading 1. The last modality has a vector of slack.
class Factors {
 public:
  Factors(const TensorFusionParams& p, Carver& memory, int64_t rows) : p_(&p) {
    offsets_ = reinterpret_cast<int64_t*>(memory.take(2 * p.count));
    for (int64_t i = 0; i < p.count; ++i) {
      if (offsets_ != nullptr) offsets_[i] = stride_;
      stride_ += round_up(p.modalities[i].width + 1, VW) + VW;
    }
    stride_ = spread_stride(stride_);
    data_ = memory.take(rows * stride_);
  }

  void fill(int64_t first, int64_t rows) const {
    for (int64_t i = 0; i < p_->count; ++i) {
      const FusedModality& m = p_->modalities[i];
      const int64_t size = element_size(p_->dtype);
      float* to = data_ + offsets_[i];
      for (int64_t b = 0; b < rows; ++b) to[b * stride_] = 1.f;
      copy_rows(p_->dtype, static_cast<const char*>(m.data) + first * m.stride * size, m.stride, rows, m.width, to + 1,
                stride_);
    }
  }
  const float* of(int64_t row, int64_t modality) const { return data_ + row * stride_ + offsets_[modality]; }

 private:
  const TensorFusionParams* p_;
  int64_t* offsets_;
  int64_t stride_ = 0;
  float* data_;
};

// Where entry k is: its index into the last modality and into each other one, the first modality's slowest.
class Position {
 public:
  Position(const TensorFusionParams& p, Carver& memory)
      : p_(&p),
        start_(reinterpret_cast<int64_t*>(memory.take(2 * p.count))),
        digits_(reinterpret_cast<int64_t*>(memory.take(2 * p.count))) {}

  void start_at(int64_t k) {
    for (int64_t i = last(); i >= 0; --i) {
      start_[i] = k % size(i);
      k /= size(i);
    }
    rewind();
  }
  void rewind() {
    for (int64_t i = 0; i < p_->count; ++i) digits_[i] = start_[i];
  }
  int64_t size(int64_t modality) const { return p_->modalities[modality].width + 1; }
  int64_t operator[](int64_t modality) const { return digits_[modality]; }
  int64_t last() const { return p_->count - 1; }

  // Past `count` entries, which end at or before the end of a run of the last modality.
  // Returns the slowest modality whose index changed.
  int64_t advance(int64_t count) {
    int64_t i = last();
    digits_[i] += count;
    while (i > 0 && digits_[i] == size(i)) {
      digits_[i] = 0;
      ++digits_[--i];
    }
    return i;
  }

 private:
  const TensorFusionParams* p_;
  int64_t *start_, *digits_;
};

// `count` entries of one row's outer product from where `at` started. Up to a vector beyond them is overwritten.
inline void expand_row(const Factors& x, int64_t row, Position& at, int64_t count, float* out) {
  at.rewind();
  const int64_t last = at.last(), size = at.size(last);
  const float* x_last = x.of(row, last);
  const float* x_inner = last > 0 ? x.of(row, last - 1) : nullptr;
  float outer = 1.f;  // the product over all modalities but the last two
  const auto set_outer = [&] {
    outer = 1.f;
    for (int64_t i = 0; i + 1 < last; ++i) outer *= x.of(row, i)[at[i]];
  };
  set_outer();
  for (int64_t done = 0; done < count;) {
    const int64_t j = at[last], run = min(size - j, count - done);
    const vf prefix = set1(last > 0 ? outer * x_inner[at[last - 1]] : 1.f);
    for (int64_t c = 0; c < run; c += VW) store(out + done + c, prefix * load(x_last + j + c));
    done += run;
    if (at.advance(run) + 1 < last) set_outer();
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
