//   z_ij = scale · x_i·y_j + bias,   loss_i = Σ_j softplus(z_ij), of a pair softplus(−z_ij) = softplus(z_ij) − z_ij
//   dloss/dz_ij = σ(z_ij), of a pair σ(z_ij) − 1
//
// Tiling     a row of the tile at a time, once: the products are read, and replaced by the gradients.
// Threads    the caller's: a tile belongs to one.
// Precision  float32; the sums of a row in lanes, then float64.
// Limits     any number of columns.
#include "csrc/logits/log.h"
#include "csrc/logits/softmax.h"
#include "csrc/sigmoid_contrastive_loss/sigmoid_contrastive_loss.h"

namespace mmk {
namespace MMK_ISA {
namespace {

struct Sigmoid {
  vf of_z, softplus;
  MMK_INLINE explicit Sigmoid(vf z) {
    const vf e = exp_scaled(min(z, -z), set1(kLog2e));  // e^−|z|
    const vf inverse = set1(1.f) / (set1(1.f) + e);
    of_z = select(z < zero(), e * inverse, inverse);
    softplus = max(z, zero()) + log1p(e);
  }
};

template <class T>
void row_of_pairs(const SigmoidTile& p, T* products, int64_t row) {
  const PairTile& t = p.pairs;
  const vf scale = set1(t.scale), bias = set1(p.bias);
  const int64_t target = t.target(row);
  const bool has_pair = target >= 0 && target < t.columns;
  float of_pair = 0.f;  // its product
  if (has_pair) of_pair = sum(load_as_float(products + target, 1));
  vf losses = zero(), with_products = zero(), gradients = zero();
  for (int64_t c = 0; c < t.columns; c += VW) {
    const int64_t n = t.columns - c;
    const vf x = load_as_float(products + c, n);
    const Sigmoid sigmoid(fma(x, scale, bias));
    losses = losses + filled_from(n, sigmoid.softplus, 0.f);
    if (!p.with_gradients) continue;
    const vf gradient = filled_from(n, sigmoid.of_z, 0.f);
    with_products = fma(gradient, x, with_products);
    gradients = gradients + gradient;
    store_from_float(products + c, gradient, n);
  }
  const int64_t at = t.first_row + row;
  p.losses[at] = sum(losses);
  if (has_pair) p.losses[at] -= std::fma(static_cast<double>(t.scale), of_pair, p.bias);
  if (!p.with_gradients) return;
  p.of_scale[at] = sum(with_products);
  p.of_bias[at] = sum(gradients);
  if (has_pair) {
    const vf z = set1(std::fma(t.scale, of_pair, p.bias));
    store_from_float(products + target, zero() - Sigmoid(-z).of_z, 1);
    p.of_scale[at] -= of_pair;
    p.of_bias[at] -= 1.;
  }
  std::memset(static_cast<void*>(products + t.columns), 0, sizeof(T) * static_cast<size_t>(t.end_column - t.columns));
}

}  // namespace

void sigmoid_pairs(const SigmoidTile& p) {
  const PairTile& t = p.pairs;
  with_element_type(t.dtype, t.products, [&](auto* products) {
    for (int64_t row = 0; row < t.rows; ++row) row_of_pairs(p, products + row * t.stride, row);
    for (int64_t row = t.rows; p.with_gradients && row < t.end_row; ++row) {
      std::memset(static_cast<void*>(products + row * t.stride), 0,
                  sizeof(*products) * static_cast<size_t>(t.end_column));
    }
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
