// The products of x [n, D] with y [N, D], a tile of rows at a time, and of their gradients with x and y: torch's, whose
// rate is the core's. A group of tiles belongs to one thread, which takes them in their order and has sums of its own;
// those of the groups are added in order. Their number depends on n alone, so that any number of threads gives the same
// bits, but where there is one tile: torch then takes all threads for its products, and sums as it likes.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "csrc/contrastive/tile.h"
#include "csrc/cpu/half_products.h"
#include "csrc/cpu/torch_tensors.h"

// Of the OpenMP and the MKL that torch comes with, where it does.
extern "C" __attribute__((weak)) void omp_set_num_threads(int threads);
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

namespace mmk {

// While it lives, torch's products of this thread take no other threads. Else they cut a sum into as many parts as the
// process has threads, even where the call is in one of them.
class OneThreadProducts {
 public:
  OneThreadProducts() : threads_(at::get_num_threads()) {  // which sets them, in a new thread
    if (MKL_Set_Num_Threads_Local != nullptr) of_mkl_ = MKL_Set_Num_Threads_Local(1);
    if (omp_set_num_threads != nullptr) omp_set_num_threads(1);
  }
  ~OneThreadProducts() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(of_mkl_);
    if (omp_set_num_threads != nullptr) omp_set_num_threads(threads_);
  }
  OneThreadProducts(const OneThreadProducts&) = delete;
  OneThreadProducts& operator=(const OneThreadProducts&) = delete;

 private:
  int threads_, of_mkl_ = 0;
};

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
        x_(multiplied(x.detach(), x.numel() * y.size(0))),
        y_(multiplied(y.detach(), x.numel() * y.size(0))),
        dtype_(floating_dtype_of(op, x_)),
        negated_(scale < 0.),
        scale_(std::max(static_cast<float>(std::abs(scale)), std::numeric_limits<float>::min())),
        tile_rows_(columns_ > kWide  ? 128
                   : columns_ > 4096 ? 256
                                     : 512) {}

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  float scale() const { return scale_; }  // above 0: below it, the products are negated
  float sign() const { return negated_ ? -1.f : 1.f; }
  bool are_of(at::ScalarType dtype) const { return x_.scalar_type() == dtype && x_.size(0) == rows_; }
  int64_t groups() const { return share() == 0 ? 0 : (tiles() + share() - 1) / share(); }

  // f(group, tile, its products as a tensor [end_row, end_column]) for every tile. All products [n, N] are written to
  // one tensor and may be taken from one, where these are defined and nothing was padded.
  template <class Function>
  void for_each_tile(int64_t first_target, const at::Tensor& to, const at::Tensor& from, Function f) const {
    at::parallel_for(0, groups(), 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below;
      std::optional<OneThreadProducts> alone;
      if (groups() > 1) alone.emplace();
      const int64_t most_rows = to.defined() ? 0 : std::min(tile_rows_, x_.size(0));
      const at::Tensor buffer = at::cpu::empty({most_rows, y_.size(0)}, x_.options());
      for (int64_t group = begin; group < end; ++group) {
        const int64_t last = std::min((group + 1) * share(), tiles());
        for (int64_t at = group * share(); at < last; ++at) {
          PairTile tile;
          tile.first_row = at * tile_rows_;
          tile.rows = std::min(tile_rows_, rows_ - tile.first_row);
          tile.columns = columns_;
          tile.end_row = std::min(tile_rows_, x_.size(0) - tile.first_row);
          tile.end_column = y_.size(0);
          at::Tensor products =
              to.defined() ? rows_of(to, tile.first_row, tile.end_row) : rows_of(buffer, 0, tile.end_row);
          if (from.defined()) {
            products.copy_(rows_of(from, tile.first_row, tile.end_row));
          } else {
            at::mm_out(products, rows_of_x(tile), y_.t());
            if (negated_) products.neg_();
          }
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

  // Gradients of y, [N, D] float32 for each group, where they are wanted. A group's first tile writes them.
  std::vector<at::Tensor> new_sums(bool wanted) const {
    std::vector<at::Tensor> sums(wanted ? static_cast<size_t>(std::max<int64_t>(groups(), 1)) : 0);
    const auto options = x_.options().dtype(at::kFloat);
    for (at::Tensor& t : sums) t = rows_ == 0 ? at::zeros(y_.sizes(), options) : at::cpu::empty(y_.sizes(), options);
    return sums;
  }
  void add_to_y(const at::Tensor& sum, const at::Tensor& gradients, const PairTile& tile) const {
    const double kept = tile.first_row % (share() * tile_rows_) == 0 ? 0. : 1.;  // by a factor of 0, nothing is read
    if (dtype_ == Dtype::f32) {
      at::addmm_out(const_cast<at::Tensor&>(sum), sum, gradients.t(), rows_of_x(tile), kept);
    } else if (kept == 0.) {
      sum.copy_(at::mm(gradients.t(), rows_of_x(tile)));
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
    at::Tensor rows = rows_of(out, tile.first_row, tile.rows);
    if (dtype_ == Dtype::f32 && out.scalar_type() == at::kFloat && out.size(1) == y_.size(1)) {
      at::addmm_out(rows, rows, gradients, y_, 0., factor);
    } else {
      const at::Tensor product = at::mm(gradients, y_).narrow(0, 0, tile.rows).narrow(1, 0, features_);
      rows.copy_(product.to(at::kFloat).mul_(factor));
    }
  }

 private:
  static bool has_products_of(at::ScalarType dtype) {
    return dtype == at::kHalf ? has_f16_products() : has_bf16_products();
  }
  static constexpr int64_t kGroups = 4;
  static constexpr int64_t kFew = 1 << 20;  // mmkernels/ops/contrastive_loss asks for no products of so few
  static constexpr int64_t kWide = 8192;    // columns from which a tile has fewer rows, to stay small beside x and y

  int64_t tiles() const { return (rows_ + tile_rows_ - 1) / tile_rows_; }
  int64_t share() const { return (tiles() + kGroups - 1) / kGroups; }  // tiles of a group
  static at::Tensor rows_of(const at::Tensor& t, int64_t first, int64_t count) {
    return count == t.size(0) ? t : t.narrow(0, first, count);  // a view of all costs as much as a small product
  }
  at::Tensor rows_of_x(const PairTile& tile) const { return rows_of(x_, tile.first_row, tile.end_row); }
  // What goes into the products. In half precision with even sizes: a product's last pair then ends where its row does.
  // As float32 where few multiplications cost less than torch's setting up of others, or the core has no products of
  // it.
  static at::Tensor multiplied(const at::Tensor& t, int64_t multiplications) {
    if (t.scalar_type() == at::kFloat) return t;
    if (multiplications <= kFew || !has_products_of(t.scalar_type())) return t.to(at::kFloat);
    const int64_t more_rows = t.size(0) % 2, more_features = t.size(1) % 2;
    if (more_rows + more_features == 0) return t;
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
