// Whether Python objects that a recording stands on have changed: what ddpm_fast/runtime/snapshot.py asks before every
// replay, of some ten thousand entries.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

namespace ddpm_fast {

// Entries of dictionaries and lists and types of objects, by identity; tensors by address and layout.
class __attribute__((visibility("hidden"))) Snapshot {
 public:
  Snapshot(const std::vector<pybind11::dict>& dicts, const std::vector<pybind11::list>& lists,
           const std::vector<pybind11::object>& objects, const std::vector<pybind11::object>& tensors)
      : dicts_(dicts), lists_(lists), objects_(objects), tensors_(tensors) {
    for (const auto& dict : dicts_) {
      dict_sizes_.push_back(PyDict_Size(dict.ptr()));
      for_each_value(dict, [this](PyObject* value) {
        entries_.push_back(pybind11::reinterpret_borrow<pybind11::object>(value));
        return true;
      });
    }
    for (const auto& list : lists_) {
      list_sizes_.push_back(PyList_GET_SIZE(list.ptr()));
      for (const auto& value : list) entries_.push_back(pybind11::reinterpret_borrow<pybind11::object>(value));
    }
    for (const auto& object : objects_) types_.push_back(pybind11::type::of(object));
    for (const auto& tensor : tensors_) facts_.push_back(Facts(THPVariable_Unpack(tensor.ptr())));
  }

  bool holds() const {
    size_t next = 0;
    for (size_t i = 0; i < dicts_.size(); ++i) {
      if (PyDict_Size(dicts_[i].ptr()) != dict_sizes_[i]) return false;
      const bool same = for_each_value(dicts_[i], [&](PyObject* value) { return value == entries_[next++].ptr(); });
      if (!same) return false;
    }
    for (size_t i = 0; i < lists_.size(); ++i) {
      PyObject* list = lists_[i].ptr();
      if (PyList_GET_SIZE(list) != list_sizes_[i]) return false;
      for (Py_ssize_t j = 0; j < list_sizes_[i]; ++j) {
        if (PyList_GET_ITEM(list, j) != entries_[next++].ptr()) return false;
      }
    }
    for (size_t i = 0; i < objects_.size(); ++i) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(objects_[i].ptr())) != types_[i].ptr()) return false;
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (!facts_[i].hold(THPVariable_Unpack(tensors_[i].ptr()))) return false;
    }
    return true;
  }

 private:
  struct Facts {
    explicit Facts(const at::Tensor& t)
        : data(address(t)),
          sizes(t.sizes().vec()),
          strides(t.strides().vec()),
          dtype(t.scalar_type()),
          requires_grad(t.requires_grad()) {}

    bool hold(const at::Tensor& t) const {
      return address(t) == data && t.sizes() == sizes && t.strides() == strides && t.scalar_type() == dtype &&
             t.requires_grad() == requires_grad;
    }

    // Of tensors without memory, too, such as torch's fake ones.
    static const void* address(const at::Tensor& t) {
      if (!t.has_storage()) return nullptr;
      const char* start =
          static_cast<const char*>(t.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get());
      return start + t.storage_offset() * t.element_size();
    }

    const void* data;
    std::vector<int64_t> sizes, strides;
    at::ScalarType dtype;
    bool requires_grad;
  };

  // Calls a function with the values of a dictionary until it returns false; true if it never does.
  template <class Function>
  static bool for_each_value(const pybind11::dict& dict, Function function) {
    PyObject* value = nullptr;
    Py_ssize_t position = 0;
    while (PyDict_Next(dict.ptr(), &position, nullptr, &value)) {
      if (!function(value)) return false;
    }
    return true;
  }

  std::vector<pybind11::dict> dicts_;
  std::vector<pybind11::list> lists_;
  std::vector<pybind11::object> objects_, tensors_, types_, entries_;
  std::vector<Py_ssize_t> dict_sizes_, list_sizes_;
  std::vector<Facts> facts_;
};

inline void bind_snapshot(pybind11::module_& m) {
  pybind11::class_<Snapshot>(m, "Snapshot", "See runtime/snapshot.py.")
      .def(pybind11::init<const std::vector<pybind11::dict>&, const std::vector<pybind11::list>&,
                          const std::vector<pybind11::object>&, const std::vector<pybind11::object>&>())
      .def("holds", &Snapshot::holds);
}

}  // namespace ddpm_fast
