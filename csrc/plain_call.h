// What a door (csrc/door.h) serves: eager calls on ordinary dense CPU tensors. Everything else (another device or
// layout, a tensor subclass, a mode, a transform, tracing, autocast) goes through torch's dispatcher.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

namespace mmk {

inline bool is_plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet kPlainKeys({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                            c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  return t.defined() && t.is_cpu() && t.layout() == at::kStrided && kPlainKeys.has_all(t.key_set());
}

inline bool is_plain(PyObject* object) {
  return THPVariable_CheckExact(object) && is_plain(THPVariable_Unpack(object));
}

inline bool has_kernel_dtype(const at::Tensor& t) {
  const auto dtype = t.scalar_type();
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

// Whether the last dim is contiguous, which is what kernels ask of floating tensors.
inline bool has_dense_rows(const at::Tensor& t) { return t.dim() == 0 || t.stride(-1) == 1 || t.size(-1) <= 1; }

inline bool runs_plainly() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return !at::autocast::is_autocast_enabled(at::kCPU) && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0 &&
         !included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) && !included.has(c10::DispatchKey::Tracer);
}

// Whether a backward may call kernels by itself: its gradients will not be differentiated, in forward mode or in
// reverse, nor are they batched.
inline bool pulls_plainly(const at::Tensor& grad) {
  return !at::GradMode::is_enabled() && is_plain(grad) && !grad._fw_grad(0).defined() && runs_plainly();
}

}  // namespace mmk
