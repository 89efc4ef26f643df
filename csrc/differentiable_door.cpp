// The short way into the ops of mmkernels/_differentiable.py. Their Python dispatch and autograd cost more than a small
// kernel; here a plain eager call goes straight to the kernels `_<name>_fwd` and `_<name>_bwd`, whose schemas say what
// the arguments are. A gradient that is itself differentiated goes through the op `<name>_backward`.
//
//   open_differentiable_door(name, outputs, kept, any_strides) -> handle; the first `outputs` results of the kernel are
//                                differentiable; `kept` are triples (keeps outputs, the table of Kept in Python, bits
//                                of the arguments it calls `added`); kernels take the arguments at the positions
//                                `any_strides` as they come
//   differentiable_door(handle, checked, kept, *arguments) -> the output, or the list of them where there are several,
//                                or None where the call is not plain, or was not checked and does not fit; `kept` is
//                                the position of the triple that serves
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/empty_strided_cpu_dispatch.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/dense_rows.h"
#include "csrc/door.h"
#include "csrc/plain_call.h"

namespace mmk {
namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::variable_list;

enum class Kind {
  tensor,
  optional_tensor,
  tensors,
  number,
  optional_number,
  integer,
  optional_integer,
  integers,
  flag,
  text
};

Kind kind_of(const c10::Argument& argument) {
  const std::string type = argument.type()->str();
  constexpr std::pair<std::string_view, Kind> kKinds[] = {{"Tensor", Kind::tensor},
                                                          {"Tensor?", Kind::optional_tensor},
                                                          {"Tensor[]", Kind::tensors},
                                                          {"float", Kind::number},
                                                          {"float?", Kind::optional_number},
                                                          {"int", Kind::integer},
                                                          {"int?", Kind::optional_integer},
                                                          {"bool", Kind::flag},
                                                          {"int[]", Kind::integers},
                                                          {"str", Kind::text},
                                                          {"str?", Kind::text}};
  for (const auto& [name, kind] : kKinds) {
    if (type == name) return kind;
  }
  TORCH_CHECK(false, "a door knows no arguments of type ", type);
}

// What a backward finds again besides what the kernel saved.
struct Kept {
  bool outputs;
  std::vector<uint64_t> reads;  // for each argument, a bit for every argument that its gradient depends on
  uint64_t added;               // a bit for every argument whose gradient is the first output's
};

struct DoorOp {
  DoorOp(const std::string& name, size_t outputs, std::vector<Kept> kept)
      : name(name),
        outputs(outputs),
        kept(std::move(kept)),
        forward(kernel(name, "fwd")),
        backward(kernel(name, "bwd")),
        differentiable("mmkernels::" + name + "_backward") {
    const auto& checks = DoorCheck::all();
    if (const auto found = checks.find(name); found != checks.end()) check = found->second;
    const auto& arguments = forward.schema().arguments();
    one_output = outputs == 1 && forward.schema().returns()[0].type()->str() == "Tensor";
    for (size_t i = 0; i + 1 < arguments.size(); ++i) kinds.push_back(kind_of(arguments[i]));  // all but `training`
    for (const Kept& kind : this->kept) TORCH_INTERNAL_ASSERT(kind.reads.size() == kinds.size() && kinds.size() <= 64);
  }
  static c10::OperatorHandle kernel(const std::string& name, const char* direction) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("mmkernels::_" + name + "_" + direction).c_str(), "");
  }

  std::string name;
  size_t outputs;  // of the kernel's results, a list of tensors being one
  std::vector<Kept> kept;
  c10::OperatorHandle forward, backward;
  std::string differentiable;  // the backward that has a backward
  std::vector<Kind> kinds;
  const DoorCheck* check = nullptr;
  bool one_output;                // and not a list
  std::vector<bool> any_strides;  // per argument, whether kernels take it as it comes
};

std::vector<std::unique_ptr<DoorOp>>& door_ops() {
  static std::vector<std::unique_ptr<DoorOp>> ops;
  return ops;
}

// One call's arguments, and the tensors among them in order, undefined where an optional one is absent.
struct Call {
  bool one_dtype = false;  // or nobody has checked that yet
  std::vector<IValue> arguments;
  variable_list leaves;
  bool needs_grad = false;
};

bool take_tensor(PyObject* object, bool any_strides, Call& call) {
  if (!is_plain(object)) return false;
  const Tensor& t = THPVariable_Unpack(object);
  if (!any_strides && t.is_floating_point() && !has_dense_rows(t)) return false;
  const bool known = !t.is_floating_point()                   ? !call.leaves.empty()
                     : !call.one_dtype || call.leaves.empty() ? has_kernel_dtype(t)
                                                              : t.scalar_type() == call.leaves[0].scalar_type();
  if (!known) return false;
  call.needs_grad |= t.requires_grad();
  call.leaves.push_back(t);
  return true;
}

bool take(PyObject* object, Kind kind, bool any_strides, Call& call) {
  std::vector<IValue>& arguments = call.arguments;
  switch (kind) {
    case Kind::tensor:
      if (!take_tensor(object, any_strides, call)) return false;
      arguments.emplace_back(call.leaves.back());
      return true;
    case Kind::optional_tensor:
      if (object != Py_None) return take(object, Kind::tensor, any_strides, call);
      call.leaves.emplace_back();
      arguments.emplace_back();
      return true;
    case Kind::tensors: {
      if (!PyList_CheckExact(object) && !PyTuple_CheckExact(object)) return false;
      c10::List<Tensor> list;
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
        if (!take_tensor(PySequence_Fast_GET_ITEM(object, i), any_strides, call)) return false;
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
      if (object != Py_None) return take(object, Kind::number, any_strides, call);
      arguments.emplace_back();
      return true;
    case Kind::optional_integer:
      if (object != Py_None) return take(object, Kind::integer, any_strides, call);
      arguments.emplace_back();
      return true;
    case Kind::integer: {
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

Results run_forward(const DoorOp& op, Call& call, bool training) {  // takes the arguments
  at::AutoDispatchBelowADInplaceOrView below;
  torch::jit::Stack stack = std::move(call.arguments);
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

// f(argument, whether it is there) for the place of every leaf, in order.
template <class Function>
void for_each_leaf(const std::vector<Kind>& kinds, c10::ArrayRef<IValue> arguments, Function f) {
  for (size_t i = 0; i < kinds.size(); ++i) {
    if (kinds[i] == Kind::tensor) f(i, true);
    if (kinds[i] == Kind::optional_tensor) f(i, arguments[i].toBool());
    if (kinds[i] == Kind::tensors) {
      for (int64_t n = arguments[i].toInt(); n > 0; --n) f(i, true);
    }
  }
}

struct Shape {
  at::DimVector sizes, strides;
  at::TensorOptions options;
};

using NodePointer = decltype(torch::autograd::Edge::function);  // intrusive since torch 2.13, shared before

// The backward of one call.
class EagerNode : public torch::autograd::Node {
 public:
  EagerNode(const DoorOp& op, const Call& call) : op_(op) {
    arguments_.reserve(op.kinds.size());
    for (size_t i = 0; i < op.kinds.size(); ++i) {  // of tensors only their number: they are kept by themselves
      const IValue& x = call.arguments[i];
      switch (op.kinds[i]) {
        case Kind::tensor:
          arguments_.emplace_back();
          break;
        case Kind::optional_tensor:
          arguments_.emplace_back(!x.isNone());
          break;
        case Kind::tensors:
          arguments_.emplace_back(static_cast<int64_t>(x.toListRef().size()));
          break;
        default:
          arguments_.push_back(x);
      }
    }
  }

  // What the backward gets: of the leaves that are there those that a gradient depends on, of the others the shape; the
  // outputs where the op keeps them, and what the kernel saved.
  void keep(const variable_list& leaves, const Results& results, const Kept& kept) {
    added_ = kept.added;
    uint64_t read = 0;
    for_each_present([&](size_t argument, size_t leaf) {
      if (leaves[leaf].requires_grad()) read |= kept.reads[argument];
    });
    shapes_.resize(leaves.size());
    kept_.reserve(leaves.size() + results.saved.size() + (kept.outputs ? results.outputs.size() : 0));
    for_each_present([&](size_t argument, size_t leaf) {
      const Tensor& t = leaves[leaf];
      if (read >> argument & 1) {
        kept_.emplace_back(t, false);
      } else {
        shapes_[leaf].reset(new Shape{at::DimVector(t.sizes()), at::DimVector(t.strides()), t.options()});
      }
    });
    if (kept.outputs) {
      for (const Tensor& t : results.outputs) kept_.emplace_back(t, true);
    }
    for (const Tensor& t : results.saved) kept_.emplace_back(t, false);
  }

  std::string name() const override { return "mmkernels::" + op_.name; }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.clear();
    released_ = true;
  }

  variable_list apply(variable_list&& grads) override {
    variable_list result(shapes_.size());
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& g) { return g.defined(); })) return result;
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) grads[i] = input_metadata(i).zeros_like();  // of an output that nobody used
    }
    const variable_list kept = unpacked();
    const bool plain = std::all_of(grads.begin(), grads.end(), pulls_plainly);

    torch::jit::Stack stack;
    stack.reserve(op_.kinds.size() + 3);
    if (plain) {
      for (Tensor& grad : grads) grad = with_dense_rows(grad);
    }
    stack.emplace_back(c10::List<Tensor>(at::TensorList(grads)));
    push_arguments(stack, op_.kinds, arguments_, kept.data());
    stack.emplace_back(c10::List<Tensor>(at::TensorList(kept).slice(shapes_.size())));
    c10::List<bool> needed;
    size_t leaf = 0;
    for_each_leaf(op_.kinds, arguments_, [&](size_t argument, bool present) {
      bool asked = present && kept[leaf].is_floating_point() && task_should_compute_output(leaf);
      if (asked && plain && (added_ >> argument & 1)) {  // nothing to compute
        result[leaf] = grads[0];
        asked = false;
      }
      needed.push_back(asked);
      leaf += present;
    });
    stack.emplace_back(needed);
    if (plain) {
      at::AutoDispatchBelowADInplaceOrView below;
      op_.backward.callBoxed(stack);
    } else {
      c10::Dispatcher::singleton().findSchemaOrThrow(op_.differentiable.c_str(), "").callBoxed(stack);
    }

    const c10::List<Tensor> pulled = stack[0].toTensorList();
    size_t at = 0, position = 0;  // in result, in pulled
    for_each_leaf(op_.kinds, arguments_, [&](size_t, bool present) {
      if (present && needed.get(position)) result[at] = pulled.get(position);
      at += present;
      ++position;
    });
    return result;
  }

 private:
  // f(argument, leaf) for the leaves that are there.
  template <class Function>
  void for_each_present(Function f) const {
    size_t leaf = 0;
    for_each_leaf(op_.kinds, arguments_, [&](size_t argument, bool present) {
      if (present) f(argument, leaf++);
    });
  }

  // The leaves, those that were not kept with any values, and what else was kept.
  variable_list unpacked() {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    const NodePointer self = [](auto* node) {
      if constexpr (requires { node->getptr(); }) {
        return node->getptr();
      } else {
        return NodePointer::unsafe_reclaim_from_nonowning(node);
      }
    }(static_cast<torch::autograd::Node*>(this));
    variable_list tensors;
    tensors.reserve(shapes_.size() + kept_.size());
    auto kept = kept_.begin();
    for (const auto& shape : shapes_) {
      tensors.push_back(shape ? at::cpu::empty_strided(shape->sizes, shape->strides, shape->options)
                              : kept++->unpack(self));
    }
    for (; kept != kept_.end(); ++kept) tensors.push_back(kept->unpack(self));
    return tensors;
  }

  const DoorOp& op_;
  std::vector<IValue> arguments_;
  std::vector<torch::autograd::SavedVariable> kept_;
  std::vector<std::unique_ptr<Shape>> shapes_;  // of the leaves; null where one is kept
  uint64_t added_ = 0;
  bool released_ = false;
};

template <class Pointer>
Pointer own(typename Pointer::element_type* node) {
  if constexpr (requires { Pointer::unsafe_reclaim_from_nonowning(node); }) {
    return Pointer::unsafe_steal_from_new(node);
  } else {
    return Pointer(node, [](auto* done) { deleteNode(done); });
  }
}

variable_list run_recorded(const DoorOp& op, Call& call, const Kept& kept) {
  variable_list leaves;  // that are there
  for (const Tensor& leaf : call.leaves) {
    if (leaf.defined()) leaves.push_back(leaf);
  }
  EagerNode* const node = new EagerNode(op, call);
  const NodePointer owned = own<NodePointer>(node);
  node->set_next_edges(torch::autograd::collect_next_edges(leaves));
  Results results = run_forward(op, call, true);
  for (Tensor& output : results.outputs) torch::autograd::set_history(output, owned);
  node->keep(leaves, results, kept);
  return std::move(results.outputs);
}

PyObject* differentiable_door(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const int64_t handle = PyLong_AsLongLong(arguments[0]);
  const bool checked = arguments[1] == Py_True;
  const DoorOp& op = *door_ops().at(static_cast<size_t>(handle));
  const Kept& kept = op.kept.at(PyLong_AsSize_t(arguments[2]));
  TORCH_INTERNAL_ASSERT(count == static_cast<Py_ssize_t>(op.kinds.size()) + 3);
  if (!runs_plainly() || (!checked && op.check == nullptr)) Py_RETURN_NONE;
  Call call;
  call.one_dtype = !checked && op.check->dtypes == DoorCheck::Dtypes::one;
  call.arguments.reserve(op.kinds.size() + 1);  // and `training`
  for (size_t i = 0; i < op.kinds.size(); ++i) {
    if (!take(arguments[i + 3], op.kinds[i], op.any_strides[i], call)) Py_RETURN_NONE;
  }
  if (!checked && !op.check->fits(call.arguments)) Py_RETURN_NONE;
  variable_list outputs;
  {
    pybind11::gil_scoped_release no_gil;
    if (call.needs_grad && at::GradMode::is_enabled()) {
      outputs = run_recorded(op, call, kept);
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

using KeptInPython = std::tuple<bool, std::vector<uint64_t>, uint64_t>;

PyObject* open_differentiable_door(PyObject*, PyObject* const* arguments, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const auto outputs = static_cast<size_t>(PyLong_AsLongLong(arguments[1]));
  std::vector<Kept> kept;
  for (const auto& [keeps_outputs, reads, added] : pybind11::handle(arguments[2]).cast<std::vector<KeptInPython>>()) {
    kept.push_back({keeps_outputs, reads, added});
  }
  door_ops().push_back(std::make_unique<DoorOp>(PyUnicode_AsUTF8(arguments[0]), outputs, std::move(kept)));
  std::vector<bool>& any_strides = door_ops().back()->any_strides;
  any_strides.resize(door_ops().back()->kinds.size());
  for (const size_t i : pybind11::handle(arguments[3]).cast<std::vector<size_t>>()) any_strides.at(i) = true;
  return PyLong_FromSize_t(door_ops().size() - 1);
  END_HANDLE_TH_ERRORS
}

}  // namespace

std::unordered_map<std::string, const DoorCheck*>& DoorCheck::all() {
  static std::unordered_map<std::string, const DoorCheck*> checks;
  return checks;
}

namespace {

const Door door("differentiable_door", differentiable_door);
const Door opening("open_differentiable_door", open_differentiable_door);

}  // namespace
}  // namespace mmk
