// The direct call of an operator that `Operator` declares (ddpm_fast/ops/operator.py), on the CPU. A norm of a map of
// 4×4 pixels takes 17 µs with checks, choice and call in Python, and 82 µs with its backward; from here 4 and 45 µs.
#include "native_operator.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <bit>
#include <optional>
#include <string>
#include <vector>

namespace ddpm_fast {

namespace {

namespace py = pybind11;
using at::Tensor;
using c10::IValue;
using c10::TypeKind;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

// One operator, as `Operator` describes it. An argument is named by its place.
struct NativeOperator {
  struct Argument {
    TypeKind kind;
    bool is_optional;
    std::string shape;  // see fits(); empty for an argument that only other calls have
  };

  std::string name;  // in errors
  c10::OperatorHandle forward;
  std::optional<c10::OperatorHandle> backward;
  std::vector<Argument> arguments;
  std::vector<int64_t> kept;     // tensors of backward: -1 is grad, and returns follow arguments
  std::vector<int64_t> options;  // other arguments of backward
  std::vector<std::vector<std::vector<int64_t>>> flags;  // arguments whose gradients each bool of each flag is for
  std::vector<int64_t> gradients, passes;
  bool contiguous_grad;
  py::object otherwise;  // the function in Python that takes every call

  int64_t count() const { return static_cast<int64_t>(arguments.size()); }
};

constexpr c10::DispatchKeySet kPlainTensor({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                            c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});

bool has_only(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

// Modes, traces and transforms of torch.func add keys to each call.
bool is_watched() {
  return at::impl::PythonTorchFunctionTLS::stack_len() > 0 ||
         !has_only(c10::impl::tls_local_dispatch_key_set().included_, c10::default_included_set);
}

// Reads one argument; false if the value is of another type, or the dispatcher would do more than find the CPU's
// kernel.
bool read(PyObject* value, const NativeOperator::Argument& argument, Stack& stack) {
  switch (argument.kind) {
    case TypeKind::TensorType:
      if (argument.is_optional && value == Py_None) return stack.emplace_back(), true;
      if (!THPVariable_CheckExact(value)) return false;
      stack.emplace_back(THPVariable_Unpack(value));
      return has_only(stack.back().toTensor().key_set(), kPlainTensor);
    case TypeKind::IntType: {
      int overflow = 0;
      if (!PyLong_CheckExact(value)) return false;
      stack.emplace_back(int64_t{PyLong_AsLongLongAndOverflow(value, &overflow)});
      return overflow == 0;
    }
    case TypeKind::FloatType:
      if (!PyFloat_CheckExact(value)) return false;
      stack.emplace_back(PyFloat_AS_DOUBLE(value));
      return true;
    case TypeKind::BoolType:
      if (!PyBool_Check(value)) return false;
      stack.emplace_back(value == Py_True);
      return true;
    default: return false;
  }
}

bool read_all(const NativeOperator& op, PyObject* const* values, Py_ssize_t count, Stack& stack) {
  if (count != op.count() || is_watched()) return false;
  stack.reserve(std::max(op.arguments.size(), size_t{16}));
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!read(values[i], op.arguments[i], stack)) return false;
  }
  return true;
}

// True if every tensor has the declared shape: a letter for each dimension, the same size wherever the letter stands,
// or '#' and a letter for so many elements in any shape. The first is dense, in either memory format.
bool fits(const NativeOperator& op, const Stack& arguments) {
  std::array<int64_t, 128> sizes;
  sizes.fill(-1);
  const auto is = [&](char letter, int64_t size) {
    int64_t& known = sizes[static_cast<unsigned char>(letter)];
    if (known < 0) known = size;
    return known == size;
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (op.arguments[i].kind != TypeKind::TensorType || arguments[i].isNone()) continue;
    const Tensor& tensor = arguments[i].toTensor();
    const std::string& shape = op.arguments[i].shape;
    const at::ScalarType type = tensor.scalar_type();
    if (type != at::kFloat && type != at::kHalf && type != at::kBFloat16) return false;
    if (shape.empty() || tensor.numel() == 0) return false;
    if (shape[0] == '#') {
      if (!is(shape[1], tensor.numel())) return false;
      continue;
    }
    if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
    for (size_t dim = 0; dim < shape.size(); ++dim) {
      if (!is(shape[dim], tensor.size(dim))) return false;
    }
    if (i == 0 && !tensor.is_contiguous() && !tensor.is_contiguous(at::MemoryFormat::ChannelsLast)) return false;
  }
  return true;
}

void run(const c10::OperatorHandle& op, Stack& stack) {
  const at::AutoDispatchBelowAutograd below_autograd;
  op.callBoxed(stack);
}

}  // namespace

// Autograd of every native operator, under this name in profiles. It holds its operator, the bits of the tensors that
// were given and the options as one list of numbers, so that compiled autograd can keep them.
class NativeGradient : public torch::autograd::Function<NativeGradient> {
 public:
  // Runs the operator, and returns its first output; `stack` takes all, without history.
  static Tensor forward(AutogradContext* context, at::TensorList given, const NativeOperator* op, Stack* stack) {
    uint64_t present = 0;
    for (size_t i = 0; i < stack->size(); ++i) present |= uint64_t{(*stack)[i].isTensor()} << i;
    c10::List<IValue> numbers(c10::AnyType::get());
    numbers.reserve(2 + op->options.size());
    numbers.push_back(static_cast<int64_t>(reinterpret_cast<intptr_t>(op)));
    numbers.push_back(static_cast<int64_t>(present));
    for (const int64_t option : op->options) numbers.push_back((*stack)[option]);
    context->saved_data.emplace("call", std::move(numbers));
    context->set_materialize_grads(false);
    run(op->forward, *stack);
    variable_list kept;
    kept.reserve(op->kept.size());
    for (const int64_t place : op->kept) {
      if (place < 0) continue;
      if (place >= op->count()) {
        kept.push_back((*stack)[place - op->count()].toTensor());
      } else {
        kept.push_back(has(present, place) ? given[rank(present, place)] : Tensor());
      }
    }
    context->save_for_backward(std::move(kept));
    return stack->front().toTensor();
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const c10::List<IValue> numbers = context->saved_data.at("call").toList();
    const auto* op = reinterpret_cast<const NativeOperator*>(static_cast<intptr_t>(numbers.get(0).toInt()));
    const auto present = static_cast<uint64_t>(numbers.get(1).toInt());
    TORCH_CHECK(!op->backward.has_value() || !at::GradMode::is_enabled(), op->name,
                ": the native kernel's gradient cannot be differentiated again (create_graph=True); use "
                "ddpm_fast.use_backend(\"reference\") for second derivatives");
    const auto needs = [&](int64_t place) {
      return has(present, place) && context->needs_input_grad(rank(present, place));
    };
    const auto needs_any = [&](const std::vector<int64_t>& places) {
      return std::any_of(places.begin(), places.end(), needs);
    };
    variable_list results(rank(present, op->count()) + 2);  // beside tensors, forward takes two pointers
    const Tensor& grad = grads[0];
    if (!grad.defined()) return results;
    const variable_list kept = context->get_saved_variables();  // once: a second time is an error under checkpoint
    for (const int64_t place : op->passes) {
      if (needs(place)) results[rank(present, place)] = grad;  // the engine casts it
    }
    if (!op->backward.has_value() || !needs_any(op->gradients)) return results;

    Stack stack;
    stack.reserve(std::max(op->kept.size() + op->options.size() + op->flags.size(), op->gradients.size()));
    size_t next = 0;
    for (const int64_t place : op->kept) {
      const Tensor& tensor = place < 0 ? grad : kept[next++];
      if (!tensor.defined()) {
        stack.emplace_back();
      } else {
        stack.emplace_back(place < 0 && op->contiguous_grad ? grad.contiguous() : tensor);
      }
    }
    for (size_t i = 0; i < op->options.size(); ++i) stack.push_back(numbers.get(2 + i));
    for (const auto& flag : op->flags) {
      const bool is_list = op->backward->schema().arguments()[stack.size()].type()->kind() == TypeKind::ListType;
      if (is_list) {
        c10::List<bool> list;
        for (const std::vector<int64_t>& places : flag) list.push_back(needs_any(places));
        stack.emplace_back(std::move(list));
      } else {
        stack.emplace_back(needs_any(flag.front()));
      }
    }
    run(*op->backward, stack);
    const bool is_list = stack.front().isTensorList();
    const std::vector<Tensor> made = is_list ? stack.front().toTensorVector() : std::vector<Tensor>();
    for (size_t i = 0; i < op->gradients.size(); ++i) {
      const int64_t place = op->gradients[i];
      if (needs(place)) results[rank(present, place)] = is_list ? made[i] : std::move(stack[i]).toTensor();
    }
    return results;
  }

 private:
  static bool has(uint64_t present, int64_t place) { return present >> place & 1; }

  // How many tensors stand before a place: autograd counts no other arguments.
  static int64_t rank(uint64_t present, int64_t place) { return std::popcount(present & ((uint64_t{1} << place) - 1)); }
};

namespace {

// Replaces the arguments by what the operator returns, with history where autograd wants it.
void call(const NativeOperator& op, Stack& stack) {
  const py::gil_scoped_release without_python;
  bool wants_gradients = false;
  for (const IValue& value : stack) wants_gradients |= value.isTensor() && value.toTensor().requires_grad();
  if (!wants_gradients || !at::GradMode::is_enabled()) return run(op.forward, stack);
  variable_list given;
  given.reserve(stack.size());
  for (const IValue& value : stack) {
    if (value.isTensor()) given.push_back(value.toTensor());
  }
  Tensor out = NativeGradient::apply(at::TensorList(given), &op, &stack);
  stack.front() = std::move(out);
}

const NativeOperator& operator_of(PyObject* capsule) {
  return *static_cast<const NativeOperator*>(PyCapsule_GetPointer(capsule, nullptr));
}

// What `Operator.native` is: all outputs.
PyObject* call_operator(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const NativeOperator& op = operator_of(self);
  Stack stack;
  if (!read_all(op, values, count, stack)) return PyObject_Vectorcall(op.otherwise.ptr(), values, count, nullptr);
  call(op, stack);
  if (stack.size() == 1) return THPVariable_Wrap(std::move(stack[0]).toTensor());
  py::tuple outputs(stack.size());
  for (size_t i = 0; i < stack.size(); ++i) {
    PyTuple_SET_ITEM(outputs.ptr(), i, THPVariable_Wrap(std::move(stack[i]).toTensor()));
  }
  return outputs.release().ptr();
  END_HANDLE_TH_ERRORS
}

// What `Operator.native_if_it_fits` is: the first output, or None where a call needs Python's checks.
PyObject* call_if_it_fits(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const NativeOperator& op = operator_of(self);
  Stack stack;
  if (!read_all(op, values, count, stack) || !fits(op, stack)) Py_RETURN_NONE;
  call(op, stack);
  return THPVariable_Wrap(std::move(stack[0]).toTensor());
  END_HANDLE_TH_ERRORS
}

PyObject* function_of(const char* name, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t),
                      const py::capsule& op) {
  auto* const method = new PyMethodDef{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
                                       METH_FASTCALL, nullptr};
  return PyCFunction_New(method, op.ptr());
}

c10::OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
}

py::tuple native_operator(const std::string& name, const std::vector<std::string>& shapes, bool has_backward,
                          const std::vector<int64_t>& kept, const std::vector<int64_t>& options,
                          const std::vector<std::vector<std::vector<int64_t>>>& flags,
                          const std::vector<int64_t>& gradients, const std::vector<int64_t>& passes,
                          bool contiguous_grad, const py::object& otherwise) {
  auto* const op = new NativeOperator{.name = name,
                                      .forward = find("ddpm_fast::native_" + name),
                                      .backward = std::nullopt,
                                      .arguments = {},
                                      .kept = kept,
                                      .options = options,
                                      .flags = flags,
                                      .gradients = gradients,
                                      .passes = passes,
                                      .contiguous_grad = contiguous_grad,
                                      .otherwise = otherwise};
  if (has_backward) op->backward = find("ddpm_fast::native_" + name + "_backward");
  const auto& arguments = op->forward.schema().arguments();
  TORCH_CHECK_VALUE(arguments.size() == shapes.size() && shapes.size() < 64, name, ": one shape per argument");
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto optional = arguments[i].type()->cast<c10::OptionalType>();
    const c10::TypePtr type = optional ? optional->getElementType() : arguments[i].type();
    op->arguments.push_back({type->kind(), optional != nullptr, shapes[i]});
  }
  const py::capsule capsule(op);  // never destroyed: graphs refer to it
  return py::make_tuple(py::reinterpret_steal<py::object>(function_of("call", &call_operator, capsule)),
                        py::reinterpret_steal<py::object>(function_of("call_if_it_fits", &call_if_it_fits, capsule)));
}

}  // namespace

void bind_native_operator(py::module_& m) {
  m.def("native_operator", &native_operator,
        "Functions that call an operator, and that call it if its arguments fit; see ops/operator.py.");
}

}  // namespace ddpm_fast
