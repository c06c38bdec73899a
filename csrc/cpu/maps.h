// What the CPU's operators on channels-last maps share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <optional>

namespace ddpm_fast {

// A float32 map (B, C, H, W) whose memory is (B, H, W, C).
inline at::Tensor as_map(const at::Tensor& tensor) { return tensor.to(at::kFloat).contiguous(at::MemoryFormat::ChannelsLast); }

inline at::Tensor as_map(const at::Tensor& tensor, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  return as_map(tensor);
}

inline at::Tensor empty_map(at::IntArrayRef shape) {
  return at::empty(shape, at::TensorOptions(at::kFloat).memory_format(at::MemoryFormat::ChannelsLast));
}

// Contiguous float32 numbers of `count` elements in any shape.
inline at::Tensor as_floats(const at::Tensor& tensor, const char* name, int64_t count) {
  TORCH_CHECK_VALUE(tensor.numel() == count, name, " must have ", count, " elements, got shape ", tensor.sizes());
  return tensor.to(at::kFloat).contiguous();
}

inline at::Tensor as_floats(const std::optional<at::Tensor>& tensor, const char* name, int64_t count) {
  return tensor.has_value() ? as_floats(*tensor, name, count) : at::Tensor();
}

inline const float* floats_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

inline float* mutable_floats_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.data_ptr<float>() : nullptr;
}

}  // namespace ddpm_fast
