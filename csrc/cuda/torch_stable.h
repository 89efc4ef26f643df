// What the torch-facing files of CUDA kernels share. They keep to torch's stable ABI, so that one library serves torch
// 2.11 and later, loads where torch has no CUDA, and is compiled against any build of torch.
//
// The same files make two libraries: `_cuda_<op>` for CUDA tensors, and where MMK_SIMT is defined `_simt_<op>` for CPU
// tensors, whose kernels run in the emulator. Python has checked the arguments and made the outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "csrc/cuda/launch.h"

#ifdef MMK_SIMT
#define MMK_OP(name) "_simt_" name
#define MMK_KEY CPU
#else
#define MMK_OP(name) "_cuda_" name
#define MMK_KEY CUDA
#endif

// MMK_REGISTER("concat_tokens_fwd", "(Tensor[] xs, Tensor(a!) out, int stream) -> ()", function) for each op of a file.
#define MMK_REGISTER(name, schema, function) MMK_REGISTER_AS(name, schema, function, __COUNTER__)
#define MMK_REGISTER_AS(name, schema, function, count) MMK_REGISTER_ONE(name, schema, function, count)
#define MMK_REGISTER_ONE(name, schema, function, count)                                                          \
  namespace mmk_registration_##count {                                                                           \
    STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, library) { library.def(MMK_OP(name) schema); }                      \
    STABLE_TORCH_LIBRARY_IMPL(mmkernels, MMK_KEY, library) { library.impl(MMK_OP(name), TORCH_BOX(&function)); } \
  }

namespace mmk::cuda {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool is_bf16(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::BFloat16; }

template <typename T = void>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

/// Null for a tensor that is absent or was not asked for, which is empty.
template <typename T = void>
T* data(const OptionalTensor& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

inline Stream as_stream(int64_t stream) { return reinterpret_cast<Stream>(stream); }

/// The stride of a dim, 0 where it has one element and so is the same for all.
inline int64_t stride_or_zero(const Tensor& t, int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

}  // namespace mmk::cuda
