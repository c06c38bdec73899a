// torch's conversions between Python's objects and IValue, declared as torch/csrc/jit/python/pybind_utils.h declares
// them: that header alone costs half a minute of compile time.
#pragma once

#include <ATen/core/ivalue.h>
#include <pybind11/pybind11.h>

#include <optional>

namespace torch::jit {

c10::IValue toIValue(pybind11::handle object, const c10::TypePtr& type, std::optional<int32_t> N);
pybind11::object toPyObject(c10::IValue value);

}  // namespace torch::jit
