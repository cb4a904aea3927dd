// The CUDA part of fastcalib._C.
#pragma once
#include <pybind11/pybind11.h>

namespace fastcalib::cuda {

void bind(pybind11::module_& m);

}  // namespace fastcalib::cuda
