// The extension module mmkernels._C. Importing it registers the private torch ops, each in its own <op>.cpp; this file
// lists none of them and offers only what is common to all.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "csrc/cpu/isa.h"
#include "csrc/door.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "Clang " __clang_version__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
#if defined(__SANITIZE_ADDRESS__)
  info["sanitizers"] = "address, undefined";
#endif
  return info;
}

}  // namespace

std::vector<PyMethodDef>& mmk::Door::all() {
  static std::vector<PyMethodDef> doors;
  return doors;
}

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("compiled_isas", &mmk::compiled_isas);
  m.def("supported_isas", &mmk::supported_isas);
  m.def("isa", &mmk::current_isa);
  m.def("set_isa", &mmk::set_isa, py::arg("name"));

  static std::vector<PyMethodDef> doors = mmk::Door::all();  // every file has added its own by now
  doors.push_back({nullptr, nullptr, 0, nullptr});
  if (PyModule_AddFunctions(m.ptr(), doors.data()) != 0) throw py::error_already_set();
}
