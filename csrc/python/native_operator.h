// Calls of the CPU's native operators that Python makes without torch's parser, and whose gradients run without Python.
#pragma once

#include <pybind11/pybind11.h>

namespace ddpm_fast {

void bind_native_operator(pybind11::module_& m);

}  // namespace ddpm_fast
