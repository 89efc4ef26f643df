// multimodal_cross_entropy on the CPU, as torch sees it. Shapes were checked at the door; labels are checked here,
// where compiled code comes by too.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "csrc/cpu/torch_tensors.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"
#include "csrc/multimodal_cross_entropy/cross_entropy.h"

namespace mmk::multimodal_cross_entropy {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Text = std::optional<std::string_view>;

CrossEntropyKind kind_named(Text robust) {
  TORCH_CHECK_VALUE(!robust || *robust == "gce" || *robust == "symmetric",
                    "multimodal_cross_entropy: robust: expected None, 'gce' or 'symmetric'; got '", *robust, "'");
  if (!robust) return CrossEntropyKind::plain;
  return *robust == "gce" ? CrossEntropyKind::gce : CrossEntropyKind::symmetric;
}

struct Options {
  double label_smoothing;
  int64_t ignore_index;
  Text robust;
  double q;
};

// How many rows are valid. Their labels are below the classes.
int64_t count_valid(const CrossEntropyParams& p, const CrossEntropyRows& item) {
  int64_t count = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    if (!p.is_valid(item, r)) continue;
    const int64_t label = item.labels[r];
    TORCH_CHECK_VALUE(label >= 0 && label < item.classes,
                      "multimodal_cross_entropy: labels: expected labels from 0 to ", item.classes - 1,
                      ", or ignore_index ", p.ignore_index, "; got ", label, " in row ", r);
    ++count;
  }
  return count;
}

// What both passes are given. The items point into the tensors and into this.
struct Call {
  std::vector<CrossEntropyRows> items;
  std::vector<int64_t> counts;  // of valid rows
  std::vector<Tensor> kept;
  CrossEntropyParams params;

  Call(at::TensorList logits, at::TensorList labels, const OptionalTensor& presence, const Options& options,
       double operations) {
    CrossEntropyParams& p = params;
    p.rows = logits[0].size(0);
    p.modalities = static_cast<int64_t>(logits.size());
    p.dtype = floating_dtype_of("multimodal_cross_entropy", logits[0]);
    p.kind = kind_named(options.robust);
    p.ignore_index = options.ignore_index;
    p.label_smoothing = static_cast<float>(options.label_smoothing);
    p.q = static_cast<float>(options.q);
    for (const Tensor& y : labels) kept.push_back(y.contiguous());
    const uint8_t* flags = nullptr;
    const bool by_row = presence && presence->dim() > 1;
    if (presence) {
      kept.push_back(presence->contiguous());
      flags = reinterpret_cast<const uint8_t*>(kept.back().const_data_ptr<bool>());
    }
    items.resize(logits.size());
    double elements = 0.;
    for (size_t i = 0; i < logits.size(); ++i) {
      CrossEntropyRows& item = items[i];
      item.logits = logits[i].const_data_ptr();
      item.stride = row_stride(logits[i]);
      item.classes = item.grad_stride = logits[i].size(1);
      item.labels = kept[labels.size() > 1 ? i : 0].const_data_ptr<int64_t>();
      if (presence) {
        item.present = flags + i;
        item.present_stride = by_row ? p.modalities : 0;
      }
      elements += static_cast<double>(p.rows) * static_cast<double>(item.classes + 16);
      counts.push_back(count_valid(p, item));
    }
    p.workers = torch_workers(operations * elements);
  }

  const CrossEntropyParams& finished() {
    params.items = items.data();
    return params;
  }
};

// The values of a vector with one number for each modality; ones where there is none.
std::vector<double> values_of(const OptionalTensor& given, size_t count) {
  std::vector<double> values(count, 1.);
  if (!given) return values;
  const int64_t stride = given->dim() == 0 ? 0 : given->stride(0);
  const auto read = [&](const auto* data) {
    for (size_t i = 0; i < count; ++i) values[i] = static_cast<double>(data[static_cast<int64_t>(i) * stride]);
  };
  switch (given->scalar_type()) {
    case at::kBFloat16:
      read(given->const_data_ptr<at::BFloat16>());
      break;
    case at::kHalf:
      read(given->const_data_ptr<at::Half>());
      break;
    default:
      read(given->const_data_ptr<float>());
  }
  return values;
}

// The numbers in a dtype.
Tensor tensor_of(const std::vector<double>& values, at::IntArrayRef sizes, const at::TensorOptions& options) {
  const Tensor result = at::cpu::empty(sizes, options);
  const auto write = [&](auto* data) {
    for (size_t i = 0; i < values.size(); ++i) data[i] = static_cast<float>(values[i]);
  };
  switch (result.scalar_type()) {
    case at::kBFloat16:
      write(result.data_ptr<at::BFloat16>());
      break;
    case at::kHalf:
      write(result.data_ptr<at::Half>());
      break;
    default:
      write(result.data_ptr<float>());
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(at::TensorList logits, at::TensorList labels,
                                                   const OptionalTensor& weights, const OptionalTensor& log_vars,
                                                   const OptionalTensor& presence, const OptionalTensor&,
                                                   double label_smoothing, int64_t ignore_index, Text robust, double q,
                                                   bool wide, bool training) {
  Call call(logits, labels, presence, {label_smoothing, ignore_index, robust, q}, 4.);
  const auto options = logits[0].options().dtype(at::kFloat);
  const int64_t count = call.params.modalities, rows = call.params.rows;
  const Tensor statistics = training ? at::cpu::empty({count, rows, 2}, options) : at::cpu::empty({0}, options);
  const Tensor losses = at::cpu::empty({count, rows}, options);
  for (int64_t i = 0; i < count; ++i) {
    CrossEntropyRows& item = call.items[static_cast<size_t>(i)];
    item.losses = losses.data_ptr<float>() + i * rows;
    if (training) item.statistics = statistics.data_ptr<float>() + i * rows * 2;
  }
  if (rows > 0) MMK_DISPATCH(cross_entropy_forward)(call.finished());
  const std::vector<double> factors = values_of(log_vars ? log_vars : weights, logits.size());
  std::vector<double> means(logits.size(), 0.);
  double total = 0.;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (call.counts[i] == 0) continue;
    const float* const of_rows = call.items[i].losses;
    for (int64_t r = 0; r < rows; ++r) means[i] += static_cast<double>(of_rows[r]);
    means[i] /= static_cast<double>(call.counts[i]);
    total += log_vars ? std::exp(-factors[i]) * means[i] + factors[i] : factors[i] * means[i];
  }
  const auto given = wide ? options : logits[0].options();
  return {tensor_of({total}, {}, given), tensor_of(means, {count}, given), statistics,
          training ? tensor_of(means, {count}, options) : at::cpu::empty({0}, options)};
}

// saved: statistics and means. grads: of the total and of the means.
std::vector<Tensor> backward(at::TensorList grads, at::TensorList logits, at::TensorList labels,
                             const OptionalTensor& weights, const OptionalTensor& log_vars,
                             const OptionalTensor& presence, const OptionalTensor& modulation, double label_smoothing,
                             int64_t ignore_index, Text robust, double q, bool, at::TensorList given_saved,
                             const c10::List<bool>& needed) {
  const std::vector<Tensor> saved = contiguous_tensors(given_saved);
  Call call(logits, labels, presence, {label_smoothing, ignore_index, robust, q}, 4.);
  const size_t count = logits.size();
  const int64_t rows = call.params.rows;
  const std::vector<double> factors = values_of(log_vars ? log_vars : weights, count);
  const std::vector<double> modulated = values_of(modulation, count);
  const double of_total = values_of(grads[0], 1)[0];
  const std::vector<double> of_means = values_of(grads[1], count);
  const float* const means = saved[1].const_data_ptr<float>();
  std::vector<Tensor> results;
  int64_t bytes = 0;
  for (size_t i = 0; i < count; ++i) {
    results.push_back(empty_if(logits[i], needed[i]));
    CrossEntropyRows& item = call.items[i];
    item.statistics = saved[0].data_ptr<float>() + static_cast<int64_t>(i) * rows * 2;
    if (!needed[i] || call.counts[i] == 0) {
      results[i].zero_();
      continue;
    }
    const double factor = log_vars ? std::exp(-factors[i]) : factors[i];
    const double scale = (of_total * factor + of_means[i]) * modulated[i] / static_cast<double>(call.counts[i]);
    item.grad = results[i].data_ptr();
    item.scale = static_cast<float>(scale);
    bytes += static_cast<int64_t>(results[i].nbytes());
  }
  call.params.stream = worth_streaming(bytes);
  if (bytes > 0) MMK_DISPATCH(cross_entropy_backward)(call.finished());

  size_t position = count;
  for (size_t i = 0; i < labels.size(); ++i, ++position) results.push_back(at::cpu::empty({0}, logits[0].options()));
  const OptionalTensor vectors[] = {weights, log_vars, presence, modulation};
  for (size_t v = 0; v < 4; ++v, ++position) {
    if (!needed[position]) {
      results.push_back(at::cpu::empty({0}, logits[0].options()));
      continue;
    }
    std::vector<double> slopes(count, 0.);
    for (size_t i = 0; v < 2 && i < count; ++i) {
      if (call.counts[i] == 0) continue;
      const double mean = static_cast<double>(means[i]);
      slopes[i] = of_total * (v == 0 ? mean : 1. - std::exp(-factors[i]) * mean);
    }
    results.push_back(tensor_of(slopes, vectors[v]->sizes(), vectors[v]->options()));
  }
  return results;
}

// The losses [B] of rows whose label is 0 or more, 0 for the others; with `gradient` the logits become the gradients of
// these losses. Labels were checked.
void rows_in_place(const Tensor& logits, const Tensor& labels, double label_smoothing, Text robust, double q,
                   bool gradient, const Tensor& losses) {
  TORCH_CHECK(logits.dim() == 2 && losses.is_contiguous() && labels.is_contiguous(), "rows of logits, dense labels");
  CrossEntropyRows item;
  item.logits = logits.data_ptr();
  item.stride = item.grad_stride = row_stride(logits);
  item.classes = logits.size(1);
  item.labels = labels.const_data_ptr<int64_t>();
  item.losses = losses.data_ptr<float>();
  if (gradient) item.grad = logits.data_ptr();
  CrossEntropyParams p;
  p.rows = logits.size(0);
  p.modalities = 1;
  p.dtype = floating_dtype_of("multimodal_cross_entropy", logits);
  p.kind = kind_named(robust);
  p.ignore_index = -1;
  p.label_smoothing = static_cast<float>(label_smoothing);
  p.q = static_cast<float>(q);
  p.items = &item;
  p.workers = torch_workers(8. * static_cast<double>(p.rows) * static_cast<double>(item.classes + 16));
  if (p.rows > 0) MMK_DISPATCH(cross_entropy_forward)(p);
}

// One number for each modality, in float32 or the dtype of the logits.
bool is_vector(const c10::IValue& argument, int64_t count, at::ScalarType dtype) {
  if (argument.isNone()) return true;
  const Tensor& vector = argument.toTensor();
  return (vector.scalar_type() == dtype || vector.scalar_type() == at::kFloat) &&
         vector.sizes() == at::IntArrayRef{count};
}

// What the public function asks, but for the values of labels.
bool fits(const std::vector<c10::IValue>& arguments) {
  const auto logits = arguments[0].toTensorVector(), labels = arguments[1].toTensorVector();
  if (logits.empty() || logits[0].dim() != 2) return false;
  const int64_t rows = logits[0].size(0), count = static_cast<int64_t>(logits.size());
  const at::ScalarType dtype = logits[0].scalar_type();
  for (const Tensor& z : logits) {
    if (!z.is_floating_point() || z.scalar_type() != dtype || z.dim() != 2 || z.size(0) != rows) return false;
  }
  if (labels.size() != 1 && labels.size() != logits.size()) return false;
  for (const Tensor& y : labels) {
    if (y.scalar_type() != at::kLong || y.sizes() != at::IntArrayRef{rows}) return false;
  }
  if (!arguments[4].isNone()) {
    const Tensor& presence = arguments[4].toTensor();
    if (presence.scalar_type() != at::kBool) return false;
    if (presence.sizes() != at::IntArrayRef{count} && presence.sizes() != at::IntArrayRef{rows, count}) return false;
  }
  for (const size_t i : {2, 3, 5}) {
    if (!is_vector(arguments[i], count, dtype)) return false;
  }
  const double smoothing = arguments[6].toDouble(), q = arguments[9].toDouble();
  if (!(smoothing >= 0. && smoothing <= 1. && q > 1e-30 && q <= 1.) || arguments[7].isNone()) return false;
  if (!arguments[8].isNone()) {
    const auto robust = arguments[8].toStringView();
    if ((robust != "gce" && robust != "symmetric") || smoothing != 0.) return false;
  }
  return arguments[2].isNone() || arguments[3].isNone();
}

const DoorCheck door_check("multimodal_cross_entropy", fits, DoorCheck::Dtypes::any);

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_multimodal_cross_entropy_fwd(Tensor[] logits, Tensor[] labels, Tensor? weights, Tensor? log_vars, "
      "Tensor? presence, Tensor? modulation, float label_smoothing, int ignore_index, str? robust, float q, "
      "bool wide, bool training) -> (Tensor total, Tensor means, Tensor statistics, Tensor kept)");
  m.def(
      "_multimodal_cross_entropy_bwd(Tensor[] grads, Tensor[] logits, Tensor[] labels, Tensor? weights, "
      "Tensor? log_vars, Tensor? presence, Tensor? modulation, float label_smoothing, int ignore_index, str? robust, "
      "float q, bool wide, Tensor[] saved, bool[] needed) -> Tensor[]");
  m.def(
      "_cross_entropy_rows(Tensor(a!) logits, Tensor labels, float label_smoothing, str? robust, float q, "
      "bool gradient, Tensor(b!) losses) -> ()");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_multimodal_cross_entropy_fwd", forward);
  m.impl("_multimodal_cross_entropy_bwd", backward);
  m.impl("_cross_entropy_rows", rows_in_place);
}

}  // namespace
}  // namespace mmk::multimodal_cross_entropy
