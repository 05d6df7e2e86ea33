// The Python module stgridpool_kernels._C. Importing it registers the ops of binding.cpp.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

#include "binding.h"
#include "grid_pool.h"
#include "tables.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of stgridpool_kernels: how they were built, and which CPU instructions they use.";

  m.attr("TABLES_VERSION") = stgp::VERSION;

  m.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{
            {"version", STGP_BUILD_VERSION},
            {"compiler", STGP_BUILD_COMPILER},
            {"torch", STGP_BUILD_TORCH},
            {"stable ABI", STGP_BUILD_ABI},
            {"cuda", STGP_BUILD_CUDA},
            {"cuda architectures", STGP_BUILD_CUDA_ARCHITECTURES},
            {"cpu capabilities", STGP_BUILD_CPU_CAPABILITIES},
        };
      },
      "How this library was built. \"cuda\" is empty if it has no CUDA kernels.");

  using pybind11::arg;
  pybind11::class_<stgp::DenseCall>(m, "DenseCall", "A call on contiguous tensors, which takes their addresses.")
      .def(pybind11::init([](bool is_pooling, uintptr_t tables, int dtype, int64_t C, double temperature,
                             double norm_type, bool normalize_norm, int64_t norm_channels) {
             const stgp::Op op = is_pooling ? stgp::Op::grid_pool : stgp::Op::temporal_grid;
             return stgp::DenseCall(op, tables, static_cast<stgp::DType>(dtype), C, temperature, norm_type,
                                    normalize_norm, norm_channels);
           }),
           arg("is_pooling"), arg("tables"), arg("dtype"), arg("C"), arg("temperature"), arg("norm_type"),
           arg("normalize_norm"), arg("norm_channels"))
      .def("__call__", &stgp::DenseCall::run, pybind11::call_guard<pybind11::gil_scoped_release>(), arg("x"),
           arg("out"));

  m.def("cpu_capability", &stgp::cpu::capability,
        "The vector instructions in use: \"avx512\", \"avx2\" or \"portable\".");

  m.def("release_scratch", &stgp::release_scratch,
        "Free the memory that is kept from one CPU call for the next, at most 64 MB. Returns its size in bytes.");

  // Clearing pages takes some hundred milliseconds for each gigabyte, in which other Python threads may run.
  m.def("take_huge_pages", &stgp::take_huge_pages, pybind11::arg("address"), pybind11::arg("bytes"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Have the system back fresh memory, whose contents do not matter yet, by huge pages.");

  m.def(
      "use_cpu_capability",
      [](const std::string& name) {
        if (!stgp::cpu::use_capability(name.c_str())) {
          throw std::invalid_argument("name must be one of " STGP_BUILD_CPU_CAPABILITIES " that this CPU runs, got '" +
                                      name + "'");
        }
      },
      pybind11::arg("name"),
      "Use these vector instructions from now on, in every thread. Raises ValueError if this CPU does not run "
      "them.");
}
