// Functions that Python calls without torch's dispatcher in between. Each op's file adds its own; csrc/module.cpp
// offers them all.
#pragma once

#include <Python.h>

#include <vector>

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

}  // namespace mmk
