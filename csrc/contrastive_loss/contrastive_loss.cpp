// contrastive_loss on the CPU, as torch sees it. Arguments were checked before.
#include "csrc/contrastive_loss/contrastive_loss.h"

#include <ATen/ops/full.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <numeric>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "csrc/contrastive/torch_products.h"
#include "csrc/door.h"

namespace mmk::contrastive_loss {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr float kLowest = -std::numeric_limits<float>::max();

double total_of(const std::vector<double>& sums) { return std::accumulate(sums.begin(), sums.end(), 0.); }

// The labels of both sides, and of each row and column the share of a positive in its target: 1 / their number.
class Positives {
 public:
  Positives(const OptionalTensor& row_labels, const OptionalTensor& column_labels, int64_t rows, int64_t columns,
            int64_t first_target)
      : first_target_(first_target), rows_(rows), columns_(columns) {
    if (!row_labels) return;
    row_labels_ = row_labels->to(at::kLong).contiguous();
    column_labels_ = column_labels->to(at::kLong).contiguous();
    row_share_ = shares(row_labels_, column_labels_);
    column_share_ = shares(column_labels_, row_labels_);
  }

  void set(ContrastiveTile& p) const {
    if (!row_labels_.defined()) return;
    p.row_labels = row_labels_.const_data_ptr<int64_t>();
    p.column_labels = column_labels_.const_data_ptr<int64_t>();
    p.row_share = row_share_.data();
    p.column_share = column_share_.data();
  }
  bool of_row(int64_t i) const {
    if (row_labels_.defined()) return row_share_[static_cast<size_t>(i)] > 0.f;
    return first_target_ + i >= 0 && first_target_ + i < columns_;
  }
  bool of_column(int64_t j) const {
    if (row_labels_.defined()) return column_share_[static_cast<size_t>(j)] > 0.f;
    return j >= first_target_ && j < first_target_ + rows_;
  }

 private:
  static std::vector<float> shares(const Tensor& labels, const Tensor& others) {
    std::unordered_map<int64_t, int64_t> counts;
    const auto* other = others.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < others.numel(); ++i) ++counts[other[i]];
    std::vector<float> result;
    const auto* label = labels.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < labels.numel(); ++i) {
      const auto found = counts.find(label[i]);
      result.push_back(found == counts.end() ? 0.f : 1.f / static_cast<float>(found->second));
    }
    return result;
  }

  int64_t first_target_, rows_, columns_;
  Tensor row_labels_, column_labels_;
  std::vector<float> row_share_, column_share_;
};

// The weight of a softmax in the gradient: of the positives, where there are some, and of smoothing.
double softmax_weight(bool has_positives, double smoothing) {
  return (has_positives ? 1. - smoothing : 0.) + smoothing;
}

// Σ log Σ exp over rows or columns: those that have positives, and all.
struct LseSums {
  double of_positives = 0., of_all = 0.;

  // sums [2, count]: top, total.
  template <class HasPositives>
  void add(const Tensor& sums, double scale, HasPositives has_positives) {
    const int64_t count = sums.size(1);
    const auto* top = sums.const_data_ptr<float>();
    for (int64_t i = 0; i < count; ++i) {
      const double lse = scale * static_cast<double>(top[i]) + std::log(static_cast<double>(top[count + i]));
      of_all += lse;
      if (has_positives(i)) of_positives += lse;
    }
  }
};

SoftmaxSums sums_of(const Tensor& stats) {
  float* const data = stats.data_ptr<float>();
  return {data, data + stats.numel() / 2};
}

// Column sums of the groups, [groups, 2, columns], as one [2, columns].
Tensor joined(const std::vector<Tensor>& groups, double scale) {
  Tensor result = groups[0];
  const SoftmaxSums to = sums_of(result);
  const int64_t columns = result.size(1);
  for (size_t group = 1; group < groups.size(); ++group) {
    const SoftmaxSums from = sums_of(groups[group]);
    for (int64_t j = 0; j < columns; ++j) {
      const double top = std::max(to.top[j], from.top[j]);
      const auto moved = [&](const SoftmaxSums& s) {
        return s.total[j] == 0.f
                   ? 0.
                   : static_cast<double>(s.total[j]) * std::exp(scale * (static_cast<double>(s.top[j]) - top));
      };
      to.total[j] = static_cast<float>(moved(to) + moved(from));
      to.top[j] = static_cast<float>(top);
    }
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& y, const Tensor& logit_scale,
                                                   const OptionalTensor& row_labels,
                                                   const OptionalTensor& column_labels, double label_smoothing,
                                                   bool symmetric, int64_t first_target, int64_t total,
                                                   bool keeps_products, bool training) {
  const PairProducts products("contrastive_loss", x, y, logit_scale.item<double>());
  const int64_t rows = products.rows(), columns = products.columns();
  const auto options = x.options().dtype(at::kFloat);
  const Tensor none = at::cpu::empty({0}, options), row_sums = at::zeros({2, rows}, options);
  keeps_products = keeps_products && training;
  const Tensor kept = keeps_products ? at::cpu::empty({rows, columns}, x.options()) : at::cpu::empty({0}, x.options());
  if (rows == 0 || columns == 0) {
    return {at::zeros({}, options), training ? row_sums : none,
            training && symmetric ? at::zeros({2, columns}, options) : at::cpu::empty({0}, options), kept};
  }
  const Positives positives(row_labels, column_labels, rows, columns, first_target);
  std::vector<double> targets(static_cast<size_t>(rows)), sums(static_cast<size_t>(rows));
  std::vector<Tensor> column_sums;
  for (int64_t group = 0; symmetric && group < products.groups(); ++group) {
    column_sums.push_back(at::zeros({2, columns}, options));
    column_sums.back()[0].fill_(kLowest);
  }
  ContrastiveTile call;
  positives.set(call);
  call.of_rows = sums_of(row_sums);
  call.targets = targets.data();
  call.sums = sums.data();
  const Tensor to = keeps_products && products.are_of(x.scalar_type()) ? kept : Tensor();
  products.for_each_tile(first_target, to, {}, [&](int64_t group, const PairTile& tile, const Tensor&) {
    ContrastiveTile p = call;
    p.pairs = tile;
    if (symmetric) p.of_columns = sums_of(column_sums[static_cast<size_t>(group)]);
    MMK_DISPATCH(contrastive_statistics)(p);
  });
  const double scale = products.scale(), s = label_smoothing;
  LseSums lse;
  lse.add(row_sums, scale, [&](int64_t i) { return positives.of_row(i); });
  double share = 1. / static_cast<double>(columns);  // of a logit in what label smoothing takes off
  Tensor of_columns = at::cpu::empty({0}, options);
  if (symmetric) {
    of_columns = joined(column_sums, scale);
    lse.add(of_columns, scale, [&](int64_t j) { return positives.of_column(j); });
    share += 1. / static_cast<double>(rows);
  }
  double loss = (1. - s) * (lse.of_positives - scale * total_of(targets));
  if (s != 0.) loss += s * (lse.of_all - scale * share * total_of(sums));
  return {at::scalar_tensor(0.5 * loss / static_cast<double>(std::max<int64_t>(total, 1)), options),
          training ? row_sums : none, training ? of_columns : at::cpu::empty({0}, options), kept};
}

std::vector<Tensor> backward(at::TensorList grads, const Tensor& x, const Tensor& y, const Tensor& logit_scale,
                             const OptionalTensor& row_labels, const OptionalTensor& column_labels,
                             double label_smoothing, bool symmetric, int64_t first_target, int64_t total,
                             bool keeps_products, at::TensorList saved, const c10::List<bool>& needed) {
  const PairProducts products("contrastive_loss", x, y, logit_scale.item<double>());
  const int64_t rows = products.rows(), columns = products.columns();
  const auto none = [&] { return at::cpu::empty({0}, x.options()); };
  if (rows == 0 || columns == 0) {
    const auto zeros = [&](size_t i, const Tensor& t) {
      return needed[i] ? at::zeros(t.sizes(), t.options()) : none();
    };
    return {zeros(0, x), zeros(1, y), zeros(2, logit_scale), none(), none()};
  }
  const Positives positives(row_labels, column_labels, rows, columns, first_target);
  const Tensor row_sums = saved[0].contiguous(), column_sums = saved[1].contiguous();
  std::vector<float> row_weight(static_cast<size_t>(rows)), column_weight(static_cast<size_t>(columns));
  for (int64_t i = 0; i < rows; ++i) {
    row_weight[static_cast<size_t>(i)] = static_cast<float>(softmax_weight(positives.of_row(i), label_smoothing));
  }
  std::vector<double> of_scale(static_cast<size_t>(rows));
  ContrastiveTile call;
  positives.set(call);
  call.of_rows = sums_of(row_sums);
  call.row_weight = row_weight.data();
  call.of_positive = static_cast<float>(1. - label_smoothing);
  call.of_all = static_cast<float>(label_smoothing / static_cast<double>(columns));
  call.of_scale = of_scale.data();
  if (symmetric) {
    call.of_columns = sums_of(column_sums);
    for (int64_t j = 0; j < columns; ++j) {
      const double weight = softmax_weight(positives.of_column(j), label_smoothing);
      column_weight[static_cast<size_t>(j)] = static_cast<float>(weight) / call.of_columns.total[j];
    }
    call.column_weight = column_weight.data();
    call.of_all =
        static_cast<float>(label_smoothing * (1. / static_cast<double>(columns) + 1. / static_cast<double>(rows)));
  }
  const double mean = 0.5 * grads[0].item<double>() / static_cast<double>(std::max<int64_t>(total, 1));
  const double factor = mean * logit_scale.item<double>();
  const Tensor dx = needed[0] ? at::cpu::empty(x.sizes(), x.options()) : none();
  std::vector<Tensor> sums = products.new_sums(needed[1]);
  const Tensor from = keeps_products && products.are_of(x.scalar_type()) ? saved[2].contiguous() : Tensor();
  products.for_each_tile(first_target, {}, from, [&](int64_t group, const PairTile& tile, const Tensor& gradients) {
    const Tensor of_positives = at::cpu::empty({columns}, row_sums.options());
    ContrastiveTile p = call;
    p.pairs = tile;
    p.of_positives = of_positives.data_ptr<float>();
    MMK_DISPATCH(contrastive_gradients)(p);
    if (needed[0]) products.of_x(dx, gradients, tile, factor);
    if (needed[1]) products.add_to_y(sums[static_cast<size_t>(group)], gradients, tile);
  });
  const Tensor dscale =
      needed[2] ? at::scalar_tensor(total_of(of_scale) * mean * products.sign(), logit_scale.options()) : none();
  return {dx, needed[1] ? products.of_y(sums, factor, y.scalar_type()) : none(), dscale, none(), none()};
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const double smoothing = arguments[5].toDouble();
  if (!are_pairs(arguments, 1) || !(smoothing >= 0. && smoothing <= 1.)) return false;
  if (arguments[3].isNone()) return true;
  const Tensor& labels = arguments[3].toTensor();
  return at::isIntegralType(labels.scalar_type(), false) && labels.sizes() == at::IntArrayRef{arguments[8].toInt()};
}

const DoorCheck door_check("contrastive_loss", fits, DoorCheck::Dtypes::any);

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_contrastive_loss_fwd(Tensor x, Tensor y, Tensor logit_scale, Tensor? row_labels, Tensor? column_labels, "
      "float label_smoothing, bool symmetric, int first_target, int total, bool keeps_products, "
      "bool training) -> (Tensor loss, Tensor row_stats, Tensor column_stats, Tensor products)");
  m.def(
      "_contrastive_loss_bwd(Tensor[] grads, Tensor x, Tensor y, Tensor logit_scale, Tensor? row_labels, "
      "Tensor? column_labels, float label_smoothing, bool symmetric, int first_target, int total, "
      "bool keeps_products, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_contrastive_loss_fwd", forward);
  m.impl("_contrastive_loss_bwd", backward);
}

}  // namespace mmk::contrastive_loss
