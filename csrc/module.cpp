// The extension module mmkernels._C. Importing it registers the private torch ops, each in its own <op>.cpp; this file
// lists none of them and offers only what is common to all.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "csrc/cpu/amx.h"
#include "csrc/cpu/half_products.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/runnable.h"
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

#ifdef MMK_TEST_ISA
// C + A · B of tiles of so many rows, and units of A; A [rows][units], B [units][16] and C [rows][16] are bytes.
py::bytes portable_tile_product(const std::string& a, const std::string& b, std::string c, int rows, int units) {
  namespace tiles = mmk::portable_tiles;
  mmk::TileConfiguration x{};
  x.palette = 1;
  for (int tile : {0, 1}) x.rows[tile] = static_cast<uint8_t>(rows);
  x.rows[2] = static_cast<uint8_t>(units);
  for (int tile : {0, 2}) x.row_bytes[tile] = 64;
  x.row_bytes[1] = static_cast<uint16_t>(4 * units);
  tiles::configure(x);
  tiles::load(0, c.data(), 64);
  tiles::load(1, a.data(), 4 * units);
  tiles::load(2, b.data(), 64);
  tiles::dot(0, 1, 2);
  tiles::store(0, c.data(), 64);
  tiles::release();
  return c;
}
#endif

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
  m.def("default_isa", [] { return mmk::best_isa(mmk::supported_isas(), mmk::cpu_vendor()); });
  m.def("best_isa", &mmk::best_isa, py::arg("runnable"), py::arg("vendor"));
  m.def("has_bf16_products", &mmk::has_bf16_products);
  m.def("why_no_amx", [] { return mmk::why_no_amx(); });
  m.def("why_no_amx", py::overload_cast<bool, bool, int>(&mmk::why_no_amx));
  m.def("set_isa", &mmk::set_isa, py::arg("name"));
#ifdef MMK_TEST_ISA
  m.def("portable_tiles",
        [] { return std::make_pair(mmk::portable_tiles::configurations(), mmk::portable_tiles::is_configured()); });
  m.def("portable_tile_product", &portable_tile_product);
#endif

  static std::vector<PyMethodDef> doors = mmk::Door::all();  // every file has added its own by now
  doors.push_back({nullptr, nullptr, 0, nullptr});
  if (PyModule_AddFunctions(m.ptr(), doors.data()) != 0) throw py::error_already_set();
}
