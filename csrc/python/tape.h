// A list of operator calls that were made once and are made again without Python.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace ddpm_fast {

void bind_tape(pybind11::module_& m);

}  // namespace ddpm_fast
