// merge_embeddings on the CPU, as torch sees it: text [B, L, C], modals [T_i, C], mask [B, L] bool, checked at the door
// (mmkernels/ops/merge_embeddings) except for the number of true positions, which is known only here.
#include "csrc/merge_embeddings/merge_embeddings.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "csrc/cpu/large_output.h"
#include "csrc/cpu/torch_tensors.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::merge_embeddings {
namespace {

using at::Tensor;

ByteRows byte_rows(const Tensor& t) {  // [B, L, C] or [T, C]
  const int64_t size = t.element_size();
  check_dense_rows(t, t.dim() == 3 ? 3 : 2);
  return {static_cast<char*>(t.data_ptr()), t.dim() == 3 ? t.stride(0) * size : 0, t.stride(-2) * size};
}

MergeParams make_params(const Tensor& text, const Tensor& mask, std::vector<ModalRows>& modals) {
  MergeParams p;
  p.batch = text.size(0);
  p.length = text.size(1);
  p.row_bytes = text.size(2) * text.element_size();
  p.mask = reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>());
  p.modals = modals.data();
  p.modal_count = static_cast<int64_t>(modals.size());
  p.stream = worth_streaming(static_cast<int64_t>(text.nbytes()));
  p.workers = torch_workers(static_cast<double>(text.nbytes()));
  return p;
}

void check_count(at::TensorList modals, const Tensor& mask, bool check) {
  int64_t rows = 0;
  for (const Tensor& modal : modals) rows += modal.size(0);
  const int64_t count =
      MMK_DISPATCH(count_true)(reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>()), mask.numel());
  TORCH_CHECK_VALUE(count <= rows && !(check && count < rows), "merge_embeddings: mask: expected ", rows,
                    " True positions, one for each row of modal; got ", count);
}

Tensor forward(const Tensor& text, at::TensorList modals, const Tensor& given_mask, bool check, bool) {
  const Tensor mask = given_mask.contiguous();
  check_count(modals, mask, check);
  const Tensor out = with_huge_pages(at::cpu::empty(text.sizes(), text.options()));
  if (out.numel() == 0) return out;
  std::vector<ModalRows> sources;
  for (const Tensor& modal : modals) sources.push_back({byte_rows(modal), modal.size(0)});
  MergeParams p = make_params(text, mask, sources);
  p.text = byte_rows(text);
  p.merged = byte_rows(out);
  MMK_DISPATCH(merge_rows)(p);
  return out;
}

std::vector<Tensor> backward(at::TensorList grads, const Tensor& text, at::TensorList modals, const Tensor& given_mask,
                             bool, at::TensorList, c10::List<bool> needed) {
  const Tensor mask = given_mask.contiguous();
  check_count(modals, mask, false);
  std::vector<Tensor> result;
  const auto next = [&](const Tensor& like) -> const Tensor& {
    const bool wanted = needed[result.size()];
    result.push_back(
        with_huge_pages(wanted ? at::cpu::empty(like.sizes(), like.options()) : at::cpu::empty({0}, like.options())));
    return result.back();
  };
  std::vector<ModalRows> sources;
  const Tensor dtext = next(text);
  for (const Tensor& modal : modals) {
    const bool wanted = needed[result.size()];
    const Tensor& dmodal = next(modal);
    sources.push_back({wanted ? byte_rows(dmodal) : ByteRows{}, modal.size(0)});
  }
  result.push_back(at::cpu::empty({0}, text.options()));  // of the mask
  if (text.numel() == 0) {
    for (const Tensor& t : result) t.zero_();
    return result;
  }
  MergeParams p = make_params(text, mask, sources);
  if (needed[0]) p.text = byte_rows(dtext);
  p.merged = byte_rows(grads[0]);
  MMK_DISPATCH(split_rows)(p);
  return result;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const Tensor &text = arguments[0].toTensor(), &mask = arguments[2].toTensor();
  if (text.dim() != 3 || mask.scalar_type() != at::kBool || mask.sizes() != text.sizes().slice(0, 2)) return false;
  const c10::List<Tensor> modals = arguments[1].toTensorList();
  return !modals.empty() && std::all_of(modals.begin(), modals.end(), [&](const Tensor& modal) {
    return modal.scalar_type() == text.scalar_type() && modal.dim() == 2 && modal.size(1) == text.size(2);
  });
}

const DoorCheck door_check("merge_embeddings", fits);

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def("_merge_embeddings_fwd(Tensor text, Tensor[] modals, Tensor mask, bool check, bool training) -> Tensor");
  m.def(
      "_merge_embeddings_bwd(Tensor[] grads, Tensor text, Tensor[] modals, Tensor mask, bool check, Tensor[] saved, "
      "bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_merge_embeddings_fwd", forward);
  m.impl("_merge_embeddings_bwd", backward);
}

}  // namespace
}  // namespace mmk::merge_embeddings
