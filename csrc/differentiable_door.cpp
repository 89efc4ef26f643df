// The short way into the ops of mmkernels/_differentiable.py. Their Python dispatch and autograd cost more than a small
// kernel; here a plain eager call goes straight to the kernels `_<name>_fwd` and `_<name>_bwd`, whose schemas say what
// the arguments are. A gradient that is itself differentiated goes through the op `<name>_backward`.
//
//   open_differentiable_door(name, outputs) -> handle; the first `outputs` results of the kernel are differentiable
//   differentiable_door(handle, checked, keeps_outputs, *arguments) -> the output, or the list of them where there are
//                                several, or None where the call is not plain, or was not checked and does not fit
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "csrc/door.h"
#include "csrc/plain_call.h"

namespace mmk {
namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

enum class Kind { tensor, optional_tensor, tensors, number, optional_number, integer, integers, flag, text };

Kind kind_of(const c10::Argument& argument) {
  const std::string type = argument.type()->str();
  constexpr std::pair<std::string_view, Kind> kKinds[] = {{"Tensor", Kind::tensor},
                                                          {"Tensor?", Kind::optional_tensor},
                                                          {"Tensor[]", Kind::tensors},
                                                          {"float", Kind::number},
                                                          {"float?", Kind::optional_number},
                                                          {"int", Kind::integer},
                                                          {"int?", Kind::integer},
                                                          {"bool", Kind::flag},
                                                          {"int[]", Kind::integers},
                                                          {"str", Kind::text},
                                                          {"str?", Kind::text}};
  for (const auto& [name, kind] : kKinds) {
    if (type == name) return kind;
  }
  TORCH_CHECK(false, "a door knows no arguments of type ", type);
}

struct DoorOp {
  DoorOp(const std::string& name, size_t outputs)
      : outputs(outputs),
        forward(kernel(name, "fwd")),
        backward(kernel(name, "bwd")),
        differentiable("mmkernels::" + name + "_backward") {
    const auto& checks = DoorCheck::all();
    if (const auto found = checks.find(name); found != checks.end()) fits = found->second;
    const auto& arguments = forward.schema().arguments();
    one_output = outputs == 1 && forward.schema().returns()[0].type()->str() == "Tensor";
    for (size_t i = 0; i + 1 < arguments.size(); ++i) kinds.push_back(kind_of(arguments[i]));  // all but `training`
  }
  static c10::OperatorHandle kernel(const std::string& name, const char* direction) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("mmkernels::_" + name + "_" + direction).c_str(), "");
  }

  size_t outputs;  // of the kernel's results, a list of tensors being one
  c10::OperatorHandle forward, backward;
  std::string differentiable;  // the backward that has a backward
  std::vector<Kind> kinds;
  DoorCheck::Function fits = nullptr;
  bool one_output;  // and not a list
};

std::vector<std::unique_ptr<DoorOp>>& door_ops() {
  static std::vector<std::unique_ptr<DoorOp>> ops;
  return ops;
}

// One call's arguments, and the tensors among them in order, undefined where an optional one is absent.
struct Call {
  bool checked = false;
  std::vector<IValue> arguments;
  variable_list leaves;
  bool needs_grad = false;
};

bool take_tensor(PyObject* object, Call& call) {
  if (!is_plain(object)) return false;
  const Tensor& t = THPVariable_Unpack(object);
  if (t.is_floating_point() && !has_dense_rows(t)) return false;
  const bool known = !t.is_floating_point()                ? !call.leaves.empty()
                     : call.checked || call.leaves.empty() ? has_kernel_dtype(t)
                                                           : t.scalar_type() == call.leaves[0].scalar_type();
  if (!known) return false;
  call.needs_grad |= t.requires_grad();
  call.leaves.push_back(t);
  return true;
}

bool take(PyObject* object, Kind kind, Call& call) {
  std::vector<IValue>& arguments = call.arguments;
  switch (kind) {
    case Kind::tensor:
      if (!take_tensor(object, call)) return false;
      arguments.emplace_back(call.leaves.back());
      return true;
    case Kind::optional_tensor:
      if (object != Py_None) return take(object, Kind::tensor, call);
      call.leaves.emplace_back();
      arguments.emplace_back();
      return true;
    case Kind::tensors: {
      if (!PyList_CheckExact(object) && !PyTuple_CheckExact(object)) return false;
      c10::List<Tensor> list;
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
        if (!take_tensor(PySequence_Fast_GET_ITEM(object, i), call)) return false;
        list.push_back(call.leaves.back());
      }
      arguments.emplace_back(std::move(list));
      return true;
    }
    case Kind::number:
      if (!PyFloat_CheckExact(object)) return false;
      arguments.emplace_back(PyFloat_AS_DOUBLE(object));
      return true;
    case Kind::optional_number:
      if (object != Py_None) return take(object, Kind::number, call);
      arguments.emplace_back();
      return true;
    case Kind::integer: {  // or none
      if (object == Py_None) {
        arguments.emplace_back();
        return true;
      }
      if (!PyLong_CheckExact(object)) return false;
      int overflow = 0;
      arguments.emplace_back(static_cast<int64_t>(PyLong_AsLongLongAndOverflow(object, &overflow)));
      return overflow == 0;
    }
    case Kind::integers: {
      if (!PyList_CheckExact(object)) return false;
      c10::List<int64_t> list;
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(object); ++i) {
        PyObject* item = PyList_GET_ITEM(object, i);
        if (!PyLong_CheckExact(item)) return false;
        list.push_back(PyLong_AsLongLong(item));
      }
      arguments.emplace_back(std::move(list));
      return true;
    }
    case Kind::flag:
      if (!PyBool_Check(object)) return false;
      arguments.emplace_back(object == Py_True);
      return true;
    case Kind::text:  // or none
      if (object != Py_None && !PyUnicode_CheckExact(object)) return false;
      arguments.push_back(object == Py_None ? IValue() : IValue(std::string(PyUnicode_AsUTF8(object))));
      return true;
  }
  return false;
}

struct Results {
  variable_list outputs, saved;
};

Results run_forward(const DoorOp& op, const Call& call, bool training) {
  at::AutoDispatchBelowADInplaceOrView below;
  torch::jit::Stack stack(call.arguments.begin(), call.arguments.end());
  stack.emplace_back(training);
  op.forward.callBoxed(stack);
  Results results;
  for (size_t i = 0; i < stack.size(); ++i) {
    variable_list& to = i < op.outputs ? results.outputs : results.saved;
    if (stack[i].isTensor()) {
      to.push_back(std::move(stack[i]).toTensor());
    } else {
      for (const Tensor& t : stack[i].toTensorList()) to.push_back(t);
    }
  }
  return results;
}

// `arguments` with the tensors put back, in order.
void push_arguments(torch::jit::Stack& stack, const std::vector<Kind>& kinds, c10::ArrayRef<IValue> arguments,
                    const Tensor* leaf) {
  for (size_t i = 0; i < kinds.size(); ++i) {
    switch (kinds[i]) {
      case Kind::tensor:
        stack.emplace_back(*leaf++);
        break;
      case Kind::optional_tensor:
        arguments[i].toBool() ? stack.emplace_back(*leaf++) : stack.emplace_back();
        break;
      case Kind::tensors: {
        const auto count = static_cast<size_t>(arguments[i].toInt());
        stack.emplace_back(c10::List<Tensor>(at::TensorList(leaf, count)));
        leaf += count;
        break;
      }
      default:
        stack.push_back(arguments[i]);
    }
  }
}

// f(whether it is there) for the place of every leaf, in order.
template <class Function>
void for_each_leaf(const std::vector<Kind>& kinds, c10::ArrayRef<IValue> arguments, Function f) {
  for (size_t i = 0; i < kinds.size(); ++i) {
    if (kinds[i] == Kind::tensor) f(true);
    if (kinds[i] == Kind::optional_tensor) f(arguments[i].toBool());
    if (kinds[i] == Kind::tensors) {
      for (int64_t n = arguments[i].toInt(); n > 0; --n) f(true);
    }
  }
}

struct PlainOp : torch::autograd::Function<PlainOp> {
  static variable_list forward(AutogradContext* ctx, int64_t handle, at::TensorList present, const Call* call,
                               bool keeps_outputs) {
    const DoorOp& op = *door_ops()[static_cast<size_t>(handle)];
    Results results = run_forward(op, *call, true);
    variable_list kept(present.begin(), present.end());
    if (keeps_outputs) kept.insert(kept.end(), results.outputs.begin(), results.outputs.end());
    kept.insert(kept.end(), results.saved.begin(), results.saved.end());
    ctx->save_for_backward(std::move(kept));
    std::vector<IValue> arguments = call->arguments;  // tensors by their number only: they are kept above
    for (size_t i = 0; i < op.kinds.size(); ++i) {
      if (op.kinds[i] == Kind::tensor) arguments[i] = IValue();
      if (op.kinds[i] == Kind::optional_tensor) arguments[i] = !arguments[i].isNone();
      if (op.kinds[i] == Kind::tensors) arguments[i] = static_cast<int64_t>(arguments[i].toListRef().size());
    }
    ctx->saved_data["op"] = handle;
    ctx->saved_data["arguments"] = c10::ivalue::Tuple::create(std::move(arguments));
    ctx->saved_data["leaves"] = static_cast<int64_t>(present.size());
    ctx->set_materialize_grads(results.outputs.size() > 1);  // zeros for outputs that nobody used
    return std::move(results.outputs);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const DoorOp& op = *door_ops()[static_cast<size_t>(ctx->saved_data["op"].toInt())];
    const auto leaves = static_cast<size_t>(ctx->saved_data["leaves"].toInt());
    variable_list result(leaves + 3);  // one for each argument of forward
    if (!grads[0].defined()) return result;
    const auto arguments = ctx->saved_data["arguments"].toTuple();
    const c10::ArrayRef<IValue> given(arguments->elements());
    const variable_list saved = ctx->get_saved_variables();
    const bool plain = std::all_of(grads.begin(), grads.end(), pulls_plainly);

    torch::jit::Stack stack;
    c10::List<Tensor> given_grads;
    for (const Tensor& grad : grads) given_grads.push_back(plain && !has_dense_rows(grad) ? grad.contiguous() : grad);
    stack.emplace_back(std::move(given_grads));
    push_arguments(stack, op.kinds, given, saved.data());
    stack.emplace_back(c10::List<Tensor>(at::TensorList(saved).slice(leaves)));
    c10::List<bool> needed;
    size_t leaf = 0;
    for_each_leaf(op.kinds, given, [&](bool present) {
      needed.push_back(present && saved[leaf].is_floating_point() && ctx->needs_input_grad(leaf));
      leaf += present;
    });
    stack.emplace_back(needed);
    if (plain) {
      at::AutoDispatchBelowADInplaceOrView below;
      op.backward.callBoxed(stack);
    } else {
      c10::Dispatcher::singleton().findSchemaOrThrow(op.differentiable.c_str(), "").callBoxed(stack);
    }

    const c10::List<Tensor> pulled = stack[0].toTensorList();
    size_t at = 1, position = 0;  // in result, in pulled
    for_each_leaf(op.kinds, given, [&](bool present) {
      if (present && needed.get(position)) result[at] = pulled.get(position);
      at += present;
      ++position;
    });
    return result;
  }
};

PyObject* differentiable_door(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const int64_t handle = PyLong_AsLongLong(arguments[0]);
  const bool checked = arguments[1] == Py_True, keeps_outputs = arguments[2] == Py_True;
  const DoorOp& op = *door_ops().at(static_cast<size_t>(handle));
  TORCH_INTERNAL_ASSERT(count == static_cast<Py_ssize_t>(op.kinds.size()) + 3);
  if (!runs_plainly() || (!checked && op.fits == nullptr)) Py_RETURN_NONE;
  Call call;
  call.checked = checked;
  call.arguments.reserve(op.kinds.size());
  for (size_t i = 0; i < op.kinds.size(); ++i) {
    if (!take(arguments[i + 3], op.kinds[i], call)) Py_RETURN_NONE;
  }
  if (!checked && !op.fits(call.arguments)) Py_RETURN_NONE;
  variable_list outputs;
  {
    pybind11::gil_scoped_release no_gil;
    if (call.needs_grad && at::GradMode::is_enabled()) {
      variable_list present;
      for (const Tensor& leaf : call.leaves) {
        if (leaf.defined()) present.push_back(leaf);
      }
      outputs = PlainOp::apply(handle, at::TensorList(present), &call, keeps_outputs);
    } else {
      outputs = run_forward(op, call, false).outputs;
    }
  }
  if (op.one_output) return THPVariable_Wrap(outputs[0]);
  PyObject* const list = PyList_New(static_cast<Py_ssize_t>(outputs.size()));
  for (size_t i = 0; i < outputs.size(); ++i) {
    PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), THPVariable_Wrap(outputs[i]));
  }
  return list;
  END_HANDLE_TH_ERRORS
}

PyObject* open_differentiable_door(PyObject*, PyObject* const* arguments, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const auto outputs = static_cast<size_t>(PyLong_AsLongLong(arguments[1]));
  door_ops().push_back(std::make_unique<DoorOp>(PyUnicode_AsUTF8(arguments[0]), outputs));
  return PyLong_FromSize_t(door_ops().size() - 1);
  END_HANDLE_TH_ERRORS
}

}  // namespace

std::unordered_map<std::string, DoorCheck::Function>& DoorCheck::all() {
  static std::unordered_map<std::string, Function> checks;
  return checks;
}

namespace {

const Door door("differentiable_door", differentiable_door);
const Door opening("open_differentiable_door", open_differentiable_door);

}  // namespace
}  // namespace mmk
