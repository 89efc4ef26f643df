// A row of the outer product ⊗_i [1; x_i] in pieces: which factors entry k is made of, and runs of entries as vectors,
// forward and backward.
#pragma once

#include "csrc/cpu/products.h"
#include "csrc/tensor_fusion_linear/tensor_fusion_linear.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// Rows of all modalities as floats side by side, each with its leading 1, or their gradients in the same places. A
// modality has a vector of slack.
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
      pack_rows_as_float(p_->dtype, static_cast<const char*>(m.data) + first * m.stride * size, m.stride, rows, m.width,
                         to + 1, stride_);
    }
  }
  void clear(int64_t rows) const { std::memset(data_, 0, static_cast<size_t>(rows * stride_) * sizeof(float)); }
  float* of(int64_t row, int64_t modality) const { return data_ + row * stride_ + offsets_[modality]; }

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

// Whether so many rows leave too many lanes of a panel idle: the entries are then in the lanes.
MMK_INLINE bool are_few(int64_t rows) { return 2 * rows <= 3 * VW; }

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

// Adds to the gradients of one row's factors what `grad`, of `count` entries from where `at` started, brings them. A
// run of the faster modalities that is complete passes on to the slower one before them: until then up[i], of modality
// i, sums the gradient of the product of the factors before i.
inline void contract_row(const Factors& x, const Factors& gradients, int64_t row, Position& at, int64_t count,
                         const float* grad, float* up) {
  at.rewind();
  const int64_t last = at.last(), size = at.size(last);
  const auto prefix = [&](int64_t modality) {
    float product = 1.f;
    for (int64_t i = 0; i < modality; ++i) product *= x.of(row, i)[at[i]];
    return product;
  };
  for (int64_t done = 0; done < count;) {
    const int64_t j = at[last], run = min(size - j, count - done);
    const float* factor = x.of(row, last) + j;
    float* gradient = gradients.of(row, last) + j;
    const vf before = set1(prefix(last));
    vf total = zero();
    int64_t c = 0;
    for (; c + VW <= run; c += VW) {
      const vf g = load(grad + done + c);
      total = fma(g, load(factor + c), total);
      store(gradient + c, fma(g, before, load(gradient + c)));
    }
    if (c < run) {
      const vf g = load_partial(grad + done + c, run - c);
      total = fma(g, load_partial(factor + c, run - c), total);
      store(gradient + c, fma(g, before, load(gradient + c)));
    }
    up[last] += sum(total);
    if (j + run == size) {
      for (int64_t i = last; i > 0; --i) {
        const float complete = up[i];
        up[i] = 0.f;
        gradients.of(row, i - 1)[at[i - 1]] += complete * prefix(i - 1);
        up[i - 1] += complete * x.of(row, i - 1)[at[i - 1]];
        if (at[i - 1] + 1 < at.size(i - 1)) break;
      }
    }
    done += run;
    at.advance(run);
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
