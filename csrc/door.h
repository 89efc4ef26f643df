// Functions that Python calls without torch's dispatcher in between. Each op's file adds its own; csrc/module.cpp
// offers them all.
#pragma once

#include <Python.h>

#include <string>
#include <unordered_map>
#include <vector>

namespace c10 {
struct IValue;
}

namespace mmk {

class Door {
 public:
  using Function = PyObject* (*)(PyObject* module, PyObject* const* arguments, Py_ssize_t count);
  Door(const char* name, Function function) {
    all().push_back(
        {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr});
  }
  static std::vector<PyMethodDef>& all();
};

// Whether the arguments of an op's schema fit together, for a call whose tensors are plain and of one floating dtype or
// of none; with Dtypes::any, of any that kernels have. An op that has one lets differentiable_door take calls that
// nobody has checked; what does not fit goes the long way, to the error that says why.
class DoorCheck {
 public:
  using Function = bool (*)(const std::vector<c10::IValue>& arguments);
  enum class Dtypes { one, any };
  DoorCheck(const char* op, Function function, Dtypes dtypes = Dtypes::one) : fits(function), dtypes(dtypes) {
    all()[op] = this;
  }
  DoorCheck(const DoorCheck&) = delete;
  static std::unordered_map<std::string, const DoorCheck*>& all();

  const Function fits;
  const Dtypes dtypes;
};

}  // namespace mmk
