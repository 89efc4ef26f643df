#include "csrc/cuda/torch_stable.h"
#include "csrc/merge_embeddings/merge_embeddings_cuda.cuh"

namespace mmk::cuda {
namespace {

/// What both passes have: `in` is text or the gradient of out.
MergeEmbeddings arguments(const Tensor& in, const std::vector<Tensor>& modals, const Tensor& mask,
                          const OptionalTensor& counts) {
  MergeEmbeddings p{};
  p.mask = data<uint8_t>(mask);
  p.counts = data<int>(counts);
  p.in = data<uint16_t>(in);
  p.in_batch = in.stride(0);
  p.in_token = in.stride(1);
  p.length = int(in.size(1));
  p.even = in.size(0) == 1 || p.in_batch == p.length * p.in_token;
  p.tokens = int(in.size(0) * in.size(1));
  p.vectors = int(in.size(2) / kVector);
  int end = 0;
  for (const Tensor& modal : modals) {
    end += int(modal.size(0));
    p.modals[p.count++] = {data<uint16_t>(modal), modal.stride(0), end};
  }
  return p;
}

void forward(Tensor text, std::vector<Tensor> modals, Tensor mask, OptionalTensor counts, Tensor out, int64_t stream) {
  MergeEmbeddings p = arguments(text, modals, mask, counts);
  p.out = data<uint16_t>(out);
  launch_merge_embeddings_forward(p, as_stream(stream));
}

void backward(Tensor g, std::vector<Tensor> modals, Tensor mask, OptionalTensor counts, OptionalTensor dtext,
              std::vector<Tensor> dmodals, int64_t stream) {
  MergeEmbeddings p = arguments(g, modals, mask, counts);
  p.out = data<uint16_t>(dtext);
  for (size_t i = 0; i < dmodals.size(); ++i) {  // contiguous, empty where not asked for
    p.modals[i].rows = data<uint16_t>(dmodals[i]);
    p.modals[i].stride = g.size(2);
  }
  launch_merge_embeddings_backward(p, as_stream(stream));
}

MMK_REGISTER("merge_embeddings_fwd",
             "(Tensor text, Tensor[] modals, Tensor mask, Tensor(a!)? counts, Tensor(b!) out, int stream) -> ()",
             forward)
MMK_REGISTER("merge_embeddings_bwd",
             "(Tensor g, Tensor[] modals, Tensor mask, Tensor(a!)? counts, Tensor(b!)? dtext, Tensor(c!)[] dmodals, "
             "int stream) -> ()",
             backward)

}  // namespace
}  // namespace mmk::cuda
