// The products of x [n, D] with y [N, D], a tile of rows at a time, and of their gradients with x and y: torch's, whose
// rate is the core's. A group of tiles belongs to one thread, which takes them in their order and has sums of its own;
// those of the groups are added in order. Their number depends on n alone, so that any number of threads gives the same
// bits.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "csrc/contrastive/tile.h"
#include "csrc/cpu/torch_tensors.h"

namespace mmk {

// Whether x and y are two sides of pairs with scalars, as a call that nobody has checked may have them.
inline bool are_pairs(const std::vector<c10::IValue>& arguments, size_t scalars) {
  const at::Tensor &x = arguments[0].toTensor(), &y = arguments[1].toTensor();
  if (x.dim() != 2 || y.sizes() != x.sizes() || !x.is_floating_point() || y.scalar_type() != x.scalar_type()) {
    return false;
  }
  for (size_t i = 2; i < 2 + scalars; ++i) {
    const at::Tensor& scalar = arguments[i].toTensor();
    if (scalar.dim() != 0 || scalar.scalar_type() != at::kFloat) return false;
  }
  return true;
}

class PairProducts {
 public:
  PairProducts(const char* op, const at::Tensor& x, const at::Tensor& y, double scale)
      : rows_(x.size(0)),
        columns_(y.size(0)),
        features_(x.size(1)),
        x_(even(x.detach())),
        y_(even(y.detach())),
        dtype_(floating_dtype_of(op, x_)),
        negated_(scale < 0.),
        scale_(std::max(static_cast<float>(std::abs(scale)), std::numeric_limits<float>::min())),
        tile_rows_(columns_ > kWide ? 128 : 256) {}

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  float scale() const { return scale_; }  // above 0: below it, the products are negated
  float sign() const { return negated_ ? -1.f : 1.f; }
  int64_t groups() const { return std::min(kGroups, tiles()); }

  // f(group, tile, its products as a tensor [end_row, end_column]) for every tile.
  template <class Function>
  void for_each_tile(int64_t first_target, Function f) const {
    const int64_t count = groups(), share = count == 0 ? 0 : (tiles() + count - 1) / count;
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below;
      const at::Tensor buffer = at::empty({std::min(tile_rows_, x_.size(0)), y_.size(0)}, x_.options());
      for (int64_t group = begin; group < end; ++group) {
        const int64_t last = std::min((group + 1) * share, tiles());
        for (int64_t at = group * share; at < last; ++at) {
          PairTile tile;
          tile.first_row = at * tile_rows_;
          tile.rows = std::min(tile_rows_, rows_ - tile.first_row);
          tile.columns = columns_;
          tile.end_row = std::min(tile_rows_, x_.size(0) - tile.first_row);
          tile.end_column = y_.size(0);
          at::Tensor products = buffer.narrow(0, 0, tile.end_row);
          at::mm_out(products, rows_of_x(tile), y_.t());
          if (negated_) products.neg_();
          tile.products = products.data_ptr();
          tile.stride = products.stride(0);
          tile.dtype = dtype_;
          tile.first_target = first_target;
          tile.scale = scale_;
          f(group, tile, products);
        }
      }
    });
  }

  // What a thread of for_each_tile adds to: gradients of y, [N, D] float32 for each group, where they are wanted.
  std::vector<at::Tensor> new_sums(bool wanted) const {
    std::vector<at::Tensor> sums(wanted ? static_cast<size_t>(std::max<int64_t>(groups(), 1)) : 0);
    for (at::Tensor& t : sums) t = at::zeros({y_.size(0), y_.size(1)}, x_.options().dtype(at::kFloat));
    return sums;
  }
  void add_to_y(const at::Tensor& sum, const at::Tensor& gradients, const PairTile& tile) const {
    if (dtype_ == Dtype::f32) {
      at::addmm_out(const_cast<at::Tensor&>(sum), sum, gradients.t(), rows_of_x(tile));
    } else {
      sum.add_(at::mm(gradients.t(), rows_of_x(tile)));
    }
  }
  // [N, D] of the sums, times a factor, in a dtype.
  at::Tensor of_y(std::vector<at::Tensor>& sums, double factor, at::ScalarType dtype) const {
    for (size_t group = 1; group < sums.size(); ++group) sums[0].add_(sums[group]);
    return sums[0].narrow(0, 0, columns_).narrow(1, 0, features_).mul_(factor).to(dtype).contiguous();
  }
  // Write the tile's rows of out [n, D].
  void of_x(const at::Tensor& out, const at::Tensor& gradients, const PairTile& tile, double factor) const {
    const at::Tensor product = at::mm(gradients, y_).narrow(0, 0, tile.rows).narrow(1, 0, features_);
    out.narrow(0, tile.first_row, tile.rows).copy_(product.to(at::kFloat).mul_(factor));
  }

 private:
  static bool multiplies_float16() {
#ifdef __x86_64__
    return __builtin_cpu_supports("avx512fp16");
#else
    return true;
#endif
  }
  static constexpr int64_t kGroups = 4;
  static constexpr int64_t kWide = 8192;  // columns from which a tile has fewer rows, to stay small beside x and y

  int64_t tiles() const { return (rows_ + tile_rows_ - 1) / tile_rows_; }
  at::Tensor rows_of_x(const PairTile& tile) const { return x_.narrow(0, tile.first_row, tile.end_row); }
  // In half precision with even sizes: a product's last pair then ends where its row does. Float16 as float32 where
  // there are no instructions for its products: torch's take many times as long.
  static at::Tensor even(const at::Tensor& t) {
    if (t.scalar_type() == at::kHalf && !multiplies_float16()) return t.to(at::kFloat);
    const int64_t more_rows = t.size(0) % 2, more_features = t.size(1) % 2;
    if (t.scalar_type() == at::kFloat || more_rows + more_features == 0) return t;
    return at::constant_pad_nd(t, {0, more_features, 0, more_rows});
  }

  int64_t rows_, columns_, features_;
  at::Tensor x_, y_;
  Dtype dtype_;
  bool negated_;
  float scale_;
  int64_t tile_rows_;
};

}  // namespace mmk
