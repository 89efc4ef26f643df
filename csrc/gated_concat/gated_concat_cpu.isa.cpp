//   g = σ([x; y] Wᵀ + b),  out = [g ∘ x; y; s],  s = Σ_k g_k x_k
//
// With e = dout[: Kx] + ds, the gradient of g ∘ x:
//
//   dz = (e ∘ x) ∘ g ∘ (1 - g), summed over k where one gate serves all,  dx = e ∘ g + dz W_x,  dy = dout[Kx :] + dz
//   W_y
//
// Tiling     the gates are a product over the two sources (csrc/concat/forward.h); a second pass over the rows writes
//            them out beside y. The backward is that of a linear layer, its dx finished on the tile.
// Precision  float32 beside the products; g is kept in the dtype.
// Limits     any widths.
#include "csrc/concat/backward.h"
#include "csrc/concat/forward.h"
#include "csrc/cpu/activation.h"
#include "csrc/gated_concat/gated_concat.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <class T>
const T* row_of(const RowView& view, int64_t row) {
  const int64_t element = row / view.inner * view.outer_stride + row % view.inner * view.inner_stride;
  return static_cast<const T*>(view.data) + element;
}

// Σ f(k, elements left) over a row's vectors, in runs, so that a long sum keeps its digits.
template <class Function>
MMK_INLINE vf sum_in_runs(int64_t width, Function f) {
  constexpr int64_t kRun = 32 * VW;
  vf total = zero();
  for (int64_t start = 0; start < width; start += kRun) {
    vf part = zero();
    for (int64_t k = start; k < min(start + kRun, width); k += VW) part = part + f(k, width - k);
    total = total + part;
  }
  return total;
}

// [g ∘ x; y; s] of one row.
template <class T>
void write_row(const GatedConcatParams& p, int64_t row) {
  const int64_t gates = p.sources.features, width = p.x_width + p.y_width + 1;
  const T *x = row_of<T>(p.x, row), *y = row_of<T>(p.y, row), *g = static_cast<const T*>(p.gate) + row * gates;
  T* out = static_cast<T*>(p.out) + row * width;
  const vf shared = set1(gates == 1 ? sum(load_as_float(g, 1)) : 0.f);
  const vf total = sum_in_runs(p.x_width, [&](int64_t k, int64_t n) {
    const vf gated = load_as_float(x + k, n) * (gates == 1 ? shared : load_as_float(g + k, n));
    store_from_float(out + k, gated, n);
    return gated;
  });
  if (p.y_width > 0) std::memcpy(out + p.x_width, y, static_cast<size_t>(p.y_width) * sizeof(T));
  store_from_float(out + width - 1, set1(sum(total)), 1);
}

template <bool kPairs>
void forward(const GatedConcatParams& p) {
  Scratch bias(round_up(p.sources.features + VW, 16));
  std::memset(bias.data(), 0, sizeof(float) * static_cast<size_t>(p.sources.features + VW));
  if (p.bias != nullptr) {
    with_element_type(p.sources.dtype, p.bias, [&](const auto* b) {
      for (int64_t c = 0; c < p.sources.features; c += VW) {
        store(bias.data() + c, load_as_float(b + c, p.sources.features - c));
      }
    });
  }
  const auto write_gates = [&](int64_t first, int64_t rows, int64_t column, int64_t columns, const float* z,
                               int64_t stride) {
    with_element_type(p.sources.dtype, p.gate, [&](auto* gate) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < columns; c += VW) {
          const vf logit = load(z + i * stride + c) + load(bias.data() + column + c);
          store_from_float(gate + (first + i) * p.sources.features + column + c, sigmoid(logit), columns - c);
        }
      }
    });
  };
  multiply_concatenation<kPairs>(p.sources, p.workers, PlainLoader{p.sources}, kBlockRows, write_gates);
  for_each_claim(p.workers, p.sources.rows, 64, [&](int, int64_t begin, int64_t end) {
    with_element_type(p.sources.dtype, p.out, [&](auto* out) {
      for (int64_t row = begin; row < end; ++row) write_row<std::remove_pointer_t<decltype(out)>>(p, row);
    });
  });
}

template <bool kPairs>
class GatedConcatGradient {
 public:
  static constexpr int kSums = 1;
  static constexpr bool kFinishesRows = true, kFinishesWeights = false;

  explicit GatedConcatGradient(const GatedConcatParams& p) : p_(p) {}

  void make(int64_t first, int64_t rows, float* dz, int64_t stride, float* sums) const {
    with_element_type(p_.sources.dtype, p_.gate, [&](const auto* gate) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(gate)>>;
      for (int64_t i = 0; i < rows; ++i) {
        make_row<T>(first + i, dz + i * stride);
        for (int64_t c = 0; c < p_.sources.features; c += VW)
          store(sums + c, load(sums + c) + load(dz + i * stride + c));
      }
    });
  }

  template <class T>
  void finish_rows(int64_t s, int64_t first, int64_t rows, const float* dx, int64_t stride, T* out,
                   int64_t out_stride) const {
    const T* gate = static_cast<const T*>(p_.gate);
    for (int64_t i = 0; i < rows; ++i, dx += stride, out += out_stride) {
      const int64_t row = first + i;
      const T* grad = row_of<T>(p_.grad_out, row);
      if (s == p_.y_item) {
        for (int64_t k = 0; k < p_.y_width; k += VW) {
          const int64_t n = p_.y_width - k;
          store_from_float(out + k, load(dx + k) + load_as_float(grad + p_.x_width + k, n), n);
        }
        continue;
      }
      const vf of_sum = set1(sum(load_as_float(grad + p_.x_width + p_.y_width, 1)));
      for (int64_t k = 0; k < p_.x_width; k += VW) {
        const int64_t n = p_.x_width - k;
        const vf e = load_as_float(grad + k, n) + of_sum;
        store_from_float(out + k, fma(e, gates(gate, row, k), load(dx + k)), n);
      }
    }
  }

  void columns(int64_t s, int64_t first, int64_t count, int64_t column, int64_t width, float* panels) const {
    pack_source_columns<kPairs>(p_.sources.items[s], p_.sources.dtype, first, count, column, width, panels);
  }

  void finish_sums(const float* sums) const {
    if (p_.grad_bias == nullptr) return;
    with_element_type(p_.sources.dtype, p_.grad_bias, [&](auto* out) {
      for (int64_t c = 0; c < p_.sources.features; c += VW) {
        store_from_float(out + c, load(sums + c), p_.sources.features - c);
      }
    });
  }

 private:
  // Gates of the features from k on.
  template <class T>
  vf gates(const T* gate, int64_t row, int64_t k) const {
    const int64_t count = p_.sources.features;
    return count == 1 && p_.x_width != 1 ? set1(sum(load_as_float(gate + row, 1)))
                                         : load_as_float(gate + row * count + k, count - k);
  }

  template <class T>
  void make_row(int64_t row, float* dz) const {
    const T *grad = row_of<T>(p_.grad_out, row), *x = row_of<T>(p_.x, row);
    const T* gate = static_cast<const T*>(p_.gate);
    const vf of_sum = set1(sum(load_as_float(grad + p_.x_width + p_.y_width, 1)));
    const bool shared = p_.sources.features == 1;
    const vf total = sum_in_runs(p_.x_width, [&](int64_t k, int64_t n) {
      const vf g = gates(gate, row, k);
      const vf d = (load_as_float(grad + k, n) + of_sum) * load_as_float(x + k, n) * g * (set1(1.f) - g);
      if (!shared) store(dz + k, d);
      return d;
    });
    if (shared) {
      store(dz, zero());
      dz[0] = sum(total);
    }
  }

  const GatedConcatParams& p_;
};

template <bool kPairs>
void backward(const GatedConcatParams& p) {
  GatedConcatGradient<kPairs> gradient(p);
  ConcatBackward<kPairs, GatedConcatGradient<kPairs>>(p.sources, p.workers, gradient).run();
}

}  // namespace

void gated_concat_forward(const GatedConcatParams& p) {
  with_pairs(p.sources.dtype, p.workers.tiles, is_worth_tiles(p.sources), [&](auto pairs) { forward<pairs>(p); });
}

void gated_concat_backward(const GatedConcatParams& p) {
  with_pairs(p.sources.dtype, p.workers.tiles, is_worth_tiles(p.sources), [&](auto pairs) { backward<pairs>(p); });
}

}  // namespace MMK_ISA
}  // namespace mmk
