// The Python module xtg_kernels._C: build and ISA information and the NumPy-side packing. Importing it also registers the
// tensor ops of namespace xtg.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/isa.h"

namespace py = pybind11;

void bind_pack(py::module_& m);  // pack.cpp

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of xtg_kernels.";
  m.def("available_isas", &xtg::available_isas, "ISAs in this build that the machine has, lowest first.");
  m.def("active_isa", [] { return std::string(xtg::active_kernels().name); }, "The ISA whose kernels are in use.");
  m.def("use_isa", &xtg::use_isa, py::arg("name"), "Uses the kernels of another ISA; ValueError if it is not there.");
  m.attr("compiler") = XTG_COMPILER;
  m.attr("torch_version") = XTG_TORCH_VERSION;
  bind_pack(m);
}
