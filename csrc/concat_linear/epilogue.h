// What becomes of a tile of z: bias, activation, gate, residual, and the cast.
#pragma once

#include "csrc/concat/product.h"
#include "csrc/concat_linear/concat_linear.h"
#include "csrc/cpu/activation.h"
#include "csrc/cpu/schedule.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// A vector of features as floats, padded with zeros to a multiple of VW; null stays null.
inline const float* floats_of(Dtype dtype, const void* data, int64_t stride, int64_t count, float* memory) {
  if (data == nullptr) return nullptr;
  with_element_type(dtype, data, [&](const auto* p) {
    for (int64_t i = 0; i < count; i += VW) {
      store(memory + i, stride == 0 ? set1(sum(load_as_float(p, 1))) : load_as_float(p + i, count - i));
    }
  });
  return memory;
}

class LinearEpilogue {
 public:
  static int64_t floats(const ConcatLinearParams& p) { return 2 * round_up(p.sources.features, 16); }

  LinearEpilogue(const ConcatLinearParams& p, float* memory) : p_(p) {
    bias_ = floats_of(p.sources.dtype, p.bias, 1, p.sources.features, memory);
    float* gates = memory + round_up(p.sources.features, 16);
    if (floats_of(p.sources.dtype, p.gate, p.gate_stride, p.sources.features, gates) != nullptr) {
      for (int64_t i = 0; i < p.sources.features; i += VW) store(gates + i, tanh(load(gates + i)));
      gate_ = gates;
    }
  }

  const float* bias() const { return bias_; }  // padded with zeros
  const float* gate() const { return gate_; }  // tanh(gate), padded with zeros

  void operator()(int64_t first, int64_t rows, int64_t column, int64_t columns, const float* z, int64_t stride) const {
    with_activation(p_.activation, [&](auto activation) {
      with_element_type(p_.sources.dtype, p_.out,
                        [&](auto* out) { finish<decltype(activation)>(first, rows, column, columns, z, stride, out); });
    });
  }

 private:
  template <class Act, class T>
  void finish(int64_t first, int64_t rows, int64_t column, int64_t columns, const float* z, int64_t stride,
              T* out) const {
    const int64_t features = p_.sources.features;
    const auto finish_row = [&](int64_t i, const T* residual) {
      const int64_t at = (first + i) * features + column;
      T* const saved = p_.preactivation == nullptr ? nullptr : static_cast<T*>(p_.preactivation) + at;
      for (int64_t c = 0; c < columns; c += VW) {
        const int64_t n = columns - c;
        vf x = load(z + i * stride + c);
        if (bias_ != nullptr) x = x + load(bias_ + column + c);
        if (saved != nullptr) store_from_float(saved + c, x, n);
        x = Act::value(x);
        if (gate_ != nullptr) x = x * load(gate_ + column + c);
        if (residual != nullptr) x = x + load_as_float(residual + c, n);
        store_from_float(out + at + c, x, n);
      }
    };
    if (p_.residual.data == nullptr) {
      for (int64_t i = 0; i < rows; ++i) finish_row(i, nullptr);
    } else {
      for_row_addresses(p_.residual, p_.sources.dtype, first, rows,
                        [&](int64_t i, const char* row) { finish_row(i, reinterpret_cast<const T*>(row) + column); });
    }
  }

  const ConcatLinearParams& p_;
  const float *bias_ = nullptr, *gate_ = nullptr;  // the gate's tanh
};

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
