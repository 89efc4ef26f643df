//   h_i = tanh(W_i x_i + b_i),  w = softmax over present i of (W_z [x₁; …; x_M] + b_z),  y = Σ_i w_i ∘ h_i
//
//   dh_i = dy ∘ w_i ∘ (1 - h_i²),  dlogit_i = dy ∘ w_i ∘ (h_i - y);  sigmoid form: dlogit = dy ∘ w₁ ∘ w₂ ∘ (h₁ - h₂)
//
// Tiling     all values and gates of a block of rows are the columns of one product (csrc/concat/forward.h), whose
//            float tile, of at most 256 KB, the epilogue turns into y; of few rows, the whole product. The backward is
//            one product likewise: the gradients of values and gates side by side.
// Precision  float32 beside the products.
// Limits     any widths and number of modalities; absent rows are neither read nor multiplied.
#include "csrc/concat/backward.h"
#include "csrc/concat/forward.h"
#include "csrc/cpu/activation.h"
#include "csrc/gated_fusion/gated_fusion.h"

namespace mmk {
namespace MMK_ISA {
namespace {

MMK_INLINE vf load_some(const float* p, int64_t n) { return n >= VW ? load(p) : load_partial(p, n); }
MMK_INLINE void store_some(float* p, vf x, int64_t n) {
  if (n >= VW) {
    store(p, x);
  } else {
    store_partial(p, x, n);
  }
}

class GateEpilogue {
 public:
  static int64_t floats(const GatedFusionParams& p) { return round_up(p.sources.features + VW, 16); }

  // `biases` of all columns of z.
  GateEpilogue(const GatedFusionParams& p, float* biases) : p_(p), biases_(biases) {
    std::memset(biases, 0, sizeof(float) * static_cast<size_t>(floats(p)));
    const int64_t values = p.modalities * p.features;
    const auto put = [&](const void* from, int64_t count, float* to) {
      if (from == nullptr) return;
      with_element_type(p.sources.dtype, from, [&](const auto* x) {
        for (int64_t c = 0; c < count; c += VW) store_some(to + c, load_as_float(x + c, count - c), count - c);
      });
    };
    for (int64_t i = 0; p.value_biases != nullptr && i < p.modalities; ++i) {
      put(p.value_biases[i], p.features, biases + i * p.features);
    }
    put(p.gate_bias, p.sources.features - values, biases + values);
  }

  void operator()(int64_t first, int64_t rows, int64_t, int64_t, float* z, int64_t stride) const {
    with_element_type(p_.sources.dtype, p_.out, [&](auto* out) {
      for (int64_t i = 0; i < rows; ++i) finish_row(first + i, z + i * stride, out + (first + i) * p_.features);
    });
  }

 private:
  bool is_present(int64_t row, int64_t i) const {
    return p_.present == nullptr || p_.present[row * p_.present_stride + i] != 0;
  }

  template <class T>
  void finish_row(int64_t row, float* z, T* out) const {
    const int64_t count = p_.modalities, features = p_.features, all = count * features;
    T* const values = p_.values == nullptr ? nullptr : static_cast<T*>(p_.values) + row * all;
    T* const weights = p_.weights == nullptr ? nullptr : static_cast<T*>(p_.weights) + row * all;
    for (int64_t c = 0; c < features; c += VW) {
      const int64_t n = features - c;
      const auto column = [&](int64_t at) { return load_some(z + at + c, n) + load_some(biases_ + at + c, n); };
      vf y = zero();
      const auto add = [&](int64_t i, vf weight) {
        const vf h = tanh(column(i * features));
        if (values != nullptr) store_from_float(values + i * features + c, h, n);
        if (weights != nullptr) store_from_float(weights + i * features + c, weight, n);
        if (is_present(row, i)) y = fma(weight, h, y);
      };
      if (p_.sigmoid) {
        const bool both = is_present(row, 0) && is_present(row, 1);
        const vf gate = column(all);
        for (int64_t i = 0; i < 2; ++i) {
          add(i, !is_present(row, i) ? zero() : both ? sigmoid(i == 0 ? gate : -gate) : set1(1.f));
        }
      } else {
        vf top = set1(-kInfinity), total = zero();
        for (int64_t i = 0; i < count; ++i) {
          if (is_present(row, i)) top = max(top, column(all + i * features));
        }
        for (int64_t i = 0; i < count; ++i) {
          if (is_present(row, i)) total = total + exp_of(column(all + i * features) - top);
        }
        for (int64_t i = 0; i < count; ++i) {
          add(i, is_present(row, i) ? exp_of(column(all + i * features) - top) / total : zero());
        }
      }
      store_from_float(out + c, y, n);
    }
  }

  const GatedFusionParams& p_;
  float* biases_;
};

template <bool kPairs>
class GateGradient {
 public:
  static constexpr int kSums = 1;
  static constexpr bool kFinishesRows = false, kFinishesWeights = false;

  explicit GateGradient(const GatedFusionParams& p) : p_(p) {}

  void make(int64_t first, int64_t rows, float* dz, int64_t stride, float* sums) const {
    with_element_type(p_.sources.dtype, p_.values, [&](const auto* values) {
      using T = std::remove_pointer_t<decltype(values)>;
      const int64_t all = p_.modalities * p_.features;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = first + i;
        make_row(reinterpret_cast<T*>(row_address(p_.grad_out, p_.sources.dtype, row)), values + row * all,
                 static_cast<T*>(p_.weights) + row * all, dz + i * stride, stride);
        for (int64_t c = 0; c < p_.sources.features; c += VW)
          store(sums + c, load(sums + c) + load(dz + i * stride + c));
      }
    });
  }

  void columns(int64_t s, int64_t first, int64_t count, int64_t column, int64_t width, float* panels) const {
    pack_source_columns<kPairs>(p_.sources.items[s], p_.sources.dtype, first, count, column, width, panels);
  }

  void finish_sums(const float* sums) const {
    const auto put = [&](void* to, const float* from, int64_t count) {
      if (to == nullptr) return;
      with_element_type(p_.sources.dtype, to, [&](auto* x) {
        for (int64_t c = 0; c < count; c += VW) store_from_float(x + c, load_some(from + c, count - c), count - c);
      });
    };
    for (int64_t i = 0; p_.grad_value_biases != nullptr && i < p_.modalities; ++i) {
      put(p_.grad_value_biases[i], sums + i * p_.features, p_.features);
    }
    const int64_t values = p_.modalities * p_.features;
    put(p_.grad_gate_bias, sums + values, p_.sources.features - values);
  }

 private:
  template <class T>
  void make_row(const T* grad, const T* values, const T* weights, float* dz, int64_t stride) const {
    const int64_t count = p_.modalities, features = p_.features, all = count * features;
    for (int64_t c = p_.sources.features / VW * VW; c < stride; ++c) dz[c] = 0.f;
    for (int64_t c = 0; c < features; c += VW) {
      const int64_t n = features - c;
      const auto at = [&](const T* of, int64_t i) { return load_as_float(of + i * features + c, n); };
      const vf dy = load_as_float(grad + c, n);
      vf y = zero();
      for (int64_t i = 0; i < count; ++i) {
        const vf h = at(values, i), w = at(weights, i);
        y = fma(w, h, y);
        store_some(dz + i * features + c, dy * w * (set1(1.f) - h * h), n);
      }
      if (p_.sigmoid) {
        store_some(dz + all + c, dy * at(weights, 0) * at(weights, 1) * (at(values, 0) - at(values, 1)), n);
      } else {
        for (int64_t i = 0; i < count; ++i) {
          store_some(dz + all + i * features + c, dy * at(weights, i) * (at(values, i) - y), n);
        }
      }
    }
  }

  const GatedFusionParams& p_;
};

template <bool kPairs>
void forward(const GatedFusionParams& p) {
  Scratch biases(GateEpilogue::floats(p));
  const GateEpilogue epilogue(p, biases.data());
  if (are_few_rows(p.sources)) {
    const int64_t columns = round_up(p.sources.features, VW);
    const Scratch z(p.sources.rows * columns);
    multiply_few_rows<kPairs>(
        p.sources, p.workers, PlainLoader{p.sources},
        [&](int64_t first, int64_t rows, int64_t column, int64_t count, const float* tile, int64_t stride) {
          for (int64_t i = 0; i < rows; ++i) {
            std::memcpy(z.data() + (first + i) * columns + column, tile + i * stride,
                        sizeof(float) * static_cast<size_t>(count));
          }
        });
    for_each_claim(p.workers, p.sources.rows, 4, [&](int, int64_t begin, int64_t end) {
      epilogue(begin, end - begin, 0, p.sources.features, z.data() + begin * columns, columns);
    });
    return;
  }
  constexpr int64_t kTileFloats = 64 << 10;
  const int64_t rows =
      min(kBlockRows, max(1, kTileFloats / round_up(p.sources.features, VW) / kFeatureRows) * kFeatureRows);
  multiply_rows_broadcast<kPairs>(p.sources, p.workers, PlainLoader{p.sources}, rows, p.sources.features, epilogue);
}

template <bool kPairs>
void backward(const GatedFusionParams& p) {
  GateGradient<kPairs> gradient(p);
  ConcatBackward<kPairs, GateGradient<kPairs>>(p.sources, p.workers, gradient).run();
}

}  // namespace

void gated_fusion_forward(const GatedFusionParams& p) {
  with_pairs(p.sources.dtype, p.workers.tiles, is_worth_tiles(p.sources), [&](auto pairs) { forward<pairs>(p); });
}

void gated_fusion_backward(const GatedFusionParams& p) {
  // Pairs of features of dz must not straddle two terms.
  if constexpr (kBf16Dot) {
    const bool in_pairs = p.workers.tiles == TileUnit::none || is_worth_tiles(p.sources);
    if (p.sources.dtype == Dtype::bf16 && p.features % 2 == 0 && in_pairs) return backward<true>(p);
  }
  backward<false>(p);
}

}  // namespace MMK_ISA
}  // namespace mmk
