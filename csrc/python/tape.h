// A list of operator calls that were made once and are made again without Python. Included by module.cpp alone:
// pybind11 and torch's dispatcher take a compiler as long as a file of kernels does.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "cpu/runtime/memory.h"
#include "ivalue.h"

namespace ddpm_fast {

namespace py = pybind11;
using c10::IValue;

// Calls f(tensor, element) for every tensor of a value: its place in a list, or -1 for the value itself.
template <typename F>
void for_each_tensor(const IValue& value, F f) {
  if (value.isTensor()) {
    f(value.toTensor(), -1);
  } else if (value.isList()) {
    const c10::List<IValue> list = value.toList();
    for (int64_t i = 0; i < static_cast<int64_t>(list.size()); ++i) {
      const IValue element = list.get(i);
      if (element.isTensor()) f(element.toTensor(), i);
    }
  }
}

class Tape {
 public:
  // One call, as a dispatch mode sees it: below autograd and autocast. Tensors that an earlier call returned are taken
  // from that call in a replay; all others, and every number, are held fast.
  void append(const std::string& name, const std::string& overload, const py::tuple& args, const py::dict& kwargs,
              py::handle returned) {
    Call call{c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str())};
    const c10::FunctionSchema& schema = call.op.schema();
    const auto& arguments = schema.arguments();
    std::vector<const c10::TensorImpl*> given;
    for (size_t i = 0; i < arguments.size(); ++i) {
      const c10::Argument& argument = arguments[i];
      IValue value;
      if (i < args.size()) {
        value = as_value(args[i], argument);
      } else if (kwargs.contains(argument.name())) {
        value = as_value(kwargs[argument.name().c_str()], argument);
      } else {
        TORCH_CHECK(argument.default_value().has_value(), schema.name(), ": ", argument.name(), " was not given");
        value = *argument.default_value();
      }
      for_each_tensor(value, [&](const at::Tensor& tensor, int64_t element) {
        given.push_back(tensor.unsafeGetTensorImpl());
        const auto known = produced_.find(tensor.unsafeGetTensorImpl());
        if (known != produced_.end()) call.inputs.push_back({static_cast<int64_t>(i), element, known->second.slot});
      });
      call.stack.push_back(std::move(value));
    }
    for (const TensorRef& input : call.inputs) {  // a map of the recording must not live on in the tape
      IValue& value = call.stack[input.argument];
      if (input.element < 0) {
        value = IValue(at::Tensor());
      } else {
        value = copy_of_list(value);
        value.toList().set(input.element, at::Tensor());
      }
    }

    const auto& returns = schema.returns();
    const auto holds_tensors = [](const c10::Argument& value) {
      return value.type()->isSubtypeOf(*c10::OptionalType::create(c10::TensorType::get())) ||
             value.type()->isSubtypeOf(*c10::ListType::ofTensors());
    };
    // An operator without tensors returns the same at every call.
    if (given.empty() && std::none_of(returns.begin(), returns.end(), holds_tensors)) return;
    TORCH_CHECK(returns.size() < 2 || py::len(returned) == returns.size(), schema.name(), " returned something else");
    for (size_t i = 0; i < returns.size(); ++i) {
      TORCH_CHECK(holds_tensors(returns[i]), schema.name(), " hands Python a value, which a replay would not look at");
      const py::object one =
          returns.size() == 1 ? py::reinterpret_borrow<py::object>(returned) : py::object(returned[py::int_(i)]);
      const IValue value = torch::jit::toIValue(one, returns[i].type(), std::nullopt);
      for_each_tensor(value, [&](const at::Tensor& tensor, int64_t element) {
        const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
        const bool is_new = tensor.defined() && produced_.count(impl) == 0 &&
                            std::find(given.begin(), given.end(), impl) == given.end();
        if (!is_new) return;
        call.results.push_back({static_cast<int64_t>(i), element, num_slots_});
        produced_.emplace(impl,
                          Produced{c10::weak_intrusive_ptr<c10::TensorImpl>(tensor.getIntrusivePtr()), num_slots_});
        ++num_slots_;
      });
    }
    calls_.push_back(std::move(call));
  }

  // End of recording. Each slot is freed after its last use.
  void finish() {
    produced_.clear();
    std::vector<size_t> last(num_slots_, 0);
    for (size_t i = 0; i < calls_.size(); ++i) {
      for (const TensorRef& input : calls_[i].inputs) last[input.slot] = i;
      for (const TensorRef& result : calls_[i].results) last[result.slot] = i;
    }
    for (int64_t slot = 0; slot < num_slots_; ++slot) calls_[last[slot]].frees.push_back(slot);
  }

  void replay() const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard below_autocast(c10::autocast_dispatch_keyset);
    std::vector<at::Tensor> slots(num_slots_);
    torch::jit::Stack stack;
    for (const Call& call : calls_) {
      stack = call.stack;
      for (const TensorRef& input : call.inputs) {
        IValue& value = stack[input.argument];
        if (input.element < 0) {
          value = slots[input.slot];
        } else {
          value = copy_of_list(value);
          value.toList().set(input.element, slots[input.slot]);
        }
      }
      call.op.callBoxed(stack);
      for (const TensorRef& result : call.results) {
        const IValue& value = stack[result.argument];
        slots[result.slot] = result.element < 0 ? value.toTensor() : value.toList().get(result.element).toTensor();
      }
      stack.clear();
      for (const int64_t slot : call.frees) slots[slot].reset();
    }
  }

  int64_t size() const { return static_cast<int64_t>(calls_.size()); }

 private:
  struct TensorRef {
    int64_t argument;  // or return value
    int64_t element;   // of a list, or -1
    int64_t slot;
  };
  struct Call {
    explicit Call(c10::OperatorHandle op) : op(std::move(op)) {}
    c10::OperatorHandle op;
    torch::jit::Stack stack;
    std::vector<TensorRef> inputs, results;
    std::vector<int64_t> frees;
  };
  // The weak reference keeps the address from being used for another tensor, and not the tensor's memory.
  struct Produced {
    c10::weak_intrusive_ptr<c10::TensorImpl> impl;
    int64_t slot;
  };

  static IValue as_value(py::handle given, const c10::Argument& argument) {
    PyObject* const object = given.ptr();
    const bool is_number = PyLong_Check(object) || PyFloat_Check(object) || PyComplex_Check(object);
    if (is_number && argument.type()->kind() == c10::TypeKind::TensorType) return number_as_tensor(given);
    return torch::jit::toIValue(given, argument.type(), argument.N());
  }

  // `x += 1` passes the number; torch calls the operator with a tensor that does not change the dtype of x.
  static at::Tensor number_as_tensor(py::handle given) {
    const c10::Scalar scalar = PyBool_Check(given.ptr())
                                   ? c10::Scalar(given.ptr() == Py_True)
                                   : torch::jit::toIValue(given, c10::NumberType::get(), std::nullopt).toScalar();
    const at::Tensor number = unpooled_tensor({}, scalar.type());
    switch (scalar.type()) {
      case at::kBool: *number.data_ptr<bool>() = scalar.toBool(); break;
      case at::kLong: *number.data_ptr<int64_t>() = scalar.toLong(); break;
      case at::kDouble: *number.data_ptr<double>() = scalar.toDouble(); break;
      case at::kComplexDouble: *number.data_ptr<c10::complex<double>>() = scalar.toComplexDouble(); break;
      default: TORCH_CHECK_TYPE(false, "a number of Python's is of type ", scalar.type());
    }
    number.unsafeGetTensorImpl()->set_wrapped_number(true);
    return number;
  }

  static IValue copy_of_list(const IValue& value) { return value.toList().copy(); }

  std::vector<Call> calls_;
  std::unordered_map<const c10::TensorImpl*, Produced> produced_;
  int64_t num_slots_ = 0;
};

inline void bind_tape(py::module_& m) {
  py::class_<Tape>(m, "Tape", "Operator calls that were made once and are made again without Python; see recording.py.")
      .def(py::init<>())
      .def("append", &Tape::append, "One more call: its operator, what it was given, and what it returned.")
      .def("finish", &Tape::finish, "No call follows.")
      .def("replay", &Tape::replay, py::call_guard<py::gil_scoped_release>(), "Make all calls again.")
      .def("__len__", &Tape::size);
}

}  // namespace ddpm_fast
