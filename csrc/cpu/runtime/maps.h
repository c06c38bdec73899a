// Feature maps (B, C, H, W) as the kernels read them: float32, the channels of a pixel side by side.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "memory.h"

namespace ddpm_fast {

inline void check_floating(const at::Tensor& tensor, const char* name) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, name,
                   " must be float32, float16 or bfloat16, got ", type);
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
}

inline void check_shape_of_map(const at::Tensor& x, const char* name) {
  check_floating(x, name);
  TORCH_CHECK_VALUE(x.dim() == 4, name, " must have shape (B, C, H, W), got ", x.sizes());
}

// A map in either layout.
inline void check_dense_map(const at::Tensor& x, const char* name) {
  check_shape_of_map(x, name);
  TORCH_CHECK_VALUE(x.is_contiguous() || x.is_contiguous(at::MemoryFormat::ChannelsLast), name,
                    " must be contiguous or channels-last, got strides ", x.strides());
}

// The map that others must fit.
inline void check_map(const at::Tensor& x, const char* name) {
  check_shape_of_map(x, name);
  TORCH_CHECK_VALUE(x.is_contiguous(at::MemoryFormat::ChannelsLast), name, " must be channels-last, got strides ",
                    x.strides());
}

inline void check_sizes(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes) {
  check_floating(tensor, name);
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " must have shape ", sizes, ", got ", tensor.sizes());
}

inline void check_elements(const at::Tensor& tensor, const char* name, int64_t elements) {
  check_floating(tensor, name);
  TORCH_CHECK_VALUE(tensor.numel() == elements, name, " must have ", elements, " elements, got ", tensor.numel());
}

inline at::Tensor float_map(const at::Tensor& map) {
  return as_type(map, at::kFloat).contiguous(at::MemoryFormat::ChannelsLast);
}

// A map that is read in place: channels-last, and not empty.
inline at::Tensor float_map(const at::Tensor& map, const char* name) {
  check_map(map, name);
  TORCH_CHECK_VALUE(map.numel() > 0, name, " must have elements, got shape ", map.sizes());
  return as_type(map, at::kFloat);
}

// Where a map is contiguous in both formats its outputs are contiguous.
inline at::MemoryFormat format_of(const at::Tensor& map) {
  return map.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}

inline at::Tensor float_vector(const at::Tensor& tensor) { return as_type(tensor, at::kFloat).contiguous(); }

// The same of any tensor of these sizes, in any layout.
inline at::Tensor float_map(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes) {
  check_sizes(tensor, name, sizes);
  return float_map(tensor);
}

// The same, of the batch and the positions of another map.
inline at::Tensor float_map_like(const at::Tensor& tensor, const char* name, const at::Tensor& other,
                                 int64_t channels) {
  return float_map(tensor, name, {other.size(0), channels, other.size(2), other.size(3)});
}

inline at::Tensor empty_float_map(at::IntArrayRef sizes) {
  return empty_tensor(sizes, at::kFloat, at::MemoryFormat::ChannelsLast);
}

// Float32 numbers side by side, of `elements` in any shape.
inline at::Tensor float_vector(const at::Tensor& tensor, const char* name, int64_t elements) {
  check_elements(tensor, name, elements);
  return float_vector(tensor);
}

inline at::Tensor float_vector(const std::optional<at::Tensor>& tensor, const char* name, int64_t elements) {
  return tensor.has_value() ? float_vector(*tensor, name, elements) : at::Tensor();
}

inline const float* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

inline float* mutable_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.data_ptr<float>() : nullptr;
}

}  // namespace ddpm_fast
