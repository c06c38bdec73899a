// A list of operator calls that were made once and are made again without Python. Included by module.cpp alone:
// pybind11 and torch's dispatcher take a compiler as long as a file of kernels does.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add_ops.h>
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
  // from that call in a replay, also under another name, as autograd keeps outputs for backward. All others, and every
  // number, are held fast.
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
        const int64_t slot = find_slot(tensor, schema);
        if (slot >= 0) call.inputs.push_back({static_cast<int64_t>(i), element, slot});
      });
      call.stack.push_back(std::move(value));
    }
    // A map of the recording must not live on in the tape.
    set_inputs(call, call.stack, [](int64_t) { return at::Tensor(); });

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
        if (tensor.has_storage()) {
          Memory& memory = memory_of(tensor, false);
          if (!memory.is_held) memory.views.push_back({tensor, num_slots_});
        }
        ++num_slots_;
      });
    }
    calls_.push_back(std::move(call));
  }

  // End of recording. Each slot is freed after its last use.
  void finish() {
    produced_.clear();
    memories_.clear();
    std::vector<size_t> last(num_slots_, 0);
    for (size_t i = 0; i < calls_.size(); ++i) {
      for (const TensorRef& input : calls_[i].inputs) last[input.slot] = i;
      for (const TensorRef& result : calls_[i].results) last[result.slot] = i;
    }
    for (int64_t slot = 0; slot < num_slots_; ++slot) calls_[last[slot]].frees.push_back(slot);
    for (Call& call : calls_) {
      const c10::OperatorName& name = call.op.operator_name();
      call.is_sum = name.name == "aten::add" && name.overload_name == "Tensor" && call.results.size() == 1;
    }
  }

  void replay() const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard below_autocast(c10::autocast_dispatch_keyset);
    std::vector<at::Tensor> slots(num_slots_);
    torch::jit::Stack stack;
    for (const Call& call : calls_) {
      stack = call.stack;
      set_inputs(call, stack, [&](int64_t slot) -> const at::Tensor& { return slots[slot]; });
      if (!add_in_place(call, stack)) call.op.callBoxed(stack);
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
    bool is_sum = false;
  };
  // The weak reference keeps the address from being used for another tensor, and not the tensor's memory.
  struct Produced {
    c10::weak_intrusive_ptr<c10::TensorImpl> impl;
    int64_t slot;
  };

  // Where a tensor is in memory, and how it is laid out.
  struct View {
    View(const at::Tensor& tensor, int64_t slot)
        : sizes(tensor.sizes().vec()),
          strides(tensor.strides().vec()),
          offset(tensor.storage_offset()),
          type(tensor.scalar_type()),
          is_special(tensor.is_conj() || tensor.is_neg()),
          slot(slot) {}

    bool is(const View& other) const {
      return sizes == other.sizes && strides == other.strides && offset == other.offset && type == other.type &&
             is_special == other.is_special;
    }

    std::vector<int64_t> sizes, strides;
    int64_t offset;
    at::ScalarType type;
    bool is_special;
    int64_t slot;
  };
  // Of one storage: held fast, or made by a call that returned the first of these views.
  struct Memory {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    bool is_held;
    std::vector<View> views;
  };

  Memory& memory_of(const at::Tensor& tensor, bool is_held) {
    const c10::Storage& storage = tensor.storage();
    return memories_.try_emplace(storage.unsafeGetStorageImpl(), Memory{storage.getWeakStorageImpl(), is_held, {}})
        .first->second;
  }

  // The slot of a tensor, or -1 where it is held fast.
  int64_t find_slot(const at::Tensor& tensor, const c10::FunctionSchema& schema) {
    if (!tensor.defined()) return -1;
    const auto known = produced_.find(tensor.unsafeGetTensorImpl());
    if (known != produced_.end()) return known->second.slot;
    if (!tensor.has_storage()) return -1;
    const Memory& memory = memory_of(tensor, true);
    if (memory.is_held) return -1;
    const View wanted(tensor, -1);
    for (auto view = memory.views.rbegin(); view != memory.views.rend(); ++view) {
      if (view->is(wanted)) return view->slot;
    }
    TORCH_CHECK(false, schema.name(), " was given a view that no operator made, which a replay cannot make again");
  }

  // A sum in the memory of its first addend, where the call is the last to read that, as autograd adds gradients up.
  // While recording they have a second owner, so that autograd's sums take memory of their own.
  static bool add_in_place(const Call& call, torch::jit::Stack& stack) {
    if (!call.is_sum || call.inputs.empty() || call.inputs.front().argument != 0) return false;
    const int64_t slot = call.inputs.front().slot;
    if (std::find(call.frees.begin(), call.frees.end(), slot) == call.frees.end()) return false;
    at::Tensor& sum = stack[0].toTensor();
    const at::Tensor& other = stack[1].toTensor();
    // The slot and the stack hold the tensor; a view of it, or another tensor of its memory, would hold the storage.
    const bool is_last = sum.use_count() == 2 && sum.storage().use_count() == 1;
    if (!is_last || !sum.is_non_overlapping_and_dense() || sum.scalar_type() != other.scalar_type() ||
        sum.sizes() != other.sizes() || sum.strides() != other.strides()) {
      return false;
    }
    at::_ops::add__Tensor::call(sum, other, stack[2].toScalar());
    stack.resize(1);
    return true;
  }

  // Puts value(slot) into the inputs of a call; each list is copied once.
  template <typename Value>
  static void set_inputs(const Call& call, torch::jit::Stack& stack, const Value& value) {
    int64_t copied = -1;  // inputs are sorted by argument
    for (const TensorRef& input : call.inputs) {
      IValue& argument = stack[input.argument];
      if (input.element < 0) {
        argument = value(input.slot);
        continue;
      }
      if (input.argument != copied) argument = argument.toList().copy();
      copied = input.argument;
      argument.toList().set(input.element, value(input.slot));
    }
  }

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

  std::vector<Call> calls_;
  std::unordered_map<const c10::TensorImpl*, Produced> produced_;
  std::unordered_map<const c10::StorageImpl*, Memory> memories_;
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
