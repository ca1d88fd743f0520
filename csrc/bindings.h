// What the files of the Python module fastvdiff._C share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace py = pybind11;

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_cuda(py::module_& m);  // bindings_cuda.cpp, where the CUDA kernels are built
