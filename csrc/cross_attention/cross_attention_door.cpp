// The short way in: a plain eager call, whose Python checks and dispatch would cost more than a small kernel. Whatever
// is not plain (another dtype or device, shapes to broadcast or to complain about, a mode, a transform) returns None,
// and the caller goes the long way, which gives the same result.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "csrc/attention/torch_rows.h"
#include "csrc/cross_attention/cross_attention.h"
#include "csrc/door.h"
#include "csrc/plain_call.h"

namespace mmk {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct PlainCrossAttention : torch::autograd::Function<PlainCrossAttention> {
  static Tensor forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                        double scale) {
    auto [out, row_max, log_sum] =
        cross_attention_forward(query, key, value, {}, {}, {}, {}, -1, -1, false, 0., scale, 0., {}, true);
    ctx->save_for_backward({query, key, value, out, row_max, log_sum});
    ctx->saved_data["scale"] = scale;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const double scale = ctx->saved_data["scale"].toDouble();
    const std::array<bool, 6> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    const auto call = [&](auto&& backward, const Tensor& grad) {
      return backward(grad, std::nullopt, saved[0], saved[1], saved[2], std::nullopt, std::nullopt, std::nullopt,
                      std::nullopt, saved[3], saved[4], saved[5], -1, -1, false, 0., scale, 0., std::nullopt, wanted);
    };
    // A gradient that will itself be differentiated goes through the op that knows how.
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mmkernels::cross_attention_backward", "")
                               .typed<decltype(cross_attention_backward)>();
    const bool plain = pulls_plainly(grads[0]);
    const auto [dq, dk, dv, dmask, dbias, dsinks] =
        plain ? call(cross_attention_backward, has_dense_rows(grads[0]) ? grads[0] : grads[0].contiguous())
              : call([](auto&&... arguments) { return op.call(arguments...); }, grads[0]);
    const auto given = [](bool is_wanted, const Tensor& t) { return is_wanted ? t : Tensor(); };
    return {given(wanted[0], dq), given(wanted[1], dk), given(wanted[2], dv), Tensor()};
  }
};

bool is_plain_input(PyObject* object) {
  if (!is_plain(object)) return false;
  const Tensor& t = THPVariable_Unpack(object);
  return t.dim() == 4 && has_dense_rows(t) && has_kernel_dtype(t);
}

// cross_attention_door(query, key, value, scale or None) -> out or None
PyObject* cross_attention_door(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4 || !is_plain_input(arguments[0]) || !is_plain_input(arguments[1]) || !is_plain_input(arguments[2]) ||
      !runs_plainly()) {
    Py_RETURN_NONE;
  }
  const Tensor& query = THPVariable_Unpack(arguments[0]);
  const Tensor& key = THPVariable_Unpack(arguments[1]);
  const Tensor& value = THPVariable_Unpack(arguments[2]);
  const auto q = query.sizes(), k = key.sizes(), v = value.sizes();
  const bool fits = k[0] == q[0] && k[1] == q[1] && k[3] == q[3] && v[0] == q[0] && v[1] == q[1] && v[2] == k[2] &&
                    key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type();
  if (!fits || q[3] == 0 || !is_countable({q[0], q[1], q[2], k[2]})) Py_RETURN_NONE;
  double scale = 1. / std::sqrt(static_cast<double>(q[3]));
  if (arguments[3] != Py_None) {
    if (!PyFloat_CheckExact(arguments[3])) Py_RETURN_NONE;
    scale = PyFloat_AS_DOUBLE(arguments[3]);
  }
  Tensor out;
  {
    pybind11::gil_scoped_release no_gil;
    if (at::GradMode::is_enabled() && (query.requires_grad() || key.requires_grad() || value.requires_grad())) {
      out = PlainCrossAttention::apply(query, key, value, scale);
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      out = std::get<0>(
          cross_attention_forward(query, key, value, {}, {}, {}, {}, -1, -1, false, 0., scale, 0., {}, false));
    }
  }
  return THPVariable_Wrap(out);
  END_HANDLE_TH_ERRORS
}

const Door door("cross_attention_door", cross_attention_door);

}  // namespace
}  // namespace mmk
